"""``qlora-sft preview``: what a configuration will train on, before anything is trained."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from qlora_sft.config import Config
from qlora_sft.faults import every_fault
from qlora_sft.say import tell


def preview(
    config: Config, count: int = 3, page: str | None = None, show: bool = True, *, alone: bool = False
) -> dict[str, Any]:
    """Prints the ledger and the mixture (stderr) and the first ``count`` documents as they are packed (stdout).

    Returns ``{"rows": [{source, ids, tokens, supervised, weights}, ...], "ledger": {...}}`` of the shown documents;
    ``page``: also writes a web page. Everything is what `train` would do with the same configuration. ``alone``:
    nothing is trained in this process, so Unsloth, which would have to be imported before what is needed here, is not.
    """
    if not alone:
        from qlora_sft.model.backend import choose_backend

        choose_backend(config.model.backend)
    from dataclasses import asdict

    from qlora_sft.data.plan import plan_data
    from qlora_sft.data.show import as_page, as_text
    from qlora_sft.data.splits import read_data
    from qlora_sft.data.template import chat_format
    from qlora_sft.model.base_check import check_base
    from qlora_sft.model.load import resolve_base
    from qlora_sft.model.tokenizer import load_tokenizer, stop_ids

    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        tell(text)

    with every_fault(config):
        train_sources, held_out_sources, _ = read_data(config, say)
    base = resolve_base(config.model.path)
    check_base(config, base)
    tokenizer = load_tokenizer(config.model, base, say)
    style = chat_format(tokenizer, stop_ids(config.model, base, tokenizer), config.model.chat_template)
    say(f"chat template: {style.reason}")
    prepared, _, bins = plan_data(config, train_sources, held_out_sources, tokenizer, style, say)
    documents = prepared.all_documents
    shown = first_documents(bins, count)
    packed = [[documents[index] for index in each] for each in shown]
    if show:
        print(as_text(packed, tokenizer, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    if page:
        from qlora_sft.atomic import written_file

        with written_file(Path(page)) as beside:
            beside.write_text(
                as_page(packed, tokenizer, f"{config.output}: what is trained", "\n\n".join(said)), "utf-8"
            )
    rows = [
        {
            "source": document.source,
            "ids": document.input_ids,
            "tokens": tokenizer.convert_ids_to_tokens(document.input_ids),
            "supervised": [weight > 0 for weight in document.weights],
            "weights": document.weights,
        }
        for each in packed
        for document in each
    ]
    ledger = {name: {**asdict(row), "share": row.share} for name, row in prepared.ledger.items()}
    return {"rows": rows, "ledger": ledger}


def first_documents(bins: list[list[int]], count: int) -> list[list[int]]:
    """The first bins, the last of them cut so that there are ``count`` documents in all."""
    shown: list[list[int]] = []
    for each in bins:
        if count <= 0:
            break
        shown.append(each[:count])
        count -= len(each)
    return shown
