"""Loads the experts of a mixture in NF4, stack by stack: transformers and bitsandbytes quantise linear layers only.

This is a quantiser for transformers, which asks it about every parameter while it reads the files. So no more than one
stack exists in 16 bits at a time. Import this module only when the backend is chosen: it imports transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from qlora_sft.model.experts import (
    BLOCK,
    NESTED_BLOCK,
    SCALES,
    parts_of,
    router_names,
    stack_names,
    stack_shape,
    stacks,
)

METHOD = "nf4_with_experts"


class ExpertsConfig(BitsAndBytesConfig):  # type: ignore[misc]
    """Holds bitsandbytes' settings under the name of our own method, by which transformers finds `ExpertsQuantizer`."""

    def __init__(self, quantizes_on: str | None = None, **settings: Any):
        """Takes bitsandbytes' settings. quantizes_on: the device that quantises what is loaded into host memory."""
        settings.pop("quant_method", None)
        super().__init__(**settings)
        self.quantizes_on = quantizes_on
        self.quant_method = METHOD


class ExpertsQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """Quantises linear layers as bitsandbytes' 4-bit quantiser does, and stacks of experts too.

    The linear layers of routers stay as they are.
    """

    def get_modules_to_not_convert(self, model: Any, *args: Any, **kwargs: Any) -> list[str]:
        kept: list[str] = super().get_modules_to_not_convert(model, *args, **kwargs)
        return [*kept, *router_names(model)]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)
        for _, module, name in list(stacks(model)):
            scales = scale_shapes(stack_shape(module, name), parts_of(module, name))
            for scale in SCALES:
                module.register_buffer(f"{name}_{scale}", torch.empty(scales[scale], device="meta"))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return name in stack_names(module) or bool(super().param_needs_quantization(model, param_name, **kwargs))

    def get_quantize_ops(self) -> _Quantize:
        return _Quantize(self)


class _Quantize(Bnb4bitQuantize):  # type: ignore[misc]
    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        device = self.hf_quantizer.quantization_config.quantizes_on
        values = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        there = values if device is None else {key: value.to(device) for key, value in values.items()}
        done = self._quantized(there, full_layer_name, model, **kwargs)
        return done if device is None else {key: _to_host(value) for key, value in done.items()}

    def _quantized(
        self, values: dict[str, Tensor], full_name: str, model: nn.Module, **kwargs: object
    ) -> dict[str, Tensor]:
        module, name = get_module_from_name(model, full_name)
        if name not in stack_names(module):
            return dict(super().convert(values, full_layer_name=full_name, model=model, **kwargs))
        (value,) = values.values()
        packed, scales = quantized_stack(value, parts_of(module, name))
        module.nf4_dtype = getattr(module, name).dtype
        return {full_name: packed, **{f"{full_name}_{scale}": scales[scale] for scale in SCALES}}


def _to_host(value: Tensor) -> Tensor:
    """Returns a quantised weight, or what belongs to it, in host memory."""
    if not isinstance(value, nn.Parameter) or isinstance(value, Params4bit):
        moved: Tensor = value.to("cpu")
        return moved
    value.data = value.data.to("cpu")  # with what else the parameter says of itself
    return value


def quantize_experts(module: Any) -> None:
    """Replaces the stacks of a module of experts by their NF4 form."""
    for name in stack_names(module):
        weight = getattr(module, name)
        packed, scales = quantized_stack(weight.detach(), parts_of(module, name))
        module.nf4_dtype = weight.dtype
        setattr(module, name, packed)
        for scale in SCALES:
            module.register_buffer(f"{name}_{scale}", scales[scale])


def quantized_stack(weight: Tensor, parts: int) -> tuple[nn.Parameter, dict[str, Tensor]]:
    """Quantises a stack [E, R, C] and returns (packed values, scales as `experts.SCALES` names them), as in `NF4Stack`.

    parts: how many parts of each expert are quantised on their own.

    Raises ValueError if a part of an expert is no whole number of NF4's blocks.
    """
    count, rows, width = weight.shape
    if rows % parts or rows // parts * width % BLOCK:
        raise ValueError(f"experts of {rows} x {width} weights cannot be cut into NF4's blocks of {BLOCK}")
    packed, states = [], []
    for part in weight.reshape(count * parts, rows // parts, width):
        values, state = quantize_4bit(part, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        packed.append(values.view(-1))
        states.append(state)
    first = states[0]
    scales = {
        "absmax": torch.stack([state.absmax for state in states]),
        "nested_absmax": torch.stack([state.state2.absmax for state in states]),
        "offset": torch.stack([state.offset for state in states]),
        "code": first.code,
        "nested_code": first.state2.code,
    }
    parameter: Any = nn.Parameter(torch.stack(packed).view(count, -1), requires_grad=False)
    # PEFT looks here for the shape of a parameter that is kept in another form.
    parameter.ds_shape = torch.Size((count, rows, width))
    return parameter, scales


def scale_shapes(shape: tuple[int, int, int], parts: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of what `quantized_stack` makes beside the packed values of a stack of this shape.

    transformers looks at them while it loads, and refuses others than those that it was told before.
    """
    count, rows, width = shape
    blocks = rows // parts * width // BLOCK
    each = count * parts
    return {
        "absmax": (each, blocks), "nested_absmax": (each, -(-blocks // NESTED_BLOCK)), "offset": (each,),
        "code": (16,), "nested_code": (256,),
    }  # fmt: skip


def experts_config(quantizes_on: str | None, **settings: Any) -> ExpertsConfig:
    """Returns the settings that quantise a base with experts, to be given to ``from_pretrained``."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(ExpertsConfig)
        register_quantizer(METHOD)(ExpertsQuantizer)
    return ExpertsConfig(quantizes_on, **settings)
