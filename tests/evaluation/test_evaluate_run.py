"""The verb: a finished run and its base, asked the same questions."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import configured
from safetensors.torch import load_file, save_file
from tests_support import bare_base

from qlora_sft.cli import main
from qlora_sft.config import TaskConfig
from qlora_sft.errors import ConfigError, DataError
from qlora_sft.evaluation import ask
from qlora_sft.evaluation.compare import EvaluationReport, TaskReport
from qlora_sft.evaluation.evaluate_run import diagnose_run, evaluate_run
from qlora_sft.evaluation.keep_right import keep_right
from qlora_sft.evaluation.results import _free_name
from qlora_sft.evaluation.unfinished import digest_of
from qlora_sft.model import load
from qlora_sft.model.load import load_for_inference
from qlora_sft.page.facts import read_run
from qlora_sft.page.run_page import run_page
from qlora_sft.run.folder import Run
from qlora_sft.train import train

CHOICES = [
    {"question": f"Is it {i}?", "choices": ["yes", "no", "maybe so", "never"], "answer": i % 4} for i in range(12)
]
NUMBERS = [{"question": f"How much is {i} and {i}?", "answer": f"That is\n#### {2 * i}"} for i in range(6)]
CODE = [{"prompt": "def f(x):\n", "test": "def check(c):\n    assert c(1) == 2\n", "entry_point": "f"}]
TEXTS = [{"text": "It was a dark and stormy night. " * (1 + i % 3)} for i in range(5)]
FILES = {"choices": CHOICES, "numbers": NUMBERS, "code": CODE, "texts": TEXTS}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    for name, rows in FILES.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(tmp_path / f"{name}.jsonl") for name in FILES}


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, trained a little."""
    make = configured(tmp_path_factory.mktemp("trained"), tiny_model)
    config = make("training.max_steps=3", "training.learning_rate=1e-2")
    train(config, say=lambda _: None)
    return Path(config.output)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def tasks(files: dict[str, str], *names: str, **settings: Any) -> list[TaskConfig]:
    return [TaskConfig(files[name], max_new_tokens=6, **settings) for name in names]


def rows_of(result: EvaluationReport, name: str) -> list[dict[str, Any]]:
    (report,) = (report for report in result.tasks if report.name == name)
    return [json.loads(line) for line in Path(report.answers).read_text().splitlines()]


def test_the_base_is_the_model_under_the_adapter(
    run: Path, files: dict[str, str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the run says of its base is what the base's own folder says of itself, answer for answer."""
    # The run is float32; a folder is asked in what is fastest here, which may be another type.
    monkeypatch.setattr(load, "bfloat16_products", lambda: (False, "a test"))
    asked = tasks(files, "choices", "numbers", "texts")
    of_run = evaluate_run(run, asked, say=lambda _: None)
    of_base = evaluate_run(tiny_model, asked, say=lambda _: None)
    for name in ("choices", "numbers"):
        assert [row["base"] for row in rows_of(of_run, name)] == [row["tuned"] for row in rows_of(of_base, name)]
    texts, alone = of_run.tasks[2], of_base.tasks[2]
    assert texts.base["loss"] == pytest.approx(alone.tuned["loss"], rel=1e-6)
    assert texts.tuned["loss"] != texts.base["loss"]
    assert texts.tuned["kl"] > 0
    assert "base" not in alone.to_json()
    assert Path(of_base.folder) == tiny_model.with_name(f"{tiny_model.name}-evaluation")


def test_an_adapter_that_does_nothing_changes_nothing(run: Path, files: dict[str, str]) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * ("lora_B" not in name) for name, tensor in load_file(file).items()}, file)
    result = evaluate_run(run, tasks(files, "choices", "texts"), say=lambda _: None)
    again = evaluate_run(run, tasks(files, "numbers", samples=3), say=lambda _: None)
    result = replace(result, tasks=[*result.tasks, *again.tasks])
    for report in result.tasks:
        assert report.verdict == "no difference shown"
        assert all((change.difference, [*change.interval]) == (0, [0, 0]) for change in report.change.values())
        assert all(row["base"] == row["tuned"] for row in rows_of(result, report.name))
    assert result.tasks[1].tuned["kl"] == 0


def test_the_same_seed_draws_the_same_answers_and_another_others(run: Path, files: dict[str, str]) -> None:
    asked = tasks(files, "numbers", samples=4, temperature=1.5)

    def answers(seed: int) -> list[Any]:
        return rows_of(evaluate_run(run, asked, seed=seed, say=lambda _: None), "numbers")

    first = answers(0)
    assert first == answers(0)
    assert first != answers(1)
    texts = [answer["text"] for answer in first[0]["tuned"]["answers"]]
    assert len(set(texts)) > 1


def test_answers_of_other_weights_or_settings_are_not_kept(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    cases = [(folder, None, folder / "config.json"), (run, Run.open(run), run / "adapter" / "adapter_config.json")]
    for path, opened, settings in cases:
        weights = next(settings.parent.glob("*.safetensors"))
        seen = [digest_of(path, opened)]
        assert digest_of(path, opened) == seen[0]
        settings.write_text(settings.read_text() + "\n")
        seen.append(digest_of(path, opened))
        save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
        seen.append(digest_of(path, opened))
        assert len(set(seen)) == 3


def test_an_interrupted_evaluation_goes_on_with_its_answers(
    run: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, calls, own = tasks(files, "numbers", samples=2), [], ask.generate
    whole = rows_of(evaluate_run(run, asked, say=lambda _: None), "numbers")

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) in (1, 3):
            raise KeyboardInterrupt
        return own(*args)

    monkeypatch.setattr(ask, "generate", interrupted)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):  # in the first batch, when there is no answer
        evaluate_run(run, asked, say=said.append)
    assert not any("are kept" in line for line in said)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, asked, say=said.append)
    assert said[-1] == "the answers so far are kept; the same command continues with them"
    (kept,) = (run / "evaluation" / "unfinished").iterdir()
    other = kept.with_name("other.jsonl")
    other.write_text("{}")
    # Another seed is another evaluation, and this one's answers wait.
    evaluate_run(run, asked, seed=1, say=said.append)
    assert not any("kept from" in line for line in said)
    assert rows_of(evaluate_run(run, asked, say=said.append), "numbers") == whole
    assert "numbers: 12 answers are kept from an evaluation that was interrupted" in said
    assert [*kept.parent.iterdir()] == [other]


def test_every_answer_is_recorded_beside_its_question(run: Path, files: dict[str, str]) -> None:
    said: list[str] = []
    result = evaluate_run(run, tasks(files, "numbers", samples=3), say=said.append)
    (report,) = result.tasks
    assert json.loads((run / "evaluation" / "numbers.json").read_text()).items() < report.to_json().items()
    about = {"ended", "distinct", "length", "repetition", "entropy", "self-BLEU", "distinct-2"}
    assert set(report.tuned) == {"pass@1", "pass@2", "pass@3", *about}
    assert sum(report.for_rl.values()) == pytest.approx(1)
    row = rows_of(result, "numbers")[5]
    assert row["question"] == "How much is 5 and 5?"
    assert row["reference"] == "10"
    assert row["place"].endswith("numbers.jsonl:6")
    assert len(row["base"]["answers"]) == len(row["tuned"]["answers"]) == 3
    assert any("cut off at 6 tokens" in line for line in said)
    assert any("for RL: " in line for line in said)


def test_a_diagnosis_asks_everything_in_other_ways(run: Path, files: dict[str, str], tmp_path: Path) -> None:
    said: list[str] = []
    kept = tmp_path / "kept.jsonl"
    short = {"max_rows": 6, "max_new_tokens": 6}
    result = diagnose_run(run, tasks(files, "numbers", "texts"), short, say=said.append)
    names = ["numbers", "texts", "benign", "numbers-4-shot", "numbers-labelled", "numbers-polite"]
    assert [report.name for report in result.tasks][:6] == names
    assert result.diagnosis is not None
    assert any(line.startswith(f"verdict: {result.diagnosis.verdict}") for line in said)
    (table,) = (line for line in said if line.startswith("how open the answers are"))
    shown = [line.split()[-6:-4] for line in table.splitlines() if "entropy  " in line]
    assert shown == [
        [f"{each[w]['entropy']:.3f}" for w in ("base", "tuned")]
        for each in (report.to_json() for report in result.tasks if report.name in ("numbers", "benign"))
    ]
    shown = rows_of(result, "numbers-4-shot")[0]["conversation"]["messages"]
    assert [message["role"] for message in shown] == ["user", "assistant"] * 4 + ["user"]
    assert keep_right(result, kept) == (sum(row["tuned"]["right"] > 0 for row in rows_of(result, "numbers")), 6)
    assert 0 <= result.tasks[2].tuned["refused"] <= 1
    assert f"{result.diagnosis.verdict}</span></h3>" in run_page(read_run(run)).split("<h3>Diagnosis")[1]
    again = read_run(run)
    assert again.diagnosis["verdict"] == result.diagnosis.verdict
    assert [task["name"] for task in again.tasks].count("numbers") == 1


def test_ways_of_asking_that_the_model_has_no_room_for_are_left_out(run: Path, files: dict[str, str]) -> None:
    rows = [{"question": f"{i} " + "word " * 420, "answer": f"#### {i}"} for i in range(5)]
    Path(files["numbers"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    result = diagnose_run(run, tasks(files, "numbers"), {"max_rows": 5, "max_new_tokens": 4}, say=said.append)
    assert any(line.startswith("left out, longer than the model's") and "numbers-4-shot" in line for line in said)
    assert "numbers-polite" in [report.name for report in result.tasks]


def test_a_model_folder_has_nothing_to_be_diagnosed_by(tiny_model: Path, files: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="a model folder has no base to compare with"):
        diagnose_run(tiny_model, tasks(files, "numbers"))


def test_results_of_other_questions_or_settings_stay(run: Path, files: dict[str, str], tmp_path: Path) -> None:
    def names() -> list[str]:
        return sorted(path.stem for path in (run / "evaluation").glob("*.json"))

    one = tasks(files, "choices")
    evaluate_run(run, one, say=lambda _: None)
    evaluate_run(run, one, say=lambda _: None)
    assert names() == ["choices"]
    evaluate_run(run, one, {"max_rows": 3}, base=False, say=lambda _: None)
    assert names() == ["choices", "choices-2"]
    assert json.loads((run / "evaluation" / "choices.json").read_text())["items"] == len(CHOICES)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "choices.jsonl"
    other.write_text(Path(files["choices"]).read_text().replace("Is it", "Was it"))
    evaluate_run(run, [TaskConfig(str(other))], say=lambda _: None)
    assert names() == ["choices", "choices-2", "choices-3"]
    assert main(["evaluate", str(run), "--task", f"mine={other}", "--no-base"]) == 0
    assert "mine" in names()


def test_tasks_of_the_configuration_are_the_default(make_config: Any, files: dict[str, str]) -> None:
    config = make_config("training.max_steps=1", f"evaluation.tasks=[{{path: {files['choices']}, max_rows: 5}}]")
    train(config, say=lambda _: None)
    (report,) = evaluate_run(config.output, say=lambda _: None).tasks
    assert (report.name, report.items) == ("choices", 5)
    (report,) = evaluate_run(config.output, settings={"max_rows": 3}, say=lambda _: None).tasks
    assert report.items == 3


def test_code_is_run_only_where_that_was_said(run: Path, files: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"code: graded by running what the model writes.*--run-code"):
        evaluate_run(run, tasks(files, "code"), say=lambda _: None)
    (report,) = evaluate_run(run, tasks(files, "code"), run_code=True, say=lambda _: None).tasks
    assert report.tuned["pass@1"] == 0
    (row,) = [json.loads(line) for line in (run / "evaluation" / "code.jsonl").read_text().splitlines()]
    assert "Error" in row["tuned"]["answers"][0]["found"]


def test_what_is_wrong_is_said_before_a_model_is_loaded(
    run: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_sft.evaluation.asking.load_for_inference", lambda _: pytest.fail("loaded"))
    assert main(["evaluate", str(run)]) == 2
    assert "name files of questions with --task FILE" in capsys.readouterr().err
    assert main(["evaluate", str(run / "no"), "--task", files["choices"]]) == 2
    assert "neither a run folder" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--task", "missing.jsonl"]) == 2
    assert "missing.jsonl: no such file" in capsys.readouterr().err
    for option, value, fault in (
        ("samples", "0", "positive"), ("temperature", "nan", "a finite number"), ("max-rows", "-3", "positive"),
    ):  # fmt: skip
        assert main(["evaluate", str(run), "--task", files["numbers"], f"--{option}", value]) == 2
        assert f"tasks.0.{option.replace('-', '_')} must be {fault}" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--task", files["texts"], "--task", files["texts"]]) == 2
    assert "two tasks named texts" in capsys.readouterr().err


def test_a_question_that_the_model_has_no_room_for_is_refused(run: Path, files: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="lower max_new_tokens"):
        evaluate_run(run, tasks(files, "numbers"), {"max_new_tokens": 2040}, say=lambda _: None)


def test_texts_are_cut_to_what_the_model_takes(run: Path, tiny_model: Path, files: dict[str, str]) -> None:
    config = tiny_model / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"max_position_embeddings": 2048', '"max_position_embeddings": 8'))
    try:
        (report,) = evaluate_run(run, tasks(files, "texts"), say=lambda _: None).tasks
    finally:
        config.write_text(before)
    assert report.items == len(TEXTS)


def test_a_template_that_cannot_write_a_question_names_its_line(run: Path, files: dict[str, str]) -> None:
    file = Path(files["numbers"])
    row = {"question": "x \U000f0000 <|im_end|>", "answer": "#### 1"}
    file.write_text(file.read_text() + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"numbers\.jsonl:7: "):
        evaluate_run(run, tasks(files, "numbers"), say=lambda _: None)


def test_json_has_the_figures(run: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--task", files["choices"], "--no-base", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["tasks"]
    assert report["form"] == "choices"
    assert "base" not in report


def test_a_base_whose_template_brought_tokens_is_asked_as_before_training(
    make_config: Any, files: dict[str, str], tmp_path: Path, small_tokenizer: Any
) -> None:
    """Their rows are in the adapter. Without it they are what training began with, the mean; and a plain text ends in
    the base's eos token, not in the end of turn that took its place."""
    base = bare_base(tmp_path / "bare", small_tokenizer, tied=True, room=0)
    config = make_config(
        f"model.path={base}", "model.chat_template=chatml", "training.max_steps=2", "training.learning_rate=0.1"
    )
    train(config, say=lambda _: None)
    run = Path(config.output)
    result = evaluate_run(run, tasks(files, "texts", "numbers"), say=lambda _: None)
    assert evaluate_run(run, tasks(files, "texts", "numbers"), say=lambda _: None) == result
    model = load_for_inference(run)
    ids = torch.tensor([[*small_tokenizer(TEXTS[0]["text"])["input_ids"], small_tokenizer.eos_token_id]])
    with model.disable_adapter(), torch.no_grad():
        rows = model.get_input_embeddings()(torch.arange(len(small_tokenizer) + 1))
        loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(rows[-1], rows[:-1].mean(0))
    assert rows_of(result, "texts")[0]["base"]["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_what_is_not_read_is_counted(run: Path, tmp_path: Path) -> None:
    """Texts in which nothing is to be predicted, and answers that their rows mark as not wanted."""
    file = tmp_path / "chats.jsonl"
    user = {"role": "user", "content": "Capital?"}
    chats: list[dict[str, Any]] = [
        {"messages": [user, {"role": "assistant", "content": "Lyon", "train": False}]},
        {"messages": [user, {"role": "assistant", "content": "Rome"}]},
        {"messages": [user, {"role": "assistant", "content": "Bonn"}], "label": False},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in chats))
    said: list[str] = []
    result = evaluate_run(run, [TaskConfig(str(file), form="loss")], say=said.append)
    assert len(rows_of(result, "chats")) == 1
    assert f"chats: 1 rows left out (label: false, an answer that is not wanted; first {file}:3)" in said
    assert f"chats: 1 of 2 texts left out, because they have no token to predict (first {file}:1)" in said
    said.clear()
    evaluate_run(run, [TaskConfig(str(file), form="exact", max_new_tokens=2)], say=said.append)
    assert "chats: configured exact, 2 of 2 items" in said


def test_damaged_results_of_an_earlier_evaluation_are_left_alone(tmp_path: Path) -> None:
    """They must not end one that has asked for hours."""
    (tmp_path / "t.json").write_text("{")
    report = TaskReport(name="t", form="exact", path="p", questions="q", items=1, seed=0, tuned={})
    assert _free_name(tmp_path, report) == "t-2"
