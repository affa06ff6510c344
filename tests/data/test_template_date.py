"""A template that writes today's date: said at the start, the same for the whole run, whenever it goes on."""

from __future__ import annotations

import json
import shutil
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests_support import SHORT, result
from transformers.utils.chat_template_utils import _compile_jinja_template as compiled

from qlora_sft.data import template, template_date
from qlora_sft.data.shipped import FOLDER
from qlora_sft.data.template import choose_chat_format
from qlora_sft.data.template_date import with_date, writes_date
from qlora_sft.errors import DataError
from qlora_sft.model.tokenizer import load_tokenizer
from qlora_sft.train import train
from qlora_sft.training.trainer import PackedSFTTrainer

DAY = date(2026, 3, 7)
DATED = (
    "{%- if strftime_now is defined %}"
    "{{- '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}{%- endif %}"
)


@pytest.mark.parametrize(
    "format",
    [
        "%d %b %Y",
        "%Y-%m-%d",
        "%A, %B %-d, %Y",
        "%H:%M:%S",
        "100%% of %y",
        "%%d",
        "%c|%x|%X|%j|%U|%e|%F|%D|%p",
        "none",
        "",
    ],
)
@pytest.mark.parametrize("written", ["{{ strftime_now('FORMAT') }}", "{{ strftime_now(format) }}"])
def test_the_macro_writes_what_strftime_writes(format: str, written: str) -> None:
    text = with_date(written.replace("FORMAT", format), DAY)
    assert compiled(text).render(format=format) == datetime(2026, 3, 7).strftime(format)


def test_only_a_template_that_calls_the_function_writes_the_date() -> None:
    assert writes_date(DATED)
    assert writes_date("{% set d = strftime_now ('%Y') %}")
    assert not any(writes_date(file.read_text()) for file in FOLDER.glob("*.jinja"))


def test_the_date_is_said_and_every_rendering_has_it(own_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(own_tokenizer)
    tokenizer.chat_template = DATED + (FOLDER / "chatml.jinja").read_text()
    chat_format = choose_chat_format(tokenizer, day=DAY)
    assert "it writes today's date into every conversation: 2026-03-07, kept with the run" in chat_format.reason
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    text, spans = template.render_text(row, tokenizer, chat_format)
    assert text.startswith("<|im_start|>system\nToday is 07 Mar 2026<|im_end|>\n")
    assert [text[span.start : span.end] for span in spans] == ["Ho<|im_end|>"]
    assert choose_chat_format(tokenizer).day == date.today()


def test_a_template_that_is_configured_is_called_by_its_name(own_tokenizer: Any, tokenizer: Any) -> None:
    assert choose_chat_format(tokenizer, name="chatml-think").reason.startswith(
        "chatml-think; its {% generation %} marks"
    )
    assert choose_chat_format(tokenizer).reason.startswith("the tokenizer's own; its {% generation %} marks")
    assert choose_chat_format(own_tokenizer, name="own.jinja").reason.startswith(
        "own.jinja; what is supervised follows from"
    )


@pytest.mark.parametrize("text", ["{% for %}", "{{ x | nosuch }}", "{% generation %}{{ x }}", "{% if x %}"])
def test_a_template_that_is_no_jinja_is_refused_once(text: str, own_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(own_tokenizer)
    tokenizer.chat_template = text
    with pytest.raises(DataError, match="not valid Jinja"):
        choose_chat_format(tokenizer)


class Crash(Exception):
    pass


def test_a_run_goes_on_the_next_day_with_an_empty_cache(
    make_config: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the date of the first day its rows would not be those that it began with."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "chat_template.jinja").write_text(DATED + (FOLDER / "chatml.jinja").read_text())
    monkeypatch.setenv("QLORA_SFT_CACHE", str(tmp_path / "cache"))
    settings = [*SHORT, f"model.path={base}"]
    whole = make_config(*settings, f"output={tmp_path / 'whole'}")
    train(whole, say=lambda _: None)
    config = make_config(*settings, f"output={tmp_path / 'stopped'}")
    take = PackedSFTTrainer.get_batch_samples

    def stop(self: Any, *args: Any) -> Any:
        if self.state.global_step == 3:
            raise Crash
        return take(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedSFTTrainer, "get_batch_samples", stop)
        with pytest.raises(Crash):
            train(config, say=lambda _: None)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(template, "today", lambda: date.today() + timedelta(days=1))
    said: list[str] = []
    train(config, resume=True, say=said.append)
    assert f"writes today's date into every conversation: {date.today()}" in "\n".join(said)
    assert result(tmp_path / "stopped") == result(tmp_path / "whole")
    assert json.loads((tmp_path / "stopped" / "begun.json").read_text())["template_date"] == str(date.today())
    # A new run of that day is another one.
    assert choose_chat_format(load_tokenizer(config.model, str(base))).day == date.today() + timedelta(days=1)
    assert template_date.today() == date.today()
