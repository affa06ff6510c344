"""Gives the adapters of a model that is about to be trained their beginning (``lora.init``).

The base is never changed: what is merged and exported is then the adapter on the base that was named. PEFT's own forms
of these beginnings take the base's type, which for NF4 is bytes, or need a GPU; the formulas are PEFT's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_sft.config import LoraConfig
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.model.base import base_of
from qlora_sft.model.base_files import safetensors_header
from qlora_sft.model.linears import shape_of
from qlora_sft.model.snapshot import weight_files

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from qlora_sft.model.base import CausalModel

# Larger matrices are decomposed at random directions: it takes a fraction of the time and holds a little less.
EXACT = 2048
MORE_DIRECTIONS, ITERATIONS = 32, 6


def begin_adapters(model: CausalModel, lora: LoraConfig, base: str, seed: int) -> str:
    """Initialises the adapters of the linear layers of ``model`` as ``lora.init`` says; returns a message about it, ""
    for the default.

    base: the folder with the weights that ``model`` was loaded from. Raises `ConfigError` if loftq does not find them
    there.
    """
    if lora.init in ("default", "eva"):  # eva needs the data (lora_eva.py)
        return ""
    if lora.init == "loftq":
        return _hold_what_nf4_lost(model, base, seed)
    draw = torch.Generator().manual_seed(seed)
    make = _gaussian if lora.init == "gaussian" else orthogonal
    count = 0
    for _, layer in adapted_layers(model):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        put_factors(layer, *make(len(A), A.shape[1], len(B), draw))
        count += 1
    return f"{count} layers begin {lora.init}, with a product of zero (lora.init={lora.init})"


def adapted_layers(model: CausalModel) -> Iterator[tuple[str, LoraLayer]]:
    """Yields the path in the base and PEFT's module of every linear layer that has an adapter."""
    for path, module in base_of(model).named_modules():
        layer: Any = module
        if "default" in getattr(layer, "lora_A", ()) and isinstance(layer.get_base_layer(), torch.nn.Linear):
            yield path, layer


def check_shapes(model: CausalModel, lora: LoraConfig) -> None:
    """Raises `RunError` unless every adapter has the rank, the scale and the form that ``lora`` asks for.

    A library that passes over a setting would train something else without a word.
    """
    for path, layer in adapted_layers(model):
        rank, alpha = shape_of(path, lora)
        wanted = (rank, alpha / (math.sqrt(rank) if lora.rslora else rank), lora.dora)
        found = (
            len(layer.lora_A["default"].weight),
            layer.scaling["default"],
            "default" in layer.lora_magnitude_vector,
        )
        if found != wanted:
            raise RunError(f"{path}: its adapter has (rank, scale, DoRA) {found} instead of {wanted}; set "
                           "model.backend=transformers")  # fmt: skip


def orthogonal(rank: int, inputs: int, outputs: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns A [rank, inputs] and B [outputs, rank], at random, with a product of zero: A lies in the odd rows of an
    orthogonal matrix and B in the even ones."""
    rows, _ = torch.linalg.qr(torch.randn(rank, rank, generator=draw))
    A = (torch.randn(inputs, rank // 2, generator=draw) @ rows[0::2]).T / 10
    B = torch.randn(rank // 2, outputs, generator=draw).T @ rows[1::2] / 10
    return A, B


def _gaussian(rank: int, inputs: int, outputs: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, inputs, generator=draw) / rank, torch.zeros(outputs, rank)


@torch.no_grad()
def put_factors(layer: LoraLayer, A: Tensor, B: Tensor) -> None:
    """Gives an adapter its two factors, and DoRA the length of the rows that these come to."""
    factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for parameter, value in zip(factors, (A, B), strict=True):
        parameter.copy_(value)
    if "default" in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector["default"]
        own = magnitude.weight
        magnitude.update_layer(
            base_layer=layer.get_base_layer(), lora_A=factors[0], lora_B=factors[1], scaling=layer.scaling["default"]
        )
        own.copy_(magnitude.weight)
        magnitude.weight = own


# ------------------------------------------------------------------ what NF4 has lost


def _hold_what_nf4_lost(model: CausalModel, base: str, seed: int) -> str:
    """Sets A and B by one iteration of LoftQ: ``scale * B A`` is the nearest of its rank to weight minus NF4 form."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    files = _files_by_end(base)
    layers, held, lost = 0, 0.0, 0.0
    for path, layer in adapted_layers(model):
        linear = layer.get_base_layer()
        if not isinstance(linear, Linear4bit):
            continue
        packed: Any = linear.weight
        quantized = dequantize_4bit(packed.data, packed.quant_state).float()
        missing = _weight(path, files, quantized.shape).to(quantized.device).float() - quantized
        A, B = nearest(missing, len(layer.lora_A["default"].weight), seed)
        scale = layer.scaling["default"] ** 0.5
        put_factors(layer, A / scale, B / scale)
        layers, held, lost = layers + 1, held + float((B @ A).square().sum()), lost + float(missing.square().sum())
    if not layers:
        raise ConfigError("lora.init: loftq holds what NF4 has lost, and no layer with an adapter is in NF4")
    share = held / lost if lost else 1.0
    return f"{layers} layers begin with {share:.0%} of the square of what NF4 has lost of them (lora.init=loftq)"


def nearest(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns A [rank, in] and B [out, rank] with the product of that rank that is nearest to ``matrix`` [out, in]."""
    if min(matrix.shape) <= EXACT:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        V = Vh.T
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            U, S, V = torch.svd_lowrank(matrix, min(rank + MORE_DIRECTIONS, *matrix.shape), ITERATIONS)
    if rank > len(S):
        raise ConfigError(f"lora.init: loftq needs ranks of at most the width of a layer, and {rank} is above {len(S)}")
    root = S[:rank].sqrt()
    return root[:, None] * V[:, :rank].T, U[:, :rank] * root


def _files_by_end(base: str) -> dict[str, list[tuple[Path, str]]]:
    """Returns the files' tensors (file, name) by the ends of their names, from the number of the decoder layer on."""
    found: dict[str, list[tuple[Path, str]]] = {}
    for file in weight_files(Path(base)):
        for name in safetensors_header(file)[0]:
            found.setdefault(_end(name), []).append((file, name))
    return found


def _end(path: str) -> str:
    """Returns a path from the list of decoder layers on: what comes before it may be named otherwise in files."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[max(0, number - 1) :])


def _weight(path: str, files: Mapping[str, list[tuple[Path, str]]], shape: torch.Size) -> Tensor:
    """Reads the weight of the layer at ``path``. Raises `ConfigError` if the files have it under no such name."""
    from safetensors import safe_open

    places = files.get(_end(f"{path}.weight"), [])
    if len(places) != 1:
        raise ConfigError(
            f"lora.init: loftq compares each weight with its file, and {len(places) or 'none'} of the base's tensors "
            f"is {path}.weight; take another beginning"
        )
    file, name = places[0]
    with safe_open(file, framework="pt") as opened:
        weight: Tensor = opened.get_tensor(name)
    if weight.shape != shape or not weight.dtype.is_floating_point:
        raise ConfigError(
            f"lora.init: loftq needs the weights before they were quantised, and {name} in {file} is not "
            f"{tuple(shape)} numbers; take another beginning"
        )
    return weight
