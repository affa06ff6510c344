"""Convert the common arguments of TRL, as its YAML has them, or as `python_arguments` finds them in a script."""

from __future__ import annotations

from qlora_sft.convert.evaluating import eval_strategy, move_evaluation
from qlora_sft.convert.pieces import Converted, given_keys, named_apart, number, objects, source, text, texts
from qlora_sft.errors import ConfigError
from qlora_sft.json_types import JsonObject

SAME = {
    "model_name_or_path": "model.path", "trust_remote_code": "model.trust_remote_code",
    "model_revision": "model.revision", "max_length": "data.max_length", "output_dir": "output", "lora_r": "lora.r",
    "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout", "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation", "learning_rate": "training.learning_rate",
    "weight_decay": "training.weight_decay", "seed": "seed", "max_grad_norm": "training.max_grad_norm",
    "warmup_ratio": "training.warmup_ratio", "warmup_steps": "training.warmup_steps",
    "neftune_noise_alpha": "training.neftune_alpha", "use_rslora": "lora.rslora", "use_dora": "lora.dora",
    "save_steps": "training.save_steps",
    "save_total_limit": "training.save_total_limit",
}  # fmt: skip
# What TRL takes where nothing is given, and which is something else here.
DEFAULTS: JsonObject = {
    "max_length": 1024, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3,
    "learning_rate": 2e-5, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "warmup_ratio": 0.0, "seed": 42,
    "save_steps": 500, "logging_steps": 10,
}  # fmt: skip
FINE = {
    "bf16": "model.dtype: auto", "fp16": "model.dtype: auto", "dtype": "model.dtype: auto", "torch_dtype": "the same",
    "tf32": "does not concern 16-bit products", "attn_implementation": "model.attention: auto",
    "gradient_checkpointing*": "memory.policy: auto", "use_gradient_checkpointing": "memory.policy: auto",
    "activation_offloading": "memory.policy: auto", "logging_steps": "every step is logged",
    "logging_strategy": "every step is logged", "logging_first_step": "every step is logged",
    "per_device_eval_batch_size": "measured alike", "do_eval": "measured before and after",
    "dataset_num_proc": "preparation decides", "dataloader_num_workers": "preparation decides",
    "dataset_text_field": "the columns are found", "dataset_test_split": "see data.held_out",
    "bnb_4bit*": "NF4, doubly quantised", "use_bnb_nested_quant": "NF4, doubly quantised",
    "lora_task_type": "a language model", "task_type": "a language model", "shuffle_dataset": "rows are shuffled",
    "padding_free": "nothing is padded", "overwrite_output_dir": "--overwrite", "remove_unused_columns": "by columns",
    "save_strategy": "training.save_steps", "eval_packing": "held-out rows are packed by the same rule",
}  # fmt: skip


def convert_trl(original: JsonObject) -> Converted:
    """Returns the recipe. Raises `ConfigError` for a kind of training that there is not here."""
    given = {**DEFAULTS, **given_keys(original)}
    if given.get("warmup_steps"):
        del given["warmup_ratio"]
    for key in ("beta", "reward_model_path", "reward_funcs"):
        if key in given:
            raise ConfigError(f"{key}: there is no preference training or reinforcement learning here")
    if "max_steps" in given and number("max_steps", given["max_steps"]) <= 0:
        del given["max_steps"]  # theirs for "by epochs"
    made = Converted()
    _precision(given, made)
    _template(given, made)
    _sources(given, made)
    _split(given, made)
    move_evaluation(given, made, patience="early_stopping_patience", by_steps=False, best=False)
    _masks(given, made)
    made.schedule(given, "lr_scheduler_type")
    made.reporting(given, "report_to")
    made.rename(given, {**SAME, "max_steps": "training.max_steps"})
    made.epochs(given, "num_train_epochs")
    made.optimizer(given, "optim")
    made.beginning(given, "init_lora_weights")
    made.refuse_modules(given, "lora_modules_to_save")
    made.biases(given, "bias")
    _targets(given, made)
    made.leave(given, FINE)
    return made


def _precision(given: JsonObject, made: Converted) -> None:
    if not given.pop("use_peft", False):
        made.note("use_peft", False, "only LoRA is trained here, not all weights")
    if given.pop("load_in_8bit", False):
        made.note("load_in_8bit", True, "there are only 4 bits (NF4) and 16 bits here; 16 is written")
    made.put("model.load_in_4bit", bool(given.pop("load_in_4bit", False)))
    made.quantization(given, "bnb_4bit_quant_type")


def _template(given: JsonObject, made: Converted) -> None:
    path = text("chat_template_path", given.pop("chat_template_path", ""))
    if path.endswith(".jinja"):
        made.put("model.chat_template", path)
    elif path:
        made.note("chat_template_path", path, "a template of another model; model.chat_template takes its .jinja file")
    made.template(given, "chat_template")
    if "eos_token" in given:
        made.stop_tokens([text("eos_token", given.pop("eos_token"))])


def _sources(given: JsonObject, made: Converted) -> None:
    """Writes the sources; those whose split is one for tests are held out."""
    entries = objects("datasets", given.pop("datasets", []))
    if "dataset_name" in given:
        named = {"path": given.pop("dataset_name"), "name": given.pop("dataset_config", None)}
        entries = [{**named, "split": given.pop("dataset_train_split", "train")}, *entries]
        if eval_strategy(given, "no") != "no":
            entries.append({**named, "split": given.pop("dataset_test_split", "test")})
    for each in (part for entry in entries for part in _by_split(given_keys(entry))):
        split = text("split", each.pop("split", "train"))
        apart = text("data_files", each.pop("named", split)).startswith(("test", "valid", "eval", "dev"))
        into = made.held_out if apart else made.train
        for one in _of_one(each, made):
            if "fraction" in each:
                one["weight"] = each["fraction"]
                made.put("data.mixture", "explicit")
            into.append({**one, **({"split": split} if split != "train" else {})})
        made.leave(each, {"columns": "found by their names", "fraction": "its weight"})
    made.train, made.held_out = named_apart(made.train), named_apart(made.held_out)


def _by_split(entry: JsonObject) -> list[JsonObject]:
    """Returns a data set for each split of which ``data_files`` names the files, or for the one that is asked for."""
    files = entry.get("data_files")
    if not isinstance(files, dict):
        return [entry]
    asked = text("split", entry.get("split", ""))
    # Files have no splits here; a part of one stays, and is refused when it is read.
    kept = entry if "[" in asked else {key: value for key, value in entry.items() if key != "split"}
    names = [name for name in files if asked.partition("[")[0] in ("", name)]
    return [{**kept, "data_files": files[name], "named": name} for name in names]


def _of_one(each: JsonObject, made: Converted) -> list[JsonObject]:
    path = text("path", each.pop("path", ""))
    files = each.pop("data_files", None)
    if files:
        return [source(file, {}, None) for file in texts("data_files", files)]
    return [source(f"{path}:{each.pop('name')}" if "name" in each else path, {}, None)]


def _split(given: JsonObject, made: Converted) -> None:
    """Writes the share that a script splits off, so that it is not trained on here either."""
    if given.get("test_size") is Ellipsis:
        made.note("test_size", given.pop("test_size"), "is computed; set data.held_out by hand")
    made.split(given, "test_size")


def _masks(given: JsonObject, made: Converted) -> None:
    """Writes which tokens are trained, and notes it where TRL's default is another one."""
    assistant, completion = given.pop("assistant_only_loss", None), given.pop("completion_only_loss", None)
    # Either switch masks what is not the answer, whatever the other says.
    if False in (assistant, completion) and True not in (assistant, completion):
        made.supervise("all")
    elif assistant is None:
        why = "without it TRL trains every token, as supervise: all does here; assistant turns alone are trained"
        made.note("assistant_only_loss", "not given", why)
    if not given.pop("packing", False):
        made.put("data.packing", "none")
    strategy = text("packing_strategy", given.pop("packing_strategy", "bfd"))
    if strategy != "bfd":
        made.note("packing_strategy", strategy, "best-fit decreasing is used; rows are never cut to fit")


def _targets(given: JsonObject, made: Converted) -> None:
    modules = given.pop("lora_target_modules", None)
    if modules is None:
        made.note(
            "lora_target_modules", "not given", "PEFT would adapt some of the attention's layers, all-linear is written"
        )
    elif modules not in ("all-linear", ["all-linear"]):
        made.put("lora.target_modules", texts("lora_target_modules", modules))
