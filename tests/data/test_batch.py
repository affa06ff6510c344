import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_sft.config_data import DataConfig, TrainSourceConfig
from qlora_sft.data.batch import flatten
from qlora_sft.data.collate import PackedCollator
from qlora_sft.data.packing import pack
from qlora_sft.data.render import Rendered
from qlora_sft.data.sequences import plan_sequences

weight = st.sampled_from([0.0, 0.5, 1.0])
documents = st.lists(
    st.lists(st.tuples(st.integers(0, 99), weight), min_size=1, max_size=12).map(
        lambda pairs: Rendered([i for i, _ in pairs], [w for _, w in pairs], "s")
    ),
    min_size=1,
    max_size=8,
)


def expected_pairs(document: Rendered) -> list[tuple[int, int, float]]:
    """(token before, target, weight) of every supervised token that something predicts."""
    ids, weights = document.input_ids, document.weights
    return [(ids[i - 1], ids[i], weights[i]) for i in range(1, len(ids)) if weights[i] > 0]


@given(documents)
def test_labels_survive_packing(docs: list[Rendered]) -> None:
    sequences = pack([len(d.input_ids) for d in docs], 16)
    collate = PackedCollator(docs)
    found = []
    for each in sequences:
        batch = collate([{"documents": each}])
        ids = batch["input_ids"][0]
        for row, target, w in zip(batch["positions"].long(), batch["targets"], batch["position_weights"], strict=True):
            found.append((int(ids[row]), int(target), float(w)))
    assert sorted(found) == sorted(pair for d in docs for pair in expected_pairs(d))


@given(documents)
def test_the_flat_row_describes_its_documents(docs: list[Rendered]) -> None:
    batch = flatten(docs)
    bounds = batch["cu_seqlens"].tolist()
    assert batch["input_ids"][0].tolist() == [i for d in docs for i in d.input_ids]
    assert batch["position_ids"][0].tolist() == [p for d in docs for p in range(len(d.input_ids))]
    assert bounds == [0, *torch.tensor([len(d.input_ids) for d in docs]).cumsum(0).tolist()]
    assert batch["longest"] == max(len(d.input_ids) for d in docs)
    assert batch["n_supervised"] == len(batch["positions"]) == len(batch["targets"])
    assert batch["weight_sum"] == float(batch["position_weights"].sum())
    for row, document in zip(batch["positions"].tolist(), batch["position_documents"].tolist(), strict=True):
        # The token a row predicts lies in the row's own document.
        assert bounds[document] <= row < row + 1 < bounds[document + 1]


def test_the_order_depends_on_the_seed_alone_and_every_epoch_has_its_own() -> None:
    docs = [Rendered([1] * (1 + i % 9), [1.0] * (1 + i % 9), "s") for i in range(60)]
    config = DataConfig([TrainSourceConfig("s")], max_length=16, share_prefixes="off")
    planned = plan_sequences(docs, config, epochs=2, seed=3).sequences
    assert planned == plan_sequences(docs, config, epochs=2, seed=3).sequences
    assert planned != plan_sequences(docs, config, epochs=2, seed=4).sequences
    half = len(planned) // 2
    assert planned[:half] != planned[half:]
    for epoch in (planned[:half], planned[half:]):
        assert sorted(i for each in epoch for i in each) == list(range(60))
