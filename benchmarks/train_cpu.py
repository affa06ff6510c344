"""Question: how fast does a 135M model train on a CPU, ours against Unsloth's trainer and plain transformers with PEFT?

    python benchmarks/train_cpu.py --data gsm8k_train.jsonl [--steps 5] [--threads 1] [--dtype bfloat16]

SmolLM2-135M of the demo in NF4, LoRA of rank 16 on all linear layers with the same factors everywhere, GSM8K in
conversations. Every trainer gets the same documents in every step, and the same labels: ours in one packed row, the
others padded. Each is a process of its own and has the CPU alone for a step at a time, in turns; a step is all of it,
the optimizer included. The first step, in which caches are filled, does not count.

With one thread the time is that of the process, which other work on the machine does not lengthen. To stand for a CPU
without AVX512: ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2, with --dtype float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "train_cpu.jsonl"
PROVIDERS = ("ours", "Unsloth", "Unsloth, nothing recomputed", "transformers + PEFT")
RANK, RATE = 16, 2e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="GSM8K: a JSONL file of questions and answers")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--documents", type=int, default=8, help="of a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--only", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    parser.add_argument("--profile", action="store_true", help="the largest costs of ours' last step, no rows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    with tempfile.TemporaryDirectory(prefix="train-cpu-") as folder:
        prepare(options, Path(folder))
        workers = {name: start(name, folder, options) for name in options.only}
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for _ in range(options.steps):
            for name, worker in list(workers.items()):
                step = turn(worker)
                if step is None:
                    print(f"{name} ended: {(Path(folder) / f'{name}.err').read_text()[-2000:]}", file=sys.stderr)
                    del workers[name]
                else:
                    print(name, step, file=sys.stderr, flush=True)
                    found[name].append(step)
        for name, worker in workers.items():
            worker.wait()
            if options.profile:
                print((Path(folder) / f"{name}.err").read_text())
    if not options.profile:
        write(found, options)


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Writes the documents of all steps: ids, and labels in which -100 is not supervised."""
    from qlora_sft.config import load_config
    from qlora_sft.data.prepare import render_sources
    from qlora_sft.data.sources import read_sources
    from qlora_sft.demo.base_model import base_model_path
    from qlora_sft.model.tokenizer import load_tokenizer

    count = options.steps * options.documents
    with (folder / "chats.jsonl").open("w") as file:
        for line in options.data.read_text().splitlines()[:count]:
            row = json.loads(line)
            file.write(json.dumps({"messages": [{"role": "user", "content": row["question"]},
                                                {"role": "assistant", "content": row["answer"]}]}) + "\n")  # fmt: skip
    recipe = f"output: {folder / 'run'}\nmodel: {{path: {base_model_path()}}}\n"
    recipe += f"data: {{train: [{{path: {folder / 'chats.jsonl'}}}]}}\n"
    (folder / "recipe.yaml").write_text(recipe)
    config = load_config(str(folder / "recipe.yaml"), [])
    tokenizer = load_tokenizer(config.model, config.model.path)
    documents = render_sources(read_sources(config.data.train, config.seed), config.data, tokenizer).all_documents
    assert len(documents) == count, f"{len(documents)} of {count} rows became documents"
    rows = [{"ids": list(map(int, d.input_ids)), "weights": list(map(float, d.weights))} for d in documents]
    (folder / "documents.json").write_text(json.dumps(rows))


def start(name: str, folder: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", name, "--folder", folder, "--data", str(options.data)]
    command += ["--steps", str(options.steps), "--documents", str(options.documents), "--dtype", options.dtype]
    command += ["--threads", str(options.threads), *(["--profile"] if options.profile else [])]
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parent / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command, text=True, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=(Path(folder) / f"{name}.err").open("w"),
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": paths},
    )  # fmt: skip


def turn(worker: subprocess.Popen[str]) -> dict[str, Any] | None:
    """Lets a worker do one step, alone; what it measured, or None if it has ended."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    for line in worker.stdout:
        if line == "READY\n":
            worker.stdin.write("go\n")
            worker.stdin.flush()
        elif line.startswith("STEP "):
            return dict(json.loads(line.removeprefix("STEP ")))
    return None


def write(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    import torch
    from measuring import measured_on

    torch.set_num_threads(options.threads)
    machine = {**measured_on("train_cpu"), "capability": os.environ.get("ATEN_CPU_CAPABILITY", "as it is")}
    with options.output.open("a") as file:
        for name, steps in found.items():
            row = {**machine, "provider": name, "dtype": options.dtype, "documents": options.documents, "rank": RANK}
            counted = steps[1:]
            if len(steps) < options.steps or not counted:
                row["not_measured"] = f"ended after {len(steps)} steps"
            else:
                speeds = [step["supervised"] / step["seconds"] for step in counted]
                row |= {"supervised_tokens_per_second": statistics.median(speeds), "steps": len(counted)}
                row |= {key: counted[-1][key] for key in ("peak_bytes", "peak_resident")}
                row["losses"] = [round(step["loss"], 4) for step in steps]
            file.write(json.dumps(row) + "\n")
            print(json.dumps(row))


# ------------------------------------------------------------------ one trainer, in a process of its own


def work(options: argparse.Namespace) -> None:
    from qlora_sft.model.backend import choose_backend

    choose_backend("unsloth" if options.worker.startswith("Unsloth") else "transformers")
    import torch

    torch.set_num_threads(options.threads)
    rows = json.loads((options.folder / "documents.json").read_text())
    make = ours if options.worker == "ours" else padded
    make(options, rows).train()


def clocked(options: argparse.Namespace, rows: list[dict[str, Any]]) -> Any:
    """A callback that waits for its turn before each step, and says what the step took."""
    from measuring import clock
    from torch.profiler import profile
    from transformers import TrainerCallback

    class Clocked(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not state.global_step:
                Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
                self.before = resident("VmRSS")
            print("READY", flush=True, file=sys.__stdout__)
            sys.stdin.readline()
            self.profile = profile() if options.profile and state.global_step == options.steps - 1 else None
            if self.profile:
                self.profile.start()
            self.started = clock()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds = clock() - self.started
            if self.profile:
                self.profile.stop()
                table = self.profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
                print(table, file=sys.stderr)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in logs:
                return
            size = options.documents
            of_step = rows[(state.global_step - 1) * size : state.global_step * size]
            step = {"seconds": self.seconds, "loss": logs["loss"], "peak_resident": resident("VmHWM"),
                    "supervised": sum(w > 0 for row in of_step for w in row["weights"])}  # fmt: skip
            step["peak_bytes"] = step["peak_resident"] - self.before
            print("STEP " + json.dumps(step), flush=True, file=sys.__stdout__)

    return Clocked()


def resident(key: str) -> int:
    from measuring import _kilobytes

    return 1024 * _kilobytes(Path("/proc/self/status").read_text(), key)


def same_factors(model: Any) -> None:
    """LoRA's A from a seed, by name, so that all trainers begin alike; B is zero."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted((n, p) for n, p in model.named_parameters() if "lora_A" in n):
        noise = torch.rand(parameter.shape, generator=generator) * 2 - 1
        parameter.data.copy_(noise / parameter.shape[1] ** 0.5)


def ours(options: argparse.Namespace, rows: list[dict[str, Any]]) -> Any:
    """As `qlora-sft train` sets it up: the model, what its layers keep, and the trainer."""
    import torch

    from qlora_sft.config import load_config
    from qlora_sft.data.collate import PackedCollator
    from qlora_sft.data.render import Rendered
    from qlora_sft.model.memory import use_memory
    from qlora_sft.model.setup import prepare_model
    from qlora_sft.model.tokenizer import load_tokenizer
    from qlora_sft.training.trainer import PackedSFTTrainer, sft_config

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    overrides = [
        f"lora.r={RANK}", f"lora.alpha={RANK}", f"training.learning_rate={RATE}", "training.warmup_ratio=0",
        f"output={options.folder}",
    ]  # fmt: skip
    config = load_config(str(options.folder / "recipe.yaml"), overrides)
    documents = [Rendered(row["ids"], row["weights"], "gsm8k") for row in rows]
    size, dtype = options.documents, getattr(torch, options.dtype)
    bins = [list(range(start, start + size)) for start in range(0, len(rows), size)]
    tokens = max(sum(len(rows[index]["ids"]) for index in row) for row in bins)
    model = prepare_model(config, config.model.path, dtype, "transformers", tokens, say)
    same_factors(model)
    memory = use_memory(model, config, tokens, dtype, say)
    args, _ = sft_config(config, options.folder, options.steps, dtype)
    return PackedSFTTrainer(
        model, PackedCollator(documents, False), bins, config, memory.keep_less, say, args=args,
        processing_class=load_tokenizer(config.model, config.model.path), callbacks=[clocked(options, rows)],
    )  # fmt: skip


def padded(options: argparse.Namespace, rows: list[dict[str, Any]]) -> Any:
    """Unsloth's SFTTrainer, or transformers' Trainer with PEFT, on padded batches."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    from qlora_sft.demo.base_model import base_model_path

    base, dtype = str(base_model_path()), getattr(torch, options.dtype)
    checkpointing = options.worker == "Unsloth"
    model = (unsloth_model if options.worker.startswith("Unsloth") else peft_model)(base, dtype, checkpointing)
    same_factors(model)
    settings = {
        "output_dir": str(options.folder / "out"), "per_device_train_batch_size": options.documents,
        "max_steps": options.steps, "learning_rate": RATE, "lr_scheduler_type": "linear", "warmup_steps": 0,
        "weight_decay": 0.0, "optim": "adamw_torch_fused", "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False, "use_cpu": True,
        "bf16": dtype == torch.bfloat16, "dataloader_pin_memory": False, "gradient_checkpointing": False,
    }  # fmt: skip

    def collate(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        length = max(len(row["ids"]) for row in chosen)
        ids, labels, mask = (torch.full((len(chosen), length), fill) for fill in (0, -100, 0))
        for number, row in enumerate(chosen):
            own = torch.tensor(row["ids"])
            ids[number, : len(own)], mask[number, : len(own)] = own, 1
            labels[number, : len(own)] = torch.where(torch.tensor(row["weights"]) > 0, own, -100)
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    given = {
        "model": model, "train_dataset": Dataset.from_list(rows), "data_collator": collate,
        "processing_class": AutoTokenizer.from_pretrained(base), "callbacks": [clocked(options, rows)],
    }  # fmt: skip
    if options.worker.startswith("Unsloth"):
        from torch.utils.data import SequentialSampler
        from trl import SFTConfig, SFTTrainer

        class InOrder(SFTTrainer):  # type: ignore[misc]
            def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
                return SequentialSampler(self.train_dataset)

        args = SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True}, packing=False)
        return InOrder(args=args, **given)
    from transformers import Trainer, TrainingArguments

    return Trainer(args=TrainingArguments(**settings, train_sampling_strategy="sequential"), **given)


NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def unsloth_model(base: str, dtype: Any, checkpointing: bool) -> Any:
    from unsloth import FastLanguageModel

    kept: Any = "unsloth" if checkpointing else False
    model, _ = FastLanguageModel.from_pretrained(
        base, max_seq_length=2048, dtype=dtype, load_in_4bit=True, use_exact_model_name=True,
        use_gradient_checkpointing=kept,
    )  # fmt: skip
    return FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=RANK, lora_dropout=0, target_modules=NAMES, use_gradient_checkpointing=kept
    )


def peft_model(base: str, dtype: Any, checkpointing: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    from qlora_sft.model.load import disable_inference_repacking, load_base

    model = load_base(base, dtype, True).requires_grad_(False)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=NAMES, task_type="CAUSAL_LM"))
    disable_inference_repacking(model)
    return model


if __name__ == "__main__":
    main()
