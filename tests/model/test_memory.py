"""The tiers in a real model: measured bytes, the choice by budget, and gradients equal bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from qlora_kernels.offload import LayerBytes, peak_bytes
from tests_support import documents_of, with_unsloth

from qlora_sft.config import load_config
from qlora_sft.data.batch import flatten
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.model import memory, memory_budget
from qlora_sft.model.attention import use_document_attention
from qlora_sft.model.layer_bytes import measure_layer
from qlora_sft.model.load import load_model
from qlora_sft.model.loss import batch_loss
from qlora_sft.model.loss_bytes import between_bytes
from qlora_sft.model.memory import use_memory
from qlora_sft.model.qkv import use_lean_attention

GIB = 2**30
LAYER = LayerBytes(input=GIB, attention=GIB, kept=10 * GIB, backward=4 * GIB)


def quiet(text: str) -> None:
    pass


def prepared(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    model = load_model(config, config.model.path, dtype, "transformers")
    use_document_attention(model)
    model.train()
    return model


def gradients(model: Any, batches: list[Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    model.zero_grad()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype != torch.float32):
            loss = batch_loss(model, batch).loss
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("policy", "dtype", "dropout"),
    [
        ("none", "float32", 0.2), ("offload", "float32", 0), ("auto", "bfloat16", 0.2), ("offload", "bfloat16", 0.2),
        ("none", "bfloat16", 0), ("offload", "bfloat16", 0),
    ],
)  # fmt: skip
def test_every_policy_gives_the_gradients_of_checkpointing(
    make_config: Any, policy: str, dtype: str, dropout: float
) -> None:
    """On a packed row and on a single document, accumulated; with LoRA's dropout, or with q, k, v and o by nf4_lora."""
    found = []
    model = prepared(make_config(f"lora.dropout={dropout}", f"model.dtype={dtype}"), getattr(torch, dtype))
    assert use_lean_attention(model).startswith("left to PEFT (LoRA dropout" if dropout else "on")
    for each in ("checkpoint", policy):
        config = make_config(f"memory.policy={each}")
        documents = documents_of(config)
        batches = [flatten(documents[:4]), flatten(documents[4:5])]
        tokens = max(batch["input_ids"].numel() for batch in batches)
        with use_memory(model, config, tokens, getattr(torch, dtype), quiet) as installed:
            found.append(gradients(model, batches))
            assert installed.slab is None or (installed.slab.taken, installed.slab.slots) == (0, 2)
        assert installed.slab is None or installed.slab.nbytes == 0
    assert found[0].keys() == found[1].keys()
    assert any(gradient.abs().max() > 0 for gradient in found[0].values())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("tokens", [300, 2000])
def test_a_layer_keeps_what_it_is_measured_to_keep(make_config: Any, tokens: int) -> None:
    """Against the whole model: its saved bytes with both layers kept, less those with the last one checkpointed. (The
    input of the first needs no gradient.)"""
    config = make_config("data.max_length=2048")
    model = prepared(config)
    layer = measure_layer(model, tokens, torch.float32)
    assert layer.input == tokens * 64 * 4
    assert layer.attention == tokens * 4 * (16 * 4 + 4)
    saved = []
    for tiers in (["keep", "keep"], ["keep", "checkpoint"]):
        memory.install(model, tiers, tokens, layer.input, quiet)
        saved.append(saved_bytes(model, tokens))
    assert saved[0] - saved[1] == layer.kept - layer.input
    assert layer.backward > 0


def test_short_sequences_tell_what_a_long_one_takes() -> None:
    """Where the MLP is tiled its backward takes no more beyond a tile, which two shorter sequences would not show."""
    from transformers import LlamaConfig

    from qlora_sft.model.layer_bytes import _measured
    from qlora_sft.model.mlp import set_recompute, use_tiled_mlp
    from qlora_sft.plan.random_model import random_model

    settings = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = random_model(settings, load_config("demo", ["lora.r=4"]), torch.float32, torch.device("cpu"))
    use_tiled_mlp(model, "auto", 8192)
    predicted = measure_layer(model, 8192, torch.float32)
    layer = model.get_base_model().model.layers[0]
    for recompute, kept in ((False, predicted.kept), (True, predicted.recomputed)):
        set_recompute(layer, recompute, 8192)
        found = _measured(layer, model, 8192, torch.float32)
        assert found.kept == kept
        assert found.backward <= predicted.backward <= 1.1 * found.backward or recompute


def test_a_gpu_without_room_to_measure_is_measured_with_less(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or says what to do. The flags of the model are those that it had."""
    from qlora_sft.model import layer_bytes
    from qlora_sft.model.mlp import use_tiled_mlp

    model = prepared(make_config("data.max_length=2048"))
    use_tiled_mlp(model, "auto", 4096)
    flags = [layer.mlp.recompute for layer in model.get_base_model().model.layers]
    wanted = measure_layer(model, 4096, torch.float32)
    own, room_for = layer_bytes._measured, [300]

    def measured(layer: Any, of: Any, tokens: int, dtype: torch.dtype, tree: bool) -> LayerBytes:
        if tokens > room_for[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return own(layer, of, tokens, dtype, tree)

    monkeypatch.setattr(layer_bytes, "_measured", measured)
    said: list[str] = []
    found = measure_layer(model, 4096, torch.float32, say=said.append)
    assert "Tried to allocate 2 GiB); measured with 256 tokens instead" in said[-1]
    assert (found.input, found.attention, found.kept) == (wanted.input, wanted.attention, wanted.kept)
    assert found.backward >= wanted.backward  # never too hopeful
    room_for[0] = 0
    with pytest.raises(RunError, match=r"no room for one layer of 64 tokens.*memory.offload_embeddings"):
        measure_layer(model, 4096, torch.float32, say=said.append)
    assert [layer.mlp.recompute for layer in model.get_base_model().model.layers] == flags


def saved_bytes(model: Any, tokens: int) -> int:
    from qlora_sft.model.layer_bytes import _documents
    from qlora_sft.model.loss import last_hidden_states

    storages: dict[int, int] = {}
    fixed = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = last_hidden_states(model, _documents(model, tokens))
    assert hidden.requires_grad
    return sum(storages.values())


def test_measuring_changes_neither_the_model_nor_the_random_numbers(make_config: Any) -> None:
    model = prepared(make_config("lora.dropout=0.2"))
    model.eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    measure_layer(model, 1000, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_auto_keeps_all_where_there_is_room_and_less_where_there_is_not(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    model = prepared(config)
    said: list[str] = []
    report = use_memory(model, config, 256, torch.float32, said.append).report
    assert report.tiers == ["keep", "keep"]
    assert "everything fits" in said[-1]
    layer = LayerBytes(**report.layer)
    least = peak_bytes(["checkpoint", "keep"], layer, between_bytes(model.config, 256, torch.float32, on_gpu=False))
    monkeypatch.setattr(memory, "device_budget", lambda *_: memory_budget.MemoryBudget(least, "a test"))
    report = use_memory(model, config, 256, torch.float32, said.append).report
    assert report.tiers != ["keep", "keep"]
    assert report.device_bytes <= least
    assert "offload" not in report.tiers  # of no use on a CPU
    monkeypatch.setattr(memory, "device_budget", lambda *_: memory_budget.MemoryBudget(1000, "a test"))
    report = use_memory(model, config, 256, torch.float32, said.append).report
    assert report.tiers == ["checkpoint", "checkpoint"]
    assert "activations do not fit" in said[-2]


def test_a_gpu_gets_the_tiers_its_budget_allows_or_an_error(make_config: Any) -> None:
    sixty = memory_budget.MemoryBudget(60 * GIB, "60")
    config = make_config("memory.gpu_budget_gib=60", "memory.host_budget_gib=20")
    choice = memory.choose(config, 32, LAYER, GIB, sixty, True, quiet)
    counts = Counter(choice.tiers)
    assert counts["offload"] <= 20
    assert choice.gpu_bytes <= 60 * GIB
    assert choice.tiers.count("keep") > 0
    config = make_config("memory.gpu_budget_gib=60", "memory.host_budget_gib=1")
    with pytest.raises(ConfigError, match=r"(?s)activations do not fit.*Shorten data.max_length"):
        memory.choose(config, 80, LAYER, GIB, sixty, True, quiet)


def test_offload_takes_as_many_layers_as_the_host_budget_holds(make_config: Any) -> None:
    config = make_config("memory.policy=offload", "memory.host_budget_gib=0.0001")
    model = prepared(config)
    said: list[str] = []
    with use_memory(model, config, 256, torch.float32, said.append) as installed:
        assert installed.report.tiers == ["offload", "checkpoint"]
        assert installed.slab is not None
        assert installed.slab.nbytes == installed.report.host_bytes == 256 * 64 * 4
    assert "host memory holds the inputs of 1 layers (memory.host_budget_gib=0.0001)" in said[-1]


def test_a_model_that_cannot_be_checkpointed_is_named(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnLayer(torch.nn.Module):
        pass

    monkeypatch.setattr(memory, "decoder_layers", lambda model: [OwnLayer()])
    with pytest.raises(ConfigError, match=r"OwnLayer cannot be checkpointed.*memory.policy=none"):
        use_memory(None, make_config(), 256, torch.float32, quiet)


def test_gradients_and_optimizer_states_are_taken_off_the_room(make_config: Any) -> None:
    model = prepared(make_config())
    trained = [p for p in model.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in trained)
    assert memory_budget.training_states(model, make_config()) == 12 * trainable + 4 * len(trained)
    # No tensor of this model is large enough for 8-bit states.
    assert memory_budget.training_states(model, make_config("training.optimizer=adamw_8bit")) == 12 * trainable


def test_room_on_a_card_before_and_after_the_model_is_loaded(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card, weights, states = 16 * GIB, 5 * GIB, GIB
    for config in (make_config(), make_config("memory.gpu_budget_gib=10")):
        found = []
        for allocated in (0, weights):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=card - allocated: (free, card))
            monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _, n=allocated: n)
            monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _, n=allocated: n)
            found.append(memory_budget.budget_on(torch.device("cuda"), config, states, weights - allocated).nbytes)
        budget = config.memory.gpu_budget_gib
        assert found == [(10 * GIB if budget else card - int(0.05 * card)) - weights - states] * 2


def test_room_is_measured_within_the_machine(make_config: Any) -> None:
    import psutil

    assert 0 < memory_budget.available_ram() <= psutil.virtual_memory().total
    config = make_config("memory.policy=offload", "memory.host_budget_gib=2")
    assert memory_budget.host_budget(config) == (2 * GIB, "memory.host_budget_gib=2")


UNDER_UNSLOTH = """
import json, sys
from pathlib import Path
from qlora_sft.model.backend import choose_backend
choose_backend("unsloth")
import torch
from tests_support import documents_of
from qlora_sft.config import load_config
from qlora_sft.model.attention import use_document_attention
from qlora_sft.model.base import decoder_layers
from qlora_sft.model.load import load_model
from qlora_sft.model.tokenizer import load_tokenizer
from qlora_sft.model.memory import use_memory
from qlora_sft.training.fit import Training, fit
config = load_config(sys.argv[1], sys.argv[2:])
documents = documents_of(config)
model = load_model(config, config.model.path, torch.float32, "unsloth")
use_document_attention(model)
Path(config.output).mkdir()
with use_memory(model, config, 256, torch.float32, lambda text: None) as memory:
    slots = []
    for layer in decoder_layers(model):
        def counted(function, *args, own=layer._gradient_checkpointing_func):
            result = own(function, *args)
            slots.append(memory.slab.taken)
            return result
        layer._gradient_checkpointing_func = counted
    tokenizer = load_tokenizer(config.model, config.model.path)
    fit(Training(config, Path(config.output), lambda text: None, model, tokenizer, torch.float32, documents,
        [[0, 1], [2]]), memory.keep_less)
    print(json.dumps([slots, memory.slab.taken]))
"""


@with_unsloth
def test_the_tiers_run_under_the_trainer_of_unsloth(make_config: Any, tmp_path: Path) -> None:
    """It switches checkpointing on or off in every layer as it likes before it trains."""
    make_config()
    overrides = ["memory.policy=offload", "model.backend=unsloth", f"output={tmp_path / 'out'}"]
    run = subprocess.run(
        [sys.executable, "-c", UNDER_UNSLOTH, str(tmp_path / "config.yaml"), *overrides],
        capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])},
    )  # fmt: skip
    # Two layers in each of two steps: slots taken after each forward, and after all.
    assert json.loads(run.stdout.splitlines()[-1]) == [[1, 2, 1, 2], 0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["memory.policy=ofload"], "did you mean 'offload'"),
        (["memory.gpu_budget_gib=0"], "memory.gpu_budget_gib must be positive, got 0"),
        (["memory.host_budget_gib=-1"], "memory.host_budget_gib must be positive"),
        (["memory.policy=none", "memory.gpu_budget_gib=8"], "has an effect only with memory.policy=auto, not none"),
        (["memory.policy=checkpoint", "memory.host_budget_gib=8"], "not with memory.policy=checkpoint"),
        (["model.gradient_checkpointing=true"], "unknown key 'model.gradient_checkpointing'"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("demo", overrides)
