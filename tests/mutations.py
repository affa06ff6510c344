"""Files and recipes as they come out of accidents: cut off, doubled, half overwritten, with values of another kind."""

from __future__ import annotations

import copy
import random
from typing import Any

# One of every kind that a value can be, and those that have surprised a parser before.
VALUES: list[Any] = [
    None, "", " ", "\0", "text", "<|im_end|>", "<think>", "</think>", "\ud83d", "{", "[{'a': 1}]", "[]", "null",
    "é" * 300,
    [], [[]], [None], {}, {"": None}, {"role": "user"}, 0, -1, 3, 10**30, 1.5, float("nan"), float("inf"), True, False,
    ["a", {"type": "text", "text": "b"}], {"type": "image", "image": "x"}, [[[[[["deep"]]]]]], "0512", "1:30", "on",
]  # fmt: skip
BYTES = [
    b"\0", b"\xff", b"\xff\xfe", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\\", b"'", b"\t", b"- ",
    b"&a ", b"*a", b"<<: ", b"!!int ", b"%", b"|", b">", b"#", b"9" * 50, b"\xed\xa0\xbd", b"\xc3", b"\xe2\x80\xa8",
]  # fmt: skip


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """The content after one to four accidents."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        until = min(len(content), at + rng.choice([1, 1, 2, 5, 40]))
        piece = content[at:until]
        content = rng.choice(
            [
                content[:at],
                content[:at] + content[until:],
                content[:at] + rng.choice(BYTES) + content[until:],
                content[:at] + rng.choice(BYTES) + content[at:],
                content[:at] + piece + piece + content[until:],
                content[until:] + piece,
            ]
        )
    return content


def mutated_tree(tree: Any, rng: random.Random) -> Any:
    """The tree with one to three of its values, keys or items changed, doubled or gone."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            break
        inside, key = rng.choice(places)
        action = rng.randrange(5)
        if action == 0:
            del inside[key]
        elif action == 1 and isinstance(inside, dict):
            inside[rng.choice(["", "role", "content", str(key) + "s", str(key).upper()])] = inside.pop(key)
        elif action == 2 and isinstance(inside, list):
            inside.insert(key, copy.deepcopy(rng.choice(VALUES + inside)))
        else:
            inside[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def _places(tree: Any) -> Any:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield tree, key
        yield from _places(value)
