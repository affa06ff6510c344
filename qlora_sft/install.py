"""Install what the project needs beside a torch that suits the machine. Run it in a checkout, with the Python to fill.

Run as::

    python -m qlora_sft.install [--dry-run] [--driver VERSION]

A machine with an NVIDIA driver gets the CUDA build of torch that its driver can run, with the libraries of CUDA that
this build names; any other gets a CPU build, where pip is offered one. A torch that is there and was tested is kept.
In .venv of the checkout the rest is that of the lock; elsewhere, as in Colab, what other packages were built against is
kept too. It needs nothing but Python and pip.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from qlora_sft.errors import RunError

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"

# The oldest driver for each. From PyPI torch 2.11 and later are built with CUDA 13, and torch 2.10 with CUDA 12.
TORCH_BY_DRIVER = ((580, "2.13.0", "CUDA 13"), (525, "2.10.0", "CUDA 12"))
TORCH = TORCH_BY_DRIVER[0][1]
# The versions of torch that are kept if they are there, and those of Python: from the first on, before the second.
TESTED = ((2, 10), (2, 16))
PYTHONS = ((3, 11), (3, 14))

# What other packages of an environment were built against, and what a session has imported before us.
KEPT = "torch torchvision torchaudio triton numpy pandas protobuf scipy scikit-learn pillow requests ipython".split()
# What this project's results depend on: exactly the tested versions.
TIED = "transformers trl peft bitsandbytes datasets accelerate tokenizers safetensors gguf xllamacpp".split()
# These ask for xformers and torchvision, and would take builds for another torch.
ALONE = ("unsloth", "unsloth_zoo")
# What those two import besides.
OF_UNSLOTH = "einops hf_transfer json5 msgspec nest-asyncio pydantic regex rich structlog typer tyro".split()
# PEFT makes no adapter beside an older one.
OLDEST_TORCHAO, NEW_TORCHAO = (0, 16), "0.17.0"

VERSION_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Step:
    """Holds the arguments of one call of pip, and the lines of the file that it reads as ``FILE``, if it does."""

    pip: list[str]
    file: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: that of the process) and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m qlora_sft.install", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the commands; install nothing")
    parser.add_argument("--driver", metavar="VERSION", help="of the NVIDIA driver of another machine, for an image")
    arguments = parser.parse_args(argv)
    try:
        install(arguments.driver or nvidia_driver(), arguments.dry_run)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def install(driver: str | None, dry_run: bool) -> None:
    """Prints which torch is chosen for a driver, and why, and runs the calls of pip, or only prints them."""
    if not PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        found = ".".join(map(str, sys.version_info[:2]))
        raise RunError(f"this is Python {found}; 3.11 to 3.13 are tested. Name one: make install PYTHON=python3.13")
    if not LOCK.is_file():
        raise RunError(f"{LOCK} is missing; run it in a checkout of the project (a wheel is installed by pip alone)")
    ours = Path(sys.prefix) == ROOT / ".venv"
    reason, steps = decide(driver, installed(), ours)
    print(f"{reason}\nThe first time this takes some minutes, depending on the network.", flush=True)
    for step in steps:
        print(shlex.join(["pip", *step.pip]), flush=True)
        if dry_run:
            print("".join(f"  {line}\n" for line in step.file), end="")
        else:
            _run(step)


def _run(step: Step) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "versions.txt"
        file.write_text("".join(f"{line}\n" for line in step.file), encoding="utf-8")
        arguments = [str(file) if part == "FILE" else part for part in step.pip]
        # What is downloaded for torch may be gigabytes, so pip shows its bars then.
        quiet = [] if any(part.startswith("torch=") for part in arguments) else ["--quiet"]
        command = [sys.executable, "-m", "pip", *quiet, "--disable-pip-version-check", *arguments]
        done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise RunError(f"pip ended with exit code {done.returncode}; its messages are above")


def decide(driver: str | None, present: Mapping[str, str], ours: bool) -> tuple[str, list[Step]]:
    """Decides by the version of the driver (None: there is no driver) and by what is installed, name by name.

    ours: whether the environment is this project's own, in which everything is as the lock has it; in another one, what
    is there is kept. Returns a sentence with the reason, and the calls of pip. Raises `RunError` for a driver that is
    too old.
    """
    torch, reason = _torch_for(driver)
    there = present.get("torch")
    steps = []
    if there is not None and TESTED[0] <= _numbers(there) < TESTED[1] and _runs_with(there, driver):
        torch, reason = there, f"torch {there} is here and is kept"
    else:
        # "===", because by "==" a CPU build, 2.13.0+cpu, is a 2.13.0 too, and the newer one.
        steps.append(Step(["install", f"torch{'===' if driver else '=='}{torch}"]))
    if ours:
        return reason, [*steps, *_as_locked(torch)]
    return f"{reason}; what others use here stays as it is", [*steps, *_beside({**present, "torch": torch})]


def _torch_for(driver: str | None) -> tuple[str, str]:
    if driver is None:
        return TORCH, f"no NVIDIA driver: torch {TORCH}, for the CPU if pip is offered such a build"
    for oldest, version, cuda in TORCH_BY_DRIVER:
        if _numbers(driver)[0] >= oldest:
            return version, f"NVIDIA driver {driver}: torch {version} with {cuda}"
    oldest, version, cuda = TORCH_BY_DRIVER[-1]
    raise RunError(f"the NVIDIA driver is {driver}, and torch {version} with {cuda} needs {oldest} or later: update it")


def _runs_with(torch: str, driver: str | None) -> bool:
    """Tells whether a build of torch uses the GPU that there is; without one, any build does its work."""
    version, _, build = torch.partition("+")
    if driver is None:
        return True
    if build.startswith("cu"):
        newer = build >= "cu130"
        return _numbers(driver)[0] >= TORCH_BY_DRIVER[0 if newer else -1][0]
    return not build and _numbers(driver)[0] >= TORCH_BY_DRIVER[0 if _numbers(version) >= (2, 11) else -1][0]


def _as_locked(torch: str) -> list[Step]:
    """Returns the calls that install everything but torch exactly as the lock has it."""
    # A CUDA build brings its own triton; a CPU build brings none.
    lines = [f"{name}=={version}" for name, version in locked().items() if name != "triton" or torch.startswith(TORCH)]
    return [Step(["install", "--no-deps", "-r", "FILE"], tuple(lines)), Step(["install", "--no-deps", "-e", "."])]


def _beside(present: Mapping[str, str]) -> list[Step]:
    """Returns the calls that install the tested stack and leave alone what is kept."""
    versions = locked()
    kept = [f"{name}=={present[name]}" for name in KEPT if name in present]
    tied = [f"{name}=={versions[name]}" for name in TIED]
    alone = [f"{name}=={versions[name]}" for name in ALONE]
    if "torchao" in present and _numbers(present["torchao"]) < OLDEST_TORCHAO:
        alone.append(f"torchao=={NEW_TORCHAO}")
    # Not editable: a session that is running would not find it.
    first = Step(["install", "--constraint", "FILE", ".[gguf]", *OF_UNSLOTH], (*kept, *tied))
    return [first, Step(["install", "--no-deps", *alone])]


def nvidia_driver(version_file: Path = VERSION_FILE) -> str | None:
    """Returns the version of the NVIDIA driver, as nvidia-smi or the kernel says it, or None if there is none."""
    program = shutil.which("nvidia-smi")
    if program:
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True)
        found = re.match(r"\d+\.[\d.]+", said.stdout.strip())
        if said.returncode == 0 and found:
            return found[0]
    text = version_file.read_text(encoding="utf-8", errors="replace") if version_file.is_file() else ""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return found[1] if found else None


def installed() -> dict[str, str]:
    """Returns the version of every installed package under its normalised name; the first of several is what counts."""
    found: dict[str, str] = {}
    for each in distributions():
        found.setdefault(re.sub(r"[-_.]+", "-", each.metadata["Name"] or "").lower(), each.version)
    return found


def restart_hint() -> str:
    """Says what a session has to do that was running while things were installed; empty if it can go on.

    What it had imported before stays as it was, whatever version is on the disk by now.
    """
    now = installed()
    loaded = {name: str(getattr(module, "__version__", "")) for name, module in list(sys.modules.items())}
    # A build's own name, +cu128, is left out of some of them.
    older = sorted(n for n, was in loaded.items() if was and now.get(n, was).split("+")[0] != was.split("+")[0])
    if not older:
        return ""
    return f"Restart the session and continue after this cell: {', '.join(older)} had been imported in another version"


def locked() -> dict[str, str]:
    """Returns the version of every package of the lock under its name."""
    lines = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {line.split("==")[0]: line.split("==")[1] for line in lines}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


if __name__ == "__main__":
    sys.exit(main())
