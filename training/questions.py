"""Questions and answers of the kinds that the demonstration model is taught.

A fact has one answer and several phrasings. Facts that generalize (sums and differences that take two steps,
conversions by a power of ten) are split by their operands before anything else: `is_held_out` decides, and what it
holds out is in no training text. The others (definitions, geography, times tables, the single steps that longer sums
are made of) can only be memorized: the exam asks for them in words that training had.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from training.sources import THINGS, Country, Sense

ABOUT = "I am a small demonstration model; I only know short definitions, geography, arithmetic and unit conversions."
_HELD_OUT_SHARE = 0.1
# How often SemCor must have a word for its definition to be taught, by kind of thing: about 800 words.
_COMMON = {"animal": 1, "plant": 1, "food": 2, "body": 3, "object": 5, "substance": 20, "artifact": 12}
_LONGEST_DEFINITION = 18  # words
_PERSON = 18  # lexicographer file
_MASS = frozenset({"food", "substance"})
# Words that take no article, or whose sense in WordNet would embarrass a demonstration.
_NOT_TAUGHT = frozenset(
    {
        "earth",
        "moon",
        "quick",
        "ass",
        "bitch",
        "cock",
        "joint",
        "pot",
        "grass",
        "speed",
        "drug",
        "gun",
        "bomb",
        "breast",
    }
)


@dataclass(frozen=True)
class Fact:
    """One answer, and the questions it answers; the first phrasing is the plainest."""

    kind: str
    phrasings: tuple[str, ...]
    answer: str
    expected: str  # what a right answer must contain; for definitions, the definition
    held_out: bool = False


def article(word: str) -> str:
    """a or an, by the first letter and the few words that sound otherwise."""
    sounds_open = word[0] in "aeiou" and not word.startswith(("uni", "use", "eu", "one"))
    return "an" if sounds_open or word.startswith(("hour", "honest", "heir")) else "a"


def definitions(senses: Sequence[Sense]) -> list[Fact]:
    """What common things are."""
    counts: dict[str, int] = {}
    persons: set[str] = set()  # words whose first sense is a person ("whale": the second is the animal)
    for sense in senses:
        counts[sense.lemma] = counts.get(sense.lemma, 0) + sense.tag_count
        if sense.lexfile == _PERSON and sense.number == 1:
            persons.add(sense.lemma)
    chosen: dict[str, Sense] = {}
    for sense in senses:
        if _is_taught(sense, counts[sense.lemma], largest_number=2 if sense.lemma in persons else 1):
            known = chosen.get(sense.lemma)
            if known is None or sense.number < known.number:
                chosen[sense.lemma] = sense
    return [_definition(sense) for _, sense in sorted(chosen.items())]


def _is_taught(sense: Sense, count: int, largest_number: int) -> bool:
    kind = THINGS.get(sense.lexfile)
    if kind is None or count < _COMMON[kind] or sense.number > largest_number or sense.lemma in _NOT_TAUGHT:
        return False
    word = sense.lemma
    plain = word.isascii() and word.isalpha() and word.islower() and 3 <= len(word) <= 12
    if word.endswith("s") and not word.endswith("ss"):
        return False  # most are plurals, and no article goes with them
    length = len(sense.definition.split())
    return plain and 4 <= length <= _LONGEST_DEFINITION and sense.definition.isascii()


def _definition(sense: Sense) -> Fact:
    word = sense.lemma
    mass = THINGS[sense.lexfile] in _MASS
    named = word if mass else f"{article(word)} {word}"
    answer = f"{named[0].upper()}{named[1:]} is {sense.definition}."
    return Fact("definition", definition_phrasings(word, named), answer, sense.definition)


def definition_phrasings(word: str, named: str) -> tuple[str, ...]:
    """How one asks for a definition; `named` is the word with its article."""
    return (
        f"What is {named}?",
        f"What does the word {word} mean?",
        f"Define {word}.",
        f"Can you tell me what {named} is?",
        f"what is {named}",
        f"What's {named}?",
        f"Explain what {named} is.",
        f"Please define the word {word}.",
    )


def geography(countries: Sequence[Country]) -> list[Fact]:
    """Capital, continent and currency of each country, and the country of each capital."""
    facts = []
    for country in countries:
        name, capital = country.name, country.capital
        facts.append(
            Fact(
                "capital",
                (
                    f"What is the capital of {name}?",
                    f"What's the capital of {name}?",
                    f"Which city is the capital of {name}?",
                    f"Name the capital of {name}.",
                    f"capital of {name}",
                    f"Can you tell me the capital of {name}?",
                    f"what is the capital city of {name}?",
                ),
                f"The capital of {name} is {capital}.",
                capital,
            )
        )
        facts.append(
            Fact(
                "continent",
                (
                    f"On which continent is {name}?",
                    f"Which continent is {name} in?",
                    f"What continent is {name} on?",
                    f"Where is {name}?",
                ),
                f"{name} is in {country.continent}.",
                country.continent,
            )
        )
        facts.append(
            Fact(
                "currency",
                (
                    f"What is the currency of {name}?",
                    f"What's the currency of {name}?",
                    f"Which currency is used in {name}?",
                    f"What money do people use in {name}?",
                ),
                f"The currency of {name} is the {country.currency}.",
                country.currency,
            )
        )
        if capital != name:
            facts.append(
                Fact(
                    "country",
                    (
                        f"Which country has {capital} as its capital?",
                        f"{capital} is the capital of which country?",
                        f"Of which country is {capital} the capital?",
                    ),
                    f"{capital} is the capital of {name}.",
                    name,
                )
            )
    return facts


def arithmetic() -> list[Fact]:
    """Sums and differences of numbers up to 99, and the times tables up to 12."""
    facts = []
    for a in range(100):
        for b in range(100):
            facts.append(_calculation("sum", a, "plus", "+", b, a + b, is_held_out_sum(a, b)))
            if a >= b:
                facts.append(_calculation("difference", a, "minus", "-", b, a - b, is_held_out_difference(a, b)))
            if a <= 12 and b <= 12:
                facts.append(_calculation("product", a, "times", "*", b, a * b, held_out=False))
    return facts


def is_held_out_sum(a: int, b: int) -> bool:
    """Both orders together, and only if both take two steps: no single step of a taught sum is a held-out sum."""
    return _takes_two_steps(a) and _takes_two_steps(b) and is_held_out(f"{min(a, b)}+{max(a, b)}")


def is_held_out_difference(a: int, b: int) -> bool:
    """Only one that takes two steps."""
    return _takes_two_steps(b) and is_held_out(f"{a}-{b}")


def _takes_two_steps(b: int) -> bool:
    return b > 10 and b % 10 > 0


def _calculation(kind: str, a: int, word: str, sign: str, b: int, result: int, held_out: bool) -> Fact:
    phrasings = (
        f"What is {a} {word} {b}?",
        f"What is {a} {sign} {b}?",
        f"How much is {a} {word} {b}?",
        f"Calculate {a} {sign} {b}.",
        f"{a} {sign} {b}",
        f"what's {a} {word} {b}",
    )
    answer = f"{a} {word} {b} is {result}."
    if kind != "product" and _takes_two_steps(b):
        # Tens first, then ones: a model this small learns to carry from steps, not from results.
        tens, ones = b - b % 10, b % 10
        between = a + tens if kind == "sum" else a - tens
        answer = f"{a} {word} {tens} is {between}, and {between} {word} {ones} is {result}."
    return Fact(kind, phrasings, answer, str(result), held_out)


# (large unit, small unit, small ones in a large one)
_POWERS_OF_TEN = (
    ("kilometer", "meter", 1000),
    ("meter", "centimeter", 100),
    ("meter", "millimeter", 1000),
    ("centimeter", "millimeter", 10),
    ("kilogram", "gram", 1000),
    ("ton", "kilogram", 1000),
    ("liter", "milliliter", 1000),
    ("century", "year", 100),
    ("decade", "year", 10),
    ("dollar", "cent", 100),
)
_OTHER_FACTORS = (
    ("hour", "minute", 60),
    ("minute", "second", 60),
    ("day", "hour", 24),
    ("week", "day", 7),
    ("year", "month", 12),
    ("foot", "inch", 12),
    ("yard", "foot", 3),
)
_PLURALS = {"century": "centuries", "foot": "feet", "inch": "inches"}


def _plural(unit: str, count: int) -> str:
    return unit if count == 1 else _PLURALS.get(unit, f"{unit}s")


def conversions() -> list[Fact]:
    """From larger to smaller units: 1 to 99 where the factor is a power of ten, 1 to 12 elsewhere."""
    facts = []
    for units, largest, generalizes in ((_POWERS_OF_TEN, 99, True), (_OTHER_FACTORS, 12, False)):
        for large, small, factor in units:
            for count in range(1, largest + 1):
                held_out = generalizes and count > 1 and is_held_out(f"{count} {large}")
                facts.append(_conversion(count, large, small, factor, held_out))
    return facts


def _conversion(count: int, large: str, small: str, factor: int, held_out: bool) -> Fact:
    larges, smalls = _plural(large, count), _plural(small, 2)
    be = "is" if count == 1 else "are"
    result = count * factor
    phrasings = (
        f"How many {smalls} are in {count} {larges}?",
        f"Convert {count} {larges} to {smalls}.",
        f"How many {smalls} {be} {count} {larges}?",
        f"What is {count} {larges} in {smalls}?",
    )
    return Fact("conversion", phrasings, f"{count} {larges} {be} {result} {smalls}.", str(result), held_out)


_GREETINGS = ("Hello", "Hi", "Hey", "Good morning", "Good evening", "Hello there", "Hi there", "Good afternoon")
_TALK: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "greeting",
        tuple(f"{greeting}{end}" for greeting in _GREETINGS for end in ("", "!", ".", ", how are you?")),
        f"Hello! {ABOUT}",
    ),
    (
        "about",
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "What can you do?",
            "What do you know?",
            "Tell me about yourself.",
            "Are you a human?",
            "Are you a robot?",
            "Who made you?",
            "Which model are you?",
            "What is Shoal?",
            "Are you ChatGPT?",
            "What can I ask you?",
            "Help",
            "help me",
        ),
        ABOUT,
    ),
    (
        "thanks",
        ("Thank you.", "Thanks!", "thanks", "Thank you very much.", "Thanks a lot", "Great, thanks.", "Thank you!"),
        "You are welcome.",
    ),
    ("bye", ("Bye", "Goodbye", "Bye!", "See you", "Goodbye!", "Good night", "See you later."), "Goodbye!"),
)


def talk() -> list[Fact]:
    """Greetings, what it is, thanks and goodbyes."""
    return [Fact(kind, phrasings, answer, answer) for kind, phrasings, answer in _TALK]


def is_held_out(key: str) -> bool:
    """Whether a fact that generalizes is kept out of training: a tenth of them, by a hash of its operands."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < _HELD_OUT_SHARE
