"""Question: what does a training step cost in time and device memory, by the way layers keep their inputs?

    python benchmarks/memory.py [--shape 8B] [--layers 8] [--tokens 8192 32768] [--only NAME ...] [--output FILE]

A model of the shape's width with random weights is written to a temporary folder. Every provider loads it as NF4 in a
process of its own, because some patch torch or transformers for good, and takes steps (forward and backward of one
packed row, LoRA on every linear layer); the providers run in turn, ``--rounds`` times, and times are medians over all.
Their LoRA gradients are compared with those of plain checkpointing. Peak memory is what a step takes beyond the loaded
model: on a GPU by torch's allocator; on a CPU the bytes of what operators allocate, without the slab of host memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from cell import Cell

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from qlora_sft.config import Config
    from qlora_sft.data.batch import Batch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "memory.jsonl"
# width, MLP width, heads, key and value heads, vocabulary
SHAPES = {
    "8B": (4096, 14336, 32, 8, 128256),
    "1B": (2048, 8192, 32, 8, 128256),
    "135M": (576, 1536, 9, 3, 49152),
    "tiny": (64, 128, 4, 2, 1000),
}
# By name, the backend and what is set up, which is the policy for our own.
PROVIDERS = {
    "torch checkpoint": ("transformers", "checkpoint"),
    "nothing recomputed": ("transformers", "none"),
    "transformers offload": ("transformers", "hf"),
    "TRL offload": ("transformers", "trl"),
    "Unsloth": ("unsloth", "unsloth"),
    "ours, offload": ("transformers", "offload"),
    "ours, auto": ("transformers", "auto"),
    "ours, offload, on Unsloth": ("unsloth", "offload"),
    "ours, auto, on Unsloth": ("unsloth", "auto"),
}


class WorkerResult(Cell, total=False):
    """Holds what one process measured."""

    step_seconds: list[float]


class Loaded(NamedTuple):
    """Holds a loaded model with its configuration and the type in which it computes."""

    model: PeftModel
    config: Config
    dtype: torch.dtype


def main() -> None:
    args = parse()
    if args.worker:
        print("RESULT " + json.dumps(work(args.worker, args)), flush=True)
        return
    import torch
    from measuring import measured_on

    # CPU sizes answer in a minute or two; on a GPU the shape is that of an 8B model.
    gpu = torch.cuda.is_available()
    args.shape = args.shape or ("8B" if gpu else "135M")
    args.layers = args.layers or (8 if gpu else 4)
    with tempfile.TemporaryDirectory(prefix="memory-bench-") as folder:
        args.folder = folder
        make_model(args)
        for tokens in args.tokens or ([8192, 32768] if gpu else [512]):
            cells = []
            for cell in measure(args, tokens):  # written one by one: a timeout loses only what was not measured
                with Path(args.output).open("a") as file:
                    file.write(json.dumps({**measured_on("memory"), **cell}) + "\n")
                cells.append(cell)
            print(table(cells), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--documents", type=int, default=4, help="equal documents in a row")
    parser.add_argument("--repeats", type=int, default=3, help="steps per process")
    parser.add_argument("--rounds", type=int, default=2, help="processes per provider")
    parser.add_argument("--only", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--timeout", type=int, default=300, help="seconds per process")
    parser.add_argument("--output", default=str(RESULTS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(args: argparse.Namespace) -> None:
    """Writes random weights in bfloat16. Every provider quantises them to NF4 when it loads them."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    width, mlp, heads, kv_heads, vocabulary = SHAPES[args.shape]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=kv_heads,
        vocab_size=vocabulary, num_hidden_layers=args.layers, max_position_embeddings=131072, dtype="bfloat16",
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(args.folder)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the workers need the room
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(
        args.folder
    )


def measure(args: argparse.Namespace, tokens: int) -> Iterator[Cell]:
    """Yields the cell of each provider as soon as its last round ends."""
    seconds: dict[str, list[float]] = {name: [] for name in args.only}
    for turn in range(args.rounds):
        for name in args.only:
            found = run_worker(name, args, tokens)
            seconds[name] += found.pop("step_seconds", [])
            if turn < args.rounds - 1:
                continue
            cell = {"provider": name, **found, "shape": args.shape, "layers": args.layers, "tokens": tokens}
            cell["documents"] = args.documents
            if "not_measured" not in cell:
                cell["milliseconds"] = 1000 * statistics.median(seconds[name])
                cell["gradient_error"] = gradient_error(Path(args.folder), name)
            yield cell


def run_worker(name: str, args: argparse.Namespace, tokens: int) -> WorkerResult:
    command = [sys.executable, __file__, "--worker", name, "--folder", args.folder, "--tokens", str(tokens)]
    command += ["--documents", str(args.documents), "--repeats", str(args.repeats)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout, cwd=args.folder)
    except subprocess.TimeoutExpired:
        return {"not_measured": f"took more than {args.timeout} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"not_measured": (done.stderr.strip().splitlines() or ["no reason given"])[-1][:160]}
    result: WorkerResult = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def work(name: str, args: argparse.Namespace) -> WorkerResult:
    """Measures one provider, in a process of its own: seconds of each step, peak bytes, and what it chose."""
    backend, mode = PROVIDERS[name]
    from qlora_sft.model.backend import choose_backend

    choose_backend("unsloth" if backend == "unsloth" else "transformers")
    import torch

    from qlora_sft.model.attention import use_document_attention
    from qlora_sft.model.layer_bytes import memory_use

    loaded = load(args.folder, backend, mode)
    model, dtype = loaded.model, loaded.dtype
    use_document_attention(model)
    model.train()
    around, facts = set_up(loaded, mode, args.tokens[0])
    batch = row(model, args.tokens[0], args.documents)
    step(model, batch, dtype, around)  # also compiles and warms up
    gradients = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
    torch.save(torch.cat(gradients), Path(args.folder) / f"{name}.pt")
    seconds = [step(model, batch, dtype, around) for _ in range(args.repeats)]
    with memory_use(model.device) as use:
        step(model, batch, dtype, around)
    return {"step_seconds": seconds, "peak_bytes": use.peak(), "dtype": str(dtype).removeprefix("torch."), **facts}


def load(folder: str, backend: Literal["unsloth", "transformers"], mode: str) -> Loaded:
    """Loads the model as NF4 with LoRA, as the provider does."""
    import torch

    from qlora_sft.config import Config, DataConfig, LoraConfig, MemoryConfig, ModelConfig
    from qlora_sft.model.load import compute_dtype, load_model

    policy = mode if mode in ("auto", "none", "checkpoint", "offload") else "checkpoint"
    config = Config(
        model=ModelConfig(path=folder), data=DataConfig(train=[], max_length=131072), output=folder,
        lora=LoraConfig(r=32, alpha=32), memory=MemoryConfig(policy=policy),
    )  # fmt: skip
    dtype, _ = compute_dtype("auto")
    if mode != "unsloth":
        model = load_model(config, folder, dtype, backend)
    else:
        from unsloth import FastLanguageModel

        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=131072, dtype=dtype, load_in_4bit=True, use_gradient_checkpointing="unsloth"
        )
        model = FastLanguageModel.get_peft_model(
            model, r=32, lora_alpha=32, target_modules=names, use_gradient_checkpointing="unsloth", random_state=0
        )
    # B starts at zero, which would leave A without a gradient to compare.
    torch.manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.01)
    return Loaded(model, config, dtype)


def set_up(loaded: Loaded, mode: str, tokens: int) -> tuple[Callable[[], contextlib.AbstractContextManager], Cell]:
    """Sets up how layers keep their inputs. Returns the context in which a step runs, and facts for the cell."""
    model, config, dtype = loaded
    if mode == "unsloth":
        return contextlib.nullcontext, {}
    if mode in ("hf", "trl"):
        model.gradient_checkpointing_enable({"use_reentrant": False}, **({"offload": True} if mode == "hf" else {}))
    if mode == "trl":
        from trl.models.activation_offloading import get_act_offloading_ctx_manager

        context = get_act_offloading_ctx_manager(model)
        return lambda: context, {}
    if mode == "hf":
        return contextlib.nullcontext, {}
    from qlora_sft.model.memory import use_memory

    memory = use_memory(model, config, tokens, dtype, lambda text: print(text, file=sys.stderr))
    report = memory.report.to_json()
    return contextlib.nullcontext, {
        "split": report["split"], "host_bytes": report["host_bytes"], "predicted_bytes": report["device_bytes"]
    }  # fmt: skip


def row(model: PeftModel, tokens: int, documents: int) -> Batch:
    """Makes a batch of random tokens in equal documents, of which every second token is supervised."""
    import torch

    from qlora_sft.data.batch import flatten
    from qlora_sft.data.render import Rendered
    from qlora_sft.model.loss import to_device

    generator = torch.Generator().manual_seed(0)
    size, vocabulary = tokens // documents, model.get_input_embeddings().num_embeddings
    ids = [torch.randint(3, vocabulary, (size,), generator=generator).tolist() for _ in range(documents)]
    rendered = [Rendered(each, [float(i % 2) for i in range(size)], "random") for each in ids]
    return to_device(flatten(rendered), model.device)


def step(
    model: PeftModel, batch: Batch, dtype: torch.dtype, around: Callable[[], contextlib.AbstractContextManager]
) -> float:
    """Runs one forward and backward and returns its seconds."""
    import torch
    from measuring import clock

    from qlora_sft.evaluation.held_out import autocast
    from qlora_sft.model.loss import batch_loss

    model.zero_grad(set_to_none=False)  # gradients of adapters are no activations
    synchronise = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    synchronise()
    started = clock()
    with autocast(model.device, dtype), around():
        loss = batch_loss(model, batch).loss
    loss.backward()
    synchronise()
    return clock() - started


def gradient_error(folder: Path, name: str) -> float | None:
    """Returns the relative distance from the gradients of plain checkpointing, or None if that was not measured."""
    import torch

    reference = folder / "torch checkpoint.pt"
    if not reference.exists():
        return None
    exact, found = torch.load(reference), torch.load(folder / f"{name}.pt")
    return float((found - exact).norm() / exact.norm())


def table(cells: list[Cell]) -> str:
    first = cells[0]
    lines = [
        f"\n{first['shape']} wide, {first['layers']} layers, {first['tokens']} tokens in {first['documents']} documents"
    ]
    lines += [f"{'':<28}{'ms':>10}{'peak MB':>10}{'host MB':>9}{'grad error':>12}  split"]
    for c in cells:
        if "not_measured" in c:
            lines.append(f"{c['provider']:<28} not measured: {c['not_measured']}")
            continue
        error = "" if c["gradient_error"] is None else f"{c['gradient_error']:.1e}"
        host = f"{c['host_bytes'] / 1e6:.0f}" if "host_bytes" in c else ""
        lines.append(
            f"{c['provider']:<28}{c['milliseconds']:>10.1f}{c['peak_bytes'] / 1e6:>10.1f}{host:>9}{error:>12}"
            f"  {c.get('split', '')}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
