"""What the changes of one task's figures are called."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_sft.evaluation.compare import judged
from qlora_sft.evaluation.statistics import PairedChange

RISEN, FALLEN = PairedChange(0.2, 0.4, 0.1, 0.3), PairedChange(0.4, 0.2, -0.3, -0.1)
SAME = PairedChange(0.4, 0.39, -0.05, 0.03)


@pytest.mark.parametrize(
    ("form", "changes", "samples", "verdict"),
    [
        ("number", {"pass@1": FALLEN, "pass@8": FALLEN}, 8, "forgetting"),
        ("number", {"pass@1": SAME, "pass@8": FALLEN}, 8, "forgetting"),
        ("number", {"pass@1": FALLEN, "pass@8": SAME}, 8, "alignment tax"),
        ("number", {"pass@1": FALLEN, "pass@8": RISEN}, 8, "alignment tax"),
        ("number", {"pass@1": RISEN, "pass@8": SAME}, 8, "better"),
        ("number", {"pass@1": SAME, "pass@8": SAME}, 8, "no difference shown"),
        ("code", {"pass@1": FALLEN}, 1, "worse"),
        ("exact", {"pass@1": RISEN}, 1, "better"),
        ("choices", {"accuracy": FALLEN, "said": FALLEN}, 1, "forgetting"),
        ("choices", {"accuracy": SAME, "said": FALLEN}, 1, "alignment tax"),
        ("choices", {"accuracy": SAME, "said": RISEN}, 1, "better"),
        ("loss", {"loss": RISEN}, 1, "worse"),
        ("loss", {"loss": FALLEN}, 1, "better"),
        ("loss", {"loss": SAME}, 1, "no difference shown"),
    ],
)
def test_forgetting_is_told_from_alignment_tax(form: Any, changes: Any, samples: int, verdict: str) -> None:
    assert judged(form, changes, samples)[0] == verdict
