"""Which of transformers' causal architectures can be trained here, and with what: tried on tiny models, one of each.

    python benchmarks/every_family.py          writes docs/families.md

Every model is made from its family's own configuration with small sizes, saved, loaded in NF4 with LoRA as a run loads
it, and trained for three steps on rows of several documents. Tests use the same functions.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from every_gguf import Tried, read_rows
from tiny_models import tiny_config, tiny_model

from qlora_sft.config import Config, load_config
from qlora_sft.data.batch import Batch, flatten
from qlora_sft.data.render import Rendered
from qlora_sft.errors import ConfigError, first_line
from qlora_sft.export.llama_cpp import llama_cpp_path, llama_cpp_version
from qlora_sft.install import locked
from qlora_sft.model.attention import plain_attention
from qlora_sft.model.base import base_of, decoder_layers
from qlora_sft.model.experts import check_reach
from qlora_sft.model.hidden import alone, hidden_states, one_at_a_time
from qlora_sft.model.loss import batch_loss
from qlora_sft.model.memory import use_memory
from qlora_sft.model.meta_model import meta_model
from qlora_sft.model.mixers import mixers_of
from qlora_sft.model.mlp import TiledMLP
from qlora_sft.model.norms import has_lean_norms
from qlora_sft.model.setup import prepare_model

TABLE = Path(__file__).parent.parent / "docs" / "families.md"
ROWS = TABLE.with_suffix(".jsonl")
LENGTHS = (21, 1, 13, 34)
STEPS = 3
# More than float32 rounds: a document sees too much or too little.
WRONG = 1e-4
TIMM = "its tower needs the package timm"
FIXED = "towers of fixed sizes, too large for a test"
DEFAULTS = "its default configuration is not one of a whole model"
PARTS = "its parts have sizes that depend on one another"
OTHER = "no language model beside what it sees or hears"
# Configurations that transformers makes no model of from its own defaults, or only one too large for a test.
NOT_MADE = {
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), TIMM),
    **dict.fromkeys(
        ("granite_speech", "granite_speech_plus", "inkling_mm_model", "janus", "kosmos-2", "kosmos-2.5",
         "phi4_multimodal", "qwen2_5_omni", "vibevoice_asr"),
        FIXED,
    ),
    **dict.fromkeys(
        ("aria", "chameleon", "cosmos3_edge", "deepseek_ocr2", "diffusion_gemma", "emu3", "evolla", "granite4_vision",
         "kyutai_speech_to_text", "minicpmv4_6", "nemotron_h_omni", "qwen3_omni_moe", "qwen4_exp", "qwen4_exp_text",
         "video_llama_3", "vision-encoder-decoder"),
        DEFAULTS,
    ),
    **dict.fromkeys(
        ("apertus1p5", "blt", "dots3_note", "ernie4_5_vl_moe", "florence2", "fun_asr_nano", "glm5_next",
         "granite_docling", "inkling2", "inkling2_loop", "longcat_flash", "molmo2", "muse_spark", "nemo_speechlm",
         "t5gemma2"),
        PARTS,
    ),
    **dict.fromkeys(("pi0", "shieldgemma2"), OTHER),
    "cohere_compass": "its default rope parameters are not those of its layers",
    "cohere_compass_text": "its default rope parameters are not those of its layers",
    "dbrx": "its default configuration lacks rope_theta",
    "gemma4_assistant": "a drafting head of another model",
    "gemma4_unified_assistant": "a drafting head of another model",
    "musicgen": "music, not text",
    "musicgen_melody": "music, not text",
    "zamba": "its default ties do not fit fewer layers",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of one family."""

    kind: str
    how: str
    """"packed", "one at a time" or "refused"."""
    reason: str = ""
    architecture: str = ""
    mixers: int = 0
    """Recurrent and convolutional layers."""
    experts: bool = False
    frozen: bool = False
    """Its experts have a form that is not known here: trained with ``lora.experts=frozen``, refused without."""
    tiled: bool = False
    lean: bool = False
    difference: float = 0.0
    """Of the hidden states of packed documents from those that transformers' own attention gives for each alone."""
    losses: tuple[float, ...] = ()
    transformers: str = ""
    """With which version it was tried, if not that of the lock."""


def architectures() -> dict[str, str]:
    """Returns model type -> class, of all models of the installed transformers that write text, those that also see or
    hear among them."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )

    also = {**MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return {**also, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


def settings(kind: str) -> Config:
    """Returns the settings for a model of the type ``kind``; experts of a form that is not known stay frozen."""
    given = ["model.backend=transformers", "model.chat_template=null", "lora.r=4"]
    try:
        check_reach(meta_model(tiny_config(kind)))
    except ConfigError:
        given.append("lora.experts=frozen")
    return load_config("demo", given)


def packed_documents() -> Batch:
    random = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 200, (length,), generator=random).tolist() for length in LENGTHS]
    return flatten([Rendered(each, [1.0] * len(each), "s") for each in ids])


def try_family(kind: str, folder: Path) -> Outcome:
    """Trains a tiny model of the type ``kind`` in the empty ``folder``. Only a refusal is caught: what else is raised
    is a fault."""
    model = tiny_model(kind)
    architecture = type(model).__name__
    model.save_pretrained(folder)
    try:
        return _trained(kind, architecture, folder)
    except ConfigError as refusal:
        reason = first_line(refusal).removeprefix("model.path: ").replace(str(folder), "it")
        return Outcome(kind, "refused", reason, architecture, transformers=_other_version())


def _trained(kind: str, architecture: str, folder: Path) -> Outcome:
    config, said = settings(kind), list[str]()
    batch = packed_documents()
    model = prepare_model(config, str(folder), torch.float32, "transformers", sum(LENGTHS), said.append)
    difference = difference_from_alone(model, batch)
    memory = use_memory(model, config, sum(LENGTHS), torch.float32, said.append)
    with memory:
        losses = tuple(train(model, batch))
    layers = decoder_layers(model)
    kept = next((line for line in said if line.startswith("documents: ")), "")
    return Outcome(
        kind=kind,
        how="one at a time" if one_at_a_time(model) else "packed",
        reason=kept.removeprefix("documents: one at a time, not packed, because ").split(";")[0],
        architecture=architecture,
        mixers=sum(len(mixers_of(layer)) for layer in layers),
        experts=any(_is_stack(name, p) for layer in layers for name, p in layer.named_parameters()),
        frozen=config.lora.experts == "frozen",
        tiled=any(isinstance(module, TiledMLP) for module in model.modules()),
        lean=has_lean_norms(model),
        difference=difference,
        losses=losses,
        transformers=_other_version(),
    )


def _other_version() -> str:
    here = version("transformers")
    return "" if here == locked()["transformers"] else here


def _is_stack(name: str, parameter: torch.Tensor) -> bool:
    """Says whether a parameter holds the weights of several experts, in NF4 or not."""
    return "expert" in name and len(getattr(parameter, "ds_shape", parameter.shape)) == 3


@torch.no_grad()
def difference_from_alone(model: Any, batch: Batch) -> float:
    """Returns the largest relative difference of a packed document from the same document alone."""
    model.eval()
    bounds = (batch["cu_seqlens"], batch["lengths"])
    packed = hidden_states(model, batch["input_ids"], batch["position_ids"], *bounds)[0].split(LENGTHS)
    with plain_attention(model):
        apart = [alone(base_of(model), ids)[0] for ids in batch["input_ids"].split(LENGTHS, dim=1)]
    model.train()
    return max(float((ours - own).norm() / own.norm()) for ours, own in zip(packed, apart, strict=True))


def train(model: Any, batch: Batch) -> Iterator[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        loss = batch_loss(model, batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss)


# ------------------------------------------------------------------ the table


def converted() -> set[str]:
    """Returns the architectures that the pinned converter of llama.cpp knows, by its sources."""
    folder = llama_cpp_path()
    sources = [folder / "convert_hf_to_gguf.py", *sorted((folder / "conversion").glob("*.py"))]
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources if source.is_file())
    return set(re.findall(r'"(\w+(?:LM|LMHeadModel|Generation|Model))"', text))


def table(outcomes: list[Outcome], known: set[str], tried: dict[str, Tried]) -> str:
    counts = {how: sum(each.how == how for each in outcomes) for how in ("packed", "one at a time", "refused")}
    lines = [
        "# Families",
        "",
        "Written by `benchmarks/every_family.py`, which makes a tiny model of a causal architecture of transformers",
        f"and trains it for {STEPS} steps in NF4 with LoRA on a CPU. A row is as of the commit at which it was tried.",
        "",
        f"So far {len(outcomes)} of {len(_known(outcomes))} families were tried: {counts['packed']} train packed, "
        f"{counts['one at a time']} one document at a time, {counts['refused']} are refused with the reason.",
        f"No model is made of {len(NOT_MADE)}, with the reason; {len(_without_row(outcomes))} have no row yet.",
        "",
        "A version behind a name is that of transformers with which it was tried; the others were with",
        f"{locked()['transformers']}, which does not have all of those.",
        "",
        "- **Documents**: whether they share a packed sequence, or are run one at a time (the same result, slower",
        "  where they are short).",
        "- **Recurrent layers**: how many recurrent or convolutional mixers the tiny model has.",
        "- **Experts**: yes, in NF4 with adapters; frozen, in a form that is not known here: the family is refused",
        "  unless `lora.experts=frozen` leaves them in 16 bits and untrained.",
        "- **Tiled MLP**, **lean norms**: whether this project's own apply; where not, the model's own are used.",
        "- **GGUF**: same, where a merged tiny model was converted and llama.cpp gave its logits",
        "  (`benchmarks/every_gguf.py`; f16, of mixtures f32; mean KL at most 1e-3); no, where that failed, with the",
        f"  reason below; known, where it was not tried and the converter ({llama_cpp_version()})",
        "  has the architecture.",
        "",
        "| family | documents | recurrent layers | experts | tiled MLP | lean norms | GGUF |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in outcomes:
        if each.how == "refused":
            continue
        experts = "frozen" if each.frozen else "yes" if each.experts else ""
        marks = [experts, "yes" if each.tiled else "", "yes" if each.lean else ""]
        gguf = "known" if each.architecture in known else ""
        if each.kind in tried:
            gguf = "no" if tried[each.kind].reason else "same"
        lines.append(f"| {_named(each)} | {each.how} | {each.mixers or ''} | {' | '.join(marks)} | {gguf} |")
    without = [f"| {kind} | {row.reason} |" for kind, row in tried.items() if row.reason]
    lines += ["", "## No GGUF", "", "| family | reason |", "|---|---|", *without] if without else []
    lines += ["", "## Refused", "", "| family | reason |", "|---|---|"]
    lines += [f"| {_named(each)} | {each.reason} |" for each in outcomes if each.how == "refused"]
    lines += ["", "## One document at a time", "", "| family | reason |", "|---|---|"]
    lines += [f"| {_named(each)} | {each.reason} |" for each in outcomes if each.how == "one at a time"]
    lines += ["", "## Not tried", "", "| family | reason |", "|---|---|"]
    lines += [f"| {kind} | {reason} |" for kind, reason in NOT_MADE.items()]
    lines += [f"| {kind} | no row yet: run the script again |" for kind in _without_row(outcomes)]
    return "\n".join(lines) + "\n"


def _named(outcome: Outcome) -> str:
    return f"{outcome.kind} ({outcome.transformers})" if outcome.transformers else outcome.kind


def _known(outcomes: list[Outcome]) -> set[str]:
    """Returns all families that are known, to the installed transformers or to another with which they were tried."""
    return {*architectures(), *NOT_MADE, *(each.kind for each in outcomes)}


def _row(outcome: Outcome) -> dict[str, Any]:
    return {name: value for name, value in asdict(outcome).items() if name != "transformers" or value}


def _without_row(outcomes: list[Outcome]) -> list[str]:
    done = {each.kind for each in outcomes} | set(NOT_MADE)
    return [kind for kind in architectures() if kind not in done]


def main(*wanted: str) -> None:
    """Tries the families of ``wanted``, or all that have no row yet, and writes the table of all rows."""
    warnings.filterwarnings("ignore")
    ROWS.parent.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []
    found = {row["kind"]: Outcome(**row) for row in rows}
    tried = [kind for kind in architectures() if kind not in NOT_MADE]
    for kind in wanted or [kind for kind in tried if kind not in found]:
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = try_family(kind, Path(folder))
        print(kind, found[kind].how, found[kind].reason, file=sys.stderr, flush=True)
        ROWS.write_text("".join(json.dumps(_row(each)) + "\n" for each in found.values()), encoding="utf-8")
    wrong = [each.kind for each in found.values() if each.difference > WRONG]
    if wrong:
        raise SystemExit(f"not as transformers' own attention, so no table is written: {', '.join(wrong)}")
    TABLE.write_text(table(list(found.values()), converted(), read_rows()), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
