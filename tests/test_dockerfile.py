"""The Dockerfile, which is not built here: its instructions are whole, and it installs as the README says."""

from __future__ import annotations

import re
from pathlib import Path

from qlora_sft.install import TORCH_BY_DRIVER, decide

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """Every instruction and its argument, continued lines joined, comments left out."""
    lines = [line for line in TEXT.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def test_every_instruction_is_one() -> None:
    known = {"FROM", "RUN", "ARG", "COPY", "WORKDIR", "ENV", "ENTRYPOINT"}
    assert {name for name, _ in instructions()} == known
    assert instructions()[0][0] == "FROM"
    assert all(not argument.endswith(("\\", "&&")) for _, argument in instructions())


def test_it_installs_as_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    run = [command.strip() for name, argument in instructions() if name == "RUN" for command in argument.split("&&")]
    ours = [command for command in run if not command.startswith(("apt-get", "rm "))]
    assert ours == ["python3 -m venv .venv", ".venv/bin/python -m qlora_sft.install --driver $DRIVER"]
    for command in ours:
        assert command.removesuffix(" --driver $DRIVER") in readme
    assert "--driver" in readme


def test_its_torch_is_for_the_gpu_though_no_driver_is_there() -> None:
    (driver,) = (argument.removeprefix("DRIVER=") for name, argument in instructions() if name == "ARG")
    assert decide(driver, {}, ours=True)[1][0].pip == ["install", f"torch==={TORCH_BY_DRIVER[0][1]}"]
    assert str(TORCH_BY_DRIVER[-1][0]) in TEXT  # the older one that its comment names


def test_nothing_that_is_built_or_trained_goes_into_the_image() -> None:
    left_out = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv*", "runs"} <= set(left_out)
    copied = {argument.split()[-1] for name, argument in instructions() if name == "COPY"}
    assert copied == {argument for name, argument in instructions() if name == "WORKDIR"} - {"/data"}
