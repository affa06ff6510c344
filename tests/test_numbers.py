"""Every number of the configuration has a range, and what is in it trains to an adapter that is finite."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_sft.cli import main
from qlora_sft.config import Config, load_config
from qlora_sft.errors import ConfigError
from qlora_sft.ranges import Range
from qlora_sft.strict import options_of, ranges
from qlora_sft.train import train

CASES = Path(__file__).parent / "cases"
SENSELESS = [".nan", ".inf", "-.inf", "0", "-1", "1e30", "0512"]
# What a key needs beside it to have an effect.
CONTEXT = {
    "weight": ["data.mixture=explicit", "data.train.0.weight=1"],
    "quality": ["data.mixture=quality"],
    "temperature": ["data.mixture=temperature", "data.temperature=2"],
    "rope_scaling": ["model.rope_scaling={rope_type: yarn, factor: 2}"],
    "replay": ["data.replay={path: general.txt}"],
    "modules": ["lora.modules=[{match: q_proj, r: 4, alpha: 4}]"],
    "decay_ratio": ["training.schedule=wsd"],
    "tasks": ["evaluation.tasks=[{path: task.jsonl}]"],
    "held_out": ["data.held_out=[{path: held_out.jsonl}]"],
    "every_steps": ["data.held_out=[{path: held_out.jsonl}]"],
    "patience": ["data.held_out=[{path: held_out.jsonl}]", "evaluation.every_steps=3"],
    "replay_kl": ["data.replay={path: general.txt}"],
    "ewc": ["data.replay={path: general.txt}"],
    "tasks_every_steps": ["evaluation.tasks=[{path: task.jsonl}]"],
}


def numbers(kind: Any, prefix: str = "") -> Iterator[tuple[str, type, Range | None]]:
    """Dotted key, type and range of every number in the schema; of lists the first item."""
    for name, bare, limits in ranges(kind):
        yield prefix + name, bare, limits
    for name, hint in typing.get_type_hints(kind).items():
        for option in options_of(hint):
            many = typing.get_origin(option) is list
            kind_of_it = typing.get_args(option)[0] if many else option
            if dataclasses.is_dataclass(kind_of_it):
                yield from numbers(kind_of_it, f"{prefix}{name}.{'0.' if many else ''}")


NUMBERS = list(numbers(Config))


def context(key: str) -> list[str]:
    found = [override for part, needed in CONTEXT.items() if part in key.split(".") for override in needed]
    return [] if key == "evaluation.tasks.0.temperature" else found


def needed_by(key: str) -> list[str]:
    return CONTEXT["tasks"] if key.startswith("evaluation.tasks") else context(key)


def test_every_number_has_a_range_that_its_default_is_in() -> None:
    assert len(NUMBERS) > 40
    assert {key for key, _, limits in NUMBERS if limits is None} == set()
    assert {"training.learning_rate", "data.train.0.repeat", "data.held_out.0.loss_weight", "seed"} <= {
        key for key, *_ in NUMBERS
    }


@pytest.mark.parametrize("key", [key for key, *_ in NUMBERS])
def test_the_middle_of_a_range_is_accepted(key: str, make_config: Any) -> None:
    (limits,) = [limits for each, _, limits in NUMBERS if each == key]
    (kind,) = [kind for each, kind, _ in NUMBERS if each == key]
    assert limits is not None
    value = 0.4 if limits.high <= 1 and kind is float else max(2, limits.low)
    make_config(*needed_by(key), f"{key}={value}")


def tried(make_config: Any) -> Iterator[tuple[str, str, str]]:
    """(key, value, its fault or nothing) of every number and every senseless value."""
    for key, *_ in NUMBERS:
        for value in SENSELESS:
            try:
                make_config(*needed_by(key), f"{key}={value}")
            except ConfigError as error:
                yield key, value, str(error)
            else:
                yield key, value, ""


def test_values_without_sense_are_refused_or_train_to_a_finite_adapter(make_config: Any) -> None:
    """What is accepted is accepted all at once, in one run."""
    results = list(tried(make_config))
    for key, value, fault in results:
        assert not fault or f"{key} must " in fault, (key, value, fault)
    accepted = [f"{key}={value}" for key, value, fault in results if not fault]
    assert {override.split("=")[1] for override in accepted} == {"0"}
    assert sorted(accepted) == [
        "evaluation.answers=0", "evaluation.show=0", "evaluation.tasks.0.shots=0", "lora.dropout=0", "seed=0",
        "training.save_steps=0", "training.warmup_ratio=0", "training.weight_decay=0",
    ]  # fmt: skip
    needed = dict.fromkeys(each for override in accepted for each in needed_by(override.split("=")[0]))
    config = make_config(*needed, *accepted, "training.max_steps=2")
    train(config, say=lambda _: None)
    adapter = load_file(Path(config.output) / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in adapter.values())
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


EXTREME = {
    "training.learning_rate": ["1e-10", "1"],
    "lora.alpha": ["1", "65536"],
    "lora.plus_ratio": ["10000"],
    "training.neftune_alpha": ["1000"],
    "training.new_tokens_rate": ["1e-10"],
    "training.initial_rate_fraction": ["1e-300"],
    "training.tokens_per_step": ["1", "1000000000"],
    "training.max_grad_norm": ["1e-30", "1e9"],
    "data.train.0.loss_weight": ["1e-6", "1e6"],
    "training.weight_decay": ["1"],
    "training.warmup_ratio": ["0.999"],
    "lora.dropout": ["0.999"],
    "data.train.0.fraction": ["1e-300"],
    "seed": ["4294967295"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in EXTREME.items() for value in values])
def test_the_ends_of_the_ranges_train_to_a_finite_adapter(key: str, value: str, make_config: Any) -> None:
    config = make_config(f"{key}={value}", "training.max_steps=3", "data.packing=none")
    train(config, say=lambda _: None)
    adapter = load_file(Path(config.output) / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in adapter.values())


@pytest.mark.parametrize(
    ("limits", "value", "fault"),
    [
        (Range(0, 1), 0.5, ""),
        (Range(0, 1), 0, ""),
        (Range(0, 1, above=True), 0, "must be positive, got 0"),
        (Range(0, 1), -0.5, "must not be negative, got -0.5"),
        (Range(0, 1, below=True), 1, "must be less than 1, got 1"),
        (Range(2, 5), 1, "must be at least 2, got 1"),
        (Range(1, 5, above=True), 1, "must be larger than 1, got 1"),
        (Range(1, 5000), 5001, "must be at most 5,000, got 5001"),
        (Range(1, 5), 10**400, "must be at most 5, got far more"),
        (Range(0, 1), math.nan, "must be a finite number, got nan"),
        (Range(0, 1), -math.inf, "must be a finite number, got -inf"),
    ],
)
def test_the_fault_of_a_number_says_which_side_of_the_range_it_misses(limits: Range, value: float, fault: str) -> None:
    assert limits.fault(value) == fault


@pytest.mark.parametrize("verb", ["train", "preview", "plan"])
@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("training.learning_rate=.inf", "must be a finite number, got inf"),
        ("lora.alpha=0", "must be positive, got 0"),
        ("training.max_grad_norm=-1", "must be positive, got -1"),
    ],
)
def test_the_shipped_case_ends_with_2(
    verb: str, override: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were taken as they came: the values of the adapter were not finite, or none was trained."""
    fine = [f"data.train.0.path={CASES / 'ok.jsonl'}", f"output={tmp_path / 'run'}"]
    assert main([verb, str(CASES / "without_sense.yaml"), *fine, override]) == 2
    assert capsys.readouterr().err == f"error: override {override!r}: {override.split('=')[0]} {fault}\n"
    assert not (tmp_path / "run").exists()


def test_a_number_of_thousands_of_digits_is_no_traceback(make_config: Any, tmp_path: Path) -> None:
    for value in ("9" * 5000, "0x" + "f" * 9000, "1e999999", "9" * 400):
        for key in ("lora.r", "training.learning_rate", "output"):
            with pytest.raises(ConfigError):
                make_config(f"{key}={value}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["preview", "demo", "--count", "-1"],
        ["evaluate", "run", "--seed", "-1"],
        ["chat", "run", "--max-new-tokens", "0"],
        ["chat", "run", "--serve", "--port", "99999"],
        ["chat", "run", "--port", "one"],
    ],
)
def test_numbers_of_the_command_line_have_ranges_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert ": must " in capsys.readouterr().err


def test_a_resolved_configuration_keeps_texts_that_look_like_numbers(make_config: Any, tmp_path: Path) -> None:
    from qlora_sft.config import dump_config

    for name in ("2e-4", "0512", "1:30", "2024-01-01", "on", "null", "=", "1_000", ".inf", "0x1f", "~", "1."):
        config = make_config(f'data.train.0.name="{name}"')
        copy = tmp_path / "copy.yaml"
        copy.write_text(dump_config(config))
        assert load_config(copy) == config
