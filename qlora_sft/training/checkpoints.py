"""Finds, writes and compares the checkpoints of a run, from which `--resume` continues.

A run can only continue as the same run: its configuration, data, base, type and backend have to be the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from qlora_sft.atomic import disk_error
from qlora_sft.config import AttentionWay, Config, load_config
from qlora_sft.errors import ConfigError, first_line
from qlora_sft.json_types import JsonObject, read_object
from qlora_sft.lora_from import KEYS, adapter_folder
from qlora_sft.parallel import world_size
from qlora_sft.say import Say
from qlora_sft.strict import as_tree
from qlora_sft.training.whole import damage_of

if TYPE_CHECKING:
    from qlora_sft.data.documents import Documents
    from qlora_sft.training.run_folder import Beginning

# What may be another in a run that goes on: it changes neither what is trained nor in which order.
FREE = (
    "output", "evaluation", "memory", "training.save_steps", "training.save_total_limit", "training.keep",
    "training.patience", "training.report_to", "model.revision",
)  # fmt: skip
# Of a source what only accepts it as it is: the judgement of the data may be another version's.
ACCEPTS = ".allow_share"
# Settings that may be named now where they were "auto", and what of the beginning they have to be. Of the revision the
# commit is compared, which several names may mean.
NAMED = {"model.dtype": "dtype", "model.backend": "backend", "model.attention": "attention"}
# The ways to attend by their names, as begun.json has them.
WAYS: dict[str, AttentionWay] = {way: way for way in get_args(AttentionWay)}
# What a run takes from the adapter of lora.from.
TAKEN = tuple(f"lora.{key}" for key in (*KEYS, "init"))
# What to do if a fact of begun.json differs; these facts follow from "auto" settings and from files.
CURES = {
    "data_sha256": "the training data, or how it is rendered and packed, is not what this run began with; restore it",
    "base_sha256": "the base model is another; set model.path to the one this run began with",
    "dtype": "set model.dtype={0}, which this run began with (auto means {1} here)",
    "backend": "set model.backend={0}, which this run began with (auto means {1} here)",
}


def folder_of(run: Path, step: int) -> Path:
    """Returns the folder of the checkpoint that is written after ``step``."""
    return run / "checkpoints" / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """Returns the number of optimizer steps that were done when ``checkpoint`` was written."""
    return int(checkpoint.name.removeprefix("step-"))


def all_checkpoints(run: Path) -> list[Path]:
    """Lists the checkpoints of ``run``, the oldest first. All are complete: none gets this name before it is."""
    return sorted(path for path in run.glob("checkpoints/step-*") if (path / "trainer_state.json").is_file())


def latest_checkpoint(run: Path) -> Path | None:
    """Returns the last checkpoint of ``run``, or None if it has none."""
    return next(reversed(all_checkpoints(run)), None)


def what_is_left(run: Path) -> str:
    """Says for an error message whether ``run`` can be resumed, and from which checkpoint."""
    checkpoint = latest_checkpoint(run)
    return f"{checkpoint} is complete, --resume goes on from there" if checkpoint else "there is no checkpoint"


def publish(unfinished: Path, folder: Path, keep: int, best: int | None = None) -> None:
    """Renames a complete checkpoint to its final name, and removes the oldest checkpoints beyond ``keep``.

    best: the step whose checkpoint is kept, however old it is.
    """
    folder.parent.mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
    for old in all_checkpoints(folder.parents[1])[:-keep]:
        if step_of(old) != best:
            shutil.rmtree(old, ignore_errors=True)


def clear_unfinished(run: Path) -> None:
    """Removes the checkpoint that a killed run was still writing."""
    for folder in run.glob(".unfinished-*"):
        shutil.rmtree(folder)


def survive_disk(error: Exception, folder: Path, say: Say) -> None:
    """Lets training continue if ``error`` means that a checkpoint could not be written to the disk, and raises any
    other error.

    There may be room again before the next one, or the server may be back, so this is no reason to lose the run.
    """
    why = refused_by_disk(error, folder)
    if not why:
        raise error
    go_on_without(why, say)


def refused_by_disk(error: Exception, folder: Path) -> str:
    """Says why ``folder`` could not be written, if ``error`` means that; else "".

    safetensors and torch report such failures by exceptions of their own.
    """
    full, text = disk_error(error, folder), first_line(error)
    if full is not None:
        return str(full)
    of_torch = isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text)
    if of_torch:
        return f"{folder}: the disk is full or does not take what is written ({text})"
    return f"{folder}: {text}" if isinstance(error, OSError) or "(os error " in text else ""


def go_on_without(why: str, say: Say) -> None:
    """Says that training continues although a checkpoint could not be written, and why."""
    say(f"checkpoint not written, training goes on: {why}")


# ------------------------------------------------------------------ going on


def find_checkpoint(run: Path, config: Config, say: Say) -> Path | None:
    """Returns the newest checkpoint of ``run``, or None, with a message, if there is none yet.

    Raises `ConfigError` if ``config`` belongs to another run or if the run is finished.
    """
    if (run / "manifest.json").exists():
        raise ConfigError(f"--resume: {run} holds a finished run; choose another output=... or add --overwrite")
    checkpoint = _newest_whole(run, say)
    if checkpoint is None:
        say(f"resume: {run} has no checkpoint yet, so it begins at step 0")
        return None
    before = load_config(run / "config.yaml")
    begun = _begun(run)
    _check_processes(run, begun)
    found = differences(as_tree(before), as_tree(config))
    lost = _lost_adapter(config)
    changed = [
        (key, old, new)
        for key, old, new in found
        if not (key in NAMED and begun.get(NAMED[key]) == new)
        and not (key == "data.share_prefixes" and new == _sharing(begun))
        and not (lost and key in TAKEN)
        # Another machine may not have the kernels; these are everywhere, and differ by rounding.
        and not (key == "model.attention" and new == "varlen")
    ]
    if changed:
        raise ConfigError(
            [f"--resume: {key} was {old!r} when {run} began and is {new!r} now" for key, old, new in changed]
            + ["a run goes on as it began; take the old values, or choose another output=... for a new run"]
        )
    say(f"resume: from step {step_of(checkpoint)} ({checkpoint})")
    return checkpoint


def _newest_whole(run: Path, say: Say) -> Path | None:
    """Returns the newest undamaged checkpoint; None if there is none at all.

    Raises `ConfigError` if all are damaged, or if there is an adapter and no checkpoint: starting again would destroy
    what was trained.
    """
    found = all_checkpoints(run)
    for checkpoint in reversed(found):
        damage = damage_of(checkpoint)
        if not damage:
            return checkpoint
        say(f"resume: {checkpoint} is damaged ({damage}), so it is not taken")
    if found:
        raise ConfigError(f"--resume: no checkpoint of {run} is whole; --overwrite begins the run once more")
    if (run / "adapter").is_dir():
        raise ConfigError(
            f"--resume: {run} has no checkpoint (training.save_steps=0), but {run / 'adapter'} is trained to its end; "
            f"`lora.from: {run / 'adapter'}` begins another run with it, and --overwrite trains this one once more"
        )
    return None


def _check_processes(run: Path, begun: Mapping[str, object]) -> None:
    """Raises `ConfigError` if a different number of processes trained ``run`` so far.

    Each process has its own random numbers, and the order in which gradients are added depends on their number. Runs of
    earlier versions had one process.
    """
    before, now = begun.get("processes", 1), world_size()
    if before != now:
        start = f"torchrun --nproc-per-node {before} -m qlora_sft.train ..." if before != 1 else "without torchrun"
        raise ConfigError(
            f"--resume: processes were {before} when {run} began and are {now} now; start as many ({start}), or choose "
            "another output=... for a new run"
        )


def as_begun(config: Config, run: Path, say: Say) -> Config:
    """Returns ``config`` with the base's commit, the way to attend and the sharing of prefixes that ``run`` began with,
    where it leaves them open.

    The main branch of the base may have moved, and another device may choose differently.
    """
    begun, model = _begun(run), config.model
    commit, way = begun.get("base_commit"), str(begun.get("attention"))
    if isinstance(commit, str) and model.revision == load_config(run / "config.yaml").model.revision:
        say(f"base: {model.path} at commit {commit}, with which this run began")
        model = dataclasses.replace(model, revision=commit)
    if way in WAYS and model.attention == "auto":
        model = dataclasses.replace(model, attention=WAYS[way])
    lora = config.lora
    if _lost_adapter(config):
        say(f"lora.from: {lora.from_} is gone; the checkpoint has all of it")
        lora = dataclasses.replace(load_config(run / "config.yaml").lora, from_=None)
    data = config.data
    if data.share_prefixes == "auto":
        data = dataclasses.replace(data, share_prefixes=_sharing(begun))
    return dataclasses.replace(config, model=model, lora=lora, data=data)


def _sharing(begun: Mapping[str, object]) -> Literal["on", "off"]:
    """Returns whether a run shares prefixes, as a setting. Runs of versions without sharing did not."""
    return "on" if begun.get("shares_prefixes") else "off"


def _lost_adapter(config: Config) -> bool:
    """Says whether the adapter that the run started from no longer exists."""
    return config.lora.from_ is not None and adapter_folder(config.lora.from_) is None


def differences(old: object, new: object, key: str = "") -> Iterable[tuple[str, object, object]]:
    """Yields (dotted key, old value, new value) wherever two configurations would not train the same model."""
    if key in FREE or key.endswith(ACCEPTS):
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in {**old, **new}:
            yield from differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    elif key == "data.train" and isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (before, now) in enumerate(zip(old, new, strict=True)):
            yield from differences(before, now, f"{key}.{number}")
    elif old != new:
        yield key, old, new


def check_same(run: Path, beginning: Beginning) -> None:
    """Raises `ConfigError` if ``beginning`` differs from what the run began with."""
    facts, begun = beginning.to_json(), _begun(run)
    # What an older version did not know of its beginning cannot be compared.
    known = {key: cure for key, cure in CURES.items() if begun.get(key) is not None}
    problems = [cure.format(begun[key], facts[key]) for key, cure in known.items() if begun[key] != facts[key]]
    if problems:
        raise ConfigError([f"--resume: {problem}" for problem in problems])


def check_commit(run: Path, commit: str | None) -> None:
    """Raises `ConfigError` where the base is at another ``commit`` than when the run began: before its weights are
    fetched."""
    begun = _begun(run).get("base_commit")
    if begun and begun != commit:
        raise ConfigError(
            f"--resume: the base model is at commit {commit}, and this run began with {begun}; set "
            f"model.revision={begun}, or choose another output=... for a new run"
        )


def _begun(run: Path) -> JsonObject:
    try:
        return read_object(run / "begun.json")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--resume: {run / 'begun.json'} is damaged ({first_line(error)}), so it is not known what this run "
            "began with; restore it, or choose another output=... for a new run"
        ) from None


def data_digest(documents: Iterable[Documents], sequences: list[list[int]]) -> str:
    """Returns a sha256 over everything that is trained on: every token, every weight and the order of the sequences."""
    from qlora_sft.data.mixture import order_digest

    digest = hashlib.sha256(order_digest(sequences).encode())
    for each in documents:
        for values in (each.ids, each.weights, each.bounds):
            digest.update(values.data)
    return digest.hexdigest()
