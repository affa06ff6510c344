"""A GGUF file in llama.cpp, inside this process (xllamacpp)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_sft.errors import ConfigError, RunError


@contextmanager
def running(gguf: Path, context: int = 2048) -> Iterator[Any]:
    """llama.cpp with ``gguf`` loaded, on this machine's loopback address only.

    Raises `ConfigError` if there is no such file, `RunError` if xllamacpp is missing or cannot load it.
    """
    if not gguf.is_file():
        raise ConfigError(f"{gguf}: no such file")
    try:
        import xllamacpp
    except ImportError:
        raise RunError("running a GGUF needs xllamacpp: pip install 'qlora-sft[gguf]'") from None
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx = context
    params.n_parallel = 1
    params.verbosity = -1
    params.warmup = False
    try:
        server = xllamacpp.Server(params)
    except Exception as error:
        raise RunError(f"llama.cpp cannot load {gguf}: {error}") from None
    yield server


def complete(server: Any, prompt: list[int] | str, max_new_tokens: int) -> str:
    """Greedy continuation of token ids or text, up to the end of the turn."""
    answer = server.handle_completions(
        {"prompt": prompt, "n_predict": max_new_tokens, "temperature": 0.0, "cache_prompt": False}
    )
    if "choices" not in answer:
        raise RunError(f"llama.cpp refused the prompt: {answer}")
    return str(answer["choices"][0]["text"])


def reply(server: Any, messages: list[dict[str, Any]], max_new_tokens: int, show: Callable[[str], None]) -> str:
    """The next turn of a chat under the file's own template; ``show`` gets every piece as it comes."""
    pieces: list[str] = []

    def on_chunk(chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            raise RunError(f"llama.cpp: {chunk['error']}")
        for choice in chunk.get("choices", []):
            delta = choice.get("delta", {})
            text = (delta.get("reasoning_content") or "") + (delta.get("content") or "")
            if text:
                pieces.append(text)
                show(text)

    request = {"messages": messages, "max_tokens": max_new_tokens, "temperature": 0.0, "stream": True}
    server.handle_chat_completions(request, on_chunk)
    return "".join(pieces)
