import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import MakeConfig

from qlora_sft.atomic import path_error
from qlora_sft.cache import cache_dir, cache_root
from qlora_sft.cli import guarded, main
from qlora_sft.faults import check_overrides

HEAVY = ("torch", "transformers", "trl", "unsloth", "peft", "datasets", "numpy")


def python(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd)


def test_importing_the_package_imports_nothing_heavy() -> None:
    result = python(f"import sys, qlora_sft; print([m for m in {HEAVY} if m in sys.modules])")
    assert result.stdout.strip() == "[]"


def test_the_fronts_import_nothing_that_unsloth_has_to_patch_first() -> None:
    """Imported before Unsloth, transformers, trl and peft would keep their own functions, and it would be left out."""
    fronts = "train preview plan.plan evaluation.evaluate_run chat.terminal demo_run".split()
    modules = ", ".join(f"qlora_sft.{front}" for front in fronts)
    result = python(f"import sys, {modules}; print([m for m in {HEAVY} if m in sys.modules])")
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "nosuch.yaml"]])
def test_the_command_line_imports_nothing_heavy_before_there_is_work(arguments: list[str]) -> None:
    code = (
        "import sys, qlora_sft.cli\n"
        "try: qlora_sft.cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert python(code, *arguments).stdout.strip().endswith("[]")


def test_every_public_name_exists() -> None:
    import qlora_sft

    assert all(getattr(qlora_sft, name) is not None for name in qlora_sft.__all__)


@pytest.mark.parametrize("first", ["", "import qlora_sft.train, qlora_sft.preview, qlora_sft.cli"])
def test_a_public_name_is_the_function_whatever_was_imported_before(first: str) -> None:
    code = "from qlora_sft import preview, train\nfrom qlora_sft import train as again\nprint(train, again, preview)"
    assert python(f"{first}\n{code}").stdout.count("<function ") == 3


def test_wrong_configurations_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nosuch.yaml"]) == 2
    assert "nosuch.yaml: no such file" in capsys.readouterr().err
    assert main(["train", "demo", "training.lr=1", "model.backend=slow", "data.max_length=x"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3


def test_overrides_may_stand_behind_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "demo", "--overwrite", "lora.r=0", "--json", "lora.alfa=1"]) == 2
    said = capsys.readouterr().err
    assert "unknown key 'lora.alfa'" in said
    assert main(["train", "demo", "--overwrite", "lora.r=0"]) == 2
    assert "lora.r must be positive, got 0" in capsys.readouterr().err
    for arguments in (["train", "demo", "--whatever"], ["merge", "run", "a=1"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert f"unrecognized arguments: {arguments[-1]}" in capsys.readouterr().err


def test_usage_says_that_overrides_are_optional(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, needed in ((["train"], "config"), (["preview"], "config"), (["plan", "--no-data"], "config")):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        said = capsys.readouterr().err
        assert said.endswith(f"the following arguments are required: {needed}\n")
        assert "[key.sub=value ...]" in said
    with pytest.raises(SystemExit, match="2"):
        main(["train", "demo", "--overwirte"])
    assert "usage: qlora-sft train " in capsys.readouterr().err


def test_a_path_that_cannot_be_written_is_no_traceback(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_config()
    (tmp_path / "file").write_text("")
    recipe = str(tmp_path / "config.yaml")
    for output, why in (
        (f"{tmp_path}/file", "is a file; name a folder"),
        (f"{tmp_path}/file/run", "is a file; name a folder"),
        ("x" * 300, "cannot be a file or folder: File name too long"),
        ('"a\\0b"', "cannot be a file or folder: embedded null byte"),
        ("~nobody-of-that-name/run", "cannot be a file or folder: Could not determine home directory"),
    ):
        assert main(["train", recipe, f"output={output}"]) == 2
        assert why in capsys.readouterr().err
        for key in ("model.path", "data.train.0.path", "model.chat_template"):
            assert main(["train", recipe, f"{key}={output}"]) == 2
            assert "error: " in capsys.readouterr().err
    assert main(["preview", recipe, "--html", str(tmp_path)]) == 1
    assert f"error: {tmp_path}" in capsys.readouterr().err
    assert main(["train", str(tmp_path)]) == 2
    assert "a folder, and not a YAML file" in capsys.readouterr().err


def test_verbs_on_something_that_is_no_run_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["merge"], ["export"], ["chat", "--message", "hi"]):
        assert main([verb[0], str(tmp_path), *verb[1:]]) == 2
        assert str(tmp_path) in capsys.readouterr().err


def test_a_run_folder_is_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("precious")
    assert main(["train", "demo", f"output={tmp_path}"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    # Even with --overwrite, bad data comes to light before anything is removed.
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    assert main(["train", "demo", f"output={tmp_path}", f"data.train.0.path={bad}", "--overwrite"]) == 2
    assert (tmp_path / "adapter" / "weights").read_text() == "precious"


def test_json_goes_to_stdout_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qlora_sft.cli import guarded

    assert guarded(lambda: {"answer": 1}, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"answer": 1}


@pytest.mark.parametrize("debug", [None, False])
def test_an_unforeseen_error_names_the_file_of_its_traceback(
    debug: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is in its text; and --debug where there is one, which the demo has not."""
    from qlora_sft.cli import guarded

    def fail() -> None:
        raise ValueError("bad \udcff")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # As Python opens it.
    stderr = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    monkeypatch.setattr(sys, "stderr", stderr)
    assert guarded(fail, debug=debug) == 1
    stderr.seek(0)
    said = stderr.read()
    (file,) = tmp_path.iterdir()
    assert f"{file} says where" in said
    assert ("--debug" in said) == (debug is False)
    assert "ValueError: bad \\udcff" in file.read_text(encoding="utf-8")


UNREAD = """
import os, sys
from qlora_sft.cli import guarded
def act():
    if "lost" in sys.argv:
        raise BrokenPipeError(32, "a child has gone")
    print("x" * 100_000)
reader, writer = os.pipe()
if "read" not in sys.argv:
    os.close(reader)
os.dup2(writer, 1)
sys.exit(guarded(act if "json" not in sys.argv else dict, as_json="json" in sys.argv))
"""


def test_a_reader_that_has_seen_enough_is_no_fault() -> None:
    """As `head` is, of a long text and of --json. A pipe to something else that breaks is an error still."""
    for how in ("text", "json"):
        ended = python(UNREAD, how)
        assert (ended.returncode, ended.stderr) == (0, "")
    ended = python(UNREAD, "read", "lost")
    assert ended.returncode == 1
    assert "BrokenPipeError: [Errno 32] a child has gone" in ended.stderr


def test_a_value_that_a_later_one_would_undo_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    twice = {
        ("lora.r=8", "lora.r=16"): "override 'lora.r=16' would undo 'lora.r=8'",
        ("model.path=demo", "--model.path=other"): "would undo 'model.path=demo'",
        ("lora.r=8", "lora={alpha: 4}"): "override 'lora={alpha: 4}' would undo 'lora.r=8'",
    }
    for overrides, expected in twice.items():
        for verb in ("train", "preview", "plan"):
            assert main([verb, "demo", "--", *overrides]) == 2
            assert expected in capsys.readouterr().err
    check_overrides(["lora={alpha: 4}", "lora.r=8", "lora.rank=3"])


def test_a_cache_that_cannot_be_written_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QLORA_SFT_CACHE", str(tmp_path / "file" / "cache"))
    assert guarded(lambda: {"cache": str(cache_dir("models"))}) == 1
    assert f"{tmp_path / 'file' / 'cache'}" in (said := capsys.readouterr().err)
    assert "QLORA_SFT_CACHE=FOLDER before the command" in said
    above = FileNotFoundError(2, "No such file or directory", str(tmp_path / "file"))
    assert "QLORA_SFT_CACHE=FOLDER" in str(path_error(above))
    other = FileNotFoundError(2, "No such file or directory", str(tmp_path / "output"))
    assert "check the path and its permissions" in str(path_error(other))


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number of which the system knows nothing."""
    for name in ("QLORA_SFT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000)
    assert cache_root() == Path(tempfile.gettempdir()) / "qlora_sft-4000000"


def test_a_terminal_that_knows_no_such_letter_gets_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    def write() -> dict[str, object]:
        print("━ caf\xe9")
        return {}

    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert guarded(write) == 0
    assert written.getvalue() == b"\\u2501 caf\\xe9\n"
