"""Serve a GGUF with llama.cpp's server, which speaks OpenAI's protocol, on this machine only."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from qlora_sft.chat.models import gguf_facts
from qlora_sft.errors import ConfigError
from qlora_sft.export.run_gguf import running
from qlora_sft.json_types import JsonObject
from qlora_sft.say import Say, tell


def serve(gguf: Path, port: int, say: Say = tell, until: threading.Event | None = None) -> JsonObject:
    """Serves ``gguf`` until Ctrl-C, SIGTERM or ``until``. With ``port`` 0 any free port is taken.

    Raises `ConfigError` for anything but a GGUF, `RunError` if the port is taken or the file cannot be loaded.
    """
    if gguf.suffix != ".gguf":
        raise ConfigError(f"{gguf}: --serve needs a .gguf file; 'qlora-sft export RUN' writes one")
    ended = until or threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
    with running(gguf, gguf_facts(gguf).context, port) as server:
        address = str(server.listening_address)
        say(f"{gguf.name} answers at {address}/v1/chat/completions (on this machine only); Ctrl-C ends it")
        ended.wait()
    return {"address": address}
