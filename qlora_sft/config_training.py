"""Define the training section of the configuration, and what of it makes no sense together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from qlora_sft.config_data import DataConfig, Require
from qlora_sft.ranges import Count, CountOrNone, Range


@dataclass(frozen=True)
class TrainingConfig:
    """Sets optimizer, schedule, batches and checkpoints."""

    learning_rate: Annotated[float, Range(1e-10, 1)] = 2e-4
    """The highest learning rate of the run, which is reached after the warm-up."""
    epochs: Annotated[float, Range(0, 10_000, above=True)] = 1.0
    """How often the run goes through the mixture. With 0.5 it uses half of the rows of every source, drawn at
    random."""
    max_steps: Count | None = None
    """Stops after this many optimizer steps; default: all epochs."""
    batch_size: Annotated[int, Range(1, 100_000)] = 1
    """Packed sequences per micro-batch."""
    gradient_accumulation: Annotated[int, Range(1, 1_000_000)] = 1
    """Micro-batches per optimizer step. The loss is weighted by tokens over all of them together."""
    tokens_per_step: Count | None = None
    """Tokens per optimizer step, instead of gradient_accumulation: accumulates the number of micro-batches that comes
    nearest to it, given what a packed sequence holds on average."""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """Learning rate after the warm-up: it falls to zero linearly or along a cosine, stays constant, or stays constant
    and falls linearly at the end (``wsd``: warm-up, stable, decay)."""
    warmup_ratio: Annotated[float, Range(0, 1, below=True)] = 0.1
    """Share of the steps in which the learning rate rises."""
    warmup_steps: Count | None = None
    """Number of steps in which the learning rate rises, instead of warmup_ratio."""
    initial_rate_fraction: Annotated[float, Range(0, 1, above=True)] | None = None
    """Share of the learning rate at which the warm-up begins; default: 1 / (its steps + 1)."""
    decay_ratio: Annotated[float, Range(0, 1, above=True)] | None = None
    """With schedule wsd: share of the steps in which the learning rate falls; default: 0.2."""
    weight_decay: Annotated[float, Range(0, 1)] = 0.0
    """AdamW's weight decay: every step subtracts this share of a weight, times the learning rate. Adapters decay;
    magnitudes of DoRA and rows of new tokens do not."""
    new_tokens_rate: Annotated[float, Range(1e-10, 1)] | None = None
    """The highest learning rate of the rows of control tokens that a chat template adds; default: learning_rate."""
    neftune_alpha: Annotated[float, Range(0, 1000, above=True)] | None = None
    """Adds noise to the embeddings in training (NEFTune; its authors take 5), by the length of each document, also of
    those that share a packed sequence; default: none."""
    max_grad_norm: Annotated[float, Range(0, 1e9, above=True)] = 1.0
    """A gradient with a larger norm is scaled down to this norm; 1e9 in effect turns this off."""
    save_steps: CountOrNone = 50
    """Optimizer steps between checkpoints, from which ``--resume`` continues. The last step is saved, too. With 0 a
    checkpoint is saved only when the run is interrupted."""
    save_total_limit: Count = 2
    """How many checkpoints are kept; the oldest go first."""
    optimizer: Literal["auto", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = "auto"
    """``auto``: adamw_8bit on a GPU, adamw_torch_fused on a CPU."""
    replay_kl: Annotated[float, Range(0, 1e6, above=True)] | None = None
    """Keeps the model close to its base on the rows of ``data.replay``: this many times the KL divergence of its
    predictions from those of the base (without the adapter) is added to the loss of each of their supervised tokens.
    The base reads these rows once more in every step. Default: none. With 1 a token's divergence counts as much as its
    loss; a small share of replay needs more."""
    ewc: Annotated[float, Range(0, 1e12, above=True)] | None = None
    """Keeps weights that matter for the rows of ``data.replay`` near their initial values (elastic weight
    consolidation): adds to the loss this many times half the square of every weight's change, times its Fisher
    information on these rows. Default: none. It takes effect from about 1000, because the weights of a layer move
    together and the penalty counts them one by one."""
    keep: Literal["auto", "best", "last"] = "auto"
    """Step whose adapter is saved and exported. ``best``: the best by ``best_metric`` of those that were evaluated
    during training; its checkpoint is kept beside the newest ones. ``auto``: best if ``evaluation.every_steps`` is set
    (``tasks_every_steps`` for the metric of a task), else last."""
    best_metric: str = "held_out"
    """Which evaluation counts as the best, for ``keep`` and ``patience``: ``held_out``, the mean of the sources'
    held-out losses; ``held_out/NAME``, the loss of one of them; ``tasks/NAME``, a task of ``evaluation.tasks``, by its
    share of right answers, or by its loss if it only measures that."""
    patience: Count | None = None
    """Ends the run after this many evaluations in a row without improvement by ``best_metric``; default: never. Needs
    ``evaluation.every_steps``, or ``tasks_every_steps`` for the metric of a task."""
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = field(default_factory=list)
    """Loggers that also get the figures of every step and evaluation; each has to be installed. TensorBoard's files are
    in the run folder; the others write where their own settings say."""

    def accumulated(self, tokens: Sequence[int]) -> int:
        """Returns the micro-batches per optimizer step. tokens: those that are computed for each packed sequence."""
        if self.tokens_per_step is None:
            return self.gradient_accumulation
        batches = max(1, math.ceil(len(tokens) / self.batch_size))
        return max(1, round(self.tokens_per_step / max(1.0, sum(tokens) / batches)))


def check_training(t: TrainingConfig, require: Require) -> None:
    """Requires that no setting of batches and schedule is without effect beside another."""
    # A key that has no effect would be believed to have one.
    one_batch = t.tokens_per_step is None or t.gradient_accumulation == 1
    require(one_batch, "training.tokens_per_step", "decides the accumulation; remove training.gradient_accumulation")
    one_warmup = t.warmup_steps is None or t.warmup_ratio in (0.0, TrainingConfig.warmup_ratio)
    require(one_warmup, "training.warmup_steps", "replaces training.warmup_ratio; remove one of them")
    warm = t.warmup_steps is not None or t.warmup_ratio > 0
    require(
        warm or t.initial_rate_fraction is None, "training.initial_rate_fraction", "has no effect without a warm-up"
    )
    wsd = t.schedule == "wsd"
    require(wsd or t.decay_ratio is None, "training.decay_ratio", "has an effect with training.schedule=wsd only")
    room = t.warmup_steps is not None or not wsd or t.warmup_ratio + (t.decay_ratio or 0) <= 1
    require(room, "training.decay_ratio", "and training.warmup_ratio are more than the whole run")


def check_tethers(t: TrainingConfig, d: DataConfig, require: Require) -> None:
    """Requires the rows on which a run is held to its base."""
    for key, value in (("training.replay_kl", t.replay_kl), ("training.ewc", t.ewc)):
        require(value is None or d.replay is not None, key, "needs data.replay, the rows that tell what is to be kept")
    apart = "needs the rows of data.replay by themselves, which data.share_prefixes=on mixes: remove one of them"
    require(t.replay_kl is None or d.share_prefixes != "on", "training.replay_kl", apart)
