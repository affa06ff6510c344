"""The evaluation before training, kept with the run: one that goes on need not ask the base again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_sft.atomic import write_json
from qlora_sft.config import EvaluationConfig
from qlora_sft.data.render import Rendered
from qlora_sft.evaluation.evaluate import Evaluation

FILE = "before.json"


def keep_before(run: Path, evaluation: Evaluation, question: str) -> None:
    write_json(run / FILE, {"question": question, **dataclasses.asdict(evaluation)})


def kept_before(run: Path, question: str) -> Evaluation | None:
    """What the run was begun with, if the same was asked."""
    file = run / FILE
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    return Evaluation(**content) if content.pop("question") == question else None


def question_digest(config: EvaluationConfig, held_out: Mapping[str, Sequence[Rendered]]) -> str:
    """sha256 of all that decides the result, beside the model: held-out tokens and settings."""
    asked = [config.loss, config.answers, config.max_new_tokens]
    digest = hashlib.sha256(json.dumps(asked).encode())
    for source, rows in held_out.items():
        digest.update(json.dumps([source, *([row.input_ids, row.weights] for row in rows)]).encode())
    return digest.hexdigest()
