"""Runs interpreted_*.py under Triton's interpreter, in a process where nothing has imported triton yet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

HERE = Path(__file__).parent


def test_the_triton_kernels_on_the_cpu() -> None:
    triton = pytest.importorskip("triton")
    if Version(triton.__version__) < Version("3.7"):
        pytest.skip("the interpreter of Triton before 3.7 cannot use NumPy's arrays of one element as numbers")
    paths = [str(HERE), str(HERE.parents[1]), str(HERE.parents[1] / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    files = map(str, sorted(HERE.glob("interpreted_*.py")))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stdout.count(" passed") == 1
