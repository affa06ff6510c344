"""The penalty is that of the layers' own weights, and their Fisher information has the sums of the true one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from torch import Tensor

from qlora_sft.data.batch import flatten
from qlora_sft.data.render import Rendered
from qlora_sft.errors import ConfigError
from qlora_sft.model import ewc
from qlora_sft.model.attention import plain_attention
from qlora_sft.model.ewc import ewc_bytes, file_bytes, load_anchors, measure_anchors, penalty, save_anchors, shapes_of
from qlora_sft.model.lora_init import adapted_layers
from qlora_sft.model.loss import batch_loss
from qlora_sft.model.setup import prepare_model
from qlora_sft.training.model_snapshot import training_facts

DOCUMENTS = [Rendered([30 + 7 * i + k for i in range(9)], [0.0] * 4 + [1.0] * 5, "old") for k in range(3)]


@pytest.fixture
def model(make_config: MakeConfig, tiny_model: Path) -> Any:
    config = make_config("lora.r=4", "lora.rslora=true", "lora.dropout=0.2", "lora.target_modules=[q_proj, down_proj]")
    torch.manual_seed(0)
    return prepare_model(config, str(tiny_model), torch.float32, "transformers", 64, lambda _: None)


def test_rows_and_columns_sum_up_to_those_of_the_whole_matrix(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the labels that were drawn, the squares of the products of every token's input and gradient."""
    drawn: list[Tensor] = []
    own = ewc._drawn

    def draw(*arguments: Any) -> Tensor:
        drawn.append(own(*arguments))
        return drawn[-1]

    monkeypatch.setattr(ewc, "_drawn", draw)
    facts = training_facts(model)
    anchors, told = measure_anchors(model, DOCUMENTS, torch.float32, 0)
    assert training_facts(model) == facts
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "4 layers, by 15 predictions on 27 tokens" in told
    monkeypatch.setattr(ewc, "_drawn", own)
    path, layer = next(iter(adapted_layers(model)))
    whole = torch.zeros(layer.out_features, layer.in_features)
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_: Any, args: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: seen.append((args[0][0].detach(), gradient[0])))

    hook = layer.register_forward_hook(look)
    model.eval()
    order = list(ewc._batches(DOCUMENTS, 0))
    for batch, labels in zip(order, drawn, strict=True):
        batch["targets"] = labels
        batch_loss(model, batch, n_items=1.0).loss.backward()
    hook.remove()
    for x, gradient in seen:
        whole += (gradient.square().T @ x.square()) / 15
    found = torch.outer(anchors[path].rows, anchors[path].columns)
    assert whole.max() > 0
    torch.testing.assert_close(found.sum(0), whole.sum(0), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.sum(1), whole.sum(1), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("begins_at_zero", [True, False])
def test_the_penalty_is_the_sum_over_all_weights(model: Any, begins_at_zero: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and not begins_at_zero:
                parameter.normal_()
    anchors, _ = measure_anchors(model, DOCUMENTS, torch.float32, 0)
    assert penalty(model, anchors).item() == 0
    save_anchors(anchors, tmp_path / "ewc.safetensors")
    anchors = load_anchors(tmp_path / "ewc.safetensors", torch.device("cpu"))
    began = {path: layer.get_delta_weight("default").detach().clone() for path, layer in adapted_layers(model)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = torch.zeros(())
    for path, layer in adapted_layers(model):
        fisher = torch.outer(anchors[path].rows, anchors[path].columns)
        expected = expected + (fisher * (layer.get_delta_weight("default") - began[path]).square()).sum() / 2
    found = penalty(model, anchors)
    assert expected > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, theirs = torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 * float(other.abs().max()))


def test_the_bytes_of_anchors_and_graph_are_counted(model: Any, tmp_path: Path) -> None:
    """The graph holds whatever is saved for the backward and is neither a trained value nor an anchor."""
    anchors, _ = measure_anchors(model, DOCUMENTS, torch.float32, 0)
    kept = [value for anchor in anchors.values() for value in vars(anchor).values()]
    there = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *kept)}
    saved: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if value.dim() and storage.data_ptr() not in there:
            saved[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        total = penalty(model, anchors)
    total.backward()  # type: ignore[no-untyped-call]
    shapes = shapes_of(model)
    assert file_bytes(shapes) == sum(value.nbytes for value in kept)
    assert ewc_bytes(shapes) == file_bytes(shapes) + sum(saved.values())
    save_anchors(anchors, tmp_path / "ewc.safetensors")
    assert 0 <= (tmp_path / "ewc.safetensors").stat().st_size - file_bytes(shapes) < 4096  # its header


def test_it_is_about_what_a_change_costs(model: Any) -> None:
    """In the second order the penalty is the divergence per token that the change makes; the rank-one form is not the
    matrix itself, so only the size is compared."""
    anchors, _ = measure_anchors(model, DOCUMENTS, torch.float32, 0)
    torch.manual_seed(5)
    with plain_attention(model), torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
        model.eval()
        divergence, count = 0.0, 0
        for document in DOCUMENTS:
            ids, places = torch.tensor([document.input_ids]), flatten([document])["positions"].long()
            q = model(input_ids=ids, use_cache=False).logits[0, places].log_softmax(-1)
            with model.disable_adapter():
                p = model(input_ids=ids, use_cache=False).logits[0, places].log_softmax(-1)
            divergence += float((p.exp() * (p - q)).sum())
            count += len(places)
    assert 0.2 < penalty(model, anchors).item() / (divergence / count) < 5


def test_a_run_that_has_lost_it_does_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ewc\.safetensors is gone"):
        load_anchors(tmp_path / "ewc.safetensors", torch.device("cpu"))
