"""Writes a Modelfile beside a GGUF: the template, stop tokens, system text and settings of the training."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_sft.atomic import written_file
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.export.go_template import go_template, writes_bos
from qlora_sft.export.trained import Trained, as_ollama_has_it, function_of
from qlora_sft.json_types import JsonObject
from qlora_sft.model.base_tokenizer import saved_tokenizer
from qlora_sft.run.folder import Run
from qlora_sft.run.report import Report
from qlora_sft.say import Say, tell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A conversation needs this many tokens even if every trained row was short. It has been Ollama's default for years.
LEAST_CONTEXT = 4096
# By the name of a setting in generation_config.json, its name in Ollama.
SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}


@dataclass(frozen=True)
class OllamaModel:
    """Describes what is registered with Ollama: the GGUF of a model, or the GGUF of an adapter and its base."""

    gguf: Path
    folder: Path
    """The folder with tokenizer, config and generation config."""
    adds_bos: bool
    """Whether the runtime puts bos before a prompt."""
    base: Path | None = None
    """The base of an adapter."""


@dataclass(frozen=True)
class Modelfile(Report):
    """Names the file that registers a GGUF with Ollama."""

    modelfile: str
    template: str | None
    """The name of the shipped template in it, or None if the trained template has no Go form."""


def write_modelfile(
    run: Path, registered: OllamaModel, trained: Trained, system: str | None = None, say: Say = tell
) -> Modelfile:
    """Writes a Modelfile beside the GGUF, under the GGUF's name.

    trained: what the run's data says.
    system: the SYSTEM text. None takes the training data's, if all conversations have the same; ``""`` takes none.

    Raises `ConfigError` for a text that a Modelfile cannot hold.
    """
    tokenizer = saved_tokenizer(run / "adapter")
    say(f"Ollama: {trained.unknown or _about(trained)}")
    form = go_template(tokenizer, registered.adds_bos, trained.can_think)
    if form:
        say(f"Ollama: TEMPLATE is the Go form of {form.name}, which writes what the trained template writes")
        _warn_of_tools(trained, say)
    else:
        say(
            "Ollama: no TEMPLATE, because the trained template is none of the shipped ones. Versions that run "
            "llama.cpp's server use the one in the GGUF; older ones guess, or send the text as it is"
        )
    if registered.adds_bos and not writes_bos(tokenizer):
        say("Ollama: the base puts its bos token before every prompt, which the trained template does not have")
    lines = [_header(registered, form is not None), *_from(registered)]
    if form:
        lines.append(f'TEMPLATE """{form.text}"""')
    lines += _system(system, trained, say)
    lines += [f'PARAMETER stop "{stop}"' for stop in _stops(run, tokenizer)]
    lines += [f"PARAMETER {name} {value}" for name, value in _parameters(run, registered, say).items()]
    target = registered.gguf.with_suffix(".Modelfile")
    with written_file(target) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    say(f"Ollama: ollama create {registered.gguf.stem} -f {target}")
    return Modelfile(str(target), form.name if form else None)


def _about(trained: Trained) -> str:
    """Says in one line what the training data had."""
    parts = [
        "one system text in all of the training data" if trained.system else "no system text that all of the data has",
        "thinking was trained" if trained.thinks else "thinking was not trained",
    ]
    return ", ".join(parts)


def _warn_of_tools(trained: Trained, say: Say) -> None:
    """Says how many tools look different in Ollama's prompts."""
    changed = [tool for tool in trained.tools if json.dumps(as_ollama_has_it(tool)) != json.dumps(tool)]
    if changed:
        name = function_of(changed[0]).get("name")
        say(
            f"Ollama: {len(changed)} of {len(trained.tools)} tools of the data (first: {name}) look different in its "
            "prompts: it puts properties in alphabetical order and knows type, description, enum and items of them"
        )


def _header(registered: OllamaModel, template: bool) -> str:
    lines = [f"# ollama create {registered.gguf.stem} -f {registered.gguf.with_suffix('.Modelfile').name}"]
    if not template:
        lines.append("# No TEMPLATE: there is no Go form of the trained template. The one in the GGUF is right, where")
        lines.append("# Ollama uses it; llama.cpp and 'qlora-sft chat' always do.")
    if registered.base:
        lines.append("# The adapter fits this base only; a GGUF of the same model, or its name in Ollama, will do too.")
    return "\n".join(lines)


def _from(registered: OllamaModel) -> list[str]:
    if registered.base:
        return [f"FROM {registered.base.resolve()}", f"ADAPTER ./{registered.gguf.name}"]
    return [f"FROM ./{registered.gguf.name}"]


def _system(wanted: str | None, trained: Trained, say: Say) -> list[str]:
    text = trained.system if wanted is None else wanted
    if not text:
        return []
    if '"""' in text and wanted is None:
        say(
            'Ollama: no SYSTEM, because a Modelfile cannot hold a text with """; give the system text with each request'
        )
        return []
    if '"""' in text:
        raise ConfigError('--system: a Modelfile cannot hold a text with """; give the system text with each request')
    return [f'SYSTEM """{text}"""']


def _stops(run: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns every stop token of the model as text."""
    from qlora_sft.model.load import saved_stop_token_ids

    ids = saved_stop_token_ids(run, tokenizer)
    return [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ids))]


def _parameters(run: Path, registered: OllamaModel, say: Say) -> JsonObject:
    """Returns num_ctx and the sampling settings of the base's generation config."""
    trained = Run.open(run).config.data.max_length
    stated = _read_json(registered.folder / "config.json").get("max_position_embeddings")
    model = stated if isinstance(stated, int) and stated else trained
    context = min(model, max(trained, LEAST_CONTEXT))
    say(f"Ollama: num_ctx {context:,} (rows of up to {trained:,} tokens were trained, the model has {model:,})")
    generation = _read_json(registered.folder / "generation_config.json")
    sampling = {
        theirs: generation[ours]
        for ours, theirs in SAMPLING.items()
        if generation.get("do_sample") and generation.get(ours) is not None
    }
    # Versions before 2026 penalise repetition by 1.1 unless told otherwise, and JSON and code repeat a lot.
    return {"num_ctx": context, "repeat_penalty": generation.get("repetition_penalty") or 1.0, **sampling}


def _read_json(file: Path) -> JsonObject:
    """Reads a JSON object, which is empty if there is no such file."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


# ------------------------------------------------------------------ ollama itself


def require_ollama() -> str:
    """Returns the path of the program. Raises `RunError` with the cure if it is not on PATH."""
    program = shutil.which("ollama")
    if program is None:
        raise RunError(
            "--create needs the program ollama, which is not on PATH: install it (https://ollama.com/download), or "
            "export without --create and run the 'ollama create' command that is printed where Ollama is"
        )
    return program


def create(name: str, modelfile: Path, say: Say = tell) -> None:
    """Registers the model with Ollama. Raises `RunError` with the last lines that Ollama printed."""
    command = [require_ollama(), "create", name, "-f", modelfile.name]
    result = subprocess.run(command, cwd=modelfile.parent, capture_output=True, text=True)
    if result.returncode:
        last = "\n".join((result.stderr or result.stdout).strip().splitlines()[-3:])
        raise RunError(f"ollama create {name} failed:\n{last}\nIs it running (ollama serve)? The files are complete.")
    say(f"Ollama: registered; ollama run {name}")
