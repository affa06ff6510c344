"""A tokenizer splits texts as its tokenizer.json says, whatever class is named for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from qlora_sft.model.base_tokenizer import read_tokenizer, saved_tokenizer

TEXT = "It's  12345 words,\n\n\tand I'LL see été; you DON'T   \n x_1=2\r\n 3.14 "


@pytest.mark.parametrize(
    ("named", "family"), [("LlamaTokenizerFast", "llama"), ("TokenizersBackend", "qwen2"), ("GPT2Tokenizer", "llama")]
)
def test_texts_are_split_as_the_file_says(named: str, family: str, tmp_path: Path, short_tokenizer: Any) -> None:
    short_tokenizer.save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": named}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    wanted = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    right = AutoTokenizer.from_pretrained(tmp_path)(TEXT, add_special_tokens=False).input_ids == wanted
    # A later transformers sees by itself that a file which works on bytes is none of Llama 2's.
    assert not right or named == "LlamaTokenizerFast"
    said: list[str] = []
    tokenizer = read_tokenizer(str(tmp_path), said.append)
    assert tokenizer(TEXT, add_special_tokens=False).input_ids == wanted
    assert tokenizer.special_tokens_map == short_tokenizer.special_tokens_map
    assert tokenizer.chat_template == short_tokenizer.chat_template
    assert [line.split(";")[0] for line in said] == ([] if right else ["tokenizer: as its tokenizer.json has it"])
    tokenizer.save_pretrained(tmp_path / "saved")
    assert saved_tokenizer(tmp_path / "saved")(TEXT, add_special_tokens=False).input_ids == wanted


def test_a_tokenizer_of_the_right_class_stays_of_it(tmp_path: Path, short_tokenizer: Any) -> None:
    short_tokenizer.save_pretrained(tmp_path)
    said: list[str] = []
    assert type(read_tokenizer(str(tmp_path), said.append)) is type(AutoTokenizer.from_pretrained(tmp_path))
    assert said == []
