"""Trains a model, top to bottom: facts to resume by, model, evaluation before, fit, evaluation after, report.

Import this module only when the backend is chosen (`qlora_sft.prepare` does that): Unsloth patches what is imported
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from qlora_sft.config import Config
from qlora_sft.config_data import source_name
from qlora_sft.data.documents import Sizes, sizes
from qlora_sft.errors import Interrupted, RunError
from qlora_sft.evaluation.answers import choose_prompts
from qlora_sft.evaluation.around_training import evaluate_after, evaluate_before
from qlora_sft.evaluation.baseline import keep_baseline, question_digest
from qlora_sft.evaluation.evaluate import Evaluation
from qlora_sft.evaluation.evaluated_model import EvaluatedModel
from qlora_sft.json_types import JsonObject
from qlora_sft.model.attention_choice import AttentionChoice
from qlora_sft.model.attention_measured import settle_attention
from qlora_sft.model.base_folder import fetch_base, own_folder
from qlora_sft.model.ewc import ANCHORS, Anchors, load_anchors, measure_anchors
from qlora_sft.model.fingerprint import fingerprint
from qlora_sft.model.flash_switch import switch_flash
from qlora_sft.model.go_on import adapter_digest
from qlora_sft.model.load import compute_dtype, quantized_modules
from qlora_sft.model.lora_eva import begin_from_data
from qlora_sft.model.memory import use_memory
from qlora_sft.model.meta_model import read_settings
from qlora_sft.model.prefix_sharing import check_prefixes
from qlora_sft.model.setup import prepare_model
from qlora_sft.model.shards import shards_of
from qlora_sft.model.sixteen_bit import packed_as
from qlora_sft.model.snapshot import file_hashes
from qlora_sft.page.write import draw_report
from qlora_sft.run.manifest import describe_data, write_manifest
from qlora_sft.run.report import Choice, OrderReport, RunReport
from qlora_sft.run_data import RunData
from qlora_sft.say import Say
from qlora_sft.stopwatch import Stopwatch
from qlora_sft.training.asked import asking, questions_while_training
from qlora_sft.training.checkpoints import check_commit, check_same, data_digest
from qlora_sft.training.fit import Training, fit, train_along
from qlora_sft.training.join import join_ranks
from qlora_sft.training.report import pair, summary
from qlora_sft.training.run_folder import Beginning, begin_run, record_data, save_trained, write_samples
from qlora_sft.training.said import Said
from qlora_sft.training.schedule import schedule_of
from qlora_sft.training.steps import count_steps, deal, longest_dealt, settle_accumulation
from qlora_sft.training.trained_on import keep_trained_on

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_sft.model.base import CausalModel


def run_recipe(
    config: Config, run: Path, data: RunData, checkpoint: Path | None, watch: Stopwatch, say: Said
) -> RunReport | None:
    """Trains on ``data`` in the folder ``run``, from ``checkpoint`` if there is one, and returns the report.

    Of several processes the first one does so; the others train along and return None. Raises the errors of `train`.
    """
    ranks = join_ranks()
    with watch("base model"), ranks.first_ahead():
        fetch_same_base(run, data, checkpoint, say)
    with watch("data"):
        dtype, reason = compute_dtype(config.model.dtype)
        counted = sizes(data.documents)
        attention = how_to_attend(config, data, dtype, counted.tokens)
        beginning = begins_with(config, data, dtype, attention)
        check_beginning(run, beginning, checkpoint)
        questions = questions_while_training(config, data, say)
        settled = settled_steps(config, data, say)

    # ------------------------------------------------------------------ model
    with watch("load model"):
        say(f"compute in {beginning.dtype} ({reason})")
        tokens = longest_dealt(data.packed.tokens, deal(settled, ranks.size))
        model = model_of(config, data, dtype, tokens, attention, say)
        begin_by_data(config, model, data, checkpoint, dtype, say)
        memory = use_memory(model, config, tokens, dtype, say, data.packed.shares_prefixes)
        anchors = anchors_of(config, model, data, run if checkpoint else None, dtype, say)
    evaluated = EvaluatedModel(model, data.tokenizer, data.chat_format, dtype)
    training = Training(
        settled, run, say, model, data.tokenizer, dtype, data.documents, data.sequences, data.packed.shares_prefixes,
        data.held_out.documents, ask_tasks=asking(evaluated, questions, config.seed), anchors=anchors,
    )  # fmt: skip
    ranks.gather(None)  # by now none looks any more whether the run folder is free
    if not ranks.first:
        train_along(training, memory, checkpoint)
        return None
    prompts = choose_prompts(data.held_out.documents, config.evaluation.answers, config.seed)

    # ------------------------------------------------------------------ before, fit, after
    files = describe_files(data)
    with watch("evaluate before"), ranks.helped():
        asked = question_digest(config.evaluation, data.held_out.documents)
        before = evaluate_before(run if checkpoint else None, asked, evaluated, config, data.held_out, prompts, say)
    if checkpoint is None:
        begin_folder(run, config, beginning, anchors, before, asked)
    order = keep_records(run, settled, data, counted, say)
    training = replace(training, baseline=before.loss, baseline_seconds=watch.seconds["evaluate before"])
    with watch("train"), memory:
        fitted = fit(training, memory.keep_less, checkpoint)
    save_trained(model, data.tokenizer, run)
    say(f"adapter: {run / 'adapter'}")
    with watch("evaluate after"), ranks.helped():
        after = evaluate_after(evaluated, config, data.held_out, prompts, say)

    # ------------------------------------------------------------------ report
    report = RunReport(
        output=str(run),
        backend=Choice(*data.backend),
        base=config.model.path if data.commit else own_folder(data.base),
        base_sha256=beginning.base_sha256,
        base_commit=data.commit,
        base_files=files.base,
        base_dequantized=files.packed_as,
        data_sha256=beginning.data_sha256,
        dtype=beginning.dtype,
        attention=Choice(*attention),
        quantized_modules=quantized_modules(model),
        loss=pair(before.loss, after.loss),
        exact_match=pair(before.exact_match, after.exact_match),
        **{**vars(fitted), "warnings": [*fitted.warnings, *before.lacking, *after.lacking]},
        memory=memory.report,
        order=order,
        seconds=watch.rounded(),
    )
    finish(run, config, files.sources, report, before, after, say)
    return report


def fetch_same_base(run: Path, data: RunData, checkpoint: Path | None, say: Say) -> None:
    """Fetches the weights of the base. Raises `ConfigError` if the run goes on and began with another commit of it."""
    if checkpoint:
        check_commit(run, data.commit)
    fetch_base(data.base, say)


def check_beginning(run: Path, beginning: Beginning, checkpoint: Path | None) -> None:
    """Raises `ConfigError` if the run goes on and is not what it began with, and `RunError` if the processes that train
    together do not see the same data and base."""
    if checkpoint:
        check_same(run, beginning)
    facts = {"training data": beginning.data_sha256, "base model": beginning.base_sha256, "type": beginning.dtype}
    seen = join_ranks().gather(facts)
    if other := [(name, rank) for name in facts for rank, each in enumerate(seen) if each[name] != seen[0][name]]:
        name, rank = other[0]
        raise RunError(
            f"process {rank} has another {name} than process 0; all must read the same files, with the same versions "
            "of everything that is installed, on the same kind of device"
        )


def begin_folder(
    run: Path, config: Config, beginning: Beginning, anchors: Anchors | None, before: Evaluation, asked: str
) -> None:
    """Clears the folder for a new run and writes what it begins with. asked: the digest of its questions."""
    begin_run(run, config, beginning, anchors)
    if config.evaluation.before_training and not before.lacking:
        keep_baseline(run, before, asked)


def keep_records(run: Path, settled: Config, data: RunData, counted: Sizes, say: Said) -> OrderReport:
    """Writes what is said and what is trained on into the folder; returns the order of the packed sequences."""
    say.keep_in(run)
    keep_trained_on(run, settled, data, counted)
    return record_data(run, data.sequences, data.removed)


class FilesBefore(NamedTuple):
    """Describes the files of a run as they are before training, because by its end somebody may have edited or removed
    them."""

    sources: JsonObject
    """What `describe_data` says of the training data."""
    base: dict[str, str]
    """The sha256 of the base's files."""
    packed_as: str | None
    """The format of the base, if it was dequantised."""


def describe_files(data: RunData) -> FilesBefore:
    """Describes the files that a run is trained on."""
    return FilesBefore(describe_data(data.train.ledger), file_hashes(own_folder(data.base)), packed_as(data.base))


def finish(
    run: Path, config: Config, sources: JsonObject, report: RunReport, before: Evaluation, after: Evaluation, say: Say
) -> None:
    """Writes the manifest, with which the run is finished, and the answers, and prints the report.

    sources: of `FilesBefore`. Raises `Interrupted` if Ctrl-C ended the evaluation ``after`` training.
    """
    write_manifest(run / "manifest.json", config, sources, report)
    write_samples(run, before.records, after.records)
    say(summary(report, before, after, config.evaluation.show))
    if after.interrupted:
        draw_report(run, say)
        raise Interrupted(f"interrupted after the last step; the run {run} is complete, without what was not measured")


def settled_steps(config: Config, data: RunData, say: Say) -> Config:
    """Returns ``config`` with the accumulation that follows from the data.

    Raises `ConfigError` if the schedule does not fit the number of steps, or a step does not fit the number of
    processes.
    """
    settled, told = settle_accumulation(config, data.packed.tokens)
    if told:
        say(told)
    deal(settled, join_ranks().size)
    schedule_of(settled.training, count_steps(len(data.sequences), settled))
    return settled


def model_of(
    config: Config, data: RunData, dtype: torch.dtype, tokens: int, attention: AttentionChoice, say: Say
) -> PeftModel:
    """Returns the model, ready to be trained, which the processes of the run hold together if it is cut."""
    model = prepare_model(config, data.base, dtype, data.backend.name, tokens, say, attention)
    join_ranks().cut = shards_of(model)
    if data.packed.shares_prefixes:
        say(f"prefixes: {check_prefixes(model, dtype)}")
    return model


def begin_by_data(
    config: Config, model: CausalModel, data: RunData, checkpoint: Path | None, dtype: torch.dtype, say: Say
) -> None:
    """Initialises the adapters of ``model`` from the data, if that is configured and the run is not resumed."""
    if config.lora.init == "eva" and not checkpoint:
        say(f"adapter: {begin_from_data(model, data.documents, data.sequences, dtype, config.seed)}")


def anchors_of(
    config: Config, model: PeftModel, data: RunData, going_on: Path | None, dtype: torch.dtype, say: Say
) -> Anchors | None:
    """Returns what ``training.ewc`` keeps the weights near to: as it is measured now, or as the run ``going_on`` began
    with it; None without it. Of several processes the first one adds the penalty, so the others need nothing."""
    if config.training.ewc is None or config.data.replay is None:
        return None
    ranks = join_ranks()
    if not ranks.first:
        ranks.help_first()
        return None
    with ranks.helped():
        if going_on:
            return load_anchors(going_on / ANCHORS, model.device)
        replay = data.train.documents[source_name(config.data.replay)]
        anchors, told = measure_anchors(model, replay, dtype, config.seed)
    say(f"held near to what they are: {told}")
    return anchors


def how_to_attend(config: Config, data: RunData, dtype: torch.dtype, lengths: Sequence[int]) -> AttentionChoice:
    """Returns the way to attend inside documents of ``lengths`` tokens, measured if there are several.

    Each process measures for itself; all take what the first one finds.
    """
    own = _own_way(config, data, dtype, lengths)
    choice = join_ranks().gather(own)[0]
    if choice.way != own.way:
        switch_flash(choice.way)
    return choice


def _own_way(config: Config, data: RunData, dtype: torch.dtype, lengths: Sequence[int]) -> AttentionChoice:
    """Returns the way that this process finds, and switches torch to it."""
    switch_flash("varlen")  # torch's own kernels, whatever an earlier run of this process took
    if data.backend.name == "unsloth":
        return AttentionChoice("varlen", "as Unsloth does it")
    if data.packed.shares_prefixes and config.model.attention == "auto":
        return AttentionChoice("varlen", "rows share prefixes, which torch's own kernels compute part by part")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    understood = read_settings(config, data.base).get_text_config()
    return settle_attention(understood, config.model.attention, device, dtype, lengths)


def begins_with(config: Config, data: RunData, dtype: torch.dtype, attention: AttentionChoice) -> Beginning:
    """Returns what a run that goes on must find again."""
    return Beginning(
        data_sha256=data_digest(data.train.documents.values(), data.sequences),
        base_sha256=fingerprint(data.base),
        dtype=str(dtype).removeprefix("torch."),
        backend=data.backend.name,
        template_date=day.isoformat() if (day := data.chat_format.day) else None,
        base_commit=data.commit,
        attention=attention.way,
        shares_prefixes=data.packed.shares_prefixes,
        lora_from_sha256=adapter_digest(config.lora.from_),
        processes=join_ranks().size,
    )
