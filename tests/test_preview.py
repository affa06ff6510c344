import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from qlora_sft.cli import main
from qlora_sft.data.render import Rendered, render_conversation
from qlora_sft.data.show import as_page, as_text, token_runs


@pytest.fixture
def recipe(make_config: Any, tmp_path: Path) -> Path:
    make_config()
    return tmp_path / "config.yaml"


def test_json_says_token_by_token_what_is_supervised(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(recipe), "--count", "5", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)["rows"]
    assert len(rows) == 5
    for row in rows:
        assert row["source"] == "chat"
        assert len(row["ids"]) == len(row["tokens"]) == len(row["supervised"]) == len(row["weights"])
        trained = [token for token, on in zip(row["tokens"], row["supervised"], strict=True) if on]
        assert trained[-1] == "<|im_end|>"
        assert "<|im_start|>" not in trained
    assert "supervised" in err
    assert "mixture" in err


def test_it_says_how_much_of_the_first_sequences_is_shown(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(recipe), "--count", "2"]) == 0
    (shown,) = re.findall(
        r"shown: 2 of the (\d+) documents of the first 1 of \d+ packed sequences", capsys.readouterr().err
    )
    assert int(shown) > 2
    assert main(["preview", str(recipe), "--count", shown]) == 0
    assert "shown:" not in capsys.readouterr().err


def test_it_packs_for_the_backend_that_training_will_take(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth shares no prefixes; that it is here is enough to know, and it is not imported for it."""
    from qlora_sft.prepare import prepare

    if find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    monkeypatch.setattr("qlora_sft.model.backend._import_unsloth", lambda: pytest.fail("imported"))
    for backend, dora, shares in (("auto", "false", False), ("auto", "true", True), ("transformers", "false", True)):
        said: list[str] = []
        config = make_config(f"model.backend={backend}", f"lora.dora={dora}")
        data = prepare(config, said.append, unsloth=False)
        assert (data.backend.name == "transformers") == shares
        assert any("Unsloth's forward knows no tree" in line for line in said) != shares


def test_it_shows_what_train_trains(recipe: Path, make_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The first packed sequence of the preview is the first one of the run."""
    from tests_support import documents_of

    from qlora_sft.data.sequences import plan_sequences

    config = make_config()
    documents = documents_of(config)
    first = plan_sequences(documents, config.data, config.training.epochs, config.seed).sequences[0]
    assert main(["preview", str(recipe), "--count", str(len(first)), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["ids"] for row in rows] == [documents[i].input_ids for i in first]
    assert [row["weights"] for row in rows] == [documents[i].weights for i in first]


def test_a_terminal_sees_green_and_dim_and_a_file_sees_brackets(tokenizer: Any) -> None:
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0.5}]}
    document = render_conversation(row, tokenizer, source="s")
    assert [(run.text, run.weight) for run in token_runs(document, tokenizer)][-3:] == [
        ("A", 0.5),
        ("<|im_end|>", 0.5),
        ("\n", 0.0),
    ]
    plain = as_text([[document]], tokenizer, colour=False)
    assert "[[×0.5 A]][[×0.5 <|im_end|>]]" in plain
    assert "\x1b[32mA\x1b[0m" in as_text([[document]], tokenizer, colour=True)


def test_the_page_stands_alone_and_escapes_everything(tokenizer: Any) -> None:
    evil = "<script>alert(1)</script> & <b>"
    row = {"messages": [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}]}
    document = render_conversation(row, tokenizer, source="<i>")
    page = as_page([[document, document]], tokenizer, "<title>", ["a < b"])
    assert "<script" not in page
    assert "<i>" not in page
    assert page.count('<div class="tokens"') == 2
    assert not re.search(r"https?://|src=|href=", page)
    assert 'name="viewport"' in page


def test_every_token_is_shown_once(tokenizer: Any) -> None:
    document = Rendered([1, 520, 9531, 198, 57, 2, 198], [0, 0, 0, 0, 1, 1, 0], "s")
    assert "".join(run.text for run in token_runs(document, tokenizer)) == tokenizer.decode(document.input_ids)


def test_the_command_writes_the_page_and_nothing_else(recipe: Path, tmp_path: Path) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    command = [sys.executable, "-m", "qlora_sft", "preview", str(recipe), "--html", str(tmp_path / "page.html")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} - before == {"page.html"}
    assert "[[" in result.stdout


def test_the_tree_of_shared_prefixes_is_drawn(tokenizer: Any) -> None:
    prompt = tokenizer("You answer questions about the weather, the time and the news, and about nothing else at all.")
    ids = (prompt.input_ids * 2)[:32]
    rows = [Rendered([*ids, 50 + n, 51, 52], [0.0] * 32 + [1.0] * 3, "a") for n in range(6)]
    text = as_text([rows], tokenizer, colour=False, trees=True)
    assert "6 documents, 210 tokens; computed once where they are shared: 50" in text
    assert "└─ 32 tokens, shared by 6 documents: 'You answer" in text
    assert "   └─ 3 tokens, a, 3 supervised" in text
    assert "(2 more that continue the segment of 32 tokens alone)" in text
