"""libkvgate by ctypes: where it is found, its structs and the types of its calls (kvgate.h, kvgate_abi.h).

ctypes.CDLL releases the interpreter's lock for the time of each call.
"""

import ctypes
import errno
import functools
import os
from ctypes import (
    POINTER,
    c_char,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_size_t,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

from kvgate.errors import KvgateError

ABI_VERSION = 1
SONAME = "libkvgate.so.1"
BLOCK_TOKENS = 16
LAYOUT_BYTES = 192 + 8 * 96
KIND_HOST, KIND_CUDA = 1, 2
KEY_SIZE = 32


class GroupStruct(ctypes.Structure):
    """struct kvg_group."""

    _fields_ = [
        ("kind", c_uint32),
        ("layers", c_uint32),
        ("head_begin", c_uint32),
        ("head_count", c_uint32),
        ("head_total", c_uint32),
        ("rank", c_uint32),
        ("world", c_uint32),
        ("group_id", c_uint32),
        ("k_dim", c_uint32),
        ("v_dim", c_uint32),
        ("k_dtype", c_uint32),
        ("v_dtype", c_uint32),
        ("scale_kind", c_uint32),
        ("scale_offset", c_uint32),
        ("block_tokens", c_uint32),
        ("window", c_uint32),
        ("max_rollback", c_uint32),
        ("query_heads", c_uint32),
        ("reserved", c_uint32 * 6),
    ]


class LayoutStruct(ctypes.Structure):
    """struct kvg_layout."""

    _fields_ = [
        ("model", c_char * 128),
        ("hidden_dim", c_uint32),
        ("group_count", c_uint32),
        ("max_sequences", c_uint32),
        ("max_tokens", c_uint32),
        ("reserved", c_uint32 * 12),
        ("groups", GroupStruct * 8),
    ]


class PolicyStruct(ctypes.Structure):
    """struct kvg_policy."""

    _fields_ = [
        ("ratio", c_double),
        ("mode", c_uint8),
        ("level", c_uint8),
        ("flags", c_uint16),
        ("prefix_tokens", c_uint32),
        ("context_tokens", c_uint32),
        ("chunk_tokens", c_uint32),
        ("max_new_tokens", c_uint32),
        ("window", c_uint32),
        ("floor", c_uint32),
        ("threshold", c_float),
        ("budget", c_uint32),
        ("decode_first", c_uint32),
        ("decode_window", c_uint32),
        ("reserved", c_uint32 * 6),
    ]


class EvictResultStruct(ctypes.Structure):
    """struct kvg_evict_result."""

    _fields_ = [
        ("pairs_held", c_uint64),
        ("pairs_dropped", c_uint64),
        ("bytes", c_uint64),
        ("generation", c_uint32),
        ("reserved", c_uint32),
    ]


class SequenceInfoStruct(ctypes.Structure):
    """struct kvg_sequence_info."""

    _fields_ = [
        ("generation", c_uint32),
        ("fold_pos", c_uint32),
        ("committed_pos", c_uint32),
        ("reserved_pos", c_uint32),
        ("pairs", c_uint64),
        ("blocks", c_uint64),
        ("bytes", c_uint64),
    ]


class RecallResultStruct(ctypes.Structure):
    """struct kvg_recall_result."""

    _fields_ = [
        ("pairs_held", c_uint64),
        ("pairs_recalled", c_uint64),
        ("bytes", c_uint64),
        ("generation", c_uint32),
        ("reserved", c_uint32),
    ]


class ContextInfoStruct(ctypes.Structure):
    """struct kvg_context_info."""

    _fields_ = [
        ("id", c_uint64),
        ("bytes", c_uint64),
        ("tokens", c_uint32),
        ("attached", c_uint32),
        ("existed", c_uint32),
        ("reserved", c_uint32),
    ]


class SlotStruct(ctypes.Structure):
    """struct kvg_slot."""

    _fields_ = [
        ("epoch", c_uint32),
        ("generation", c_uint32),
        ("fold_pos", c_uint32),
        ("committed_pos", c_uint32),
        ("reserved_pos", c_uint32),
        ("flags", c_uint32),
        ("shared_pos", c_uint32),
        ("reserved", c_uint32 * 9),
    ]


class ViewStruct(ctypes.Structure):
    """struct kvg_view."""

    _fields_ = [
        ("k_base", c_void_p),
        ("v_base", c_void_p),
        ("stride", c_uint64),
        ("extent_size", c_uint64),
        ("slots", c_void_p),
        ("base_len", c_void_p),
        ("ids", c_void_p),
        ("appended", c_void_p),
        ("layers", c_uint32),
        ("heads", c_uint32),
        ("max_sequences", c_uint32),
        ("row_cap", c_uint32),
    ]


_CLIENT = c_void_p
_ROWS = [_CLIENT, c_uint64, c_uint32, c_uint32, c_uint32]

# name: (result, arguments). A result of c_int is a negative errno or a count.
_CALLS: dict[str, tuple[Any, list[Any]]] = {
    "kvg_abi_version": (c_uint32, []),
    "kvg_connect": (c_int, [c_char_p, c_char_p, POINTER(c_void_p), c_char_p, c_size_t]),
    "kvg_close": (c_void_p, [_CLIENT]),
    "kvg_abandon": (c_void_p, [_CLIENT]),
    "kvg_error": (c_char_p, [_CLIENT]),
    "kvg_tenant": (c_char_p, [_CLIENT]),
    "kvg_kind": (c_int, [_CLIENT]),
    "kvg_fd": (c_int, [_CLIENT]),
    "kvg_set_spin": (None, [_CLIENT, c_uint32]),
    "kvg_register": (c_int, [_CLIENT, POINTER(LayoutStruct), c_uint64]),
    "kvg_load_gate": (c_int, [_CLIENT, c_char_p]),
    "kvg_create": (c_int, [_CLIENT, POINTER(PolicyStruct), POINTER(c_uint64)]),
    "kvg_reserve": (c_int, [_CLIENT, c_uint64, c_uint32]),
    "kvg_commit": (c_int, [_CLIENT, c_uint64, c_uint32]),
    "kvg_stage_hidden": (c_int, [*_ROWS, c_void_p]),
    "kvg_stage_scores": (c_int, [*_ROWS, c_void_p]),
    "kvg_stage_wait": (c_int, [_CLIENT]),
    "kvg_evict": (c_int, [_CLIENT, c_uint64, c_uint32, POINTER(EvictResultStruct)]),
    "kvg_evict_async": (c_int, [_CLIENT, c_uint64, c_uint32]),
    "kvg_evict_finish": (c_int, [_CLIENT, c_uint64, POINTER(EvictResultStruct)]),
    "kvg_reserve_async": (c_int, [_CLIENT, c_uint64, c_uint32]),
    "kvg_reserve_finish": (c_int, [_CLIENT, c_uint64]),
    "kvg_truncate": (c_int, [_CLIENT, c_uint64, c_uint32]),
    "kvg_protect": (c_int, [_CLIENT, c_uint64, c_uint32, c_uint32]),
    "kvg_free": (c_int, [_CLIENT, c_uint64]),
    "kvg_query": (c_int, [_CLIENT, c_uint64, POINTER(SequenceInfoStruct)]),
    "kvg_offload": (c_int, [_CLIENT, c_uint64, POINTER(c_uint64)]),
    "kvg_restore": (c_int, [_CLIENT, c_uint64]),
    "kvg_idle": (c_int, [_CLIENT, c_uint64]),
    "kvg_recall": (c_int, [_CLIENT, c_uint64, c_double, POINTER(RecallResultStruct)]),
    "kvg_recall_budget": (c_int, [_CLIENT, c_uint64, c_uint32, POINTER(RecallResultStruct)]),
    "kvg_publish": (c_int, [_CLIENT, c_uint64, c_char_p, POINTER(ContextInfoStruct)]),
    "kvg_find": (c_int, [_CLIENT, c_char_p, POINTER(ContextInfoStruct)]),
    "kvg_find_longest": (c_int, [_CLIENT, c_char_p, c_uint32, POINTER(c_uint32), POINTER(ContextInfoStruct)]),
    "kvg_attach": (
        c_int,
        [_CLIENT, c_char_p, POINTER(PolicyStruct), POINTER(c_uint64), POINTER(ContextInfoStruct)],
    ),
    "kvg_fork": (c_int, [_CLIENT, c_uint64, c_uint32, POINTER(c_uint64)]),
    "kvg_context_keys": (c_int, [_CLIENT, POINTER(PolicyStruct), c_void_p, c_uint32, c_uint32, c_char_p]),
    "kvg_pressure": (c_uint32, [_CLIENT]),
    "kvg_nop": (c_int, [_CLIENT]),
    "kvg_process": (c_int, [_CLIENT]),
    "kvg_mapped_bytes": (c_uint64, [_CLIENT]),
    "kvg_arena_bytes": (c_uint64, [_CLIENT]),
    "kvg_return_memory": (c_int, [_CLIENT]),
    "kvg_view": (c_int, [_CLIENT, POINTER(ViewStruct)]),
    "kvg_append": (c_int, [*_ROWS, c_uint32, c_void_p, c_size_t, c_void_p, c_size_t]),
    "kvg_attend": (c_int, [*_ROWS, c_uint32, c_float, c_void_p, c_size_t, c_void_p, c_size_t]),
    "kvg_set_stream": (c_int, [_CLIENT, c_void_p]),
    "kvg_stream_wait": (c_int, [_CLIENT, c_uint64]),
    "kvg_stage_device": (
        c_int,
        [_CLIENT, c_uint64, c_uint32, c_uint32, c_uint32, c_uint32, c_uint32, c_void_p, c_uint64],
    ),
    "kvg_stage_device_buffer": (c_void_p, [_CLIENT, c_uint64]),
    "kvg_import_buffer": (c_int, [_CLIENT, c_void_p, c_uint64, POINTER(c_uint32)]),
    "kvg_import_event": (c_int, [_CLIENT, c_void_p, POINTER(c_uint32)]),
    "kvg_release": (c_int, [_CLIENT, c_uint32]),
    "kvg_cuda_append": (
        c_int,
        [_CLIENT, c_uint32, c_uint32, c_void_p, c_void_p, c_void_p, c_uint64, c_void_p, c_uint64],
    ),
    "kvg_cuda_advance": (c_int, [_CLIENT, c_void_p, c_uint32, c_uint32]),
    "kvg_cuda_plan": (c_int, [_CLIENT, c_uint32, c_uint32, c_uint32, c_void_p, c_uint32]),
    "kvg_cuda_attend": (c_int, [_CLIENT, c_uint32, c_float, c_void_p, c_uint64, c_void_p, c_uint64]),
    "kvg_cuda_export_table": (c_int, [_CLIENT, c_uint32, c_uint32, c_void_p, c_uint32, c_void_p, c_uint32, c_void_p]),
    "kvg_cuda_export_csr": (c_int, [_CLIENT, c_uint32, c_uint32, c_void_p, c_uint32, c_void_p, c_void_p, c_void_p]),
}


def _candidates() -> list[str]:
    """Names to load, in order. The one of the environment stands alone."""
    named = os.environ.get("KVGATE_LIBRARY")
    if named:
        return [named]
    checkout = Path(__file__).resolve().parents[3] / "build" / "lib" / SONAME
    return [SONAME, *([str(checkout)] if checkout.exists() else [])]


def _open() -> tuple[ctypes.CDLL, str]:
    tried = []
    for name in _candidates():
        try:
            return ctypes.CDLL(name), name
        except OSError as error:
            tried.append(str(error))
    how = "install kvgate or build it (tools/build build -DKVG_TESTS=OFF), and name the library in KVGATE_LIBRARY"
    raise KvgateError(errno.ENOENT, f"no {SONAME}: {'; '.join(tried)}: {how}")


def _declare(lib: ctypes.CDLL, path: str) -> None:
    for name, (result, arguments) in _CALLS.items():
        try:
            call = getattr(lib, name)
        except AttributeError:
            raise KvgateError(errno.ENOSYS, f"library {path} has no {name}(): it is older than this package") from None
        call.restype = result
        call.argtypes = arguments


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded once. KvgateError says what was tried, or which version was found."""
    lib, path = _open()
    _declare(lib, path)
    version = lib.kvg_abi_version()
    if version != ABI_VERSION:
        raise KvgateError(errno.EPROTO, f"library {path} speaks version {version}, this package {ABI_VERSION}")
    return lib
