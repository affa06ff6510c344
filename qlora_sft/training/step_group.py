"""Computes the micro-batches of one optimizer step, and does them again with less kept where a GPU is full.

Of several processes each has micro-batches of its own. At the end of a step they add up their gradients; where the base
is cut over them (`model/shards.py`) they also go from micro-batch to micro-batch together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from qlora_kernels.offload import drop_failed_graphs
from torch import Tensor

from qlora_sft.data.batch import Batch
from qlora_sft.errors import first_line
from qlora_sft.model.full_memory import free_memory, is_gpu_full
from qlora_sft.model.hidden import one_at_a_time
from qlora_sft.model.shards import shards_of
from qlora_sft.training.guards import RngState
from qlora_sft.training.join import join_ranks
from qlora_sft.training.totals import StepTotals, all_together

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qlora_sft.model.base import CausalModel

Compute = Callable[[Batch], Tensor]
"""Runs forward and backward of a micro-batch and returns its loss."""


class GroupEnd(NamedTuple):
    """Holds what a process tells the others when its part of an optimizer step is done."""

    obstacle: str | None
    """Why the step does not fit its GPU, if it does not."""
    signalled: bool
    """Whether a signal has asked it to stop."""
    without: list[bool]
    """Which trained parameters have no gradient."""
    totals: StepTotals


class Full(NamedTuple):
    """Says why a GPU was full, and whether it was the one of this process."""

    why: str
    own: bool = True


class StepGroup:
    """Holds the micro-batches of one optimizer step, and the results so far."""

    def __init__(self, model: CausalModel, accelerator: Accelerator, keep_less: Callable[[str], bool]):
        """Takes what the steps of ``model`` need.

        accelerator: its gradient scaler is used in float16. keep_less: makes the layers keep less, for the reason it is
        given; returns False if they keep the least already.
        """
        self.model, self.accelerator, self.keep_less = model, accelerator, keep_less
        self.ranks, self.shards = join_ranks(), shards_of(model)
        self._rng_state = RngState()
        self.begin([])

    def begin(self, batches: list[Batch]) -> None:
        """Begins a step; none of its micro-batches is done yet."""
        self.batches, self._done = batches, 0
        self.totals = StepTotals()
        self._obstacle: str | None = None

    @property
    def is_done(self) -> bool:
        """Says whether all micro-batches of the step are done."""
        return self._done == len(self.batches)

    def next_loss(self, batch: Batch, compute: Compute) -> Tensor:
        """Computes the next micro-batch of the step and returns its loss, which is 0 for an empty one.

        If the GPU is full, the micro-batches up to this one are computed again while every layer keeps less. They get
        the same random numbers, so the step has the same result. If even that does not fit, it returns 0, and `end`
        says why.
        """
        if self._done == 0:
            # A resumed run sets the random numbers only when it has taken its first batch, so they are read here.
            self._rng_state = RngState()
        loss = None if self._obstacle is not None else self._loss_of(batch, compute)
        self._done += 1
        if loss is not None:
            return loss
        zero = torch.zeros((), device=self.accelerator.device)
        scaler = None if self._obstacle is not None else self.accelerator.scaler
        # The scaler makes its scale for the first loss that it is given. Other processes may have gradients.
        scaled: Tensor = zero if scaler is None else scaler.scale(zero)
        return scaled

    def end(self, signalled: bool) -> tuple[str | None, bool]:
        """Ends the step: adds up what all processes have computed.

        signalled: whether this process was asked to stop. Returns why the step does not fit the GPU of one of them, if
        that is so, and whether one was asked to stop.
        """
        trained = [p for p in self.model.parameters() if p.requires_grad]
        totals = self.totals if self.ranks.alone else self.totals.in_numbers()
        ends = self.ranks.gather(GroupEnd(self._obstacle, signalled, [p.grad is None for p in trained], totals))
        stop = any(end.signalled for end in ends)
        if obstacles := [end.obstacle for end in ends if end.obstacle is not None]:
            self._begin_again()
            return obstacles[0], stop
        if self.ranks.alone:
            return None, stop
        self.totals = all_together([end.totals for end in ends])
        # What has no gradient in any process has none in one process either, and is passed over by the optimizer.
        unused = [all(flags) for flags in zip(*(end.without for end in ends), strict=True)]
        used = [p for p, passed_over in zip(trained, unused, strict=True) if not passed_over]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.ranks.add_up([p.grad for p in used if p.grad is not None])
        return None, stop

    # -------------------------------------------------------------- a GPU that is full

    def _loss_of(self, batch: Batch, compute: Compute) -> Tensor | None:
        """Returns the loss of a micro-batch after its backward; None for an empty one, and where the GPU is full."""
        loss, full = self._try([batch], compute)
        if full is not None:
            so_far = self.batches[: self._done + 1]
            self._begin_again()
            if self._can_keep_less(full):
                loss, full = self._try(so_far, compute)
            self._done = len(so_far) - 1
            self._obstacle = None if full is None else full.why
        return loss

    def _can_keep_less(self, full: Full) -> bool:
        """Returns whether a step that found a GPU full can be tried again, with less kept by the processes that found
        it full."""
        less = self.keep_less(full.why) if full.own else True
        return less if self.shards is None else all(self.ranks.gather(less))

    def _try(self, batches: list[Batch], compute: Compute) -> tuple[Tensor | None, Full | None]:
        """Returns the loss of the last of ``batches`` that is not empty and None, or None and the reason if the GPU was
        full.

        When it returns, the memory that the failed graph held is free.
        """
        loss = None
        for batch in batches:
            why = None
            self._begin_round(batch)
            try:
                if batch["lengths"]:
                    loss = compute(batch)
            except RuntimeError as error:
                if not is_gpu_full(error):
                    raise
                why = first_line(error)
            # Only here, where the error has gone with all that its traceback held.
            if (full := self._end_round(why)) is not None:
                return None, full
        return loss, None

    def _begin_again(self) -> None:
        """Drops all gradients of the step and sets the random numbers back to its first micro-batch."""
        _free_failed()
        self.model.zero_grad()
        self._rng_state.restore()
        self.begin(self.batches)

    # -------------------------------------------------------------- a base that is cut

    def _begin_round(self, batch: Batch) -> None:
        """Agrees with the other processes, if the base is sharded, on how often all layers run for this micro-batch."""
        if self.shards is None:
            return
        parts = [batch["lengths"]] if batch["lengths"] else []
        parts += [batch["replayed"]["documents"]["lengths"]] if batch.get("replayed") else []
        apart = one_at_a_time(self.model)
        runs = [len(lengths) if apart else 1 for lengths in parts]
        every = self.ranks.gather((sum(runs), runs[0] if runs else 0))
        self.shards.expect(max(forwards for forwards, _ in every), max(backwards for _, backwards in every))

    def _end_round(self, why: str | None) -> Full | None:
        """Ends a micro-batch; returns why a GPU was full. If the base is sharded, that stops all processes."""
        if self.shards is None:
            return None if why is None else Full(why)
        if why is not None:
            _free_failed()
        self.shards.end()
        found = [each for each in self.ranks.gather(why) if each is not None]
        return Full(found[0], own=why is not None) if found else None


def _free_failed() -> None:
    """Frees the memory that a failed backward has left allocated."""
    drop_failed_graphs()
    free_memory()
