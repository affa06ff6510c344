"""A Modelfile beside a GGUF: the template, the stops, the system text and the settings that were trained."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_sft.atomic import written_file
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.export.go_template import go_template, writes_bos
from qlora_sft.export.trained import Trained, as_ollama_has_it
from qlora_sft.run.folder import Run
from qlora_sft.run.report import Report
from qlora_sft.say import Say, tell

# A conversation needs room even if every trained row was short; Ollama's own default has been this for years.
LEAST_CONTEXT = 4096
# Name in generation_config.json -> Ollama's.
SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}


@dataclass(frozen=True)
class Subject:
    """What is registered: a model's GGUF, or the GGUF of an adapter and the base it is for.

    ``folder`` has tokenizer, config and generation config; ``adds_bos``: whether the runtime puts bos before a prompt.
    """

    gguf: Path
    folder: Path
    adds_bos: bool
    base: Path | None = None


@dataclass(frozen=True)
class Modelfile(Report):
    """The file that registers a GGUF with Ollama."""

    modelfile: str
    template: str | None
    """The shipped Go template in it; None if the trained template has no Go form."""


def write_modelfile(
    run: Path, subject: Subject, trained: Trained, system: str | None = None, say: Say = tell
) -> Modelfile:
    """Writes GGUF's name with ``.Modelfile`` beside it.

    ``trained``: what the run's data says. ``system``: the SYSTEM text; None takes the training data's if all of it has
    one and the same, ``""`` none.
    Raises `ConfigError` for a text that a Modelfile cannot hold.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(run / "adapter")
    say(f"Ollama: {trained.unknown or _about(trained)}")
    form = go_template(tokenizer, subject.adds_bos, trained.can_think)
    if form:
        say(f"Ollama: TEMPLATE is the Go form of {form.name}, which writes what the trained template writes")
        _warn_of_tools(trained, say)
    else:
        say(
            "Ollama: no TEMPLATE, because the trained template is none of the shipped ones. Versions that run "
            "llama.cpp's server use the one in the GGUF; older ones guess, or send the text as it is"
        )
    if subject.adds_bos and not writes_bos(tokenizer):
        say("Ollama: the base puts its bos token before every prompt, which the trained template does not have")
    lines = [_header(subject, form is not None), *_from(subject)]
    if form:
        lines.append(f'TEMPLATE """{form.text}"""')
    lines += _system(system, trained)
    lines += [f'PARAMETER stop "{stop}"' for stop in _stops(run, tokenizer)]
    lines += [f"PARAMETER {name} {value}" for name, value in _parameters(run, subject, say).items()]
    target = subject.gguf.with_suffix(".Modelfile")
    with written_file(target) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    say(f"Ollama: ollama create {subject.gguf.stem} -f {target}")
    return Modelfile(str(target), form.name if form else None)


def _about(trained: Trained) -> str:
    parts = [
        "one system text in all of the training data" if trained.system else "no system text that all of the data has",
        "thinking was trained" if trained.thinks else "thinking was not trained",
    ]
    return ", ".join(parts)


def _warn_of_tools(trained: Trained, say: Say) -> None:
    changed = [tool for tool in trained.tools if json.dumps(as_ollama_has_it(tool)) != json.dumps(tool)]
    if changed:
        name = changed[0].get("function", changed[0]).get("name")
        say(
            f"Ollama: {len(changed)} of {len(trained.tools)} tools of the data (first: {name}) look different in its "
            "prompts: it puts properties in alphabetical order and knows type, description, enum and items of them"
        )


def _header(subject: Subject, template: bool) -> str:
    lines = [f"# ollama create {subject.gguf.stem} -f {subject.gguf.with_suffix('.Modelfile').name}"]
    if not template:
        lines.append("# No TEMPLATE: there is no Go form of the trained template. The one in the GGUF is right, where")
        lines.append("# Ollama uses it; llama.cpp and 'qlora-sft chat' always do.")
    if subject.base:
        lines.append("# The adapter fits this base only; a GGUF of the same model, or its name in Ollama, will do too.")
    return "\n".join(lines)


def _from(subject: Subject) -> list[str]:
    if subject.base:
        return [f"FROM {subject.base.resolve()}", f"ADAPTER ./{subject.gguf.name}"]
    return [f"FROM ./{subject.gguf.name}"]


def _system(wanted: str | None, trained: Trained) -> list[str]:
    text = trained.system if wanted is None else wanted
    if not text:
        return []
    if '"""' in text:
        raise ConfigError('--system: a Modelfile cannot hold a text with """; give the system text with each request')
    return [f'SYSTEM """{text}"""']


def _stops(run: Path, tokenizer: Any) -> list[str]:
    """Every token at which the model stops, as text."""
    from qlora_sft.model.load import saved_stop_token_ids

    ids = saved_stop_token_ids(run, tokenizer)
    return [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ids))]


def _parameters(run: Path, subject: Subject, say: Say) -> dict[str, Any]:
    """num_ctx and what the base's generation config says of sampling."""
    trained = Run.open(run).config.data.max_length
    model = _read_json(subject.folder / "config.json").get("max_position_embeddings") or trained
    context = min(model, max(trained, LEAST_CONTEXT))
    say(f"Ollama: num_ctx {context:,} (rows of up to {trained:,} tokens were trained, the model has {model:,})")
    generation = _read_json(subject.folder / "generation_config.json")
    sampling = {
        theirs: generation[ours]
        for ours, theirs in SAMPLING.items()
        if generation.get("do_sample") and generation.get(ours) is not None
    }
    # Versions before 2026 punish repetition by 1.1 unless told otherwise; JSON and code are repetition.
    return {"num_ctx": context, "repeat_penalty": generation.get("repetition_penalty") or 1.0, **sampling}


def _read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


# ------------------------------------------------------------------ ollama itself


def require_ollama() -> str:
    """The program. Raises `RunError` with the cure if it is not on PATH."""
    program = shutil.which("ollama")
    if program is None:
        raise RunError(
            "--create needs the program ollama, which is not on PATH: install it (https://ollama.com/download), or "
            "export without --create and run the 'ollama create' command that is printed where Ollama is"
        )
    return program


def create(name: str, modelfile: Path, say: Say = tell) -> None:
    """Registers the model with Ollama. Raises `RunError` with Ollama's last words."""
    command = [require_ollama(), "create", name, "-f", modelfile.name]
    result = subprocess.run(command, cwd=modelfile.parent, capture_output=True, text=True)
    if result.returncode:
        last = "\n".join((result.stderr or result.stdout).strip().splitlines()[-3:])
        raise RunError(f"ollama create {name} failed:\n{last}\nIs it running (ollama serve)? The files are complete.")
    say(f"Ollama: registered; ollama run {name}")
