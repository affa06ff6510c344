"""Compare ``columns:`` of a source with the columns that its rows have, because a mapping
without effect is a mistake."""

from __future__ import annotations

from difflib import get_close_matches

from qlora_sft.config_data import FORMS, SourceConfig
from qlora_sft.data.formats import RowForm

# Both names may hold both kinds of turns, so either of them may be mapped.
_TURNS = {"messages", "conversations"}


def wrong_columns(source: SourceConfig, forms: list[RowForm], seen: set[str]) -> list[str]:
    """Returns what is wrong with the mapping: columns that no row has, or that no form of the rows reads.

    seen: all columns of the rows.
    """
    read = {ours for form in forms for group in FORMS[form.name] for ours in group}
    read |= _TURNS if read & _TURNS else set()
    problems = []
    for ours, theirs in (source.columns or {}).items():
        if theirs not in seen:
            close = get_close_matches(theirs, seen, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"they have {', '.join(sorted(seen))}"
            problems.append(f"columns maps {ours} to {theirs!r}, which no row has ({hint})")
        elif forms and ours not in read:
            names = " and ".join(dict.fromkeys(form.name for form in forms))
            problems.append(
                f"columns maps {ours} to {theirs!r}, but the rows are {names}, which has no {ours}; set format: or "
                "remove it"
            )
    return [f"{source.path}: {problem}" for problem in problems]
