"""Decides whether Unsloth or plain transformers loads and patches the model, and says why."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any, Literal, NamedTuple

from qlora_sft.cache import cache_dir
from qlora_sft.errors import ConfigError

BackendName = Literal["unsloth", "transformers"]

# What Unsloth patches while it is imported, by its knowledge of their sources. It does not look at their versions: with
# a later one than it names it may be imported all the same, and compute something else.
PATCHED = ("transformers", "trl", "peft", "bitsandbytes", "torch")


class Backend(NamedTuple):
    """Names the backend, with the reason."""

    name: BackendName
    reason: str


def choose_backend(wanted: Literal["auto", "unsloth", "transformers"], obstacle: str = "") -> Backend:
    """Chooses the backend, and imports Unsloth if that is the choice.

    obstacle: why the run cannot be had with Unsloth; empty if it can. Call it before anything imports trl,
    transformers or peft: Unsloth patches them while it is imported. Raises `ConfigError` if
    Unsloth was asked for by name and cannot be had.
    """
    if wanted == "transformers":
        return Backend("transformers", "as configured")
    if obstacle:
        if wanted == "unsloth":
            raise ConfigError(f"model.backend=unsloth: {obstacle}; set model.backend=auto")
        return Backend("transformers", obstacle)
    fault = _import_unsloth()
    if fault is None:
        return Backend("unsloth", "as configured" if wanted == "unsloth" else "it is installed and imports")
    if wanted == "unsloth":
        raise ConfigError(
            f"model.backend=unsloth: {fault}. Install it, with what it is made for (pip install 'qlora-sft[unsloth]'), "
            "or set model.backend=transformers"
        )
    return Backend("transformers", f"Unsloth is not available: {fault}")


def expected_backend(wanted: Literal["auto", "unsloth", "transformers"], obstacle: str = "") -> Backend:
    """Returns what `choose_backend` will choose, without importing Unsloth: if it is there, it is taken to work."""
    if wanted == "transformers" or obstacle:
        return choose_backend(wanted, obstacle)
    fault = unsloth_fault()
    if fault:
        return Backend("transformers", f"Unsloth is not available: {fault}")
    return Backend("unsloth", "it is installed")


def unsloth_fault() -> str:
    """Says why Unsloth cannot be used, without importing it: it is not installed, or was made for other versions of
    what it patches than are here; "" if nothing is known against it."""
    if importlib.util.find_spec("unsloth") is None:
        return "not installed"
    from packaging.requirements import Requirement  # comes with transformers

    for demand in map(Requirement, _demands_of("unsloth")):
        if demand.name not in PATCHED or (demand.marker and not demand.marker.evaluate({"extra": ""})):
            continue
        found = version(demand.name)
        unmet = [str(each) for each in demand.specifier if not each.contains(found, prereleases=True)]
        if unmet:
            return f"it is made for {demand.name}{','.join(unmet)}, and {found} is installed"
    return ""


def _demands_of(package: str) -> list[str]:
    """Returns what a package says that it needs, as pip reads it; nothing for a folder on the path."""
    try:
        return requires(package) or []
    except PackageNotFoundError:
        return []


def _import_unsloth() -> str | None:
    """Imports Unsloth. Returns None, or in one line why it cannot be used."""
    if fault := unsloth_fault():
        return fault
    early = [name for name in ("trl", "peft", "transformers") if name in sys.modules]
    if early and "unsloth" not in sys.modules:
        return f"{early[0]} was imported before it, so its patches would be incomplete; choose the backend first"
    try:
        # It writes the code that it generates into the current folder unless it is told another place.
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir("unsloth")))
        # Its banner goes to stdout, which belongs to --json.
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module("unsloth")
    except (ImportError, NotImplementedError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    return None


def fast_language_model() -> Any:
    """Returns Unsloth's loader; `choose_backend` must have imported it."""
    return importlib.import_module("unsloth").FastLanguageModel
