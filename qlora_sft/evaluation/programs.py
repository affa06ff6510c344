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
from textwrap import dedent, indent

from qlora_sft.errors import RunError

SECONDS = 10
MEGABYTES = 4096
CHILD = Path(__file__).with_name("program_child.py")

# Of its report: a program that came to its end has said one word.
REPORT = 1000

# A fence of any language: one that was not seen would make its end the beginning of the next.
_BLOCK = re.compile(r"^([ \t]*)[^\n]*?```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"^(?:import|from|def|async def|class|@)\b|^@", re.MULTILINE)


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
    answer = answer.replace("\r\n", "\n")
    # In a list the whole block is indented.
    blocks = [dedent(block) if margin else block for margin, block in _BLOCK.findall(answer)]
    defining = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(tests.entry_point)}\b", re.MULTILINE)
    code = next((block for block in blocks if defining.search(block)), blocks[0] if blocks else answer)
    if defining.search(code):
        begins, of_prompt = _CODE.search(code), defining.search(tests.prompt)
        before = tests.prompt[: of_prompt.start()] if of_prompt else ""
        whole = f"{before}\n{code[begins.start() :] if begins and not blocks else code}"
    else:
        whole = tests.prompt + _as_body(code, tests.prompt)
    return f"{whole}\n\n{tests.test}\n\ncheck({tests.entry_point})\n"


def _as_body(code: str, prompt: str) -> str:
    """What goes on where the prompt ends, with the indentation of the prompt's last line."""
    last = prompt.rstrip().splitlines()[-1]
    wanted = last[: len(last) - len(last.lstrip())] or "    "
    first = next((line for line in code.splitlines() if line.strip()), "")
    given = first[: len(first) - len(first.lstrip())]
    return code if given == wanted else indent(dedent(code), wanted)


def run_all(programs: Sequence[str], seconds: float = SECONDS) -> list[str]:
    """What became of each: ``passed``, ``timed out``, or the exception."""
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2)) as pool:
        return list(pool.map(lambda text: run(text, seconds), programs))


def check_programs() -> None:
    """Raises `RunError` where no program can run, so that all would be graded wrong."""
    try:
        trivial = run("pass\n")
    except OSError as error:
        trivial = str(error)
    if trivial != "passed":
        raise RunError(f"programs cannot be run here: one that does nothing {trivial}; look at the limits (ulimit -a)")


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
