"""Where the KV and its tables lie, as arrays without a copy."""

import ctypes
import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvgate._library import BLOCK_TOKENS, ViewStruct
from kvgate.arrays import Array
from kvgate.errors import KvgateError
from kvgate.layout import Layout

if TYPE_CHECKING:
    from kvgate.client import Client

_POINTER_DEVICE_ORDINAL = 9  # CUpointer_attribute


@dataclass(frozen=True)
class View:
    """Where a client's KV lies. The addresses stay until `Client.close()`; on the cuda kind all are on the device.

    `k_blocks` and `v_blocks` are [ids][16][dim] of the layout's dtype, blocks `stride` bytes apart. They span the whole
    range of addresses, most of which is not mapped: only blocks that a row names may be touched.
    Row (layer, slot, head) has base_len + appended[slot] pairs; pair i lies in block ids[...][i // 16], place i % 16.

    `base_len` int32 [layers][max_sequences][heads] and `ids` int32 [layers][max_sequences][heads][row_cap] are the
    daemon's and mapped read-only. `appended` int32 [max_sequences] counts what was committed since the last eviction.
    """

    k_blocks: Array
    v_blocks: Array
    base_len: Array
    ids: Array
    appended: Array
    stride: int
    extent_size: int
    row_cap: int


def _cuda_ordinal(address: int) -> int:
    """This process's number of the GPU that an address belongs to."""
    driver = ctypes.CDLL("libcuda.so.1")
    ordinal = ctypes.c_int(-1)
    driver.cuPointerGetAttribute.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64]
    status = driver.cuPointerGetAttribute(ctypes.byref(ordinal), _POINTER_DEVICE_ORDINAL, address)
    if status != 0 or ordinal.value < 0:
        raise KvgateError(errno.EIO, f"device address {address:#x}: cuPointerGetAttribute says {status}")
    return ordinal.value


def _packed(shape: tuple[int, ...], address: int, device: str, writable: bool, owner: object) -> Array:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return Array(shape, tuple(reversed(strides)), "i32", address, device, writable, owner)


def view_of(client: "Client", layout: Layout, c: ViewStruct, arena_bytes: int) -> View:
    """The View of what kvg_view() said."""
    device = f"cuda:{_cuda_ordinal(c.appended)}" if client.kind == "cuda" else "cpu"
    step = c.stride // layout.element_bytes
    count = (arena_bytes - c.extent_size // 2) // c.stride
    rows = (c.layers, c.max_sequences, c.heads)

    def blocks(address: int, dim: int) -> Array:
        return Array((count, BLOCK_TOKENS, dim), (step, dim, 1), layout.dtype, address, device, True, client)

    return View(
        k_blocks=blocks(c.k_base, layout.k_dim),
        v_blocks=blocks(c.v_base, layout.v_dim),
        base_len=_packed(rows, c.base_len, device, False, client),
        ids=_packed((*rows, c.row_cap), c.ids, device, False, client),
        appended=_packed((c.max_sequences,), c.appended, device, True, client),
        stride=c.stride,
        extent_size=c.extent_size,
        row_cap=c.row_cap,
    )
