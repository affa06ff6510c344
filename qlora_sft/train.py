"""Fine-tune a 4-bit model with LoRA: config -> data -> model -> fit -> report (`training/recipe.py`).

Run as::

    python -m qlora_sft.train CONFIG [key.sub=value ...]      CONFIG: a YAML file or a shipped recipe's name

or from Python::

    from qlora_sft import load_config, train
    report = train(load_config("recipe.yaml", ["training.learning_rate=1e-4"]))
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

from qlora_sft.config import Config
from qlora_sft.data.given import GivenRows, with_rows
from qlora_sft.faults import every_fault
from qlora_sft.page.write import draw_report
from qlora_sft.prepare import prepare
from qlora_sft.run.folder import Run, kept_day
from qlora_sft.run.report import RunReport
from qlora_sft.say import Say, tell, unfailing_messages
from qlora_sft.stopwatch import Stopwatch
from qlora_sft.training.checkpoints import as_begun, find_checkpoint
from qlora_sft.training.join import check_shards, join_ranks
from qlora_sft.training.loggers import check_loggers
from qlora_sft.training.run_folder import claim_run_folder, held
from qlora_sft.training.said import Said


def train(
    config: Config, *, data: GivenRows | None = None, overwrite: bool = False, resume: bool = False, say: Say = tell
) -> RunReport:
    """Trains as configured and returns the report, which ``manifest.json`` in the run folder also holds.

    data: rows from Python that replace those of a source, see `with_rows`.

    overwrite: removes an earlier run in the folder. resume: continues from the newest checkpoint in the run folder, if
    there is one; the result equals, bit for bit, that of a run that was not interrupted.

    Where a launcher has started several processes (torchrun, accelerate launch), all of them call this and train
    together; the first one prints and writes. The others raise `EndedTogether` when one fails.

    Raises `ConfigError` or `DataError` before anything is trained, `RunError` when the run fails, and `Interrupted`
    after Ctrl-C, with a checkpoint of the step that was running.
    """
    ranks = join_ranks()
    with ranks.ending_together():
        return _train(config, data, overwrite, resume, Said(say) if ranks.first else Said(lambda _: None))


def _train(config: Config, data: GivenRows | None, overwrite: bool, resume: bool, say: Said) -> RunReport:
    watch, ranks = Stopwatch(), join_ranks()
    config = with_rows(config, data, say=say)
    with every_fault(config):
        check_loggers(config)
        check_shards(config)
        run = claim_run_folder(config, overwrite, resume)
        checkpoint = find_checkpoint(run, config, say) if resume else None
        config = as_begun(config, run, say) if checkpoint else config
    with held(run) if ranks.first else nullcontext():
        return _trained(config, run, checkpoint, watch, say)


def _trained(config: Config, run: Path, checkpoint: Path | None, watch: Stopwatch, say: Said) -> RunReport:
    """Trains in the folder ``run``, from ``checkpoint`` on if there is one."""
    ranks = join_ranks()
    with ranks.first_ahead():
        # A run that goes on writes the date that it began with, if its chat template writes one.
        prepared = prepare(config, say, watch, day=kept_day(run) if checkpoint else None)
    with watch("imports"):
        # Only now: Unsloth, if it was chosen, has patched trl, transformers and peft.
        from qlora_sft.training.recipe import run_recipe
    with unfailing_messages():
        report = run_recipe(config, run, prepared, checkpoint, watch, say)
        if report is not None:
            draw_report(run, say)
    ranks.from_first(lambda: None)
    return report or Run.open(run).report


if __name__ == "__main__":
    from qlora_sft.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
