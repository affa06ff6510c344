"""Fine-tune with QLoRA on one GPU, from chat data to a GGUF file that answers.

A whole run::

    from qlora_sft import evaluate_run, export_run, load_config, make_plan, plan_table, preview, train

    config = load_config("recipe.yaml", ["training.learning_rate=1e-4"])
    preview(config)                          # shows what is trained, token by token
    print(plan_table(make_plan(config)))     # what the run will need
    report = train(config)                   # writes the run folder that `output` names
    evaluate_run(config.output)              # asks the tasks of the configuration
    export_run(config.output, parity=True)   # merges, writes a GGUF file, and compares it

``with_rows`` takes rows from Python, ``curves`` draws a run in a notebook, ``merge_run`` only merges, and ``Run.open``
reads a run folder. ``render_conversation`` turns a conversation into token ids and labels; ``pack`` puts documents into
sequences. Every error is a `QloraSftError`: `ConfigError` and `DataError` are raised before anything is trained,
`RunError` and `Interrupted` later.

Each name is imported when it is first used, so ``import qlora_sft`` does not import torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_sft.config import Config as Config
    from qlora_sft.config import TaskConfig as TaskConfig
    from qlora_sft.config import load_config as load_config
    from qlora_sft.data.given import with_rows as with_rows
    from qlora_sft.data.packing import pack as pack
    from qlora_sft.data.render import Rendered as Rendered
    from qlora_sft.data.render import render_conversation as render_conversation
    from qlora_sft.errors import ConfigError as ConfigError
    from qlora_sft.errors import DataError as DataError
    from qlora_sft.errors import Interrupted as Interrupted
    from qlora_sft.errors import QloraSftError as QloraSftError
    from qlora_sft.errors import RunError as RunError
    from qlora_sft.evaluation.evaluate_run import evaluate_run as evaluate_run
    from qlora_sft.export.gguf import export_run as export_run
    from qlora_sft.export.merge import merge_run as merge_run
    from qlora_sft.page.notebook import curves as curves
    from qlora_sft.plan.plan import make_plan as make_plan
    from qlora_sft.plan.table import plan_table as plan_table
    from qlora_sft.preview import preview as preview
    from qlora_sft.run.folder import Run as Run
    from qlora_sft.run.report import RunReport as RunReport
    from qlora_sft.train import train as train

_HOMES = {
    "Config": "config",
    "ConfigError": "errors",
    "DataError": "errors",
    "Interrupted": "errors",
    "QloraSftError": "errors",
    "Rendered": "data.render",
    "Run": "run.folder",
    "RunError": "errors",
    "RunReport": "run.report",
    "TaskConfig": "config",
    "curves": "page.notebook",
    "evaluate_run": "evaluation.evaluate_run",
    "export_run": "export.gguf",
    "load_config": "config",
    "make_plan": "plan.plan",
    "merge_run": "export.merge",
    "pack": "data.packing",
    "plan_table": "plan.table",
    "preview": "preview",
    "render_conversation": "data.render",
    "train": "train",
    "with_rows": "data.given",
}
__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qlora_sft' has no attribute {name!r}")
    return getattr(import_module(f"qlora_sft.{_HOMES[name]}"), name)


class _Package(ModuleType):
    """Keeps a public function under its name when a module of the same name is imported.

    Importing a module binds it in its package. Without this, ``from qlora_sft import train`` would give the function or
    the module, depending on what was imported before.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
