"""Two processes train what one would: the same steps, and all that may happen to a run happens to both."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import configured, conversation, layers_of_width_64, write_rows
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests_support import result

from qlora_sft.config import load_config
from qlora_sft.errors import ConfigError
from qlora_sft.find_rate import find_rate
from qlora_sft.parallel import Ranks
from qlora_sft.run.folder import Run
from qlora_sft.train import train
from qlora_sft.training.checkpoints import all_checkpoints, find_checkpoint
from qlora_sft.training.join import check_shards, join_ranks
from qlora_sft.training.steps import Deal, deal, describe_deal, longest_dealt, micro_batches

CHILD = Path(__file__).with_name("parallel_child.py")
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip


class Launched(NamedTuple):
    """Holds what two processes have left behind."""

    folder: Path
    config: Any
    stdout: str
    stderr: str

    def told(self, run: str, process: int) -> list[dict[str, Any]]:
        """What a process was told, and how each of its parts ended."""
        return [json.loads(line) for line in (self.folder / f"{run}.{process}.jsonl").read_text().splitlines()]


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(CHILD.parents[1]), os.environ.get("PYTHONPATH", "")])  # where tests_support is
    environment = {**os.environ, "PYTHONPATH": path}
    command = (sys.executable, "-m", *command)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, short_tokenizer: Any) -> Launched:
    """Nine rows in steps of four: in the last step the second process has nothing to do."""
    folder = tmp_path_factory.mktemp("parallel")
    make = configured(folder, layers_of_width_64(folder / "model", short_tokenizer, 3))
    settings = ["data.packing=none", "training.gradient_accumulation=4", "training.learning_rate=1e-2"]
    settings.append("model.load_in_4bit=true")
    config = make(*settings, rows=[conversation(number, 1 + number % 2) for number in range(9)])
    file = folder / "config.yaml"
    file.write_text(
        file.read_text()
        .replace("max_length: 256", "max_length: 256, packing: none")
        .replace("load_in_4bit: false", "load_in_4bit: true")
        + "training: {gradient_accumulation: 4, learning_rate: 1e-2}\n"
    )
    held_out = write_rows(folder / "held_out.jsonl", [conversation(50), conversation(51)])
    write_rows(folder / "replay.jsonl", [conversation(60), conversation(61)])
    done = launch(*TORCHRUN, str(CHILD), str(file), str(held_out))
    assert done.returncode == 0, done.stderr
    return Launched(folder, config, done.stdout, done.stderr)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_do_the_steps_of_one(launched: Launched) -> None:
    train(launched.config, say=lambda _: None)
    one, two = Path(launched.config.output), launched.folder / "two"
    assert len(losses(one)) == 3
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    rows = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in (one, two)]
    assert rows[0]["supervised_tokens"] == rows[1]["supervised_tokens"]
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-5)
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two)]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-3, atol=2e-5, msg=name)


def test_two_processes_with_half_of_the_base_each_do_the_same(launched: Launched) -> None:
    """In the last step the second one has nothing to compute, and has to help all the same."""
    assert [part["ended"] for process in (0, 1) for part in launched.told("two_cut", process)] == ["3 steps"] * 2
    assert result(launched.folder / "two_cut") == result(launched.folder / "two")
    said = "\n".join(launched.told("two_cut", 0)[0]["said"])
    assert re.search(
        r"base: .* KiB of frozen weights in 3 layers are cut over 2 processes, .* KiB each; 2 layers", said
    )


def test_what_happens_to_a_process_with_half_of_the_base_costs_nothing(launched: Launched) -> None:
    """Its GPU is full for good, and once, while others wait for its shards; the first process asks questions alone."""
    first, second = launched.told("cut", 0), launched.told("cut", 1)
    ended = sorted((first[0]["ended"], second[0]["ended"]))
    assert ended[0] == "EndedTogether: "
    assert "step-000004 is complete, --resume goes on from there" in ended[1]
    assert (first[1]["ended"], second[1]["ended"]) == ("6 steps", "6 steps")
    assert result(launched.folder / "cut") == result(launched.folder / "whole")
    assert len((launched.folder / "cut" / "samples.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("run", ["two_cut", "cut"])
def test_between_steps_a_process_has_its_shards_and_one_layer(run: str, launched: Launched) -> None:
    for process in (0, 1):
        held = json.loads((launched.folder / f"{run}.{process}.bytes.json").read_text())
        assert held["shards"] * 2 == sum(held["of"])
        assert held["whole"] <= max(held["of"])


def test_the_first_process_alone_prints(launched: Launched) -> None:
    report = json.loads(launched.stdout)
    assert (report["steps"], report["processes"]) == (3, 2)
    assert Run.open(launched.folder / "two").report.to_json() == report
    assert launched.stderr.count("learning rate: 0.01") == 1
    assert launched.stderr.count("processes: 2; each takes up to 2 micro-batches of 1 rows of a step's 4") == 1
    assert launched.told("whole", 0)[0]["said"]
    assert launched.told("whole", 1)[0]["said"] == []


def test_what_happens_to_one_happens_to_both_and_costs_nothing(launched: Launched) -> None:
    """A signal, and then a GPU that is full for good, each in the second process, and one that is full once."""
    first, second = launched.told("stopped", 0), launched.told("stopped", 1)
    checkpoint = launched.folder / "stopped" / "checkpoints"
    for parts, cause, left in (
        ((first[0], second[0]), "Interrupted: interrupted after step 3; ", "step-000003"),
        ((first[1], second[1]), "RunError: the GPU is full with as little kept as possible", "step-000004"),
    ):
        ended = sorted(part["ended"] for part in parts)
        assert ended[0] == "EndedTogether: ", "the cause is said once"
        assert ended[1].startswith(cause)
        assert f"{checkpoint / left} is complete, --resume goes on from there" in ended[1]
    assert (first[2]["ended"], second[2]["ended"]) == ("6 steps", "6 steps")
    assert result(launched.folder / "stopped") == result(launched.folder / "whole")
    lines = [
        [{**json.loads(line), "seconds": 0} for line in (launched.folder / run / "evaluations.jsonl").open()]
        for run in ("whole", "stopped")
    ]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [0, 3, 6]
    assert not list((launched.folder / "stopped").glob(".*"))


def test_a_step_without_a_finite_gradient_is_left_out_by_both(launched: Launched) -> None:
    report = Run.open(launched.folder / "left_out").report
    assert (report.steps, report.steps_left_out) == (6, 1)
    adapter = load_file(launched.folder / "left_out" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    assert any(text.startswith("step 3 left out") for text in launched.told("left_out", 0)[0]["said"])


def test_a_step_that_leaves_a_process_idle_is_refused_once(launched: Launched) -> None:
    ended = sorted(launched.told("idle", process)[0]["ended"] for process in (0, 1))
    assert ended[0].startswith("ConfigError: training.gradient_accumulation: a step has 1 packed sequences")
    assert "there are 2 processes; raise gradient_accumulation to 2 or more, or start 1 processes" in ended[0]
    assert ended[1] == "EndedTogether: "


def test_another_number_of_processes_is_refused(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(launched.folder / "config.yaml", [f"output={launched.folder / 'two'}"])
    run = Path(config.output)
    (run / "manifest.json").rename(run / "manifest.away")
    (run / "checkpoints" / "step-000002").mkdir(parents=True)
    (run / "checkpoints" / "step-000002" / "trainer_state.json").write_text("{}")
    try:
        with pytest.raises(ConfigError, match=r"processes were 2 when .* and are 1 now; start as many .torchrun"):
            train(config, resume=True, say=lambda _: None)
        monkeypatch.setenv("WORLD_SIZE", "3")
        with pytest.raises(ConfigError, match=r"processes were 2 when .* and are 3 now"):
            find_checkpoint(run, config, lambda _: None)
    finally:
        (run / "manifest.away").rename(run / "manifest.json")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[*TORCHRUN, "-m"], [*ACCELERATE, "--module"]], ids=["torchrun", "accelerate"])
def test_both_launchers_start_a_run(launcher: list[str], launched: Launched, tmp_path: Path) -> None:
    done = launch(*launcher, "qlora_sft.train", str(launched.folder / "config.yaml"), f"output={tmp_path}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2
    assert losses(tmp_path) == losses(launched.folder / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("fails", "the second process has failed"),
        ("killed", "error: another process of this run has ended without a message"),
    ],
)
def test_when_one_dies_all_end_and_the_cause_is_said_once(how: str, told: str, launched: Launched) -> None:
    done = launch(*TORCHRUN, str(CHILD), str(launched.folder / "config.yaml"), how)
    assert done.returncode != 0
    assert done.stderr.count(told) == 1
    assert done.stderr.count("Traceback") == 1  # the launcher's own
    assert not (launched.folder / how / "manifest.json").exists()


@pytest.mark.slow
def test_a_signal_to_the_launcher_leaves_a_checkpoint(launched: Launched, tmp_path: Path) -> None:
    command = [sys.executable, "-m", *TORCHRUN, "-m", "qlora_sft.train", str(launched.folder / "config.yaml")]
    command += [f"output={tmp_path}", "training.epochs=200"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not ((tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").read_text()):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    assert stderr.count("error: interrupted after step") == 1
    assert len(all_checkpoints(tmp_path)) == 1


@given(
    count=st.integers(0, 40),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 7),
    processes=st.integers(1, 6),
)
def test_every_step_has_its_sequences_whatever_the_number_of_processes(
    count: int, batch_size: int, accumulation: int, processes: int
) -> None:
    config = load_config(
        "demo", [f"training.batch_size={batch_size}", f"training.gradient_accumulation={accumulation}"]
    )
    per_step = batch_size * accumulation
    if per_step < processes:
        with pytest.raises(ConfigError, match="packed sequences"):
            deal(config, processes)
        return
    dealt = deal(config, processes)
    assert dealt.size <= batch_size
    if processes == 1:
        assert dealt == Deal(per_step, batch_size, accumulation, 1)
    sequences = [[2 * number, 2 * number + 1] for number in range(count)]
    batches = micro_batches(sequences, dealt)
    in_step = dealt.rounds * processes
    for start in range(0, count, per_step):
        of_step = batches[start // per_step * in_step :][:in_step]
        expected = sequences[start : start + per_step]
        assert [index for batch in of_step for index in batch] == [index for each in expected for index in each]
        assert len(of_step) % processes == 0
        # Accelerate gives each process every n-th of them; in a whole step all have something to do.
        if len(expected) == per_step:
            assert all(any(of_step[process::processes]) for process in range(processes))
    assert max(map(len, batches), default=0) <= 2 * dealt.size
    tokens = [7 + number % 5 for number in range(count)]
    expected_longest = max((sum(tokens[i // 2] for i in batch) // 2 for batch in batches), default=0)
    assert longest_dealt(tokens, dealt) == expected_longest
    told = describe_deal(dealt, cards=2)
    assert f"up to {dealt.rounds} micro-batches" in told or "1, on one of 2 GPUs; torchrun --nproc-per-node 2" in told
    assert (describe_deal(dealt, cards=1) == "") == (processes == 1)


def test_ways_of_training_in_parallel_that_are_not_ours_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    join_ranks.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"asks for FSDP, .*memory\.base_shards=N .*torchrun --nproc-per-node N"):
            join_ranks()
    finally:
        monkeypatch.delenv("ACCELERATE_USE_FSDP")
        join_ranks.cache_clear()
    assert join_ranks().alone


def test_a_base_is_cut_for_as_many_processes_as_train(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for start in (train, find_rate):
        with pytest.raises(
            ConfigError, match=r"cut over 2 processes, and 1 trains; start .torchrun --nproc-per-node 2"
        ):
            start(make_config("memory.base_shards=2"), say=lambda _: None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"cut over 2 processes, and 3 train; .* or set it to 3"):
        check_shards(make_config("memory.base_shards=2"))
    check_shards(make_config("memory.base_shards=3"))
    check_shards(make_config())


def test_several_processes_train_without_unsloth(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_sft.model.backend import choose_backend
    from qlora_sft.prepare import why_not_unsloth

    monkeypatch.setenv("WORLD_SIZE", "2")
    why = why_not_unsloth(make_config())
    assert choose_backend("auto", why).name == "transformers"
    with pytest.raises(ConfigError, match=r"model.backend=unsloth: several processes train together"):
        choose_backend("unsloth", why)


def test_a_process_alone_waits_for_nobody() -> None:
    ranks = Ranks()
    with ranks.ending_together(), ranks.first_ahead():
        assert ranks.from_first(lambda: {"a": 1}) == {"a": 1}
        assert ranks.gather(3) == [3]
    with pytest.raises(KeyError), ranks.ending_together():
        raise KeyError
