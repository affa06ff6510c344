"""Reads the shape of a model without its weights: every tensor, and what becomes of it when it is loaded for training.

transformers builds the model on the meta device, from config.json alone, so shapes, ties and names are those of the
real model. Which layers bitsandbytes quantises is asked of transformers' own rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from qlora_kernels.packed_ce import HeadShape

from qlora_sft.config import Config
from qlora_sft.errors import ConfigError, first_line
from qlora_sft.json_types import JsonObject
from qlora_sft.model.attention import head_size_of, layer_settings
from qlora_sft.model.base import layer_list
from qlora_sft.model.base_files import Header
from qlora_sft.model.base_folder import base_headers
from qlora_sft.model.meta_model import meta_model, read_settings, why_parts_stay
from qlora_sft.model.vocabulary import grow, new_rows, trainable_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from qlora_sft.model.linears import Shape


@dataclass(frozen=True)
class Linear:
    """Describes a linear layer from ``inputs`` to ``outputs`` features.

    block: the number of its decoder layer; None outside of them.
    """

    name: str
    inputs: int
    outputs: int
    block: int | None
    quantized: bool
    rank: int
    """Of its adapter; 0 if it gets none."""
    head: bool = False
    """Whether it is the output head."""

    @property
    def adapted(self) -> bool:
        """Returns whether it gets an adapter."""
        return self.rank > 0

    @property
    def short(self) -> str:
        """Returns the last part of the layer's name."""
        return self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Stack:
    """Describes one stack of experts: ``count`` of them, each ``inputs`` -> ``outputs``."""

    name: str
    count: int
    inputs: int
    outputs: int
    block: int
    parts: int
    """How many parts of an expert are quantised on their own."""
    quantized: bool
    adapted: bool


@dataclass(frozen=True)
class Norm:
    """Describes a normalisation layer."""

    name: str
    kind: str
    """Name of its class."""
    width: int


@dataclass(frozen=True)
class Blueprint:
    """Describes the tensors of a model and what becomes of them in training."""

    kind: str
    """The class of the model."""
    config: PretrainedConfig
    """transformers' configuration of the language model."""
    parameters: dict[str, torch.Size]
    """The shape of every parameter; a tied one stands here once."""
    buffer_bytes: int
    linears: list[Linear]
    norms: list[list[Norm]]
    """The norms of every decoder layer."""
    stacks: list[Stack] = field(default_factory=list)
    """Of experts, in a mixture."""
    why_not_tiled: str = ""
    """Why the MLPs stay transformers' own; empty if they are computed by tiles."""
    why_not_lean: str = ""
    """Why q, k, v and o are left to PEFT; empty if nf4_lora computes them."""
    input_embedding: int = 0
    """Values of the input embedding if the output head is another matrix, else 0."""
    lean_norms: bool = False
    """Whether RMSNorms keep their input as it is, and no float32 copy of it."""
    added_rows: int = 0
    """Tokens that the chat template adds, whose rows are trained."""
    trained_matrices: int = 0
    """The matrices with such rows: the embedding, and the head where it is another."""
    prefix: str = "model.layers."
    """What the names of the parameters of the decoder layers begin with."""
    beside: dict[str, int] = field(default_factory=dict)
    """The parameters of the towers for images and sound, and of what leads from them to the language model."""
    why_one_at_a_time: str = ""
    """Why documents are run one at a time; empty if they share packed sequences."""
    grown: int = 0
    """Parameters that the files lack, because embedding and head have to grow for added tokens."""
    dora: bool = False
    """Whether the length of every row of an adapted weight is trained, too."""
    nested: bool = True
    """Whether the scales of NF4 weights are quantised themselves; a checkpoint that was saved in NF4 may differ."""
    shared: frozenset[str] = frozenset()
    """The parameters that several decoder layers have in common."""

    @property
    def n_layers(self) -> int:
        return len(self.norms)

    @property
    def n_parameters(self) -> int:
        return sum(shape.numel() for shape in self.parameters.values())

    @property
    def hidden(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Returns (query heads, key and value heads, size of a head), of the layers with most."""
        each = layer_settings(self.config)
        count = max(int(layer.num_attention_heads) for layer in each)
        groups = max(int(getattr(layer, "num_key_value_heads", None) or count) for layer in each)
        return count, groups, head_size_of(self.config)

    @property
    def head_in_4bit(self) -> bool:
        return any(linear.quantized for linear in self.linears if linear.head)

    def head(self, dtype: torch.dtype) -> HeadShape:
        """Returns the output head as the loss meets it."""
        return HeadShape(self.vocabulary, self.hidden, dtype, self.head_in_4bit, self.added_rows)

    def stacked(self, number: int) -> list[str]:
        """Returns the parameters of a decoder layer that are more than a matrix and not known: convolutions, experts of
        another form."""
        here = f"{self.prefix}{number}."
        found = {name.removeprefix(here) for name, shape in self.parameters.items() if len(shape) > 2}
        known = {stack.name for stack in self.stacks}
        return sorted(name for name in found if here + name in self.parameters and here + name not in known)

    def loose(self, number: int) -> list[str]:
        """Returns the parameters of a decoder layer that belong to no linear layer, norm or mixture of experts: they
        tell of something else that it computes."""
        here = f"{self.prefix}{number}."
        modules = {linear.name.removeprefix(here) for linear in self.layer(number)}
        modules |= {norm.name for norm in self.norms[number]}
        stacks = [stack.name.removeprefix(here) for stack in self.stacks if stack.block == number]
        mixtures = tuple(f"{name.split('.')[0]}." for name in stacks)  # with its router
        names = [name.removeprefix(here) for name in self.parameters if name.startswith(here)]
        odd = [name for name in names if name.rpartition(".")[0] not in modules and not name.startswith(mixtures)]
        return sorted(set(odd) - set(self.stacked(number)))

    def layer(self, number: int) -> list[Linear]:
        """Returns the linear layers of the decoder layer of this number."""
        return [linear for linear in self.linears if linear.block == number]


def read_blueprint(config: Config, base: str) -> Blueprint:
    """Reads the shape of the model ``base`` from its config.json and its tokenizer.

    Raises `ConfigError` for a model that transformers does not know, or without decoder layers or tokenizer.
    """
    settings = read_settings(config, base)
    try:
        rows = new_rows(config.model, base)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: cannot read the tokenizer of {base}: {first_line(error)}") from None
    return blueprint_of(settings, config, rows)


def blueprint_of(settings: PretrainedConfig, config: Config, rows: Sequence[int] = ()) -> Blueprint:
    """Describes a model by transformers' configuration object and the ids of the tokens that are added (``rows``)."""
    from qlora_sft.model.attention import why_one_at_a_time
    from qlora_sft.model.head import check_head
    from qlora_sft.model.linears import layers_prefix, other_parts, shapes
    from qlora_sft.model.norms import FORMS

    model = meta_model(settings)
    try:
        blocks = layer_list(model)
        adapted = shapes(model, config.lora)
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"model.path: {type(settings).__name__} is not understood here: {first_line(error)}"
        ) from None
    in_files = model.num_parameters()
    grow(model, rows, initialise=False)
    if config.model.head_in_4bit:
        check_head(model)
    blueprint = Blueprint(
        kind=type(model).__name__,
        config=model.config.get_text_config(),
        parameters={name: p.shape for name, p in model.named_parameters()},
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        input_embedding=_input_embedding(model),
        added_rows=len(rows),
        grown=model.num_parameters() - in_files,
        nested=bool(_packed(settings).get("bnb_4bit_use_double_quant", not _packed(settings))),
        trained_matrices=len(trainable_rows(model, rows) or ()),
        linears=_linears(model, adapted, config),
        dora=config.lora.dora,
        stacks=_stacks(model, config),
        prefix=layers_prefix(model),
        beside={name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in other_parts(model)},
        why_one_at_a_time=why_one_at_a_time(model),
        shared=_shared(model, blocks),
        norms=[
            [Norm(name, type(m).__name__, m.weight.numel()) for name, m in block.named_modules() if _is_norm(m)]
            for block in blocks
        ],
    )
    lean = all(norm.kind in FORMS for norms in blueprint.norms for norm in norms)
    mlp, attention = why_parts_stay(model, config)
    return replace(blueprint, why_not_tiled=mlp, why_not_lean=attention, lean_norms=lean)


def _input_embedding(model: PreTrainedModel) -> int:
    """Returns the values of the input embedding; 0 if the output head is the same matrix."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return 0 if head is not None and head.weight is embedding.weight else int(embedding.weight.numel())


def _shared(model: PreTrainedModel, blocks: torch.nn.ModuleList) -> frozenset[str]:
    """Returns the names of the parameters that several of ``blocks`` have."""
    uses = Counter(parameter for block in blocks for parameter in block.parameters())
    return frozenset(name for name, parameter in model.named_parameters() if uses[parameter] > 1)


def _stacks(model: PreTrainedModel, config: Config) -> list[Stack]:
    """Describes all stacks of experts of a model."""
    from qlora_sft.model.experts import form_of, parts_of, stack_shape, stacks, target_parameters
    from qlora_sft.model.linears import layers_prefix

    prefix, targets = layers_prefix(model), tuple(f".{name}" for name in target_parameters(model, config.lora))
    found = []
    for path, module, name in stacks(model):
        count, rows, width = stack_shape(module, name)
        form = form_of(module)
        outputs, inputs = (width, rows) if form and form.transposed else (rows, width)
        full, block = f"{path}.{name}", int(path.removeprefix(prefix).split(".")[0])
        adapted = bool(targets) and full.endswith(targets)
        parts = parts_of(module, name)
        found.append(Stack(full, count, inputs, outputs, block, parts, config.model.load_in_4bit, adapted))
    return found


def _linears(model: PreTrainedModel, adapted: Mapping[str, Shape], config: Config) -> list[Linear]:
    """Describes all linear layers of a model."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    from qlora_sft.model.linears import is_linear, layers_prefix, not_quantized

    prefix, skipped = layers_prefix(model), _packed(model.config).get("llm_int8_skip_modules")
    kept = HfQuantizer.get_modules_to_not_convert(model, skipped) if skipped else not_quantized(model)
    head = model.get_output_embeddings()

    def quantized(name: str, module: torch.nn.Linear) -> bool:
        if module is head and config.model.head_in_4bit:
            return True
        plain = type(module) is torch.nn.Linear
        return config.model.load_in_4bit and plain and should_convert_module(name, kept)

    return [
        Linear(
            name, module.in_features, module.out_features,
            block=int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else None,
            quantized=quantized(name, module),
            rank=adapted[name].rank if name in adapted else 0,
            head=module is head,
        )
        for name, module in model.named_modules()
        if is_linear(module)
    ]  # fmt: skip


def _packed(settings: PretrainedConfig) -> JsonObject:
    """Returns how a checkpoint was quantised when it was saved; empty for one in 16 bits."""
    return dict(getattr(settings, "quantization_config", None) or {})


def _is_norm(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and weight is not None and weight.dim() == 1


@dataclass(frozen=True)
class WeightFiles:
    """Holds what the headers of a model's files say of its weights."""

    nbytes: int
    parameters: int
    note: str
    """What does not fit the configuration; empty if all does."""


def check_headers(blueprint: Blueprint, base: str) -> WeightFiles:
    """Reads what the weights' files of ``base`` hold and compares it with its configuration.

    A checkpoint in 4 bits counts too: its packed tensors hold two parameters per byte.
    """
    headers = base_headers(base)
    packed = any("quant_state" in name for name in headers)
    held = sum(_parameters(name, header) for name, header in headers.items())
    spare = held - (blueprint.n_parameters - blueprint.grown)
    note = ""
    tied = {
        name for name in headers if name.endswith("lm_head.weight")
    } and "lm_head.weight" not in blueprint.parameters
    if spare < 0 and not packed:
        note = f"the files hold {-spare:,} parameters fewer than config.json asks for: an incomplete download?"
    elif spare > 0 and not packed and not tied:
        note = (
            f"the files hold {spare:,} parameters that a language model does not use (images, sound, or a second head)"
        )
    return WeightFiles(sum(header.nbytes for header in headers.values()), held, note)


def _parameters(name: str, header: Header) -> int:
    """Returns the parameters that one tensor of a file holds; 0 for the tensors that only undo a quantisation."""
    if any(mark in name for mark in (".absmax", ".quant_map", ".nested_", ".quant_state")):
        return 0
    count = 1
    for size in header.shape:
        count *= size
    return 2 * count if header.dtype == "U8" else count
