"""Fine-tune a 4-bit model with LoRA: config -> data -> model -> fit -> report.

Run as::

    python -m qlora_sft.train CONFIG [key.sub=value ...]      CONFIG: a YAML file or a shipped recipe's name

or from Python::

    from qlora_sft import load_config, train
    report = train(load_config("recipe.yaml", ["training.learning_rate=1e-4"]))
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_sft.config import Config
from qlora_sft.data.splits import read_data
from qlora_sft.errors import Interrupted, RunError
from qlora_sft.faults import every_fault
from qlora_sft.manifest import describe_data, write_manifest
from qlora_sft.say import Say, tell
from qlora_sft.training.checkpoints import (
    check_same,
    clear_unfinished,
    data_digest,
    find_checkpoint,
    step_of,
    what_is_left,
)
from qlora_sft.training.run_folder import (
    begin_run,
    claim_run_folder,
    kept_day,
    record_data,
    save_adapter,
    write_samples,
)
from qlora_sft.training.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from qlora_sft.data.render import Rendered
    from qlora_sft.model.backend import Name


def train(config: Config, *, overwrite: bool = False, resume: bool = False, say: Say = tell) -> dict[str, Any]:
    """Trains as configured and returns the report, which ``manifest.json`` in the run folder holds as well.

    resume: goes on from the newest checkpoint in the run folder, if there is one, to the very result of a run that was
    not interrupted. Raises `ConfigError` or `DataError` before anything is trained, `RunError` when the run fails, and
    `Interrupted` after Ctrl-C, with a checkpoint of the step that was running.
    """
    watch = Stopwatch()
    with every_fault(config):
        run = claim_run_folder(config, overwrite, resume)
        checkpoint = find_checkpoint(run, config, say) if resume else None

    # ------------------------------------------------------------------ data, as far as it goes without a model
    with watch("data"), every_fault(config):
        # Needs no torch, so a bad file is reported at once.
        train_sources, held_out_sources, removed = read_data(config, say)

    # ------------------------------------------------------------------ tokenizer, labels, packing
    with watch("imports"):
        # First of all heavy imports: Unsloth patches trl, transformers and peft while it is imported.
        from qlora_sft.model.backend import choose_backend

        backend = choose_backend(config.model.backend)
        say(f"backend: {backend.name} ({backend.reason})")
        from qlora_sft.data.batch import longest_row
        from qlora_sft.data.documents import sizes
        from qlora_sft.data.plan import plan_data
        from qlora_sft.data.template import chat_format
        from qlora_sft.evaluation.answers import choose_prompts
        from qlora_sft.evaluation.before import keep_before, kept_before, question_digest
        from qlora_sft.evaluation.evaluate import evaluate
        from qlora_sft.model.base_check import check_base
        from qlora_sft.model.fingerprint import fingerprint
        from qlora_sft.model.load import compute_dtype, quantized_modules, resolve_base
        from qlora_sft.model.memory import use_memory
        from qlora_sft.model.tokenizer import end_turns, load_tokenizer, stop_ids
        from qlora_sft.training.report import pair, summary
    with watch("base model"):
        base = resolve_base(config.model.path)
        check_base(config, base)
    with watch("data"):
        tokenizer = load_tokenizer(config.model, base, say)
        # A run that goes on writes the date that it began with.
        day = kept_day(run) if checkpoint else None
        style = chat_format(tokenizer, stop_ids(config.model, base, tokenizer), config.model.chat_template, day)
        say(f"chat template: {style.reason}")
        prepared, held_out, bins = plan_data(config, train_sources, held_out_sources, tokenizer, style, say)
        documents = prepared.all_documents
        end_turns(tokenizer, config.model, base, say)
        dtype, reason = compute_dtype(config.model.dtype)
        facts = {
            "data_sha256": data_digest(prepared.documents.values(), bins),
            "base_sha256": fingerprint(base),
            "dtype": str(dtype).removeprefix("torch."),
            "backend": backend.name,
            "template_date": style.day.isoformat() if style.day else None,
        }
        if checkpoint:
            check_same(run, facts)

    # ------------------------------------------------------------------ model
    with watch("load model"):
        say(f"compute in {facts['dtype']} ({reason})")
        tokens = longest_row(sizes(documents).tokens, bins, config.training.batch_size)
        model = prepare_model(config, base, dtype, backend.name, tokens, say)
        memory = use_memory(model, config, tokens, dtype, say)
    prompts = choose_prompts(held_out.documents, config.evaluation.answers, config.seed)

    # ------------------------------------------------------------------ before, fit, after
    with watch("evaluate before"):
        asked = question_digest(config.evaluation, held_out.documents)
        before = kept_before(run, asked) if checkpoint else None
        if before is None:
            before = evaluate(model, tokenizer, config, held_out, prompts, style.stops, dtype, say, "before training")
    if checkpoint is None:
        begin_run(run, config, facts)
        keep_before(run, before, asked)
    order = record_data(run, bins, removed)
    with watch("train"), memory:
        fitted = fit(model, tokenizer, config, documents, bins, dtype, run, memory.make_room, say, checkpoint)
    save_adapter(model, tokenizer, run / "adapter")
    say(f"adapter: {run / 'adapter'}")
    with watch("evaluate after"):
        after = evaluate(model, tokenizer, config, held_out, prompts, style.stops, dtype, say, "after training")

    # ------------------------------------------------------------------ report
    report = {
        "output": str(run),
        "backend": backend._asdict(),
        "base": base,
        "base_sha256": facts["base_sha256"],
        "data_sha256": facts["data_sha256"],
        "dtype": facts["dtype"],
        "quantized_modules": quantized_modules(model),
        "loss": pair(before.loss, after.loss),
        "exact_match": pair(before.exact_match, after.exact_match),
        **fitted,
        "memory": memory.report,
        "order": order,
        "seconds": watch.rounded(),
    }
    write_manifest(run / "manifest.json", config, data=describe_data(prepared.ledger), report=report)
    write_samples(run, before.records, after.records)
    say(summary(report, before, after, config.evaluation.show))
    return report


def prepare_model(config: Config, base: str, dtype: torch.dtype, backend: Name, tokens: int, say: Say) -> Any:
    """NF4 base with LoRA for rows of up to ``tokens``, attending inside documents only."""
    from qlora_sft.model.attention_check import use_checked_attention
    from qlora_sft.model.embeddings import use_host_embedding
    from qlora_sft.model.load import load_model
    from qlora_sft.model.loss import use_loss
    from qlora_sft.model.mlp import use_tiled_mlp
    from qlora_sft.model.norms import use_lean_norms
    from qlora_sft.model.trained_rows import use_rows_beside_embedding

    model = load_model(config, base, dtype, backend)
    use_rows_beside_embedding(model)
    use_checked_attention(model, dtype, say)
    if config.memory.offload_embeddings:
        on_gpu = model.device.type == "cuda"
        say(f"embeddings: {use_host_embedding(model) if on_gpu else 'where they are (the model is in host memory)'}")
    say(f"norms: {use_lean_norms(model)}")
    say(f"tiled MLP: {use_tiled_mlp(model, config.memory.tiled_mlp, tokens)}")
    say(f"loss: {use_loss(model, config.model.loss)}")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"model: {base}, LoRA rank {config.lora.r}, {trainable:,} trainable parameters")
    return model


def fit(
    model: Any,
    tokenizer: Any,
    config: Config,
    documents: Sequence[Rendered],
    bins: list[list[int]],
    dtype: torch.dtype,
    run: Path,
    make_room: Callable[[str], bool],
    say: Say,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """The training itself, from ``checkpoint`` on if there is one. Returns steps, losses and speed.

    make_room: called with the reason when the GPU is full; False if there is none to be had.
    """
    import torch

    from qlora_sft.training.guards import FiniteSteps, update_too_full
    from qlora_sft.training.interrupt import StopAfterStep
    from qlora_sft.training.losses import summarize_losses
    from qlora_sft.training.progress import Progress
    from qlora_sft.training.steps import count_steps
    from qlora_sft.training.trainer import PackedSFTTrainer, sft_config

    steps = count_steps(len(bins), config)
    t = config.training
    # What would not be trained on would still be skipped, one by one, by a run that goes on.
    bins = bins[: steps * t.batch_size * t.gradient_accumulation]
    clear_unfinished(run)
    # On the same disk as the run, so that what is complete there needs no copying.
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=run) as scratch, StopAfterStep(say) as stop:
        args, optimizer = sft_config(config, Path(scratch), steps, dtype)
        say(f"optimizer: {optimizer}; {steps} steps of {t.batch_size} x {t.gradient_accumulation} rows")
        begin = step_of(checkpoint) if checkpoint else 0
        progress = Progress(run / "metrics.jsonl", steps, begin)
        finite = FiniteSteps(lambda step: sources_of(step, config, documents, bins), lambda: what_is_left(run), say)
        trainer = PackedSFTTrainer(
            model, documents, bins, run, make_room, say,
            args=args, processing_class=tokenizer, callbacks=[progress, finite, stop],
        )  # fmt: skip
        progress.trainer = trainer
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted at once; {what_is_left(run)}") from None
        except torch.OutOfMemoryError as error:
            raise update_too_full(error, what_is_left(run)) from None
        finally:
            progress.close()
        done = trainer.state.global_step
        if stop.requested and done < steps:
            raise Interrupted(f"interrupted after step {done}; {what_is_left(run)}")
    if not progress.losses or progress.left_out == progress.steps_done:
        lacking = "loss" if not progress.losses else "gradient"
        raise RunError(
            f"no step had a finite {lacking}; lower training.learning_rate or compute in another model.dtype"
        )
    return {
        "steps": progress.steps_done,
        "steps_left_out": progress.left_out,
        "resumed_at": begin or None,
        "train_loss": summarize_losses(progress.losses),
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised,
        "tokens_per_second": round(progress.tokens / progress.seconds, 1),
        "optimizer": optimizer,
    }


def sources_of(step: int, config: Config, documents: Sequence[Rendered], bins: list[list[int]]) -> str:
    """Where to look for what the step of this number, from 0, learns from."""
    size = config.training.batch_size * config.training.gradient_accumulation
    rows = bins[step * size : (step + 1) * size]
    names = sorted({documents[index].source for row in rows for index in row})
    return f"rows {step * size} to {step * size + len(rows) - 1} of order.json, from {', '.join(names)}"


if __name__ == "__main__":
    from qlora_sft.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
