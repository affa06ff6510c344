"""Computes the cross-entropy of the supervised positions of a packed sequence, straight from the hidden states."""

from qlora_kernels.packed_ce.backend import PathChoice, PathName, choose_path
from qlora_kernels.packed_ce.function import CEOutput, packed_linear_cross_entropy
from qlora_kernels.packed_ce.head import NF4Head, PatchedHead
from qlora_kernels.packed_ce.reference import reference_linear_cross_entropy
from qlora_kernels.packed_ce.targets import Targets
from qlora_kernels.packed_ce.workspace import HeadShape, backward_bytes, workspace_bytes

__all__ = [
    "CEOutput",
    "HeadShape",
    "NF4Head",
    "PatchedHead",
    "PathChoice",
    "PathName",
    "Targets",
    "backward_bytes",
    "choose_path",
    "packed_linear_cross_entropy",
    "reference_linear_cross_entropy",
    "workspace_bytes",
]
