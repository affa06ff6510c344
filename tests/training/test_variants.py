"""Every form of adapter: one step is that of PEFT and AdamW alone, a run that goes on ends with the same bits, and the
merged model is the adapter."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig, configured
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tests_support import bare_base, result
from torch import Tensor

from qlora_sft.config import Config
from qlora_sft.data.render import Rendered
from qlora_sft.export.merge import merge_run
from qlora_sft.export.parity import check_parity
from qlora_sft.model.load import load_base
from qlora_sft.model.memory import use_memory
from qlora_sft.model.mlp import TiledMLP
from qlora_sft.model.qkv import LeanAttention
from qlora_sft.model.setup import prepare_model
from qlora_sft.model.tokenizer import load_tokenizer
from qlora_sft.model.vocabulary import new_rows
from qlora_sft.train import train
from qlora_sft.training.fit import Training, fit
from qlora_sft.training.run_folder import Beginning, begin_run

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE = 1e-2


@dataclass
class Variant:
    """What is configured here, and what it is in PEFT and AdamW."""

    overrides: list[str]
    peft: dict[str, Any] = field(default_factory=dict)
    of_b: float = 1.0
    """How many times the rate of A the rate of B is."""
    of_rows: float = 1.0
    """The same of the rows of new tokens."""
    ours: bool = True
    """Whether nf4_lora computes the layers."""

    def rate_of(self, name: str) -> float:
        return RATE * (self.of_b if "lora_B" in name else self.of_rows if "trainable_tokens" in name else 1.0)


VARIANTS = {
    "rslora": Variant(
        ["lora.rslora=true", "lora.r=4", "lora.plus_ratio=4", "training.new_tokens_rate=1e-3"],
        {"use_rslora": True, "r": 4}, of_b=4, of_rows=0.1,
    ),
    "modules": Variant(
        [r"lora.modules=[{match: down_proj, r: 4, alpha: 9}, {match: 'layers\.0\..*[qk]_proj', r: 2}]",
         "lora.rslora=true", "lora.init=gaussian"],
        {"rank_pattern": {"down_proj": 4, r"layers\.0\..*[qk]_proj": 2}, "alpha_pattern": {"down_proj": 9},
         "use_rslora": True},
    ),
    "dora": Variant(["lora.dora=true", "training.weight_decay=0.1"], {"use_dora": True}, ours=False),
    "regex": Variant(
        [r"lora.target_modules='layers\.1\..*|o_proj'", "lora.init=orthogonal", "training.weight_decay=0.1"],
        {"target_modules": r".*(layers\.1\..*_proj|o_proj)"},
    ),
    "loftq": Variant(["lora.init=loftq", "model.load_in_4bit=true"]),
}  # fmt: skip


@pytest.fixture
def make_config(tmp_path: Path, small_tokenizer: Any) -> MakeConfig:
    """For a base that lacks two control tokens, whose rows are trained, too."""
    make = configured(tmp_path, bare_base(tmp_path / "base", small_tokenizer, tied=False, room=8))
    return lambda *overrides, **options: make("model.chat_template=chatml", *overrides, **options)


def factors(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def one_step(config: Config, documents: list[Rendered]) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """The adapter before and after the step of a run over one packed sequence, and the model."""
    base = config.model.path
    tokens = sum(len(document.input_ids) for document in documents)
    model = prepare_model(config, base, torch.float32, "transformers", tokens, lambda _: None)
    before, run = factors(model), Path(config.output)
    begin_run(run, config, Beginning("", None, "float32", "transformers"))
    bins = [list(range(len(documents)))]
    with use_memory(model, config, tokens, torch.float32, lambda _: None, False):
        tokenizer = load_tokenizer(config.model, base)
        training = Training(config, run, lambda _: None, model, tokenizer, torch.float32, documents, bins)
        fit(training, keep_less=lambda _: False)
    return before, factors(model), model


def step_of_peft(config: Config, variant: Variant, begin: dict[str, Tensor], documents: list[Rendered]) -> Any:
    """What PEFT and AdamW make of ``begin``, with every document alone and nothing of ours."""
    base = load_base(config.model.path, torch.float32, config.model.load_in_4bit)
    rows = dict.fromkeys(("embed_tokens", "lm_head"), new_rows(config.model, config.model.path))
    settings = {"r": 16, "lora_alpha": 16, "target_modules": ALL, "trainable_token_indices": rows, **variant.peft}
    model = get_peft_model(base, LoraConfig(**settings)).train()
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert own.keys() == begin.keys()
    total, count = torch.zeros(()), 0
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(begin[name])
    for document in documents:
        labels = [i if weight else -100 for i, weight in zip(document.input_ids, document.weights, strict=True)]
        logits = model(input_ids=torch.tensor([document.input_ids])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
        count += sum(label >= 0 for label in labels[1:])
    (total / count).backward()
    torch.nn.utils.clip_grad_norm_(list(own.values()), config.training.max_grad_norm)
    decay = config.training.weight_decay
    kept = ("vector", "trainable_tokens")
    groups = [
        {"params": [p], "lr": variant.rate_of(name), "weight_decay": 0.0 if any(k in name for k in kept) else decay}
        for name, p in own.items()
    ]  # fmt: skip
    torch.optim.AdamW(groups).step()
    return factors(model)


@pytest.mark.parametrize("name", VARIANTS)
def test_one_step_is_that_of_peft(make_config: Any, name: str) -> None:
    variant = VARIANTS[name]
    config = make_config(*variant.overrides, f"training.learning_rate={RATE}", "training.warmup_ratio=0")
    size = max(new_rows(config.model, config.model.path)) + 1
    ids = [[(31 * n + 7 * i) % size for i in range(20 + 9 * n)] for n in range(1, 5)]
    documents = [Rendered(each, [float(i > 5) for i in range(len(each))], "s") for each in ids]
    before, after, model = one_step(config, documents)
    wanted = step_of_peft(config, variant, before, documents)
    moved = dict.fromkeys(("lora_A", "lora_B", "magnitude"), 0.0)
    for path, tensor in after.items():
        update, theirs = tensor - before[path], wanted[path] - before[path]
        assert (update - theirs).norm() <= 1e-3 * theirs.norm() + 1e-7, path
        moved = {part: moved[part] + float(theirs.norm()) * (part in path) for part in moved}
    assert moved["lora_B"] > 0.1
    assert (moved["magnitude"] > 0.1) == ("use_dora" in variant.peft)
    kinds = {type(module) for module in model.modules()}
    assert ({LeanAttention, TiledMLP} <= kinds) == variant.ours


ALL_FORMS = {
    **VARIANTS,
    "neftune": Variant(["training.neftune_alpha=5", "training.schedule=cosine"]),
    "eva": Variant(["lora.init=eva"]),
}


@pytest.mark.parametrize("name", ALL_FORMS)
def test_a_run_that_goes_on_ends_with_the_same_bits_and_its_merge_is_the_adapter(
    make_config: Any, tmp_path: Path, name: str
) -> None:
    short = ["training.max_steps=4", "training.save_steps=2", "data.packing=none", f"training.learning_rate={RATE}",
             "training.gradient_accumulation=2", "model.load_in_4bit=true", "lora.dropout=0.1"]  # fmt: skip
    overrides = [*short, *(each for each in ALL_FORMS[name].overrides if each not in short)]
    whole = make_config(*overrides)
    train(whole, say=lambda _: None)
    run, stopped = Path(whole.output), tmp_path / "stopped"
    shutil.copytree(run, stopped, ignore=shutil.ignore_patterns("manifest.json", "adapter", "step-000004"))
    train(make_config(*overrides, f"output={stopped}"), resume=True, say=lambda _: None)
    assert result(stopped) == result(run)
    assert merge_run(run, onto="nf4-dequantized", say=lambda _: None).modules == (10 if name == "regex" else 16)
    figures = check_parity(run, run / "merged", say=lambda _: None)["merged"]
    assert figures.top1 >= 0.995
    assert figures.kl < 1e-5


def test_the_adapter_is_read_back_with_its_form(make_config: Any, tmp_path: Path) -> None:
    """With lora.from, and by PEFT alone: rank, scale and layers are in what is saved."""
    overrides = [*VARIANTS["modules"].overrides, "training.max_steps=1", "lora.target_modules='layers\\..*_proj'"]
    config = make_config(*overrides)
    train(config, say=lambda _: None)
    again = make_config(f"lora.from={config.output}", f"output={tmp_path / 'again'}")
    assert again.lora.rslora
    assert again.lora.target_modules == "layers\\..*_proj"
    assert {each.match: (each.r, each.alpha) for each in again.lora.modules} == {
        "down_proj": (4, 9), r"layers\.0\..*[qk]_proj": (2, None)
    }  # fmt: skip
    train(make_config(f"lora.from={config.output}", "training.max_steps=1", f"output={tmp_path / 'again'}"))
    theirs = PeftModel.from_pretrained(
        load_base(config.model.path, torch.float32, False), tmp_path / "again" / "adapter"
    )
    scales = {
        path.split("model.layers.")[1]: (module.r["default"], module.scaling["default"])
        for path, module in theirs.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert scales["0.self_attn.q_proj"] == (2, pytest.approx(16 / 2**0.5))
    assert scales["1.self_attn.q_proj"] == (16, pytest.approx(4.0))
    assert scales["1.mlp.down_proj"] == (4, pytest.approx(4.5))
