"""One question of a task, and the forms that tasks have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qlora_sft.data.conversation import Conversation, Message
from qlora_sft.evaluation.programs import UnitTests

TaskForm = Literal["choices", "number", "exact", "code", "refusal", "loss"]


@dataclass(frozen=True)
class Item:
    """Holds one question."""

    place: str
    """The file and line it comes from."""
    conversation: Conversation
    """The messages up to the answer, or all of them for a task of the form ``loss``."""
    answer: Message = field(default_factory=lambda: Message(role="assistant", content="None"))
    """The answer that the file has."""
    reference: str = ""
    """The right letter, number or text. It is empty for code."""
    options: int = 0
    """The number of choices."""
    shown: int = 0
    """How many messages before the question are examples with their answers."""
    tests: UnitTests | None = None
    """The tests that grade an answer in code."""
