"""Write a commented recipe for a model, data, a card and a goal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_sft.atomic import written_file
from qlora_sft.config import RECIPES, load_config
from qlora_sft.convert.pieces import named_apart
from qlora_sft.errors import ConfigError
from qlora_sft.text import as_path
from qlora_sft.yaml_text import write_yaml

# GiB of a card, from which on -> a max_length that an 8B trains there without host memory, by the plan, with room to
# spare. Smaller cards and a CPU take smaller models.
CARDS = {0: 2048, 8: 4096, 12: 8192, 16: 16_384, 24: 32_768, 48: 65_536, 80: 131_072}


@dataclass(frozen=True)
class Goal:
    """Says what one kind of fine-tuning needs beside the defaults."""

    purpose: str
    longest: int = 8192
    """Most tokens of a sequence that the goal asks for; a small card allows less."""
    rank: int = 32
    learning_rate: str = "2e-4"
    source: tuple[str, ...] = ()
    """Lines of every source."""
    template: str | None = None
    evaluation: tuple[str, ...] = ()


GOALS = {
    "chat": Goal("answers as in your conversations"),
    "think": Goal(
        "thinks before it answers, as in your conversations",
        longest=16_384, learning_rate="1e-4",
        source=('thinking: "on"                # the template is told so for rows that do not say it themselves',),
        evaluation=("max_new_tokens: 2048            # else answers are cut off in the middle of a thought",),
    ),
    "no-think": Goal(
        "answers at once, without thinking",
        source=('thinking: "off"               # the template is told so for rows that do not say it themselves',),
    ),
    "tools": Goal("calls tools as in your conversations", learning_rate="1e-4",
                  evaluation=("max_new_tokens: 256",)),
    "base-to-chat": Goal(
        "a base model that becomes one that chats",
        rank=64, template="chatml", evaluation=("max_new_tokens: 256",),
    ),
    "read": Goal(
        "reads on in plain texts (continued pre-training)",
        rank=64, learning_rate="5e-5", source=("format: text",),
        evaluation=("answers: 0                      # plain texts ask no questions",),
    ),
    "long": Goal("long conversations and documents, as long as the card allows", longest=131_072, rank=16,
                 learning_rate="1e-4",
                 source=("allow_share: true             # an answer is short beside a long document",)),
}  # fmt: skip


def new_recipe(
    file: str, model: str, data: Sequence[str], card: int, goal: str, held_out: Sequence[str] = ()
) -> Path:  # fmt: skip
    """Writes the recipe ``file`` and returns its path. Raises `ConfigError` if it exists or would not load.

    ``card`` is the GPU memory in GB, 0 without a GPU; ``goal`` is one of `GOALS`.
    """
    target = as_path(file)
    if target.exists():
        raise ConfigError(f"{target} exists; name another file, or remove it first")
    with written_file(target) as beside:
        beside.write_text(_text(target, model, data, held_out, card, GOALS[goal]), encoding="utf-8")
        try:
            load_config(beside)
        except ConfigError as error:
            raise ConfigError([problem.replace(str(beside), str(target)) for problem in error.problems]) from None
    return target


def ask(question: str, check: Callable[[str], object]) -> str:
    """Asks on a terminal until ``check`` takes the answer. Raises `ConfigError` where there is no terminal."""
    if not sys.stdin.isatty():
        raise ConfigError(f"qlora-sft new: {question} is not given, and there is no terminal to ask on")
    while True:
        try:
            answer = input(f"{question}: ").strip()
        except EOFError:
            raise ConfigError(f"qlora-sft new: {question} is not given; the answers ended") from None
        try:
            check(answer)
        except (ValueError, ConfigError) as error:
            print(error, file=sys.stderr)
        else:
            return answer


def check_given(answer: str) -> None:
    """Raises ValueError for an empty answer."""
    if not answer:
        raise ValueError("name a file, a folder or a Hub id")


def card_size(answer: str) -> int:
    """Returns the GB of a card. Raises ValueError for anything but a whole number from 0 on."""
    size = answer.strip().lower().removesuffix("gb").strip()
    if not (size.isascii() and size.isdigit() and len(size) < 5):
        raise ValueError("a whole number, as 24; 0 without a GPU")
    return int(size)


def check_goal(answer: str) -> None:
    """Raises ValueError for an unknown goal."""
    if answer not in GOALS:
        raise ValueError("one of: " + "; ".join(f"{name} ({goal.purpose})" for name, goal in GOALS.items()))


# ------------------------------------------------------------------ the text


def _text(file: Path, model: str, data: Sequence[str], held_out: Sequence[str], card: int, goal: Goal) -> str:
    length = min(goal.longest, CARDS[max(size for size in CARDS if size <= card)])
    rank = 16 if card <= 8 else goal.rank
    accumulation = max(1, min(16, (65_536 if card else 8192) // length))
    small = _small_card(model, card)
    named = _one_line(str(file))
    lines = [
        f"# yaml-language-server: $schema={RECIPES / 'schema.json'}",
        f"# {_one_line(Path(model).name)}: {goal.purpose}, {f'on a card of {card} GB' if card else 'without a GPU'}.",
        f"#   qlora-sft preview {named}    what is trained, token by token",
        f"#   qlora-sft plan {named}       whether it fits this machine, and how long it takes",
        f"#   qlora-sft train {named}",
        "# All keys: the schema above, with their meaning. Other recipes: qlora-sft recipes.",
        "model:",
        f"  {_pair('path', model)}",
        *small.get("model", ()),
        *_template(goal),
        "data:",
        "  train:",
        *_sources(data, goal),
        *_held_out(held_out, goal),
        f"  max_length: {length:<20} # longest conversation and packed sequence, in tokens; longer ones are dropped",
        "lora:",
        f"  r: {rank:<29} # rank; more of it learns and forgets more",
        f"  alpha: {rank}",
        "training:",
        f"  learning_rate: {goal.learning_rate}",
        f"  gradient_accumulation: {accumulation:<9} # packed sequences per optimizer step",
        "  # max_steps: 20                 # for a first try",
        *(["evaluation:", *(f"  {line}" for line in goal.evaluation)] if goal.evaluation else []),
        *(["memory:", *small["memory"]] if small else []),
        f"output: {json.dumps('runs/' + file.stem, ensure_ascii=False)}",
    ]
    return "\n".join(lines) + "\n"


def _template(goal: Goal) -> list[str]:
    if goal.template:
        return [f"  chat_template: {goal.template:<18} # its control tokens are added and trained if the base has none"]
    return []


def _sources(paths: Sequence[str], goal: Goal) -> list[str]:
    lines = []
    for source in named_apart([{"path": path} for path in paths]):
        first, *others = [*(_pair(key, str(value)) for key, value in source.items()), *goal.source]
        lines += [f"    - {first}", *(f"      {line}" for line in others)]
    return lines


def _held_out(paths: Sequence[str], goal: Goal) -> list[str]:
    if paths:
        return ["  held_out:", *_sources(paths, goal)]
    return [
        "  held_out: 5%                     # of every source: never trained on, they show what was learned; or a list"
    ]


def _small_card(model: str, card: int) -> dict[str, list[str]]:
    """Returns what frees 1.7 GiB of an 8B on a small card, as comments unless the head is known not to be tied."""
    if card > 8 or not card:
        return {}
    off = "" if _untied(model) else "# "
    why = "" if _untied(model) else ", if its head is not tied to the embedding (tie_word_embeddings: false)"
    return {
        "model": [f"  {off}head_in_4bit: true".ljust(33) + f" # saves 0.7 GiB of an 8B{why}"],
        "memory": [
            "  policy: auto                    # keeps what fits, recomputes the rest",
            f"  {off}offload_embeddings: true".ljust(33) + f" # saves 1 GiB of an 8B{why}",
        ],
    }


def _untied(model: str) -> bool:
    """Says whether the config.json of a folder has the head apart; False where that is not known."""
    file = as_path(model) / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get("tie_word_embeddings") is False


def _pair(key: str, value: str) -> str:
    """Returns ``key: value`` on one line."""
    if len(value.splitlines()) > 1:
        return f"{key}: {json.dumps(value)}"
    return write_yaml({key: value}).strip()


def _one_line(text: str) -> str:
    """Returns a text for a comment, which a line break would end and bytes of a file's name that are no UTF-8 spoil."""
    return " ".join(text.split()).encode("utf-8", "replace").decode()
