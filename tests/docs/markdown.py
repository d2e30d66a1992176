"""What the documents hold besides prose: code blocks, tables, links and headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.support import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FENCE = re.compile(r"^```(?P<language>\w*)\s*$")
_FILE = re.compile(r"^# (?P<name>\w+\.py)$")
_PRINTED = re.compile(r"^.*\bprint\(.*\)  # (?P<output>.+)$")
_SEPARATOR = re.compile(r"^[\s|:-]+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block of a document."""

    document: Path
    line: int
    language: str
    code: str

    @property
    def where(self) -> str:
        """The place of the block, for messages."""
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    @property
    def file_name(self) -> str | None:
        """The file that the block is, if its first line is a comment with a file's name."""
        first = _FILE.match(self.code.partition("\n")[0])
        return first["name"] if first else None

    @property
    def printed(self) -> list[str]:
        """What the block prints: the comments behind its `print` calls, in order."""
        return [found["output"] for found in map(_PRINTED.match, self.code.splitlines()) if found]

    @property
    def commands(self) -> list[str]:
        """The command lines of a shell block, without comments; a backslash continues a line."""
        joined = self.code.replace("\\\n", " ")
        lines = (re.sub(r"\s+#\s.*$", "", line).strip() for line in joined.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def documents() -> list[Path]:
    """List every document that users read."""
    top = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    return top + sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "examples").rglob("*.md"))


def blocks(document: Path) -> list[Block]:
    """Read the fenced blocks of a document, in order."""
    found: list[Block] = []
    language, start, lines = "", 0, list[str]()
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if start and fence:
            code = "\n".join(lines) + "\n"
            found.append(Block(document=document, line=start, language=language, code=code))
            start, lines = 0, []
        elif start:
            lines.append(line)
        elif fence:
            language, start = fence["language"], number
    assert not start, f"{document.name}:{start}: the block has no end"
    return found


def tables(document: Path) -> Iterator[list[list[str]]]:
    """Yield the tables of a document as rows of cells, the heading first, with the code marks taken away."""
    rows: list[list[str]] = []
    for line in [*_prose(document), ""]:
        if line.startswith("|"):
            if not _SEPARATOR.match(line):
                cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
                rows.append([cell.strip().replace("`", "").replace("\\|", "|") for cell in cells])
        elif rows:
            yield rows
            rows = []


def table(document: Path, *heading: str) -> list[list[str]]:
    """Return the rows of the one table that begins with these columns."""
    found = [rows[1:] for rows in tables(document) if rows[0][: len(heading)] == list(heading)]
    assert len(found) == 1, f"{document.name} has {len(found)} tables with the heading {heading}"
    return found[0]


def links(document: Path) -> list[str]:
    """List the targets of a document's links."""
    return re.findall(r"\]\(([^)\s]+)\)", "\n".join(_prose(document)))


def anchors(document: Path) -> set[str]:
    """List the anchors that a page on GitHub gives to the document's headings."""
    headings = [line.lstrip("#").strip() for line in _prose(document) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _prose(document: Path) -> list[str]:
    """Return the lines outside of fenced blocks."""
    lines, is_inside = [], False
    for line in document.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            is_inside = not is_inside
        elif not is_inside:
            lines.append(line)
    return lines
