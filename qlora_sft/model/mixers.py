"""Keeps recurrent and convolutional layers (gated delta nets, Mamba, short convolutions) inside each packed document.

Their state passes from one token to the next, so behind the end of a document it has to begin anew. transformers hands
the bounds on (``seq_idx``, ``cu_seq_lens_q``) to the kernels of causal-conv1d, flash-linear-attention and mamba-ssm,
where those are installed; its plain torch operations take no notice of them. There a mixer is run document by document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_sft.model.attention_tree import tree_of
from qlora_sft.model.base import decoder_layers
from qlora_sft.model.bounds import lengths_of

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel

# Mixers without a convolution, by the name of their class.
WITHOUT_CONVOLUTION = {"MiniMaxLightningAttention"}
# The arguments that tell a kernel or an attention function where documents begin. A mixer that sees a single document
# needs none of them.
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class ByDocument(nn.Module):
    """Runs the forward of a mixer once per document; `mix_by_document` derives a class from this and the mixer's."""

    document_bounds: Tensor | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bounds = self.document_bounds
        if bounds is not None and tree_of(bounds) is not None:
            raise ValueError("recurrent layers cannot share prefixes of documents; set data.share_prefixes=off")
        lengths = [] if bounds is None else lengths_of(bounds)
        if len(lengths) < 2:
            return super().forward(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in BOUNDS}
        parts = zip(*(_split(each, lengths) for each in (args, kwargs)), strict=True)
        return _joined([super(ByDocument, self).forward(*some, **named) for some, named in parts])


def mixers_of(layer: nn.Module) -> list[nn.Module]:
    """Returns the modules of a decoder layer that mix tokens in another way than by attention."""
    return [module for module in layer.modules() if _is_mixer(module)]


def _is_mixer(module: nn.Module) -> bool:
    convolves = any(isinstance(child, nn.Conv1d) for child in module.children())
    return convolves or type(module).__name__ in WITHOUT_CONVOLUTION


def mix_by_document(model: CausalModel) -> int:
    """Makes every mixer of ``model`` run one document after the other; returns how many there are.

    The bounds are those that its decoder layer is called with, so a layer that is computed again has those of its own
    forward.
    """
    count = 0
    for layer in decoder_layers(model):
        mixers = [module for module in mixers_of(layer) if not isinstance(module, ByDocument)]
        for mixer in mixers:
            run_by_document(mixer)
        if mixers:
            layer.register_forward_pre_hook(_hand_bounds, with_kwargs=True)
        count += len(mixers)
    return count


def run_by_document(module: nn.Module) -> None:
    """Makes ``module`` run once per document, as its ``document_bounds`` say; at first they say nothing.

    It keeps its parameters and their names; its class becomes one that is derived from it.
    """
    kind = type(module)
    module.__class__ = type(kind.__name__, (ByDocument, kind), {})
    module.document_bounds = None  # type: ignore[assignment]


def _hand_bounds(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for module in layer.modules():
        if isinstance(module, ByDocument):
            module.document_bounds = kwargs.get("cu_seq_lens_q")


def use_adapted_projections(model: CausalModel) -> None:
    """Keeps Mamba's mixers from a kernel for training that reads the weights of their projections by itself.

    It would pass by the adapters of ``out_proj``, and take packed 4-bit weights for numbers. A mixer takes it only
    while its own ``training`` is set, for which it has no other use; its layers keep theirs.
    """
    for layer in decoder_layers(model):
        for module in mixers_of(layer):
            if hasattr(module, "A_log"):
                module.register_forward_pre_hook(_not_training)


def _not_training(mixer: nn.Module, args: tuple[Any, ...]) -> None:
    mixer.training = False


def _split(tree: Any, lengths: Sequence[int]) -> list[Any]:
    """Returns what each document gets of ``tree``, which is an argument or a tuple or dict of arguments.

    Tensors [1, T, ...] are cut along the tokens; everything else goes to every document as it is.
    """
    if isinstance(tree, Tensor) and tree.dim() > 1 and tree.shape[1] == sum(lengths):
        return list(tree.split(list(lengths), dim=1))
    if isinstance(tree, tuple):
        return [tuple(each) for each in zip(*(_split(item, lengths) for item in tree), strict=True)] or [()] * len(
            lengths
        )
    if isinstance(tree, dict):
        names = list(tree)
        cut = [_split(value, lengths) for value in tree.values()]
        return [dict(zip(names, each, strict=True)) for each in zip(*cut, strict=True)] or [{}] * len(lengths)
    return [tree] * len(lengths)


def _joined(results: list[Any]) -> Any:
    first = results[0]
    if isinstance(first, Tensor):
        return torch.cat(results, dim=1)
    if isinstance(first, tuple):
        return tuple(_joined(list(each)) for each in zip(*results, strict=True))
    return first
