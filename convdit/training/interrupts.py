"""Ctrl-C and SIGTERM end a training run after the step in progress, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any


class Interrupted(Exception):
    """The run was asked to stop, and its checkpoint is written. ``status``: exit status to use."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class StopSignals:
    """``with StopSignals() as stop:`` makes ``stop.received`` the number of the first signal, or 0.

    A second signal acts as it would have without this.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}  # what signal.signal returns

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: object) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()
