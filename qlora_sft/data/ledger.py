"""Account for every row: kept, shortened, dropped for which reason, and how much of it is supervised. This is the
ledger."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from qlora_sft.data.coverage import describe_lost

# An answer of fewer tokens, the one that ends the turn aside, carries little signal.
FEW = 4


@dataclass
class Drop:
    """Counts rows with the same fate, and keeps the place (file:line) of the first three."""

    rows: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, places: list[str]) -> None:
        self.rows += len(places)
        self.first += places[: 3 - len(self.first)]

    @property
    def shown(self) -> str:
        return ", ".join(self.first) + (" ..." if self.rows > len(self.first) else "")


@dataclass
class Note(Drop):
    """Counts kept rows with one remarkable property, and how often it occurs in all of them."""

    times: int = 0


@dataclass
class SourceLedger:
    """Accounts for the rows of one source: ``read`` = ``not_drawn`` + rows of all ``dropped`` + ``kept``."""

    path: str
    files: list[str] = field(default_factory=list)
    read: int = 0
    not_drawn: int = 0
    """Rows left out by ``fraction`` or ``max_rows``."""
    dropped: dict[str, Drop] = field(default_factory=dict)
    kept: int = 0
    """Rows that are trained on, whole or shortened."""
    shortened: int = 0
    """Kept rows that were truncated, or split into several documents."""
    lost: dict[str, int] = field(default_factory=dict)
    """Characters that the vocabulary cannot represent, and how many of each the kept rows have."""
    lost_in: Drop = field(default_factory=Drop)
    """The kept rows that have such characters."""
    notes: dict[str, Note] = field(default_factory=dict)
    """Remarkable facts about kept rows that are not faults: unused keys, calls without results, ..."""
    tokens: int = 0
    supervised: int = 0
    p50: int = 0
    """Half of the kept rows have at most so many tokens; p95 and p99 likewise."""
    p95: int = 0
    p99: int = 0
    longest: int = 0
    repeated: int = 0
    """Tokens that rows of one document per turn have again and again: what a document begins with as the one before."""
    plain: int = 0
    """Tokens of plain texts, beside conversations."""
    plain_supervised: int = 0
    """Those of them that are supervised: all but the first of every document, which nothing predicts."""
    whole: bool = False
    """Whether all of it is supervised on purpose: plain text, or ``supervise: all``."""
    thinking: int = 0
    """Kept rows with reasoning."""
    answers: int = 0
    """Stretches of supervised tokens; none is counted where all of it is supervised on purpose."""
    short_answers: int = 0
    """Those of fewer than `FEW` tokens, the token that ends the turn aside."""
    unended: Drop = field(default_factory=Drop)
    """The kept rows whose last answer was cut, so that its end is not learned."""
    also_in: dict[str, int] = field(default_factory=dict)
    """Documents that earlier training sources have as well, by source."""

    @property
    def share(self) -> float:
        """Returns the share of tokens that are supervised."""
        return self.supervised / self.tokens if self.tokens else 0.0

    @property
    def share_of_rows(self) -> float:
        """Returns the share in conversations, with the earlier turns of every row counted once."""
        tokens = self.tokens_of_rows
        return self.supervised_of_rows / tokens if tokens else 0.0

    @property
    def supervised_of_rows(self) -> int:
        """Returns the supervised tokens of conversations."""
        return self.supervised - self.plain_supervised

    @property
    def tokens_of_rows(self) -> int:
        """Returns the tokens of conversations, with the earlier turns of every row counted once."""
        return self.tokens - self.repeated - self.plain

    def drop(self, reason: str, places: list[str]) -> None:
        self.dropped.setdefault(reason, Drop()).add(places)

    def note(self, notes: dict[str, int], place: str) -> None:
        """Notes remarkable facts about a kept row, and how often each occurs there."""
        for what, times in notes.items():
            note = self.notes.setdefault(what, Note())
            note.add([place])
            note.times += times

    def lose(self, lost: dict[str, int], place: str) -> None:
        """Notes the characters that a kept row loses, if any."""
        if lost:
            self.lost = dict(Counter(self.lost) + Counter(lost))
            self.lost_in.add([place])


def ledger_table(ledger: dict[str, SourceLedger]) -> str:
    """Returns the ledger as text: a line per source, and one per reason for which rows were dropped."""
    lines = [
        f"{'source':<16}{'read':>9}{'kept':>9}{'dropped':>9}{'tokens':>13}{'supervised':>20}"
        f"{'p50':>7}{'p95':>7}{'p99':>7}{'longest':>9}"
    ]
    for name, row in ledger.items():
        supervised = f"{row.supervised:,} ({row.share:.1%})"
        dropped = sum(drop.rows for drop in row.dropped.values())
        lines.append(
            f"{name:<16}{row.read:>9,}{row.kept:>9,}{dropped:>9,}{row.tokens:>13,}{supervised:>20}"
            f"{row.p50:>7,}{row.p95:>7,}{row.p99:>7,}{row.longest:>9,}"
        )
        if row.not_drawn:
            lines.append(f"  {name}: {row.not_drawn:,} rows not drawn (fraction, max_rows)")
        if row.shortened:
            lines.append(f"  {name}: {row.shortened:,} rows truncated or split to fit")
        for reason, drop in row.dropped.items():
            lines.append(f"  {name}: {drop.rows:,} dropped ({reason}): {drop.shown}")
        for what, note in row.notes.items():
            where = f", in {note.rows:,} rows" if note.times > note.rows else ""
            lines.append(f"  {name}: {note.times:,} {what}{where}: {note.shown}")
        if row.lost:
            lines.append(
                f"  {name}: {sum(row.lost.values()):,} characters are lost, because no token of this vocabulary spells "
                f"them: {describe_lost(row.lost)}; in {row.lost_in.rows:,} rows: {row.lost_in.shown}"
            )
    return "\n".join(lines)
