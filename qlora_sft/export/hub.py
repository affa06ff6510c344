"""Uploads a run's adapter, merged model or GGUF files to the Hugging Face Hub, with a card made from its records."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from qlora_sft.errors import ConfigError, RunError
from qlora_sft.export.model_card import base_name, model_card
from qlora_sft.run.folder import Run
from qlora_sft.run.report import LEFT_OUT, Report
from qlora_sft.say import Say, tell

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

UploadKind = Literal["adapter", "merged", "gguf"]
Files = dict[str, Path | bytes]
"""By name in the repository, the file on disk or its content."""


@dataclass(frozen=True)
class PushOptions:
    """Holds how an upload is done."""

    gguf: str | None = None
    """The only GGUF file to upload, by its name. The default is all."""
    public: bool = False
    """Whether the repository is made public."""
    dry_run: bool = False
    """Whether what would be uploaded is only printed, without any connection."""


@dataclass(frozen=True)
class PushResult(Report):
    """Says what was uploaded, or would be."""

    repo: str
    what: UploadKind
    public: bool
    files: dict[str, int]
    """By name in the repository, the size in bytes."""
    card: str
    dry_run: bool
    url: str | None = field(default=None, metadata=LEFT_OUT)
    """The address of the commit."""


def push(
    run: str | Path,
    repo: str,
    what: UploadKind = "adapter",
    *,
    options: PushOptions = PushOptions(),
    api: HfApi | None = None,
    say: Say = tell,
) -> PushResult:
    """Uploads to the model repository ``repo`` (user/name) in one commit. A new repository is private by default.

    ``api`` is used instead of the default `huggingface_hub.HfApi`. Raises `ConfigError` for a bad name or something
    that was not exported, and `RunError` without a token, without a network, and when the Hub refuses. No message
    contains the token.
    """
    public, dry_run = options.public, options.dry_run
    run = Run.open(run).path
    if what not in get_args(UploadKind):
        raise ConfigError(f"--what {what}: one of {', '.join(get_args(UploadKind))}")
    check_name(repo)
    files = files_of(run, repo, what, options.gguf)
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    verb = "would go" if dry_run else "goes"
    say(f"{verb} to https://huggingface.co/{repo} ({'public' if public else 'private'}):")
    for name, size in sizes.items():
        say(f"  {size:>16,} bytes  {name}")
    say(f"  {sum(sizes.values()):>16,} bytes  in all")
    card = files["README.md"]
    assert isinstance(card, bytes)
    if dry_run:
        say(card.decode())
        return PushResult(repo, what, public, sizes, card.decode(), dry_run=True)
    url = _upload(api, repo, files, public, say)
    say(f"uploaded: {url}")
    return PushResult(repo, what, public, sizes, card.decode(), dry_run=False, url=url)


def check_name(repo: str) -> None:
    """Raises `ConfigError` for what cannot be the name of a repository."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]{1,96}", repo):
        raise ConfigError(f"{repo}: name the repository as user/name")


def files_of(run: Path, repo: str, what: UploadKind, gguf: str | None = None) -> Files:
    """Returns all files to upload. None of them names a folder of this machine."""
    folder = run / what
    found = sorted(file for file in folder.glob("*") if file.is_file() and not file.name.startswith("."))
    # The Modelfile of an adapter is left out, because it names the folder of the base on this machine.
    found = [file for file in found if file.suffix != ".Modelfile" or "\nADAPTER " not in file.read_text("utf-8")]
    files: Files = {file.name: file for file in found if gguf is None or file.stem == Path(gguf).stem}
    ggufs = [name for name in files if name.endswith(".gguf")]
    if not any(name.endswith((".safetensors", ".gguf")) for name in files):
        cure = {"adapter": "train", "merged": "merge", "gguf": "export"}[what]
        raise ConfigError(f"{folder}: nothing there to upload; run 'qlora-sft {cure}' first")
    if what == "adapter":
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base_name(Run.open(run))
        files["adapter_config.json"] = json.dumps(config, indent=2).encode()
    files["README.md"] = model_card(run, repo, what, ggufs).encode()
    return files


def _upload(api: HfApi | None, repo: str, files: Files, public: bool, say: Say) -> str:
    """Uploads the files in one commit and returns its address. Raises `RunError` that names the cure."""
    import huggingface_hub
    from httpx import HTTPError
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    token = huggingface_hub.get_token()
    if api is None:
        if not token:
            raise RunError("no Hugging Face token: run 'hf auth login', or set HF_TOKEN to one that may write")
        api = huggingface_hub.HfApi(token=token)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        private = api.repo_info(repo).private
        if not public and not private:
            raise RunError(f"{repo} exists and is public; nothing was uploaded. Add --public, or choose another name")
        if public and private:
            say(f"{repo} exists and is private; it stays so until that is changed in its settings")
        commit = api.create_commit(repo, operations, commit_message="Upload from qlora_sft")
    except OfflineModeIsEnabled:
        raise RunError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it and try again") from None
    except HfHubHTTPError as error:
        raise RunError(_refusal(repo, error, token)) from None
    except (HTTPError, OSError) as error:
        reason = _without(str(error).strip().splitlines() or [type(error).__name__], token)
        raise RunError(
            f"the Hub cannot be reached ({reason}); nothing was uploaded. Try the same again later"
        ) from None
    return str(commit.commit_url)


def _refusal(repo: str, error: HfHubHTTPError, token: str | None) -> str:
    """Says why the Hub refused an upload, and what to do about it."""
    status = getattr(error.response, "status_code", 0)
    cures = {
        401: "the token is not valid: run 'hf auth login' again, or set HF_TOKEN",
        403: f"the token may not write to {repo}: make one with write access, or name a repository of yours",
    }
    cure = cures.get(status) or _without(str(error).strip().splitlines(), token)
    return f"the Hub refused the upload to {repo} ({status or 'no answer'}): {cure}"


def _without(lines: list[str], token: str | None) -> str:
    """Returns the first line, with the token removed from it."""
    return lines[0].replace(token, "***") if token else lines[0]
