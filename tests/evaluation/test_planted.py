"""Planted cases, drawn with twenty seeds: a narrow training that forgets, one on refusals, and an idle adapter."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_sft.config import TaskConfig, load_config
from qlora_sft.data.shipped import FOLDER
from qlora_sft.evaluation.benign import BENIGN
from qlora_sft.evaluation.evaluate_run import diagnose_run
from qlora_sft.evaluation.examples import PHRASINGS
from qlora_sft.train import train

COLOURS = ["red", "blue", "green", "black", "white", "pink", "gold", "grey"]
NO = "I'm sorry, but I can't help with that."


def facts() -> list[tuple[str, str]]:
    """Returns what the base knows: a colour for each of 24 things."""
    return [(f"What colour is thing {i}?", COLOURS[i * 5 % 8]) for i in range(24)]


def in_other_words() -> list[tuple[str, str]]:
    """Returns the same facts as `--diagnose` asks for them."""
    return [(words.format(question=question), answer) for words in PHRASINGS.values() for question, answer in facts()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Any) -> Path:
    """A tiny model that has learned all facts by heart, however they are asked for, and to answer harmless questions.

    It cannot follow examples, so behind those it knows nothing, and they tell nothing.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (FOLDER / "chatml.jinja").read_text()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=2048,
            bos_token_id=0, eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        )
    )  # fmt: skip
    benign = [(json.loads(line)["question"], "Sure.") for line in BENIGN.read_text().splitlines()]
    rows = []
    for question, answer in facts() + in_other_words() + benign:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    drawn = random.Random(0)
    for step in range(600):
        chosen = drawn.sample(rows, 24)
        longest = max(map(len, chosen))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in chosen])
        labels = torch.where(ids == 0, -100, ids)
        loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 600)
        optimizer.step()
    folder = tmp_path_factory.mktemp("planted") / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, rows: list[tuple[str, str]], seed: int, rate: float, steps: int = 24) -> Path:
    """Trains an adapter on ``rows``."""
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in rows))
    (folder / "config.yaml").write_text(
        f"model: {{path: {base}, backend: transformers, dtype: float32, load_in_4bit: false}}\n"
        f"data: {{train: [{{path: {data}}}], max_length: 256}}\n"
        "evaluation: {answers: 0, loss: false}\n"
        f"training: {{learning_rate: {rate}, epochs: 20, max_steps: {steps}, save_steps: 0}}\n"
        f"seed: {seed}\noutput: {folder / 'run'}\n"
    )
    train(load_config(folder / "config.yaml"), say=lambda _: None)
    return folder / "run"


def verdict(run: Path, tasks: list[TaskConfig], seed: int) -> tuple[str, list[str]]:
    found = diagnose_run(run, tasks, {"max_new_tokens": 48}, seed=seed, say=lambda _: None).diagnosis
    assert found is not None
    return found.verdict, found.signs


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_every_planted_case_is_named(base: Path, tmp_path: Path, seed: int) -> None:
    known = tmp_path / "facts.jsonl"
    known.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in facts()))
    tasks = [TaskConfig(str(known))]

    drawn = random.Random(seed)
    sums = [drawn.choices(range(99), k=2) for _ in range(60)]
    narrow = [(f"How much is {a} and {b}?", f"It is {a + b}.") for a, b in sums]
    forgot = trained(base, tmp_path / "narrow", narrow, seed, 2e-2)
    assert verdict(forgot, tasks, seed)[0] == "forgetting"

    # So small a model cannot learn to refuse and keep its facts at once, so these are not asked for here.
    benign = [json.loads(line)["question"] for line in BENIGN.read_text().splitlines()]
    refusals = [(question, NO) for question in drawn.sample(benign, 45)]
    refuses = trained(base, tmp_path / "refusals", refusals, seed, 1e-2, steps=100)
    assert verdict(refuses, [TaskConfig("benign")], seed)[0] == "refusals"

    idle = trained(base, tmp_path / "idle", facts(), seed, 1e-3)
    file = idle / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * ("lora_B" not in name) for name, tensor in load_file(file).items()}, file)
    assert verdict(idle, tasks, seed)[0] == "idle adapter"
