"""Run the verbs that take a model out of a run: merge, export, push."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_sft.errors import ConfigError
from qlora_sft.verbs.verb import AddVerb, CommandResult

if TYPE_CHECKING:
    from qlora_sft.export.hub import PushResult


def add_export_verbs(add: AddVerb) -> None:
    """Adds ``merge``, ``export`` and ``push`` to the command line."""
    merge = add("merge", _merge, "merge the adapter of a run into its base model, and compare the two")
    merge.add_argument("run", help="run folder")
    merge.add_argument("--out", help="folder to write (default: RUN/merged)")
    merge.add_argument(
        "--onto",
        choices=["nf4-dequantized", "bf16"],
        help="weights to merge onto (default: those measured closer)",
    )
    merge.add_argument("--dtype", default="auto", choices=["auto", "bf16", "f16", "f32"], help="type of the weights")
    merge.add_argument("--no-parity", action="store_true", help="do not compare its logits with the adapter's")
    merge.add_argument("--push", metavar="USER/NAME", help="afterwards upload it to the Hub, as a private repository")

    export = add("export", _export, "write a run's model as a GGUF file for llama.cpp and Ollama, and compare the two")
    export.add_argument("run", help="run folder")
    export.add_argument("--quant", default="q8_0", help="f32, f16, bf16, q8_0 (default), or any type of llama.cpp")
    export.add_argument("--adapter", action="store_true", help="export only the LoRA adapter, for llama.cpp's --lora")
    export.add_argument(
        "--imatrix", default="auto", help="importance matrix: auto (from the training data), none, FILE"
    )
    export.add_argument("--out", help="file to write (default: RUN/gguf/NAME-QUANT.gguf)")
    export.add_argument("--no-parity", action="store_true", help="do not compare its logits with the merged model's")
    export.add_argument("--system", help="SYSTEM text of the Modelfile (default: the training data's, if it has one)")
    export.add_argument("--create", metavar="NAME", help="also register the model with Ollama under this name")
    export.add_argument("--push", metavar="USER/NAME", help="afterwards upload it to the Hub, as a private repository")

    push = add("push", _push, "upload a run's adapter, merged model or GGUF files to the Hub, with a model card")
    push.add_argument("run", help="run folder")
    push.add_argument("repo", metavar="USER/NAME", help="repository on the Hub; created if it does not exist")
    push.add_argument("--what", default="adapter", choices=["adapter", "merged", "gguf"], help="default: adapter")
    push.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    push.add_argument(
        "--dry-run", action="store_true", help="print what would be uploaded, and the card; upload nothing"
    )


def _merge(arguments: argparse.Namespace) -> CommandResult:
    _check_push(arguments)
    from qlora_sft.export.merge import merge_run

    result = merge_run(arguments.run, arguments.out, arguments.onto, arguments.dtype)
    if not arguments.no_parity:
        from qlora_sft.export.parity import check_parity

        result = replace(result, parity=check_parity(Path(arguments.run), Path(result.merged)))
    return replace(result, push=_pushed(arguments, "merged"))


def _export(arguments: argparse.Namespace) -> CommandResult:
    _check_push(arguments)
    from qlora_sft.export.gguf import OllamaOptions, export_adapter, export_run

    parity, ollama = not arguments.no_parity, OllamaOptions(arguments.system, arguments.create)
    if arguments.adapter:
        result = export_adapter(arguments.run, arguments.out, parity=parity, ollama=ollama)
    else:
        result = export_run(
            arguments.run, arguments.quant, arguments.out, imatrix=arguments.imatrix, parity=parity, ollama=ollama
        )
    return replace(result, push=_pushed(arguments, "gguf", result.gguf))


def _check_push(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for a repository name that cannot be pushed to, before an hour of work and not after it."""
    if arguments.push:
        from qlora_sft.export.hub import check_name

        check_name(arguments.push)
        if arguments.out:
            raise ConfigError("--push uploads from the run folder; leave out --out")


def _pushed(
    arguments: argparse.Namespace, what: Literal["merged", "gguf"], gguf: str | None = None
) -> PushResult | None:
    if not arguments.push:
        return None
    from qlora_sft.export.hub import PushOptions, push

    return push(arguments.run, arguments.push, what, options=PushOptions(gguf))


def _push(arguments: argparse.Namespace) -> CommandResult:
    from qlora_sft.export.hub import PushOptions, push

    options = PushOptions(public=arguments.public, dry_run=arguments.dry_run)
    return push(arguments.run, arguments.repo, arguments.what, options=options)
