"""libkvgate through a plain FFI: Python's ctypes, no header, no compiler.

Usage: test_ffi.py KVGATED LIBKVGATE [PRELOAD]. PRELOAD is the sanitizer's runtime that the library needs to come first.
"""
import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile

LAYERS, HEADS, DIM, TOKENS = 4, 4, 32, 400
GLOBAL, BF16, PREFILL = 1, 1, 0
WINDOW_ABSOLUTE, CHUNKED, LEVEL_PAIR = 1, 1, 0


class EvictResult(ctypes.Structure):
    _fields_ = [("pairs_held", ctypes.c_uint64), ("pairs_dropped", ctypes.c_uint64), ("bytes", ctypes.c_uint64),
                ("generation", ctypes.c_uint32), ("reserved", ctypes.c_uint32)]


class SequenceInfo(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint32) for n in ("generation", "fold_pos", "committed_pos", "reserved_pos")] + \
               [(n, ctypes.c_uint64) for n in ("pairs", "blocks", "bytes")]


def layout():
    group = struct.pack("<24I", GLOBAL, LAYERS, 0, HEADS, HEADS, 0, 1, 0, DIM, DIM, BF16, BF16, 0, 0, 16, 0, 0, 2,
                        *[0] * 6)
    return struct.pack("<128s4I48x", b"ffi", 256, 1, 2, 2048) + group + bytes(7 * 96)


def policy():
    return struct.pack("<dBBH6If3I28x", 0.3, CHUNKED, LEVEL_PAIR, WINDOW_ABSOLUTE, 1, TOKENS - 1, 0, 64, 20, 0, 0.0,
                       0, 0, 0)


class Daemon:
    def __init__(self, program, folder):
        self.socket_path = os.path.join(folder, "a.sock")
        config = os.path.join(folder, "kvgated.conf")
        with open(config, "w", encoding="ascii") as file:
            file.write("[pool]\ndevice.size = 16M\nextent_size = 256K\n[tenant a]\nsocket = a.sock\n")
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.bind(os.path.join(folder, "notify"))
        notify.settimeout(20)
        environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "KVG_FFI_PRELOADED")}
        if os.environ.get("KVG_FFI_PRELOADED"):
            environment.pop("ASAN_OPTIONS", None)
        environment["NOTIFY_SOCKET"] = notify.getsockname()
        self.process = subprocess.Popen([program, "--config", config, "--state-dir", folder], env=environment)
        while b"READY=1" not in notify.recv(4096).split(b"\n"):
            pass
        notify.close()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(20) == 0, self.process.returncode


def declare(lib):
    """The calls with arguments that ctypes would not pass right by itself."""
    pointer, u32, u64, size = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_size_t
    lib.kvg_abi_version.restype = u32
    lib.kvg_connect.argtypes = [ctypes.c_char_p, ctypes.c_char_p, pointer, ctypes.c_char_p, size]
    lib.kvg_close.argtypes, lib.kvg_close.restype = [pointer], pointer
    lib.kvg_error.argtypes, lib.kvg_error.restype = [pointer], ctypes.c_char_p
    lib.kvg_tenant.argtypes, lib.kvg_tenant.restype = [pointer], ctypes.c_char_p
    lib.kvg_register.argtypes = [pointer, ctypes.c_char_p, u64]
    lib.kvg_create.argtypes = [pointer, ctypes.c_char_p, pointer]
    lib.kvg_reserve.argtypes = lib.kvg_commit.argtypes = [pointer, u64, u32]
    lib.kvg_stage_scores.argtypes = [pointer, u64, u32, u32, u32, pointer]
    lib.kvg_append.argtypes = [pointer, u64, u32, u32, u32, u32, pointer, size, pointer, size]
    lib.kvg_attend.argtypes = [pointer, u64, u32, u32, u32, u32, ctypes.c_float, pointer, size, pointer, size]
    lib.kvg_evict.argtypes = [pointer, u64, u32, pointer]
    lib.kvg_query.argtypes = [pointer, u64, pointer]
    lib.kvg_free.argtypes = [pointer, u64]
    lib.kvg_mapped_bytes.argtypes, lib.kvg_mapped_bytes.restype = [pointer], u64
    return lib


def fill(lib, client, seq):
    row = (ctypes.c_float * (TOKENS * DIM))(*[(i % 64) / 64 for i in range(TOKENS * DIM)])
    for layer in range(LAYERS):
        scores = (ctypes.c_float * (TOKENS * HEADS))(*[(i * 7919 + layer) % 4096 / 4096 for i in range(TOKENS * HEADS)])
        assert lib.kvg_stage_scores(client, seq, layer, 0, TOKENS, scores) == 0, lib.kvg_error(client)
        for head in range(HEADS):
            assert lib.kvg_append(client, seq, layer, head, 0, TOKENS, row, DIM, row, DIM) == 0, lib.kvg_error(client)
    assert lib.kvg_commit(client, seq, TOKENS) == 0, lib.kvg_error(client)


def attend(lib, client, seq):
    """Attention of the last token over the whole row: a mean of values that are all below one."""
    query, out = (ctypes.c_float * (2 * DIM))(), (ctypes.c_float * (2 * DIM))()
    assert lib.kvg_attend(client, seq, 0, 0, TOKENS - 1, 1, 1.0, query, 2 * DIM, out, 2 * DIM) == 0, \
        lib.kvg_error(client)
    assert all(abs(out[i] - (i % DIM / 64 + 0.25)) < 0.26 for i in range(2 * DIM)), list(out)
    assert max(out) > 0.3, list(out)


def use(lib, path):
    client, seq, text = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.create_string_buffer(256)
    assert lib.kvg_abi_version() == 1
    assert lib.kvg_connect(b"/nonexistent.sock", b"ffi", ctypes.byref(client), text, len(text)) < 0 and text.value
    assert lib.kvg_connect(path.encode(), b"ffi", ctypes.byref(client), text, len(text)) == 0, text.value
    assert lib.kvg_tenant(client) == b"a"
    assert lib.kvg_register(client, layout(), 1 << 20) == 0, lib.kvg_error(client)
    assert lib.kvg_create(client, policy(), ctypes.byref(seq)) == 0, lib.kvg_error(client)
    assert lib.kvg_reserve(client, seq, TOKENS) == 0, lib.kvg_error(client)
    fill(lib, client, seq)
    attend(lib, client, seq)
    before, result, info = lib.kvg_mapped_bytes(client), EvictResult(), SequenceInfo()
    assert lib.kvg_evict(client, seq, PREFILL, ctypes.byref(result)) == 0, lib.kvg_error(client)
    assert result.pairs_held + result.pairs_dropped == TOKENS * LAYERS * HEADS
    assert 0.25 < result.pairs_held / (TOKENS * LAYERS * HEADS) < 0.32, result.pairs_held
    assert lib.kvg_query(client, seq, ctypes.byref(info)) == 0
    assert info.pairs == result.pairs_held and info.committed_pos == info.fold_pos == TOKENS
    assert 0 < lib.kvg_mapped_bytes(client) < before
    assert lib.kvg_reserve(client, 12345, 1) < 0 and lib.kvg_error(client)
    assert lib.kvg_free(client, seq) == 0, lib.kvg_error(client)
    assert lib.kvg_mapped_bytes(client) == 0
    assert lib.kvg_close(client) is None


def main():
    program, library = sys.argv[1:3]
    if len(sys.argv) > 3 and sys.argv[3] and not os.environ.get("KVG_FFI_PRELOADED"):
        # The interpreter is not built with the sanitizer, and is not clean of leaks.
        os.environ.update(LD_PRELOAD=sys.argv[3], KVG_FFI_PRELOADED="1", ASAN_OPTIONS="detect_leaks=0")
        os.execv(sys.executable, [sys.executable] + sys.argv)
    assert len(layout()) == 192 + 8 * 96 and len(policy()) == 80
    with tempfile.TemporaryDirectory(prefix="kvg-ffi.") as folder:
        daemon = Daemon(program, folder)
        try:
            use(declare(ctypes.CDLL(library)), daemon.socket_path)
        finally:
            daemon.stop()
    print("passed")


main()
