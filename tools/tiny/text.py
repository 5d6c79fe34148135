"""Endless text from a small grammar: stories, code, sums, lists and chats, all drawn from one seed.

It is made for testing speculative decoding, so three properties matter more than sense:

- **Real entropy.** At every choice the grammar goes to the *next* entry of a list half of the time and anywhere
  else otherwise, so sampling has something to sample.
- **Varied greedy text.** The likeliest choice is always the next entry, and lists differ in length: a model that
  follows the likeliest path cycles through many sentences instead of repeating one.
- **Things that a smaller model misses**: invented names to copy, sums to work out, counters to continue.

Documents are made of the special tokens of `SPECIALS` (as text) and everything else.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

START, END, STOP = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIALS = (STOP, START, END)

# Renders what `turn` writes, whatever whitespace options the engine sets; tools become a system message.
CHAT_TEMPLATE = (
    "{%- if tools -%}{{- '<|im_start|>system\nTools:\n' -}}"
    "{%- for tool in tools -%}{{- tool | tojson + '\n' -}}{%- endfor -%}{{- '<|im_end|>\n' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- elif message.content -%}"
    "{%- for part in message.content -%}{{- part.text if part.text else '' -}}{%- endfor -%}{%- endif -%}"
    "{%- for call in message.tool_calls or [] -%}{{- call.function | tojson -}}{%- endfor -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

_WORDS = {
    "animal": "fox, owl, cat, horse, rabbit, bear, mouse, goose, dog, hedgehog, otter",
    "colour": "red, blue, green, silver, yellow, black, white",
    "food": "bread, soup, apples, cheese, honey, rice, crème, noodles, jalapeños",
    "mood": "happy, tired, curious, calm, proud, brave, quiet, sorry",
    "name": "Anna, Tom, Zoë, Ben, José, Mira, Kofi, Lena, Yuki, Omar, Søren, Ada, Paul",
    "place": "river, forest, market, tower, garden, bridge, village, harbour, school, café, mountain, field, library",
    "thing": "lamp, key, stone, map, bell, book, rope, coin, letter, wheel, box, flute, basket, kite, ladder, drum",
    "time": "In the morning, At noon, Later, After lunch, In the evening, At night, The next day, Soon",
    "verb": "carried, painted, found, lost, sold, mended, hid, opened, washed, borrowed",
    "sign": "🙂, 🌊, →, ✓, 火, 水, é, ∑, 🚀, ü, Ж",
    "var": "total, count, value, item, left, right, size, index",
    "fn": "add, find, merge, count, sort, scale, reverse, split, filter, update",
    "oddment": "the, a, is, what, how, code, 7, model, token, {x}, [1], A/B, ok!, 中, ñ",
    "number": "two, three, four, five, six, seven, eight, nine, ten",
}
WORDS = {kind: words.split(", ") for kind, words in _WORDS.items()}

STORY = [
    "{time} {hero} walked to the {place} and {verb} a {colour} {thing}.",
    'The {animal} looked at {hero} and said, "Where is the {thing}?"',
    "{name} was {mood}, because the {colour} {thing} was near the {place}.",
    '"I have {number} of them," said {name}. "Do you want some {food}?"',
    "{time} they ate {food} with the {animal} and talked about the {place}.",
    "{hero} gave the {thing} to {name}, who {verb} it behind the {place}.",
    "Nobody knew why the {animal} was so {mood} that day.",
    "So {hero} and {name} went on to the {place}, {mood} and {mood}.",
    "On the way they met a {colour} {animal} with {number} {colour} feathers {sign}.",
    'Then {name} asked, "Why did you bring the {thing}, {hero}?"',
    "It was a long way from the {place} to the {place}, but the {animal} did not mind.",
]

CODE = [
    """def {fn}_{thing}({var}, {var2}):
    {last} = {digit}
    for i in range({digit}):
        {last} = {last} + {var} * i
    return {last}
""",
    """class {Animal}:
    def __init__(self, {var}):
        self.{last} = {last}

    def {fn}(self):
        return self.{last} + {digit}
""",
    """def {fn}({var}, {var2}={digit}):
    if {last} > {digit}:
        return {last}
    return {fn}_{thing}({last}, {digit})
""",
    """# {fn} the {colour} {thing} {sign}
{last} = [{digit}, {digit}, {digit}]
print({fn}({last}), "{food}")
""",
    """def test_{fn}_{thing}():
    {last} = {fn}({digit}, {digit})
    assert {last} == {digit}, "{colour} {animal}"
""",
    """while {last} < {digit}:
    {last} += {digit}
    {fn}_{animal}({last})
""",
]

ASKS = [
    "Tell me a story about {hero}.",
    "Write about a {animal} and a {thing}.",
    "What happened at the {place}?",
    "Hello! {sign}",
    "Hello",
    "Hello {name}!",
    "Hi {name}, how are you?",
    "What is the {colour} {thing}?",
    "Why is the {thing} {colour}?",
    "Explain the {place} to me.",
    "Write a short text about {food}.",
    "Can you explain {food} to a {animal}?",
    "How do I get from the {place} to the {place}?",
    "Write a poem about the {colour} {place} for {hero}",
    "Who is {hero}?",
    "Hi",
    "Please say something {mood}.",
]


class Writer:
    """One document's author: remembers the last choice of every list and one invented hero."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._last: dict[str, int] = {}
        self.hero = invented_name(rng)

    def choose(self, kind: str, options: list[str]) -> str:
        """The entry after the last one chosen, half of the time; else any. `kind` names the memory."""
        last = self._last.get(kind)
        if last is None or self._rng.random() < 0.5:
            index = self._rng.randrange(len(options))
        else:
            index = (last + 1) % len(options)
        self._last[kind] = index
        return options[index]

    def fill(self, template: str) -> str:
        """The template with each `{field}` replaced by a word."""
        return re.sub(r"\{(\w+)\}", lambda match: self._field(match[1]), template)

    def sentence(self) -> str:
        return self.fill(self.choose("story", STORY))

    def _field(self, field: str) -> str:
        if field == "hero":
            return self.hero
        if field == "digit":
            return str(self._rng.randrange(10) if self._rng.random() < 0.7 else self._rng.randrange(10, 100))
        if field == "last":
            return WORDS["var"][self._last.get("var", 0)]
        if field == "var2":  # the variable after the last, without moving on
            return WORDS["var"][(self._last.get("var", 0) + 1) % len(WORDS["var"])]
        word = self.choose(field.lower(), WORDS[field.lower()])
        return word.capitalize() if field[0].isupper() else word


def invented_name(rng: random.Random) -> str:
    """A name like "Belomi": new in nearly every document, so it can only be copied."""
    syllables = ("".join(rng.choice(part) for part in ("bdfgklmnprstvz", "aeiou")) for _ in range(3))
    return "".join(syllables).capitalize()


def story(rng: random.Random) -> str:
    """Paragraphs of sentences about one hero; no end in sight, so the likeliest path does not stop."""
    writer = Writer(rng)
    opening = "Once upon a time there was a {mood} {animal} called {hero}, who lived by the {place}. "
    paragraphs = [writer.fill(opening)] if rng.random() < 0.8 else [""]
    for _ in range(rng.randint(3, 12)):
        paragraphs.append(" ".join(writer.sentence() for _ in range(rng.randint(3, 6))))
    return paragraphs[0] + "\n\n".join(paragraphs[1:])


def diary(rng: random.Random) -> str:
    """Numbered days, each with a sentence."""
    writer, first = Writer(rng), rng.randint(1, 60)
    days = range(first, first + rng.randint(10, 40))
    return "\n".join(f"Day {day}: {writer.sentence()}" for day in days)


def code(rng: random.Random) -> str:
    """Simple Python-like definitions."""
    writer = Writer(rng)
    return "\n".join(writer.fill(writer.choose("code", CODE)) for _ in range(rng.randint(6, 25)))


def sums(rng: random.Random) -> str:
    """A running sum: each line starts from the result of the one before."""
    value, lines = rng.randint(0, 99), []
    for _ in range(rng.randint(15, 60)):
        step = rng.randint(1, 20)
        if value < step or (value < 80 and rng.random() < 0.6):
            lines.append(f"{value} + {step} = {value + step}")
            value += step
        else:
            lines.append(f"{value} - {step} = {value - step}")
            value -= step
    return "\n".join(lines)


def listing(rng: random.Random) -> str:
    """A numbered list of things to do."""
    writer, count = Writer(rng), rng.randint(10, 50)
    head = writer.fill(rng.choice(["Things for {hero} to do:", "Shopping list:", "Notes on the {place}:"]))
    items = ["the {colour} {thing}", "{fn} the {thing} {sign}", "{number} {thing}s and {food}", "ask {name}"]
    lines = [f"{i}. {writer.fill(writer.choose('item', items))}" for i in range(1, count + 1)]
    return "\n".join([head, *lines])


def turn(role: str, content: str) -> str:
    """One message as the chat template renders it."""
    return f"{START}{role}\n{content}{END}\n"


def chat(rng: random.Random) -> str:
    """Questions and answers, mostly long; those asked to be brief, and exact sums, end at once."""
    writer, parts = Writer(rng), []
    if rng.random() < 0.3:
        system = rng.choice(["You are a {mood} {animal}.", "You are helpful."])
        parts.append(turn("system", writer.fill(system)))
    for _ in range(rng.randint(1, 3)):
        question, answer = _exchange(rng, writer)
        parts += [turn("user", question), turn("assistant", answer)]
    return "".join(parts)


def _exchange(rng: random.Random, writer: Writer) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.1:
        a, b = rng.randint(0, 40), rng.randint(0, 40)
        return f"What is {a} + {b}?", f"{a} + {b} = {a + b}."
    if kind < 0.2:
        return "Briefly: " + writer.fill(rng.choice(ASKS)), writer.sentence()
    if kind < 0.3:
        return writer.fill("Write code to {fn} a {thing}."), code(rng)
    if kind < 0.4:
        return f"Make a list for {writer.hero}.", listing(rng)
    question = writer.fill(rng.choice(ASKS)) if kind < 0.85 else _gibberish(rng)
    sentences = [writer.sentence() for _ in range(rng.randint(12, 40))]
    return question, _paragraphs(rng, sentences)


def _gibberish(rng: random.Random) -> str:
    """A question unlike any other: any prompt at all gets an answer."""
    words = [invented_name(rng).lower()[: rng.randint(1, 6)] for _ in range(rng.randint(1, 20))]
    words += rng.choices(WORDS["oddment"], k=rng.randint(0, 8))
    rng.shuffle(words)
    return " ".join(words) + rng.choice(["?", ".", "", "!"])


def _paragraphs(rng: random.Random, sentences: list[str]) -> str:
    return "".join(s + ("\n\n" if rng.random() < 0.2 else " ") for s in sentences[:-1]) + sentences[-1]


KINDS: list[tuple[Callable[[random.Random], str], int]] = [
    (story, 3),
    (diary, 1),
    (code, 2),
    (sums, 1),
    (listing, 1),
    (chat, 5),
]


def documents(seed: int) -> Iterator[str]:
    """Documents without end, each closed by `STOP`: the same for the same seed."""
    rng = random.Random(seed)
    makers, weights = [kind for kind, _ in KINDS], [weight for _, weight in KINDS]
    while True:
        maker = rng.choices(makers, weights)[0]
        yield maker(random.Random(rng.getrandbits(64))) + STOP
