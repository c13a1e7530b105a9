"""Shows the demo's rankings on the terminal: one table for each question, with the right candidate marked."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from demo_rankings import Figures, Ranked, Ranking

NUM_ROWS = 5


def ranking_table(ranking: Ranking, caveat: str | None) -> Table:
    """Return a table of the best after reranking, with their ranks before."""
    shows_images = ranking.question.image_id is None
    table = Table(
        "rank",
        "before",
        "image" if shows_images else "text",
        "score",
        *(() if ranking.question.right is None else ("",)),
        title=Text(f"{'images for the text' if shows_images else 'texts for the image'}: {ranking.question.text}"),
        caption=None if caveat is None else Text(caveat),
        title_justify="left",
        caption_justify="left",
    )
    for result in ranking.best_after(NUM_ROWS):
        table.add_row(*_row(ranking, result), style="bold" if ranking.is_right(result) else None)
    return table


def summary(figures: Figures, num_candidates: int, num_pictures: int) -> str:
    """Return the figures in one line."""
    return (
        f"Right image first, of {figures.num_questions} questions over {num_pictures} pictures: first stage "
        f"{figures.first_stage_r1:.1%}, its best {num_candidates} reranked {figures.reranked_r1:.1%}. Reranking put "
        f"{figures.num_lifted} right images first that were not."
    )


def about_the_texts(ranking: Ranking) -> str | None:
    """Return a sentence about the rank of the right text for an image, None if it is unknown."""
    if ranking.question.image_id is None or ranking.right is None:
        return None
    where = "first" if ranking.right.rank == 1 else f"only number {ranking.right.rank}"
    return f"Of {len(ranking.results)} texts made of the same words, the right one came {where} for its image."


def _row(ranking: Ranking, result: Ranked) -> list[str | Text]:
    row = [str(result.rank), str(result.rank_before), Text(result.option.caption), f"{result.relevance_score:.4f}"]
    if ranking.question.right is not None:
        row.append("<- right" if ranking.is_right(result) else "")
    return row
