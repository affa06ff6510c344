"""Open what can answer in a chat: a run's adapter or a model folder in transformers, a GGUF in llama.cpp.

All of them get their prompt from the same chat template, rendered here, because llama.cpp's own chat endpoint sets
enable_thinking unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_sft.chat.speaker import Messages, Said, Speaker, check_model
from qlora_sft.errors import ConfigError, ContextFull, RunError
from qlora_sft.gguf_file import read_gguf
from qlora_sft.run.folder import is_run

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A model that could take more is limited to this: the cache takes memory, and a chat on the terminal is short.
LARGEST_CONTEXT = 8192


@contextmanager
def opened(path: Path, max_new_tokens: int) -> Iterator[Speaker]:
    """Opens the model at ``path``.

    Raises `ConfigError` for a path that is no model, `RunError` for a model that cannot be loaded.
    """
    check_model(path)
    if path.suffix == ".gguf":
        from qlora_sft.export.run_gguf import running

        facts = gguf_facts(path)
        with running(path, facts.context) as server:
            yield _in_llama_cpp(server, facts, max_new_tokens)
    else:
        yield _in_transformers(path, max_new_tokens)


def prompt_text(messages: Messages, template: str, tokens: dict[str, str], think: bool | None) -> str:
    """Returns the prompt for the next answer as text.

    tokens: bos_token, eos_token and so on, by the names that templates use. Raises `RunError` if the template refuses
    the conversation.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    from qlora_sft.data.typed_parts import as_template_reads, check_no_lists

    mode = {} if think is None else {"enable_thinking": think}
    read = as_template_reads(messages, template)
    try:
        texts, _ = render_jinja_template(
            [read],
            chat_template=template,
            add_generation_prompt=True,
            **tokens,
            **mode,
        )
        check_no_lists(read, texts[0])
    except Exception as error:
        raise RunError(f"the chat template refuses this conversation: {error}") from None
    return str(texts[0])


# ------------------------------------------------------------------ transformers


def _in_transformers(path: Path, max_new_tokens: int) -> Speaker:
    """Answers with the adapter on its NF4 base, as it was trained, or with a merged model."""
    from qlora_sft.model.base_tokenizer import read_tokenizer, saved_tokenizer
    from qlora_sft.model.load import load_for_inference
    from qlora_sft.model.remote_code import check_folder

    tokenizer: PreTrainedTokenizerBase
    if is_run(path):
        tokenizer = saved_tokenizer(path / "adapter")
    else:
        check_folder(path)
        tokenizer = read_tokenizer(str(path))
    model = load_for_inference(path)
    stop_token_ids = _stop_token_ids(model, tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None) or 2**31

    def speak(messages: Messages, think: bool | None, show: Callable[[str], None], stopped: Callable[[], bool]) -> Said:
        text = prompt_text(messages, tokenizer.chat_template, tokenizer.special_tokens_map, think)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
        left = _tokens_left(inputs["input_ids"].shape[1], limit)
        streamer = _Streamer(tokenizer, stop_token_ids, show)
        model.generate(
            **inputs,
            max_new_tokens=min(max_new_tokens, left),
            do_sample=False,
            eos_token_id=sorted(stop_token_ids),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stop_token_ids),
            streamer=streamer,
            stopping_criteria=[lambda ids, _: stopped()],
        )
        ended = "stop" if streamer.stopped else "interrupt" if stopped() else "length"
        return Said(streamer.text, ended)

    return speak


def _stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the tokens that end an answer; those of a run were put into the generation config when it was loaded."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [] if configured is None else [configured])
    return ids | {tokenizer.eos_token_id}


def _tokens_left(prompt: int, limit: int) -> int:
    if prompt >= limit:
        raise ContextFull(f"the conversation has {prompt:,} tokens, the model takes {limit:,}")
    return limit - prompt


class _Streamer:
    """Shows text as tokens come.

    Control tokens of calls and thoughts are shown, but not the one that ends the turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: set[int], show: Callable[[str], None]):
        self.tokenizer, self.stop_token_ids, self.show = tokenizer, stop_token_ids, show
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Takes the ids of the prompt [1, n] first, then one id at a time [1]."""
        if self._prompt:
            self._prompt = False
            return
        for token in value.flatten().tolist():
            self.stopped |= token in self.stop_token_ids
            if not self.stopped:
                self.ids.append(token)
        text = self.tokenizer.decode(self.ids, clean_up_tokenization_spaces=False)
        # Half of a character comes with the next token.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show_up_to(text)

    def end(self) -> None:
        self._show_up_to(self.tokenizer.decode(self.ids, clean_up_tokenization_spaces=False))

    def _show_up_to(self, text: str) -> None:
        if len(text) > len(self.text):
            self.show(text[len(self.text) :])
            self.text = text


# ------------------------------------------------------------------ llama.cpp


@dataclass(frozen=True)
class GgufFacts:
    """Holds what a GGUF says of itself."""

    template: str
    tokens: dict[str, str]
    """Control tokens by the names that templates use."""
    adds_bos: bool
    """Whether llama.cpp puts bos before every prompt."""
    context: int
    """Tokens that the server takes at most."""


def gguf_facts(path: Path) -> GgufFacts:
    """Reads what the GGUF at ``path`` says of itself.

    Raises `ConfigError` if there is no such file, `RunError` for one that is damaged or has no chat template.
    """
    from qlora_sft.export.gguf_metadata import bos_first

    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        fields = read_gguf(path).fields
    except (ValueError, OSError) as error:
        raise RunError(f"{path}: not a whole GGUF file ({error})") from None
    template = fields.get("tokenizer.chat_template")
    if not template:
        raise RunError(f"{path}: the file has no chat template, so it does not say how it wants to be asked")
    vocabulary = fields["tokenizer.ggml.tokens"]
    tokens = {}
    for name, kind in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        at = fields.get(f"tokenizer.ggml.{kind}_token_id")
        if at is not None:
            tokens[f"{name}_token"] = vocabulary[at]
    context = int(fields.get(f"{fields['general.architecture']}.context_length", LARGEST_CONTEXT))
    return GgufFacts(template, tokens, bos_first(fields), min(context, LARGEST_CONTEXT))


def _in_llama_cpp(server: Any, facts: GgufFacts, max_new_tokens: int) -> Speaker:
    from qlora_sft.export.run_gguf import stream

    def speak(messages: Messages, think: bool | None, show: Callable[[str], None], stopped: Callable[[], bool]) -> Said:
        text = prompt_text(messages, facts.template, facts.tokens, think)
        # llama.cpp puts bos before every prompt for which the file says so.
        if facts.adds_bos:
            text = text.removeprefix(facts.tokens.get("bos_token", ""))
        return Said(*stream(server, text, max_new_tokens, show, stopped))

    return speak
