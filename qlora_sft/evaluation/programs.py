"""Grades code by running it: HumanEval's way (Chen et al. 2021, arXiv:2107.03374).

Each program runs in a process of its own with limits on time, memory and file size, in an empty folder, without this
process's environment. That stops accidents. It is no sandbox: what a model writes can read files and use the network.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SECONDS = 10
MEGABYTES = 4096
CHILD = Path(__file__).with_name("program_child.py")

_BLOCK = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class UnitTests:
    """``prompt`` begins the function ``entry_point``; ``test`` defines ``check(candidate)``, which raises if wrong."""

    prompt: str
    test: str
    entry_point: str


def program(answer: str, tests: UnitTests) -> str:
    """The answer as a program that ends without an exception iff it is right.

    An answer that defines the function is taken with what stands before it in the prompt (imports, helpers); any other
    is taken to go on where the prompt ends.
    """
    blocks = _BLOCK.findall(answer)
    defining = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(tests.entry_point)}\b", re.MULTILINE)
    code = next((block for block in blocks if defining.search(block)), blocks[0] if blocks else answer)
    begins = defining.search(tests.prompt)
    before = tests.prompt[: begins.start()] if begins else ""
    whole = f"{before}\n{code}" if defining.search(code) else tests.prompt + code
    return f"{whole}\n\n{tests.test}\n\ncheck({tests.entry_point})\n"


def run_all(programs: Sequence[str], seconds: float = SECONDS) -> list[str]:
    """What became of each: ``passed``, ``timed out``, or the exception."""
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        return list(pool.map(lambda text: run(text, seconds), programs))


def run(text: str, seconds: float = SECONDS) -> str:
    # Only a program that came to its end can say the word: one that leaves early has passed no test.
    word = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD), str(int(seconds) + 1), str(MEGABYTES), word],
            cwd=folder, env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            output, _ = process.communicate(text.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            _end(process)
    said = output.decode("utf-8", "replace").strip()
    if said == word:
        return "passed"
    return said or f"ended early (exit code {process.returncode})"


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it may have started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
