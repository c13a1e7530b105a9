"""Progress bars of the command lines."""

import io

from rich.console import Console

from edje.progress import progress_bars, track


def test_a_bar_shows_its_title_and_count():
    file = io.StringIO()

    with progress_bars(Console(file=file, force_terminal=True, width=100)) as bars:
        bars.advance(bars.add_task("images", total=4), 3)

    assert "images" in file.getvalue()
    assert "3/4" in file.getvalue()


def test_a_disabled_bar_draws_nothing():
    file = io.StringIO()

    with progress_bars(Console(file=file, force_terminal=True), enabled=False) as bars:
        bars.advance(bars.add_task("images", total=4))

    assert file.getvalue() == ""


def test_tracked_items_are_yielded_and_nothing_goes_to_standard_output(capsys):
    assert list(track(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
    assert list(track(range(2), "numbers", enabled=False)) == [0, 1]
    assert capsys.readouterr().out == ""
