"""QLoRA fine-tuning on one GPU, from chat data to a GGUF that answers.

The public names are loaded when they are first used: ``import qlora_sft`` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_sft.config import Config, load_config
    from qlora_sft.data.packing import pack
    from qlora_sft.data.render import Rendered, render_conversation
    from qlora_sft.errors import ConfigError, DataError, Interrupted, QloraSftError, RunError
    from qlora_sft.export.gguf import export_run
    from qlora_sft.export.merge import merge_run
    from qlora_sft.train import train

_HOMES = {
    "Config": "config",
    "ConfigError": "errors",
    "DataError": "errors",
    "Interrupted": "errors",
    "QloraSftError": "errors",
    "Rendered": "data.render",
    "RunError": "errors",
    "export_run": "export.gguf",
    "load_config": "config",
    "merge_run": "export.merge",
    "pack": "data.packing",
    "render_conversation": "data.render",
    "train": "train",
}
__all__ = list(_HOMES)  # noqa: PLE0604
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qlora_sft' has no attribute {name!r}")
    return getattr(import_module(f"qlora_sft.{_HOMES[name]}"), name)
