"""Loads the base model in NF4 with LoRA adapters on every linear layer, through either backend."""

from __future__ import annotations

import contextlib
import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from qlora_kernels.cpu import bfloat16_products

from qlora_sft.config import Config, ModelConfig, RopeScaling
from qlora_sft.errors import ConfigError, first_line
from qlora_sft.model.backend import BackendName, fast_language_model
from qlora_sft.model.base import base_of
from qlora_sft.model.base_files import has_experts, hub_origin, read_config
from qlora_sft.model.base_folder import fetch_base
from qlora_sft.model.base_folder import resolve_base as resolve_base
from qlora_sft.model.base_tokenizer import saved_tokenizer
from qlora_sft.model.experts import in_nf4, stacks, target_parameters
from qlora_sft.model.head import check_frozen_head, quantize_head
from qlora_sft.model.linears import kept_in_full, peft_settings
from qlora_sft.model.meta_model import auto_class, meta_model
from qlora_sft.model.missing_weights import check_missing
from qlora_sft.model.peft_targets import as_named, read_targets
from qlora_sft.model.remote_code import check_folder, runs_code
from qlora_sft.model.rope import check_rope, scaled_config
from qlora_sft.model.run_base import described_base, run_base
from qlora_sft.model.sixteen_bit import copy_of
from qlora_sft.model.tokenizer import stop_token_ids
from qlora_sft.model.vocabulary import grow, new_rows, trainable_rows, trained_rows
from qlora_sft.run.folder import Run, is_run

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from qlora_sft.model.base import CausalModel


def compute_dtype(wanted: str) -> tuple[torch.dtype, str]:
    """Returns the type that the model computes in, and why."""
    if wanted != "auto":
        return getattr(torch, wanted), "as configured"
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"{torch.cuda.get_device_name()} has bfloat16"
        return torch.float16, f"{torch.cuda.get_device_name()} has no bfloat16; a gradient scaler keeps small gradients"
    faster, reason = bfloat16_products()
    return torch.bfloat16 if faster else torch.float32, reason


def load_model(config: Config, base: str, dtype: torch.dtype, backend: BackendName) -> PeftModel:
    """Loads the base, frozen, in NF4 or in ``dtype``, and adds LoRA adapters in float32, initialised with the seed.

    Returns a PeftModel in training mode. Raises `ConfigError` if the base cannot be loaded.
    """
    rows = new_rows(config.model, base)
    check_frozen_head(config.model, rows)
    try:
        load = _load_with_unsloth if backend == "unsloth" else _load_with_transformers
        model = load(config, base, dtype, rows)
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        raise ConfigError(f"model.path: cannot load {base}: {first_line(error)}") from None
    if config.model.rope_scaling is not None:
        check_rope(model, scaled_config(base, config.model.rope_scaling, config.model.trust_remote_code))
    compute_in(model, dtype)
    _name_base(model, config.model.path, base)
    model.config.use_cache = False
    disable_inference_repacking(model)
    return model


def _name_base(model: PeftModel, path: str, base: str) -> None:
    """Makes the adapter name its base by repository and commit, not by its place on this machine."""
    origin = hub_origin(path, base)
    if origin is not None:
        for adapter in model.peft_config.values():
            adapter.base_model_name_or_path, adapter.revision = path, origin.commit


def _load_with_unsloth(config: Config, base: str, dtype: torch.dtype, rows: list[int]) -> PeftModel:
    fast = fast_language_model()
    rope = config.model.rope_scaling
    trust = config.model.trust_remote_code
    scaling = {} if rope is None else {"rope_scaling": _rope_parameters(scaled_config(base, rope, trust))}
    # Unsloth says what it does on stdout, which belongs to --json; what matters of it is in the run's own report.
    # Its trainer switches every layer on or off by what it was told here: True, whatever the tiers will be.
    checkpointing = {"use_gradient_checkpointing": True}
    with contextlib.redirect_stdout(io.StringIO()):
        model, _ = fast.from_pretrained(
            base,
            max_seq_length=config.data.max_length,
            dtype=dtype,
            load_in_4bit=config.model.load_in_4bit,
            # Else well-known names become those of Unsloth's own repositories, quantised by others. (A base of the Hub
            # comes as the folder of its snapshot, in which there is no name to be mapped.)
            use_exact_model_name=True,
            trust_remote_code=runs_code(base, trust),
            **scaling,
            **checkpointing,
        )
        grow(model, rows, initialise=True)
        if config.model.head_in_4bit:
            quantize_head(model, dtype)
        return fast.get_peft_model(
            model,
            **peft_settings(model, config.lora),
            trainable_token_indices=trainable_rows(model, rows),
            **checkpointing,
            random_state=config.seed,
        )


def _load_with_transformers(config: Config, base: str, dtype: torch.dtype, rows: list[int]) -> PeftModel:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    from qlora_sft.model.experts_lora import use_experts_lora

    settings = config.model
    to_host = config.memory.base_shards > 1  # from where each process takes its share
    model = load_base(base, dtype, settings.load_in_4bit, settings.rope_scaling, settings.trust_remote_code, to_host)
    grow(model, rows, initialise=True)
    if config.model.head_in_4bit:
        quantize_head(model, dtype, own_device())
    # What peft.prepare_model_for_kbit_training does and is wanted here. Not wanted: its cast of every 16-bit weight
    # (the embedding!) to float32.
    model.requires_grad_(False)
    torch.manual_seed(config.seed)
    lora = PeftLoraConfig(
        **peft_settings(model, config.lora),
        target_parameters=target_parameters(model, config.lora) or None,
        trainable_token_indices=trainable_rows(model, rows),
        task_type="CAUSAL_LM",
    )
    with as_named(model):
        peft = get_peft_model(model, lora)
    use_experts_lora(peft)
    return peft


def load_base(
    base: str,
    dtype: torch.dtype,
    load_in_4bit: bool,
    rope: RopeScaling | None = None,
    trust: bool = False,
    to_host: bool = False,
) -> PreTrainedModel:
    """Loads the base in plain transformers, in NF4 with double quantisation or in ``dtype``, on a GPU if there is one.

    trust: code that the folder ``base`` brings along may be run. to_host: it is loaded into host memory; the GPU only
    quantises, one weight after the other, so the bits are those of a base that is loaded on it.
    """
    from qlora_sft.model.experts_scored import use_our_experts

    settings = scaled_config(base, rope, trust)
    options: dict[str, Any] = {} if rope is None else {"config": settings}
    # One that was saved in NF4 is loaded as it is.
    device = own_device()
    if load_in_4bit and not read_config(base).get("quantization_config"):
        kept = kept_in_full(meta_model(settings))
        options["quantization_config"] = _quantization(base, dtype, kept, device if to_host else None)
    model: PreTrainedModel
    model, told = auto_class(settings).from_pretrained(
        base,
        dtype=dtype,
        device_map="cpu" if to_host else device,
        trust_remote_code=runs_code(base, trust),
        output_loading_info=True,
        **options,
    )
    check_missing(told["missing_keys"], model, base)
    compute_in(model, dtype)
    use_our_experts(model)
    return model


def own_device() -> str:
    """Returns the device of this process; of several processes each has a GPU of its own."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def _quantization(base: str, dtype: torch.dtype, kept: list[str] | None, quantizes_on: str | None) -> Any:
    """Returns the settings for NF4 with double quantisation of all linear layers but those ``kept`` in full.

    If the base has experts, their stacks are quantised as well. quantizes_on: the device that quantises what is loaded
    into host memory; None if weights are quantised where they are.
    """
    from transformers import BitsAndBytesConfig

    config: Any = BitsAndBytesConfig
    if quantizes_on or has_experts(read_config(base)):
        from qlora_sft.model.experts_load import experts_config

        config = partial(experts_config, quantizes_on)
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def compute_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Has 4-bit layers compute in ``dtype``: a checkpoint in NF4 brings the type that it was made with."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype


def _rope_parameters(config: PretrainedConfig) -> dict[str, object]:
    parameters: dict[str, object] = config.get_text_config().rope_parameters
    return dict(parameters)


def load_trained_base(path: Path) -> PreTrainedModel:
    """Loads the base of a run as it was when training began, without the adapter.

    Type, quantisation and scaled positions are those of the run. Rows of new tokens are what they began as.
    """
    run = Run.open(path)
    dtype, _ = compute_dtype(run.dtype)
    settings = run.model
    folder = str(run_base(run))
    base = load_base(folder, dtype, settings.load_in_4bit, settings.rope_scaling, settings.trust_remote_code)
    # The adapter has its own; without it the base is asked as it was before training, not with rows drawn at random.
    grow(base, trained_rows(run.adapter), initialise=True)
    if run.model.head_in_4bit:
        quantize_head(base, dtype)
    disable_inference_repacking(base)
    return base


def load_for_inference(path: Path) -> CausalModel:
    """Loads the adapter of a run on the base that it was trained on, or a model folder.

    The model is one of plain transformers, in evaluation mode. A folder in MXFP4 or FP8 is written in 16 bits first, as
    it is for training.

    Raises `ConfigError` for a model folder that cannot be loaded.
    """
    if not is_run(path):
        check_folder(path)
        folder = copy_of(str(path.absolute()))
        fetch_base(folder)
        try:
            return load_base(folder, compute_dtype("auto")[0], load_in_4bit=False).eval()
        except (OSError, ValueError, ImportError, NotImplementedError) as error:
            raise ConfigError(f"{path}: cannot load the model: {first_line(error)}") from None
    base = load_trained_base(path)
    # The base's own list does not have the end of turn that a template brought.
    base.generation_config.eos_token_id = sorted(saved_stop_token_ids(path, saved_tokenizer(path / "adapter")))
    return with_adapter(base, path / "adapter")


def with_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Returns ``base`` with the adapter that is saved in ``folder``, in evaluation mode."""
    from peft import PeftModel

    from qlora_sft.model.experts_lora import use_experts_lora

    with as_named(base):
        model = PeftModel.from_pretrained(base, str(folder), config=read_targets(folder)).eval()
    use_experts_lora(model)
    return model


def saved_stop_token_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the tokens at which the model of a run, or the model in a folder, stops."""
    if not is_run(path):
        return stop_token_ids(ModelConfig(str(path)), str(path), tokenizer)
    run = Run.open(path)
    return stop_token_ids(run.model, described_base(run), tokenizer)


def quantized_modules(model: CausalModel) -> list[str]:
    """Returns the paths in the base model of all weights in NF4, which a merge has to send through NF4 too.

    They are linear layers, named as modules, and stacks of experts, named as parameters.
    """
    from bitsandbytes.nn import Linear4bit

    base = base_of(model)
    layers = [name.removesuffix(".base_layer") for name, layer in base.named_modules() if isinstance(layer, Linear4bit)]
    experts = [(path.replace(".base_layer", ""), name) for path, module, name in stacks(base) if in_nf4(module, name)]
    return layers + [f"{path}.{name}" for path, name in experts]


def disable_inference_repacking(model: CausalModel) -> None:
    """Keeps bitsandbytes from repacking NF4 weights for its AVX512 inference kernel.

    It does so in place at the first forward without gradients and never undoes it; every gradient afterwards is
    garbage (cosine with the right one: 0.009) while the loss looks plausible. One evaluation before training
    would ruin the run.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
