"""Keeps the baseline, which is the evaluation before training, so that a resumed run need not measure it again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_sft.atomic import write_json
from qlora_sft.config import EvaluationConfig
from qlora_sft.data.render import Rendered
from qlora_sft.evaluation.evaluate import Evaluation
from qlora_sft.json_types import read_object

FILE = "before.json"


def keep_baseline(run: Path, evaluation: Evaluation, question: str) -> None:
    """Writes the baseline into the run folder, with the digest of what was asked."""
    write_json(run / FILE, {"question": question, **dataclasses.asdict(evaluation)})


def kept_baseline(run: Path, question: str) -> Evaluation | None:
    """Returns the baseline of the run, or None if there is none, it is damaged, or something else was asked then."""
    try:
        content: dict[str, Any] = read_object(run / FILE)
        return Evaluation(**content) if content.pop("question") == question else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def question_digest(config: EvaluationConfig, held_out: Mapping[str, Sequence[Rendered]]) -> str:
    """Returns the sha256 of the held-out tokens and the settings, which decide the result together with the model."""
    asked = [config.loss, config.answers, config.max_new_tokens]
    digest = hashlib.sha256(json.dumps(asked).encode())
    for source, rows in held_out.items():
        digest.update(json.dumps([source, *([row.input_ids, row.weights] for row in rows)]).encode())
    return digest.hexdigest()
