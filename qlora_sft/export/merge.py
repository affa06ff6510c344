"""The adapter of a run, added into its base model: a folder that plain transformers loads.

Tensor by tensor from safetensors to safetensors: no model is built, and memory holds slices. By default the adapter
goes onto the weights that give the smaller measured difference from the adapter itself, which for a 4-bit run are
the dequantised NF4 weights it was trained on, not the 16-bit originals.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from qlora_sft.atomic import written_folder
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.export.base import base_folder, check_base
from qlora_sft.model.rope import with_rope_scaling
from qlora_sft.run.folder import Run
from qlora_sft.run.report import LEFT_OUT, Report
from qlora_sft.say import Say, tell

if TYPE_CHECKING:
    from qlora_sft.export.hub import PushResult
    from qlora_sft.export.parity import Figures

Onto = Literal["nf4-dequantized", "bf16"]
# Up to here both ways are tried and measured; beyond, the minutes and gigabytes are not worth it.
MEASURED_BELOW = 2**30
Dtype = Literal["auto", "bf16", "f16", "f32"]
# Mean KL from the adapter from which on the rounding of bfloat16 is worth avoiding, where it is measured.
TAKE_FLOAT16 = 1e-4
TORCH_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@dataclass(frozen=True)
class MergeResult(Report):
    """A merged model, and how it was made."""

    merged: str
    """Its folder."""
    onto: Onto
    dtype: str
    modules: int
    """How many layers the adapter was added to."""
    bytes: int
    reason: str
    """Why onto these weights."""
    parity: dict[str, Figures] | None = field(default=None, metadata=LEFT_OUT)
    push: PushResult | None = field(default=None, metadata=LEFT_OUT)


def merge_run(
    run: str | Path,
    out: str | Path | None = None,
    onto: Onto | None = None,
    dtype: Dtype = "auto",
    say: Say = tell,
) -> MergeResult:
    """Writes the merged model of a run folder (default: RUN/merged) and says what was done.

    ``dtype`` auto: the base's, or float16 where that is measured to keep more of the adapter than bfloat16.
    Peak memory: a quarter of the largest tensor and a few slices. Raises `ConfigError` if ``run`` is no finished
    run or ``onto`` is impossible for it, `RunError` if adapter and base do not fit together or the disk is too
    small; then nothing is written under the final name.
    """
    opened = Run.open(run)
    base = base_folder(opened.base)
    check_base(opened, base)
    if dtype not in get_args(Dtype):
        raise ConfigError(f"--dtype {dtype}: one of {', '.join(get_args(Dtype))}")
    merge = _Merge(opened, base, say)
    target = Path(out) if out else opened.merged
    if onto is not None:
        _check_onto(onto, opened, base)
        reason = "as asked for"
    else:
        onto, reason = _only_onto(opened, base)
    if onto is None:
        return _merge_better(merge, target, dtype)
    say(f"merge onto {onto} ({reason})")
    return merge.write(target, onto, dtype, reason)


# ------------------------------------------------------------------ onto what


def _only_onto(run: Run, base: Path) -> tuple[Onto | None, str]:
    """(onto, reason), or (None, "") when there is a choice and measuring it is cheap."""
    if _is_4bit_checkpoint(base):
        return "nf4-dequantized", "the base exists in 4 bits only"
    if not run.quantized_modules:
        return "bf16", "the adapter was trained on 16-bit weights"
    if sum(file.stat().st_size for file in base.glob("*.safetensors")) > MEASURED_BELOW:
        return "nf4-dequantized", "the adapter was trained on it; measuring both would need two copies of a large model"
    return None, ""


def _merge_better(merge: _Merge, target: Path, dtype: Dtype) -> MergeResult:
    """Merges onto both, measures both against the adapter, keeps the closer one; in f16 if bf16 is too coarse."""
    from qlora_sft.export.parity import quick_difference

    scratch = target.with_name(f".{target.name}.measured-{os.getpid()}")
    results: dict[str, MergeResult] = {}
    measured: dict[str, float] = {}
    try:
        with quick_difference(merge.run.path) as difference:

            def attempt(name: str, onto: Onto, dtype: Dtype) -> None:
                results[name] = merge.write(scratch / name, onto, dtype, "")
                measured[name] = difference(scratch / name)

            for onto in get_args(Onto):
                attempt(onto, onto, dtype)
            best = min(measured, key=lambda name: measured[name])
            if dtype == "auto" and measured[best] > TAKE_FLOAT16 and results[best].dtype == "bfloat16":
                attempt(f"{best} in float16", results[best].onto, "f16")
                best = min(measured, key=lambda name: measured[name])
        reason = "mean KL from the adapter, measured: " + ", ".join(f"{o} {kl:.1e}" for o, kl in measured.items())
        merge.say(f"merge onto {best} ({reason})")
        with written_folder(target) as beside:
            beside.rmdir()
            os.replace(scratch / best, beside)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return replace(results[best], merged=str(target), reason=reason)


def _check_onto(onto: str, run: Run, base: Path) -> None:
    if onto not in get_args(Onto):
        raise ConfigError(f"--onto {onto}: one of {', '.join(get_args(Onto))}")
    packed = _is_4bit_checkpoint(base)
    if onto == "bf16" and packed:
        raise ConfigError(f"--onto bf16: {base} has its weights in 4 bits only; use --onto nf4-dequantized")
    if onto == "nf4-dequantized" and not packed and not run.quantized_modules:
        raise ConfigError("--onto nf4-dequantized: this adapter was trained on 16-bit weights; use --onto bf16")


def _is_4bit_checkpoint(base: Path) -> bool:
    return bool(_read_config(base).get("quantization_config", {}).get("load_in_4bit"))


def trained_config(run: Run, base: Path) -> dict[str, Any]:
    """The base's config.json with the positions it was trained with."""
    return with_rope_scaling(_read_config(base), run.model.rope_scaling)


def _read_config(base: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{base}: no readable config.json ({error}); the base model is incomplete") from None
    return config


# ------------------------------------------------------------------ the merge itself


@dataclass(frozen=True)
class _Merge:
    """A run and its base, which may be merged in several ways."""

    run: Run
    base: Path
    say: Say

    def write(self, target: Path, onto: Onto, dtype: Dtype, reason: str) -> MergeResult:
        """Writes the merged model to ``target``, tensor by tensor, and reads back what was written."""
        import torch

        from qlora_sft.export.adapter import read_adapter
        from qlora_sft.export.merge_plan import plan_merge
        from qlora_sft.export.stacks import in_files
        from qlora_sft.export.tensors import read_model, write_index, write_shard

        adapter, base, say = self.run.adapter, self.base, self.say
        config = trained_config(self.run, base)
        through_nf4 = set(self.run.quantized_modules) if onto == "nf4-dequantized" else set()
        changes = read_adapter(adapter)
        if not any(_does_something(change) for change in changes.values()):
            raise RunError(f"{adapter}: every update is zero, the merged model would be the base; was it trained?")
        wanted = getattr(torch, TORCH_DTYPES[dtype]) if dtype != "auto" else None
        stored = read_model(base)
        known = in_files(base, stored, config, changes, through_nf4)
        plan = plan_merge(stored, config, known.changes, known.through_nf4, wanted, str(adapter), known.stacked)
        for note in plan.notes:
            say(note)
        _check_disk(target, plan.nbytes)
        _remove_leftovers(target)
        with written_folder(target) as beside:
            shards = plan.shards()
            for file, tensors in shards.items():
                write_shard(beside / file, tensors)
            write_index(beside, dict(shards))
            _write_configs(base, beside, _with_dtype({**config, **plan.config}, plan.dtype), adapter, say)
            _verify(beside, plan.tensors)
        return MergeResult(str(target), onto, plan.dtype, len(plan.modules), plan.nbytes, reason)


def write_trained_base(run: Run, target: Path) -> None:
    """The base as the adapter saw it in training (dequantised NF4 for a 4-bit run), as a model folder of its own."""
    from qlora_sft.export.merge_plan import plan_merge
    from qlora_sft.export.stacks import in_files
    from qlora_sft.export.tensors import read_model, write_index, write_shard

    base = base_folder(run.base)
    config = trained_config(run, base)
    stored = read_model(base)
    known = in_files(base, stored, config, {}, set(run.quantized_modules))
    plan = plan_merge(stored, config, {}, known.through_nf4, None, str(base), known.stacked)
    _check_disk(target, plan.nbytes)
    with written_folder(target) as beside:
        for file, tensors in plan.shards().items():
            write_shard(beside / file, tensors)
        write_index(beside, dict(plan.shards()))
        _write_configs(base, beside, _with_dtype(config, plan.dtype), run.adapter, lambda _: None)


def _does_something(change: Any) -> bool:
    if change.b is not None and change.replaced is None and change.magnitude is None and change.tokens is None:
        return bool(change.b.any()) and bool(change.a.any())
    return True


def _check_disk(target: Path, needed: int) -> None:
    parent = next(p for p in [target.absolute().parent, *target.absolute().parents] if p.exists())
    free = shutil.disk_usage(parent).free
    needed += 2**26  # tokenizer and configuration
    if free < needed:
        raise RunError(
            f"{target}: the merged model needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {parent}. "
            "Nothing was written. Free some room or name another folder with --out."
        )


def _remove_leftovers(target: Path) -> None:
    """What merges that were killed left beside ``target``; those that still run are left alone."""
    for folder in target.parent.glob(f".{target.name}.*-*"):
        pid = folder.name.rsplit("-", 1)[-1]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _verify(folder: Path, tensors: list[Any]) -> None:
    """Reads back what was written: every tensor is there with its type, shape and bytes."""
    from qlora_sft.export.tensors import read_model

    written = read_model(folder)
    wrong = [t.name for t in tensors if t.name not in written or written[t.name].shape != t.shape]
    if wrong or len(written) != len(tensors):
        raise RunError(f"{folder}: what was read back is not what was written (first: {(wrong or ['?'])[0]})")


# ------------------------------------------------------------------ configuration and tokenizer


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """transformers 5 writes ``dtype``, earlier versions ``torch_dtype``; whichever there is has to be true."""
    known = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return {**config, **dict.fromkeys(known, dtype)}


def _write_configs(base: Path, target: Path, config: dict[str, Any], adapter: Path, say: Say) -> None:
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = _write_tokenizer(adapter, target)
    generation = base / "generation_config.json"
    if generation.is_file():
        content = json.loads(generation.read_text(encoding="utf-8"))
        stops = content.get("eos_token_id")
        listed = stops if isinstance(stops, list) else [] if stops is None else [stops]
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in listed:
            content["eos_token_id"] = [tokenizer.eos_token_id, *listed]
            say(f"generation stops at {tokenizer.eos_token!r} too: turns were trained to end with it")
        (target / "generation_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(adapter: Path, target: Path) -> Any:
    """The tokenizer as trained. Its template loses the ``{% generation %}`` marks, which only training needs and
    not every runtime knows; ``{% if true %}`` in their place keeps the blocks and so the white space."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(adapter)
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = without_generation_marks(tokenizer.chat_template)
    tokenizer.save_pretrained(target)
    return tokenizer


def without_generation_marks(template: str) -> str:
    """The same template for inference."""
    template = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", template)
