"""Whether a GGUF of a family is the model that was merged: tried on tiny models, by the export's own comparison.

    python benchmarks/every_gguf.py            tries the families of today, and writes docs/families_gguf.jsonl

A tiny model of the family gets a random adapter, is merged, converted by the pinned converter, and run by
llama.cpp beside transformers. `every_family.py` makes the column of docs/families.md from the rows. Tests use the same
functions.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiny_models import tiny_model

from qlora_sft.config import LoraConfig
from qlora_sft.data.shipped import FOLDER as TEMPLATES
from qlora_sft.demo import base_model_path
from qlora_sft.errors import ConfigError, RunError, first_line
from qlora_sft.export.gguf import export_run
from qlora_sft.export.llama_cpp import llama_cpp_version
from qlora_sft.export.merge import merge_run
from qlora_sft.export.parity import check_parity
from qlora_sft.model.base_files import has_experts, read_config
from qlora_sft.model.experts import check_reach, target_parameters
from qlora_sft.model.linears import peft_targets, target_modules
from qlora_sft.model.load import load_base
from qlora_sft.model.peft_targets import as_named, write_portable_targets

ROWS = Path(__file__).parent.parent / "docs" / "families_gguf.jsonl"
# Sizes that llama.cpp has in its code or needs in a file, and what published models of the family set.
OWN: dict[str, dict[str, Any]] = {
    "cohere2": {"rotary_pct": 1.0},
    "falcon_h1": {"head_dim": 16},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3n_text": {
        "hidden_size_per_layer_input": 256,
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 0,
        "intermediate_size": [128] * 5,
        "layer_types": [*["sliding_attention"] * 4, "full_attention"],
        "activation_sparsity_pattern": [0.95] * 5,
    },
    "gemma4_text": {"num_experts": None, "num_kv_shared_layers": 3},
    "gemma3_text": {
        "num_hidden_layers": 6,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
        "final_logit_softcapping": None,
        "query_pre_attn_scalar": 16,
    },
    "gpt_oss": {"max_position_embeddings": 131072},
    "granitemoehybrid": {"shared_intermediate_size": 64},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_5_moe_text": {"head_dim": 256},
    "qwen3_5_text": {"head_dim": 256},
    "llama4_text": {"attention_chunk_size": 8192},
    "ministral3": {"sliding_window": None},
    "mistral": {"sliding_window": None},
    "mistral3": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    # llama.cpp has Nemotron-H with experts or without, and not both in one model.
    "nemotron_h": {"layer_types": ["linear_attention", "moe", "full_attention", "moe"]},
    "phi3": {"sliding_window": None},
    "qwen3_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
}
# Control tokens that the converter looks up by name.
CONTROL = {
    kind: ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    for kind in ("glm4", "glm4_moe")
}
FAMILIES = (
    "cohere2", "deepseek_v3", "falcon_h1", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm4", "glm4_moe",
    "gpt_oss", "granite", "granitemoehybrid", "lfm2", "lfm2_moe", "llama", "llama4_text", "ministral3", "mistral",
    "mixtral", "nemotron_h", "olmo3", "phi3", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe",
    "qwen3_next", "smollm3",
    # Of these that also see, the language model.
    "gemma3", "gemma4", "llama4", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_vl",
)  # fmt: skip


@dataclass(frozen=True)
class Tried:
    """What became of the GGUF of one family."""

    kind: str
    llama_cpp: str
    form: str = "f16"
    """The type of the file; f32 for a mixture, because a rounded router sends tokens of a random model to others."""
    kl: float | None = None
    """Mean KL of the GGUF from the merged model, in nats per token; None if that failed."""
    reason: str = ""
    """Why there is none, or why it is not the model."""


def tokenizer_of(kind: str) -> Any:
    """Returns a tokenizer that the family's converter takes: Gemma's has to be like SentencePiece's."""
    from transformers import AutoTokenizer

    tokenizer = sentencepiece_like() if kind.startswith("gemma") else AutoTokenizer.from_pretrained(base_model_path())
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL.get(kind, [])})
    tokenizer.chat_template = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
    return tokenizer


def sentencepiece_like() -> Any:
    """Returns a small tokenizer with words behind a low line, and bytes for what it does not know."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>"]
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Replace(" ", "\u2581")
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("\\n+"), "isolated")
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    known = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [chr(code) for code in range(33, 127)] + ["\u2581", "\n"]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=[*special, *known], initial_alphabet=letters)
    raw.train_from_iterator([(TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")] * 20, trainer)
    text = json.loads(raw.to_str())
    # The trainer makes bytes special, which they are not.
    text["added_tokens"] = [token for token in text["added_tokens"] if token["content"] in special]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(text)), pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>",
    )  # fmt: skip


def write_run(kind: str, folder: Path) -> Path:
    """Writes a tiny base of the type ``kind`` and a run folder with a random adapter for it, as training leaves one."""
    import torch
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    tokenizer = tokenizer_of(kind)
    sizes = {"vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer), "max_position_embeddings": 512}
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    base, run = folder / "base", folder / "run"
    tiny_model(kind, **{**sizes, **ends, **OWN.get(kind, OWN.get(f"{kind}_text", {}))}).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = load_base(str(base), torch.float32, load_in_4bit=False)
    settings = LoraConfig()
    try:
        check_reach(model)
    except ConfigError:
        settings = LoraConfig(experts="frozen")
    torch.manual_seed(1)
    lora = PeftLoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM",
        target_modules=peft_targets(model, target_modules(model, settings)),
        target_parameters=target_parameters(model, settings) or None,
    )  # fmt: skip
    with as_named(model):
        peft = get_peft_model(model, lora)
    peft.save_pretrained(run / "adapter")
    write_portable_targets(peft, run / "adapter")
    tokenizer.save_pretrained(run / "adapter")
    described = {"path": str(base), "dtype": "float32", "load_in_4bit": False, "stop_tokens": []}
    manifest = {"config": {"model": described}, "report": {"base": str(base), "quantized_modules": []}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "config.yaml").write_text(
        f"model: {{path: {base}, load_in_4bit: false, dtype: float32}}\n"
        f"data: {{train: [{{path: {run / 'none.jsonl'}}}]}}\n"
        f"output: {run}\n"
    )
    return run


def try_gguf(kind: str, folder: Path) -> Tried:
    """Exports a tiny model of the type ``kind`` in the empty ``folder``. Only errors that an export reports are caught;
    a merged model that is not the adapter is a fault."""
    run = write_run(kind, folder)
    merge_run(run, say=lambda _: None)
    check_parity(run, run / "merged", say=lambda _: None)
    form = "f32" if has_experts(read_config(str(run / "merged"))) else "f16"
    try:
        parity = export_run(run, form, parity=True, say=lambda _: None).parity
    except (RunError, ConfigError) as error:
        return Tried(kind, llama_cpp_version(), form, None, _reason(error))
    assert parity is not None
    return Tried(kind, llama_cpp_version(), form, parity[form].kl)


def _reason(error: RunError | ConfigError) -> str:
    """Returns the line of an error that says what is wrong, without this machine's paths."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[-1] if "converter failed" in lines[0] else " ".join(lines[1:2]) or first_line(error)
    return " ".join(word for word in told.split() if not word.startswith("/"))


def read_rows() -> dict[str, Tried]:
    """Returns what became of the families that were tried, by model type."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []
    return {row["kind"]: Tried(**row) for row in rows}


def main(*wanted: str) -> None:
    """Tries the families of ``wanted``, or those of today that have no row yet."""
    warnings.filterwarnings("ignore")
    found = read_rows()
    for kind in wanted or [kind for kind in FAMILIES if kind not in found]:
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = try_gguf(kind, Path(folder))
        print(kind, found[kind].kl, found[kind].reason, file=sys.stderr, flush=True)
        text = "".join(json.dumps(asdict(found[each])) + "\n" for each in sorted(found))
        ROWS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
