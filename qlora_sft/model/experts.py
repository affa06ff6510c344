"""Computes the experts of a mixture, whose weights transformers keeps as stacks [E, R, C] and not as linear layers.

A stack is one parameter: R x C weights of each of E experts. A module of experts has two stacks, and says how they lie,
whether they have biases and whether there is a gate. These attributes are those that transformers' own implementations
read (`integrations/moe.py` there); Llama 4's module has none of them and is known by its class. A stack is in NF4
(`experts_load`) or as the files have it, with an adapter (`experts_lora`) or without; either way it is computed here,
expert by expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from qlora_kernels.nf4_lora import Experts, NestedScales, NF4Stack, lora_experts
from torch import Tensor, nn

from qlora_sft.config import LoraConfig
from qlora_sft.config_lora import matches
from qlora_sft.errors import ConfigError
from qlora_sft.model.base import base_of, decoder_layers
from qlora_sft.model.base_files import has_experts

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel

BLOCK = 64  # weights that share a scale in NF4
NESTED_BLOCK = 256  # scales that share one of their own
# A quantised stack is made of its packed values and of these buffers of its module, whose names end so.
SCALES = ("absmax", "nested_absmax", "offset", "code", "nested_code")
# Linear layers that choose or weigh experts. They stay as they are: a little noise in them is another choice.
ROUTER = re.compile(r"(^|\.)(router|gate|classifier|shared_expert_gate)(\.|$)")
# This share of the blocks' weights may be out of reach without a fault: experts have small parameters beside their
# weights.
NEGLIGIBLE = 0.05

Factors = tuple[Tensor, Tensor, float]
"""A [E, r, in], B [E, out, r] and scale of one stack."""


class Form(NamedTuple):
    """Says how a module of experts keeps and uses its stacks."""

    gate: bool
    bias: bool
    transposed: bool
    """Whether a weight is [in, out] and not [out, in]."""
    concatenated: bool
    """Whether the gate's outputs stand before those of up, and not between them."""


# Those of modules that do not say it themselves.
OWN_FORMS = {"Llama4TextExperts": Form(gate=True, bias=False, transposed=True, concatenated=True)}


def form_of(module: nn.Module) -> Form | None:
    """Returns the form of a module of experts; None for any other module, and for experts whose results go through a
    norm of theirs (Muse Spark), which is not computed here."""
    if getattr(module, "has_post_expert_norm", False):
        return None
    own = next((OWN_FORMS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in OWN_FORMS), None)
    facts = [getattr(module, name, None) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated")]
    return own if own is not None or None in facts else Form(*map(bool, facts))


def stack_names(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the two stacks of a module of experts, in the order they are used; () for another module."""
    form = form_of(module)
    if form is None:
        return ()
    names = ("gate_up_proj" if form.gate else "up_proj", "down_proj")
    return names if all(isinstance(getattr(module, name, None), nn.Parameter) for name in names) else ()


def lies_as_peft_thinks(module: nn.Module) -> bool:
    """Says whether PEFT knows which of a weight's dimensions are inputs: it takes what the module itself says.

    Else A and B of an adapter have changed places, and scale B A has the shape of the weight all the same.
    """
    form = form_of(module)
    return form is not None and form.transposed == bool(getattr(module, "is_transposed", False))


def stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields (path of the module, module, name of the parameter) for every stack of experts in ``model``."""
    for path, module in model.named_modules():
        for name in stack_names(module):
            yield path, module, name


def peft_knows_experts(model: CausalModel) -> bool:
    """Says whether PEFT may take layers of ``model`` for experts.

    It goes by the family, also where no layer of the model has any (a DeepSeek-V3 whose layers are all dense).
    """
    return any(True for _ in stacks(model)) or has_experts(model.config.to_dict())


def stack_shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    """Returns the shape [E, R, C] of a stack, also if it is packed in NF4."""
    parameter = getattr(module, name)
    return cast(tuple[int, int, int], tuple(getattr(parameter, "ds_shape", parameter.shape)))


def parts_of(module: nn.Module, name: str) -> int:
    """Returns how many parts of an expert's rows are quantised on their own.

    They are two where gate and up stand one behind the other: the files of most families have them as two tensors, and
    a merge sends the files through NF4 tensor by tensor. Else the expert is one part.
    """
    form = form_of(module)
    return 2 if name == "gate_up_proj" and form and form.concatenated and not form.transposed else 1


def in_nf4(module: nn.Module, name: str) -> bool:
    """Says whether a stack is quantised to NF4."""
    return bool(getattr(module, name).dtype == torch.uint8)


def weight_of(module: Any, name: str) -> Tensor | NF4Stack:
    """Returns the weights of a stack without copying them: the parameter itself, or its NF4 form."""
    parameter = getattr(module, name)
    if not in_nf4(module, name):
        return cast(Tensor, parameter)
    absmax, nested, offset, code, nested_code = (getattr(module, f"{name}_{scale}") for scale in SCALES)
    scales = NestedScales(nested, nested_code, offset, NESTED_BLOCK)
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
    """Computes the experts of ``module``: hidden [T, D] -> [T, D].

    index, weights: [T, K], the K experts that the router has chosen for each token, and how much each counts. factors:
    the adapters of the stacks that have one, by the names of the stacks.
    """
    form = form_of(module)
    assert form is not None
    up, down = (_projection(module, form, name, (factors or {}).get(name)) for name in stack_names(module))
    middle = module._apply_gate if form.gate else module.act_fn
    dtype = up.weight.dtype if isinstance(up.weight, NF4Stack) else None
    return lora_experts(hidden, index, weights, up, down, middle, dtype=dtype)


def _projection(module: Any, form: Form, name: str, factors: Factors | None) -> Experts:
    bias = getattr(module, f"{name}_bias") if form.bias else None
    A, B, scale = factors or (None, None, 1.0)
    return Experts(weight_of(module, name), form.transposed, A, B, scale, bias)


# ------------------------------------------------------------------ what is trained


def describe_experts(model: CausalModel, lora: LoraConfig) -> str:
    """Says in one line, to print, in which type the experts of a PEFT model are and what of them is trained.

    Returns "" for a model without experts.
    """
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
    """Returns the stacks that get adapters, named by the ends of their paths, as PEFT's ``target_parameters`` wants it.

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
    """Measures the weights of experts that neither adapters nor NF4 can reach: those in another form than known here.

    Returns (the class that has most of them, how many there are, their share of all weights in the decoder's blocks).
    Linear layers, stacks, and whatever does not belong to an expert count as within reach.
    """
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
    """Returns the paths of the linear layers that choose or weigh experts, in the blocks of a mixture of experts."""
    counts = {stack_shape(module, name)[0] for _, module, name in stacks(model)}
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and ROUTER.search(within_block(path)) and module.out_features in {1, *counts}
    ]


def decoder(model: CausalModel) -> nn.Module:
    """Returns the decoder's blocks as one module."""
    return nn.ModuleList(decoder_layers(model))


def within_block(path: str) -> str:
    """Cuts off what leads to the block: ``model.layers.3.mlp.experts`` and ``3.mlp.experts`` -> ``mlp.experts``."""
    return re.sub(r"^(.*\.)?\d+\.", "", path, count=1)
