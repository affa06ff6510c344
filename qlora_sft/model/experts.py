"""The experts of a mixture: stacks [E, R, C] of weights that transformers keeps as parameters, not as linear layers.

What is read of a module of experts is what transformers' own implementations read (`integrations/moe.py` there): its
two stacks, biases, layout and gate. Each stack is in NF4 (`experts_load`) or as the files have it; with adapters
(`experts_lora`) or without, it is computed here, expert by expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
from qlora_kernels.nf4_lora import Experts, NestedScales, NF4Stack, lora_experts
from torch import Tensor, nn

from qlora_sft.config import LoraConfig
from qlora_sft.config_lora import matches
from qlora_sft.errors import ConfigError
from qlora_sft.model.base import base_of, decoder_layers

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel

NAME = "qlora_experts"
"""Under which transformers knows `experts_forward`."""
BLOCK = 64  # weights that share a scale in NF4
# What a quantised stack is made of beside its packed values: buffers of its module, under these endings.
SCALES = ("absmax", "nested_absmax", "offset", "code", "nested_code")
# Linear layers that choose or weigh experts. They stay as they are: a little noise in them is another choice.
ROUTER = re.compile(r"(^|\.)(router|gate|classifier|shared_expert_gate)(\.|$)")
# Share of the blocks that may be out of reach without a word: what experts have beside their weights.
NEGLIGIBLE = 0.05

Factors = tuple[Tensor, Tensor, float]
"""A [E, r, in], B [E, out, r] and scale of one stack."""


def stack_names(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the two stacks of a module of experts, in the order they are used; () for another module."""
    facts: Any = module
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated")):
        return ()
    names = ("gate_up_proj" if facts.has_gate else "up_proj", "down_proj")
    return names if all(isinstance(getattr(module, name, None), nn.Parameter) for name in names) else ()


def stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields (path of the module, module, name of the parameter) for every stack of experts in ``model``."""
    for path, module in model.named_modules():
        for name in stack_names(module):
            yield path, module, name


def stack_shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    """[E, R, C] of a stack, whatever form it is in."""
    parameter = getattr(module, name)
    return cast(tuple[int, int, int], tuple(getattr(parameter, "ds_shape", parameter.shape)))


def parts_of(module: Any, name: str) -> int:
    """How many parts of an expert's rows are quantised on their own: gate and up where they stand behind one another,
    because the files of most families have them as two tensors, and a merge goes through NF4 tensor by tensor."""
    return 2 if name == "gate_up_proj" and module.is_concatenated and not module.is_transposed else 1


def in_nf4(module: nn.Module, name: str) -> bool:
    """Whether a stack is quantised."""
    return bool(getattr(module, name).dtype == torch.uint8)


def weight_of(module: Any, name: str) -> Tensor | NF4Stack:
    """A stack as it is now: the parameter itself, or its NF4 form. Copies nothing."""
    parameter = getattr(module, name)
    if not in_nf4(module, name):
        return cast(Tensor, parameter)
    absmax, nested, offset, code, nested_code = (getattr(module, f"{name}_{scale}") for scale in SCALES)
    scales = NestedScales(nested, nested_code, offset, 256)
    return NF4Stack(parameter, absmax, scales, code, parameter.ds_shape, BLOCK, module.nf4_dtype)


def expand_stacks(model: nn.Module) -> None:
    """Replaces the stacks of ``model`` that are in NF4 by what these stand for, in the type that was quantised."""
    for _, module, name in list(stacks(model)):
        weight = weight_of(module, name)
        if isinstance(weight, NF4Stack):
            setattr(module, name, nn.Parameter(weight.dequantize(slice(0, len(weight.packed))), requires_grad=False))
            for scale in SCALES:
                delattr(module, f"{name}_{scale}")


def experts_forward(
    module: Any, hidden: Tensor, index: Tensor, weights: Tensor, factors: Mapping[str, Factors] | None = None
) -> Tensor:
    """What the experts of ``module`` make of ``hidden`` [T, D].

    index, weights: [T, K], its router's choice; factors: of the stacks that have an adapter.
    """
    up, down = (_projection(module, name, (factors or {}).get(name)) for name in stack_names(module))
    middle = module._apply_gate if module.has_gate else module.act_fn
    dtype = up.weight.dtype if isinstance(up.weight, NF4Stack) else None
    return lora_experts(hidden, index, weights, up, down, middle, dtype=dtype)


def _projection(module: Any, name: str, factors: Factors | None) -> Experts:
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    A, B, scale = factors or (None, None, 1.0)
    return Experts(weight_of(module, name), module.is_transposed, A, B, scale, bias)


def use_our_experts(model: CausalModel) -> None:
    """Lets transformers compute the experts of ``model``, if it has some, by `experts_forward`."""
    if not any(True for _ in stacks(model)):
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    model.set_experts_implementation(NAME)


# ------------------------------------------------------------------ what is trained


def describe_experts(model: CausalModel, lora: LoraConfig) -> str:
    """One line on the experts of a PEFT model, to print: what they are in and what of them is trained. "" for a model
    that has none."""
    base = base_of(model)
    found = list(stacks(base))
    kind, lost, share = out_of_reach(base)
    if not found:
        return (
            ""
            if share <= NEGLIGIBLE
            else f"{lost:,} weights of {kind} in full and untrained ({share:.0%} of the blocks)"
        )
    trained = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name and ".experts." in name)
    count = sum(stack_shape(module, name)[0] for _, module, name in found) // 2
    kept = "NF4" if all(in_nf4(module, name) for _, module, name in found) else "the model's own type"
    values = sum(prod(stack_shape(module, name)) for _, module, name in found)
    adapters = f"{trained:,} trainable parameters" if trained else f"without adapters, {values:,} weights left out"
    frozen = " (lora.experts=frozen)" if lora.experts == "frozen" else ""
    return f"{count} in {len(found) // 2} layers, in {kept}, {adapters}{frozen}; routers in full and frozen"


def target_parameters(model: CausalModel, lora: LoraConfig) -> list[str]:
    """The stacks that get adapters, as PEFT's ``target_parameters`` names them: the ends of their paths.

    Raises `ConfigError` where the blocks have weights that neither adapters nor NF4 can reach.
    """
    if lora.experts == "frozen":
        return []
    check_reach(model)
    found: set[str] = set()
    left: set[str] = set()
    for path, _, name in stacks(base_of(model)):
        (found if _wanted(path, name, lora) else left).add(f"{within_block(path)}.{name}")
    if found & left:
        raise ConfigError(
            f"lora.target_modules: {lora.target_modules!r} matches the experts of some layers only, which PEFT "
            "takes by name; match those of all layers or of none"
        )
    if found and lora.dora:
        raise ConfigError(
            "lora.dora: cannot be had for experts, whose adapters are added to their weights; set it to false, or "
            "leave the experts without adapters with lora.experts=frozen"
        )
    if found and lora.dropout:
        raise ConfigError(
            f"lora.dropout: {lora.dropout:g} cannot be had for experts, whose adapters are added to their weights; set "
            "it to 0, or leave the experts without adapters with lora.experts=frozen"
        )
    return sorted(found)


def _wanted(path: str, name: str, lora: LoraConfig) -> bool:
    """Returns whether the stack ``name`` of the module at ``path`` is among the targets of ``lora``."""
    if isinstance(lora.target_modules, list):
        return name in lora.target_modules
    return lora.target_modules == "all-linear" or matches(lora.target_modules, f"{path}.{name}")


def check_reach(model: CausalModel) -> None:
    """Raises `ConfigError` if much of the blocks' weights are experts in a form that is not known here."""
    kind, count, share = out_of_reach(model)
    if share > NEGLIGIBLE:
        raise ConfigError(
            f"lora.experts: {kind} keeps its experts in a form that is not known here, so {count:,} weights "
            f"({share:.0%} of the blocks) would stay in 16 bits and untrained; lora.experts=frozen trains the rest all "
            "the same"
        )


def check_blocks(model: nn.Module) -> None:
    """Raises `ConfigError` for experts that are no whole number of NF4's blocks."""
    for path, module, name in stacks(model):
        _, rows, width = stack_shape(module, name)
        if rows // parts_of(module, name) * width % BLOCK:
            raise ConfigError(
                f"model.load_in_4bit: {path}.{name} has experts of {rows} x {width} weights, which cannot be cut into "
                f"NF4's blocks of {BLOCK}; set it to false"
            )


def out_of_reach(model: CausalModel) -> tuple[str, int, float]:
    """(class that has most of them, values, share of the blocks' values) of experts in the decoder's blocks that are
    neither linear layers nor stacks. What else has no form of these two (a convolution, a state) is of no account."""
    reached = lost = 0
    largest: dict[str, int] = {}
    for path, module in decoder(model).named_modules():
        kind = type(module).__name__
        is_expert = "expert" in f"{path} {kind}".lower()
        known = isinstance(module, nn.Linear) or bool(stack_names(module)) or not is_expert
        for parameter in module.parameters(recurse=False):
            if known or parameter.dim() < 2:
                reached += parameter.numel()
            else:
                lost += parameter.numel()
                largest[kind] = largest.get(kind, 0) + parameter.numel()
    kind = max(largest, key=lambda name: largest[name], default="")
    return kind, lost, lost / max(1, reached + lost)


def router_names(model: nn.Module) -> list[str]:
    """Paths of the linear layers that choose or weigh experts, in the blocks of a model that has experts."""
    counts = {stack_shape(module, name)[0] for _, module, name in stacks(model)}
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and ROUTER.search(within_block(path)) and module.out_features in {1, *counts}
    ]


def decoder(model: CausalModel) -> nn.Module:
    """The decoder's blocks."""
    return nn.ModuleList(decoder_layers(model))


def within_block(path: str) -> str:
    """The path without what leads to its block: ``model.layers.3.mlp.experts`` and ``3.mlp.experts`` -> mlp.experts."""
    return re.sub(r"^(.*\.)?\d+\.", "", path, count=1)
