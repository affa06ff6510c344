"""Adapts TRL's SFTTrainer (Unsloth's patched one where Unsloth runs) to our batches and our loss.

Import this module only after `qlora_sft.model.backend.choose_backend`: it imports trl at the top.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from qlora_sft.config import Config
from qlora_sft.data.batch import Batch, Replayed
from qlora_sft.data.collate import PackedCollator
from qlora_sft.errors import EndedTogether
from qlora_sft.evaluation.held_out import autocast
from qlora_sft.model.ewc import penalty
from qlora_sft.model.leash import base_hidden_states, divergence_from
from qlora_sft.model.loss import decode_batch, loss_of
from qlora_sft.model.neftune import EmbeddingNoise
from qlora_sft.model.shards import shards_of
from qlora_sft.say import Say
from qlora_sft.text import as_path
from qlora_sft.training.checkpoints import (
    folder_of,
    go_on_without,
    publish,
    refused_by_disk,
    survive_disk,
    what_is_left,
)
from qlora_sft.training.groups import describe_rates, parameter_groups
from qlora_sft.training.guards import too_full
from qlora_sft.training.join import join_ranks
from qlora_sft.training.model_snapshot import ModelSnapshot, require_unchanged, restore, take_snapshot, undisturbed
from qlora_sft.training.reporting import PROJECT
from qlora_sft.training.run_folder import write_adapter
from qlora_sft.training.schedule import rate_factor, schedule_of
from qlora_sft.training.step_group import StepGroup
from qlora_sft.training.steps import choose_optimizer, deal, micro_batches
from qlora_sft.training.totals import StepTotals

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import TrainerControl

    from qlora_sft.model.base import CausalModel
    from qlora_sft.model.ewc import Anchors
    from qlora_sft.training.interrupt import StopAfterStep
    from qlora_sft.training.watch import Watch


class PackedSFTTrainer(SFTTrainer):  # type: ignore[misc]
    """Replaces SFTTrainer's data preparation, packing and loss by ours.

    One micro-batch is one flat sequence of documents (`Batch`). The loss of every token is divided by the weight of the
    whole accumulation group, so accumulating gives the same gradient as one large batch.

    Each of several processes computes its own micro-batches of a group, and the gradients are added up before the
    update. The model is not wrapped in DistributedDataParallel, which adds gradients up during a backward: a process
    whose GPU was full could then not repeat it, and a process without a micro-batch would have none.
    """

    control: TrainerControl
    optimizer: Optimizer | None

    def __init__(
        self,
        model: CausalModel,
        collate: PackedCollator,
        sequences: list[list[int]],
        config: Config,
        keep_less: Callable[[str], bool],
        say: Say,
        **kwargs: Any,
    ):
        """Builds the trainer and restores what TRL's constructor changes in ``model``.

        keep_less: makes the layers keep less, for the reason it is given; returns False if they keep the least already.
        """
        self.config, self.run, self.say = config, as_path(config.output), say
        self.ranks, self.shards = join_ranks(), shards_of(model)
        alpha = config.training.neftune_alpha
        self.noise = EmbeddingNoise(model, alpha) if alpha is not None else None
        self._snapshot: ModelSnapshot | None = take_snapshot(model)
        super().__init__(
            model=model,
            data_collator=collate,
            train_dataset=Dataset.from_dict({"documents": micro_batches(sequences, deal(config, self.ranks.size))}),
            **kwargs,
        )
        restore(model, self._snapshot)
        # accelerate takes it for wrapped.
        model._is_accelerate_prepared = not self.ranks.alone  # type: ignore[assignment]
        self.computes_in = computed_type(self.args)
        scale_gradients(self.accelerator, self.computes_in)
        self.group = StepGroup(self.accelerator.unwrap_model(self.model), self.accelerator, keep_less)
        self.figures: Callable[[dict[str, float]], dict[str, float]] = lambda logs: logs
        """Adds what was measured of a step to what the trainer logs of it."""
        self.rows_decay = False
        """Whether rows of new tokens decay with the factors, as in a run of an earlier version that goes on."""
        self.watch: Watch | None = None
        """What evaluates while training; it is set where something does."""
        self.stop: StopAfterStep | None = None
        """What signals have asked for; it is set where somebody listens."""
        self.factor: Callable[[int], float] | None = None
        """The share of the highest rate at every step, where it is not that of the run's schedule."""
        self.anchors: Anchors | None = None
        """What training.ewc keeps the weights near to."""
        self.remove_callback(PrinterCallback)  # prints every log entry to stdout
        # Trainer would divide the loss by the accumulation steps once more if it believed otherwise.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, *_: object, **__: object) -> SequentialSampler:
        """Returns a sampler that keeps the order of the sequences, which is the training order of all epochs."""
        return SequentialSampler(self.train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """Creates the schedule of ``training.schedule``, which every group follows from its own learning rate."""
        factor = self.factor or partial(rate_factor, schedule_of(self.config.training, num_training_steps))
        self.lr_scheduler = LambdaLR(optimizer or self.create_optimizer(), factor)
        return self.lr_scheduler

    def create_optimizer(self, model: CausalModel | None = None) -> Optimizer:
        """Creates the optimizer over our groups, in which learning rates and decay may differ."""
        if self.optimizer is not None:
            return self.optimizer
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        groups = parameter_groups(self.model, self.config, self.rows_decay)
        if rates := describe_rates(groups, self.config):
            self.say(f"learning rates: {self.args.learning_rate:g}; {rates}")
        created: Optimizer = kind(groups, **options)
        self.optimizer = created
        return created

    def _save_checkpoint(self, model: CausalModel, trial: object) -> None:
        """Writes the trainer's own checkpoint into a hidden folder and renames it when it is complete.

        Every process adds the state of its random numbers; the first one writes the rest.
        """
        folder = folder_of(self.run, self.state.global_step)
        unfinished = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        obstacle: Exception | None = None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            obstacle = error
        # What to say of the disk, and nothing of another error, which ends the run.
        own = None if obstacle is None else refused_by_disk(obstacle, folder)
        found = [each for each in self.ranks.gather(own) if each is not None]
        try:
            if obstacle is not None and not own:
                raise obstacle
            if "" in found:
                raise EndedTogether(1)  # the process whose error it is says it
            if found:
                go_on_without(found[0], self.say)
            elif self.ranks.first:
                publish(unfinished, folder, self.args.save_total_limit, self.watch.best_step if self.watch else None)
        except Exception as error:
            survive_disk(error, folder, self.say)
        finally:
            if self.ranks.first:
                shutil.rmtree(unfinished, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
        """Writes the adapter as it is saved at the end of the run, without the trainer's pickled arguments."""
        write_adapter(self.model, self.processing_class, Path(output_dir or self.args.output_dir))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hands what the trainer logs to all callbacks, with what was measured of the step."""
        super().log(self.figures(logs), start_time)

    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """Evaluates on held-out data, with our own code. It does not affect the training."""
        metrics: dict[str, float] = {}

        def decided() -> list[bool]:
            metrics.update(self._evaluated())
            return [self.control.should_save, self.control.should_training_stop]

        # The first process evaluates and decides what follows from it; the others wait.
        self.control.should_save, self.control.should_training_stop = self.ranks.from_first(decided)
        self.control.should_evaluate = False
        return metrics

    def _evaluated(self) -> dict[str, float]:
        if self.watch is None:
            raise RuntimeError("the trainer was asked to evaluate, and nothing is to be evaluated")
        with undisturbed(self.accelerator.unwrap_model(self.model)):
            metrics = self.watch.measure(self.state.global_step)
        if metrics:
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def begin_together(self) -> None:
        """Gives every process the adapter of the first one, and random numbers of its own."""
        self.ranks.take_from_first([p.data for p in self.model.parameters() if p.requires_grad])
        if not self.ranks.first:
            set_seed(self.args.seed + self.ranks.rank)

    def load_adapter(self, checkpoint: Path) -> None:
        """Loads the adapter of ``checkpoint`` into the model, in the same way as a resumed run."""
        self._load_from_checkpoint(str(checkpoint))

    def create_model_card(self, *_: object, **__: object) -> None:
        """Writes no model card: a checkpoint is only for resuming, and what is published gets a card of ours."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], float]:
        """Returns this process's micro-batches of one optimizer step, and the weight of all supervised tokens of the
        step."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        self.group.begin(batches)
        return batches, sum(self.ranks.gather(sum(batch["weight_sum"] for batch in batches)))

    def training_step(self, model: CausalModel, inputs: Batch, num_items_in_batch: float | None = None) -> Tensor:
        """Runs forward and backward of one micro-batch and returns its loss.

        If the GPU is full, the micro-batches of the step up to this one are repeated while every layer keeps less.
        """
        if self._snapshot is not None:
            # By now everything that prepares the model for training has run, so its work can be checked.
            require_unchanged(self.model, self._snapshot)
            self._snapshot = None
        compute = super().training_step
        loss = self.group.next_loss(inputs, lambda batch: compute(model, batch, num_items_in_batch))
        if self.group.is_done:
            self._end_group()
        return loss

    def _end_group(self) -> None:
        """Ends the run in all processes if one has found its GPU full, and stops it if one was asked to stop."""
        obstacle, signalled = self.group.end(self.stop is not None and self.stop.signalled)
        if obstacle is not None:
            raise too_full(obstacle, self._save_finished_steps())
        if self.stop is not None:
            self.stop.requested = signalled

    @property
    def totals(self) -> StepTotals:
        """Returns what the optimizer step has seen so far; of all processes, once it is done."""
        return self.group.totals

    def _save_finished_steps(self) -> str:
        """Writes a checkpoint of the finished steps before the run ends, and returns a message about it."""
        if self.state.global_step:
            self._save_checkpoint(self.model, None)
        self.ranks.gather(None)  # the first process has given it its name by now
        return what_is_left(self.run)

    def compute_loss(
        self, model: CausalModel, inputs: Batch, return_outputs: bool = False, num_items_in_batch: float | None = None
    ) -> Tensor:
        """Returns the loss of one micro-batch, divided by the weight of its accumulation group."""
        if num_items_in_batch is None:
            raise RuntimeError("the trainer lost count of the accumulation group; its loss would be scaled wrongly")
        # accelerate puts autocast around the forward of the whole model, which is not what is called here.
        noise = self.noise.over(inputs["lengths"]) if self.noise and model.training else nullcontext()
        own, replayed, first = self.accelerator.unwrap_model(model), inputs.get("replayed"), not self.totals.tokens
        n_items = max(num_items_in_batch, 1e-30)  # a group without a single supervised token has loss 0, not 0 / 0
        with autocast(self.accelerator.device, self.computes_in):
            base = base_hidden_states(own, replayed) if replayed else None
            with noise:
                decoded = decode_batch(own, inputs)
            if self.shards is not None:
                self.shards.end_forward()
            output = loss_of(own, inputs, decoded, n_items)
            loss = output.loss
            if replayed and base is not None:
                loss = loss + self._leash(divergence_from(base, own, decoded.hidden[0], replayed), replayed) / n_items
        if self.anchors and first and self.ranks.first:  # once per step, whatever it accumulates, of all processes
            loss = loss + self._hold(penalty(own, self.anchors))
        self.totals.add(output, inputs)
        return loss

    def _leash(self, divergence: Tensor, replayed: Replayed) -> Tensor:
        """Returns the term that ``training.replay_kl`` adds for the divergence from the base in one micro-batch."""
        self.totals.divergence = self.totals.divergence + divergence.detach()
        self.totals.leashed += replayed["documents"]["weight_sum"]
        return divergence * (self.config.training.replay_kl or 0.0)

    def _hold(self, half_square: Tensor) -> Tensor:
        """Returns the term that ``training.ewc`` adds for the change of the weights."""
        held = half_square * (self.config.training.ewc or 0.0)
        self.totals.penalty = held.detach()
        return held


def computed_type(args: Any) -> torch.dtype:
    """Returns the type that the layers compute in, as ``args`` of the trainer have it."""
    if args.fp16:
        return torch.float16
    return torch.bfloat16 if args.bf16 else torch.float32


def scale_gradients(accelerator: Any, dtype: torch.dtype) -> None:
    """Gives ``accelerator`` a gradient scaler for a run in float16, in which small gradients would become zero.

    On a GPU it has one already; on a CPU it ignores float16.
    """
    if dtype == torch.float16 and accelerator.scaler is None:
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
        accelerator.native_amp = True  # without which it would not undo the scale before gradients are shortened


def sft_config(config: Config, scratch: Path, steps: int, dtype: torch.dtype) -> tuple[SFTConfig, str]:
    """Returns our settings as TRL's configuration, and the optimizer with its reason.

    scratch: a folder that TRL may use.
    """
    on_gpu = torch.cuda.is_available()
    optimizer, reason = choose_optimizer(config, on_gpu)
    args = SFTConfig(
        output_dir=str(scratch),
        # A row of the trainer's data set is a whole micro-batch.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=deal(config, join_ranks().size).rounds,
        max_steps=steps,
        learning_rate=config.training.learning_rate,
        weight_decay=config.training.weight_decay,
        max_grad_norm=config.training.max_grad_norm,
        optim=optimizer,
        seed=config.seed,
        data_seed=config.seed,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not on_gpu,
        # What each layer keeps was set up with the model (model/memory.py); the trainer must not do it in its own way.
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        packing=False,
        logging_steps=1,
        save_strategy="steps" if config.training.save_steps else "no",
        save_steps=config.training.save_steps or steps,
        save_total_limit=config.training.save_total_limit,
        eval_strategy="no",
        report_to="none",  # see reporting.py
        run_name=Path(config.output).name,
        project=PROJECT,
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=on_gpu,
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # transformers would give every GPU that this one process sees a copy of the model
    return args, f"{optimizer} ({reason})"
