"""Runs child processes: this Python, with the very package that is running on its path, and one way to talk with it.

A request is a line of JSON, and so is its answer. They travel over a socket, which is the child's standard input; what
the child or a library prints goes to a file, whose last line tells why a child died. `Child` is the parent's side,
`serve` the child's.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Tell = Callable[[str], None]


class Lost(Exception):
    """Nothing more will run in this process: raised by what answers there, and told to the parent with the answer."""


class Child:
    """A child process that answers one request after the other.

    Attributes:
        now: what the child has come to in the request at hand, as it told; None before it has told anything.
    """

    def __init__(self, *arguments: str, log: Path | None = None, variables: Mapping[str, str] | None = None):
        """Start Python with these arguments, and `variables` in its environment beside ours.

        What it prints is appended to `log` when it is closed.
        """
        self.now: str | None = None
        self._log = log
        self._printed = tempfile.TemporaryFile("w+", errors="replace")
        self._socket, theirs = socket.socketpair()
        self._lines = self._socket.makefile("rb")
        with theirs:
            self._process = subprocess.Popen(
                python(*arguments),
                stdin=theirs.fileno(),
                stdout=self._printed,
                stderr=self._printed,
                env=environment(**(variables or {})),
                start_new_session=True,  # Ctrl-C is for the parent, which keeps the results and ends its children
            )

    def ask(self, request: dict[str, Any], limit: float | None = None) -> dict[str, Any]:
        """Send a request and return its answer.

        The answer is {"error": why, "lost": True} where the process died, is of no use any more, or took longer than
        `limit` seconds: it is then to be closed.
        """
        end = None if limit is None else time.monotonic() + limit
        self.now = None
        try:
            self._wait_until(end)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            while True:
                self._wait_until(end)
                line = self._lines.readline()
                if not line.endswith(b"\n"):
                    break
                said = json.loads(line)
                if said.keys() != {"now"}:
                    return said
                self.now = said["now"]
        except TimeoutError:
            return self._lost(f"not done within {limit:.0f} s")
        except (OSError, ValueError):  # the connection was closed, by the child or here
            pass
        return self._lost(self._end())

    def finish(self, patience: float) -> dict[str, Any]:
        """Let the process end by itself and return {}; what `ask` returns for a lost one where it does not end well."""
        self._socket.shutdown(socket.SHUT_WR)
        try:
            code = self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            return self._lost(f"its process did not end within {patience:.0f} s")
        return self._lost(self._end()) if code else {}

    def close(self) -> None:
        """End the process, and whatever it has started, at once."""
        kill(self._process)
        if self._log is not None and (printed := self._read()[-20_000:]):
            with self._log.open("a") as log:
                log.write(f"== process {self._process.pid}\n{printed}\n")
        for file in (self._lines, self._socket, self._printed):
            file.close()

    def _wait_until(self, end: float | None) -> None:
        self._socket.settimeout(None if end is None else max(0.001, end - time.monotonic()))

    def _lost(self, why: str) -> dict[str, Any]:
        lines = [line.strip() for line in self._read().splitlines() if line.strip()]
        return {"error": why + (f"; it last said: {lines[-1][:200]}" if lines else ""), "lost": True}

    def _end(self) -> str:
        try:
            return f"its process ended with exit code {self._process.wait(timeout=10)}"
        except subprocess.TimeoutExpired:
            return "its process does not answer"

    def _read(self) -> str:
        try:
            self._printed.seek(0)
            return self._printed.read()
        except ValueError:  # closed meanwhile, by another thread
            return ""


def ask_once(
    arguments: Sequence[str],
    request: dict[str, Any],
    limit: float = 1800,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Ask one request of a child of its own; {"error": one line} where it fails, or does not end well afterwards."""
    start = time.monotonic()
    child = Child(*arguments, variables=variables)
    try:
        answer = child.ask(request, limit)
        if not answer.get("lost"):
            answer = child.finish(max(1.0, start + limit - time.monotonic())) or answer
    finally:
        child.close()
    answer.pop("lost", None)
    return answer


def serve(answer: Callable[[dict[str, Any], Tell], dict[str, Any]]) -> int:
    """Serve the other side of `Child`, until that is closed: what `answer(request, tell)` returns is the answer.

    `tell(name)` says what the request has come to. An exception is answered with {"error": one line}, and its traceback
    printed; after `Lost` the parent asks nothing more.
    """
    with socket.socket(fileno=os.dup(0)) as connection, connection.makefile("rb") as lines:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)  # the connection is not for what this process starts
        os.close(nothing)

        def say(what: dict[str, Any]) -> None:
            connection.sendall(json.dumps(what).encode() + b"\n")

        for line in lines:
            try:
                result = answer(json.loads(line), lambda name: say({"now": name}))
                json.dumps(result)
            except Lost as error:
                result = {"error": str(error), "lost": True}
            except Exception as error:
                result = failed(error)
            say(result)
    return 0


def failed(error: BaseException) -> dict[str, Any]:
    """Return the answer that an exception is, and print its traceback."""
    traceback.print_exception(error)
    return {"error": one_line(error)}


def one_line(error: BaseException) -> str:
    """Return the type of an exception and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


# -- any child of this Python


def python(*arguments: str) -> list[str]:
    """Return the command of a child; what lies in the current folder is no part of its path."""
    return [sys.executable, "-P", *arguments]


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment, with the folder that holds `fused_inr` ahead of PYTHONPATH.

    So a plain checkout that was never installed has children, too.
    """
    from .. import __file__ as package

    folder = str(Path(package).resolve().parents[1])
    paths = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), **more}


def end(process: subprocess.Popen, patience: float = 20.0) -> None:
    """End a child that leads a process group of its own: SIGINT, so that it can report, then the whole group."""
    if process.poll() is None:
        _signal(process, signal.SIGINT)
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            pass
    kill(process)


def kill(process: subprocess.Popen) -> None:
    """End a child that leads a process group of its own, and whatever else is in the group, at once."""
    _signal(process, signal.SIGKILL)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        pass  # a driver may hold a process whose kernel hangs: nobody waits for that


def _signal(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
