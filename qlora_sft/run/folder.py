"""Open a finished run on disk: read what its manifest says, and find its parts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from qlora_sft.config import Config, ModelConfig, RopeScaling, load_config
from qlora_sft.errors import ConfigError
from qlora_sft.json_types import JsonObject, read_object
from qlora_sft.run.report import RunReport


def is_run(path: Path) -> bool:
    """Says whether ``path`` is the folder of a run, and not that of a model."""
    return (path / "adapter").is_dir()


def kept_day(run: Path) -> date | None:
    """Returns the date that the chat template wrote when the run began; None if it writes none."""
    begun = run / "begun.json"
    if not begun.is_file():
        return None
    content = _read(begun, "train the run again")
    if "template_date" not in content:  # a run of an earlier version wrote the date on which it began
        return date.fromtimestamp(begun.stat().st_mtime)
    day = content["template_date"]
    return date.fromisoformat(str(day)) if day else None


def _read(file: Path, cure: str) -> JsonObject:
    """Reads one of the files that a run wrote of itself. Raises `ConfigError` with ``cure`` for one that is damaged."""
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: damaged ({error}); {cure}") from None


@dataclass(frozen=True)
class Run:
    """Represents the folder of a finished run.

    It reads what it is asked for and raises `ConfigError` naming what an old run lacks.
    """

    path: Path
    manifest: JsonObject = field(repr=False)
    """The content of ``manifest.json``. Whatever else reads it belongs in this class."""

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Opens the run at ``path``. Raises `ConfigError` if there is no finished run."""
        path = Path(path)
        file = path / "manifest.json"
        if not file.is_file():
            raise ConfigError(f"{path}: not the folder of a finished run (it has no manifest.json); train one first")
        return cls(path, _read(file, "train the run again"))

    # ------------------------------------------------------------------ what stands in the folder

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        """Returns the folder of its merged model, whether it exists or not."""
        return self.path / "merged"

    @property
    def ggufs(self) -> Path:
        """Returns the folder of its GGUF files."""
        return self.path / "gguf"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Returns the file with the answers to held-out prompts."""
        return self.path / "samples.jsonl"

    @property
    def exports(self) -> dict[str, Any]:
        """Returns what ``export.json`` says of its merged model and GGUF files."""
        file = self.path / "export.json"
        return _read(file, "remove it and export again") if file.is_file() else {}

    # ------------------------------------------------------------------ what it was configured with

    @cached_property
    def config(self) -> Config:
        """Returns the configuration of the run. Raises `ConfigError` if ``config.yaml`` is not of this version."""
        return load_config(self.path / "config.yaml")

    @cached_property
    def lora_init(self) -> str:
        """Returns how its adapter began; versions that knew no choice began with the default."""
        lora = self._of("config").get("lora")
        return str(lora.get("init", "default")) if isinstance(lora, dict) else "default"

    @cached_property
    def model(self) -> ModelConfig:
        """Returns the section ``model`` of its configuration, without keys that this version does not know."""
        given = self._of("config").get("model") or {}
        if not isinstance(given, dict):
            raise self._lacks("the configuration in its manifest.json has no section 'model'")
        known = {each.name for each in dataclasses.fields(ModelConfig)}
        values: dict[str, Any] = {name: value for name, value in given.items() if name in known and value is not None}
        if "rope_scaling" in values:
            values["rope_scaling"] = self._rope_scaling(values["rope_scaling"])
        return ModelConfig(**{"path": self.base, **values})

    def _rope_scaling(self, given: object) -> RopeScaling:
        """Returns the scaling of positions that the run's manifest gives.

        Raises `ConfigError` if it has settings that this version does not know. To leave those out would give the model
        other positions than it was trained with.
        """
        try:
            return RopeScaling(**cast(dict[str, Any], given))
        except TypeError:
            known = ", ".join(each.name for each in dataclasses.fields(RopeScaling))
            raise ConfigError(
                f"{self.path / 'manifest.json'}: model.rope_scaling is {given}, and this version knows {known}; take "
                "the version that trained the run, or train it again"
            ) from None

    # ------------------------------------------------------------------ what it reported

    @property
    def base(self) -> str:
        """Returns the folder or Hub id of the base model."""
        return str(self._reported("base"))

    @property
    def base_sha256(self) -> str | None:
        """Returns the fingerprint of the base's weights; None for a run that was made before fingerprints."""
        found = self._of("report").get("base_sha256")
        return None if found is None else str(found)

    @property
    def base_commit(self) -> str | None:
        """Returns the commit of the Hub that was trained on; None for a folder, and in runs from before it was kept."""
        found = self._of("report").get("base_commit")
        return None if found is None else str(found)

    @property
    def dtype(self) -> str:
        """Returns the type that it computed in; ``auto`` may mean another one on this machine."""
        return str(self._of("report").get("dtype") or self.model.dtype)

    @property
    def quantized_modules(self) -> list[str]:
        """Returns the layers of the base whose weights went through NF4."""
        return list(self._reported("quantized_modules"))

    @cached_property
    def report(self) -> RunReport:
        """Returns all that it reported."""
        try:
            return RunReport.from_json(self._of("report"))
        except KeyError as error:
            raise self._lacks(f"the report in its manifest.json has no {error}") from None

    @property
    def data(self) -> dict[str, dict[str, Any]]:
        """Returns the ledger of every source, with the sha256 of its files."""
        return cast(dict[str, dict[str, Any]], self._of("data"))

    @property
    def versions(self) -> dict[str, str]:
        """Returns the versions of the packages that it was made with."""
        return {name: str(version) for name, version in self._of("versions").items()}

    def _of(self, section: str) -> JsonObject:
        found = self.manifest.get(section)
        if not isinstance(found, dict):
            raise self._lacks(f"its manifest.json has no {section!r}")
        return found

    def _reported(self, name: str) -> Any:
        report = self._of("report")
        if name not in report:
            raise self._lacks(f"the report in its manifest.json has no {name!r}")
        return report[name]

    def _lacks(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path}: {what}, so an older version made it; train the run again")
