"""Keeps the model as it was loaded while a trainer is built around it.

TRL's SFTTrainer turns every trainable tensor of a quantised model into bfloat16 in its constructor and replaces the
forward of the language model. Unsloth's patched trainer does the same on a CPU. An adapter in bfloat16 loses every
update that is smaller than 1/256 of a weight, and nothing in a run would show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from qlora_sft.errors import RunError
from qlora_sft.model.base import base_of, decoder_layers
from qlora_sft.training.guards import RngState

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


class ModelSnapshot(NamedTuple):
    """Holds what a model was when it was handed to the trainer."""

    trained: dict[str, Tensor]
    """The values of every trainable parameter, which share their memory with the model."""
    forward: Callable[..., object] | None
    """The function that replaces the language model's own forward; None if nothing does."""
    checkpointing: list[bool | None]
    """Whether each layer calls its checkpointing function: a trainer that is told not to checkpoint switches it off."""
    facts: dict[str, object]
    """The model's `training_facts`."""


def take_snapshot(model: CausalModel) -> ModelSnapshot:
    """Returns what `restore` and `require_unchanged` compare ``model`` with. The snapshot takes hardly any memory."""
    trained = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    flags = [getattr(layer, "gradient_checkpointing", None) for layer in decoder_layers(model)]
    return ModelSnapshot(trained, base_of(model).__dict__.get("forward"), flags, training_facts(model))


def training_facts(model: CausalModel) -> dict[str, object]:
    """Returns everything that shapes training and that a trainer could change: the types of the parameters, which of
    them are trained, how layers are checkpointed, the hooks inside the base model, and its attention.
    """
    facts: dict[str, object] = {}
    for name, parameter in model.named_parameters():
        facts[f"type of {name}"] = str(parameter.dtype).removeprefix("torch.")
        facts[f"requires_grad of {name}"] = parameter.requires_grad
    base = base_of(model)
    for name, module in base.named_modules():
        facts[f"hooks of {name}"] = sum(len(getattr(module, kind)) for kind in HOOKS)
    for number, layer in enumerate(decoder_layers(model)):
        for attribute in CHECKPOINTING:
            facts[f"{attribute} of layer {number}"] = getattr(layer, attribute, None)
        facts[f"forward of layer {number}"] = layer.__dict__.get("forward")
    facts["attention"] = base.config._attn_implementation
    return facts


def restore(model: CausalModel, snapshot: ModelSnapshot) -> list[str]:
    """Undoes what the construction of a trainer did to ``model``, and returns the names of the changed parameters.

    Raises `RunError` for a change that cannot be undone here.
    """
    changed = []
    for name, parameter in model.named_parameters():
        values = snapshot.trained.get(name)
        if values is not None and parameter.dtype != values.dtype:
            parameter.data = values
            changed.append(name)
    base = base_of(model)
    if snapshot.forward is None:
        base.__dict__.pop("forward", None)
    else:
        base.forward = snapshot.forward
    for layer, flag in zip(decoder_layers(model), snapshot.checkpointing, strict=True):
        if flag is not None:
            layer.gradient_checkpointing = flag  # type: ignore[assignment]
    require_unchanged(model, snapshot)
    return changed


@contextmanager
def undisturbed(model: CausalModel) -> Iterator[None]:
    """Lets its body use ``model`` in the middle of training, and afterwards restores the random numbers and whatever
    the body has changed.

    Unsloth, for example, switches checkpointing off to generate an answer.
    """
    snapshot, numbers = take_snapshot(model), RngState()
    yield
    numbers.restore()
    restore(model, snapshot)
    model.train()


def require_unchanged(model: CausalModel, snapshot: ModelSnapshot) -> None:
    """Raises `RunError` if ``model`` would no longer be trained in the way it was loaded for."""
    now = training_facts(model)
    changed = [key for key in {**snapshot.facts, **now} if snapshot.facts.get(key) != now.get(key)]
    if not changed:
        return
    first = changed[0]
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    raise RunError(
        f"the trainer changed the model after it was loaded: {first} was {snapshot.facts.get(first)} and is "
        f"{now.get(first)}{more}. Versions of trl, transformers or unsloth that qlora_sft does not know may do so; "
        "install those of requirements.lock, or try model.backend=transformers"
    )
