from pathlib import Path

import pytest

from qlora_sft.config import RECIPES, dump_config, load_config
from qlora_sft.config_data import SourceConfig, source_name
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
    assert [p.split(": ", 1)[1] for p in problems_of(file)] == [
        "missing key 'model'", "missing key 'output'", "data.train must name at least one source",
    ]  # fmt: skip


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
        ("data.train.0.fraction=0", "data.train.0.fraction must be positive, got 0"),
        ("data.train.0.repeat=0", "data.train.0.repeat must be positive"),
        ("data.train.0.loss_weight=-1", "data.train.0.loss_weight must be positive"),
        ("data.train.0.weight=2", "data.train.0.weight has an effect with data.mixture=explicit only"),
        ("data.train.0.quality=2", "data.train.0.quality has an effect with data.mixture=quality only"),
        ("data.mixture=explicit", "data.train.1.weight must be given with data.mixture=explicit"),
        ("data.mixture=temperature", "data.temperature is needed with data.mixture=temperature"),
        ("data.temperature=2", "data.temperature has an effect with data.mixture=temperature only"),
        ("data.curriculum=progressive", "data.curriculum needs data.replay"),
        ("data.replay=3", "data.replay must be a section with keys or empty, got a number"),
        ("data.replay={path: c.jsonl, share: 1}", "data.replay.share must be at most 0.95, got 1"),
        ("data.replay={path: a.jsonl}", "two sources named a"),
        ("data.replay={path: c.jsonl, weight: 2}", "unknown key 'data.replay.weight'"),
        ("data.held_out=[{path: a.jsonl, repeat: 2}]", "unknown key 'data.held_out.0.repeat'"),
        ("data.train.0.columns=[a]", "data.train.0.columns must be a section of texts or empty"),
        ("data.train.0.columns={promt: q}", "maps 'promt', which is none of"),
        ("data.train.0={path: x, format: text, columns: {prompt: q}}", "maps 'prompt', which is none of text"),
        ("data.train.0.streaming=true", "data.train.0.streaming needs max_rows"),
        ("data.decontaminate_words=1", "data.decontaminate_words must be at least 2"),
    ],
)
def test_wrong_overrides(minimal: Path, override: str, message: str) -> None:
    assert any(message in problem for problem in problems_of(minimal, override))


def test_a_whole_data_section_loads_and_survives_a_round_trip(minimal: Path, tmp_path: Path) -> None:
    minimal.write_text(
        "model: {path: demo}\noutput: out\n"
        "data:\n"
        "  train:\n"
        "    - {path: a.jsonl, weight: 3, columns: {prompt: question, completion: answer}, loss_weight: 0.5}\n"
        "    - {path: owner/set, split: test, revision: abc, streaming: true, max_rows: 9, weight: 1e-1}\n"
        "  mixture: explicit\n"
        "  replay: {path: wiki.txt, share: 0.1}\n"
        "  curriculum: progressive\n"
        "  decontaminate: [exam.jsonl]\n"
    )
    config = load_config(minimal)
    assert config.data.replay is not None
    assert config.data.replay.share == 0.1
    assert config.data.train[0].columns == {"prompt": "question", "completion": "answer"}
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/b.jsonl.gz", "b"),
        ("demo:train/fields.jsonl", "fields"),
        ("owner/set:main", "set"),
        ("corpus/shards/*.parquet", "shards"),
        ("corpus/v1.5/", "v1.5"),
        ("*.jsonl", "*"),
    ],
)
def test_sources_are_called_after_the_last_part_of_their_path(path: str, name: str) -> None:
    assert source_name(SourceConfig(path)) == name


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
