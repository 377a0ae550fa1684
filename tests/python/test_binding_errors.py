"""What the binding says when something is wrong, and that nothing is left behind then."""

import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvgate
from binding import GROUP, HEADS, K_DIM, STAGING, V_DIM, Filled, connected, descriptors, layout, policy
from conftest import StartDaemon
from daemon import Daemon, config
from kvgate.errors import error_of


def test_no_daemon(tmp_path: Path) -> None:
    before = descriptors()
    path = tmp_path / "none.sock"
    with pytest.raises(kvgate.NotRunningError) as error:
        kvgate.Client(path)
    assert error.value.errno == errno.ENOENT
    assert str(error.value) == (
        f"no kvgated at {path}: start it with `kvgated --config FILE` or `systemctl start kvgated`, and check the "
        f"tenant's socket (socket {path}: No such file or directory)"
    )
    assert isinstance(error.value, OSError)
    assert descriptors() == before


def test_a_socket_without_a_daemon(tmp_path: Path) -> None:
    path = str(tmp_path / "old.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(path)
    with pytest.raises(kvgate.NotRunningError, match="kvgated --config FILE") as error:
        kvgate.Client(path)
    assert error.value.errno == errno.ECONNREFUSED


def test_a_daemon_that_hangs_up_at_hello(tmp_path: Path) -> None:
    """Connecting fails half-way: what was opened is closed."""
    path = str(tmp_path / "mute.sock")
    before = descriptors()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        hang_up = "import socket, sys; s = socket.socket(fileno=0); s.accept()[0].close()"
        with subprocess.Popen([sys.executable, "-c", hang_up], stdin=listener) as peer:
            with pytest.raises(kvgate.ConnectionLostError, match="daemon"):
                kvgate.Client(path)
            assert peer.wait(20) == 0
    assert descriptors() == before


def test_paths_and_names(daemon: Daemon) -> None:
    with pytest.raises(kvgate.KvgateError, match="more than 107") as error:
        kvgate.Client("/" + "a" * 200)
    assert error.value.errno == errno.ENAMETOOLONG
    with pytest.raises(ValueError, match=r"socket .* has a NUL"):
        kvgate.Client(daemon.socket() + "\0x")
    with pytest.raises(ValueError, match=r"name .* has a NUL"):
        kvgate.Client(daemon.socket(), "a\0b")
    with connected(daemon.socket()) as client, pytest.raises(ValueError, match=r"path .* has a NUL"):
        client.load_gate("gate\0")


def test_refusals_name_bytes(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config(a="device.max = 1M"))
    before = descriptors()
    with connected(daemon.socket()) as client:
        with pytest.raises(kvgate.RefusedError) as error:
            client.create(policy(1500, ratio=1.0))
        assert error.value.errno == errno.ENOSPC
        text = str(error.value)
        assert text.startswith("tenant a: device budget 1.0 MiB, in use 0 B, promised 0 B, the sequence needs ")
        assert " bytes short" in text
        assert int(text.split(": ")[-1].split()[0]) > 0
        assert client.sequences == []
        assert daemon.tenant()["refusals"] == 1
        with client.create(policy(100)) as sequence:  # the client goes on
            sequence.reserve(100)
    assert descriptors() == before


def test_errors_have_the_daemons_text(daemon: Daemon) -> None:
    with connected(daemon.socket()) as client:
        cases: list[tuple[Callable[[], Any], int, str]] = [
            (lambda: client.register(layout(), STAGING), errno.EALREADY, "layout binding: this connection has one"),
            (lambda: client.load_gate("/nowhere/gate"), errno.ENOENT, "gate /nowhere/gate: No such file"),
            (lambda: client.load_gate("/dev/null"), errno.EINVAL, "gate /dev/null: not a regular file"),
        ]
        sequence = client.create(policy(100))
        sequence.reserve(100)
        row = np.zeros((1, HEADS), np.float32)
        cases += [
            (lambda: sequence.stage_scores(9, 0, row), errno.EINVAL, "layer 9 of 3"),
            (lambda: sequence.commit(1000), errno.EINVAL, "commit of 1000 tokens at position 0 passes the reserved"),
            (lambda: sequence.reserve_finish(), errno.ENOENT, "nothing under way"),
            (lambda: sequence.stream_wait(), errno.EOPNOTSUPP, "of the kind host"),
        ]
        for use, number, text in cases:
            with pytest.raises(kvgate.KvgateError) as error:
                use()
            assert (error.value.errno, text in str(error.value)) == (number, True), error.value
            assert type(error.value) is kvgate.KvgateError


def test_bad_layouts_are_refused_by_the_daemon(daemon: Daemon) -> None:
    before = descriptors()
    with kvgate.Client(daemon.socket()) as client:
        for use in (lambda: client.create(policy(10)), lambda: client.load_gate("/dev/null"), client.view):
            with pytest.raises(kvgate.KvgateError, match="no layout is registered"):
                use()
        with pytest.raises(kvgate.KvgateError) as error:
            client.register(layout(max_tokens=4_000_000_000), STAGING)
        assert error.value.errno in (errno.EOPNOTSUPP, errno.EINVAL)
        assert client.layout is None
    assert descriptors() == before


def test_reading_and_writing_where_there_is_nothing(daemon: Daemon) -> None:
    k, v, q = (np.zeros(shape, np.float32) for shape in ((1, K_DIM), (1, V_DIM), (1, GROUP, K_DIM)))
    with connected(daemon.socket()) as client:
        sequence = Filled(client, 100).sequence
        sequence.evict()
        end = sequence.state().reserved_pos
        place = f"sequence 0, layer 0 of 3, head 0 of 2, positions 99 to 100 of 100 to {end}"
        with pytest.raises(kvgate.KvgateError, match=f"kvg_append: {place}: Numerical result out of range") as error:
            sequence.append(0, 0, 99, k, v)
        assert error.value.errno == errno.ERANGE
        with pytest.raises(kvgate.KvgateError, match=f"kvg_attend: {place}"):
            sequence.attend(0, 0, 99, 1, 1.0, q)
        with pytest.raises(kvgate.KvgateError, match="layer 7 of 3, head 0 of 2") as error:
            sequence.attend(7, 0, 100, 1, 1.0, q)
        assert error.value.errno == errno.EINVAL


def test_the_daemon_dies(daemon: Daemon) -> None:
    before = descriptors()
    with connected(daemon.socket()) as client:
        with Filled(client, 100).sequence as sequence, client.create(policy(50)) as other:
            daemon.kill()
            for use in (lambda: sequence.reserve(500), client.nop, sequence.query, other.evict, client.stage_wait):
                with pytest.raises(kvgate.ConnectionLostError) as error:
                    use()
                assert error.value.errno == errno.EPIPE
        assert client.sequences == []
    with pytest.raises(kvgate.NotRunningError):
        kvgate.Client(daemon.socket())
    assert descriptors() == before


def test_nothing_is_left_open_after_exceptions(daemon: Daemon) -> None:
    before = descriptors()

    def use() -> None:
        with connected(daemon.socket()) as client:
            with pytest.raises(kvgate.KvgateError, match="not a regular file"):
                client.load_gate("/dev/null")
            with Filled(client, 100).sequence as sequence:
                sequence.evict_async()
                sequence.commit(1)

    for _ in range(20):
        with pytest.raises(kvgate.KvgateError, match="eviction is under way"):
            use()
    assert descriptors() == before
    assert daemon.gone()


def test_cuda_calls_are_refused_by_name_on_the_host_kind(daemon: Daemon) -> None:
    with connected(daemon.socket()) as client:
        sequence = client.create(policy(10))
        calls: dict[str, Callable[[], Any]] = {
            "kvg_set_stream": lambda: client.set_stream(0),
            "kvg_stage_device_buffer": lambda: client.stage_device_buffer(64),
            "kvg_stage_device": lambda: sequence.stage_device("hidden", 0, 1, 0, 1, 64),
            "kvg_import_buffer": lambda: client.import_buffer(64, 64),
            "kvg_import_event": lambda: client.import_event(64),
            "kvg_release": lambda: client.release(1),
            "kvg_cuda_append": lambda: client.cuda_append(0, 1, 64, None, 64, 64, 64, 64),
            "kvg_cuda_advance": lambda: client.cuda_advance(64, 1, 1),
            "kvg_cuda_plan": lambda: client.cuda_plan(0, 1, 1, 64, 1),
            "kvg_cuda_attend": lambda: client.cuda_attend(0, 1.0, 64, 64, 64, 64),
            "kvg_cuda_export_table": lambda: client.cuda_export_table(0, 1, 64, 1, 64, 4, 64),
            "kvg_cuda_export_csr": lambda: client.cuda_export_csr(0, 1, 64, 1, 64, 64, 64),
        }
        for name, call in calls.items():
            with pytest.raises(kvgate.KvgateError, match=f"{name}: .* of the kind host") as error:
                call()
            assert error.value.errno == errno.EOPNOTSUPP, name


@pytest.mark.parametrize("value", [-1, 2**32, 2**70])
def test_numbers_are_not_cut_to_size(daemon: Daemon, value: int) -> None:
    k, v = np.zeros((1, K_DIM), np.float32), np.zeros((1, V_DIM), np.float32)
    with connected(daemon.socket()) as client:
        sequence = client.create(policy(10))
        calls: list[tuple[str, Callable[[], Any]]] = [
            ("tokens", lambda: sequence.reserve(value)),
            ("tokens", lambda: sequence.reserve_async(value)),
            ("tokens", lambda: sequence.commit(value)),
            ("pos", lambda: sequence.truncate(value)),
            ("end", lambda: sequence.protect(0, value)),
            ("pos", lambda: sequence.append(0, 0, value, k, v)),
            ("head", lambda: sequence.append(0, value, 0, k, v)),
            ("us", lambda: client.set_spin(value)),
            ("count", lambda: client.cuda_append(0, value, 64, None, 64, 64, 64, 64)),
            ("layer", lambda: client.cuda_append(value, 1, 64, None, 64, 64, 64, 64)),
            ("by", lambda: client.cuda_advance(64, 1, value)),
            ("sequences", lambda: client.cuda_plan(0, 1, value, 64, 1)),
            ("layer", lambda: client.cuda_attend(value, 1.0, 64, 64, 64, 64)),
            ("cap", lambda: client.cuda_export_table(0, 1, 64, 1, 64, value, 64)),
            ("extra", lambda: client.cuda_export_csr(0, 1, 64, value, 64, 64, 64)),
        ]
        for name, call in calls:
            with pytest.raises(ValueError, match=f"{name} is {value}, outside 0 to 4294967295"):
                call()
        for stride in (-1, 2**64):
            with pytest.raises(ValueError, match=f"v_stride is {stride}, outside 0 to 18446744073709551615"):
                client.cuda_append(0, 1, 64, None, 64, 64, 64, stride)
            with pytest.raises(ValueError, match="out_stride"):
                client.cuda_attend(0, 1.0, 64, 64, 64, stride)
            with pytest.raises(ValueError, match="staging_bytes"):
                client.register(layout(), stride)


def test_numbers_of_numpy_are_numbers(daemon: Daemon) -> None:
    with connected(daemon.socket()) as client, client.create(policy(10)) as sequence:
        sequence.reserve(np.int64(10))  # type: ignore[arg-type]
        sequence.commit(np.uint32(10))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"tokens is 1\.5, which is no whole number"):
            sequence.reserve(1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.0}, r"ratio is 0\.0, outside \(0, 1\]"),
        ({"ratio": 1.5}, r"ratio is 1\.5, outside"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"mode": "never"}, "mode is 'never', not one of off, chunked, once, threshold"),
        ({"level": "head"}, "level is 'head', not one of pair, pair-head, pair-layer, adakv-layer"),
        ({"window": -1}, "window is -1, outside 0 to 4294967295"),
        ({"context_tokens": 2**32}, "context_tokens is 4294967296, outside"),
        ({"decode_first": -4}, "decode_first is -4"),
        ({"threshold": float("inf")}, "threshold is inf"),
        ({"threshold": 1e39}, "threshold is 1e"),
    ],
)
def test_policies_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kvgate.Policy(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "fp8"}, "dtype is 'fp8', not one of bf16, f16, f32"),
        ({"layers": 0}, "layers is 0, outside 1 to 4294967295"),
        ({"heads": -2}, "heads is -2, outside 1"),
        ({"model": ""}, "has 0 bytes, outside 1 to 127"),
        ({"model": "m" * 128}, "has 128 bytes, outside 1 to 127"),
        ({"model": "a\0b"}, "has a NUL"),
        ({"max_tokens": 2**32}, "max_tokens is 4294967296"),
    ],
)
def test_layouts_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout(**change)


def test_errors_by_errno() -> None:
    for number, kind in (
        (errno.ENOSPC, kvgate.RefusedError),
        (errno.EPIPE, kvgate.ConnectionLostError),
        (errno.ESTALE, kvgate.StaleError),
        (errno.EINVAL, kvgate.KvgateError),
    ):
        error = error_of(-number, "")
        assert (type(error), error.errno, str(error)) == (kind, number, os.strerror(number))


def test_eviction_modes_by_name(daemon: Daemon) -> None:
    with connected(daemon.socket()) as client, client.create(policy(10)) as sequence:
        for use in (sequence.evict, sequence.evict_async):
            with pytest.raises(ValueError, match="mode is 'all', not one of prefill, decode"):
                use("all")
        with pytest.raises(ValueError, match="kind is 'rows', not one of hidden, preact, score"):
            sequence.stage_device("rows", 0, 1, 0, 1, 64)


# ---- the library ----

PACKAGE = Path(kvgate.__file__).resolve().parents[1]  # the folder that kvgate/ lies in
FOUND = "NotRunningError no kvgated at /nowhere/x"


def load(library: str | None, package: Path = PACKAGE, **more: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that connects with KVGATE_LIBRARY set so."""
    environment = {name: value for name, value in os.environ.items() if name != "KVGATE_LIBRARY"}
    environment |= {"PYTHONPATH": str(package), **more}
    if library is not None:
        environment["KVGATE_LIBRARY"] = library
    script = """
import kvgate
try:
    kvgate.Client("/nowhere/x")
except kvgate.KvgateError as error:
    print(type(error).__name__, error)
"""
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)


def test_importing_needs_no_library_nor_package() -> None:
    script = "import sys, kvgate; print([m for m in ('numpy', 'torch') if m in sys.modules])"
    environment = {**os.environ, "KVGATE_LIBRARY": "/nowhere/libkvgate.so"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_library_of_the_environment() -> None:
    assert load(os.environ["KVGATE_LIBRARY"]).stdout.startswith(FOUND)


def test_the_library_of_the_loader() -> None:
    folder = Path(os.environ["KVGATE_LIBRARY"]).parent
    assert load(None, LD_LIBRARY_PATH=str(folder)).stdout.startswith(FOUND)


def test_the_library_of_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "build" / "lib").mkdir(parents=True)
    (tmp_path / "build" / "lib" / "libkvgate.so.1").symlink_to(os.environ["KVGATE_LIBRARY"])
    package = tmp_path / "client" / "python"
    shutil.copytree(PACKAGE / "kvgate", package / "kvgate")
    assert load(None, package).stdout.startswith(FOUND)


def test_a_library_that_is_not_there() -> None:
    said = load("/nowhere/libkvgate.so.1").stdout
    assert said.startswith("KvgateError no libkvgate.so.1: /nowhere/libkvgate.so.1: cannot open")
    assert "tools/build build" in said
    assert "KVGATE_LIBRARY" in said


def test_a_library_that_is_another() -> None:
    assert load("libc.so.6").stdout == (
        "KvgateError library libc.so.6 has no kvg_abi_version(): it is older than this package\n"
    )
