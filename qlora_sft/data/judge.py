"""Judge from the rows' fate whether the training data is likely to teach what is meant.

An error is something that would train a wrong mask; a warning is something that is often a mistake but may be intended.
Each names the setting that accepts it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from qlora_sft.config import Config
from qlora_sft.config_data import SourceConfig, source_name
from qlora_sft.data.causes import Told, why_little, why_much
from qlora_sft.data.documents import sizes
from qlora_sft.data.ledger import FEW, SourceLedger
from qlora_sft.data.prepare import Prepared
from qlora_sft.data.sequences import Packed
from qlora_sft.data.sources import Source
from qlora_sft.errors import DataError
from qlora_sft.say import Say

LEAST, LITTLE, MOST = 0.05, 0.2, 0.95
"""Shares of supervised tokens in conversations: less than the first is an error; less than the second or more than the
last is a warning."""
_MANY_SHORT = 0.2
_SPREAD = 10
_FEW_STEPS = 10
"""A run with fewer optimizer steps has hardly left the warm-up when it ends."""
_LOOKED_AT = 1000
_SHORT = 256
"""No shorter ``data.max_length`` is proposed."""


@dataclass(frozen=True)
class Finding:
    """Holds one error or warning about the training data."""

    level: Literal["error", "warning"]
    kind: Literal["supervised share", "short answers", "answers without end", "duplicates", "steps", "few steps"]
    source: str | None
    """None if it is said of the whole run."""
    text: str


def judge(config: Config, sources: Sequence[Source], train: Prepared, packed: Packed) -> list[Finding]:
    """Returns what is found in the training data, the errors first."""
    found: list[Finding] = []
    for source in sources:
        ledger, key = train.ledger[source.name], _key(config, source.settings)
        found += _of_share(source, ledger, key)
        found += _of_answers(config, source.name, ledger)
        if ledger.also_in:
            found.append(_duplicates(source.name, ledger, len(train.documents[source.name])))
    of_each = sizes(train.all_documents)
    supervised = [sum(of_each.supervised[index] for index in each) for each in packed.sequences]
    found += _of_steps(config, supervised, packed.tokens)
    found += _of_few_steps(config, packed.tokens, max(of_each.tokens, default=0))
    return sorted(found, key=lambda finding: finding.level != "error")


def tell_findings(found: list[Finding], say: Say) -> None:
    """Prints the warnings. Raises one `DataError` with all errors if there are any."""
    errors = [finding.text for finding in found if finding.level == "error"]
    for finding in found:
        if finding.level == "warning":
            say(f"warning: {finding.text}")
    if errors:
        raise DataError("\n".join(errors))


def _key(config: Config, settings: SourceConfig) -> str:
    for number, each in enumerate(config.data.train):
        if source_name(each) == source_name(settings):
            return f"data.train.{number}"
    return "data.replay"


def _of_share(source: Source, ledger: SourceLedger, key: str) -> Iterator[Finding]:
    """Judges the share of supervised tokens of a source that has prompts.

    Plain text and ``supervise: all`` have no masked prompts. Reasoning is much longer than any question, so rows that
    have it are not judged for too large a share.
    """
    share = ledger.share_of_rows
    if ledger.whole or source.settings.allow_share:
        return
    much = share > MOST and 2 * ledger.thinking < ledger.kept
    if share >= LITTLE and not much:
        return
    of_all = f"{ledger.supervised_of_rows:,} of {ledger.tokens_of_rows:,} tokens ({share:.1%})"
    told = Told.of(islice(source.rows, _LOOKED_AT), source.settings.supervise)
    if much:
        what, why, look = "hardly anything is masked", why_much(told), "Look at it with `qlora-sft preview`. "
    else:
        what, why, look = "little is supervised", why_little(told), ""
    accept = f"{look}If it is meant so, set {key}.allow_share=true"
    text = f"{source.path}: {source.name}: {what}, {of_all}, likely because of {why}. {accept}"
    yield Finding("error" if share < LEAST else "warning", "supervised share", source.name, text)


def _of_answers(config: Config, name: str, ledger: SourceLedger) -> Iterator[Finding]:
    few = ledger.short_answers
    if config.data.min_answer_tokens is None and few and few >= _MANY_SHORT * ledger.answers:
        yield Finding(
            "warning", "short answers", name,
            f"{name}: {few:,} of {ledger.answers:,} answers have fewer than {FEW} tokens, which carry little signal. "
            f"Let the answers give reasons, set data.min_answer_tokens={FEW} to drop such rows, or 1 to accept them",
        )  # fmt: skip
    if cut := ledger.unended.rows:
        yield Finding(
            "warning", "answers without end", name,
            f"{name}: the last answer of {cut:,} of {ledger.kept:,} rows is cut, so the model learns answers that do "
            f"not end: {ledger.unended.shown}. Raise data.max_length (now {config.data.max_length:,}), or set "
            "data.overlong=drop or truncate_left_turns",
        )  # fmt: skip


def _duplicates(name: str, ledger: SourceLedger, documents: int) -> Finding:
    where = ", ".join(f"{count:,} in {other}" for other, count in ledger.also_in.items())
    text = (
        f"{name}: {sum(ledger.also_in.values()):,} of {documents:,} documents are in other sources as well ({where}), "
        "and so are trained on more often. Set data.deduplicate=exact; to repeat on purpose, use repeat of one source"
    )
    return Finding("warning", "duplicates", name, text)


def _of_steps(config: Config, supervised: list[int], tokens: list[int]) -> Iterator[Finding]:
    """Judges how evenly the supervised tokens are spread over the optimizer steps. supervised, tokens: of every
    sequence.

    Every step moves the weights about equally far, so a token counts more the fewer there are in its step. A tenth of
    the steps at either end is left out, and at least the smallest one, because the last sequence of an epoch is rarely
    full.
    """
    t = config.training
    size = t.batch_size * t.accumulated(tokens)
    steps = sorted(sum(supervised[start : start + size]) for start in range(0, len(supervised), size))
    tenth = len(steps) // 10
    steps = steps[max(1, tenth) : len(steps) - tenth]
    if len(steps) < 2 or steps[-1] < _SPREAD * steps[0]:
        return
    cures = ["data.packing=bfd"] if config.data.packing == "none" else []
    if t.tokens_per_step is None:
        cures.append(f"training.gradient_accumulation={4 * t.gradient_accumulation}")
    else:
        cures.append(f"training.tokens_per_step={4 * t.tokens_per_step}")
    yield Finding(
        "warning", "steps", None,
        f"the optimizer steps have from {steps[0]:,} to {steps[-1]:,} supervised tokens (a tenth of them at either end "
        f"left out), and all weigh the same. Steps are more even with {' or '.join(cures)}",
    )  # fmt: skip


def _of_few_steps(config: Config, tokens: list[int], longest: int) -> Iterator[Finding]:
    """Judges whether all epochs together have enough optimizer steps to learn anything, unless ``max_steps`` ends them.

    tokens: of every packed sequence. longest: tokens of the longest document.
    """
    t = config.training
    per_step = t.batch_size * t.accumulated(tokens)
    steps = math.ceil(len(tokens) / per_step)
    if not 0 < steps < _FEW_STEPS or (t.max_steps and t.max_steps <= steps):
        return
    cures = []
    if t.tokens_per_step is not None:
        cures.append(f"training.tokens_per_step={max(1, t.tokens_per_step * steps // _FEW_STEPS)}")
    elif t.gradient_accumulation > 1:
        cures.append("training.gradient_accumulation=1")
    shorter = max(_SHORT, 1 << (longest - 1).bit_length())
    if config.data.packing != "none" and 2 * shorter <= config.data.max_length:
        cures.append(f"data.max_length={shorter} (the longest document has {longest:,} tokens)")
    cures.append(f"training.epochs={math.ceil(t.epochs * _FEW_STEPS * per_step / len(tokens))}")
    count = "1 optimizer step" if steps == 1 else f"{steps} optimizer steps"
    yield Finding(
        "warning", "few steps", None,
        f"the whole run has {count}, in which hardly anything is learned. There are more with {' or '.join(cures)}; "
        "training.max_steps accepts them",
    )  # fmt: skip
