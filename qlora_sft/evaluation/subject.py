"""The model that is evaluated, with all that it takes to ask it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qlora_sft.data.template import ChatFormat


@dataclass(frozen=True)
class Subject:
    """The model that is asked, and how: the template and stops of its training, the type it computes in."""

    model: Any
    tokenizer: Any
    style: ChatFormat
    dtype: torch.dtype
