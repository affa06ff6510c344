"""Tries each part that training stands on, in small: an NF4 product, a Triton kernel, a step of LoRA.

`doctor` runs each in a process of its own, ``python -m qlora_sft.proofs PART``, because Triton's interpreter has to be
chosen before Triton is imported, and Unsloth wants to come before transformers. A part prints what it did, or fails.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Literal

# Relative error of a product in half precision, and of float32 that goes through another kernel.
TOLERANCE = 2e-2


def nf4_product() -> str:
    """Quantises a matrix to NF4 and multiplies by it; compares with the product by the matrix that it stands for."""
    import bitsandbytes as bnb
    import torch

    from qlora_sft.model.load import compute_dtype

    device, (dtype, _) = _device(), compute_dtype("auto")
    torch.manual_seed(0)
    weight = torch.randn(256, 512, dtype=dtype, device=device)
    rows = torch.randn(16, 512, dtype=dtype, device=device)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    restored = bnb.functional.dequantize_4bit(packed, state)
    lost = _distance(restored, weight)
    assert 0.02 < lost < 0.15, f"NF4 lost {lost:.1%} of a random matrix, where about 9% is right"
    apart = _distance(bnb.matmul_4bit(rows, packed.t(), quant_state=state), rows @ restored.t())
    assert apart < TOLERANCE, f"the product is {apart:.1%} away from that by the dequantised matrix"
    return f"bitsandbytes {bnb.__version__} on {_name()}: the product is that by the dequantised matrix"


def triton_kernel() -> str:
    """Computes a loss and its gradient by the Triton kernels and by plain torch, and compares."""
    import torch
    import triton
    from qlora_kernels.packed_ce import Targets, packed_linear_cross_entropy

    torch.manual_seed(0)
    hidden = torch.randn(8, 64, device=_device(), requires_grad=True)
    head = torch.randn(96, 64, device=_device())
    labels = torch.tensor([-100, 3, 5, 95, -100, 0, 7, 9], device=_device())
    targets = Targets.from_labels(labels, position_ids=torch.arange(8, device=_device()))
    paths: tuple[Literal["triton", "torch"], ...] = ("triton", "torch")
    losses, gradients = [], []
    for path in paths:
        loss = packed_linear_cross_entropy(hidden, head, targets, path=path).loss
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, hidden)[0])
    apart = _distance(*gradients)
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[1], f"losses {losses[0]} and {losses[1]}"
    assert apart < TOLERANCE, f"the gradients are {apart:.1%} apart"
    where = _name() if torch.cuda.is_available() else "the CPU, in Triton's interpreter"
    return f"triton {triton.__version__} on {where}: loss and gradient are those of plain torch"


def lora_step() -> str:
    """Loads a tiny model as a run would, takes a step of its adapters, and looks whether the loss fell."""
    from qlora_sft.config import load_config
    from qlora_sft.model.backend import choose_backend

    backend = choose_backend("auto")  # before transformers
    import torch

    from qlora_sft.data.batch import flatten
    from qlora_sft.data.render import Rendered
    from qlora_sft.model.load import compute_dtype
    from qlora_sft.model.loss import batch_loss
    from qlora_sft.model.setup import prepare_model

    dtype, _ = compute_dtype("auto")
    with tempfile.TemporaryDirectory() as folder:
        _save_tiny_model(Path(folder))
        config = load_config("demo", [f"model.path={folder}", "data.max_length=64", "lora.r=4", "lora.alpha=8"])
        model = prepare_model(config, folder, dtype, backend.name, 32, say=lambda _: None)
    batch = flatten([Rendered(list(range(3, 35)), [1.0] * 32, "proof")])
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = batch_loss(model, batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters), "a gradient is missing or not finite"
    assert losses[-1] < losses[0], f"the loss did not fall: {losses[0]:.4f} -> {losses[-1]:.4f}"
    kind = str(dtype).removeprefix("torch.")
    return f"{backend.name} ({backend.reason}) on {_name()} in {kind}, NF4: loss {losses[0]:.2f} -> {losses[-1]:.2f}"


def _save_tiny_model(folder: Path) -> None:
    """Writes two layers with random weights and a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<pad>", *letters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(settings).save_pretrained(folder)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"


def _distance(found: object, wanted: object) -> float:
    """Returns the norm of the difference as a share of the norm of ``wanted``."""
    import torch

    assert isinstance(found, torch.Tensor)
    assert isinstance(wanted, torch.Tensor)
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


PARTS = {"nf4": nf4_product, "triton": triton_kernel, "lora": lora_step}

if __name__ == "__main__":
    from qlora_sft.cli import quiet_libraries

    quiet_libraries()
    print(PARTS[sys.argv[1]]())
