"""Define the schema of a run and load it strictly: YAML plus ``key.sub=value`` into dataclasses.

Every problem is reported at once, each with its file, its key and the nearest valid name.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from qlora_sft.config_data import DataConfig as DataConfig
from qlora_sft.config_data import Require, check_data
from qlora_sft.config_data import SourceConfig as SourceConfig
from qlora_sft.config_evaluation import EvaluationConfig as EvaluationConfig
from qlora_sft.config_evaluation import TaskConfig as TaskConfig
from qlora_sft.config_evaluation import check_tasks as check_tasks
from qlora_sft.config_evaluation import check_watch
from qlora_sft.config_evaluation import task_name as task_name
from qlora_sft.config_lora import LoraConfig as LoraConfig
from qlora_sft.config_lora import check_lora, take_refused
from qlora_sft.config_training import TrainingConfig as TrainingConfig
from qlora_sft.config_training import check_tethers, check_training
from qlora_sft.errors import ConfigError
from qlora_sft.json_types import JsonObject
from qlora_sft.lora_from import fill_from_adapter
from qlora_sft.ranges import Count, Gibibytes, Range
from qlora_sft.strict import apply_override, as_tree, build, build_rest, did_you_mean, kind_of
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
    """YaRN does not change frequencies that turn more often than this within the trained positions; default: 32."""
    beta_slow: Annotated[float, Range(0, 10_000, above=True)] | None = None
    """YaRN stretches frequencies that turn less often than this by the whole factor; default: 1."""


AttentionWay = Literal["varlen", "sdpa", "flash3", "flash4"]


@dataclass(frozen=True)
class ModelConfig:
    """Names the base model and says how it is loaded."""

    path: str
    """Folder or Hub id of the base model; ``demo`` is the embedded SmolLM2-135M-Instruct."""
    revision: str | None = None
    """Commit, tag or branch of a Hub id; default: its main branch. The run records the commit that was loaded, and
    ``--resume``, merge, export, evaluate and chat use it."""
    trust_remote_code: bool = False
    """Runs code from the repository, for a model that transformers does not have."""
    backend: Literal["auto", "unsloth", "transformers"] = "auto"
    """``auto`` takes Unsloth if it imports and works, else transformers + peft, and says which and why."""
    load_in_4bit: bool = True
    """NF4 with double quantisation; false loads the weights in ``dtype``."""
    head_in_4bit: bool = False
    """Quantises the output head as well. This saves three quarters of a GiB for a
    vocabulary of 128k and changes the loss a little. It works only for a model whose head
    is not tied to the input embedding, and with a frozen vocabulary."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type. ``auto`` takes bfloat16 where it is the fastest, else float16 on a GPU and float32 on a CPU."""
    chat_template: str | None = None
    """A shipped template (chatml, chatml-think, gemma, llama3, mistral, phi, qwen3) or a
    .jinja file, instead of the tokenizer's own. Control tokens that it writes (``<|...|>``) and the vocabulary lacks
    are added, start as the mean of all others, are trained and saved."""
    new_tokens: list[str] = field(default_factory=list)
    """More control tokens that are added in the same way if the vocabulary lacks them."""
    stop_tokens: list[str] = field(default_factory=list)
    """Tokens that end a turn, in addition to the eos token and those of the model's generation config."""
    loss: Literal["auto", "triton", "torch"] = "auto"
    """Implementation of the loss. ``auto``: Triton on an NVIDIA GPU, plain torch elsewhere; says which and why."""
    attention: Literal["auto", "varlen", "sdpa", "flash3", "flash4"] = "auto"
    """How attention inside documents is computed on a GPU. ``varlen`` handles all documents in one call of torch's
    FlashAttention; ``flash3`` and ``flash4`` use these versions, if torch and their packages have them. ``sdpa`` makes
    one call per document, which is often faster for long documents. ``auto`` measures for about a second before the run
    and prints the figures; a resumed run keeps its choice. On a CPU, with capped logits or attention sinks, and on GPUs
    without FlashAttention there is only one way, whatever this says."""
    rope_scaling: RopeScaling | None = None
    """Needed if ``data.max_length`` exceeds the model's number of positions. The merged model and the GGUF keep it."""


@dataclass(frozen=True)
class MemoryConfig:
    """Sets what each layer keeps from its forward to its backward. It changes time and memory, not the result."""

    policy: Literal["auto", "none", "checkpoint", "offload"] = "auto"
    """``auto`` chooses layer by layer what recomputes least and still fits, and prints it. ``none`` keeps all
    activations. ``checkpoint`` keeps the input of every layer and recomputes the layer in the backward, which takes
    about a third more time. ``offload`` does the same with the inputs in host memory."""
    gpu_budget_gib: Gibibytes | None = None
    """GPU memory that this run may use, including weights; default: what is free, minus 5% of the card."""
    host_budget_gib: Gibibytes | None = None
    """Host memory that the inputs of layers may take; default: half of what is available."""
    tiled_mlp: Literal["auto", "on", "off"] = "auto"
    """Computes MLPs in tiles of tokens, and keeps only their input if the layer is recomputed. ``auto`` does so for
    every MLP of a known kind."""
    offload_embeddings: bool = False
    """Keeps the input embedding in host memory when training on a GPU. This saves a GiB on the card for a vocabulary of
    128k and costs one more wait per step. It works only for a model whose output head is not tied to the embedding."""
    base_shards: Annotated[int, Range(1, 1024)] = 1
    """Shards the frozen weights of the decoder layers over this many cards, as FSDP does: each keeps one share, and
    gathers a layer only while it computes. For a model that is too large for one card; if it fits, 1 is faster. The
    same number of processes must train (torchrun --nproc-per-node)."""


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
    """Seed of all random numbers: drawn rows, the order of the documents, initial adapters, dropout."""


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
        check_training(training, require)
    if training and data:
        shares = data.share_prefixes != "on" or training.neftune_alpha is None
        require(
            shares,
            "data.share_prefixes",
            "on cannot be combined with noise (training.neftune_alpha); remove one of them",
        )
        check_tethers(training, data, require)
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
        check_watch(training, data, evaluation, require)
    return problems


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
