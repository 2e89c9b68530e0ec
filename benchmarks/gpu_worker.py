"""A process that measures, and may die or hang without harm to the rest.

A new kernel may read where it must not, which makes every later call of its process fail, or wait
for ever. So the work is done in a process that can be ended, and what was at work is known then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any


class Lost(Exception):
    """Nothing came back: whose turn it was, and why."""

    def __init__(self, at: str, reason: str) -> None:
        super().__init__(f"{at}: {reason}")
        self.at = at
        self.reason = reason


class Worker:
    """Runs functions that take a `tell` last, one after the other, in one process."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Any = None

    def call(self, limit: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of function(*arguments, tell), within so many seconds, or Lost."""
        if self._process is None:
            context = get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(theirs,))
            self._process.start()
            theirs.close()
        at, end = "start", time.monotonic() + limit
        try:
            self._connection.send((function, arguments))
            while self._connection.poll(max(0.0, end - time.monotonic())):
                kind, value = self._connection.recv()
                if kind == "at":
                    at = value
                elif kind == "result":
                    return value
                else:
                    self.close()
                    raise Lost(at, value)
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            raise Lost(at, f"its process died with exit code {code}") from None
        self.close()
        raise Lost(at, f"no result within {limit:.0f} s")

    def close(self) -> None:
        """End the process: by itself, as its connection closes, or else by force."""
        if self._process is not None:
            self._connection.close()
            self._process.join(5)
            self._process.kill()
            self._process.join()
            self._process = None


def serve(connection: Connection) -> None:
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            result = function(*arguments, lambda at: connection.send(("at", at)))
        except Exception as error:
            first_line = str(error).partition("\n")[0]
            connection.send(("error", f"{type(error).__name__}: {first_line}"))
            return
        connection.send(("result", result))
