"""Let several processes train one model together, as `torchrun` and `accelerate launch` start them.

Without such a launcher there is one process, and nothing here imports torch.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from qlora_sft.errors import ConfigError, EndedTogether, QloraSftError, RunError

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

T = TypeVar("T")
# Seconds between two looks at what the first process has done.
LOOK = 0.02


def world_size() -> int:
    """Returns the number of processes that were started to train together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Returns the number of this process, from 0."""
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


def processes_here() -> int:
    """Returns how many of the processes are on this machine, whose memory they share."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if world_size() > 1 else 1


def refuse(problem: str) -> None:
    """Raises a `ConfigError` that all processes have alike; the first says it."""
    raise ConfigError(problem) if rank() == 0 else EndedTogether(ConfigError.exit_code)


class Cut(Protocol):
    """Describes a model that no process has whole (`model/shards.py`)."""

    def lead(self) -> AbstractContextManager[None]:
        """Lets the first process use the model alone in the body, while the others `follow`."""
        ...

    def follow(self) -> None:
        """Gives the first process what it asks for, until its `lead` is over."""
        ...


class Ranks:
    """Connects this process with the others of the run. A process without others has rank 0 of 1.

    What the first process does alone may take hours (an evaluation), so the others look for it in a store and no
    time-out ends them. Within a step all wait for each other.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None):
        self.rank, self.size, self._store = rank, size, store
        self.first = rank == 0
        self.alone = size == 1
        self._runs = self._turns = self._depth = 0
        self.cut: Cut | None = None
        """The model of the run, where it is cut over the processes."""

    # -------------------------------------------------------------- the first process and the others

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Ends all processes when its body fails in one. The first that fails raises its error, and the others
        `EndedTogether`, so that the cause is printed once."""
        if self.alone or self._depth:
            yield
            return
        from torch.distributed import destroy_process_group

        self._runs, self._turns, self._depth = self._runs + 1, 0, 1
        try:
            yield
        except BaseException as error:
            # To take leave of others that do not answer any more could take for ever.
            atexit.unregister(destroy_process_group)
            if isinstance(error, EndedTogether) or not self._is_first_to_fail():
                raise EndedTogether(_exit_code(error)) from None
            raise
        finally:
            self._depth, self.cut = 0, None

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """Lets the first process finish the body before the others begin it, and find what it has left in the cache."""
        if self.alone:
            yield
            return
        turn = self._next_turn()
        if not self.first:
            self._wait_for(turn)
        yield
        if self.first:
            self._kept.set(turn, "null")

    def from_first(self, work: Callable[[], T]) -> T:
        """Returns in every process what ``work`` returns in the first, which must be something that JSON can hold.

        ``work`` may use the model.
        """
        if self.alone:
            return work()
        turn = self._next_turn()
        if self.first:
            with self.helped():
                result = work()
            self._kept.set(turn, json.dumps(result))
            return result
        self.help_first()
        self._wait_for(turn)
        received: T = json.loads(self._kept.get(turn))
        return received

    @contextmanager
    def helped(self) -> Iterator[None]:
        """Lets the first process use the model alone in the body. The others call `help_first` meanwhile."""
        if self.cut is None:
            yield
            return
        with self.cut.lead():
            yield

    def help_first(self) -> None:
        """Helps the first process in what it does `helped`. Returns at once where every process has the whole model."""
        if self.cut is not None:
            self.cut.follow()

    @property
    def _kept(self) -> Store:
        assert self._store is not None, "a process without others has nothing to keep for them"
        return self._store

    def _next_turn(self) -> str:
        self._turns += 1
        return f"qlora_sft run {self._runs} turn {self._turns}"

    def _wait_for(self, turn: str) -> None:
        while not self._kept.check([turn]):
            if self._kept.check([self._failed]):
                raise EndedTogether(1)
            time.sleep(LOOK)

    @property
    def _failed(self) -> str:
        return f"qlora_sft run {self._runs} failed"

    def _is_first_to_fail(self) -> bool:
        try:
            return bool(self._kept.add(self._failed, 1) == 1)
        except RuntimeError:  # the process that kept the store has ended before
            return self.first

    # -------------------------------------------------------------- within a step

    def gather(self, own: T) -> list[T]:
        """Returns what all processes have given, in the order of their ranks."""
        if self.alone:
            return [own]
        from torch.distributed import all_gather_object

        result: list[T | None] = [None] * self.size
        with naming_lost():
            all_gather_object(result, own)
        return cast(list[T], result)

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces each of ``tensors`` by its sum over all processes, which comes to the same bits in each."""
        from torch.distributed import all_reduce

        with naming_lost():
            for work in [all_reduce(each, async_op=True) for each in tensors]:
                if work is not None:
                    work.wait()

    def take_from_first(self, tensors: Sequence[torch.Tensor]) -> None:
        """Gives each of ``tensors`` the values that it has in the first process."""
        if self.alone:
            return
        from torch.distributed import broadcast

        with naming_lost():
            for each in tensors:
                broadcast(each, src=0)


@contextmanager
def naming_lost() -> Iterator[None]:
    """Raises a `RunError` with the likely cause where another process has gone."""
    from torch import OutOfMemoryError

    try:
        yield
    except OutOfMemoryError:  # it is a RuntimeError too
        raise
    except RuntimeError as error:
        raise RunError(
            "another process of this run has ended without a message: it was killed, perhaps because host memory ran "
            f"out. --resume goes on from the newest checkpoint, if there is one ({str(error).splitlines()[0]})"
        ) from None


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, QloraSftError) else 1
