"""Which torch the installation takes, and what it leaves alone, on machines that are not here."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from qlora_sft import install
from qlora_sft.errors import RunError
from qlora_sft.install import TIED, TORCH, decide, locked, main, nvidia_driver

ROOT = Path(__file__).parent.parent
# August 2026, beside what it has of ours.
COLAB = {
    "torch": "2.11.0+cu128", "triton": "3.6.0", "torchvision": "0.26.0+cu128", "torchao": "0.10.0", "numpy": "2.1.3",
    "pandas": "2.2.3", "protobuf": "5.29.6", "transformers": "5.12.0", "peft": "0.20.0", "psutil": "5.9.5",
}  # fmt: skip
KERNEL = {
    "550": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12\n",
    "580": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n",
}


def calls(driver: str | None, present: dict[str, str], ours: bool) -> list[str]:
    return [" ".join(step.pip) for step in decide(driver, present, ours)[1]]


def nvidia_smi(folder: Path, said: str, code: int = 0) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("driver", "torch"),
    [
        (None, "torch==2.13.0"),
        ("580.65.06", "torch===2.13.0"),
        ("610.1", "torch===2.13.0"),
        ("570.124.06", "torch===2.10.0"),
        ("525.60.13", "torch===2.10.0"),
    ],
)
def test_the_driver_decides_over_torch(driver: str | None, torch: str) -> None:
    reason, steps = decide(driver, {"pip": "26.0"}, ours=True)
    assert steps[0].pip == ["install", torch]
    assert (driver or "no NVIDIA driver") in reason
    assert torch.strip("torch=") in reason
    # A CUDA build has pinned its own triton, with its dependencies; everything else is the lock's.
    assert {"triton==3.7.1"} >= {f"{n}=={v}" for n, v in locked().items()} - set(steps[1].file)
    assert ("triton==3.7.1" in steps[1].file) == ("2.13.0" in torch)
    assert [step.pip[:2] for step in steps[1:]] == [["install", "--no-deps"]] * 2


def test_a_driver_that_is_too_old_is_a_fault_with_a_cure() -> None:
    with pytest.raises(
        RunError, match=r"driver is 470\.82, and torch 2\.10\.0 with CUDA 12 needs 525 or later: update"
    ):
        decide("470.82", {}, ours=True)


@pytest.mark.parametrize("driver", ["550.54.15", None])
def test_in_colab_everything_that_others_use_is_kept(driver: str | None) -> None:
    _, (first, alone) = decide(driver, COLAB, ours=False)
    assert first.pip[:4] == ["install", "--constraint", "FILE", ".[gguf]"]
    kept = {name: COLAB[name] for name in ("torch", "triton", "torchvision", "numpy", "pandas", "protobuf")}
    pins = dict(line.split("==") for line in first.file)
    assert pins == kept | {name: locked()[name] for name in TIED}
    assert not {"torch", "triton", "numpy", "pandas", "protobuf", "torchvision"} & set(first.pip)
    # PEFT refuses torchao 0.10; Unsloth would fetch xformers and with it another torch.
    assert alone.pip == ["install", "--no-deps", "unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "torchao==0.17.0"]


def test_a_newer_torchao_stays() -> None:
    assert "torchao" not in calls(None, COLAB | {"torchao": "0.18.0"}, ours=False)[1]
    assert "torchao" not in calls(None, {"torch": "2.11.0"}, ours=False)[1]


@pytest.mark.parametrize(
    ("present", "driver", "kept"),
    [
        ("2.13.0+cpu", None, True),
        ("2.13.0+cpu", "580.65", False),  # a card was put in, or the driver installed later
        ("2.13.0", "580.65", True),
        ("2.13.0", "550.54", False),  # it is built with CUDA 13
        ("2.10.0", "550.54", True),
        ("2.11.0+cu128", "550.54", True),
        ("2.11.0+cu130", "550.54", False),
        ("2.11.0", "550.54", False),
        ("2.11.0", "580.65", True),
        ("2.15.0", "580.65", True),
        ("2.9.1", None, False),
        ("2.16.0", None, False),
    ],
)
def test_a_torch_that_is_there_is_kept_if_it_was_tested_and_runs(present: str, driver: str | None, kept: bool) -> None:
    reason, steps = decide(driver, {"torch": present}, ours=True)
    assert ("is kept" in reason) == kept
    assert any(part.startswith("torch=") for step in steps for part in step.pip) != kept


@pytest.mark.parametrize(
    ("driver", "torch"), [(None, TORCH), ("580.65", TORCH), ("550.54", "2.10.0"), (None, "2.11.0")]
)
def test_a_second_time_in_an_environment_of_ours_installs_the_lock_again(driver: str | None, torch: str) -> None:
    present = {**COLAB, "torch": torch}
    assert calls(driver, present, ours=True) == ["install --no-deps -r FILE", "install --no-deps -e ."]


@pytest.mark.parametrize("present", [{"numpy": "2.1.3"}, {"numpy": "2.1.3", "torch": TORCH}])
def test_in_an_environment_of_others_their_packages_stay(present: dict[str, str]) -> None:
    """Also if its torch is the lock's, as Colab's will be one day."""
    *torch, first, _ = decide(None, present, ours=False)[1]
    assert [step.pip for step in torch] == ([] if "torch" in present else [["install", f"torch=={TORCH}"]])
    assert {"numpy==2.1.3", f"torch=={TORCH}"} <= set(first.file)


def test_nvidia_smi_is_asked_and_then_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    kernel = tmp_path / "version"
    nvidia_smi(tmp_path, "Failed to initialize NVML: Driver/library version mismatch", 18)
    assert nvidia_driver(kernel) is None
    kernel.write_text(KERNEL["550"])
    assert nvidia_driver(kernel) == "550.54.15"
    kernel.write_text(KERNEL["580"])
    assert nvidia_driver(kernel) == "580.65.06"
    nvidia_smi(tmp_path, "575.57.08\n575.57.08")
    assert nvidia_driver(kernel) == "575.57.08"


def test_a_dry_run_prints_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvidia_smi(tmp_path, "580.65.06")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(install, "installed", dict)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))  # not the project's own environment
    assert main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "NVIDIA driver 580.65.06: torch 2.13.0 with CUDA 13; what others use here stays as it is\n"
    )
    assert "\npip install torch===2.13.0\npip install --constraint FILE" in printed
    assert "\n  transformers==5.17.0\n" in printed
    nvidia_smi(tmp_path, "390.157")
    assert main(["--dry-run"]) == 1
    assert "update it" in capsys.readouterr().err


def test_the_ranges_are_those_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = dict(re.findall(r"([\w-]+)(.*)", line)[0] for line in project["dependencies"])
    makefile = (ROOT / "Makefile").read_text()
    newest = dict(re.findall(r"(\w+)==([\d.]+)", re.findall(r"^PACKAGES \?= (.*)$", makefile, flags=re.M)[0]))
    for name in {*TIED} & {*ranges}:
        tested = [
            tuple(map(int, version.split(".")[:2])) for version in (locked()[name], newest.get(name, locked()[name]))
        ]
        allowed = [
            (major, minor)
            for major in sorted({major for major, _ in tested})
            for minor in range(60)
            if SpecifierSet(ranges[name]).contains(f"{major}.{minor}.0")
        ]
        assert [allowed[0], allowed[-1]] == tested, name
        # Those between them, too, were not tested. Of datasets 4 there was none after the lock's.
        assert name == "datasets" or set(allowed) == set(tested), name
    first, last = ((".".join(map(str, bound))) for bound in install.TESTED)
    assert ranges["torch"] == f">={first},<{last}"
    first, last = ((".".join(map(str, bound))) for bound in install.PYTHONS)
    assert project["requires-python"] == f">={first},<{last}"
    assert f"TORCH ?= {install.TORCH_BY_DRIVER[-1][1]}" in makefile  # so it is tested
