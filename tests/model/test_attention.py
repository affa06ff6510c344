from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_sft.data.batch import flatten
from qlora_sft.data.render import Rendered
from qlora_sft.model.attention import document_attention, plain_attention, use_document_attention
from qlora_sft.model.loss import batch_loss, logit_transform


def document(length: int, seed: int) -> Rendered:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 400, (length,), generator=generator).tolist()
    return Rendered(ids, [float(i % 3 > 0) for i in range(length)], "s")


@pytest.fixture
def model(tiny_model: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    use_document_attention(model)
    return model


def test_packed_documents_do_not_see_each_other(model: Any) -> None:
    documents = [document(30, 1), document(1, 2), document(17, 3), document(40, 4)]
    packed = batch_loss(model, flatten(documents), n_items=1.0)
    packed.loss.backward()
    packed_gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    separate = [batch_loss(model, flatten([each]), n_items=1.0) for each in documents]
    sum(each.loss for each in separate).backward()
    torch.testing.assert_close(packed.nll, torch.cat([each.nll for each in separate]), rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        assert (packed_gradient[name] - p.grad).norm() <= 1e-5 * p.grad.norm(), name


def test_it_is_what_transformers_computes_for_a_document_alone(model: Any, tiny_model: Path) -> None:
    one = document(50, 5)
    ours = batch_loss(model, flatten([one])).nll
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    logits = theirs(input_ids=torch.tensor([one.input_ids])).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(one.input_ids[1:]), reduction="none")
    torch.testing.assert_close(ours, nll[torch.tensor(one.weights[1:]) > 0], rtol=1e-5, atol=1e-6)


def test_a_change_in_one_document_changes_nothing_in_another(model: Any) -> None:
    first, second, other = document(20, 1), document(20, 2), document(20, 3)
    with torch.no_grad():
        nll = batch_loss(model, flatten([first, second])).nll
        changed = batch_loss(model, flatten([other, second])).nll
    half = len(nll) // 2
    assert torch.equal(nll[half:], changed[half:])
    assert not torch.equal(nll[:half], changed[:half])


def test_what_it_cannot_do_is_refused() -> None:
    q = torch.randn(1, 2, 6, 8)
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    module = torch.nn.Module()
    with pytest.raises(ValueError, match="needs one flat row"):
        document_attention(module, q, q, q, None)
    with pytest.raises(ValueError, match="takes no mask"):
        document_attention(module, q, q, q, torch.ones(1, 1, 6, 6), cu_seq_lens_q=bounds)
    module.is_causal = False
    with pytest.raises(ValueError, match="attends in both directions"):
        document_attention(module, q, q, q, None, cu_seq_lens_q=bounds)


def test_generation_goes_through_sdpa_and_back(model: Any) -> None:
    ids = torch.tensor([document(9, 1).input_ids])
    with plain_attention(model), torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert out.shape[1] >= 10
    assert model.config._attn_implementation == "qlora_documents"


def test_the_families_own_names_for_scaled_and_capped_logits() -> None:
    from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

    assert logit_transform(LlamaConfig()) == {}
    assert logit_transform(Gemma2Config(final_logit_softcapping=30.0)) == {"softcap": 30.0}
    assert logit_transform(CohereConfig(logit_scale=0.0625)) == {"logit_scale": 0.0625}
    assert logit_transform(GraniteConfig(logits_scaling=8.0)) == {"logit_scale": 0.125}
