"""TRL's YAML, and scripts that use TRL, PEFT or Unsloth, become recipes that load; what has no counterpart is named."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from test_convert import converted

from qlora_sft.config import Config, load_config
from qlora_sft.convert.recipe import convert
from qlora_sft.errors import ConfigError
from qlora_sft.yaml_text import read_yaml, write_yaml

TRL = """
model_name_or_path: owner/Base-8B
dataset_name: owner/chats
dataset_config: all
learning_rate: 2.0e-4
num_train_epochs: 2
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
assistant_only_loss: true
max_length: 4096
eos_token: <|im_end|>
use_peft: true
load_in_4bit: true
lora_r: 32
lora_target_modules: all-linear
lr_scheduler_type: cosine
warmup_ratio: 0.03
report_to: wandb
output_dir: out/base
"""
UNSLOTH = """
from unsloth import FastLanguageModel
from unsloth.chat_templates import get_chat_template, train_on_responses_only
!pip install unsloth
max_seq_length = 2048
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="owner/Base-8B", max_seq_length=max_seq_length, dtype=None, load_in_4bit=True,
)
model = FastLanguageModel.get_peft_model(
    model, r=16, target_modules=["q_proj", "v_proj"], lora_alpha=32, lora_dropout=0, bias="none",
    use_gradient_checkpointing="unsloth", random_state=3407, use_rslora=False, loftq_config=None,
)
tokenizer = get_chat_template(tokenizer, chat_template="llama-3.1")
dataset = load_dataset("owner/chats", split="train")
later = load_dataset("json", data_files="apart.jsonl", split="test")
trainer = SFTTrainer(
    model=model, tokenizer=tokenizer, train_dataset=dataset, packing=False,
    args=SFTConfig(
        per_device_train_batch_size=2, gradient_accumulation_steps=2 * 2, max_steps=60, learning_rate=2e-4,
        optim="adamw_8bit", weight_decay=0.001, lr_scheduler_type="linear", seed=3407, output_dir="outputs",
        warmup_steps=5, report_to="none", save_steps=choose(),
    ),
)
trainer = train_on_responses_only(trainer, instruction_part="<|user|>", response_part="<|assistant|>")
raise SystemExit("this must never run")
"""
PEFT = """
bnb = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
peft = LoraConfig(r=64, lora_alpha=16, lora_dropout=0.1, task_type="CAUSAL_LM")
tokenizer = AutoTokenizer.from_pretrained("owner/Other")
args = SFTConfig(output_dir="out", max_length=1024, packing=True, completion_only_loss=False)
trainer = SFTTrainer("unused" and model, args=args, peft_config=peft, train_dataset=load_dataset(path, name="b"))
trainer = SFTTrainer(model="owner/Base-1B", args=args)
"""


def script(code: str, folder: Path) -> tuple[Config, str]:
    file = folder / "theirs.py"
    file.write_text(code)
    recipe = convert(str(file))
    copy = folder / "ours.yaml"
    copy.write_text(recipe.text)
    return load_config(copy), "\n".join(recipe.notes)


def named(notes: str) -> list[str]:
    return sorted(note.split(":")[0] for note in notes.splitlines())


def test_trl(tmp_path: Path) -> None:
    config, notes = converted(TRL, tmp_path)
    (chats,) = config.data.train
    assert (config.model.path, config.model.load_in_4bit, chats.path) == ("owner/Base-8B", True, "owner/chats:all")
    assert (config.data.max_length, config.data.packing, chats.supervise) == (4096, "bfd", "assistant")
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (32, 32, 0.05)
    assert config.lora.target_modules == "all-linear"
    t = config.training
    assert (t.batch_size, t.gradient_accumulation, t.epochs, t.learning_rate) == (2, 8, 2, 2e-4)
    assert (t.warmup_ratio, t.save_steps, config.seed, config.output) == (0.03, 500, 42, "out/base")
    assert (t.schedule, t.report_to) == ("cosine", ["wandb"])
    assert (named(notes), config.model.stop_tokens) == ([], ["<|im_end|>"])


def test_unsloth_in_python(tmp_path: Path) -> None:
    config, notes = script(UNSLOTH, tmp_path)
    assert (config.model.path, config.model.load_in_4bit, config.model.chat_template) == (
        "owner/Base-8B",
        True,
        "llama3",
    )
    (chats,), (apart,) = config.data.train, config.data.held_out
    assert (chats.path, chats.supervise, apart.path, apart.split) == ("owner/chats", "assistant", "apart.jsonl", "test")
    assert (config.data.max_length, config.data.packing, config.seed) == (2048, "none", 3407)
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (16, 32, 0)
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    t = config.training
    assert (t.batch_size, t.gradient_accumulation, t.max_steps, t.optimizer) == (2, 4, 60, "adamw_8bit")
    assert (t.warmup_steps, t.schedule, t.report_to, config.lora.rslora) == (5, "linear", [], False)
    assert "save_steps: choose(): is computed in line 21; set it by hand" in notes
    assert named(notes) == ["save_steps"]


def test_peft_in_python_with_its_own_defaults(tmp_path: Path) -> None:
    config, notes = script(PEFT, tmp_path)
    assert (config.model.path, config.model.load_in_4bit) == ("owner/Base-1B", True)
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (64, 16, 0.1)
    assert (config.data.packing, config.data.train[0].supervise) == ("bfd", "all")
    assert "lora_target_modules: not given: PEFT would adapt" in notes


RELOADED = """
model, tokenizer = FastLanguageModel.from_pretrained(model_name="owner/Base-8B", max_seq_length=2048)
trainer = SFTTrainer(model=model, args=SFTConfig(max_steps=60))
if False:
    model, tokenizer = FastLanguageModel.from_pretrained("lora_model", max_seq_length=512, load_in_4bit=False)
"""


@pytest.mark.parametrize("first", ['"owner/Base-8B"', "arguments.model"])
def test_the_model_that_is_trained_counts_and_not_what_is_loaded_again_later(first: str, tmp_path: Path) -> None:
    code = RELOADED.replace('"owner/Base-8B"', first) + ('SFTTrainer("owner/Base-8B", model="owner/Base-8B")')
    config, _ = script(code, tmp_path)
    assert (config.model.path, config.model.load_in_4bit) == ("owner/Base-8B", True)
    assert config.data.max_length == 2048


@pytest.mark.parametrize(
    ("asked", "train", "held_out"),
    [("", ["a.jsonl", "c.jsonl"], ["b.jsonl"]), (", split='train'", ["a.jsonl", "c.jsonl"], [])],
)
def test_the_files_of_a_test_split_are_not_trained_on(
    asked: str, train: list[str], held_out: list[str], tmp_path: Path
) -> None:
    files = "{'train': ['a.jsonl', 'c.jsonl'], 'test': 'b.jsonl'}"
    config, _ = script(
        f"load_dataset('json', data_files={files}{asked})\n{PEFT}".replace('load_dataset(path, name="b")', "d"),
        tmp_path,
    )
    assert [each.path for each in config.data.train] == train
    assert isinstance(config.data.held_out, list)
    assert [(each.path, each.split) for each in config.data.held_out] == [(path, None) for path in held_out]


@pytest.mark.parametrize(
    ("size", "held_out", "note"),
    [
        ("test_size=0.1", "10%", ""),
        ("", "25%", ""),
        ("test_size=50", [], "test_size: 50:"),
        ("test_size=n", [], "by hand"),
    ],
)
def test_what_a_script_splits_off_is_not_trained_on(size: str, held_out: object, note: str, tmp_path: Path) -> None:
    config, notes = script(
        f"split = load_dataset('owner/a').train_test_split({size})\nSFTConfig(model_name_or_path='owner/b')", tmp_path
    )
    assert config.data.held_out == held_out
    assert note in notes


@pytest.mark.parametrize(
    ("assistant", "completion", "supervise"),
    [("true", "false", "assistant"), ("false", "true", "assistant"), ("false", "false", "all")],
)
def test_a_mask_that_one_switch_asks_for_is_kept(
    assistant: str, completion: str, supervise: str, tmp_path: Path
) -> None:
    switches = f"assistant_only_loss: {assistant}\ncompletion_only_loss: {completion}\n"
    config, _ = converted(TRL.replace("assistant_only_loss: true\n", switches), tmp_path)
    assert config.data.train[0].supervise == supervise


@pytest.mark.parametrize("warmup", ["warmup_ratio: 0.03", "warmup_steps: 20"])
@pytest.mark.parametrize(
    "theirs",
    [
        "model_name_or_path: a/b\ndataset_name: a/c\nlr_scheduler_type: constant",
        "model_name_or_path: a/b\nstage: sft\ndataset: c\nlr_scheduler_type: constant",
        "base_model: a/b\nadapter: lora\ndatasets: [{path: a/c, type: chat_template}]\nlr_scheduler: constant",
    ],
    ids=["TRL", "LLaMA-Factory", "axolotl"],
)
def test_a_constant_rate_of_theirs_has_no_warm_up(theirs: str, warmup: str, tmp_path: Path) -> None:
    config, _ = converted(f"{theirs}\n{warmup}\n", tmp_path)
    assert (config.training.schedule, config.training.warmup_ratio, config.training.warmup_steps) == (
        "constant",
        0.0,
        None,
    )


@pytest.mark.parametrize(
    ("changed", "check"),
    [
        ("assistant_only_loss: false", lambda c, n: c.data.train[0].supervise == "all"),
        (
            "assistant_only_loss:",
            lambda c, n: c.data.train[0].supervise == "assistant" and "TRL trains every token" in n,
        ),
        ("use_peft: false", lambda c, n: "use_peft: False: only LoRA is trained" in n),
        ("load_in_4bit: false", lambda c, n: not c.model.load_in_4bit),
        ("packing_strategy: wrapped", lambda c, n: "packing_strategy: wrapped" in n),
        (
            "report_to: [tensorboard, comet_ml]",
            lambda c, n: (
                c.training.report_to == ["tensorboard"] and "report_to: comet_ml: training.report_to has no" in n
            ),
        ),
        ("use_dora: true", lambda c, n: c.lora.dora),
        ("lora_modules_to_save: [lm_head]", lambda c, n: "lora_modules_to_save: ['lm_head']" in n),
        ("max_steps: -1", lambda c, n: c.training.max_steps is None),
        ("chat_template_path: owner/Chat-8B", lambda c, n: c.model.chat_template is None and "of another model" in n),
    ],
)
def test_what_changes_training_is_taken_over_or_noted(changed: str, check: object, tmp_path: Path) -> None:
    key = changed.split(":")[0]
    text = "\n".join(line for line in TRL.splitlines() if not line.startswith(f"{key}:"))
    assert callable(check)
    config, notes = converted(f"{text}\n{changed}\n", tmp_path)
    assert check(config, notes)


WATCHED = """
model_name_or_path: owner/Base-8B
dataset_name: owner/chats
load_in_4bit: true
eval_strategy: steps
eval_steps: 20
"""


@pytest.mark.parametrize(
    ("more", "kept", "notes"),
    [
        ("", (20, "last", None), []),
        ("load_best_model_at_end: true\nearly_stopping_patience: 3", (20, "best", 3), []),
        ("load_best_model_at_end: true\nmetric_for_best_model: eval_loss", (20, "best", None), []),
        ("metric_for_best_model: accuracy", (20, "last", None), ["metric_for_best_model: accuracy: the held-out loss"]),
        ("eval_strategy: epoch\nearly_stopping_patience: 3", (None, "last", None),
         ["eval_strategy: epoch: evaluation.every_steps counts", "early_stopping_patience: 3: needs evaluation.every"]),
        ("eval_steps: 0.1", (None, "last", None), ["eval_steps: 0.1: evaluation.every_steps counts"]),
        ("eval_steps:\nlogging_steps: 7", (7, "last", None), []),
        ("eval_steps:", (10, "last", None), []),
        ("eval_steps: 0", (10, "last", None), []),
    ],
)  # fmt: skip
def test_evaluation_while_training_is_taken_over_or_noted(
    more: str, kept: tuple[int | None, str, int | None], notes: list[str], tmp_path: Path
) -> None:
    """Theirs keeps the last step unless it is told otherwise; ours keeps the best of those that were measured."""
    keys = [line.split(":")[0] for line in more.splitlines()]
    text = "\n".join(line for line in WATCHED.splitlines() if line.split(":")[0] not in keys)
    config, said = converted(f"{text}\n{more}\n", tmp_path)
    every, keep = config.evaluation.every_steps, config.training.keep
    keep = ("best" if every else "last") if keep == "auto" else keep
    assert (every, keep, config.training.patience) == kept
    assert isinstance(config.data.held_out, list)
    assert [each.split for each in config.data.held_out] == ["test"]
    for note in notes:
        assert note in said


@pytest.mark.parametrize(
    ("strategy", "held_out"),
    [("eval_strategy: no", False), ("eval_strategy: false", False), ("eval_strategy: 'no'", False), ("", False),
     ("evaluation_strategy: steps", True)],
)  # fmt: skip
def test_a_split_for_tests_is_held_out_only_if_it_is_measured(strategy: str, held_out: bool, tmp_path: Path) -> None:
    config, _ = converted(WATCHED.replace("eval_strategy: steps\neval_steps: 20", strategy), tmp_path)
    assert bool(config.data.held_out) == held_out
    assert config.evaluation.every_steps == (10 if held_out else None)


def test_a_script_that_stops_early_does_so_here(tmp_path: Path) -> None:
    code = """
split = load_dataset("owner/a").train_test_split(0.1)
args = SFTConfig(model_name_or_path="owner/b", eval_strategy="steps", eval_steps=10, load_best_model_at_end=True)
trainer = SFTTrainer(args=args, callbacks=[EarlyStoppingCallback(early_stopping_patience=4)])
"""
    config, _ = script(code, tmp_path)
    assert (config.data.held_out, config.evaluation.every_steps, config.training.patience) == ("10%", 10, 4)


@pytest.mark.parametrize(
    ("call", "note"),
    [
        ("LoraConfig(bias='all')", "bias: all: biases are not trained here"),
        ("LoraConfig(bias='lora_only')", "bias: lora_only: biases are not trained here"),
        ("LoraConfig(bias='none')", ""),
        ("BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='fp4')", "quant_type: fp4: 4 bits are NF4 here"),
        ("BitsAndBytesConfig(load_in_4bit=True)", "bnb_4bit_quant_type: fp4: 4 bits are NF4 here"),
        ("BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')", ""),
        ("BitsAndBytesConfig(load_in_8bit=True)", ""),
    ],
)
def test_what_is_trained_or_loaded_otherwise_is_named(call: str, note: str, tmp_path: Path) -> None:
    _, notes = script(f"SFTConfig(model_name_or_path='owner/b')\n{call}\n", tmp_path)
    assert note in notes
    assert bool(note) == ("bias" in notes or "fp4" in notes)


def test_a_share_of_the_mixture_is_a_weight(tmp_path: Path) -> None:
    text = TRL.replace("dataset_name: owner/chats\ndataset_config: all\n", "")
    text += "datasets:\n  - {path: owner/a, fraction: 0.7}\n  - {path: json, data_files: b.jsonl, fraction: 0.3}\n"
    config, _ = converted(text, tmp_path)
    assert config.data.mixture == "explicit"
    assert [(each.path, each.weight) for each in config.data.train] == [("owner/a", 0.7), ("b.jsonl", 0.3)]


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("x = (1,\n", "theirs.py: line 1: this is no Python"),
        ("print('hello')\n", "no call of SFTConfig, LoraConfig"),
        ("GRPOConfig(beta=0.1)\nSFTConfig(beta=0.1)", "beta: there is no preference training"),
        ("SFTConfig(max_length=-5)\n", "data.max_length must be"),
    ],
)
def test_a_script_that_cannot_be_read_is_refused(code: str, fault: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=fault):
        script(code, tmp_path)


def test_odd_values_are_converted_or_refused(tmp_path: Path) -> None:
    tree = read_yaml(TRL)
    assert isinstance(tree, dict)
    file = tmp_path / "theirs.yaml"
    for key in [*tree, "datasets", "packing_strategy", "completion_only_loss", "max_steps"]:
        for odd in ([1, [2]], {"a": {"b": 1}}, float("inf"), "a,b", 10**400, [{"path": ["x"]}]):
            file.write_text(write_yaml({**tree, key: odd}))
            with suppress(ConfigError):
                assert convert(str(file)).text
