"""The notebooks, run cell by cell on a tiny model, and their first cell as it would run in Colab: they must not rot."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
RENDERED = ROOT / "docs" / "quickstart.ipynb"
# Shown to nobody here; what would be is kept.
STUB = "class HTML(str): pass\ndef display(shown): assert 'srcdoc' in shown and 'supervised' in shown"
SMALL = ["training.max_steps=2", "evaluation.answers=1", "evaluation.max_new_tokens=4", "data.held_out.0.max_rows=2"]
DEMO = [
    *(f"data.train.{number}.max_rows=20" for number in range(3)),
    *(f"data.held_out.{number}.max_rows=2" for number in (1, 2)),
    "evaluation.tasks.0.max_rows=2",
    "evaluation.tasks.0.max_new_tokens=4",
]
FOLDERS = {
    "quickstart": "notebook", "own_data": "own-data", "thinking_and_tools": "thinking", "long_context": "long",
    "evaluate_and_export": "export",
}  # fmt: skip


def cells(notebook: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def first_cell(notebook: Path) -> str:
    return "".join(cells(notebook)[0]["source"])


def shortened(name: str, model: Path, backend: str) -> str:
    """The code of a notebook, with settings that make it short in its one list of them."""
    code = "\n\n".join("".join(cell["source"]) for cell in cells(ROOT / "notebooks" / f"{name}.ipynb"))
    small = [f"model.path={model}", f"model.backend={backend}", *SMALL, *([] if name == "own_data" else DEMO)]
    # The notebook's own steps and rows are more, so they must not come behind.
    code = re.sub(r', "training.max_steps=\d+"', "", code)
    code = re.sub(r"max_rows=20, max_new_tokens=\d+", "max_rows=2, max_new_tokens=4", code)
    begin, found, end = code.partition(f'["output=runs/{FOLDERS[name]}"')
    assert found
    return f"{begin}[*{small!r}, {found[1:]}{end}"


def prepared(folder: Path) -> Path:
    (folder / "IPython").mkdir(parents=True)
    (folder / "IPython" / "__init__.py").touch()
    (folder / "IPython" / "display.py").write_text(STUB)
    return folder


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_no_outputs_are_kept(notebook: Path) -> None:
    assert cells(notebook)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(notebook))


def test_the_rendered_quickstart_is_the_quickstart_with_outputs() -> None:
    """If it is not, python notebooks/render.py writes it anew."""
    content = RENDERED.read_text(encoding="utf-8")
    ours, theirs = (json.loads(text)["cells"] for text in ((ROOT / "notebooks" / RENDERED.name).read_text(), content))
    assert [(cell["cell_type"], cell["source"]) for cell in theirs] == [(c["cell_type"], c["source"]) for c in ours]
    shown = [json.dumps(cell["outputs"], ensure_ascii=False) for cell in cells(RENDERED)]
    assert [cell["execution_count"] for cell in cells(RENDERED)] == [*range(1, len(shown) + 1)]
    assert [text == "[]" for text in shown] == [True, True, *[False] * (len(shown) - 2)]
    # The masks, the plan, the live line and the curves, before and after, the tasks, the exported file.
    for part in ("<mark", "longest row per card", "█", "<svg", "held-out loss", "arithmetic", "q8_0 against merged"):
        assert part in "".join(shown)
    assert not any("error" in output["output_type"] for cell in cells(RENDERED) for output in cell["outputs"])
    assert render()["OF_A_MACHINE"].search(content) is None
    assert len(content.encode()) < 500_000


def render() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "notebooks" / "render.py"))


def test_rendered_outputs_do_not_name_the_machine() -> None:
    notebook = json.loads((ROOT / "notebooks" / RENDERED.name).read_text(encoding="utf-8"))
    first = cells(ROOT / "notebooks" / RENDERED.name)[0]
    assert first["outputs"] == []
    code = render()["code_cells"](notebook)
    code[2]["metadata"] = {"execution": {"iopub.execute_input": "2026-01-01T00:00:00Z"}}
    code[2]["outputs"] = [
        {"output_type": "stream", "name": "stderr", "text": "10%|█ |\r90%|█▇|  \rdone\nin /here/run: /house/me/x\n"},
        {
            "output_type": "execute_result",
            "execution_count": 7,
            "metadata": {},
            "data": {"text/html": "<p>/here/run</p>"},
        },
    ]
    scrubbed = render()["scrubbed"](notebook, {"/here/run": ".", "/house/me": "~"})
    (stream, result) = render()["code_cells"](scrubbed)[2]["outputs"]
    assert stream["text"] == ["done\n", "in .: ~/x\n"]
    assert (result["data"], result["execution_count"]) == ({"text/html": ["<p>.</p>"]}, 3)
    assert "iopub" not in json.dumps(scrubbed)
    for path in ("/root/x", "/tmp/x", "http://localhost/simple"):
        code[2]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": f"see {path}"}]
        with pytest.raises(ValueError, match="names the machine"):
            render()["scrubbed"](notebook, {})


def test_the_quickstart_runs(tmp_path: Path, convertible_model: Path) -> None:
    """Under Unsloth, whose patched trainer trains our batches and writes nowhere else."""
    script = prepared(tmp_path) / "notebook.py"
    script.write_text(shortened("quickstart", convertible_model, "auto"))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "backend: unsloth" in done.stderr
    # Unsloth's unsloth_compiled_cache is not among them.
    assert {path.name for path in tmp_path.iterdir()} == {"IPython", "notebook.py", "runs"}
    run = tmp_path / "runs" / "notebook"
    assert (run / "gguf" / "notebook-q8_0.gguf").is_file()
    assert (run / "evaluation" / "arithmetic.json").is_file()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(0 < row["loss"] < 20 and row["supervised_tokens"] > 0 for row in rows)
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """(name, model) -> what the notebook printed; it is run in this process, where all is imported, and in a home."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    display = ModuleType("IPython.display")
    exec(STUB, display.__dict__)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)

    def run(name: str, model: Path) -> str:
        exec(compile(shortened(name, model, "transformers"), name, "exec"), {"__name__": "__main__"})
        return capsys.readouterr().out

    return run


def test_own_data_runs(run_here: Any, tiny_model: Path) -> None:
    printed = run_here("own_data", tiny_model)
    assert "shop         1 of 20 rows kept" in printed
    assert "data/broken.jsonl:1: no assistant turn" in printed
    assert "did you mean 'learning_rate'?" in printed
    assert Path("runs/own-data/adapter").is_dir()
    assert {path.name for path in Path().iterdir()} == {"runs", "data", "shop.yaml"}


def test_long_context_runs(run_here: Any, tiny_model: Path) -> None:
    printed = run_here("long_context", tiny_model)
    assert "longest row per card" in printed
    assert "65,536 tokens" in printed
    assert "offload      activations" in printed
    assert Path("runs/long/adapter").is_dir()
    assert {path.name for path in Path().iterdir()} == {"runs"}


@pytest.mark.slow
def test_thinking_and_export_run(run_here: Any, convertible_model: Path) -> None:
    """The quickstart has the most of it."""
    assert "tool_call" in run_here("thinking_and_tools", convertible_model)
    assert Path("runs/thinking/evaluation/thinking-off.json").is_file()
    assert "TEMPLATE" in run_here("evaluate_and_export", convertible_model)
    assert Path("runs/export/gguf/export-q8_0.gguf").is_file()
    assert Path("runs/export/evaluation/general.json").is_file()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_its_badge_opens_it_and_its_first_cell_fetches_the_same_project(notebook: Path) -> None:
    text = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
    (opened,) = re.findall(
        r"\(https://colab\.research\.google\.com/github/(\S+)/blob/main/notebooks/(\w+)\.ipynb\)", text
    )
    (fetched,) = re.findall(r'"https://github\.com/(\S+)"', first_cell(notebook))
    assert opened == (fetched, notebook.stem)
    assert first_cell(notebook) == first_cell(NOTEBOOKS[0])
    assert f"notebooks/{notebook.name}" in (ROOT / "README.md").read_text(encoding="utf-8")


def colab(folder: Path) -> dict[str, str]:
    """An environment as Colab's: its versions, google.colab, and a git and a pip that only write down what they do."""
    versions = {
        "torch": "2.11.0+cu128", "triton": "3.6.0", "torchvision": "0.26.0+cu128", "torchao": "0.10.0",
        "numpy": "2.1.3", "pandas": "2.2.3", "protobuf": "5.29.6",
    }  # fmt: skip
    site, bin = folder / "site", folder / "bin"
    for name, version in versions.items():
        (site / f"{name}-{version}.dist-info").mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)
    (site / "google" / "colab").mkdir(parents=True)
    (site / "pip").mkdir()
    (site / "pip" / "__init__.py").touch()
    (site / "pip" / "__main__.py").write_text(
        "import sys, pathlib\n"
        f"with open({str(folder / 'pip.log')!r}, 'a') as log:\n"
        "    print(*sys.argv[1:], file=log)\n"
        "    for part in sys.argv:\n"
        "        print(pathlib.Path(part).read_text() if part.endswith('versions.txt') else '', end='', file=log)\n"
    )
    bin.mkdir()
    (bin / "git").write_text(f'#!/bin/sh\ncp -r {ROOT}/qlora_sft {ROOT}/requirements.lock "$5/" || exit 1\n')
    (bin / "git").chmod(0o755)
    (folder / "content" / "qlora-sft").mkdir(parents=True)
    return {**os.environ, "PYTHONPATH": str(site), "PATH": f"{bin}:/usr/bin:/bin"}


def test_in_colab_the_first_cell_installs_beside_its_torch(tmp_path: Path) -> None:
    environment = colab(tmp_path)
    hide = "import sys\nsys.meta_path = [finder for finder in sys.meta_path if '__editable__' not in repr(finder)]\n"
    code = first_cell(NOTEBOOKS[0]).replace("/content", str(tmp_path / "content"))
    # Nothing was installed, so what installed it is looked for where it was fetched.
    code = code.replace("    importlib.invalidate", "    sys.path.append(home)\n    importlib.invalidate")
    done = subprocess.run(
        [sys.executable, "-c", hide + code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch 2.11.0+cu128 is here and is kept; what others use here stays as it is" in done.stdout
    first, *pins, last = (tmp_path / "pip.log").read_text().splitlines()
    assert "install --constraint" in first
    assert ".[gguf]" in first
    kept = {"torch==2.11.0+cu128", "triton==3.6.0", "torchvision==0.26.0+cu128", "numpy==2.1.3", "pandas==2.2.3"}
    assert kept | {"protobuf==5.29.6", "transformers==5.17.0"} < set(pins)
    assert not any(part.startswith(("torch=", "triton", "numpy", "pandas", "protobuf")) for part in first.split())
    assert "--no-deps unsloth==" in last


def test_elsewhere_the_first_cell_does_nothing_or_says_how_to_get_it(tmp_path: Path) -> None:
    hide = "import importlib.util as u\nu.find_spec = lambda name: None\n"
    there, missing = (
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        for code in (first_cell(NOTEBOOKS[0]), hide + first_cell(NOTEBOOKS[0]))
    )
    assert (there.returncode, there.stdout, there.stderr) == (0, "", "")
    assert missing.returncode == 1
    assert f"{sys.executable} has no qlora_sft. In the checkout run make install" in missing.stderr
    assert list(tmp_path.iterdir()) == []
