"""Configurations of axolotl and LLaMA-Factory become recipes that load; what has no counterpart is named."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qlora_sft.cli import main
from qlora_sft.config import Config, load_config
from qlora_sft.convert.recipe import convert
from qlora_sft.errors import ConfigError
from qlora_sft.yaml_text import read_yaml, write_yaml

AXOLOTL = """
base_model: owner/Base-8B
load_in_4bit: true
adapter: qlora
chat_template: llama3
datasets:
  - {path: owner/chats, type: chat_template, field_messages: turns, split: train, name: all}
  - {path: owner/chats, type: chat_template, split: extra}
  - {path: json, data_files: more.jsonl, ds_type: json, type: alpaca}
test_datasets:
  - {path: apart.jsonl, type: sharegpt}
val_set_size: 0.05
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_linear: true
lora_target_modules:
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2.0
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
warmup_steps: 10
bf16: auto
flash_attention: true
deepspeed: zero1.json
wandb_project:
output_dir: ./outputs/out
"""
FACTORY = """
model_name_or_path: owner/Base-8B
stage: sft
do_train: true
finetuning_type: lora
quantization_bit: 4
lora_target: q_proj,v_proj
template: qwen3
dataset: ours, absent
cutoff_len: 1024
max_samples: 100
mask_history: true
num_train_epochs: 0.5
lr_scheduler_type: linear
deepspeed: z3.json
output_dir: saves/out
"""


def converted(text: str, folder: Path) -> tuple[Config, str]:
    file = folder / "theirs.yaml"
    file.write_text(text)
    recipe = convert(str(file))
    copy = folder / "ours.yaml"
    copy.write_text(recipe.text)
    assert all(f"# not here: {note}" in recipe.text for note in recipe.notes)
    return load_config(copy), "\n".join(recipe.notes)


def test_axolotl(tmp_path: Path) -> None:
    config, notes = converted(AXOLOTL, tmp_path)
    assert (config.model.path, config.model.load_in_4bit, config.model.chat_template) == (
        "owner/Base-8B",
        True,
        "llama3",
    )
    turns, extra, more = config.data.train
    assert (turns.path, turns.split, turns.columns) == ("owner/chats:all", "train", {"messages": "turns"})
    assert (extra.path, extra.split, more.path, more.format) == ("owner/chats", "extra", "more.jsonl", "alpaca")
    assert [each.path for each in config.data.held_out] == ["apart.jsonl"]
    assert (config.data.max_length, config.data.packing) == (4096, "bfd")
    assert (config.lora.r, config.lora.alpha, config.lora.target_modules) == (32, 16, "all-linear")
    t = config.training
    assert (t.batch_size, t.gradient_accumulation, t.epochs, t.optimizer) == (2, 4, 2, "adamw_8bit")
    assert (t.learning_rate, config.output) == (2e-4, "./outputs/out")
    named = [note.split(":")[0] for note in notes.splitlines()]
    assert sorted(named) == ["deepspeed", "type", "val_set_size"]
    assert (t.schedule, t.warmup_steps) == ("cosine", 10)


def test_llama_factory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    info: dict[str, Any] = {"ours": {"file_name": "ours.json", "columns": {"prompt": "question", "response": "output"}}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    config, notes = converted(FACTORY, tmp_path)
    ours, absent = config.data.train
    assert (ours.path, ours.columns) == (str(tmp_path / "data" / "ours.json"), {"instruction": "question"})
    assert (absent.path, ours.max_rows, absent.max_rows, ours.supervise) == ("absent", 100, 100, "last")
    assert (config.model.load_in_4bit, config.model.chat_template) == (True, "qwen3")
    assert (config.lora.r, config.lora.alpha, config.lora.target_modules) == (8, 16, ["q_proj", "v_proj"])
    assert (config.data.packing, config.training.epochs, config.training.learning_rate) == ("none", 0.5, 5e-5)
    named = [note.split(":")[0] for note in notes.splitlines()]
    assert sorted(named) == ["dataset", "deepspeed"]


@pytest.mark.parametrize(
    ("text", "changed", "check"),
    [
        (AXOLOTL, "trust_remote_code: true\nrevision_of_model: abc",
         lambda c: (c.model.trust_remote_code, c.model.revision) == (True, "abc")),
        (FACTORY, "trust_remote_code: true\nmodel_revision: abc",
         lambda c: (c.model.trust_remote_code, c.model.revision) == (True, "abc")),
        (AXOLOTL.replace("output_dir: ./outputs/out", ""), "", lambda c: c.output == "runs/theirs"),
        (FACTORY.replace("output_dir: saves/out", ""), "", lambda c: c.output == "runs/theirs"),
        (AXOLOTL, "train_on_inputs: true", lambda c: c.data.train[0].supervise == "all"),
        (AXOLOTL.replace("warmup_steps: 10\n", ""), "", lambda c: c.training.warmup_ratio == 0.03),
        (AXOLOTL, "warmup_ratio: 0.2", lambda c: (c.training.warmup_steps, c.training.warmup_ratio) == (10, 0.1)),
        (AXOLOTL.replace("warmup_steps: 10", "warmup_steps: 0"), "", lambda c: c.training.warmup_ratio == 0.0),
        (AXOLOTL, "eot_tokens: ['<end>']\nspecial_tokens: {eos_token: <stop>, pad_token: <pad>}\ntokens: [<|a|>]",
         lambda c: (c.model.stop_tokens, c.model.new_tokens) == (["<end>", "<stop>"], ["<|a|>"])),
        (AXOLOTL.replace("field_messages: turns", "field_messages: turns, revision: abc"), "",
         lambda c: [each.revision for each in c.data.train] == ["abc", None, None]),
        (AXOLOTL.replace("adamw_bnb_8bit", "adamw_torch_8bit"), "", lambda c: c.training.optimizer == "adamw_8bit"),
        (AXOLOTL.replace("adamw_bnb_8bit", "paged_adamw_32bit"), "", lambda c: c.training.optimizer == "adamw_torch"),
        (FACTORY, "enable_thinking: false", lambda c: {each.thinking for each in c.data.train} == {"off"}),
        (FACTORY.replace("linear", "cosine_with_min_lr"), "", lambda c: c.training.schedule == "cosine"),
        (AXOLOTL, "dataset_exact_deduplication: true", lambda c: c.data.deduplicate == "exact"),
        (AXOLOTL.replace("sample_packing: true", ""), "seed: 3", lambda c: (c.data.packing, c.seed) == ("none", 3)),
        (AXOLOTL.replace("lora_target_linear: true", ""), "lora_target_modules: [q_proj]",
         lambda c: c.lora.target_modules == ["q_proj"]),
        (AXOLOTL, "use_tensorboard: true", lambda c: c.training.report_to == ["tensorboard"]),
        (AXOLOTL, "mlflow_experiment_name: a", lambda c: c.training.report_to == ["mlflow"]),
        (FACTORY, "report_to: wandb", lambda c: c.training.report_to == ["wandb"]),
        (FACTORY, "report_to: none", lambda c: c.training.report_to == []),
        (AXOLOTL, "eval_steps: 20\nsave_steps: 40\nearly_stopping_patience: 2",
         lambda c: (c.evaluation.every_steps, c.training.patience, c.training.keep) == (20, 2, "auto")),
        (AXOLOTL, "eval_steps: 20\nsave_steps: 40\nload_best_model_at_end: false", lambda c: c.training.keep == "last"),
        (AXOLOTL, "eval_steps: 20\nsave_steps: 30", lambda c: c.training.keep == "last"),
        (AXOLOTL, "eval_steps: 20\nload_best_model_at_end: true", lambda c: c.training.keep == "last"),
        (AXOLOTL, "evals_per_epoch: 4", lambda c: c.evaluation.every_steps is None),
        (FACTORY, "val_size: 0.1\neval_strategy: steps\neval_steps: 9\nearly_stopping_steps: 5",
         lambda c: (c.evaluation.every_steps, c.training.patience, c.training.keep) == (9, 5, "last")),
        (FACTORY, "val_size: 0.1\neval_strategy: steps", lambda c: c.evaluation.every_steps == 500),
        (FACTORY, "train_on_prompt: true", lambda c: c.data.train[0].supervise == "all"),
        (FACTORY, "packing: true", lambda c: c.data.packing == "bfd"),
        (FACTORY, "mix_strategy: interleave_under\ninterleave_probs: 0.7,0.3",
         lambda c: (c.data.mixture, [each.weight for each in c.data.train]) == ("explicit", [0.7, 0.3])),
        (FACTORY.replace("stage: sft", "stage: pt"), "", lambda c: c.data.train[0].format == "text"),
        (FACTORY.replace("quantization_bit: 4", ""), "", lambda c: c.model.load_in_4bit is False),
    ],
)  # fmt: skip
def test_what_changes_training_is_taken_over(text: str, changed: str, check: Any, tmp_path: Path) -> None:
    if changed.split(":")[0] == "lora_target_modules":
        text = text.replace("lora_target_modules:\n", "")
    config, _ = converted(f"{text}\n{changed}\n", tmp_path)
    assert check(config)


def test_what_is_so_here_too_is_not_noted_and_what_is_elsewhere_is_named(tmp_path: Path) -> None:
    alike = "field_messages: turns, roles_to_train: [assistant], train_on_eos: turn, message_field_training: train"
    more = (
        "plugins: [axolotl.integrations.liger.LigerPlugin, a.cut_cross_entropy.CutCrossEntropyPlugin]\n"
        "liger_rope: true\nactivation_offloading: true\nspecial_tokens: {pad_token: a}\nsave_safetensors: false\n"
    )
    theirs = AXOLOTL.replace("field_messages: turns", alike)
    assert converted(theirs + more, tmp_path)[1] == converted(AXOLOTL, tmp_path)[1]
    other = AXOLOTL.replace(
        "field_messages: turns", "field_messages: turns, roles_to_train: [user], train_on_eos: last"
    )
    _, notes = converted(
        f"{other}plugins: [spectrum]\nevals_per_epoch: 4\nshuffle_merged_datasets: false\n"
        "special_tokens: {bos_token: a}\nhub_model_id: me/mine\n",
        tmp_path,
    )
    assert "roles_to_train: ['user']: has no counterpart" in notes
    assert "train_on_eos: last: has no counterpart" in notes
    assert "plugins: ['spectrum']: has no counterpart" in notes
    assert "evals_per_epoch: 4: evaluation.every_steps counts optimizer steps" in notes
    assert "shuffle_merged_datasets: False: has no counterpart" in notes
    assert "special_tokens.bos_token: a: has no counterpart" in notes
    assert "hub_model_id: me/mine: qlora-sft push uploads a finished run" in notes


def test_what_dataset_info_says_of_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    ours: dict[str, Any] = {"hf_hub_url": "owner/ours", "revision": "abc", "num_samples": 30, "split": "extra"}
    ours |= {"formatting": "sharegpt", "tags": {"role_tag": "role", "content_tag": "said", "user_tag": "user"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"ours": ours}))
    config, notes = converted(FACTORY, tmp_path)
    (first, absent) = config.data.train
    assert (first.path, first.revision, first.split, first.max_rows) == ("owner/ours", "abc", "extra", 30)
    assert "ours.tags.content_tag: said: is not known here; rename it in the rows" in notes
    assert "dataset: absent: a name of dataset_info.json, which does not have it" in notes
    assert ("role_tag" in notes, "user_tag" in notes, absent.max_rows) == (False, False, 100)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (AXOLOTL + "rl: dpo\n", "rl: dpo: there is no preference training"),
        (FACTORY.replace("stage: sft", "stage: dpo"), "stage: dpo: there is no preference training"),
        ("model: {path: demo}\n", "neither of axolotl"),
        ("- a\n", "expected keys and values"),
        (
            AXOLOTL.replace("learning_rate: 2e-4", "learning_rate: 20"),
            "converted: training.learning_rate must be at most",
        ),
        (AXOLOTL.replace("lora_r: 32", "lora_r: many"), "converted: lora.r must be a whole number"),
        ("base_model: a\ndatasets: x\n", "datasets: expected a list"),
        (AXOLOTL + "3: 4\n", r"theirs\.yaml: 3: a key must be a text"),
        (AXOLOTL + "peft: [{true: 4}]\n", "True: a key must be a text"),
        (AXOLOTL.replace("num_epochs: 2.0", "num_epochs: .inf"), "num_epochs: expected a finite number, got inf"),
        (AXOLOTL.replace("num_epochs: 2.0", "num_epochs: .nan"), "num_epochs: expected a finite number, got nan"),
        (AXOLOTL.replace("chat_template: llama3", "chat_template: [a]"), "chat_template: expected a text"),
        (AXOLOTL.replace("adamw_bnb_8bit", "{a: 1}"), "optimizer: expected a text"),
        (FACTORY + "lora_rank: .inf\n", "lora_rank: expected a finite number"),
        (FACTORY + "mix_strategy: interleave_under\ninterleave_probs: a,b\n", "interleave_probs: expected numbers"),
        (FACTORY + "mix_strategy: interleave_under\ninterleave_probs: 0.5\n", "interleave_probs: 1 numbers for 2"),
    ],
)
def test_what_cannot_be_converted_is_said(text: str, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=fault):
        convert(str(file))


def test_the_verb_prints_or_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    file.write_text(AXOLOTL)
    assert main(["convert", str(file)]) == 0
    printed = capsys.readouterr()
    assert "not in the recipe: deepspeed: zero1.json: has no counterpart" in printed.err
    assert main(["convert", str(file), "--out", str(out)]) == 0
    assert out.read_text() == printed.out
    assert main(["convert", str(file), "--out", str(out)]) == 2
    assert "exists; name another file" in capsys.readouterr().err


def test_a_format_of_ones_own_gives_the_columns(tmp_path: Path) -> None:
    kind = "{field_instruction: q, field_output: a, field_system: rules, format: '[INST] {instruction}'}"
    config, notes = converted(AXOLOTL.replace("type: alpaca", f"type: {kind}"), tmp_path)
    more = config.data.train[2]
    assert (more.format, more.columns) == ("alpaca", {"instruction": "q", "output": "a", "system": "rules"})
    assert "type.format: '[INST] {instruction}': the chat template writes the turns here" in notes


def test_every_file_is_a_source(tmp_path: Path) -> None:
    text = AXOLOTL.replace("data_files: more.jsonl", "data_files: [a/more.jsonl, b/more.jsonl]")
    config, _ = converted(text, tmp_path)
    assert [each.path for each in config.data.train[2:]] == ["a/more.jsonl", "b/more.jsonl"]
    assert len({each.name for each in config.data.train[2:]}) == 2
    _, notes = converted(text.replace("path: json", "path: owner/files"), tmp_path)
    assert "data_files: a/more.jsonl, b/more.jsonl: files of owner/files" in notes


def test_the_schedule_that_stands_nowhere_is_theirs(tmp_path: Path) -> None:
    config, _ = converted(AXOLOTL.replace("lr_scheduler: cosine\n", ""), tmp_path)
    assert config.training.schedule == "cosine"
    config, notes = converted(AXOLOTL.replace("cosine", "rex").replace("warmup_steps: 10", "warmup_steps: 0"), tmp_path)
    assert "lr_scheduler: rex: training.schedule has no such kind" in notes
    assert (config.training.schedule, config.training.warmup_steps) == ("linear", None)


def test_forms_of_adapters(tmp_path: Path) -> None:
    theirs = (
        "peft_use_rslora: true\npeft_use_dora: true\nloraplus_lr_ratio: 16\nneftune_noise_alpha: 5\n"
        "peft_init_lora_weights: pissa\nlora_modules_to_save: [lm_head]\n"
    )
    config, notes = converted(AXOLOTL + theirs, tmp_path)
    lora = config.lora
    assert (lora.rslora, lora.dora, lora.plus_ratio, lora.init) == (True, True, 16.0, "default")
    assert config.training.neftune_alpha == 5.0
    assert "peft_init_lora_weights: pissa: takes the largest directions out of the base's weights" in notes
    assert "lora_modules_to_save: ['lm_head']: whole matrices are not trained here" in notes
    theirs = (
        "use_rslora: true\nloraplus_lr_ratio: 8\nneftune_noise_alpha: 5\nwarmup_steps: 4\npissa_init: true\n"
        "additional_target: embed_tokens\n"
    )
    config, notes = converted(FACTORY.replace("linear", "constant_with_warmup") + theirs, tmp_path)
    assert (config.lora.rslora, config.lora.plus_ratio, config.training.neftune_alpha) == (True, 8.0, 5.0)
    assert (config.training.schedule, config.training.warmup_steps) == ("constant", 4)
    assert {"pissa_init", "additional_target"} <= {note.split(":")[0] for note in notes.splitlines()}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"ours":\n', r"dataset_info\.json:2: not valid JSON"),
        (b"[1]", r"dataset_info\.json: expected an object"),
        (b'{"ours": 3}', r"dataset_info\.json: ours: expected an object"),
        (b'{"ours": {"columns": [1]}}', r"ours\.columns: expected an object"),
        (b'{"ours": {"file_name": ["a"]}}', r"ours\.file_name: expected a text"),
        (b"\xff", r"dataset_info\.json: not UTF-8"),
    ],
)
def test_a_broken_dataset_info_is_named(content: bytes, fault: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"theirs\.yaml: .*{fault}"):
        converted(FACTORY, tmp_path)


@pytest.mark.parametrize("text", [AXOLOTL, FACTORY])
def test_odd_values_are_converted_or_refused(text: str, tmp_path: Path) -> None:
    tree = read_yaml(text)
    assert isinstance(tree, dict)
    more = ("interleave_probs", "mask_history", "max_samples", "dataset_dir", "rl", "packing", "lora_rank", "template")
    file = tmp_path / "theirs.yaml"
    for key in [*tree, *more]:
        for odd in ([1, [2]], {"a": {"b": 1}}, float("inf"), "a,b", 10**400, [{"path": ["x"]}]):
            file.write_text(write_yaml({**tree, "mix_strategy": "interleave_over", key: odd}))
            with suppress(ConfigError):
                assert convert(str(file)).text
