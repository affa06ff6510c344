"""Convert the common keys of an axolotl configuration."""

from __future__ import annotations

from qlora_sft.convert.pieces import Converted, given_keys, named_apart, objects, source
from qlora_sft.errors import ConfigError
from qlora_sft.json_types import JsonObject

SAME = {
    "base_model": "model.path", "sequence_len": "data.max_length", "output_dir": "output", "lora_r": "lora.r",
    "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout", "micro_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation", "max_steps": "training.max_steps",
    "learning_rate": "training.learning_rate", "weight_decay": "training.weight_decay", "seed": "seed",
    "max_grad_norm": "training.max_grad_norm", "warmup_ratio": "training.warmup_ratio",
    "save_steps": "training.save_steps", "save_total_limit": "training.save_total_limit",
}  # fmt: skip
# What axolotl takes where nothing is given, and which is something else here.
DEFAULTS = {"sequence_len": 512, "num_epochs": 1, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
FINE = {
    "model_type": "config.json says it", "tokenizer_type": "the tokenizer's files say it",
    "bf16": "model.dtype: auto", "fp16": "model.dtype: auto", "tf32": "does not concern 16-bit products",
    "gradient_checkpointing*": "memory.policy: auto", "flash_attention": "model.attention: auto",
    "xformers_attention": "model.attention: auto", "sdp_attention": "model.attention: auto",
    "attn_implementation": "model.attention: auto", "dataset_prepared_path": "prepared data is cached",
    "pad_to_sequence_len": "nothing is padded", "group_by_length": "sequences are packed",
    "logging_steps": "every step is logged", "strict": "always", "lora_mlp_kernel": "memory.tiled_mlp: auto",
    "lora_qkv_kernel": "kernels are chosen here", "lora_o_kernel": "kernels are chosen here",
    "dataset_processes": "preparation decides", "evals_per_epoch": "measured before and after",
    "eval_sample_packing": "held-out rows are packed by the same rule",
}  # fmt: skip
FORMS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "chat_template": None}


def convert_axolotl(original: JsonObject) -> Converted:
    """Returns the recipe. Raises `ConfigError` for a kind of training that there is not here."""
    given = {**DEFAULTS, **given_keys(original)}
    if "rl" in given:
        raise ConfigError(f"rl: {given['rl']}: there is no preference training or reinforcement learning here")
    made = Converted()
    made.rename(given, {"base_model": SAME["base_model"]})
    _precision(given, made)
    made.template(given, "chat_template")
    made.train = named_apart([_source(each, made) for each in objects("datasets", given.pop("datasets", None))])
    tests = objects("test_datasets", given.pop("test_datasets", []))
    made.held_out = named_apart([_source(each, made) for each in tests])
    made.rename(given, SAME)
    made.epochs(given, "num_epochs")
    made.optimizer(given, "optimizer")
    made.schedule(given, "lr_scheduler")
    _data(given, made)
    _targets(given, made)
    made.leave(given, FINE)
    return made


def _precision(given: JsonObject, made: Converted) -> None:
    adapter = given.pop("adapter", None)
    in_4bit, in_8bit = given.pop("load_in_4bit", False), given.pop("load_in_8bit", False)
    if adapter not in ("qlora", "lora"):
        made.note("adapter", adapter, "only LoRA is trained here, not all weights")
    if in_8bit:
        made.note("load_in_8bit", in_8bit, "the base is loaded in 4 bits (NF4); model.load_in_4bit: false takes 16")
    made.put("model.load_in_4bit", bool(in_4bit or in_8bit))


def _source(each: JsonObject, made: Converted) -> JsonObject:
    each = given_keys(each)
    path, kind = str(each.pop("path", "")), each.pop("type", "chat_template")
    files = each.pop("data_files", None)
    if files:
        path = str(files[0] if isinstance(files, list) else files)
    elif "name" in each:
        path += f":{each.pop('name')}"
    if kind == "alpaca":
        made.note("type", kind, "the chat template writes the turns here, not '### Instruction:'")
    elif kind not in FORMS:
        made.note("type", kind, "the form of the rows is found by their columns; look at it with preview")
    columns = {"messages": str(each.pop("field_messages", "messages")), "tools": str(each.pop("field_tools", "tools"))}
    columns["system"] = str(each.pop("field_system", "system"))
    if columns["messages"] == "conversations":
        del columns["messages"]  # known under this name
    made_source = source(path, columns, FORMS.get(kind) if isinstance(kind, str) else None)
    if "split" in each and not files:
        made_source["split"] = each.pop("split")
    for key in (
        "ds_type",
        "message_field_role",
        "message_field_content",
        "roles",
        "message_property_mappings",
        "split",
    ):
        each.pop(key, None)  # found by the file's name and the rows themselves
    made.leave(each, {})
    return made_source


def _data(given: JsonObject, made: Converted) -> None:
    if not given.pop("sample_packing", False):
        made.put("data.packing", "none")
    if given.pop("train_on_inputs", False):
        made.supervise("all")
    if given.pop("dataset_exact_deduplication", False):
        made.put("data.deduplicate", "exact")
    size = given.pop("val_set_size", 0)
    if size:
        made.note("val_set_size", size, "nothing is split off; name held-out data in data.held_out")


def _targets(given: JsonObject, made: Converted) -> None:
    modules, all_linear = given.pop("lora_target_modules", None), given.pop("lora_target_linear", False)
    if modules and not all_linear:
        made.put("lora.target_modules", modules)
