"""What the Hub refuses is said with its reason and the cure; its own messages begin with a status and a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlora_sft.errors import ConfigError
from qlora_sft.model.base_files import read_headers
from qlora_sft.model.base_folder import resolve_base

NAME, COMMIT = "owner/model", "a1" * 20
REASONS = {
    GatedRepoError: "gated; accept its licence on its page .https://huggingface.co/owner/model. and log in: hf auth",
    RepositoryNotFoundError: "no such repository, or it is private and you are not logged in",
    RevisionNotFoundError: "has no revision .*; look at model.revision",
    HfHubHTTPError: "403 .Request ID: 1. Over the quota",
}


def refusal(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    return kind("403 (Request ID: 1)\n\nOver the quota", response=response)


@pytest.mark.parametrize("kind", REASONS)
def test_a_refusal_of_the_hub_is_said_with_its_cure(
    kind: type[HfHubHTTPError], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(*_: Any, local_files_only: bool = False, **__: Any) -> Any:
        raise LocalEntryNotFoundError("not here") if local_files_only else refusal(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", refused)
    with pytest.raises(ConfigError, match=f"owner/model at revision v9 .*{REASONS[kind]}"):
        resolve_base(NAME, "v9")
    described = tmp_path / "models--owner--model" / "snapshots" / COMMIT
    with pytest.raises(ConfigError, match=f"{COMMIT} .*{REASONS[kind]}"):
        read_headers(str(described))


def test_the_reason_may_lie_behind_another_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise LocalEntryNotFoundError("cannot find the files") from refusal(GatedRepoError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    with pytest.raises(ConfigError, match="hf auth login"):
        resolve_base(NAME)
