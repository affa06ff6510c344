"""The way to attend is the fastest of those that keep documents apart, by a clock and kernels of the tests' own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig

from qlora_sft.config import Config, DataConfig, ModelConfig
from qlora_sft.errors import ConfigError
from qlora_sft.model import attention_measured
from qlora_sft.model.attention import Way
from qlora_sft.model.attention_capped import Scores, plain_documents
from qlora_sft.model.attention_choice import AttentionChoice
from qlora_sft.model.attention_measured import (
    Attend,
    Shape,
    attend_by,
    check_named,
    measured_choice,
    settle_attention,
    shape_of,
    some_documents,
)
from qlora_sft.model.flash_switch import SWITCHES, installed_flash, switch_flash
from qlora_sft.training import recipe

CPU = torch.device("cpu")
SHAPE = Shape(4, 2, 16)
PACKED = attend_by("varlen")


class Clock:
    """Stands still but for what attention takes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def taking(self, seconds: float, attend: Attend = PACKED) -> Attend:
        def timed(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, window: int | None) -> Tensor:
            self.seconds += seconds
            return attend(q, k, v, bounds, window)

        return timed


def chosen(clock: Clock, lengths: list[int], ways: dict[Way, Attend], windowed: bool = True) -> AttentionChoice:
    return measured_choice(SHAPE._replace(windowed=windowed), CPU, torch.float32, lengths, ways, clock)


def across_documents(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, window: int | None) -> Tensor:
    return plain_documents(q, k, v, bounds[[0, -1]], Scores())


def without_a_window(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, window: int | None) -> Tensor:
    return PACKED(q, k, v, bounds, None)


def without_a_gradient_of_keys(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, window: int | None) -> Tensor:
    return plain_documents(q, k * 0.5 + k.detach() * 0.5, v, bounds, Scores())


def missing(*_: Tensor | int | None) -> Tensor:
    raise RuntimeError("no kernel for this GPU\nand many lines")


def refusing(*_: Tensor | int | None) -> Tensor:
    raise AssertionError("heads of up to 128")


def test_the_fastest_is_taken_and_all_figures_are_said() -> None:
    clock = Clock()
    way, reason = chosen(clock, [300] * 4, {"varlen": clock.taking(0.008), "sdpa": clock.taking(0.004)})
    assert way == "sdpa"
    assert reason == (
        "measured: varlen 8.00 ms; sdpa 4.00 ms; forward and backward of a layer, 1,200 tokens in 4 documents"
    )


def test_varlen_stays_where_another_is_no_clear_gain() -> None:
    clock = Clock()
    assert chosen(clock, [300], {"varlen": clock.taking(0.01), "sdpa": clock.taking(0.0099)}).way == "varlen"


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (across_documents, "packed documents differ from the same documents alone by"),
        (without_a_gradient_of_keys, "packed documents differ from the same documents alone by"),
        (missing, r"left out (no kernel for this GPU);"),
        (refusing, r"left out (heads of up to 128);"),
        (without_a_window, "under a window of 40 tokens"),
    ],
)
def test_what_errs_is_never_chosen_however_fast(attend: Attend, why: str) -> None:
    clock = Clock()
    way, reason = chosen(clock, [300], {"varlen": clock.taking(0.01), "sdpa": clock.taking(0.001, attend)})
    assert way == "varlen"
    assert why in reason


def test_many_lengths_are_not_given_to_cudnn() -> None:
    clock = Clock()
    way, reason = chosen(clock, list(range(10, 60)), {"varlen": clock.taking(0.01), "sdpa": clock.taking(0.001)})
    assert way == "varlen"
    assert "sdpa left out (50 different lengths" in reason


def test_it_ends_in_time() -> None:
    clock = Clock()
    way, reason = chosen(clock, [300], {"varlen": clock.taking(0.5), "sdpa": clock.taking(0.1)})
    assert clock.seconds <= 2.5  # what is done once, two checks, warm-up and one measurement
    assert way == "varlen"
    assert "sdpa left out (no time left to measure it)" in reason


def test_nothing_measured_is_varlen() -> None:
    clock = Clock()
    assert chosen(clock, [300], {"varlen": missing}) == AttentionChoice(
        "varlen",
        "nothing could be measured: varlen left out (no kernel for this GPU)",
    )


@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=60))
def test_the_documents_measured_are_the_runs_own_and_not_too_many(lengths: list[int]) -> None:
    some = some_documents(lengths)
    assert 0 < sum(some) <= attention_measured.TOKENS
    assert len(some) <= len(lengths)
    assert all(length in lengths or length == attention_measured.TOKENS for length in some)
    assert some_documents([512] * 1000) == [512] * 32


def test_a_cpu_and_a_capped_model_have_one_way_each_which_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_measured, "measured_choice", lambda *_: pytest.fail("measured"))
    way, reason = settle_attention(LlamaConfig(), "auto", CPU, torch.float32, [100])
    assert way == "varlen"
    assert reason == "nothing was measured: sdpa, document by document, on a cpu, the only way there"
    assert (
        "nothing was measured: flex"
        in settle_attention(Gemma2Config(), "auto", torch.device("cuda"), torch.bfloat16, [100]).reason
    )


def test_a_gpu_measures_its_ways_over_the_heads_of_the_model_unless_one_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    switched: list[Way] = []
    path = SimpleNamespace(name="varlen", reason="")
    monkeypatch.setattr(attention_measured, "choose_path", lambda *_: path)
    monkeypatch.setattr(attention_measured, "installed_flash", lambda: ["flash4"])
    monkeypatch.setattr(attention_measured, "switch_flash", switched.append)

    def measured(shape: Shape, _device: Any, _dtype: Any, lengths: Any, ways: dict[Way, Attend]) -> AttentionChoice:
        assert (
            shape
            == shape_of(LlamaConfig(num_attention_heads=8, num_key_value_heads=2, head_dim=32))
            == (8, 2, 32, False)
        )
        assert list(ways) == ["varlen", "sdpa", "flash4"]
        return AttentionChoice("flash4", "measured")

    monkeypatch.setattr(attention_measured, "measured_choice", measured)
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=2, head_dim=32)
    assert settle_attention(config, "auto", CPU, torch.bfloat16, [100]).way == "flash4"
    named = settle_attention(config, "sdpa", CPU, torch.bfloat16, [100])
    assert named == AttentionChoice("sdpa", "model.attention=sdpa")
    assert switched == ["flash4", "sdpa"]


def test_a_named_flash_attention_that_mixes_documents_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_measured, "switch_flash", lambda _: None)
    check_named("flash4", SHAPE, CPU, torch.float32, PACKED)
    with pytest.raises(ConfigError, match=r"model.attention=flash4: packed documents differ .*; set it to auto"):
        check_named("flash4", SHAPE, CPU, torch.float32, across_documents)
    with pytest.raises(ConfigError, match=r"model.attention=flash4: heads of up to 128; set it to auto"):
        check_named("flash4", SHAPE, CPU, torch.float32, refusing)


@pytest.mark.parametrize("own", ["varlen", "flash4"])
@pytest.mark.parametrize("first", ["varlen", "flash4"])
def test_every_process_attends_as_the_first_one_found(own: Way, first: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Switch()
    library.activate_flash_attention_impl("FA3")  # an earlier run's
    ranks = SimpleNamespace(gather=lambda _: [AttentionChoice(first, "measured by the first"), None])
    monkeypatch.setattr(recipe, "join_ranks", lambda: ranks)
    monkeypatch.setattr(recipe, "switch_flash", lambda way: switch_flash(way, library))

    def settled(*_: Any) -> AttentionChoice:
        switch_flash(own, library)
        return AttentionChoice(own, "measured here")

    monkeypatch.setattr(recipe, "settle_attention", settled)
    monkeypatch.setattr(recipe, "read_settings", lambda *_: LlamaConfig())
    data: Any = SimpleNamespace(
        backend=SimpleNamespace(name="transformers"), packed=SimpleNamespace(shares_prefixes=False), base=""
    )
    config = Config(ModelConfig("x"), DataConfig([]), output="x")
    assert recipe.how_to_attend(config, data, torch.bfloat16, [1]).way == first
    assert library.active == {"varlen": None, "flash4": "FA4"}[first]


class Switch:
    """Has the functions of torch's switch."""

    def __init__(self, fails: bool = False) -> None:
        self.active: str | None = None
        self.fails = fails

    def list_flash_attention_impls(self) -> list[str]:
        return ["FA3", "FA4"]

    def current_flash_attention_impl(self) -> str | None:
        return self.active

    def activate_flash_attention_impl(self, name: str) -> None:
        if self.fails:
            raise ModuleNotFoundError("No module named 'flash_attn'")
        self.active = name

    def restore_flash_attention_impl(self) -> None:
        assert self.active is not None, "torch would warn"
        self.active = None


def test_torch_is_switched_to_a_flash_attention_and_back() -> None:
    library = Switch()
    for way, active in (("varlen", None), ("flash4", "FA4"), ("flash4", "FA4"), ("flash3", "FA3"), ("sdpa", None)):
        switch_flash(way, library)
        assert library.active == active


def test_a_flash_attention_that_is_not_there_is_an_error_with_its_cure() -> None:
    with pytest.raises(ConfigError, match=r"flash4: No module named 'flash_attn'; install it .*flash-attn-4"):
        switch_flash("flash4", Switch(fails=True))
    with pytest.raises(ConfigError, match="cannot switch to it; set it to auto"):
        switch_flash("flash3", SimpleNamespace())  # as torch had it before the switch
    switch_flash("varlen", SimpleNamespace())
    assert installed_flash(SimpleNamespace()) == []


def test_this_torch_has_the_switch_that_is_asked_for() -> None:
    """Its names are torch's. Which packages are installed does not matter here."""
    assert all(callable(getattr(torch.nn.attention, name)) for name in SWITCHES)
    assert {"FA3", "FA4"} <= set(torch.nn.attention.list_flash_attention_impls())
    assert set(installed_flash()) <= {"flash3", "flash4"}
