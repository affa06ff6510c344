"""What goes to the Hub: exactly what is printed, private, with a card of measured figures, and never the token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_sft.config import Config, DataConfig, LoraConfig, ModelConfig, TrainingConfig, dump_config
from qlora_sft.config_data import TrainSourceConfig
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.export.hub import PushOptions, push
from qlora_sft.export.model_card import model_card
from qlora_sft.run.report import Choice, Course, Pair, RunReport

TOKEN = "hf_" + "s3cret" * 5


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as training, merging and exporting leave it, with files of a few bytes."""
    run = tmp_path / "run"
    data = {"path": "/home/me/private/chat.jsonl", "files": ["/home/me/private/chat.jsonl"], "sha256": "ab" * 32}
    counts = {"read": 1000, "kept": 990, "tokens": 12345, "supervised": 2345}
    config = Config(
        ModelConfig("/home/me/models/Base-1B", chat_template="chatml"),
        DataConfig([TrainSourceConfig("/home/me/private/chat.jsonl")], max_length=512),
        output="/home/me/run",
        lora=LoraConfig(r=16, alpha=32),
        training=TrainingConfig(learning_rate=2e-4),
    )
    report = RunReport(
        output="/home/me/run", backend=Choice("transformers", "as configured"), base="/home/me/models/Base-1B",
        dtype="float32", quantized_modules=[], loss={"chat": Pair(1.234, 0.567)}, exact_match={}, steps=10,
        train_loss=Course(1.5, 0.5), tokens=12345, supervised_tokens=2345, tokens_per_second=1.0, optimizer="adamw",
    )  # fmt: skip
    manifest = {
        "config": asdict(config),
        "versions": {"qlora-sft": "0.1.0", "torch": "2.13.0"},
        "data": {"chat": {**data, **counts}},
        "report": report.to_json(),
    }
    contents = {
        "manifest.json": json.dumps(manifest),
        "config.yaml": dump_config(config),
        "export.json": json.dumps({"parity": {"q8_0": {"top1": 0.9912, "kl": 0.004, "max_diff": 1.0, "tokens": 2048}}}),
        "adapter/adapter_model.safetensors": "weights",
        "adapter/adapter_config.json": json.dumps({"base_model_name_or_path": "/home/me/models/Base-1B", "r": 16}),
        "adapter/README.md": "# Model Card for Model ID",
        "merged/model.safetensors": "more weights",
        "gguf/run-q8_0.gguf": "GGUF",
        "gguf/run-q8_0.Modelfile": "# a\nFROM ./run-q8_0.gguf\n",
        "gguf/run-adapter.gguf": "GGUF",
        "gguf/run-adapter.Modelfile": "# a\nFROM /home/me/models/Base-1B\nADAPTER ./run-adapter.gguf\n",
        "gguf/.run.gguf.partial-1": "half",
    }
    for name, content in contents.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(content)
    return run


class Hub:
    """Stands in for huggingface_hub.HfApi and remembers what it was given."""

    def __init__(self, private: bool = True):
        self.private, self.created, self.files = private, {}, {}  # type: ignore[var-annotated]

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
        self.created = {"repo": repo, "private": private}

    def repo_info(self, _: str) -> Any:
        return SimpleNamespace(private=self.private)

    def create_commit(self, repo: str, operations: list[Any], commit_message: str) -> Any:
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo}/commit/1")


def test_exactly_the_printed_files_go_up_to_a_private_repository(run: Path) -> None:
    for what in ("adapter", "merged", "gguf"):
        hub, said = Hub(), []  # type: ignore[var-annotated]
        planned = push(run, "me/my-model", what, options=PushOptions(dry_run=True), say=said.append)  # type: ignore[arg-type]
        result = push(run, "me/my-model", what, api=hub, say=lambda _: None)  # type: ignore[arg-type]
        assert hub.created == {"repo": "me/my-model", "private": True}
        assert {name: len(content) for name, content in hub.files.items()} == planned.files == result.files
        assert all(any(line.endswith(f"  {name}") for line in said) for name in hub.files)
        assert b"/home/me" not in b"".join(hub.files.values())
        assert "Model Card for Model ID" not in hub.files["README.md"].decode()
    assert set(hub.files) == {"README.md", "run-q8_0.gguf", "run-q8_0.Modelfile", "run-adapter.gguf"}
    one = push(run, "me/x", "gguf", options=PushOptions(gguf="gguf/run-q8_0.gguf", dry_run=True), say=lambda _: None)
    assert set(one.files) == {"README.md", "run-q8_0.gguf", "run-q8_0.Modelfile"}


def test_the_card_says_what_was_measured(run: Path) -> None:
    card = model_card(run, "me/my-model", "gguf", ["run-q8_0.gguf"])
    assert "| chat | 1.234 | 0.567 | not measured | not measured |" in card
    assert "| chat | 1,000 | 990 | 12,345 | 2,345 | 100.0% | `abababababababab` |" in card
    assert "| q8_0 | 99.12% | 4.0e-03 | 2,048 |" in card
    assert "Base-1B" in card
    assert "base_model:" not in card
    assert "license:" not in card
    assert "ollama create run-q8_0" in card


def test_the_card_names_the_commit_of_the_base(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["report"] |= {"base": "owner/base", "base_commit": "a1" * 20}
    (run / "manifest.json").write_text(json.dumps(manifest))
    card = model_card(run, "me/my-model", "adapter", [])
    assert f"[owner/base](https://huggingface.co/owner/base) at commit `{'a1' * 20}`, fine-tuned" in card
    assert f'AutoModelForCausalLM.from_pretrained("owner/base", revision="{"a1" * 20}", dtype' in card
    assert "revision=" not in model_card(run, "me/my-model", "merged", [])


def test_the_licence_is_the_one_of_the_base(run: Path, tmp_path: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["report"]["base"] = str(tmp_path)
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: llama3.1\n---\n# Base\n")
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "\nlicense: llama3.1\n" in model_card(run, "me/x", "merged", [])
    manifest["report"]["base"] = manifest["config"]["model"]["path"] = "some/Base-1B"
    (run / "manifest.json").write_text(json.dumps(manifest))
    card = model_card(run, "me/x", "adapter", [])
    assert "\nbase_model: some/Base-1B\n" in card
    assert 'from_pretrained("some/Base-1B"' in card


def test_nothing_private_becomes_public_by_accident(run: Path) -> None:
    hub = Hub(private=False)
    with pytest.raises(RunError, match="exists and is public"):
        push(run, "me/x", api=hub, say=lambda _: None)
    assert not hub.files
    push(run, "me/x", options=PushOptions(public=True), api=hub, say=lambda _: None)
    assert hub.created["private"] is False


def test_what_is_missing_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="user/name"):
        push(run, "my-model", say=lambda _: None)
    (run / "merged" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="qlora-sft merge"):
        push(run, "me/x", "merged", say=lambda _: None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(RunError, match="hf auth login"):
        push(run, "me/x", say=lambda _: None)


@pytest.fixture
def refusing_hub() -> Iterator[str]:
    """A server that answers every request with 403 and with the token it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.dumps({"error": f"Forbidden: {self.headers['authorization']}"}).encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def push_in_a_process(run: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qlora_sft", "push", str(run), "me/x"]
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_refusal_names_the_cure_and_not_the_token(run: Path, refusing_hub: str) -> None:
    result = push_in_a_process(run, refusing_hub)
    assert result.returncode == 1
    assert "403" in result.stderr
    assert "write access" in result.stderr
    assert TOKEN not in result.stdout + result.stderr


def test_without_a_network_it_says_so(run: Path) -> None:
    result = push_in_a_process(run, "http://127.0.0.1:9")
    assert result.returncode == 1
    assert "cannot be reached" in result.stderr
    assert "Traceback" not in result.stderr
    assert TOKEN not in result.stdout + result.stderr


def test_the_card_says_no_more_than_is_known_of_what_was_not_measured(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    cards = []
    for warnings in ([], ["held-out loss after training: not measured (no memory left: CUDA out of memory); ..."]):
        manifest["report"] |= {"loss": {}, "warnings": warnings}
        (run / "manifest.json").write_text(json.dumps(manifest))
        cards.append(model_card(run, "me/it", "adapter", []))
    assert "Not measured: the run had no held-out data." in cards[0]
    assert "Not measured.\n" in cards[1]
