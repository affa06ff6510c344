"""Tells PEFT what to adapt in a mixture of experts, and reads what a saved adapter of one has adapted.

PEFT (0.21) takes gate_proj, up_proj and down_proj among the ``target_modules`` of such a model for the experts of
transformers 4, which had a layer each, and turns them into the stacks of transformers 5. The linear layers of these
names (shared experts, dense blocks) then get no adapter. So it does not learn here which family a model is of, and a
saved adapter names these layers' weights as ``target_parameters``, which any PEFT leaves as they are. The tensors of an
adapter have the same names either way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from qlora_sft.lora_from import with_weight
from qlora_sft.model.base import base_of
from qlora_sft.model.experts import decoder, peft_knows_experts, within_block
from qlora_sft.model.linears import MOVED, layers_prefix

if TYPE_CHECKING:
    from peft import PeftConfig

    from qlora_sft.model.base import CausalModel

WEIGHT = ".weight"


@contextmanager
def as_named(model: CausalModel) -> Iterator[None]:
    """Makes PEFT adapt exactly the layers of ``model`` that it is told to, inside the ``with`` block."""
    settings = model.config
    if not peft_knows_experts(model):
        yield
        return
    # PEFT asks for the family's name. It is an attribute of the class, which this attribute of the object hides.
    settings.model_type = ""
    try:
        yield
    finally:
        del settings.model_type


def write_portable_targets(model: CausalModel, folder: Path) -> None:
    """Lets the adapter that a PEFT model of a mixture has saved in ``folder`` name all its targets as parameters."""
    base = base_of(model)
    if not peft_knows_experts(base):
        return
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    targets = config["target_modules"] or ()
    layers = [
        path.removesuffix(".base_layer")
        for path, module in decoder(base).named_modules()
        if isinstance(module, nn.Linear) and path.endswith(".base_layer")
    ]
    # A pattern says that other parts of the model have layers of these names: then each layer is named in full.
    full = isinstance(targets, str)
    named = {path: layers_prefix(base) + path if full else within_block(path) for path in layers}
    weights = {named[path] + WEIGHT for path in layers if _last(path) in MOVED}
    kept = {named[path] if full else _last(path) for path in layers if _last(path) not in MOVED}
    config["target_modules"] = sorted(kept)
    config["target_parameters"] = sorted({*(config["target_parameters"] or ()), *weights})
    if weights:
        # PEFT looks for ranks and alphas by the names of the weights then, and knows no dropout, which is training's.
        for key in ("rank_pattern", "alpha_pattern"):
            config[key] = {with_weight(match): value for match, value in config[key].items()}
        config["lora_dropout"] = 0.0
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def read_targets(folder: Path) -> PeftConfig:
    """Reads PEFT's configuration of the adapter in ``folder``, and names linear layers as modules again.

    `write_portable_targets` has named their weights as parameters.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    named = set(config.target_parameters or ())
    layers = {name for name in named if name.endswith(WEIGHT)}
    if layers:
        modules = {name.removesuffix(WEIGHT) for name in layers}
        config.target_modules = {*(config.target_modules or ()), *modules}
        config.target_parameters = sorted(named - layers) or None
    return config
