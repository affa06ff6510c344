"""Question: how long does GSM8K (7,473 rows) take from disk to labelled and packed rows, with us, TRL and Unsloth?

Cold: nobody finds anything cached, each run is a process of its own; ours then starts a second time. All read the same
file with the same tokenizer and template and supervise the answers only; imports are not timed. Run as::

    python benchmarks/preparation.py [gsm8k_train.jsonl] [--runs 3]

TRL also supervises the newlines at the end of the header and after the end of turn: two tokens more per row. Unsloth
adds a second end of turn to each row (not supervised), and packs nothing on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NotRequired, TypedDict

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WHO = ("ours", "trl", "unsloth")
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "trl", "unsloth", "unsloth_zoo")
# The number of lines that are shown of a failure.
LAST_LINES = 3


class Figures(TypedDict):
    """Holds the times, in seconds, and the counts of one preparation."""

    seconds: float
    read: float
    process: float
    second_start: NotRequired[float]
    tokens: int
    supervised: int
    rows: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("QLORA_SFT_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("file", nargs="?", type=Path, default=data / "gsm8k_train.jsonl")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    file = arguments.file.resolve()
    if not file.is_file():
        parser.error(f"{file}: no such file; name GSM8K's train.jsonl, or its folder in QLORA_SFT_DATA")
    n_rows = sum(1 for line in file.open(encoding="utf-8") if line.strip())
    results: dict[str, list[Figures]] = {who: [] for who in WHO}
    failed: dict[str, str] = {}
    for number in range(arguments.runs):
        for who in [who for who in WHO if who not in failed]:
            figures = one_run(who, file)
            if isinstance(figures, str):
                failed[who] = figures
                continue
            results[who].append(figures)
            print(f"run {number}, {who}: {figures['seconds']:.2f} s", flush=True)
    for who, reason in failed.items():
        print(f"{who} could not run: {reason}")
    summary = {who: medians(runs) for who, runs in results.items() if runs and who not in failed}
    report(summary, n_rows)
    write(HERE / "results" / "preparation.jsonl", n_rows, summary, failed, results)


def one_run(who: str, file: Path) -> Figures | str:
    """Runs one preparation in a process of its own, with empty caches. Returns its figures, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        # The current folder is empty as well, because Unsloth writes there what it has compiled.
        paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_DATASETS_CACHE": folder,
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, str(HERE / "preparation_peers.py"), who, str(file)]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        process = time.perf_counter() - started
    if done.returncode:
        return " | ".join(done.stderr.strip().splitlines()[-LAST_LINES:])
    figures: Figures = {**json.loads(done.stdout.splitlines()[-1]), "process": process}
    return figures


def medians(runs: list[Figures]) -> Figures:
    """Returns the medians of the times, and the counts, which must be the same in every run."""
    counts = ("tokens", "supervised", "rows")
    assert all(run[key] == runs[0][key] for run in runs for key in counts), runs
    timed = [key for key in ("seconds", "read", "process", "second_start") if key in runs[0]]
    times = {key: statistics.median(run[key] for run in runs) for key in timed}
    return {**times, **{key: runs[0][key] for key in counts}}


def report(summary: dict[str, Figures], n_rows: int) -> None:
    print(f"\n{'':<9}{'median s':>9}{'reading':>9}{'process':>9}{'tokens/s':>11}{'rows':>7}{'tokens':>12}", end="")
    print(f"{'supervised':>12}{'more/row':>10}{'ours is':>9}")
    reference = summary.get("ours")
    for who, row in summary.items():
        more = f"{(row['supervised'] - reference['supervised']) / n_rows:+.3f}" if reference else ""
        ratio = f"{row['seconds'] / reference['seconds']:.2f}x" if reference else ""
        print(
            f"{who:<9}{row['seconds']:>9.2f}{row['read']:>9.2f}{row['process']:>9.1f}"
            f"{row['tokens'] / row['seconds']:>11,.0f}{row['rows']:>7,}{row['tokens']:>12,}"
            f"{row['supervised']:>12,}{more:>10}{ratio:>9}"
        )
    if reference:
        print(f"ours from the cache: {reference['second_start']:.2f} s, reading included")


def write(
    file: Path, n_rows: int, summary: dict[str, Figures], failed: dict[str, str], results: dict[str, list[Figures]]
) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True).stdout
    row = {
        "benchmark": "preparation",
        "commit": commit + ("+changes" if changed.strip() else ""),
        "versions": {"python": sys.version.split()[0], **{name: installed(name) for name in PACKAGES}},
        "machine": {"cpus": os.cpu_count()},
        "sizes": {"rows": n_rows, "capacity": 2048},
        "median": rounded(summary),
        "runs": {who: [round(run["seconds"], 3) for run in runs] for who, runs in results.items()},
        "could_not_run": failed,
    }
    file.parent.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


def rounded(summary: dict[str, Figures]) -> dict[str, Figures]:
    return {who: {key: round(value, 3) for key, value in row.items()} for who, row in summary.items()}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
