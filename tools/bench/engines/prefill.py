"""Part `prefill`: prompts through the model, in chunks and whole."""

from __future__ import annotations

import time
from typing import Any

import torch

from engines.clock import allocated, free_memory, repeat, spread, synchronize
from engines.method import Bench, Method, Workload
from engines.rivals import Dynamic, Masked
from engines.service import Daemon
from engines.setup import Setup, attempt


def run_prompt(bench: Bench, method: Method, ids: torch.Tensor, chunk: int) -> tuple[float, float]:
    """Seconds from the first chunk to the first token, and until every eviction is over and memory has gone back."""
    synchronize(bench.device)
    began = time.perf_counter()
    for begin in range(0, ids.shape[1], chunk):
        out = bench.model(
            input_ids=ids[:, begin : begin + chunk], past_key_values=method.cache, use_cache=True, logits_to_keep=1
        )
        method.after_chunk()
    out.logits[:, -1].argmax(-1).tolist()
    token = time.perf_counter() - began
    method.settle()
    return token, time.perf_counter() - began


class Prefill:
    """Rows of one method: `chunk` 0 feeds the whole prompt at once."""

    def __init__(self, setup: Setup, bench: Bench, method: Method, variant: str, chunk: int) -> None:
        self.setup, self.bench, self.method, self.variant, self.chunk = setup, bench, method, variant, chunk
        self.warm = False

    def measure(self, length: int, ratio: float) -> None:
        """One row."""
        ids, chunk = self.setup.tokens(1, length), self.chunk or length
        name = "/".join(["prefill", self.method.name, self.variant, str(length), f"{ratio:g}"])
        name += self.setup.suffix if self.method.name == "kvgate" else ""
        row: dict[str, Any] = {"id": name, "part": "prefill", "method": self.method.name, "variant": self.variant}
        row["mps"] = self.setup.options.under_mps
        row |= {
            "tokens": length,
            "ratio": ratio,
            "chunk": chunk,
            "full_bytes": length * self.bench.geometry.token_bytes,
        }
        row = attempt(row, lambda: self._rows(ids, ratio, chunk))
        self.method.close()
        self.setup.results.add(row)

    def _rows(self, ids: torch.Tensor, ratio: float, chunk: int) -> dict[str, Any]:
        options, length = self.setup.options, ids.shape[1]
        found: dict[str, Any] = {}
        first: list[float] = []

        def once(measure: bool = False) -> float:
            self.method.open(self._work(length, ratio, chunk, measure))
            try:
                token, seconds = run_prompt(self.bench, self.method, ids, chunk)
                first.append(token)
                found["kv_bytes"] = self.method.kv_bytes()
                return seconds
            finally:
                if not measure:
                    self.method.close()

        if not self.warm:
            once()
            self.warm = True
        free_memory(self.bench.device)
        before = allocated(self.bench.device)
        self._reset_peak()
        first.clear()
        seconds = repeat(once, options.repeats, options.row_seconds)
        peak, first_token = self._peak() - before, spread(first, 5)
        total = once(measure=True)
        shares = {name: value / total for name, value in self.method.shares().items()}
        return {
            "tokens_per_second": spread([length / value for value in seconds], 1),
            "seconds": [round(value, 5) for value in seconds],
            "first_token_seconds": first_token,
            "kv_bytes": found["kv_bytes"],
            "torch_peak_bytes": peak,
            "share": shares,
            **self.method.accounts(),
        }

    def _work(self, length: int, ratio: float, chunk: int, measure: bool) -> Workload:
        return Workload([length], ratio, chunk, self.setup.options.window, new_tokens=16, measure=measure)

    def _reset_peak(self) -> None:
        if self.bench.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.bench.device.startswith("cuda") else 0


def run(setup: Setup) -> None:
    """All rows of the part."""
    options = setup.options
    bench = setup.prepare(max(options.lengths) + 1024)
    with torch.no_grad():
        _all(setup, bench)


def _all(setup: Setup, bench: Bench) -> None:
    options = setup.options
    if "kvgate" in options.methods:
        _ours(setup, bench)
    evicting = [ratio for ratio in options.ratios if ratio < 1]
    for variant, chunk in (("chunked", options.chunk), ("whole", 0)):
        lengths = [length for length in options.lengths if not chunk or length > chunk]
        if "dynamic" in options.methods:
            _rows(Prefill(setup, bench, Dynamic(bench), variant, chunk), lengths, [1.0])
        if "masked" in options.methods:
            _rows(Prefill(setup, bench, Masked(bench, once=not chunk), variant, chunk), lengths, evicting)


def _rows(rows: Prefill, lengths: list[int], ratios: list[float]) -> None:
    for length in lengths:
        for ratio in ratios:
            rows.measure(length, ratio)


def _ours(setup: Setup, bench: Bench) -> None:
    from engines.ours import Kvgate

    options = setup.options
    for length in options.lengths:
        for ratio in options.ratios:
            gate = setup.gate_file if ratio < 1 else None
            with Daemon(setup.programs, setup.kind, options.pool, options.extent) as daemon:
                method = Kvgate(bench, daemon.socket, 1, length + 64, gate, daemon=daemon)
                try:
                    Prefill(setup, bench, method, "chunked", options.chunk).measure(length, ratio)
                finally:
                    method.detach()
