"""The KV of one layout in the daemon's memory, as torch sees it: append and attend, on the host and on a GPU."""

from __future__ import annotations

import errno

import torch

from kvgate import Client, KvgateError

from . import paged
from .rows import Row


class Store:
    """Rows of the sequences of one client. window: tokens that a query sees, itself included; -1: all.

    Sliding layers (window > 0) keep their KV as a ring: token p lies at place p % window of its rows, and nothing
    is ever evicted from it.
    """

    def __init__(self, client: Client, window: int = -1) -> None:
        view, layout = client.view(), client.layout
        assert layout is not None
        self.client, self.window = client, window
        self.heads, self.dim, self.layers = layout.heads, layout.k_dim, layout.layers
        self.on_gpu = client.kind == "cuda"
        self._k = view.k_blocks.torch().view(-1, self.dim)
        self._v = view.v_blocks.torch().view(-1, self.dim)
        self._ids, self._base = view.ids.torch(), view.base_len.torch()
        self.device = self._ids.device
        self._flash = self.on_gpu and layout.dtype in ("bf16", "f16") and self.dim <= 256
        self._kernels: bool | None = None
        self._slots: dict[tuple[int, ...], torch.Tensor] = {}
        self._held: dict[int, list[list[int]]] = {}

    def _slot(self, row: Row) -> int:
        """The slot of a sequence, or of its ring."""
        return row.slot if self.window <= 0 or row.window is None else row.window.slot

    # ---- a step of one token of each sequence, on a GPU ----

    def slots(self, rows: list[Row]) -> torch.Tensor:
        """The rows' slots on the GPU, int32 [rows]; the same tensor for the same rows."""
        key = tuple(self._slot(row) for row in rows)
        if key not in self._slots:
            self._slots[key] = torch.tensor(key, dtype=torch.int32, device=self.device)
        return self._slots[key]

    def kernels(self, row: Row) -> bool:
        """Whether libkvgate's attention of one token is made for this layout (on a GPU, head sizes of some kinds)."""
        if self._kernels is None:
            self._kernels = self.on_gpu
            try:
                if self.on_gpu:
                    self.client.cuda_plan(0, self.layers, 1, self.slots([row]), 0)
            except KvgateError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                self._kernels = False
        return self._kernels

    def plan(self, rows: list[Row]) -> None:
        """Before a decode step on a GPU: divides the rows' pairs among its processors."""
        if self.window > 0:
            self._ring_grow(rows, [1] * len(rows))
            self._ring_index = torch.tensor(
                [row.length % self.window for row in rows], dtype=torch.int32, device=self.device
            )
        self._step_slots = self.slots(rows)
        self.client.cuda_plan(0, self.layers, len(rows), self._step_slots, 0 if self.window > 0 else 1)

    def decode(
        self, layer: int, rows: list[Row], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Appends and attends: q [B][query heads][1][D], k and v [B][heads][1][D] -> [B][1][query heads][D]."""
        count, slots = len(rows), self._step_slots
        q, k, v = q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        stride = self.heads * self.dim
        index = self._ring_index if self.window > 0 else None
        self.client.cuda_append(layer, count, slots, index, k, stride, v, stride)
        out = torch.empty_like(q)
        self.client.cuda_attend(layer, scale, q, q.stride(0), out, out.stride(0))
        return out

    # ---- any step, one sequence after the other ----

    def begin(self, rows: list[Row]) -> None:
        """Before a step of several tokens: reads how many pairs each row's head holds."""
        if self.window > 0:
            return
        base = self._base[:, [self._slot(row) for row in rows]].cpu()
        self._held = {row.slot: base[:, i].tolist() for i, row in enumerate(rows)}

    def step(
        self, layer: int, row: Row, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Appends T tokens and attends: q [query heads][T][D], k and v [heads][T][D] -> [query heads][T][D]."""
        if self.window > 0:
            return self._ring_step(layer, row, q, k, v, scale)
        ids, count, first = self._ids[layer, row.slot], k.shape[1], row.length - row.fold
        self._append(layer, row, ids, k, v)
        if row.length == 0:
            return paged.attend_fresh(q, k, v, scale)
        lengths = [base + first + count for base in self._held[row.slot][layer]]
        return self._attend_rows(q, ids, lengths, scale)

    def append(self, layer: int, row: Row, k: torch.Tensor, v: torch.Tensor) -> None:
        """Appends T tokens: k and v [heads][T][D]."""
        if self.window > 0:
            self._ring_write(layer, row, k, v)
        else:
            self._append(layer, row, self._ids[layer, row.slot], k, v)

    def _append(self, layer: int, row: Row, ids: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        first, count = row.length - row.fold, k.shape[1]
        if self.on_gpu:
            index = torch.arange(first, first + count, dtype=torch.int32, device=self.device)
            self._write_gpu(layer, row, index, k, v)
            return
        where = paged.places(ids, self._base[layer, row.slot].long() + first, count).view(-1)
        self._k.index_copy_(0, where, k.reshape(-1, self.dim))
        self._v.index_copy_(0, where, v.reshape(-1, self.dim))

    def _write_gpu(self, layer: int, row: Row, index: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        slots = torch.full_like(index, self._slot(row))
        k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
        self.client.cuda_append(layer, len(index), slots, index, k, k.stride(0), v, v.stride(0))

    def _attend_rows(self, q: torch.Tensor, ids: torch.Tensor, lengths: list[int], scale: float) -> torch.Tensor:
        if self._flash:
            where = paged.packed_places(ids, lengths)
            return paged.attend_flash(q, self._k[where], self._v[where], lengths, scale)
        count = torch.tensor(lengths, device=self.device)
        where = paged.padded_places(ids, count, max(lengths))
        return paged.attend_rows(q, self._k[where], self._v[where], count, scale)

    # ---- sliding layers ----

    def _ring_places(self, layer: int, row: Row, begin: int, end: int) -> torch.Tensor:
        """Rows of `flat` of positions begin .. end - 1 of each head: int64 [heads][end - begin]."""
        place = torch.arange(begin, end, device=self.device) % self.window
        ids = self._ids[layer, self._slot(row)]
        return ids[:, place // paged.BLOCK_TOKENS].long() * paged.BLOCK_TOKENS + place % paged.BLOCK_TOKENS

    def _ring_write(self, layer: int, row: Row, k: torch.Tensor, v: torch.Tensor) -> None:
        end = row.length + k.shape[1]
        begin = max(row.length, end - self.window)
        k, v = k[:, begin - row.length :], v[:, begin - row.length :]
        if self.on_gpu:
            index = torch.arange(begin, end, dtype=torch.int32, device=self.device) % self.window
            self._write_gpu(layer, row, index, k, v)
            return
        where = self._ring_places(layer, row, begin, end).view(-1)
        self._k.index_copy_(0, where, k.reshape(-1, self.dim))
        self._v.index_copy_(0, where, v.reshape(-1, self.dim))

    def _ring_step(
        self, layer: int, row: Row, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        before = self._ring_places(layer, row, max(0, row.length - self.window + 1), row.length)
        keys, values = torch.cat((self._k[before], k), 1), torch.cat((self._v[before], v), 1)
        self._ring_write(layer, row, k, v)
        lengths = [keys.shape[1]] * self.heads
        if self._flash:
            flat = (keys.reshape(-1, self.dim), values.reshape(-1, self.dim))
            return paged.attend_flash(q, *flat, lengths, scale, self.window)
        return paged.attend_rows(q, keys, values, torch.tensor(lengths, device=self.device), scale, self.window)

    def ring_end(self, rows: list[Row], counts: list[int]) -> None:
        """After a step of several tokens on a GPU: the rings have grown."""
        self._ring_grow(rows, counts)

    def _ring_grow(self, rows: list[Row], counts: list[int]) -> None:
        """Counts the pairs that a step of counts[i] tokens adds to rings that are not full."""
        growth: dict[int, list[Row]] = {}
        for row, count in zip(rows, counts, strict=True):
            filled = min(row.length + count, self.window)
            if filled > row.ring:
                growth.setdefault(filled - row.ring, []).append(row)
                row.ring = filled
        for by, grown in growth.items():
            self.client.cuda_advance(self.slots(grown), len(grown), by)
