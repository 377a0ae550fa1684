"""Part `fit`: how many contexts fit into a fixed amount of KV memory."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

import torch

from engines.clock import free_memory
from engines.method import Bench, DoesNotFitError, Make, Method, Workload
from engines.rivals import Dynamic, Masked
from engines.service import Daemon
from engines.setup import Setup

MOST = 256  # sequences that are tried
NEW_TOKENS = 256
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def size_of(text: str) -> int:
    """Bytes of a size as kvgated reads it: 4096, 64K, 40G. ValueError."""
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    number = text[: len(text) - len(unit)]
    if unit not in UNITS or not number.isdigit():
        raise ValueError(f"size '{text}': a whole number with K, M or G is wanted")
    return int(number) * UNITS[unit]


class Fit:
    """Rows of the part. limit: bytes of KV."""

    def __init__(self, setup: Setup, bench: Bench, make: Make) -> None:
        self.setup, self.bench, self.make = setup, bench, make
        self.limit = size_of(setup.options.fit_pool)

    def work(self, ratio: float, budget: bool) -> Workload:
        """One sequence."""
        options = self.setup.options
        limit = int(ratio * options.context) if budget else 0
        return Workload([options.context], ratio, options.chunk, options.window, NEW_TOKENS, limit)

    def add(self, name: str, ratio: float, counted: int, each: int, **more: Any) -> None:
        """Writes a row: sequences admitted, and what one takes by itself."""
        full = self.setup.options.context * self.bench.geometry.token_bytes
        row = {"id": f"fit/{name}/{ratio:g}", "part": "fit", "method": name, "ratio": ratio, "limit_bytes": self.limit}
        row |= {"context": self.setup.options.context, "full_bytes": full, "sequence_bytes": each}
        row |= {"batch_fits": counted, "batch_computed": self.limit // each if each else 0}
        self.setup.results.add(row | more)


def run(setup: Setup) -> None:
    """All rows of the part."""
    options = setup.options
    bench = setup.prepare(options.context + 2 * NEW_TOKENS)
    fit = Fit(setup, bench, setup.pool(max(options.chunk, 4096)).make)
    with torch.no_grad():
        if "kvgate" in options.methods:
            for ratio in options.ratios:
                _ours(fit, ratio)
        if "dynamic" in options.methods:
            _rival(fit, "dynamic", 1.0)
        if "masked" in options.methods:
            for ratio in (ratio for ratio in options.ratios if ratio < 1):
                _rival(fit, "masked", ratio)


def _ours(fit: Fit, ratio: float) -> None:
    """Sequences of one connection, each with a cache of its own, until the daemon refuses one."""
    from engines.ours import Kvgate

    setup, options = fit.setup, fit.setup.options
    gate = setup.gate_file if ratio < 1 else None
    with Daemon(setup.programs, setup.kind, options.fit_pool, options.extent) as daemon:
        method = Kvgate(fit.bench, daemon.socket, MOST, options.context + NEW_TOKENS, gate, daemon=daemon)
        caches: list[Any] = []
        each, why = 0, "all that were tried fit"
        try:
            while len(caches) < MOST:
                method.open(fit.work(ratio, ratio < 1))
                try:
                    method.fill(fit.make)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    why = str(error)
                    break
                caches.append(method.cache)
                each = each or method.kv_bytes()
            method.settle()
            fit.add("kvgate", ratio, len(caches), each, kv_bytes=method.kv_bytes(), text=why, **method.accounts())
        finally:
            for cache in caches:
                cache.free()
            method.detach()


def _rival(fit: Fit, name: str, ratio: float) -> None:
    methods: list[Method] = []
    each, why, held = 0, "all that were tried fit", 0
    try:
        with _limited(fit.bench.device, fit.limit):
            while len(methods) < MOST:
                method: Method = Masked(fit.bench, once=True) if name == "masked" else Dynamic(fit.bench)
                try:
                    method.open(fit.work(ratio, False))
                    method.fill(fit.make)
                except (DoesNotFitError, torch.OutOfMemoryError) as error:
                    method.close()
                    why = str(error)
                    break
                methods.append(method)
                each = each or method.kv_bytes()
                if held + each > fit.limit:
                    methods.pop().close()
                    why = f"{held + each} bytes, the limit is {fit.limit}"
                    break
                held += method.kv_bytes()
        fit.add(name, ratio, len(methods), each, kv_bytes=held, text=why)
    finally:
        for method in methods:
            method.close()
        free_memory(fit.bench.device)


@contextlib.contextmanager
def _limited(device: str, room: int) -> Iterator[None]:
    """PyTorch gets `room` bytes more than it has now, and a little for what filling needs besides."""
    if not device.startswith("cuda"):
        yield
        return
    free_memory(device)
    total = torch.cuda.mem_get_info()[1]
    spare = 512 << 20
    torch.cuda.set_per_process_memory_fraction(min((torch.cuda.memory_reserved() + room + spare) / total, 1.0))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
