"""``recipes`` lists what is shipped; ``new`` writes a recipe that loads, for every card and goal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_sft.cli import main
from qlora_sft.config import RECIPES, load_config
from qlora_sft.errors import ConfigError
from qlora_sft.recipe_new import CARDS, GOALS, Goal, new_recipe


def test_every_shipped_recipe_is_listed_with_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for file in RECIPES.glob("*.yaml"):
        (line,) = (line for line in lines if line.startswith(f"{file.stem} "))
        assert file.read_text().splitlines()[1].removeprefix("# ") in line
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert {entry["name"] for entry in listed} == {file.stem for file in RECIPES.glob("*.yaml")}


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("card", CARDS)
def test_what_is_written_loads_and_says_what_was_asked(card: int, goal: str, tmp_path: Path) -> None:
    data = [str(tmp_path / "a: b #1.jsonl"), "owner/set"]
    file = new_recipe(str(tmp_path / "mine.yaml"), "owner/Model-8B", data, card, goal, ["apart.jsonl"])
    config = load_config(file)
    assert [source.path for source in config.data.train] == data
    assert [source.path for source in config.data.held_out] == ["apart.jsonl"]
    assert (config.model.path, config.output) == ("owner/Model-8B", "runs/mine")
    assert config.data.max_length <= CARDS[card]
    assert ("GB" in file.read_text(), "without a GPU" in file.read_text()) == (card > 0, card == 0)
    thinking = {"think": "on", "no-think": "off"}.get(goal, "auto")
    assert {source.thinking for source in [*config.data.train, *config.data.held_out]} == {thinking}
    assert (config.data.train[0].format == "text") == (goal == "read")
    assert max(map(len, file.read_text().splitlines())) < 200


def test_a_small_card_gets_the_head_in_4_bits_only_where_it_is_not_tied(tmp_path: Path) -> None:
    for name, tied in (("tied", True), ("apart", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        file = new_recipe(str(tmp_path / f"{name}.yaml"), str(tmp_path / name), ["a.jsonl"], 8, "chat")
        config = load_config(file)
        assert (config.model.head_in_4bit, config.memory.offload_embeddings) == (not tied, not tied)
        assert "head_in_4bit" in file.read_text()


def test_nothing_is_overwritten_and_faults_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    flags = ["--model", "demo", "--data", "a.jsonl", "--card", "12", "--goal", "chat"]
    with monkeypatch.context() as changed:
        changed.setitem(GOALS, "chat", Goal("learns too fast", learning_rate="20"))
        assert main(["new", str(file), *flags]) == 2
    assert f"{file}: training.learning_rate must be at most" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["new", str(file), *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(file)}
    assert main(["new", str(file), *flags]) == 2
    assert "exists; name another file" in capsys.readouterr().err


def test_what_is_not_given_is_asked_until_it_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    with pytest.raises(ConfigError, match=r"--model .* is not given, and there is no terminal"):
        monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
        from qlora_sft.recipe_new import ask

        ask("--model (a folder)", lambda _: None)
    answers = iter(["", "demo", "a.jsonl", "large", "20 GB", "sing", "tools"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    assert main(["new", str(file)]) == 0
    said = capsys.readouterr().err
    assert "name a file, a folder or a Hub id" in said
    assert "a whole number, as 24; 0 without a GPU" in said
    assert "tools (calls tools" in said
    config = load_config(file)
    assert (config.model.path, config.data.train[0].path, config.data.max_length) == ("demo", "a.jsonl", 8192)


def test_any_card_is_one_and_rows_are_held_out_unless_some_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "demo", "--data", "a.jsonl", "--goal", "long"]
    for card, length in (("0", 2048), ("6", 2048), ("10", 4096), ("32", 32_768), ("141gb", 131_072)):
        assert main(["new", str(tmp_path / f"{card}.yaml"), *flags, "--card", card]) == 0
        config = load_config(tmp_path / f"{card}.yaml")
        assert (config.data.max_length, config.data.held_out) == (length, "5%")
    for card in ("-8", "8.5", "many", "99999"):
        assert main(["new", str(tmp_path / "no.yaml"), *flags, "--card", card]) == 2
        assert f"--card: expected a whole number, as 24; 0 without a GPU, got '{card}'" in capsys.readouterr().err


def test_long_names_line_breaks_and_equal_names_load(tmp_path: Path) -> None:
    data = [f"{'a folder ' * 20}/a.jsonl", "b/a.jsonl", "b/c\nd.jsonl", "b/a-1.jsonl"]
    file = new_recipe(
        str(tmp_path / "mein 😀.yaml"), "owner/\udcffa\nlora: {r: 1}", data, 8, "chat", ["x/h.jsonl", "y/h.jsonl"]
    )
    config = load_config(file)
    assert (config.model.path, config.lora.r, config.output) == ("owner/\udcffa\nlora: {r: 1}", 16, "runs/mein 😀")
    assert [source.path for source in config.data.train] == data
    assert [source.name for source in config.data.train] == ["a-0", "a-2", None, None]
    assert [source.name for source in config.data.held_out] == ["h-0", "h-1"]
    assert "docs/" not in file.read_text()


def test_the_end_of_the_answers_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", ended)
    assert main(["new", str(tmp_path / "mine.yaml")]) == 2
    assert "--model (a folder, a Hub id, or demo) is not given; the answers ended" in capsys.readouterr().err
