"""Answers that are code: taken out of the text as they are meant, run, and stopped whatever they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests_support import real_data

from qlora_sft.config import TaskConfig
from qlora_sft.errors import RunError
from qlora_sft.evaluation import programs
from qlora_sft.evaluation.ask import grade_all
from qlora_sft.evaluation.programs import UnitTests, check_programs, program, run, run_all
from qlora_sft.evaluation.tasks import Item, Task

DOUBLE = UnitTests(
    prompt="import math\n\ndef helper(x):\n    return x\n\ndef double(x):\n    '''Twice x.'''\n",
    test="def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0\n",
    entry_point="double",
)


@pytest.mark.parametrize(
    "answer",
    [
        "```python\ndef double(x):\n    return 2 * x\n```",
        "Sure!\n```\ndef double(x):\n    return helper(x) * 2\n```\nIt multiplies.",
        "```python\nimport math\ndef double(x):\n    return math.prod((2, x))\n```",
        "    return 2 * x\n",
        "```python\n    return 2 * x\n```",
        "def double(x):\n    return x + x",
        "For example:\n```python\ndouble(2)\n```\nThe function:\n```python\ndef double(x):\n    return 2 * x\n```",
        "```python\ndef double(x):\n    return 2 * x",
        "```python3\ndef double(x):\n    return 2 * x\n```\nThat is all.",
        "```Python\r\ndef double(x):\r\n    return 2 * x\r\n```\r\nThat is all.",
        "First:\n```bash\npip install math\n```\nThen:\n```python copy\ndef double(x):\n    return 2 * x\n```\nDone.",
        "1. So:\n   ```python\n   def double(x):\n       return 2 * x\n   ```\n2. Done.",
        "Use `x`. Here it is: ```python\ndef double(x):\n    return 2 * x\n```\nDone.",
        "Here it is:\ndef double(x):\n    return 2 * x\n",
        "    ```python\n    return 2 * x\n    ```",
        "```python\nreturn 2 * x\n```",
        "```python\ndef double(x):\n    return 2 * x\n\nif __name__ == '__main__':\n    double(input())\n```",
    ],
    ids=[
        "block",
        "helper of the prompt",
        "own import",
        "goes on",
        "goes on in a block",
        "bare",
        "second block",
        "open",
        "other tag",
        "other line ends",
        "another language first",
        "in a list",
        "fence in a line",
        "no fence",
        "goes on in an indented block",
        "goes on without indentation",
        "with a demonstration",
    ],
)
def test_right_answers_in_any_form_pass(answer: str) -> None:
    assert run(program(answer, DOUBLE)) == "passed"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("return 3 * x", "AssertionError"),
        ("return y", "NameError: name 'y' is not defined"),
        ("return (", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import os\n    os._exit(0)", "ended early (exit code 0)"),
        ("return [0] * 10**12", "MemoryError"),
        ("open('big', 'wb').write(bytes(2**24))", "OSError"),
        ("import os, signal\n    os.kill(os.getpid(), signal.SIGSEGV)", "ended early (exit code -11)"),
    ],
)
def test_wrong_answers_say_how(body: str, found: str) -> None:
    assert run(program(f"    {body}\n", DOUBLE)).startswith(found)


def test_printing_what_success_looks_like_is_not_success() -> None:
    assert run("print('passed')\nraise ValueError") == "ValueError"


def test_an_answer_that_goes_on_keeps_its_indentation_from_the_model_to_the_grade() -> None:
    task = Task("t", "code", [Item("t:1", {"messages": []}, tests=DOUBLE)], TaskConfig("t"))
    texts = ["    return 2 * x\n", "\n    y = 2 * x\n    return y", "<think>\nEasy.\n</think>\n\n    return 2 * x"]
    for text in texts:
        assert grade_all(task, [False], [text])[0][0], text


def test_a_program_cannot_fill_this_process_with_its_report() -> None:
    assert len(run("import os\nwhile os.write(3, b'x' * 10**6): pass\n")) <= 1000


def test_lower_limits_of_the_machine_are_kept() -> None:
    code = (
        "import resource; from qlora_sft.evaluation.programs import run_all\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (5, 5))\n"
        "print(run_all(['pass']))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "['passed']\n"


def test_where_no_program_can_run_none_is_graded_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(programs, "CHILD", tmp_path / "missing.py")
    with pytest.raises(RunError, match="programs cannot be run here: one that does nothing ended early"):
        check_programs()


def test_an_endless_program_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    text = f"import subprocess\np = subprocess.Popen(['sleep', '60'])\nopen({str(mark)!r}, 'w').write(str(p.pid))\n"
    started = time.monotonic()
    assert run(text + "while True: pass\n", seconds=2) == "timed out"
    assert time.monotonic() - started < 20
    # The signal is sent; on a busy machine it takes a moment to die of it.
    deadline = time.monotonic() + 20
    while _alive(int(mark.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(int(mark.read_text()))


def _alive(pid: int) -> bool:
    """A killed child of a process that is gone may wait as a zombie for whoever collects it."""
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()


def test_a_program_sees_neither_the_environment_nor_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    text = f"import os\nassert 'HF_TOKEN' not in os.environ\nassert os.getcwd() != {os.getcwd()!r}\n"
    assert run(text) == "passed"


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_the_reference_solutions_of_humaneval_pass(every: int) -> None:
    rows = [json.loads(line) for line in real_data("HumanEval.jsonl").read_text().splitlines()][::every]
    tests = [UnitTests(row["prompt"], row["test"], row["entry_point"]) for row in rows]
    whole = [f"```python\n{row['prompt']}{row['canonical_solution']}```" for row in rows]
    assert set(run_all([program(answer, t) for answer, t in zip(whole, tests, strict=True)])) == {"passed"}
    some = list(zip(rows, tests, strict=True))[::4]
    going_on = [program(row["canonical_solution"], t) for row, t in some]
    assert set(run_all(going_on)) == {"passed"}
    wrong = run_all([program("    return None\n", t) for _, t in some])
    assert "passed" not in wrong
