"""Attention over the rows of kvgate's tables with torch, and writing into them: pure functions over tensors.

A row is what one KV head of one layer of one sequence holds: `length` pairs in blocks of 16 tokens that `ids` names.
Order within a row means nothing to attention, but the newest tokens are last, in order. Keys and values of all
blocks are one matrix each, `flat` [pairs of the arena][head_dim], of which only blocks named in a row may be touched.
"""

from __future__ import annotations

import torch
from torch.nn import functional

BLOCK_TOKENS = 16
_QUERY_SLICE = 1024  # queries that one boolean mask covers


def places(ids: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    """Rows of `flat` of the tokens first[h] .. first[h] + count - 1 of each head: int64 [heads][count].

    ids: int32 [heads][row_cap]; first: int64 [heads].
    """
    index = first[:, None] + torch.arange(count, device=ids.device)
    return ids.gather(1, index // BLOCK_TOKENS).long() * BLOCK_TOKENS + index % BLOCK_TOKENS


def packed_places(ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Rows of `flat` of all pairs of all heads, head after head: int64 [sum of lengths]."""
    device, total = ids.device, sum(lengths)
    count = torch.tensor(lengths, device=device)
    head = torch.repeat_interleave(torch.arange(len(lengths), device=device), count, output_size=total)
    index = torch.arange(total, device=device) - (count.cumsum(0) - count)[head]
    return ids[head, index // BLOCK_TOKENS].long() * BLOCK_TOKENS + index % BLOCK_TOKENS


def attend_fresh(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention where nothing is held yet: q [query heads][T][D], k and v [heads][T][D] -> like q."""
    group = q.shape[0] // k.shape[0]
    if q.is_cuda:
        out = functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=q.shape[1] > 1, scale=scale, enable_gqa=group > 1
        )
        return out[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    return functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=q.shape[1] > 1, scale=scale)[0]


def attend_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float, window: int = -1
) -> torch.Tensor:
    """Attention of the newest T tokens over packed rows by FlashAttention: 16-bit floats on a GPU.

    q [query heads][T][D]; k and v [sum of lengths][D], head after head, fresh tokens last. window: tokens that
    a query sees, itself included (-1: all). Returns [query heads][T][D].
    """
    heads, queries = len(lengths), q.shape[1]
    group, begin, parts = q.shape[0] // heads, 0, []
    for head, length in enumerate(lengths):
        rows = slice(begin, begin + length)
        begin += length
        out = torch.ops.aten._flash_attention_forward(
            q[head * group : (head + 1) * group].transpose(0, 1)[None],
            k[None, rows, None],
            v[None, rows, None],
            None,
            None,
            queries,
            length,
            0.0,
            True,
            False,
            scale=scale,
            window_size_left=window - 1 if window > 0 else None,
            window_size_right=0 if window > 0 else None,
        )[0]
        parts.append(out[0])
    return torch.cat(parts, dim=1).transpose(0, 1)


def _visible(lengths: torch.Tensor, widest: int, queries: int, first: int, last: int, window: int) -> torch.Tensor:
    """Which pairs queries first .. last - 1 of `queries` see: bool [heads][last - first][widest]."""
    newest = lengths[:, None] - queries + torch.arange(first, last, device=lengths.device)
    index = torch.arange(widest, device=lengths.device)
    seen = index <= newest[..., None]
    return seen & (index > newest[..., None] - window) if window > 0 else seen


def attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, scale: float, window: int = -1
) -> torch.Tensor:
    """The same by torch's own attention, for any dtype and device.

    q [query heads][T][D]; k and v [heads][widest][D], padded; lengths int64 [heads]. Returns [query heads][T][D].
    """
    heads, widest, dim = k.shape
    queries = q.shape[1]
    q = q.reshape(heads, -1, queries, dim)
    k, v = k[:, None].expand(-1, q.shape[1], -1, -1), v[:, None].expand(-1, q.shape[1], -1, -1)
    parts = []
    for first in range(0, queries, _QUERY_SLICE):
        last = min(first + _QUERY_SLICE, queries)
        mask = _visible(lengths, widest, queries, first, last, window)[:, None]
        parts.append(functional.scaled_dot_product_attention(q[:, :, first:last], k, v, attn_mask=mask, scale=scale))
    return torch.cat(parts, dim=2).reshape(-1, queries, dim)


def padded_places(ids: torch.Tensor, lengths: torch.Tensor, widest: int) -> torch.Tensor:
    """Rows of `flat` of all pairs of all heads: int64 [heads][widest]. Behind a row's end its last pair is repeated."""
    index = torch.minimum(torch.arange(widest, device=ids.device), lengths[:, None] - 1)
    return ids.gather(1, index // BLOCK_TOKENS).long() * BLOCK_TOKENS + index % BLOCK_TOKENS
