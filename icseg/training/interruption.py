"""A request to stop that lets the step at hand end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def stop_request() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second acts as usual. Main thread only."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    usual: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, usual[number])

    for number in usual:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, previous in usual.items():
            signal.signal(number, previous)
