"""What several files here compare with."""

from pathlib import Path
from typing import Any

import pytest
from tests_support import SHORT, result

from qlora_sft.config import Config


@pytest.fixture
def whole(make_config: Any) -> tuple[bytes, list[Any]]:
    """The result of a run that nothing happens to."""
    from qlora_sft.train import train

    config: Config = make_config(*SHORT)
    train(config, say=lambda _: None)
    return result(Path(config.output))
