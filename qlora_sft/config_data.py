"""Define the data section of the configuration: where rows come from, how they are mixed, and what makes no sense."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from fractions import Fraction
from typing import Annotated, Literal

from qlora_sft.ranges import Count, Factor, Range

Overlong = Literal["drop", "truncate_left_turns", "truncate", "error"]
Require = Callable[[bool, str, str], None]
"""Takes whether a value is good, its key, and what is wrong otherwise."""

# Every form a row can have, with the columns it needs and those it may have besides.
_OF_A_CHAT = ("system", "tools", "chat_template_kwargs")
FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), _OF_A_CHAT),
    "sharegpt": (("conversations",), _OF_A_CHAT),
    "alpaca": (("instruction", "output"), ("input", "history", *_OF_A_CHAT)),
    "prompt_completion": (("prompt", "completion"), _OF_A_CHAT),
    "text": (("text",), ()),
}


@dataclass(frozen=True)
class SourceConfig:
    """Names one source of rows and says how they are read and supervised."""

    path: str
    """File (.jsonl, .json, .parquet, .csv, .tsv, .txt; also compressed, with .gz or .zst at the end), folder, glob, or
    Hugging Face data set (``owner/name``, ``owner/name:configuration``)."""
    name: str | None = None
    """Name in reports; default: the last part of the path without its extension."""
    max_rows: Count | None = None
    """Uses only this many rows, drawn at random with the run's seed; of a stream, the first rows."""
    fraction: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Uses only this share of the source's own rows, drawn at random with the run's seed.
    It is not a share of the mixture."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """Format of the rows. ``auto`` detects it from the columns and prints what it found."""
    columns: dict[str, str] | None = None
    """Which column holds what, where the names are not the usual ones: ``{prompt: question, completion: answer}``."""
    split: str | None = None
    """Split of a Hugging Face data set, or of a folder laid out like one; default there: ``train``."""
    revision: str | None = None
    """Commit, tag or branch of a Hugging Face data set."""
    streaming: bool = False
    """Reads the first ``max_rows`` rows of a Hugging Face data set without downloading the rest."""
    loss_weight: Annotated[float, Range(1e-6, 1e6)] = 1.0
    """Factor on the loss of every supervised token of this source."""
    supervise: Literal["assistant", "turns", "last", "all"] = "assistant"
    """Which tokens are trained: every assistant turn, only the last one, or the whole conversation. ``turns`` makes one
    document of every assistant turn, preceded by what the model sees before it at inference, with the history as the
    template rewrites it there; what these documents share is computed once (``share_prefixes``)."""
    allow_share: bool = False
    """Accepts any share of supervised tokens. Otherwise, in conversations, less than 5% is an error, and less than 20%
    or more than 95% a warning, with the likely causes; see [what is judged](data.md#what-is-judged)."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """``on`` and ``off`` set ``enable_thinking`` of the template for rows that do not set it. ``auto`` leaves it to the
    rows' own ``chat_template_kwargs``."""
    think_tags: Literal["reasoning", "text"] = "reasoning"
    """What ``<think>...</think>`` at the beginning of an answer means. ``reasoning``: it is the reasoning, which the
    template writes in its own way. ``text``: it is text like any other."""
    allow_special: bool = False
    """Lets control tokens inside messages act as control tokens instead of staying text. Use it only
    for data that you wrote yourself."""


@dataclass(frozen=True)
class TrainSourceConfig(SourceConfig):
    """Adds what a training source says about its part in the mixture."""

    held_out: str | None = None
    """Share of this source's rows that is held out (``5%``), instead of ``data.held_out``; ``0%`` for none."""

    weight: Factor | None = None
    """Share of the mixture, relative to the other sources' weights; only for ``mixture: explicit``."""
    quality: Factor | Literal["perplexity", "file"] | None = None
    """Factor on the number of rows; only for ``mixture: quality``, where the default is 1. ``perplexity``: the share of
    rows whose answers do not have an unusually high loss under the base, compared with the rows of all sources, in a
    sample that is scored once and cached. ``file``: the mean of the ratings in the file ``ratings``. The most extreme
    rows are printed for you to read."""
    ratings: str | None = None
    """File for ``quality: file``: one rating, 0 or more, for every row of the source, in the same order, one per line;
    a number, or an object with a ``rating``. Rate all sources on one scale; a source without ratings counts as 1."""
    repeat: Annotated[float, Range(0, 10_000, above=True)] = 1.0
    """How often every row is offered to the mixture per epoch; 2 is like naming the source twice."""


@dataclass(frozen=True)
class ReplayConfig(SourceConfig):
    """Names general data that is mixed in as replay."""

    share: Annotated[float, Range(0, 0.95, above=True)] = 0.05
    """Share of replay in the documents of the whole run."""


@dataclass(frozen=True)
class DataConfig:
    """Says what is trained on, what is held out, and how documents are mixed and packed."""

    train: list[TrainSourceConfig]
    """Sources that are trained on, mixed as ``mixture`` says."""
    held_out: list[SourceConfig] | str = field(default_factory=list)
    """Sources that are never trained on; their loss is measured before and after the run. Or a share of every training
    source (``5%``): at least one row of each, chosen by seed and content, with near duplicates kept on one side."""
    max_length: Annotated[int, Range(2, 10**8)] = 2048
    """Tokens per packed sequence, and the longest conversation that is accepted."""
    overlong: Overlong = "drop"
    """What happens to a conversation of more than ``max_length`` tokens: it is dropped, loses its earliest turns, loses
    its last tokens, or ends the run. Every case is counted and shown. Plain text is split into pieces that fit."""
    min_answer_tokens: Count | None = None
    """Drops training conversations in which no answer has this many tokens, not counting the token that ends the turn.
    Default: none is dropped, and a source in which a fifth of the answers have fewer than 4 gets a warning; 1 accepts
    them all."""
    packing: Literal["bfd", "ffd", "none"] = "bfd"
    """``bfd``: best-fit decreasing over the whole data set; ``ffd``: first-fit
    decreasing. Packing changes the speed and nothing else."""
    packing_window: Count | None = None
    """Packs this many documents at a time instead of the whole data set. The sequences then roughly keep the order of
    the data, as in a stream, and are filled a little less."""
    share_prefixes: Literal["auto", "on", "off"] = "auto"
    """Computes what several rows have in common at their beginning only once: system prompts, tools, earlier turns.
    Loss and gradients are those of the separate rows. ``auto`` does it where it saves more than 5% of the tokens, on a
    GPU 15%. Models with sliding windows, logit caps or attention sinks need ``on`` on a GPU, and mixtures of experts
    need it everywhere. ``on`` is an error where the model cannot share."""
    mixture: Literal["proportional", "temperature", "quality", "explicit"] = "proportional"
    """Share p of each source in the documents of an epoch, by its number of rows N
    (times ``repeat``): ``proportional`` p ~ N, ``temperature`` p ~ N^(1/T), ``quality`` p
    ~ N * quality, ``explicit`` p ~ weight. An epoch has sum(N) documents."""
    temperature: Annotated[float, Range(0.1, 1e6)] | None = None
    """T of ``mixture: temperature``; 1 is proportional, larger is more even."""
    replay: ReplayConfig | None = None
    """General data that is mixed in, so that the model keeps its other abilities."""
    curriculum: Literal["none", "progressive"] = "none"
    """``progressive``: the share of replay falls linearly from 2 * ``replay.share`` to zero over the run."""
    deduplicate: Literal["none", "exact", "near"] = "none"
    """Drops conversations that already occurred in any training source. ``near`` also drops those that differ only a
    little (MinHash over 5-word shingles, Jaccard similarity of 0.8 or more; needs ``pip install qlora-sft[dedup]``)."""
    decontaminate: list[str] = field(default_factory=list)
    """Evaluation files, in any form that a source can have. Training rows that share an
    n-gram of words with them are dropped. Of a data set of the Hub all splits except
    ``train`` are read, or the one in brackets: ``owner/name[test]``."""
    decontaminate_words: Annotated[int, Range(2, 1000)] = 13
    """Length of that n-gram in words."""


def check_data(d: DataConfig, require: Require) -> None:
    """Requires that names differ and that every key of the data section has an effect."""
    trained: list[SourceConfig] = [*d.train, *([d.replay] if d.replay else [])]
    held_out = held_out_sources(d)
    _check_shares(d, require)
    for split, named in (("train", trained), ("held_out", held_out)):
        names = [source_name(source) for source in named]
        if split == "held_out":
            names += [name for name, share in held_out_shares(d).items() if share]
        double = sorted({name for name in names if names.count(name) > 1})
        require(not double, f"data.{split}", f"has two sources named {', '.join(double)}; give each its own name:")
    keys = [f"data.train.{i}" for i in range(len(d.train))] + ["data.replay"] * (d.replay is not None)
    keys += [f"data.held_out.{i}" for i in range(len(held_out))]
    for key, source in zip(keys, [*trained, *held_out], strict=True):
        _check_source(key, source, require)
    for i, source in enumerate(d.train):
        key, explicit = f"data.train.{i}", d.mixture == "explicit"
        # A key that has no effect would be believed to have one.
        needed = "must be given with data.mixture=explicit, the share relative to the other sources' weights"
        require((source.weight is not None) >= explicit, f"{key}.weight", needed)
        require(source.weight is None or explicit, f"{key}.weight", "has an effect with data.mixture=explicit only")
        quality = source.quality is None or d.mixture == "quality"
        require(quality, f"{key}.quality", "has an effect with data.mixture=quality only")
        rated = (source.ratings is not None) == (source.quality == "file")
        require(
            rated, f"{key}.ratings", "must name the file of ratings with quality=file, and has an effect only there"
        )
    warm = d.mixture == "temperature"
    wanted = "is needed with data.mixture=temperature" if warm else "has an effect with data.mixture=temperature only"
    require((d.temperature is not None) == warm, "data.temperature", wanted)
    shares = d.share_prefixes != "on" or d.packing != "none"
    require(shares, "data.share_prefixes", "needs packing: rows that are computed one by one share nothing")
    progressive = d.curriculum == "progressive"
    require(
        d.replay is not None or not progressive, "data.curriculum", "needs data.replay: it lowers the share of replay"
    )
    if d.replay and progressive:
        why = f"must be in (0, 0.5]: the run starts with twice that, got {d.replay.share}"
        require(d.replay.share <= 0.5, "data.replay.share", why)


def _check_source(key: str, source: SourceConfig, require: Require) -> None:
    rows, columns = source.max_rows, source.columns or {}
    endless = "needs max_rows: packing has to know all rows before the first step"
    require(rows is not None or not source.streaming, f"{key}.streaming", endless)
    require(
        source.fraction == 1 or not source.streaming, f"{key}.fraction", "cannot be drawn from a stream; set max_rows"
    )
    forms = FORMS if source.format == "auto" else {source.format: FORMS[source.format]}
    allowed = dict.fromkeys(column for needed, optional in forms.values() for column in (*needed, *optional))
    for ours in columns:
        close = get_close_matches(ours, allowed, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        require(ours in allowed, f"{key}.columns", f"maps {ours!r}, which is none of {', '.join(allowed)}{hint}")


def held_out_sources(d: DataConfig) -> list[SourceConfig]:
    """Returns the sources that are named as held out; none if a share of the training sources is."""
    return d.held_out if isinstance(d.held_out, list) else []


def held_out_shares(d: DataConfig) -> dict[str, Fraction]:
    """Returns the share of each training source that is held out; sources without one are left out."""
    of_all = d.held_out if isinstance(d.held_out, str) else None
    given = {source_name(source): source.held_out or of_all for source in d.train}
    shares = {name: _share(text) for name, text in given.items() if text}
    return {name: share for name, share in shares.items() if share}


def _share(text: str) -> Fraction | None:
    """Returns the share that a text as ``5%`` says; None if it says none, or more than half."""
    found = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?) ?%", text.strip())
    share = Fraction(found[1]) / 100 if found else None
    return share if share is not None and share <= Fraction(1, 2) else None


def _check_shares(d: DataConfig, require: Require) -> None:
    given = {f"data.train.{i}.held_out": source.held_out for i, source in enumerate(d.train)}
    for key, text in {"data.held_out": d.held_out, **given}.items():
        if isinstance(text, str):
            wanted = f"must be a share of at most half, as 5%, got {text!r}"
            require(_share(text) is not None, key, wanted + ("" if "train" in key else "; or list sources"))


def source_name(source: SourceConfig) -> str:
    """Returns the name that reports give a source: its own, or the last part of its path without endings.

    ``a/b.jsonl.gz`` gives ``b``.
    """
    if source.name:
        return source.name
    path = source.path.removeprefix("demo:").replace("\\", "/")
    parts = [part for part in path.split("/") if part and not re.search(r"[*?\[]", part)] or [path]
    last = parts[-1].partition(":")[0]
    return re.sub(r"(\.(jsonl|ndjson|json|parquet|csv|tsv|txt|gz|zst))+$", "", last) or last
