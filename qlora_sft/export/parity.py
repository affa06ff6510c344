"""Measures whether the exported model is the one that was trained, on logits, token by token, against stated bounds.

The merged model is compared with the adapter, and the GGUF with the merged model. The figures are kept in the run's
``export.json``.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_sft.atomic import write_json
from qlora_sft.errors import RunError
from qlora_sft.export.probe import FIXED_TEXT, Probe, read_probe
from qlora_sft.export.text_parity import compare_texts
from qlora_sft.json_types import JsonObject
from qlora_sft.model.base_tokenizer import saved_tokenizer
from qlora_sft.run.folder import Run
from qlora_sft.run.report import Report
from qlora_sft.say import Say, tell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUICK_TOKENS = 256
# Two tokens whose probabilities differ by less are a near tie: which of them is likelier says nothing of a model that
# was rounded. A mean KL of 0.02, which q8_0 may have, allows probabilities to be moved by 0.1 (Pinsker: sqrt(KL / 2)).
NEAR_TIE = 0.05


@dataclass(frozen=True)
class Figures(Report):
    """Holds how far one model is from its reference."""

    top1: float
    """The share of the positions at which both find the same token likeliest."""
    kl: float
    """The mean KL divergence of the model from the reference, in nats per token."""
    max_diff: float
    """The largest difference of any logit."""
    tokens: int
    """The number of positions that were compared."""
    ties: float = 0.0
    """The share of the positions at which they differ in the likeliest token, and the reference is nearly undecided
    between the two (`NEAR_TIE`)."""


# By format, the least top-1 agreement and the greatest mean KL. The formats with 16 bits and more have to be the same
# model. The others may lose what their size costs, as measured on a 135M model, which loses more than a large one.
BOUNDS: dict[str, tuple[float, float]] = {
    "merged": (0.995, 1e-3),
    "f32": (0.995, 1e-3),
    "bf16": (0.995, 1e-3),
    "f16": (0.995, 1e-3),
    "lora": (0.995, 1e-3),
    "q8_0": (0.99, 0.02),
    "q6": (0.97, 0.02),
    "q5": (0.94, 0.05),
    "q4": (0.90, 0.2),
    "iq4": (0.88, 0.25),
    "q3": (0.75, 0.8),
    "iq3": (0.65, 1.5),
    "q2": (0.40, 4.0),
    "iq2": (0.30, 5.0),
    "iq1": (0.10, 10.0),
    "tq": (0.0, 100.0),
}


def bound(form: str) -> tuple[float, float]:
    """Returns the bounds of a format, which is recognised by its longest known beginning (q4 for q4_k_m)."""
    known = [name for name in BOUNDS if form == name or (form.startswith(name) and form[len(name) :][:1] in ("_", ""))]
    return BOUNDS[max(known, key=len)] if known else BOUNDS["q2"]


def compare(reference: np.ndarray, other: np.ndarray) -> Figures:
    """Compares two [tokens, vocabulary] logits. One may have more columns, which are padding and are left out.

    The KL divergence from logits that are not numbers, or of such, is infinite: nothing is farther from a model.
    """
    import torch

    if len(reference) != len(other):
        raise ValueError(f"{len(reference)} and {len(other)} tokens")
    width = min(reference.shape[1], other.shape[1])
    same, ties, divergence, largest = 0, 0, 0.0, 0.0
    for start in range(0, len(reference), 128):
        a = torch.from_numpy(np.array(reference[start : start + 128, :width]))
        b = torch.from_numpy(np.array(other[start : start + 128, :width]))
        p, q = a.log_softmax(1), b.log_softmax(1)
        likeliest, others = (each.argmax(1, keepdim=True) for each in (a, b))
        agree, gap = likeliest == others, p.exp().gather(1, likeliest) - p.exp().gather(1, others)
        same += int(agree.sum())
        ties += int((~agree & (gap < NEAR_TIE)).sum())
        largest = max(largest, float((a - b).abs().max()))
        # A token that both rule out has a logit of minus infinity in both.
        divergence += float((p.exp() * (p - q)).masked_fill(p.isneginf(), 0.0).sum(dtype=torch.float64))
    count = len(reference)
    kl = max(0.0, divergence / count) if math.isfinite(divergence) else math.inf
    return Figures(same / count, kl, largest, count, ties / count)


@contextmanager
def quick_difference(run: Path) -> Iterator[Callable[[Path], float]]:
    """Yields a function that measures, on a few tokens, the mean KL of a merged folder from the run's adapter."""
    from qlora_sft.export.logits import adapter_logits, model_logits

    probe = read_probe(run, _tokenizer(run / "adapter"), QUICK_TOKENS)
    with tempfile.TemporaryDirectory(prefix="qlora_sft-") as scratch:
        reference = adapter_logits(run, probe, Path(scratch, "adapter.npy"))
        merged = Path(scratch, "merged.npy")
        trust = Run.open(run).model.trust_remote_code
        yield lambda folder: compare(reference, model_logits(folder, probe, merged, trust)).kl


def check_parity(
    run: Path,
    merged: Path | None,
    gguf: Path | None = None,
    form: str = "",
    lora: Path | None = None,
    say: Say = tell,
) -> dict[str, Figures]:
    """Compares the merged model with the adapter and, if given, ``gguf`` with the merged model.

    The figures are printed and kept in ``run``/export.json. ``form`` is the GGUF's format. With ``lora``, ``gguf`` is
    the base's, and the two together are compared with the adapter. The merged model is not measured again if
    export.json has its figures since it was written. Nothing is deleted. Raises `RunError` naming the suspect when a
    bound is missed; the figures are kept even then.
    """
    from qlora_sft.export.logits import adapter_logits, gguf_logits, model_logits

    tokenizer = _tokenizer(run / "adapter")
    probe = read_probe(run, tokenizer)
    say(f"parity on {probe.tokens:,} tokens: {probe.origin}")
    found: dict[str, Figures] = {}
    faults: list[str] = []
    measured = merged is not None and gguf is not None and _measured_since(run, merged)
    with tempfile.TemporaryDirectory(prefix="qlora_sft-") as scratch:
        folder = Path(scratch)
        if not measured:
            reference = adapter_logits(run, probe, folder / "adapter.npy")
        if merged is not None:
            ours = model_logits(merged, probe, folder / "merged.npy", Run.open(run).model.trust_remote_code)
            if not measured:
                found["merged"] = compare(reference, ours)
                faults += _judge("merged", found["merged"], "adapter", probe.supervised_only, say)
            reference = ours
        if gguf is not None:
            texts = _texts(probe, tokenizer)
            theirs, ids = gguf_logits(gguf, probe, texts, folder / "gguf.npy", lora)
            found[form] = compare(reference, theirs)
            faults += _judge(
                form, found[form], "merged" if merged is not None else "adapter", probe.supervised_only, say
            )
            faults += compare_texts(texts, ids, tokenizer)
    finite = {name: figures.to_json() for name, figures in found.items() if math.isfinite(figures.kl)}
    record(run, {"parity": finite})
    if merged == run / "merged" and "merged" in found:
        record(run, {"merged_written": (merged / "config.json").stat().st_mtime})
    if faults:
        raise RunError("the export is not the model that was trained:\n" + "\n".join(faults) + "\nNothing was deleted.")
    return found


def _measured_since(run: Path, merged: Path) -> bool:
    """Says whether export.json has figures of the merged model that were taken after it was last written."""
    if merged != run / "merged":
        return False
    known = Run.open(run).exports
    written = (merged / "config.json").stat().st_mtime
    return "merged" in known.get("parity", {}) and known.get("merged_written") == written


def record(run: Path, facts: JsonObject) -> None:
    """Adds ``facts`` to ``run``/export.json. Objects in it are extended, not replaced."""
    content = Run.open(run).exports
    for key, value in facts.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    write_json(run / "export.json", content)


def forget(run: Path, form: str) -> None:
    """Removes the figures of ``form`` from export.json: its file is another one now, of which nothing is known yet."""
    content = Run.open(run).exports
    known = content.get("parity", {})
    if form in known:
        del known[form]
        write_json(run / "export.json", content)


def _texts(probe: Probe, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns texts to tokenize: some of the probe's documents, and texts about which tokenizers usually disagree."""
    chosen = probe.documents[:: max(1, len(probe.documents) // 8)]
    return [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in chosen] + list(FIXED_TEXT)


def _judge(form: str, figures: Figures, against: str, supervised_only: bool, say: Say) -> list[str]:
    """Prints one comparison and returns the fault with its suspect, if there is one.

    The top-1 bound holds only if all positions are of tokens that the model was trained to write. Near ties count as
    agreement where weights were rounded to few bits: a model that was hardly trained is undecided in many places.
    """
    top1, kl = bound(form)
    found = figures.top1 + (0.0 if top1 >= 0.995 else figures.ties)
    top1 = top1 if supervised_only else 0.0
    # Few tokens prove little. So the bound is widened by three standard deviations of what a model that just meets it
    # would show on as many tokens.
    least = max(0.0, top1 - 3 * (top1 * (1 - top1) / figures.tokens) ** 0.5)
    of_many = f", {top1:.1%} of many" if top1 else ""
    decided = f", {found:.2%} with near ties" if found > figures.top1 else ""
    say(
        f"{form} against {against}: top-1 {figures.top1:.2%}{decided} (at least {least:.2%}{of_many}), mean KL "
        f"{figures.kl:.1e} (at most {kl:.0e}), largest logit difference {figures.max_diff:.3g}, "
        f"{figures.tokens:,} tokens"
    )
    if found >= least and figures.kl <= kl:
        return []
    return [f"{form}: top-1 {figures.top1:.2%}, mean KL {figures.kl:.1e}. Suspect: {_suspect(form, figures)}"]


def _suspect(form: str, figures: Figures) -> str:
    """Names the likeliest cause of the difference, and the cure."""
    if math.isinf(figures.kl):
        return "an overflow, for its logits are not numbers; merge with --dtype f32, and export bf16 or f32"
    if form == "merged":
        if figures.top1 > 0.9:
            return "the rounding of the merged weights; merge with --dtype f16 or f32"
        return "the weights it was merged onto: try the other --onto, and check that the base is the one trained on"
    if form == "lora":
        return "the base GGUF: it has to come from exactly the base model that the adapter was trained on"
    if bound(form)[0] >= 0.995 or figures.kl > 5:
        if form == "bf16" and figures.top1 > 0.9:
            return "the rounding: bfloat16 keeps 8 bits of a weight; export f16"
        return "the conversion (rope settings, head permutation, norms): the weights were stored with enough bits"
    cure = "export f16, or train longer: the tokens of a model that is unsure of them change in near-ties"
    if form != "q8_0":
        cure = "take more bits (q8_0) or an importance matrix"
    return f"the quantisation: {form} is too coarse for this model; {cure}"


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return saved_tokenizer(folder)
