"""Claims, clears and fills the run folder.

The folder is claimed before anything is done and cleared only when training begins; its files are written one by one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_sft.atomic import remove_leftovers, write_json, written_file, written_folder
from qlora_sft.config import Config, dump_config
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.lora_from import adapter_folder
from qlora_sft.run.report import OrderReport, Report
from qlora_sft.text import as_path
from qlora_sft.training.checkpoints import what_is_left

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_sft.data.dedup import Removed
    from qlora_sft.evaluation.answers import HeldOutAnswer
    from qlora_sft.model.base import CausalModel
    from qlora_sft.model.ewc import Anchors

# The files and folders of a finished or interrupted run. --overwrite removes these and nothing else.
RUN_FILES = (
    "config.yaml begun.json before.json manifest.json order.json removed.jsonl metrics.jsonl evaluations.jsonl "
    "tensorboard samples.jsonl adapter checkpoints merged merged-evaluation gguf export.json evaluation demo.json "
    "said.jsonl trained_on.json report.html comparison.html ewc.safetensors"
).split()


def claim_run_folder(config: Config, overwrite: bool, resume: bool) -> Path:
    """Returns the run folder of ``config``.

    Raises `ConfigError` if the folder holds an earlier run and neither ``overwrite`` nor ``resume`` is given.
    """
    if overwrite and resume:
        raise ConfigError("--overwrite removes what --resume would go on with; give one of them")
    run = as_path(config.output)
    check_writable(run)
    _check_apart(config, run)
    earlier = [name for name in RUN_FILES if (run / name).exists()]
    if earlier and not (overwrite or resume):
        go_on = "" if (run / "manifest.json").exists() else ", or --resume to go on with it"
        raise ConfigError(
            f"output: {run} holds an earlier run ({', '.join(earlier)}); choose another output=... or add --overwrite"
            f"{go_on}"
        )
    return run


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Keeps other processes from training in ``run`` while its body runs, because two would overwrite each other's
    files.

    The lock is on the folder itself and is released when the process ends, however that happens. Raises `ConfigError`
    if another process has it.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    lock = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(
            f"output: another process is training in {run}; wait until it ends, or choose another output=..."
        ) from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_UN)  # a child of this process may have it open as well
        os.close(lock)
        for folder in made:
            with suppress(OSError):  # a run that has begun is in it
                folder.rmdir()


def _check_apart(config: Config, run: Path) -> None:
    """Raises `ConfigError` for a run that would overwrite the adapter that it starts from."""
    folder = adapter_folder(config.lora.from_) if config.lora.from_ else None
    if folder and run.resolve() in (folder.resolve(), folder.resolve().parent):
        raise ConfigError(f"lora.from: {folder} is in the folder of this run; choose another output=...")


def check_writable(run: Path) -> None:
    """Raises `ConfigError`, before a model is loaded, if the folder ``run`` cannot be created or written to."""
    existing = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ConfigError(f"output: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"output: {existing} may not be written to; choose another folder")


@dataclass(frozen=True)
class Beginning(Report):
    """Holds the facts that a run begins with beside its configuration, such as the values that "auto" has resolved to.

    They are kept in ``begun.json``.
    """

    data_sha256: str
    base_sha256: str | None
    dtype: str
    backend: str
    template_date: str | None = None
    """The date that the chat template wrote as today; None if it writes none."""
    base_commit: str | None = None
    """Commit of the Hub that the base is of."""
    attention: str | None = None
    """The way that attends inside documents."""
    shares_prefixes: bool | None = None
    """Whether what rows share at their beginning is computed once, which decides what is packed together."""
    lora_from_sha256: str | None = None
    """Of the weights of the adapter that it goes on from."""
    processes: int = 1
    """How many processes train together."""


def begin_run(run: Path, config: Config, beginning: Beginning, anchors: Anchors | None = None) -> None:
    """Removes the earlier run that may be overwritten and writes ``config.yaml`` and ``begun.json``.

    It is called when everything has been checked, so that an error before that does not destroy the earlier run.

    beginning: the facts that must be the same when this run is resumed. anchors: what training.ewc keeps.
    """
    for name in RUN_FILES:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    write_json(run / "begun.json", beginning.to_json())
    if anchors is not None:
        from qlora_sft.model.ewc import ANCHORS, save_anchors

        save_anchors(anchors, run / ANCHORS)


def record_data(run: Path, sequences: list[list[int]], removed: list[Removed]) -> OrderReport:
    """Writes the order of the packed sequences (``order.json``) and the removed rows (``removed.jsonl``).

    Returns what the manifest says about them.
    """
    from qlora_sft.data.mixture import order_digest

    order = OrderReport(order_digest(sequences), len(sequences), len(removed))
    with written_file(run / "order.json") as beside:
        content = {"sha256": order.sha256, "rows": order.rows, "bins": sequences}
        beside.write_text(json.dumps(content) + "\n", encoding="utf-8")
    if removed:
        from qlora_sft.data.dedup import removed_lines

        with written_file(run / "removed.jsonl") as beside:
            beside.write_text(removed_lines(removed), encoding="utf-8")
    return order


def save_adapter(model: CausalModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a PEFT adapter that plain peft loads, with the tokenizer and the chat template that it was trained with."""
    remove_leftovers(folder)
    with written_folder(folder) as beside:
        write_adapter(model, tokenizer, beside)


def save_trained(model: CausalModel, tokenizer: PreTrainedTokenizerBase, run: Path) -> None:
    """Saves the adapter when training is over.

    If it cannot be written to the run folder, it is saved among the temporary files, and the `RunError` says so,
    because otherwise the whole training would be lost with this process.
    """
    try:
        save_adapter(model, tokenizer, run / "adapter")
    except Exception as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="qlora_sft-adapter-"))
        try:
            write_adapter(model, tokenizer, elsewhere)
        except Exception:
            shutil.rmtree(elsewhere, ignore_errors=True)
            raise error from None
        raise RunError(
            f"{error} What was trained is in {elsewhere}: move it away from there, and `lora.from` begins a run with "
            f"it; {what_is_left(run)}"
        ) from None


def write_adapter(model: CausalModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes adapter and tokenizer into ``folder``. Raises `RunError` if a value of the adapter is not finite."""
    from qlora_sft.model.peft_targets import write_portable_targets
    from qlora_sft.training.guards import all_finite

    if not all_finite(model):
        raise RunError(
            f"{folder}: not written, because the adapter has values that are not finite; lower training.learning_rate"
        )
    # Rows of new tokens are in it whole; PEFT would add the complete embedding where that had to grow for them.
    model.save_pretrained(folder, save_embedding_layers=False)
    write_portable_targets(model, folder)
    tokenizer.save_pretrained(folder)


def write_samples(run: Path, before: list[HeldOutAnswer], after: list[HeldOutAnswer]) -> None:
    """Writes ``samples.jsonl``: the answers after training, each with the answer before training."""
    with written_file(run / "samples.jsonl") as beside:
        # Nobody was asked before training where that was not wanted, or found no memory.
        answers = [old["answer"] for old in before] if before and after else [None] * len(after)
        rows = [{**new, "before": old} for old, new in zip(answers, after, strict=True)]
        beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
