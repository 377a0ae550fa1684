"""An admitted sequence gets its room, also while what its evictions freed is on its way back."""

import numpy as np
import pytest

import kvgate
from conftest import StartDaemon
from daemon import config

CHUNK, LAYERS, HEADS = 512, 8, 4
LAYOUT = kvgate.Layout("room", 64, LAYERS, HEADS, 2, 32, 32, "bf16", 4, 4096)
POLICY = kvgate.Policy(
    0.25, context_tokens=2 * CHUNK, chunk_tokens=CHUNK, window=16, window_absolute=True, max_new_tokens=CHUNK
)


def read(client: kvgate.Client, sequence: kvgate.Sequence, finish: bool) -> None:
    """A prompt of two chunks with its evictions, and room for all that may be generated."""
    scores = np.random.default_rng(1).random((CHUNK, HEADS), dtype=np.float32)
    for begin in range(0, 2 * CHUNK, CHUNK):
        sequence.reserve(CHUNK)
        for layer in range(LAYERS):
            sequence.stage_scores(layer, begin, scores)
        sequence.commit(CHUNK)
        client.stage_wait()
        if finish:
            sequence.evict_async()
            sequence.evict_finish()
        else:
            sequence.evict()
    sequence.reserve(CHUNK)


@pytest.mark.parametrize("finish", [True, False])
def test_a_budget_of_what_was_admitted_is_enough(start_daemon: StartDaemon, finish: bool) -> None:
    daemon = start_daemon(config(size="64M"))
    with kvgate.Client(daemon.socket()) as client:
        client.register(LAYOUT, 1 << 20)
        sequence = client.create(POLICY)
        tenant = daemon.tenant()
        admitted = tenant["charged"] + tenant["promised"]
        sequence.free()
    tight = start_daemon(config(size="64M", a=f"device.max = {admitted}"))
    for _ in range(3):
        with kvgate.Client(tight.socket()) as client:
            client.register(LAYOUT, 1 << 20)
            sequence = client.create(POLICY)
            read(client, sequence, finish)
            sequence.free()  # its memory is back in the pool, for the next round
