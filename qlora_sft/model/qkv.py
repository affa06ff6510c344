"""Lets attention modules compute q, k, v and o by `qlora_kernels.nf4_lora`, and rotate q and k in place.

Each ``self_attn`` is replaced by a `LeanAttention` that holds the very same layers under the same names, so parameter
names, PEFT and what is saved stay as they were. Which modules can be is decided by what they are made of, and by
whether a small one of the same class gives the same results and gradients, not by their names.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from qlora_kernels.nf4_lora import NF4Weight, Projection, lora_linears
from qlora_kernels.rotate import rotate
from torch import Tensor

from qlora_sft.errors import first_line
from qlora_sft.model.attention import NAME, register
from qlora_sft.model.base import decoder_layers
from qlora_sft.model.norms import FORMS, LeanRMSNorm
from qlora_sft.model.projection import base_dtype, projection_of

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
# As which argument layers hand over the cache of keys and values: in transformers 5.17, and in 5.24.
CACHES = ("past_key_values", "cache")
ATTRIBUTES = ("config", "layer_idx", "head_dim", "scaling", "attention_dropout")
# Tokens and head size of the small module that is tried out.
TRIED_TOKENS, TRIED_HEAD = 12, 16


class LeanAttention(torch.nn.Module):
    """Takes the place of a transformers attention module, and has its attributes."""

    def __init__(self, attention: Any):
        super().__init__()
        for name, value in vars(attention).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)  # config, scaling, sliding_window: attention functions look at some
        for name, layer in attention.named_children():
            self.add_module(name, layer)
        self.kind = type(attention)
        self.train(attention.training)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attend = ALL_ATTENTION_FUNCTIONS.get(cast(Any, self.config)._attn_implementation)
        layers = projections_of(self, self.training)
        # Generation has a cache; eager attention is the class's own. A feature that was refused at the start may come
        # later: an adapter is disabled, added or merged.
        cached = any(kwargs.get(name) is not None for name in CACHES)
        if cached or attend is None or isinstance(layers, str):
            given = {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
            return cast("tuple[Tensor, Any]", self.kind.forward(self, hidden_states, **given, **kwargs))
        q, k, v = self.projected(hidden_states, layers[:3], position_embeddings)
        options: dict[str, Any] = {"scaling": self.scaling, "dropout": self.attention_dropout if self.training else 0.0}
        options |= {own: value for name, own in PASSED.items() if (value := self.setting(name)) is not None}
        result, weights = attend(self, q, k, v, attention_mask, **options, **kwargs)
        result = result.reshape(*hidden_states.shape[:-1], -1)
        (out,) = lora_linears(result, layers[3:], dtype=base_dtype(self.o_proj))
        return out.view(*hidden_states.shape[:-1], -1), weights

    def setting(self, name: str) -> object:
        """Returns the module's own value of ``name``, or its configuration's, from where Mistral's reads its window.

        Where a module has the attribute it counts, None included: a full layer of Qwen2 has a window in its settings.
        """
        return getattr(self if hasattr(self, name) else self.config, name, None)

    def projected(
        self, x: Tensor, layers: list[Projection], position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns q [B, H, T, d], k and v [B, G, T, d], with q and k normalised and rotated if this module does so."""
        size = cast(int, self.head_dim)
        q, k, v = lora_linears(x, layers, dtype=base_dtype(self.q_proj))
        shape = (*x.shape[:-1], -1, size)
        if hasattr(self, "q_norm"):
            q, k = cast(Any, self).q_norm(q.view(shape)), cast(Any, self).k_norm(k.view(shape))
        if getattr(self, "use_rope", True) and position_embeddings is not None:
            cos, sin = (f.expand(*x.shape[:-1], -1) for f in position_embeddings)
            q, k = rotate(q, k, cos, sin, size)
        return q.view(shape).transpose(1, 2), k.view(shape).transpose(1, 2), v.view(shape).transpose(1, 2)


# Maps an attribute of a module to the argument of the attention function as which the module hands it over.
PASSED = {"sliding_window": "sliding_window", "attn_logit_softcapping": "softcap"}


def projections_of(attention: Any, training: bool) -> list[Projection] | str:
    """Returns the layers q, k, v and o as they are now, or says why they cannot be computed here."""
    found: list[Projection] = []
    for name in LAYERS:
        projection = projection_of(getattr(attention, name), training)
        if isinstance(projection, str):
            return projection
        found.append(projection)
    types = {base_dtype(getattr(attention, name)) for name in LAYERS}
    if len({isinstance(p.weight, NF4Weight) for p in found}) > 1 or len(types) > 1:
        return "some layers quantised and some not"
    return found


def use_lean_attention(model: Any) -> str:
    """Replaces the attention modules of ``model``'s decoder; returns the choice with its reason, to print.

    Always on where it can be: results are as exact as PEFT's, with fewer bytes and fewer passes over them.
    """
    blocks = decoder_layers(model)
    reason = why_not_lean(blocks)
    if reason:
        return f"left to PEFT ({reason})"
    for block in blocks:
        block.self_attn = LeanAttention(block.self_attn)
    return f"on for {len(blocks)} layers (a small one of their class gives the same results)"


def why_not_lean(blocks: list[Any]) -> str:
    """Says why the attention modules of these decoder layers must stay as they are; "" if all can be replaced.

    blocks: the layers of a model that has its adapters already.
    """
    return next((reason for block in blocks if (reason := obstacle_of(getattr(block, "self_attn", None)))), "")


def obstacle_of(attention: Any) -> str | None:
    """Says why this attention module must stay as it is; None if it can be replaced."""
    if attention is None:
        return "a decoder layer without self_attn"
    kind = type(attention).__name__
    if isinstance(attention, LeanAttention):
        return "replaced already"
    children = {name for name, _ in attention.named_children()}
    known = children in ({*LAYERS}, {*LAYERS, *NORMS}) and all(hasattr(attention, name) for name in ATTRIBUTES)
    if not known or any(True for _ in attention.parameters(recurse=False)):
        return f"no formula here for {kind}"
    if attention._forward_hooks or attention._forward_pre_hooks or hasattr(attention, "_hf_hook"):
        return "hooks on its attention"
    if "forward" in vars(attention) or not type(attention).forward.__module__.startswith("transformers."):
        return f"{kind} has a forward that is not transformers' own"
    if any(
        type(getattr(attention, name)).__name__ not in (*FORMS, LeanRMSNorm.__name__) for name in children - {*LAYERS}
    ):
        return f"no formula here for the norms of {kind}"
    layers = projections_of(attention, training=True)
    return layers if isinstance(layers, str) else differs(attention)


def differs(attention: Any) -> str | None:
    """Tries out a small module of the same class and settings: says so if ours gives other results or gradients."""
    kind = type(attention).__name__
    try:
        register()
        small = small_one(attention)
        found, wanted = (tried(module) for module in (LeanAttention(small), small))
    except Exception as error:
        return f"{kind} could not be tried out: {first_line(error)}"
    same = all((f - w).norm() <= 1e-3 * w.norm() for f, w in zip(found, wanted, strict=True))
    return None if same else f"{kind} computes something else than is known here"


def small_one(attention: Any) -> Any:
    """Makes a module of the same class and settings as ``attention``, but small, on the CPU and in float32."""
    config = copy.deepcopy(attention.config)
    groups = 4 if config.num_key_value_heads == config.num_attention_heads else 2
    for name, value in {
        "hidden_size": 4 * TRIED_HEAD, "num_attention_heads": 4, "num_key_value_heads": groups, "head_dim": TRIED_HEAD
    }.items():  # fmt: skip
        setattr(config, name, value)
    if getattr(config, "sliding_window", None):
        # Shorter than the documents that are tried, so that a window that is not handed on shows.
        config.sliding_window = TRIED_TOKENS // 4
    config._attn_implementation = NAME
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        # In training, so that a dropout that is not known here shows.
        small = type(attention)(config, attention.layer_idx).float().requires_grad_(False).train()
    for number, parameter in enumerate(small.parameters()):
        parameter.copy_(waves(*parameter.shape, number=number) / parameter.shape[-1] ** 0.5)
    return small


def tried(attention: Any) -> list[Tensor]:
    """Tries a module out on two packed documents.

    Returns [its result, the gradient of its input, its result for inputs so large that a limit would clip them].
    """
    config = attention.config
    share = getattr(config, "partial_rotary_factor", None) or 1.0
    angle = waves(1, TRIED_TOKENS, int(share * TRIED_HEAD) // 2).repeat(1, 1, 2)
    bounds = torch.tensor([0, TRIED_TOKENS // 3, TRIED_TOKENS], dtype=torch.int32, device="cpu")
    # Far positions, so that a scale that goes by them shows.
    positions = 5000 * torch.arange(TRIED_TOKENS, device="cpu")[None]

    def result(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return cast(Tensor, attention(
            hidden_states=x, position_embeddings=(angle.cos(), angle.sin()), attention_mask=None, cu_seq_lens_q=bounds,
            max_length_q=TRIED_TOKENS, position_ids=positions,
        )[0])  # fmt: skip

    x = waves(1, TRIED_TOKENS, config.hidden_size).requires_grad_()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        out = result(x)
        (gradient,) = torch.autograd.grad(out, x, out.detach().cos())
        return [out.detach(), gradient, result(30 * x).detach()]


def waves(*shape: int, number: int = 0) -> Tensor:
    """Returns values between -1 and 1 of this shape, the same on every machine; ``number`` gives others."""
    count = torch.Size(shape).numel()
    return torch.linspace(-3, 3, count, device="cpu").mul_(77 + 1000 * number).sin_().view(shape)
