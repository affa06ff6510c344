"""Says which tensors of a base in MXFP4 or FP8 hold one weight together, and what shape that weight has.

It is known from config.json and the headers of the files, so that a plan can count the weights without reading them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from qlora_sft.errors import ConfigError
from qlora_sft.json_types import JsonObject
from qlora_sft.model.base_files import Header, packed_method, quantization_of, text_config

_FP8 = ("F8_E4M3", "F8_E5M2")
# Of activations and of the cache, which are computed in 16 bits here.
_UNUSED = ("activation_scale", "input_scale", ".k_scale", ".v_scale", ".q_scale")


@dataclass(frozen=True)
class Part:
    """Describes one tensor of the model in 16 bits, and the tensors of the files that it is made of."""

    name: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    codes: str
    """The tensor of the files that holds it; packed if there are ``scales``."""
    scales: str | None = None
    block: tuple[int, int] = (0, 0)
    """Rows and columns of FP8 that share a scale; zeros for MXFP4."""

    @property
    def header(self) -> Header:
        """Returns what a safetensors file will say of the tensor."""
        bits = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "BF16": 16, "F16": 16, "I16": 16}.get(self.dtype, 8)
        return Header(self.dtype, self.shape, prod(self.shape) * bits // 8)


def layout_of(headers: Mapping[str, Header], settings: JsonObject) -> list[Part]:
    """Returns the tensors that a 16-bit model has in place of those of ``headers``, in their order.

    settings: config.json. Raises `ConfigError` for a weight that is packed in a way that is not known here.
    """
    text = text_config(settings)
    named = [str(part.get(key)) for part in (settings, text) for key in ("dtype", "torch_dtype")]
    dtype = "F16" if "float16" in named else "BF16"
    if packed_method(settings) == "mxfp4":
        return _mxfp4_layout(headers, dtype)
    block = quantization_of(settings).get("weight_block_size")
    return _fp8_layout(headers, dtype, block if isinstance(block, list) else None)


def _mxfp4_layout(headers: Mapping[str, Header], dtype: str) -> list[Part]:
    """Pairs NAME_blocks [experts, out, groups, bytes] with NAME_scales [experts, out, groups]."""
    parts = []
    for name, header in headers.items():
        if name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in headers:
            continue
        if not name.endswith("_blocks"):
            parts.append(Part(name, header.dtype, header.shape, name))
            continue
        plain = name.removesuffix("_blocks")
        scales = headers.get(f"{plain}_scales")
        if len(header.shape) != 4 or header.dtype != "U8" or scales is None or scales.shape != header.shape[:-1]:
            raise _unknown(name, header, scales)
        experts, rows, groups, size = header.shape
        parts.append(Part(plain, dtype, (experts, 2 * groups * size, rows), name, f"{plain}_scales"))
    return parts


def _fp8_layout(headers: Mapping[str, Header], dtype: str, block: list[int] | None) -> list[Part]:
    """Pairs every weight with its scales, one for each ``block`` of it or one for all."""
    companions = {
        name: next((name + end for end in ("_scale_inv", "_scale") if name + end in headers), None) for name in headers
    }
    used = {scales for scales in companions.values() if scales}
    parts = []
    for name, header in headers.items():
        if name in used or (name.endswith(_UNUSED) and prod(header.shape) == 1):
            continue
        scales = companions[name]
        if scales is None and header.dtype not in _FP8:
            parts.append(Part(name, header.dtype, header.shape, name))
            continue
        found = headers[scales] if scales else None
        if found is None or header.dtype not in _FP8 or len(header.shape) < 2:
            raise _unknown(name, header, found)
        each = _block_of(header.shape, found.shape, block)
        if each is None:
            raise _unknown(name, header, found)
        parts.append(Part(name, dtype, header.shape, name, scales, each))
    return parts


def _block_of(shape: tuple[int, ...], scales: tuple[int, ...], block: list[int] | None) -> tuple[int, int] | None:
    """Returns the rows and columns that share a scale; None if the scales do not fit the weight.

    The blocks at the edges may be smaller than the others.
    """
    if prod(scales) == 1:
        return shape[-2], shape[-1]
    if len(scales) != len(shape) or scales[:-2] != shape[:-2]:
        return None
    sizes = [
        _size(count, grid, each) for count, grid, each in zip(shape[-2:], scales[-2:], block or (0, 0), strict=True)
    ]
    return (sizes[0], sizes[1]) if all(sizes) else None


def _size(count: int, grid: int, block: int) -> int:
    """Returns how many of ``count`` values share one of ``grid`` scales; 0 if the numbers do not fit."""
    if grid == 1:
        return count
    if block:
        return block if -(-count // block) == grid else 0
    return count // grid if count % grid == 0 else 0


def _unknown(name: str, header: Header, scales: Header | None) -> ConfigError:
    beside = f"scales {scales.dtype} {list(scales.shape)}" if scales else "no scales that are known here"
    return ConfigError(
        f"model.path: {name} is {header.dtype} {list(header.shape)} with {beside}, which cannot be dequantised here; "
        "name the same model in 16 bits (a repository whose files are BF16)"
    )
