"""Lets `qlora_kernels.nf4_lora` compute the gated MLPs of a model: tiled over tokens, nothing kept but the input.

Each ``mlp`` module is replaced by a `TiledMLP` that holds the very same layers under the same names, so parameter
names, PEFT and what is saved stay as they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from qlora_kernels.nf4_lora import Activation, Projection, default_tile, lora_mlp
from torch import Tensor

from qlora_sft.errors import ConfigError
from qlora_sft.model.base import decoder_layers
from qlora_sft.model.projection import base_dtype, projection_of

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel

LAYERS = ("gate_proj", "up_proj", "down_proj")
# Modules whose forward is known to be down_proj(act_fn(gate_proj(x)) * up_proj(x)), by their class's name.
FAMILIES = {
    "LlamaMLP", "Qwen2MLP", "Qwen3MLP", "MistralMLP", "SmolLM3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP",
}  # fmt: skip
# transformers' modules for the activations that qlora_kernels has.
ACTIVATIONS: dict[str, Activation] = {
    "SiLUActivation": "silu", "SiLU": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh",
}  # fmt: skip
# A norm of this name normalises the result of the MLP and saves it. So the recomputation of its layer has to run the
# whole MLP.
NORM_AFTER = "post_feedforward_layernorm"

Requested = Literal["auto", "on", "off"]


class TiledMLP(torch.nn.Module):
    """Takes the place of a transformers MLP. ``recompute`` and ``tile`` as in `lora_mlp`; may be set at any time."""

    def __init__(self, mlp: Any, activation: Activation, recompute: bool, tile: int):
        super().__init__()
        for name, value in vars(mlp).items():
            if not name.startswith("_") and name != "training" and name != "forward":
                setattr(self, name, value)  # config, hidden_size, intermediate_size
        for name, layer in mlp.named_children():
            self.add_module(name, layer)
        self.activation, self.recompute, self.tile = activation, recompute, tile
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        # A short row of which nothing is saved (generation) gains nothing from tiles.
        if not (torch.is_grad_enabled() and self.training) and x.numel() // x.shape[-1] <= self.tile:
            return self.plain(x)
        layers = projections_of(self, self.training)
        # A feature that was refused at the start may come later: an adapter is disabled, added or merged.
        if isinstance(layers, str):
            return self.plain(x)
        dtype = base_dtype(self.gate_proj)
        return lora_mlp(x, *layers, self.activation, tile=self.tile, recompute=self.recompute, dtype=dtype)

    def plain(self, x: Tensor) -> Tensor:
        """Computes what the module that was replaced would compute."""
        layers: Any = self  # its children are not known to the type checker
        hidden = layers.act_fn(layers.gate_proj(x)) * layers.up_proj(x)
        return cast(Tensor, layers.down_proj(hidden))


def projections_of(mlp: Any, training: bool) -> tuple[Projection, Projection, Projection] | str:
    """Returns gate, up and down as they are now, or what keeps them from being computed here."""
    found = [projection_of(getattr(mlp, name), training) for name in LAYERS]
    for reason in found:
        if isinstance(reason, str):
            return reason
    gate, up, down = (p for p in found if isinstance(p, Projection))
    if len({type(p.weight) for p in (gate, up, down)} | {base_dtype(getattr(mlp, name)) for name in LAYERS}) > 2:
        return "some layers quantised and some not"
    return gate, up, down


def use_tiled_mlp(model: CausalModel, requested: Requested, tokens: int) -> str:
    """Replaces the MLPs of ``model`` as ``requested``; returns the choice with its reason, to print.

    tokens: longest row of the run. ``auto`` is on wherever it can be: measured on a CPU, a layer is 1.2 to 1.3 times as
    fast as PEFT's if it is checkpointed and 0.93 to 1.0 times if not, with a seventh and two fifths of the memory.

    Raises `ConfigError` when ``on`` is demanded where it cannot be.
    """
    blocks: list[Any] = decoder_layers(model)
    reason = why_not_tiled(blocks, requested)
    if reason:
        return f"off ({reason})"
    tile = default_tile(blocks[0].mlp.hidden_size)
    for block in blocks:
        block.mlp = TiledMLP(block.mlp, ACTIVATIONS[type(block.mlp.act_fn).__name__], recompute=True, tile=tile)
        set_recompute(block, bool(getattr(block, "gradient_checkpointing", False)), tokens)
    return f"on, {tile:,} tokens at a time ({'as configured' if requested == 'on' else 'its formula is known'})"


def why_not_tiled(blocks: list[Any], requested: Requested) -> str:
    """Says why the MLPs of these decoder layers, which have their adapters, are not tiled; "" if they are to be.

    Raises `ConfigError` when ``on`` is demanded where it cannot be.
    """
    if requested == "off":
        return "as configured"
    obstacle = next((reason for block in blocks if (reason := obstacle_of(block))), "")
    if obstacle and requested == "on":
        raise ConfigError(f"memory.tiled_mlp: on is not possible here: {obstacle}; use auto or off")
    return obstacle


def set_recompute(block: torch.nn.Module, checkpointed: bool, tokens: int) -> None:
    """Sets whether the MLP of a decoder layer, if it is tiled, computes gate and up again in its backward.

    It keeps them in a layer that is not computed again. A checkpointed layer computes them again once, by tiles. Only
    if it ends with a norm it has to run its MLP in the recomputation anyway; there short sequences keep gate and up
    from that, and long ones save the memory.
    """
    mlp = getattr(block, "mlp", None)
    if isinstance(mlp, TiledMLP):
        mlp.recompute = checkpointed and recomputes(tokens, mlp.tile, hasattr(block, NORM_AFTER))


def recomputes(tokens: int, tile: int, norm_after: bool) -> bool:
    """Returns whether the MLP of a checkpointed layer computes gate and up by tiles in its backward."""
    return tokens > tile or not norm_after


def obstacle_of(block: torch.nn.Module) -> str | None:
    """Returns why this decoder layer's MLP must stay as it is; None if it can be tiled."""
    mlp = getattr(block, "mlp", None)
    if isinstance(mlp, TiledMLP):
        return "its MLPs are tiled already"
    if mlp is None:
        return "a decoder layer without mlp"
    if type(mlp).__name__ not in FAMILIES:
        return f"no formula here for {type(mlp).__name__}"
    if mlp._forward_hooks or mlp._forward_pre_hooks or hasattr(mlp, "_hf_hook"):
        return "hooks on the MLP"
    if type(mlp.act_fn).__name__ not in ACTIVATIONS:
        return f"no derivative here for {type(mlp.act_fn).__name__}"
    layers = projections_of(mlp, training=True)
    return layers if isinstance(layers, str) else None
