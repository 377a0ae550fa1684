"""What the binding's tests share: a small layout, KV whose pairs name themselves, and a plain reference."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import kvgate

LAYERS, HEADS, GROUP, K_DIM, V_DIM, HIDDEN = 3, 2, 2, 32, 64, 128
STAGING = 1 << 20
Floats = np.ndarray[Any, np.dtype[np.float32]]


def layout(dtype: str = "bf16", max_sequences: int = 4, max_tokens: int = 2048, **changes: Any) -> kvgate.Layout:
    """Three layers of two KV heads, K narrower than V."""
    fields = {
        "model": "binding",
        "hidden_dim": HIDDEN,
        "layers": LAYERS,
        "heads": HEADS,
        "query_heads": GROUP,
        "k_dim": K_DIM,
        "v_dim": V_DIM,
        "dtype": dtype,
        "max_sequences": max_sequences,
        "max_tokens": max_tokens,
    }
    return kvgate.Layout(**{**fields, **changes})


def policy(tokens: int, ratio: float = 0.3, **changes: Any) -> kvgate.Policy:
    """Of a prompt of `tokens` tokens, the first of which is the prefix, evicted once."""
    fields = {"context_tokens": tokens - 1, "prefix_tokens": 1, "max_new_tokens": 64, "window": 20}
    return kvgate.Policy(ratio=ratio, **{**fields, "window_absolute": True, **changes})


@contextmanager
def connected(socket: str, dtype: str = "bf16", **changes: Any) -> Iterator[kvgate.Client]:
    """A client with the layout registered."""
    with kvgate.Client(socket, "binding") as client:
        client.register(layout(dtype, **changes), STAGING)
        yield client


def whole_numbers(rng: np.random.Generator, tokens: int, dim: int) -> Floats:
    """[layers][heads][tokens][dim] of small whole numbers, which every dtype holds exactly; two name the position."""
    values = rng.integers(-8, 9, (LAYERS, HEADS, tokens, dim)).astype(np.float32)
    values[..., 0], values[..., 1] = np.arange(tokens) % 256, np.arange(tokens) // 256
    return values


class Filled:
    """A sequence whose first `tokens` tokens are written, staged with random scores and committed."""

    def __init__(self, client: kvgate.Client, tokens: int, seed: int = 1, **changes: Any) -> None:
        rng = np.random.default_rng(seed)
        self.k, self.v = whole_numbers(rng, tokens, K_DIM), whole_numbers(rng, tokens, V_DIM)
        self.sequence = client.create(policy(tokens, **changes))
        self.sequence.reserve(tokens)
        for layer in range(LAYERS):
            self.sequence.stage_scores(layer, 0, rng.random((tokens, HEADS), np.float32))
            for head in range(HEADS):
                self.sequence.append(layer, head, 0, self.k[layer, head], self.v[layer, head])
        self.sequence.commit(tokens)


def attention(q: Floats, k: Floats, v: Floats, scale: float) -> Floats:
    """q [group][k_dim] over k [pairs][k_dim], v [pairs][v_dim]: [group][v_dim], in float64."""
    logits = scale * q.astype(np.float64) @ k.T.astype(np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    mean: Floats = (weights / weights.sum(axis=1, keepdims=True) @ v.astype(np.float64)).astype(np.float32)
    return mean


def descriptors() -> dict[str, str]:
    """This process's open descriptors and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the listing's own
    return found
