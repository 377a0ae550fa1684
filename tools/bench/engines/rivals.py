"""What kvgate is compared with: transformers' own cache, one that copies nothing, and eviction that only masks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engines.clock import Spans, free_memory, synchronize
from engines.method import Bench, DoesNotFitError, Make, Method, Workload

EVENT_TOKENS = 128  # between decode evictions
FIRST_TOKENS, NEWEST_TOKENS = 4, 128  # never evicted while decoding
ATTENTION = "bench_masked"


def _one_length(work: Workload, name: str) -> int:
    if len(set(work.lengths)) != 1:
        raise ValueError(f"{name}: sequences of one length only, not {sorted(set(work.lengths))}")
    return work.lengths[0]


def _out_of_memory(work: Workload, bench: Bench, error: torch.OutOfMemoryError) -> DoesNotFitError:
    needs = sum(length + work.new_tokens for length in work.lengths) * bench.geometry.token_bytes
    return DoesNotFitError(str(error).split(". GPU")[0], needs)


class Dynamic(Method):
    """DynamicCache and SDPA: what transformers does when nobody asks for anything else."""

    name = "dynamic"

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.cache: Any = None

    def open(self, work: Workload) -> None:
        self.work = work
        self.bench.model.config._attn_implementation = "sdpa"
        self.cache = DynamicCache(config=self.bench.model.config)

    def fill(self, make: Make) -> None:
        length, batch = _one_length(self.work, self.name), len(self.work.lengths)
        try:
            for number, layer in enumerate(self.cache.layers):
                sample, _, _ = make(number, 0, 1)
                layer.lazy_initialization(sample, sample)
                layer.keys = self._random(number, batch, length, make, 0)
                layer.values = self._random(number, batch, length, make, 1)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(self.work, self.bench, error) from None

    def _random(self, layer: int, batch: int, length: int, make: Make, which: int) -> torch.Tensor:
        """K (0) or V (1) of one layer, [B, H, T, D], written once."""
        geometry = self.bench.geometry
        shape = (batch, geometry.kv_heads, length, geometry.head_dim)
        values = torch.empty(shape, dtype=geometry.dtype, device=self.bench.device)
        fill_room(values, layer, length, make, which)
        return values

    def kv_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers if layer.is_initialized)

    def settle(self) -> None:
        synchronize(self.bench.device)

    def close(self) -> None:
        self.cache = None
        free_memory(self.bench.device)


def fill_room(room: torch.Tensor, layer: int, length: int, make: Make, which: int, step: int = 4096) -> None:
    """Writes tokens 0 .. length - 1 of every sequence of room [B, H, T, D]."""
    for begin in range(0, length, step):
        end = min(begin + step, length)
        room[:, :, begin:end] = make(layer, begin, end)[which]


class RoomLayer(DynamicLayer):
    """A layer with room for `capacity` tokens from the start: update() copies the new tokens only."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_room = torch.empty((batch, heads, self.capacity, dim), dtype=self.dtype, device=self.device)
        self.value_room = torch.empty_like(self.key_room)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self.key_room[:, :, self.length : end] = key_states
        self.value_room[:, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = self.key_room[:, :, :end], self.value_room[:, :, :end]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length


class Room(Dynamic):
    """DynamicCache's layers with room for everything from the start: SDPA without the copy of the cache each step."""

    name = "room"

    def open(self, work: Workload) -> None:
        self.work = work
        self.bench.model.config._attn_implementation = "sdpa"
        capacity = (_one_length(work, self.name) + work.new_tokens + 15) // 16 * 16
        self.cache = Cache(layers=[RoomLayer(capacity) for _ in range(self.bench.geometry.layers)])

    def fill(self, make: Make) -> None:
        length, batch = _one_length(self.work, self.name), len(self.work.lengths)
        try:
            for number, layer in enumerate(self.cache.layers):
                sample = make(number, 0, 1)[0].expand(batch, -1, -1, -1)
                layer.lazy_initialization(sample, sample)
                fill_room(layer.key_room, number, length, make, 0)
                fill_room(layer.value_room, number, length, make, 1)
                layer.length = length
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(self.work, self.bench, error) from None

    def kv_bytes(self) -> int:
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        return sum(layer.key_room.nbytes + layer.value_room.nbytes for layer in layers)


# ---- eviction that only masks


def _closed(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """The attention function while no Masked is open."""
    raise RuntimeError("masked: attention without an open workload")


class Masked(Room):
    """The gate's scores in PyTorch and a mask over the full cache, as libraries do that free nothing.

    The mask is an additive one of the model's dtype (0 or -inf), one row for each KV head, which the attention needs
    anyway; scores stay in fp32 with -inf for what is evicted. The rules are kvgate's (level `pair`).
    """

    name = "masked"

    def __init__(self, bench: Bench, once: bool = False) -> None:
        super().__init__(bench)
        self.once = once  # evict once behind the whole prompt, not after each chunk
        self.spans = Spans(bench.device)
        self._hooks: list[Any] = []
        self._decode: Callable[..., torch.Tensor] | None = None

    def open(self, work: Workload) -> None:
        super().open(work)
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, self.attend)
        self.bench.model.config._attn_implementation = ATTENTION
        geometry, capacity = self.bench.geometry, self.cache.layers[0].capacity
        shape = (geometry.layers, len(work.lengths), geometry.kv_heads, capacity)
        staged = (geometry.layers, len(work.lengths), EVENT_TOKENS, geometry.hidden)
        try:
            self.mask = torch.zeros(shape, dtype=geometry.dtype, device=self.bench.device)
            self.scores = torch.zeros(shape, dtype=torch.float32, device=self.bench.device)
            self.staged = torch.empty(
                staged if work.decode_budget else 0, dtype=torch.bfloat16, device=self.bench.device
            )
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(work, self.bench, error) from None
        self.start, self.rows = 0, 0  # the first token that no prefill eviction has seen; rows staged
        self._decode = None
        self._hook()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _closed)  # or the registry would keep the model alive
        self.mask = self.scores = self.staged = torch.empty(0)
        self.spans.reset()
        super().close()

    def kv_bytes(self) -> int:
        return super().kv_bytes() + self.mask.nbytes + self.scores.nbytes

    def shares(self) -> dict[str, float]:
        seconds = self.spans.sum()
        self.spans.reset()
        return seconds

    # ---- the gate

    def _hook(self) -> None:
        for number, layer in enumerate(self.bench.model.model.layers):

            def look(_module: Any, _args: Any, kwargs: dict[str, Any], layer: int = number) -> None:
                self._take(layer, kwargs["hidden_states"])

            self._hooks.append(layer.self_attn.register_forward_pre_hook(look, with_kwargs=True))

    def _take(self, layer: int, hidden: torch.Tensor) -> None:
        """Scores a chunk's hidden states [B, T, D] at once; those of decoded tokens are kept for the next event."""
        count = hidden.shape[1]
        if count > 1:
            at = self.cache.layers[layer].length
            with self.spans.span("gate"):
                self.scores[layer, :, :, at : at + count] = self.bench.gate.scores(layer, hidden)
        elif self.work.decode_budget:
            self.staged[layer, :, self.rows] = hidden[:, 0]

    # ---- evictions

    def fill(self, make: Make) -> None:
        super().fill(make)
        length = self.work.lengths[0]
        self.scores[..., :length].uniform_()
        if self.work.ratio < 1:
            self._evict_prompt(0, length, once=True)

    def after_chunk(self) -> None:
        seen = self.cache.get_seq_length()
        if self.work.ratio < 1 and (not self.once or seen >= self.work.lengths[0]):
            self._evict_prompt(self.start, seen, once=self.once)

    def _evict_prompt(self, start: int, seen: int, once: bool) -> None:
        """Level `pair` over the context tokens [start, seen - window)."""
        context, ratio, window = self.work.lengths[0], self.work.ratio, self.work.window
        if context < self.work.chunk:
            window = int(0.02 * context)
        window, kept = (
            (int(ratio * context), 0.0)
            if ratio * context < window
            else (window, (ratio * context - window) / (context - window))
        )
        end = max(seen - window, start)
        with self.spans.span("evict"):
            for sequence in range(len(self.work.lengths)):
                self._keep_best(sequence, start, end, kept)
        self.start = end if not once else seen

    def _keep_best(self, sequence: int, start: int, end: int, kept: float) -> None:
        scores = self.scores[:, sequence, :, start:end]
        if not scores.numel():
            return
        place = max(int(scores.numel() * kept) - 1, 0)
        threshold = torch.topk(scores.flatten(), place + 1, sorted=False).values.min()
        self._drop(sequence, start, end, scores <= threshold)

    def _drop(self, sequence: int, start: int, end: int, gone: torch.Tensor) -> None:
        self.scores[:, sequence, :, start:end].masked_fill_(gone, -torch.inf)
        self.mask[:, sequence, :, start:end].masked_fill_(gone, -torch.inf)

    def after_step(self) -> None:
        if not self.work.decode_budget:
            return
        self.rows += 1
        seen = self.cache.get_seq_length()
        if (seen - 1) % EVENT_TOKENS == 0 or self.rows == EVENT_TOKENS:
            self._event(seen)

    def _event(self, seen: int) -> None:
        """Scores what was decoded since the last event, and evicts each sequence to its budget."""
        with self.spans.span("gate"):
            for layer in range(self.bench.geometry.layers):
                rows = self.staged[layer, :, : self.rows]
                self.scores[layer, :, :, seen - self.rows : seen] = self.bench.gate.scores(layer, rows)
        self.rows = 0
        limit = self.work.decode_budget * self.bench.geometry.layers * self.bench.geometry.kv_heads
        with self.spans.span("evict"):
            for sequence in range(len(self.work.lengths)):
                scores = self.scores[:, sequence, :, :seen].clone()
                for kept in (scores[..., :FIRST_TOKENS], scores[..., max(seen - NEWEST_TOKENS, 0) :]):
                    kept.masked_fill_(kept > -torch.inf, 1.0)
                if limit < scores.numel():
                    threshold = torch.topk(scores.flatten(), limit, sorted=False).values.min()
                    self._drop(sequence, 0, seen, scores < threshold)

    # ---- attention

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention function: query [B, heads, Q, D], key and value [B, H, T, D] -> [B, Q, heads, D]."""
        count, total = query.shape[2], key.shape[2]
        if count == total:
            out = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=True
            )
        elif count > 1:
            out = self._attend_chunk(module.layer_idx, query, key, value, scaling)
        else:
            out = self._attend_token(module.layer_idx, query, key, value, scaling)
        return out.transpose(1, 2).contiguous(), None

    def _attend_chunk(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """One KV head after the other, or the masks would take more room than the cache."""
        batch, _, count, dim = query.shape
        heads, total = key.shape[1], key.shape[2]
        group = query.shape[1] // heads
        out = torch.empty_like(query)
        later = torch.ones((count, total), dtype=torch.bool, device=query.device).triu_(total - count + 1)
        for head in range(heads):
            mask = self.mask[layer, :, head, None, None, :total].expand(batch, 1, count, total)
            mask = mask.masked_fill(later, -torch.inf).expand(batch, group, count, total)
            rows = slice(head * group, (head + 1) * group)
            out[:, rows] = functional.scaled_dot_product_attention(
                query[:, rows],
                key[:, head : head + 1].expand(batch, group, total, dim),
                value[:, head : head + 1].expand(batch, group, total, dim),
                attn_mask=mask,
                scale=scaling,
            )
        return out

    def _attend_token(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """The query heads of a group are rows of one product, so that the KV is not repeated."""
        batch, heads, total, dim = key.shape
        rows = query.reshape(batch, heads, -1, dim)
        mask = self.mask[layer, :, :, None, :total]
        if self._decode is None:
            self._decode = fastest([_by_products, _by_sdpa], (rows, key, value, mask, scaling), self.bench.device)
        return self._decode(rows, key, value, mask, scaling).reshape(batch, -1, 1, dim)


def _by_products(
    rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    weights = torch.matmul(rows * scaling, key.transpose(2, 3)) + mask
    return torch.matmul(torch.softmax(weights, -1, dtype=torch.float32).to(value.dtype), value)


def _by_sdpa(
    rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    wide = mask.expand(-1, -1, rows.shape[2], -1)
    return functional.scaled_dot_product_attention(rows, key, value, attn_mask=wide, scale=scaling)


def fastest(
    ways: list[Callable[..., torch.Tensor]], arguments: tuple[Any, ...], device: str
) -> Callable[..., torch.Tensor]:
    """The one of several functions that takes the least time with these arguments."""

    def seconds(way: Callable[..., torch.Tensor]) -> float:
        way(*arguments)
        synchronize(device)
        began = time.perf_counter()
        for _ in range(3):
            way(*arguments)
        synchronize(device)
        return time.perf_counter() - began

    return min(ways, key=seconds)
