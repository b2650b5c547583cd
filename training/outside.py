"""Questions that the demonstration model is not taught to answer, and what it says instead."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from training.questions import ABOUT, Fact, article, definition_phrasings, definitions
from training.sources import Country, Sense

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
        question = draw.choice(definition_phrasings(word, f"{article(word)} {word}"))
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
