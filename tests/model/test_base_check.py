"""A base whose parts do not fit one another is refused before anything is loaded, by every verb alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qlora_sft.cli import main
from qlora_sft.config import ModelConfig
from qlora_sft.errors import ConfigError, DataError
from qlora_sft.model.base_check import check_base, check_tokenizer
from qlora_sft.model.base_files import check_quantization, read_config
from qlora_sft.model.tokenizer import stop_token_ids
from qlora_sft.prepare import prepare

CASES = Path(__file__).parents[1] / "cases"


def edited(folder: Path, file: str, **values: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **values}))


def add_tokens(folder: Path) -> None:
    """As the case does: three tokens, and the model is not resized."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tag_a>", "<tag_b>"], special_tokens=True)
    tokenizer.add_tokens(["zzplain"])
    tokenizer.save_pretrained(folder)


def quantized(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edited(folder, "config.json", quantization_config=values)


def cut_embedding(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name] = tensors[name][:-100].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "added tokens": (
        add_tokens,
        "has 3 tokens beyond the 5,000 rows of the model's embedding: '<tag_a>' (5000), '<tag_b>' (5001), 'zzplain' "
        "(5002). Take the tokenizer",
    ),
    "awq": (quantized(quant_method="awq", bits=4, group_size=128), "are quantised with awq, which cannot be trained"),
    "embedding of another size": (cut_embedding, "says vocab_size 5,000, and model.embed_tokens.weight has 4,900"),
    "layers that the files lack": (
        lambda folder: edited(folder, "config.json", num_hidden_layers=3, layer_types=None),
        "fewer than config.json asks for; is the download incomplete?",
    ),
    "a stop token of another tokenizer": (
        lambda folder: edited(folder, "generation_config.json", eos_token_id=[2, 128009]), "stops at token 128009",
    ),
}  # fmt: skip


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_is_refused_with_the_cure(name: str, copied: Path, make_config: Any) -> None:
    make, expected = FAULTS[name]
    make(copied)
    with pytest.raises(ConfigError) as caught:
        check_base(make_config(f"model.path={copied}"), str(copied))
    assert expected in caught.value.problems[0]


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4}, "are quantised with gptq, which cannot be trained here"),
        ({"quant_method": "compressed-tensors"}, "are quantised with compressed-tensors"),
        ({"quant_method": "mxfp4"}, "are quantised with mxfp4"),  # of no gpt-oss
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "with bitsandbytes in 8 bits"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "with bitsandbytes in fp4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "model.load_in_4bit: false, but the weights in"),
    ],
)
def test_only_what_can_be_trained_may_be_quantised(quantization: dict[str, Any], expected: str) -> None:
    for settings in ({"quantization_config": quantization}, {"text_config": {"quantization_config": quantization}}):
        with pytest.raises(ConfigError, match=expected):
            check_quantization(ModelConfig("base", load_in_4bit=False), "base", settings)
    check_quantization(ModelConfig("base"), "base", {"quantization_config": {}})
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    check_quantization(ModelConfig("base"), "base", {"quantization_config": nf4})


def test_what_was_quantised_is_named_if_the_readme_names_it(copied: Path, make_config: Any) -> None:
    edited(copied, "config.json", quantization_config={"quant_method": "gptq"})
    for line in ("base_model: owner/Model-1B", "base_model:\n- owner/Model-1B", 'base_model: "owner/Model-1B"'):
        (copied / "README.md").write_text(f"---\nlicense: mit\n{line}\n---\n# base_model: other/one\n")
        with pytest.raises(ConfigError, match=r"quantised with gptq, .*; name owner/Model-1B, from which it was made"):
            check_base(make_config(f"model.path={copied}"), str(copied))


@pytest.mark.parametrize("name", ["added tokens", "awq"])
def test_train_preview_and_plan_refuse_alike(
    name: str, copied: Path, make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, expected = FAULTS[name]
    make(copied)
    make_config()
    arguments = [
        str(tmp_path / "config.yaml"),
        f"model.path={copied}",
        f"data.train.0.path={CASES / 'added_tokens.jsonl'}",
    ]
    said = []
    for verb in ("train", "preview", "plan"):
        assert main([verb, *arguments]) == 2
        said.append(capsys.readouterr().err.split("error: ")[1])
    assert expected in said[0]
    assert said[1] == said[2] == said[0]


def test_everything_that_does_not_fit_is_said_at_once(copied: Path, make_config: Any) -> None:
    add_tokens(copied)
    edited(copied, "config.json", quantization_config={"quant_method": "awq"})
    config = make_config(
        f"model.path={copied}", "data.max_length=9999", "lora.target_modules=[qproj]", "model.stop_tokens=[<none>]"
    )
    with pytest.raises(ConfigError) as caught:
        check_base(config, str(copied))
    found = "\n".join(caught.value.problems)
    for part in ("awq", "knows positions", "no linear layer is named ['qproj']", "<tag_a>", "'<none>' is not a token"):
        assert part in found
    assert len(caught.value.problems) == 5


def test_tokens_that_are_there_for_images_only_are_no_fault(copied: Path) -> None:
    """Gemma 3 1B, which reads text only, has the tokenizer of its larger brothers."""
    edited(copied, "tokenizer_config.json", image_token="<image_soft_token>")
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(copied)
    check_tokenizer(ModelConfig(str(copied)), str(copied), read_config(str(copied)))
    tokenizer.add_tokens(["<other>"], special_tokens=True)
    tokenizer.save_pretrained(copied)
    with pytest.raises(ConfigError, match=r"has 1 tokens beyond the 5,000 rows of the model's embedding: '<other>'"):
        check_tokenizer(ModelConfig(str(copied)), str(copied), read_config(str(copied)))


def test_a_text_that_holds_such_a_token_is_refused_with_its_source(copied: Path, make_config: Any) -> None:
    edited(copied, "tokenizer_config.json", image_token="<image_soft_token>")
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(copied)
    rows = [{"text": "A picture: <image_soft_token> and what it shows."}]
    config = make_config(f"model.path={copied}", "data.train.0.allow_special=true", rows=rows)
    with pytest.raises(DataError, match=r"chat holds '<image_soft_token>'.*5,000 rows does not have"):
        prepare(config, lambda _: None, unsloth=False)


def test_a_null_among_the_stops_is_none(copied: Path) -> None:
    edited(copied, "generation_config.json", eos_token_id=[2, None])
    tokenizer = AutoTokenizer.from_pretrained(copied)
    assert stop_token_ids(ModelConfig(str(copied)), str(copied), tokenizer) == {2, tokenizer.eos_token_id}


def test_a_base_that_fits_and_tokens_that_a_template_adds_are_no_fault(
    tiny_model: Path, small_tokenizer: Any, tmp_path: Path, make_config: Any
) -> None:
    from tests_support import bare_base

    check_base(make_config(), str(tiny_model))
    base = bare_base(tmp_path / "bare", small_tokenizer, tied=True, room=0)
    check_base(make_config(f"model.path={base}", "model.chat_template=chatml"), str(base))
