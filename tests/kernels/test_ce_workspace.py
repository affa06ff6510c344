"""What the loss says it needs is what it takes, for every kind of head; the path in Triton: interpreted_triton.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qlora_kernels.packed_ce import HeadShape, inputs, workspace_bytes
from qlora_kernels.packed_ce.workspace import vocabulary_tile
from workspace_cases import KINDS, check_bytes

from qlora_sft.model.loss_bytes import loss_bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "products"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("sizes", [(300, 128, 5000), (500, 1024, 5000)], ids=str)
def test_the_path_in_torch_takes_what_it_says(
    kind: str, dtype: torch.dtype, products: bool, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``products``: whether the CPU is one that multiplies in bfloat16."""
    monkeypatch.setattr(inputs, "bfloat16_products", lambda: (products, "a test"))
    check_bytes(kind, sizes, dtype, "torch")


def test_a_softcap_takes_its_slope() -> None:
    check_bytes("dense", (300, 128, 5000), torch.float32, "torch", softcap=10.0)


def test_a_plan_counts_the_trained_rows_of_a_head_of_8b() -> None:
    """On a GPU its vocabulary is cut into tiles, which are copies; a dense head takes chunks of logits only."""

    class Llama8B:
        hidden_size, vocab_size, head_dim, num_attention_heads = 4096, 128_256, 128, 32

        def get_text_config(self) -> Any:
            return self

    dense, patched = (HeadShape(128_256, 4096, torch.bfloat16, trained_rows=rows) for rows in (0, 2))
    assert [vocabulary_tile(head, False, None, 2**28) for head in (dense, patched)] == [None, 16384]
    tokens = 8192
    more = workspace_bytes(patched, tokens, torch.bfloat16, "triton", torch.device("cuda"))
    more -= workspace_bytes(dense, tokens, torch.bfloat16, "triton", torch.device("cuda"))
    assert more > 2**27
    said = [loss_bytes(Llama8B(), tokens, torch.bfloat16, True, True, head) for head in (dense, patched)]
    assert said[1] - said[0] == more
