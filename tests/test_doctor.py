"""``doctor`` says what is there, and for what is not, how to get it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from qlora_sft import doctor
from qlora_sft.cli import main
from qlora_sft.doctor import examine, proved, table
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


def test_a_driver_that_torch_cannot_use_is_a_fault_with_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU build on a machine with a card trains there without a word, some hundred times slower."""
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: "580.65.06")
    check = checks()["device"]
    assert not check["ok"]
    assert "although there is an NVIDIA driver (580.65.06)" in str(check["found"])
    assert "python -m qlora_sft.install" in str(check["cure"])


def test_a_part_that_fails_says_why_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that cannot be imported, as where their CUDA libraries are missing."""
    for name in ("bitsandbytes", "triton"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('lib{name}.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(doctor, "PARTS", ["nf4", "triton"])
    nf4, triton = proved()
    assert (nf4["ok"], nf4["found"]) == (False, "ImportError: libbitsandbytes.so: cannot open shared object file")
    assert "python -m bitsandbytes" in nf4["cure"]
    assert (triton["ok"], triton["found"]) == (False, "ImportError: libtriton.so: cannot open shared object file")
    assert "apt install gcc python3-dev" in triton["cure"]


def test_doctor_on_the_command_line_tries_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"]
    tried = {check["name"]: check for check in facts["checks"][-3:]}
    assert all(check["ok"] for check in tried.values()), tried
    assert "that by the dequantised matrix" in tried["4-bit product"]["found"]
    assert "those of plain torch" in tried["Triton kernel"]["found"]
    before, after = re.findall(r"loss ([\d.]+) -> ([\d.]+)", tried["step of LoRA"]["found"])[0]
    assert float(after) < float(before)
    assert "GGUF converter" in table(facts)
