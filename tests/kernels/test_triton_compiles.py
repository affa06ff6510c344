"""Every kernel compiles ahead of time for every generation of GPU, without spilling registers. Needs no GPU."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from qlora_kernels import rms_norm_triton, rotate_triton  # noqa: E402
from qlora_kernels.nf4_lora import pointwise  # noqa: E402
from qlora_kernels.packed_ce import gather_scatter, logit_kernels, select, triton_path  # noqa: E402

CAPABILITIES = [75, 80, 86, 89, 90, 100, 120]
PLAIN = {"HAS_BIAS": False, "HAS_CAP": False, "SMOOTH": False}
EVERYTHING = {"HAS_BIAS": True, "HAS_CAP": True, "SMOOTH": True}
ROWS, TILES = {"BLOCK": triton_path.BLOCK, "GRAD": True}, {"BLOCK": triton_path.TILE_BLOCK}

# name, kernel, constants, warps
VARIANTS: list[tuple[str, Any, dict[str, Any], int]] = [
    ("rows, plain", logit_kernels.row_kernel, {**PLAIN, "Z_LOSS": False, **ROWS}, triton_path.WARPS),
    ("rows, all options", logit_kernels.row_kernel, {**EVERYTHING, "Z_LOSS": True, **ROWS}, triton_path.WARPS),
    ("rows, loss only", logit_kernels.row_kernel, {**PLAIN, "Z_LOSS": False, **ROWS, "GRAD": False}, triton_path.WARPS),
    ("tile, plain", logit_kernels.tile_kernel, {**PLAIN, **TILES}, triton_path.WARPS),
    ("tile, all options", logit_kernels.tile_kernel, {**EVERYTHING, **TILES}, triton_path.WARPS),
    ("gather", gather_scatter.gather_kernel, {"BLOCK": 1024}, 4),
    ("scatter", gather_scatter.scatter_kernel, {"BLOCK": 1024}, 4),
    ("documents", gather_scatter.document_kernel, {"BLOCK": 256}, 4),
    ("count", select.count_kernel, {"BLOCK": 1024}, 4),
    ("compact", select.compact_kernel, {"BLOCK": 1024}, 4),
    *(
        (
            f"rotate {'back' if inverse else ''}, heads of {2 * half}",
            rotate_triton.rotate_kernel,
            {"INVERSE": inverse, "HEADS": rotate_triton.PAIRS // half, "HALF": half},
            rotate_triton.WARPS,
        )
        for inverse in (False, True)
        for half in (64, 128)
    ),
    *(
        (
            f"norm backward{', gemma' if gemma else ''}, {block} wide",
            rms_norm_triton.norm_backward_kernel,
            {"GEMMA": gemma, "BLOCK": block},
            rms_norm_triton.warps_for(block),
        )
        for gemma, block in ((False, 128), (True, 4096), (False, 16_384))
    ),
    *(
        (f"{name}, {activation}", kernel, {"ACTIVATION": activation, "BLOCK": pointwise.BLOCK}, pointwise.WARPS)
        for name, kernel in (("gated", pointwise.gated_kernel), ("gated backward", pointwise.gated_backward_kernel))
        for activation in ("silu", "gelu", "gelu_tanh")
    ),
]
TYPES = {
    "row_kernel": "X=*fp32 stride_x=i64 G=*half stride_g=i64 bias=*half labels=*i32 token_loss=*fp32 nll=*fp32 "
    "correct=*i8 V=i32 scale=fp32 cap=fp32 smoothing=fp32 z_loss=fp32",
    "tile_kernel": "X=*fp32 stride_x=i64 G=*half stride_g=i64 bias=*half labels=*i32 first=i32 width=i32 shift=*fp32 "
    "sum_exp=*fp32 max_logit=*fp32 z_sum=*fp32 factor=*fp32 scale=fp32 cap=fp32",
    "gather_kernel": "X=*half stride_row=i64 stride_column=i64 positions=*i32 out=*half T=i32 D=i32",
    "scatter_kernel": "U=*half positions=*i32 factors=*fp32 out=*half T=i32 D=i32",
    "document_kernel": "nll=*fp32 correct=*i8 bounds=*i32 out=*fp32",
    "count_kernel": "labels=*i64 documents=*i32 counts=*i32 T=i32 ignore=i32",
    "gated_kernel": "G=*half U=*half H=*half n=i64",
    "gated_backward_kernel": "D=*half G=*half U=*half DG=*half DU=*half n=i64",
    "rotate_kernel": "Q=*half K=*half OUT_Q=*half OUT_K=*half COS=*half SIN=*half q_token=i32 q_head=i32 k_token=i32 "
    "k_head=i32 H=i32 G=i32 size=i32 half=i32",
    "norm_backward_kernel": "X=*half DY=*half W=*half ROOT=*fp32 DX=*half D=i32",
    "compact_kernel": "labels=*i64 documents=*i32 ends=*i32 positions=*i32 kept_labels=*i32 "
    "kept_documents=*i32 T=i32 ignore=i32",
}


def resources(kernel: Any, constants: dict[str, Any], warps: int, capability: int, folder: Path) -> tuple[int, int]:
    """(registers per thread, bytes of stack and local memory: what is spilled)"""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # bfloat16 exists from sm_80 on.
    half = "*fp16" if capability < 80 else "*bf16"
    given = dict(pair.split("=") for pair in TYPES[kernel.__name__].split())
    signature = {name: half if kind == "*half" else kind for name, kind in given.items()}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([str(tool), "-res-usage", str(binary)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert found, report
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


# Triton 3.6 (torch 2.11) keeps two numbers of the tile kernel with all options in local memory, and from 3.8 on (torch
# 2.14) the backward of the widest norm on sm_120, where 32 warps leave a thread 64 registers.
ALLOWED = 0 if Version("3.7") <= Version(triton.__version__) < Version("3.8") else 8


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_spills(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for name, kernel, constants, warps in VARIANTS:
        registers, spilled = resources(kernel, constants, warps, capability, tmp_path)
        print(f"sm_{capability} {name}: {registers} registers, {spilled} bytes spilled")
        record_property(f"sm_{capability} {name}", registers)
        assert spilled <= ALLOWED, f"{name} spills {spilled} bytes on sm_{capability}"
        # 65,536 registers per multiprocessor: two blocks of eight warps run side by side up to 128.
        assert registers <= 128, f"{name} takes {registers} registers on sm_{capability}"
