"""Fine-tune a 4-bit model with LoRA: config -> data -> model -> fit -> report.

Run as::

    python -m qlora_sft.train CONFIG [key.sub=value ...]      CONFIG: a YAML file or a shipped recipe's name

or from Python::

    from qlora_sft import load_config, train
    report = train(load_config("recipe.yaml", ["training.learning_rate=1e-4"]))
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_sft.config import Config, dump_config
from qlora_sft.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    import torch

    from qlora_sft.data.dedup import Removed
    from qlora_sft.data.prepare import Prepared
    from qlora_sft.data.sources import Source
    from qlora_sft.evaluation.answers import Prompt
    from qlora_sft.model.backend import Name

Say = Callable[[str], None]
# What a finished or interrupted run leaves behind; --overwrite removes these and nothing else.
RUN_FILES = (
    "config.yaml manifest.json order.json removed.jsonl metrics.jsonl samples.jsonl adapter checkpoints merged gguf "
    "export.json"
).split()


def train(config: Config, *, overwrite: bool = False, say: Say | None = None) -> dict[str, Any]:
    """Trains as configured and returns the report, which ``manifest.json`` in the run folder holds as well.

    Raises `ConfigError` or `DataError` before anything is trained, `RunError` when the run fails, and
    `Interrupted` after Ctrl-C, with the adapter saved as it was.
    """
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    watch = Stopwatch()
    run = claim_run_folder(config, overwrite)

    # ------------------------------------------------------------------ data, as far as it goes without a model
    with watch("data"):
        # Needs no torch, so a bad file is reported at once.
        train_sources, held_out_sources, removed = read_data(config, say)

    # ------------------------------------------------------------------ tokenizer, labels, packing
    with watch("imports"):
        # First of all heavy imports: Unsloth patches trl, transformers and peft while it is imported.
        from qlora_sft.model.backend import choose_backend

        backend = choose_backend(config.model.backend)
        say(f"backend: {backend.name} ({backend.reason})")
        from qlora_sft.data.plan import plan_data
        from qlora_sft.data.template import chat_format
        from qlora_sft.model.load import compute_dtype, load_tokenizer, quantized_modules, resolve_base, stop_ids
    with watch("base model"):
        base = resolve_base(config.model.path)
    with watch("data"):
        tokenizer = load_tokenizer(config.model, base)
        style = chat_format(tokenizer, stop_ids(config.model, base, tokenizer))
        say(f"chat template: {style.reason}")
        prepared, held_out, bins = plan_data(config, train_sources, held_out_sources, tokenizer, style, say)
        documents = prepared.all_documents

    # ------------------------------------------------------------------ model
    with watch("load model"):
        dtype, reason = compute_dtype(config.model.dtype)
        say(f"compute in {str(dtype).removeprefix('torch.')} ({reason})")
        model = prepare_model(config, base, dtype, backend.name, say)
    from qlora_sft.evaluation.answers import choose_prompts

    prompts = choose_prompts(held_out.documents, config.evaluation.answers, config.seed)

    # ------------------------------------------------------------------ before, fit, after
    with watch("evaluate before"):
        before = evaluate(model, tokenizer, config, held_out, prompts, style.stops, dtype, say, "before training")
    begin_run(run, config)
    order = record_data(run, bins, removed)
    with watch("train"):
        fitted = fit(model, tokenizer, config, documents, bins, dtype, run, say)
    save_adapter(model, tokenizer, run / "adapter")
    say(f"adapter: {run / 'adapter'}")
    with watch("evaluate after"):
        after = evaluate(model, tokenizer, config, held_out, prompts, style.stops, dtype, say, "after training")

    # ------------------------------------------------------------------ report
    report = {
        "output": str(run),
        "backend": backend._asdict(),
        "base": base,
        "quantized_modules": quantized_modules(model),
        "loss": pair(before.loss, after.loss),
        "exact_match": pair(before.exact_match, after.exact_match),
        **fitted,
        "order": order,
        "seconds": watch.rounded(),
    }
    write_report(run, config, report, prepared, before, after)
    say(summary(report, before, after, config.evaluation.show))
    return report


class Stopwatch:
    """Seconds per stage; a stage may be entered more than once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str):  # type: ignore[no-untyped-def]
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def rounded(self) -> dict[str, float]:
        return {stage: round(seconds, 1) for stage, seconds in self.seconds.items()}


@dataclass
class Evaluation:
    """Held-out results at one moment: source -> loss, source -> exact match, and one record per answer."""

    loss: dict[str, float] = field(default_factory=dict)
    exact_match: dict[str, float] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)


def claim_run_folder(config: Config, overwrite: bool) -> Path:
    """The run folder. Refuses to write over an earlier run unless told to."""
    run = Path(config.output).expanduser()
    if run.exists() and not run.is_dir():
        raise ConfigError(f"output: {run} is a file; name a folder")
    earlier = [name for name in RUN_FILES if (run / name).exists()]
    if earlier and not overwrite:
        raise ConfigError(
            f"output: {run} holds an earlier run ({', '.join(earlier)}); choose another output=... or add --overwrite"
        )
    return run


def begin_run(run: Path, config: Config) -> None:
    """Only now, with everything checked, does an earlier run that may be overwritten go."""
    for name in RUN_FILES:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")


def read_data(config: Config, say: Say) -> tuple[list[Source], list[Source], list[Removed]]:
    """Training sources (replay last) without duplicates and contaminated rows, held-out sources, what was removed.

    Needs no torch, so a bad file is reported at once.
    """
    from qlora_sft.data.sources import read_sources

    data = config.data
    trained = [*data.train, *([data.replay] if data.replay else [])]
    sources = read_sources([*trained, *data.held_out], config.seed, say)
    train_sources, held_out_sources = sources[: len(trained)], sources[len(trained) :]
    removed: list[Removed] = []
    if data.decontaminate or data.deduplicate != "none":
        from qlora_sft.data.dedup import clean_sources

        train_sources, removed = clean_sources(train_sources, data, say)
    return train_sources, held_out_sources, removed


def record_data(run: Path, bins: list[list[int]], removed: list[Removed]) -> dict[str, Any]:
    """Writes the order of the run (``order.json``) and the removed rows (``removed.jsonl``); returns what the manifest
    says of them, so that a run that is resumed can prove to go on in the same order."""
    import json

    from qlora_sft.atomic import written_file
    from qlora_sft.data.mixture import order_digest

    record = {"sha256": order_digest(bins), "rows": len(bins)}
    with written_file(run / "order.json") as beside:
        beside.write_text(json.dumps({**record, "bins": bins}) + "\n", encoding="utf-8")
    if removed:
        from qlora_sft.data.dedup import removed_lines

        with written_file(run / "removed.jsonl") as beside:
            beside.write_text(removed_lines(removed), encoding="utf-8")
    return {**record, "removed": len(removed)}


def prepare_model(config: Config, base: str, dtype: torch.dtype, backend: Name, say: Say) -> Any:
    """NF4 base with LoRA, attending inside documents only."""
    from qlora_sft.model.attention import use_document_attention
    from qlora_sft.model.load import load_model
    from qlora_sft.model.loss import use_loss

    model = load_model(config, base, dtype, backend)
    use_document_attention(model)
    say(f"loss: {use_loss(model, config.model.loss)}")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"model: {base}, LoRA rank {config.lora.r}, {trainable:,} trainable parameters")
    return model


def evaluate(
    model: Any,
    tokenizer: Any,
    config: Config,
    held_out: Prepared,
    prompts: list[Prompt],
    stops: frozenset[int],
    dtype: torch.dtype,
    say: Say,
    when: str,
) -> Evaluation:
    from qlora_sft.evaluation.answers import exact_match, greedy_answers, judge
    from qlora_sft.evaluation.held_out import held_out_loss

    result = Evaluation()
    if config.evaluation.loss and held_out.documents:
        result.loss = held_out_loss(model, held_out.documents, config.data.max_length, dtype)
        say(f"held-out loss {when}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in result.loss.items()))
    if prompts:
        answers = greedy_answers(model, tokenizer, prompts, config.evaluation.max_new_tokens, dtype, stops)
        result.records = judge(prompts, answers, tokenizer, stops)
        result.exact_match = exact_match(result.records)
        say(f"exact match {when}: " + ", ".join(f"{name} {share:.0%}" for name, share in result.exact_match.items()))
    return result


def fit(
    model: Any,
    tokenizer: Any,
    config: Config,
    documents: list[Any],
    bins: list[list[int]],
    dtype: torch.dtype,
    run: Path,
    say: Say,
) -> dict[str, Any]:
    """The training itself. Returns steps, losses and speed."""
    from qlora_sft.training.progress import Progress
    from qlora_sft.training.trainer import PackedSFTTrainer, count_steps, sft_config

    steps = count_steps(len(bins), config)
    # TRL wants a folder; what it leaves there is nobody's result.
    with tempfile.TemporaryDirectory(prefix="qlora_sft-") as scratch:
        args, optimizer = sft_config(config, Path(scratch), steps, dtype)
        t = config.training
        say(f"optimizer: {optimizer}; {steps} steps of {t.batch_size} x {t.gradient_accumulation} rows")
        progress = Progress(run / "metrics.jsonl", steps)
        trainer = PackedSFTTrainer(
            model, config, documents, bins, args=args, processing_class=tokenizer, callbacks=[progress]
        )
        progress.trainer = trainer
        try:
            trainer.train()
        except KeyboardInterrupt:
            step = trainer.state.global_step
            checkpoint = run / "checkpoints" / f"step-{step:06d}"
            save_adapter(model, tokenizer, checkpoint)
            raise Interrupted(f"interrupted after step {step}; the adapter is in {checkpoint}") from None
        finally:
            progress.close()
    return {
        "steps": len(progress.losses),
        "train_loss": {"first": progress.losses[0], "last": progress.losses[-1]},
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised,
        "tokens_per_second": round(progress.tokens / progress.seconds, 1),
        "optimizer": optimizer,
    }


def save_adapter(model: Any, tokenizer: Any, folder: Path) -> None:
    """A PEFT adapter that plain peft loads, with the tokenizer and the chat template it was trained with."""
    from qlora_sft.atomic import written_folder

    with written_folder(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def pair(before: dict[str, float], after: dict[str, float]) -> dict[str, dict[str, float]]:
    return {source: {"before": before[source], "after": after[source]} for source in after}


def write_report(
    run: Path, config: Config, report: dict[str, Any], prepared: Prepared, before: Evaluation, after: Evaluation
) -> None:
    import json

    from qlora_sft.atomic import written_file
    from qlora_sft.training.manifest import describe_data, write_manifest

    write_manifest(run / "manifest.json", config, data=describe_data(prepared.ledger), report=report)
    with written_file(run / "samples.jsonl") as beside:
        rows = [{**new, "before": old["answer"]} for old, new in zip(before.records, after.records, strict=True)]
        beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def summary(report: dict[str, Any], before: Evaluation, after: Evaluation, show: int) -> str:
    """The report as text: some answers before and after (of every source in turn), then the table."""
    lines = []
    pairs = list(zip(before.records, after.records, strict=True))
    by_source = [[p for p in pairs if p[1]["source"] == source] for source in after.exact_match]
    in_turn = [p for group in zip_longest(*by_source) for p in group if p is not None]
    for old, new in in_turn[:show]:
        lines += [f"[{new['source']}] wanted: {new['reference']!r}"]
        lines += [f"  before: {old['answer']!r}", f"  after:  {new['answer']!r}"]
    if report["loss"] or report["exact_match"]:
        lines.append(f"{'source':<16}{'held-out loss':>24}{'exact match':>22}")
    for source in report["loss"] or report["exact_match"]:
        loss, match = report["loss"].get(source), report["exact_match"].get(source)
        losses = f"{loss['before']:.3f} -> {loss['after']:.3f}" if loss else "not measured"
        matches = f"{match['before']:.0%} -> {match['after']:.0%}" if match else "not measured"
        lines.append(f"{source:<16}{losses:>24}{matches:>22}")
    first, last = report["train_loss"]["first"], report["train_loss"]["last"]
    lines.append(
        f"{report['steps']} steps, {report['tokens']:,} tokens ({report['supervised_tokens']:,} supervised), "
        f"{report['tokens_per_second']:.0f} tokens/s, loss {first:.3f} -> {last:.3f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    from qlora_sft.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
