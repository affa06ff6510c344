"""Exports a run as a GGUF file, which is read back and compared before it takes its name, and a Modelfile beside it."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_sft.atomic import remove_leftovers, written_file
from qlora_sft.data.pieces import adds_bos
from qlora_sft.errors import ConfigError
from qlora_sft.export.gguf_check import check_gguf
from qlora_sft.export.gguf_metadata import for_converter, for_lora_converter, leave_bos_to_the_template
from qlora_sft.export.gguf_padding import drop_padding
from qlora_sft.export.imatrix import write_imatrix
from qlora_sft.export.llama_cpp import convert, convert_lora, llama_cpp_version
from qlora_sft.export.merge import merge_run, write_trained_base
from qlora_sft.export.ollama import OllamaModel, create, require_ollama, write_modelfile
from qlora_sft.export.parity import Figures, check_parity, forget, record
from qlora_sft.export.plain_lora import require_plain, write_plain_lora
from qlora_sft.export.quantize import CONVERTED, check_quant, quantize, require_quantizer, wants_imatrix
from qlora_sft.export.stale import is_stale
from qlora_sft.export.trained import Trained, read_trained
from qlora_sft.gguf_file import read_gguf
from qlora_sft.model.base_tokenizer import saved_tokenizer
from qlora_sft.model.run_base import run_base
from qlora_sft.run.folder import Run
from qlora_sft.run.report import LEFT_OUT, Report
from qlora_sft.say import Say, tell

if TYPE_CHECKING:
    from qlora_sft.export.hub import PushResult


@dataclass(frozen=True)
class OllamaOptions:
    """Holds what is asked of the Modelfile."""

    system: str | None = None
    """The system text, as in `write_modelfile`."""
    create_as: str | None = None
    """The name under which the model is registered with Ollama, after a comparison that it passed."""


@dataclass(frozen=True)
class ExportResult(Report):
    """Describes an exported GGUF file and its Modelfile."""

    gguf: str
    quant: str
    """The type of the file, or ``lora`` for an adapter alone."""
    bytes: int
    llama_cpp: str
    """The version of llama.cpp that wrote the file."""
    modelfile: str
    template: str | None
    """The name of the Go template in the Modelfile."""
    parity: dict[str, Figures] | None = field(default=None, metadata=LEFT_OUT)
    push: PushResult | None = field(default=None, metadata=LEFT_OUT)


def export_run(
    run: str | Path,
    quant: str = "q8_0",
    out: str | Path | None = None,
    *,
    imatrix: str = "auto",
    parity: bool = False,
    ollama: OllamaOptions = OllamaOptions(),
    say: Say = tell,
) -> ExportResult:
    """Writes RUN/gguf/NAME-QUANT.gguf (or ``out``) and its Modelfile.

    Merges first if that has not been done, or was done with another adapter than the run has now.

    ``imatrix`` is auto, none, or a file. With ``parity`` the file's logits are compared with the merged model's
    afterwards; the file stays whatever the result. Raises what `merge_run` raises, `ConfigError` for an unknown type,
    and `RunError` if a tool fails or if what is read back differs from the merged model. Then there is no file under
    the final name.
    """
    quant = quant.lower()
    check_quant(quant)
    run = Run.open(run).path
    if ollama.create_as:
        require_ollama()
    if quant not in CONVERTED:
        # The quantizer is found or built first, so that a missing compiler is reported before the merge.
        say(f"quantizer: {require_quantizer(say).found}")
    merged = run / "merged"
    stale = merged.is_dir() and is_stale(Run.open(run))
    if stale:
        say(f"{merged} was made of another adapter than the run has now, so it is merged again")
    if stale or not merged.is_dir():
        merge_run(run, say=say)
    target = Path(out) if out else run / "gguf" / f"{file_name(run)}-{quant}.gguf"
    trained = read_trained(run)
    remove_leftovers(target)
    with written_file(target) as beside:
        version = _write(run, merged, beside, quant, imatrix, trained, say)
        checked = check_gguf(beside, merged)
    say(f"read back: {checked.tensors} tensors, tokenizer, template, stop token and rope are those of {merged}")
    if checked.lost_window:
        window = f"{checked.lost_window:,} tokens"
        say(
            f"the model looks back {window}, and llama.cpp knows no sliding window for this family: in contexts longer "
            f"than {window} the file is another model (ollama: num_ctx, llama.cpp: --ctx-size)"
        )
    facts = {"file": str(target), "bytes": target.stat().st_size, "llama_cpp": version, "checked": checked.tensors}
    forget(run, quant)
    record(run, {"gguf": {quant: facts}})
    made = write_modelfile(run, OllamaModel(target, merged, checked.adds_bos), trained, ollama.system, say)
    figures = check_parity(run, merged, target, quant, say=say) if parity else None
    if ollama.create_as:
        create(ollama.create_as, Path(made.modelfile), say)
    size = target.stat().st_size
    return ExportResult(str(target), quant, size, version, made.modelfile, made.template, figures)


def _write(run: Path, merged: Path, target: Path, quant: str, imatrix: str, trained: Trained, say: Say) -> str:
    """Writes the file with the converter and, for types that it cannot write, with the quantizer.

    Returns the version of llama.cpp that did it.
    """
    if quant in CONVERTED:
        _convert(run, merged, target, quant, trained.can_think, say)
        return llama_cpp_version()
    full = target.with_name(f"{target.name}.full")
    matrix = target.with_name(f"{target.name}.imatrix")
    try:
        _convert(run, merged, full, "auto", trained.can_think, say)
        tool = quantize(full, target, quant, _imatrix(run, merged, full, matrix, quant, imatrix, say), say)
        return tool.version
    finally:
        full.unlink(missing_ok=True)
        matrix.unlink(missing_ok=True)


def _convert(run: Path, model: Path, target: Path, quant: str, thinks: bool, say: Say) -> None:
    """Writes the file of ``model`` with the converter, and mends what that takes for granted."""
    with for_converter(model, thinks) as view:
        convert(view, target, quant, model_name(run, model))
    padding = drop_padding(target)
    if padding:
        say(f"{padding} tokens that the converter put behind the vocabulary, without rows in the model: taken out")
    leave_bos_to_the_template(target, model)


def _imatrix(run: Path, merged: Path, full: Path, target: Path, quant: str, wanted: str, say: Say) -> Path | None:
    """Returns the importance matrix that was named, or one that is computed into ``target``, or None without one."""
    if wanted not in ("auto", "none"):
        if not Path(wanted).is_file():
            raise ConfigError(f"--imatrix {wanted}: no such file (or auto, none)")
        return Path(wanted)
    worth, reason = wants_imatrix(quant)
    if wanted == "none" or not worth:
        say(f"no importance matrix ({'as asked for' if wanted == 'none' else reason})")
        return None
    say(f"importance matrix ({reason})")
    architecture: str = read_gguf(full).fields["general.architecture"]
    write_imatrix(run, merged, architecture, target, say)
    return target


def export_adapter(
    run: str | Path,
    out: str | Path | None = None,
    *,
    parity: bool = False,
    ollama: OllamaOptions = OllamaOptions(),
    say: Say = tell,
) -> ExportResult:
    """Writes the LoRA alone as RUN/gguf/NAME-adapter.gguf (or ``out``), for ``--lora`` in llama.cpp, and a Modelfile.

    With ``parity``, a GGUF of the weights on which it was trained is made for the comparison and removed again.
    """
    if ollama.create_as:
        require_ollama()
    opened = Run.open(run)
    run, base = opened.path, run_base(opened)
    require_plain(opened.adapter)
    if opened.lora_init == "loftq":
        say("the adapter holds what NF4 lost of its base (lora.init=loftq): use it with a base that has NF4's values")
    target = Path(out) if out else run / "gguf" / f"{file_name(run)}-adapter.gguf"
    remove_leftovers(target)
    with (
        written_file(target) as beside,
        tempfile.TemporaryDirectory(prefix="qlora_sft-") as scratch,
        for_lora_converter(base) as view,
    ):
        convert_lora(write_plain_lora(opened.adapter, Path(scratch, "adapter")), view, beside)
    version = llama_cpp_version()
    facts = {"file": str(target), "bytes": target.stat().st_size, "llama_cpp": version}
    forget(run, "lora")
    record(run, {"gguf": {"lora": facts}})
    registered = OllamaModel(target, base, adds_bos(saved_tokenizer(opened.adapter)), base)
    made = write_modelfile(run, registered, read_trained(run), ollama.system, say)
    figures = None
    if parity:
        with tempfile.TemporaryDirectory(prefix=".parity-", dir=target.parent) as scratch:
            trained_on, base_gguf = Path(scratch, "base"), Path(scratch, "base.gguf")
            write_trained_base(opened, trained_on)
            _convert(run, trained_on, base_gguf, "f16", True, say)
            figures = check_parity(run, None, base_gguf, "lora", lora=target, say=say)
    if ollama.create_as:
        create(ollama.create_as, Path(made.modelfile), say)
    size = target.stat().st_size
    return ExportResult(str(target), "lora", size, version, made.modelfile, made.template, figures)


def model_name(run: Path, merged: Path) -> str:
    """Returns the name of the model that the file holds.

    By this name llama.cpp knows that the control tokens of Phi-3 swallow the white space behind them. A file with that
    name has to have the tokens below, or llama.cpp cannot load it.
    """
    vocabulary = json.loads((merged / "tokenizer.json").read_text(encoding="utf-8"))
    swallows = any(token["special"] and token["rstrip"] for token in vocabulary["added_tokens"])
    expected = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
    phi3 = swallows and expected <= {token["content"] for token in vocabulary["added_tokens"]}
    return f"phi-3-{file_name(run)}" if phi3 else file_name(run)


def file_name(run: Path) -> str:
    """Returns the name of the run with only the characters that every file system and tool accepts."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", run.resolve().name) or "model"
