"""What clients of one running service see: answers, errors, and that nothing they do stops it."""

import contextlib
import json
import math
import random
import socket
import subprocess
import sys
import time

import grpc
import httpx
import openai
import psutil
import pytest
import torch
import transformers
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from deploy.gateway import inference_pb2 as pb
from deploy.gateway.inference_pb2_grpc import InferenceStub
from deploy.models import default_model_directory
from tests.reference import hf_greedy
from tests.serving import MAX_CONCURRENT_REQUESTS, MAX_MODEL_LEN, MAX_NUM_SEQS

pytestmark = [pytest.mark.service, pytest.mark.timeout(300)]

QUESTION = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "What is a whale?"}]


@pytest.fixture(scope="module")
def channel(service):
    with grpc.insecure_channel(service.grpc) as made:
        yield made


@pytest.fixture(scope="module")
def stub(channel):
    return InferenceStub(channel)


@pytest.fixture(scope="module")
def http(service):
    with httpx.Client(base_url=f"http://{service.http}", timeout=60.0, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def reference():
    directory = default_model_directory()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def still_answering(stub):
    """After the test the service gives a right answer."""
    before = greedy_ids(stub, [5, 6, 7], 4)
    yield
    assert greedy_ids(stub, [5, 6, 7], 4) == before


def greedy_ids(stub, prompt, count, timeout=60.0):
    request = pb.CompletionRequest(
        token_ids=pb.TokenIds(ids=prompt), max_tokens=count, temperature=0.0, ignore_eos=True
    )
    return [token for chunk in stub.Completion(request, timeout=timeout) for token in chunk.token_ids]


def chat_request(**fields):
    messages = [pb.ChatMessage(**message) for message in QUESTION]
    return pb.ChatCompletionRequest(messages=messages, **{"max_tokens": 24, "temperature": 0.0, **fields})


def test_the_chat_answer_is_transformers_answer_to_the_checkpoints_own_template(stub, reference):
    model, tokenizer = reference
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    chunks = list(stub.ChatCompletion(chat_request(ignore_eos=True), timeout=60.0))
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    assert tokens == hf_greedy(model, prompt, 24)
    assert "".join(chunk.content for chunk in chunks) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(chunks) > 1, "the answer must come in pieces"
    assert [chunk.HasField("finish_reason") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(prompt), 24, len(prompt) + 24)
    assert len({chunk.id for chunk in chunks}) == 1


def test_http_and_grpc_give_one_answer_streamed_or_not(service, stub):
    chunks = list(stub.ChatCompletion(chat_request(), timeout=60.0))
    expected = "".join(chunk.content for chunk in chunks)
    base_url = f"http://{service.http}/v1"
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60.0) as client:
        whole = client.chat.completions.create(model="", messages=QUESTION, max_tokens=24, temperature=0.0)
        stream = client.chat.completions.create(
            model=service.model, messages=QUESTION, max_tokens=24, temperature=0.0, stream=True
        )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        ids = client.completions.create(model="", prompt=[5, 6, 7], max_tokens=4, temperature=0.0)
        [listed] = client.models.list().data
    assert whole.choices[0].message.content == streamed == expected
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens > 1
    # Whole blocks of 16, and one token at least is computed.
    assert whole.usage.prompt_tokens_details.cached_tokens == (whole.usage.prompt_tokens - 1) // 16 * 16 > 0
    assert ids.usage.prompt_tokens == 3
    assert listed.id == service.model == "shoal-demo"


def test_the_first_of_several_choices_is_the_answer_of_one_and_the_others_differ(stub):
    sampling = {"temperature": 2.0, "seed": 4, "ignore_eos": True}
    alone = [
        token for chunk in stub.ChatCompletion(chat_request(**sampling), timeout=60.0) for token in chunk.token_ids
    ]
    answers = []
    for _ in range(2):
        chunks = list(stub.ChatCompletion(chat_request(n=3, **sampling), timeout=60.0))
        choices = [[token for chunk in chunks if chunk.index == i for token in chunk.token_ids] for i in range(3)]
        assert sum(chunk.HasField("finish_reason") for chunk in chunks) == 3
        assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].usage.completion_tokens == 3 * 24
        answers.append(choices)
    assert answers[0] == answers[1]
    assert answers[0][0] == alone
    assert len({tuple(choice) for choice in answers[0]}) == 3


def test_several_prompts_in_one_request_have_the_answers_that_they_have_alone(http, stub):
    prompts = [[5, 6, 7], [9, 8], [11, 12, 13, 14]]
    fields = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    together = http.post("/v1/completions", json={"prompt": prompts, **fields}).json()
    alone = [http.post("/v1/completions", json={"prompt": prompt, **fields}).json() for prompt in prompts]
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    assert [choice["text"] for choice in together["choices"]] == [answer["choices"][0]["text"] for answer in alone]
    counts = {"prompt_tokens": 9, "completion_tokens": 24, "total_tokens": 33}
    assert together["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}


def test_overload_reaches_clients_through_serves_proxies_with_its_retry_delay(http, stub):
    """One request runs; sixteen choices more do not fit a gateway that takes sixteen requests at once."""
    running = stub.Completion(long_request())
    next(running)
    metadata = (("x-request-id", "mine"),)
    refused = stub.ChatCompletion(chat_request(n=MAX_CONCURRENT_REQUESTS), timeout=30.0, metadata=metadata)
    chunks = []
    with pytest.raises(grpc.RpcError) as refusal:
        chunks.extend(refused)
    answer = http.post("/v1/completions", content=body(n=MAX_CONCURRENT_REQUESTS))
    running.cancel()
    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "takes 16 requests at once" in refusal.value.details()
    trailing = dict(refusal.value.trailing_metadata())
    assert (trailing["retry-after-ms"], trailing["x-request-id"]) == ("1000", "mine")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


def test_the_request_id_of_the_client_comes_back_on_both_wires(http, stub):
    call = stub.ChatCompletion(chat_request(max_tokens=2), timeout=60.0, metadata=(("x-request-id", "mine"),))
    assert len(list(call)) > 0
    assert dict(call.trailing_metadata())["x-request-id"] == "mine"
    answer = http.post("/v1/completions", content=body(), headers={"x-request-id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_reflection_health_and_the_list_of_models(service, channel, stub):
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {"shoal.v1.Inference", "grpc.health.v1.Health"} <= set(database.get_services())
    check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10.0)
    assert check.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as refusal:
        list(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=10.0))
    assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED
    [model] = stub.ListModels(pb.ListModelsRequest(), timeout=10.0).models
    assert (model.id, model.max_model_len) == (service.model, MAX_MODEL_LEN)


def test_tokenize_and_detokenize_are_the_checkpoints_tokenizer(stub, reference):
    _, tokenizer = reference
    text = "Ünïcode, 12345 and 🐋"
    ids = list(stub.Tokenize(pb.TokenizeRequest(text=text), timeout=10.0).token_ids.ids)
    assert ids == tokenizer(text)["input_ids"]
    assert text in stub.Detokenize(pb.DetokenizeRequest(token_ids=pb.TokenIds(ids=ids)), timeout=10.0).text


def test_a_seed_gives_one_stream_whoever_shares_the_batch(stub):
    request = pb.CompletionRequest(
        token_ids=pb.TokenIds(ids=[9, 8, 7]), max_tokens=24, temperature=1.0, seed=4, ignore_eos=True
    )

    def tokens():
        return [token for chunk in stub.Completion(request, timeout=60.0) for token in chunk.token_ids]

    alone = tokens()
    others = [stub.Completion(pb.CompletionRequest(text="x", max_tokens=200, ignore_eos=True)) for _ in range(3)]
    for other in others:
        next(other)
    assert tokens() == alone
    for other in others:
        other.cancel()


def completion(**fields):
    return "Completion", pb.CompletionRequest(**{"text": "hello", "max_tokens": 4, **fields})


def chat(*messages, **fields):
    made = [pb.ChatMessage(role=role, content=content) for role, content in messages]
    return "ChatCompletion", pb.ChatCompletionRequest(messages=made, **fields)


REFUSED = {
    "prompt longer than the context": (
        completion(text=None, token_ids=pb.TokenIds(ids=[5] * (MAX_MODEL_LEN + 1))),
        "INVALID_ARGUMENT",
        ("4096", "4097"),
    ),
    "prompt and output longer than the context": (
        completion(max_tokens=MAX_MODEL_LEN),
        "INVALID_ARGUMENT",
        ("max_tokens", "4096"),
    ),
    "max_tokens 0": (completion(max_tokens=0), "INVALID_ARGUMENT", ("max_tokens", "got 0")),
    "temperature NaN": (completion(temperature=math.nan), "INVALID_ARGUMENT", ("temperature", "nan")),
    "temperature infinite": (completion(temperature=math.inf), "INVALID_ARGUMENT", ("temperature", "inf")),
    "no prompt": (completion(text=None), "INVALID_ARGUMENT", ("prompt",)),
    "no tokens": (completion(text=None, token_ids=pb.TokenIds()), "INVALID_ARGUMENT", ("at least one token",)),
    "token id above the vocabulary": (
        completion(text=None, token_ids=pb.TokenIds(ids=[1, 4096])),
        "INVALID_ARGUMENT",
        ("token_ids[1]", "4095", "got 4096"),
    ),
    "token id below 0": (
        completion(text=None, token_ids=pb.TokenIds(ids=[-1])),
        "INVALID_ARGUMENT",
        ("token_ids[0]", "got -1"),
    ),
    "empty messages": (chat(), "INVALID_ARGUMENT", ("messages", "got none")),
    "unknown role": (chat(("wizard", "hi")), "INVALID_ARGUMENT", ("messages[0].role", "'wizard'")),
    "unknown model": (completion(model="gpt-9"), "NOT_FOUND", ("'gpt-9'", "shoal-demo")),
    "unknown model in a chat": (chat(("user", "hi"), model="gpt-9"), "NOT_FOUND", ("'gpt-9'",)),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("still_answering")
def test_a_bad_grpc_request_is_refused_with_rule_and_value(stub, case):
    (method, request), code, words = REFUSED[case]
    with pytest.raises(grpc.RpcError) as refusal:
        list(getattr(stub, method)(request, timeout=30.0))
    assert refusal.value.code().name == code
    for word in words:
        assert word in refusal.value.details()


def body(**fields):
    return json.dumps({"prompt": "hello", "max_tokens": 4, **fields}).encode()


HTTP_REFUSED = {
    "invalid UTF-8": ("completions", b'{"prompt": "\xff\xfe"}', 400, "UTF-8"),
    "invalid JSON": ("completions", b'{"prompt": ', 400, "JSON"),
    "nested JSON": ("completions", b"[" * 100_000, 400, "JSON"),
    "no object": ("completions", b"[]", 400, "the body"),
    "negative max_tokens": ("completions", body(max_tokens=-1), 400, "got -1"),
    "max_tokens 0": ("completions", body(max_tokens=0), 400, "got 0"),
    "max_tokens a text": ("completions", body(max_tokens="many"), 400, "max_tokens"),
    "temperature NaN": ("completions", body(temperature=math.nan), 400, "temperature"),
    "token ids out of range": ("completions", body(prompt=[4096]), 400, "4096"),
    "prompt too long": ("completions", body(prompt=[5] * 5000), 400, "5000"),
    "unknown model": ("completions", body(model="gpt-9"), 404, "gpt-9"),
    "empty messages": ("chat/completions", b'{"messages": []}', 400, "messages"),
    "unknown role": ("chat/completions", b'{"messages": [{"role": "wizard", "content": "hi"}]}', 400, "role"),
    "no messages": ("chat/completions", b"{}", 400, "messages"),
    "unknown path": ("nothing", b"{}", 404, ""),
}


@pytest.mark.parametrize("case", HTTP_REFUSED)
@pytest.mark.usefixtures("still_answering")
def test_a_bad_http_request_is_refused_in_openais_shape(http, case):
    path, content, status, word = HTTP_REFUSED[case]
    answer = http.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert word in error["message"]
    assert {"message", "type", "param", "code"} <= error.keys()


@pytest.mark.usefixtures("still_answering")
def test_bytes_that_are_no_request_are_refused(channel):
    call = channel.unary_stream("/shoal.v1.Inference/Completion", request_serializer=lambda data: data)
    with pytest.raises(grpc.RpcError) as refusal:
        list(call(b"\xff\xff\xff\xff", timeout=30.0))
    # gRPC's own status: parsing comes before any code of the service.
    assert refusal.value.code() is grpc.StatusCode.UNKNOWN
    assert "Error parsing message" in refusal.value.details()


def long_request():
    """One that would run for minutes."""
    return pb.CompletionRequest(text="on and on", max_tokens=MAX_MODEL_LEN - 64, temperature=0.0, ignore_eos=True)


def leave_by_cancel(service, stub):
    streams = [stub.Completion(long_request()) for _ in range(MAX_NUM_SEQS)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.cancel()


def leave_by_deadline(service, stub):
    streams = [stub.Completion(long_request(), timeout=1.5) for _ in range(MAX_NUM_SEQS)]
    for stream in streams:
        with pytest.raises(grpc.RpcError) as ended:
            list(stream)
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def leave_by_closing_http(service, stub):
    content = body(prompt="on and on", max_tokens=MAX_MODEL_LEN - 64, temperature=0.0, ignore_eos=True, stream=True)
    with contextlib.ExitStack() as open_streams:
        client = open_streams.enter_context(httpx.Client(trust_env=False, timeout=60.0))
        for _ in range(MAX_NUM_SEQS):
            response = open_streams.enter_context(
                client.stream("POST", f"http://{service.http}/v1/completions", content=content)
            )
            next(response.iter_lines())


def leave_all_choices(service, stub):
    request = long_request()
    request.n = MAX_NUM_SEQS
    stream = stub.Completion(request)
    next(stream)
    stream.cancel()


@pytest.mark.parametrize("leave", [leave_by_cancel, leave_by_deadline, leave_by_closing_http, leave_all_choices])
def test_a_client_that_leaves_frees_its_place(service, stub, leave):
    """As many clients as the engine runs at once leave; the next request needs one of their places."""
    leave(service, stub)
    begun = time.monotonic()
    assert len(greedy_ids(stub, [5, 6, 7], 4, timeout=30.0)) == 4
    assert time.monotonic() - begun < 20.0


def test_requests_of_every_kind_at_once_end_as_they_would_alone(stub, reference):
    model, _ = reference
    draw = random.Random(3)
    prompts = [[draw.randrange(4096) for _ in range(draw.randint(1, 300))] for _ in range(6)]
    streams = [
        stub.Completion(
            pb.CompletionRequest(token_ids=pb.TokenIds(ids=prompt), max_tokens=16, temperature=0.0, ignore_eos=True),
            timeout=60.0,
        )
        for prompt in prompts
    ]
    left = stub.Completion(long_request())
    next(left)
    left.cancel()
    for prompt, stream in zip(prompts, streams, strict=True):
        assert [token for chunk in stream for token in chunk.token_ids] == hf_greedy(model, prompt, 16)


def test_it_listens_on_loopback_alone(service):
    """Serve's replicas are the exception: they bind a port of their own for Serve's proxies to every interface."""
    root = psutil.Process(service.process.pid)
    listening = [
        (process.name(), connection.laddr.ip.removeprefix("::ffff:"))
        for process in [root, *root.children(recursive=True)]
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    # One of each, and so none of the gateway's that clients might reach beside HAProxy.
    assert sorted((name, ip) for name, ip in listening if ip not in ("127.0.0.1", "::1")) == [
        ("ray::ServeReplica:shoal:attention", "::"),
        ("ray::ServeReplica:shoal:gateway", "::"),
    ]


RANKS = ("ray::ExpertRank", "ray::CoordinatorRank", "ray::ServeReplica")
BARE_RANKS = ("ray::Idle", "ray::ServeReplica")


def processes_of(pid, names):
    """The process and those below it that bear one of the names."""
    root = psutil.Process(pid)
    return [root, *(p for p in root.children(recursive=True) if " ".join(p.cmdline()).startswith(names))]


def spent(processes):
    times = [process.cpu_times() for process in processes]
    return sum(entry.user + entry.system for entry in times)


def test_an_idle_cell_costs_nothing(service):
    """Under 5 % of one core beyond what Ray itself uses: as many actors and replicas that do nothing, beside it."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [str(taken.getsockname()[1]) for taken in (first, second)]
    command = [sys.executable, "-m", "tests.bare_ray", *ports]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as bare:
        assert bare.stdout.readline() == "ready\n"
        measured = [processes_of(service.process.pid, RANKS), processes_of(bare.pid, BARE_RANKS)]
        assert [len(processes) for processes in measured] == [6, 6]
        time.sleep(10.0)
        before, begun = [spent(processes) for processes in measured], time.monotonic()
        time.sleep(15.0)
        cell, ray = [spent(processes) - old for processes, old in zip(measured, before, strict=True)]
        share = (cell - ray) / (time.monotonic() - begun)
        bare.communicate(timeout=60.0)
    assert share < 0.05
