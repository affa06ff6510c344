"""Make micro-batches of the packed sequences that the data loader hands over."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_sft.data.batch import Batch, flatten, replayed_of
from qlora_sft.data.render import Rendered
from qlora_sft.data.tree_batch import flatten_tree


class PackedCollator:
    """Turns ``[{"documents": [i, j]}, ...]``, micro-batches as the data loader hands them over, into a `Batch`."""

    def __init__(self, documents: Sequence[Rendered], shares_prefixes: bool = False, replay: str | None = None):
        """Takes the documents that the numbers mean. replay: the source whose documents stand by themselves, too."""
        self.documents, self.replay = documents, replay
        self.flatten = flatten_tree if shares_prefixes else flatten

    def __call__(self, sequences: list[dict[str, list[int]]]) -> Batch:
        documents = [self.documents[index] for each in sequences for index in each["documents"]]
        # An empty micro-batch keeps a process company that has nothing to do in a step.
        batch = self.flatten(documents) if documents else flatten([])
        if self.replay is not None and (replayed := replayed_of(documents, self.replay)):
            batch["replayed"] = replayed
        return batch
