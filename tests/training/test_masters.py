"""Adapters, their gradients and the optimizer's states are float32 from the first step to the saved file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from masters_child import watched
from safetensors.torch import load_file
from tests_support import with_unsloth

from qlora_sft.errors import RunError
from qlora_sft.training.model_snapshot import require_unchanged, restore, take_snapshot

CHILD = Path(__file__).parent / "masters_child.py"
RUN = [
    "model.load_in_4bit=true",
    "model.dtype=bfloat16",
    "training.save_steps=2",
    "training.max_steps=4",
    "data.packing=none",
]


def watched_beside(file: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """The same in a process of its own."""
    command = [sys.executable, str(CHILD), str(file), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("backend", ["transformers", pytest.param("unsloth", marks=with_unsloth)])
def test_masters_are_float32_in_every_step_after_resume_and_on_disk(
    make_config: Any, tmp_path: Path, backend: str
) -> None:
    from qlora_sft.plan.blueprint import read_blueprint
    from qlora_sft.plan.weights import residents

    config = make_config(*RUN)
    watch = watched_beside if backend == "unsloth" else watched
    found = watch(tmp_path / "config.yaml", [*RUN, f"model.backend={backend}"])
    steps = [seen for seen in found if "step" in seen]
    assert [seen["step"] for seen in steps] == [1, 2, 3, 2, 3]
    assert all(seen["parameters"] == seen["states"] == ["float32"] for seen in steps)
    assert all(seen["gradients"] == ["float32"] for seen in found if "gradients" in seen)
    planned = residents(
        read_blueprint(config, config.model.path), config, torch.bfloat16, "adamw_torch_fused", on_gpu=False
    )
    assert steps[0]["bytes"] == [planned.adapters, planned.optimizer]
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.fixture
def model(make_config: Any) -> Any:
    from qlora_sft.model.load import load_model

    config = make_config()
    return load_model(config, config.model.path, torch.float32, "transformers")


def test_a_cast_is_undone_with_every_bit(model: Any) -> None:
    for layer in model.get_base_model().model.layers:
        layer.gradient_checkpointing = True
    snapshot = take_snapshot(model)
    model.get_base_model().model.layers[0].gradient_checkpointing = False
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert sorted(restore(model, snapshot)) == sorted(before)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert all(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)


@pytest.mark.parametrize("what", ["frozen", "thawed", "hook", "checkpointing", "attention", "type"])
def test_what_nobody_ordered_ends_the_run_with_its_name(model: Any, what: str) -> None:
    snapshot = take_snapshot(model)
    base = model.get_base_model()
    layer = base.model.layers[1]
    changes = {
        "frozen": lambda: next(p for p in layer.parameters() if p.requires_grad).requires_grad_(False),
        "thawed": lambda: base.model.norm.weight.requires_grad_(True),
        "hook": lambda: layer.mlp.register_forward_hook(lambda *_: None),
        "checkpointing": lambda: setattr(layer, "gradient_checkpointing", True),
        "attention": lambda: base.set_attn_implementation("eager"),
        "type": lambda: base.model.norm.to(torch.float16),
    }
    changes[what]()
    named = {
        "frozen": "requires_grad of .*layers.1.*lora_A",
        "thawed": "requires_grad of .*norm",
        "hook": "hooks of .*layers.1.mlp",
        "checkpointing": "gradient_checkpointing of layer 1",
        "attention": "attention was .* and is eager",
        "type": "type of .*norm",
    }[what]
    with pytest.raises(RunError, match=named):
        require_unchanged(model, snapshot)
