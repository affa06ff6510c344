"""Lets `qlora_kernels.rms_norm` compute the RMSNorms of a model, which then keep no copy of their input in float32.

Each module is replaced by a `LeanRMSNorm` that holds the very same weight under the same name, so parameter names,
PEFT and what is saved stay as they were. Results are the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from qlora_kernels.rms_norm import NormFormula, rms_norm
from torch import Tensor

from qlora_sft.model.base import decoder_layers, decoder_of

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel

# Modules whose forward is known, by their class's name.
FORMS: dict[str, NormFormula] = {
    "LlamaRMSNorm": "llama", "Qwen2RMSNorm": "llama", "Qwen3RMSNorm": "llama", "MistralRMSNorm": "llama",
    "SmolLM3RMSNorm": "llama", "Phi3RMSNorm": "llama",
    "GemmaRMSNorm": "gemma", "Gemma2RMSNorm": "gemma", "Gemma3RMSNorm": "gemma",
}  # fmt: skip
# Rows of a probe: more than one, since a single row may be summed in an order of its own.
PROBE_ROWS = 32


class LeanRMSNorm(torch.nn.Module):
    """Takes the place of a transformers RMSNorm, and has its attributes (``variance_epsilon`` or ``eps``)."""

    def __init__(self, norm: Any, form: NormFormula):
        super().__init__()
        for name, value in vars(norm).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        self.weight = norm.weight
        self.form: NormFormula = form
        self.epsilon = float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon, form=self.form)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.epsilon}"


def use_lean_norms(model: CausalModel) -> str:
    """Replaces the RMSNorms of ``model``'s decoder: those of its layers and the last one. Returns the choice with its
    reason, to print.

    Always on where the formula is known: nothing but memory changes, and measured on a CPU it is faster.
    """
    decoder = decoder_of(model)
    # On a GPU, the forward of Unsloth's layers reads the weight of a norm itself and never calls the module.
    if any(type(layer).forward.__module__.startswith("unsloth") for layer in decoder_layers(model)):
        return "off (Unsloth's layers compute their norms in their own way)"
    found = [
        (parent, name, child)
        for parent in decoder.modules()
        for name, child in parent.named_children()
        if "RMSNorm" in type(child).__name__
    ]
    if not found:
        return "off (no RMSNorm here)"
    left: dict[str, int] = {}
    for parent, name, norm in found:
        reason = obstacle_of(norm)
        if reason is None:
            setattr(parent, name, LeanRMSNorm(norm, FORMS[type(norm).__name__]))
        else:
            left[reason] = left.get(reason, 0) + 1
    as_is = "; ".join(f"{count} left: {reason}" for reason, count in left.items())
    replaced = len(found) - sum(left.values())
    if not replaced:
        return f"off ({as_is})"
    return f"on for {replaced} norms (kept: their input as it is, no float32 copy{'; ' + as_is if as_is else ''})"


def has_lean_norms(model: CausalModel) -> bool:
    """Returns whether any norm of ``model`` was replaced."""
    return any(isinstance(module, LeanRMSNorm) for module in model.modules())


def obstacle_of(norm: Any) -> str | None:
    """Returns why this module must stay as it is; None if it can be replaced."""
    kind = type(norm).__name__
    if kind == LeanRMSNorm.__name__:
        return "replaced already"
    if kind not in FORMS:
        return f"no formula here for {kind}"
    if norm._forward_hooks or norm._forward_pre_hooks or hasattr(norm, "_hf_hook") or "forward" in vars(norm):
        return f"hooks on a {kind}"
    return None if same_bits(norm, LeanRMSNorm(norm, FORMS[kind])) else f"{kind} computes something else here"


@torch.no_grad()
def same_bits(norm: Any, lean: LeanRMSNorm) -> bool:
    """Returns whether both norms give the same bits for a probe.

    A later transformers, or a patched class, may have the name and another formula.
    """
    weight = norm.weight
    x = torch.linspace(-3, 3, PROBE_ROWS * len(weight), device=weight.device).sin().to(weight.dtype)
    x = x.view(PROBE_ROWS, -1)
    return torch.equal(norm(x), lean(x))
