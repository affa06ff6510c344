"""What a GGUF says beside its weights, so that a runtime asks the model as it was trained.

Training takes every token from the chat template. Two things a runtime does of its own accord:

- It puts bos before each prompt when the GGUF says so, and the converter lets it say what the base's tokenizer does
  with plain text: ChatML trained on a Llama 3 base would be asked with a token in front that it never saw.
- llama.cpp sets enable_thinking to true unless it is told otherwise: a model that was never trained on the modes of
  chatml-think would be asked with "/think" in its system turn.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_sft.export.go_template import WITHOUT_THINKING, shipped_name, writes_bos
from qlora_sft.export.spm import is_sentencepiece, write_spm

BOS_FIELD = "tokenizer.ggml.add_bos_token"
_FIELDS = (BOS_FIELD, "tokenizer.ggml.model", "tokenizer.ggml.pre")
# Where a file says nothing, llama.cpp decides by the kind of vocabulary.
_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken", "chameleon")


def adds_bos(gguf: Path) -> bool:
    """Whether llama.cpp and Ollama put bos before a prompt for this file."""
    from gguf import GGUFReader

    reader: Any = GGUFReader(str(gguf))
    return bos_first({name: reader.fields[name].contents() for name in _FIELDS if name in reader.fields})


def bos_first(fields: dict[str, Any]) -> bool:
    """The same, from the metadata of the file."""
    stated, kind, pre = (fields.get(name) for name in _FIELDS)
    return bool(stated) if stated is not None else kind == "llama" or pre in _BOS_BY_DEFAULT


def tokenizer_adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts bos before plain text, which is what a GGUF of its base will say."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def leave_bos_to_the_template(gguf: Path, model: Path) -> None:
    """Changes one byte of a file that puts bos before every prompt although the template writes none.

    In the file, not in what is converted: the converter knows a tokenizer by the ids it gives, bos among them.
    """
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    if not tokenizer.chat_template or writes_bos(tokenizer):
        return
    reader: Any = GGUFReader(str(gguf), "r+")
    if BOS_FIELD in reader.fields:
        reader.fields[BOS_FIELD].parts[-1][0] = False
        reader.data.flush()


@contextmanager
def for_converter(model: Path, thinks: bool) -> Iterator[Path]:
    """The files of ``model`` as llama.cpp's converter needs them: without the template's thinking modes if the model
    never learned them, and with a tokenizer.model where the vocabulary is SentencePiece's."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory(prefix="qlora_sft-") as scratch:
        # The converter takes what it says of the model from the folder's name, too: it is the run's.
        view = Path(scratch, model.resolve().parent.name or "model")
        view.mkdir()
        for file in model.iterdir():
            (view / file.name).symlink_to(file.resolve())
        if tokenizer.chat_template and not thinks:
            settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
            settings.pop("chat_template", None)
            _replace(view / "tokenizer_config.json", json.dumps(settings))
            _replace(view / "chat_template.jinja", without_thinking(tokenizer))
        vocabulary = view / "tokenizer.json"
        content = json.loads(vocabulary.read_text(encoding="utf-8")) if vocabulary.is_file() else None
        if content and is_sentencepiece(content):
            (view / "tokenizer.model").unlink(missing_ok=True)
            write_spm(view, content)
        yield view


def _replace(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8")


def without_thinking(tokenizer: Any) -> str:
    """The template; of those that write something else for enable_thinking than without it, one that does not."""
    template: str = tokenizer.chat_template
    if shipped_name(tokenizer) not in WITHOUT_THINKING:
        return template
    return template.replace("enable_thinking is defined", "false")
