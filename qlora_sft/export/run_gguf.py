"""Runs a GGUF file in llama.cpp inside this process, with xllamacpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_sft.errors import ConfigError, ContextFull, RunError
from qlora_sft.export.llama_tools import loaded, threads

if TYPE_CHECKING:
    from xllamacpp import Server


@contextmanager
def running(gguf: Path, context: int = 2048, port: int = 0) -> Iterator[Server]:
    """Loads ``gguf`` in llama.cpp and yields its server, which listens on the loopback address.

    The port is a free one if ``port`` is 0.

    Raises `ConfigError` if there is no such file, `RunError` if xllamacpp is missing, cannot load it, or if the port
    is taken.
    """
    if not gguf.is_file():
        raise ConfigError(f"{gguf}: no such file")
    try:
        xllamacpp = loaded(lambda: import_module("xllamacpp"))
    except ModuleNotFoundError:
        raise RunError("running a GGUF needs xllamacpp: pip install 'qlora-sft[gguf]'") from None
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx = context
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads()
    params.verbosity = -1
    params.warmup = False
    try:
        server = xllamacpp.Server(params)
    except Exception as error:
        taken = f", or port {port} is taken" if port else ""
        raise RunError(f"llama.cpp cannot load {gguf}{taken}: {error}") from None
    yield server


def complete(server: Server, prompt: list[int] | str, max_new_tokens: int) -> str:
    """Continues token ids or a text greedily, up to the end of the turn."""
    answer = server.handle_completions(
        {"prompt": prompt, "n_predict": max_new_tokens, "temperature": 0.0, "cache_prompt": False}
    )
    if "choices" not in answer:
        raise RunError(f"llama.cpp refused the prompt: {answer}")
    return str(answer["choices"][0]["text"])


def stream(
    server: Server, prompt: str, max_new_tokens: int, show: Callable[[str], None], stopped: Callable[[], bool]
) -> tuple[str, str]:
    """Continues a prompt greedily and passes the text to ``show`` piece by piece.

    Returns the whole text and why it ended: "stop", "length" or "interrupt". Raises `ContextFull` for a prompt that
    does not fit, and `RunError` for anything else that llama.cpp refuses.
    """
    pieces: list[str] = []
    ends: list[str] = []
    errors: list[dict[str, Any]] = []

    def on_chunk(chunk: dict[str, Any]) -> bool:
        """Takes one piece and returns whether to stop. An exception raised here would be lost, so errors are kept."""
        if "error" in chunk:
            errors.append(chunk["error"])
        for choice in chunk.get("choices", []):
            if choice.get("text"):
                pieces.append(choice["text"])
                show(choice["text"])
            if choice.get("finish_reason"):
                ends.append(choice["finish_reason"])
        return stopped()

    request = {"prompt": prompt, "n_predict": max_new_tokens, "temperature": 0.0, "stream": True}
    refused = server.handle_completions(request, on_chunk)
    if isinstance(refused, dict) and "error" in refused:
        errors.append(refused["error"])
    if errors:
        if errors[0].get("type") == "exceed_context_size_error":
            count, limit = errors[0].get("n_prompt_tokens", 0), errors[0].get("n_ctx", 0)
            raise ContextFull(f"the conversation has {count:,} tokens, the context {limit:,}")
        raise RunError(f"llama.cpp: {errors[0].get('message', errors[0])}")
    return "".join(pieces), ends[-1] if ends else "interrupt" if stopped() else "stop"
