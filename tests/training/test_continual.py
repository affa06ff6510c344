"""A planted case: a model that can do one thing is trained to do another. What holds it to the first lets it forget at
most half as much, and it learns the second as well as without."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig, conversation, write_rows
from safetensors.torch import load_file
from tests_support import SHORT, documents_of, killed, result
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_sft.cli import main
from qlora_sft.config import Config, load_config
from qlora_sft.data.shipped import FOLDER as TEMPLATES
from qlora_sft.errors import ConfigError
from qlora_sft.model.base_check import check_ewc
from qlora_sft.prepare import why_not_unsloth
from qlora_sft.run.report import RunReport
from qlora_sft.train import train

# The old task is to write letters of the one kind, the new one to write those of the other, each as often as here.
OFTEN = [0.4, 0.25, 0.15, 0.1, 0.04, 0.03, 0.02, 0.01]


def rows_of(letter: str, letters: str, count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(f"{letter} {seed}")
    return [
        {
            "prompt": f"{letter}{draw.randrange(1000)}",
            "completion": "".join(draw.choices(letters, OFTEN[: len(letters)], k=12)),
        }
        for _ in range(count)
    ]


def configured(folder: Path, base: Path, *overrides: str) -> Config:
    file = folder / "config.yaml"
    file.write_text(
        f"model: {{path: {base}, backend: transformers, dtype: float32, load_in_4bit: false}}\n"
        f"data:\n  train: [{{path: {folder}/new.jsonl}}]\n"
        f"  held_out: [{{path: {folder}/held_out.jsonl, name: old}}, {{path: {folder}/unseen.jsonl, name: new}}]\n"
        f"  replay: {{path: {folder}/replay.jsonl, share: 0.02}}\n"
        "  max_length: 256\n  share_prefixes: off\n"
        "training: {learning_rate: 5.0e-3, epochs: 3, save_steps: 0, replay_kl: null}\n"
        "lora: {r: 8}\n"
        "evaluation: {answers: 0}\n"
        f"output: {folder}/run\n"
    )
    return load_config(file, overrides)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Any) -> Path:
    """A folder with a tiny model that has learned the old task, and the rows of both."""
    folder = tmp_path_factory.mktemp("planted")
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = (TEMPLATES / "chatml.jinja").read_text()
    write_rows(folder / "new.jsonl", rows_of("N", "wxyz", 240, 0))
    write_rows(folder / "unseen.jsonl", rows_of("N", "wxyz", 100, 1))
    write_rows(folder / "held_out.jsonl", rows_of("O", "abcd", 100, 1))
    write_rows(folder / "replay.jsonl", rows_of("O", "abcd", 40, 2))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    base = folder / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    # Of the other letters it knows that they are there.
    write_rows(folder / "old.jsonl", [*rows_of("O", "abcd", 240, 0), *rows_of("M", "zwbyacxd", 60, 0)])
    config = configured(folder, base, f"data.train=[{{path: {folder}/old.jsonl}}]")
    documents = documents_of(config)
    longest = max(len(document.input_ids) for document in documents)
    ids = torch.tensor([[*d.input_ids, *[0] * (longest - len(d.input_ids))] for d in documents])
    weights = torch.tensor([[*d.weights, *[0.0] * (longest - len(d.weights))] for d in documents])
    labels = ids.where(weights > 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = torch.randperm(len(ids))
    for step in range(90):
        some = order[step % 6 * 50 : step % 6 * 50 + 50]
        model(input_ids=ids[some], labels=labels[some]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(base)
    return folder


def trained(folder: Path, name: str, *overrides: str) -> RunReport:
    return train(configured(folder, folder / "base", *overrides, f"output={folder / name}"), say=lambda _: None)


@pytest.fixture(scope="module")
def plain(planted: Path) -> RunReport:
    return trained(planted, "plain")


def forgotten(report: RunReport) -> float:
    before = report.loss["old"].before
    assert before is not None
    return report.loss["old"].after - before


@pytest.mark.parametrize(
    ("name", "key"), [("leashed", "training.replay_kl=20"), ("held", "training.ewc=3000")]
)  # fmt: skip
def test_it_forgets_at_most_half_and_learns_as_much(planted: Path, plain: RunReport, name: str, key: str) -> None:
    report = trained(planted, name, key)
    print(name, report.loss, plain.loss)
    assert forgotten(plain) > 0.1
    assert forgotten(report) <= forgotten(plain) / 2
    assert report.loss["new"].after <= 1.02 * plain.loss["new"].after
    rows = [json.loads(line) for line in (planted / name / "metrics.jsonl").read_text().splitlines()]
    figures = [row["replay_kl" if name == "leashed" else "ewc_penalty"] for row in rows]
    assert figures[0] in (None, 0.0) or figures[0] < 1e-6
    assert max(each for each in figures if each is not None) > 1e-4


# ------------------------------------------------------------------ the mechanics

BOTH = ["training.replay_kl=2", "training.ewc=50"]


@pytest.fixture
def replay(tmp_path: Path) -> list[str]:
    """Packed rows, a third of them of replay."""
    general = write_rows(tmp_path / "general.jsonl", [conversation(40 + i) for i in range(6)])
    more = [f"data.replay={{path: {general}, share: 0.3}}", "training.epochs=4", "data.max_length=160"]
    more += ["data.share_prefixes=off"]  # which the leash refuses; a run without it is to see the same rows together
    return [*(each for each in SHORT if "packing" not in each), *more]


def test_a_killed_run_goes_on_to_the_same_bits(make_config: MakeConfig, tmp_path: Path, replay: list[str]) -> None:
    """With both at once, which costs half of the time that one after the other would."""
    train(make_config(*replay, *BOTH), say=lambda _: None)
    stopped = make_config(*replay, *BOTH, f"output={tmp_path / 'stopped'}")
    killed(stopped, 3)
    for key in BOTH:
        with pytest.raises(ConfigError, match=f"--resume: {key.partition('=')[0]} was"):
            train(make_config(*replay, *BOTH, f"{key}1", f"output={stopped.output}"), resume=True, say=lambda _: None)
    train(stopped, resume=True, say=lambda _: None)
    assert result(tmp_path / "stopped") == result(tmp_path / "run")
    for name in ("replay_kl", "ewc_penalty"):
        assert max(row[name] or 0.0 for row in result(tmp_path / "run")[1]) > 0, name


def test_accumulation_and_recomputation_change_nothing(
    make_config: MakeConfig, tmp_path: Path, replay: list[str]
) -> None:
    """Nor does the loss that is noted know of what is added to it."""
    plain = [each for each in replay if not each.startswith(("lora.dropout", "training.gradient_accumulation"))]
    ways = {
        "once": ["training.batch_size=2", "memory.policy=none", *BOTH],
        "accumulated": ["training.gradient_accumulation=2", "memory.policy=none", *BOTH],
        "recomputed": ["training.batch_size=2", "memory.policy=checkpoint", *BOTH],
        "without": ["training.batch_size=2", "memory.policy=none"],
    }
    for name, way in ways.items():
        train(make_config(*plain, *way, "training.max_steps=2", f"output={tmp_path / name}"), say=lambda _: None)
    tensors = {name: load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ways}
    for name, tensor in tensors["once"].items():
        for other in ("accumulated", "recomputed"):
            torch.testing.assert_close(tensors[other][name], tensor, rtol=1e-3, atol=1e-5)
    first, without = (result(tmp_path / name)[1][0]["loss"] for name in ("once", "without"))
    assert first == without
    assert any((tensors["without"][name] - tensor).abs().max() > 1e-3 for name, tensor in tensors["once"].items())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.replay_kl=1"], "training.replay_kl needs data.replay"),
        (["training.ewc=1"], "training.ewc needs data.replay"),
        (["REPLAY", "training.replay_kl=1", "data.share_prefixes=on"], "which data.share_prefixes=on mixes"),
        (["REPLAY", "training.ewc=1", "lora.dora=true"], "lora.dora changes magnitudes: remove one"),
        (["REPLAY", "training.ewc=0"], "training.ewc must be positive"),
    ],
)
def test_what_cannot_be_is_refused(
    make_config: MakeConfig, replay: list[str], overrides: list[str], expected: str
) -> None:
    source = next(each for each in replay if each.startswith("data.replay="))
    with pytest.raises(ConfigError) as refused:
        make_config(*(source if each == "REPLAY" else each for each in overrides))
    assert expected in str(refused.value)


def test_unsloth_is_not_taken_for_either(make_config: MakeConfig, replay: list[str]) -> None:
    assert "training.ewc looks at what goes into each layer" in why_not_unsloth(make_config(*replay, "training.ewc=1"))
    assert "was not tried with Unsloth's" in why_not_unsloth(make_config(*replay, "training.replay_kl=1"))
    assert why_not_unsloth(make_config(*replay)) == ""


def test_weights_of_experts_cannot_be_held(make_config: MakeConfig, replay: list[str]) -> None:
    mixture = {"num_local_experts": 4}
    with pytest.raises(ConfigError, match=r"lora\.experts=frozen"):
        check_ewc(make_config(*replay, "training.ewc=1"), mixture)
    for others in (["training.ewc=1", "lora.experts=frozen"], ["training.replay_kl=1"]):
        check_ewc(make_config(*replay, *others), mixture)


def test_the_plan_counts_what_holds_the_model(
    make_config: MakeConfig, tmp_path: Path, replay: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the leash the logits of the base and of the model, a few positions at a time; of the held weights about 20
    bytes per value of the adapter, and 4 in a file."""
    make_config()
    loss, disk = {}, {}
    for name, more in {"plain": [], "leashed": ["training.replay_kl=1"], "held": ["training.ewc=1"]}.items():
        assert main(["plan", str(tmp_path / "config.yaml"), *replay, *more, "--no-time", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        loss[name], disk[name] = plan["this_run"]["loss"], plan["disk"]
        adapter = plan["resident"]["adapters"]
    assert 2**20 < loss["leashed"] - loss["plain"] < 2**29
    assert 5 * adapter < loss["held"] - loss["plain"] < 6 * adapter
    assert disk["leashed"]["anchors"] == 0
    assert adapter < disk["held"]["anchors"] < 1.5 * adapter
