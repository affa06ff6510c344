"""Convert the common keys of an axolotl configuration."""

from __future__ import annotations

from qlora_sft.convert.evaluating import move_evaluation
from qlora_sft.convert.pieces import Converted, given_keys, named_apart, objects, source, text, texts
from qlora_sft.errors import ConfigError
from qlora_sft.json_types import JsonObject

SAME = {
    "trust_remote_code": "model.trust_remote_code", "revision_of_model": "model.revision",
    "base_model": "model.path", "sequence_len": "data.max_length", "output_dir": "output", "lora_r": "lora.r",
    "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout", "micro_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation", "max_steps": "training.max_steps",
    "learning_rate": "training.learning_rate", "weight_decay": "training.weight_decay", "seed": "seed",
    "max_grad_norm": "training.max_grad_norm", "warmup_ratio": "training.warmup_ratio",
    "warmup_steps": "training.warmup_steps", "neftune_noise_alpha": "training.neftune_alpha",
    "peft_use_rslora": "lora.rslora", "peft_use_dora": "lora.dora", "loraplus_lr_ratio": "lora.plus_ratio",
    "save_steps": "training.save_steps", "save_total_limit": "training.save_total_limit",
}  # fmt: skip
# What axolotl takes where nothing is given, and which is something else here.
DEFAULTS = {
    "sequence_len": 512, "num_epochs": 1, "micro_batch_size": 1, "gradient_accumulation_steps": 1,
    "lr_scheduler": "cosine", "warmup_ratio": 0.03,
}  # fmt: skip
FINE = {
    "model_type": "config.json says it", "tokenizer_type": "the tokenizer's files say it",
    "bf16": "model.dtype: auto", "fp16": "model.dtype: auto", "tf32": "does not concern 16-bit products",
    "gradient_checkpointing*": "memory.policy: auto", "flash_attention": "model.attention: auto",
    "xformers_attention": "model.attention: auto", "sdp_attention": "model.attention: auto",
    "attn_implementation": "model.attention: auto", "dataset_prepared_path": "prepared data is cached",
    "pad_to_sequence_len": "nothing is padded", "group_by_length": "sequences are packed",
    "logging_steps": "every step is logged", "strict": "always", "lora_mlp_kernel": "memory.tiled_mlp: auto",
    "lora_qkv_kernel": "kernels are chosen here", "lora_o_kernel": "kernels are chosen here",
    "dataset_processes": "preparation decides",
    "eval_sample_packing": "held-out rows are packed by the same rule", "liger_*": "kernels are chosen here",
    "activation_offloading": "memory.policy: auto", "gemma4_hybrid_attn_impl": "model.attention: auto",
    "split_thinking": "reasoning at the beginning of an answer is found", "eval_table_size": "samples.jsonl",
    "cut_cross_entropy": "the loss is chosen here",
}  # fmt: skip
FORMS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "chat_template": None}
# Found by the file's name and the rows themselves.
FOUND = {
    "ds_type", "message_field_role", "message_field_content", "roles", "message_property_mappings", "split",
}  # fmt: skip
# Plugins that bring kernels and losses alone.
KERNELS = ("cut_cross_entropy", "liger")
# What is so here as well.
ALIKE = {
    "roles_to_train": ["assistant"],
    "train_on_eos": "turn",
    "train_on_eot": "turn",
    "message_field_training": "train",
}
# What the datasets library calls its readers of files; any other path beside data_files is where the files are.
READERS = ("", "json", "csv", "parquet", "text", "arrow")


def convert_axolotl(original: JsonObject) -> Converted:
    """Returns the recipe. Raises `ConfigError` for a kind of training that there is not here."""
    given = {**DEFAULTS, **given_keys(original)}
    if given.get("warmup_steps") == 0:
        given["warmup_ratio"] = 0.0
    elif "warmup_steps" in given:
        del given["warmup_ratio"]
    if "rl" in given:
        raise ConfigError(f"rl: {given['rl']}: there is no preference training or reinforcement learning here")
    made = Converted()
    made.rename(given, {"base_model": SAME["base_model"]})
    _precision(given, made)
    made.template(given, "chat_template")
    made.train = named_apart(_sources("datasets", given, made))
    given.setdefault("test_datasets", [])
    made.held_out = named_apart(_sources("test_datasets", given, made))
    made.schedule(given, "lr_scheduler")
    loggers = {"wandb_project": "wandb", "use_tensorboard": "tensorboard", "mlflow_experiment_name": "mlflow"}
    given["report_to"] = [name for key, name in loggers.items() if given.get(key)]
    given.pop("use_tensorboard", None)
    made.reporting(given, "report_to")
    best = _keeps_best(given, made)
    made.rename(given, SAME)
    made.epochs(given, "num_epochs")
    made.optimizer(given, "optimizer")
    made.beginning(given, "peft_init_lora_weights")
    made.refuse_modules(given, "lora_modules_to_save")
    _data(given, made)
    move_evaluation(given, made, patience="early_stopping_patience", by_steps=True, best=best)
    _targets(given, made)
    _tokens(given, made)
    plugins = texts("plugins", given.pop("plugins", []))
    if others := [name for name in plugins if not any(kernel in name for kernel in KERNELS)]:
        given["plugins"] = others
    made.leave(given, FINE, default_on=("shuffle_merged_datasets",))
    return made


def _tokens(given: JsonObject, made: Converted) -> None:
    """Moves tokens that end a turn, and those that are added; what pads is left out, because nothing is padded."""
    special = given.pop("special_tokens", {})
    if not isinstance(special, dict):
        raise ConfigError(f"special_tokens: expected keys and values, got {special!r}")
    ends = texts("eot_tokens", given.pop("eot_tokens", []))
    if special.get("eos_token"):
        ends.append(text("special_tokens.eos_token", special["eos_token"]))
    made.stop_tokens(ends)
    if tokens := texts("tokens", given.pop("tokens", [])):
        made.put("model.new_tokens", tokens)
    for key, value in given_keys(special).items():
        if key not in ("eos_token", "pad_token"):
            made.note(f"special_tokens.{key}", value, "has no counterpart")


def _keeps_best(given: JsonObject, made: Converted) -> bool:
    """Says whether axolotl keeps the best step: if each that is saved is measured, and nobody asks for the last."""
    wanted, save, every = given.pop("load_best_model_at_end", None), given.get("save_steps"), given.get("eval_steps")
    saved = isinstance(save, int) and isinstance(every, int) and save > 0 and every > 0 and save % every == 0
    if wanted and not saved:
        why = "axolotl keeps the last step unless save_steps is a multiple of eval_steps; training.keep: best does so"
        made.note("load_best_model_at_end", wanted, why)
    return saved and (wanted is not False or bool(given.get("early_stopping_patience")))


def _precision(given: JsonObject, made: Converted) -> None:
    adapter = given.pop("adapter", None)
    in_4bit, in_8bit = given.pop("load_in_4bit", False), given.pop("load_in_8bit", False)
    if adapter not in ("qlora", "lora"):
        made.note("adapter", adapter, "only LoRA is trained here, not all weights")
    if in_8bit:
        made.note("load_in_8bit", in_8bit, "the base is loaded in 4 bits (NF4); model.load_in_4bit: false takes 16")
    made.put("model.load_in_4bit", bool(in_4bit or in_8bit))


def _sources(key: str, given: JsonObject, made: Converted) -> list[JsonObject]:
    return [made_source for each in objects(key, given.pop(key, None)) for made_source in _of_one(each, made)]


def _of_one(each: JsonObject, made: Converted) -> list[JsonObject]:
    """Returns the sources of one entry: one for every file."""
    each = given_keys(each)
    paths = _paths(each, made)
    form, columns = _form(each, made)
    sources = [source(path, columns, form) for path in paths]
    if "split" in each and "data_files" not in each:
        for made_source in sources:
            made_source["split"] = each["split"]
    if "revision" in each and "data_files" not in each:
        for made_source in sources:
            made_source["revision"] = each["revision"]
        del each["revision"]
    alike = {key for key, value in ALIKE.items() if each.get(key) == value}
    made.leave(
        {key: value for key, value in each.items() if key not in alike}, dict.fromkeys([*FOUND, "data_files"], "")
    )
    return sources


def _paths(each: JsonObject, made: Converted) -> list[str]:
    path = text("path", each.pop("path", ""))
    if "data_files" in each:
        files = texts("data_files", each["data_files"])
        if path not in READERS:
            made.note("data_files", ", ".join(files), f"files of {path}; put their paths on this machine")
        return files
    return [f"{path}:{each.pop('name')}" if "name" in each else path]


def _form(each: JsonObject, made: Converted) -> tuple[str | None, dict[str, str]]:
    """Returns the form of the rows, None if they tell it, and the names of their columns."""
    kind = each.pop("type", "chat_template")
    if isinstance(kind, dict):
        return "alpaca", _own_columns(given_keys(kind), made)
    kind = text("type", kind)
    if kind == "alpaca":
        made.note("type", kind, "the chat template writes the turns here, not '### Instruction:'")
    elif kind not in FORMS:
        made.note("type", kind, "the form of the rows is found by their columns; look at it with preview")
    columns = {name: text(f"field_{name}", each.pop(f"field_{name}", name)) for name in ("messages", "tools", "system")}
    if columns["messages"] == "conversations":
        del columns["messages"]  # known under this name
    if FORMS.get(kind) == "text":
        columns = {"text": text("field", each.pop("field", "text"))}
    return FORMS.get(kind), columns


def _own_columns(kind: JsonObject, made: Converted) -> dict[str, str]:
    """Returns the columns of a format of the user's own, and notes what else it says: the texts around them."""
    names = ("instruction", "input", "output", "system")
    columns = {name: text(f"type.field_{name}", kind.pop(f"field_{name}", name)) for name in names}
    for key, value in kind.items():
        made.note(f"type.{key}", repr(value), "the chat template writes the turns here")
    return columns


def _data(given: JsonObject, made: Converted) -> None:
    if not given.pop("sample_packing", False):
        made.put("data.packing", "none")
    if given.pop("train_on_inputs", False):
        made.supervise("all")
    if given.pop("dataset_exact_deduplication", False):
        made.put("data.deduplicate", "exact")
    made.split(given, "val_set_size")


def _targets(given: JsonObject, made: Converted) -> None:
    modules, all_linear = given.pop("lora_target_modules", None), given.pop("lora_target_linear", False)
    if modules and not all_linear:
        made.put("lora.target_modules", modules)
