"""Hooks of MkDocs: what the repository's pages say of files that are not on the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)\)")
NOT_RUN = re.compile(r"^<!-- (?:not run|needs): .*?-->\n", re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Name files outside docs/ in place of linking to them, since the site does not hold them.

    Args:
        markdown: The page.
        page: Where it stands.
        config: Unused.
        files: Unused.

    Returns:
        The page, without the remarks that are for the tests.

    Raises:
        ValueError: A link leads to no file.
    """
    folder = Path(page.file.abs_src_path).parent
    root = Path(config["docs_dir"]).parent

    def named(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if not target.exists():
            raise ValueError(f"{page.file.src_path} links to {link[2]}, which is not there")
        path = target.relative_to(root.resolve()).as_posix()
        return link[1] if path in link[1] else f"{link[1]} (`{path}` in the repository)"

    return NOT_RUN.sub("", OUTSIDE.sub(named, markdown))
