"""Chooses which linear layers of a model are quantised and which get adapters, by their place and their use.

Quantised are those of the language model, but not its output head. Adapted are those of its decoder layers. Both leave
out what routes to experts, what a layer reads the weight of without calling it, and other parts of a model (towers for
images and sound).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from qlora_sft.config import LoraConfig
from qlora_sft.config_lora import matches
from qlora_sft.errors import ConfigError
from qlora_sft.lora_from import PATTERN_BEGINS, PATTERN_GOES_ON
from qlora_sft.model.base import base_of, decoder_of, layer_list
from qlora_sft.model.experts import peft_knows_experts, router_names, stacks
from qlora_sft.model.head import BLOCK
from qlora_sft.strict import did_you_mean

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel

# Whose weight is read, or clamped in place, without the layer being called, in Mamba's first form and in Gemma 3n:
# packed in 4 bits it would be taken for numbers, and an adapter would have no effect.
READ_DIRECTLY = {"dt_proj": "Mamba", "prediction_coefs": "AltUp", "correction_coefs": "AltUp"}
# PEFT refuses adapters on these of its Mamba families, whose kernels for training read the weight.
REFUSED_BY_PEFT = {name: {"out_proj"} for name in ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")}

# The names that PEFT takes for experts, in a mixture.
MOVED = {"gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3"}


class Shape(NamedTuple):
    """Holds the rank and the alpha of the adapter of one layer."""

    rank: int
    alpha: int


def peft_settings(model: CausalModel, lora: LoraConfig) -> dict[str, object]:
    """Returns what PEFT has to be told of the adapters of ``model``: the layers that get some, with their shapes.

    Raises `ConfigError` where ``lora`` names what ``model`` has not, or what cannot get an adapter.
    """
    shapes(model, lora)
    return {
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": peft_targets(model, target_modules(model, lora)),
        "rank_pattern": {each.match: each.r for each in lora.modules if each.r is not None},
        "alpha_pattern": {each.match: each.alpha for each in lora.modules if each.alpha is not None},
    }


def shapes(model: CausalModel, lora: LoraConfig) -> dict[str, Shape]:
    """Returns the rank and the alpha of every layer that gets an adapter, by its path.

    Raises `ConfigError` for an entry of ``lora.modules`` that fits no such layer, and for two that fit the same one:
    a saved adapter keeps no order, so which of them is meant would be lost.
    """
    targets, prefix = target_modules(model, lora), layers_prefix(model)
    found, used = {}, set()
    for path, module in model.named_modules():
        if is_linear(module) and path.startswith(prefix) and is_target(path, targets):
            own = _own_entries(path, lora)
            if len(own) > 1:
                raise ConfigError(f"lora.modules: {path} is matched by entries {' and '.join(map(str, own))}")
            used.update(own)
            found[path] = shape_of(path, lora)
    _check_portable(model, found, lora)
    for i, each in enumerate(lora.modules):
        if i not in used:
            hint = did_you_mean(each.match, linear_names(model))
            raise ConfigError(f"lora.modules.{i}.match: no layer with an adapter is matched by {each.match!r}{hint}")
        for path, _, name in stacks(layer_list(model)) if lora.experts == "train" else ():
            if matches(each.match, f"{prefix}{path}.{name}") or matches(each.match, f"{prefix}{path}"):
                raise ConfigError(
                    f"lora.modules.{i}.match: {each.match!r} matches the experts {prefix}{path}, which all have "
                    "lora.r and lora.alpha; name layers more closely"
                )
    return found


def _check_portable(model: CausalModel, adapted: Iterable[str], lora: LoraConfig) -> None:
    """Raises `ConfigError` for DoRA on layers of a mixture that a saved adapter has to name as parameters.

    PEFT knows no DoRA for parameters, so no other program could load the adapter.
    """
    names = sorted({path.rsplit(".", 1)[-1] for path in adapted} & MOVED)
    if lora.dora and names and peft_knows_experts(model):
        routers = {path.rsplit(".", 1)[-1] for path in router_names(model)}
        others = sorted(linear_names(model) - MOVED - routers - barred_names(model).keys())
        raise ConfigError(
            f"lora.dora: PEFT could not load the adapter again: in a mixture of experts it takes {', '.join(names)} "
            "for experts, which have no DoRA. Set it to false, or name the other layers: lora.target_modules="
            f"[{','.join(others)}]"
        )


def shape_of(path: str, lora: LoraConfig) -> Shape:
    """Returns the rank and the alpha of an adapter on the layer at ``path``."""
    own = [lora.modules[i] for i in _own_entries(path, lora)]
    ranks, alphas = [each.r for each in own if each.r], [each.alpha for each in own if each.alpha]
    return Shape(*ranks or [lora.r], *alphas or [lora.alpha])


def _own_entries(path: str, lora: LoraConfig) -> list[int]:
    return [i for i, each in enumerate(lora.modules) if matches(each.match, path)]


def is_target(path: str, targets: list[str] | str) -> bool:
    """Returns whether the layer at ``path`` gets an adapter. targets: of `target_modules`."""
    return matches(targets, path) if isinstance(targets, str) else path.rsplit(".", 1)[-1] in targets


def target_modules(model: CausalModel, lora: LoraConfig) -> list[str] | str:
    """Names of the layers that get adapters, or a regular expression for the ends of their paths; ``all-linear``: every
    linear layer inside the blocks, not the head, and not those that route to experts.

    Raises `ConfigError` for a name that neither a layer nor a stack of experts has, or that cannot get one.
    """
    linear, barred = linear_names(model), barred_names(model)
    if lora.target_modules == "all-linear":
        routers = {name.rsplit(".", 1)[-1] for name in router_names(model)}
        chosen = sorted(linear - barred.keys() - routers)
        if not chosen:
            own = "; its Conv1D keeps weights the other way round" if _of_gpt2(model) else ""
            raise ConfigError(
                f"model.path: {type(base_of(model)).__name__} has no linear layers that could get adapters{own}"
            )
        return chosen
    experts = {name for _, _, name in stacks(layer_list(model))}
    if isinstance(lora.target_modules, str):
        named = _matched_names(model, lora.target_modules)
    else:
        named = lora.target_modules
    unknown = sorted(set(named) - linear - experts)
    if unknown:
        has = sorted(linear | experts)
        raise ConfigError(f"lora.target_modules: no linear layer is named {unknown}; this model has {has}")
    without = [f"{name} ({barred[name]})" for name in named if name in barred]
    if without:
        raise ConfigError(f"lora.target_modules: no adapter can be on {', '.join(without)}; remove it")
    return lora.target_modules if isinstance(lora.target_modules, str) else [name for name in named if name in linear]


def _matched_names(model: CausalModel, pattern: str) -> list[str]:
    """Returns the last parts of the paths of the layers and stacks that a regular expression matches."""
    prefix = layers_prefix(model)
    paths = [path for path, module in layer_list(model).named_modules() if is_linear(module)]
    paths += [f"{path}.{name}" for path, _, name in stacks(layer_list(model))]
    found = sorted({path.rsplit(".", 1)[-1] for path in paths if matches(pattern, prefix + path)})
    routing = sorted({name.rsplit(".", 1)[-1] for name in router_names(model)} & {*found})
    if routing:
        raise ConfigError(
            f"lora.target_modules: {pattern!r} matches {', '.join(routing)}, which chooses experts; name "
            "layers more closely"
        )
    if not found:
        hint = did_you_mean(pattern, ["all-linear", *linear_names(model)])
        raise ConfigError(f"lora.target_modules: no linear layer is matched by {pattern!r}{hint}")
    return found


def linear_names(model: CausalModel) -> set[str]:
    """Returns the last part of the names of all linear layers inside the decoder layers."""
    names = {name.rsplit(".", 1)[-1] for name, module in layer_list(model).named_modules() if is_linear(module)}
    # What has a number for a name, PEFT would take for every module with that number, whole decoder layers included.
    return {name for name in names if not name.isdigit()}


def is_linear(module: torch.nn.Module) -> bool:
    """Returns whether ``module`` multiplies and does nothing else; routers of experts may be linear layers that do."""
    if not isinstance(module, torch.nn.Linear):
        return False
    kind = type(module)
    return kind.forward is torch.nn.Linear.forward or kind.__name__ in ("FalconLinear", "Linear4bit")


def barred_names(model: CausalModel) -> dict[str, str]:
    """Returns the names that cannot get adapters, each with its reason."""
    kind = str(base_of(model).config.get_text_config().model_type)
    refused = REFUSED_BY_PEFT.get(kind, set())
    reasons = dict.fromkeys(read_directly(model), "its weight is read without calling the layer")
    reasons |= dict.fromkeys(refused, f"PEFT refuses it in {kind}")
    return {name: reason for name, reason in reasons.items() if name in linear_names(model)}


def read_directly(model: CausalModel) -> list[str]:
    """Returns the names of linear layers whose weight the module around them reads."""
    found = {
        name
        for parent in layer_list(model).modules()
        for name, _ in parent.named_children()
        if name in READ_DIRECTLY and READ_DIRECTLY[name] in type(parent).__name__
    }
    return sorted(found)


def peft_targets(model: CausalModel, names: list[str] | str) -> list[str] | str:
    """Returns the targets as PEFT has to be told them: a pattern where other parts of the model have such layers too,
    or where a regular expression is meant, which PEFT wants to match the whole path."""
    prefix = layers_prefix(model)
    if isinstance(names, str):
        # Blocks and their parts may match as well, but only layers can have adapters.
        layers = "|".join(map(re.escape, _matched_names(model, names)))
        return rf"{PATTERN_BEGINS}{re.escape(prefix)})(?=.*\.({layers})$){PATTERN_GOES_ON}{names})"
    # Of whatever class: Gemma 4's towers have layers of their own kind there, which PEFT would refuse.
    outside = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if not name.startswith(prefix)}
    if not outside & set(names):
        return names
    return rf"{re.escape(prefix)}(.*\.)?({'|'.join(map(re.escape, sorted(names)))})"


def layers_prefix(model: CausalModel) -> str:
    """Returns what the names of all parameters of the decoder layers begin with."""
    layers = layer_list(model)
    return str(next(name for name, module in model.named_modules() if module is layers)) + "."


def kept_in_full(model: CausalModel) -> list[str] | None:
    """Returns the modules that are not quantised, as bitsandbytes' settings name them; None: transformers' own choice,
    which is the output head.

    Towers for images and sound are left as they are: nothing trains them, and a merge keeps them. So are layers whose
    weight is read directly, or is no multiple of NF4's blocks wide, and GPT-2's, which bitsandbytes would turn round.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    own = [*other_parts(model), *read_directly(model), *narrow(model), *_of_gpt2(model)]
    return [*get_keys_to_not_convert(model), *own] if own else None


def narrow(model: CausalModel) -> list[str]:
    """Returns the linear layers whose input is no multiple of NF4's blocks: on a CPU bitsandbytes dequantises a block
    that goes on in the next row of a weight to other values than it was made from."""
    return [name for name, module in model.named_modules() if is_linear(module) and module.in_features % BLOCK]


def _of_gpt2(model: CausalModel) -> list[str]:
    """Returns the layers that keep their weight as [inputs, outputs], to which a merge would add an adapter turned."""
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in model.named_modules() if isinstance(module, Conv1D)]


def not_quantized(model: CausalModel) -> list[str]:
    """Returns the patterns of names that stay as they are when ``model`` is loaded in 4 bits."""
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = kept_in_full(model) or get_keys_to_not_convert(model)
    return [*kept, *router_names(model), *(model._keep_in_fp32_modules or ())]


def other_parts(model: CausalModel) -> list[str]:
    """Returns the names of the parts of ``model`` beside its language model: towers, and what leads from them to it."""
    decoder, head = decoder_of(model), model.get_output_embeddings()
    path = next(name for name, module in model.named_modules() if module is decoder).split(".")
    beside = []
    for depth in range(len(path)):
        parent = model.get_submodule(".".join(path[:depth]))
        for name, child in parent.named_children():
            if name != path[depth] and child is not head and any(True for _ in child.parameters()):
                beside.append(".".join([*path[:depth], name]))
    return beside


def describe_linears(model: CausalModel) -> str:
    """Says how many linear layers are in 4 bits and how many have adapters, and why others have none."""
    from bitsandbytes.nn import Linear4bit

    base = base_of(model)
    layers = [(name, m) for name, m in layer_list(base).named_modules() if is_linear(m)]
    layers = [(name, m) for name, m in layers if ".lora_" not in name]
    quantized = sum(isinstance(m, Linear4bit) for _, m in layers)
    adapted = sum(name.endswith(".base_layer") for name, _ in layers)
    without = [f"{name}: {reason}" for name, reason in barred_names(base).items()]
    other = other_parts(base)
    notes = [*without, *([f"{', '.join(other)}: frozen and not quantised"] if other else [])]
    told = f" ({'; '.join(notes)})" if notes else ""
    return f"of {len(layers)} linear layers {quantized} in NF4, {adapted} with LoRA{told}"
