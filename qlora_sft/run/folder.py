"""A finished run on disk: what its manifest says of it, and where its parts are."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora_sft.config import Config, ModelConfig, RopeScaling, load_config
from qlora_sft.errors import ConfigError
from qlora_sft.run.report import RunReport


def is_run(path: Path) -> bool:
    """Whether ``path`` is the folder of a run, and not that of a model."""
    return (path / "adapter").is_dir()


def kept_day(run: Path) -> date | None:
    """Returns the date that the chat template wrote when the run began; None if it writes none."""
    begun = run / "begun.json"
    if not begun.is_file():
        return None
    content = json.loads(begun.read_text(encoding="utf-8"))
    if "template_date" not in content:  # a run of an earlier version wrote the date on which it began
        return date.fromtimestamp(begun.stat().st_mtime)
    day = content["template_date"]
    return date.fromisoformat(day) if day else None


@dataclass(frozen=True)
class Run:
    """The folder of a finished run. Reads what it is asked for; raises `ConfigError` naming what an old one lacks."""

    path: Path
    manifest: dict[str, Any] = field(repr=False)
    """The content of ``manifest.json``; whatever else reads it belongs in this class."""

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Raises `ConfigError` if there is no finished run at ``path``."""
        path = Path(path)
        file = path / "manifest.json"
        if not file.is_file():
            raise ConfigError(f"{path}: not the folder of a finished run (it has no manifest.json); train one first")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file}: damaged ({error}); train the run again") from None
        return cls(path, content)

    # ------------------------------------------------------------------ what stands in the folder

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        """Where its merged model is, or would be."""
        return self.path / "merged"

    @property
    def ggufs(self) -> Path:
        """The folder of its GGUF files."""
        return self.path / "gguf"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """The answers to held-out prompts."""
        return self.path / "samples.jsonl"

    @property
    def exports(self) -> dict[str, Any]:
        """What ``export.json`` has of its merged model and GGUF files."""
        file = self.path / "export.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    # ------------------------------------------------------------------ what it was configured with

    @cached_property
    def config(self) -> Config:
        """The configuration of the run. Raises `ConfigError` where ``config.yaml`` is none of this version."""
        return load_config(self.path / "config.yaml")

    @cached_property
    def model(self) -> ModelConfig:
        """The section ``model`` of its configuration, as far as this version knows it."""
        given: dict[str, Any] = self._of("config").get("model") or {}
        known = {each.name for each in dataclasses.fields(ModelConfig)}
        values = {name: value for name, value in given.items() if name in known and value is not None}
        if isinstance(rope := values.get("rope_scaling"), dict):
            values["rope_scaling"] = RopeScaling(**rope)
        return ModelConfig(**{"path": self.base, **values})

    # ------------------------------------------------------------------ what it reported

    @property
    def base(self) -> str:
        """Folder or Hub id of the base model."""
        return str(self._reported("base"))

    @property
    def base_sha256(self) -> str | None:
        """Fingerprint of the base's weights; None in runs from before there was one."""
        return self._of("report").get("base_sha256")

    @property
    def base_commit(self) -> str | None:
        """Commit of the Hub that was trained on; None for a folder, and in runs from before it was kept."""
        return self._of("report").get("base_commit")

    @property
    def dtype(self) -> str:
        """The type that it computed in, which ``auto`` need not mean on this machine."""
        return self._of("report").get("dtype") or self.model.dtype

    @property
    def quantized_modules(self) -> list[str]:
        """Layers of the base whose weights went through NF4."""
        return list(self._reported("quantized_modules"))

    @cached_property
    def report(self) -> RunReport:
        """All that it reported."""
        try:
            return RunReport.from_json(self._of("report"))
        except KeyError as error:
            raise self._lacks(f"the report in its manifest.json has no {error}") from None

    @property
    def data(self) -> dict[str, dict[str, Any]]:
        """The ledger of every source, with the sha256 of its files."""
        return self._of("data")

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that it was made with."""
        return self._of("versions")

    def _of(self, section: str) -> dict[str, Any]:
        if section not in self.manifest:
            raise self._lacks(f"its manifest.json has no {section!r}")
        found: dict[str, Any] = self.manifest[section]
        return found

    def _reported(self, name: str) -> Any:
        report = self._of("report")
        if name not in report:
            raise self._lacks(f"the report in its manifest.json has no {name!r}")
        return report[name]

    def _lacks(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path}: {what}, so an older version made it; train the run again")
