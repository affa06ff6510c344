"""Convert the common keys of a LLaMA-Factory configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path

from qlora_sft.config_lora import REFUSED_INITS
from qlora_sft.convert.evaluating import move_evaluation
from qlora_sft.convert.pieces import Converted, given_keys, named_apart, number, source, text, texts
from qlora_sft.errors import ConfigError
from qlora_sft.json_types import JsonObject
from qlora_sft.text import read_text

SAME = {
    "trust_remote_code": "model.trust_remote_code", "model_revision": "model.revision",
    "cutoff_len": "data.max_length", "output_dir": "output", "lora_rank": "lora.r", "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout", "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation", "max_steps": "training.max_steps",
    "learning_rate": "training.learning_rate", "weight_decay": "training.weight_decay", "seed": "seed",
    "max_grad_norm": "training.max_grad_norm", "warmup_ratio": "training.warmup_ratio",
    "warmup_steps": "training.warmup_steps", "neftune_noise_alpha": "training.neftune_alpha",
    "use_rslora": "lora.rslora", "use_dora": "lora.dora", "loraplus_lr_ratio": "lora.plus_ratio",
    "save_steps": "training.save_steps", "save_total_limit": "training.save_total_limit",
}  # fmt: skip
# What LLaMA-Factory takes where nothing is given, and which is something else here.
DEFAULTS = {
    "cutoff_len": 2048, "lora_rank": 8, "num_train_epochs": 3, "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1, "learning_rate": 5e-5, "warmup_ratio": 0.0, "save_steps": 500,
    "logging_steps": 500,
}  # fmt: skip
FINE = {
    "do_train": "train does it", "bf16": "model.dtype: auto",
    "fp16": "model.dtype: auto", "flash_attn": "model.attention: auto", "overwrite_cache": "the cache knows",
    "preprocessing_num_workers": "preparation decides", "dataloader_num_workers": "preparation decides",
    "logging_steps": "every step is logged", "plot_loss": "metrics.jsonl", "overwrite_output_dir": "--overwrite",
    "ddp_timeout": "one GPU", "double_quantization": "NF4, doubly quantised",
    "disable_gradient_checkpointing": "memory.policy: auto", "per_device_eval_batch_size": "measured alike",
    "save_only_model": "checkpoints are complete", "resume_from_checkpoint": "train --resume",
}  # fmt: skip
# Columns of dataset_info.json -> columns here.
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
           "tools": "tools", "messages": "conversations"}  # fmt: skip

# Names of roles, and of what holds role and text, that rows here may have, too.
TAGS = {
    "role_tag": ("from", "role"), "content_tag": ("value", "content"), "system_tag": ("system",),
    "user_tag": ("human", "user"), "assistant_tag": ("gpt", "assistant"), "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
}  # fmt: skip


def convert_llama_factory(original: JsonObject, folder: Path) -> Converted:
    """Returns the recipe; names of data sets are looked up in dataset_info.json, beside ``folder`` or where one is.

    Raises `ConfigError` for a kind of training that there is not here.
    """
    given: JsonObject = {**DEFAULTS, **given_keys(original)}
    stage = given.pop("stage", "sft")
    if stage not in ("sft", "pt"):
        raise ConfigError(f"stage: {stage}: there is no preference training or reinforcement learning here")
    given.setdefault("lora_alpha", int(2 * number("lora_rank", given["lora_rank"])))
    made = Converted()
    made.rename(given, {"model_name_or_path": "model.path"})
    _precision(given, made)
    made.template(given, "template")
    _sources(given, made, folder, stage)
    if not (given.pop("packing", stage == "pt") or given.pop("neat_packing", False)):
        made.put("data.packing", "none")
    given.pop("neat_packing", None)
    made.schedule(given, "lr_scheduler_type")
    made.reporting(given, "report_to")
    made.rename(given, SAME)
    made.epochs(given, "num_train_epochs")
    made.optimizer(given, "optim")
    made.refuse_modules(given, "additional_target")
    if given.pop("pissa_init", False):
        made.note("pissa_init", True, REFUSED_INITS["pissa"])
    target = given.pop("lora_target", "all")
    if target != "all":
        made.put("lora.target_modules", texts("lora_target", target))
    made.split(given, "val_size")
    move_evaluation(given, made, patience="early_stopping_steps", by_steps=False, best=False)
    made.leave(given, FINE)
    return made


def _precision(given: JsonObject, made: Converted) -> None:
    kind, bits = given.pop("finetuning_type", "lora"), given.pop("quantization_bit", None)
    if kind != "lora":
        made.note("finetuning_type", kind, "only LoRA is trained here")
    if bits not in (None, 4):
        made.note("quantization_bit", bits, "the base is loaded in 4 bits (NF4)")
    made.put("model.load_in_4bit", bits is not None)
    made.quantization(given, "quantization_type")
    method = text("quantization_method", given.pop("quantization_method", "bnb"))
    if method not in ("bnb", "bitsandbytes"):
        made.note("quantization_method", method, "4 bits are bitsandbytes' NF4 here")


def _sources(given: JsonObject, made: Converted, folder: Path, stage: str) -> None:
    known = _dataset_info(text("dataset_dir", given.pop("dataset_dir", "data")), folder)
    rows = given.pop("max_samples", None)
    form = "text" if stage == "pt" else None
    for key, sources in (("dataset", made.train), ("eval_dataset", made.held_out)):
        sources += named_apart([_source(name, known, made, form) for name in texts(key, given.pop(key, []))])
        for each in sources if rows else ():
            own = each.get("max_rows")
            each["max_rows"] = min(rows, own) if isinstance(rows, int) and isinstance(own, int) else rows
    _mixture(given, made)
    if given.get("enable_thinking") is False:
        for each in (*made.train, *made.held_out):
            each["thinking"] = "off"
    if given.pop("train_on_prompt", False):
        made.supervise("all")
    elif given.pop("mask_history", False):
        made.supervise("last")


def _mixture(given: JsonObject, made: Converted) -> None:
    strategy, shares = given.pop("mix_strategy", "concat"), given.pop("interleave_probs", None)
    if strategy == "concat" or not shares:
        return
    weights = _shares("interleave_probs", shares)
    if len(weights) != len(made.train):
        raise ConfigError(f"interleave_probs: {len(weights)} numbers for {len(made.train)} data sets")
    for each, weight in zip(made.train, weights, strict=True):
        each["weight"] = weight
    made.put("data.mixture", "explicit")
    made.note("mix_strategy", strategy, "an epoch has as many rows as all sources together, drawn by these shares")


def _shares(key: str, value: object) -> list[float]:
    """Returns the numbers of a list, or of a text in which commas part them."""
    try:
        return [number(key, float(share)) for share in texts(key, value)]
    except ValueError:
        raise ConfigError(f"{key}: expected numbers separated by commas, got {value!r}") from None


def _dataset_info(name: str, folder: Path) -> dict[str, JsonObject]:
    """Returns the content of dataset_info.json in the folder that the configuration names, with paths of its files."""
    for place in (Path(name), folder / name, folder.parent / name, folder.parent.parent / name):
        file = place / "dataset_info.json"
        if os.path.isfile(file):  # and no error for a name that no file can have
            return {key: {**entry, "folder": str(place)} for key, entry in _entries(file).items()}
    return {}


def _entries(file: Path) -> dict[str, JsonObject]:
    """Returns the entries of a dataset_info.json. Raises `ConfigError` if it is none."""
    try:
        entries = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ConfigError(f"dataset_dir: {file}:{error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"dataset_dir: {file}: not valid JSON: nested too deep") from None
    if not isinstance(entries, dict):
        raise ConfigError(f"dataset_dir: {file}: expected an object of data sets by their names")
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise ConfigError(f"dataset_dir: {file}: {name}: expected an object, got {entry!r}")
    return entries


def _source(name: str, known: dict[str, JsonObject], made: Converted, form: str | None) -> JsonObject:
    entry = known.get(name)
    if entry is None:
        why = "which does not have it" if known else "which is not here"
        made.note("dataset", name, f"a name of dataset_info.json, {why}; put its file or Hub id instead")
        return source(name, {}, form)
    if entry.get("ranking"):
        made.note("dataset", name, "preference data, which is not trained here")
    _note_tags(name, entry.get("tags"), made)
    if "file_name" in entry:
        path = str(Path(str(entry["folder"])) / text(f"{name}.file_name", entry["file_name"]))
    else:
        subset = f":{entry['subset']}" if entry.get("subset") else ""
        path = f"{entry.get('hf_hub_url', name)}{subset}"
    named = entry.get("columns") or {}
    if not isinstance(named, dict):
        raise ConfigError(f"dataset_info.json: {name}.columns: expected an object, got {named!r}")
    columns = {COLUMNS[key]: text(f"{name}.columns.{key}", value) for key, value in named.items()
               if key in COLUMNS and value}  # fmt: skip
    if columns.get("conversations") == "messages":
        del columns["conversations"]  # known under this name
    made_source = source(path, columns, form)
    if "file_name" not in entry:
        made_source |= {key: entry[key] for key in ("split", "revision") if entry.get(key)}
    if entry.get("num_samples"):
        made_source["max_rows"] = entry["num_samples"]
    return made_source


def _note_tags(name: str, tags: object, made: Converted) -> None:
    """Notes names of roles and of their columns that are not found here by themselves."""
    for key, value in tags.items() if isinstance(tags, dict) else ():
        if value not in TAGS.get(key, ()):
            made.note(f"{name}.tags.{key}", value, "is not known here; rename it in the rows")
