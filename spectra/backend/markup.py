"""The HTML with which objects show themselves in a notebook. Every text in it is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

PALE = "color:#666"
LEFT = "text-align:left"


def sentence(text: str, detail: str = "") -> str:
    """A text, with a paler detail after it.

    Args:
        text: The text, in plain letters.
        detail: What follows it.

    Returns:
        HTML.

    Example:
        >>> sentence("a < b")
        '<span>a &lt; b</span>'
    """
    pale = f' <span style="{PALE}">{escape(detail)}</span>' if detail else ""
    return f"<span>{escape(text)}{pale}</span>"


def paragraphs(lines: Sequence[str]) -> str:
    """Texts below each other, which wrap where the page is narrow.

    Args:
        lines: The texts, in plain letters.

    Returns:
        HTML.

    Example:
        >>> paragraphs(["a < b"])
        '<div style="white-space:normal;line-height:1.4"><div>a &lt; b</div></div>'
    """
    inner = "".join(f"<div>{escape(line)}</div>" for line in lines)
    return f'<div style="white-space:normal;line-height:1.4">{inner}</div>'


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, heading: str = "", notes: Sequence[str] = ()
) -> str:
    """A table of texts.

    Args:
        columns: The heading of each column.
        rows: The cells of each row, in plain letters.
        heading: What stands above the table.
        notes: Sentences below it.

    Returns:
        HTML.
    """
    above = "".join(f'<th style="{LEFT}">{escape(name)}</th>' for name in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="{LEFT}">{escape(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    before = f"<div>{escape(heading)}</div>" if heading else ""
    after = "".join(f'<div style="{PALE}">{escape(note)}</div>' for note in notes)
    return f"<div>{before}<table><thead><tr>{above}</tr></thead><tbody>{body}</tbody></table>{after}</div>"
