"""``doctor`` says what is there, and for what is not, how to get it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlora_sft.cli import main
from qlora_sft.doctor import examine, table
from qlora_sft.model.attention import choose_path


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


def test_it_says_what_a_gpu_without_bfloat16_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4; and one that has it all."""
    found = []
    for name, capability in (("Tesla T4", (7, 5)), ("NVIDIA L4", (8, 9))):
        choose_path.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda own=name: own)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, own=capability: own)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda own=capability, **_: own >= (8, 0))
        found.append(str(checks()["device"]["found"]))
    choose_path.cache_clear()
    assert found[0].startswith("Tesla T4; computes in float16 (Tesla T4 has no bfloat16; a gradient scaler")
    assert "attends by sdpa (document by document" in found[0]
    assert "needs compute capability 8.0" in found[0]
    assert found[1].startswith("NVIDIA L4; computes in bfloat16 (NVIDIA L4 has bfloat16), attends by varlen")


def test_doctor_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"]
    assert main(["doctor"]) == 0
    assert "GGUF converter" in capsys.readouterr().out
