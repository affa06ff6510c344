"""Measures the held-out loss of every source, over packed sequences, with the training loss itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from qlora_sft.data.batch import flatten
from qlora_sft.data.packing import pack
from qlora_sft.data.render import Rendered
from qlora_sft.model.full_memory import free_memory, is_memory_full
from qlora_sft.model.loss import batch_loss, to_device
from qlora_sft.say import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def held_out_loss(
    model: PreTrainedModel, documents: Mapping[str, Sequence[Rendered]], capacity: int, dtype: torch.dtype
) -> dict[str, float]:
    """Returns, by source, the weighted mean loss per supervised token in nats. Leaves the model in training mode.

    A packed sequence that memory does not suffice for is read one document at a time; where it does not suffice for a
    single one, the error is raised.
    """
    model.eval()
    result = {}
    packed = {source: pack([len(row.input_ids) for row in rows], capacity) for source, rows in documents.items()}
    bar = progress(sum(map(len, packed.values())), "held-out loss", "sequence")
    try:
        for source, rows in documents.items():
            total = weight = 0.0
            for each in packed[source]:
                for nll, counted in _summed(model, [rows[index] for index in each], dtype):
                    total, weight = total + nll, weight + counted
                bar.update()
            result[source] = total / weight
    finally:
        bar.close()
        model.train()
    return result


def _summed(model: PreTrainedModel, documents: list[Rendered], dtype: torch.dtype) -> list[tuple[float, float]]:
    """Returns the summed loss of ``documents`` and its weight: of all in one, or of each alone if memory is full."""
    batch = to_device(flatten(documents), model.device)
    try:
        with torch.no_grad(), autocast(model.device, dtype):
            output = batch_loss(model, batch)
        return [(float((output.nll * batch["position_weights"]).sum()), batch["weight_sum"])]
    except Exception as error:
        if not is_memory_full(error) or len(documents) == 1:
            raise
    del batch
    free_memory()
    return [part for document in documents for part in _summed(model, [document], dtype)]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Returns the autocast context in which the trainer computes, so that evaluation sees the same model."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
