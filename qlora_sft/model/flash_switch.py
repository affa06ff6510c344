"""Switches torch's FlashAttention kernels to those of version 3 or 4, where torch and a package have them.

torch keeps a table of implementations (`torch.nn.attention.activate_flash_attention_impl`) that take the place of its
own kernels in the whole process; varlen attention and trees of prefixes then run on them, too.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.attention

from qlora_sft.errors import ConfigError, first_line
from qlora_sft.model.attention import Way

# The name in torch's table, the package that must be there, and where it comes from.
IMPLEMENTATIONS: dict[Way, tuple[str, str, str]] = {
    "flash3": ("FA3", "flash_attn_interface", "FlashAttention 3, built from its repository"),
    "flash4": ("FA4", "flash_attn", "pip install flash-attn-4"),
}
# torch has all of them or, before the switch came, none.
SWITCHES = (
    "activate_flash_attention_impl", "restore_flash_attention_impl", "current_flash_attention_impl",
    "list_flash_attention_impls",
)  # fmt: skip


def installed_flash(library: Any = torch.nn.attention) -> list[Way]:
    """Returns the ways that torch can switch to here, as far as that is known without loading them.

    library: what holds torch's switch.
    """
    if not _has_switch(library):
        return []
    listed = library.list_flash_attention_impls()
    return [way for way, (name, package, _) in IMPLEMENTATIONS.items() if name in listed and find_spec(package)]


def switch_flash(way: Way, library: Any = torch.nn.attention) -> None:
    """Switches to the kernels of ``way``: those of flash3 or flash4, else torch's own.

    Raises `ConfigError` if they are not there.
    """
    current = library.current_flash_attention_impl() if _has_switch(library) else None
    if way not in IMPLEMENTATIONS:
        if current is not None:
            library.restore_flash_attention_impl()
        return
    name, _, source = IMPLEMENTATIONS[way]
    if not _has_switch(library) or name not in library.list_flash_attention_impls():
        raise ConfigError(f"model.attention={way}: torch {torch.__version__} cannot switch to it; set it to auto")
    if current == name:
        return
    try:
        library.activate_flash_attention_impl(name)
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise ConfigError(
            f"model.attention={way}: {first_line(error)}; install it ({source}) or set it to auto"
        ) from error


def _has_switch(library: Any) -> bool:
    return all(hasattr(library, name) for name in SWITCHES)
