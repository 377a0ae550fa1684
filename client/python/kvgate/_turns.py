"""Who may be in the library: one caller of any call, or any number of readers and writers of KV (append, attend)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """`with turns:` is alone; `with turns.shared():` is among its like. Not recursive."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._idle = threading.Condition(self.lock)
        self._sharers = 0

    @property
    def busy(self) -> bool:
        """Whether someone is inside: for code that may run inside itself, such as a finalizer."""
        return self.lock.locked() or self._sharers > 0

    def __enter__(self) -> None:
        self.lock.acquire()
        try:
            while self._sharers:
                self._idle.wait()
        except BaseException:
            self.lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Keeps those out who must be alone."""
        with self.lock:
            self._sharers += 1
        try:
            yield
        finally:
            with self.lock:
                self._sharers -= 1
                if not self._sharers:
                    self._idle.notify_all()
