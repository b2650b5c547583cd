"""Logs: one event a line, `key=value` fields, always with role and rank where there is one.

2026-01-31T12:00:00.123Z INFO role=expert rank=E1 event="epoch joined" epoch=3
"""

import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

LogValue = str | int | float | bool | None


class _LineFormatter(logging.Formatter):
    """Formats a record as one line; an exception's text is folded into it."""

    def __init__(self, role: str, rank: str) -> None:
        super().__init__()
        self._origin = f"role={role} rank={rank}"

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        head = f"{moment.replace('+00:00', 'Z')} {record.levelname} {self._origin}"
        fields: dict[str, LogValue] = getattr(record, "fields", {})
        parts = [head, f"event={quote(record.getMessage())}"]
        parts += [f"{key}={quote(value)}" for key, value in fields.items()]
        if record.exc_info:
            parts.append(f"traceback={quote(self.formatException(record.exc_info))}")
        return " ".join(parts)


def quote(value: LogValue) -> str:
    """A value as it stands in a log line: quoted when it has spaces, newlines escaped."""
    text = str(value)
    if text and not any(character in text for character in ' "\n\r\t='):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'


def configure_logging(role: str, rank: str, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Sends Shoal's own loggers of this process to `stream` (stderr by default); other libraries keep theirs."""
    # The process's first stderr: Serve puts its own log in place of sys.stderr in a replica.
    handler = logging.StreamHandler(stream or sys.__stderr__)
    handler.setFormatter(_LineFormatter(role, rank))
    for name in ("model_shards", "cluster", "deploy"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def log_event(logger: logging.Logger, event: str, level: int = logging.INFO, **fields: LogValue) -> None:
    """Writes one event with its fields."""
    logger.log(level, event, extra={"fields": fields})
