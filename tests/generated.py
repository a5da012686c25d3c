"""Parts of the documentation that tests write: compared with what is committed, and written anew by `make docs`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
_FOREIGN = re.compile(r"\((?:\w*(?:Error|Exception|Interrupted)\b|\[Errno)[^)]*\)")
"""What other libraries say, which changes with their versions."""


def assert_documented(page: str, part: str, text: str) -> None:
    """`text` is what docs/`page` has between `<!-- part -->` and `<!-- end of part -->`, but for words of other libraries."""
    path = DOCS / page
    begin, end = f"<!-- {part} -->\n", f"<!-- end of {part} -->\n"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    found, _, after = rest.partition(end)
    assert rest, f"{path} has no {begin.strip()}"
    assert after or rest.endswith(end), f"{path} has no {end.strip()}"
    if os.environ.get("KDUNET_WRITE_DOCS"):
        path.write_text(before + begin + text + end + after, encoding="utf-8")
    else:
        assert _FOREIGN.sub("(...)", found) == _FOREIGN.sub("(...)", text), (
            f"run `make docs`, and look at {path} before a commit"
        )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
