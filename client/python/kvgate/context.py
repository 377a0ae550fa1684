"""Contexts that sequences of a tenant share, and the keys by which they are found."""

import ctypes
from dataclasses import dataclass
from typing import Any

from kvgate._library import KEY_SIZE, ContextInfoStruct
from kvgate.checks import whole


@dataclass(frozen=True)
class ContextInfo:
    """A published context: positions 0 to `tokens` - 1, in blocks of `bytes` bytes that are charged once.

    `attached` counts sequences. `existed`: `Sequence.publish()` found it published by another.
    """

    id: int
    bytes: int
    tokens: int
    attached: int
    existed: bool


def context_info(c: ContextInfoStruct) -> ContextInfo:
    """The same of a struct kvg_context_info."""
    return ContextInfo(int(c.id), int(c.bytes), int(c.tokens), int(c.attached), bool(c.existed))


def token_array(tokens: Any) -> "ctypes.Array[ctypes.c_uint32]":
    """Token ids, of a list or of an array or tensor of one dimension, as C has them."""
    numbers = tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
    return (ctypes.c_uint32 * len(numbers))(*[whole("token", number) for number in numbers])


def checked_key(key: bytes) -> bytes:
    """The key; TypeError or ValueError when it is not 32 bytes."""
    if not isinstance(key, (bytes, bytearray, memoryview)):
        raise TypeError(f"key is {key!r}, not bytes")
    key = bytes(key)
    if len(key) != KEY_SIZE:
        raise ValueError(f"key has {len(key)} bytes, not {KEY_SIZE}")
    return key
