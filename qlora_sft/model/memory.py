"""Measures, chooses, installs and prints what each decoder layer keeps between its forward and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from qlora_kernels.offload import (
    HostSlab,
    LayerBytes,
    Schedule,
    Tier,
    TierChoice,
    choose_tiers,
    describe,
    engine_for,
    gib,
    layer_functions,
    peak_bytes,
)  # fmt: skip
from qlora_kernels.packed_ce import HeadShape
from torch import nn

from qlora_sft.config import Config
from qlora_sft.errors import ConfigError
from qlora_sft.model.base import base_of, decoder_layers, has_unsloths_forward
from qlora_sft.model.ewc import ewc_bytes, shapes_of
from qlora_sft.model.head import loss_weight
from qlora_sft.model.layer_bytes import measure_layer
from qlora_sft.model.leash import leash_bytes
from qlora_sft.model.loss import path_of
from qlora_sft.model.loss_bytes import between_bytes, persistent_bytes, with_persistent
from qlora_sft.model.memory_budget import MemoryBudget, device_budget, host_budget
from qlora_sft.model.mlp import TiledMLP, set_recompute
from qlora_sft.model.norms import has_lean_norms
from qlora_sft.model.qkv import LeanAttention
from qlora_sft.parallel import rank
from qlora_sft.run.report import MemoryReport
from qlora_sft.say import Say

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel


class Memory:
    """Holds the tiers that are in force for a model.

    As a context it frees the host memory at its end, however that comes.
    """

    def __init__(self, model: CausalModel, config: Config, layer: LayerBytes, between: int, tokens: int, say: Say):
        self.model, self.config, self.layer, self.between, self.tokens, self.say = (
            model, config, layer, between, tokens, say,
        )  # fmt: skip
        self.choice: TierChoice | None = None
        """The split that is in force."""
        self.slab: HostSlab | None = None
        self.resident: dict[str, int] = {}
        """The bytes that the device held when training began; empty on a CPU."""
        self.measured: dict[str, int] | None = None
        """The most bytes that torch had allocated and reserved during the training, on a GPU."""

    def use(self, choice: TierChoice) -> None:
        """Installs the tiers, and says so."""
        if self.slab is not None:
            self.slab.close()
        self.slab = install(self.model, choice.tiers, self.tokens, self.layer.input, self.say)
        where = "GPU" if self.model.device.type == "cuda" else "CPU"
        host = f" and {gib(choice.host_bytes)} of host memory" if choice.host_bytes else ""
        self.say(
            f"memory: of {len(choice.tiers)} layers {describe(choice.tiers)} ({choice.reason}); "
            f"activations of {self.tokens:,} tokens take {gib(choice.gpu_bytes)} on the {where}{host}"
        )
        self.choice = choice

    @property
    def report(self) -> MemoryReport:
        """Returns what the manifest says about the tiers."""
        choice = self.choice
        assert choice is not None, "no tiers are installed yet"
        return MemoryReport(
            tiers=list(choice.tiers),
            split=describe(choice.tiers),
            reason=choice.reason,
            tokens=self.tokens,
            device_bytes=choice.gpu_bytes,
            host_bytes=choice.host_bytes,
            layer=asdict(self.layer),
            between=self.between,
            measured=self.measured,
        )

    def keep_less(self, why: str) -> bool:
        """Installs the split that takes least, whatever was chosen before, because the GPU was full after all.

        Returns False if that split is in force already. why: the reason, to be printed.
        """
        host = host_budget(self.config).nbytes if self.model.device.type == "cuda" else 0
        choice = _least(len(decoder_layers(self.model)), self.layer, self.between, host, why)
        if self.choice is not None and choice.tiers == self.choice.tiers:
            return False
        self.use(choice)
        return True

    def __enter__(self) -> Memory:
        for layer in decoder_layers(self.model):
            # Unsloth switches this off for an evaluation, and on again only when it trains.
            layer.gradient_checkpointing = True  # type: ignore[assignment]
        self.resident = device_peak(self.model.device, begin=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.resident:
            # Beside the plan's figures in the manifest, so that one run shows which of them falls short.
            self.measured = {"resident": self.resident["allocated"], **device_peak(self.model.device)}
        if self.slab is not None:
            self.slab.close()


def device_peak(device: torch.device, begin: bool = False) -> dict[str, int]:
    """Returns the most bytes that torch had allocated and reserved on a GPU since the last call with ``begin``.

    A call with ``begin`` starts the count anew. On a CPU the result is empty.
    """
    if device.type != "cuda":
        return {}
    if begin:
        torch.cuda.reset_peak_memory_stats(device)
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "card": torch.cuda.mem_get_info(device)[1],
    }


def use_memory(
    model: CausalModel, config: Config, tokens: int, dtype: torch.dtype, say: Say, tree: bool = False
) -> Memory:
    """Decides what every layer keeps for sequences of up to ``tokens``, and installs it. Call it before training.

    Raises `ConfigError` if the model cannot be checkpointed layer by layer, or if a configured budget is too small.
    """
    layers = decoder_layers(model)
    if config.memory.policy != "none":
        _require_checkpointing(layers, config)
    layer = measure_layer(model, tokens, dtype, tree, say)
    on_gpu = model.device.type == "cuda"
    settings, head = model.config.get_text_config(), loss_weight(base_of(model).get_output_embeddings())
    persistent = persistent_bytes(settings, tokens, dtype, on_gpu)
    if has_unsloths_forward(base_of(model)):
        persistent += layer.input  # the embedding's result, which `install` leaves a leaf of the graph
    layer = with_persistent(layer, persistent)
    between = between_bytes(settings, tokens, dtype, on_gpu, has_lean_norms(model), HeadShape.of(head), path_of(model))
    between += cast_bytes(model, dtype)
    if has_unsloths_forward(base_of(model)):
        between += layer.input
    if config.training.replay_kl is not None:
        between += leash_bytes(settings.vocab_size, settings.hidden_size, tokens, dtype)
    if config.training.ewc is not None and rank() == 0:  # of several processes the first one adds the penalty
        between += ewc_bytes(shapes_of(model))
    choice = choose(config, len(layers), layer, between, device_budget(model, config), on_gpu, say)
    memory = Memory(model, config, layer, between, tokens, say)
    memory.use(choice)
    return memory


def cast_bytes(model: CausalModel, dtype: torch.dtype) -> int:
    """Returns the bytes of LoRA's weights in 16 bits that autocast holds until the forward of the whole model is over,
    whatever its layers keep. The tiled MLP and lean attention make their own and drop them."""
    if dtype.itemsize != 2:
        return 0
    modules = [module for layer in decoder_layers(model) for module in layer.modules()]
    ours = {id(p) for module in modules if isinstance(module, TiledMLP | LeanAttention) for p in module.parameters()}
    lora = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name and id(p) not in ours]
    values: int = sum(p.numel() for p in lora)
    return values * dtype.itemsize


def choose(
    config: Config, n_layers: int, layer: LayerBytes, loss: int, budget: MemoryBudget, on_gpu: bool, say: Say
) -> TierChoice:
    """Chooses the tier of every layer by ``memory.policy``.

    loss: the bytes between forward and backward.
    """
    policy = config.memory.policy
    if policy == "auto":
        return _choose_by_budget(config, n_layers, layer, loss, budget, on_gpu, say)
    tiers = _repeat("keep" if policy == "none" else "checkpoint", n_layers)
    reason = f"memory.policy={policy}"
    if policy == "offload":
        host = host_budget(config)
        offloaded = min(n_layers, host.nbytes // layer.input)
        # The first layers wait longest for their backward.
        tiers[:offloaded] = _repeat("offload", offloaded)
        if offloaded < n_layers:
            reason += f"; host memory holds the inputs of {offloaded} layers ({host.reason})"
    return _choice(tiers, layer, loss, reason)


def _choose_by_budget(
    config: Config, n_layers: int, layer: LayerBytes, loss: int, budget: MemoryBudget, on_gpu: bool, say: Say
) -> TierChoice:
    """Chooses the fastest tiers that fit the budget."""
    if config.memory.gpu_budget_gib is not None and not on_gpu:
        say("memory.gpu_budget_gib has no effect here: the model is on the CPU")
    # On a CPU host and device are the same memory: to copy an input there would only cost time.
    host = host_budget(config).nbytes if on_gpu else 0
    try:
        choice = choose_tiers(n_layers, layer, budget.nbytes, host, loss=loss)
    except ValueError as error:
        if on_gpu and (config.memory.gpu_budget_gib is not None or config.memory.host_budget_gib is not None):
            raise ConfigError(
                f"memory: {error} ({budget.reason}). Shorten data.max_length, lower training.batch_size, or raise "
                "memory.gpu_budget_gib or memory.host_budget_gib"
            ) from None
        # What is free is known only roughly; what was not forbidden is tried.
        say(
            f"memory: {error} ({budget.reason}); trying the least that is possible. If it fails, shorten "
            "data.max_length"
        )
        return _least(n_layers, layer, loss, host, "the least memory that is possible")
    return _choice(choice.tiers, layer, loss, f"{choice.reason}: {budget.reason}")


def _least(n_layers: int, layer: LayerBytes, loss: int, host: int, reason: str) -> TierChoice:
    """Returns the split with as many inputs in host memory as ``host`` bytes hold, and the others on the device."""
    offloaded = min(n_layers, host // layer.input)
    tiers = _repeat("offload", offloaded) + _repeat("checkpoint", n_layers - offloaded)
    return _choice(tiers, layer, loss, reason)


def _repeat(tier: Tier, count: int) -> list[Tier]:
    return [tier] * count


def _choice(tiers: Sequence[Tier], layer: LayerBytes, loss: int, reason: str) -> TierChoice:
    """Returns a split with what it takes."""
    return TierChoice(tuple(tiers), peak_bytes(tiers, layer, loss), tiers.count("offload") * layer.input, reason)


def install(model: CausalModel, tiers: Sequence[Tier], tokens: int, input_bytes: int, say: Say) -> HostSlab | None:
    """Sets how each layer of ``model`` is run. Takes the host memory that it needs, and returns it."""
    base = base_of(model)
    slab = schedule = None
    if "offload" in tiers:
        slab = HostSlab(tiers.count("offload"), input_bytes, model.device)
        if slab.warning:
            say(f"memory: {slab.warning}")
        schedule = Schedule(slab, engine_for(model.device), warn=say)
    functions = layer_functions(tiers, schedule)
    for layer, tier, function in zip(decoder_layers(model), tiers, functions, strict=True):
        set_recompute(layer, tier != "keep", tokens)
        layer._gradient_checkpointing_func = function  # type: ignore[assignment]
        # Also where everything is kept: Unsloth switches this on again in every layer before it trains.
        layer.gradient_checkpointing = True  # type: ignore[assignment]
    if not has_unsloths_forward(base):
        # Only reentrant checkpointing needs a gradient of the embedding's result, which would be a leaf of the graph
        # and stay on the device until the backward is over. With Unsloth's forward a step without it fails (H200).
        base.disable_input_require_grads()
    elif any(tier != "keep" for tier in tiers):
        base.enable_input_require_grads()
    return slab


def _require_checkpointing(layers: Sequence[nn.Module], config: Config) -> None:
    """Raises `ConfigError` if a layer cannot be checkpointed."""
    lacking = sorted({type(layer).__name__ for layer in layers if not hasattr(layer, "gradient_checkpointing")})
    if lacking:
        raise ConfigError(
            f"memory.policy={config.memory.policy}: {', '.join(lacking)} cannot be checkpointed (it is no "
            "GradientCheckpointingLayer of transformers); set memory.policy=none"
        )
