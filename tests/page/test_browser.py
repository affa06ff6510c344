"""The pages in Chromium: no error in the console, every figure drawn, nothing to scroll sideways on a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_run
from test_run_page import HOSTILE

from qlora_sft.page.write import report_runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")

# Frames of these widths are laid out as on a screen of that width.
WIDTHS = (390, 1280)
MEASURE = """<!doctype html><meta charset="utf-8"><body>%s<pre id="result">nothing</pre><script>
onload = () => {
  const result = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    page.querySelectorAll("details").forEach(each => { each.open = true; });
    const boxes = [...page.querySelectorAll("figure svg[role=img]")].map(svg => svg.getBoundingClientRect());
    const lines = [...page.querySelectorAll("figure .plot .line")];
    const wide = [...page.querySelectorAll("body *")].filter(each =>
      each.getBoundingClientRect().right > root.clientWidth + 1 && !each.closest(".scroll, pre, svg"));
    return {
      width: root.clientWidth, scrolls: root.scrollWidth, figures: page.querySelectorAll("figure").length,
      drawn: boxes.filter(box => box.width > 100 && box.height > 100).length,
      lines: lines.length, empty: lines.filter(line => line.getTotalLength() == 0).length,
      wide: wide.map(each => each.outerHTML.slice(0, 200)),
      clipped: [...page.querySelectorAll(".card > b")].filter(each => each.scrollWidth > each.clientWidth).length,
      bold: page.defaultView.getComputedStyle(page.querySelector("h1")).fontSize,
    };
  });
  document.getElementById("result").textContent = JSON.stringify(result);
};
</script>"""


def measured(pages: list[Path], folder: Path) -> list[dict[str, Any]]:
    """Lays every page out at every width, in one browser, whose start takes longer than all of it, and returns what was
    measured; fails if the console had anything to say."""
    frames = "".join(
        f'<iframe src="{page.as_uri()}" style="width:{width}px;height:900px;border:0"></iframe>'
        for page in pages
        for width in WIDTHS
    )
    probe = folder / "probe.html"
    probe.write_text(MEASURE % frames)
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000",
        "--hide-scrollbars", "--virtual-time-budget=20000", "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert [line for line in result.stderr.splitlines() if ":CONSOLE" in line] == []
    found = re.search(r'<pre id="result">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found is not None, result.stderr
    measures: list[dict[str, Any]] = json.loads(
        found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    )
    return measures


def test_reports_and_comparisons_fit_a_phone_and_a_screen(tmp_path: Path) -> None:
    whole, hostile = write_run(tmp_path / "support"), write_run(tmp_path / "odd", steps=30, sources=[HOSTILE, "b", "c"])
    one = write_run(tmp_path / "one", steps=1, every=1, finished=False)
    report_runs([whole, hostile])
    report_runs([one])
    pages = {"report": whole / "report.html", "hostile": hostile / "report.html", "one step": one / "report.html",
             "comparison": whole / "comparison.html"}  # fmt: skip
    laid_out = [(name, width) for name in pages for width in WIDTHS]
    for (name, width), seen in zip(laid_out, measured([*pages.values()], tmp_path), strict=True):
        assert seen["width"] == width, name
        assert seen["scrolls"] <= width, (name, seen)
        assert seen["wide"] == [], name
        assert seen["figures"] == seen["drawn"] > 5, name
        assert seen["lines"] >= seen["figures"]
        assert seen["clipped"] == 0, (name, width)
        assert seen["bold"] == "28px", "the style was not read"
        if name != "one step":
            assert seen["empty"] == 0, name
