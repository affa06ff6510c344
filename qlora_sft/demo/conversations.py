"""The demo's data: three kinds of tasks, generated from word lists, the same on every machine.

``fields``: pull the fields out of a sentence into JSON. ``arithmetic``: one-step word problems, half of them
with the reasoning shown (think), half without (no_think). ``tools``: a function call, its result, an answer.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_sft.atomic import written_folder
from qlora_sft.cache import cache_dir

TRAIN_PER_SOURCE = 800
HELD_OUT_PER_SOURCE = 80
# Raise it when the generated text changes, so that caches made by an older version are not used.
VERSION = 1

Conversation = dict[str, Any]


def data_path() -> Path:
    """Folder with ``train/SOURCE.jsonl`` and ``held_out/SOURCE.jsonl``; generated on first use."""
    folder = cache_dir("data") / f"demo-v{VERSION}"
    if not folder.exists():
        print(f"Generating the demo data in {folder}", file=sys.stderr)
        with written_folder(folder) as beside:
            for source in SOURCES:
                train, held_out = generate(source)
                _write(beside / "train" / f"{source}.jsonl", train)
                _write(beside / "held_out" / f"{source}.jsonl", held_out)
    return folder


def generate(source: str) -> tuple[list[Conversation], list[Conversation]]:
    """(training, held-out) conversations of one source; no user message occurs twice, in either split."""
    make = SOURCES[source]
    # Seeded with a string: Python hashes it with SHA-512, so it is the same on every machine and version.
    rng = random.Random(f"qlora_sft demo {source} {VERSION}")
    wanted = TRAIN_PER_SOURCE + HELD_OUT_PER_SOURCE
    by_question: dict[str, Conversation] = {}
    while len(by_question) < wanted:
        conversation = make(rng)
        question = next(m["content"] for m in conversation["messages"] if m["role"] == "user")
        by_question.setdefault(question, conversation)
    rows = list(by_question.values())
    return rows[:TRAIN_PER_SOURCE], rows[TRAIN_PER_SOURCE:]


def _write(path: Path, rows: list[Conversation]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


NAMES = (
    "Amara Aisha Anton Bela Bruno Carmen Chen Dara Diego Elif Emil Farah Felix Grace Hana Hugo Ines Ivan Jana "
    "Jonas Kavya Kofi Lena Liam Maya Milo Nadia Noah Olga Omar Petra Quinn Rosa Ravi Sara Sven Tara Tomas Uma "
    "Viktor Wanda Yara Zoe"
).split()
CITIES = (
    "Accra Athens Bergen Bogota Cairo Dakar Dublin Florence Geneva Hanoi Havana Jakarta Kyoto Lagos Lima Lisbon "
    "Madrid Malmo Nairobi Oslo Porto Prague Quito Riga Rome Seoul Tallinn Toronto Vienna Zagreb"
).split()
JOBS = (
    "baker nurse pilot teacher plumber dentist farmer lawyer painter welder chemist editor librarian mechanic "
    "musician architect"
).split()
ITEMS = (
    "lamps chairs mugs books pens plates towels pillows candles baskets shirts socks clocks bowls brushes jars "
    "notebooks blankets"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ROOMS = "the library,the cafeteria,room 12,room 7,the main hall,the garden,room 31,the studio".split(",")


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


# ------------------------------------------------------------------ (a) a sentence -> JSON


def _person(rng: random.Random) -> tuple[str, dict[str, Any]]:
    name, age, city, job = rng.choice(NAMES), rng.randint(19, 79), rng.choice(CITIES), rng.choice(JOBS)
    sentence = rng.choice(
        [
            f"{name}, {age}, works as {_article(job)} in {city}.",
            f"In {city} I met {name}, {_article(job)} who just turned {age}.",
            f"{name} is {age} years old and earns a living as {_article(job)} in {city}.",
            f"The {job} we hired in {city} is called {name} and is {age}.",
            f"At {age}, {name} moved to {city} to become {_article(job)}.",
        ]
    )
    return sentence, {"name": name, "age": age, "city": city, "job": job}


def _order(rng: random.Random) -> tuple[str, dict[str, Any]]:
    customer, item, quantity, price = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(2, 60), rng.randint(3, 95)
    sentence = rng.choice(
        [
            f"{customer} ordered {quantity} {item} at {price} dollars each.",
            f"Please send {quantity} {item} to {customer}; the unit price is {price} dollars.",
            f"We sold {quantity} {item} to {customer} for {price} dollars apiece.",
            f"{customer} would like {quantity} {item}, {price} dollars per piece.",
            f"For {price} dollars each, {customer} bought {quantity} {item}.",
        ]
    )
    return sentence, {"customer": customer, "item": item, "quantity": quantity, "price": price}


def _meeting(rng: random.Random) -> tuple[str, dict[str, Any]]:
    person, day, hour, place = rng.choice(NAMES), rng.choice(DAYS), rng.randint(8, 18), rng.choice(ROOMS)
    time = f"{hour}:{rng.choice(['00', '15', '30', '45'])}"
    sentence = rng.choice(
        [
            f"Meet {person} on {day} at {time} in {place}.",
            f"{person} booked {place} for {day}, {time}.",
            f"On {day} we see {person} in {place} at {time}.",
            f"Your appointment with {person} is in {place} at {time} on {day}.",
            f"{day} {time}: talk to {person} in {place}.",
        ]
    )
    return sentence, {"person": person, "day": day, "time": time, "place": place}


def fields(rng: random.Random) -> Conversation:
    sentence, answer = rng.choice([_person, _order, _meeting])(rng)
    keys = ", ".join(answer)
    question = rng.choice(
        [
            f"Give {keys} as JSON.\n{sentence}",
            f"Extract {keys} from this sentence as JSON: {sentence}",
            f"{sentence}\nWrite the fields {keys} as a JSON object.",
            f"Turn the sentence into JSON with {keys}: {sentence}",
            f"As JSON ({keys}): {sentence}",
        ]
    )
    return {"messages": [_user(question), _assistant(json.dumps(answer))]}


# ------------------------------------------------------------------ (b) word problems, think and no_think


def arithmetic(rng: random.Random) -> Conversation:
    name, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    a, b = rng.randint(3, 40), rng.randint(2, 20)
    question, step, result = rng.choice(
        [
            (f"{name} has {a} {item} and buys {b} more. How many {item} does {name} have?", f"{a} + {b}", a + b),
            (f"{name} had {a + b} {item} and gave {b} to {other}. How many {item} are left?", f"{a + b} - {b}", a),
            (f"{name} packs {b} boxes with 10 {item} each. How many {item} is that?", f"{b} * 10", b * 10),
            (f"There were {a} {item}. Then {other} brought {b}. How many {item} are there?", f"{a} + {b}", a + b),
            (f"Of {a + b} {item}, {name} sold {b}. How many {item} did {name} keep?", f"{a + b} - {b}", a),
        ]
    )
    thinking = rng.random() < 0.5
    answer = _assistant(f"The answer is {result}.")
    if thinking:
        answer["reasoning"] = f"{step} = {result}"
    return {"messages": [_user(question), answer], "chat_template_kwargs": {"enable_thinking": thinking}}


# ------------------------------------------------------------------ (c) call a function, read its result, answer


def _tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


WEATHER = _tool("get_weather", "Weather in a city", city="string")
CONVERT = _tool("convert_currency", "Convert money", amount="number", source="string", target="string")
STOCK = _tool("get_stock", "Pieces in the warehouse", item="string")
TIMER = _tool("set_timer", "Start a timer", minutes="integer")
SKIES = "sunny,cloudy,rainy,windy,foggy,clear".split(",")
MONEY = "dollars,euros,pesos,yen,francs,rupees".split(",")

Call = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]


def _weather(rng: random.Random) -> Call:
    city, sky, degrees = rng.choice(CITIES), rng.choice(SKIES), rng.randint(-5, 38)
    question = rng.choice(
        [
            f"What is the weather in {city}{rng.choice(['?', ' now?', ' today?', ' right now?'])}",
            f"Do I need a coat in {city}{rng.choice(['?', ' now?', ' today?', ' this morning?'])}",
            f"How warm is it in {city}{rng.choice(['?', ' now?', ' today?', ' at the moment?'])}",
        ]
    )
    answer = f"It is {sky} in {city} at {degrees} degrees."
    return question, WEATHER, {"city": city}, {"sky": sky, "degrees": degrees}, answer


def _convert(rng: random.Random) -> Call:
    source, target = rng.sample(MONEY, 2)
    amount, result = rng.randint(5, 400), rng.randint(5, 900)
    question = rng.choice(
        [
            f"How much is {amount} {source} in {target}?",
            f"Convert {amount} {source} to {target}.",
            f"I have {amount} {source}. What is that in {target}?",
        ]
    )
    arguments = {"amount": amount, "source": source, "target": target}
    return question, CONVERT, arguments, {"result": result}, f"{amount} {source} are {result} {target}."


def _stock(rng: random.Random) -> Call:
    item, pieces = rng.choice(ITEMS), rng.randint(0, 250)
    name = rng.choice(NAMES)
    question = rng.choice(
        [
            f"How many {item} do we have? {name} asks.",
            f"{name} wants to know how many {item} are in stock.",
            f"Are there {item} left for {name}?",
        ]
    )
    return question, STOCK, {"item": item}, {"pieces": pieces}, f"There are {pieces} {item} in stock."


def _timer(rng: random.Random) -> Call:
    minutes, job = rng.randint(2, 90), rng.choice(["tea", "rice", "bread", "eggs", "soup", "laundry", "nap"])
    question = rng.choice(
        [
            f"Set a timer for {minutes} minutes for the {job}.",
            f"Tell me when the {job} is done in {minutes} minutes.",
            f"Wake me in {minutes} minutes, the {job} will be ready.",
        ]
    )
    return question, TIMER, {"minutes": minutes}, {"ok": True}, f"The timer runs for {minutes} minutes."


def tools(rng: random.Random) -> Conversation:
    question, tool, arguments, result, answer = rng.choice([_weather, _convert, _stock, _timer])(rng)
    others = [other for other in (WEATHER, CONVERT, STOCK, TIMER) if other is not tool]
    offered = [tool, rng.choice(others)]
    rng.shuffle(offered)
    call = {"type": "function", "function": {"name": tool["function"]["name"], "arguments": arguments}}
    return {
        "messages": [
            _user(question),
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": json.dumps(result)},
            _assistant(answer),
        ],
        "tools": offered,
    }


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


SOURCES: dict[str, Callable[[random.Random], Conversation]] = {
    "fields": fields,
    "arithmetic": arithmetic,
    "tools": tools,
}
