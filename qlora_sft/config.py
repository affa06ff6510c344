"""Define the schema of a run and load it strictly: YAML plus ``key.sub=value`` into dataclasses.

Every problem is reported at once, each with its file, its key and the nearest valid name.
"""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from qlora_sft.config_data import DataConfig as DataConfig
from qlora_sft.config_data import Require, check_data, held_out_shares, held_out_sources, source_name
from qlora_sft.config_data import SourceConfig as SourceConfig
from qlora_sft.config_lora import LoraConfig as LoraConfig
from qlora_sft.config_lora import check_lora, take_refused
from qlora_sft.errors import ConfigError
from qlora_sft.json_types import JsonObject
from qlora_sft.lora_from import fill_from_adapter
from qlora_sft.ranges import Count, CountOrNone, Gibibytes, Range
from qlora_sft.strict import apply_override, as_tree, build, build_rest, did_you_mean, kind_of, range_faults
from qlora_sft.text import as_path, read_text
from qlora_sft.yaml_text import YamlFault, read_yaml, write_yaml

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class RopeScaling:
    """Extends the positions beyond those that the model was trained on.

    The names are those of transformers; see its `modeling_rope_utils`.
    """

    rope_type: Literal["yarn", "linear", "dynamic"]
    """``yarn`` keeps most of what the model knows; ``dynamic`` depends on the longest document of a row."""
    factor: Annotated[float, Range(1, 10_000, above=True)]
    """The number of positions is multiplied by this."""
    original_max_position_embeddings: Count | None = None
    """Positions that the model was trained on; default: the model's own ``max_position_embeddings``."""
    attention_factor: Annotated[float, Range(0, 100, above=True)] | None = None
    """YaRN's scale of the logits; default: ``0.1 * ln(factor) + 1``."""
    beta_fast: Annotated[float, Range(0, 10_000, above=True)] | None = None
    """YaRN leaves frequencies as they are that turn more often than this within the trained positions; default: 32."""
    beta_slow: Annotated[float, Range(0, 10_000, above=True)] | None = None
    """YaRN stretches frequencies by the whole factor that turn less often than this; default: 1."""


AttentionWay = Literal["varlen", "sdpa", "flash3", "flash4"]


@dataclass(frozen=True)
class ModelConfig:
    """Names the base model and says how it is loaded."""

    path: str
    """Folder or Hub id of the base model; ``demo`` is the embedded SmolLM2-135M-Instruct."""
    revision: str | None = None
    """Of a Hub id: the commit, tag or branch to take; default: its main branch. The commit that was loaded is kept
    with the run, and is what ``--resume``, merge, export, evaluate and chat take."""
    trust_remote_code: bool = False
    """Run code that the repository brings along for a model that transformers does not have."""
    backend: Literal["auto", "unsloth", "transformers"] = "auto"
    """``auto`` takes Unsloth where it imports and works, else transformers + peft, and says which and why."""
    load_in_4bit: bool = True
    """NF4 with double quantisation; false loads the weights in ``dtype``."""
    head_in_4bit: bool = False
    """Quantises the output head as well. This saves three quarters of a GiB for a
    vocabulary of 128k and changes the loss a little. It works only for a model whose head
    is not tied to the input embedding, and with a frozen vocabulary."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type. ``auto`` takes bfloat16 where it is the faster one, else float16 on a GPU and float32 on a CPU."""
    chat_template: str | None = None
    """A shipped template (chatml, chatml-think, gemma, llama3, mistral, phi, qwen3) or a
    .jinja file, in place of the tokenizer's own. Control tokens that it writes (``<|...|>``) and the vocabulary lacks
    are added, begin as the mean of all others, are trained and saved."""
    new_tokens: list[str] = field(default_factory=list)
    """More control tokens that are added in the same way where the vocabulary lacks them."""
    stop_tokens: list[str] = field(default_factory=list)
    """Tokens that end a turn, beside the eos token and those of the model's generation config."""
    loss: Literal["auto", "triton", "torch"] = "auto"
    """Implementation of the loss. ``auto``: Triton on an NVIDIA GPU, plain torch elsewhere; says which and why."""
    attention: Literal["auto", "varlen", "sdpa", "flash3", "flash4"] = "auto"
    """How a GPU attends inside documents. ``varlen`` handles all documents in one call of torch's FlashAttention,
    ``flash3`` and ``flash4`` in one of these versions, where torch and their packages have them. ``sdpa`` makes one
    call per document, which is often faster where documents are long. ``auto`` measures for a second before the run
    and prints the figures; a run that goes on keeps the way. There is only one on a CPU, with capped logits or
    attention sinks, and on GPUs without FlashAttention, whatever this says."""
    rope_scaling: RopeScaling | None = None
    """Needed if ``data.max_length`` exceeds the positions of the model. The merged model and the GGUF carry it."""


@dataclass(frozen=True)
class TrainingConfig:
    """Sets optimizer, schedule, batches and checkpoints."""

    learning_rate: Annotated[float, Range(1e-10, 1)] = 2e-4
    """The highest learning rate of the run, which is reached after the warm-up."""
    epochs: Annotated[float, Range(0, 10_000, above=True)] = 1.0
    """How often the run goes through the mixture. With 0.5 it has half of the rows of every source, drawn at random."""
    max_steps: Count | None = None
    """Stop after so many optimizer steps; default: all epochs."""
    batch_size: Annotated[int, Range(1, 100_000)] = 1
    """Packed sequences per micro-batch."""
    gradient_accumulation: Annotated[int, Range(1, 1_000_000)] = 1
    """Micro-batches per optimizer step. The loss is weighted by tokens over all of them together."""
    tokens_per_step: Count | None = None
    """Tokens per optimizer step, in place of gradient_accumulation: as many micro-batches are accumulated as come
    nearest to it with what a packed sequence holds on average."""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """How the learning rate goes on behind the warm-up: falls to zero in a line or along a cosine, stays, or stays and
    falls in a line at the end (``wsd``: warm-up, stable, decay)."""
    warmup_ratio: Annotated[float, Range(0, 1, below=True)] = 0.1
    """Share of the steps in which the learning rate rises."""
    warmup_steps: Count | None = None
    """Steps in which the learning rate rises, in place of warmup_ratio."""
    initial_rate_fraction: Annotated[float, Range(0, 1, above=True)] | None = None
    """Share of the learning rate at which the warm-up begins; default: 1 / (its steps + 1)."""
    decay_ratio: Annotated[float, Range(0, 1, above=True)] | None = None
    """With schedule wsd: share of the steps in which the learning rate falls; default: 0.2."""
    weight_decay: Annotated[float, Range(0, 1)] = 0.0
    """AdamW's decay: share of a weight, times the learning rate, that every step takes off it. Adapters decay;
    magnitudes of DoRA and rows of new tokens do not."""
    new_tokens_rate: Annotated[float, Range(1e-10, 1)] | None = None
    """The highest learning rate of the rows of control tokens that a chat template adds; default: learning_rate."""
    neftune_alpha: Annotated[float, Range(0, 1000, above=True)] | None = None
    """Adds noise to the embeddings in training (NEFTune; its authors take 5), by the length of each document, also of
    those that share a packed sequence; default: none."""
    max_grad_norm: Annotated[float, Range(0, 1e9, above=True)] = 1.0
    """A gradient with a larger norm is scaled down to this norm; 1e9 leaves all as they are."""
    save_steps: CountOrNone = 50
    """Optimizer steps between checkpoints, from which ``--resume`` goes on. The last step is saved, too. With 0 a
    checkpoint is saved only when the run is interrupted."""
    save_total_limit: Count = 2
    """How many checkpoints are kept; the oldest go first."""
    optimizer: Literal["auto", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = "auto"
    """``auto``: adamw_8bit on a GPU, adamw_torch_fused on a CPU."""
    replay_kl: Annotated[float, Range(0, 1e6, above=True)] | None = None
    """Holds the model to its base on the rows of ``data.replay``: so many times the KL divergence of its predictions
    from those of the base (without the adapter) is added to the loss of each of their supervised tokens. The base reads
    these rows once more in every step. Default: none; with 1 a token's divergence counts as much as its loss, and
    where the share of replay is small more is needed."""
    ewc: Annotated[float, Range(0, 1e12, above=True)] | None = None
    """Holds weights that the rows of ``data.replay`` need near to what they were (elastic weight consolidation): half
    the square of every weight's change, times its Fisher information on these rows, is added to the loss so many
    times. Default: none; it begins to hold at about 1000, because the weights of a layer move together, which this
    does not see."""
    keep: Literal["auto", "best", "last"] = "auto"
    """Which step the adapter is of that is saved and exported. ``best``: the best one by ``best_metric`` of those that
    were evaluated while training; its checkpoint is kept beside the newest ones. ``auto``: best where
    ``evaluation.every_steps`` is set (``tasks_every_steps`` for the metric of a task), else last."""
    best_metric: str = "held_out"
    """What tells which evaluation is the best, for ``keep`` and ``patience``: ``held_out``, the mean of the sources'
    held-out losses; ``held_out/NAME``, the loss of one of them; ``tasks/NAME``, a task of ``evaluation.tasks``, of
    which more right answers are better, or a lower loss if it only measures one."""
    patience: Count | None = None
    """Ends the run after so many evaluations in a row that are no better by ``best_metric``; default: never. Needs
    ``evaluation.every_steps``, or ``tasks_every_steps`` for the metric of a task."""
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = field(default_factory=list)
    """Loggers that get the figures of every step and evaluation as well, each of which has to be installed.
    TensorBoard's files are in the run folder; the others write where their own settings say."""

    def accumulated(self, tokens: typing.Sequence[int]) -> int:
        """Returns the micro-batches per optimizer step. tokens: those that are computed for each packed sequence."""
        if self.tokens_per_step is None:
            return self.gradient_accumulation
        batches = max(1, math.ceil(len(tokens) / self.batch_size))
        return max(1, round(self.tokens_per_step / max(1.0, sum(tokens) / batches)))


@dataclass(frozen=True)
class TaskConfig:
    """Describes questions with known answers, which ``qlora-sft evaluate`` asks."""

    path: str
    """A path as of a data source. A data set of the Hub names its split in brackets: ``owner/name[test]``. ``benign``
    is a shipped list of harmless questions, for ``refusal``."""
    name: str | None = None
    """How reports call it; default: the last part of the path without its ending."""
    form: Literal["auto", "choices", "number", "exact", "code", "refusal", "loss"] = "auto"
    """How answers are graded. ``choices`` takes the likeliest letter (rows as MMLU's and ARC's); ``number`` compares
    the last number (as GSM8K's); ``exact`` compares the text; ``code`` runs the answer (as HumanEval's); ``refusal``
    counts the answers that refuse, to questions that nobody needs to refuse; ``loss`` measures the loss of the rows
    without asking. ``auto`` decides by the columns and prints what it found."""
    max_rows: Count | None = None
    """Asks only so many questions, drawn at random with the seed of the evaluation."""
    shots: Annotated[int, Range(0, 100)] = 0
    """Examples with their answers before every question, drawn from the other questions of the task."""
    phrasing: Literal["plain", "labelled", "polite"] = "plain"
    """``plain`` asks as the file does; ``labelled`` writes Question: and Answer: around it; ``polite`` asks for help
    first. What a model can do does not hang on that."""
    samples: Annotated[int, Range(1, 10_000)] = 1
    """Answers per question. One is greedy; several are sampled and give pass@k up to that k."""
    temperature: Annotated[float, Range(0, 100, above=True)] = 0.8
    """Temperature of sampled answers."""
    max_new_tokens: Count = 512
    """Tokens of the longest answer; what is longer is cut off."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """``on`` and ``off`` set ``enable_thinking`` of the template for rows that do not set it. ``auto`` prompts as
    training would have shown the row with its reference: without reasoning if the reference has none."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Says what is measured on held-out data before, while and after training."""

    loss: bool = True
    """Measures the held-out loss per source before and after training."""
    before_training: bool = True
    """Measures before training what is measured after it; false saves the time and leaves nothing to compare with."""
    every_steps: Count | None = None
    """Optimizer steps between measurements of the held-out loss while training, each a line of ``evaluations.jsonl``;
    the last step is measured, too. Default: only before and after training."""
    answers: CountOrNone = 3
    """Greedy answers per held-out source, before and after training; 0 for none."""
    max_new_tokens: Count = 128
    """Tokens of the longest of these answers; what is longer is cut off."""
    show: CountOrNone = 3
    """How many of the answers are printed."""
    tasks: list[TaskConfig] = field(default_factory=list)
    """Questions that ``qlora-sft evaluate`` asks the finished run and its base; training does not ask them, but for
    ``tasks_every_steps``."""
    tasks_every_steps: Count | None = None
    """Optimizer steps between the times at which some questions of every task are asked while training; after the last
    step they are asked, too. Default: never."""
    tasks_rows: Count = 100
    """Questions of each task that are asked while training, drawn with the seed; each gets one greedy answer."""


@dataclass(frozen=True)
class MemoryConfig:
    """Sets what each layer keeps from its forward to its backward. It changes time and memory, not the result."""

    policy: Literal["auto", "none", "checkpoint", "offload"] = "auto"
    """``auto`` takes the least recomputation that fits, chosen layer by layer and printed. ``none`` keeps all
    activations. ``checkpoint`` keeps the input of every layer and recomputes the layer in the backward, which takes
    about a third more time. ``offload`` does the same with the inputs in host memory."""
    gpu_budget_gib: Gibibytes | None = None
    """GPU memory that this run may use, weights included; default: what is free, less 5% of the card."""
    host_budget_gib: Gibibytes | None = None
    """Host memory that the inputs of layers may take; default: half of what is available."""
    tiled_mlp: Literal["auto", "on", "off"] = "auto"
    """Computes MLPs in tiles of tokens and keeps only their input wherever a layer is recomputed. ``auto`` does so for
    every MLP of a known kind."""
    offload_embeddings: bool = False
    """Keeps the input embedding in host memory when training on a GPU. This saves a GiB on the card for a vocabulary of
    128k and costs one more wait per step. It works only for a model whose output head is not tied to the embedding."""


@dataclass(frozen=True)
class Config:
    """Holds the whole configuration of a run."""

    model: ModelConfig
    data: DataConfig
    output: str
    """The run folder."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Start of all random numbers: drawn rows, the order of the documents, adapters, dropout."""


SECTIONS = {
    "model": ModelConfig, "data": DataConfig, "lora": LoraConfig, "training": TrainingConfig,
    "evaluation": EvaluationConfig, "memory": MemoryConfig,
}  # fmt: skip


def load_config(name: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a YAML file or a shipped recipe, applies ``key.sub=value`` overrides, and checks everything.

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
    problems += take_refused(tree.get("lora"), str(path))
    fill_from_adapter(tree.get("lora"))
    config = build(Config, tree, "", str(path), origin, problems)
    problems += _check_values(tree, str(path))
    if problems:
        raise ConfigError(problems, {name: build_rest(kind, tree.get(name)) for name, kind in SECTIONS.items()})
    assert isinstance(config, Config)
    return config


def dump_config(config: Config) -> str:
    """Returns YAML that `load_config` reads back to an equal configuration."""
    return write_yaml(as_tree(config))


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


def _check_values(tree: JsonObject, file: str) -> list[str]:
    """Finds values that have the right type and range and still make no sense together.

    It looks at all sections of ``tree`` in which nothing else is wrong.
    """
    problems = []

    def require(good: bool, key: str, text: str) -> None:
        if not good:
            problems.append(f"{file}: {key} {text}")

    def section(name: str) -> Any:
        given = tree.get(name, {})
        return build(SECTIONS[name], given, "", "", {}, []) if isinstance(given, dict) else None

    model, data, training, memory, evaluation, lora = map(
        section, ("model", "data", "training", "memory", "evaluation", "lora")
    )
    if data:
        require(bool(data.train), "data.train", "must name at least one source")
        check_data(data, require)
    if model:
        no_effect = "has no effect without model.load_in_4bit"
        require(model.load_in_4bit or not model.head_in_4bit, "model.head_in_4bit", no_effect)
        spaced = [token for token in model.new_tokens if not token or token != "".join(token.split())]
        require(not spaced, "model.new_tokens", f"must be texts without spaces, got {', '.join(map(repr, spaced))}")
    if model and data and training:
        _check_rope(model.rope_scaling, data, training, require)
    if training:
        _check_training(training, require)
    if training and data:
        shares = data.share_prefixes != "on" or training.neftune_alpha is None
        require(shares, "data.share_prefixes", "on goes with no noise (training.neftune_alpha): set one of them back")
        _check_tethers(training, data, require)
    if training and lora:
        magnitudes = "measures the change of a weight by its factors, and lora.dora changes magnitudes: remove one"
        require(training.ewc is None or not lora.dora, "training.ewc", magnitudes)
    if lora:
        given = tree.get("model")
        check_lora(lora, given if isinstance(given, dict) else {}, require)
    if memory:
        _check_memory(memory, require)
    if evaluation:
        check_tasks(evaluation.tasks, require)
    if data and training and evaluation:
        _check_watch(training, data, evaluation, require)
    return problems


def _check_tethers(t: TrainingConfig, d: DataConfig, require: Require) -> None:
    """Requires the rows on which a run is held to its base."""
    for key, value in (("training.replay_kl", t.replay_kl), ("training.ewc", t.ewc)):
        require(value is None or d.replay is not None, key, "needs data.replay, the rows that tell what is to be kept")
    apart = "needs the rows of data.replay by themselves, which data.share_prefixes=on mixes: remove one of them"
    require(t.replay_kl is None or d.share_prefixes != "on", "training.replay_kl", apart)


def _check_watch(t: TrainingConfig, data: DataConfig, e: EvaluationConfig, require: Require) -> None:
    """Requires that what is to be decided by the held-out loss while training is measured while training."""
    key = "evaluation.every_steps"
    held_out = bool(held_out_sources(data) or held_out_shares(data))
    require(not e.every_steps or held_out, key, "measures held-out rows, and data.held_out names none")
    require(not e.every_steps or e.loss, key, "has no effect with evaluation.loss=false; remove one of them")
    of_task = t.best_metric.startswith("tasks/")
    every = e.tasks_every_steps if of_task else e.every_steps
    needs = f"needs {key}, the steps between measurements of the held-out loss"
    if of_task:
        needs = "needs evaluation.tasks_every_steps, the steps between the times at which tasks are asked"
    require(t.keep != "best" or bool(every), "training.keep=best", needs)
    require(not t.patience or bool(every), "training.patience", needs)
    require(t.best_metric == "held_out" or bool(every), "training.best_metric", needs)
    sources = [*map(source_name, held_out_sources(data)), *held_out_shares(data)]
    metrics = ["held_out", *(f"held_out/{name}" for name in sources), *(f"tasks/{task_name(each)}" for each in e.tasks)]
    known = f"is none of {', '.join(metrics)}{did_you_mean(t.best_metric, metrics)}, got {t.best_metric!r}"
    require(t.best_metric in metrics, "training.best_metric", known)
    key = "evaluation.tasks_every_steps"
    require(not e.tasks_every_steps or bool(e.tasks), key, "asks the questions of evaluation.tasks, and there are none")


def check_tasks(tasks: list[TaskConfig], require: Require, key: str = "evaluation.tasks") -> None:
    """Requires that every task is in its ranges and that no two have one name."""
    for i, task in enumerate(tasks):
        here = f"{key}.{i}"
        for name, fault in range_faults(task):  # a task may come from the command line
            require(False, f"{here}.{name}", fault)
        sampled = task.form not in ("choices", "loss")
        require(sampled or task.samples == 1, f"{here}.samples", f"has no effect with form {task.form}; remove it")
        asked = task.form != "loss"
        require(asked or task.shots == 0, f"{here}.shots", "has no effect with form loss; remove it")
        require(asked or task.phrasing == "plain", f"{here}.phrasing", "has no effect with form loss; remove it")
        referenced = task.form not in ("code", "refusal") or task.shots == 0
        require(referenced, f"{here}.shots", f"needs answers to show, and form {task.form} has none; remove it")
    names = [task_name(task) for task in tasks]
    double = sorted({name for name in names if names.count(name) > 1})
    require(not double, key, f"has two tasks named {', '.join(double)}; give each its own name:")


def task_name(task: TaskConfig) -> str:
    """Returns the name that reports give a task: its own, or the last part of its path.

    ``a/b.jsonl`` gives b, ``a/b:c[test]`` gives b-c.
    """
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


def _check_training(t: TrainingConfig, require: Require) -> None:
    # A key that has no effect would be believed to have one.
    one_batch = t.tokens_per_step is None or t.gradient_accumulation == 1
    require(one_batch, "training.tokens_per_step", "decides the accumulation; remove training.gradient_accumulation")
    one_warmup = t.warmup_steps is None or t.warmup_ratio in (0.0, TrainingConfig.warmup_ratio)
    require(one_warmup, "training.warmup_steps", "is in place of training.warmup_ratio; remove one of them")
    warm = t.warmup_steps is not None or t.warmup_ratio > 0
    require(
        warm or t.initial_rate_fraction is None, "training.initial_rate_fraction", "has no effect without a warm-up"
    )
    wsd = t.schedule == "wsd"
    require(wsd or t.decay_ratio is None, "training.decay_ratio", "has an effect with training.schedule=wsd only")
    room = t.warmup_steps is not None or not wsd or t.warmup_ratio + (t.decay_ratio or 0) <= 1
    require(room, "training.decay_ratio", "and training.warmup_ratio are more than the whole run")


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
