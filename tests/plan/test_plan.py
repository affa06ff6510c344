"""The verb: one document, from headers and data alone, with training's own steps; its faults are those of training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from tests_support import bare_base

from qlora_sft.cli import main
from qlora_sft.errors import ConfigError
from qlora_sft.plan import needs, timing
from qlora_sft.plan.activations import sequence_bytes
from qlora_sft.plan.blueprint import read_blueprint
from qlora_sft.plan.plan import make_plan
from qlora_sft.plan.report import DevicePlan
from qlora_sft.plan.table import plan_table
from qlora_sft.units import size


def quiet(text: str) -> None:
    pass


def test_headers_are_all_it_reads_of_the_weights(make_config: MakeConfig, tiny_model: Path, tmp_path: Path) -> None:
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    for file in tiny_model.iterdir():
        (hollow / file.name).write_bytes(file.read_bytes())
    weights = (tiny_model / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")
    (hollow / "model.safetensors").write_bytes(weights[:header])
    whole = make_plan(make_config(), timing=False, say=lambda _: None)
    plan = make_plan(make_config(f"model.path={hollow}"), timing=False, say=lambda _: None)
    assert plan.resident == whole.resident
    assert plan.model.note == ""


def test_its_steps_and_tokens_are_those_of_the_training(make_config: MakeConfig) -> None:
    from qlora_sft.train import train

    config = make_config("training.max_steps=2", "training.batch_size=2", "evaluation.loss=false")
    plan = make_plan(config, timing=False, say=lambda _: None)
    report = train(config, say=lambda _: None)
    assert plan.data.steps == report.steps
    assert plan.data.tokens == report.tokens
    assert plan.data.supervised_tokens == report.supervised_tokens


def test_it_refuses_the_schedule_that_training_refuses(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="a warm-up of 9 steps would never reach the learning rate in a run of 2"):
        make_plan(make_config("training.max_steps=2", "training.warmup_steps=9"), timing=False, say=quiet)


@pytest.mark.parametrize(
    "overrides", [(), ("memory.tiled_mlp=off", "memory.policy=checkpoint"), ("memory.policy=offload",)]
)
def test_its_tiers_and_the_bytes_of_a_layer_are_those_of_the_training(
    make_config: MakeConfig, overrides: tuple[str, ...]
) -> None:
    from qlora_sft.model.memory import use_memory
    from qlora_sft.model.setup import prepare_model

    config = make_config("lora.r=4", *overrides)
    plan = make_plan(config, timing=False, say=quiet).this_run
    model = prepare_model(config, config.model.path, torch.float32, "transformers", plan.tokens, quiet)
    with use_memory(model, config, plan.tokens, torch.float32, quiet) as memory:
        report = memory.report
    assert plan.split == report.split
    assert plan.offloaded == report.host_bytes
    for name in ("input", "attention", "kept"):
        assert plan.layer[name] == report.layer[name]
    assert plan.layer["recomputed"] == (report.layer["recomputed"] or plan.layer["kept"])
    assert plan.layer["backward"] == pytest.approx(report.layer["backward"], rel=0.1)
    assert plan.activations == pytest.approx(report.device_bytes, rel=0.1)


@pytest.mark.parametrize("template", [[], ["model.chat_template=chatml"]])
def test_the_loss_takes_what_the_plan_says_also_with_trained_rows_of_the_head(
    template: list[str], make_config: MakeConfig, tmp_path: Path, small_tokenizer: Any
) -> None:
    from qlora_sft.model.memory import use_memory
    from qlora_sft.model.setup import prepare_model
    from qlora_sft.plan.activations import sequence_bytes
    from qlora_sft.plan.blueprint import read_blueprint

    base = bare_base(tmp_path / "base", small_tokenizer, tied=False, room=0)
    config = make_config(f"model.path={base}", *template)
    model = prepare_model(config, str(base), torch.float32, "transformers", 200, quiet)
    with use_memory(model, config, 200, torch.float32, quiet) as memory:
        measured = memory.between
    row = sequence_bytes(read_blueprint(config, str(base)), config.lora, torch.float32, on_gpu=False)
    assert row(200)[1] == measured


def test_a_second_is_enough_for_a_time_and_the_table_says_what_it_rests_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.2)
    plan = make_plan(make_config(), say=lambda _: None)
    assert plan.time.training > 0
    assert plan.time.measured.tokens <= plan.data.longest_row
    text = plan_table(plan)
    for part in ("from one layer measured here on a row of", "optimizer", "80 GB", "exact", "assumed"):
        assert part in text
    assert json.loads(json.dumps(plan.to_json())) == plan.to_json()


def test_the_measured_layer_attends_as_the_run_and_cards_take_its_loss(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[str] = []
    speed = timing.Speed(tokens=10, documents=1, forward=0.1, backward=0.2, loss=0.1, repeats=1)
    monkeypatch.setattr(needs, "measure", lambda *arguments: ways.append(arguments[-1]) or speed)
    plans = [make_plan(make_config(*each), say=quiet) for each in ([], ["model.attention=sdpa", "model.loss=torch"])]
    assert ways == ["varlen", "sdpa"]
    assert plans[0].choices["attention"].reason == "document by document, on a cpu, the only way there"
    blueprint = read_blueprint(make_config(), make_config().model.path)
    lora = make_config().lora
    triton, plain = (
        sequence_bytes(blueprint, lora, torch.bfloat16, True, False, path)(4096)[1] for path in ("triton", "torch")
    )
    assert triton != plain
    assert plans[0].cards.rows[0].tokens != plans[1].cards.rows[0].tokens


def test_a_base_that_is_cut_has_its_shards_in_the_table(make_config: MakeConfig) -> None:
    whole, cut = (
        make_plan(make_config(f"memory.base_shards={shards}"), data=False, timing=False, say=quiet) for shards in (1, 4)
    )
    held = cut.resident
    assert held.total - held.fetched < whole.resident.total  # of this model both layers are whole
    text = plan_table(cut)
    assert f"shards of the layers    {size(held.shards):>10}  one of 4, exact; so many cards train together" in text
    assert f"layers that are whole   {size(held.fetched):>10}  two at a time, exact" in text
    assert f"the whole base          {size(cut.host.base):>10}  before training" in text
    assert cut.host.base == whole.resident.nf4 + whole.resident.full
    assert "shards" not in plan_table(whole)


def test_an_embedding_that_a_gpu_leaves_in_host_memory_is_counted_there(
    tmp_path: Path, small_tokenizer: Any, make_config: MakeConfig
) -> None:
    base = bare_base(tmp_path / "base", small_tokenizer, tied=False, room=0)
    config = make_config(f"model.path={base}", "memory.offload_embeddings=true", "model.chat_template=null")
    embedding = needs._embedding(read_blueprint(config, str(base)), config, torch.bfloat16)
    assert embedding == 2 * len(small_tokenizer) * 64
    device = DevicePlan(device="a GPU", memory=2**33, tokens=10, split=None, reason="", peak=2**30)
    host = needs._host(None, device, True, 0, embedding)
    assert (host.device, host.embedding, host.total) == (0, embedding, needs.PROCESS_BYTES + embedding)
    here = needs._host(None, device, False, 0, embedding)  # on a CPU it is a part of the model
    assert (here.device, here.embedding, here.total) == (2**30, 0, needs.PROCESS_BYTES + 2**30)


def test_the_disk_has_room_for_what_a_run_leaves(make_config: MakeConfig, tmp_path: Path) -> None:
    """Adapter and checkpoints of a run, the tokenizer that each has among them, within 10%."""
    from qlora_sft.train import train

    config = make_config("training.max_steps=2", "training.save_steps=1", "evaluation.loss=false")
    disk = make_plan(config, timing=False, say=quiet).disk
    train(config, say=quiet)
    adapter, steps = (
        sum(file.stat().st_size for file in (tmp_path / "run" / name).rglob("*.*"))
        for name in ("adapter", "checkpoints")
    )
    assert disk.adapter == pytest.approx(adapter, rel=0.1)
    assert 2 * disk.checkpoints / 3 == pytest.approx(steps, rel=0.1)  # a third one may be half written


def test_the_command_prints_one_json_document(make_config: MakeConfig, tmp_path: Path, capsys: Any) -> None:
    make_config()
    assert main(["plan", str(tmp_path / "config.yaml"), "--json", "--no-data", "--no-time"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["data"] is None
    assert plan["time"] is None
    assert [row["gib"] for row in plan["cards"]["rows"]] == [8, 12, 16, 24, 48, 80]
    assert not (tmp_path / "run").exists()


def test_its_faults_are_those_of_the_configuration(make_config: MakeConfig, tmp_path: Path, capsys: Any) -> None:
    make_config()
    assert main(["plan", str(tmp_path / "config.yaml"), "data.max_length=4096", "--no-time"]) == 2
    assert "knows positions up to 2,048" in capsys.readouterr().err
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    assert main(["plan", str(tmp_path / "config.yaml"), f"model.path={tmp_path}", "--no-data"]) == 2
    assert "not a safetensors file" in capsys.readouterr().err


def test_sizes_have_three_digits() -> None:
    assert [size(n) for n in (0, 999, 1000, 1536 * 1024, 45 * 2**20, 616 * 2**20, 2**40)] == [
        "0 B", "999 B", "0.98 KiB", "1.50 MiB", "45.0 MiB", "616 MiB", "1024 GiB",
    ]  # fmt: skip
