"""Programs that a model writes reach nothing of the user, in every kind of sandbox that works on this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_sft.config import TaskConfig
from qlora_sft.evaluation import programs, sandbox
from qlora_sft.evaluation.evaluate_run import _check_code
from qlora_sft.evaluation.programs import PROCESSES, at_once, check_programs, run
from qlora_sft.evaluation.sandbox import Sandbox, _try, choose_sandbox, visible_paths
from qlora_sft.evaluation.tasks import Task

KINDS = ("bubblewrap", "namespaces")


@pytest.fixture(autouse=True)
def chosen_anew() -> Iterator[None]:
    """A process chooses its sandbox once; here others are tried."""
    for chosen in (choose_sandbox, sandbox._sized):
        chosen.cache_clear()
    yield
    for chosen in (choose_sandbox, sandbox._sized):
        chosen.cache_clear()


@pytest.fixture(scope="module", params=KINDS)
def shut_in(request: pytest.FixtureRequest) -> Sandbox:
    obstacle = _try(request.param)
    if obstacle is not None:
        pytest.skip(f"{request.param}: {obstacle}")
    return Sandbox(request.param, "")


def test_an_ordinary_program_passes(shut_in: Sandbox) -> None:
    text = "import json, math, os\nopen('own', 'w').write('x')\nassert open('own').read() == 'x'\nassert math.pi > 3\n"
    assert run(text, sandbox=shut_in) == "passed"
    assert run("assert 1 == 2", sandbox=shut_in) == "AssertionError"
    assert (
        run("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", sandbox=shut_in) == "ended early (exit code -11)"
    )


def test_no_file_of_the_user_is_read(shut_in: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    places = [str(secret), str(Path.home() / ".bashrc"), "/etc/passwd", "/etc/shadow", str(Path(__file__))]
    text = f"import os\nassert not [p for p in {places!r} if os.path.exists(p)]\n"
    assert run(text, sandbox=shut_in) == "passed"
    assert run(text) == "AssertionError"


def test_nothing_is_written_outside(shut_in: Sandbox, tmp_path: Path) -> None:
    places = [str(tmp_path / "x"), "/usr/x", "/x", f"{sys.prefix}/x", f"{sys.base_prefix}/x", "/dev/x"]
    text = (
        f"written = []\nfor place in {places!r}:\n    try:\n        open(place, 'w')\n        written.append(place)\n"
        "    except OSError:\n        pass\nassert not written, written\n"
    )
    assert run(text, sandbox=shut_in) == "passed"
    assert not any(Path(place).exists() for place in places)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_no_socket_reaches_this_machine(shut_in: Sandbox, listener: socket.socket) -> None:
    text = f"import socket\nsocket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), 5)\n"
    assert run(text) == "passed"
    assert "Error" in run(text, sandbox=shut_in)


def test_no_other_process_is_seen(shut_in: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    parent = os.getpid()
    text = (
        "import glob, os\nassert 'HF_TOKEN' not in os.environ\n"
        f"assert not os.path.exists('/proc/{parent}/environ')\n"
        "seen = [open(p, 'rb').read() for p in glob.glob('/proc/*/environ')]\n"
        "assert not any(b'secret' in each for each in seen)\n"
        f"try:\n    os.kill({parent}, 0)\n    raise AssertionError('seen')\nexcept ProcessLookupError:\n    pass\n"
    )
    assert run(text, sandbox=shut_in) == "passed"


def test_a_fork_bomb_ends_with_all_its_processes(shut_in: Sandbox) -> None:
    before = len(os.listdir("/proc"))
    most = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], len(os.listdir("/proc")) - before)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    text = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    assert run(text, seconds=3, sandbox=shut_in) == "timed out"
    done.set()
    watcher.join()
    # The processes of root are not limited, and in bubblewrap they are root's.
    if os.getuid() != 0 or shut_in.name == "namespaces":
        assert most[0] < PROCESSES * at_once() + 40  # others begin processes meanwhile
    assert left_over("program_child.py") == 0


def test_an_endless_program_takes_a_process_that_hides_with_it(shut_in: Sandbox) -> None:
    hidden = "    os.setsid()\n    os.execv('/bin/sleep', ['sleep', '61.803'])\n"
    text = f"import os\nif os.fork() == 0:\n{hidden}while True: pass\n"
    assert run(text, seconds=2, sandbox=shut_in) == "timed out"
    assert left_over("61.803") == 0


def left_over(words: str) -> int:
    """Counts the processes with these words in their command line, once they had time to die of their signal."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        lines = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                lines.append(file.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
            except OSError:
                continue
        found = [line for line in lines if words in line]
        if not found:
            return 0
        time.sleep(0.1)
    return len(found)


def test_memory_and_files_have_limits(shut_in: Sandbox) -> None:
    assert run("x = bytearray(10 * 2**30)", sandbox=shut_in) == "MemoryError"
    text = "for i in range(200):\n    open(f'f{i}', 'wb').write(bytes(2**20))\n"
    if shut_in.name == "namespaces" or sandbox._sized():
        assert "No space left" in run(text, sandbox=shut_in)


# ------------------------------------------------------------------ the choice


def test_where_nothing_works_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container without namespaces: programs run with limits, under the words `no sandbox`."""
    monkeypatch.setattr(sandbox, "_try", lambda name: f"{name} not permitted")
    chosen = choose_sandbox()
    assert chosen.name is None
    assert "bubblewrap: bubblewrap not permitted" in chosen.reason
    assert "namespaces: namespaces not permitted" in chosen.reason
    said: list[str] = []
    code = Task("t", "code", [], TaskConfig("t"))
    _check_code([code], True, said.append)
    assert said[0].startswith("t: no sandbox, programs can read your files and use the network (")


def test_bubblewrap_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert _try("bubblewrap") == "bwrap: setting up uid map: Permission denied"
    assert check_programs().name in ("namespaces", None)


def test_a_folder_with_the_users_home_in_it_is_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert tmp_path not in visible_paths()
    assert Path("/") not in visible_paths()


def test_nothing_of_a_folder_is_shown_but_what_a_program_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shut_in: Sandbox
) -> None:
    """As with a Python in ~/.local, whose share holds keys, or a project in /usr/src."""
    for name in ("bin", "lib", "share", "app"):
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "prefix", str(tmp_path))
        shown = visible_paths()
    assert tmp_path / "lib" in shown
    assert not {tmp_path, tmp_path / "share", tmp_path / "app", Path("/usr"), Path("/usr/local")} & set(shown)
    assert run("import os\nassert not os.path.exists('/usr/src')", sandbox=shut_in) == "passed"
    # A home below /usr is no reason to run without a sandbox.
    monkeypatch.setattr(Path, "home", lambda: Path("/usr/home/me"))
    assert run("pass", sandbox=shut_in) == "passed"


def test_programs_that_run_at_once_take_no_processes_from_each_other(
    monkeypatch: pytest.MonkeyPatch, shut_in: Sandbox
) -> None:
    """Root's sandboxes all run as one user, of whom the system counts the processes."""
    monkeypatch.setattr(programs, "PROCESSES", 4)
    monkeypatch.setattr(programs, "at_once", lambda: 6)
    text = "import threading, time\nfor _ in range(8):\n    x = threading.Thread(target=time.sleep, args=(0.1,))\n"
    text += "    x.start()\n    time.sleep(0.1)\n"
    assert programs.run_all([text] * 6, 30, shut_in) == ["passed"] * 6


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="becomes another user")
def test_another_user_than_root_is_shut_in_as_well(tmp_path: Path) -> None:
    """By a namespace of users; the system's own Python, as this one may lie in root's folder."""
    python = next((p for p in ("/usr/bin/python3",) if Path(p).exists()), None)
    if python is None:
        pytest.skip("no Python of the system")
    folder, child = Path("/tmp/qlora-sandbox-test"), Path("/tmp/qlora-sandbox-child.py")
    folder.mkdir(exist_ok=True)
    try:
        folder.chmod(0o777)
        shutil.copy(sandbox.CHILD, child)
        child.chmod(0o644)
        paths = [str(path) for path in map(Path, ("/usr", "/bin", "/lib", "/lib64")) if path.exists()]
        program = "import os; print(os.getuid(), os.getcwd(), os.path.exists('/etc'), os.path.exists('/root'))"
        as_user = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups"]
        done = subprocess.run(
            [*as_user, python, "-I", str(child), str(folder), *paths, "--", python, "-I", "-c", program],
            capture_output=True, text=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
        child.unlink(missing_ok=True)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"this system allows no namespaces: {done.stderr.splitlines()[-1]}")
    assert done.stdout == "65534 /sandbox False False\n", done.stderr
