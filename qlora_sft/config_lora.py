"""Define the adapter's section of the configuration, and what of it makes no sense together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from qlora_sft.config_data import Require
from qlora_sft.json_types import JsonObject
from qlora_sft.ranges import Range

Rank = Annotated[int, Range(1, 4096)]
Alpha = Annotated[int, Range(1, 65_536)]

# What people know from elsewhere and cannot have here, with the reason.
REFUSED = {
    "modules_to_save": "whole matrices are not trained here: the loss and the merge take embedding and output head as "
    "frozen. The rows of control tokens that a chat template adds are trained without it (model.chat_template)",
    "bias": "biases are not trained here; remove it",
}
_OTHER_BASE = (
    "takes the largest directions out of the base's weights, and the rest would have to be quantised again: the "
    "adapter would belong to another base than the one you named, so no merge or export could be what was trained"
)
REFUSED_INITS = {
    "pissa": _OTHER_BASE,
    "olora": _OTHER_BASE,
    "corda": _OTHER_BASE,
    "mica": "freezes B, which is not supported here",
    "lora_ga": _OTHER_BASE,
}


@dataclass(frozen=True)
class LoraModules:
    """Gives some layers a rank or a scale of their own."""

    match: str
    """Regular expression for the end of a layer's path, starting at the path's beginning or after a dot: ``down_proj``,
    ``layers\\.(0|1)\\..*``. It has to match at least one layer that gets an adapter; no layer may be matched twice."""
    r: Rank | None = None
    """Rank of these layers; default: lora.r."""
    alpha: Alpha | None = None
    """Alpha of these layers; default: lora.alpha."""


@dataclass(frozen=True)
class LoraConfig:
    """Sets the shape of the adapter."""

    r: Rank = 16
    """Rank."""
    alpha: Alpha = 16
    """The update is scaled by alpha / r."""
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Share of an adapter's input values that is set to zero at random in training."""
    target_modules: str | list[str] = "all-linear"
    """``all-linear``: every linear layer of every block, and the weights of experts, but not their router, and not the
    output head. A list names layers, and gate_up_proj and down_proj of experts. Any other text is a regular expression
    for the end of a layer's path, as in lora.modules: ``layers\\.[0-9]\\..*_proj``."""
    modules: list[LoraModules] = field(default_factory=list)
    """Layers with a rank or an alpha of their own."""
    rslora: bool = False
    """Scales the update by alpha / sqrt(r) instead (rsLoRA), which keeps large ranks learning."""
    dora: bool = False
    """Trains the length of every row of a weight separately from its direction (DoRA). Such layers are computed by PEFT
    and not by the kernels here, which takes more time and memory."""
    init: Literal["default", "gaussian", "orthogonal", "eva", "loftq"] = "default"
    """How adapters are initialised. ``default`` and ``gaussian``: A at random, B zero. ``orthogonal``: both at random,
    with a product of zero; ranks have to be even. ``eva``: A with the directions in which the inputs of its layer vary
    most over the first documents, B zero. ``loftq``: with what each weight has lost in NF4, as far as the rank can hold
    it; the base stays as it is, so the adapter fits only its NF4 form."""
    plus_ratio: Annotated[float, Range(1, 10_000)] | None = None
    """Ratio of the learning rate of B to that of A (LoRA+; its authors take 16); default: the same rate."""
    experts: Literal["train", "frozen"] = "train"
    """What is done with the experts of a mixture. ``train``: NF4 with adapters. ``frozen``: no adapters; how many
    weights stay untrained is printed."""
    from_: str | None = None
    """Folder of a run or an adapter to continue from: rank, alpha, layers and form are taken from it. The base has to
    be the one that it was trained on."""


def take_refused(lora: object, file: str) -> Iterator[str]:
    """Takes out of the section ``lora``, as it was read, what is known and refused; yields a fault for each."""
    if not isinstance(lora, dict):
        return
    for key in REFUSED.keys() & lora.keys():
        del lora[key]
        yield f"{file}: lora.{key}: {REFUSED[key]}"
    init = lora.get("init")
    name = init.split("_niter")[0] if isinstance(init, str) else ""
    if name in REFUSED_INITS:
        del lora["init"]
        yield f"{file}: lora.init: {init} {REFUSED_INITS[name]}; take default, orthogonal, eva or loftq"


def check_lora(lora: LoraConfig, model: JsonObject, require: Require) -> None:
    """Requires what the values of the section say together. model: the section of the base, as it was read."""
    for i, each in enumerate(lora.modules):
        here = f"lora.modules.{i}"
        require(not (fault := regex_fault(each.match)), f"{here}.match", fault)
        require(each.r is not None or each.alpha is not None, here, "has no effect; give it an r or an alpha")
    if isinstance(lora.target_modules, str):
        require(not (fault := regex_fault(lora.target_modules)), "lora.target_modules", fault)
    else:
        require(bool(lora.target_modules), "lora.target_modules", "must name at least one layer")
    ranks = [lora.r, *(each.r for each in lora.modules if each.r)]
    odd = [rank for rank in ranks if rank % 2]
    require(lora.init != "orthogonal" or not odd, "lora.init", f"orthogonal needs even ranks, not {odd}")
    nothing_lost = model.get("load_in_4bit") is False
    no_effect = "loftq has no effect without model.load_in_4bit"
    held = "loftq: the adapter of lora.from holds what NF4 has lost of its base, and needs model.load_in_4bit"
    require(lora.init != "loftq" or not nothing_lost, "lora.init", held if lora.from_ else no_effect)
    # An adapter that began by LoftQ stays one of NF4's values, whoever goes on from it.
    begun = lora.from_ is not None and lora.init not in ("default", "loftq")
    require(not begun, "lora.init", "has no effect with lora.from, which brings its own adapter; remove it")


def patterns_of(lora: LoraConfig) -> list[str]:
    """Lists the regular expressions of the section."""
    named = [lora.target_modules] if isinstance(lora.target_modules, str) else []
    return [*named, *(each.match for each in lora.modules)]


def regex_fault(pattern: str) -> str:
    """Returns what is wrong with a regular expression; "" if nothing is."""
    if not pattern:
        return "must not be empty"
    try:
        re.compile(pattern)
    except re.error as error:
        return f"is no regular expression ({error}): {pattern}"
    return ""


def matches(pattern: str, path: str) -> bool:
    """Returns whether ``pattern`` matches the end of a layer's path, from its beginning or a dot on: PEFT's rule."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def describe_lora(lora: LoraConfig) -> str:
    """Names the form of the adapter: "LoRA rank 16", or "rsLoRA with DoRA, rank 16, 2 patterns with their own"."""
    form = ("rsLoRA" if lora.rslora else "LoRA") + (" with DoRA," if lora.dora else "")
    own = len(lora.modules)
    return f"{form} rank {lora.r}" + (f" (lora.modules: {own} with their own)" if own else "")
