"""Computes PEFT's adapters of experts (``target_parameters``) expert by expert.

PEFT's own way adds the product of the factors to the whole stack, all experts of it, in every forward; for NF4 there is
no such sum. The adapters stay PEFT's, by name, shape and in what is saved. Import it only when the backend is chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from qlora_sft.model.base import base_of
from qlora_sft.model.experts import Factors, experts_forward, lies_as_peft_thinks, stack_names
from qlora_sft.model.projection import active_factors

if TYPE_CHECKING:
    from peft import PeftModel


class ExpertsLora(ParamWrapper):  # type: ignore[misc]
    """Computes a module of experts with the adapters of all its stacks.

    PEFT wraps such a module once for each stack that has an adapter. This is the class of the outermost wrapper; it
    collects the adapters of all.
    """

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        factors: dict[str, Factors] = {}
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            found = active_factors(layer, self.training)
            if isinstance(found, str):
                raise NotImplementedError(f"experts cannot be computed with {found}")
            if found is not None:
                A, B, scale = found
                A = A.view(layer.num_experts, -1, A.shape[1])
                B = B.view(len(B), -1, layer.num_experts).permute(2, 0, 1)
                if not lies_as_peft_thinks(layer.get_base_layer()):
                    A, B = B.transpose(1, 2), A.transpose(1, 2)
                factors[layer.parameter_name] = A, B, scale
            layer = layer.base_layer
        return experts_forward(layer, x, index, weights, factors)


def use_experts_lora(model: PeftModel) -> int:
    """Lets the adapters of all experts of a PEFT model be computed here; returns how many modules have some."""
    taken = 0
    for parent in list(base_of(model).modules()):
        for layer in parent.children():
            outermost = isinstance(layer, ParamWrapper) and not isinstance(parent, ParamWrapper)
            if outermost and stack_names(layer.get_base_layer()):
                # The same object with another forward: whoever holds it, and PEFT's own functions, go on with it.
                layer.__class__ = ExpertsLora
                taken += 1
    return taken
