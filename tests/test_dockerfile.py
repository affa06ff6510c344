"""The Dockerfile, which is not built here: its instructions are whole, and it installs as the README says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from qlora_sft import cli
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


def test_its_first_lines_say_how_it_is_built_and_run() -> None:
    lines = [
        line.removeprefix("#").split("#")[0].strip() for line in TEXT.splitlines() if line.startswith("#   docker")
    ]
    build, run = (shlex.split(line) for line in lines)
    tag = build[build.index("--tag") + 1]
    inside = run.index(tag) + 1
    assert cli._arguments(run[inside:]).config == "recipe.yaml"
    # Where it runs, what it writes and what it keeps for the next time are all in the folder of the host.
    (volume,) = (word for word in run if word.startswith("$PWD:"))
    there = volume.partition(":")[2]
    assert [argument for name, argument in instructions() if name == "WORKDIR"][-1] == there
    kept = [each for name, argument in instructions() if name == "ENV" for each in argument.split()]
    caches = [each.partition("=")[2] for each in kept if each.startswith(("QLORA_SFT_CACHE", "HF_HOME"))]
    assert len(caches) == 2
    assert all(cache.startswith(f"{there}/") for cache in caches)
    (entry,) = (argument for name, argument in instructions() if name == "ENTRYPOINT")
    assert f'{json.loads(entry)[0]} = "qlora_sft.cli:main"' in (ROOT / "pyproject.toml").read_text()


def test_what_is_compiled_when_it_runs_has_its_compilers() -> None:
    (apt,) = (argument for name, argument in instructions() if "apt-get install" in argument)
    packages = set(apt.partition("--no-install-recommends")[2].partition("&&")[0].split())
    assert packages == {"cmake", "g++", "gcc", "make"}  # g++ is Debian's c++
    needed = re.findall(r"in \((\"cmake\", \"c\+\+\")\)", (ROOT / "qlora_sft" / "export" / "quantize.py").read_text())
    assert needed == ['"cmake", "c++"']


def test_nothing_that_is_built_or_trained_goes_into_the_image() -> None:
    left_out = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv*", "runs"} <= set(left_out)
    copied = {argument.split()[-1] for name, argument in instructions() if name == "COPY"}
    assert copied == {argument for name, argument in instructions() if name == "WORKDIR"} - {"/data"}
