"""Chooses how a GPU attends inside documents by a short measurement of the run's own shape, before its model is loaded.

The ways are torch's varlen FlashAttention, sdpa document by document, and FlashAttention 3 and 4 through torch's own
switch where their packages are installed. A way may be chosen only if packed documents come out as they do alone, in
plain products, with their gradients. A run that goes on attends as it began, unmeasured: all ways round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from qlora_sft.errors import ConfigError, first_line
from qlora_sft.model.attention import Way, choose_path, document_attention, head_size_of
from qlora_sft.model.attention_capped import Scores, plain_documents
from qlora_sft.model.attention_choice import FEW, AttentionChoice, Wanted
from qlora_sft.model.block_mask import needs_flex
from qlora_sft.model.bounds import lengths_of
from qlora_sft.model.flash_switch import IMPLEMENTATIONS, installed_flash, switch_flash

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Tokens that are measured, at most: 0.1 s of an 8B's layer on a card of 100 teraflops.
TOKENS = 16_384
# Lengths among them, at most: cuDNN plans anew for each, and the measurement is to be short.
KINDS = 4
REPEATS = 5
# Seconds after which no way is begun or repeated.
SECONDS = 1.2
# Another way than varlen has to be faster by so much, which is more than a measurement is off by.
MARGIN = 0.05
# Documents of the check, and what rounding explains of the relative difference of outputs and gradients.
CHECKED = (11, 1, 130)
TOLERANCE = 3e-2

# A window that ends inside the longest of them.
WINDOW = 40

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int | None], Tensor]
"""Takes query [1, H, T, d], key and value [1, Hkv, T, d], the bounds of documents, and how many tokens each sees (None:
all before it and itself); returns [1, T, H, d]."""


class Shape(NamedTuple):
    """Holds the query heads of a layer, its key and value heads, their size, and whether layers attend to a window."""

    heads: int
    groups: int
    size: int
    windowed: bool = False


class Figure(NamedTuple):
    """Holds what was found of one way."""

    milliseconds: float | None
    """The fastest forward and backward, which other work on the machine lengthens least; None if it cannot be taken."""
    obstacle: str = ""

    def __str__(self) -> str:
        return f"{self.milliseconds:.2f} ms" if self.milliseconds is not None else f"left out ({self.obstacle})"


def settle_attention(
    config: PretrainedConfig, wanted: Wanted, device: torch.device, dtype: torch.dtype, lengths: Sequence[int]
) -> AttentionChoice:
    """Returns the way to attend for a run of documents with ``lengths`` tokens, and why.

    config: transformers' configuration of the language model. wanted: ``model.attention``. Raises `ConfigError` for a
    way that was asked for and is not available.
    """
    shape = shape_of(config)
    path = choose_path(device, dtype, shape.size, needs_flex(config))
    if wanted != "auto":
        choice = AttentionChoice(wanted, f"model.attention={wanted}")
        if wanted in IMPLEMENTATIONS and path.name == "varlen":
            check_named(wanted, shape, device, dtype, attend_by(wanted))
    elif path.name != "varlen":
        choice = AttentionChoice("varlen", f"nothing was measured: {path.name}, {path.reason}")
    elif getattr(config, "kv_lora_rank", None):
        choice = AttentionChoice("varlen", "nothing was measured: heads of keys and values have different sizes")
    else:
        choice = measured_choice(shape, device, dtype, lengths, {way: attend_by(way) for way in candidates()})
    if path.name == "varlen":
        switch_flash(choice.way)
    return choice


def check_named(way: Way, shape: Shape, device: torch.device, dtype: torch.dtype, attend: Attend) -> None:
    """Raises `ConfigError` if a FlashAttention that was asked for is not available or does not keep documents apart."""
    with flash_of(way):
        try:
            obstacle = obstacle_of(attend, shape, device, dtype)
        except Exception as error:  # as a package may raise anything
            obstacle = first_line(error) or type(error).__name__
    if obstacle:
        raise ConfigError(f"model.attention={way}: {obstacle}; set it to auto, or to varlen for a run that is resumed")


def measured_choice(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    lengths: Sequence[int],
    ways: Mapping[Way, Attend],
    clock: Callable[[], float] | None = None,
) -> AttentionChoice:
    """Returns the fastest of ``ways`` over some of the documents, with the figures of all.

    clock: returns seconds when all that was begun is done; by default the device's.
    """
    clock = clock or (synchronized if device.type == "cuda" else perf_counter)
    some = some_documents(lengths)
    different = len(set(lengths))
    inputs = _inputs(shape, some, device, dtype)
    # What a process does once, such as loading kernels, is not the first way's.
    with suppress(Exception):
        _once(next(iter(ways.values())), inputs)
    deadline = clock() + SECONDS
    figures: dict[Way, Figure] = {}
    for way, attend in ways.items():
        if way == "sdpa" and different > FEW:
            # Its plans are made once for every length, which the measurement would not show.
            figures[way] = Figure(None, f"{different:,} different lengths, and cuDNN builds a plan for each")
        elif clock() > deadline:
            figures[way] = Figure(None, "no time left to measure it")
        else:
            figures[way] = _figure(way, attend, shape, inputs, clock, deadline)
    del inputs
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return _fastest(figures, f"forward and backward of a layer, {sum(some):,} tokens in {_count(some)}")


def _fastest(figures: Mapping[Way, Figure], what: str) -> AttentionChoice:
    """Returns the way with the smallest figure; varlen, which needs the least memory, if none is clearly faster."""
    told = "; ".join(f"{way} {figure}" for way, figure in figures.items())
    taken = {way: figure.milliseconds for way, figure in figures.items() if figure.milliseconds is not None}
    if not taken:
        return AttentionChoice("varlen", f"nothing could be measured: {told}")
    best = min(taken, key=lambda way: taken[way])
    if "varlen" in taken and taken[best] > taken["varlen"] * (1 - MARGIN):
        best = "varlen"
    return AttentionChoice(best, f"measured: {told}; {what}")


def _figure(
    way: Way, attend: Attend, shape: Shape, inputs: list[Tensor], clock: Callable[[], float], deadline: float
) -> Figure:
    try:
        with flash_of(way):
            if obstacle := obstacle_of(attend, shape, inputs[0].device, inputs[0].dtype):
                return Figure(None, obstacle)
            _once(attend, inputs)
            seconds: list[float] = []
            while not seconds or (len(seconds) < REPEATS and clock() < deadline):
                started = clock()
                _once(attend, inputs)
                seconds.append(clock() - started)
    except Exception as error:  # a package that refuses a shape may raise anything, an AssertionError too
        return Figure(None, first_line(error) or type(error).__name__)
    return Figure(1000 * min(seconds))


def obstacle_of(attend: Attend, shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns how packed documents differ from the same documents alone, with a window if the model has one; None if
    they agree."""
    for window in (None, WINDOW) if shape.windowed else (None,):
        difference = differs(attend, shape, device, dtype, window)
        # A difference that is not a number is no agreement either.
        if not difference <= TOLERANCE:
            where = f" under a window of {window} tokens" if window else ""
            return f"packed documents differ from the same documents alone by {difference:.0e}{where}"
    return None


def differs(attend: Attend, shape: Shape, device: torch.device, dtype: torch.dtype, window: int | None = None) -> float:
    """Returns the largest relative difference of output and gradients of packed documents from the same documents
    alone, in plain products in float32."""
    q, k, v, gradient, bounds = _inputs(shape, CHECKED, device, dtype)
    packed = attend(q, k, v, bounds, window)
    found = [packed, *torch.autograd.grad(packed, (q, k, v), gradient)]
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    parts = [
        plain_documents(a, b, c, torch.tensor([0, a.shape[2]], dtype=torch.int32, device=device), Scores(window=window))
        for a, b, c in zip(*(x.split(CHECKED, dim=2) for x in exact), strict=True)
    ]
    alone = torch.cat(parts, dim=1)
    right = [alone, *torch.autograd.grad(alone, exact, gradient.float())]
    return max(
        float((ours.detach().float() - theirs.detach()).norm() / theirs.detach().norm())
        for ours, theirs in zip(found, right, strict=True)
    )


def _once(attend: Attend, inputs: list[Tensor]) -> None:
    q, k, v, gradient, bounds = inputs
    torch.autograd.grad(attend(q, k, v, bounds, None), (q, k, v), gradient)


def _inputs(shape: Shape, lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Returns query, key, value, a gradient and the bounds of documents of ``lengths``; they are the same in every
    call."""
    generator = torch.Generator(device).manual_seed(0)
    tokens, (heads, groups, size, _) = sum(lengths), shape
    drawn = [
        torch.randn(1, tokens, count, size, generator=generator, device=device, dtype=dtype)
        for count in (heads, groups, groups, heads)
    ]
    # As the projections leave them: [1, T, H, d] in memory, seen as [1, H, T, d].
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in drawn[:3])
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return [q, k, v, drawn[3], bounds]


def some_documents(lengths: Sequence[int], tokens: int = TOKENS) -> list[int]:
    """Returns a few of the lengths, evenly spaced among all and repeated, of at most ``tokens`` together."""
    ordered = sorted(lengths)
    count = min(KINDS, len(ordered))
    # In the middle of each of so many equal stretches; long ones first, because most of the time goes into them.
    chosen = [min(tokens, ordered[(2 * i + 1) * len(ordered) // (2 * count)]) for i in reversed(range(count))]
    while sum(chosen) > tokens:
        chosen.pop()
    return chosen * max(1, min(tokens // sum(chosen), len(ordered) // count))


def _count(documents: Sequence[int]) -> str:
    return "1 document" if len(documents) == 1 else f"{len(documents):,} documents"


def shape_of(config: PretrainedConfig) -> Shape:
    """Returns the heads of a model's layers. ``config``: transformers' configuration of the language model."""
    heads = getattr(config, "num_attention_heads", None)
    heads = heads if isinstance(heads, int) and heads else 1
    groups = getattr(config, "num_key_value_heads", None)
    groups = groups if isinstance(groups, int) and groups else heads
    return Shape(heads, groups, head_size_of(config), has_windows(config))


def has_windows(config: PretrainedConfig) -> bool:
    """Says whether any layer may attend to a window."""
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else bool(getattr(config, "sliding_window", None))


def candidates() -> list[Way]:
    """Returns the ways that this torch and its packages have on a GPU."""
    return ["varlen", "sdpa", *installed_flash()]


def attend_by(way: Way) -> Attend:
    """Returns attention as a model's layers will have it."""
    layer = nn.Module()

    def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, window: int | None) -> Tensor:
        longest = max(lengths_of(bounds))
        return document_attention(
            layer, q, k, v, None, cu_seq_lens_q=bounds, max_length_q=longest, sliding_window=window,
            one_by_one=way == "sdpa",
        )[0]  # fmt: skip

    return attend


@contextmanager
def flash_of(way: Way) -> Iterator[None]:
    """Switches torch to the FlashAttention of ``way`` inside the ``with`` block, and back to its own."""
    switch_flash(way)
    try:
        yield
    finally:
        switch_flash("varlen")


def synchronized() -> float:
    """Returns the seconds of a clock, when the GPU has done all that it was given."""
    torch.cuda.synchronize()
    return perf_counter()
