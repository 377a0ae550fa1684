"""The connection of one worker to kvgated."""

import ctypes
import errno
import os
import weakref
from typing import Any, Self

from kvgate._library import KEY_SIZE, KIND_CUDA, ContextInfoStruct, ViewStruct, library
from kvgate._turns import Turns
from kvgate.checks import U64_MAX, whole
from kvgate.context import ContextInfo, checked_key, context_info, token_array
from kvgate.errors import KvgateError, error_of, not_running
from kvgate.layout import Layout
from kvgate.policy import Policy
from kvgate.sequence import Sequence, address_of
from kvgate.view import View, view_of

_TEXT_BYTES = 512
_NUMBERS = 0xFFFFFFFF


def _c_string(name: str, value: bytes) -> bytes:
    if b"\0" in value:
        raise ValueError(f"{name} {value!r} has a NUL")
    return value


class Client:
    """One worker's connection to its tenant's socket.

    Threads may share it: calls take turns, and `Sequence.append()` and `attend()` run side by side. Calls release the
    interpreter's lock. A child made by fork() cannot use it and holds nothing of it; the parent goes on.
    All sequences and arrays end with `close()` or the `with` block.
    """

    def __init__(self, socket: str | os.PathLike[str], name: str = "python") -> None:
        """Connects. `name` appears in the daemon's reports. NotRunningError when no daemon listens on `socket`."""
        self.name = name
        self.layout: Layout | None = None
        self._handle: int | None = None
        self._gone = f"client {name}: it is closed"
        self._process = os.getpid()
        self._turns = Turns()
        self._view: ViewStruct | None = None
        self._sequences: dict[int, Sequence] = {}
        self._stream: Any = None
        self._lib = library()
        self._handle = self._connect(os.fspath(socket), name)
        try:
            _clients.add(self)
            self.tenant: str = self._lib.kvg_tenant(self._handle).decode(errors="replace")
            self.kind: str = "cuda" if self._lib.kvg_kind(self._handle) == KIND_CUDA else "host"
        except BaseException:
            self.close()
            raise

    def _connect(self, path: str, name: str) -> int:
        socket_path = _c_string("socket", os.fsencode(path))
        handle, text = ctypes.c_void_p(), ctypes.create_string_buffer(_TEXT_BYTES)
        status = self._lib.kvg_connect(
            socket_path, _c_string("name", name.encode()), ctypes.byref(handle), text, len(text)
        )
        if status < 0:
            why = text.value.decode(errors="replace")
            absent = status in (-errno.ENOENT, -errno.ECONNREFUSED) and text.value.startswith(b"socket " + socket_path)
            raise not_running(path, status, why) if absent else error_of(status, why)
        assert handle.value is not None
        return handle.value

    def __repr__(self) -> str:
        return f"<kvgate.Client {self.name}{' (closed)' if self.closed else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    # ---- the way into the library ----

    def _live(self) -> int:
        """The library's client. KvgateError after close() or in a forked child."""
        if self._handle is None:
            raise KvgateError(errno.EBADF, self._gone)
        return self._handle

    def _failure(self, status: int) -> KvgateError:
        """What the last failed call said; within its turn."""
        return error_of(status, self._lib.kvg_error(self._handle).decode(errors="replace"))

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._lib, name)
        with self._turns:
            status = function(self._live(), *arguments)
            if status < 0:
                raise self._failure(status)

    def _registered(self) -> Layout:
        self._live()
        if self.layout is None:
            raise KvgateError(errno.EINVAL, f"client {self.name}: no layout is registered")
        return self.layout

    def _registered_view(self) -> ViewStruct:
        self._registered()
        assert self._view is not None
        return self._view

    def _lost(self) -> bool:
        """Whether the connection has ended, for whatever reason."""
        with self._turns:
            return self._handle is None or self._lib.kvg_process(self._handle) < 0

    def _forget(self, sequence: Sequence) -> None:
        self._sequences.pop(sequence.handle, None)

    def _abandon(self) -> None:
        """In a forked child: lets go of everything without a word to the daemon."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        self._gone = f"client {self.name} belongs to process {self._process}: a forked child cannot use it"
        self._turns = Turns()  # a thread that this process does not have may be in the old ones
        self._lib.kvg_abandon(handle)

    # ---- the connection ----

    @property
    def closed(self) -> bool:
        """Whether it was closed, or belongs to the process that forked this one."""
        return self._handle is None

    @property
    def busy(self) -> bool:
        """Whether a call is under way, perhaps this thread's own: a finalizer that finds it busy must not call."""
        return self._turns.busy

    @property
    def sequences(self) -> list[Sequence]:
        """The live sequences."""
        return list(self._sequences.values())

    @property
    def mapped_bytes(self) -> int:
        """Bytes of extents that are mapped now: what the tenant is charged for this client."""
        with self._turns:
            return int(self._lib.kvg_mapped_bytes(self._live()))

    def close(self) -> None:
        """Frees all sequences, unmaps everything and disconnects. Harmless when it is closed."""
        with self._turns:
            handle, self._handle = self._handle, None
            if handle is not None:
                self._lib.kvg_close(handle)
        for sequence in self.sequences:
            sequence._forget()

    def fileno(self) -> int:
        """The control socket: readable when `process()` has something to do."""
        return int(self._lib.kvg_fd(self._live()))

    def process(self) -> None:
        """Handles the daemon's messages without waiting."""
        self._call("kvg_process")

    def nop(self) -> None:
        """A round trip that does nothing."""
        self._call("kvg_nop")

    def return_memory(self) -> None:
        """Waits until every extent asked back so far is unmapped here and back in the pool."""
        self._call("kvg_return_memory")

    def set_spin(self, us: int) -> None:
        """Microseconds that waiting calls spin before they sleep; 0: sleep at once; 50 at first."""
        with self._turns:
            self._lib.kvg_set_spin(self._live(), whole("us", us))

    # ---- the model ----

    def register(self, layout: Layout, staging_bytes: int) -> None:
        """Registers the layout of this worker's KV, once; `staging_bytes` hold at least a row of hidden states."""
        c, c_view, size = layout.to_c(), ViewStruct(), whole("staging_bytes", staging_bytes, 0, U64_MAX)
        with self._turns:
            status = self._lib.kvg_register(self._live(), ctypes.byref(c), size)
            if status < 0:
                raise self._failure(status)
            status = self._lib.kvg_view(self._handle, ctypes.byref(c_view))
            if status < 0:
                raise error_of(status, f"layout {layout.model}: {os.strerror(-status)}")
            self._view, self.layout = c_view, layout

    def load_gate(self, path: str | os.PathLike[str]) -> None:
        """Gives the daemon the gate's weights (a safetensors file). The error names what does not fit the layout."""
        self._call("kvg_load_gate", _c_string("path", os.fsencode(path)))

    def create(self, policy: Policy) -> Sequence:
        """Admits a sequence with its whole need. RefusedError says how many bytes are short."""
        c, handle = policy.to_c(), ctypes.c_uint64()
        self._call("kvg_create", ctypes.byref(c), ctypes.byref(handle))
        return self._made(handle.value, policy)

    def _made(self, handle: int, policy: Policy) -> Sequence:
        sequence = Sequence(self, handle, policy)
        self._sequences[sequence.handle] = sequence
        return sequence

    def stage_wait(self) -> None:
        """Waits until everything staged is scored, and reports the first error since the last wait."""
        self._call("kvg_stage_wait")

    # ---- contexts ----

    def context_keys(self, policy: Policy, tokens: Any, chunk: int = 0) -> list[bytes]:
        """Keys by which workers find each other's contexts, of 32 bytes.

        Key i names the context of exactly the first (i + 1) * chunk tokens, or all, under this layout, gate and policy.
        `tokens`: token ids, a list or a numpy array or torch tensor of one dimension. chunk 0: one key, of all.
        """
        c, numbers = policy.to_c(), token_array(tokens)
        size = whole("chunk", chunk) or max(len(numbers), 1)
        keys = ctypes.create_string_buffer(-(-len(numbers) // size) * KEY_SIZE)
        self._call("kvg_context_keys", ctypes.byref(c), numbers, len(numbers), size, keys)
        return [keys.raw[i : i + KEY_SIZE] for i in range(0, len(keys), KEY_SIZE)]

    def find(self, key: bytes) -> ContextInfo | None:
        """The context of that key, or None: this tenant has none, whoever else may."""
        c = ContextInfoStruct()
        return context_info(c) if self._found("kvg_find", checked_key(key), ctypes.byref(c)) else None

    def find_longest(self, keys: list[bytes]) -> tuple[int, ContextInfo] | None:
        """The last of `keys` (of `context_keys()`) that there is a context of: its index and what it is, or None."""
        c, index, joined = ContextInfoStruct(), ctypes.c_uint32(), b"".join(map(checked_key, keys))
        found = self._found("kvg_find_longest", joined, len(keys), ctypes.byref(index), ctypes.byref(c))
        return (int(index.value), context_info(c)) if found else None

    def _found(self, name: str, *arguments: Any) -> bool:
        try:
            self._call(name, *arguments)
        except KvgateError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def attach(self, key: bytes, policy: Policy) -> Sequence:
        """A sequence that begins with the context of that key: its tokens are committed (`Sequence.state()`).

        `policy` is for what comes after: the context's tokens count as prefix, besides `prefix_tokens`. KvgateError
        with ENOENT: there is no such context (any more).
        """
        c, handle = policy.to_c(), ctypes.c_uint64()
        self._call("kvg_attach", checked_key(key), ctypes.byref(c), ctypes.byref(handle), None)
        return self._made(handle.value, policy)

    @property
    def pressure(self) -> int:
        """Not 0: the daemon is short of memory and asks for what is idle; a new number each time."""
        with self._turns:
            return int(self._lib.kvg_pressure(self._live()))

    def view(self) -> View:
        """Where the KV and its tables lie."""
        layout, c_view = self._registered(), self._registered_view()
        return view_of(self, layout, c_view, int(self._lib.kvg_arena_bytes(self._live())))

    # ---- the cuda kind. Each `pointer` is a device address: an int, None, or what has data_ptr() ----

    def set_stream(self, stream: Any) -> None:
        """The stream whose kernels use the KV: a cudaStream_t as an int, or what has `cuda_stream` (torch's Stream)."""
        address = stream if stream is None or isinstance(stream, int) else stream.cuda_stream
        self._call("kvg_set_stream", address)
        self._stream = stream  # the library needs it until the next one is set

    def stage_device_buffer(self, bytes: int) -> int:
        """Address of the device staging area's next free place, for the next `Sequence.stage_device()`."""
        size = whole("bytes", bytes, 0, U64_MAX)
        with self._turns:
            handle = self._live()
            address = self._lib.kvg_stage_device_buffer(handle, size)
            if address is None:
                why = self._lib.kvg_error(handle).decode(errors="replace")
                broken = self._lib.kvg_process(handle)  # only a lost connection fails here, and says so
                raise self._failure(broken) if broken < 0 else KvgateError(self._buffer_errno(size), why)
            return int(address)

    def _buffer_errno(self, size: int) -> int:
        return errno.EOPNOTSUPP if self.kind == "host" else errno.EMSGSIZE if size else errno.EINVAL

    def import_buffer(self, pointer: Any, size: int) -> int:
        """Lets the daemon read `size` bytes of this process's device memory; an id for `release()`."""
        number = ctypes.c_uint32()
        self._call("kvg_import_buffer", address_of(pointer), whole("size", size, 0, U64_MAX), ctypes.byref(number))
        return int(number.value)

    def import_event(self, event: int) -> int:
        """The same for an interprocess cudaEvent_t."""
        number = ctypes.c_uint32()
        self._call("kvg_import_event", event, ctypes.byref(number))
        return int(number.value)

    def release(self, id: int) -> None:
        """Gives an import back."""
        self._call("kvg_release", whole("id", id))

    # Called for every layer of every step: numbers are checked together, and only a wrong one by one.

    def _end(self, status: int) -> None:
        """Raises what a call said, within its turn."""
        if status < 0:
            raise self._failure(status)

    def cuda_append(
        self, layer: int, count: int, slots: Any, index: Any, k: Any, k_stride: int, v: Any, v_stride: int
    ) -> None:
        """Writes K and V of `count` tokens of one layer, all heads, of any mix of sequences.

        Token t, head h: k + t * k_stride + h * k_dim (elements of the layout's dtype), v likewise; to sequence
        slots[t] (uint32), index[t] (uint32) tokens after its last eviction, or at its counter when `index` is None.
        """
        if (layer | count) >> 32 or (k_stride | v_stride) >> 64:
            _refuse(layer=layer, count=count, k_stride=k_stride, v_stride=v_stride)
        with self._turns.lock:
            self._end(
                self._lib.kvg_cuda_append(
                    self._live(),
                    layer,
                    count,
                    address_of(slots),
                    address_of(index),
                    address_of(k),
                    k_stride,
                    address_of(v),
                    v_stride,
                )
            )

    def cuda_advance(self, slots: Any, count: int, by: int) -> None:
        """The counters of `count` sequences, slots uint32 [count], grow by `by` tokens."""
        if (count | by) >> 32:
            _refuse(count=count, by=by)
        with self._turns.lock:
            self._end(self._lib.kvg_cuda_advance(self._live(), address_of(slots), count, by))

    def cuda_plan(self, layer_begin: int, layer_count: int, sequences: int, slots: Any, extra: int) -> None:
        """Divides the pairs of some layers of slots uint32 [sequences] for `cuda_attend()`; slots outlive the plan."""
        if (layer_begin | layer_count | sequences | extra) >> 32:
            _refuse(layer_begin=layer_begin, layer_count=layer_count, sequences=sequences, extra=extra)
        with self._turns.lock:
            self._end(
                self._lib.kvg_cuda_plan(self._live(), layer_begin, layer_count, sequences, address_of(slots), extra)
            )

    def cuda_attend(self, layer: int, scale: float, q: Any, q_stride: int, out: Any, out_stride: int) -> None:
        """Attention of one token of each of the plan's sequences, over all pairs of its rows.

        Sequence i, query head h: q + i * q_stride + h * k_dim; out + i * out_stride + h * v_dim (elements).
        """
        if layer >> 32 or (q_stride | out_stride) >> 64:
            _refuse(layer=layer, q_stride=q_stride, out_stride=out_stride)
        with self._turns.lock:
            self._end(
                self._lib.kvg_cuda_attend(
                    self._live(), layer, scale, address_of(q), q_stride, address_of(out), out_stride
                )
            )

    def cuda_export_table(
        self, layer: int, sequences: int, slots: Any, extra: int, table: Any, cap: int, lengths: Any
    ) -> None:
        """Block table of one layer: int32 [sequences][heads][cap], and lengths int32 [sequences][heads] in tokens."""
        if (layer | sequences | extra | cap) >> 32:
            _refuse(layer=layer, sequences=sequences, extra=extra, cap=cap)
        with self._turns.lock:
            self._end(
                self._lib.kvg_cuda_export_table(
                    self._live(),
                    layer,
                    sequences,
                    address_of(slots),
                    extra,
                    address_of(table),
                    cap,
                    address_of(lengths),
                )
            )

    def cuda_export_csr(
        self, layer: int, sequences: int, slots: Any, extra: int, indptr: Any, indices: Any, last_page_len: Any
    ) -> None:
        """The same as CSR: indptr int32 [sequences * heads + 1], indices int32 [sequences * heads * row_cap],
        last_page_len int32 [sequences * heads]."""
        if (layer | sequences | extra) >> 32:
            _refuse(layer=layer, sequences=sequences, extra=extra)
        with self._turns.lock:
            self._end(
                self._lib.kvg_cuda_export_csr(
                    self._live(),
                    layer,
                    sequences,
                    address_of(slots),
                    extra,
                    address_of(indptr),
                    address_of(indices),
                    address_of(last_page_len),
                )
            )


def _refuse(**numbers: int) -> None:
    """ValueError for the first number that its C type does not hold."""
    for name, value in numbers.items():
        whole(name, value, 0, U64_MAX if name.endswith("_stride") else _NUMBERS)


_clients: "weakref.WeakSet[Client]" = weakref.WeakSet()


def _abandon_all() -> None:
    for client in list(_clients):
        client._abandon()


os.register_at_fork(after_in_child=_abandon_all)
