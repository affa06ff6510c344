"""How long documents are and in which language they answer, as bars."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_check import checked

from qlora_sft.cli import main
from qlora_sft.data.histograms import drawn, evenly, lengths, supervised_text
from qlora_sft.data.language import UNKNOWN, language_of
from qlora_sft.data.render import Rendered

TEXTS = {
    "English": "The river had risen in the night, and by seven o'clock the lower road was under water. Nobody saw it.",
    "German": "Der Fluss war in der Nacht gestiegen, und um sieben Uhr stand die untere Straße unter Wasser.",
    "French": "La rivière avait monté dans la nuit, et la route du bas est sous les eaux.",
    "Spanish": "El río había crecido por la noche y a las siete la carretera está bajo el agua.",
    "Italian": "Il fiume è salito nella notte, e alle sette la strada bassa era sott'acqua. Non è come prima.",
    "Portuguese": "O rio subiu durante a noite e, às sete horas, a estrada não estava mais seca. Isso é mais.",
    "Dutch": "De rivier is in de nacht gestegen en om zeven uur stond het water op de weg. Dat is niet van deze tijd.",
    "Swedish": "Floden har stigit under natten och vägen är under vatten. Det är inte en vår som jag kan minnas.",
    "Polish": "Rzeka podniosła się w nocy i droga jest pod wodą. Nikt nie pamięta, że tak było na wiosnę.",
    "Turkish": "Nehir gece yükseldi ve yol su altında. Bu bahar çok yağmur var, ama kimse böyle bir şey hatırlamıyor.",
    "Vietnamese": "Nước sông đã dâng lên trong đêm và con đường không còn khô. Đây là một mùa xuân của những cơn mưa.",
    "Indonesian": "Sungai itu naik pada malam hari dan jalan ini tidak bisa dilalui. Anda harus menunggu.",
    "Chinese": "夜里河水涨了两米，七点钟低处的路已经淹没了。",
    "Japanese": "夜の間に川の水位が上がり、七時には下の道が水に浸かっていた。",
    "Korean": "밤사이 강물이 불어나 일곱 시에는 아랫길이 물에 잠겼다.",
    "Cyrillic script": "За ночь река поднялась на два метра, и дорога оказалась под водой.",
    "Arabic script": "ارتفع النهر في الليل وأصبح الطريق تحت الماء.",
    "Greek": "Το ποτάμι ανέβηκε τη νύχτα και ο δρόμος βρέθηκε κάτω από το νερό.",
    UNKNOWN: "def mean(values): return sum(values) / len(values)",
}


@pytest.mark.parametrize("language", TEXTS)
def test_languages(language: str) -> None:
    assert language_of(TEXTS[language]) == language
    assert language_of("12,345 + 1 = ?! " + TEXTS[language]) == language


@pytest.mark.parametrize("text", ["", "42", "Paris", '{"city": "Berlin"}', "???", "OK"])
def test_what_says_too_little_is_no_language(text: str) -> None:
    assert language_of(text) == UNKNOWN


@given(st.text(max_size=200))
def test_any_text_has_an_answer(text: str) -> None:
    assert language_of(text)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50))
def test_every_length_is_in_its_class(tokens: list[int]) -> None:
    counted = lengths(tokens)
    bounds = [[int(part.replace(",", "")) for part in name.split(" to ")] for name, _ in counted]
    assert [count for _, count in counted] == [sum(low <= n <= high for n in tokens) for low, high in bounds]
    assert sum(count for _, count in counted) == len(tokens)


def test_bars_are_as_long_as_the_counts() -> None:
    picture = drawn("lengths", [("a<b", 40), ("bb", 1), ("c", 0)])
    assert re.findall(r'class="part" width="(\d+)"', picture) == ["1000", "25", "0"]
    assert re.findall(r"<small>(.*?)</small>", picture) == ["40 (97.6%)", "1 (2.4%)", "0 (0.0%)"]
    assert '<span title="a&lt;b">a&lt;b</span>' in picture
    assert drawn("lengths", []) == ""


def test_documents_are_looked_at_from_end_to_end() -> None:
    documents = [Rendered([n], [0.0], "a") for n in range(95)]
    assert [row.input_ids[0] for row in evenly(documents, 10)] == [0, 9, 19, 28, 38, 47, 57, 66, 76, 85]
    assert evenly(documents[:3], 10) == documents[:3]
    assert evenly([], 10) == []


def test_only_what_is_supervised_has_a_language(tokenizer: Any) -> None:
    ids = tokenizer("why?<|im_end|>so<|im_end|>").input_ids
    weights = [0.0] * (len(ids) - 2) + [1.0, 1.0]
    assert supervised_text(Rendered(ids, weights, "a"), tokenizer) == "so"


def test_the_page_has_them_by_source(make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turn = {"role": "user", "content": "?"}
    rows = [
        {"messages": [turn, {"role": "assistant", "content": TEXTS[name]}]} for name in ("German", "German", "French")
    ]
    make_config(rows=rows)
    assert main(["preview", str(tmp_path / "config.yaml"), "--html", str(tmp_path / "page.html"), "--json"]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    checked(page)
    assert 'aria-label="chat: tokens per document"' in page
    assert "language of what is supervised, guessed, in 3 documents" in page
    assert re.search(r'>German</span><svg.*?class="part" width="1000".*?<small>2 \(66\.7%\)</small>', page)
    assert re.search(r'>French</span><svg.*?class="part" width="500".*?<small>1 \(33\.3%\)</small>', page)
    assert json.loads(capsys.readouterr().out)["rows"]
