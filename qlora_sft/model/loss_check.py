"""Checks before training that the logits on which the loss rests are those that the model itself would give.

The loss is computed from the last hidden states, the output head and what is known of a family's scales and caps. A
family may do more behind its last hidden state (a transformation, a multiplier), and would be trained towards another
model than the one that answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_sft.errors import ConfigError, first_line
from qlora_sft.model.attention import plain_attention
from qlora_sft.model.attention_check import FAILURES, TOLERANCE, Asking, some_ids
from qlora_sft.model.base import base_of, has_unsloths_forward
from qlora_sft.model.hidden import alone
from qlora_sft.model.loss import logit_transform
from qlora_sft.say import Say

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel

LENGTH = 23


def check_logits(model: CausalModel, dtype: torch.dtype, say: Say = lambda _: None) -> None:
    """Raises `ConfigError` where the model's own logits of a short document are not those of the loss.

    Where only the scale that its language model names is left out by the class for the whole model, it says so.
    """
    base = base_of(model)
    if has_unsloths_forward(base):
        return  # it gives hidden states in place of logits, if it likes
    try:
        own, ours, unscaled = logits_of(model, dtype)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise ConfigError(f"model.path: {type(base).__name__} gives no logits here: {first_line(error)}") from None
    scale = logit_transform(base.config).get("logit_scale")
    if scale and difference_of(own, unscaled) <= TOLERANCE[dtype] < difference_of(own, ours):
        say(
            f"logits: {type(base).__name__} of transformers leaves out the logit_scale of its language model "
            f"({scale:g}); the loss has it, as the language model alone has"
        )
        return
    difference = difference_of(own, ours)
    if not difference <= TOLERANCE[dtype]:
        raise ConfigError(
            f"model.path: {type(base).__name__} does more behind its last hidden states than its output head and the "
            f"scales and caps that are known here, so the loss would be that of another model (logits differ by "
            f"{difference:.1e}); models of this kind cannot be trained here"
        )


def logits_of(model: CausalModel, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logits of a short document: the model's own, those of the loss, and these without their scale.

    The model stays in its mode.
    """
    base = base_of(model)
    ids = some_ids(base, (LENGTH,))[None]
    with torch.no_grad(), Asking(base, dtype), plain_attention(model):
        own = base(input_ids=ids, use_cache=False).logits.float()
        raw = base.get_output_embeddings()(alone(model, ids)).float()
    options = logit_transform(base.config)
    return own, transformed(raw, **options), transformed(raw, softcap=options.get("softcap"))


def difference_of(own: Tensor, ours: Tensor) -> float:
    """Returns ``|own - ours| / |own|``."""
    return float((own - ours).norm() / own.norm())


def transformed(logits: Tensor, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    """Returns what the loss makes of ``logits``, in the order in which it does."""
    scaled = logits * logit_scale
    return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)
