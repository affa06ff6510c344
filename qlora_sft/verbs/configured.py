"""Run the verbs that take a configuration: train, preview, plan."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qlora_sft.errors import ConfigError
from qlora_sft.ranges import whole
from qlora_sft.verbs.verb import Action, AddVerb, CommandResult

if TYPE_CHECKING:
    from qlora_sft.config import Config


def add_configured_verbs(add: AddVerb) -> None:
    """Adds ``train``, ``preview`` and ``plan``, which take a configuration, to the command line."""
    train = configured_verb(add, "train", run_train, "fine-tune a model as configured")
    train.add_argument("--overwrite", action="store_true", help="replace an earlier run in the output folder")
    train.add_argument("--resume", action="store_true", help="continue from its newest checkpoint, if it has one")
    train.add_argument(
        "--find-rate", action="store_true",
        help="do not train, but try learning rates, draw the curve and suggest one",
    )  # fmt: skip

    preview = configured_verb(add, "preview", _preview, "show what will be trained on, token by token")
    preview.add_argument("--count", type=whole(0), default=3, help="how many conversations to show (default: 3)")
    preview.add_argument("--html", metavar="FILE", help="also write them as a web page")

    plan = configured_verb(
        add, "plan", _plan, "compute the memory, disk and time that a run will need, before loading it"
    )
    plan.add_argument("--no-data", action="store_true", help="do not read the data; leaves out steps and tokens")
    plan.add_argument("--no-time", action="store_true", help="do not measure a layer; leaves out the time")


def configured_verb(add: AddVerb, name: str, action: Action, help: str) -> argparse.ArgumentParser:
    """Adds a verb that takes a configuration and values that replace those of its file."""
    sub = add(name, action, help)
    sub.add_argument("config", help="a YAML file or the name of a shipped recipe (demo)")
    sub.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="values that replace the file's")
    return sub


def run_train(arguments: argparse.Namespace) -> CommandResult:
    """Trains, or tries learning rates. It is the only verb that several processes can run together."""
    from qlora_sft.faults import load_checked
    from qlora_sft.train import train
    from qlora_sft.training.join import join_ranks

    with join_ranks().ending_together():
        config = load_checked(arguments.config, arguments.overrides)
        if arguments.find_rate:
            return _find_rate(config, arguments)
        return train(config, overwrite=arguments.overwrite, resume=arguments.resume)


def _find_rate(config: Config, arguments: argparse.Namespace) -> CommandResult:
    from qlora_sft.find_rate import find_rate

    if arguments.overwrite or arguments.resume:
        raise ConfigError("--find-rate keeps nothing of what it trains; leave out --overwrite and --resume")
    report = find_rate(config)
    if not arguments.json:
        from qlora_sft.training.rate_curve import said_of

        print(said_of(report))
    return report


def _preview(arguments: argparse.Namespace) -> CommandResult:
    from qlora_sft.faults import load_checked
    from qlora_sft.preview import preview

    config = load_checked(arguments.config, arguments.overrides)
    return preview(config, arguments.count, arguments.html, show=not arguments.json, alone=True)


def _plan(arguments: argparse.Namespace) -> CommandResult:
    from qlora_sft.faults import load_checked
    from qlora_sft.plan.plan import make_plan
    from qlora_sft.plan.table import plan_table

    config = load_checked(arguments.config, arguments.overrides)
    plan = make_plan(config, data=not arguments.no_data, timing=not arguments.no_time)
    if not arguments.json:
        print(plan_table(plan))
    return plan
