"""Hidden states on their way to the daemon's gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from kvgate import Array, Client

from .rows import Row

if TYPE_CHECKING:
    from collections.abc import Iterator

Scorer = Callable[[int, torch.Tensor], torch.Tensor]

_GATHER_STEPS = 16  # decode steps whose rows are kept apart before they are put together


class Stage:
    """Hands rows over for scoring: their hidden states, the gate's products of them, or a scorer's scores."""

    def __init__(
        self, client: Client, gate: str | None, scorer: Scorer | None, preact: bool, device: torch.device
    ) -> None:
        self.client, self.scorer, self.on_gpu = client, scorer, client.kind == "cuda"
        self._matrices = self._load(gate, device) if preact and gate and not scorer else []

    def _load(self, gate: str, device: torch.device) -> list[torch.Tensor]:
        """The rows that an engine would append to its QKV matrix: [(G + 1) * H * d][hidden] of each layer."""
        with safe_open(gate, framework="pt", device=str(device)) as file:
            return [
                torch.cat([file.get_tensor(f"layers.{i}.{name}_proj.weight") for name in "qk"]).bfloat16()
                for i in range(self.client.layout.layers if self.client.layout else 0)
            ]

    def prepare(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What is kept of decoded tokens until their event: [B][T][hidden] -> [B][T][columns]."""
        hidden = hidden.detach().to(torch.bfloat16)
        return torch.nn.functional.linear(hidden, self._matrices[layer]) if self._matrices else hidden

    def prompt(self, layer: int, row: Row, hidden: torch.Tensor) -> None:
        """Rows of one layer of a prompt's tokens: [T][hidden], at the row's length."""
        hidden = hidden.detach()
        if self.scorer:
            self._scores(layer, row, row.length, self.scorer(layer, hidden))
        elif self.on_gpu:
            self._device("hidden", layer, row, row.length, hidden.to(torch.bfloat16)[None])
        else:
            row.sequence.stage_hidden(layer, row.length, hidden.to(torch.bfloat16).contiguous())

    def decoded(self, row: Row, pos: int, rows: list[torch.Tensor]) -> None:
        """Rows of all layers of tokens from pos on, as prepare() made them: a [T][columns] of each layer."""
        if self.scorer:
            for layer, hidden in enumerate(rows):
                self._scores(layer, row, pos, self.scorer(layer, hidden))
        elif self.on_gpu:
            self._device("preact" if self._matrices else "hidden", 0, row, pos, rows)
        else:
            for layer, hidden in enumerate(rows):
                row.sequence.stage_hidden(layer, pos, hidden.contiguous())

    def _scores(self, layer: int, row: Row, pos: int, scores: torch.Tensor) -> None:
        scores = scores.float().contiguous()
        if self.on_gpu:
            self._device("score", layer, row, pos, scores[None])
        else:
            row.sequence.stage_scores(layer, pos, scores)

    def _device(self, kind: str, layer: int, row: Row, pos: int, rows: torch.Tensor | list[torch.Tensor]) -> None:
        """Copies [layers][T][columns] into the staging area and submits them."""
        first = rows[0]
        size = len(rows) * first.numel() * first.element_size()
        address = self.client.stage_device_buffer(size)
        dtype = "f32" if first.dtype == torch.float32 else "bf16"
        shape, device = (len(rows), *first.shape), str(first.device)
        strides = (first.numel(), first.shape[1], 1)
        place = Array(shape, strides, dtype, address, device, owner=self.client).torch()
        if isinstance(rows, list):
            torch.stack(rows, out=place)
        else:
            place.copy_(rows)
        row.sequence.stage_device(kind, layer, len(rows), pos, first.shape[0], address)


class Pending:
    """Rows of decoded tokens since the last event.

    Keeping a step's tensors costs no kernel; now and then they are joined.
    """

    def __init__(self, layers: int, stage: Stage) -> None:
        self._stage = stage
        self._steps: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self._joined: list[list[torch.Tensor]] = [[] for _ in range(layers)]

    def add(self, layer: int, hidden: torch.Tensor) -> None:
        """A step's hidden states of one layer, [B][T][hidden]; they must not be written to afterwards."""
        steps = self._steps[layer]
        steps.append(hidden)
        if len(steps) >= _GATHER_STEPS:
            self._join(layer)

    def _join(self, layer: int) -> None:
        if self._steps[layer]:
            self._joined[layer].append(self._stage.prepare(layer, torch.cat(self._steps[layer], dim=1)))
            self._steps[layer] = []

    def take(self) -> Iterator[torch.Tensor]:
        """All rows, [B][T][columns] of each layer; none is kept afterwards."""
        for layer in range(len(self._steps)):
            self._join(layer)
            parts, self._joined[layer] = self._joined[layer], []
            yield torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def cut(self, keep: int) -> None:
        """Keeps the oldest `keep` tokens of each sequence: rejected drafts go, or what a broken step left of itself."""
        for layer in range(len(self._steps)):
            self._join(layer)
            rows = torch.cat(self._joined[layer], dim=1)[:, :keep] if self._joined[layer] else None
            self._joined[layer] = [rows] if rows is not None and keep > 0 else []
