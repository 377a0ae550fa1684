"""One sequence's KV: its memory, scores and evictions."""

import ctypes
import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from kvgate._library import (
    BLOCK_TOKENS,
    ContextInfoStruct,
    EvictResultStruct,
    RecallResultStruct,
    SequenceInfoStruct,
    SlotStruct,
)
from kvgate.arrays import packed_rows, strided_rows
from kvgate.checks import choice, whole
from kvgate.context import ContextInfo, checked_key, context_info
from kvgate.errors import KvgateError, error_of
from kvgate.policy import Policy

if TYPE_CHECKING:
    import numpy

    from kvgate.client import Client

    Int32s = numpy.ndarray[Any, numpy.dtype[numpy.int32]]
    Float32s = numpy.ndarray[Any, numpy.dtype[numpy.float32]]

EVICT_MODES = {"prefill": 0, "decode": 1}
_OFFLOADED, _IDLE = 1, 2  # KVG_SLOT_*
STAGE_KINDS = {"hidden": 1, "preact": 2, "score": 3}


@dataclass(frozen=True)
class EvictResult:
    """What an eviction left: (token, head, layer) pairs held and dropped, bytes of the sequence's blocks."""

    pairs_held: int
    pairs_dropped: int
    bytes: int
    generation: int


@dataclass(frozen=True)
class RecallResult:
    """What a recall left: pairs held and brought back, bytes of the sequence's blocks."""

    pairs_held: int
    pairs_recalled: int
    bytes: int
    generation: int


@dataclass(frozen=True)
class SequenceInfo:
    """What the daemon says of a sequence. Positions count tokens; tokens below `fold_pos` went through an eviction."""

    generation: int
    fold_pos: int
    committed_pos: int
    reserved_pos: int
    pairs: int
    blocks: int
    bytes: int


class SlotState(NamedTuple):
    """What shared memory says of a sequence, as of its last completion."""

    generation: int
    fold_pos: int
    committed_pos: int
    reserved_pos: int


@dataclass(frozen=True)
class Residency:
    """Where a sequence is. Tokens below `shared_pos` belong to a context that it is attached to."""

    offloaded: bool
    idle: bool
    shared_pos: int


def address_of(value: Any) -> int | None:
    """A device address: an int, None, or what has data_ptr(), as torch tensors do."""
    if value is None or isinstance(value, int):
        return value
    address: int = value.data_ptr()
    return address


class Sequence:
    """A sequence of a Client's, made by `Client.create()`.

    It lives until `free()`, the end of a `with` block, or the Client's `close()`; dropping the object alone keeps its
    memory. Freeing it twice is harmless; any other use after that raises KvgateError. No thread may read or write its
    KV in place, by `View` or kernels of its own, while it is evicted, recalled, published, forked, offloaded or freed.
    """

    def __init__(self, client: "Client", handle: int, policy: Policy) -> None:
        """For `Client.create()`."""
        self.handle = handle
        self.slot = handle & 0xFFFFFFFF
        self.policy = policy
        self._client = client
        self._freed = False
        self._unfinished: list[str] = []

    def __repr__(self) -> str:
        return f"<kvgate.Sequence {self.handle:#x}{' (freed)' if self._freed else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def _check(self) -> None:
        if self._freed:
            self._client._live()
            raise KvgateError(errno.ENOENT, f"sequence {self.handle:#x}: it is freed")

    def _call(self, name: str, *arguments: Any) -> None:
        self._check()
        self._client._call(name, self.handle, *arguments)

    # ---- memory ----

    def reserve(self, tokens: int) -> None:
        """Room for `tokens` tokens beyond the committed ones. RefusedError names tenant, budget, use and need."""
        self._call("kvg_reserve", whole("tokens", tokens))

    def reserve_async(self, tokens: int) -> None:
        """`reserve()` without waiting, also right behind `evict_async()`; `reserve_finish()` takes the result."""
        self._call("kvg_reserve_async", whole("tokens", tokens))
        self._unfinished.append("kvg_reserve_finish")

    def reserve_finish(self) -> None:
        """Waits for `reserve_async()`; kernels that append are launched after that."""
        self._finish("kvg_reserve_finish")

    def commit(self, tokens: int) -> None:
        """The next `tokens` tokens are written in every row."""
        self._call("kvg_commit", whole("tokens", tokens))

    def truncate(self, pos: int) -> None:
        """Forgets tokens from position `pos` on; not before the last eviction's. Their room stays reserved."""
        self._call("kvg_truncate", whole("pos", pos))

    def protect(self, begin: int, end: int) -> None:
        """Positions [begin, end) are never evicted."""
        self._call("kvg_protect", whole("begin", begin), whole("end", end))

    def free(self) -> None:
        """Frees the sequence; its memory is back in the pool on return. Harmless when it is gone already."""
        if self._freed or self._client.closed:
            self._freed = True
            return
        for name in list(self._unfinished):
            with suppress(KvgateError):  # its result is not wanted any more
                self._finish(name)
        try:
            self._call("kvg_free")
        except KvgateError:
            if not self._client._lost():  # then the memory went with the connection
                raise
        self._forget()

    def _forget(self) -> None:
        self._freed = True
        self._client._forget(self)

    # ---- scores ----

    def stage_hidden(self, layer: int, pos: int, hidden: Any) -> None:
        """Scores positions from `pos` on of one layer, from hidden states after the input RMSNorm.

        hidden: bf16 [rows][hidden_dim], a torch tensor on the CPU or a numpy array of uint16, contiguous. Copied before
        this returns and scored in the background; `Client.stage_wait()` or an eviction reports errors.
        """
        address, rows = packed_rows("hidden", hidden, "bf16", self._client._registered().hidden_dim)
        self._call("kvg_stage_hidden", whole("layer", layer), whole("pos", pos), whole("rows", rows), address)

    def stage_scores(self, layer: int, pos: int, scores: Any) -> None:
        """The same with the scores themselves: float32 [rows][heads]."""
        address, rows = packed_rows("scores", scores, "f32", self._client._registered().heads)
        self._call("kvg_stage_scores", whole("layer", layer), whole("pos", pos), whole("rows", rows), address)

    def stage_device(
        self,
        kind: str,
        layer_begin: int,
        layer_count: int,
        pos: int,
        rows: int,
        pointer: Any,
        layer_stride: int = 0,
    ) -> None:
        """Scores rows in device memory, in place and in the stream's order (cuda kind).

        kind: "hidden" bf16 [layer_count][rows][hidden_dim], "preact" bf16 products of the gate's matrices, "score"
        float32 [layer_count][rows][heads]; layers are `layer_stride` bytes apart (0: they follow each other).
        `pointer` lies in the device staging area or an imported buffer.
        """
        self._call(
            "kvg_stage_device",
            choice("kind", kind, STAGE_KINDS),
            whole("layer_begin", layer_begin),
            whole("layer_count", layer_count),
            whole("pos", pos),
            whole("rows", rows),
            address_of(pointer),
            whole("layer_stride", layer_stride, 0, 0xFFFFFFFFFFFFFFFF),
        )

    # ---- eviction ----

    def evict(self, mode: str = "prefill") -> EvictResult:
        """Evicts by the policy, "prefill" or "decode". What was reserved and not committed goes back, too."""
        result = EvictResultStruct()
        self._call("kvg_evict", choice("mode", mode, EVICT_MODES), ctypes.byref(result))
        return _evict_result(result)

    def evict_async(self, mode: str = "prefill") -> None:
        """`evict()` without waiting; until `evict_finish()` only `reserve_async()` is taken for this sequence."""
        self._call("kvg_evict_async", choice("mode", mode, EVICT_MODES))
        self._unfinished.append("kvg_evict_finish")

    def evict_finish(self) -> EvictResult:
        """Waits for `evict_async()` and takes its result."""
        result = EvictResultStruct()
        self._finish("kvg_evict_finish", ctypes.byref(result))
        return _evict_result(result)

    def recall(self, ratio: float | None = None, budget: int | None = None) -> RecallResult:
        """Brings pairs back that evictions dropped and the host kept (`Policy.retain`), best first; nothing held goes.

        Until the sequence holds what evictions at that `ratio`, (0, 1], would have left it, or `budget` tokens per
        head on average. Everything committed is folded, as by an eviction.
        """
        result = RecallResultStruct()
        if (ratio is None) == (budget is None):
            raise ValueError(f"recall: one of ratio and budget is needed, not ratio={ratio} and budget={budget}")
        if budget is not None:
            self._call("kvg_recall_budget", whole("budget", budget), ctypes.byref(result))
        else:
            self._call("kvg_recall", ratio, ctypes.byref(result))
        return RecallResult(
            int(result.pairs_held), int(result.pairs_recalled), int(result.bytes), int(result.generation)
        )

    # ---- the host's memory ----

    def offload(self) -> int:
        """Sends the sequence's blocks to the host; bytes that they take there. Device memory is back in the pool.

        `restore()` or `reserve()` brings them back, bit for bit; until then it cannot be read or written.
        """
        bytes_there = ctypes.c_uint64()
        self._call("kvg_offload", ctypes.byref(bytes_there))
        return int(bytes_there.value)

    def restore(self) -> None:
        """Brings it back, or ends its idleness. RefusedError: there is no room; it stays where it is."""
        self._call("kvg_restore")

    def idle(self) -> None:
        """Releases it until `restore()` or `reserve()`: the daemon may send it to the host when memory is short."""
        self._call("kvg_idle")

    # ---- sharing ----

    def publish(self, key: bytes) -> ContextInfo:
        """Seals what the sequence holds as a context that others of the tenant find by `key` (32 bytes).

        The sequence goes on as one that is attached to it. KvgateError with EEXIST: the key is another context's.
        """
        info = ContextInfoStruct()
        self._call("kvg_publish", checked_key(key), ctypes.byref(info))
        return context_info(info)

    def fork(self, n: int = 1) -> "list[Sequence]":
        """`n` copies, all or none, at the committed position: they share all full blocks, and evict none of them."""
        count = whole("n", n)
        handles = (ctypes.c_uint64 * max(count, 1))()
        self._call("kvg_fork", count, handles)
        return [self._client._made(handle, self.policy) for handle in handles]

    def _finish(self, name: str, *arguments: Any) -> None:
        if name == "kvg_evict_finish" and not arguments:
            arguments = (None,)
        try:
            self._call(name, *arguments)
        finally:
            if name in self._unfinished:
                self._unfinished.remove(name)

    def stream_wait(self) -> None:
        """The client's stream waits for everything submitted for the sequence so far (cuda kind)."""
        self._call("kvg_stream_wait")

    # ---- state ----

    def query(self) -> SequenceInfo:
        """What the daemon says of the sequence, in one round trip."""
        c = SequenceInfoStruct()
        self._call("kvg_query", ctypes.byref(c))
        return SequenceInfo(
            c.generation, c.fold_pos, c.committed_pos, c.reserved_pos, int(c.pairs), int(c.blocks), int(c.bytes)
        )

    def state(self) -> SlotState:
        """The same positions from shared memory, without a call."""
        self._check()
        slots = self._client._registered_view().slots
        slot = SlotStruct.from_address(slots + self.slot * ctypes.sizeof(SlotStruct))
        return SlotState(slot.generation, slot.fold_pos, slot.committed_pos, slot.reserved_pos)

    def residency(self) -> Residency:
        """Where the sequence is and what of it is shared, from shared memory, without a call."""
        self._check()
        slots = self._client._registered_view().slots
        slot = SlotStruct.from_address(slots + self.slot * ctypes.sizeof(SlotStruct))
        return Residency(bool(slot.flags & _OFFLOADED), bool(slot.flags & _IDLE), slot.shared_pos)

    # ---- KV in place, on the host kind ----

    def append(self, layer: int, head: int, pos: int, k: Any, v: Any) -> None:
        """Writes K and V of one KV head from position `pos` on; they are reserved and not folded by an eviction.

        k: float32 [count][k_dim], v: float32 [count][v_dim], of any row stride; converted to the layout's dtype.
        Any number of threads may append and attend at once.
        """
        layout = self._client._registered()
        k_address, count, k_stride = strided_rows("k", k, "f32", (layout.k_dim,))
        v_address, v_count, v_stride = strided_rows("v", v, "f32", (layout.v_dim,))
        if count != v_count:
            raise ValueError(f"k has {count} rows, v {v_count}")
        self._in_place("kvg_append", layer, head, pos, count, k_address, k_stride, v_address, v_stride)

    def attend(self, layer: int, head: int, pos: int, count: int, scale: float, q: Any) -> "Float32s":
        """Attention of the tokens at positions pos .. pos + count - 1, for one KV head, over all pairs up to each.

        q: float32 [count][query_heads][k_dim], of any token stride. Returns float32 [count][query_heads][v_dim].
        """
        import numpy

        layout = self._client._registered()
        address, rows, stride = strided_rows("q", q, "f32", (layout.query_heads, layout.k_dim))
        if rows != count:
            raise ValueError(f"q has {rows} rows, count is {count}")
        out = numpy.empty((count, layout.query_heads, layout.v_dim), numpy.float32)
        out_stride = layout.query_heads * layout.v_dim
        self._in_place("kvg_attend", layer, head, pos, count, scale, address, stride, out.ctypes.data, out_stride)
        return out

    def _in_place(self, name: str, layer: int, head: int, pos: int, count: int, *arguments: Any) -> None:
        numbers = [whole("layer", layer), whole("head", head), whole("pos", pos), whole("count", count)]
        self._check()
        with self._client._turns.shared():
            function = getattr(self._client._lib, name)
            status = function(self._client._live(), self.handle, *numbers, *arguments)
        if status < 0:
            raise self._in_place_error(name, status, layer, head, pos, count)

    def _in_place_error(self, name: str, status: int, layer: int, head: int, pos: int, count: int) -> KvgateError:
        """These calls say their errno only."""
        layout, state = self._client._registered(), self.state()
        what = f"{name}: sequence {self.slot}, layer {layer} of {layout.layers}, head {head} of {layout.heads}, "
        what += f"positions {pos} to {pos + count} of {state.fold_pos} to {state.reserved_pos}"
        if status == -errno.EOPNOTSUPP:
            return error_of(status, f"{name}: the memory of client {self._client.name} is of the kind cuda")
        return error_of(status, f"{what}: {os.strerror(-status)}")

    def _tables(self, what: str) -> "tuple[Int32s, Int32s]":
        """This sequence's lengths [layers][heads] (a copy) and ids [layers][heads][row_cap] (the daemon's)."""
        self._check()
        if self._client.kind != "host":
            text = f"{what}: the memory of client {self._client.name} is of the kind cuda: use Client.cuda_export_*()"
            raise KvgateError(errno.EOPNOTSUPP, text)
        view = self._client.view()
        lengths = view.base_len.numpy()[:, self.slot] + view.appended.numpy()[self.slot]
        return lengths, view.ids.numpy()[:, self.slot]

    def _layer(self, layer: int) -> int:
        return whole("layer", layer, 0, self._client._registered().layers - 1)

    def row_length(self, layer: int, head: int) -> int:
        """Pairs of a row: what the last eviction left, and what was committed since (host kind)."""
        lengths, _ = self._tables("row_length")
        return int(lengths[self._layer(layer), whole("head", head, 0, self._client._registered().heads - 1)])

    def row(self, layer: int, head: int) -> "Int32s":
        """Ids of a row's blocks, a copy (host kind): pair i is in block row[i // 16], place i % 16."""
        blocks = -(-self.row_length(layer, head) // BLOCK_TOKENS)
        return self._tables("row")[1][layer, head, :blocks].copy()

    def block_table(self, layer: int) -> "tuple[Int32s, Int32s]":
        """Block table of one layer for paged kernels, a request for each KV head (host kind), as copies.

        ids int32 [heads][cap], padded with 0, and lengths int32 [heads] in tokens; cap is the longest row's.
        """
        import numpy

        lengths, ids = self._tables("block_table")
        mine = lengths[self._layer(layer)]
        blocks = -(-mine // BLOCK_TOKENS)
        cap = int(blocks.max())
        table = numpy.where(numpy.arange(cap) < blocks[:, None], ids[layer, :, :cap], 0).astype(numpy.int32)
        return table, mine

    def csr(self, layer: int) -> "tuple[Int32s, Int32s, Int32s]":
        """The same as CSR with pages of 16 tokens, as copies.

        indptr int32 [heads + 1], indices int32, last_page_len int32 [heads], which is 0 for an empty row.
        """
        import numpy

        lengths, ids = self._tables("csr")
        mine = lengths[self._layer(layer)]
        blocks = -(-mine // BLOCK_TOKENS)
        indptr = numpy.zeros(len(mine) + 1, numpy.int32)
        numpy.cumsum(blocks, out=indptr[1:])
        indices = ids[layer][numpy.arange(ids.shape[2]) < blocks[:, None]]
        last = numpy.where(mine > 0, (mine - 1) % BLOCK_TOKENS + 1, 0).astype(numpy.int32)
        return indptr, indices, last


def _evict_result(c: EvictResultStruct) -> EvictResult:
    return EvictResult(int(c.pairs_held), int(c.pairs_dropped), int(c.bytes), int(c.generation))
