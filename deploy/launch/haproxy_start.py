"""Serve runs this in place of HAProxy: `haproxy_start.py BINARY -db -f FILE ...` becomes `BINARY -db -f FILE ...`.

Serve 2.60 has HAProxy tell statistics and metrics on every interface, and has no setting for it: here they are told
on loopback. An HAProxy that has just started knows no application, and says of all that it does not exist: here there
is one, and clients are told to try again. And HAProxy ends with the process that started it: one that is killed would
leave it, with its ports.

Runs by its path, without the package; the standard library is all there is.
"""

import ctypes
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_SECTION = re.compile(r"\S")
_OPERATORS = re.compile(r"(frontend\s+prometheus|listen\s+stats)\b")
_BEFORE_THE_FIRST = re.compile(r"backend\s+default_(grpc_)?backend\b")
_BIND = re.compile(r"(\s+bind\s+)\*?:(?=\d)")
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> None:
    """Never returns: the process is HAProxy then."""
    binary, *rest = arguments
    file = Path(rest[rest.index("-f") + 1])
    file.write_text(adapted(file.read_text()))
    # The parent may have ended before this was asked for: then nobody would stop it.
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(1)
    os.execv(binary, [binary, *rest])


def adapted(config: str) -> str:
    """HAProxy's configuration, with what is for operators on loopback, and "not found" as "not yet"."""
    lines: list[str] = []
    section = ""
    for line in config.splitlines(keepends=True):
        if _SECTION.match(line):
            section = line
        if _OPERATORS.match(section):
            line = _BIND.sub(r"\g<1>127.0.0.1:", line)
        elif _BEFORE_THE_FIRST.match(section):
            line = line.replace(" grpc-status 5 ", " grpc-status 14 ").replace(" status 404 ", " status 503 ")
        lines.append(line)
    return "".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
