"""A base without a chat template and without its control tokens: they are added, trained, saved and found again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from qlora_kernels.packed_ce import PatchedHead
from tests_support import bare_base, with_unsloth

from qlora_sft.config import Config
from qlora_sft.data.batch import flatten
from qlora_sft.data.render import Rendered
from qlora_sft.model.attention import use_document_attention
from qlora_sft.model.head import loss_weight
from qlora_sft.model.load import load_for_inference, load_model
from qlora_sft.model.loss import batch_loss
from qlora_sft.model.tokenizer import load_tokenizer, stop_token_ids
from qlora_sft.model.vocabulary import new_rows
from qlora_sft.train import train

NEW = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def configured(make_config: Any, base: Path, *more: str) -> Config:
    config: Config = make_config(
        f"model.path={base}", "model.chat_template=llama3", "training.learning_rate=1e-2", "data.max_length=512", *more
    )
    return config


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=torch.tensor([ids])).logits
    return result


@pytest.mark.parametrize("room", [0, 8], ids=["grown", "in unused rows"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_control_tokens_are_trained_saved_and_found_again(
    make_config: Any, tmp_path: Path, small_tokenizer: Any, tied: bool, room: int
) -> None:
    from transformers import AutoModelForCausalLM

    base = bare_base(tmp_path / "base", small_tokenizer, tied, room)
    config = configured(make_config, base, "training.max_steps=2")
    said: list[str] = []
    train(config, say=said.append)
    assert f"vocabulary: {', '.join(NEW)} added, because chat_template=llama3 writes them" in "\n".join(said)
    run = tmp_path / "run"
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    first = len(small_tokenizer)
    rows = [first, first + 1, first + 2]
    assert all(each == rows for each in adapter["trainable_token_indices"].values())
    # Some kilobytes of rows, not a second embedding.
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_size < 400_000

    trained = load_for_inference(run)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(model, layer)().weight for model in (plain, trained.get_base_model()))
        assert torch.equal(after[:first], before[:first])
        assert ((after[rows] - before[:first].mean(0)).abs().amax(1) > 1e-4).all()
        # The model never has to write the header's tokens: in a head of its own nothing tells them apart.
        assert len(torch.unique(after[rows], dim=0)) == (3 if tied or layer == "get_input_embeddings" else 2)


def test_what_was_saved_computes_what_was_trained(make_config: Any, tmp_path: Path, small_tokenizer: Any) -> None:
    from qlora_sft.training.run_folder import save_adapter

    base = bare_base(tmp_path / "base", small_tokenizer, tied=False, room=0)
    config = configured(make_config, base, "training.max_steps=1")
    train(config, say=lambda _: None)
    tokenizer = load_tokenizer(config.model, str(base))
    model = load_model(config, str(base), torch.float32, "transformers")
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_adapter(model, tokenizer, tmp_path / "run" / "shaken")
    (tmp_path / "run" / "adapter").rename(tmp_path / "run" / "first")
    (tmp_path / "run" / "shaken").rename(tmp_path / "run" / "adapter")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "why?"}], return_dict=False)
    assert set(ids) & set(tokenizer.convert_tokens_to_ids(NEW))
    torch.testing.assert_close(logits(load_for_inference(tmp_path / "run"), ids), logits(model, ids))


@pytest.mark.parametrize("room", [0, 8], ids=["grown", "in unused rows"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_merge_has_them_too(make_config: Any, tmp_path: Path, small_tokenizer: Any, tied: bool, room: int) -> None:
    from transformers import AutoModelForCausalLM

    from qlora_sft.export.merge import merge_run

    base = bare_base(tmp_path / "base", small_tokenizer, tied, room)
    config = configured(make_config, base, "training.max_steps=2")
    train(config, say=lambda _: None)
    merge_run(tmp_path / "run", say=lambda _: None)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32)
    tokenizer = load_tokenizer(config.model, str(base))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "why?"}], return_dict=False)
    torch.testing.assert_close(logits(merged, ids), logits(load_for_inference(tmp_path / "run"), ids))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_gradient_of_the_new_rows_is_that_of_the_whole_head(
    make_config: Any, tmp_path: Path, small_tokenizer: Any, tied: bool
) -> None:
    """And the loss never sees a copy of the head with the rows put in, whose gradient would be as large."""
    base = bare_base(tmp_path / "base", small_tokenizer, tied, room=0)
    config = configured(make_config, base)
    model = load_model(config, str(base), torch.float32, "transformers")
    assert isinstance(loss_weight(model.get_base_model().get_output_embeddings()), PatchedHead)
    rows = new_rows(config.model, str(base))
    ids = [5, *rows, 17, rows[1], 40, 3, rows[2]]
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data += 0.05 * torch.randn_like(parameter)

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, trained)]

    logits = model(input_ids=torch.tensor([ids])).logits[0]
    theirs = gradients(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])))
    use_document_attention(model)
    ours = gradients(batch_loss(model, flatten([Rendered(ids, [1.0] * len(ids), "s")])).loss)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_new_rows_begin_as_the_mean_in_both_matrices(make_config: Any, tmp_path: Path, small_tokenizer: Any) -> None:
    base = bare_base(tmp_path / "base", small_tokenizer, tied=False, room=0)
    model = load_model(configured(make_config, base), str(base), torch.float32, "transformers")
    rows = new_rows(configured(make_config, base).model, str(base))
    for layer in (model.get_base_model().get_input_embeddings(), model.get_base_model().get_output_embeddings()):
        mean = layer.weight[: min(rows)].mean(0)
        torch.testing.assert_close(layer.weight[rows], mean.expand(3, -1))


def test_the_end_of_turn_stops_generation_and_is_the_saved_eos(
    make_config: Any, tmp_path: Path, small_tokenizer: Any
) -> None:
    from transformers import AutoTokenizer

    base = bare_base(tmp_path / "base", small_tokenizer, tied=True, room=0)
    (tmp_path / "plain.txt").write_text("A plain text.\n")
    config = configured(
        make_config, base, "training.max_steps=1", f"data.replay={{path: {tmp_path / 'plain.txt'}, share: 0.5}}"
    )
    tokenizer = load_tokenizer(config.model, str(base))
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert stop_token_ids(config.model, str(base), tokenizer) == {end, 0}
    train(config, say=lambda _: None)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").eos_token == "<|eot_id|>"
    assert load_for_inference(tmp_path / "run").generation_config.eos_token_id == [0, end]


def test_a_plain_text_still_ends_in_the_bases_own_eos(make_config: Any, tmp_path: Path, small_tokenizer: Any) -> None:
    from qlora_sft.data.render import render_conversation

    base = bare_base(tmp_path / "base", small_tokenizer, tied=True, room=0)
    tokenizer = load_tokenizer(configured(make_config, base).model, str(base))
    assert render_conversation({"text": "x"}, tokenizer).input_ids[-1] == 0


def test_nothing_is_added_where_nothing_is_missing(make_config: Any, tiny_model: Path) -> None:
    config = make_config("model.chat_template=chatml")
    assert new_rows(config.model, str(tiny_model)) == []
    model = load_model(config, str(tiny_model), torch.float32, "transformers")
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_the_new_rows_are_those_of_the_tokenizer_that_is_there_now(
    make_config: Any, tmp_path: Path, small_tokenizer: Any
) -> None:
    """In a notebook the tokens may be added to the base in the same folder, between two runs."""
    base = bare_base(tmp_path / "base", small_tokenizer, tied=True, room=8)
    model = configured(make_config, base).model
    assert len(new_rows(model, str(base))) == len(NEW)
    load_tokenizer(model, str(base)).save_pretrained(base)
    assert new_rows(model, str(base)) == []


def test_a_base_without_a_template_is_told_which_to_name(
    make_config: Any, tmp_path: Path, small_tokenizer: Any
) -> None:
    from qlora_sft.errors import DataError

    base = bare_base(tmp_path / "base", small_tokenizer, tied=True, room=0)
    with pytest.raises(DataError, match=r"no chat template; name one, e\.g\. model\.chat_template=chatml-think"):
        train(make_config(f"model.path={base}"), say=lambda _: None)


UNSLOTH = """
import sys
from qlora_sft.config import load_config
from qlora_sft.train import train
train(load_config(sys.argv[1], sys.argv[2:]))
"""


@with_unsloth
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"])
def test_unsloth_trains_them_as_well(make_config: Any, tmp_path: Path, small_tokenizer: Any, tied: bool) -> None:
    base = bare_base(tmp_path / "base", small_tokenizer, tied=tied, room=0)
    make_config()
    overrides = [
        f"model.path={base}", "model.chat_template=llama3", "model.backend=unsloth", "training.max_steps=1",
        "data.max_length=512", "training.learning_rate=1e-2",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", UNSLOTH, str(tmp_path / "config.yaml"), *overrides],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    trained = load_for_inference(tmp_path / "run").get_base_model()
    assert len(torch.unique(trained.get_input_embeddings().weight[-3:], dim=0)) == 3
    assert len(torch.unique(trained.get_output_embeddings().weight[-3:], dim=0)) >= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_beside_the_embedding_change_nothing_and_copy_no_embedding(
    make_config: Any, tmp_path: Path, small_tokenizer: Any, tied: bool, dtype: torch.dtype
) -> None:
    from qlora_sft.model.layer_bytes import memory_use
    from qlora_sft.model.trained_rows import use_rows_beside_embedding

    base = bare_base(tmp_path / "base", small_tokenizer, tied, room=20_000)
    config = configured(make_config, base)
    model = load_model(config, str(base), dtype, "transformers")
    use_document_attention(model)
    rows = new_rows(config.model, str(base))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    batch = flatten([Rendered([5, *rows, 17, rows[1], 40, 3, rows[2], rows[2]], [1.0] * 10, "s")])

    def gradients() -> tuple[list[torch.Tensor], int]:
        with memory_use(torch.device("cpu")) as use:
            loss = batch_loss(model, batch).loss
            found = [loss.detach(), *torch.autograd.grad(loss, list(trained.values()))]
            return found, use.peak()

    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        theirs, much = gradients()
        names = set(model.state_dict())
        assert use_rows_beside_embedding(model)
        ours, little = gradients()
    assert set(model.state_dict()) == names
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {*trained}
    embedding = model.get_base_model().get_input_embeddings().original_module.weight
    assert little < embedding.nbytes < much
    # In bfloat16 PEFT sums the gradient of a row in bfloat16, where one token after the other is rounded away.
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 0.02, "atol": 1e-3}
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, **tolerance)
