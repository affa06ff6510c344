"""A base in MXFP4 or FP8 becomes a 16-bit copy, bit for bit as transformers reads it, and is then a base like any."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import configured
from packed_bases import fp8, mxfp4, read_by_transformers, write_gpt_oss, write_in_16_bits, write_qwen3
from safetensors.torch import load_file, save_file
from tests_support import result
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora_sft.errors import ConfigError, RunError
from qlora_sft.export.merge import merge_run
from qlora_sft.export.parity import check_parity
from qlora_sft.model.base_files import Header, read_config, read_headers
from qlora_sft.model.base_folder import base_headers, fetch_base, own_folder, resolve_base
from qlora_sft.model.fingerprint import fingerprint
from qlora_sft.model.load import load_for_inference
from qlora_sft.model.packed_layout import layout_of
from qlora_sft.model.run_base import run_base
from qlora_sft.model.snapshot import file_hashes, has_weights
from qlora_sft.model.tensors import read_header, read_model
from qlora_sft.model.unpack import unpacked
from qlora_sft.plan.plan import make_plan
from qlora_sft.run.folder import Run
from qlora_sft.train import train

WRITERS = {"mxfp4": write_gpt_oss, "fp8": write_qwen3}
SETTINGS = (
    "model.chat_template=chatml", "model.load_in_4bit=true", "training.learning_rate=1e-2", "lora.r=4",
    "training.max_steps=2", "data.packing=none",
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_SFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dequantized"


def dequantized(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What our formulas make of tensors in a file."""
    save_file(tensors, folder / "model.safetensors")
    stored = read_header(folder / "model.safetensors")
    parts = layout_of(read_headers(str(folder)), settings)
    planned = {part.name: unpacked(part, stored) for part in parts}
    return {name: torch.cat(list(tensor.slices())).reshape(tensor.shape) for name, tensor in planned.items()}


def settings_of(method: str, **quantization: Any) -> dict[str, Any]:
    return {"model_type": "gpt_oss", "quantization_config": {"quant_method": method, **quantization}}


@pytest.mark.parametrize("shape", [(1, 32, 3), (5, 96, 70), (3, 64, 256)])
def test_mxfp4_is_read_as_transformers_reads_it(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(sum(shape))
    codes, scales = mxfp4(shape)
    scales.random_(1, 255)
    settings = settings_of("mxfp4")
    ours = dequantized(tmp_path, {"a.down_proj_blocks": codes, "a.down_proj_scales": scales}, settings)
    assert list(ours) == ["a.down_proj"]
    assert torch.equal(ours["a.down_proj"], convert_moe_packed_tensors(codes, scales))
    assert ours["a.down_proj"].shape == shape


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(64, 128), (3, 96, 64)])
def test_fp8_is_read_as_transformers_reads_it(shape: tuple[int, ...], kind: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(sum(shape))
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    grid = (*shape[:-2], shape[-2] // 32, shape[-1] // 32)
    scales = torch.randint(118, 134, grid, dtype=torch.uint8)
    if kind == torch.float8_e8m0fnu:
        scales = scales.view(kind)
    elif kind != torch.uint8:
        scales = torch.rand(grid).to(kind)
    reference = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    settings = settings_of("fp8", weight_block_size=[32, 32])
    ours = dequantized(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scales}, settings)
    assert torch.equal(ours["a.weight"], reference)


def test_blocks_at_the_edges_of_a_weight_are_smaller(tmp_path: Path) -> None:
    """As in DeepSeek-V3, whose 576 rows are four blocks of 128 and one of 64; transformers refuses them."""
    weight = torch.randn(200, 70)
    codes, scales = fp8(weight, (64, 32))
    assert scales.shape == (4, 3)
    tensors = {"a.weight": codes, "a.weight_scale_inv": scales}
    found = dequantized(tmp_path, tensors, settings_of("fp8", weight_block_size=[64, 32]))["a.weight"]
    for i in range(200):
        for j in range(0, 70, 7):
            assert found[i, j] == (codes[i, j].float() * scales[i // 64, j // 32]).to(torch.bfloat16)
    torch.testing.assert_close(found.float(), weight, rtol=0.07, atol=0.02)


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale"])
def test_one_scale_for_all_of_a_weight(suffix: str, tmp_path: Path) -> None:
    codes, scale = fp8(torch.randn(40, 24), None)
    unused = {"a.input_scale": torch.tensor(2.0), "a.k_scale": torch.tensor([3.0])}
    tensors = {"a.weight": codes, f"a.{suffix}": scale, "a.bias": torch.ones(40), **unused}
    found = dequantized(tmp_path, tensors, settings_of("fp8"))
    assert found.keys() == {"a.weight", "a.bias"}
    assert torch.equal(found["a.weight"], (codes.float() * scale).to(torch.bfloat16))
    half = {**settings_of("fp8"), "torch_dtype": "float16"}
    assert dequantized(tmp_path, tensors, half)["a.weight"].dtype == torch.float16


@pytest.mark.parametrize(
    ("method", "tensors"),
    [
        ("fp8", {"a.weight": ("F8_E4M3", (64, 64))}),
        ("fp8", {"a.weight": ("F8_E4M3", (64, 64)), "a.weight_scale_inv": ("F32", (3, 2))}),
        ("fp8", {"a.weight": ("F8_E4M3", (64, 64)), "a.weight_scale_inv": ("F32", (64,))}),
        ("fp8", {"a.weight": ("I8", (64, 32)), "a.weight_scale_inv": ("F8_E8M0", (64, 2))}),
        ("mxfp4", {"a_blocks": ("U8", (2, 8, 1, 16))}),
        ("mxfp4", {"a_blocks": ("U8", (2, 8, 1, 16)), "a_scales": ("U8", (2, 4, 1))}),
        ("mxfp4", {"a_blocks": ("U8", (8, 1, 16)), "a_scales": ("U8", (8, 1))}),
    ],
)
def test_a_weight_that_is_packed_otherwise_is_refused_by_name(method: str, tensors: dict[str, Any]) -> None:
    headers = {name: Header(dtype, shape, 0) for name, (dtype, shape) in tensors.items()}
    with pytest.raises(ConfigError, match=r"a(\.weight|_blocks) is .* cannot be dequantised here; name the same model"):
        layout_of(headers, settings_of(method, weight_block_size=[32, 32]))


# ------------------------------------------------------------------ the copy


@pytest.mark.parametrize("method", WRITERS)
def test_the_copy_is_what_transformers_reads(method: str, tmp_path: Path, small_tokenizer: Any) -> None:
    base = WRITERS[method](tmp_path / "base", small_tokenizer)
    folder = resolve_base(str(base))
    assert own_folder(folder) == str(base)
    assert not has_weights(Path(folder))
    assert "quantization_config" not in read_config(folder)
    planned = base_headers(folder)
    said: list[str] = []
    fetch_base(folder, said.append)
    assert method.upper() in said[0]
    assert "written in" in said[1]
    assert planned == base_headers(folder)
    reference = read_by_transformers(base)
    stored = read_model(Path(folder))
    assert stored.keys() == reference.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor.whole(), reference[name]), name
    said.clear()
    fetch_base(resolve_base(str(base)), said.append)
    assert said == []
    assert not list(Path(folder).glob(".*"))


@pytest.mark.parametrize("method", WRITERS)
def test_training_and_merging_are_those_of_the_16_bit_model(method: str, tmp_path: Path, small_tokenizer: Any) -> None:
    base = WRITERS[method](tmp_path / "base", small_tokenizer)
    plain = write_in_16_bits(tmp_path / "plain", base)
    config = configured(tmp_path, base)(*SETTINGS, f"output={tmp_path / 'run'}")
    plan = make_plan(config, data=False, timing=False, say=lambda _: None)
    nbytes = sum(header.nbytes for header in read_headers(str(plain)).values())
    assert (plan.disk.copy_in_16_bits, plan.disk.download, plan.model.note) == (nbytes, 0, "")
    said: list[str] = []
    train(config, say=said.append)
    assert any(line.startswith(f"model: {base}, dequantised from {method.upper()}, LoRA") for line in said)
    other = configured(tmp_path, plain)(*SETTINGS, f"output={tmp_path / 'other'}")
    theirs = make_plan(other, data=False, timing=False, say=lambda _: None)
    assert (plan.resident, plan.model.parameters) == (theirs.resident, theirs.model.parameters)
    assert make_plan(config, data=False, timing=False, say=lambda _: None).disk.copy_in_16_bits == 0
    train(other, say=lambda _: None)
    assert result(tmp_path / "run") == result(tmp_path / "other")
    run, same = Run.open(tmp_path / "run"), Run.open(tmp_path / "other")
    assert (run.base, run.report.base_dequantized) == (str(base), method.upper())
    assert run.report.base_files == file_hashes(str(base))
    assert (same.report.base_dequantized, run.base_sha256) == (None, same.base_sha256)
    for onto in ("bf16", "nf4-dequantized"):
        merged = [merge_run(each.path, onto=onto, say=lambda _: None) for each in (run, same)]
        ours, others = ({name: each.whole() for name, each in read_model(Path(m.merged)).items()} for m in merged)
        assert ours.keys() == others.keys()
        assert all(torch.equal(tensor, others[name]) for name, tensor in ours.items())
    settings = read_config(merged[0].merged)
    assert "quantization_config" not in settings
    assert check_parity(run.path, run.merged, say=lambda _: None)["merged"].kl < 1e-3


def test_a_run_goes_on_when_its_copy_is_gone(tmp_path: Path, cache: Path, small_tokenizer: Any) -> None:
    base = write_qwen3(tmp_path / "base", small_tokenizer)
    config = configured(tmp_path, base)(*SETTINGS, "training.save_steps=1", f"output={tmp_path / 'run'}")
    train(config, say=lambda _: None)
    whole = result(tmp_path / "run")
    for name in ("manifest.json", "adapter", "checkpoints/step-000002"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(cache)
    assert train(config, say=lambda _: None, resume=True).resumed_at == 1
    assert result(tmp_path / "run") == whole
    shutil.rmtree(cache)
    assert fingerprint(run_base(Run.open(tmp_path / "run"))) == Run.open(tmp_path / "run").base_sha256


def test_what_was_interrupted_goes_on_and_leaves_nothing(
    tmp_path: Path, small_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_qwen3(tmp_path / "base", small_tokenizer)
    folder = Path(resolve_base(str(base)))
    from qlora_sft.model import tensors

    write, written = tensors.write_shard, []

    def killed(file: Path, planned: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(file.name)
        write(file, planned)

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch_base(str(folder), lambda _: None)
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert not has_weights(folder)
    assert base_headers(str(folder)).keys() == read_by_transformers(base).keys()
    (folder / ".model-00002-of-00004.safetensors.partial-1").write_bytes(b"half")
    first = next(folder.glob("*.safetensors")).stat().st_mtime_ns
    fetch_base(str(folder), lambda _: None)
    assert has_weights(folder)
    assert min(file.stat().st_mtime_ns for file in folder.glob("*.safetensors")) == first
    assert not list(folder.glob(".*"))


def test_other_weights_or_another_tokenizer_are_never_those_of_an_earlier_copy(
    tmp_path: Path, small_tokenizer: Any
) -> None:
    base = write_qwen3(tmp_path / "base", small_tokenizer)
    first = resolve_base(str(base))
    fetch_base(first, lambda _: None)
    (base / "chat_template.jinja").write_text("{{ 1 }}")
    assert resolve_base(str(base)) == first
    assert (Path(first) / "chat_template.jinja").read_text() == "{{ 1 }}"
    (base / "chat_template.jinja").unlink()
    resolve_base(str(base))
    assert not (Path(first) / "chat_template.jinja").is_symlink()
    copied = shutil.copytree(base, tmp_path / "copied")
    assert resolve_base(str(copied)) != first
    file = base / "model-00001-of-00002.safetensors"
    save_file(
        {name: torch.zeros_like(t) if t.dtype == torch.bfloat16 else t for name, t in load_file(file).items()}, file
    )
    assert resolve_base(str(base)) != first


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    tmp_path: Path, small_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve_base(str(write_qwen3(tmp_path / "base", small_tokenizer)))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    with pytest.raises(RunError, match=r"needs 0\.\d MiB, and 0\.0 MiB are free there.*QLORA_SFT_CACHE"):
        fetch_base(folder, lambda _: None)
    assert not list(Path(folder).glob("*.safetensors*"))


def test_a_source_with_a_missing_file_is_refused(tmp_path: Path, small_tokenizer: Any) -> None:
    base = write_qwen3(tmp_path / "base", small_tokenizer)
    (base / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors"):
        train(configured(tmp_path, base)(*SETTINGS, f"output={tmp_path / 'run'}"), say=lambda _: None)


def test_a_model_of_the_hub_is_recorded_as_it_was_typed(
    tmp_path: Path, small_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, hub = "c3" * 20, tmp_path / "hub"
    for module in ("constants", "_snapshot_download.constants"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(hub))
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_OFFLINE", True)
    kept = hub / "models--owner--packed"
    (kept / "snapshots").mkdir(parents=True)
    source = write_gpt_oss(kept / "snapshots" / commit, small_tokenizer)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    config = configured(tmp_path, Path("owner/packed"))(*SETTINGS, f"output={tmp_path / 'run'}")
    train(config, say=lambda _: None)
    run = Run.open(tmp_path / "run")
    assert (run.base, run.base_commit, run.report.base_dequantized) == ("owner/packed", commit, "MXFP4")
    assert run.report.base_files == file_hashes(str(source))
    adapter = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("owner/packed", commit)
    assert check_parity(run.path, Path(merge_run(run.path, say=lambda _: None).merged))["merged"].kl < 1e-3


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_that_is_no_run_is_asked_as_training_would_load_it(
    kind: str, tmp_path: Path, own_tokenizer: Any, cache: Path
) -> None:
    """As chat and evaluate open one, without a GPU that could compute in its format."""
    base = WRITERS[kind](tmp_path / "base", own_tokenizer)
    same = write_in_16_bits(tmp_path / "same", base)
    asked, expected = load_for_inference(base), load_for_inference(same)
    assert len(list(cache.glob("*/*.safetensors"))) == 2
    ids = torch.arange(20, 50)[None]
    with torch.no_grad():
        assert torch.equal(asked(input_ids=ids).logits, expected(input_ids=ids).logits)
