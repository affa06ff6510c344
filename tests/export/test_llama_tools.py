"""Loading llama.cpp on a bare system."""

from __future__ import annotations

import pytest

from qlora_sft.errors import RunError
from qlora_sft.export.llama_tools import loaded

MISSING = "libgomp.so.1: cannot open shared object file: No such file or directory"


def test_where_the_system_has_no_openmp_that_of_torch_will_do() -> None:
    faults: list[Exception] = [ImportError(MISSING)]

    def load() -> str:
        if faults:
            raise faults.pop()
        return "library"

    assert loaded(load) == "library"
    faults += [OSError(MISSING), OSError(MISSING)]
    with pytest.raises(RunError, match=r"llama.cpp cannot be loaded \(libgomp.so.1.*apt install libgomp1"):
        loaded(load)
    faults.append(OSError("not an ELF file"))
    with pytest.raises(OSError, match="not an ELF file"):
        loaded(load)
