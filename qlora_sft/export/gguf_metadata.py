"""Sets what a GGUF says beside its weights, so that a runtime prompts the model as it was trained.

In training every token comes from the chat template. A runtime does two things of its own accord:

- It puts the bos token before each prompt if the GGUF says so. The converter lets the GGUF say what the base's
  tokenizer does with plain text. So a model trained with ChatML on a Llama 3 base would be prompted with a token in
  front that it never saw in training.
- llama.cpp sets enable_thinking to true unless it is told otherwise. So a model that was never trained on the modes
  of chatml-think would be prompted with "/think" in its system turn.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_sft.data.pieces import adds_bos
from qlora_sft.export.gguf_config import config_for_converter
from qlora_sft.export.go_template import WITHOUT_THINKING, shipped_name, writes_bos
from qlora_sft.export.spm import is_sentencepiece, write_spm
from qlora_sft.gguf_file import read_gguf
from qlora_sft.model.base_files import read_headers
from qlora_sft.model.base_tokenizer import saved_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS_FIELD = "tokenizer.ggml.add_bos_token"
_FIELDS = (BOS_FIELD, "tokenizer.ggml.model", "tokenizer.ggml.pre")
# Where a file does not say whether bos is added, llama.cpp adds it for these kinds of vocabulary.
_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken", "chameleon")


def bos_first(fields: Mapping[str, object]) -> bool:
    """Says whether a runtime puts bos before a prompt for a file with these metadata."""
    stated, kind, pre = (fields.get(name) for name in _FIELDS)
    return bool(stated) if stated is not None else kind == "llama" or pre in _BOS_BY_DEFAULT


def leave_bos_to_the_template(gguf: Path, model: Path) -> None:
    """Changes one byte of a file that puts bos before every prompt although the template writes none.

    The finished file is changed and not the tokenizer that is converted, because the converter recognises a tokenizer
    by the ids that it gives, bos among them.
    """
    tokenizer = saved_tokenizer(model)
    if not tokenizer.chat_template or writes_bos(tokenizer):
        return
    at = read_gguf(gguf).offsets.get(BOS_FIELD)
    if at is not None:
        with gguf.open("r+b") as file:
            file.seek(at)
            file.write(b"\0")


@contextmanager
def for_converter(model: Path, thinks: bool) -> Iterator[Path]:
    """Yields a folder with the files of ``model`` as llama.cpp's converter needs them.

    If the model was never trained to think, the template lacks the thinking modes. A tokenizer that does not add bos
    says so. If the vocabulary is SentencePiece's, there is a tokenizer.model. The configuration
    (`config_for_converter`) and the tokenizer of a Phi-4 have their published names, which transformers changes. Raises
    `ConfigError` for a model that llama.cpp would compute differently.
    """
    tokenizer = saved_tokenizer(model)
    with tempfile.TemporaryDirectory(prefix="qlora_sft-") as scratch:
        # The converter also describes the model by the name of its folder, so the folder has the name of the run.
        view = _linked(model, Path(scratch, model.resolve().parent.name or "model"))
        described = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
        if tokenizer.chat_template and not thinks:
            described.pop("chat_template", None)
            _replace(view / "chat_template.jinja", without_thinking(tokenizer))
        if not adds_bos(tokenizer):
            # Where nothing is said, llama.cpp puts bos before every prompt for some vocabularies.
            described.setdefault("add_bos_token", False)
        family = json.loads((model / "config.json").read_text(encoding="utf-8")).get("model_type")
        vocabulary = view / "tokenizer.json"
        content = json.loads(vocabulary.read_text(encoding="utf-8")) if vocabulary.is_file() else None
        if content and is_sentencepiece(content):
            (view / "tokenizer.model").unlink(missing_ok=True)
            write_spm(view, content)
        elif family == "phi3":
            # By this name the converter knows a Phi-4, which has no tokenizer.model, as a Phi-3 has.
            described["tokenizer_class"] = "GPT2Tokenizer"
        _replace(view / "tokenizer_config.json", json.dumps(described))
        yield view


@contextmanager
def for_lora_converter(base: Path) -> Iterator[Path]:
    """Yields a folder with the files of ``base`` for the converter of adapters.

    It rearranges what an adapter adds to a layer as the converter of models rearranges the layer. Raises `ConfigError`
    as `for_converter` does.
    """
    with tempfile.TemporaryDirectory(prefix="qlora_sft-") as scratch:
        yield _linked(base, Path(scratch, "base"))


def _linked(model: Path, view: Path) -> Path:
    """Returns the new folder ``view``: links to the files of ``model``, and config.json as the converter needs it."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    described = config_for_converter(config, read_headers(str(model)))
    view.mkdir()
    for file in model.iterdir():
        (view / file.name).symlink_to(file.resolve())
    _replace(view / "config.json", json.dumps(described))
    return view


def _replace(file: Path, text: str) -> None:
    """Writes ``text`` in place of the link ``file``, whose target stays as it is."""
    file.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8")


def without_thinking(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the template without thinking modes.

    A shipped template that depends on enable_thinking is changed so that it no longer does; others are returned as they
    are.
    """
    template: str = tokenizer.chat_template
    if shipped_name(tokenizer) not in WITHOUT_THINKING:
        return template
    return template.replace("enable_thinking is defined", "false")
