"""Serve runs this in place of HAProxy: `haproxy_start.py PARENT HOST BINARY -f FILE ...` becomes `BINARY -f FILE ...`.

Serve 2.60 has HAProxy and the gateways behind it listen on one host, and has HAProxy reach them on loopback: here both
are true, as HAProxy alone listens on HOST. Its statistics and metrics, which Serve puts on every interface, are told on
loopback. An HAProxy that has just started knows no application and says of all that it does not exist, and one that
reaches no gateway says that there was an error inside: here clients are told to try again. And HAProxy ends with
PARENT, the process that started it: one that is killed would leave it, with its ports.

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
_CLIENTS = re.compile(r"frontend\s+(http|grpc)_frontend\b")
_OPERATORS = re.compile(r"(frontend\s+prometheus|listen\s+stats)\b")
_BEFORE_THE_FIRST = re.compile(r"backend\s+default_(grpc_)?backend\b")
_BIND = re.compile(r"(\s+bind\s+)\S*:(\d+)")
_ERROR_FILE = re.compile(r"\s+errorfile\s+50[234]\s")
_MESSAGE = re.compile(r'(hdr grpc-message|lf-string) "[^"]*"')
_AGAIN = r'\1 "the service is starting; send the request again"'
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> None:
    """Never returns: the process is HAProxy then."""
    parent, host, binary, *rest = arguments
    file = Path(rest[rest.index("-f") + 1])
    file.write_text(adapted(file.read_text(), host))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # It may have ended before this was asked for: then nobody would stop HAProxy.
    if os.getppid() != int(parent):
        sys.exit(1)
    os.execv(binary, [binary, *rest])


def adapted(config: str, host: str) -> str:
    """HAProxy's configuration as Serve wrote it, as it is to be."""
    clients, operators = rf"\g<1>{_address(host)}", r"\g<1>127.0.0.1:\2"
    lines: list[str] = []
    section = ""
    for line in config.splitlines(keepends=True):
        if _SECTION.match(line):
            section = line
        if _CLIENTS.match(section):
            lines.append(_BIND.sub(clients, line))
        elif _OPERATORS.match(section):
            lines.append(_BIND.sub(operators, line))
        elif _BEFORE_THE_FIRST.match(section):
            later = line.replace(" grpc-status 5 ", " grpc-status 14 ").replace(" status 404 ", " status 503 ")
            lines.append(_MESSAGE.sub(_AGAIN, later))
        elif not _ERROR_FILE.match(line):
            lines.append(line)
    return "".join(lines)


def _address(host: str) -> str:
    """What `bind` takes in place of a host and the port, which is the second group."""
    if host == "::":
        return r"[::]:\2 v4v6"  # as gRPC and others understand it
    return rf"[{host}]:\2" if ":" in host else rf"{host}:\2"


if __name__ == "__main__":
    main(sys.argv[1:])
