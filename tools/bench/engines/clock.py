"""Time and memory of a device, and the loop that is measured."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def synchronize(device: str) -> None:
    """Waits for everything enqueued."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def settle_python() -> None:
    """Takes what was imported and made so far out of the garbage collector's rounds, which would cost steps."""
    gc.collect()
    gc.freeze()


def free_memory(device: str) -> None:
    """Gives what PyTorch keeps back to the device, where the daemon can use it."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def allocated(device: str) -> int:
    """Bytes of live tensors."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else 0


class Spans:
    """Seconds of named pieces of the stream's work; on a CPU of the wall clock. sum() waits for the device."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._events: list[tuple[str, Any, Any]] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measures the block."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def sum(self) -> dict[str, float]:
        """Seconds by name since the last reset."""
        if self._events:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self._seconds[name] = self._seconds.get(name, 0.0) + begin.elapsed_time(end) / 1e3
        self._events.clear()
        return dict(self._seconds)

    def reset(self) -> None:
        """Forgets everything."""
        self._events.clear()
        self._seconds.clear()


def busy_seconds(run: Callable[[], Any], device: str) -> float:
    """Seconds in which this process kept the GPU busy during run(); 0: unknown (a CPU, or no profiler).

    What is left of the wall clock is the CPU's, which hands kernels over one by one.
    """
    if not device.startswith("cuda"):
        return 0.0
    synchronize(device)
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            run()
            synchronize(device)
    except RuntimeError as error:
        print(f"# the profiler does not run here: {error}", flush=True)
        return 0.0
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in found.events() or []
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    total, until = 0.0, -1.0
    for begin, end in sorted(spans):
        total += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return total / 1e6


def repeat(run: Callable[[], float], times: int, limit_s: float) -> list[float]:
    """Results of up to `times` runs; after the first no other begins once limit_s seconds are over."""
    began = time.monotonic()
    results: list[float] = []
    while len(results) < times and (not results or time.monotonic() - began < limit_s):
        results.append(run())
    return results


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """min, median and max."""
    return {
        "min": round(min(values), digits),
        "median": round(statistics.median(values), digits),
        "max": round(max(values), digits),
    }


def decode(model: Any, method: Any, token: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy decoding of `steps` tokens for each sequence, one synchronization a step, as generate() has.

    token: int64 [B, 1], the first input. Returns the next one. The loop is the same for every method.
    """
    for _ in range(steps):
        out = model(input_ids=token, past_key_values=method.cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        method.after_step()
        if bool((token < 0).any()):  # never: stands for generate()'s look for the end of all sequences
            break
    return token
