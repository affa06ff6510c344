"""Say what a verb of the command line is."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from qlora_sft.run.report import Report

CommandResult = Report | Mapping[str, object] | None
"""What a command returns; ``--json`` prints it."""
Action = Callable[[argparse.Namespace], CommandResult]
"""Does what a verb says, with its arguments."""
AddVerb = Callable[[str, Action, str], argparse.ArgumentParser]
"""Takes the name of a verb, what it does, and its help."""
