"""The table of waiting requests: replies find their callers, and no caller gets the answer to another request."""

import pytest

from workers.gateway.errors import ApiError
from workers.gateway.pending import PendingReplies


def pending(**options) -> PendingReplies[str]:
    return PendingReplies(**options)


def test_a_reply_takes_the_waiter_of_its_request_once():
    table = pending()
    assert table.join("r", b"x", lambda: "waiter", 0.0) == ("waiter", True)

    assert table.close("r", 1.0) == "waiter"
    assert table.close("r", 1.0) == "late"


def test_a_reply_without_a_request_is_unknown():
    assert pending().close("r", 0.0) == "unknown"


def test_a_reply_after_its_caller_has_left_is_late():
    table = pending()
    table.join("r", b"x", lambda: "waiter", 0.0)

    assert table.leave("r", 1.0)

    assert table.close("r", 2.0) == "late"
    assert len(table) == 0


def test_two_callers_with_the_same_request_share_a_waiter_until_both_have_left():
    table = pending()
    table.join("r", b"x", lambda: "first", 0.0)

    assert table.join("r", b"x", lambda: "second", 0.0) == ("first", False)
    assert not table.leave("r", 1.0)
    assert table.leave("r", 1.0)


@pytest.mark.parametrize("closed", [False, True])
def test_an_id_that_is_used_for_another_request_is_refused(closed):
    table = pending()
    table.join("r", b"x", lambda: "waiter", 0.0)
    if closed:
        table.close("r", 1.0)

    with pytest.raises(ApiError, match="use a new key") as caught:
        table.join("r", b"y", lambda: "other", 2.0)

    assert caught.value.status == 422


def test_the_same_request_can_be_sent_again():
    table = pending()
    table.join("r", b"x", lambda: "waiter", 0.0)
    table.leave("r", 1.0)

    assert table.join("r", b"x", lambda: "again", 2.0) == ("again", True)


def test_closed_requests_are_forgotten_after_a_while_and_beyond_a_number():
    table = pending(max_remembered=2, remembered_s=10.0)
    for name in "abc":
        table.join(name, b"x", lambda: "waiter", 0.0)
        table.leave(name, 0.0)

    assert table.close("a", 1.0) == "unknown"
    assert table.close("c", 1.0) == "late"
    table.join("d", b"x", lambda: "waiter", 11.0)
    assert table.close("c", 11.0) == "unknown"


def test_leaving_a_request_that_was_answered_changes_nothing():
    table = pending()
    table.join("r", b"x", lambda: "waiter", 0.0)
    table.close("r", 1.0)

    assert not table.leave("r", 1.0)
