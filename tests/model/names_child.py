"""Loads well-known names from a fake cache of the Hub through Unsloth and through transformers, in its own process.

``python names_child.py CONFIG MODEL COUNT``: CONFIG is for the folder MODEL, a tiny model, of which every name that
Unsloth's own resolver would replace gets a copy whose last norm is its number, and every replacement one of -1.
Prints one JSON document per name on stdout: what was loaded, recorded and planned.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Literal

from qlora_sft.model.backend import choose_backend


def put(name: str, model: Path, mark: float) -> Path:
    """A copy of ``model`` in the cache, as ``name``, whose last norm is ``mark``."""
    from safetensors.torch import load_file, save_file

    kept = Path(os.environ["HF_HUB_CACHE"]) / f"models--{name.replace('/', '--')}"
    commit = f"{abs(hash((name, mark))):040x}"
    folder = kept / "snapshots" / commit
    shutil.copytree(model, folder)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(mark)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def replaced_names(count: int) -> dict[str, str]:
    """Names that Unsloth would load another repository for, and which: one in so many of all that it knows."""
    from unsloth.models.loader_utils import get_model_name
    from unsloth.models.mapper import FLOAT_TO_INT_MAPPER

    typed = sorted(name for name in FLOAT_TO_INT_MAPPER if name.count("/") == 1 and not name.startswith("unsloth/"))
    wanted = ["meta-llama/Llama-3.2-1B-Instruct", "Qwen/Qwen3-4B", "google/gemma-3-4b-it", "openai/gpt-oss-20b"]
    chosen = [*wanted, *typed[:: len(typed) // count]]
    replaced = {name: str(get_model_name(name, load_in_4bit=True)) for name in chosen}
    found = [(name, other) for name, other in replaced.items() if other.lower() != name.lower()]
    return dict(found[:count])


def main(file: str, model: Path, count: int) -> None:
    names = replaced_names(count)
    for other in {other.lower(): other for other in names.values()}.values():
        put(other, model, -1)
    import torch

    from qlora_sft.config import load_config
    from qlora_sft.model.base import base_of
    from qlora_sft.model.base_folder import resolve_base
    from qlora_sft.model.fingerprint import fingerprint
    from qlora_sft.model.load import load_model
    from qlora_sft.plan.plan import make_plan

    for number, (name, other) in enumerate(names.items(), 2):  # the model itself has 1
        folder = put(name, model, number)
        config = load_config(file, [f"model.path={name}", "model.load_in_4bit=true", "model.backend=unsloth"])
        base = resolve_base(name)
        seen = {"name": name, "other": other, "number": number, "norm": [], "adapter": []}
        for backend in ("unsloth", "transformers"):
            loaded = load_model(config, base, torch.float32, backend)
            seen["norm"].append(float(base_of(loaded).get_decoder().norm.weight.float().mean()))
            seen["adapter"].append(loaded.peft_config["default"].base_model_name_or_path)
        seen["plan"] = make_plan(config, data=False, timing=False, say=lambda _: None).model.path
        seen["fingerprint"] = fingerprint(base) == fingerprint(folder) != fingerprint(model)
        print(json.dumps(seen), file=sys.__stdout__, flush=True)
    packed = [packed_as_it_is(file, model, "unsloth"), packed_as_it_is(file, model, "transformers")]
    print(json.dumps({"packed": packed}), file=sys.__stdout__, flush=True)


def packed_as_it_is(file: str, model: Path, backend: Literal["unsloth", "transformers"]) -> bool:
    """Whether a repository that was saved in NF4 is loaded with the codes that its file holds."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from qlora_sft.config import load_config
    from qlora_sft.model.base import base_of
    from qlora_sft.model.base_folder import resolve_base
    from qlora_sft.model.load import load_base, load_model, quantized_modules

    name, packed = f"unsloth/packed-{backend}-bnb-4bit", model.with_name(f"packed-{backend}")
    load_base(str(model), torch.float32, load_in_4bit=True).save_pretrained(packed)
    AutoTokenizer.from_pretrained(model).save_pretrained(packed)
    files = load_file(put(name, packed, 1) / "model.safetensors")
    config = load_config(file, [f"model.path={name}", "model.load_in_4bit=true"])
    loaded = load_model(config, resolve_base(name), torch.float32, backend)
    weights = {module: base_of(loaded).get_submodule(module).base_layer.weight for module in quantized_modules(loaded)}
    return len(weights) == 14 and all(torch.equal(w.data, files[f"{module}.weight"]) for module, w in weights.items())


if __name__ == "__main__":
    choose_backend("unsloth")
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
