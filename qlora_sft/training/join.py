"""Connects the processes that `torchrun` or `accelerate launch` has started. It imports torch only if there are
several."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from functools import cache

from qlora_sft.config import Config
from qlora_sft.errors import ConfigError
from qlora_sft.model.allocator import use_expandable_segments
from qlora_sft.parallel import Ranks, refuse, world_size

# Longest wait for another process within a step. One that has died is noticed at once.
TIMEOUT = timedelta(days=1)
# What `accelerate launch` sets for ways of training in parallel that are not ours.
OTHER_WAYS = {
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}  # fmt: skip


@cache
def join_ranks() -> Ranks:
    """Connects this process, once for its lifetime, with the others that its launcher has started.

    Raises `ConfigError` for a kind of parallel training that is not supported.
    """
    ways = [name for variable, name in OTHER_WAYS.items() if os.environ.get(variable, "").lower() in ("true", "1")]
    if ways:
        refuse(
            f"the launcher asks for {ways[0]}, which does not train here: processes share the rows (DDP), and where "
            "memory.base_shards=N asks for it they cut the base themselves. Start with `torchrun --nproc-per-node N`, "
            "or answer `accelerate config` with multi-GPU and nothing else"
        )
    if world_size() == 1:
        return Ranks()
    return _joined()


def check_shards(config: Config) -> None:
    """Raises `ConfigError` unless the number of processes is the number of shards that the base is to be cut into."""
    wanted, size = config.memory.base_shards, world_size()
    if wanted not in (1, size):
        refuse(
            f"memory.base_shards: the base is to be cut over {wanted} processes, and {size} "
            f"{'trains' if size == 1 else 'train'}; start `torchrun --nproc-per-node {wanted} -m qlora_sft.train ...`, "
            f"or set it to {size}"
        )


def _joined() -> Ranks:
    use_expandable_segments()
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or dist.is_initialized():
        found = f"{', '.join(missing)} missing" if missing else "a process group is there already"
        raise ConfigError(
            f"WORLD_SIZE={world_size()} says that several processes train together, and they cannot be connected "
            f"({found}); start them with torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    store, own, size = next(rendezvous("env://", timeout=TIMEOUT))
    backend = "gloo"
    if torch.cuda.is_available():
        local, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= cards:
            raise ConfigError(
                f"process {local + 1} of this machine has no GPU of its own: {cards} can be seen; start as many "
                f"processes as there are GPUs (torchrun --nproc-per-node {cards})"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    else:
        # accelerate would name it "cpu:0", to which torch cannot load the optimizer of a checkpoint.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    dist.init_process_group(backend, store=store, rank=own, world_size=size, timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)
    if own:
        _be_quiet()
    return Ranks(own, size, store)


def _be_quiet() -> None:
    """Silences libraries that would print the same in every process."""
    import logging
    import warnings

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
