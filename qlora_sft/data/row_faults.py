"""Collect what is wrong with the rows of a file, so that a fault that many rows have is told once."""

from __future__ import annotations

from dataclasses import dataclass

# After so many different faults, or so many faulty rows, the file as a whole is wrong, and reading on helps nobody.
MAX_PROBLEMS = 10
MAX_ROWS = 1000


@dataclass
class _Fault:
    first: str
    rows: int
    last: str


class RowFaults:
    """Counts the rows that have each fault, and says them with the first place of each."""

    def __init__(self) -> None:
        self._faults: dict[str, _Fault] = {}
        self._rows = 0

    def __bool__(self) -> bool:
        return bool(self._faults)

    @property
    def enough(self) -> bool:
        """Says whether more rows would tell nothing new."""
        return len(self._faults) == MAX_PROBLEMS or self._rows == MAX_ROWS

    def add(self, place: str, fault: str) -> None:
        """Counts one row, which stands at ``place`` (file:line)."""
        self._rows += 1
        known = self._faults.setdefault(fault, _Fault(place, 0, place))
        known.rows += 1
        known.last = place

    def lines(self, path: str) -> list[str]:
        """Returns a line for every fault, in the order of their first places, and one that says where it stopped.

        path: the file or the source, as the last line names it.
        """
        lines = [f"{fault.first}: {text}{_others(fault)}" for text, fault in self._faults.items()]
        if not self.enough:
            return lines
        count = f"{MAX_PROBLEMS} faults" if len(self._faults) == MAX_PROBLEMS else f"{MAX_ROWS:,} faulty rows"
        return [*lines, f"{path}: stopped after {count}"]


def _others(fault: _Fault) -> str:
    if fault.rows == 1:
        return ""
    return f" (the same in {fault.rows:,} rows, the last at {fault.last})"
