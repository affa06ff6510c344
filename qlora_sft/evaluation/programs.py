"""Grades code by running it: HumanEval's way (Chen et al. 2021, arXiv:2107.03374).

Each program runs in a process of its own with limits on time, memory and file size, in an empty folder, without this
process's environment. That stops accidents. It is no sandbox: what a model writes can read files, use the network, and
leave a process behind that calls ``setsid``.
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
from textwrap import dedent

from qlora_sft.errors import RunError

SECONDS = 10
MEGABYTES = 4096
CHILD = Path(__file__).with_name("program_child.py")

# Of its report: a program that came to its end has said one word.
REPORT = 1000

# A fence of any language: one that was not seen would make its end the beginning of the next.
_BLOCK = re.compile(r"^([ \t]*)```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


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
    # In a list the whole block is indented; else what is indented goes on where the prompt ends.
    blocks = [dedent(block) if indent else block for indent, block in _BLOCK.findall(answer.replace("\r\n", "\n"))]
    defining = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(tests.entry_point)}\b", re.MULTILINE)
    code = next((block for block in blocks if defining.search(block)), blocks[0] if blocks else answer)
    begins = defining.search(tests.prompt)
    before = tests.prompt[: begins.start()] if begins else ""
    whole = f"{before}\n{code}" if defining.search(code) else tests.prompt + code
    return f"{whole}\n\n{tests.test}\n\ncheck({tests.entry_point})\n"


def run_all(programs: Sequence[str], seconds: float = SECONDS) -> list[str]:
    """What became of each: ``passed``, ``timed out``, or the exception. Raises `RunError` where none could pass."""
    trivial = run("pass\n", seconds)
    if trivial != "passed":
        raise RunError(f"programs cannot be run here: one that does nothing {trivial}; look at the limits (ulimit -a)")
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2)) as pool:
        return list(pool.map(lambda text: run(text, seconds), programs))


def run(text: str, seconds: float = SECONDS) -> str:
    # It is said where a program comes to its end: one that leaves early has passed no test.
    word = secrets.token_hex(8)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as report,
    ):
        source.write(f"{word}\n{text}".encode("utf-8", "replace"))
        source.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD), str(int(seconds) + 1), str(MEGABYTES)],
            cwd=folder, env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            stdin=source, stdout=report, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            with suppress(ProcessLookupError):  # with what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        report.seek(0)
        said = report.read(REPORT).decode("utf-8", "replace").strip()
    if said == word:
        return "passed"
    return said or f"ended early (exit code {process.returncode})"
