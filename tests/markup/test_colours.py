"""The colours of pages are read by everybody: enough contrast, and curves that differ for the colour-blind, too."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from qlora_sft.markup.chart import COLOURS
from qlora_sft.markup.style import style

Colour = tuple[float, float, float]

# Machado, Oliveira and Fernandes (2009), severity 1: what people without one kind of cone see, in linear light.
SIGHT = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
}


def linear(text: str) -> Colour:
    digits = "".join(2 * digit for digit in text) if len(text) == 3 else text
    red, green, blue = (int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4))

    def light(value: float) -> float:
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    return light(red), light(green), light(blue)


def luminance(colour: Colour) -> float:
    return 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]


def contrast(one: Colour, other: Colour) -> float:
    """The contrast as WCAG defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def lab(colour: Colour) -> Colour:
    red, green, blue = (max(0.0, value) for value in colour)
    x = (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    z = (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089
    a, b, c = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in (x, y, z))
    return 116 * b - 16, 500 * (a - b), 200 * (b - c)


def palettes() -> dict[str, dict[str, Colour]]:
    """The colours of a light page and of a dark one, by their names."""
    text = style()
    light = text.split("body.qsft {")[1].split("}")[0]
    dark = text.split("prefers-color-scheme: dark")[1].split("}")[0]
    found = {}
    for name, part in (("light", light), ("dark", dark)):
        values = re.findall(r"--(\w+): #([0-9a-f]{3,6})\b", part)
        found[name] = {key: linear(value) for key, value in values if len(value) in (3, 6)}
    return found


@pytest.mark.parametrize("page", ["light", "dark"])
def test_texts_and_curves_stand_out(page: str) -> None:
    colours = palettes()[page]
    for name in ("ink", "soft", "accent", "good", "bad"):
        assert contrast(colours[name], colours["card"]) >= 4.5, name
    for number in range(COLOURS):
        assert contrast(colours[f"s{number}"], colours["card"]) >= 3, number


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("page", ["light", "dark"])
def test_neighbouring_curves_differ_for_everybody(page: str, sight: str) -> None:
    """The first four, which most charts need; more stand with names at their ends, or in a legend with dashes."""
    colours = palettes()[page]
    seen = []
    for number in range(4):
        colour = colours[f"s{number}"]
        red, green, blue = (sum(a * b for a, b in zip(row, colour, strict=True)) for row in SIGHT[sight])
        seen.append(lab((red, green, blue)))
    for one, other in combinations(range(4), 2):
        distance = sum((a - b) ** 2 for a, b in zip(seen[one], seen[other], strict=True)) ** 0.5
        assert distance > 20, (one, other, distance)
