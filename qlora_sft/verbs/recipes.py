"""Run the verbs around recipes: list those that are shipped, write a new one, convert one of another toolkit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from qlora_sft.errors import ConfigError
from qlora_sft.recipe_new import GOALS
from qlora_sft.verbs.verb import AddVerb


def add_recipe_verbs(add: AddVerb) -> None:
    """Adds ``recipes``, ``new`` and ``convert`` to the command line."""
    add("recipes", _recipes, "list the shipped recipes, and what each is for")
    new = add("new", _new, "write a commented recipe; asks for whatever is not given")
    new.add_argument("file", help="YAML file to write")
    new.add_argument("--model", metavar="PATH", help="folder or Hub id of the base model, or demo")
    new.add_argument("--data", action="append", default=[], metavar="PATH", help="training data; may be given again")
    new.add_argument(
        "--held-out", action="append", default=[], metavar="PATH",
        help="data that is never trained on (default: 5%% of every source)",
    )  # fmt: skip
    new.add_argument("--card", metavar="GB", help="GPU memory in GB; 0 without a GPU")
    new.add_argument("--goal", choices=list(GOALS), help="what the model is to learn")
    other = add("convert", _convert, "turn a configuration of axolotl, LLaMA-Factory, TRL or Unsloth into a recipe")
    other.add_argument("file", help="their YAML file, or a Python script with their arguments")
    other.add_argument("--out", metavar="FILE", help="YAML file to write (default: print it)")


def _recipes(arguments: argparse.Namespace) -> Mapping[str, object]:
    from qlora_sft.recipe_list import recipe_table, shipped_recipes

    recipes = shipped_recipes()
    if not arguments.json:
        print(recipe_table(recipes))
    return {"recipes": [recipe._asdict() for recipe in recipes]}


def _new(arguments: argparse.Namespace) -> Mapping[str, object]:
    from qlora_sft.recipe_new import ask, card_size, check_given, check_goal, new_recipe

    model = arguments.model or ask("--model (a folder, a Hub id, or demo)", check_given)
    data = arguments.data or [ask("--data (a file, a folder, a glob or a Hub id)", check_given)]
    card = arguments.card or ask("--card (GB of GPU memory; 0 without a GPU)", card_size)
    goal = arguments.goal or ask(f"--goal ({', '.join(GOALS)})", check_goal)
    try:
        size = card_size(card)
    except ValueError as error:
        raise ConfigError(f"qlora-sft new: --card: expected {error}, got {card!r}") from None
    file = new_recipe(arguments.file, model, data, size, goal, arguments.held_out)
    if not arguments.json:
        print(f"wrote {file}; next: qlora-sft preview {file}, qlora-sft plan {file}, qlora-sft train {file}")
    return {"file": str(file)}


def _convert(arguments: argparse.Namespace) -> Mapping[str, object]:
    from qlora_sft.convert.recipe import convert, write_recipe

    recipe = convert(arguments.file)
    for note in recipe.notes:
        print(f"not in the recipe: {note}", file=sys.stderr)
    if arguments.out:
        print(f"wrote {write_recipe(recipe, arguments.out)}", file=sys.stderr)
    elif not arguments.json:
        print(recipe.text, end="")
    return {"recipe": recipe.text, "notes": recipe.notes}
