"""Rates training sources by how strange their answers are to the base (``quality: perplexity``).

A sample of every training source is scored: the mean loss of a row's supervised tokens, under the base's weights as
they are loaded for training. A row is strange if its loss is more than three robust standard deviations above the
median of all samples: ``loss > median + 3 * 1.4826 * MAD``. The quality of a source is the share of its rows that are
not. That finds garbled, scrambled and foreign text. It does not say which of two good answers is better, so the
extremes are printed, to be read.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

import torch

from qlora_sft.atomic import write_json
from qlora_sft.cache import cache_dir
from qlora_sft.config import Config
from qlora_sft.config_data import source_name
from qlora_sft.data.prepare import fitted_rows, render_sources
from qlora_sft.data.render import Rendered
from qlora_sft.data.sources import Source, place
from qlora_sft.data.template import ChatFormat
from qlora_sft.errors import DataError
from qlora_sft.model.base_folder import fetch_base
from qlora_sft.model.fingerprint import fingerprint
from qlora_sft.model.load import compute_dtype, disable_inference_repacking, load_base
from qlora_sft.model.vocabulary import grow, new_rows
from qlora_sft.say import Say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLE = 200
"""Rows of a source that are scored; all of a smaller one."""
_TOKENS = 1024
_DEVIATIONS = 3
# A narrow source (all answers alike) would otherwise find the smallest difference strange; in nats.
_LEAST_DEVIATION = 0.1
_SHOWN = 3


@dataclass(frozen=True)
class Rated:
    """Holds what is scored of one row, and where it stands."""

    document: Rendered
    place: str


def with_ratings(
    config: Config,
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    chat_format: ChatFormat,
    base: str,
    say: Say,
) -> Config:
    """Returns the configuration with a number in place of every ``quality: perplexity``; itself if there is none."""
    data = config.data
    if not any(source.quality == "perplexity" for source in data.train):
        return config
    names = [source_name(source) for source in data.train]
    try:
        samples = {s.name: sample(s, config, tokenizer, chat_format) for s in sources if s.name in names}
    except DataError:
        # Where one row is faulty, all that are will be named.
        render_sources(list(sources), data, tokenizer, chat_format)
        raise
    scores = _scored(config, samples, base, say)
    qualities = rate(scores)
    say("\n".join(_described(name, samples[name], scores[name], qualities[name], tokenizer) for name in samples))
    train = [
        replace(source, quality=qualities[source_name(source)]) if source.quality == "perplexity" else source
        for source in data.train
    ]
    return replace(config, data=replace(data, train=train))


def sample(source: Source, config: Config, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat) -> list[Rated]:
    """Renders rows of a source, drawn with the run's seed; those that do not fit are left out. Raises `DataError`."""
    count = len(source.rows)
    drawn = random.Random(f"rating {config.seed} {source.name}").sample(range(count), min(SAMPLE, count))
    part = replace(source, rows=source.rows.without(set(range(count)) - set(drawn)))
    rated = []
    for conversation, _, fitting in fitted_rows(part, config.data, tokenizer, chat_format):
        if isinstance(fitting, DataError):
            raise DataError(f"{place(conversation)}: {fitting}")
        kept = [document for each in fitting if not isinstance(each, str) for document in each]
        rated += [Rated(kept[-1], place(conversation))] if kept else []
    return rated


def rate(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Returns the quality of every source, in hundredths and at least one of them, from the losses of its rows."""
    every = [loss for losses in scores.values() for loss in losses]
    if not every:
        return dict.fromkeys(scores, 1.0)
    middle = median(every)
    deviation = max(1.4826 * median(abs(loss - middle) for loss in every), _LEAST_DEVIATION)
    limit = middle + _DEVIATIONS * deviation
    ordinary = {name: sum(loss <= limit for loss in losses) for name, losses in scores.items()}
    return {
        name: max(0.01, round(ordinary[name] / len(losses), 2)) if losses else 1.0 for name, losses in scores.items()
    }


def _scored(config: Config, samples: Mapping[str, list[Rated]], base: str, say: Say) -> dict[str, list[float]]:
    """Returns the loss of every row, from the cache where the same rows were scored with the same weights before."""
    dtype, _ = compute_dtype(config.model.dtype)
    fetch_base(base, say)
    digest = hashlib.sha256(
        f"{fingerprint(base)} {dtype} {config.model.load_in_4bit} {config.model.rope_scaling}".encode()
    )
    for rated in samples.values():
        for each in rated:
            digest.update(json.dumps([each.document.input_ids, each.document.weights]).encode())
        digest.update(b"end of a source")
    file = cache_dir("ratings") / f"{digest.hexdigest()[:32]}.json"
    if file.is_file():
        kept: list[list[float]] = json.loads(file.read_text(encoding="utf-8"))
        return dict(zip(samples, kept, strict=True))
    say(f"quality: {sum(map(len, samples.values())):,} rows are scored with the base, once; the losses are kept")
    model = load_base(base, dtype, config.model.load_in_4bit, config.model.rope_scaling, config.model.trust_remote_code)
    disable_inference_repacking(model)
    grow(model, new_rows(config.model, base), initialise=True)
    scores = {name: [_loss(model.eval(), each.document) for each in rated] for name, rated in samples.items()}
    del model
    gc.collect()
    torch.cuda.empty_cache()
    write_json(file, list(scores.values()))
    return scores


@torch.no_grad()
def _loss(model: PreTrainedModel, document: Rendered) -> float:
    """Returns the mean loss of the last supervised tokens and what stands before them, 1,024 tokens in all."""
    end = max(i for i, weight in enumerate(document.weights) if weight > 0) + 1
    start = max(0, end - _TOKENS)
    ids = torch.tensor([document.input_ids[start:end]], device=model.device)
    supervised = torch.tensor(document.weights[start:end][1:], device=model.device) > 0
    logits = model(input_ids=ids).logits[0, :-1][supervised].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:][supervised]))


def _described(
    name: str, rated: list[Rated], losses: list[float], quality: float, tokenizer: PreTrainedTokenizerBase
) -> str:
    order = sorted(range(len(losses)), key=losses.__getitem__)
    typical = f"median perplexity {math.exp(median(losses)):.1f}" if losses else "no row fits"
    lines = [f"quality of {name}: {quality:g} ({typical} in {len(losses):,} rows)"]
    for what, chosen in (("strangest", order[::-1][:_SHOWN]), ("most expected", order[:_SHOWN])):
        for index in chosen:
            text = " ".join(_answer(rated[index].document, tokenizer).split())
            lines.append(f"  {what}: {rated[index].place}: {math.exp(min(losses[index], 99)):.1f}: {text[:100]}")
    return "\n".join(lines)


def _answer(document: Rendered, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = [token for token, weight in zip(document.input_ids, document.weights, strict=True) if weight > 0]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text
