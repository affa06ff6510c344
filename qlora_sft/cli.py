"""Parse the command line, run the verb that it names, and end with an exit code. The verbs are in ``verbs/``.

Exit codes: 0 done, 2 the configuration or the data is wrong, 1 the run failed, 130 interrupted. This module imports
nothing heavy, so that --help and wrong arguments are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from qlora_sft.atomic import disk_error, path_error
from qlora_sft.errors import EndedTogether, QloraSftError, first_line
from qlora_sft.parallel import rank, refuse, world_size
from qlora_sft.run.report import Report
from qlora_sft.verbs.asking import add_asking_verbs
from qlora_sft.verbs.configured import add_configured_verbs, run_train
from qlora_sft.verbs.exporting import add_export_verbs
from qlora_sft.verbs.recipes import add_recipe_verbs
from qlora_sft.verbs.verb import Action, CommandResult

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: that of the process) and returns its exit code."""
    # Of several processes that train together the first one says what is wrong with the arguments they all have.
    with contextlib.redirect_stderr(io.StringIO()) if rank() else contextlib.nullcontext():
        arguments = _arguments(argv)
    return guarded(lambda: _done(arguments), as_json=arguments.json, debug=arguments.debug)


def _done(arguments: argparse.Namespace) -> CommandResult:
    """Runs the verb of ``arguments``. Only training is done by several processes."""
    if world_size() > 1 and (arguments.verb is not run_train or arguments.find_rate):
        refuse("only training runs in several processes; start this without torchrun")
    action: Action = arguments.verb
    return action(arguments)


def guarded(action: Callable[[], CommandResult], as_json: bool = False, debug: bool | None = None) -> int:
    """Runs ``action``, prints its result as JSON on stdout if ``as_json``, and returns an exit code.

    An error is printed to stderr. One that is not raised by this package, and is no full disk or wrong path, is a bug;
    ``debug`` raises it again, to show its traceback (None: the command has no --debug). Of several processes that train
    together the first one prints the result, and the one that failed prints its error.
    """
    quiet_libraries()
    _write_any_text()
    try:
        result = action()
        if as_json and not rank():
            print(json.dumps(result.to_json() if isinstance(result, Report) else result, ensure_ascii=False))
        sys.stdout.flush()  # here, where it can still be told that nobody reads it
    except KeyboardInterrupt:
        _tell_last("interrupted")
        return 130
    except EndedTogether as error:
        return error.exit_code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and (unread := [each for each in (1, 2) if _is_unread(each)]):
            return _end_unread(unread)
        fault = error if isinstance(error, QloraSftError) else disk_error(error) or path_error(error)
        if fault is None and debug:
            raise
        _tell_last(f"error: {fault or unexpected(error, debug is not None)}")
        return fault.exit_code if fault else 1
    _tell_last("")
    return 0


def _write_any_text() -> None:
    """Lets stdout write what its encoding has no letters for, as \\u escapes; stderr does so anyway."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _tell_last(text: str) -> None:
    """Prints the last text of the command. If the terminal is gone by now, that must not change the exit code."""
    try:
        print(text, end="\n" if text else "", file=sys.stderr, flush=True)
    except OSError:
        _end_unread([2])


def _is_unread(stream: int) -> bool:
    """Says whether the file descriptor ``stream`` is a pipe whose reader has gone."""
    import select

    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _end_unread(streams: list[int]) -> int:
    """Sends the rest of the output nowhere, because its reader (`head`, say) has seen enough, and returns an exit code.

    It is 0 if only results were unread. If messages (2) were, the work that they report was not finished.
    """
    import os

    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream)
    os.close(nowhere)
    return 1 if 2 in streams else 0


def unexpected(error: Exception, has_debug: bool) -> str:
    """Describes an unexpected error. Its traceback is kept in a file, because the command may have run for hours.

    has_debug: whether the command has the option --debug.
    """
    import tempfile
    import traceback

    where = "--debug shows where" if has_debug else "there was no room for a file that says where"
    with (
        suppress(OSError),
        tempfile.NamedTemporaryFile(
            "w", prefix="qlora-sft-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file,
    ):
        file.write("".join(traceback.format_exception(error)))
        where = f"{file.name} says where{', and so does --debug' if has_debug else ''}"
    return (
        f"{type(error).__name__}: {first_line(error)} (this is a fault of qlora_sft or of a library that it uses; "
        f"{where}, which is what a report of it needs)"
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses ``argv``, and also accepts a ``key.sub=value`` that follows an option.

    argparse itself takes positional arguments in one stretch only.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if "overrides" in arguments:
        arguments.overrides = [*arguments.overrides, *filter(_is_override, rest)]
        rest = [argument for argument in rest if not _is_override(argument)]
    if rest:
        arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _is_override(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qlora-sft", description="QLoRA fine-tuning: from chat data to a GGUF that answers.", allow_abbrev=False
    )
    verbs: Verbs = parser.add_subparsers(required=True, metavar="VERB")
    for add_verbs in (add_recipe_verbs, add_configured_verbs, add_export_verbs, add_asking_verbs):
        add_verbs(partial(_verb, verbs))
    return parser


def _verb(verbs: Verbs, name: str, action: Action, help: str) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
    sub.set_defaults(verb=action, parser=sub)
    sub.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")
    sub.add_argument("--debug", action="store_true", help="show the traceback of an unexpected error")
    return sub


def quiet_libraries() -> None:
    """Silences notices of other libraries that no user could act on."""
    import logging
    import os
    import warnings

    # From tqdm in a notebook without ipywidgets; it then draws its bars as text.
    warnings.filterwarnings("ignore", "IProgress not found")
    # "Failed to load CPU gemm_4bit_forward from kernels-community": an optional download, wanted by nobody here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # The bars of transformers ("Loading weights") and datasets follow this one.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Rows are encoded in a thread beside the one that renders them, which takes longer; more threads gained nothing
    # (GSM8K: 9.1 s without, 10.6 s with, the best of four each on a busy machine of two cores).
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    sys.exit(main())
