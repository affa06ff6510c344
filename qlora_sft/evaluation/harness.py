"""Runs tasks of EleutherAI's lm-evaluation-harness on a run and on its base, and compares the two.

The harness gets the model as we load it: the same NF4 weights, adapter and type, so that its figures are of what was
trained. A task is one of its own names, or a YAML file in its form. Its own tasks come from the Hub; ``NAME=FILE`` asks
the questions of a local file instead (https://github.com/EleutherAI/lm-evaluation-harness).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_sft.atomic import write_json
from qlora_sft.errors import ConfigError, first_line
from qlora_sft.evaluation.compare import MetricChange
from qlora_sft.evaluation.generate import PROMPTS
from qlora_sft.evaluation.held_out import autocast
from qlora_sft.evaluation.statistics import paired_change
from qlora_sft.model.attention import plain_attention
from qlora_sft.model.load import load_for_inference
from qlora_sft.run.folder import is_run
from qlora_sft.run.report import LEFT_OUT, Report
from qlora_sft.run_data import saved_text
from qlora_sft.say import Say, tell

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = "--harness needs lm-evaluation-harness: pip install 'qlora-sft[eval]'"
# Questions of one batch on a GPU; on a CPU the harness sorts them by length as well, and more only cost padding.
_BATCH = {"cuda": PROMPTS, "cpu": 16}
_LISTED = (
    "`lm-eval ls tasks` lists its tasks, which it reads from the Hub; NAME=FILE asks the questions of a local file"
)
Spec = str | dict[str, object]
"""Is what the harness takes for a task: a name, the path of a YAML file, or settings."""


@dataclass(frozen=True, kw_only=True)
class HarnessFigure(Report):
    """Holds one metric of one task of the harness."""

    task: str
    metric: str
    """Its name, with that of the filter behind a comma where the harness has one."""
    items: int
    tuned: float
    base: float | None = field(default=None, metadata=LEFT_OUT)
    change: MetricChange | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class HarnessReport(Report):
    """Holds what the harness found out about a model, and about its base if that was asked."""

    model: str
    folder: str
    figures: list[HarnessFigure]


Samples = Mapping[str, Sequence[Mapping[str, Any]]]
"""Maps a task to what the harness says of each question: requests, responses, metrics."""
Values = dict[tuple[str, str], dict[int, float]]
"""Maps task and metric to the figure of each question."""


def run_harness(
    path: str | Path,
    tasks: Sequence[str],
    *,
    base: bool = True,
    limit: int | None = None,
    chat: bool = False,
    seed: int = 0,
    say: Say = tell,
) -> HarnessReport:
    """Asks the model of a run, or of a model folder, the ``tasks`` of the harness, and writes what it says.

    limit: the most questions of each task, the first ones.
    chat: whether prompts are put as a user's turn of the chat template; the harness' own default is that they are not.

    Raises `ConfigError` if the harness is not installed, or does not know a task.
    """
    path = Path(path).expanduser().resolve()
    if not is_run(path) and not (path / "config.json").is_file():
        raise ConfigError(f"{path}: neither a run folder (no adapter/) nor a model folder (no config.json)")
    specs = [task_of(name) for name in tasks]
    manager = manager_of(specs)
    loaded(specs, manager)
    text = saved_text(path)
    say("loading the model")
    model = load_for_inference(path)
    found: dict[str, Values] = {}
    for who in ("base", "tuned") if base and is_run(path) else ("tuned",):
        say(f"{', '.join(tasks)}: the harness asks the {who} model")
        with model.disable_adapter() if who == "base" else nullcontext():
            found[who] = values_of(ask(model, text.tokenizer, loaded(specs, manager), limit, chat, seed))
    folder = (path / "evaluation" if is_run(path) else path.with_name(f"{path.name}-evaluation")) / "harness"
    report = HarnessReport(str(path), str(folder), compared(found["tuned"], found.get("base"), seed))
    for task in dict.fromkeys(figure.task for figure in report.figures):
        write_json(folder / f"{task}.json", [each.to_json() for each in report.figures if each.task == task])
    say(harness_table(report))
    return report


def task_of(name: str) -> Spec:
    """Returns what the harness takes for a task: its name, or its settings with the questions of a local file.

    In a file, which has one split, examples are other questions of the same. Raises `ConfigError` for a missing one.
    """
    task, given, file = name.partition("=")
    if not given and not task.endswith((".yaml", ".yml")):
        return task
    path = Path(file or task).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"--harness {name}: {path}: no such file")
    if not given:
        return str(path)
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.suffix not in kinds:
        raise ConfigError(f"--harness {name}: the questions must be in a file of {', '.join(kinds)}")
    return {
        "task": task, "dataset_path": kinds[path.suffix], "dataset_name": None, "training_split": None,
        "validation_split": None, "test_split": "test", "fewshot_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
    }  # fmt: skip


def manager_of(specs: Sequence[Spec]) -> TaskManager:
    """Returns what reads the tasks. Raises `ConfigError` if the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise ConfigError(INSTALL)
    return _manager(any(isinstance(spec, dict) or not spec.endswith((".yaml", ".yml")) for spec in specs))


@cache
def _manager(own: bool) -> TaskManager:
    """Returns what reads tasks, with the harness' own if one is named: it takes ten seconds to list them."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=own)


def loaded(specs: Sequence[Spec], manager: TaskManager) -> list[Task]:
    """Returns the tasks with their questions, read anew. Raises `ConfigError` for what the harness cannot read."""
    from jinja2 import TemplateError

    tasks: list[Task] = []
    for spec in specs:
        name = spec["task"] if isinstance(spec, dict) else spec
        if isinstance(spec, dict) and name not in manager.all_subtasks:
            raise ConfigError(f"--harness {name}=FILE: the harness has no single task of that name. {_LISTED}")
        # Settings in a group are added to those of the task of that name; alone they would replace them.
        named = {"group": f"{name}=FILE", "task": [spec]} if isinstance(spec, dict) else spec
        try:
            tasks += manager.load([named])["tasks"].values()
        except TemplateError as error:
            raise ConfigError(
                f"--harness {name}: {first_line(error)} in a question: the file lacks a column that the task asks for"
            ) from None
        except (KeyError, ValueError, OSError, TypeError, AttributeError) as error:
            raise ConfigError(f"--harness {name}: {first_line(error)}. {_LISTED}") from None
    names = [task.task_name for task in tasks]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(
            f"--harness: {', '.join(sorted(twice))}: named twice; its figures would go into the same file"
        )
    return tasks


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    limit: int | None,
    chat: bool,
    seed: int,
) -> Samples:
    """Has the harness ask the model, and returns what it says of every question, by task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    dtype = model.get_input_embeddings().weight.dtype
    with plain_attention(model), torch.no_grad(), autocast(model.device, dtype):
        # It sets what it needs in the tokenizer that it gets.
        harness = HFLM(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal",
            batch_size=_BATCH.get(model.device.type, 1),
        )  # fmt: skip
        result = simple_evaluate(
            harness, tasks=list(tasks), task_manager=_manager(own=False), limit=limit,
            apply_chat_template=chat, log_samples=True, bootstrap_iters=0,
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    samples: Samples = result["samples"]
    return samples


def values_of(samples: Samples) -> Values:
    """Returns the metrics of every question that are one number."""
    found: Values = {}
    for task, rows in samples.items():
        for row in rows:
            for name in row["metrics"]:
                value, filtered = row[name], row["filter"]
                if isinstance(value, int | float):
                    metric = name if filtered == "none" else f"{name},{filtered}"
                    found.setdefault((task, metric), {})[row["doc_id"]] = float(value)
    return found


def compared(tuned: Values, base: Values | None, seed: int) -> list[HarnessFigure]:
    """Returns the mean of every metric, with that of the base and the interval of the change if it was asked."""
    figures = []
    for (task, metric), of_each in tuned.items():
        values = [of_each[number] for number in sorted(of_each)]
        figure = HarnessFigure(task=task, metric=metric, items=len(values), tuned=sum(values) / len(values))
        if base is not None:
            before = [base[task, metric][number] for number in sorted(of_each)]
            moved = paired_change(before, values, [1.0] * len(values), seed)
            change = MetricChange.of(moved)
            figure = replace(figure, base=moved.base, change=change)
        figures.append(figure)
    return figures


def harness_table(report: HarnessReport) -> str:
    """Formats the figures as a table."""
    lines = [f"{'task':<20}{'items':>7}  {'':<28}{'base':>8}{'tuned':>8}  change (95% interval)"]
    for each in report.figures:
        base = "-" if each.base is None else f"{each.base:.4f}"
        low, high = each.change.interval if each.change else (0.0, 0.0)
        moved = f"  {each.change.difference:+.4f} ({low:+.4f} to {high:+.4f})" if each.change else ""
        lines.append(f"{each.task[:20]:<20}{each.items:>7,}  {each.metric:<28}{base:>8}{each.tuned:>8.4f}{moved}")
    return "\n".join([*lines, f"figures: {report.folder}"])
