"""Find the adapter that a run goes on from (``lora.from``) and read what it says of itself; no weights are read."""

from __future__ import annotations

from pathlib import Path

from qlora_sft.errors import ConfigError
from qlora_sft.json_types import JsonObject, read_object
from qlora_sft.text import as_path

# PEFT's names of what our settings are.
KEYS = {
    "r": "r", "alpha": "lora_alpha", "target_modules": "target_modules", "rslora": "use_rslora", "dora": "use_dora",
    "modules": "rank_pattern, alpha_pattern",
}  # fmt: skip
# How PEFT is told a regular expression for the ends of the paths of layers: behind these two texts, in parentheses.
PATTERN_BEGINS = "(?="
PATTERN_GOES_ON = r"(.*\.)?("
# What is around a pattern of ranks and alphas that holds for a layer and for its weight, named as a parameter.
LAYER_BEGINS, OR_WEIGHT = "(?:", r"(\.weight)?"


def adapter_folder(path: str) -> Path | None:
    """Returns the folder of the adapter: ``path`` is a run's folder or its own; None if there is none."""
    given = as_path(path)
    return next((folder for folder in (given / "adapter", given) if (folder / "adapter_config.json").is_file()), None)


def adapter_settings(folder: Path) -> JsonObject:
    """Returns PEFT's settings of the adapter. Raises `ConfigError`."""
    try:
        return read_object(folder / "adapter_config.json")
    except (OSError, ValueError) as error:
        raise ConfigError(f"lora.from: {folder}: no readable adapter_config.json ({error})") from None


def adapter_layers(settings: JsonObject) -> list[str] | str | None:
    """Returns the layers that an adapter is on, as ``lora.target_modules`` has them: names, or a regular expression;
    None if it has none.

    PEFT is told more of a mixture of experts (stacks, and weights of layers by their paths) and of a model with towers
    for images or sound (a pattern that ends with the names).
    """
    modules = settings.get("target_modules")
    if isinstance(modules, str) and modules.startswith(PATTERN_BEGINS) and PATTERN_GOES_ON in modules:
        return modules.split(PATTERN_GOES_ON, 1)[1][:-1]
    paths = modules.rsplit("(", 1)[-1].rstrip(")").split("|") if isinstance(modules, str) else _texts(modules)
    paths = [*paths, *_texts(settings.get("target_parameters"))]
    return sorted({path.removesuffix(".weight").rsplit(".", 1)[-1] for path in paths}) or None


def _texts(value: object) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def setting_of_adapter(settings: JsonObject, key: str) -> object:
    """Returns what an adapter says of our setting ``key``, one of `KEYS`."""
    if key == "target_modules":
        return adapter_layers(settings)
    if key == "modules":
        return _own_shapes(settings)
    value = settings.get(KEYS[key])
    return bool(value) if key in ("rslora", "dora") else value


def _own_shapes(settings: JsonObject) -> list[JsonObject]:
    """Returns ``lora.modules`` of an adapter: what of it has a rank or an alpha of its own."""
    ranks, alphas = (settings.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    assert isinstance(ranks, dict)
    assert isinstance(alphas, dict)
    own: list[JsonObject] = [
        {"match": _of_layer(match), "r": ranks.get(match), "alpha": alphas.get(match)}
        for match in sorted({*ranks, *alphas})
    ]
    return [{key: value for key, value in each.items() if value is not None} for each in own]


def with_weight(pattern: str) -> str:
    """Returns a pattern for what ``pattern`` matches and for the weights of it."""
    return f"{LAYER_BEGINS}{pattern}){OR_WEIGHT}"


def _of_layer(pattern: str) -> str:
    """Returns the pattern that `with_weight` was given; any other as it is."""
    ours = pattern.startswith(LAYER_BEGINS) and pattern.endswith(f"){OR_WEIGHT}")
    return pattern.removeprefix(LAYER_BEGINS).removesuffix(f"){OR_WEIGHT}") if ours else pattern


def fill_from_adapter(lora: object) -> None:
    """Gives the section ``lora`` of a configuration the form, the ranks and the layers of the adapter that it names.

    What is given stays; whether it is the adapter's, and whether there is an adapter, is found before training. A
    finished run can be read without the adapter that it went on from.
    """
    path = lora.get("from") if isinstance(lora, dict) else None
    folder = adapter_folder(path) if isinstance(path, str) else None
    if folder is None or not isinstance(lora, dict):
        return
    settings = adapter_settings(folder)
    for key in KEYS:
        value = setting_of_adapter(settings, key)
        if key not in lora and value is not None:
            lora[key] = value
    if begun_as(folder) == "loftq":
        lora.setdefault("init", "loftq")
    # The names of layers beside the experts may be those of stacks as well.
    parameters = _texts(settings.get("target_parameters"))
    if parameters and all(path.endswith(".weight") for path in parameters):
        lora.setdefault("experts", "frozen")


def base_of_adapter(folder: Path) -> str | None:
    """Returns the fingerprint of the weights that the adapter was trained on, if a run's folder is around it.

    Raises `ConfigError` if what that run wrote of itself is damaged: then nobody knows.
    """
    for name, section in (("manifest.json", "report"), ("begun.json", "")):
        file = folder.parent / name
        if file.is_file():
            found = _part(file, section).get("base_sha256")
            if found:
                return str(found)
    return None


def begun_as(folder: Path) -> str | None:
    """Returns how the adapter began (``lora.init``), if a finished run is around it: one that began by LoftQ holds what
    NF4 has lost of its base for ever. Raises `ConfigError` as `base_of_adapter` does.
    """
    file = folder.parent / "manifest.json"
    lora = _part(file, "config").get("lora") if file.is_file() else None
    return str(lora.get("init", "default")) if isinstance(lora, dict) else None


def _part(file: Path, section: str) -> JsonObject:
    try:
        content = read_object(file)
        part = content.get(section, {}) if section else content
        if not isinstance(part, dict):
            raise ValueError(f"its {section} is not an object")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"lora.from: {file}: damaged ({error}), so it does not say which weights the adapter was trained on; copy "
            "the run again, or name a copy of its folder 'adapter' alone"
        ) from None
    return part
