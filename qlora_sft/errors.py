"""Define the ways in which a command can end badly, and what each one tells the shell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping


class QloraSftError(Exception):
    """Is the base of all errors. The message names the cause and the cure; ``exit_code`` is what the CLI returns."""

    exit_code = 1


class ConfigError(QloraSftError):
    """Says that the configuration is wrong.

    ``problems`` lists every fault found, not only the first. ``rest`` maps the name of each section to what is right in
    it.
    """

    exit_code = 2

    def __init__(self, problems: list[str] | str, rest: Mapping[str, object] | None = None):
        self.rest = rest or {}
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(QloraSftError):
    """Says that the training data is wrong. The message carries the file and the line."""

    exit_code = 2


class RunError(QloraSftError):
    """Says that the run failed although configuration and data were fine (disk, download, export)."""

    exit_code = 1


class ContextFull(RunError):
    """Says that a conversation is longer than the model's context."""


class Interrupted(QloraSftError):
    """Says that Ctrl-C ended the training. The message names where the checkpoint is."""

    exit_code = 130


class EndedTogether(QloraSftError):
    """Says that this process ends because another one of the same run has failed, which says why. It has no message."""

    def __init__(self, exit_code: int):
        self.exit_code = exit_code
        super().__init__()


def all_at_once(checks: Iterable[Callable[[], object]]) -> None:
    """Runs every check and raises the faults of all in one error.

    If one error says all that the others say, it is raised itself.
    """
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
    """Returns the first line of another library's message, which may run over pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
