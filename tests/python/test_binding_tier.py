"""The host tier and shared contexts through the binding: what comes back is what went, and who finds it."""

import errno
import hashlib
import struct
from typing import Any

import numpy as np
import pytest
import torch

import kvgate
from binding import GROUP, HEADS, HIDDEN, K_DIM, LAYERS, STAGING, V_DIM, Filled, connected, policy
from conftest import StartDaemon
from daemon import ROOT, Daemon, config

PILOT_GATE = ROOT / "tests" / "data" / "pilot-lm" / "gate.safetensors"
TOKENS = 500
SCALE = 0.05


@pytest.fixture
def tiered(start_daemon: StartDaemon) -> Daemon:
    """A daemon with 32 MiB of device memory and as much of the host's."""
    return start_daemon(config(host="32M"))


def positions(client: kvgate.Client, sequence: kvgate.Sequence, layer: int, head: int) -> list[int]:
    """Positions of the pairs that a row holds, in order: the first two numbers of a key name its position."""
    blocks = client.view().k_blocks.torch()[torch.from_numpy(sequence.row(layer, head)).long()]
    keys = blocks.reshape(-1, K_DIM)[: sequence.row_length(layer, head), :2].float()
    return sorted((keys[:, 0] + 256 * keys[:, 1]).int().tolist())


def all_positions(client: kvgate.Client, sequence: kvgate.Sequence) -> list[list[int]]:
    return [positions(client, sequence, layer, head) for layer in range(LAYERS) for head in range(HEADS)]


def next_token(sequence: kvgate.Sequence, seed: int = 7) -> list[Any]:
    """Appends a token of random K and V, and its attention in every row."""
    rng, pos = np.random.default_rng(seed), sequence.state().committed_pos
    sequence.reserve(1)
    out = []
    for layer in range(LAYERS):
        for head in range(HEADS):
            k, v = rng.random((1, K_DIM), np.float32), rng.random((1, V_DIM), np.float32)
            sequence.append(layer, head, pos, k, v)
            out.append(sequence.attend(layer, head, pos, 1, SCALE, rng.random((1, GROUP, K_DIM), np.float32)))
    sequence.commit(1)
    return out


def same(a: list[Any], b: list[Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# ---- keys ----


def links(gate: bytes, rules: kvgate.Policy, tokens: list[int], chunk: int) -> list[bytes]:
    """The keys as kvgate.h describes them."""
    head = b"kvgate context 1" + b"binding".ljust(128, b"\0") + struct.pack("<2I", HIDDEN, 1)
    head += struct.pack("<18I", 1, LAYERS, 0, HEADS, HEADS, 0, 1, 0, K_DIM, V_DIM, 1, 1, 0, 0, 16, 0, 0, GROUP)
    modes, levels = ["off", "chunked", "once", "threshold"], ["pair", "pair-head", "pair-layer", "adakv-layer"]
    fields = (modes.index(rules.mode), levels.index(rules.level), int(rules.window_absolute), rules.prefix_tokens)
    head += gate + struct.pack("<d4I", rules.ratio, *fields)
    head += struct.pack("<3If", rules.chunk_tokens, rules.window, rules.floor, rules.threshold)
    link, keys = hashlib.sha256(head).digest(), []
    for begin in range(0, len(tokens), chunk):
        part = tokens[begin : begin + chunk]
        link = hashlib.sha256(link + struct.pack(f"<{len(part)}I", *part)).digest()
        keys.append(link)
    return keys


def test_keys_are_what_hashlib_computes(daemon: Daemon) -> None:
    tokens = [(i * 2654435761) % 2**32 for i in range(700)]
    rules = kvgate.Policy(ratio=0.3, level="pair-layer", chunk_tokens=300, prefix_tokens=2, window=9, floor=3)
    with connected(daemon.socket()) as client:
        assert client.context_keys(rules, tokens, 300) == links(bytes(32), rules, tokens, 300)
        assert client.context_keys(rules, np.array(tokens, np.uint32), 700) == links(bytes(32), rules, tokens, 700)
        assert client.context_keys(rules, torch.tensor(tokens)) == links(bytes(32), rules, tokens, 700)
        assert client.context_keys(rules, []) == []
        retained = kvgate.Policy(**{**vars(rules), "retain": "host", "context_tokens": 5, "max_new_tokens": 6})
        assert client.context_keys(retained, tokens, 300) == links(bytes(32), rules, tokens, 300)
        # Longer prompts have the same keys for what they have in common.
        assert client.context_keys(rules, [*tokens[:600], 1, 2], 300)[:2] == links(bytes(32), rules, tokens, 300)[:2]
        with pytest.raises(ValueError, match="token is -1, outside 0 to 4294967295"):
            client.context_keys(rules, [-1])


def test_keys_depend_on_the_gate(daemon: Daemon) -> None:
    pilot, rules = kvgate.Layout("pilot", 256, 6, 4, 2, 32, 32, "bf16", 2, 1024), kvgate.Policy(ratio=0.3)
    with kvgate.Client(daemon.socket()) as client:
        client.register(pilot, STAGING)
        before = client.context_keys(rules, [1, 2, 3])
        client.load_gate(PILOT_GATE)
        assert client.context_keys(rules, [1, 2, 3]) != before


# ---- arguments ----


def test_arguments_are_named(daemon: Daemon) -> None:
    with pytest.raises(ValueError, match="retain is 'disk', not one of none, host"):
        kvgate.Policy(retain="disk")
    with connected(daemon.socket()) as client, client.create(policy(20)) as sequence:
        for arguments in ({}, {"ratio": 0.3, "budget": 200}):
            with pytest.raises(ValueError, match="recall: one of ratio and budget is needed"):
                sequence.recall(**arguments)
        with pytest.raises(ValueError, match="budget is -1"):
            sequence.recall(budget=-1)
        with pytest.raises(ValueError, match="key has 3 bytes, not 32"):
            sequence.publish(b"abc")
        with pytest.raises(TypeError, match="key is 'abc', not bytes"):
            client.find("abc")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="n is -1"):
            sequence.fork(-1)
        assert client.pressure == 0


# ---- the host's memory ----


def test_comes_back_bit_for_bit(tiered: Daemon) -> None:
    with connected(tiered.socket()) as client:
        one, other = Filled(client, TOKENS).sequence, Filled(client, TOKENS).sequence
        one.evict()
        other.evict()
        held, mapped = all_positions(client, other), client.mapped_bytes
        bytes_there = other.offload()
        assert bytes_there > 0
        assert client.mapped_bytes < mapped
        assert other.residency() == kvgate.Residency(True, False, 0)
        with pytest.raises(kvgate.KvgateError) as error:
            other.attend(0, 0, TOKENS - 1, 1, SCALE, np.zeros((1, GROUP, K_DIM), np.float32))
        assert error.value.errno == errno.EBUSY
        other.restore()
        assert other.residency() == kvgate.Residency(False, False, 0)
        assert all_positions(client, other) == held
        assert same(next_token(one), next_token(other))
        # A reserve brings it back, too.
        other.offload()
        assert same(next_token(one, 8), next_token(other, 8))
    assert tiered.gone()
    assert tiered.ctl("audit")["clean"]


def test_is_released_as_idle(tiered: Daemon) -> None:
    with connected(tiered.socket()) as client:
        sequence = Filled(client, TOKENS).sequence
        sequence.idle()
        assert sequence.residency().idle
        with pytest.raises(kvgate.KvgateError) as error:
            sequence.evict()
        assert error.value.errno == errno.EBUSY
        sequence.restore()
        sequence.evict()
        assert not sequence.residency().idle


@pytest.mark.parametrize("level", ["pair", "pair-head", "pair-layer", "adakv-layer"])
def test_recall_holds_what_the_higher_ratio_would(tiered: Daemon, level: str) -> None:
    with connected(tiered.socket()) as client:
        low = Filled(client, TOKENS, ratio=0.1, level=level, retain="host").sequence
        high = Filled(client, TOKENS, ratio=0.3, level=level).sequence
        low.evict()
        high.evict()
        few = all_positions(client, low)
        assert few != all_positions(client, high)
        result = low.recall(ratio=0.3)
        assert result.pairs_recalled > 0
        assert result.pairs_held == high.query().pairs == low.query().pairs
        assert all_positions(client, low) == all_positions(client, high)
        assert low.recall(ratio=0.3).pairs_recalled == 0
        assert low.recall(budget=TOKENS).pairs_held == TOKENS * LAYERS * HEADS
    assert tiered.gone()
    assert tiered.ctl("audit")["clean"]


# ---- contexts ----


def test_is_shared_by_those_who_know_the_key(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config(a="", b=""))
    rules, key, other = policy(TOKENS), bytes(range(32)), bytes(32)
    with connected(daemon.socket("a")) as client, connected(daemon.socket("a")) as second:
        sequence = Filled(client, TOKENS).sequence
        plain = Filled(client, TOKENS).sequence
        sequence.evict()
        plain.evict()
        assert client.find(key) is None
        info = sequence.publish(key)
        assert (info.tokens, info.attached, info.existed) == (TOKENS, 1, False)
        assert sequence.residency().shared_pos == TOKENS
        found = second.find_longest([other, key, other])
        assert found is not None
        assert (found[0], found[1].id, found[1].tokens) == (1, info.id, TOKENS)
        mine = second.attach(key, kvgate.Policy(ratio=1.0, mode="off", max_new_tokens=64))
        assert mine.state().committed_pos == TOKENS
        assert all_positions(second, mine) == all_positions(client, plain)
        expected = next_token(plain)
        assert same(next_token(mine), expected)
        assert same(next_token(sequence), expected)
        # It outlives the publisher.
        sequence.free()
        assert same(next_token(mine, 9), next_token(plain, 9))
        again = Filled(client, TOKENS).sequence
        again.evict()
        assert again.publish(key).existed
        with connected(daemon.socket("b")) as stranger:
            assert stranger.find(key) is None
            with pytest.raises(kvgate.KvgateError) as error:
                stranger.attach(key, rules)
            assert error.value.errno == errno.ENOENT
    assert daemon.ctl("audit")["clean"]


def test_copies_go_their_own_ways(daemon: Daemon) -> None:
    with connected(daemon.socket()) as client:
        sequence = Filled(client, TOKENS, max_new_tokens=128).sequence
        plain = Filled(client, TOKENS, max_new_tokens=128).sequence
        sequence.evict()
        plain.evict()
        assert same(next_token(sequence), next_token(plain))
        copies = sequence.fork(2)
        assert len(client.sequences) == 4
        assert same(next_token(copies[0], 10), next_token(plain, 10))
        next_token(copies[1], 11)
        sequence.free()
        copies[1].free()
        assert same(next_token(copies[0], 12), next_token(plain, 12))
        with pytest.raises(kvgate.KvgateError):
            copies[0].fork(4)
        assert len(client.sequences) == 2
    assert daemon.gone()
    assert daemon.ctl("audit")["clean"]
