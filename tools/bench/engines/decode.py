"""Part `decode`: tokens a second of batches with long contexts, which are filled and not computed."""

from __future__ import annotations

import time
from typing import Any

import torch

from engines.clock import busy_seconds, decode, repeat, spread, synchronize
from engines.method import Bench, Make, Method, Workload
from engines.rivals import Dynamic, Masked, Room
from engines.service import Daemon
from engines.setup import Setup, attempt, refusal

WARM_STEPS = 8
BUSY_STEPS = 4  # whose kernels are added up
RIVAL_STEPS = 32  # of a run without events
ROOM_FOR_WORK = 4 << 30  # bytes that a rival's step needs beside KV and weights


class Decode:
    """Rows of one method."""

    def __init__(self, setup: Setup, bench: Bench, make: Make) -> None:
        self.setup, self.bench, self.make = setup, bench, make

    def row(self, method: str, stage: str, batch: int, ratio: float) -> dict[str, Any]:
        """What a row says before anything is measured."""
        options = self.setup.options
        full = batch * options.context * self.bench.geometry.token_bytes
        name = "/".join(["decode", method, stage, f"b{batch}", f"{ratio:g}"])
        name += self.setup.suffix if method == "kvgate" else ""
        row: dict[str, Any] = {"id": name, "part": "decode", "method": method, "stage": stage, "batch": batch}
        row["mps"] = options.under_mps
        return row | {"context": options.context, "ratio": ratio, "full_bytes": full}

    def measure(self, method: Method, row: dict[str, Any], steps: int, budget: int) -> bool:
        """Measures one row; whether it fitted."""
        options = self.setup.options
        new = WARM_STEPS + steps * options.repeats + BUSY_STEPS + 1
        work = Workload([options.context] * row["batch"], row["ratio"], options.fill_chunk, options.window, new, budget)
        row = attempt(row, lambda: self._run(method, work, steps))
        method.close()
        self.setup.results.add(row)
        return bool(row.get("fits", True))

    def _run(self, method: Method, work: Workload, steps: int) -> dict[str, Any]:
        options, batch = self.setup.options, len(work.lengths)
        began = time.perf_counter()
        method.open(work)
        method.fill(self.make)
        synchronize(self.bench.device)
        filled = time.perf_counter() - began
        token = decode(self.bench.model, method, self.setup.tokens(batch, 1), WARM_STEPS)
        method.settle()
        method.watch(True)
        method.shares()

        def once() -> float:
            nonlocal token
            synchronize(self.bench.device)
            start = time.perf_counter()
            token = decode(self.bench.model, method, token, steps)
            method.settle()
            return time.perf_counter() - start

        seconds = repeat(once, options.repeats, options.row_seconds)
        shares = {name: value / sum(seconds) for name, value in method.shares().items()}
        busy = busy_seconds(lambda: decode(self.bench.model, method, token, BUSY_STEPS), self.bench.device)
        return {
            "tokens_per_second": spread([batch * steps / value for value in seconds], 1),
            "seconds": [round(value, 5) for value in seconds],
            "steps": steps,
            "busy_ms_per_step": round(busy * 1e3 / BUSY_STEPS, 3),
            "fill_seconds": round(filled, 2),
            "kv_bytes": method.kv_bytes(),
            "share": shares,
            **method.accounts(),
        }


def run(setup: Setup) -> None:
    """All rows of the part."""
    options = setup.options
    new = WARM_STEPS + options.steps * options.repeats + BUSY_STEPS + 16
    bench = setup.prepare(options.context + new)
    rows = Decode(setup, bench, setup.pool(max(options.fill_chunk, 4096)).make)
    with torch.no_grad():
        if "kvgate" in options.methods:
            _ours(rows, options.context + new)
        for name in ("dynamic", "room", "masked"):
            if name in options.methods:
                _rival(rows, name)


def _ours(rows: Decode, max_tokens: int) -> None:
    for ratio in rows.setup.options.ratios:
        stages = rows.setup.options.stages if ratio < 1 else ["none"]
        for stage in stages:
            for batch in sorted(rows.setup.options.batches):
                _our_row(rows, max_tokens, ratio, stage, batch)


def _our_row(rows: Decode, max_tokens: int, ratio: float, stage: str, batch: int) -> None:
    """One row. Stage "none": the prompt is evicted, decoded tokens are neither scored nor evicted."""
    from engines.ours import Kvgate

    setup, options = rows.setup, rows.setup.options
    budget = int(ratio * options.context) if stage != "none" else 0
    with Daemon(setup.programs, setup.kind, options.pool, options.extent) as daemon:
        method = Kvgate(
            rows.bench,
            daemon.socket,
            batch,
            max_tokens,
            setup.gate_file if ratio < 1 else None,
            "preact" if stage == "preact" else "hidden",
            daemon,
        )
        try:
            rows.measure(method, rows.row("kvgate", stage, batch, ratio), options.steps, budget)
        finally:
            method.detach()


# ---- the rivals


def _rival(rows: Decode, name: str) -> None:
    """The batches, and where one does not fit, the largest that does."""
    options = rows.setup.options
    ratios = [ratio for ratio in options.ratios if ratio < 1] if name == "masked" else [1.0]
    for ratio in ratios:
        missing = False
        for batch in sorted(options.batches):
            missing |= not _rival_row(rows, name, batch, ratio)
        if missing:
            _largest(rows, name, ratio)


def _rival_row(rows: Decode, name: str, batch: int, ratio: float) -> bool:
    options, bench = rows.setup.options, rows.bench
    row = rows.row(name, "torch" if name == "masked" else "none", batch, ratio)
    if row["full_bytes"] > _free(bench.device):
        text = f"the device has {_free(bench.device) / 1e9:.1f} GB free beside the model"
        rows.setup.results.add(refusal(row, row["full_bytes"], text))
        return False
    method = {"dynamic": Dynamic, "room": Room, "masked": Masked}[name](bench)
    steps = options.steps if name == "masked" else min(options.steps, RIVAL_STEPS)
    budget = int(ratio * options.context) if name == "masked" else 0
    return rows.measure(method, row, steps, budget)


def _largest(rows: Decode, name: str, ratio: float) -> None:
    """Tries the largest batch that should fit, and a few smaller ones."""
    options, geometry = rows.setup.options, rows.bench.geometry
    each = options.context * geometry.token_bytes * (1 + 2 / geometry.layers)
    if name == "masked":  # scores and mask: 6 bytes a pair, and hidden states until the next event
        each += geometry.layers * (6 * geometry.kv_heads * options.context + 2 * 128 * geometry.hidden)
    batch = int((_free(rows.bench.device) - ROOM_FOR_WORK) / each)
    for smaller in range(3):
        if batch - smaller <= 0 or batch - smaller in options.batches:
            return
        if _rival_row(rows, name, batch - smaller, ratio):
            return


def _free(device: str) -> int:
    """Bytes that tensors may take now; on a CPU a number that stands for enough."""
    return int(torch.cuda.mem_get_info()[0]) if device.startswith("cuda") else 1 << 34
