"""Read what a run folder holds, whatever it lacks: a run may be finished, interrupted, running, or an old one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from qlora_sft.errors import ConfigError
from qlora_sft.json_types import JsonObject, mapping, number, numbers, read_object
from qlora_sft.page.typed import first_wrong
from qlora_sft.run.folder import Run
from qlora_sft.run.report import RunReport
from qlora_sft.text import as_path, read_text
from qlora_sft.yaml_text import YamlFault, read_yaml

TRAINED_ON, SAID = "trained_on.json", "said.jsonl"
MOST_STEPS = 1e12
# Any of these shows that a folder is that of a run.
SIGNS = ("manifest.json", "metrics.jsonl", "begun.json")


@dataclass
class RunFacts:
    """Holds what could be read of a run."""

    path: Path
    lacks: list[str] = field(default_factory=list)
    """What is missing or damaged, and why that may be."""
    manifest: JsonObject = field(default_factory=dict)
    report: RunReport | None = None
    """What a finished run reported."""
    config: JsonObject = field(default_factory=dict)
    before: JsonObject = field(default_factory=dict)
    steps: list[JsonObject] = field(default_factory=list)
    """The lines of ``metrics.jsonl``, in the order of their steps."""
    evaluations: list[JsonObject] = field(default_factory=list)
    """The lines of ``evaluations.jsonl``."""
    samples: list[JsonObject] = field(default_factory=list)
    tasks: list[JsonObject] = field(default_factory=list)
    """What `evaluate` has written."""
    diagnosis: JsonObject = field(default_factory=dict)
    """What ``evaluate --diagnose`` has concluded from its tasks."""
    trained_on: JsonObject = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    plan: JsonObject = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def finished(self) -> bool:
        return bool(self.manifest)

    @cached_property
    def losses(self) -> list[float | None]:
        """Returns the training loss of every step; None where it was not finite."""
        return [number(row.get("loss")) for row in self.steps]

    @cached_property
    def step_numbers(self) -> list[float]:
        """Returns the number of every step."""
        return [step_of(row) or 0.0 for row in self.steps]

    @property
    def planned_steps(self) -> int | None:
        """Returns how many steps the run was to take, as far as it is known."""
        return int(found) if (found := number(self.trained_on.get("steps"))) else None

    @cached_property
    def held_out(self) -> list[tuple[float, dict[str, float]]]:
        """Returns the held-out loss by source at every step at which it was measured."""
        found = {
            step: losses
            for row in self.evaluations
            if (step := step_of(row)) is not None and (losses := numbers(row.get("held_out")))
        }
        if before := numbers(self.before.get("loss")):
            found.setdefault(0.0, before)
        if self.report and self.report.loss:
            if before := numbers({name: pair.before for name, pair in self.report.loss.items()}):
                found.setdefault(0.0, before)
            found.setdefault(float(self.last_step), {name: pair.after for name, pair in self.report.loss.items()})
        return sorted(found.items())

    @property
    def reported(self) -> JsonObject:
        """Returns the report as the manifest has it, with what this version does not know."""
        return mapping(self.manifest.get("report"))

    @property
    def kept_step(self) -> float | None:
        """Returns the step whose adapter the run kept, if that is not its last one."""
        step = number(mapping(self.reported.get("kept")).get("step"))
        return step if step != self.last_step else None

    @property
    def last_step(self) -> int:
        """Returns the number of the last step that was done."""
        return int(max([*self.step_numbers, self.report.steps if self.report else 0]))


def step_of(row: JsonObject) -> float | None:
    """Returns the number of the step that a line is about; None if it has none."""
    step = number(row.get("step"))
    return step if step is not None and 0 <= step <= MOST_STEPS else None


def read_run(folder: str | Path) -> RunFacts:
    """Reads the run in ``folder``. Raises `ConfigError` if there is none."""
    path = as_path(str(folder))
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; name the folder of a run")
    if not any((path / name).is_file() for name in SIGNS):
        raise ConfigError(f"{path}: not the folder of a run (it has none of {', '.join(SIGNS)})")
    facts = RunFacts(path)
    _read_manifest(facts)
    facts.config = mapping(facts.manifest.get("config")) or _config(facts)
    facts.before = _object(facts, "before.json")
    facts.trained_on = _object(
        facts, TRAINED_ON, "it was not kept (an older version made this run), so no mask is shown"
    )
    facts.plan = _object(facts, "plan.json")
    facts.steps = sorted(
        (row for row in _lines(facts, "metrics.jsonl", "no step was finished") if step_of(row) is not None),
        key=lambda row: step_of(row) or 0.0,
    )
    facts.evaluations = _lines(facts, "evaluations.jsonl")
    facts.samples = _lines(facts, "samples.jsonl")
    facts.said = [str(row["text"]) for row in _lines(facts, SAID, "it was not kept") if "text" in row]
    facts.diagnosis = _object(facts, "evaluation/diagnosis.json")
    facts.tasks = [
        task
        for file in sorted((path / "evaluation").glob("*.json"))
        if file.name != "diagnosis.json"
        and (task := _object(facts, f"evaluation/{file.name}"))
        and numbers(task.get("tuned"))
    ]
    return facts


def _read_manifest(facts: RunFacts) -> None:
    if not (facts.path / "manifest.json").is_file():
        facts.lacks.append(
            "manifest.json: this run has not come to its end; what it has measured so far is shown. "
            "If nothing trains it any more, `train --resume` goes on with it"
        )
        return
    try:
        run = Run.open(facts.path)
        facts.manifest = run.manifest
        wrong = first_wrong(run.report, RunReport, "report")
        if wrong:
            facts.lacks.append(f"manifest.json: {wrong}, so its report is not shown")
        else:
            facts.report = run.report
    except ConfigError as error:
        facts.lacks.append(str(error))
    except (TypeError, ValueError, AttributeError) as error:
        facts.lacks.append(f"manifest.json: its report cannot be read ({error})")


def _config(facts: RunFacts) -> JsonObject:
    """Returns the tree of ``config.yaml``, of this version or of another."""
    try:
        return mapping(read_yaml(read_text(facts.path / "config.yaml")))
    except (ConfigError, YamlFault) as error:
        facts.lacks.append(f"config.yaml: {error}")
        return {}


def _object(facts: RunFacts, name: str, absent: str = "") -> JsonObject:
    """Reads a file of one JSON object. absent: what is to be said where it is missing."""
    try:
        return read_object(facts.path / name)
    except FileNotFoundError:
        if absent:
            facts.lacks.append(f"{name}: {absent}")
    except (OSError, ValueError) as error:
        facts.lacks.append(f"{name}: damaged ({error})")
    return {}


def _lines(facts: RunFacts, name: str, absent: str = "") -> list[JsonObject]:
    """Reads a file of JSON objects, one a line, and leaves out lines that are damaged."""
    try:
        lines = (facts.path / name).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        if absent:
            facts.lacks.append(f"{name}: {absent}")
        return []
    except OSError as error:
        facts.lacks.append(f"{name}: cannot be read ({error.strerror})")
        return []
    rows, damaged = [], []
    for place, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):  # cut off, or nested too deep
            row = line
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None:
            damaged.append(place)
    if damaged:
        first = ", ".join(map(str, damaged[:3])) + (" ..." if len(damaged) > 3 else "")
        facts.lacks.append(f"{name}: {len(damaged):,} damaged lines are left out (line {first})")
    return rows
