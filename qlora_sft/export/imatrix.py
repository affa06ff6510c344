"""Computes llama.cpp's importance matrix from the training data with the merged model itself.

For every weight it holds the sum over tokens of the square of each input, which says what an error in that column
costs. llama.cpp has a program for it. This module writes the same file from hooks in PyTorch, so that the program need
not be built, and it can run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_sft.errors import RunError
from qlora_sft.run.folder import Run
from qlora_sft.say import Say, tell

if TYPE_CHECKING:
    import torch
    from torch import nn

TOKENS = 16384


def write_imatrix(run: Path, merged: Path, architecture: str, target: Path, say: Say = tell) -> int:
    """Writes the importance matrix to ``target`` and returns the number of tokens that it was computed from.

    Raises `RunError` if the training data cannot be read, or if the model overflows on it.
    """
    documents = _training_documents(run)
    say(f"importance matrix from {sum(map(len, documents)):,} tokens of the training data")
    sums, tokens = _collect(merged, documents, Run.open(run).model.trust_remote_code)
    if not all(np.isfinite(values).all() for values in sums.values()):
        raise RunError(
            "no importance matrix: the merged model overflows in the type that it computes in here (float16 on a GPU "
            "without bfloat16); name a file made by llama-imatrix with --imatrix FILE, or take --imatrix none"
        )
    names = gguf_names(architecture, merged)
    entries = {names(f"{module}.weight"): values for module, values in sums.items()}
    _write(target, {name: values for name, values in entries.items() if name}, tokens)
    return tokens


def _training_documents(run: Path) -> list[list[int]]:
    """Returns the first documents of all sources in turn, until there are enough tokens."""
    from qlora_sft.errors import QloraSftError
    from qlora_sft.run_data import saved_text

    chosen: list[list[int]] = []
    try:
        config = Run.open(run).config
        for document in saved_text(run).documents(config):
            if sum(map(len, chosen)) >= TOKENS:
                break
            chosen.append(document.input_ids)
    except (QloraSftError, OSError) as error:
        cure = "name a file made by llama-imatrix with --imatrix FILE, or choose q8_0, q6_k or q5_k_m"
        raise RunError(f"no importance matrix: the run's training data cannot be read ({error}); {cure}") from None
    return chosen


def _collect(merged: Path, documents: list[list[int]], trust: bool) -> tuple[dict[str, np.ndarray], int]:
    """Returns, by module, the sum over tokens of the squares of its inputs [in], and the number of tokens."""
    import torch

    from qlora_sft.model.load import compute_dtype, load_base

    model = load_base(str(merged), compute_dtype("auto")[0], load_in_4bit=False, trust=trust).eval()
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].float().flatten(0, -2).square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for ids in documents:
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    return {name: values.cpu().numpy() for name, values in sums.items()}, sum(map(len, documents))


def gguf_names(architecture: str, model: Path) -> Callable[[str], str | None]:
    """Returns a function that translates a tensor's name in transformers into its name in the GGUF.

    The function returns None for a tensor that has no counterpart.
    """
    import json

    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    from qlora_sft.model.base_files import text_config

    config = text_config(json.loads((model / "config.json").read_text(encoding="utf-8")))
    layers = config.get("num_hidden_layers") or config.get("n_layer") or config.get("num_layers")
    # Nemotron-H as transformers saves it names its layers one by one.
    layers = layers or len(config.get("layer_types") or config.get("layers_block_type") or ())
    known = [arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture]
    if not known or not layers:
        return lambda _: None
    names = get_tensor_name_map(known[0], int(layers))

    def translate(name: str) -> str | None:
        # Of a model that also sees, llama.cpp takes the language model, and its names are those without the towers.
        name = name.replace("language_model.", "", 1)
        found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    return translate


def _write(target: Path, entries: dict[str, np.ndarray], tokens: int) -> None:
    """Writes the file as llama.cpp's own program does."""
    from gguf import GGUFWriter

    writer = GGUFWriter(target, arch="")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["the run's training data"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", tokens)
    for name, values in entries.items():
        writer.add_tensor(f"{name}.in_sum2", values.astype(np.float32).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), tokens, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
