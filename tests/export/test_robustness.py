"""Memory, a process killed in the middle, a full disk, no network: a merge writes the whole result or nothing."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import configured
from synthetic import WIDTH, write_run

from qlora_sft.atomic import remove_leftovers
from qlora_sft.errors import RunError
from qlora_sft.export import imatrix, parity
from qlora_sft.export.logits_file import logits_file
from qlora_sft.export.merge import MergeResult, _merge_better, merge_run
from qlora_sft.export.parity import _judge, compare, forget, record
from qlora_sft.model.tensors import read_model
from qlora_sft.run.folder import Run

SCRIPT = Path(__file__).with_name("synthetic.py")


def start(run: Path, onto: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(SCRIPT), str(run), onto], stdout=subprocess.PIPE, text=True)


def merge_in_a_process(run: Path, onto: str) -> dict[str, Any]:
    process = start(run, onto)
    out, _ = process.communicate()
    assert process.returncode == 0
    result: dict[str, Any] = json.loads(out)
    grown = result["after"] - result["before"]
    print(f"{result['bytes'] / 2**20:.0f} MiB merged onto {onto}: peak grew by {grown / 2**20:.0f} MiB")
    return result


def test_memory_stays_far_below_the_model(tmp_path: Path, base_model: Path) -> None:
    run = write_run(tmp_path, matrices=10, rows=8192, tokenizer_from=base_model)
    result = merge_in_a_process(run, "nf4-dequantized")
    assert result["bytes"] > 300 * 2**20
    # The bound that is promised is the largest tensor and 1 GiB; so small a model has to do with much less.
    assert result["after"] - result["before"] < result["largest"] + 256 * 2**20, result
    assert len(list((run / "merged").glob("model-*.safetensors"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("onto", ["nf4-dequantized", "bf16"])
def test_memory_of_a_4_gb_model(tmp_path: Path, base_model: Path, onto: str) -> None:
    run = write_run(tmp_path, matrices=8, rows=131072, tokenizer_from=base_model)
    result = merge_in_a_process(run, onto)
    assert result["bytes"] > 4 * 10**9
    assert result["after"] - result["before"] < result["largest"] + 2**30


def test_a_merge_that_is_killed_leaves_nothing_and_the_next_one_clears_up(tmp_path: Path, base_model: Path) -> None:
    run = write_run(tmp_path, matrices=10, rows=8192, tokenizer_from=base_model)
    process = start(run, "nf4-dequantized")
    deadline = time.monotonic() + 60
    while not list(run.glob(".merged.partial-*/model-00001*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(run.glob(".merged.partial-*")), "it was not killed in the middle"
    assert not (run / "merged").exists()
    merge_run(run, onto="bf16", say=lambda _: None)
    assert len(read_model(run / "merged")) == 10
    assert not list(run.glob(".merged*"))


def test_an_export_clears_up_what_killed_ones_have_left(tmp_path: Path) -> None:
    """Of gigabytes each; what a process that runs is writing stays, and so do the files of another name."""
    process = subprocess.Popen(["true"])
    process.wait()
    gone, running = process.pid, os.getppid()
    left = [f".m.gguf.partial-{gone}", f".m.gguf.partial-{gone}.full", f".m.gguf.partial-{gone}.imatrix"]
    stays = [f".m.gguf.partial-{running}", f".m.gguf2.partial-{gone}", ".m.gguf.x-y", "m.gguf", ".m.gguf"]
    for name in [*left, *stays]:
        (tmp_path / name).touch()
    (tmp_path / f".m.gguf.old-{gone}").mkdir()
    remove_leftovers(tmp_path / "m.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {*stays}


def test_logits_find_out_at_once_that_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To write into a mapped file for which there is no room ends the process."""
    rows = logits_file(tmp_path / "rows.npy", (300, 4096))
    assert (rows.shape, (tmp_path / "rows.npy").stat().st_blocks * 512 >= rows.nbytes) == ((300, 4096), True)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"no room for logits, 5 MiB \(No space left on device; .* Set TMPDIR"):
        logits_file(tmp_path / "other.npy", (300, 4096))


def test_logits_that_are_no_numbers_are_no_parity() -> None:
    """Whatever the others are, and though on text that was not trained only the divergence counts."""
    reference = np.random.default_rng(0).normal(size=(150, 40)).astype(np.float32)
    broken = reference.copy()
    broken[140] = np.nan
    for pair in ((reference, broken), (broken, reference), (broken, broken)):
        figures = compare(*pair)
        assert figures.kl == math.inf
        (fault,) = _judge("q8_0", figures, "merged", supervised_only=False, say=lambda _: None)
        assert "Suspect: an overflow, for its logits are not numbers" in fault
    reference[:, 7] = -np.inf  # a token that is never written
    figures = compare(reference, reference)
    assert (figures.top1, figures.kl) == (1.0, 0.0)
    assert _judge("f16", figures, "merged", supervised_only=True, say=lambda _: None) == []


def test_an_importance_matrix_of_a_model_that_overflows_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imatrix, "_training_documents", lambda _: [[1, 2]])
    monkeypatch.setattr(imatrix, "_collect", lambda *_: ({"layer": np.array([1.0, np.inf])}, 2))
    monkeypatch.setattr(imatrix.Run, "open", lambda _: SimpleNamespace(model=SimpleNamespace(trust_remote_code=False)))
    with pytest.raises(RunError, match="overflows in the type that it computes in"):
        imatrix.write_imatrix(tmp_path, tmp_path, "llama", tmp_path / "matrix", say=lambda _: None)
    assert not (tmp_path / "matrix").exists()


def test_a_base_without_a_generation_config_stops_at_the_trained_token(tmp_path: Path, base_model: Path) -> None:
    """transformers would go by config.json, which only knows the token that ends a text."""
    run = write_run(tmp_path, matrices=2, rows=64, tokenizer_from=base_model)
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": 0, "bos_token_id": 1}))
    assert not (tmp_path / "base" / "generation_config.json").exists()
    merge_run(run, onto="bf16", say=lambda _: None)
    generation = json.loads((run / "merged" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0]}


def test_that_float16_cannot_be_tried_costs_no_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def quick_difference(_: Path) -> Iterator[Any]:
        yield lambda folder: 0.02 if folder.name == "bf16" else 0.01

    def write(folder: Path, onto: Any, dtype: str, reason: str) -> MergeResult:
        if dtype == "f16":
            raise RunError("a weight is beyond float16's range")
        folder.mkdir(parents=True)
        return MergeResult(str(folder), onto, "bfloat16", 1, 1, reason)

    said: list[str] = []
    monkeypatch.setattr(parity, "quick_difference", quick_difference)
    merge: Any = SimpleNamespace(run=SimpleNamespace(path=tmp_path), say=said.append, write=write)
    result = _merge_better(merge, tmp_path / "merged", "auto")
    assert (result.onto, result.dtype) == ("nf4-dequantized", "bfloat16")
    assert said[0] == "not in float16: a weight is beyond float16's range"
    assert (tmp_path / "merged").is_dir()


def test_figures_are_forgotten_when_their_file_is_made_anew(tmp_path: Path, base_model: Path) -> None:
    """A model card would claim them for it."""
    run = write_run(tmp_path, matrices=2, rows=64, tokenizer_from=base_model)
    record(run, {"parity": {"merged": {"kl": 0.0}, "q8_0": {"kl": 1.0}}})
    merge_run(run, tmp_path / "elsewhere", onto="bf16", say=lambda _: None)
    assert list(Run.open(run).exports["parity"]) == ["merged", "q8_0"]
    merge_run(run, onto="bf16", say=lambda _: None)
    assert list(Run.open(run).exports["parity"]) == ["q8_0"]
    forget(run, "q8_0")
    assert Run.open(run).exports["parity"] == {}


def test_too_small_a_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, matrices=2, rows=64, tokenizer_from=base_model)
    usage = type(shutil.disk_usage(tmp_path))(2**40, 2**40, 2**20)
    monkeypatch.setattr("qlora_sft.export.merge.shutil.disk_usage", lambda _: usage)
    with pytest.raises(RunError, match="GiB are free on"):
        merge_run(run, onto="bf16")
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "manifest.json"]


def test_the_merge_is_the_sum_and_counts_its_modules(tmp_path: Path, base_model: Path) -> None:
    run = write_run(tmp_path, matrices=5, rows=256, tokenizer_from=base_model)
    assert merge_run(run, onto="bf16", say=lambda _: None).modules == 5
    from safetensors.torch import load_file

    lora = load_file(run / "adapter" / "adapter_model.safetensors")
    base, merged = read_model(tmp_path / "base"), read_model(run / "merged")
    for name, stored in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        update = lora[f"{key}B.weight"] @ lora[f"{key}A.weight"] * 2
        assert update.shape == (256, WIDTH)
        assert torch.equal(merged[name].whole(), (stored.whole().float() + update).to(torch.bfloat16))


# Runs before anything else in a process: no name is looked up and nothing is connected to, whoever asks.
NO_NETWORK = """
import socket
def refuse(*a, **k): raise OSError("no network in this test")
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
socket.socket.connect = refuse
"""


@pytest.fixture(scope="module")
def trained(convertible_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, with a shipped template."""
    from qlora_sft.train import train

    make = configured(tmp_path_factory.mktemp("trained"), convertible_model)
    config = make("training.max_steps=1", "training.learning_rate=1e-2", "model.chat_template=chatml-think")
    return Path(train(config, say=lambda _: None).output)


def test_an_export_of_a_run_needs_no_network(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge and read-back of a tiny run here, and conversion in a process of its own, with the tools in the cache."""
    from qlora_sft.export.gguf import export_run
    from qlora_sft.export.llama_cpp import llama_cpp_path

    llama_cpp_path()
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(NO_NETWORK)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'blocked'}:{os.environ.get('PYTHONPATH', '')}")
    asked: list[Any] = []

    def refuse(*what: Any, **_: Any) -> Any:
        asked.append(what)
        raise OSError("no network in this test")

    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    done = subprocess.run([sys.executable, "-c", "import socket; socket.gethostbyname('x')"], capture_output=True)
    assert b"no network in this test" in done.stderr
    exported = export_run(shutil.copytree(trained, tmp_path / "run"), "f16", say=lambda _: None)
    assert Path(exported.gguf).is_file()
    assert asked == []


def test_without_tools_and_network_the_error_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_sft.export.llama_cpp import llama_cpp_path

    monkeypatch.setenv("QLORA_SFT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RunError, match=r"llama-cpp-python==0\.3\.36"):
        llama_cpp_path()


def test_the_adapter_needs_nothing_of_ours(trained: Path, tmp_path: Path) -> None:
    """Plain PEFT and transformers, in a process that cannot import this package."""
    code = (
        "import sys, torch\n"
        "sys.modules['qlora_sft'] = None\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "chat = [{'role': 'user', 'content': 'Why?'}]\n"
        "options = dict(add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "inputs = tokenizer.apply_chat_template(chat, **options)\n"
        "with model.disable_adapter(): without = model(**inputs).logits\n"
        "assert (model(**inputs).logits - without).abs().max() > 1e-3\n"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=4)[0]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, str(trained / "adapter")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")


def test_a_tokenizer_that_llama_cpp_does_not_know_is_named(tmp_path: Path, trained: Path) -> None:
    from qlora_sft.export.gguf import export_run

    run = shutil.copytree(trained, tmp_path / "run")
    merge_run(run, say=lambda _: None)
    file = run / "merged" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    file.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"does not know this tokenizer \(chkhsh [0-9a-f]{64}\)"):
        export_run(run, "f16", say=lambda _: None)
    assert not (run / "gguf").exists()
