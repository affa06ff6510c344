"""Reports what a run has achieved: figures before and after training, as data and as text."""

from __future__ import annotations

from itertools import zip_longest

from qlora_sft.evaluation.evaluate import Evaluation
from qlora_sft.run.report import Pair, RunReport

# Characters that are shown of what was asked: its end, which is the last message, as the template has it.
ASKED = 160


def pair(before: dict[str, float], after: dict[str, float]) -> dict[str, Pair]:
    """Returns for every source its figure before and after training; no source that was not measured after it."""
    return {source: Pair(before.get(source), after[source]) for source in after}


def summary(report: RunReport, before: Evaluation, after: Evaluation, show: int) -> str:
    """Returns the report as text: some answers before and after, taken from every source in turn, then the table."""
    lines = []
    pairs = list(zip(before.records, after.records, strict=True)) if before.records and after.records else []
    by_source = [[p for p in pairs if p[1]["source"] == source] for source in after.exact_match]
    in_turn = [p for group in zip_longest(*by_source) for p in group if p is not None]
    for old, new in in_turn[:show]:
        lines += [f"[{new['source']}] asked: {_end(new['prompt'])!r}", f"  wanted: {new['reference']!r}"]
        lines += [f"  before: {old['answer']!r}", f"  after:  {new['answer']!r}"]
    if report.loss or report.exact_match:
        lines.append(f"{'source':<16}{'held-out loss':>24}{'exact match':>22}")
    for source in report.loss or report.exact_match:
        loss, match = report.loss.get(source), report.exact_match.get(source)
        losses, matches = _change(loss, ".3f"), _change(match, ".0%")
        lines.append(f"{source:<16}{losses:>24}{matches:>22}")
    course = report.train_loss
    means = f" (means of the first {course.first_steps} and the last {course.last_steps} steps)"
    lines.append(
        f"{report.steps} steps, {report.tokens:,} tokens ({report.supervised_tokens:,} supervised), "
        f"{report.tokens_per_second:.0f} tokens/s, loss {course.first:.3f} -> {course.last:.3f}"
        + (means if report.steps > 1 else "")
    )
    if course.rose:
        lines.append(
            f"the training loss rose (it was {course.base:.3f} at the first step, before any update): where that is "
            "more than noise between steps, the model is worse at its training data than before. Lower "
            "training.learning_rate, and look at the rows with `preview`"
        )
    return "\n".join(lines)


def _end(text: str) -> str:
    return text if len(text) <= ASKED else f"...{text[-ASKED:]}"


def _change(figures: Pair | None, form: str) -> str:
    """Returns a figure before and after training as text, or what there is of it."""
    if figures is None:
        return "not measured"
    after = format(figures.after, form)
    return after if figures.before is None else f"{figures.before:{form}} -> {after}"
