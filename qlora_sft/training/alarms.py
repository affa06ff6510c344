"""Watches a run for signs that it goes wrong, and warns of each of them once, with its cure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import fmean, pstdev

from qlora_sft.data.documents import Sizes
from qlora_sft.say import Say
from qlora_sft.training.evaluations import EvaluationRow
from qlora_sft.training.losses import RISE, StepLoss

# So many rises of the held-out loss in a row are hardly chance where it neither rises nor falls: once in 24 times.
RISES = 3
# Steps that a step is compared with, and how many have to be there.
WINDOW = 50
ENOUGH = 10
# A loss of so many standard deviations above theirs, and larger by this factor, is a spike.
DEVIATIONS = 6.0
JUMP = 1.25
VARIATION = 10
LOWEST_SHARE, HIGHEST_SHARE = 0.1, 0.9
# So large a share of answers that do not end is no chance.
ENDLESS = 0.25


class Alarms:
    """Looks at the steps and the evaluations of a run and collects its warnings."""

    def __init__(self, steps: int, describe: Callable[[int], str], say: Say):
        """Takes the number of ``steps`` of the run. ``describe`` says what a step, counted from 0, learned from."""
        self.steps, self.describe, self.say = steps, describe, say
        self.found: dict[str, tuple[int, str]] = {}
        """By kind of alarm, the step at which it was raised, and its text."""
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._fewest = self._most = (0, 0)

    @property
    def texts(self) -> list[str]:
        """Returns all warnings in the order of the steps at which they were due."""
        return [text for _, text in sorted(self.found.values())]

    def _raise(self, kind: str, step: int, text: str, quiet: bool) -> None:
        if kind in self.found:
            return
        self.found[kind] = (step, text)
        if not quiet:
            self.say(f"warning: {text}")

    def data(self, documents: Sizes, shares_prefixes: bool, quiet: bool = False) -> None:
        """Looks at the training data. Texts in which every token is supervised are meant to be so."""
        tokens, supervised = sum(documents.tokens), sum(documents.supervised)
        if tokens and supervised / tokens < LOWEST_SHARE:
            cure = "" if shares_prefixes else "; `supervise: turns` with data.share_prefixes trains more of each row"
            self._raise(
                "few supervised",
                0,
                f"only {supervised / tokens:.1%} of the tokens are supervised, and all of them are computed: shorter "
                f"prompts would train faster{cure}",
                quiet,
            )
        pairs = zip(documents.tokens, documents.supervised, strict=True)
        answered = [(tokens, supervised) for tokens, supervised in pairs if supervised < tokens - 1]
        tokens, supervised = sum(each for each, _ in answered), sum(each for _, each in answered)
        if tokens and supervised / tokens > HIGHEST_SHARE:
            self._raise(
                "much supervised",
                0,
                f"{supervised / tokens:.1%} of the tokens of conversations are supervised, so their prompts are short "
                "or trained as well; look at the masks with `preview`",
                quiet,
            )

    def step(self, number: int, step: StepLoss | None, supervised: int, quiet: bool = False) -> None:
        """Looks at a step: its loss, if it has one, and its supervised tokens."""
        if step is not None:
            self._spike(number, step.loss, quiet)
        if number < self.steps:  # the last one has what is left
            self._variation(number, supervised, quiet)

    def _spike(self, number: int, loss: float, quiet: bool) -> None:
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < ENOUGH:
            return
        mean, deviation = fmean(before), pstdev(before)
        if loss <= mean * JUMP or loss <= mean + DEVIATIONS * deviation:
            return
        far = f"{(loss - mean) / deviation:.0f} standard deviations" if deviation else "far"
        self._raise(
            "spike",
            number,
            f"the loss of step {number} is {loss:.3f}, {far} above the {len(before)} steps before it (mean "
            f"{mean:.3f}); look at its rows with `preview` ({self.describe(number - 1)}), and where it does not come "
            "down again lower training.learning_rate or training.max_grad_norm",
            quiet,
        )

    def _variation(self, number: int, supervised: int, quiet: bool) -> None:
        here = (supervised, number)
        self._fewest, self._most = (min(self._fewest, here), max(self._most, here)) if self._most[1] else (here, here)
        if self._most[0] <= VARIATION * self._fewest[0]:
            return
        self._raise(
            "variation",
            number,
            f"steps differ more than tenfold in their supervised tokens ({self._fewest[0]:,} in step "
            f"{self._fewest[1]}, {self._most[0]:,} in step {self._most[1]}), and each moves the weights as much; "
            "more training.gradient_accumulation makes them alike",
            quiet,
        )

    def evaluated(self, rows: Sequence[EvaluationRow], keeps_best: bool, quiet: bool = False) -> None:
        """Looks at all evaluations so far."""
        self._endless(rows, quiet)
        measured = [row for row in rows if row.mean is not None and math.isfinite(row.mean)]
        means = [row.mean for row in measured if row.mean is not None]
        last = means[-RISES - 1 :]
        if len(last) <= RISES or sorted(set(last)) != last or last[-1] <= RISE * min(means):
            return
        lowest = measured[means.index(min(means))]
        kept = "the best step is kept" if keeps_best else "training.keep=best keeps the best step"
        self._raise(
            "overfit",
            measured[-1].step,
            f"the held-out loss has risen in {RISES} evaluations in a row, to {means[-1]:.3f} at step "
            f"{measured[-1].step} from {min(means):.3f} at step {lowest.step}: what is still learned are the training "
            f"rows by heart. Fewer training.epochs, a lower training.learning_rate, lora.dropout or more rows help; "
            f"training.patience ends such a run, and {kept}",
            quiet,
        )

    def _endless(self, rows: Sequence[EvaluationRow], quiet: bool) -> None:
        """Warns of answers that do not end in two evaluations in a row. A model that is still learning to end them has
        fewer in the second one."""
        asked = [row for row in rows if row.tasks]
        if len(asked) < 2:
            return
        before, last = (row.endless or {} for row in asked[-2:])
        for name, share in last.items():
            if share >= ENDLESS and share >= before.get(name, 0.0) >= ENDLESS:
                self._raise(
                    "endless",
                    asked[-1].step,
                    f"{share:.0%} of the answers to {name} had not ended at their limit of tokens at step "
                    f"{asked[-1].step}, and no fewer than at step {asked[-2].step}: answers that never stop. Look with "
                    "`preview` whether the token that ends a turn is trained, name it in model.stop_tokens if the "
                    "template has another one, or raise max_new_tokens of the task if its answers are that long",
                    quiet,
                )
