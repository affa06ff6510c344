"""Pieces of a page: what they say is escaped, and what would hide in a text is shown."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_check import checked

from qlora_sft.markup.bars import Bar, Interval, bars, intervals
from qlora_sft.markup.chart import Chart, draw
from qlora_sft.markup.elements import Markup, cards, facts, opens, page, section, table
from qlora_sft.markup.series import Series
from qlora_sft.markup.style import piece, style
from qlora_sft.markup.text import attribute, escape, shortened
from qlora_sft.markup.tokens import TokenRun, tokens_html


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<b> & \"quoted\" 'too'", "&lt;b&gt; &amp; &quot;quoted&quot; &#x27;too&#x27;"),
        ("a\u202eb", 'a<span class="u">U+202E</span>b'),
        ("\ud800", '<span class="u">U+D800</span>'),
        ("a\x00b", 'a<span class="u">U+0000</span>b'),
        ("tab\tand\nline", "tab\tand\nline"),
        ("👩🏽 日本 é", "👩🏽 日本 é"),
    ],
)
def test_texts_are_escaped_and_hidden_characters_shown(text: str, expected: str) -> None:
    assert escape(text) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec=None), max_size=50))
def test_any_text_can_be_written_and_opens_no_element(text: str) -> None:
    for written in (escape(text), attribute(text)):
        written.encode("utf-8")
        assert "<" not in written.replace('<span class="u">', "").replace("</span>", "")
    assert '"' not in attribute(text)


def test_a_long_text_says_how_much_is_left_out() -> None:
    text = shortened("a" * 100 + "b" * 100, 30)
    assert text == f"{'a' * 20} [… 170 characters …] {'b' * 10}"
    assert shortened("short", 30) == "short"


def test_pieces_take_what_is_written_already_as_it_is() -> None:
    assert "<td>&lt;i&gt;</td>" in table(["a"], [["<i>"]])
    assert "<td><i>x</i></td>" in table(["a"], [[Markup("<i>x</i>")]])
    assert section("a", "A") == ""
    checked(page("<t>", style(), opens("<s>", facts([("<n>", "<v>")]), cards([("<c>", "<d>", "<e>")]))))


def test_weights_and_kinds_of_tokens_are_seen() -> None:
    runs = [TokenRun("<|im_start|>", 0.0, True), TokenRun("yes", 0.5, False), TokenRun("no", 0.0, False)]
    assert tokens_html(runs) == ('<span class="c">&lt;|im_start|&gt;</span><sup>×0.5</sup><mark class="s">yes</mark>no')


def test_a_chart_breaks_at_a_gap_and_marks_it() -> None:
    points = [(1, 2.0), (2, 1.5), (3, None), (4, 1.0), (5, 0.5)]
    drawn = draw(Chart("Loss", "nats", [Series("loss", points)], missing=[3]))
    line = drawn.split('class="line s0 d0" d="')[1].split('"')[0]
    assert line.count("M") == 2
    assert 'class="missing" d="M500 1000v-60"' in drawn
    assert "<title>step 3: no value</title>" in drawn
    checked(page("t", style(), drawn))


def test_a_chart_without_values_is_not_drawn() -> None:
    assert draw(Chart("Loss", "", [])) == draw(Chart("Loss", "", [Series("a", [(1, None)])])) == ""


def test_many_curves_differ_by_colour_or_dash_and_the_rest_is_counted() -> None:
    series = [Series(f"source {n}", [(0, n + 1.0), (1, n + 2.0)]) for n in range(25)]
    drawn = draw(Chart("Loss", "", series))
    kinds = {part.split('"')[0] for part in drawn.split('<path class="line ')[1:]}
    assert len(kinds) == 14
    assert "14 of 25 curves are drawn; the table has all" in drawn
    assert drawn.count("<th ") == 26


def test_names_at_the_ends_of_curves_do_not_cover_each_other() -> None:
    series = [Series(f"s{n}", [(0, 1.0), (1, 1.0 + n / 1e6)]) for n in range(6)]
    drawn = draw(Chart("Loss", "", series)).split('class="ends"')[1].split("</div>")[0]
    places = sorted(float(part.split("%")[0]) for part in drawn.split("top:")[1:])
    assert len(places) == 6
    assert all(b - a >= 8.4 for a, b in pairwise(places))
    assert places[-1] <= 100


def test_bars_and_intervals_are_in_proportion() -> None:
    drawn = bars("tokens", [Bar("a", 200, 50, "x"), Bar("b", 100, 100, "y")])
    assert 'class="whole" width="1000"' in drawn
    assert 'class="part" width="250"' in drawn
    assert drawn.count('width="500"') == 2
    change = intervals("t", [Interval("pass@1", 0.2, 0.1, 0.3, "text", True), Interval("b", 0.0, -0.1, 0.1, "", None)])
    assert 'class="span good"' in change
    assert 'class="span open"' in change
    checked(page("t", style(), piece(drawn, change)))
