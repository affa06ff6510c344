"""Run quickstart.ipynb and write docs/quickstart.ipynb, the copy with its outputs, for readers on the web.

Run as::

    .venv/bin/pip install nbclient ipykernel
    .venv/bin/python notebooks/render.py

It trains the demo, in a folder of its own that is removed again. What names this machine is taken out of the outputs.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SOURCE, TARGET = ROOT / "notebooks" / "quickstart.ipynb", ROOT / "docs" / "quickstart.ipynb"
# What no reader has: folders of a machine, and what its pip and Jupyter say about it.
OF_A_MACHINE = re.compile(r"(?<![\w.~/])/(?:root|home|tmp|work|mnt|opt|usr|var|Users)/|https?://(?:localhost|127\.)")


def main() -> int:
    """Runs the notebook from top to bottom and writes the copy."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(SOURCE, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}}).execute()
        written = scrubbed(json.loads(nbformat.writes(notebook)), {folder: ".", str(Path.home()): "~"})
    TARGET.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def scrubbed(notebook: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Returns a notebook as its source has it, with outputs that do not name the machine.

    names: paths of the machine, with what is written in their place, the longest first.
    """
    source = json.loads(SOURCE.read_text(encoding="utf-8"))
    for count, (ours, theirs) in enumerate(zip(code_cells(source), code_cells(notebook), strict=True), 1):
        ours["execution_count"] = count
        ours["outputs"] = [_output(each, names, count) for each in _joined(theirs["outputs"])]
    return dict(source)


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns outputs in which neighbouring pieces of one stream are one text."""
    joined: list[dict[str, Any]] = []
    for stream, group in groupby(outputs, key=lambda output: output.get("name")):
        each = list(group)
        text = "".join("".join(piece["text"]) for piece in each) if stream else ""
        joined += [{"output_type": "stream", "name": stream, "text": text}] if stream else each
    return joined


def _output(output: dict[str, Any], names: dict[str, str], count: int) -> dict[str, Any]:
    """Returns one output of the cell ``count``. Raises ValueError if it still names the machine."""
    if "text" in output:
        return {**output, "text": _lines(drawn(_named("".join(output["text"]), names)))}
    found = output["data"]
    # The plain form of what is shown as a page is long, and nobody sees it.
    kinds = ["text/html"] if "text/html" in found else list(found)
    data = {kind: _lines(_named("".join(found[kind]), names)) for kind in kinds}
    numbered = {"execution_count": count} if "execution_count" in output else {}
    return {"output_type": output["output_type"], "metadata": {}, **numbered, "data": data}


def _named(text: str, names: dict[str, str]) -> str:
    for path, name in names.items():
        text = text.replace(path, name)
    if found := OF_A_MACHINE.search(text):
        raise ValueError(f"an output names the machine: {text[max(0, found.start() - 60) : found.end() + 60]!r}")
    return text


def drawn(text: str) -> str:
    """Returns what is to be seen of a text in the end: a line that was drawn again and again is there once."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    sys.exit(main())
