"""Loads a sharded 16-bit model into NF4 in a process of its own, and prints what that took at its peak.

``python load_peak_child.py FOLDER WARM``: WARM is a tiny model that is loaded first, for all that is imported.
Prints JSON: bytes of memory at the peak beyond those before, without the pages of mapped files, which the kernel takes
back when it needs them; and the bytes of the loaded model.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from pathlib import Path

import torch

from qlora_sft.model.load import load_base


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def main(folder: str, warm: str) -> None:
    load_base(warm, torch.bfloat16, load_in_4bit=True)
    gc.collect()
    before, seen, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(anonymous() - before)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_base(folder, torch.bfloat16, load_in_4bit=True)
    done.set()
    watcher.join()
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    print(json.dumps({"peak": max(seen), "held": held}))


if __name__ == "__main__":
    main(*sys.argv[1:])
