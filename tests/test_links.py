"""Links between the Markdown files of the project lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "docs", "kernels", "benchmarks")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).glob("*.md"))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a file."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(file: Path, text: str) -> list[str]:
    """The relative links of a file that name no file, or no heading of the file that they name."""
    faults = []
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (file.parent / name).resolve() if name else file
        if not other.exists() or (anchor and anchor not in anchors(other.read_text(encoding="utf-8"))):
            faults.append(target)
    return faults


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_relative_links_resolve(file: Path) -> None:
    assert broken(file, file.read_text(encoding="utf-8")) == []


def test_a_link_without_a_target_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text("# One `thing`, and more\n", encoding="utf-8")
    links = "[a](a.md) [b](#one-thing-and-more) [c](https://example.org/x) [d](b.md) [e](a.md#two)"
    assert broken(file, links) == ["b.md", "a.md#two"]


def test_every_decision_is_reached_from_the_architecture() -> None:
    decisions = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    architecture = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    areas = set(re.findall(r"^## (.+)$", decisions, flags=re.M))
    linked = set(re.findall(r"\[([^\]]+)\]\(docs/decisions\.md#", architecture))
    assert areas - linked <= {"The demo"}
    assert len(architecture.splitlines()) <= 120
