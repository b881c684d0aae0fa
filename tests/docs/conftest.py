"""Blocks of code in the documentation, and the comments before them that say how they are tested."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(
    r"(?:<!-- test: (?P<kind>\w+) ?(?P<rest>[^\n]*?) ?-->\n\s*)?```(?P<language>\w*)\n(?P<text>.*?)\n *```", re.S
)
KINDS = ("run", "smoke", "slow", "skip", "file")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    document: Path
    line: int
    language: str
    text: str
    kind: str | None
    """One of KINDS, or None for a block without a comment."""
    rest: str
    """What follows the kind: arguments, a reason, the name of a file."""

    @property
    def where(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    return [
        Block(
            document=document,
            line=text.count("\n", 0, match.start()) + 1,
            language=match["language"],
            text=match["text"],
            kind=match["kind"],
            rest=match["rest"] or "",
        )
        for match in BLOCK.finditer(text)
    ]


@pytest.fixture(scope="session")
def documents() -> dict[Path, list[Block]]:
    """Every page of the documentation with its blocks."""
    return {document: blocks_of(document) for document in DOCUMENTS}
