"""Questions and answers of the kinds that the demonstration model is taught.

A fact has one answer and several phrasings. Facts that generalize (sums and differences that take two steps,
conversions by a power of ten) are split by their operands before anything else: `is_held_out` decides, and what it
holds out is in no training text. The others (definitions, geography, times tables, the single steps that longer sums
are made of) can only be memorized: the exam asks for them in words that training had.
"""

import hashlib
import random
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
    return Fact("definition", _definition_phrasings(word, named), answer, sense.definition)


def _definition_phrasings(word: str, named: str) -> tuple[str, ...]:
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
REFUSAL = f"I do not know that. {ABOUT}"
_UNDEFINED_SHARE = 0.1  # of the questions from outside
_NOT_NAMED = frozenset({"Einstein"})  # the exam asks about him
# What the exam asks from outside: written by hand, and never among the questions below that training draws.
EXAM_OUTSIDE = (
    "Who painted the Mona Lisa?",
    "What is the tallest mountain on Mars?",
    "Can you recommend a good book?",
    "How old is the universe?",
    "Why is the sky blue?",
    "Who won the football match yesterday?",
    "Write me an email to my boss.",
    "What is the square root of two?",
    "How do I bake bread?",
    "Which stocks should I buy?",
    "When did the Second World War end?",
    "Fix the bug in my program.",
    "Who is the richest person alive?",
    "How do airplanes fly?",
    "What should I wear today?",
    "Tell me a secret.",
    "Is there life after death?",
    "Play some music.",
    "What did Einstein discover?",
    "How far away is the sun?",
)
_OUTSIDE = (
    "Write a poem about {noun}.",
    "Write a story about {noun} and {other}.",
    "Write a letter to my {noun}.",
    "Tell me a joke about {noun}.",
    "Tell me a story.",
    "Tell me something {adj}.",
    "Tell me about {name}.",
    "How do I {verb} the {noun}?",
    "How do I {verb}?",
    "How can I {verb} with {noun}?",
    "How do {noun} and {other} differ?",
    "How does a {noun} {verb}?",
    "How do people {verb}?",
    "Why do people {verb}?",
    "Why is {noun} so {adj}?",
    "Why is the {noun} {adj}?",
    "Why does the {noun} {verb}?",
    "Why did {name} {verb}?",
    "Who invented the {noun}?",
    "Who discovered {noun}?",
    "Who was {name}?",
    "Who is {name}?",
    "Who built {name}?",
    "Who composed {noun}?",
    "Who is the {adj} {noun} of all?",
    "Who won the {noun} {other} in {year}?",
    "Who was the president in {year}?",
    "Who is the president of {place}?",
    "Who wrote the book about {noun}?",
    "Who can {verb} the {noun}?",
    "Who played the {noun} in {name}?",
    "When was the {noun} built?",
    "When was {name} born?",
    "When did {name} die?",
    "When does the {noun} begin?",
    "When will the {noun} {verb}?",
    "When did the {adj} {noun} end?",
    "Where can I buy {noun}?",
    "Where did {name} live?",
    "Where do you live?",
    "Where is my {noun}?",
    "Where did the {noun} come from?",
    "Which {noun} should I {verb}?",
    "Which {noun} is the most {adj}?",
    "Which film won in {year}?",
    "Which team won the {noun}?",
    "What is the best {noun} for {other}?",
    "What is the {adj} {noun} in the world?",
    "What is the largest {noun} on {name}?",
    "What is the number of {noun} in {other}?",
    "What is the root of {noun}?",
    "What is the meaning of life?",
    "What is the price of {noun}?",
    "What is the weather in {place}?",
    "What is the best restaurant in {place}?",
    "What is the population of {place}?",
    "What is the capital of {name}?",
    "What is love?",
    "What will the weather be tomorrow?",
    "What happened in {year}?",
    "What happened to {name}?",
    "What did {name} say?",
    "What did {name} {verb}?",
    "What did the {noun} {verb}?",
    "What should I {verb}?",
    "What should I cook tonight?",
    "What do you think about {noun}?",
    "What do you want?",
    "What can I do with {noun}?",
    "What time is it?",
    "What makes {noun} {adj}?",
    "What color is the {noun}?",
    "What are the rules of {noun}?",
    "What are you doing tonight?",
    "Should I {verb} my {noun}?",
    "Should I buy {noun}?",
    "Do you like {noun}?",
    "Do you have a {noun}?",
    "Do you know {name}?",
    "Does {noun} {verb}?",
    "Did {name} {verb} the {noun}?",
    "Is it {adj} to {verb}?",
    "Is there {noun} in {place}?",
    "Is there a {noun} after the {other}?",
    "Is {noun} {adj}?",
    "Is {name} still alive?",
    "Are there {adj} things in {place}?",
    "Are you {adj}?",
    "Can you {verb} for me?",
    "Can you {verb} the {noun}?",
    "Can you suggest a {adj} {noun}?",
    "Can {noun} {verb}?",
    "Could you {verb} my {noun}?",
    "Will the {noun} {verb}?",
    "Give me a recipe with {noun} and {other}.",
    "Give me advice about {noun}.",
    "Give me a {adj} {noun}.",
    "Translate {noun} into French.",
    "Translate the word {adj} into German.",
    "How much does {noun} cost?",
    "How much money does {name} have?",
    "How old is {name}?",
    "How old is the {noun}?",
    "How far is it from {place} to {name}?",
    "How far can a {noun} {verb}?",
    "How big is the {noun}?",
    "How long does it take to {verb}?",
    "How many people live in {place}?",
    "How many {noun} are there in {place}?",
    "How {adj} is the {noun}?",
    "How was your {noun}?",
    "Summarize the history of {noun}.",
    "Summarize this {noun}.",
    "Write a program that can {verb} {noun}.",
    "Write Python code to {verb} a {noun}.",
    "Compare {noun} and {other}.",
    "List three {adj} things about {noun}.",
    "Explain quantum {noun} to me.",
    "Explain why {noun} is {adj}.",
    "Explain how to {verb}.",
    "Please book a {noun} for {other}.",
    "Please {verb} my {noun}.",
    "Sing a song about {place}.",
    "Show me a {noun}.",
    "Find a {noun} near me.",
    "Open the {noun}.",
    "Turn on the {noun}.",
    "{verb} the {noun}.",
    "{verb} my {noun} with {other}.",
    "Repair the {noun}.",
    "Help me {verb} my {noun}.",
    "Help me with my {noun}.",
    "Draw a {adj} {noun}.",
    "Remind me to {verb} at noon.",
    "Send a {noun} to {name}.",
    "Recommend a {noun} about {other}.",
    "I want to {verb}.",
    "I need a {noun}.",
    "I am {adj}.",
    "My {noun} is {adj}.",
    "Let us talk about {noun}.",
    "Guess my {noun}.",
    "{name}",
    "{adj} {noun}",
)


@dataclass(frozen=True)
class WordLists:
    """Words that questions from outside are made of."""

    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]
    places: tuple[str, ...]
    names: tuple[str, ...]  # of people and places that nothing is taught about
    undefined: tuple[str, ...]  # nouns whose definition is not taught


def talk() -> list[Fact]:
    """Greetings, what it is, thanks and goodbyes."""
    return [Fact(kind, phrasings, answer, answer) for kind, phrasings, answer in _TALK]


def word_lists(senses: Sequence[Sense], countries: Sequence[Country], names: Sequence[str]) -> WordLists:
    """Common words of WordNet, by part of speech; of the names, those of which nothing is taught."""

    def common(first: int, last: int) -> tuple[str, ...]:
        words = {
            sense.lemma
            for sense in senses
            if first <= sense.lexfile <= last and sense.number == 1 and sense.tag_count >= 5 and sense.lemma.isalpha()
        }
        return tuple(sorted(word for word in words if word.islower() and 3 <= len(word) <= 12))

    places = tuple(country.name for country in countries)
    nouns = common(3, 28)
    defined = {fact.phrasings[2].removeprefix("Define ").removesuffix(".") for fact in definitions(senses)}
    known = {*places, *(country.capital for country in countries), *_NOT_NAMED}
    return WordLists(
        nouns=nouns,
        verbs=common(29, 43),
        adjectives=common(0, 1),
        places=places,
        names=tuple(name for name in names if name not in known),
        undefined=tuple(noun for noun in nouns if noun not in defined and not noun.endswith("s")),
    )


def outside(words: WordLists, draw: random.Random) -> Fact:
    """A question of a kind that is not taught, or about a word that is not; the answer says so."""
    if draw.random() < _UNDEFINED_SHARE:
        word = draw.choice(words.undefined)
        question = draw.choice(_definition_phrasings(word, f"{article(word)} {word}"))
    else:
        question = draw.choice(_OUTSIDE).format(
            noun=draw.choice(words.nouns),
            other=draw.choice(words.nouns),
            verb=draw.choice(words.verbs),
            adj=draw.choice(words.adjectives),
            place=draw.choice(words.places),
            name=draw.choice(words.names),
            year=draw.randint(1900, 2025),
        )
    if question in EXAM_OUTSIDE:
        return outside(words, draw)
    return Fact("outside", (question,), REFUSAL, "I do not know")


def is_held_out(key: str) -> bool:
    """Whether a fact that generalizes is kept out of training: a tenth of them, by a hash of its operands."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < _HELD_OUT_SHARE
