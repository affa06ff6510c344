"""A source larger than the memory that its preparation may take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEGABYTES = 300
# Reads, renders, packs and keeps the file, then once more from the cache; prints kilobytes before and at the peak.
PREPARE = """
import json, resource, sys, time
from qlora_sft.config import load_config
from qlora_sft.data.plan import plan_data
from qlora_sft.data.splits import read_data
from qlora_sft.data.template import choose_chat_format
from qlora_sft.model.tokenizer import load_tokenizer, stop_token_ids

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 1024

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

config = load_config(sys.argv[1])
tokenizer = load_tokenizer(config.model, config.model.path)
chat_format = choose_chat_format(tokenizer, stop_token_ids(config.model, config.model.path, tokenizer))
before, started = resident(), time.perf_counter()
train_sources, held_out, _ = read_data(config, print)
train, _, bins = plan_data(config, train_sources, held_out, tokenizer, chat_format, print)
documents = train.all_documents
json.dump({
    "before": before, "peak": peak(), "seconds": time.perf_counter() - started, "documents": len(documents),
    "tokens": train.ledger["big"].tokens, "last": documents[len(documents) - 1].input_ids[-3:],
}, open(sys.argv[2], "w"))
"""


@pytest.mark.slow
def test_a_large_file_is_prepared_in_a_small_part_of_its_size(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_SFT_CACHE", str(tmp_path / "cache"))
    words = "The quick brown fox jumps over the lazy dog, and then it sleeps in the warm sun. " * 60
    with (tmp_path / "big.jsonl").open("w") as file:
        row = 0
        while file.tell() < MEGABYTES * 2**20:
            turns = [{"role": "user", "content": f"Question {row}"}, {"role": "assistant", "content": f"{row} {words}"}]
            file.write(json.dumps({"messages": turns}) + "\n")
            row += 1
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{path: {tiny_model}}}\ndata: {{train: [{{path: {tmp_path / 'big.jsonl'}}}], max_length: 8192}}\n"
        f"output: {tmp_path / 'run'}\n"
    )
    taken = []
    for _ in range(2):
        command = [sys.executable, "-c", PREPARE, str(config), str(tmp_path / "out.json")]
        subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
        taken.append(json.loads((tmp_path / "out.json").read_text()))
    print(taken)
    first, second = taken
    assert first["documents"] == second["documents"] == row
    assert first["tokens"] == second["tokens"] > MEGABYTES * 2**20 / 8
    assert first["last"] == second["last"]
    # As Python lists the tokens alone would be 40 bytes each. Mapped pages count as resident while there is room.
    on_disk = 12 * first["tokens"] / 1024
    for each in taken:
        assert each["peak"] - each["before"] < on_disk + 300 * 1024
