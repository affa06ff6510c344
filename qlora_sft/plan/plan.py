"""Plans what a run will need before anything is loaded (``qlora-sft plan``)."""

from __future__ import annotations

from qlora_sft.config import Config
from qlora_sft.model.backend import choose_backend
from qlora_sft.plan.report import PlanReport
from qlora_sft.prepare import prepare, why_not_unsloth
from qlora_sft.say import Say, tell


def make_plan(config: Config, *, data: bool = True, timing: bool = True, say: Say = tell) -> PlanReport:
    """Returns what the run of ``config`` will need; `plan_table` makes it text.

    It reads config.json, the headers of the weights and, with ``data``, the training data, but no weights unless a
    source is to be rated with them (``quality: perplexity``). With ``timing`` one layer of the model's shape is
    measured for some seconds. Raises `ConfigError` or `DataError` as training would.
    """
    # As in training: Unsloth patches what follows while it is imported, and a later training needs it first.
    prepared = prepare(config, say) if data else None
    backend = prepared.backend if prepared else choose_backend(config.model.backend, why_not_unsloth(config))
    from qlora_sft.plan.needs import needs_of
    from qlora_sft.plan.workload import workload_of
    from qlora_sft.run_data import checked_base

    base = prepared.base if prepared else checked_base(config)
    workload = workload_of(prepared, config) if prepared else None
    return needs_of(config, base, backend, workload, timing, say)
