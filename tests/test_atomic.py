"""A full disk, for real: a small file system of its own where root may mount one, RLIMIT_FSIZE elsewhere."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_sft.atomic import written_file, written_folder
from qlora_sft.errors import RunError


def test_the_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("old", "new"):
        with written_folder(target) as beside:
            (beside / "a").write_text(content)
            assert not (target / "a").exists() or (target / "a").read_text() == "old"
    assert (target / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_after_an_error_the_old_content_stands_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    for writer, target in ((written_folder, tmp_path / "folder"), (written_file, tmp_path / "file")):
        with writer(target) as beside:
            (beside / "a" if writer is written_folder else beside).write_text("old")
        expected = RunError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected), writer(target) as beside:
            (beside / "a" if writer is written_folder else beside).write_text("half")
            raise error
        assert (target / "a" if writer is written_folder else target).read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("writer", [written_folder, written_file])
def test_folders_that_had_to_be_made_go_with_what_failed(writer: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(RuntimeError), writer(tmp_path / "run" / "gguf" / "deep" / "model.gguf"):
        assert (tmp_path / "run" / "gguf" / "deep").is_dir()
        raise RuntimeError
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "run" / "gguf").mkdir()
    (tmp_path / "run" / "gguf" / "other.gguf").write_bytes(b"x")
    with pytest.raises(RuntimeError), writer(tmp_path / "run" / "gguf" / "model.gguf"):
        raise RuntimeError
    assert os.listdir(tmp_path / "run" / "gguf") == ["other.gguf"]


SAVE = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from qlora_sft.atomic import written_folder
from qlora_sft.cli import guarded
def save():
    with written_folder(Path(sys.argv[1])) as beside:
        save_file({"w": torch.zeros(8 << 20)}, beside / "model.safetensors")
sys.exit(guarded(save))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_while_weights_are_saved(small_disk: Path) -> None:
    """safetensors reports it in its own way; it must end with 1, the cure, and nothing half-written."""
    target = small_disk / "adapter"
    result = subprocess.run([sys.executable, "-c", SAVE, str(target)], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "the disk is full" in result.stderr
    assert str(target) in result.stderr
    assert "Free some room" in result.stderr
    assert list(small_disk.iterdir()) == []
