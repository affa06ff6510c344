"""Collect the parts of a converted recipe, and what of the original has no counterpart."""

from __future__ import annotations

from dataclasses import dataclass, field

from qlora_sft.config_data import FORMS, SourceConfig, source_name
from qlora_sft.config_lora import REFUSED, REFUSED_INITS
from qlora_sft.errors import ConfigError
from qlora_sft.json_types import JsonObject

# The shipped templates, by the names that other toolkits have for them.
TEMPLATES = {
    "chatml": "chatml", "llama3": "llama3", "llama-3": "llama3", "llama-3.1": "llama3", "llama-3.2": "llama3",
    "llama-3.3": "llama3", "gemma-3": "gemma", "phi-4": "phi", "gemma": "gemma", "gemma2": "gemma", "gemma3": "gemma",
    "mistral": "mistral", "phi": "phi", "phi_4": "phi", "qwen3": "qwen3",
}  # fmt: skip
OPTIMIZERS = {
    "adamw_torch": "adamw_torch", "adamw_torch_fused": "adamw_torch_fused", "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit", "adamw_torch_8bit": "adamw_8bit",
    "adamw_hf": "adamw_torch", "paged_adamw_32bit": "adamw_torch",
}  # fmt: skip
SCHEDULES = {
    "linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}  # fmt: skip
LOGGERS = ("tensorboard", "wandb", "trackio", "mlflow")
# Beginnings of adapters that other toolkits call alike. Their LoftQ has a base of its own.
INITS = ("gaussian", "orthogonal")
# Where something of the kind is found here that no key of theirs can be turned into.
ELSEWHERE = {
    "evals_per_epoch": "evaluation.every_steps counts optimizer steps; held-out rows are measured before and after",
    "bnb_config_kwargs": "4 bits are NF4 here, doubly quantised",
    "saves_per_epoch": "training.save_steps counts optimizer steps",
    "hub_model_id": "qlora-sft push uploads a finished run",
    "push_to_hub": "qlora-sft push uploads a finished run",
    "merge_lora": "qlora-sft merge merges a finished run",
    "resume_from_checkpoint": "qlora-sft train --resume goes on with a run that was interrupted",
    "enable_thinking": "rows say it themselves, or thinking of their source does; the empty think block of an answer "
    "without reasoning belongs to the prompt",
    "message_field_training": "a message with train: false is left out here",
}
# No number of a configuration is larger; infinities and what no float holds are.
LARGEST = 1e18


@dataclass
class Converted:
    """Holds a recipe in the making, and notes on what could not be said in it."""

    sections: dict[str, JsonObject] = field(default_factory=dict)
    top: JsonObject = field(default_factory=dict)
    """What stands in no section."""
    train: list[JsonObject] = field(default_factory=list)
    held_out: list[JsonObject] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def tree(self) -> JsonObject:
        """Returns the recipe in the order of the schema."""
        data = {"train": self.train, **({"held_out": self.held_out} if self.held_out else {})}
        sections: JsonObject = {**self.sections, "data": {**data, **self.sections.get("data", {})}}
        order = ("model", "data", "lora", "training", "evaluation")
        return {**{name: sections[name] for name in order if name in sections}, **self.top}

    def put(self, key: str, value: object) -> None:
        """Writes ``value`` under ``section.name``."""
        section, _, name = key.rpartition(".")
        place = self.sections.setdefault(section, {}) if section else self.top
        place[name] = value

    def note(self, key: str, value: object, why: str) -> None:
        """Notes that ``key: value`` of the original is not in the recipe, and why."""
        self.notes.append(f"{key}: {value}: {why}")

    def rename(self, given: JsonObject, names: dict[str, str]) -> None:
        """Moves the keys whose value means the same here; ``names`` maps theirs to ours."""
        for theirs, ours in names.items():
            if theirs in given:
                self.put(ours, given.pop(theirs))

    def epochs(self, given: JsonObject, key: str) -> None:
        """Moves a number of epochs; it counts nothing where the original sets max_steps, and may then be anything."""
        value = given.pop(key)
        epochs = number(key, value)
        if epochs <= 0:
            self.note(key, value, "must be above 0 here, so 1 is written; training.max_steps ends the run")
        self.put("training.epochs", epochs if epochs > 0 else 1)

    def split(self, given: JsonObject, key: str) -> None:
        """Moves the share of the data that is split off for evaluation; a number of rows has no counterpart."""
        value = given.pop(key, 0)
        share = number(key, value)
        if 0 < share <= 0.5 and not self.held_out:
            self.put("data.held_out", f"{100 * share:.9g}%")
        elif share:
            self.note(key, value, "a share of at most half is split off here, beside no named data (data.held_out: 5%)")

    def optimizer(self, given: JsonObject, key: str) -> None:
        """Moves the optimizer if there is one of the same kind here."""
        name = text(key, given.pop(key, ""))
        if name in OPTIMIZERS:
            self.put("training.optimizer", OPTIMIZERS[name])
        elif name:
            self.note(key, name, "training.optimizer has no such kind; auto takes AdamW in 8 bits on a GPU")

    def schedule(self, given: JsonObject, key: str) -> None:
        """Moves the schedule, if there is one of its kind here."""
        name = text(key, given.pop(key, ""))
        if name in SCHEDULES:
            self.put("training.schedule", SCHEDULES[name])
        elif name.startswith("cosine"):
            self.put("training.schedule", "cosine")
            self.note(key, name, "training.schedule has no such kind; one cosine to zero is written")
        elif name:
            self.note(key, name, "training.schedule has no such kind; the learning rate falls linearly to zero")
        if name == "constant":  # without a warm-up there, whatever else is given
            given.pop("warmup_ratio", None)
            given.pop("warmup_steps", None)
            self.put("training.warmup_ratio", 0.0)
        elif given.get("warmup_steps") == 0:
            given.pop("warmup_steps")

    def reporting(self, given: JsonObject, key: str) -> None:
        """Moves the loggers that there are here, too, and notes the others."""
        names = texts(key, given.pop(key, []))
        known = [name for name in names if name in LOGGERS]
        if known:
            self.put("training.report_to", known)
        for name in names:
            if name not in (*LOGGERS, "none", "all", ""):
                self.note(key, name, "training.report_to has no such logger; metrics.jsonl has every step")

    def beginning(self, given: JsonObject, key: str) -> None:
        """Moves how adapters begin, if that can be had here."""
        value = given.pop(key, None)
        if value in INITS:
            self.put("lora.init", value)
        elif isinstance(value, str):
            self.note(key, value, REFUSED_INITS.get(value.split("_niter")[0], "lora.init has no such kind"))

    def refuse_modules(self, given: JsonObject, key: str) -> None:
        """Notes modules that would be trained whole."""
        if key in given:
            self.note(key, given.pop(key), REFUSED["modules_to_save"])

    def quantization(self, given: JsonObject, key: str) -> None:
        """Notes a form of 4 bits that is not NF4."""
        kind = text(key, given.pop(key, "nf4"))
        if kind != "nf4" and self.sections["model"].get("load_in_4bit"):
            self.note(key, kind, "4 bits are NF4 here")

    def biases(self, given: JsonObject, key: str) -> None:
        """Notes biases that would be trained."""
        value = given.pop(key, "none")
        if value not in ("none", False):
            self.note(key, value, REFUSED["bias"])

    def template(self, given: JsonObject, key: str) -> None:
        """Moves the name of a chat template if it is a shipped one."""
        name = text(key, given.pop(key, ""))
        if name in TEMPLATES:
            self.put("model.chat_template", TEMPLATES[name])
        elif name and name not in ("tokenizer_default", "default", "empty"):
            self.note(key, name, "the tokenizer's own template is used; model.chat_template takes a .jinja file, too")

    def stop_tokens(self, tokens: list[str]) -> None:
        """Adds tokens that end a turn."""
        known = texts("model.stop_tokens", self.sections.get("model", {}).get("stop_tokens", []))
        if new := [token for token in tokens if token not in known]:
            self.put("model.stop_tokens", [*known, *new])

    def supervise(self, value: str) -> None:
        """Says for every source which tokens are trained."""
        for source in self.train:
            source["supervise"] = value

    def leave(self, given: JsonObject, fine: dict[str, str], default_on: tuple[str, ...] = ()) -> None:
        """Notes every key that is left, but for those of which ``fine`` says why nothing has to be said here.

        A switch that is off asks for nothing, unless it is among ``default_on``.
        """
        for key, value in given.items():
            if value is False and key not in default_on:
                continue
            if not any(key == known or (known.endswith("*") and key.startswith(known[:-1])) for known in fine):
                self.note(key, value, ELSEWHERE.get(key, "has no counterpart"))


def source(path: str, columns: dict[str, str], form: str | None) -> JsonObject:
    """Returns a source with the columns that are not called as they are here."""
    made: JsonObject = {"path": path}
    if form:
        made["format"] = form
    known = {name for needed, optional in FORMS.values() for name in (*needed, *optional)}
    other = {ours: theirs for ours, theirs in columns.items() if ours != theirs and ours in known}
    if other:
        made["columns"] = other
    return made


def named_apart(sources: list[JsonObject]) -> list[JsonObject]:
    """Gives sources that reports would call by one name a name each."""
    names = [source_name(SourceConfig(str(each["path"]))) for each in sources]
    taken = set(names)
    for count, (name, each) in enumerate(zip(names, sources, strict=True)):
        if names.count(name) > 1:
            each["name"] = next(new for i in range(count, 2 * len(names) + 1) if (new := f"{name}-{i}") not in taken)
            taken.add(str(each["name"]))
    return sources


def given_keys(tree: JsonObject) -> JsonObject:
    """Returns the keys that have a value; published configurations list many that have none."""
    return {key: value for key, value in tree.items() if value not in (None, [], {}, "")}


def number(key: str, value: object) -> float:
    """Returns a finite number. Raises `ConfigError` for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return float(value)
    raise ConfigError(f"{key}: expected a finite number, got {value!r}")


def text(key: str, value: object) -> str:
    """Returns a text, also of a number. Raises `ConfigError` for a list or a section."""
    if isinstance(value, list | dict):
        raise ConfigError(f"{key}: expected a text, got {value!r}")
    return str(value)


def texts(key: str, value: object) -> list[str]:
    """Returns the items of a list, or of a text in which commas part them. Raises `ConfigError` for anything else."""
    items = value if isinstance(value, list) else text(key, value).split(",")
    return [text(key, item).strip() for item in items]


def objects(key: str, value: object) -> list[JsonObject]:
    """Returns a list of sections. Raises `ConfigError` for anything else."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    raise ConfigError(f"{key}: expected a list of data sets with keys, got {value!r}")
