"""What the plan says of the 135M model is what its step takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from qlora_kernels.offload import Tier, peak_bytes

from qlora_sft.config import load_config
from qlora_sft.data.batch import flatten
from qlora_sft.data.render import Rendered
from qlora_sft.model.layer_bytes import memory_use
from qlora_sft.model.loss import batch_loss
from qlora_sft.model.loss_bytes import between_bytes
from qlora_sft.model.memory import install
from qlora_sft.model.setup import prepare_model
from qlora_sft.plan.activations import layer_bytes
from qlora_sft.plan.blueprint import read_blueprint
from qlora_sft.plan.weights import residents

LAYERS = 30


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [512, 2048])
@pytest.mark.parametrize("mlp", ["auto", "off"])
def test_the_peak_of_a_step_is_predicted_within_8_percent(base_model: Path, mlp: str, tokens: int) -> None:
    """Weights, adapters and optimizer, which are exact (`test_weights`), and activations, for three tiers."""
    config = load_config("demo", [f"memory.tiled_mlp={mlp}", "model.backend=transformers"])
    model = prepare_model(config, str(base_model), torch.bfloat16, "transformers", tokens, lambda _: None).train()
    blueprint = read_blueprint(config, str(base_model))
    held = residents(blueprint, config, torch.bfloat16, "adamw_torch_fused").total
    layer = layer_bytes(blueprint, tokens, config.lora, torch.bfloat16, on_gpu=False)
    between = between_bytes(blueprint.config, tokens, torch.bfloat16, False, blueprint.lean_norms)
    documents = [Rendered([100 + i % 900 for i in range(tokens // 4)], [1.0] * (tokens // 4), "s")] * 4
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    each: tuple[Tier, ...] = ("keep", "checkpoint", "offload")
    for tier in each:
        slab = install(model, [tier] * LAYERS, tokens, layer.input, lambda _: None)
        with memory_use(torch.device("cpu")) as use:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = batch_loss(model, flatten(documents)).loss
            loss.backward()
        planned = peak_bytes([tier] * LAYERS, layer, between)
        assert held + planned == pytest.approx(held + use.peak(), rel=0.08), tier
        if slab:
            slab.close()
