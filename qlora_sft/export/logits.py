"""Computes the logits of an adapter, of a merged model and of a GGUF on the same documents, into files on disk."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_sft.errors import RunError
from qlora_sft.export.llama_tools import llama_libraries, threads
from qlora_sft.export.logits_file import logits_file
from qlora_sft.export.probe import Probe
from qlora_sft.say import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def adapter_logits(run: Path, probe: Probe, out: Path) -> np.ndarray:
    """Computes the logits of the adapter on the base of its training, NF4 included: [probe.tokens, vocabulary].

    All products are computed in float32.
    """
    import torch

    from qlora_sft.model.load import load_trained_base, with_adapter

    # The base is loaded as for training, because NF4 depends on the type that was quantised. It computes in float32, so
    # that the weights are compared and not the rounding of the arithmetic.
    base = load_trained_base(run)
    expand_4bit(base)
    # transformers refuses base.float() for a model that was quantised.
    torch.nn.Module.float(base)
    return _run_model(with_adapter(base, run / "adapter"), probe, out, "the adapter")


def expand_4bit(model: PreTrainedModel) -> None:
    """Replaces every 4-bit layer, and every stack of experts, by a plain one with the weight of training.

    The weight has the type that was quantised. Given float32 inputs, bitsandbytes would dequantise to float32, which
    training never saw, and it would do so again at every call.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    from qlora_sft.model.experts import expand_stacks

    expand_stacks(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear4bit):
                weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).detach()
                plain = torch.nn.Linear(1, 1, bias=layer.bias is not None, device=weight.device)
                plain.weight = torch.nn.Parameter(weight, requires_grad=False)
                plain.bias = layer.bias
                plain.in_features, plain.out_features = layer.in_features, layer.out_features
                setattr(parent, name, plain)
    model.is_loaded_in_4bit = model.is_quantized = False
    model.hf_quantizer = None


def model_logits(folder: Path, probe: Probe, out: Path, trust: bool = False) -> np.ndarray:
    """Computes the logits of a model folder in plain transformers, in float32: [probe.tokens, vocabulary].

    trust: its own code may be run.
    """
    import torch

    from qlora_sft.model.load import load_base

    model = load_base(str(folder), torch.float32, load_in_4bit=False, trust=trust).eval()
    return _run_model(model, probe, out, folder.name)


def _run_model(model: PreTrainedModel, probe: Probe, out: Path, what: str) -> np.ndarray:
    """Computes the logits at the probe's positions, document by document, into the file ``out``."""
    import torch

    rows: np.memmap | None = None
    start = 0
    bar = progress(probe.tokens, f"logits of {what}", "token")
    for ids, positions in zip(probe.documents, probe.positions, strict=True):
        kept = torch.tensor(positions, device=model.device)
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=kept)
        logits = output.logits[0].float().cpu()
        if rows is None:
            shape = (probe.tokens, logits.shape[1])
            rows = logits_file(out, shape)
        rows[start : start + len(positions)] = logits.numpy()
        start += len(positions)
        bar.update(len(positions))
    bar.close()
    assert rows is not None, "no documents"
    rows.flush()
    del model
    gc.collect()
    return rows


def gguf_logits(
    gguf: Path, probe: Probe, texts: list[str], out: Path, lora: Path | None = None
) -> tuple[np.ndarray, list[list[int]]]:
    """Computes on the CPU, with llama.cpp, the logits [probe.tokens, vocabulary] and the token ids of each text.

    Raises `RunError` that names what to install when no installed library can do it.
    """
    libraries = llama_libraries()
    if not libraries:
        raise RunError(
            "comparing a GGUF with its model needs llama.cpp: pip install 'qlora-sft[gguf]' (xllamacpp), "
            "or leave the comparison out with --no-parity"
        )
    request = out.with_suffix(".json")
    content = {
        "documents": probe.documents,
        "positions": probe.positions,
        "texts": texts,
        "lora": str(lora) if lora else None,
        "threads": threads(),
    }
    request.write_text(json.dumps(content), encoding="utf-8")
    reasons = []
    # Else a debugger writes pages behind the reason for which llama.cpp gave up.
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    for library in libraries:
        arguments = [str(library), str(gguf), str(request), str(out)]
        result = subprocess.run(
            [sys.executable, "-m", "qlora_sft.export.llama_logits", *arguments],
            capture_output=True,
            text=True,
            env=environment,
        )
        if result.returncode == 0:
            return np.load(out, mmap_mode="r"), json.loads(result.stdout)["texts"]
        lines = result.stderr.strip().splitlines() or [f"ended with {result.returncode}"]
        # Of a file that cannot be loaded llama.cpp says why some lines before.
        why = [line.partition("error loading model: ")[2] for line in lines if "error loading model: " in line]
        reasons.append(f"{library.name}: {'; '.join([lines[-1], *why])}")
    raise RunError(f"{gguf}: llama.cpp gives no logits. " + "; ".join(reasons))
