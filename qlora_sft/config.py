"""The one schema of a run, and its strict loader: YAML plus ``key.sub=value`` into dataclasses.

Every problem is reported at once, each with its file, its key and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from qlora_sft.config_data import DataConfig as DataConfig
from qlora_sft.config_data import Require, check_data, source_name
from qlora_sft.config_data import SourceConfig as SourceConfig
from qlora_sft.errors import ConfigError
from qlora_sft.ranges import Count, CountOrNone, Gibibytes, Range
from qlora_sft.strict import apply_override, build, build_rest, did_you_mean, kind_of, range_faults
from qlora_sft.text import as_path, read_text
from qlora_sft.yaml_text import YamlFault, read_yaml, write_yaml

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class RopeScaling:
    """Positions beyond those the model was trained on, in transformers' names; see its `modeling_rope_utils`."""

    rope_type: Literal["yarn", "linear", "dynamic"]
    """``yarn`` keeps most of what the model knows; ``dynamic`` depends on the longest document of a row."""
    factor: Annotated[float, Range(1, 10_000, above=True)]
    """How many times as many positions."""
    original_max_position_embeddings: Count | None = None
    """Positions the model was trained on; default: the model's own ``max_position_embeddings``."""
    attention_factor: Annotated[float, Range(0, 100, above=True)] | None = None
    """YaRN's scale of the logits; default: ``0.1 * ln(factor) + 1``."""
    beta_fast: Annotated[float, Range(0, 10_000, above=True)] | None = None
    beta_slow: Annotated[float, Range(0, 10_000, above=True)] | None = None


@dataclass(frozen=True)
class ModelConfig:
    path: str
    """Folder or Hub id of the base model; ``demo`` is the embedded SmolLM2-135M-Instruct."""
    backend: Literal["auto", "unsloth", "transformers"] = "auto"
    """``auto`` takes Unsloth where it imports and works, else transformers + peft, and says which and why."""
    load_in_4bit: bool = True
    """NF4 with double quantisation; false loads the weights in ``dtype``."""
    head_in_4bit: bool = False
    """The output head as well: three quarters of a GiB less for a vocabulary of 128k, for a loss that is a little
    different. Only for models whose head is another matrix than the input embedding, and with a frozen vocabulary."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type. ``auto``: bfloat16 where it is the faster one, else float16 on a GPU, float32 on a CPU."""
    chat_template: str | None = None
    """A shipped template (chatml, chatml-think, gemma, llama3, mistral, phi, qwen3) or a .jinja file, in place of the
    tokenizer's own."""
    stop_tokens: list[str] = field(default_factory=list)
    """Tokens that end a turn, beside the eos token and those of the model's generation config."""
    loss: Literal["auto", "triton", "torch"] = "auto"
    """Implementation of the loss. ``auto``: Triton on an NVIDIA GPU, plain torch elsewhere; says which and why."""
    attention: Literal["auto", "varlen", "sdpa"] = "auto"
    """How a GPU attends inside documents: ``varlen`` all of them in one call of FlashAttention, ``sdpa`` in one call
    each, which is faster where they are long. ``auto`` goes by their lengths and the GPU, and says why. On a
    CPU, with capped logits or sinks, and on GPUs without FlashAttention there is one way, whatever this says."""
    rope_scaling: RopeScaling | None = None
    """Needed where ``data.max_length`` exceeds the positions of the model; the merged model and the GGUF carry it."""


@dataclass(frozen=True)
class LoraConfig:
    r: Annotated[int, Range(1, 4096)] = 16
    """Rank."""
    alpha: Annotated[int, Range(1, 65_536)] = 16
    """Scale of the update: alpha / r."""
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """``all-linear``: every linear layer of every block, and the weights of experts, but not what routes to them, and
    not the output head. A list names layers, and gate_up_proj and down_proj of experts."""
    experts: Literal["train", "frozen"] = "train"
    """Of a mixture of experts. ``frozen``: in NF4, without adapters; how much is left out is printed."""


@dataclass(frozen=True)
class TrainingConfig:
    learning_rate: Annotated[float, Range(1e-10, 1)] = 2e-4
    epochs: Annotated[int, Range(1, 10_000)] = 1
    max_steps: Count | None = None
    """Stop after so many optimizer steps; default: all epochs."""
    batch_size: Annotated[int, Range(1, 100_000)] = 1
    """Packed rows per micro-batch."""
    gradient_accumulation: Annotated[int, Range(1, 1_000_000)] = 1
    """Micro-batches per optimizer step. Tokens are weighed over the whole group."""
    warmup_ratio: Annotated[float, Range(0, 1, below=True)] = 0.1
    """Share of the steps in which the learning rate rises; then it falls linearly to zero."""
    weight_decay: Annotated[float, Range(0, 1)] = 0.0
    max_grad_norm: Annotated[float, Range(0, 1e9, above=True)] = 1.0
    """Longer gradients are shortened to this length; 1e9 leaves all as they are."""
    save_steps: CountOrNone = 50
    """Optimizer steps between checkpoints, from which ``--resume`` goes on; there is one at the end, too. 0: none but
    when interrupted."""
    save_total_limit: Count = 2
    """Checkpoints that are kept: the newest."""
    optimizer: Literal["auto", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = "auto"
    """``auto``: adamw_8bit on a GPU, adamw_torch_fused on a CPU."""


@dataclass(frozen=True)
class TaskConfig:
    """Questions with known answers, asked by ``qlora-sft evaluate``."""

    path: str
    """As of a data source; of a data set of the Hub the split in brackets: ``owner/name[test]``."""
    name: str | None = None
    """How reports call it; default: the last part of the path without its ending."""
    form: Literal["auto", "choices", "number", "exact", "code", "loss"] = "auto"
    """How answers are graded. ``choices``: the likeliest letter (rows as MMLU's and ARC's); ``number``: the last number
    (GSM8K's); ``exact``: the same text; ``code``: by running it (HumanEval's); ``loss``: not asked, only read.
    ``auto`` tells from the columns, and prints what it found."""
    max_rows: Count | None = None
    """Ask only so many, drawn at random with the seed of the evaluation."""
    samples: Annotated[int, Range(1, 10_000)] = 1
    """Answers per question. One is greedy; several are sampled and give pass@k up to that k."""
    temperature: Annotated[float, Range(0, 100, above=True)] = 0.8
    """Of sampled answers."""
    max_new_tokens: Count = 512
    thinking: Literal["auto", "on", "off"] = "auto"
    """``on`` and ``off`` tell the template so (``enable_thinking``) where a row does not; ``auto`` asks as training
    would have shown the row, with its answer as it is: without reasoning if that has none."""


@dataclass(frozen=True)
class EvaluationConfig:
    loss: bool = True
    """Held-out loss per source before and after."""
    answers: CountOrNone = 3
    """Greedy answers per held-out source, before and after; 0 for none."""
    max_new_tokens: Count = 128
    show: CountOrNone = 3
    """How many of the answers are printed."""
    tasks: list[TaskConfig] = field(default_factory=list)
    """What ``qlora-sft evaluate`` asks the finished run and its base; training does not wait for it."""


@dataclass(frozen=True)
class MemoryConfig:
    """What each layer keeps from its forward to its backward. It changes time and memory, not the result."""

    policy: Literal["auto", "none", "checkpoint", "offload"] = "auto"
    """``auto``: the least recomputation that fits, chosen layer by layer and printed. ``none``: keep everything.
    ``checkpoint``: keep the input of every layer, compute the layer again in the backward (about a third more time).
    ``offload``: the same, with the inputs in host memory."""
    gpu_budget_gib: Gibibytes | None = None
    """What this run may use of the GPU, weights included; default: what is free, less 5% of the card."""
    host_budget_gib: Gibibytes | None = None
    """Host memory that inputs of layers may take; default: half of what is available."""
    tiled_mlp: Literal["auto", "on", "off"] = "auto"
    """MLPs in tiles of tokens that keep nothing but their input where a layer is computed again. ``auto``: wherever the
    model's MLP is one that is known."""
    offload_embeddings: bool = False
    """Input embedding in host memory (on a GPU): a GiB less on the card for a vocabulary of 128k, and one more wait per
    step. Only for models whose output head is another matrix."""


@dataclass(frozen=True)
class Config:
    model: ModelConfig
    data: DataConfig
    output: str
    """The run folder."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0


SECTIONS = {
    "model": ModelConfig, "data": DataConfig, "lora": LoraConfig, "training": TrainingConfig,
    "evaluation": EvaluationConfig, "memory": MemoryConfig,
}  # fmt: skip


def load_config(name: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a YAML file or a shipped recipe, applies ``key.sub=value`` overrides, checks everything.

    Raises `ConfigError` with all problems found.
    """
    path = _find(str(name))
    problems: list[str] = []
    try:
        tree = read_yaml(read_text(path))
    except YamlFault as fault:
        problems = [f"{path}:{line}: {what}" if line else f"{path}: {what}" for line, what in fault.faults]
        tree = fault.tree
        if tree is None:
            raise ConfigError(problems) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values (model:, data:, output:), got {kind_of(tree)}")
    origin: dict[str, str] = {}
    for override in overrides:
        apply_override(tree, override, origin, problems)
    config = build(Config, tree, "", str(path), origin, problems)
    problems += _check_values(tree, str(path))
    if problems:
        raise ConfigError(problems, {name: build_rest(kind, tree.get(name)) for name, kind in SECTIONS.items()})
    assert isinstance(config, Config)
    return config


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to an equal configuration."""
    return write_yaml(dataclasses.asdict(config))


def _find(name: str) -> Path:
    shipped = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    path = as_path(name)
    if path.is_file():
        return path
    nearby = [str(file) for file in path.parent.glob("*.yaml")]
    hint = did_you_mean(name, [*nearby, *shipped, *(f"{stem}.yaml" for stem in shipped)])
    missing = "a folder, and not a YAML file" if path.is_dir() else "no such file"
    raise ConfigError(f"{name}: {missing}{hint}; shipped recipes: {', '.join(shipped) or 'none'}")


def _check_values(tree: dict[str, Any], file: str) -> list[str]:
    """Finds values that have the right type and range and still make no sense together, in all sections of ``tree`` in
    which nothing else is wrong."""
    problems = []

    def require(good: bool, key: str, text: str) -> None:
        if not good:
            problems.append(f"{file}: {key} {text}")

    def section(name: str) -> Any:
        given = tree.get(name, {})
        return build(SECTIONS[name], given, "", "", {}, []) if isinstance(given, dict) else None

    model, data, training, memory, evaluation = map(section, ("model", "data", "training", "memory", "evaluation"))
    if data:
        require(bool(data.train), "data.train", "must name at least one source")
        check_data(data, require)
    if model:
        no_effect = "has no effect without model.load_in_4bit"
        require(model.load_in_4bit or not model.head_in_4bit, "model.head_in_4bit", no_effect)
    if model and data and training:
        _check_rope(model.rope_scaling, data, training, require)
    if memory:
        _check_memory(memory, require)
    if evaluation:
        check_tasks(evaluation.tasks, require)
    return problems


def check_tasks(tasks: list[TaskConfig], require: Require, key: str = "evaluation.tasks") -> None:
    for i, task in enumerate(tasks):
        here = f"{key}.{i}"
        for name, fault in range_faults(task):  # a task may come from the command line
            require(False, f"{here}.{name}", fault)
        sampled = task.form not in ("choices", "loss")
        require(sampled or task.samples == 1, f"{here}.samples", f"has no effect with form {task.form}; remove it")
    names = [task_name(task) for task in tasks]
    double = sorted({name for name in names if names.count(name) > 1})
    require(not double, key, f"has two tasks named {', '.join(double)}; give each its own name:")


def task_name(task: TaskConfig) -> str:
    """How reports call a task: its name, or the last part of its path (``a/b.jsonl`` is b, ``a/b:c[test]`` is b-c)."""
    path, _, configuration = task.path.partition("[")[0].partition(":")
    if path == "demo":
        path, configuration = configuration, ""
    return task.name or source_name(SourceConfig(path)) + (f"-{configuration}" if configuration else "")


def _check_rope(rope: RopeScaling | None, data: DataConfig, training: TrainingConfig, require: Require) -> None:
    if rope is None:
        return
    for name in ("attention_factor", "beta_fast", "beta_slow"):
        given = getattr(rope, name) is not None
        require(not given or rope.rope_type == "yarn", f"model.rope_scaling.{name}", "belongs to rope_type yarn only")
    slow_first = (rope.beta_slow or 1) < (rope.beta_fast or 32)  # which are YaRN's own defaults
    require(slow_first, "model.rope_scaling.beta_slow", "must be smaller than beta_fast (which is 32 by default)")
    alone = data.packing == "none" and training.batch_size == 1
    require(
        rope.rope_type != "dynamic" or alone,
        "model.rope_scaling.rope_type",
        "dynamic: the longest document of a row would change the positions of the others; take yarn, or set "
        "data.packing=none and training.batch_size=1",
    )


def _check_memory(m: MemoryConfig, require: Require) -> None:
    # A key that has no effect would be believed to have one.
    require(
        m.gpu_budget_gib is None or m.policy == "auto", "memory.gpu_budget_gib",
        f"has an effect only with memory.policy=auto, not {m.policy}; remove one of them",
    )  # fmt: skip
    require(
        m.host_budget_gib is None or m.policy in ("auto", "offload"), "memory.host_budget_gib",
        f"has an effect only where inputs go to host memory, not with memory.policy={m.policy}; remove one of them",
    )  # fmt: skip
