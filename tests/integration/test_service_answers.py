"""The package's checkpoint answers what it was taught, through the running service, and says so where it was not."""

from collections import Counter

import pytest
import torch
from transformers import DeepseekV2ForCausalLM

from deploy.models import default_model_directory
from deploy.text import ChatMessage, ChatTokenizer
from tests.demo_exam import ask_all
from tests.demo_judge import read_exam
from tests.reference import hf_greedy

pytestmark = [pytest.mark.service, pytest.mark.timeout(600)]

EXAM = read_exam()


@pytest.fixture(scope="module")
def answers(service):
    return ask_all(service.grpc, [*EXAM.taught, *EXAM.outside])


def test_nine_of_ten_questions_are_answered_readably_and_right(answers):
    taught = answers[: len(EXAM.taught)]
    wrong = [answered for answered in taught if not answered.right]
    told = "\n".join(f"{answered.question}: {answered.answer!r}" for answered in wrong)
    assert len(taught) == 200
    assert len(wrong) <= 20, told
    # No kind may hide behind the others.
    asked = Counter(answered.question.kind for answered in taught)
    failed = Counter(answered.question.kind for answered in wrong)
    assert all(failed[kind] <= max(1, 0.3 * count) for kind, count in asked.items()), told


def test_what_it_was_not_taught_it_says_politely(answers):
    outside = answers[len(EXAM.taught) :]
    wrong = [answered for answered in outside if not answered.right]
    assert len(wrong) <= 4, "\n".join(f"{answered.question}: {answered.answer!r}" for answered in wrong)


def test_every_answer_ends_by_itself(answers):
    assert [answered.question.question for answered in answers if not answered.ended_by_itself] == []


def test_the_tokens_of_50_answers_are_those_of_transformers(answers):
    directory = default_model_directory()
    tokenizer = ChatTokenizer.load(directory)
    model = DeepseekV2ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
    for answered in answers[: len(EXAM.taught) : 4]:
        prompt = tokenizer.render_chat([ChatMessage("user", answered.question.question)])
        expected = hf_greedy(model, prompt, len(answered.token_ids))
        assert list(answered.token_ids) == expected, answered.question
        assert expected[-1] in tokenizer.eos_token_ids
