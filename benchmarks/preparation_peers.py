"""Times one preparation of GSM8K, from rows on disk to labelled and packed rows, by one of the peers or by us.

Run by preparation.py in a process of its own, because importing Unsloth patches the others. Importing, the tokenizer
and the model are not timed, only what has to be done for the data. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, ParamSpec, TypedDict, TypeVar

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import LlamaConfig, PreTrainedTokenizerBase

CAPACITY = 2048
PACKAGE = "qwen2_5"  # its template adds nothing to an answer, so that masks can be compared


class Figures(TypedDict):
    """Holds the times, in seconds, and the counts of one preparation."""

    seconds: float
    read: float
    second_start: NotRequired[float]
    tokens: int
    supervised: int
    rows: int


class Counts(TypedDict):
    """Holds the counts of a prepared data set."""

    tokens: int
    supervised: int
    rows: int


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Loads Qwen2.5's tokenizer, as the tests do, with the template for which TRL ships a training version."""
    import trl
    from families import load

    result = load(PACKAGE)
    result.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    result.pad_token = "<|endoftext|>"
    return result


def ours(file: Path) -> Figures:
    """Prepares the data as a run does, cache included, and once more with what the first time left there."""
    from qlora_sft.config import Config, DataConfig, ModelConfig
    from qlora_sft.config_data import TrainSourceConfig
    from qlora_sft.data.documents import sizes
    from qlora_sft.data.plan import plan_data
    from qlora_sft.data.sources import read_sources
    from qlora_sft.data.template import choose_chat_format

    tokenizer = load_tokenizer()
    chat_format = choose_chat_format(tokenizer)
    data = DataConfig(train=[TrainSourceConfig(str(file))], max_length=CAPACITY)
    config = Config(ModelConfig("none is loaded"), data, output="none is written")
    times, reads = [], []
    with tempfile.TemporaryDirectory() as empty:
        os.environ["QLORA_SFT_CACHE"] = empty
        for _ in range(2):
            started = time.perf_counter()
            sources = read_sources(data.train, seed=0)
            reads.append(time.perf_counter() - started)
            prepared, _, packed = plan_data(config, sources, [], tokenizer, chat_format, lambda _: None)
            times.append(time.perf_counter() - started)
        of_each = sizes(prepared.all_documents)
    return {
        "seconds": times[0], "read": reads[0], "second_start": times[1],
        "tokens": sum(of_each.tokens), "supervised": sum(of_each.supervised), "rows": len(packed.sequences),
    }  # fmt: skip


def trl(file: Path) -> Figures:
    """Prepares the data with `SFTTrainer`, assistant_only_loss and bfd packing."""
    from transformers import LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer()
    model = LlamaForCausalLM(tiny(len(tokenizer)))
    prepare = Stopwatch(SFTTrainer, "_prepare_dataset")
    dataset, read = as_messages(file)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder, max_length=CAPACITY, packing=True, assistant_only_loss=True, use_cpu=True, report_to=[]
        )
        trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
    return {"seconds": read + prepare.seconds, "read": read, **counted(trainer.train_dataset)}


def unsloth(file: Path) -> Figures:
    """Prepares the data with Unsloth's patched `SFTTrainer` on rendered text, then its search for the role markers."""
    from unsloth import FastLanguageModel  # first: it patches the imports below
    from unsloth.chat_templates import train_on_responses_only

    # isort: split
    from transformers import LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(tiny(len(tokenizer))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=CAPACITY, load_in_4bit=False)
        prepare = Stopwatch(SFTTrainer, "_prepare_dataset")
        dataset, read = as_messages(file)
        started = time.perf_counter()
        dataset = dataset.map(
            lambda rows: {"text": [tokenizer.apply_chat_template(row, tokenize=False) for row in rows["messages"]]},
            batched=True,
            remove_columns=["messages"],
        )
        rendering = time.perf_counter() - started
        arguments = SFTConfig(
            output_dir=folder, max_length=CAPACITY, packing=True, dataset_text_field="text", use_cpu=True, report_to=[]
        )
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
        started = time.perf_counter()
        trainer = train_on_responses_only(trainer, "<|im_start|>user\n", "<|im_start|>assistant\n")
        masking = time.perf_counter() - started
    seconds = read + rendering + prepare.seconds + masking
    return {"seconds": seconds, "read": read, **counted(trainer.train_dataset)}


Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


class Stopwatch:
    """Times the calls of one method of a class."""

    def __init__(self, owner: type, name: str):
        self.seconds = 0.0
        original: Callable[Arguments, Returned] = getattr(owner, name)

        def timed(*args: Arguments.args, **more: Arguments.kwargs) -> Returned:
            started = time.perf_counter()
            try:
                return original(*args, **more)
            finally:
                self.seconds += time.perf_counter() - started

        setattr(owner, name, timed)


def as_messages(file: Path) -> tuple[Dataset, float]:
    """Reads GSM8K's questions and answers as messages. Returns them and the seconds that it took."""
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


def counted(dataset: Dataset) -> Counts:
    """Counts tokens, supervised tokens and rows."""
    labels = dataset["labels"]
    return {
        "tokens": sum(map(len, labels)),
        "supervised": sum(label != -100 for row in labels for label in row),
        "rows": len(labels),
    }


def tiny(vocabulary: int) -> LlamaConfig:
    """Configures the model that a trainer needs. Nothing is computed with it."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
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
