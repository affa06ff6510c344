"""Show what a run was made of: choices with their reasons, settings, what it said, versions, the manifest."""

from __future__ import annotations

import dataclasses
import json
import re

from qlora_sft.config import SECTIONS, SourceConfig, TaskConfig
from qlora_sft.config_data import TrainSourceConfig
from qlora_sft.json_types import JsonObject, mapping
from qlora_sft.markup.elements import Markup, facts, note, opens, preformatted
from qlora_sft.markup.text import shortened
from qlora_sft.page.facts import RunFacts
from qlora_sft.strict import as_tree, key_of

# Characters of the manifest that are shown; its lists of files may be long.
MANIFEST, SAID = 100_000, 4_000
# What the items of lists are made of.
IN_LISTS = {"data.train": TrainSourceConfig, "data.held_out": SourceConfig, "evaluation.tasks": TaskConfig}
# Texts that a run says which are results and not choices.
_RESULTS = re.compile(r"(held-out loss|exact match|adapter|checkpoint|report|\S+: detected)\b")


def choices(run: RunFacts) -> Markup:
    """Returns what the run chose by itself, and why."""
    rows: dict[str, str] = {}
    report = run.report
    if report:
        rows["backend"] = f"{report.backend.name} ({report.backend.reason})"
        rows["compute in"] = report.dtype
        rows["optimizer"] = report.optimizer
        if report.memory:
            rows["memory"] = f"{report.memory.split} ({report.memory.reason})"
    for text in run.said:
        name, colon, what = text.partition(": ")
        if colon and "\n" not in text and len(name) < 40 and not _RESULTS.match(text) and not is_warning(text):
            rows[name] = what
        elif text.startswith("compute in "):
            rows["compute in"] = text.removeprefix("compute in ")
    return Markup(
        f'<div class="panel">{facts((name, shortened(what, SAID)) for name, what in rows.items())}</div>'
        if rows
        else ""
    )


def is_warning(text: str) -> bool:
    """Says whether a text of the run warns of something."""
    return text.lower().startswith("warning")


def said(run: RunFacts) -> Markup:
    """Returns all that the run has said."""
    text = "\n".join(shortened(each, SAID) for each in run.said)
    return opens("Everything that the run said", preformatted(text)) if text else Markup("")


def flat(tree: object, prefix: str = "") -> dict[str, object]:
    """Returns the values of a configuration by their dotted keys."""
    if isinstance(tree, dict):
        parts: list[tuple[str, object]] = [(str(key), each) for key, each in tree.items()]
    elif isinstance(tree, list) and any(isinstance(each, dict | list) for each in tree):
        parts = [(str(number), each) for number, each in enumerate(tree)]
    else:
        return {prefix: tree}
    return {
        key: value for name, each in parts for key, value in flat(each, f"{prefix}.{name}" if prefix else name).items()
    }


def defaults() -> dict[str, object]:
    """Returns the default of every setting that has one, by its dotted key without the numbers of lists."""
    result: dict[str, object] = {"seed": 0}
    for section, kind in {**SECTIONS, **IN_LISTS}.items():
        for each in dataclasses.fields(kind):
            if each.default is not dataclasses.MISSING:
                result |= flat(as_tree(each.default), f"{section}.{key_of(each.name)}")
            elif each.default_factory is not dataclasses.MISSING:
                result |= flat(as_tree(each.default_factory()), f"{section}.{key_of(each.name)}")
    return result


def is_default(key: str, value: object, usual: dict[str, object]) -> bool:
    """Says whether ``value`` is what the setting ``key`` has where nothing is configured."""
    plain = re.sub(r"\.\d+(?=\.)", "", key)
    return plain in usual and usual[plain] == value


def written(value: object) -> str:
    """Writes the value of a setting as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def settings(run: RunFacts) -> Markup:
    """Returns the settings that are not the defaults, and below them all others."""
    every, usual = flat(run.config), defaults()
    if not every:
        return Markup("")
    rows = [(key, shortened(written(value), SAID), is_default(key, value, usual)) for key, value in every.items()]
    own = facts((key, value) for key, value, default in rows if not default)
    rest = [(key, value) for key, value, default in rows if default]
    return Markup(
        f'<div class="panel">{own}{opens(f"{len(rest)} settings that have their default", facts(rest))}</div>'
    )


def manifest(run: RunFacts) -> Markup:
    """Returns versions, machine, base and digests, and below them the whole manifest."""
    if not run.manifest:
        return note("The manifest is written when a run has come to its end.") if run.steps else Markup("")
    report: JsonObject = mapping(run.manifest.get("report"))
    names = {
        "base": "base model", "base_commit": "its commit", "base_sha256": "its weights, sha256",
        "data_sha256": "data, sha256",
    }  # fmt: skip
    rows: list[tuple[object, object]] = [(what, report[key]) for key, what in names.items() if report.get(key)]
    order = mapping(report.get("order"))
    if order:
        rows.append(("order of the rows, sha256", order.get("sha256", "")))
        rows.append(("rows removed as duplicates or contaminated", order.get("removed", 0)))
    rows.append(("machine", run.manifest.get("machine", "not kept")))
    versions = ", ".join(f"{name} {version}" for name, version in mapping(run.manifest.get("versions")).items())
    rows.append(("versions", versions or "not kept"))
    whole = json.dumps(run.manifest, indent=1, ensure_ascii=False)
    return Markup(
        f'<div class="panel">{facts(rows)}{opens("manifest.json", preformatted(shortened(whole, MANIFEST)))}</div>'
    )
