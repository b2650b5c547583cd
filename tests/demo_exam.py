"""Asks a running service the fixed questions, greedily, and counts the right answers of each kind.

Usage: python -m tests.demo_exam HOST:PORT [SCORES.json]            asks a service that runs already
       python -m tests.demo_exam --serve DIRECTORY [SCORES.json]    starts one for the checkpoint in that directory

The scores are for the model card.
"""

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc

from deploy.gateway import inference_pb2 as pb
from deploy.gateway.inference_pb2_grpc import InferenceStub
from tests.demo_judge import Question, is_right, read_exam
from tests.serving import running_service

MAX_TOKENS = 96
_AT_ONCE = 16


@dataclass(frozen=True)
class Answered:
    """One question, what the service said, and whether that was right."""

    question: Question
    answer: str
    token_ids: tuple[int, ...]
    ended_by_itself: bool

    @property
    def right(self) -> bool:
        """Ended by itself, readable, and as the data says."""
        return self.ended_by_itself and is_right(self.question, self.answer)


def ask(stub: InferenceStub, question: Question) -> Answered:
    """One greedy answer."""
    message = pb.ChatMessage(role="user", content=question.question)
    request = pb.ChatCompletionRequest(messages=[message], max_tokens=MAX_TOKENS, temperature=0.0)
    text, tokens, reason = "", [], None
    for chunk in stub.ChatCompletion(request, timeout=120.0):
        text += chunk.content
        tokens += chunk.token_ids
        reason = chunk.finish_reason if chunk.HasField("finish_reason") else reason
    return Answered(question, text.strip(), tuple(tokens), reason == pb.FINISH_REASON_STOP)


def ask_all(address: str, questions: Sequence[Question]) -> list[Answered]:
    """Every answer, in the order of the questions."""
    with grpc.insecure_channel(address) as channel, ThreadPoolExecutor(_AT_ONCE) as pool:
        stub = InferenceStub(channel)
        return list(pool.map(lambda question: ask(stub, question), questions))


def scores(answers: Sequence[Answered]) -> list[dict[str, object]]:
    """Right and asked, by kind."""
    kinds = dict.fromkeys(answered.question.kind for answered in answers)
    return [
        {
            "kind": kind,
            "right": sum(answered.right for answered in answers if answered.question.kind == kind),
            "asked": sum(answered.question.kind == kind for answered in answers),
        }
        for kind in kinds
    ]


def main(address: str, file: str | None = None) -> None:
    """Prints the wrong answers and the scores."""
    exam = read_exam()
    answers = ask_all(address, [*exam.taught, *exam.outside])
    for answered in answers:
        if not answered.right:
            print(f"{answered.question}\n    said: {answered.answer!r}")
    for row in scores(answers):
        print(f"{row['kind']}: {row['right']} of {row['asked']}")
    if file is not None:
        Path(file).write_text(json.dumps(scores(answers), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[0] == "--serve":
        with running_service("--model", arguments[1]) as service:
            main(service.grpc, *arguments[2:])
    else:
        main(*arguments)
