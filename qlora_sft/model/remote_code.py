"""Find code that a repository brings along because transformers has no model or tokenizer of that kind.

It would be run on this machine. Nothing is run to find it: config.json and tokenizer_config.json name what transformers
would load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from qlora_sft.config import ModelConfig
from qlora_sft.errors import ConfigError
from qlora_sft.json_types import read_object
from qlora_sft.model.base_files import check_tokenizer_files, read_config


def check_code(model: ModelConfig, base: str) -> None:
    """Raises `ConfigError` for a ``base`` with code of its own that would be run, unless ``model`` trusts it."""
    settings = read_config(base)
    if files := model_code(settings):
        kind = settings.get("model_type")
        if not model.trust_remote_code:
            raise ConfigError(
                f"model.trust_remote_code: transformers has no model {kind!r}, and {model.path} brings code for it, "
                f"which would be run on this machine with your rights: {', '.join(files)} (in {base}). Read it and set "
                "model.trust_remote_code=true, with model.revision for a repository of the Hub; or name another model"
            )
    if files := tokenizer_code(base):
        raise ConfigError(
            f"model.path: the tokenizer of {model.path} is code of its own ({', '.join(files)} in {base}), which is "
            "not run here; give the model a tokenizer.json with a tokenizer_class that transformers has"
        )


def check_folder(folder: Path) -> None:
    """Raises `ConfigError` for a model folder that cannot be opened as it is, without a run that says what to trust."""
    base = str(folder)
    if files := [*model_code(read_config(base)), *tokenizer_code(base)]:
        raise ConfigError(
            f"{folder}: transformers does not have this model, and the folder brings code for it, which would be run "
            f"on this machine with your rights: {', '.join(files)}. Only a run that was trained with "
            "model.trust_remote_code=true runs such code; name the folder of the run"
        )
    check_tokenizer_files(folder)


def runs_code(base: str, trust: bool) -> bool:
    """Says whether code in the folder ``base`` is to be run: it is trusted, and transformers has none of its own."""
    return trust and bool(model_code(read_config(base)))


def model_code(settings: Mapping[str, object]) -> list[str]:
    """Returns the files that transformers would run for this config.json; none for a model that it has itself."""
    from transformers import CONFIG_MAPPING

    if settings.get("model_type") in CONFIG_MAPPING:
        return []
    named = settings.get("auto_map")
    named = named if isinstance(named, dict) else {}
    return _files(named.get(name) for name in ("AutoConfig", "AutoModelForCausalLM"))


def tokenizer_code(base: str) -> list[str]:
    """Returns the files that transformers would run for the tokenizer; none for a class that it has itself."""
    import transformers

    file = Path(base) / "tokenizer_config.json"
    if not file.is_file():
        return []
    try:
        settings = read_object(file)
    except (OSError, ValueError):
        return []  # which is said where the tokenizer is read
    if hasattr(transformers, str(settings.get("tokenizer_class"))):
        return []
    given = settings.get("auto_map")
    if isinstance(given, dict):  # in older files it is the tokenizers themselves
        given = given.get("AutoTokenizer")
    return _files(given if isinstance(given, list) else [given])


def _files(references: Iterable[object]) -> list[str]:
    """Returns the files of ``module.Class``, or ``owner/name--module.Class`` for code in another repository."""
    named = (reference for reference in references if reference and isinstance(reference, str))
    return sorted({f"{reference.rpartition('.')[0]}.py".replace("--", ":") for reference in named})


def is_foreign(settings: object) -> bool:
    """Says whether the class of transformers' configuration object came with a repository, and was trusted."""
    return type(settings).__module__.startswith("transformers_modules.")
