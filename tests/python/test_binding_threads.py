"""Threads that share a client."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import kvgate
from binding import GROUP, HEADS, K_DIM, LAYERS, V_DIM, Filled, attention, connected, policy
from daemon import Daemon
from kvgate._turns import Turns

WAIT = 20


def together(*works: Callable[[], None]) -> None:
    """Runs them in a thread each; raises what one raised."""
    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result(120)


def for_ever(use: Callable[[], object]) -> None:
    """Until it raises."""
    while True:
        use()


def test_writers_and_readers_side_by_side(daemon: Daemon) -> None:
    """Each head has a thread that appends and attends, while others make the calls that take turns."""
    tokens, rng = 200, np.random.default_rng(5)
    k = rng.standard_normal((LAYERS, HEADS, tokens, K_DIM)).astype(np.float32)
    v = rng.standard_normal((LAYERS, HEADS, tokens, V_DIM)).astype(np.float32)
    query = rng.standard_normal((1, GROUP, K_DIM)).astype(np.float32)
    with connected(daemon.socket(), "f32") as client, client.create(policy(tokens)) as sequence:
        sequence.reserve(tokens)

        def head_work(layer: int, head: int) -> Callable[[], None]:
            def work() -> None:
                for pos in range(tokens):
                    one = slice(pos, pos + 1)
                    sequence.append(layer, head, pos, k[layer, head, one], v[layer, head, one])
                    out = sequence.attend(layer, head, pos, 1, 0.2, query)[0]
                    expected = attention(query[0], k[layer, head, : pos + 1], v[layer, head, : pos + 1], 0.2)
                    np.testing.assert_allclose(out, expected, atol=1e-5)

            return work

        def call_work() -> None:
            for _ in range(100):
                client.nop()
                assert sequence.query().committed_pos == 0
                with client.create(policy(20)) as other:
                    other.reserve(20)

        together(*(head_work(i, h) for i in range(LAYERS) for h in range(HEADS)), call_work, call_work)
        sequence.commit(tokens)
        assert sequence.query().pairs == tokens * LAYERS * HEADS
        assert client.sequences == [sequence]


def test_sequences_of_several_threads(daemon: Daemon) -> None:
    with connected(daemon.socket()) as client:

        def work(seed: int) -> Callable[[], None]:
            def run() -> None:
                for i in range(5):
                    with Filled(client, 150 + seed, seed=seed + i).sequence as sequence:
                        assert sequence.evict().pairs_held < 0.5 * (150 + seed) * LAYERS * HEADS

            return run

        together(*(work(seed) for seed in range(4)))
        assert client.mapped_bytes == 0
        assert daemon.tenant()["sequences"] == 0


def test_errors_are_the_callers_own(daemon: Daemon) -> None:
    """Two threads that fail differently each see their own text."""
    with connected(daemon.socket()) as client, client.create(policy(20)) as sequence:

        def commits() -> None:
            for _ in range(200):
                with pytest.raises(kvgate.KvgateError, match="commit of 999 tokens"):
                    sequence.commit(999)

        def loads() -> None:
            for _ in range(200):
                with pytest.raises(kvgate.KvgateError, match="gate /nowhere/gate"):
                    client.load_gate("/nowhere/gate")

        together(commits, loads)


def test_closing_under_callers(daemon: Daemon) -> None:
    """Threads at work when the client is closed get an exception, and no more."""
    with connected(daemon.socket()) as client:
        sequence = Filled(client, 50).sequence
        query = np.zeros((1, GROUP, K_DIM), np.float32)
        started = threading.Barrier(3)

        def until_closed(use: Callable[[], object]) -> Callable[[], None]:
            def work() -> None:
                use()
                started.wait(WAIT)
                with pytest.raises(kvgate.KvgateError, match="closed"):
                    for_ever(use)

            return work

        def close() -> None:
            started.wait(WAIT)
            client.close()

        together(until_closed(lambda: sequence.attend(0, 0, 49, 1, 1.0, query)), until_closed(client.nop), close)


def test_sharers_are_together_and_others_alone() -> None:
    turns, inside, log = Turns(), threading.Barrier(2), []
    alone = threading.Event()

    def shares() -> None:
        with turns.shared():
            inside.wait(WAIT)  # both are in, or this fails
            alone.set()
            inside.wait(WAIT)
            log.append("shared")

    def is_alone() -> None:
        assert alone.wait(WAIT)
        with turns:
            log.append("alone")

    together(shares, shares, is_alone)
    assert log == ["shared", "shared", "alone"]


def test_a_call_lets_other_threads_run(daemon: Daemon) -> None:
    """The interpreter's lock is free while a call waits: another thread ends the wait."""
    with connected(daemon.socket()) as client:
        client.set_spin(0)

        def waits() -> None:
            with pytest.raises(kvgate.ConnectionLostError):
                for_ever(client.nop)

        together(waits, daemon.kill)
