"""Every rule names the field, the rule and the value it refuses."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.gateway import inference_pb2 as pb
from deploy.gateway import validation
from deploy.gateway.validation import ModelLimits, SamplingFields
from deploy.text.messages import ChatMessage
from model_shards.errors import InvalidRequestError, UnknownModelError

LIMITS = ModelLimits("tiny", vocab_size=100, max_model_len=32)
RANGES = {"temperature": (0.0, 2.0), "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0)}


def params(**fields):
    return validation.sampling_params(SamplingFields(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": math.nan}, "temperature must be 0 to 2, got nan"),
        ({"temperature": math.inf}, "temperature must be 0 to 2, got inf"),
        ({"temperature": -0.1}, "temperature must be 0 to 2, got -0.1"),
        ({"top_p": math.nan}, "top_p must be 0 to 1, got nan"),
        ({"top_p": -0.1}, "top_p must be 0 to 1, got -0.1"),
        ({"top_p": 1.5}, "top_p must be 0 to 1, got 1.5"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"seed": -(2**63) - 1}, f"seed must be -2**63 to 2**64 - 1, got {-(2**63) - 1}"),
        ({"seed": 2**64}, f"seed must be -2**63 to 2**64 - 1, got {2**64}"),
        ({"presence_penalty": 2.5}, "presence_penalty must be -2 to 2, got 2.5"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty must be -2 to 2, got -inf"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be 0.01 to 100, got 0.0"),
        ({"repetition_penalty": 1e-39}, "repetition_penalty must be 0.01 to 100, got 1e-39"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be 0.01 to 100, got inf"),
        ({"repetition_penalty": math.nan}, "repetition_penalty must be 0.01 to 100, got nan"),
        ({"logprobs": -1}, "logprobs must be 0 to 20, got -1"),
        ({"logprobs": 21}, "logprobs must be 0 to 20, got 21"),
        ({"n": 0}, "n must be 1 to 16, got 0"),
        ({"n": 17}, "n must be 1 to 16, got 17"),
        ({"stop": ("a", "")}, "stop[1] must be 1 to 256 characters long, got 0"),
        ({"stop": ("a" * 257,)}, "stop[0] must be 1 to 256 characters long, got 257"),
        ({"stop": ("a",) * 17}, "stop must hold at most 16 strings, got 17"),
    ],
)
def test_a_bad_sampling_field_is_refused_by_name_rule_and_value(fields, message):
    with pytest.raises(InvalidRequestError) as refusal:
        params(**fields)
    assert str(refusal.value) == message


@settings(max_examples=30)
@given(st.sampled_from(sorted(RANGES)), st.floats())
def test_a_number_is_taken_unchanged_exactly_when_it_lies_in_its_range(name, value):
    low, high = RANGES[name]
    if math.isfinite(value) and low <= value <= high:
        assert getattr(params(**{name: value}), name) == value
    else:
        with pytest.raises(InvalidRequestError, match=f"^{name} must be .*, got {value}$".replace("+", r"\+")):
            params(**{name: value})


def test_the_least_repetition_penalty_is_taken_as_grpc_carries_it():
    least = pb.CompletionRequest(repetition_penalty=0.01).repetition_penalty
    assert least < 0.01
    assert params(repetition_penalty=least).repetition_penalty == least


def test_what_the_client_left_out_has_the_documented_default():
    made = params()
    assert (made.temperature, made.top_p, made.top_k, made.repetition_penalty) == (1.0, 1.0, 0, 1.0)
    assert (made.presence_penalty, made.frequency_penalty, made.logprobs, made.seed) == (0.0, 0.0, None, None)


def test_a_seed_of_zero_is_a_seed():
    assert params(seed=0).seed == 0


@pytest.mark.parametrize(("seed", "taken"), [(-1, 2**64 - 1), (-(2**63), 2**63), (2**64 - 1, 2**64 - 1)])
def test_a_negative_seed_is_taken_by_its_twos_complement(seed, taken):
    assert params(seed=seed).seed == taken


@pytest.mark.parametrize("top_k", [None, 0, 5])
def test_a_top_p_of_zero_keeps_the_best_token_alone(top_k):
    made = params(top_p=0.0, top_k=top_k)
    assert (made.top_p, made.top_k) == (1.0, 1)


@pytest.mark.parametrize("name", ["", "tiny"])
def test_the_empty_name_and_the_served_one_name_the_model(name):
    validation.check_model(name, LIMITS)


def test_another_model_is_unknown():
    with pytest.raises(UnknownModelError, match="'gpt-4' is not served here; the served model is 'tiny'"):
        validation.check_model("gpt-4", LIMITS)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must hold at least one message, got none"),
        (
            [ChatMessage("user", "a"), ChatMessage("robot", "b")],
            "messages[1].role must be one of system, user, assistant, got 'robot'",
        ),
        ([ChatMessage("", "a")], "messages[0].role must be one of system, user, assistant, got ''"),
        ([ChatMessage("user", "a")] * 4097, "messages must hold at most 4096 messages, got 4097"),
        (
            [ChatMessage("user", "a" * 2048), ChatMessage("user", "b")],
            "messages must be at most 2048 bytes (a context of 32 tokens), got 2049",
        ),
        ([ChatMessage("user", "a\ud800")], "messages must be valid Unicode, got a lone surrogate at 1"),
    ],
)
def test_a_bad_conversation_is_refused(messages, message):
    with pytest.raises(InvalidRequestError) as refusal:
        validation.check_messages(messages, LIMITS)
    assert str(refusal.value) == message


@pytest.mark.parametrize("token", [-1, 100, 2**31])
def test_a_token_outside_the_vocabulary_is_refused_with_its_place(token):
    with pytest.raises(InvalidRequestError) as refusal:
        validation.check_token_ids([0, 99, token], LIMITS)
    assert str(refusal.value) == f"token_ids[2] must be 0 to 99, got {token}"


def test_more_tokens_than_the_context_are_refused_before_they_are_looked_at():
    with pytest.raises(InvalidRequestError, match=r"token_ids must hold at most 32 ids \(the context\), got 33"):
        validation.check_token_ids([-1] * 33, LIMITS)


@given(
    prompt=st.integers(0, 40),
    wanted=st.none() | st.integers(-2, 40),
    default=st.none() | st.integers(1, 40),
)
def test_prompt_and_output_fit_the_context_or_are_refused(prompt, wanted, default):
    fits = 0 < prompt < LIMITS.max_model_len and (wanted is None or 0 < wanted <= LIMITS.max_model_len - prompt)
    fields = SamplingFields(max_tokens=wanted)
    if not fits:
        with pytest.raises(InvalidRequestError, match=r"got (none|-?\d+)"):
            validation.resolve_max_tokens(prompt, fields, default, LIMITS)
        return
    tokens = validation.resolve_max_tokens(prompt, fields, default, LIMITS)
    left = LIMITS.max_model_len - prompt
    assert tokens == (wanted if wanted is not None else min(default or left, left))


@pytest.mark.parametrize("tokens", [0, -1])
def test_max_tokens_below_one_is_refused(tokens):
    with pytest.raises(InvalidRequestError, match=f"^max_tokens must be at least 1, got {tokens}$"):
        validation.resolve_max_tokens(1, SamplingFields(max_tokens=tokens), None, LIMITS)
