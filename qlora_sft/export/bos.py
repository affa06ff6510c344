"""The bos token of a GGUF: before a prompt if it was trained so, and never twice.

Training takes every token from the chat template. A runtime puts bos before each prompt when the GGUF says so, and the
converter lets it say what the base's tokenizer does with plain text: ChatML trained on a Llama 3 base would then be
asked with a token in front that it never saw.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_sft.export.go_template import writes_bos

FIELD = "tokenizer.ggml.add_bos_token"
# Where a file says nothing, llama.cpp decides by the kind of vocabulary.
_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken", "chameleon")


def adds_bos(gguf: Path) -> bool:
    """Whether llama.cpp and Ollama put bos before a prompt for this file."""
    from gguf import GGUFReader

    reader: Any = GGUFReader(str(gguf))

    def field(name: str) -> Any:
        return reader.fields[name].contents() if name in reader.fields else None

    if field(FIELD) is not None:
        return bool(field(FIELD))
    return field("tokenizer.ggml.model") == "llama" or field("tokenizer.ggml.pre") in _BY_DEFAULT


def tokenizer_adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts bos before plain text, which is what a GGUF of its base will say."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


@contextmanager
def with_trained_bos(model: Path) -> Iterator[Path]:
    """``model`` itself if its chat template begins with bos; else the same files with add_bos_token: false."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    if not tokenizer.chat_template or writes_bos(tokenizer):
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="qlora_sft-") as scratch:
        # Of the same name, which the converter takes for the model's.
        view = Path(scratch, model.resolve().name)
        view.mkdir()
        for file in model.iterdir():
            (view / file.name).symlink_to(file.resolve())
        settings = view / "tokenizer_config.json"
        content = json.loads(settings.read_text(encoding="utf-8"))
        settings.unlink()
        settings.write_text(json.dumps({**content, "add_bos_token": False}, indent=2), encoding="utf-8")
        yield view
