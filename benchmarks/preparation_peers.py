"""One timed preparation of GSM8K: rows on disk -> labelled (and packed) rows, by one of the peers or by us.

Run by preparation.py in a process of its own, because importing Unsloth patches the others. Importing, the tokenizer
and the model are not timed, only what has to be done for the data. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

CAPACITY = 2048
PACKAGE = "qwen2_5"  # its template writes nothing into an answer by itself, so that masks can be compared


def tokenizer() -> Any:
    """Qwen2.5's, as the tests load it, with the template for which TRL ships a training version."""
    import trl
    from families import load

    result = load(PACKAGE)
    result.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    result.pad_token = "<|endoftext|>"
    return result


def ours(file: Path) -> dict[str, Any]:
    """As in a run, the cache included; and once more, with what the first time left there."""
    from qlora_sft.config import Config, DataConfig, ModelConfig
    from qlora_sft.config_data import TrainSourceConfig
    from qlora_sft.data.documents import sizes
    from qlora_sft.data.plan import plan_data
    from qlora_sft.data.sources import read_sources
    from qlora_sft.data.template import choose_chat_format

    words = tokenizer()
    chat_format = choose_chat_format(words)
    data = DataConfig(train=[TrainSourceConfig(str(file))], max_length=CAPACITY)
    config = Config(ModelConfig("none is loaded"), data, output="none is written")
    times, reads = [], []
    with tempfile.TemporaryDirectory() as empty:
        os.environ["QLORA_SFT_CACHE"] = empty
        for _ in range(2):
            started = time.perf_counter()
            sources = read_sources(data.train, seed=0)
            reads.append(time.perf_counter() - started)
            prepared, _, bins = plan_data(config, sources, [], words, chat_format, lambda _: None)
            times.append(time.perf_counter() - started)
        of_each = sizes(prepared.all_documents)
    return {
        "seconds": times[0], "read": reads[0], "second_start": times[1],
        "tokens": sum(of_each.tokens), "supervised": sum(of_each.supervised), "rows": len(bins),
    }  # fmt: skip


def trl(file: Path) -> dict[str, Any]:
    """`SFTTrainer` with assistant_only_loss and bfd packing."""
    from transformers import LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    words = tokenizer()
    model = LlamaForCausalLM(tiny(len(words)))
    prepare = Stopwatch(SFTTrainer, "_prepare_dataset")
    dataset, read = as_messages(file)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder, max_length=CAPACITY, packing=True, assistant_only_loss=True, use_cpu=True, report_to=[]
        )
        trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=words)
    return {"seconds": read + prepare.seconds, "read": read, **counted(trainer.train_dataset)}


def unsloth(file: Path) -> dict[str, Any]:
    """Unsloth's patched `SFTTrainer` on rendered text, then its search for the markers of the two roles."""
    from unsloth import FastLanguageModel  # first: it patches the imports below
    from unsloth.chat_templates import train_on_responses_only

    # isort: split
    from transformers import LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    words = tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(tiny(len(words))).save_pretrained(folder)
        words.save_pretrained(folder)
        model, words = FastLanguageModel.from_pretrained(folder, max_seq_length=CAPACITY, load_in_4bit=False)
        prepare = Stopwatch(SFTTrainer, "_prepare_dataset")
        dataset, read = as_messages(file)
        started = time.perf_counter()
        dataset = dataset.map(
            lambda rows: {"text": [words.apply_chat_template(row, tokenize=False) for row in rows["messages"]]},
            batched=True,
            remove_columns=["messages"],
        )
        rendering = time.perf_counter() - started
        arguments = SFTConfig(
            output_dir=folder, max_length=CAPACITY, packing=True, dataset_text_field="text", use_cpu=True, report_to=[]
        )
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=words)
        started = time.perf_counter()
        trainer = train_on_responses_only(trainer, "<|im_start|>user\n", "<|im_start|>assistant\n")
        masking = time.perf_counter() - started
    seconds = read + rendering + prepare.seconds + masking
    return {"seconds": seconds, "read": read, **counted(trainer.train_dataset)}


class Stopwatch:
    """Times the calls of one method of a class."""

    def __init__(self, owner: type, name: str):
        self.seconds = 0.0
        original = getattr(owner, name)

        def timed(*args: Any, **more: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **more)
            finally:
                self.seconds += time.perf_counter() - started

        setattr(owner, name, timed)


def as_messages(file: Path) -> tuple[Any, float]:
    """GSM8K's questions and answers as messages, and how long it took."""
    from datasets import load_dataset

    started = time.perf_counter()
    rows = load_dataset("json", data_files=str(file), split="train")
    dataset = rows.map(
        lambda batch: {
            "messages": [
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                for question, answer in zip(batch["question"], batch["answer"], strict=True)
            ]
        },
        batched=True,
        remove_columns=rows.column_names,
    )
    return dataset, time.perf_counter() - started


def counted(dataset: Any) -> dict[str, int]:
    labels = dataset["labels"]
    return {
        "tokens": sum(map(len, labels)),
        "supervised": sum(label != -100 for row in labels for label in row),
        "rows": len(labels),
    }


def tiny(words: int) -> Any:
    """A model to make a trainer of; nothing is computed with it."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CAPACITY,
    )


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        figures = {"ours": ours, "trl": trl, "unsloth": unsloth}[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps(figures))
