"""Rows of text as a table in a terminal or a paper."""

from __future__ import annotations


def as_text(lines: list[list[str]]) -> str:
    """Columns of equal width."""
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    cells = (
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in lines
    )
    return "\n".join("  ".join(row).rstrip() for row in cells)


def as_latex(lines: list[list[str]]) -> str:
    """A tabular environment."""
    escaped = [[c.translate({ord(x): "\\" + x for x in "%_&#$"}) for c in row] for row in lines]
    body = [" & ".join(row) + r" \\" for row in escaped]
    columns = "l" + "r" * (len(lines[0]) - 1)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", body[0], r"\hline", *body[1:], r"\end{tabular}", ""])
