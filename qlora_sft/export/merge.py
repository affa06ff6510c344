"""Merges the adapter of a run into its base model and writes a folder that plain transformers loads.

The merge goes tensor by tensor from safetensors to safetensors. No model is built, and memory holds only slices. By
default the adapter is merged onto the weights with the smaller measured difference from the adapter itself. For a 4-bit
run these are the dequantised NF4 weights on which it was trained, not the 16-bit originals.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from qlora_sft.atomic import remove_leftovers, written_folder
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.export.stale import merged_of
from qlora_sft.json_types import JsonObject
from qlora_sft.model.base_files import read_config, text_config
from qlora_sft.model.base_tokenizer import saved_tokenizer
from qlora_sft.model.rope import with_rope_scaling
from qlora_sft.model.run_base import run_base
from qlora_sft.run.folder import Run
from qlora_sft.run.report import LEFT_OUT, Report
from qlora_sft.say import Say, tell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_sft.export.adapter import TensorUpdate
    from qlora_sft.export.hub import PushResult
    from qlora_sft.export.parity import Figures
    from qlora_sft.model.tensors import Planned

Onto = Literal["nf4-dequantized", "bf16"]
# For a base of fewer bytes both ways are tried and measured; for a larger one that takes too much time and disk.
MEASURED_BELOW = 2**30
Dtype = Literal["auto", "bf16", "f16", "f32"]
# If bfloat16 is measured to give a mean KL from the adapter above this, its rounding is worth avoiding.
TAKE_FLOAT16 = 1e-4
# Of config.json, what generation goes by where there is no generation_config.json.
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
TORCH_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@dataclass(frozen=True)
class MergeResult(Report):
    """Describes a merged model and how it was made."""

    merged: str
    """The folder of the model."""
    onto: Onto
    dtype: str
    modules: int
    """The number of layers to which the adapter was added."""
    bytes: int
    reason: str
    """Why the adapter was merged onto these weights."""
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

    ``dtype`` auto takes the base's type, or float16 where that is measured to keep more of the adapter than bfloat16.
    The peak memory is a quarter of the largest tensor and a few slices. Raises `ConfigError` if ``run`` is not a
    finished run or ``onto`` is impossible for it, and `RunError` if adapter and base do not fit together or the disk is
    too small. Then nothing is written under the final name.
    """
    from qlora_sft.export.parity import forget, record

    opened = Run.open(run)
    base = run_base(opened)
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
        result = _merge_better(merge, target, dtype)
    else:
        say(f"merge onto {onto} ({reason})")
        result = merge.write(target, onto, dtype, reason)
    if target == opened.merged:
        forget(opened.path, "merged")
        record(opened.path, merged_of(opened))
    return result


# ------------------------------------------------------------------ onto what


def _only_onto(run: Run, base: Path) -> tuple[Onto | None, str]:
    """Returns (onto, reason), or (None, "") when there is a choice and measuring it is cheap."""
    if _is_4bit_checkpoint(base):
        return "nf4-dequantized", "the base exists in 4 bits only"
    if not run.quantized_modules:
        return "bf16", "the adapter was trained on 16-bit weights"
    if sum(file.stat().st_size for file in base.glob("*.safetensors")) > MEASURED_BELOW:
        return "nf4-dequantized", "the adapter was trained on it; measuring both would need two copies of a large model"
    return None, ""


def _merge_better(merge: _Merge, target: Path, dtype: Dtype) -> MergeResult:
    """Merges onto both kinds of weights, measures both against the adapter, and keeps the closer model.

    If bfloat16 is too coarse, a third merge in float16 is measured, too.
    """
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
                try:
                    attempt(f"{best} in float16", results[best].onto, "f16")
                except RunError as error:  # a weight beyond its range, or no room for one more copy
                    merge.say(f"not in float16: {error}")
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
    """Raises `ConfigError` if the adapter of ``run`` cannot be merged onto these weights."""
    if onto not in get_args(Onto):
        raise ConfigError(f"--onto {onto}: one of {', '.join(get_args(Onto))}")
    packed = _is_4bit_checkpoint(base)
    if onto == "bf16" and packed:
        raise ConfigError(f"--onto bf16: {base} has its weights in 4 bits only; use --onto nf4-dequantized")
    if onto == "bf16" and run.lora_init == "loftq":
        raise ConfigError("--onto bf16: the adapter holds what NF4 lost of these weights (lora.init=loftq); use "
                          "--onto nf4-dequantized")  # fmt: skip
    if onto == "nf4-dequantized" and not packed and not run.quantized_modules:
        raise ConfigError("--onto nf4-dequantized: this adapter was trained on 16-bit weights; use --onto bf16")


def _is_4bit_checkpoint(base: Path) -> bool:
    """Says whether the base was saved in 4 bits."""
    quantization = _read_config(base).get("quantization_config")
    return isinstance(quantization, dict) and bool(quantization.get("load_in_4bit"))


def trained_config(run: Run, base: Path) -> JsonObject:
    """Returns the base's config.json with the rope scaling of the run."""
    return with_rope_scaling(_read_config(base), run.model.rope_scaling)


def _read_config(base: Path) -> JsonObject:
    """Reads the base's config.json. Raises `RunError` if it cannot be read."""
    try:
        return read_config(str(base))
    except ConfigError as error:
        raise RunError(f"{error}; the base model is incomplete") from None


# ------------------------------------------------------------------ the merge itself


@dataclass(frozen=True)
class _Merge:
    """Holds a run and its base, which may be merged in several ways."""

    run: Run
    base: Path
    say: Say

    def write(self, target: Path, onto: Onto, dtype: Dtype, reason: str) -> MergeResult:
        """Writes the merged model to ``target``, tensor by tensor, and reads back what was written."""
        import torch

        from qlora_sft.export.adapter import read_adapter
        from qlora_sft.export.merge_plan import plan_merge
        from qlora_sft.export.stacks import in_files
        from qlora_sft.model.tensors import read_model, write_index, write_shard

        adapter, base, say = self.run.adapter, self.base, self.say
        config = trained_config(self.run, base)
        stored = read_model(base)
        trained = self.run.quantized_modules if onto == "nf4-dequantized" else []
        updates = read_adapter(adapter)
        if not any(_does_something(update) for update in updates.values()):
            raise RunError(f"{adapter}: every update is zero, the merged model would be the base; was it trained?")
        wanted = getattr(torch, TORCH_DTYPES[dtype]) if dtype != "auto" else None
        known = in_files(base, stored, config, updates, set(trained), self.run.model.trust_remote_code)
        plan = plan_merge(stored, config, known.updates, known.through_nf4, wanted, str(adapter), known.stacked)
        for note in plan.notes:
            say(note)
        _check_disk(target, plan.nbytes)
        remove_leftovers(target)
        with written_folder(target) as beside:
            shards = plan.shards()
            for file, tensors in shards.items():
                write_shard(beside / file, tensors)
            write_index(beside, dict(shards))
            _write_configs(base, beside, _with_dtype({**config, **plan.config}, plan.dtype), adapter, say)
            _verify(beside, plan.tensors)
        return MergeResult(str(target), onto, plan.dtype, len(plan.modules), plan.nbytes, reason)


def write_trained_base(run: Run, target: Path) -> None:
    """Writes the base as the adapter saw it in training as a model folder: dequantised NF4 for a 4-bit run."""
    from qlora_sft.export.merge_plan import plan_merge
    from qlora_sft.export.stacks import in_files
    from qlora_sft.model.tensors import read_model, write_index, write_shard

    base = run_base(run)
    config = trained_config(run, base)
    stored = read_model(base)
    known = in_files(base, stored, config, {}, set(run.quantized_modules), run.model.trust_remote_code)
    plan = plan_merge(stored, config, {}, known.through_nf4, None, str(base), known.stacked)
    _check_disk(target, plan.nbytes)
    with written_folder(target) as beside:
        for file, tensors in plan.shards().items():
            write_shard(beside / file, tensors)
        write_index(beside, dict(plan.shards()))
        _write_configs(base, beside, _with_dtype(config, plan.dtype), run.adapter, lambda _: None)


def _does_something(update: TensorUpdate) -> bool:
    """Says whether the update can differ from zero."""
    if update.b is not None and update.replaced is None and update.magnitude is None and update.tokens is None:
        return bool(update.b.any()) and update.a is not None and bool(update.a.any())
    return True


def _check_disk(target: Path, needed: int) -> None:
    """Raises `RunError` if the disk has less than ``needed`` bytes free for ``target``."""
    parent = next(p for p in [target.absolute().parent, *target.absolute().parents] if p.exists())
    free = shutil.disk_usage(parent).free
    needed += 2**26  # tokenizer and configuration
    if free < needed:
        raise RunError(
            f"{target}: the merged model needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {parent}. "
            "Nothing was written. Free some room or name another folder with --out."
        )


def _verify(folder: Path, tensors: list[Planned]) -> None:
    """Reads the written folder back. Raises `RunError` unless every tensor is there with its shape."""
    from qlora_sft.model.tensors import read_model

    written = read_model(folder)
    wrong = [t.name for t in tensors if t.name not in written or written[t.name].shape != t.shape]
    if wrong or len(written) != len(tensors):
        raise RunError(f"{folder}: what was read back is not what was written (first: {(wrong or ['?'])[0]})")


# ------------------------------------------------------------------ configuration and tokenizer


def _with_dtype(config: JsonObject, dtype: str) -> JsonObject:
    """Sets the type in a config.json. transformers 5 calls it ``dtype`` and earlier versions ``torch_dtype``."""
    known = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return {**config, **dict.fromkeys(known, dtype)}


def _write_configs(base: Path, target: Path, config: JsonObject, adapter: Path, say: Say) -> None:
    """Writes config.json, the tokenizer and generation_config.json, which stops at the trained eos token, too.

    What a processor for images and sound is made from is copied; its chat template is that of the tokenizer.
    """
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)  # the folder of somebody's machine
    for settings in base.glob("*processor_config.json"):
        shutil.copy(settings, target)
    for code in base.glob("*.py") if config.get("auto_map") else ():
        shutil.copy(code, target)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = _write_tokenizer(adapter, target)
    generation = base / "generation_config.json"
    if generation.is_file():
        content = json.loads(generation.read_text(encoding="utf-8"))
    else:  # where transformers looks then
        own = text_config(config)
        content = {key: own[key] for key in SPECIAL if own.get(key) is not None}
    given = content.get("eos_token_id")
    listed = given if isinstance(given, list) else [] if given is None else [given]
    added = tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in listed
    if added:
        content["eos_token_id"] = [tokenizer.eos_token_id, *listed]
        say(f"generation stops at {tokenizer.eos_token!r} too: turns were trained to end with it")
    if added or generation.is_file():
        (target / "generation_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(adapter: Path, target: Path) -> PreTrainedTokenizerBase:
    """Writes the trained tokenizer without the ``{% generation %}`` marks in its template, and returns it.

    Only training needs the marks, and not every runtime knows them.
    """
    tokenizer = saved_tokenizer(adapter)
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = without_generation_marks(tokenizer.chat_template)
    tokenizer.save_pretrained(target)
    return tokenizer


def without_generation_marks(template: str) -> str:
    """Returns the template for inference. ``{% if true %}`` in place of the marks keeps the white space as it is."""
    template = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", template)
