from pathlib import Path

import pytest

from qlora_sft.config import RECIPES, dump_config, load_config
from qlora_sft.errors import ConfigError

MINIMAL = "model: {path: demo}\ndata: {train: [{path: a.jsonl}, {path: b.jsonl}]}\noutput: out\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(MINIMAL)
    return file


def problems_of(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return caught.value.problems


def test_three_errors_are_reported_at_once_with_file_key_and_nearest_name(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(
        "model: {path: demo, backnd: auto}\n"
        "data: {train: [{path: a.jsonl}], max_length: many}\n"
        "output: out\n"
        "training: {optimizer: adam_torch}\n"
    )
    problems = problems_of(file)
    assert len(problems) == 3
    assert all(problem.startswith(str(file)) for problem in problems)
    assert "'model.backnd'" in problems[0]
    assert "'backend'" in problems[0]
    assert "data.max_length must be a whole number, got 'many'" in problems[1]
    assert "did you mean 'adamw_torch'" in problems[2]


def test_missing_required_keys_are_named(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("data: {train: []}\n")
    assert [p.split(": ", 1)[1] for p in problems_of(file)] == ["missing key 'model'", "missing key 'output'"]


def test_numbers_without_a_dot_are_numbers(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "training: {learning_rate: 2e-4}\n")
    assert load_config(minimal).training.learning_rate == 2e-4
    assert load_config(minimal, ["training.learning_rate=3E-5"]).training.learning_rate == 3e-5
    assert load_config(minimal, ["training.learning_rate=1"]).training.learning_rate == 1.0


def test_overrides_reach_list_items_and_optional_values(minimal: Path) -> None:
    config = load_config(minimal, ["data.train.1.path=c.jsonl", "training.max_steps=", "data.train.0.max_rows=5"])
    assert [source.path for source in config.data.train] == ["a.jsonl", "c.jsonl"]
    assert config.training.max_steps is None
    assert config.data.train[0].max_rows == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.2.path=x", "has 2 items"),
        ("training.lerning_rate=1", "did you mean 'learning_rate'"),
        ("training.learning_rate=-1", "must be positive"),
        ("training.batch_size=true", "must be a whole number"),
        ("output=5", "output must be a text"),
        ("model.path.x=1", "it has no 'x'"),
        ("justtext", "expected key.sub=value"),
        ("data.train.1.name=a", "two sources named a"),
        ("lora.target_modules=[q_proj, 3]", "lora.target_modules.1 must be a text"),
    ],
)
def test_wrong_overrides(minimal: Path, override: str, message: str) -> None:
    assert any(message in problem for problem in problems_of(minimal, override))


def test_a_missing_file_lists_what_is_near(tmp_path: Path, minimal: Path) -> None:
    (problem,) = problems_of(minimal.with_name("recip.yaml"))
    assert str(minimal) in problem
    (problem,) = problems_of(Path("dem"))
    assert "did you mean 'demo'" in problem


@pytest.mark.parametrize("recipe", [file.stem for file in RECIPES.glob("*.yaml")])
def test_shipped_recipes_load_and_survive_a_round_trip(recipe: str, tmp_path: Path) -> None:
    config = load_config(recipe)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config
