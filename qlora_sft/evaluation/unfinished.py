"""Names the files in which answers are kept until an evaluation is done: one that is interrupted goes on with them.

The name of a file says what was asked of which model and how. So answers to other questions, of another adapter or
under another seed are never taken for these. An evaluation removes its files once everything is written as results.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from qlora_sft.evaluation.ask import Questions
from qlora_sft.evaluation.evaluated_model import EvaluatedModel
from qlora_sft.evaluation.kept import KeptAnswers
from qlora_sft.model.fingerprint import fingerprint
from qlora_sft.run.folder import Run

FOLDER = "unfinished"


def digest_of(path: Path, run: Run | None) -> str:
    """Returns a text that says which model is asked: the adapter of a run, or the model in a folder.

    It covers weights and settings (positions, scale of an adapter). Where a model stops is asked beside it.
    """
    if run is None:
        # What is not in safetensors files is told apart by its times.
        weights = fingerprint(path) or [file.stat().st_mtime for file in sorted(path.iterdir())]
        return f"{path} {weights} {_digest(path / 'config.json')}"
    files = [run.adapter / "adapter_config.json", *sorted(run.adapter.glob("*.safetensors"))]
    return " ".join(map(_digest, files))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Unfinished:
    """Says where the answers of an evaluation are kept until it is done."""

    folder: Path
    model: str
    """What `digest_of` returns."""
    files: list[Path] = field(default_factory=list)
    """Those that this evaluation has asked for."""

    def answers(self, evaluated: EvaluatedModel, questions: Questions, who: str, seed: int) -> KeptAnswers:
        """Returns the answers of one task that one model, ``base`` or ``tuned``, has given before."""
        settings = questions.task.settings
        asked = [
            self.model, who, seed, questions.prompts, settings.max_new_tokens, settings.samples, settings.temperature,
            sorted(evaluated.chat_format.stop_token_ids), str(evaluated.dtype), str(evaluated.model.device),
        ]  # fmt: skip
        name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]
        self.files.append(self.folder / f"{name}.jsonl")
        return KeptAnswers(self.files[-1])

    def remove(self) -> None:
        """Removes the answers of this evaluation; those of another one that was interrupted stay."""
        for file in self.files:
            file.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()
