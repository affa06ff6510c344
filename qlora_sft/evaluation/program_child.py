"""Runs the program on standard input under limits: ``python -I program_child.py SECONDS MEGABYTES PROCESSES``.

`programs.run` starts this file by its path in a process of its own, so it imports nothing but the standard library.
The first line of standard input is a password and the rest is the program. The password is written to standard output
if the program came to its end; otherwise its exception is written there. PROCESSES: how many the program may have, or 0
for no limit.
"""

import os
import resource
import sys
import types


def main(seconds: int, megabytes: int, processes: int) -> None:
    """Runs the program and writes what became of it."""
    password, _, source = sys.stdin.buffer.read().decode("utf-8").partition("\n")
    report = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, megabytes * 2**20),
        (resource.RLIMIT_FSIZE, 2**20),
        (resource.RLIMIT_CORE, 0),
        *([(resource.RLIMIT_NPROC, processes)] if processes else []),
    ):
        _, hard = resource.getrlimit(limit)
        lowest = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (lowest, lowest))
    # The program is imported, not started: what an answer does only as a script (reading input, a demonstration) is
    # not asked for.
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    try:
        exec(compile(source, "answer.py", "exec"), module.__dict__)
        said = password
    except BaseException as error:  # also SystemExit, because an answer that exits has passed no test
        said = f"{type(error).__name__}: {error}"[:200].removesuffix(": ")
    os.write(report, said.encode("utf-8", "replace"))
    os._exit(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
