"""What is right in a checkout and in an editor, but not on the site."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")
ROLE = re.compile(r":(?:class|func|meth|mod):(<code>)~?")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave this folder lead nowhere on the site: they become plain text."""
    is_below = "/" in page.file.src_uri
    return markdown if is_below else OUTSIDE.sub(r"\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """The roles of docstrings are not shown."""
    return ROLE.sub(r"\1", html)
