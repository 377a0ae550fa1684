"""What goes wrong: each error carries the errno and, as its text, what the library or the daemon says."""

import errno
import os


class KvgateError(OSError):
    """A call failed. `errno` is positive; `strerror` names the object, the value and the limit."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(number, text)

    def __str__(self) -> str:
        return str(self.strerror)


class NotRunningError(KvgateError):
    """No daemon listens on the socket (ENOENT, ECONNREFUSED)."""


class RefusedError(KvgateError):
    """The daemon refuses memory: the tenant's budget or the pool is too small (ENOSPC). The text has the bytes."""


class ConnectionLostError(KvgateError):
    """The connection to the daemon is gone, and so is the KV (EPIPE)."""


class StaleError(KvgateError):
    """The entry names a generation of the sequence that an eviction has ended (ESTALE)."""


_CLASSES: dict[int, type[KvgateError]] = {
    errno.ENOSPC: RefusedError,
    errno.EPIPE: ConnectionLostError,
    errno.ESTALE: StaleError,
}


def error_of(status: int, text: str) -> KvgateError:
    """The exception of a negative errno and its text (empty: the errno's own)."""
    return _CLASSES.get(-status, KvgateError)(-status, text or os.strerror(-status))


def not_running(path: str, status: int, text: str) -> NotRunningError:
    """The exception of a connect() that found no daemon."""
    how = "start it with `kvgated --config FILE` or `systemctl start kvgated`, and check the tenant's socket"
    return NotRunningError(-status, f"no kvgated at {path}: {how} ({text})")
