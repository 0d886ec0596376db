"""Tables in pages, between markers: <!-- WHAT:WHICH --> ... <!-- end -->."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path


def table(head: list[str], body: Iterable[list[str]], left: Collection[str] = ()) -> str:
    """Markdown; the first column and those named in ``left`` are text, the others numbers."""
    rule = ["---" if not column or name in left else "---:" for column, name in enumerate(head)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *body))


def fill(page: Path, make: Callable[[str, str], str], check: bool) -> bool:
    """Write what ``make(WHAT, WHICH)`` gives between the markers of a page; whether the page was as it should be."""
    text = page.read_text(encoding="utf-8")
    new = re.sub(
        r"(<!-- ([\w/-]+):(\w+) -->\n).*?(<!-- end -->)",
        lambda match: match[1] + make(match[2], match[3]) + match[4],
        text,
        flags=re.DOTALL,
    )
    if new != text and not check:
        page.write_text(new, encoding="utf-8")
    return new == text
