"""The binding on the cuda kind: arrays on the device, the calls of an engine, a fork. Skipped without a GPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_binding_fork import Child, text_of

import kvgate
from binding import descriptors
from conftest import StartDaemon
from daemon import Daemon, config

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

LAYERS, HEADS, GROUP, DIM, TOKENS = 2, 4, 4, 128, 300
ROW = HEADS * DIM
SCALE = DIM**-0.5
LAYOUT = kvgate.Layout("gpu", 256, LAYERS, HEADS, GROUP, DIM, DIM, "bf16", 4, 2048)
POLICY = kvgate.Policy(0.3, context_tokens=TOKENS, max_new_tokens=64, window=20, window_absolute=True)


@pytest.fixture
def gpu_daemon(start_daemon: StartDaemon) -> Daemon:
    """A daemon of the cuda kind whose tenant may import buffers."""
    return start_daemon(config(size="256M", extent="2M", kind="cuda", a="ipc = yes"))


@pytest.fixture
def client(gpu_daemon: Daemon) -> Iterator[kvgate.Client]:
    """Registered, on a stream of its own, which is current."""
    stream = torch.cuda.Stream()
    with kvgate.Client(gpu_daemon.socket(), "gpu") as client, torch.cuda.stream(stream):
        client.register(LAYOUT, 8 << 20)
        client.set_stream(stream)
        yield client


def on_gpu(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


class Prompt:
    """A sequence with TOKENS random tokens written, their scores staged from device memory, committed."""

    def __init__(self, client: kvgate.Client) -> None:
        torch.manual_seed(1)
        shape = (LAYERS, TOKENS, HEADS, DIM)
        self.k, self.v = (torch.randn(shape, device="cuda").to(torch.bfloat16) for _ in range(2))
        self.scores = torch.rand(LAYERS, TOKENS, HEADS, device="cuda")
        self.sequence = client.create(POLICY)
        self.sequence.reserve(TOKENS)
        slots = on_gpu(*[self.sequence.slot] * TOKENS)
        index = torch.arange(TOKENS, dtype=torch.int32, device="cuda")
        for layer in range(LAYERS):
            client.cuda_append(layer, TOKENS, slots, index, self.k[layer], ROW, self.v[layer], ROW)

    def stage(self, address: Any) -> None:
        self.sequence.stage_device("score", 0, LAYERS, 0, TOKENS, address)
        self.sequence.commit(TOKENS)


def staged(client: kvgate.Client) -> Prompt:
    """With scores in the device staging area."""
    prompt = Prompt(client)
    place = client.stage_device_buffer(prompt.scores.nbytes)
    strides = (TOKENS * HEADS, HEADS, 1)
    kvgate.Array((LAYERS, TOKENS, HEADS), strides, "f32", place, "cuda:0").torch().copy_(prompt.scores)
    prompt.stage(place)
    return prompt


def test_arrays_lie_on_the_device(client: kvgate.Client) -> None:
    assert client.kind == "cuda"
    sequence, view = staged(client).sequence, client.view()
    assert view.k_blocks.device == view.appended.device == f"cuda:{torch.cuda.current_device()}"
    assert view.appended.torch()[sequence.slot].item() == TOKENS
    assert view.base_len.torch().sum().item() == 0
    with pytest.raises(BufferError, match="numpy reads memory of the CPU only"):
        view.ids.numpy()
    held = sequence.evict().pairs_held
    assert 0.25 * TOKENS < held / (LAYERS * HEADS) < 0.45 * TOKENS
    assert view.base_len.torch().sum().item() == held
    assert view.appended.torch()[sequence.slot].item() == 0
    assert sequence.state()[:3] == (1, TOKENS, TOKENS)
    for use in (lambda: sequence.row(0, 0), lambda: sequence.csr(0)):
        with pytest.raises(kvgate.KvgateError, match=r"use Client\.cuda_export_\*\(\)"):
            use()


def test_a_row_holds_what_was_written(client: kvgate.Client) -> None:
    prompt = staged(client)
    sequence, view = prompt.sequence, client.view()
    sequence.evict()
    for layer in range(LAYERS):
        for head in range(HEADS):
            k, v = row_pairs(view, sequence.slot, layer, head, 0)
            at = (k[:, None, :] == prompt.k[layer, :, head]).all(-1)  # [pairs][tokens]
            assert at.sum(1).tolist() == [1] * len(k)
            tokens = at.int().argmax(1)
            assert len(tokens.unique()) == len(k)
            assert torch.equal(v, prompt.v[layer, tokens, head])


def row_pairs(view: kvgate.View, slot: int, layer: int, head: int, extra: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [pairs][dim] of a row, from its blocks."""
    length = int(view.base_len.torch()[layer, slot, head].item() + view.appended.torch()[slot].item()) + extra
    ids = view.ids.torch()[layer, slot, head, : -(-length // 16)].long()
    return tuple(blocks.torch()[ids].reshape(-1, DIM)[:length] for blocks in (view.k_blocks, view.v_blocks))  # type: ignore[return-value]


def test_a_decode_step(client: kvgate.Client) -> None:
    """Append at the counter, plan, attend, advance: what torch makes of the same blocks."""
    sequence = staged(client).sequence
    sequence.evict_async()
    sequence.reserve_async(64)
    sequence.evict_finish()
    sequence.reserve_finish()
    slots, view = on_gpu(sequence.slot), client.view()
    q = torch.randn(1, HEADS * GROUP, DIM, device="cuda").to(torch.bfloat16)
    k, v = (torch.randn(1, ROW, device="cuda").to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(q)
    client.cuda_plan(0, LAYERS, 1, slots, 1)
    for layer in range(LAYERS):
        client.cuda_append(layer, 1, slots, None, k, ROW, v, ROW)
        client.cuda_attend(layer, SCALE, q, HEADS * GROUP * DIM, out, HEADS * GROUP * DIM)
        for head in range(HEADS):
            keys, values = row_pairs(view, sequence.slot, layer, head, 1)
            assert torch.equal(keys[-1], k[0, head * DIM : (head + 1) * DIM])
            mine = slice(head * GROUP, (head + 1) * GROUP)
            expected = torch.nn.functional.scaled_dot_product_attention(
                q[0, mine].float()[None], keys.float()[None], values.float()[None], scale=SCALE
            )[0]
            torch.testing.assert_close(out[0, mine].float(), expected, atol=1e-2, rtol=1e-2)
    client.cuda_advance(slots, 1, 1)
    sequence.commit(1)
    assert view.appended.torch()[sequence.slot].item() == 1
    sequence.stream_wait()


def test_exported_tables(client: kvgate.Client) -> None:
    sequence = staged(client).sequence
    sequence.evict()
    slots, view, cap = on_gpu(sequence.slot), client.view(), 20
    table, lengths = torch.full((1, HEADS, cap), -1, **INTS), torch.full((1, HEADS), -1, **INTS)
    indptr, last = torch.full((HEADS + 1,), -1, **INTS), torch.full((HEADS,), -1, **INTS)
    indices = torch.full((HEADS * view.row_cap,), -1, **INTS)
    client.cuda_export_table(1, 1, slots, 0, table, cap, lengths)
    client.cuda_export_csr(1, 1, slots, 0, indptr, indices, last)
    expected = view.base_len.torch()[1, sequence.slot]
    assert torch.equal(lengths[0], expected)
    assert len(expected.unique()) > 1
    for head in range(HEADS):
        ids = view.ids.torch()[1, sequence.slot, head, : -(-int(expected[head]) // 16)]
        assert torch.equal(table[0, head, : len(ids)], ids)
        assert torch.equal(indices[indptr[head] : indptr[head + 1]], ids)
    assert torch.equal(last, (expected - 1) % 16 + 1)


INTS: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}


def test_an_imported_buffer(client: kvgate.Client) -> None:
    prompt = Prompt(client)
    number = client.import_buffer(prompt.scores, prompt.scores.nbytes)
    prompt.stage(prompt.scores)
    client.stage_wait()
    assert prompt.sequence.evict().pairs_dropped > 0
    client.release(number)
    with pytest.raises(kvgate.KvgateError, match=str(number)):
        client.release(number)
    with pytest.raises(kvgate.KvgateError, match="staging area"):
        prompt.sequence.stage_device("score", 0, 1, 0, 1, 4096)
    with pytest.raises(kvgate.KvgateError, match="staging area"):
        client.stage_device_buffer(1 << 40)


def test_hidden_states_from_the_host(client: kvgate.Client) -> None:
    """Host pointers are taken on this kind, too."""
    sequence = client.create(POLICY)
    sequence.reserve(TOKENS)
    for layer in range(LAYERS):
        sequence.stage_scores(layer, 0, torch.rand(TOKENS, HEADS))
    sequence.commit(TOKENS)
    assert sequence.evict().pairs_dropped > 0


def test_a_fork(client: kvgate.Client, gpu_daemon: Daemon) -> None:
    """The child lets go without the driver, which does not work there; the parent goes on."""
    prompt = staged(client)
    figures = gpu_daemon.tenant()
    eventfds = sum("eventfd" in target for target in descriptors().values())

    def work() -> list[Any]:
        said = [text_of(client.nop), text_of(prompt.sequence.evict), text_of(client.view)]
        client.close()
        return [said, sum("eventfd" in target for target in descriptors().values())]

    child = Child(work)
    said, left = child.answer()
    assert ["belongs to process" in text for text in said] == [True] * 3
    assert left == eventfds - 2, "the doorbell and the thread's"
    assert gpu_daemon.tenant() == figures
    assert prompt.sequence.evict().pairs_dropped > 0
    child.end()


def test_nothing_is_left_open(gpu_daemon: Daemon) -> None:
    torch.zeros(1, device="cuda")
    counts = []
    for _ in range(3):
        with kvgate.Client(gpu_daemon.socket()) as client:
            client.register(LAYOUT, 8 << 20)
            staged(client).sequence.evict()
        counts.append(len(descriptors()))
    assert counts[1] == counts[2]
    assert gpu_daemon.gone()
