"""Saves a run from a bad step.

A step whose gradient is not finite is left out. A step that finds the GPU full is repeated while the layers keep less
(`step_group.py`); what that needs is here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import TrainerCallback

from qlora_sft.errors import RunError, first_line
from qlora_sft.say import Say

if TYPE_CHECKING:
    from accelerate.optimizer import AcceleratedOptimizer
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

# After this many steps in a row without a finite gradient the run ends: that is no accident any more.
MOST_SKIPPED = 3


class FiniteSteps(TrainerCallback):  # type: ignore[misc]
    """Leaves out every step whose gradient is not finite, because such a step would make all weights NaN.

    If an update is not finite all the same, it ends the run before a checkpoint of it can be written. In float16 the
    gradient scaler itself leaves such a step out and halves its scale, which may take several steps until it is low
    enough. The run ends if gradients are still not finite at the lowest scale.
    """

    def __init__(self, describe: Callable[[int], str], saved: Callable[[], str], say: Say):
        """Takes what the messages need.

        ``describe`` says which examples the step of a given number was about to learn from, and ``saved`` says which
        checkpoint a new run can go on from.
        """
        self.describe, self.saved, self.say = describe, saved, say
        self._in_a_row = 0
        self._scale = 0.0

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        **_: object,
    ) -> None:
        """Raises `RunError` if the update has left a trained value that is not finite, or if no scale keeps a gradient
        finite in float16."""
        # Only that tells: a fused optimizer is called all the same, and leaves the step out itself.
        if args.fp16 and (scale := optimizer.scaler.get_scale()) < self._scale:
            self._left_out_by_the_scaler(state.global_step, scale)
        if all_finite(model):
            return
        rate = optimizer.param_groups[0]["lr"]
        raise RunError(
            f"step {state.global_step + 1} made values of the adapter that are not finite (learning rate {rate:g}, "
            f"{self.describe(state.global_step)}); lower training.learning_rate, or look at these rows with `preview`; "
            f"{self.saved()}"
        )

    def _left_out_by_the_scaler(self, done: int, scale: float) -> None:
        """Says which step the gradient scaler has left out, and ends the run if its ``scale`` can fall no further."""
        self.say(
            f"step {done + 1} left out: its gradient is not finite in float16 ({self.describe(done)}); the scale of "
            f"the loss is now {scale:g}"
        )
        if scale < 1:
            raise RunError(
                f"the gradient of step {done + 1} is not finite in float16 whatever the loss is scaled by; look at "
                f"these rows with `preview`, lower training.learning_rate, or compute in another model.dtype; "
                f"{self.saved()}"
            )

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        **_: object,
    ) -> None:
        """Drops the gradients before the optimizer sees them if one of them is not finite."""
        if args.fp16:
            self._scale = optimizer.scaler.get_scale()
            return
        trained = [p for p in model.parameters() if p.grad is not None]
        gradients = [p.grad for p in trained if p.grad is not None]
        if torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            self._in_a_row = 0
            return
        for parameter in trained:
            parameter.grad = None  # the optimizer passes over what has none
        self._in_a_row += 1
        step = state.global_step + 1
        self.say(f"step {step} left out: its gradient is not finite ({self.describe(state.global_step)})")
        if self._in_a_row == MOST_SKIPPED:
            raise RunError(
                f"the gradients of steps {step - MOST_SKIPPED + 1} to {step} are not finite, so nothing is learned any "
                "more; look at these rows with `preview`, lower training.learning_rate, or compute in another "
                f"model.dtype; {self.saved()}"
            )


def all_finite(model: nn.Module) -> bool:
    """Tells whether every trained value of ``model`` is a finite number."""
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    # The largest magnitude of all is finite exactly if each value is; asking for it waits for a GPU once.
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(trained, norm_type=torch.inf)))


class RngState:
    """Holds the state of torch's random number generators, so that the same numbers can be drawn again."""

    def __init__(self) -> None:
        self.cpu: Tensor = torch.get_rng_state()
        self.gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        """Sets the generators back to where they were."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu)


def too_full(obstacle: str, saved: str) -> RunError:
    """Returns the error for a step that does not fit the GPU even though every layer keeps as little as it can."""
    return _full(f"with as little kept as possible ({obstacle})", "a smaller training.batch_size", saved)


def update_too_full(error: Exception, saved: str) -> RunError:
    """Returns the error for an optimizer update that found the GPU full.

    Such an update is not repeated, because some weights may have been updated already and others not.
    """
    cure = "training.optimizer=paged_adamw_8bit, a smaller lora.r"
    return _full(f"where the optimizer makes its states and updates the weights ({first_line(error)})", cure, saved)


def measuring_too_full(error: Exception, saved: str) -> RunError:
    """Returns the error for a loss before training, of one packed sequence at a time, that found the GPU full."""
    return _full(f"where the loss before training is measured ({first_line(error)})", "model.head_in_4bit", saved)


def _full(when: str, cure: str, saved: str) -> RunError:
    return RunError(
        f"the GPU is full {when}. Free some of it, or try memory.offload_embeddings, {cure} or a shorter "
        f"data.max_length (`plan` says what fits); {saved}"
    )
