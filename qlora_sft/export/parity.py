"""Is the exported model the one that was trained? Measured on logits, token by token, against stated bounds.

Adapter -> merged -> GGUF: each is compared with the one it was made from. A run's ``export.json`` keeps the figures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_sft.atomic import write_json
from qlora_sft.errors import RunError
from qlora_sft.export.probe import FIXED_TEXT, Probe, read_probe
from qlora_sft.export.text_parity import compare_texts
from qlora_sft.run.folder import Run
from qlora_sft.run.report import Report
from qlora_sft.say import Say, tell

QUICK_TOKENS = 256


@dataclass(frozen=True)
class Figures(Report):
    """top1: share of tokens with the same likeliest next token; kl: mean KL divergence per token, in nats, of the
    other from the reference; max_diff: largest difference of any logit; tokens: how many were compared."""

    top1: float
    kl: float
    max_diff: float
    tokens: int


# FORMAT -> (least top-1 agreement, greatest mean KL). The formats with 16 bits and more have to be the same model;
# the others may lose what their size costs, as measured on a 135M model, which suffers more than a large one.
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
    """Bounds of a format by its longest known beginning: q4_k_m -> q4."""
    known = [name for name in BOUNDS if form == name or (form.startswith(name) and form[len(name) :][:1] in ("_", ""))]
    return BOUNDS[max(known, key=len)] if known else BOUNDS["q2"]


def compare(reference: np.ndarray, other: np.ndarray) -> Figures:
    """Both [tokens, vocabulary] logits; one may have more columns (padding), which are left out."""
    import torch

    if len(reference) != len(other):
        raise ValueError(f"{len(reference)} and {len(other)} tokens")
    width = min(reference.shape[1], other.shape[1])
    same, divergence, largest = 0, 0.0, 0.0
    for start in range(0, len(reference), 128):
        a = torch.from_numpy(np.array(reference[start : start + 128, :width]))
        b = torch.from_numpy(np.array(other[start : start + 128, :width]))
        same += int((a.argmax(1) == b.argmax(1)).sum())
        largest = max(largest, float((a - b).abs().max()))
        p, q = a.log_softmax(1), b.log_softmax(1)
        divergence += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    count = len(reference)
    return Figures(same / count, max(0.0, divergence / count), largest, count)


@contextmanager
def quick_difference(run: Path) -> Iterator[Callable[[Path], float]]:
    """A function that gives the mean KL of a merged folder from the run's adapter, on a few tokens."""
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
    """Measures adapter -> merged and, if given, merged -> ``gguf``, prints both, keeps them in ``run``/export.json.

    ``form`` is the GGUF's format. With ``lora``, ``gguf`` is the base's and its counterpart the adapter. Adapter ->
    merged is left out where export.json has it of this very folder. Deletes nothing. Raises `RunError` naming the
    suspect when a bound is missed; the figures are kept even then.
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
                faults += _judge("merged", found["merged"], "adapter", probe.own_words, say)
            reference = ours
        if gguf is not None:
            texts = _texts(probe, tokenizer)
            theirs, ids = gguf_logits(gguf, probe, texts, folder / "gguf.npy", lora)
            found[form] = compare(reference, theirs)
            faults += _judge(form, found[form], "merged" if merged is not None else "adapter", probe.own_words, say)
            faults += compare_texts(texts, ids, tokenizer)
    record(run, {"parity": {name: figures.to_json() for name, figures in found.items()}})
    if merged == run / "merged" and "merged" in found:
        record(run, {"merged_written": (merged / "config.json").stat().st_mtime})
    if faults:
        raise RunError("the export is not the model that was trained:\n" + "\n".join(faults) + "\nNothing was deleted.")
    return found


def _measured_since(run: Path, merged: Path) -> bool:
    """Whether export.json has the merged model's figures, taken after it was last written."""
    if merged != run / "merged":
        return False
    known = Run.open(run).exports
    written = (merged / "config.json").stat().st_mtime
    return "merged" in known.get("parity", {}) and known.get("merged_written") == written


def record(run: Path, facts: dict[str, Any]) -> None:
    """Adds ``facts`` to ``run``/export.json; dictionaries in it are extended, not replaced."""
    content = Run.open(run).exports
    for key, value in facts.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    write_json(run / "export.json", content)


def _texts(probe: Probe, tokenizer: Any) -> list[str]:
    """Prompts as text: some of the probe's, and what tokenizers usually disagree about."""
    chosen = probe.documents[:: max(1, len(probe.documents) // 8)]
    return [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in chosen] + list(FIXED_TEXT)


def _judge(form: str, figures: Figures, against: str, own_words: bool, say: Say) -> list[str]:
    """Prints one comparison; returns the fault with its suspect, if there is one. The top-1 bound holds for the model's
    own words only."""
    top1, kl = bound(form)
    top1 = top1 if own_words else 0.0
    say(
        f"{form} against {against}: top-1 {figures.top1:.2%} (at least {top1:.1%}), mean KL {figures.kl:.1e} "
        f"(at most {kl:.0e}), largest logit difference {figures.max_diff:.3g}, {figures.tokens:,} tokens"
    )
    # Three standard deviations of the count of a model that just meets the bound: few tokens prove little.
    doubt = 3 * (top1 * (1 - top1) / figures.tokens) ** 0.5
    if figures.top1 >= top1 - doubt and figures.kl <= kl:
        return []
    return [f"{form}: top-1 {figures.top1:.2%}, mean KL {figures.kl:.1e}. Suspect: {_suspect(form, figures)}"]


def _suspect(form: str, figures: Figures) -> str:
    if form == "merged":
        if figures.top1 > 0.9:
            return "the rounding of the merged weights; merge with --dtype f16 or f32"
        return "the weights it was merged onto: try the other --onto, and check that the base is the one trained on"
    if form == "lora":
        return "the base GGUF: it has to come from the very base model the adapter was trained on"
    if bound(form)[0] >= 0.995 or figures.kl > 5:
        if form == "bf16" and figures.top1 > 0.9:
            return "the rounding: bfloat16 keeps 8 bits of a weight; export f16"
        return "the conversion (rope settings, head permutation, norms): the weights were stored with enough bits"
    cure = "export f16, or train on: a model unsure of its words changes them in near-ties"
    if form != "q8_0":
        cure = "take more bits (q8_0) or an importance matrix"
    return f"the quantisation: {form} is too coarse for this model; {cure}"


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
