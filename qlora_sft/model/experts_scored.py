"""Lets transformers compute experts by our own code, for each token those that its router chose.

Most families call their experts through an interface of transformers, which takes other code for all of them. Llama 4
does not: its experts do not weigh what they return, the router's score scales what goes into them, and every token goes
through every expert, with zeros where it was not chosen, which come to zeros. Leaving those out is the same result and
gradient. Import this module only when the backend is chosen: it imports transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

from qlora_sft.model.experts import experts_forward, stacks

NAME = "qlora_experts"
"""The name under which transformers knows `experts_forward`."""


class ScoredExperts(Llama4TextExperts):  # type: ignore[misc]
    """Computes the stacks of Llama 4, in NF4 or not, for the experts that are named for each row."""

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return experts_forward(self, hidden, index, weights)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated: Tensor = self.act_fn(gate)
        return up * activated


class ChosenExperts(Llama4TextMoe):  # type: ignore[misc]
    """Computes a layer of Llama 4's experts from those that the router chose."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(x)
        index = logits.topk(self.top_k, dim=1).indices
        rows = (x[:, None] * scores.gather(1, index)[..., None]).flatten(0, 1)
        routed = self.experts(rows, index.reshape(-1, 1), torch.ones_like(rows[:, :1]))
        return self.shared_expert(x) + routed.view(len(x), self.top_k, -1).sum(1), logits


def use_our_experts(model: PreTrainedModel) -> None:
    """Lets the experts of ``model``, if it has some, be computed by `experts_forward`."""
    if not any(True for _ in stacks(model)):
        return
    for module in model.modules():
        if type(module) is Llama4TextMoe:
            # The same objects with another forward, so that every name stays.
            module.__class__, module.experts.__class__ = ChosenExperts, ScoredExperts
    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    model.set_experts_implementation(NAME)
