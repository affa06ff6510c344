"""Read the arguments of TRL, PEFT and Unsloth out of a Python script, without running it."""

from __future__ import annotations

import ast

from qlora_sft.errors import ConfigError
from qlora_sft.json_types import JsonObject

# The calls that are read, by the last part of their name; what their arguments are called in TRL's YAML; and what is
# meant where they do not say it.
CALLS: dict[str, tuple[dict[str, str], JsonObject]] = {
    "SFTConfig": ({"max_seq_length": "max_length"}, {}),
    "TrainingArguments": ({}, {"learning_rate": 5e-5}),
    "UnslothTrainingArguments": ({}, {"learning_rate": 5e-5}),
    "SFTTrainer": ({"max_seq_length": "max_length"}, {}),
    "LoraConfig": (
        {"r": "lora_r", "target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save"},
        {"use_peft": True, "lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0},
    ),
    "get_peft_model": (
        {"r": "lora_r", "target_modules": "lora_target_modules", "random_state": "seed",
         "modules_to_save": "lora_modules_to_save"},
        {"use_peft": True, "lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.0},
    ),
    "BitsAndBytesConfig": ({}, {"bnb_4bit_quant_type": "fp4"}),
    "EarlyStoppingCallback": ({}, {"early_stopping_patience": 1}),
    "from_pretrained": (
        {"model_name": "model_name_or_path", "pretrained_model_name_or_path": "model_name_or_path",
         "max_seq_length": "max_length", "revision": "model_revision"},
        {},
    ),
    "get_chat_template": ({}, {}),
    "train_on_responses_only": ({}, {"assistant_only_loss": True}),
}  # fmt: skip
# What is no setting: objects, and texts that only mark where an answer begins.
PASSED = {
    "model", "tokenizer", "processing_class", "args", "train_dataset", "eval_dataset", "peft_config", "data_collator",
    "quantization_config", "instruction_part", "response_part", "mapping", "formatting_func", "callbacks", "token",
    "device_map", "local_files_only",
}  # fmt: skip
# Their loaders have the same name and load no weights.
NO_MODELS = {"AutoTokenizer", "AutoProcessor", "AutoConfig", "GenerationConfig"}
# Unsloth's loader takes 4 bits unless it is told otherwise.
UNSLOTH = {"FastLanguageModel", "FastModel", "FastVisionModel"}


def python_arguments(code: str) -> tuple[JsonObject, list[str]]:
    """Returns the arguments under the names that TRL's YAML has for them, and notes on those that are computed.

    Raises `ConfigError` if the code is no Python, or has none of the calls.
    """
    try:
        tree = ast.parse("\n".join("" if line.lstrip().startswith(("!", "%")) else line for line in code.split("\n")))
    except SyntaxError as error:
        raise ConfigError(f"line {error.lineno}: this is no Python: {error.msg}") from None
    known = _constants(tree)
    found: JsonObject = {}
    data: list[JsonObject] = []
    notes: list[str] = []
    loaded = False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        owner, name = _name(call)
        if name == "load_dataset":
            data.append(_data_set(call, known))
        elif name == "train_test_split":
            sizes = [keyword.value for keyword in call.keywords if keyword.arg == "test_size"]
            size = next(iter([*call.args[:1], *sizes]), None)
            found["test_size"] = 0.25 if size is None else _value(size, known)
        elif name in CALLS and owner not in NO_MODELS and not (name == "get_peft_model" and not owner):
            # What was trained is loaded again at the end of many scripts, to try it.
            if name != "from_pretrained" or not loaded:
                found.update(_arguments(call, owner, name, known, notes))
            loaded = loaded or name == "from_pretrained"
    if not found:
        raise ConfigError("no call of SFTConfig, LoraConfig, from_pretrained or the like was found in it")
    return {**found, **({"datasets": data} if data else {})}, notes


def _arguments(call: ast.Call, owner: str, name: str, known: JsonObject, notes: list[str]) -> JsonObject:
    names, implied = CALLS[name]
    found: JsonObject = {
        **implied,
        **({"load_in_4bit": True} if owner in UNSLOTH and name == "from_pretrained" else {}),
    }
    given = [(keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg]
    if name == "from_pretrained" and call.args:
        given.insert(0, ("model_name", call.args[0]))
    elif name == "SFTTrainer":  # its model may be a name
        given += [
            ("model_name_or_path", node) for key, node in given if key == "model" and isinstance(node, ast.Constant)
        ]
    for key, node in given:
        value = _value(node, known)
        if key in PASSED:
            continue
        if value is Ellipsis:
            notes.append(f"{key}: {ast.unparse(node)}: is computed in line {node.lineno}; set it by hand")
        else:
            found[names.get(key, key)] = value
    return found


def _data_set(call: ast.Call, known: JsonObject) -> JsonObject:
    values = {keyword.arg: _value(keyword.value, known) for keyword in call.keywords if keyword.arg}
    values |= dict(zip(("path", "name"), (_value(node, known) for node in call.args), strict=False))
    kept = ("path", "name", "split", "data_files")
    entry: JsonObject = {key: value for key, value in values.items() if key in kept and value is not Ellipsis}
    entry.setdefault("path", "data.jsonl")
    return entry


def _constants(tree: ast.Module) -> JsonObject:
    """Returns what names of the script stand for, where that is a value written down."""
    known: JsonObject = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            value = _value(node.value, known)
            if value is not Ellipsis:
                known[node.targets[0].id] = value
    return known


def _value(node: ast.expr, known: JsonObject) -> object:
    """Returns the value of an expression that is written down, or named so; else Ellipsis."""
    if isinstance(node, ast.Name):
        return known.get(node.id, ...)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        left, right = _value(node.left, known), _value(node.right, known)
        return left * right if isinstance(left, int) and isinstance(right, int) else ...
    try:
        value: object = ast.literal_eval(node)
    except ValueError:
        return ...
    return list(value) if isinstance(value, tuple) else value


def _name(call: ast.Call) -> tuple[str, str]:
    """Returns the last two parts of the name that is called; the first is empty for a plain function."""
    function = call.func
    if isinstance(function, ast.Attribute):
        owner = function.value
        last = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
        return last, function.attr
    return "", function.id if isinstance(function, ast.Name) else ""
