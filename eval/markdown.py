"""Tables in Markdown, and intervals as their cells."""

from collections.abc import Iterable


def table(header: Iterable[str], rows: Iterable[Iterable[str]], align: str | None = None) -> str:
    """Lines of a table, the last one ended too.

    `align` has a letter for each column, "l" for left or "r" for right; by default all but the first are to the right.
    """
    header = list(header)
    align = "l" + "r" * (len(header) - 1) if align is None else align
    rule = ["---:" if side == "r" else "---" for side in align]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (header, rule, *rows))


def interval(mean: float, low: float, high: float, form: str) -> str:
    """A number in the format `form`, with the ends of its interval in brackets."""
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"
