"""List the shipped recipes, each with the line of its header that says what it is for."""

from __future__ import annotations

from typing import NamedTuple

from qlora_sft.config import RECIPES
from qlora_sft.text import read_text


class Shipped(NamedTuple):
    """Names a shipped recipe and says what it is for."""

    name: str
    purpose: str
    file: str


def shipped_recipes() -> list[Shipped]:
    """Returns all shipped recipes by name; the purpose is the first comment behind the line for editors."""
    files = sorted(RECIPES.glob("*.yaml"))
    return [Shipped(file.stem, read_text(file).splitlines()[1].removeprefix("# "), str(file)) for file in files]


def recipe_table(recipes: list[Shipped]) -> str:
    """Writes the list for a terminal."""
    width = max(len(recipe.name) for recipe in recipes)
    lines = [f"{recipe.name:<{width}}  {recipe.purpose}" for recipe in recipes]
    return "\n".join([*lines, "", f"Each is a file in {RECIPES}; use it by its name, with key.sub=value behind it,"
                      " or write your own with qlora-sft new."])  # fmt: skip
