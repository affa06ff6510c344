"""Unsloth is taken only beside the versions that it is made for."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_sft.doctor import examine
from qlora_sft.errors import ConfigError
from qlora_sft.model.backend import choose_backend, expected_backend, unsloth_fault


def installed(folder: Path, *demands: str) -> None:
    """Writes a package that is called unsloth and says that it needs ``demands``; importing it is a fault."""
    (folder / "unsloth.py").write_text("raise AssertionError('imported')\n")
    facts = folder / "unsloth-2026.10.9.dist-info"
    facts.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: unsloth", "Version: 2026.10.9", *(f"Requires-Dist: {d}" for d in demands)]
    (facts / "METADATA").write_text("\n".join(lines) + "\n")


def test_with_a_later_version_of_what_it_patches_it_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be imported without a word, and patch sources that it was not made for."""
    installed(tmp_path, "certifi>=9999", "torch>=2.4", "transformers!=5.0.0,<=5.1,>=4.52.4")
    monkeypatch.syspath_prepend(str(tmp_path))
    for choose in (choose_backend, expected_backend):
        name, reason = choose("auto")
        assert name == "transformers"
        assert "it is made for transformers<=5.1, and 5." in reason
    with pytest.raises(ConfigError, match=r"made for transformers<=5\.1, .*qlora-sft\[unsloth\].*=transformers"):
        choose_backend("unsloth")
    (check,) = (check for check in examine()["checks"] if check["name"] == "backend unsloth")
    assert not check["ok"]
    assert "made for transformers<=5.1" in check["found"]


def test_what_it_does_not_patch_may_be_of_any_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock has an older certifi, and no xformers."""
    demands = ("certifi>=9999", "xformers>=9999", 'torch>=9999; sys_platform == "plan9"', 'trl<1; extra == "old"')
    installed(tmp_path, *demands, "transformers>=4.52.4")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert unsloth_fault() == ""
    assert expected_backend("auto").name == "unsloth"
