"""Mixture, replay, deduplication and decontamination in a whole run: what is printed, recorded and trained on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import conversation, write_rows

from qlora_sft.config import Config
from qlora_sft.data.mixture import order_digest
from qlora_sft.errors import DataError
from qlora_sft.train import train


def test_a_run_trains_on_what_the_mixture_says_and_records_it(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    exam = "one two three four five six seven eight nine ten eleven twelve thirteen"
    rows = [conversation(i) for i in range(20)]
    (tmp_path / "general.txt").write_text("A plain text.\nAnother one, a little longer.\n")
    (tmp_path / "exam.csv").write_text(f"task\n{exam}\n")
    pair = {"prompt": f"Count: {exam}!", "completion": "Done."}
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "q", "completion": "a, b, c and d"}, pair])
    chat, pairs = tmp_path / "chat.jsonl", tmp_path / "pairs.jsonl"
    config = make_config(
        f"data.train=[{{path: {chat}, loss_weight: 2}}, {{path: {pairs}, repeat: 5}}]",
        f"data.replay={{path: {tmp_path / 'general.txt'}, share: 0.2}}",
        "data.curriculum=progressive",
        "data.deduplicate=exact",
        f"data.decontaminate=[{tmp_path / 'exam.csv'}]",
        rows=[*rows, rows[3]],
    )
    said: list[str] = []
    report = train(config, say=said.append)
    run = Path(config.output)
    printed = "\n".join(said)
    for part in (
        "chat: detected messages (messages: role/content) in",
        "pairs: detected prompt_completion (prompt: prompt, completion: completion) in",
        "general: detected text (text: every token supervised), documents separated by lines in",
        f"pairs: 1 dropped (contaminated): {pairs}:2",
        f"chat: 1 dropped (duplicate): {chat}:21",
        "mixture (proportional; replay 20.0% of the rows, falling from 40.0% to 0; 1 epochs)",
    ):
        assert part in printed
    # 20 conversations, one pair five times, and replay for a fifth of all: 6 of 31 rows.
    table = printed[printed.index("mixture (") :].splitlines()
    assert [line.split()[:2] for line in table[2:5]] == [["chat", "20"], ["pairs", "5"], ["general", "6"]]
    record = json.loads((run / "order.json").read_text())
    assert record["sha256"] == report.order.sha256 == order_digest(record["bins"])
    assert sum(map(len, record["bins"])) == 31
    assert report.order.removed == 2
    removed = [json.loads(line) for line in (run / "removed.jsonl").read_text().splitlines()]
    assert [(row["source"], row["reason"]) for row in removed] == [("pairs", "contaminated"), ("chat", "duplicate")]
    data = json.loads((run / "manifest.json").read_text())["data"]
    assert data["chat"]["dropped"] == {"duplicate": {"rows": 1, "first": [f"{chat}:21"]}}
    # The same configuration and files: the same order.
    assert train(config, overwrite=True, say=said.append).order == report.order


def test_faults_of_training_replay_and_held_out_files_come_together(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text("{\n")
    config = make_config(
        f"data.train.0.path={tmp_path / 'a.jsonl'}",
        f"data.replay={{path: {tmp_path / 'b.jsonl'}}}",
        f"data.held_out=[{{path: {tmp_path / 'c.jsonl'}}}]",
    )
    with pytest.raises(DataError) as caught:
        train(config)
    assert [line.split(":1: ")[0] for line in str(caught.value).splitlines()] == [
        str(tmp_path / f"{n}.jsonl") for n in "abc"
    ]
