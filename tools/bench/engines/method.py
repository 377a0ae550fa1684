"""What every way to keep the KV has in common, so that one loop measures them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engines.gate import Gate
from engines.geometry import Geometry

# Of one layer and positions begin .. end - 1: K and V [1, H, T, D], hidden states [1, T, hidden].
Make = Callable[[int, int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class DoesNotFitError(Exception):
    """There is no room. `needs`: bytes of KV that would have been needed, 0: unknown."""

    def __init__(self, text: str, needs: int) -> None:
        super().__init__(text)
        self.needs = needs


@dataclass(frozen=True)
class Workload:
    """What a method is opened for. lengths: tokens of each sequence's context, alike where a method needs that."""

    lengths: list[int]
    ratio: float = 1.0
    chunk: int = 16000
    window: int = 4096
    new_tokens: int = 16
    decode_budget: int = 0  # tokens a head, on average; 0: no decode eviction
    measure: bool = False  # shares() as well, which may cost something


@dataclass(frozen=True)
class Bench:
    """What all methods share. None of it is theirs to free."""

    model: Any
    geometry: Geometry
    gate: Gate
    device: str


class Method:
    """A way to keep KV: opened for a workload, then prefilled by the model or filled, decoded, closed."""

    name = ""
    bench: Bench
    cache: Any = None  # transformers' Cache while open

    def open(self, work: Workload) -> None:
        """Makes the cache. DoesNotFitError where it is refused at once."""
        raise NotImplementedError

    def fill(self, make: Make) -> None:
        """Fills all contexts without the model."""
        raise NotImplementedError

    def kv_bytes(self) -> int:
        """Physical bytes of KV now, with what the method keeps beside it for each pair."""
        raise NotImplementedError

    def close(self) -> None:
        """Frees everything of the workload. Harmless when not open."""
        raise NotImplementedError

    def detach(self) -> None:
        """Ends what outlives workloads. Harmless a second time."""

    def after_chunk(self) -> None:
        """Called after each chunk of the prompt."""

    def after_step(self) -> None:
        """Called after each decoded token."""

    def settle(self) -> None:
        """Waits for everything that was begun, evictions included."""

    def watch(self, on: bool) -> None:
        """Whether shares() is asked for, where knowing costs something."""

    def accounts(self) -> dict[str, int]:
        """More bytes for the row, by the names that it shall have there."""
        return {}

    def shares(self) -> dict[str, float]:
        """Seconds of the gate ("gate") and of evictions ("evict") since the last call."""
        return {}


class Pool:
    """Random K, V and hidden states, made once and read from another place each time."""

    def __init__(self, geometry: Geometry, device: str, tokens: int, seed: int = 3) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        spare = 8 * 37

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(geometry.dtype)

        self._tokens, self._spare, self._calls = tokens, spare, 0
        self._k = normal(1, geometry.kv_heads, tokens + spare, geometry.head_dim)
        self._v = normal(1, geometry.kv_heads, tokens + spare, geometry.head_dim)
        self._hidden = normal(1, tokens + spare, geometry.hidden)

    def make(self, layer: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """At most `tokens` tokens; see Make. Views that are not to be written."""
        count = end - begin
        if count > self._tokens:
            raise ValueError(f"pool: {count} tokens were asked for, it has {self._tokens}")
        at = 8 * self._calls % self._spare
        self._calls += 1
        where = slice(at, at + count)
        return self._k[:, :, where], self._v[:, :, where], self._hidden[:, where]
