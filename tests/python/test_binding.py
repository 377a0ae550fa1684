"""Client and Sequence against a real daemon, and the tables that they hand to other kernels."""

import gc
import select
from typing import Any

import numpy as np
import pytest
import torch

import kvgate
from binding import GROUP, HEADS, K_DIM, LAYERS, STAGING, V_DIM, Filled, attention, connected, layout, policy
from daemon import ROOT, Daemon

PILOT_GATE = ROOT / "tests" / "data" / "pilot-lm" / "gate.safetensors"
SCALE = 0.05


def test_says_who_it_is(daemon: Daemon) -> None:
    with kvgate.Client(daemon.socket(), "who") as client:
        assert (client.kind, client.tenant, client.closed, client.layout) == ("host", "a", False, None)
        assert client.mapped_bytes == 0
        assert client.sequences == []
        client.nop()
        client.process()
        client.return_memory()
        client.set_spin(0)
        client.nop()
        (worker,) = daemon.ctl("workers")["workers"]
        assert (worker["name"], worker["tenant"], worker["model"]) == ("who", "a", "")
        client.register(layout(), STAGING)
        assert client.layout == layout()
        assert daemon.ctl("workers")["workers"][0]["model"] == "binding"
    assert client.closed
    assert daemon.gone()
    assert daemon.ctl("workers")["workers"] == []


def test_takes_a_path_object(daemon: Daemon) -> None:
    from pathlib import Path

    with kvgate.Client(Path(daemon.socket())) as client:
        assert daemon.ctl("workers")["workers"][0]["name"] == "python"
        client.close()
        client.close()


def test_loads_a_gate_and_scores_hidden_states(daemon: Daemon) -> None:
    tokens, pilot = 300, kvgate.Layout("pilot", 256, 6, 4, 2, 32, 32, "bf16", 2, 1024)
    torch.manual_seed(1)
    hidden = torch.randn(6, tokens, 256).to(torch.bfloat16)
    kept = []
    with kvgate.Client(daemon.socket()) as client:
        client.register(pilot, STAGING)
        client.load_gate(PILOT_GATE)
        for form in (hidden, hidden.view(torch.uint16).numpy()):
            with client.create(policy(tokens)) as sequence:
                sequence.reserve(tokens)
                for layer in range(6):
                    sequence.stage_hidden(layer, 0, form[layer])
                sequence.commit(tokens)
                client.stage_wait()
                result = sequence.evict()
                assert 0.2 < result.pairs_held / (tokens * 6 * 4) < 0.4
                kept.append((result.pairs_held, [sequence.row_length(layer, 1) for layer in range(6)]))
    assert kept[0] == kept[1]


def test_memory_comes_and_goes(daemon: Daemon) -> None:
    tokens = 500
    with connected(daemon.socket()) as client:
        filled = Filled(client, tokens)
        sequence = filled.sequence
        before = client.mapped_bytes
        assert before == daemon.tenant()["charged"] > 0
        assert sequence.state() == (0, 0, tokens, sequence.state().reserved_pos)
        result = sequence.evict()
        assert result.pairs_held + result.pairs_dropped == tokens * LAYERS * HEADS
        assert 0.28 < result.pairs_held / (tokens * LAYERS * HEADS) < 0.36
        assert 0 < client.mapped_bytes < before
        info = sequence.query()
        assert (info.pairs, info.bytes, info.generation) == (result.pairs_held, result.bytes, result.generation)
        assert info.fold_pos == info.committed_pos == tokens
        state = sequence.state()
        assert (state.generation, state.fold_pos, state.committed_pos) == (1, tokens, tokens)
        assert sequence.query().pairs == sum(sequence.row_length(i, h) for i in range(LAYERS) for h in range(HEADS))
        sequence.free()
        assert client.mapped_bytes == 0
        assert daemon.tenant()["charged"] == 0


def test_the_two_halves_of_calls(daemon: Daemon) -> None:
    with connected(daemon.socket()) as client:
        sequence = Filled(client, 400).sequence
        sequence.evict_async()
        with pytest.raises(kvgate.KvgateError, match="eviction is under way") as error:
            sequence.query()
        assert error.value.errno == 16
        sequence.reserve_async(10)
        assert sequence.evict_finish().pairs_dropped > 0
        sequence.reserve_finish()
        assert sequence.state().reserved_pos >= 410
        with pytest.raises(kvgate.KvgateError, match="nothing under way"):
            sequence.evict_finish()


def test_free_ends_what_is_under_way(daemon: Daemon) -> None:
    with connected(daemon.socket()) as client:
        with Filled(client, 400).sequence as sequence:
            sequence.evict_async()
            sequence.reserve_async(10)
        assert client.sequences == []
        assert daemon.tenant()["sequences"] == 0
        assert client.mapped_bytes == 0


def test_truncate_and_protect(daemon: Daemon) -> None:
    with connected(daemon.socket()) as client:
        filled = Filled(client, 300, ratio=0.2)
        sequence = filled.sequence
        sequence.protect(100, 140)
        sequence.evict()
        view = client.view()
        for layer in range(LAYERS):
            held = positions(sequence, view, layer, 0)
            assert set(range(100, 140)) <= set(held)
        sequence.reserve(20)
        sequence.commit(20)
        sequence.truncate(305)
        assert sequence.state().committed_pos == 305
        assert sequence.row_length(0, 0) == len(positions(sequence, view, 0, 0))
        with pytest.raises(kvgate.KvgateError, match="299"):
            sequence.truncate(299)


def test_decode_eviction(daemon: Daemon) -> None:
    budget = 150
    with connected(daemon.socket()) as client:
        sequence = Filled(client, 400, ratio=1.0, budget=budget).sequence
        result = sequence.evict("decode")
        assert result.pairs_held == budget * LAYERS * HEADS


def test_several_sequences(daemon: Daemon) -> None:
    with connected(daemon.socket()) as client:
        one, two = Filled(client, 100, seed=1), Filled(client, 130, seed=2)
        assert client.sequences == [one.sequence, two.sequence]
        assert one.sequence.slot != two.sequence.slot
        assert one.sequence.handle & 0xFFFFFFFF == one.sequence.slot
        assert one.sequence.policy == policy(100)
        one.sequence.free()
        assert client.sequences == [two.sequence]
        query = np.zeros((1, GROUP, K_DIM), np.float32)
        out = two.sequence.attend(1, 1, 129, 1, SCALE, query)
        np.testing.assert_allclose(out[0], [two.v[1, 1].mean(0)] * GROUP, rtol=1e-5)


def test_use_after_free_and_close(daemon: Daemon) -> None:
    with connected(daemon.socket()) as client:
        sequence, other = Filled(client, 50).sequence, Filled(client, 50).sequence
        view = client.view()
        sequence.free()
        sequence.free()
        row = np.zeros((1, GROUP, K_DIM), np.float32)
        for use in (sequence.query, sequence.state, lambda: sequence.row(0, 0), lambda: sequence.reserve(1)):
            with pytest.raises(kvgate.KvgateError, match="freed"):
                use()
        with pytest.raises(kvgate.KvgateError, match="freed"):
            sequence.attend(0, 0, 49, 1, 1.0, row)
    for use in (other.query, other.state, client.nop, client.view, lambda: client.create(policy(10))):
        with pytest.raises(kvgate.KvgateError, match="client binding: it is closed"):
            use()
    with pytest.raises(kvgate.KvgateError, match="closed"):
        other.attend(0, 0, 49, 1, 1.0, row)
    with pytest.raises(BufferError, match="gone"):
        view.k_blocks.torch()
    with pytest.raises(BufferError, match="gone"):
        view.ids.numpy()
    with pytest.raises(kvgate.KvgateError, match="closed"):
        _ = client.mapped_bytes
    other.free()
    client.close()


def test_a_client_that_is_dropped_is_closed(daemon: Daemon) -> None:
    client = kvgate.Client(daemon.socket())
    client.register(layout(), STAGING)
    _ = client.create(policy(50)), client.view()
    assert daemon.tenant()["sequences"] == 1
    del client, _
    gc.collect()
    assert daemon.gone()


def test_a_context_manager_closes_after_an_exception(daemon: Daemon) -> None:
    with pytest.raises(ZeroDivisionError), connected(daemon.socket()) as client, client.create(policy(50)):
        _ = 1 // 0
    assert client.closed
    assert daemon.gone()


def test_fileno_is_readable_when_the_daemon_goes(daemon: Daemon) -> None:
    with kvgate.Client(daemon.socket()) as client:
        assert select.select([client], [], [], 0)[0] == []
        daemon.kill()
        assert select.select([client], [], [], 20)[0] == [client]
        with pytest.raises(kvgate.ConnectionLostError):
            client.process()


def test_rows_of_any_stride(daemon: Daemon) -> None:
    """K and V lie as an engine has them: [tokens][heads][dim], a torch tensor or a numpy array."""
    tokens = 40
    torch.manual_seed(2)
    k, v = torch.randn(tokens, HEADS, K_DIM), torch.randn(tokens, HEADS, V_DIM)
    query = torch.randn(tokens, HEADS, GROUP, K_DIM)
    with connected(daemon.socket(), "f32") as client, client.create(policy(tokens)) as sequence:
        sequence.reserve(tokens)
        sequence.append(0, 0, 0, k[:, 0], v[:, 0])
        sequence.append(0, 1, 0, k.numpy()[:, 1], v.numpy()[:, 1])
        for head in range(HEADS):
            out = sequence.attend(0, head, 10, 25, SCALE, query[10:35, head])
            assert out.shape == (25, GROUP, V_DIM)
            assert out.dtype == np.float32
            for i in (0, 24):
                expected = attention(
                    query[10 + i, head].numpy(), k[: 11 + i, head].numpy(), v[: 11 + i, head].numpy(), SCALE
                )
                np.testing.assert_allclose(out[i], expected, atol=1e-5)


# ---- tables ----


def positions(sequence: kvgate.Sequence, view: kvgate.View, layer: int, head: int) -> list[int]:
    """The positions that a row's pairs name."""
    ids, length = sequence.row(layer, head), sequence.row_length(layer, head)
    k = view.k_blocks.torch()[torch.from_numpy(ids)].reshape(-1, K_DIM)[:length].float()
    return [int(low) + 256 * int(high) for low, high in k[:, :2]]


def paged_attention(q: Any, view: kvgate.View, ids: Any, length: int) -> Any:
    """What an engine's paged kernel does for one request: q [group][k_dim] over the blocks named."""
    at = torch.from_numpy(ids.astype(np.int64))
    k = view.k_blocks.torch()[at].float().reshape(-1, K_DIM)[:length]
    v = view.v_blocks.torch()[at].float().reshape(-1, V_DIM)[:length]
    return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=SCALE)[0]


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_block_table_and_csr_after_an_eviction(daemon: Daemon, dtype: str) -> None:
    """A paged kernel over either table, Sequence.attend() and the pairs that were written say the same."""
    tokens = 700
    torch.manual_seed(3)
    with connected(daemon.socket(), dtype) as client:
        filled = Filled(client, tokens)
        sequence = filled.sequence
        held = sequence.evict().pairs_held
        sequence.reserve(1)
        new_k, new_v = torch.full((1, K_DIM), 2.0), torch.full((1, V_DIM), -3.0)
        for layer in range(LAYERS):
            for head in range(HEADS):
                sequence.append(layer, head, tokens, new_k, new_v)
        sequence.commit(1)
        view, lengths_seen, total = client.view(), set(), 0
        for layer in range(LAYERS):
            table, lengths = sequence.block_table(layer)
            indptr, indices, last = sequence.csr(layer)
            assert table.dtype == lengths.dtype == indptr.dtype == indices.dtype == last.dtype == np.int32
            assert table.shape == (HEADS, -(-lengths.max() // 16))
            for head in range(HEADS):
                length = int(lengths[head])
                pages = indices[indptr[head] : indptr[head + 1]]
                np.testing.assert_array_equal(pages, sequence.row(layer, head))
                np.testing.assert_array_equal(table[head, : len(pages)], pages)
                assert not table[head, len(pages) :].any()
                assert length == sequence.row_length(layer, head) == 16 * (len(pages) - 1) + last[head]
                lengths_seen.add(length)
                total += length
                check_row(filled, view, layer, head, pages, length, new_k, new_v)
        assert total == held + LAYERS * HEADS
        assert len(lengths_seen) > 1, "the rows must differ in length for this to be a test"


def check_row(
    filled: Filled, view: kvgate.View, layer: int, head: int, ids: Any, length: int, new_k: Any, new_v: Any
) -> None:
    """The row holds what was written, each pair once, and attention over it is right."""
    sequence, tokens = filled.sequence, filled.k.shape[2]
    kept = positions(sequence, view, layer, head)[:-1]
    assert len(set(kept)) == length - 1
    assert 0 in kept
    assert set(range(tokens - 20, tokens)) <= set(kept)
    k = np.concatenate([filled.k[layer, head][kept], new_k])
    v = np.concatenate([filled.v[layer, head][kept], new_v])
    query = torch.randn(GROUP, K_DIM)
    expected = attention(query.numpy(), k, v, SCALE)
    paged = paged_attention(query, view, ids, length)
    in_place = sequence.attend(layer, head, tokens, 1, SCALE, query[None])[0]
    np.testing.assert_allclose(paged, expected, atol=2e-4)
    np.testing.assert_allclose(in_place, expected, atol=2e-4)


def test_tables_of_an_empty_sequence(daemon: Daemon) -> None:
    with connected(daemon.socket()) as client, client.create(policy(50)) as sequence:
        table, lengths = sequence.block_table(0)
        assert table.shape == (HEADS, 0)
        assert lengths.tolist() == [0] * HEADS
        indptr, indices, last = sequence.csr(0)
        assert (indptr.tolist(), indices.tolist(), last.tolist()) == ([0] * (HEADS + 1), [], [0] * HEADS)
        assert sequence.row(0, 0).tolist() == []
        with pytest.raises(ValueError, match="layer is 3, outside 0 to 2"):
            sequence.csr(3)
        with pytest.raises(ValueError, match="head is -1, outside 0 to 1"):
            sequence.row(0, -1)
