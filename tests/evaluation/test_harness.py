"""lm-evaluation-harness on the model as we load it: its figures are ours where it is asked what we ask."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import configured

from qlora_sft.cli import main
from qlora_sft.config import TaskConfig
from qlora_sft.errors import ConfigError
from qlora_sft.evaluation.evaluate_run import evaluate_run
from qlora_sft.evaluation.harness import (
    INSTALL,
    Spec,
    ask,
    compared,
    loaded,
    manager_of,
    run_harness,
    task_of,
    values_of,
)
from qlora_sft.model import load
from qlora_sft.model.load import load_for_inference
from qlora_sft.run_data import saved_text
from qlora_sft.train import train

CHOICES = [
    {"question": f"What is {a} and {b}?", "choices": {"text": [str(a + b + d) for d in (0, 1, 2, 3)],
     "label": list("ABCD")}, "answerKey": "A"} for a in range(1, 5) for b in range(1, 4)
]  # fmt: skip
SUMS = [{"question": f"How much is {a} and {a + 2}?", "answer": f"It is\n#### {2 * a + 2}"} for a in range(6)]
LETTERS = """task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{asked}"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ASKED = (
    "{{question}}\\n\\n{% for text in choices.text %}{{choices.label[loop.index0]}}. {{text}}\\n{% endfor %}\\n"
    "Answer with the letter only."
)
TEXTS = """task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}<|im_end|>"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
NOTHING = TEXTS.replace("task: texts", "task: nothing").replace('"{{{{answer}}}}<|im_end|>"', '""')
SAID = """task: said
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer.split('#### ')[-1]}}}}"
generation_kwargs: {{until: ["<|im_end|>"], do_sample: false, max_gen_toks: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list:
  - name: last
    filter: [{{function: regex, group_select: -1, regex_pattern: "(-?[0-9]+)"}}, {{function: take_first}}]
"""


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def kept_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has datasets keep its copies of the files below the test's folder, and model folders loaded in float32."""
    pytest.importorskip("lm_eval", reason=INSTALL)
    monkeypatch.setattr(load, "bfloat16_products", lambda: (False, "a test"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.mark.usefixtures("kept_here")
def test_its_figures_are_ours(tiny_model: Path, tmp_path: Path) -> None:
    """The same letters, log-likelihoods and answers to the same prompts, question by question."""
    letters, sums = written(tmp_path, "letters", CHOICES), written(tmp_path, "sums", SUMS)
    specs: list[Spec] = []
    files = {"letters": (LETTERS, letters), "texts": (TEXTS, sums), "nothing": (NOTHING, sums), "said": (SAID, sums)}
    for name, (text, file) in files.items():
        (tmp_path / f"{name}.yaml").write_text(text.format(file=file, asked=ASKED))
        specs.append(task_of(str(tmp_path / f"{name}.yaml")))
    asked = loaded(specs, manager_of(specs))
    samples = ask(load_for_inference(tiny_model), saved_text(tiny_model).tokenizer, asked, None, True, 0)
    tasks = [
        TaskConfig(str(letters)), TaskConfig(str(sums), name="texts", form="loss"),
        TaskConfig(str(sums), form="number", max_new_tokens=8),
    ]  # fmt: skip
    ours = {report.name: report for report in evaluate_run(tiny_model, tasks, say=lambda _: None).tasks}
    rows = {
        name: [json.loads(line)["tuned"] for line in Path(str(report.answers)).read_text().splitlines()]
        for name, report in ours.items()
    }
    values = values_of(samples)
    assert list(values["letters", "acc"].values()) == [float(row["right"]) for row in rows["letters"]]
    # It counts the line break in which a prompt of the template ends to the answer; we count the answer alone.
    for text, line_break, row in zip(samples["texts"], samples["nothing"], rows["texts"], strict=True):
        theirs = text["resps"][0][0][0] - line_break["resps"][0][0][0]
        assert theirs == pytest.approx(-row["loss"] * row["weight"], rel=1e-5)
    assert [their["resps"][0][0] for their in samples["said"]] == [row["answers"][0]["text"] for row in rows["sums"]]
    assert sum(values["said", "exact_match,last"].values()) == sum(row["right"] for row in rows["sums"])


@pytest.mark.usefixtures("kept_here")
def test_a_run_is_compared_with_its_base_on_a_local_file(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Takes ten seconds more in the first test that needs the harness' own tasks, which it lists once."""
    config = configured(tmp_path, tiny_model)("training.max_steps=3", "training.learning_rate=1e-2")
    train(config, say=lambda _: None)
    file = written(tmp_path, "arc", CHOICES)
    named = f"arc_easy={file}"
    assert main(["evaluate", config.output, "--harness", named, "--max-rows", "5", "--json"]) == 0
    said = capsys.readouterr()
    figures = {each["metric"]: each for each in json.loads(said.out)["figures"]}
    assert set(figures) == {"acc", "acc_norm"}
    assert figures["acc"]["items"] == 5
    kept = json.loads((Path(config.output) / "evaluation" / "harness" / "arc_easy.json").read_text())
    assert kept == list(figures.values())
    assert "change (95% interval)" in said.err
    base = run_harness(tiny_model, [named], limit=5, say=lambda _: None)
    assert [each.tuned for each in base.figures] == [each["base"] for each in figures.values()]


@pytest.mark.usefixtures("kept_here")
def test_what_it_cannot_read_is_named(tmp_path: Path) -> None:
    sums, arc = f"arc_easy={written(tmp_path, 'sums', SUMS)}", f"arc_easy={written(tmp_path, 'arc', CHOICES)}"
    listed = "NAME=FILE asks the questions of a local file"
    manager = manager_of(["arc_easy"])
    for names, fault in {
        ("arc_esay",): f"--harness arc_esay: .* {listed}",
        (arc.replace("easy", "esay"),): f"arc_esay=FILE: the harness has no single task of that name.* {listed}",
        (arc.replace("arc_easy", "mmlu"),): "mmlu=FILE: the harness has no single task of that name",
        (sums,): "--harness arc_easy: 'choices' is undefined in a question: the file lacks a column",
        (arc, arc): "arc_easy: named twice",
    }.items():
        with pytest.raises(ConfigError, match=fault):
            loaded([task_of(name) for name in names], manager)


def test_without_the_harness_the_cure_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'qlora-sft\[eval\]'"):
        manager_of(["arc_easy"])


def test_files_and_settings_that_do_not_go_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"missing\.jsonl: no such file"):
        task_of(f"arc_easy={tmp_path}/missing.jsonl")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ConfigError, match="must be in a file of"):
        task_of(f"arc_easy={tmp_path}/x.txt")
    assert task_of("arc_easy") == "arc_easy"
    assert main(["evaluate", str(tmp_path), "--harness", "arc_easy", "--diagnose", "--samples", "4"]) == 2
    assert "--samples, --diagnose have no effect on tasks of the harness" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "--harness", "arc_easy"]) == 2
    assert "neither a run folder" in capsys.readouterr().err


def test_only_metrics_that_are_numbers_are_compared_question_by_question() -> None:
    rows = [
        {"doc_id": n, "filter": "none", "metrics": ["acc", "words"], "acc": n % 2, "words": [1]} for n in (1, 0, 3, 2)
    ]
    tuned, base = values_of({"t": rows}), values_of({"t": [{**row, "acc": 0.0} for row in rows]})
    (figure,) = compared(tuned, base, 0)
    assert (figure.metric, figure.items, figure.tuned, figure.base) == ("acc", 4, 0.5, 0.0)
    assert figure.change is not None
    assert figure.change.difference == 0.5
    assert compared(tuned, None, 0)[0].base is None
