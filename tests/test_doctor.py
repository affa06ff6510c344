"""``doctor`` says what is there, and for what is not, how to get it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_sft.cli import main
from qlora_sft.doctor import examine, table


def checks() -> dict[str, dict[str, object]]:
    return {check["name"]: check for check in examine()["checks"]}


def test_a_quantizer_is_found_in_order_and_its_absence_has_a_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "quantizer (K, IQ types)"
    monkeypatch.setenv("QLORA_SFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    assert not checks()[name]["ok"]
    assert "cmake and c++ is missing" in str(checks()[name]["cure"])
    for folder, found in (("bin", "PATH"), ("llama/build/bin", "LLAMA_CPP_DIR")):
        program = tmp_path / folder / "llama-quantize"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\necho 'version: 1234 (abc)'\n")
        program.chmod(0o755)
        if found == "LLAMA_CPP_DIR":
            monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "llama"))
        assert found in str(checks()[name]["found"])
    assert "version: 1234" in str(checks()[name]["found"])
    assert "has no convert_hf_to_gguf.py" in table(examine())


def test_doctor_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"]
    assert main(["doctor"]) == 0
    assert "GGUF converter" in capsys.readouterr().out
