#!/usr/bin/env python3
"""Several worker processes, each with a model of its own, share one kvgated and one tenant's budget.

    examples/workers.py --model tests/data/pilot-lm --socket /run/kvgate/chat.sock --workers 4 --kill 2

Each generates --max-new-tokens tokens (the end token is left out, so that all do the same work) from a context of its
own, and a table at the end says what each held. With --kill N worker N gets SIGKILL halfway: its memory goes back to
the pool at once (`kvgatectl workers` shows it), and the others never notice.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    import torch


class Progress:
    """A streamer for generate(): reports each token through a pipe. The prompt comes first, and is not counted."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._count = pipe, -1

    def put(self, _: torch.Tensor) -> None:
        self._count += 1
        if self._count:
            self._pipe.send(("token", self._count))

    def end(self) -> None:
        """Nothing: the result follows."""


def work(options: argparse.Namespace, number: int, pipe: Connection) -> None:
    """One worker process."""
    import torch

    import kvgate.transformers

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // options.workers))
    try:
        model, text = common.load(options)
        prompt = text.prompt(common.prompt_text(options, number))
        limit = options.max_new_tokens
        with (
            kvgate.transformers.attach(
                model,
                options.socket,
                gate=options.gate,
                name=f"worker-{number}",
                max_sequences=1,
                max_tokens=len(prompt) + limit,
            ) as kv,
            kv.cache([len(prompt)], ratio=options.ratio, max_new_tokens=limit) as cache,
        ):
            begin = time.perf_counter()
            length: dict[str, Any] = {"max_new_tokens": limit, "min_new_tokens": limit}
            tokens = common.greedy(model, prompt, cache, streamer=Progress(pipe), **length)
            seconds, held = time.perf_counter() - begin, sum(info.bytes for info in cache.info())
        pipe.send(
            (
                "done",
                f"{len(prompt)} + {len(tokens)} tokens in {seconds:.1f} s, KV {held / common.MIB:.1f} MiB held: "
                f"{text.decode(tokens)!r}",
            )
        )
    except (OSError, ValueError) as error:
        pipe.send(("failed", str(error)))


@dataclass
class Worker:
    """What the parent knows of one."""

    process: BaseProcess
    pipe: Connection
    tokens: int = 0
    result: str = ""
    failed: bool = False


def start(options: argparse.Namespace) -> list[Worker]:
    """Starts them. A fresh interpreter each: a forked child cannot use CUDA, nor its parent's connections."""
    context = multiprocessing.get_context("spawn")
    workers = []
    for number in range(options.workers):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(options, number, theirs), daemon=True)
        process.start()
        theirs.close()
        workers.append(Worker(process, ours))
    return workers


def follow(workers: list[Worker], kill: int | None, halfway: int) -> None:
    """Until each has a result or is dead."""
    open_pipes = {worker.pipe: worker for worker in workers}
    while open_pipes:
        for pipe in wait(list(open_pipes)):
            worker = open_pipes[pipe]  # type: ignore[index]
            try:
                take(worker)
            except EOFError:
                del open_pipes[worker.pipe]
            if kill is not None and worker is workers[kill] and worker.tokens >= halfway and not worker.result:
                worker.process.kill()
                worker.result = f"killed after {worker.tokens} tokens"


def take(worker: Worker) -> None:
    """One message of a worker. EOFError: there are no more."""
    kind, value = worker.pipe.recv()
    if kind == "token":
        worker.tokens = value
    elif not worker.result:
        worker.result, worker.failed = value, kind == "failed"


def main() -> int:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--workers", type=common.positive, default=4, metavar="COUNT")
    parser.add_argument("--kill", type=int, metavar="N", help="kill worker N, counted from 0, when it is halfway")
    parser.add_argument("--ratio", type=float, default=0.3, help="share of the prompt's KV to keep")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="text to go on from, the same for all")
    parser.add_argument("--max-new-tokens", type=common.positive, default=64)
    options = parser.parse_args()
    if options.kill is not None and not 0 <= options.kill < options.workers:
        parser.error(f"--kill {options.kill}: there are workers 0 to {options.workers - 1}")
    workers = start(common.checked(options))
    follow(workers, options.kill, max(1, options.max_new_tokens // 2))
    for number, worker in enumerate(workers):
        worker.process.join()
        if not worker.result:
            worker.failed, worker.result = True, f"ended with status {worker.process.exitcode}"
        print(f"worker {number}: {worker.result}")
    return int(any(worker.failed for worker in workers))


if __name__ == "__main__":
    with common.one_line_errors():
        sys.exit(main())
