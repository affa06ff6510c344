"""Gather what a run is trained on, with the tokenizer, the chat template and the base that it is rendered for.

`render_data` makes it from a configuration; `SavedText` renders it once more for a finished run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_sft.config import Config, SourceConfig
from qlora_sft.data.dedup import Removed
from qlora_sft.data.documents import Chain
from qlora_sft.data.judge import Finding, judge, tell_findings
from qlora_sft.data.plan import plan_data
from qlora_sft.data.prepare import Prepared, render_rows, render_sources
from qlora_sft.data.ratings import with_file_ratings
from qlora_sft.data.render import Rendered
from qlora_sft.data.sequences import Packed
from qlora_sft.data.sources import Source, read_sources
from qlora_sft.data.splits import RunSources, read_held_out, read_trained
from qlora_sft.data.template import ChatFormat, choose_chat_format
from qlora_sft.errors import RunError
from qlora_sft.faults import every_fault
from qlora_sft.model.backend import Backend
from qlora_sft.model.base_check import check_base, check_ids
from qlora_sft.model.base_files import hub_origin
from qlora_sft.model.base_tokenizer import read_tokenizer, saved_tokenizer
from qlora_sft.model.load import resolve_base, saved_stop_token_ids
from qlora_sft.model.loss import choose_loss
from qlora_sft.model.prefix_sharing import sharing_of
from qlora_sft.model.rating import with_ratings
from qlora_sft.model.remote_code import check_folder
from qlora_sft.model.run_base import described_base
from qlora_sft.model.tokenizer import end_turns, load_tokenizer, stop_token_ids
from qlora_sft.run.folder import Run, is_run, kept_day
from qlora_sft.say import Say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RunData:
    """Holds everything that a run begins with beside its model."""

    backend: Backend
    base: str
    """Folder of the base model."""
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer as the adapter will carry it."""
    chat_format: ChatFormat
    train: Prepared
    held_out: Prepared
    packed: Packed
    """Packed sequences in training order, with the documents as indices into `documents`."""
    removed: list[Removed]
    commit: str | None = None
    """Commit of the Hub that the base is of; None for a folder."""
    findings: list[Finding] = field(default_factory=list)
    """What is to be said of the training data."""

    @property
    def documents(self) -> Chain:
        """Returns the training documents of all sources, one after the other."""
        return self.train.all_documents

    @property
    def sequences(self) -> list[list[int]]:
        """Returns the documents of every packed sequence, in training order."""
        return self.packed.sequences


def checked_base(config: Config) -> str:
    """Returns the folder of the base.

    Raises `ConfigError` if the settings do not go with its config.json.
    """
    with every_fault(config):
        base = resolve_base(config.model.path, config.model.revision)
        check_base(config, base)
    choose_loss(config.model.loss, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return base


def render_data(
    config: Config, sources: RunSources, base: str, backend: Backend, say: Say, day: date | None = None
) -> RunData:
    """Renders and packs the rows of ``sources``, or takes them from the cache.

    day: what a template writes as today's date; default: today.

    Raises `ConfigError` or `DataError`.
    """
    tokenizer = load_tokenizer(config.model, base, say)
    chat = choose_chat_format(tokenizer, stop_token_ids(config.model, base, tokenizer), config.model.chat_template, day)
    say(f"chat template: {chat.reason}")
    config = with_file_ratings(config, sources.train, say)
    config = with_ratings(config, sources.train, tokenizer, chat, base, say)
    sharing = sharing_of(config, base, backend.name)
    train, held_out, packed = plan_data(config, sources.train, sources.held_out, tokenizer, chat, say, sharing)
    findings = judge(config, sources.train, train, packed)
    tell_findings(findings, say)
    check_ids([*train.documents.values(), *held_out.documents.values()], config.model, base, tokenizer)
    # Only now: a plain text ends in the base's own eos token.
    end_turns(tokenizer, config.model, base, say)
    origin = hub_origin(config.model.path, base)
    commit = origin.commit if origin else None
    return RunData(backend, base, tokenizer, chat, train, held_out, packed, sources.removed, commit, findings)


# ------------------------------------------------------------------ of a finished run


@dataclass(frozen=True)
class SavedText:
    """Says how a finished run, or a model folder, writes text."""

    tokenizer: PreTrainedTokenizerBase
    """The tokenizer as it was saved."""
    training_tokenizer: PreTrainedTokenizerBase
    """The same tokenizer with the eos token that it had while the training data was rendered."""
    stop_token_ids: frozenset[int]
    """Token ids at which the model stops."""
    template: str | None = None
    """The template that the configuration names in place of the tokenizer's own."""
    day: date | None = None
    """The date that the template wrote in training, if it writes one."""

    @property
    def chat_format(self) -> ChatFormat:
        """Returns the chat format of the training. Raises `DataError` if there is no chat template."""
        return choose_chat_format(self.training_tokenizer, self.stop_token_ids, self.template, self.day)

    def render(self, config: Config, sources: Sequence[SourceConfig]) -> Prepared:
        """Renders all rows of ``sources`` as training did. Raises `DataError`."""
        return self._rendered(config, read_sources(list(sources), config.seed))

    def held_out(self, config: Config) -> Prepared:
        """Renders all rows that the run held out, as it did. Raises `DataError`."""
        return self._rendered(config, read_held_out(config))

    def _rendered(self, config: Config, sources: list[Source]) -> Prepared:
        return render_sources(sources, config.data, self.training_tokenizer, self.chat_format)

    def documents(self, config: Config) -> Iterator[Rendered]:
        """Yields documents that were trained on, one of every source in turn, rendered as they are taken."""
        read = read_trained(config)
        each = (render_rows(source, config.data, self.training_tokenizer, self.chat_format) for source in read)
        return (document for group in zip_longest(*each) for document in group if document is not None)


def saved_text(path: Path) -> SavedText:
    """Returns how the run or the model in the folder ``path`` writes text."""
    if not is_run(path):
        check_folder(path)
        tokenizer = read_tokenizer(str(path))
        return SavedText(tokenizer, tokenizer, frozenset(saved_stop_token_ids(path, tokenizer)))
    run = Run.open(path)
    tokenizer = saved_tokenizer(run.adapter)
    own, stop_token_ids = _before_end_turns(tokenizer, run), frozenset(saved_stop_token_ids(path, tokenizer))
    return SavedText(tokenizer, own, stop_token_ids, run.model.chat_template, kept_day(path))


def _before_end_turns(tokenizer: PreTrainedTokenizerBase, run: Run) -> PreTrainedTokenizerBase:
    """Returns a copy of ``tokenizer`` with the eos token of the base, which `end_turns` may have replaced."""
    try:
        eos_token = saved_tokenizer(described_base(run)).eos_token
    except (OSError, ValueError, RunError):  # the base is gone; what was saved is the best there is
        return tokenizer
    own: Any = copy.deepcopy(tokenizer)
    own.eos_token = eos_token
    return own
