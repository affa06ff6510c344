"""A built wheel has everything that the checkout has, and works in another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEFT_OUT = {"__pycache__", "README.md", "py.typed"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, which setuptools litters."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in ("qlora_sft", "kernels"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("qlora_sft-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(unpacked: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_it_has_every_file_of_the_packages(unpacked: Path) -> None:
    for package, home in (("qlora_sft", ROOT), ("qlora_kernels", ROOT / "kernels")):
        wanted = {file.relative_to(home) for file in (home / package).rglob("*") if file.is_file()}
        wanted = {file for file in wanted if not LEFT_OUT & set(file.parts)}
        assert {file for file in wanted if not (unpacked / file).is_file()} == set()


def test_it_lists_the_recipes_and_previews_one(unpacked: Path, tiny_model: Path, tmp_path: Path) -> None:
    listed = run(unpacked, tmp_path, "-m", "qlora_sft", "recipes")
    assert "llama-3.1-8b-8gb" in listed.stdout
    assert str(unpacked) in listed.stdout
    small = [f"model.path={tiny_model}", *(f"data.train.{number}.max_rows=5" for number in range(3))]
    shown = run(unpacked, tmp_path, "-m", "qlora_sft", "preview", "demo", "--count", "1", *small)
    assert shown.returncode == 0, shown.stderr
    assert "[[<|im_end|>]]" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_it_has_the_kernels_and_nothing_to_install_from(unpacked: Path, tmp_path: Path) -> None:
    where = run(unpacked, tmp_path, "-c", "import qlora_kernels.packed_ce as kernels; print(kernels.__file__)")
    assert where.stdout.startswith(str(unpacked))
    asked = run(unpacked, tmp_path, "-m", "qlora_sft.install", "--dry-run")
    assert asked.returncode == 1
    assert "run it in a checkout" in asked.stderr
