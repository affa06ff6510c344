"""A check that tests of pages share: a page is well-formed, stands alone, and runs nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link"}
TAGS = set(
    "html head meta title style body header nav section h1 h2 h3 p b i a ul li div span mark small sup figure "
    "figcaption svg path rect details summary table thead tbody tr th td dl dt dd pre".split()
)


class Checker(HTMLParser):
    """Follows the elements of a page and keeps what should not be there."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in TAGS:
            self.faults.append(f"<{tag}> at {self.getpos()}")
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name.startswith("on") or name in ("src", "srcset", "action", "formaction"):
                self.faults.append(f"{name} at {self.getpos()}")
            if name == "href" and not (value or "").startswith("#"):
                self.faults.append(f"href={value}")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")


def checked(page: str) -> Checker:
    """Asserts that a page is well-formed, refers to nothing outside it and runs nothing."""
    page.encode("utf-8")
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.faults == []
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert page.startswith("<!doctype html>")
    assert not re.search(r"@import|url\(|javascript:", page.split("</style>")[0])
    return checker
