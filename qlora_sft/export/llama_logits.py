"""Computes token logits with llama.cpp itself, through the C interface of whatever library is installed.

It runs as a process of its own, so that a fault in native code does not end the caller, too::

    python -m qlora_sft.export.llama_logits LIBRARY MODEL.gguf REQUEST.json OUT.npy

REQUEST: {"documents": [[id, ...], ...], "texts": [str, ...], "lora": path or null, "threads": n}. OUT gets float32
logits [tokens, vocabulary] of all documents one after another. Standard output gets one JSON document with the ids of
the texts.

The two parameter structs are never described here in full, because they change between versions. They are taken as
bytes from llama.cpp's own defaults. Only the first fields of the context's struct are set, which have been the same for
years, and llama.cpp is then asked whether it has read them so.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import numpy as np

from qlora_sft.errors import RunError
from qlora_sft.export.llama_tools import loaded
from qlora_sft.export.logits_file import logits_file

BATCH = 512
_log_callback: object = None


class ParameterBytes(ctypes.Structure):
    """Holds the bytes of a parameter struct. It is larger than the struct of any version."""

    _fields_ = (("words", ctypes.c_uint32 * 128),)


class LlamaBatch(ctypes.Structure):
    """Mirrors llama.cpp's struct ``llama_batch``."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def load_library(path: str) -> ctypes.CDLL:
    """Loads the library and declares the functions that are needed. Raises OSError or AttributeError without them."""
    library = loaded(lambda: ctypes.CDLL(path))
    pointer, integer, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
    for name, result, arguments in (
        ("llama_backend_init", None, []),
        ("llama_model_default_params", ParameterBytes, []),
        ("llama_context_default_params", ParameterBytes, []),
        ("llama_model_load_from_file", pointer, [text, ParameterBytes]),
        ("llama_init_from_model", pointer, [pointer, ParameterBytes]),
        ("llama_n_ctx", ctypes.c_uint32, [pointer]),
        ("llama_n_batch", ctypes.c_uint32, [pointer]),
        ("llama_n_ubatch", ctypes.c_uint32, [pointer]),
        ("llama_set_n_threads", None, [pointer, integer, integer]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", integer, [pointer]),
        ("llama_tokenize", integer, [pointer, text, integer, pointer, integer, ctypes.c_bool, ctypes.c_bool]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_decode", integer, [pointer, LlamaBatch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, integer]),
        ("llama_adapter_lora_init", pointer, [pointer, text]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def silence(library: ctypes.CDLL) -> None:
    """Passes llama.cpp's errors on to standard error and drops its pages of information."""
    global _log_callback  # llama.cpp keeps the pointer, so the callback has to stay alive

    def log(level: int, text: bytes, _: object) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            sys.stderr.write(text.decode(errors="replace"))

    _log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(log)
    library.llama_log_set(_log_callback, None)


class LlamaModel:
    """Holds a GGUF loaded in llama.cpp, with a context of ``length`` tokens."""

    def __init__(self, library: ctypes.CDLL, gguf: str, length: int, threads: int):
        self.library = library
        library.llama_backend_init()
        self.model = library.llama_model_load_from_file(gguf.encode(), library.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {gguf}")
        self.vocab = library.llama_model_get_vocab(self.model)
        self.n_vocab = library.llama_vocab_n_tokens(self.vocab)
        params = library.llama_context_default_params()
        wanted = -(-max(length, BATCH) // 256) * 256
        params.words[0], params.words[1], params.words[2] = wanted, BATCH, BATCH
        self.context = library.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context of {wanted} tokens for {gguf}")
        found = (library.llama_n_ctx(self.context), library.llama_n_batch(self.context))
        if found != (wanted, BATCH) or library.llama_n_ubatch(self.context) != BATCH:
            raise RuntimeError(f"this llama.cpp orders its context parameters differently ({found})")
        library.llama_set_n_threads(self.context, threads, threads)

    def use_lora(self, path: str) -> None:
        """Applies the GGUF of a LoRA adapter to the model. Raises RuntimeError if llama.cpp refuses it."""
        adapter = self.library.llama_adapter_lora_init(self.model, path.encode())
        if not adapter:
            raise RuntimeError(f"llama.cpp cannot load the adapter {path}")
        if hasattr(self.library, "llama_set_adapters_lora"):
            adapters, scales = (ctypes.c_void_p * 1)(adapter), (ctypes.c_float * 1)(1.0)
            function = self.library.llama_set_adapters_lora
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
            failed = function(self.context, adapters, 1, scales)
        else:
            function = self.library.llama_set_adapter_lora
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float]
            failed = function(self.context, adapter, 1.0)
        if failed:
            raise RuntimeError(f"llama.cpp refuses the adapter {path}")

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text, without bos and with control tokens recognised."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = self.library.llama_tokenize(self.vocab, data, len(data), ids, len(ids), False, True)
        if count < 0:
            raise RuntimeError("llama.cpp cannot tokenize the probe text")
        return list(ids[:count])

    def logits(self, ids: list[int], positions: list[int], out: np.ndarray) -> None:
        """Writes the logits at ``positions`` (ascending) of one document into ``out`` [len(positions), n_vocab]."""
        wanted = set(positions)
        done = 0
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            count = len(part)
            sequence = (ctypes.c_int32 * 1)(0)
            batch = LlamaBatch(
                n_tokens=count,
                token=(ctypes.c_int32 * count)(*part),
                pos=(ctypes.c_int32 * count)(*range(start, start + count)),
                n_seq_id=(ctypes.c_int32 * count)(*[1] * count),
                seq_id=(ctypes.POINTER(ctypes.c_int32) * count)(
                    *[ctypes.cast(sequence, ctypes.POINTER(ctypes.c_int32))] * count
                ),
                logits=(ctypes.c_int8 * count)(*[start + i in wanted for i in range(count)]),
            )
            status = self.library.llama_decode(self.context, batch)
            if status:
                raise RuntimeError(f"llama.cpp's decode failed with {status}")
            for i in range(count):
                if start + i in wanted:
                    row = self.library.llama_get_logits_ith(self.context, i)
                    out[done] = np.ctypeslib.as_array(row, (self.n_vocab,))
                    done += 1


def main(library_path: str, gguf: str, request_file: str, out_file: str) -> None:
    """Answers one request."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    documents = request["documents"]
    library = load_library(library_path)
    silence(library)
    model = LlamaModel(library, gguf, max(map(len, documents), default=0), request["threads"])
    if request["lora"]:
        model.use_lora(request["lora"])
    total = sum(map(len, request["positions"]))
    out = logits_file(Path(out_file), (total, model.n_vocab))
    start = 0
    for ids, positions in zip(documents, request["positions"], strict=True):
        model.logits(ids, positions, out[start : start + len(positions)])
        start += len(positions)
    out.flush()
    print(json.dumps({"texts": [model.tokenize(text) for text in request["texts"]]}))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:5])
    except (RunError, RuntimeError, AttributeError, OSError) as error:
        sys.exit(f"{error}")
