"""Part `workers`: one load divided among processes, with and without MPS.

The parent never opens the GPU. Each worker is this program with --as-worker: it makes its model, fills its contexts,
says "ready", and decodes `steps` tokens for every "go" on its standard input. Lines for the parent begin with '@'.
"""

from __future__ import annotations

import errno
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from engines.clock import decode, spread, synchronize
from engines.decode import WARM_STEPS
from engines.method import DoesNotFitError, Method, Workload
from engines.rivals import Dynamic
from engines.service import Daemon, mps
from engines.setup import Setup, attempt, out_of_room

ANSWER_SECONDS = 240


# ---- a worker


def be_worker(setup: Setup) -> None:
    """The other end of Worker: runs until its input ends."""
    options = setup.options
    method: Method | None = None
    try:
        with torch.no_grad():
            method = _worker_method(setup)
    except (DoesNotFitError, torch.OutOfMemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOSPC:
            raise
        _tell({"error": out_of_room(error), "needs": getattr(error, "needs", 0)})
        return
    try:
        model, device, batch = method.bench.model, setup.device, options.worker_batch
        with torch.no_grad():
            token = decode(model, method, setup.tokens(batch, 1), WARM_STEPS)
            synchronize(device)
            _tell({"ready": True, "kv_bytes": method.kv_bytes()})
            while sys.stdin.readline().strip() == "go":
                began = time.perf_counter()
                token = decode(model, method, token, options.steps)
                method.settle()
                _tell({"began": began, "ended": time.perf_counter()})
    finally:
        method.close()
        method.detach()


def _worker_method(setup: Setup) -> Method:
    options = setup.options
    new = WARM_STEPS + options.steps * (options.repeats + 1)
    bench = setup.prepare(options.worker_context + new)
    ratio, stage = min(options.ratios), options.stages[0]
    lengths = [options.worker_context] * options.worker_batch
    method: Method
    if options.methods == ["kvgate"]:
        from engines.ours import Kvgate, Staging

        way: Staging = "preact" if stage == "preact" else "hidden"
        method = Kvgate(bench, options.socket, len(lengths), options.worker_context + new, setup.gate_file, way)
        budget = int(ratio * options.worker_context)
        work = Workload(lengths, ratio, options.fill_chunk, options.window, new, budget)
    else:
        method, work = Dynamic(bench), Workload(lengths, new_tokens=new)
    method.open(work)
    method.fill(setup.pool(max(options.fill_chunk, 4096)).make)
    return method


def _tell(what: dict[str, Any]) -> None:
    print("@" + json.dumps(what), flush=True)


# ---- the parent


class Worker:
    """One process. RuntimeError where it ends or says nothing."""

    def __init__(self, arguments: list[str]) -> None:
        command = [sys.executable, str(Path(__file__).with_name("main.py")), "--as-worker", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("@"):
                self._lines.put(line[1:])
        self._lines.put("")

    def go(self) -> None:
        """Lets it decode once."""
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What it says next. DoesNotFitError where that is that there is no room."""
        try:
            line = self._lines.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            raise RuntimeError(f"worker {self._process.pid} says nothing for {ANSWER_SECONDS} s") from None
        if not line:
            raise RuntimeError(f"worker {self._process.pid} ended with {self._process.wait(60)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise DoesNotFitError(answer["error"], answer["needs"])
        return answer

    def end(self) -> None:
        """Ends it: first by the end of its input, then by force."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def run(setup: Setup) -> None:
    """All rows of the part."""
    options = setup.options
    for shared in options.mps:
        for method in (name for name in options.methods if name in ("kvgate", "dynamic")):
            for count in options.workers:
                _row(setup, method, count, shared)


def _row(setup: Setup, method: str, count: int, shared: bool) -> None:
    options, geometry = setup.options, setup.geometry
    ratio, stage = (min(options.ratios), options.stages[0]) if method == "kvgate" else (1.0, "none")
    name = f"workers/{method}/{stage}/w{count}/{'mps' if shared else 'sliced'}"
    row: dict[str, Any] = {"id": name, "part": "workers", "method": method, "stage": stage, "workers": count}
    row |= {"mps": shared, "ratio": ratio, "batch": options.worker_total // count * count}
    row |= {"context": options.worker_context, "model": geometry.name}
    row |= {"full_bytes": row["batch"] * options.worker_context * geometry.token_bytes}

    def work() -> dict[str, Any]:
        with mps(shared):
            return _measure(setup, method, count)

    setup.results.add(attempt(row, work))


def _measure(setup: Setup, method: str, count: int) -> dict[str, Any]:
    options = setup.options
    if method != "kvgate":
        return _together(setup, method, count, "")
    with Daemon(setup.programs, setup.kind, options.pool, options.extent) as daemon:
        found = _together(setup, method, count, daemon.socket)
        tenant = daemon.tenant()
        return found | {"kv_peak_bytes": tenant.get("high_water", 0)}


def _together(setup: Setup, method: str, count: int, socket: str) -> dict[str, Any]:
    """Tokens a second of all workers, from the first one's start to the last one's end."""
    options, each = setup.options, setup.options.worker_total // count
    workers: list[Worker] = []
    try:
        for _ in range(count):
            workers.append(Worker(_arguments(setup, method, each, socket)))
        ready = [worker.answer() for worker in workers]
        seconds = []
        for _ in range(options.repeats):
            for worker in workers:
                worker.go()
            answers = [worker.answer() for worker in workers]
            seconds.append(max(a["ended"] for a in answers) - min(a["began"] for a in answers))
    finally:
        for worker in workers:
            worker.end()
    rates = [count * each * options.steps / value for value in seconds]
    return {
        "tokens_per_second": spread(rates, 1),
        "seconds": [round(value, 5) for value in seconds],
        "steps": options.steps,
        "kv_bytes": sum(answer["kv_bytes"] for answer in ready),
    }


def _arguments(setup: Setup, method: str, each: int, socket: str) -> list[str]:
    options = setup.options
    words = ["--methods", method, "--ratios", ",".join(map(str, options.ratios)), "--stages", ",".join(options.stages)]
    words += ["--worker-batch", str(each), "--worker-context", str(options.worker_context)]
    words += ["--worker-layers", str(options.worker_layers), "--steps", str(options.steps)]
    words += ["--repeats", str(options.repeats), "--fill-chunk", str(options.fill_chunk)]
    words += ["--window", str(options.window), "--socket", socket]
    return words + (["--tiny"] if options.tiny else [])
