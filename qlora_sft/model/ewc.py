"""Holds weights that an old task needs near to what they were: elastic weight consolidation (EWC) for adapters.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks" (2017), add for every weight w with the
Fisher information F, which is the mean of the squared gradient of log p over what the model itself would say::

    penalty = lambda / 2 * sum_ij F_ij (w_ij - w0_ij)^2

Over the factors A and B of a new adapter that would hold nothing: B is zero, so the gradient of A is, and with it its
Fisher information; and both together make the weight, so none of them says alone how far it has moved. So the weights
here are those of the layer itself, whose change is the adapter's ``W - W0 = s (B A - B0 A0)``. B0 and A0 are what the
adapter began with: zero in all, or what another run has learned (``lora.from``).

F of a layer is a matrix as large as its weight. Kept are the sums of its rows and of its columns, and F is taken for
their product, as Adafactor (Shazeer and Stern, 2018) takes the second moments of gradients: of all matrices of rank one
it is the nearest to F in generalised Kullback-Leibler divergence, and has the same sums. With x the input of the layer
at a token and g the gradient of its output, and every token by itself (the "expand" of Eschenhagen et al.,
"Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures", 2023)::

    r_i = sum_t g_ti^2 |x_t|^2     c_j = sum_t x_tj^2 |g_t|^2     F_ij = r_i c_j / (N sum_t |g_t|^2 |x_t|^2)

N is the number of predictions, so F is that of one, and ``1/2 sum F (W - W0)^2`` the divergence per token that such a
change makes in the second order, if every weight moves by itself. Those of a low rank move together, which the diagonal
of F does not see; so a lambda far above 1 is needed. No matrix as large as the weight is ever formed::

    sum_ij r_i c_j (U V)_ij^2 = sum_kl (U^T diag(r) U)_kl (V diag(c) V^T)_kl
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from qlora_kernels.packed_ce import Targets, packed_linear_cross_entropy
from torch import Tensor, nn

from qlora_sft.atomic import written_file
from qlora_sft.data.batch import Batch, flatten
from qlora_sft.data.render import Rendered
from qlora_sft.errors import ConfigError, RunError, first_line
from qlora_sft.model.leash import Head, head_of, logits_of, positions_at_once
from qlora_sft.model.lora_init import adapted_layers
from qlora_sft.model.loss import last_hidden_states, path_of, to_device

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from qlora_sft.model.base import CausalModel

# Tokens that are looked at, and of a document at most: of each all inputs of all layers are in memory at once.
TOKENS, LONGEST = 16_384, 1024


@dataclass(frozen=True)
class Anchor:
    """Holds what is known of the layer whose adapter is held."""

    rows: Tensor
    """r / N [out]"""
    columns: Tensor
    """c / sum(c) [in]"""
    A: Tensor
    """The factor with which the run began."""
    B: Tensor


ANCHORS = "ewc.safetensors"
Anchors = dict[str, Anchor]
"""Maps the path of a layer in the base to its anchor."""


def penalty(model: PeftModel, anchors: Anchors) -> Tensor:
    """Returns half of the sum of every weight's squared change, times its Fisher information. It has a gradient."""
    total = torch.zeros((), device=model.device)
    with torch.autocast(model.device.type, enabled=False):
        for path, layer in adapted_layers(model):
            total = total + _of_layer(layer, anchors[path])
    return total / 2


def _of_layer(layer: LoraLayer, anchor: Anchor) -> Tensor:
    A, B = (factor["default"].weight.float() for factor in (layer.lora_A, layer.lora_B))
    # B A - B0 A0 as a product of two factors, without taking one large number from another.
    U = torch.cat([B - anchor.B, anchor.B], dim=1)
    V = torch.cat([A, A - anchor.A], dim=0)
    change = (U.T @ (anchor.rows[:, None] * U)) * ((V * anchor.columns) @ V.T)
    total: Tensor = layer.scaling["default"] ** 2 * change.sum()
    return total


class Shape(NamedTuple):
    """Holds the shape of an adapted linear layer."""

    rank: int
    inputs: int
    outputs: int


def shapes_of(model: CausalModel) -> list[Shape]:
    """Returns the shapes of the layers that `penalty` holds."""
    factors = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for _, layer in adapted_layers(model)]
    return [Shape(len(A), A.shape[1], len(B)) for A, B in factors]


def ewc_bytes(shapes: Sequence[Shape]) -> int:
    """Returns the most bytes that the anchors and the graph of the penalty take between forward and backward.

    Of a layer the graph keeps U and V, twice as large as B and A, each once more times its Fisher information, and two
    products of the width of both; all in float32.
    """
    graph = sum(4 * 4 * each.rank * (each.inputs + each.outputs) + 2 * 4 * (2 * each.rank) ** 2 for each in shapes)
    return file_bytes(shapes) + graph


# ------------------------------------------------------------------ the Fisher information


def measure_anchors(
    model: PeftModel, documents: Sequence[Rendered], dtype: torch.dtype, seed: int
) -> tuple[Anchors, str]:
    """Measures the Fisher information of every layer with an adapter on some of ``documents``, drawn with ``seed``;
    returns it with what to say.

    Raises `ConfigError` where a layer does not show what goes into it, and `RunError` if the GPU is full.
    """
    layers = dict(adapted_layers(model))
    sums = {path: _Sums.of(layer) for path, layer in layers.items()}
    draw = torch.Generator(model.device).manual_seed(seed)
    hooks = [layer.register_forward_hook(sums[path].look) for path, layer in layers.items()]
    drops = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.training]
    tokens = count = 0
    for module in drops:
        module.eval()
    try:
        for batch in _batches(documents, seed):
            count += _run(model, to_device(batch, model.device), dtype, draw)
            tokens += batch["input_ids"].numel()
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"training.ewc: the GPU has no room for a row of {LONGEST:,} tokens ({first_line(error)}); free some "
            "of it, or take training.replay_kl instead"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
        for module in drops:
            module.train()
        model.zero_grad()
    if not count or not all(float(each.rows.sum()) > 0 for each in sums.values()):
        raise ConfigError(
            "training.ewc: the rows of data.replay say nothing about some layers; take longer rows, or remove it"
        )
    anchors = {path: sums[path].anchor(layer, count) for path, layer in layers.items()}
    told = f"{len(anchors)} layers, by {count:,} predictions on {tokens:,} tokens of replay (training.ewc)"
    return anchors, told


@dataclass
class _Sums:
    """Sums up the rows and the columns of a layer's Fisher information."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, layer: LoraLayer) -> _Sums:
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return cls(torch.zeros(len(B), device=B.device), torch.zeros(A.shape[1], device=A.device))

    def look(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Has the gradient of ``output`` counted when it comes."""
        if output.requires_grad:
            x = args[0].detach()
            output.register_hook(lambda gradient: self.add(x, gradient))

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Counts the tokens of inputs and gradients [..., width]."""
        x2, g2 = (each.reshape(-1, each.shape[-1]).float().square() for each in (x, gradient))
        self.rows += g2.T @ x2.sum(1)
        self.columns += x2.T @ g2.sum(1)

    def anchor(self, layer: LoraLayer, count: int) -> Anchor:
        A, B = (factor["default"].weight.detach().float().clone() for factor in (layer.lora_A, layer.lora_B))
        return Anchor(self.rows / count, self.columns / self.columns.sum(), A, B)


def _batches(documents: Sequence[Rendered], seed: int) -> Iterator[Batch]:
    """Yields documents of replay, one at a time, until there are enough tokens."""
    seen = 0
    for number in random.Random(f"ewc {seed}").sample(range(len(documents)), len(documents)):
        if seen >= TOKENS:
            return
        document = documents[number]
        short = Rendered(list(document.input_ids[:LONGEST]), list(document.weights[:LONGEST]), document.source)
        batch = flatten([short])
        if batch["n_supervised"]:
            seen += len(short.input_ids)
            yield batch


def _run(model: PeftModel, batch: Batch, dtype: torch.dtype, draw: torch.Generator) -> int:
    """Sends the gradient of what the model would say through it; returns the number of predictions."""
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        hidden = last_hidden_states(model, batch)[0]
        head = head_of(model)
        said = _drawn(hidden.detach()[batch["positions"].long()], head, draw)
        targets = Targets.from_host(batch["positions"], said, batch["position_documents"], 1)
        loss = packed_linear_cross_entropy(
            hidden, head.weight, targets, n_items=1.0, bias=head.bias, path=path_of(model) or "auto", **head.transform
        ).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return len(said)


@torch.no_grad()
def _drawn(hidden: Tensor, head: Head, draw: torch.Generator) -> Tensor:
    """Draws a token for every position [M, D] from the model's own probabilities, int32 [M]."""
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        for some in hidden.float().split(positions_at_once(head.weight.shape[0])):
            parts.append(torch.multinomial(logits_of(some, head)[0].softmax(-1), 1, generator=draw)[:, 0])
    return torch.cat(parts).int()


# ------------------------------------------------------------------ a run that goes on


def file_bytes(shapes: Sequence[Shape]) -> int:
    """Returns the bytes of the tensors that `save_anchors` writes for layers of ``shapes``."""
    return 4 * sum((1 + each.rank) * (each.inputs + each.outputs) for each in shapes)


def save_anchors(anchors: Anchors, file: Path) -> None:
    """Writes the anchors of a run, which it needs to go on."""
    from safetensors.torch import save_file

    tensors = {f"{path}:{name}": value.cpu() for path, each in anchors.items() for name, value in vars(each).items()}
    with written_file(file) as beside:
        save_file({name: value.contiguous() for name, value in tensors.items()}, beside)


def load_anchors(file: Path, device: torch.device) -> Anchors:
    """Returns the anchors that a run began with. Raises `ConfigError` if they are gone."""
    from safetensors.torch import load_file

    if not file.is_file():
        raise ConfigError(
            f"--resume: {file} is gone, which holds what training.ewc keeps; choose another output=... for a new run"
        )
    tensors = load_file(file, device=str(device))
    paths = dict.fromkeys(name.rpartition(":")[0] for name in tensors)
    names = Anchor.__dataclass_fields__
    return {path: Anchor(**{name: tensors[f"{path}:{name}"] for name in names}) for path in paths}
