"""The gated MLPs of a model computed by `qlora_kernels.nf4_lora.lora_mlp`: tiled over tokens, nothing kept but the input.

Each ``mlp`` module is replaced by a `TiledMLP` that holds the very same layers under the same names, so parameter
names, PEFT and what is saved stay as they were.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from qlora_kernels.nf4_lora import Activation, Projection, default_tile, lora_mlp
from torch import Tensor

from qlora_sft.errors import ConfigError
from qlora_sft.model.projection import base_dtype, projection_of

LAYERS = ("gate_proj", "up_proj", "down_proj")
# Modules whose forward is known to be down_proj(act_fn(gate_proj(x)) * up_proj(x)), by their class's name.
FAMILIES = {
    "LlamaMLP", "Qwen2MLP", "Qwen3MLP", "MistralMLP", "SmolLM3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP",
}  # fmt: skip
# Names under which transformers files the activations that qlora_kernels has.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
# Normalises what the MLP returns, and saves it: the recomputation of a layer then has to run the whole MLP.
NORM_AFTER = "post_feedforward_layernorm"

Requested = Literal["auto", "on", "off"]


class TiledMLP(torch.nn.Module):
    """Takes the place of a transformers MLP. ``recompute`` and ``tile``: see `lora_mlp`; both may be set at any time."""

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
        layers = self.projections()
        # A feature that was refused at the start may come later: an adapter is disabled, added or merged.
        if isinstance(layers, str):
            return self.plain(x)
        return lora_mlp(
            x, *layers, self.activation, tile=self.tile, recompute=self.recompute, dtype=base_dtype(self.gate_proj)
        )

    def plain(self, x: Tensor) -> Tensor:
        """What the module in whose place this one stands computes."""
        hidden: Tensor = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(hidden)  # type: ignore[no-any-return]

    def projections(self) -> tuple[Projection, Projection, Projection] | str:
        """gate, up and down as they are now, or why they do not fit."""
        found = [projection_of(getattr(self, name)) for name in LAYERS]
        for reason in found:
            if isinstance(reason, str):
                return reason
        gate, up, down = (p for p in found if isinstance(p, Projection))
        kinds = {(type(p.weight), base_dtype(getattr(self, name))) for name, p in zip(LAYERS, (gate, up, down))}
        if len(kinds) > 1:
            return "layers of different kinds, some quantised and some not"
        return gate, up, down


def use_tiled_mlp(model: Any, requested: Requested, tokens: int) -> str:
    """Replaces the MLPs of ``model`` as ``requested``; returns the choice with its reason, to print.

    tokens: longest row of the run. ``auto``: on for a GPU, and on a CPU for rows of more than one tile; elsewhere
    there is memory for the intermediates, and checkpointing or not decides what is recomputed.

    Raises `ConfigError` when ``on`` is demanded where it cannot be.
    """
    if requested == "off":
        return "off (as configured)"
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    blocks = list(base.get_decoder().layers)
    obstacle = next((reason for block in blocks if (reason := obstacle_of(block))), None)
    if obstacle:
        if requested == "on":
            raise ConfigError(f"memory.tiled_mlp: on is not possible here: {obstacle}; use auto or off")
        return f"off ({obstacle})"
    tile = default_tile(blocks[0].mlp.hidden_size)
    wanted = reason_for(requested, base.device, tokens, tile)
    if wanted is None:
        return f"off (rows of {tokens:,} tokens on a CPU fit into one tile of {tile:,})"
    for block in blocks:
        block.mlp = tiled(block, tokens, tile)
    again = "computed again in the backward" if blocks[0].mlp.recompute else "kept, as nothing of a layer is recomputed"
    return f"on, {tile:,} tokens at a time, gate and up {again} ({wanted})"


def reason_for(requested: Requested, device: torch.device, tokens: int, tile: int) -> str | None:
    """Why the MLPs are tiled, or None."""
    if requested == "on":
        return "as configured"
    if device.type == "cuda":
        return "saves memory and a product per layer on a GPU"
    return f"rows of {tokens:,} tokens" if tokens > tile else None


def tiled(block: Any, tokens: int, tile: int) -> TiledMLP:
    """The MLP of a decoder layer, tiled.

    Gate and up are computed again where the layer is checkpointed, and where they would take more than a tile. Only a
    layer that ends with a norm has to compute its MLP in the recomputation anyway, so short rows keep them there.
    """
    checkpointed = bool(getattr(block, "gradient_checkpointing", False))
    recompute = tokens > tile or (checkpointed and not hasattr(block, NORM_AFTER))
    return TiledMLP(block.mlp, activation_of(block.mlp), recompute, tile)  # type: ignore[arg-type]


def obstacle_of(block: Any) -> str | None:
    """Why this decoder layer's MLP must stay as it is."""
    mlp = getattr(block, "mlp", None)
    if isinstance(mlp, TiledMLP):
        return "its MLPs are tiled already"
    if type(mlp).__name__ not in FAMILIES:
        return f"no formula here for {'a layer without mlp' if mlp is None else type(mlp).__name__}"
    if mlp._forward_hooks or mlp._forward_pre_hooks or hasattr(mlp, "_hf_hook"):
        return "hooks on the MLP"
    if activation_of(mlp) is None:
        return f"no derivative here for {type(mlp.act_fn).__name__}"
    reason = TiledMLP(mlp, "silu", True, 1).projections()
    return reason if isinstance(reason, str) else None


def activation_of(mlp: Any) -> Activation | None:
    """By the name in the model's configuration, and only if the module is what transformers makes of that name."""
    from transformers.activations import ACT2FN

    config = mlp.config
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if name not in ACTIVATIONS or type(ACT2FN[name]) is not type(mlp.act_fn):
        return None
    return ACTIVATIONS[name]
