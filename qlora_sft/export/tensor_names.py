"""Translates the names of a loaded model's parameters into those that its files have.

transformers renames tensors while it loads a model (``language_model.model.`` becomes ``model.language_model.``), and
an adapter has the names of the loaded model. A merge writes the files of the base again, under their own names.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from qlora_sft.errors import ConfigError, RunError

Value = TypeVar("Value")


def names_in_files(base: Path, stored: Iterable[str], trust: bool = False) -> dict[str, str]:
    """Returns name in the loaded model -> name in the files of ``base``, for the tensors where the two differ.

    stored: the names in the files. trust: code that ``base`` brings along may be run. Tensors that transformers takes
    apart or puts together are not among them.
    """
    from transformers import AutoConfig
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    from qlora_sft.model.meta_model import meta_model
    from qlora_sft.model.remote_code import runs_code

    try:
        code = runs_code(str(base), trust)
        model = meta_model(AutoConfig.from_pretrained(base, trust_remote_code=code))
    except (ConfigError, OSError, ValueError):  # a model that transformers cannot make has the names that it has
        return {}
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if not isinstance(each, WeightRenaming)]
    parameters = model.state_dict()
    found = {}
    for name in stored:
        loaded, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if converted is None and loaded != name and loaded in parameters:
            found[loaded] = name
    return found


def renamed(values: dict[str, Value], names: dict[str, str]) -> dict[str, Value]:
    """Returns ``values`` under the names that the files have."""
    return {names.get(name, name): value for name, value in values.items()}


def modules_in_files(modules: Iterable[str], names: dict[str, str], stored: Iterable[str]) -> set[str]:
    """Returns the names of ``modules`` in the files. Raises `RunError` for those whose weights are not there: a merge
    that left them out would be onto other weights than were trained on."""
    held = set(stored)
    found = {names.get(f"{module}.weight", f"{module}.weight") for module in modules}
    missing = sorted(found - held)
    if missing:
        raise RunError(
            f"{len(missing)} of {len(found)} layers that were trained in 4 bits have no weight in the base's files "
            f"(first: {missing[0]}); parts that share one weight, or are stored in another form, cannot be merged"
        )
    return {name.removesuffix(".weight") for name in found}
