"""Questions and answers on a terminal, over one client."""

import time
from contextlib import closing
from dataclasses import dataclass

import click

from deploy.cli.text import check_text
from deploy.client import Message, Piece, Sampling, ShoalClient
from model_shards.errors import ShoalError

_HELP = "Ctrl-C cancels an answer, /new starts over, /exit or Ctrl-D leaves."


@dataclass
class AnswerTimer:
    """When the pieces of one answer came; seconds on time.perf_counter."""

    begun: float
    first: float | None = None
    last: float | None = None
    num_first: int = 0  # tokens of the first piece that had any
    num_tokens: int = 0

    def saw(self, piece: Piece, now: float) -> None:
        """Notes a piece that has just come."""
        if piece.num_tokens == 0:
            return
        if self.first is None:
            self.first, self.num_first = now, piece.num_tokens
        self.last = now
        self.num_tokens += piece.num_tokens

    @property
    def time_per_output_token_s(self) -> float | None:
        """Mean time between tokens after the first piece; None when all came at once."""
        later = self.num_tokens - self.num_first
        if self.first is None or self.last is None or later == 0:
            return None
        return (self.last - self.first) / later

    def summary(self, ending: str) -> str:
        """`12 tokens (length), first after 0.05 s, then 210.0 tokens/s`."""
        text = f"{self.num_tokens} tokens ({ending})"
        if self.first is not None:
            text += f", first after {self.first - self.begun:.2f} s"
        if self.time_per_output_token_s:
            text += f", then {1 / self.time_per_output_token_s:.1f} tokens/s"
        return text


class Conversation:
    """Keeps the turns; a turn that failed or was cancelled is forgotten, question included."""

    def __init__(self, client: ShoalClient, model: str, system: str | None, sampling: Sampling) -> None:
        self._client = client
        self._model = model
        self._opening = [] if system is None else [Message("system", system)]
        self._sampling = sampling
        self.turns: list[Message] = []

    def ask(self, question: str) -> bool:
        """Streams one answer to stdout and its timings to stderr; False when Ctrl-C cancelled it.

        Raises CallError when the service refuses or fails.
        """
        messages = [*self._opening, *self.turns, Message("user", question)]
        timer = AnswerTimer(time.perf_counter())
        texts: list[str] = []
        ending = "cancelled"
        try:
            with closing(self._client.chat(messages, self._sampling, self._model)) as pieces:
                for piece in pieces:
                    timer.saw(piece, time.perf_counter())
                    texts.append(piece.text)
                    click.echo(printable(piece.text), nl=False)
                    ending = piece.finish_reason or ending
        except KeyboardInterrupt:
            ending = "cancelled"
        finally:
            if texts:
                click.echo()
        click.echo(f"shoal: {timer.summary(ending)}", err=True)
        if ending == "cancelled":
            return False
        self.turns = [*self.turns, Message("user", question), Message("assistant", "".join(texts))]
        return True

    def hold(self) -> None:
        """Reads questions from the terminal until the user leaves."""
        import readline  # noqa: F401  (importing it gives input() its history and editing)

        model = ", ".join(model.id for model in self._client.models())
        click.echo(f"shoal: talking to {model} at {self._client.address}. {_HELP}", err=True)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                click.echo(f"\nshoal: {_HELP}", err=True)
                continue
            match line:
                case "":
                    continue
                case "/exit":
                    return
                case "/new":
                    self.turns = []
                    continue
            try:
                self.ask(check_text("the question", line))
            except ShoalError as error:
                click.echo(f"shoal: error: {error}", err=True)


def printable(text: str) -> str:
    """The text without control characters: a model must not steer the user's terminal."""
    return "".join(
        character
        if character in "\n\t" or not (ord(character) < 32 or 127 <= ord(character) < 160)
        else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )
