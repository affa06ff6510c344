"""A base that is cut computes the bits of a whole one, and few of its layers are whole at a time.

Here one process has all shards; two processes are in tests/training/test_parallel.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import every_family
import pytest
import torch
import torch.distributed as dist
from conftest import layers_of_width_64
from moe_bases import write_base
from torch import Tensor

from qlora_sft.config import Config, load_config
from qlora_sft.data.batch import Batch, flatten
from qlora_sft.data.render import Rendered
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.model import shards as module
from qlora_sft.model.attention import use_plain_attention
from qlora_sft.model.base import decoder_layers
from qlora_sft.model.hidden import run_one_at_a_time
from qlora_sft.model.loss import batch_loss
from qlora_sft.model.memory import install, use_memory
from qlora_sft.model.setup import prepare_model
from qlora_sft.model.shards import CutLayer, shards_of, tensors_to_cut

LAYERS = 5


@pytest.fixture(autouse=True)
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, short_tokenizer: Any) -> Path:
    return layers_of_width_64(tmp_path_factory.mktemp("deep"), short_tokenizer, LAYERS)


def settings(*overrides: str) -> Config:
    return load_config("demo", ["model.backend=transformers", "model.chat_template=null", "lora.r=4", *overrides])


def documents() -> Batch:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 200, (length,), generator=draw).tolist() for length in (21, 1, 13)]
    return flatten([Rendered(each, [1.0] * len(each), "s") for each in ids])


def made(config: Config, base: Path) -> Any:
    """A model whose adapters do something, with the tiers of ``config``."""
    model = prepare_model(config, str(base), torch.float32, "transformers", 35, lambda _: None)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    use_memory(model, config, 35, torch.float32, lambda _: None)
    return model


def loss_and_gradients(model: Any) -> list[Tensor]:
    model.zero_grad()
    loss = batch_loss(model, documents()).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None)]


def held_bytes(layers: list[CutLayer]) -> int:
    return sum(each.whole.untyped_storage().nbytes() for each in layers)


@pytest.mark.parametrize(
    "overrides",
    [
        ["memory.policy=none"],
        ["memory.policy=checkpoint"],
        ["memory.policy=offload"],
        ["memory.policy=checkpoint", "lora.dora=true"],
        ["memory.policy=none", "model.load_in_4bit=false"],
        [r"lora.target_modules='layers\.[23]\..*'"],
    ],
    ids=["keep", "checkpoint", "offload", "PEFT's own layers", "not quantised", "some layers"],
)
def test_every_bit_is_the_same_and_two_layers_are_whole_at_most(
    overrides: list[str], deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the graph has saved of a weight is a layer that was emptied since."""
    most: list[int] = []
    gather = module._gather

    def noted(layer: CutLayer) -> Any:
        most.append(held_bytes(layers))
        return gather(layer)

    cut = made(settings(*overrides, "memory.base_shards=2"), deep)
    shards = shards_of(cut)
    assert shards is not None
    layers = shards.layers
    expected = loss_and_gradients(made(settings(*overrides), deep))
    monkeypatch.setattr(module, "_gather", noted)
    shards.drop_all()
    for _ in range(2):  # the second time with what the first has left whole
        found = loss_and_gradients(cut)
        assert len(found) == len(expected) > 8
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert max(most) == shards.whole_bytes == 2 * layers[0].size
    # The last layer stays from the forward to the backward, and the first one until the next step.
    assert len(most) <= LAYERS + 3 * (LAYERS - 1)
    shards.drop_all()
    assert held_bytes(layers) == 0
    nf4 = sum(each.shard.nbytes for each in layers)
    assert nf4 == sum(each.size for each in layers)  # one process has all shards
    assert nf4 > 0.9 * sum(t.tensor.nbytes for layer in decoder_layers(cut) for t in tensors_to_cut(layer))


def test_layers_that_keep_their_attention(deep: Path) -> None:
    models = [made(settings(*each), deep) for each in ([], ["memory.base_shards=2"])]
    for model in models:
        install(model, ["attention"] * LAYERS, 35, 0, lambda _: None)
    expected, found = map(loss_and_gradients, models)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_in_nf4_are_cut_with_their_scales(family: str, tmp_path: Path, short_tokenizer: Any) -> None:
    base = write_base(tmp_path, family, tokenizer=short_tokenizer)
    expected = loss_and_gradients(made(settings(), base))
    cut = made(settings("memory.base_shards=2"), base)
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(cut), expected, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "kind", ["falcon_h1", "gemma3n_text", "gemma4", "granitemoehybrid", "mamba", "qwen3_5_text", "zamba2"]
)
def test_families_of_all_kinds_train_as_they_do_uncut(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recurrent layers, documents one at a time, layers that share keys or weights, several streams."""
    expected = every_family.try_family(kind, tmp_path / "whole")
    given = every_family.settings(kind)
    cut = replace(given, memory=replace(given.memory, base_shards=2))
    monkeypatch.setattr(every_family, "settings", lambda _: cut)
    assert every_family.try_family(kind, tmp_path / "cut") == expected
    assert expected.how != "refused"


def test_a_family_that_reads_its_layers_from_outside_is_refused(tmp_path: Path) -> None:
    given = every_family.settings("rwkv")
    every_family.tiny_model("rwkv").save_pretrained(tmp_path)
    cut = replace(given, memory=replace(given.memory, base_shards=2))
    with pytest.raises(ConfigError, match=r"memory\.base_shards: rwkv changes weights of its layers"):
        prepare_model(cut, str(tmp_path), torch.float32, "transformers", 35, lambda _: None)


def test_layers_in_common_stay_whole() -> None:
    layer, other = torch.nn.Linear(4, 4).requires_grad_(False), torch.nn.Linear(4, 4).requires_grad_(False)
    both = torch.nn.ModuleList([layer, other])
    assert [each.tensor.shape for each in tensors_to_cut(both)] == [(4, 4), (4, 4)]
    assert len(tensors_to_cut(both, {id(other.weight)})) == 1


def test_who_has_less_to_do_takes_part_in_the_rest(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that are run one at a time have a forward each; an empty micro-batch has none."""
    model = made(settings("memory.base_shards=2"), deep)
    run_one_at_a_time(model)
    use_plain_attention(model)
    shards = shards_of(model)
    assert shards is not None
    asked: list[int] = []
    need = shards._need
    monkeypatch.setattr(shards, "_need", lambda number, ahead: (asked.append(number), need(number, ahead)))
    forward, backward = [*range(LAYERS)], [*reversed(range(LAYERS))]

    shards.expect(4, 4)
    loss = batch_loss(model, documents()).loss
    shards.end_forward()
    assert asked == 4 * forward
    loss.backward()
    assert asked == 4 * forward + 3 * backward
    shards.end()
    assert asked == 4 * forward + 4 * backward

    asked.clear()
    shards.expect(1, 1)
    shards.end()
    assert asked == forward + backward


def test_a_layer_out_of_turn_is_named(deep: Path) -> None:
    model = made(settings("memory.base_shards=2"), deep)
    shards = shards_of(model)
    assert shards is not None
    shards.expect(0, 0)
    with pytest.raises(RunError, match=r"memory\.base_shards: decoder layer 0 is computed out of turn"):
        batch_loss(model, documents())
