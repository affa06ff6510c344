"""Grades code by running it, as HumanEval does (Chen et al. 2021, arXiv:2107.03374).

Each program runs in a process of its own with limits on time, memory and file size, in an empty folder, without this
process's environment, and in a sandbox where there is one (`sandbox`). Without one the limits stop accidents only: what
a model writes can read files, use the network, and leave a process behind that calls ``setsid``.
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
from qlora_sft.evaluation.sandbox import Sandbox, choose_sandbox, command

SECONDS = 10
MEGABYTES = 4096
# Of a program and what it starts, in a sandbox. Outside of one the user's own processes would count as well. Where root
# starts them all programs are one user's, so as many times more are allowed as run at once.
PROCESSES = 32
NO_SANDBOX = Sandbox(None, "")
CHILD = Path(__file__).with_name("program_child.py")

# The most bytes that are read of a program's report.
REPORT = 1000

# A fence of any language is matched, because the end of one that is not would be taken for the beginning of the next.
_BLOCK = re.compile(r"^([ \t]*)[^\n]*?```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"^(?:import|from|def|async def|class|@)\b|^@", re.MULTILINE)


@dataclass(frozen=True)
class UnitTests:
    """Holds a HumanEval problem.

    ``prompt`` begins the function ``entry_point``. ``test`` defines ``check(candidate)``, which raises an exception if
    the candidate is wrong.
    """

    prompt: str
    test: str
    entry_point: str


def program(answer: str, tests: UnitTests) -> str:
    """Makes a program of the answer that ends without an exception exactly if the answer is correct.

    An answer that defines the function is put behind what stands before the function in the prompt (imports, helpers).
    Any other answer is taken to continue the prompt.
    """
    answer = answer.replace("\r\n", "\n")
    # A block that stands in a list is indented as a whole.
    blocks = [dedent(block) if margin else block for margin, block in _BLOCK.findall(answer)]
    defining = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(tests.entry_point)}\b", re.MULTILINE)
    code = next((block for block in blocks if defining.search(block)), blocks[0] if blocks else answer)
    if defining.search(code):
        begins, of_prompt = _CODE.search(code), defining.search(tests.prompt)
        preamble = tests.prompt[: of_prompt.start()] if of_prompt else ""
        whole = f"{preamble}\n{code[begins.start() :] if begins and not blocks else code}"
    else:
        whole = tests.prompt + _as_body(code, tests.prompt)
    return f"{whole}\n\n{tests.test}\n\ncheck({tests.entry_point})\n"


def _as_body(code: str, prompt: str) -> str:
    """Returns ``code``, which continues the prompt, with the indentation of the prompt's last line."""
    last = prompt.rstrip().splitlines()[-1]
    wanted = last[: len(last) - len(last.lstrip())] or "    "
    first = next((line for line in code.splitlines() if line.strip()), "")
    given = first[: len(first) - len(first.lstrip())]
    return code if given == wanted else indent(dedent(code), wanted)


def run_all(programs: Sequence[str], seconds: float = SECONDS, sandbox: Sandbox = NO_SANDBOX) -> list[str]:
    """Runs all programs and returns what became of each: ``passed``, ``timed out``, or the exception."""
    with ThreadPoolExecutor(at_once()) as pool:
        return list(pool.map(lambda text: run(text, seconds, sandbox), programs))


def at_once() -> int:
    """Returns how many programs run at the same time."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def check_programs() -> Sandbox:
    """Returns the sandbox in which programs run here.

    Raises `RunError` where no program can run, because every answer would be graded as wrong there.
    """
    sandbox = choose_sandbox()
    try:
        trivial = run("pass\n", sandbox=sandbox)
    except OSError as error:
        trivial = str(error)
    if trivial != "passed":
        raise RunError(f"programs cannot be run here: one that does nothing {trivial}; look at the limits (ulimit -a)")
    return sandbox


def run(text: str, seconds: float = SECONDS, sandbox: Sandbox = NO_SANDBOX) -> str:
    """Runs one program and returns what became of it, as `run_all` does."""
    # The password is written when a program comes to its end, so a program that exits early has passed no test.
    password = secrets.token_hex(8)
    processes = PROCESSES * at_once() if sandbox.name else 0
    program = [sys.executable, "-I", str(CHILD), str(int(seconds) + 1), str(MEGABYTES), str(processes)]
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as report,
    ):
        source.write(f"{password}\n{text}".encode("utf-8", "replace"))
        source.seek(0)
        process = subprocess.Popen(
            command(sandbox.name, folder, program),
            cwd=folder, env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            stdin=source, stdout=report, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            with suppress(ProcessLookupError):  # also ends the processes that the program has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        report.seek(0)
        said = report.read(REPORT).decode("utf-8", "replace").strip()
    if said == password:
        return "passed"
    code = process.returncode
    # A sandbox reports a signal as shells do.
    return said or f"ended early (exit code {128 - code if sandbox.name and code > 128 else code})"
