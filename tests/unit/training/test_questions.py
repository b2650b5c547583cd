"""What the demonstration model is asked and taught: the split holds, and the exam judges by the data."""

import random
import re

import numpy as np
import pytest

from tests.demo_judge import Question, is_readable, is_right, overlap, read_exam
from training.ngram import trigram_loss, unigram_loss
from training.outside import EXAM_OUTSIDE, REFUSAL, WordLists, outside, word_lists
from training.questions import (
    arithmetic,
    article,
    conversions,
    definitions,
    geography,
    is_held_out_difference,
    is_held_out_sum,
    talk,
)
from training.sources import Country, Sense, _split_gloss, read_countries, read_names


def sense(lemma: str, lexfile: int, number: int, definition: str, tag_count: int = 50) -> Sense:
    return Sense(lemma, lexfile, number, tag_count, definition, ())


def operands(fact):
    return tuple(int(word) for word in fact.phrasings[0].removesuffix("?").split() if word.isdigit())


def steps(fact):
    """The single calculations of an answer: [(a, word, b, result)]."""
    return [(int(a), word, int(b), int(c)) for a, word, b, c in re.findall(r"(\d+) (\w+) (\d+) is (\d+)", fact.answer)]


def test_a_tenth_of_the_sums_that_take_two_steps_is_held_out_and_both_orders_of_one_together():
    sums = {operands(fact): fact for fact in arithmetic() if fact.kind == "sum"}
    two_steps = {pair for pair in sums if min(pair) > 10 and pair[0] % 10 and pair[1] % 10}
    assert len(sums) == 10_000
    assert 0.07 < sum(sums[pair].held_out for pair in two_steps) / len(two_steps) < 0.13
    assert not any(fact.held_out for pair, fact in sums.items() if pair not in two_steps)
    assert all(sums[b, a].held_out == fact.held_out for (a, b), fact in sums.items())


def test_every_step_of_an_answer_is_right_and_leads_to_the_result():
    for fact in arithmetic():
        a, b = operands(fact)
        found = steps(fact)
        assert found[0][0] == a
        assert sum(step[2] for step in found) == b
        for left, word, right, result in found:
            assert result == {"plus": left + right, "minus": left - right, "times": left * right}[word] >= 0
        assert [step[3] for step in found[:-1]] == [step[0] for step in found[1:]]
        assert fact.answer.endswith(f" is {fact.expected}.")


def test_no_step_of_a_taught_answer_is_a_held_out_question():
    facts = arithmetic()
    held_out = {(fact.kind, *operands(fact)) for fact in facts if fact.held_out}
    kinds = {"plus": "sum", "minus": "difference", "times": "product"}
    taught = {(kinds[word], a, b) for fact in facts if not fact.held_out for a, word, b, _ in steps(fact)}
    assert {kind for kind, *_ in held_out} == {"sum", "difference"}
    assert not held_out & taught


def test_conversions_are_held_out_too_and_right():
    facts = conversions()
    assert any(fact.held_out for fact in facts)
    assert "5 kilometers are 5000 meters." in {fact.answer for fact in facts}
    assert "1 foot is 12 inches." in {fact.answer for fact in facts}


def test_common_things_are_defined_by_their_first_sense_and_animals_that_are_first_a_person_by_their_second():
    senses = [
        sense("whale", 18, 1, "a very large person"),
        sense("whale", 5, 2, "a very large mammal of the sea"),
        sense("axe", 6, 1, "an edge tool with a heavy head"),
        sense("axe", 6, 2, "some other tool that nobody means"),
        sense("bread", 13, 1, "food made from dough and baked"),
        sense("rarity", 6, 1, "a thing that hardly anyone names", tag_count=0),
    ]
    facts = {fact.phrasings[0]: fact.answer for fact in definitions(senses)}
    assert facts == {
        "What is a whale?": "A whale is a very large mammal of the sea.",
        "What is an axe?": "An axe is an edge tool with a heavy head.",
        "What is bread?": "Bread is food made from dough and baked.",
    }


@pytest.mark.parametrize(
    ("word", "expected"),
    [("whale", "a"), ("apple", "an"), ("hour", "an"), ("uniform", "a"), ("umbrella", "an"), ("house", "a")],
)
def test_the_article_goes_by_the_sound(word, expected):
    assert article(word) == expected


def test_a_capital_named_like_its_country_is_not_asked_backwards():
    facts = geography([Country("Panama", "Panama", "North America", "balboa")])
    assert [fact.kind for fact in facts] == ["capital", "continent", "currency"]
    assert all(len(set(fact.phrasings)) == len(fact.phrasings) >= 3 for fact in facts)


def test_the_countries_are_independent_ones_with_all_that_is_asked():
    countries = read_countries()
    assert 150 < len(countries) < 200
    assert Country("France", "Paris", "Europe", "euro") in countries
    assert all(country.capital and country.continent and country.currency for country in countries)
    assert not {"Hong Kong", "Taiwan", "Israel"} & {country.name for country in countries}


def test_a_gloss_gives_its_first_definition_without_remarks_and_its_examples():
    definition, examples = _split_gloss('(zoology) a large beast (of the sea); a fish; "the beast swam", "it ate"')
    assert definition == "a large beast"
    assert examples == ("the beast swam", "it ate")


def test_names_are_proper_and_the_words_of_outside_are_not_taught(tmp_path):
    (tmp_path / "data.noun").write_text(
        "  1 the licence\n"
        "09585434 18 n 02 Mozart 0 Wolfgang_Mozart 0 001 @ 00000000 n 0000 | composer\n"
        "09585435 18 n 01 composer 0 000 | one who composes\n"
        "09585436 15 n 0b Rome 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 Eternal_City 0 000 | a city\n"
        "09585437 05 n 01 Rex 0 000 | a dog\n"
    )
    names = read_names(tmp_path)
    assert names == ["Eternal City", "Mozart", "Rome", "Wolfgang Mozart"]
    senses = [sense("whale", 5, 1, "a very large mammal of the sea"), sense("quiver", 7, 1, "an act of vibration")]
    words = word_lists(senses, [Country("Italy", "Rome", "Europe", "euro")], [*names, "Einstein"])
    assert words.names == ("Eternal City", "Mozart", "Wolfgang Mozart")
    assert words.undefined == ("quiver",)


def test_questions_from_outside_are_refused_with_words_that_say_what_it_knows():
    words = WordLists(("stone", "tree"), ("sing",), ("old",), ("Peru",), ("Mozart",), ("quiver",))
    asked = {outside(words, random.Random(seed)).phrasings[0] for seed in range(200)}
    assert len(asked) > 30
    assert {outside(words, random.Random(seed)).answer for seed in range(20)} == {REFUSAL}
    taught = {text for fact in talk() for text in fact.phrasings}
    assert not asked & taught


def test_what_the_exam_asks_from_outside_is_never_drawn_though_a_template_would_make_it():
    words = WordLists(("universe",), ("fly",), ("blue",), ("Peru",), ("Mozart",), ("quiver",))
    asked = {outside(words, random.Random(seed)).phrasings[0] for seed in range(3000)}
    assert "How old is Mozart?" in asked
    assert "How old is the universe?" in EXAM_OUTSIDE
    assert not asked & set(EXAM_OUTSIDE)


def test_the_exam_has_200_different_questions_and_the_generalizing_ones_are_held_out():
    exam = read_exam()
    assert len({question.question for question in exam.taught}) == len(exam.taught) == 200
    assert {question.question for question in exam.outside} == set(EXAM_OUTSIDE)
    assert len(exam.outside) == len(EXAM_OUTSIDE) == 20
    assert "What is a whale?" in {question.question for question in exam.taught}
    for question in exam.taught:
        if question.kind in ("sum", "difference"):
            a, b = [int(word) for word in question.question.replace("?", "").replace(".", "").split() if word.isdigit()]
            held_out = is_held_out_sum if question.kind == "sum" else is_held_out_difference
            assert held_out(a, b), question


WHALE = Question("definition", "What is a whale?", "a very large mammal of the sea")
SUM = Question("sum", "What is 2 plus 3?", "5")
CAPITAL = Question("capital", "What is the capital of Guinea?", "Conakry")


@pytest.mark.parametrize(
    ("question", "answer", "right"),
    [
        (WHALE, "A whale is a very large mammal of the sea.", True),
        (WHALE, "A whale is a large mammal of the sea.", True),
        (WHALE, "A whale is a small fish.", False),
        (WHALE, "A whale is a very large mammal of the sea", False),  # not a sentence
        (SUM, "2 plus 3 is 5.", True),
        (SUM, "2 plus 0 is 2, and 2 plus 3 is 5.", True),
        (SUM, "2 plus 3 is 5, and 5 plus 0 is 6.", False),
        (SUM, "2 plus 3 is 15.", False),
        (SUM, "5 plus 3 is 2.", False),
        (CAPITAL, "The capital of Guinea is Conakry.", True),
        (CAPITAL, "The capital of Guinea is Bissau.", False),
        (CAPITAL, "Conakryville is nice.", False),
        (CAPITAL, "Conakry " * 70 + ".", False),
    ],
)
def test_the_judge(question, answer, right):
    assert is_right(question, answer) is right


def test_what_is_readable_and_what_overlap_means():
    assert is_readable("You are welcome.")
    assert not is_readable("")
    assert not is_readable("the the the end.")
    assert not is_readable("\ufffd\x00 what.")
    assert overlap("a b c d", "a b c e") == 0.75
    assert overlap("", "a") == 0.0


def test_counting_models_know_what_they_saw_and_the_longer_context_knows_more():
    train = np.array([0, 2, 3, 4, 1] * 200, dtype=np.int32)
    again = np.array([0, 2, 3, 4, 1] * 4, dtype=np.int32)
    assert trigram_loss(train, again, 8) < 0.1 < unigram_loss(train, again, 8)
    assert unigram_loss(train, again, 8) == pytest.approx(np.log(5), abs=0.02)
    strange = np.array([5, 6, 7, 5, 6, 7], dtype=np.int32)
    assert np.isfinite(trigram_loss(train, strange, 8))
    # The probabilities of everything that may follow a seen and an unseen context sum to 1.
    for context in ([2, 3], [6, 7], [3, 2]):
        total = sum(np.exp(-trigram_loss(train, np.array([*context, w], dtype=np.int32), 8)) for w in range(8))
        assert total == pytest.approx(1.0, abs=1e-9)
