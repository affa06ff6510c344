"""Asks the same questions in other ways: behind a few examples with their answers, or in other words.

A tuned model that answers worse may have lost an ability, or only the habit of showing it in this form. Examples bring
the form back and not the ability, so they tell the two apart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from qlora_sft.data.conversation import Message
from qlora_sft.errors import DataError
from qlora_sft.evaluation.item import Item, TaskForm

Phrasing = Literal["labelled", "polite"]
PHRASINGS: dict[Phrasing, str] = {
    "labelled": "Question: {question}\n\nAnswer:",
    "polite": "Could you please help me with this?\n\n{question}\n\nThank you!",
}


def rephrased(item: Item, phrasing: Phrasing) -> Item:
    """Returns the item with its last question in other words."""
    *earlier, question = item.conversation["messages"]
    words = PHRASINGS[phrasing].format(question=question.get("content") or "")
    asked: Message = {"role": question["role"], "content": words}
    return replace(item, conversation={**item.conversation, "messages": [*earlier, asked]})


def with_examples(items: Sequence[Item], shots: int, form: TaskForm, seed: int) -> list[Item]:
    """Returns the items, each behind ``shots`` others with their answers, drawn with ``seed``.

    An item's own system message stays first; those of the examples are left out. Raises `DataError` if there are too
    few items.
    """
    if len(items) <= shots:
        raise DataError(f"{shots} examples before every question need more than {len(items)} questions")
    result = []
    for number, item in enumerate(items):
        others = [other for other in range(len(items)) if other != number]
        drawn = random.Random(f"examples {seed} {number}").sample(others, shots)
        shown: list[Message] = []
        for other in drawn:
            shown += [message for message in items[other].conversation["messages"] if message["role"] != "system"]
            shown.append(_answer(items[other], form))
        own = item.conversation["messages"]
        begin = 1 if own[0]["role"] == "system" else 0
        messages = [*own[:begin], *shown, *own[begin:]]
        result.append(replace(item, conversation={**item.conversation, "messages": messages}, shown=len(shown)))
    return result


def _answer(item: Item, form: TaskForm) -> Message:
    """Returns the answer that an example shows: the letter alone where letters are compared."""
    return {"role": "assistant", "content": item.reference} if form == "choices" else item.answer
