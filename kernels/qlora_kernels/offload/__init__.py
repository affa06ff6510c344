"""Decides what each decoder layer keeps between its forward and its backward, and where, and moves it."""

from qlora_kernels.offload.checkpoint import ATTENTION_OPERATORS as ATTENTION_OPERATORS
from qlora_kernels.offload.checkpoint import layer_functions as layer_functions
from qlora_kernels.offload.engine import engine_for as engine_for
from qlora_kernels.offload.schedule import Schedule as Schedule
from qlora_kernels.offload.schedule import drop_failed_graphs as drop_failed_graphs
from qlora_kernels.offload.slab import HostSlab as HostSlab
from qlora_kernels.offload.tiers import LayerBytes as LayerBytes
from qlora_kernels.offload.tiers import Tier as Tier
from qlora_kernels.offload.tiers import TierChoice as TierChoice
from qlora_kernels.offload.tiers import choose_tiers as choose_tiers
from qlora_kernels.offload.tiers import describe as describe
from qlora_kernels.offload.tiers import gib as gib
from qlora_kernels.offload.tiers import peak_bytes as peak_bytes
from qlora_kernels.offload.tiers import slab_bytes as slab_bytes
