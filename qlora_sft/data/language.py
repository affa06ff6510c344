"""Guess the language of a text: by its script, and where that is Latin by the commonest words of some languages."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

# Words that are common in one of these languages and rare, or no words, in the others.
_COMMON = {
    "English": "the and of is that it for with this you are was not be have what which from they would",
    "German": "und der die das ist nicht ein eine zu den mit sich auf wie auch von dass wird sind werden",
    "French": "le les des est et une dans pour que qui pas vous sur avec plus sont cette ce aux du",
    "Spanish": "el los las es y una por para con que como más pero está son del muy este su al",
    "Italian": "il gli è di che per una non con sono della più anche come questo nel alla ma lo del",
    "Portuguese": "os é uma não com para por mais como em são você isso foi mas ao dos das seu pelo",
    "Dutch": "het een van is niet dat op te zijn met voor maar ook aan wordt deze bij naar heeft als",
    "Swedish": "och att det som är inte på för med av den till har jag om ett kan från men eller",
    "Polish": "i w nie na się z do jest to że jak od przez dla są po czy oraz który tylko",
    "Turkish": "ve bir bu için ile da de olarak çok daha gibi olan en ne ama ya değil var kadar her",
    "Vietnamese": "và của là có không được cho một các trong này với người những để khi đã từ bạn về",
    "Indonesian": "yang dan di untuk dengan ini itu tidak dari pada adalah dalam akan ke saya anda atau bisa juga oleh",
}
_WORDS = {language: frozenset(words.split()) for language, words in _COMMON.items()}
_WORD = re.compile(r"[^\W\d_]+")
_SCRIPTS = {
    "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean", "CJK": "Chinese", "CYRILLIC": "Cyrillic script",
    "ARABIC": "Arabic script", "HEBREW": "Hebrew", "GREEK": "Greek", "DEVANAGARI": "Devanagari script", "THAI": "Thai",
    "BENGALI": "Bengali", "TAMIL": "Tamil", "LATIN": "Latin",
}  # fmt: skip
_LOOKED_AT = 2000
UNKNOWN = "other"


def language_of(text: str) -> str:
    """Returns the name of the language, or of the script; `UNKNOWN` for what has few words or is none of those.

    It looks at the first 2,000 characters.
    """
    text = text[:_LOOKED_AT]
    letters = [character for character in text if character.isalpha()]
    scripts = Counter(_SCRIPTS.get(unicodedata.name(letter, "").partition(" ")[0], UNKNOWN) for letter in letters)
    if not scripts:
        return UNKNOWN
    script, count = scripts.most_common(1)[0]
    if scripts["Japanese"] * 10 > len(letters):  # beside which Chinese characters stand
        return "Japanese"
    if script != "Latin" or count * 2 < len(letters):
        return script if script != "Latin" else UNKNOWN
    words = [word.casefold() for word in _WORD.findall(text)]
    hits = {language: sum(word in common for word in words) for language, common in _WORDS.items()}
    best, second = sorted(hits.values(), reverse=True)[:2]
    # Two languages that share what was found, or too little of it: a name, a number, code.
    if best < 2 or best == second or best * 12 < len(words):
        return UNKNOWN
    return max(hits, key=lambda language: hits[language])
