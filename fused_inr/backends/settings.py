"""Settings of this process, and of blocks within one thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


class Setting:
    """What blocks ask for, each for its own thread (or asyncio task), and the process where no block does.

    Dynamo traces no ContextVar and its guards see no thread: what is compiled goes by `compiled`, which is what the
    block that was entered last, in any thread, asks for.
    """

    def __init__(self, name: str):
        self._block: ContextVar[tuple[str | None] | None] = ContextVar(f"fused_inr.backends.{name}", default=None)
        self._process: str | None = None
        self._blocks: list[tuple[object, str | None]] = []  # that some thread is in, the last one last
        self._lock = threading.Lock()
        self.compiled: str | None = None

    def _tell_compiled(self) -> None:
        self.compiled = self._blocks[-1][1] if self._blocks else self._process

    def set(self, value: str | None) -> str | None:
        """The process's value from now on; returns the former one."""
        with self._lock:
            former, self._process = self._process, value
            self._tell_compiled()
        return former

    @contextmanager
    def block(self, value: str | None) -> Iterator[None]:
        """Asks for a value within a block."""
        entry = (object(), value)  # its own, though another thread may ask for the same
        token = self._block.set((value,))
        with self._lock:
            self._blocks.append(entry)
            self._tell_compiled()
        try:
            yield
        finally:
            with self._lock:
                self._blocks.remove(entry)
                self._tell_compiled()
            self._block.reset(token)

    def get(self) -> str | None:
        """The value that holds here and now."""
        if torch.compiler.is_compiling():
            return self.compiled
        block = self._block.get()
        return self._process if block is None else block[0]
