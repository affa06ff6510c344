"""Find the base model of a finished run: the very files that it was trained on, whoever asks for it."""

from __future__ import annotations

from pathlib import Path

from qlora_sft.errors import ConfigError, RunError
from qlora_sft.model.fingerprint import fingerprint
from qlora_sft.model.snapshot import fetch_snapshot, fetch_weights
from qlora_sft.run.folder import Run


def described_base(run: Run) -> str:
    """Returns the folder with configuration and tokenizer of the base; of a Hub model at the commit of the training.

    Raises `RunError` if it is not to be had, naming the commits that are here.
    """
    if Path(run.base).is_dir():
        return run.base
    try:
        return str(fetch_snapshot(run.base, run.base_commit))
    except ConfigError as error:
        raise RunError(f"the base model of {run.path} is not here: {error}") from None


def run_base(run: Run) -> Path:
    """Returns the same folder with the weights in it.

    Raises `RunError` for other weights than those that ``run`` was trained on.
    """
    base = described_base(run)
    try:
        fetch_weights(base)
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
