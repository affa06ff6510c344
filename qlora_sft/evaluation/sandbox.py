"""Shuts in the programs that a model writes: no network, no file of the user, no process but their own.

Bubblewrap does it where it is installed and works, else Linux's namespaces do, if the system allows them (containers
and some distributions do not). Elsewhere there is no sandbox, which is said.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from qlora_sft.evaluation.sandbox_child import DEVICES, WORK, WORK_BYTES

CHILD = Path(__file__).with_name("sandbox_child.py")
SECONDS_TO_TRY = 20
# What of a Python's folder, or of the system's, a program needs. The rest may be anybody's: /usr/src, ~/.local/share.
PARTS = ("bin", "lib", "lib32", "lib64", "libexec", "share/zoneinfo", "pyvenv.cfg")


class Sandbox(NamedTuple):
    """Says how programs are shut in, and why in this way. ``name`` is None where they are not."""

    name: Literal["bubblewrap", "namespaces"] | None
    reason: str


@cache
def choose_sandbox() -> Sandbox:
    """Returns the first kind of sandbox in which a program runs on this machine.

    A process chooses once, so that all programs run in what was said to run them.
    Of root's processes the system does not limit the number, and in bubblewrap they stay root's: namespaces of our own
    go first there, in which the program is nobody's.
    """
    obstacles: list[str] = []
    kinds: list[Literal["bubblewrap", "namespaces"]] = ["bubblewrap", "namespaces"]
    for name in reversed(kinds) if os.getuid() == 0 else kinds:
        obstacle = _try(name)
        if obstacle is None:
            return Sandbox(name, "; ".join(obstacles))
        obstacles.append(f"{name}: {obstacle}")
    return Sandbox(None, "; ".join(obstacles))


def _try(name: Literal["bubblewrap", "namespaces"]) -> str | None:
    """Returns None if a program runs in this kind of sandbox, else what keeps it from that."""
    if sys.platform != "linux":
        return "only on Linux"
    if name == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                command(name, folder, [sys.executable, "-I", "-c", "print(1)"]),
                capture_output=True, text=True, errors="replace", timeout=SECONDS_TO_TRY, cwd=folder,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error).splitlines()[0]
    if done.returncode == 0 and done.stdout == "1\n":
        return None
    return next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")[:200]


def command(name: Literal["bubblewrap", "namespaces"] | None, folder: str, arguments: list[str]) -> list[str]:
    """Returns the command that runs ``arguments``, a Python program, in this kind of sandbox.

    folder: an empty folder, which stays empty in a sandbox: the program has one in memory instead.
    """
    if name == "namespaces":
        return [sys.executable, "-I", str(CHILD), folder, *map(str, visible_paths()), "--", *arguments]
    if name == "bubblewrap":
        shown = []
        for path in visible_paths():
            link = path.is_symlink()
            shown += ["--symlink", str(path.readlink()), str(path)] if link else ["--ro-bind", str(path), str(path)]
        for device in DEVICES:
            shown += ["--dev-bind", device, device]
        return [
            "bwrap", "--unshare-all", "--die-with-parent", "--uid", "65534", "--gid", "65534", *shown,
            *_sized(), "--tmpfs", WORK, "--remount-ro", "/", "--chdir", WORK, "--", *arguments,
        ]  # fmt: skip
    return arguments


@cache
def _sized() -> list[str]:
    """Returns the option that limits the folder in memory; bubblewrap before 0.7 has none."""
    told = subprocess.run(["bwrap", "--help"], capture_output=True, text=True, errors="replace")
    return ["--size", str(WORK_BYTES)] if "--size" in told.stdout + told.stderr else []


def visible_paths() -> list[Path]:
    """Lists what a Python program needs to run, and nothing else: programs and libraries of the system and this Python.

    A folder that the user's home is in is left out, because all of the user's files would be seen with it.
    """
    system = [Path(path) for path in ("/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")]
    program = str(Path(sys.executable).resolve().parents[1])
    folders = ("/usr", "/usr/local", sys.base_prefix, sys.prefix, program)
    parts = [Path(folder) / part for folder in folders for part in PARTS]
    # The program that is run first is a file of this package.
    parts.append(CHILD.with_name("program_child.py"))
    found = [path for path in dict.fromkeys([*system, *parts]) if path.exists() and path not in Path.home().parents]
    found = [path for path in found if path != Path.home() and path != Path("/")]
    return [path for path in found if not any(other in path.parents for other in found)]
