"""Draw the curves of a run in a notebook, also while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qlora_sft.markup.style import piece
from qlora_sft.page.curves import held_out_chart, loss_chart, tasks_chart
from qlora_sft.page.facts import read_run
from qlora_sft.page.run_page import charts


@dataclass(frozen=True)
class Curves:
    """Holds the curves of a run, which a notebook shows."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def curves(folder: str | Path) -> Curves:
    """Draws the loss of every step, the held-out loss and the tasks of the run in ``folder``, also while it trains.

    Raises `ConfigError` if the folder is not that of a run.
    """
    run = read_run(folder)
    return Curves(piece(charts([held_out_chart(run), loss_chart(run), tasks_chart(run)])))
