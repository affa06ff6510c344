"""Find the base model of a finished run: the very files that it was trained on, whoever asks for it."""

from __future__ import annotations

from pathlib import Path

from qlora_sft.errors import ConfigError, RunError
from qlora_sft.model.base_folder import fetch_base, resolve_base
from qlora_sft.model.fingerprint import fingerprint
from qlora_sft.model.sixteen_bit import copy_of
from qlora_sft.model.snapshot import fetch_snapshot
from qlora_sft.run.folder import Run


def described_base(run: Run) -> str:
    """Returns the folder with configuration and tokenizer of the base; of a Hub model at the commit of the training.

    The built-in one is built anew if it is gone. Raises `RunError` if the base is not to be had, naming the place where
    it was, or the commits that are here.
    """
    if Path(run.base).is_dir():
        return copy_of(run.base)
    if not _looks_like_hub_id(run.base):
        if run.model.path == "demo":
            try:
                return resolve_base("demo")
            except ConfigError as error:
                raise RunError(f"the base model of {run.path} is not here: {error}") from None
        raise RunError(
            f"{run.path}: the base model is no longer at {run.base}; put it back there, or write its new place as "
            f"report.base in {run.path / 'manifest.json'}"
        )
    try:
        return copy_of(str(fetch_snapshot(run.base, run.base_commit)))
    except ConfigError as error:
        # Older runs remember no commit, and folders as they were typed.
        cure = f"if it was a folder, write its place as report.base in {run.path / 'manifest.json'}"
        moved = "" if run.base_commit else f"; {cure}"
        raise RunError(f"the base model of {run.path} is not here: {error}{moved}") from None


def _looks_like_hub_id(base: str) -> bool:
    return base.count("/") == 1 and "\\" not in base and not base.startswith((".", "/", "~"))


def run_base(run: Run) -> Path:
    """Returns the same folder with the weights in it.

    Raises `RunError` for other weights than those that ``run`` was trained on.
    """
    base = described_base(run)
    try:
        fetch_base(base)
    except ConfigError as error:
        raise RunError(f"{run.path}: {error}") from None
    found = fingerprint(base)
    # A folder with a shard missing has no fingerprint; that error is clearer where the tensors are read.
    if run.base_sha256 and found and found != run.base_sha256:
        raise RunError(
            f"{base}: these are not the weights that the adapter was trained on (the fingerprint in manifest.json is "
            "another); put the base model of the run there, or train again on this one"
        )
    return Path(base)
