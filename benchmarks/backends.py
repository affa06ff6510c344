"""Question: do both backends train a small model through the command line, step by step to the same losses?

    python benchmarks/backends.py [--steps 20] [--output FILE]

A Llama of four layers is made from a seed, with a tokenizer trained on the demo's data, so nothing is downloaded. Each
backend trains it with ``qlora-sft train`` in a process of its own, both at once. A row per backend has the losses, the
gradient norms, the types in the saved adapter, what stdout held beside the report, and the plan's bytes of the run
beside what torch's allocator counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "backends.jsonl"
BACKENDS = ("transformers", "unsloth")


def make_base(folder: Path, data: Path) -> None:
    """Writes the model and its tokenizer, in bfloat16."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, special_tokens=special)
    raw.train([str(file) for file in sorted((data / "train").glob("*.jsonl"))], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 64, hidden_size=512, intermediate_size=1536, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe(folder: Path, base: Path, data: Path, steps: int) -> Path:
    """Writes the configuration of the runs."""
    file = folder / "recipe.yaml"
    train, held_out = (
        "\n".join(f"    - {{path: {path}, max_rows: {rows}}}" for path in sorted((data / part).glob("*.jsonl")))
        for part, rows in (("train", 400), ("held_out", 20))
    )
    file.write_text(
        f"model: {{path: {base}, chat_template: chatml-think}}\n"
        f"data:\n  train:\n{train}\n  held_out:\n{held_out}\n  max_length: 1024\n"
        # Where rows share prefixes they are packed in another order, which Unsloth's layers cannot follow.
        '  share_prefixes: "off"\n'
        f"training: {{learning_rate: 5e-4, max_steps: {steps}, save_steps: {max(1, steps // 2)}}}\n"
        "lora: {r: 16, alpha: 32}\nevaluation: {answers: 4, max_new_tokens: 16}\n"
    )
    return file


def start(backend: str, file: Path, folder: Path) -> subprocess.Popen[str]:
    """Starts the training on one backend."""
    command = [sys.executable, "-m", "qlora_sft.train", str(file), f"model.backend={backend}"]
    command += [f"output={folder / backend}", "--json"]
    return subprocess.Popen(
        command, text=True, cwd=folder, stdout=(folder / f"{backend}.out").open("w"),
        stderr=(folder / f"{backend}.err").open("w"),
    )  # fmt: skip


def result_of(backend: str, folder: Path, code: int) -> dict[str, object]:
    """Returns what a finished run shows, or the last lines of a failed one."""
    if code:
        return {"provider": backend, "not_measured": (folder / f"{backend}.err").read_text()[-800:]}
    from safetensors.torch import load_file

    lines = (folder / f"{backend}.out").read_text().splitlines()
    report = json.loads(lines[-1])
    metrics = [json.loads(line) for line in (folder / backend / "metrics.jsonl").read_text().splitlines()]
    adapter = load_file(folder / backend / "adapter" / "adapter_model.safetensors")
    return {
        "provider": backend,
        "losses": [round(row["loss"], 4) for row in metrics],
        "gradient_norms": [row.get("grad_norm", row.get("gradient_norm")) for row in metrics],
        "adapter_types": sorted({str(tensor.dtype) for tensor in adapter.values()}),
        "beside_the_report_on_stdout": lines[:-1],
        "left_in_the_folder": sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name not in BACKENDS),
        "loss": report["loss"],
        "tokens_per_second": report["tokens_per_second"],
        "memory": {key: report["memory"].get(key) for key in ("split", "device_bytes", "between", "measured")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    from measuring import measured_on

    from qlora_sft.demo.conversations import data_path

    data = data_path()
    with tempfile.TemporaryDirectory(prefix="backends-") as place:
        folder = Path(place)
        base = folder / "base"
        make_base(base, data)
        file = recipe(folder, base, data, options.steps)
        running = {backend: start(backend, file, folder) for backend in options.only}
        rows = [result_of(backend, folder, process.wait()) for backend, process in running.items()]
    with options.output.open("a") as output:
        for row in rows:
            output.write(json.dumps({**measured_on("backends"), **row}) + "\n")
            print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
