"""The ways a command can end badly, and what each one tells the shell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping


class QloraSftError(Exception):
    """Base class. The message names the cause and the cure; ``exit_code`` is what the CLI returns."""

    exit_code = 1


class ConfigError(QloraSftError):
    """The configuration is wrong. ``problems`` lists every fault found, not only the first; ``rest`` are the sections
    of the configuration without what is wrong in them, by name."""

    exit_code = 2

    def __init__(self, problems: list[str] | str, rest: Mapping[str, object] | None = None):
        self.rest = rest or {}
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(QloraSftError):
    """The training data is wrong. The message carries the file and the line."""

    exit_code = 2


class RunError(QloraSftError):
    """The configuration and the data were fine, but the run failed (disk, download, export)."""

    exit_code = 1


class ContextFull(RunError):
    """A conversation is longer than the model's context."""


class Interrupted(QloraSftError):
    """Ctrl-C during training. What was learned so far is saved where the message says."""

    exit_code = 130


def all_at_once(checks: Iterable[Callable[[], object]]) -> None:
    """Runs every check and raises the faults of all: the one error that says everything, or one made of several."""
    errors: list[QloraSftError] = []
    for check in checks:
        try:
            check()
        except (ConfigError, DataError) as error:
            errors.append(error)
    if not errors:
        return
    # Two checks may stumble over the same.
    lines = list(dict.fromkeys(line for error in errors for line in str(error).splitlines()))
    if len(lines) == len(str(errors[0]).splitlines()):
        raise errors[0]
    of_data = all(isinstance(error, DataError) for error in errors)
    raise DataError("\n".join(lines)) if of_data else ConfigError(lines)


def first_line(error: Exception) -> str:
    """Of another library's message, which may run over pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
