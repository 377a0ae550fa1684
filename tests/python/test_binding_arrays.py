"""Arrays over the daemon's memory: the same bytes for the library, numpy and PyTorch, and nothing left behind."""

import ctypes
import gc
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch

import kvgate
from binding import GROUP, HEADS, K_DIM, LAYERS, V_DIM, Filled, attention, connected, layout, policy
from daemon import Daemon

TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
BITS = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}
DTYPES = pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])


def test_view_describes_the_layout(daemon: Daemon) -> None:
    with connected(daemon.socket(), max_sequences=3) as client:
        view = client.view()
        assert view.base_len.shape == (LAYERS, 3, HEADS)
        assert view.ids.shape == (LAYERS, 3, HEADS, view.row_cap)
        assert view.appended.shape == (3,)
        assert view.extent_size == 256 << 10
        ids = view.k_blocks.shape[0]
        assert view.k_blocks.shape == (ids, 16, K_DIM)
        assert view.v_blocks.shape == (ids, 16, V_DIM)
        assert view.v_blocks.address - view.k_blocks.address == view.extent_size // 2
        assert view.k_blocks.strides == (view.stride // 2, K_DIM, 1)
        assert view.stride == 16 * V_DIM * 2
        # The last extent's last block is inside of both.
        assert ids * view.stride + view.extent_size // 2 == 32 << 20
        assert client.view().ids == view.ids


@DTYPES
def test_torch_writes_what_attend_reads(daemon: Daemon, dtype: str) -> None:
    """K and V written through tensors, without a copy, are those of the library."""
    torch.manual_seed(1)
    with connected(daemon.socket(), dtype) as client, client.create(policy(16)) as sequence:
        sequence.reserve(16)
        sequence.commit(16)
        (block,) = sequence.row(1, 0)
        view = client.view()
        k, v = view.k_blocks.torch(), view.v_blocks.torch()
        assert (k.dtype, v.dtype) == (TORCH[dtype], TORCH[dtype])
        assert k.data_ptr() == view.k_blocks.address
        assert k.stride() == view.k_blocks.strides
        k[block] = torch.randn(16, K_DIM)
        v[block] = torch.randn(16, V_DIM)
        query = torch.randn(1, GROUP, K_DIM)
        out = sequence.attend(1, 0, 15, 1, 0.3, query)[0]
        expected = attention(query[0].numpy(), k[block].float().numpy(), v[block].float().numpy(), 0.3)
        np.testing.assert_allclose(out, expected, atol=2e-5)


@DTYPES
def test_numpy_writes_what_attend_reads(daemon: Daemon, dtype: str) -> None:
    rng = np.random.default_rng(1)
    with connected(daemon.socket(), dtype) as client, client.create(policy(16)) as sequence:
        sequence.reserve(16)
        sequence.commit(16)
        (block,) = sequence.row(2, 1)
        k, v = client.view().k_blocks.numpy(), client.view().v_blocks.numpy()
        assert k.dtype == v.dtype == BITS[dtype]
        assert np.shares_memory(k, client.view().k_blocks.numpy())
        values = rng.integers(-8, 9, (16, V_DIM)).astype(np.float32)
        k[block] = 0
        v[block] = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy() if dtype == "bf16" else values
        query = np.ones((1, GROUP, K_DIM), np.float32)
        out = sequence.attend(2, 1, 15, 1, 1.0, query)[0]
        np.testing.assert_allclose(out, [values.mean(0)] * GROUP, atol=1e-5)


@DTYPES
def test_appended_kv_is_read_by_dlpack(daemon: Daemon, dtype: str) -> None:
    """append() converts to the layout's dtype as PyTorch does."""
    torch.manual_seed(2)
    k, v = torch.randn(16, K_DIM), torch.randn(16, V_DIM)
    with connected(daemon.socket(), dtype) as client, client.create(policy(16)) as sequence:
        sequence.reserve(16)
        sequence.append(0, 1, 0, k, v)
        sequence.commit(16)
        (block,) = sequence.row(0, 1)
        assert torch.equal(client.view().k_blocks.torch()[block], k.to(TORCH[dtype]))
        assert torch.equal(client.view().v_blocks.torch()[block], v.to(TORCH[dtype]))
        read = np.from_dlpack(client.view().base_len)
        assert read.dtype == np.int32
        if dtype != "bf16":  # numpy has no bfloat16
            np.testing.assert_array_equal(np.from_dlpack(client.view().k_blocks)[block], k.to(TORCH[dtype]))


def test_tables_are_the_daemons(daemon: Daemon) -> None:
    with connected(daemon.socket()) as client:
        sequence = Filled(client, 300).sequence
        view = client.view()
        base_len, ids, appended = view.base_len.torch(), view.ids.torch(), view.appended.torch()
        assert int(base_len.sum()) == 0
        assert int(appended[sequence.slot]) == 300
        held = sequence.evict().pairs_held  # the tensors made before see it
        assert int(base_len.sum()) == held
        assert int(appended[sequence.slot]) == 0
        assert ids[1, sequence.slot, 1, : len(sequence.row(1, 1))].tolist() == sequence.row(1, 1).tolist()
        for table in (view.base_len, view.ids):
            with pytest.raises(ValueError, match="read-only"):
                table.numpy()[0] = 1


def test_protocols_of_the_device(daemon: Daemon) -> None:
    with connected(daemon.socket()) as client:
        k, ids = client.view().k_blocks, client.view().ids
        assert k.__dlpack_device__() == (1, 0)
        assert not hasattr(k, "__cuda_array_interface__")
        with pytest.raises(BufferError, match="copies are not made"):
            k.__dlpack__(copy=True)
        with pytest.raises(BufferError, match=r"device \(2, 0\)"):
            k.__dlpack__(dl_device=(2, 0))
        assert ids.__array_interface__["data"] == (ids.address, True)
        assert k.__array_interface__["typestr"] == "<u2"
        assert ids.nbytes == 4 * LAYERS * 4 * HEADS * client.view().row_cap


def test_arrays_of_a_gpu() -> None:
    """What an array says of memory on a GPU, which is not looked at."""
    array = kvgate.Array((2, 3), (8, 1), "f16", 0x7000, "cuda:3")
    assert array.__dlpack_device__() == (2, 3)
    assert array.__cuda_array_interface__ == {
        "shape": (2, 3),
        "typestr": "<f2",
        "data": (0x7000, False),
        "strides": (16, 2),
        "version": 3,
    }
    assert not hasattr(array, "__array_interface__")
    with pytest.raises(BufferError, match="cuda:3"):
        array.numpy()
    assert not hasattr(kvgate.Array((2,), (1,), "bf16", 0x7000, "cuda:0"), "__cuda_array_interface__")


_MALLINFO = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class Mallinfo(ctypes.Structure):
    """struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO]


def allocated() -> int:
    """Bytes in use of malloc()."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo
    info: Mallinfo = libc.mallinfo2()
    return int(info.uordblks)


@pytest.mark.parametrize("consume", [False, True])
def test_capsules_leave_nothing_behind(consume: bool) -> None:
    memory = np.arange(64, dtype=np.int32)
    shape = tuple([1] * 40 + [64])  # a large struct: 784 bytes
    array = kvgate.Array(shape, shape, "i32", memory.ctypes.data, "cpu")

    def make() -> None:
        capsule = array.__dlpack__()
        if consume:
            tensor = torch.from_dlpack(capsule)
            assert tensor.shape == shape

    for _ in range(100):
        make()
    before = allocated()
    for _ in range(2000):
        make()
    assert allocated() - before < 2000 * 100


def test_tensors_may_end_in_any_thread() -> None:
    memory = np.arange(64, dtype=np.float32)
    array = kvgate.Array((64,), (1,), "f32", memory.ctypes.data, "cpu")
    tensors = [array.torch() for _ in range(100)]
    assert tensors[0].sum() == memory.sum()
    thread = threading.Thread(target=tensors.clear)
    thread.start()
    thread.join()
    assert tensors == []


def test_tensors_may_outlive_the_interpreter() -> None:
    """A tensor and a capsule that nobody has taken are still there when the interpreter ends."""
    script = """
import numpy, torch, kvgate
memory = numpy.zeros(8, numpy.float32)
array = kvgate.Array((8,), (1,), "f32", memory.ctypes.data, "cpu")
torch.kept, torch.taken, numpy.kept = array.torch(), array.__dlpack__(), array.numpy()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (torch.zeros(4, 128), "hidden is a tensor of torch.float32, not torch.bfloat16"),
        (np.zeros((4, 128), np.float32), r"hidden is an array of <f4, not <u2 \(bf16\)"),
        (torch.zeros(4, 127, dtype=torch.bfloat16), r"hidden has shape \(4, 127\), not \[rows\]\[128\]"),
        (torch.zeros(128, dtype=torch.bfloat16), r"hidden has shape \(128,\), not \[rows\]\[128\]"),
        (torch.zeros(4, 256, dtype=torch.bfloat16)[:, ::2], r"strides \(256, 2\)"),
        (torch.zeros(4, 200, dtype=torch.bfloat16)[:, :128], "dimension 0 must be 128"),
        (np.zeros((4, 256), np.uint16)[:, :128], "dimension 0 must be 128"),
        (torch.zeros(4, 128, dtype=torch.bfloat16, device="meta"), "hidden is a tensor on meta, not on the CPU"),
        ([[0] * 128], "hidden is a list, neither a torch tensor nor a numpy array"),
        (np.zeros((4, 129), np.uint8)[:, 1:].T, "not <u2"),
    ],
)
def test_hidden_states_of_the_wrong_form(daemon: Daemon, hidden: Any, message: str) -> None:
    with connected(daemon.socket()) as client, client.create(policy(16)) as sequence:
        sequence.reserve(16)
        with pytest.raises((TypeError, ValueError), match=message):
            sequence.stage_hidden(0, 0, hidden)


def test_kv_of_the_wrong_form(daemon: Daemon) -> None:
    k, v, q = torch.zeros(4, K_DIM), torch.zeros(4, V_DIM), torch.zeros(4, GROUP, K_DIM)
    with connected(daemon.socket()) as client, client.create(policy(16)) as sequence:
        sequence.reserve(16)
        for wrong_k, wrong_v, message in (
            (k.to(torch.bfloat16), v, "k is a tensor of torch.bfloat16"),
            (k[:3], v, "k has 3 rows, v 4"),
            (k, v[:, :-1], r"v has shape \(4, 63\), not \[rows\]\[64\]"),
            (torch.zeros(K_DIM, 4).T, v, "dimension 1 must be 1"),
            (k.numpy()[::-1], v, "rows must not run backwards"),
            (np.zeros((4, 2 * K_DIM + 1), np.uint8).view(np.uint8)[:, :K_DIM], v, "not <f4"),
        ):
            with pytest.raises(ValueError, match=message):
                sequence.append(0, 0, 0, wrong_k, wrong_v)
        with pytest.raises(ValueError, match="q has 4 rows, count is 3"):
            sequence.attend(0, 0, 0, 3, 1.0, q)
        with pytest.raises(ValueError, match=r"not \[rows\]\[2\]\[32\]"):
            sequence.attend(0, 0, 0, 4, 1.0, q.flatten(1))
        with pytest.raises(ValueError, match=r"scores has shape \(4, 3\), not \[rows\]\[2\]"):
            sequence.stage_scores(0, 0, np.zeros((4, 3), np.float32))


def test_stride_of_odd_bytes_is_refused(daemon: Daemon) -> None:
    record = np.zeros(4, np.dtype([("pad", "u1"), ("k", "<f4", (K_DIM,))]))
    with connected(daemon.socket()) as client, client.create(policy(16)) as sequence:
        sequence.reserve(16)
        with pytest.raises(ValueError, match="not whole elements of 4"):
            sequence.append(0, 0, 0, record["k"], np.zeros((4, V_DIM), np.float32))


def test_a_layout_of_another_stride(daemon: Daemon) -> None:
    with kvgate.Client(daemon.socket()) as client:
        client.register(layout("f32", k_dim=64, v_dim=64, hidden_dim=64), 1 << 20)
        view = client.view()
        assert view.k_blocks.strides[0] * 4 == view.stride == 16 * 64 * 4
