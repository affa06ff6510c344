"""Measures the held-out loss of every source, over packed sequences, with the training loss itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from qlora_sft.data.batch import flatten
from qlora_sft.data.packing import pack
from qlora_sft.data.render import Rendered
from qlora_sft.model.loss import batch_loss, to_device
from qlora_sft.say import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def held_out_loss(
    model: PreTrainedModel, documents: Mapping[str, Sequence[Rendered]], capacity: int, dtype: torch.dtype
) -> dict[str, float]:
    """Returns, by source, the weighted mean loss per supervised token in nats. Leaves the model in training mode."""
    model.eval()
    result = {}
    packed = {source: pack([len(row.input_ids) for row in rows], capacity) for source, rows in documents.items()}
    bar = progress(sum(map(len, packed.values())), "held-out loss", "sequence")
    try:
        for source, rows in documents.items():
            total = weight = 0.0
            for each in packed[source]:
                batch = to_device(flatten([rows[index] for index in each]), model.device)
                with torch.no_grad(), autocast(model.device, dtype):
                    output = batch_loss(model, batch)
                total += float((output.nll * batch["position_weights"]).sum())
                weight += batch["weight_sum"]
                bar.update()
            result[source] = total / weight
    finally:
        bar.close()
        model.train()
    return result


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Returns the autocast context in which the trainer computes, so that evaluation sees the same model."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
