"""The shipped recipes: each loads, fits the schema, and by the plan's own word fits the card that it names.

``python tests/test_recipes.py`` writes the plan's figures into the headers anew, where the plan has changed.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from base_shapes import BASES
from qlora_kernels.offload.tiers import Tier, peak_bytes
from schema_check import faults

from qlora_sft.config import RECIPES, Config, load_config
from qlora_sft.errors import ConfigError
from qlora_sft.model.meta_model import read_settings
from qlora_sft.model.rope import check_context
from qlora_sft.plan.activations import sequence_bytes
from qlora_sft.plan.blueprint import blueprint_of
from qlora_sft.plan.split import activation_budget, fit_card
from qlora_sft.plan.weights import residents
from qlora_sft.yaml_text import read_yaml

FILES = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
PLANNED = [name for name in FILES if name != "demo"]  # whose figures depend on the machine; README has them
GIB = 2**30
LINE = re.compile(
    r"# Plan for a card of (\d+) GB: (\S+) GiB of weights, adapters and optimizer; (\S+) GiB of host memory for\n"
    r"# max_length; longest sequence (\S+) tokens without host memory, (\S+) with (\S+) GiB of it\.\n"
)
# Of a base whose layers the plan has no formula for.
HELD = re.compile(
    r"# Plan for a card of (\d+) GB: (\S+) GiB of weights, adapters and optimizer; what its layers keep is measured\n"
    r"# when a run begins\.\n"
)
MEASURED = [name for name in PLANNED if HELD.search(FILES[name].read_text())]


class Figures(NamedTuple):
    """What the plan says of a recipe on its card."""

    held: float
    host: float
    alone: int
    longest: int
    most_host: float

    def text(self, card: int) -> str:
        return (
            f"# Plan for a card of {card} GB: {self.held:.2f} GiB of weights, adapters and optimizer; "
            f"{self.host:.1f} GiB of host memory for\n"
            f"# max_length; longest sequence {self.alone:,} tokens without host memory, {self.longest:,} with "
            f"{self.most_host:.1f} GiB of it.\n"
        )


def held_bytes(config: Config, base: str) -> int:
    blueprint = blueprint_of(read_settings(config, base), config)
    return residents(blueprint, config, torch.bfloat16, "adamw_8bit", on_gpu=True).total


def figures(config: Config, base: str, card: int) -> Figures:
    """Asks the plan's own formulas, from config.json alone; training on a GPU in bfloat16."""
    blueprint = blueprint_of(read_settings(config, base), config)
    held = held_bytes(config, base)
    row = sequence_bytes(blueprint, config.lora, torch.bfloat16, on_gpu=True)
    alone = fit_card(card, blueprint.n_layers, row, held, 0)
    most = fit_card(card, blueprint.n_layers, row, held, 2**50)
    assert most.choice
    layer, loss = row(config.data.max_length * config.training.batch_size)

    def fits(offloaded: int) -> bool:
        tiers: list[Tier] = ["offload"] * offloaded + ["checkpoint"] * (blueprint.n_layers - offloaded)
        return peak_bytes(tiers, layer, loss) <= activation_budget(card * GIB, held)

    least = next(count for count in range(blueprint.n_layers + 1) if fits(count))
    host = least * layer.input / GIB
    return Figures(held / GIB, host, alone.tokens, most.tokens, most.choice.host_bytes / GIB)


def base_of(config: Config, folder: Path) -> str:
    """A folder with the config.json of the base that a recipe names, and nothing else."""
    (folder / "config.json").write_text(json.dumps(BASES[config.model.path]))
    return str(folder)


@pytest.mark.parametrize("name", [name for name in PLANNED if name not in MEASURED])
def test_it_fits_the_card_that_it_names_as_its_header_says(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    check_context(config, base_of(config, tmp_path))
    found = LINE.search(FILES[name].read_text())
    card = int(found[1]) if found else 24
    planned = figures(config, str(tmp_path), card)
    assert found, f"the header of {name} lacks these lines, for its card:\n{planned.text(card)}"
    said = Figures(*(float(text.replace(",", "")) for text in found.groups()[1:]))
    assert said == pytest.approx(planned, rel=0.03, abs=0.06), "run: python tests/test_recipes.py"
    assert config.data.max_length * config.training.batch_size <= planned.longest
    budget = config.memory.host_budget_gib
    assert budget is None or budget >= planned.host


@pytest.mark.parametrize("name", MEASURED)
def test_what_stays_on_the_card_that_it_names_is_as_its_header_says(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    check_context(config, base_of(config, tmp_path))
    found = HELD.search(FILES[name].read_text())
    assert found
    held = held_bytes(config, str(tmp_path))
    assert float(found[2]) == pytest.approx(held / GIB, abs=0.06)
    # Else the longer header is for it. Every layer keeps at least its input, and half of the card is for the rest.
    with pytest.raises(ConfigError, match="what its layers keep is not known"):
        figures(config, str(tmp_path), int(found[1]))
    settings = read_settings(config, str(tmp_path)).get_text_config()
    inputs = 2 * config.data.max_length * settings.hidden_size * settings.num_hidden_layers
    assert inputs < activation_budget(int(found[1]) * GIB, held) / 2


@pytest.mark.parametrize("name", FILES)
def test_its_header_says_what_it_is_for_and_how_it_is_run(name: str) -> None:
    schema, purpose, command, *_ = FILES[name].read_text().splitlines()
    assert schema == "# yaml-language-server: $schema=schema.json"
    assert re.fullmatch(r"# .{20,}[.:]", purpose)
    assert command.startswith(f"#   qlora-sft train {name}")


@pytest.mark.parametrize("name", FILES)
def test_the_schema_of_the_editor_takes_it(name: str) -> None:
    schema: dict[str, Any] = json.loads((RECIPES / "schema.json").read_text())
    assert list(faults(read_yaml(FILES[name].read_text()), schema)) == []


def rewrite_headers() -> None:
    for name in (name for name in PLANNED if name not in MEASURED):
        config, text = load_config(name), FILES[name].read_text()
        found = LINE.search(text)
        assert found, f"{name}: no lines of the plan in its header"
        with tempfile.TemporaryDirectory() as folder:
            planned = figures(config, base_of(config, Path(folder)), int(found[1]))
        FILES[name].write_text(text.replace(found[0], planned.text(int(found[1]))))


if __name__ == "__main__":
    rewrite_headers()
