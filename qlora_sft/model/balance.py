"""Computes the load-balance loss of a mixture of experts as its family does: in training, if config.json asks for it.

transformers adds it in the model's own forward, which computes all logits and is not used here. Routers are frozen;
what the loss changes are the adapters before them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FUNCTION = "load_balancing_loss_func"


def balance_coefficient(base: PreTrainedModel) -> float:
    """Returns the factor of the load-balance loss; 0 if training is to have none.

    It is ``router_aux_loss_coef`` of config.json, if that sets ``output_router_logits`` and the family has such a loss.
    """
    settings = base.config.get_text_config()
    wanted = getattr(settings, "output_router_logits", False) and hasattr(sys.modules[type(base).__module__], FUNCTION)
    return float(getattr(settings, "router_aux_loss_coef", None) or 0.0) if wanted else 0.0


def balance_loss(base: PreTrainedModel, logits: tuple[Tensor, ...]) -> Tensor | None:
    """Returns the load-balance loss times its coefficient, by the family's own function; None if there is none.

    logits: what the router of each layer gave all tokens, [T, experts] each.
    """
    coefficient = balance_coefficient(base)
    if not coefficient or not logits:
        return None
    function = getattr(sys.modules[type(base).__module__], FUNCTION)
    loss: Tensor = coefficient * function(logits, base.num_experts, base.num_experts_per_tok, None)
    return loss


def describe_balance(base: PreTrainedModel) -> str:
    """Says in one phrase, to print, how much of the load-balance loss is added."""
    coefficient = balance_coefficient(base)
    return f"{coefficient:g} times it" if coefficient else "none (config.json does not set output_router_logits)"
