"""Refuses to grade a model whose logits are not numbers: the first option, or token, would be taken for its answer."""

from __future__ import annotations

from qlora_sft.errors import RunError


def no_numbers() -> RunError:
    """Returns the error for a model whose logits are not numbers."""
    return RunError(
        "the model's logits are not numbers (NaN), so nothing can be graded. Some models overflow in float16: train "
        "and evaluate them with model.dtype=bfloat16 or float32. Else the weights are damaged"
    )
