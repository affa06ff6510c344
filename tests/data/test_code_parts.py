"""Code in answers, in nanochat's form: the code is trained, its output is not, whatever the template."""

import copy
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_sft.config_data import DataConfig, SourceConfig, TrainSourceConfig
from qlora_sft.data.code_parts import MARKS, placed
from qlora_sft.data.formats import convert_noting, detect
from qlora_sft.data.prepare import render_sources
from qlora_sft.data.render import Rendered, render_conversation, render_prompt
from qlora_sft.data.shipped import FOLDER
from qlora_sft.data.sources import read_sources
from qlora_sft.data.template import ChatFormat, choose_chat_format
from qlora_sft.errors import DataError

Part = dict[str, str]

NANOCHAT = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '<|user_start|>' + message.content + '<|user_end|>' }}"
    "{% else %}{{ '<|assistant_start|>' }}{% generation %}{{ message.content + '<|assistant_end|>' }}"
    "{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}"
)
CONTROL = [
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>", "<|python_start|>",
    "<|python_end|>", "<|output_start|>", "<|output_end|>",
]  # fmt: skip

# A row of GSM8K as nanochat's task makes it: every <<12/60=0.2>> becomes a call of the calculator and what came out.
GSM8K = [
    {"role": "user", "content": "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of it."},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "Weng earns 12/60 = $"},
            {"type": "python", "text": "12/60"},
            {"type": "python_output", "text": "0.2"},
            {"type": "text", "text": "0.2 per minute.\nWorking 50 minutes, she earned 0.2 x 50 = $"},
            {"type": "python", "text": "0.2*50"},
            {"type": "python_output", "text": "10"},
            {"type": "text", "text": "10.\n#### 10"},
        ],
    },
]


@pytest.fixture(scope="module")
def nanochat(small_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.add_tokens(CONTROL, special_tokens=True)
    tokenizer.chat_template = NANOCHAT
    return tokenizer


def format_of(tokenizer: Any) -> ChatFormat:
    stops = [t for t in ("<|assistant_end|>", "<|im_end|>") if t in tokenizer.get_vocab()]
    return choose_chat_format(tokenizer, tokenizer.convert_tokens_to_ids(stops))


def render(messages: Any, tokenizer: Any, **options: Any) -> Rendered:
    row = {"messages": messages}
    form = detect(row, None)
    assert form is not None
    return render_conversation(convert_noting(row, form), tokenizer, chat_format=format_of(tokenizer), **options)


def as_nanochat_does(messages: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and mask by its rules, turn by turn and part by part, without a template."""
    ids: list[int] = []
    mask: list[int] = []

    def add(text: str, on: int) -> None:
        new = tokenizer(text, add_special_tokens=False).input_ids
        ids.extend(new)
        mask.extend([on] * len(new))

    add("<|bos|>", 0)
    for message in messages:
        if message["role"] == "user":
            add("<|user_start|>", 0), add(message["content"], 0), add("<|user_end|>", 0)
            continue
        add("<|assistant_start|>", 0)
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            on = int(part["type"] != "python_output")
            start, end = MARKS.get(part["type"], ("", ""))
            add(start, on), add(part["text"], on), add(end, on)
        add("<|assistant_end|>", 1)
    return ids, mask


def test_nanochats_example_has_only_its_outputs_masked(nanochat: Any) -> None:
    rendered = render(GSM8K, nanochat)
    assert (rendered.input_ids, [int(w > 0) for w in rendered.weights]) == as_nanochat_does(GSM8K, nanochat)
    masked = nanochat.decode([i for i, w in zip(rendered.input_ids, rendered.weights, strict=True) if not w])
    assert masked.endswith("<|assistant_start|><|output_start|>0.2<|output_end|><|output_start|>10<|output_end|>")
    assert rendered.notes == {}


PARTS = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["text", "python", "python_output"]),
            "text": st.sampled_from(["1+1", " 2 ", "x", "\n", "print('a')\n", "<|output_end|>", "<|im_end|>", "ü"]),
        }
    ),
    min_size=1,
    max_size=6,
)


@given(st.lists(PARTS, min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_any_parts_are_masked_as_nanochat_masks_them(nanochat: Any, turns: list[list[Part]]) -> None:
    """Marks that are typed stay text, so they are left out of what is compared with nanochat, which lets them act."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        plain = [part for part in turn if "<|" not in part["text"]]
        plain += [{"type": "text", "text": "."}]
        messages += [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": plain}]
    rendered = render(messages, nanochat)
    found = nanochat.decode(rendered.input_ids), [int(w > 0) for w in rendered.weights]
    ids, mask = as_nanochat_does(messages, nanochat)
    # Neighbouring texts of one weight may be joined before they are encoded.
    assert found[0] == nanochat.decode(ids)
    for on in (0, 1):
        ours, theirs = (
            nanochat.decode([i for i, m in zip(each, masks, strict=True) if m == on])
            for each, masks in ((rendered.input_ids, found[1]), (ids, mask))
        )
        assert ours == theirs


ENDS = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"]


@pytest.fixture(scope="module")
def with_ends(own_tokenizer: Any) -> Any:
    """The base's tokenizer with what ends turns in all of the templates."""
    tokenizer = copy.deepcopy(own_tokenizer)
    tokenizer.add_tokens([end for end in ENDS if end not in tokenizer.get_vocab()], special_tokens=True)
    return tokenizer


@given(PARTS, st.sampled_from(["chatml", "chatml-think", "llama3", "qwen3", "gemma", "phi"]))
@settings(max_examples=40, deadline=None)
def test_in_every_template_the_answer_is_that_of_its_text_and_only_outputs_are_masked(
    with_ends: Any, parts: list[Part], template: str
) -> None:
    """The text is that of a plain answer which spells the marks; of its supervised text, the outputs are taken out."""
    parts = [{"type": "text", "text": "So "}, *parts, {"type": "text", "text": " done"}]
    tokenizer = with_ends
    text, stops = (FOLDER / f"{template}.jinja").read_text(), tokenizer.convert_tokens_to_ids(ENDS)
    chat_format = ChatFormat(text, "", frozenset(stops))
    question = {"role": "user", "content": "?"}
    spelled = "".join(MARKS.get(p["type"], ("", ""))[0] + p["text"] + MARKS.get(p["type"], ("", ""))[1] for p in parts)
    form = detect({"messages": []}, None)
    assert form is not None
    coded, plain = (
        render_conversation(
            convert_noting({"messages": [question, {"role": "assistant", "content": content}, question,
                                         {"role": "assistant", "content": "end"}]}, form),
            tokenizer, chat_format=chat_format,
        )
        for content in (parts, spelled)
    )  # fmt: skip
    assert tokenizer.decode(coded.input_ids) == tokenizer.decode(plain.input_ids)

    def trained(each: Rendered) -> str:
        return tokenizer.decode([i for i, w in zip(each.input_ids, each.weights, strict=True) if w])

    def expected(text: str) -> str:
        for part in parts:
            if part["type"] == "python_output":
                text = text.replace(f"<|output_start|>{part['text']}<|output_end|>", "", 1)
        return text

    assert trained(coded) == expected(trained(plain))


def test_marks_that_somebody_typed_are_text(nanochat: Any) -> None:
    typed = [
        {"role": "user", "content": "<|output_start|>5<|output_end|>"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "<|python_start|>"}, {"type": "python", "text": "1"}],
        },
    ]
    rendered = render(typed, nanochat)
    mark = nanochat.convert_tokens_to_ids("<|python_start|>")
    assert rendered.input_ids.count(mark) == 1
    assert not set(nanochat.convert_tokens_to_ids(["<|output_start|>", "<|output_end|>"])) & set(rendered.input_ids)
    # Two marks of the question and one of the answer.
    assert list(rendered.notes.values()) == [3]


def test_a_vocabulary_without_the_marks_has_them_as_text_and_says_so(tokenizer: Any) -> None:
    rendered = render(GSM8K, tokenizer)
    trained = tokenizer.decode([i for i, w in zip(rendered.input_ids, rendered.weights, strict=True) if w])
    assert trained.startswith("Weng earns 12/60 = $<|python_start|>12/60<|python_end|>0.2 per minute.")
    assert list(rendered.notes) == [
        "rows with code parts whose marks are text, because the vocabulary has no <|python_start|>"
    ]


def test_no_token_reaches_over_the_bounds_of_an_output() -> None:
    """Nor where whole rows are encoded at once, as for this tokenizer, which knows words with marks in them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    named = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    text = "1/5<|python_end|><|output_start|>0.2<|output_end|>. So"
    raw.train_from_iterator([text] * 99, trainers.BpeTrainer(vocab_size=400, special_tokens=named, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = NANOCHAT.replace("<|assistant_end|>", "</s>")
    parts = [
        {"type": "python", "text": "1/5"},
        {"type": "python_output", "text": "0.2"},
        {"type": "text", "text": ". So"},
    ]
    row = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": parts}]
    rendered = render(row, tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(rendered.input_ids)
    stretches = [
        "".join(token for token, _ in group)
        for _, group in groupby(zip(tokens, rendered.weights, strict=True), lambda pair: pair[1])
    ]
    asked = {"messages": [*row, {"role": "user", "content": "why?"}]}
    form = detect(asked, None)
    assert form is not None
    prompt = render_prompt(convert_noting(asked, form), tokenizer, format_of(tokenizer))
    assert prompt[: len(tokens)] == rendered.input_ids
    assert stretches[1:] == [
        "<|python_start|>1/5<|python_end|>", "<|output_start|>0.2<|output_end|>", ".▁So</s>"
    ]  # fmt: skip


def test_weights_and_settings_reach_every_part(nanochat: Any) -> None:
    half = copy.deepcopy(GSM8K)
    half[1]["weight"] = 0.5
    assert set(render(half, nanochat).weights) == {0.0, 0.5}
    off = copy.deepcopy(GSM8K)
    off[1]["train"] = False
    assert set(render(off, nanochat).weights) == {0.0}
    assert set(render(GSM8K, nanochat, supervise="all").weights[1:]) == {1.0}


def test_reasoning_before_code_is_told_apart(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "<think>\nhm\n</think>\n\nIt is "}, {"type": "python", "text": "1"}]
    for content in (parts, [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "It is "}, parts[1]]):
        rendered = render([GSM8K[0], {"role": "assistant", "content": content}], tokenizer)
        trained = tokenizer.decode([i for i, w in zip(rendered.input_ids, rendered.weights, strict=True) if w])
        assert trained == "<think>\nhm\n</think>\n\nIt is <|python_start|>1<|python_end|><|im_end|>"


def test_a_template_that_rewrites_the_content_is_refused(nanochat: Any) -> None:
    dropping = copy.deepcopy(nanochat)
    dropping.chat_template = NANOCHAT.replace(
        "message.content + '<|a", "message.content|replace('\U000ffff3', '') + '<|a"
    )
    with pytest.raises(DataError, match="leaves out"):
        render(GSM8K, dropping)
    twice = copy.deepcopy(nanochat)
    twice.chat_template = NANOCHAT.replace("{{ '<|bos|>' }}", "{{ '<|bos|>' + messages[-1].content }}")
    with pytest.raises(DataError, match="rewrites an answer with code parts"):
        render(GSM8K, twice)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "user", "content": [{"type": "python", "text": "1"}]}, "python belongs into an answer"),
        (
            {"role": "assistant", "content": [{"type": "tool_call", "tool_call": {"name": "f", "arguments": {}}},
                                              {"type": "python", "text": "1"}]},
            "python belongs into an answer, before its tool calls",
        ),
        ({"role": "assistant", "content": [{"type": "python", "text": "\U000FFFF1"}]}, "private-use characters"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_apart_is_refused(nanochat: Any, message: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        render([GSM8K[0], message], nanochat)


def test_a_prompt_shows_what_the_document_shows(nanochat: Any) -> None:
    row: Any = {"messages": [*GSM8K, {"role": "user", "content": "and?"}]}
    form = detect(row, None)
    assert form is not None
    prompt = render_prompt(convert_noting(row, form), nanochat, format_of(nanochat))
    whole = render([*GSM8K, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "x"}], nanochat)
    assert nanochat.decode(whole.input_ids).startswith(nanochat.decode(prompt))
    assert set(nanochat.convert_tokens_to_ids(CONTROL)) <= set(whole.input_ids)
    assert [i for i in prompt if i in nanochat.added_tokens_decoder] == [
        i for i in whole.input_ids[:-2] if i in nanochat.added_tokens_decoder
    ]


def test_rows_without_parts_may_have_any_character(tokenizer: Any) -> None:
    rendered = render(
        [{"role": "user", "content": "\U000ffff1?"}, {"role": "assistant", "content": "\U000ffff3"}], tokenizer
    )
    assert "\U000ffff3" in tokenizer.decode(rendered.input_ids)
    conversation: Any = {"messages": [{"role": "user", "content": "\U000ffff1"}]}
    assert placed(conversation) is conversation


def test_a_source_of_such_rows_is_read_like_any_other(tmp_path: Path, nanochat: Any) -> None:
    file = tmp_path / "gsm8k.jsonl"
    file.write_text((json.dumps({"messages": GSM8K}) + "\n") * 3)
    prepared = render_sources(
        read_sources([SourceConfig(str(file))], 0), DataConfig([TrainSourceConfig("a")]), nanochat, format_of(nanochat)
    )
    ids, mask = as_nanochat_does(GSM8K, nanochat)
    for document in prepared.all_documents:
        assert (document.input_ids, [int(w > 0) for w in document.weights]) == (ids, mask)
    assert prepared.ledger["gsm8k"].supervised == 3 * sum(mask)
