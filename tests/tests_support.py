"""Helpers that several test files use."""

from __future__ import annotations

from qlora_sft.config import Config
from qlora_sft.data.prepare import render_sources
from qlora_sft.data.render import Rendered
from qlora_sft.data.sources import read_sources
from qlora_sft.model.tokenizer import load_tokenizer


def documents_of(config: Config) -> list[Rendered]:
    """The rendered training documents of a configuration."""
    tokenizer = load_tokenizer(config.model, config.model.path)
    return render_sources(read_sources(config.data.train, config.seed), config.data, tokenizer).all_documents
