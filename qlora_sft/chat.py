"""``qlora-sft chat``: talk to the adapter of a run, a model folder or a GGUF file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_sft.errors import ConfigError

Messages = list[dict[str, Any]]
Answer = Callable[[Messages], str]


def chat(model: str, message: str | None, system: str | None, max_new_tokens: int) -> dict[str, Any]:
    """One answer to ``message``, or a conversation on the terminal until end of input or ``/exit``.

    Answers are greedy and are printed on stdout as they come. Returns the whole conversation.
    """
    messages: Messages = [{"role": "system", "content": system}] if system else []
    with _opened(Path(model).expanduser(), max_new_tokens) as answer:
        for text in [message] if message is not None else _typed():
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": answer(messages)})
            print(flush=True)
    return {"messages": messages}


def _typed() -> Iterator[str]:
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if text in ("/exit", "/quit"):
            return
        if text:
            yield text


@contextmanager
def _opened(path: Path, max_new_tokens: int) -> Iterator[Answer]:
    if path.suffix == ".gguf":
        from qlora_sft.export.run_gguf import reply, running

        with running(path) as server:
            yield lambda messages: reply(server, messages, max_new_tokens, _show)
    elif (path / "adapter").is_dir() or (path / "config.json").is_file():
        yield _with_transformers(path, max_new_tokens)
    else:
        raise ConfigError(f"{path}: neither a run folder, nor a model folder, nor a .gguf file")


def _with_transformers(path: Path, max_new_tokens: int) -> Answer:
    """The adapter on its NF4 base as it was trained, or a merged model, in plain transformers."""
    from transformers import AutoTokenizer, TextStreamer

    from qlora_sft.model.load import load_for_inference

    folder = path / "adapter" if (path / "adapter").is_dir() else path
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = load_for_inference(path)

    def answer(messages: Messages) -> str:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
        return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return answer


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
