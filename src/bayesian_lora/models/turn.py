"""Whose turn it is at a model that several threads share."""

import threading


class Turn:
    """A thread's turn at a model; copies and pickles have one of their own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type["Turn"], tuple[()]]:
        return Turn, ()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
