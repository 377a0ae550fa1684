"""Worker processes that share a daemon: one dies by SIGKILL, one is refused; the others' tokens stay what they were."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from conftest import StartDaemon
from daemon import Daemon, config

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from models import make_model, prompts, write_gate  # noqa: E402

PROMPT, TOKENS = 300, 220
STARTED, HOLD = 20, 150  # tokens after which a worker counts as decoding, and at which it waits for the word to go on
LONG = 3000  # a prompt that the small tenant has no room for
WAIT_SECONDS = 120
RETURN_SECONDS = 1.0

StartWorker = Callable[[Daemon, str], "Worker"]


class Progress:
    """A streamer for generate(): reports each token, and at `HOLD` waits for the parent's word."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._count = pipe, -1  # the prompt comes first

    def put(self, _: torch.Tensor) -> None:
        self._count += 1
        if self._count:
            self._pipe.send(("token", self._count))
        if self._count == HOLD:
            assert self._pipe.recv() == "go on"

    def end(self) -> None:
        """Nothing: the result follows."""


def serve(socket: str, gate: str, pipe: Connection) -> None:
    """A worker process: generates for each (seed, tokens of the prompt) that comes through the pipe, until None."""
    import kvgate.transformers

    torch.set_num_threads(1)
    with kvgate.transformers.attach(
        make_model("qwen3"), socket, gate=gate, max_sequences=1, max_tokens=LONG + TOKENS, staging_bytes=4 << 20
    ) as kv:
        for seed, length in iter(pipe.recv, None):
            ids, mask = prompts([length], seed)
            try:
                # Decode events, too: evictions are under way all the time.
                out = kv.generate(
                    ids, mask, ratio=0.3, chunk=100, policy={"budget": 160, "window": 20, "window_absolute": True},
                    max_new_tokens=TOKENS, do_sample=False, streamer=Progress(pipe),
                )  # fmt: skip
                pipe.send(("done", out[0, length:].tolist()))
            except kvgate.RefusedError as error:
                pipe.send(("refused", str(error)))


class Worker:
    """A worker process of the test's."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self.process, self._pipe, self.tokens = process, pipe, 0

    @property
    def pid(self) -> int:
        pid = self.process.pid
        assert pid is not None
        return pid

    def begin(self, seed: int, length: int = PROMPT) -> None:
        """Has it generate."""
        self.tokens = 0
        self._pipe.send((seed, length))

    def next(self) -> tuple[str, Any]:
        """Its next message; EOFError when it is dead and there is none."""
        assert self._pipe.poll(WAIT_SECONDS), f"worker {self.pid}: nothing for {WAIT_SECONDS} s"
        kind, value = self._pipe.recv()
        if kind == "token":
            self.tokens = value
        return kind, value

    def until(self, tokens: int) -> None:
        """Waits until it has generated so many."""
        while self.tokens < tokens:
            kind, value = self.next()
            assert kind == "token", f"{kind}: {value}"

    def go_on(self) -> list[int]:
        """Lets it generate to the end: its tokens."""
        self._pipe.send("go on")
        kind, value = "token", None
        while kind == "token":
            kind, value = self.next()
        assert kind == "done", f"{kind}: {value}"
        tokens: list[int] = value
        assert len(tokens) == TOKENS
        return tokens

    def is_cut_off(self) -> bool:
        """Reads on until its pipe ends: whether that comes without a result."""
        try:
            while self.next()[0] == "token":
                pass
        except EOFError:
            return True
        return False

    def end(self) -> None:
        """Lets it leave by itself."""
        self._pipe.send(None)
        self.process.join(WAIT_SECONDS)
        assert self.process.exitcode == 0


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[StartWorker]:
    """start_worker(daemon, tenant): a worker process. All that are left are killed at the test's end."""
    gate = tmp_path / "gate.safetensors"
    write_gate(make_model("qwen3"), str(gate))
    # Forked from a process that has imported everything and holds no connection: quick to start.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "models", "kvgate.transformers"])
    workers: list[Worker] = []

    def start(daemon: Daemon, tenant: str) -> Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(daemon.socket(tenant), str(gate), theirs), daemon=True)
        process.start()
        theirs.close()
        workers.append(Worker(process, ours))
        return workers[-1]

    yield start
    for worker in workers:
        worker.process.kill()
        worker.process.join(WAIT_SECONDS)


def held(daemon: Daemon) -> dict[int, int]:
    """Bytes charged of each worker process that the daemon knows."""
    return {row["pid"]: row["charged"] for row in daemon.ctl("workers")["workers"]}


def audited(daemon: Daemon, tenant: str) -> int:
    """Bytes that the tenant holds, counted from the daemon's metadata; every byte is accounted for."""
    answer = daemon.ctl("audit")
    assert answer["clean"], answer
    row = next(row for row in answer["rows"] if row["tenant"] == tenant)
    assert row["physical"] == row["charged"] == row["extent_bytes"]
    charged: int = row["charged"]
    return charged


def test_the_others_generate_the_same_when_one_of_four_workers_is_killed(
    start_daemon: StartDaemon, start_worker: StartWorker
) -> None:
    daemon = start_daemon()
    workers = [start_worker(daemon, "a") for _ in range(4)]
    for seed, worker in enumerate(workers):
        worker.begin(seed)
    expected = [worker.go_on() for worker in workers]
    assert len({tuple(tokens) for tokens in expected}) == 4, "the workers' texts are alike"

    for seed, worker in enumerate(workers):
        worker.begin(seed)
    for worker in workers:
        worker.until(STARTED)
    victim, others = workers[1], [workers[0], *workers[2:]]
    before = held(daemon)
    assert before[victim.pid] > 0
    assert set(before) == {worker.pid for worker in workers}

    victim.process.kill()
    killed = time.monotonic()
    while victim.pid in held(daemon):
        assert time.monotonic() - killed < RETURN_SECONDS, "the dead worker's memory is not back"
    left = daemon.tenant()
    took = time.monotonic() - killed
    assert took < RETURN_SECONDS
    assert left["workers"] == left["sequences"] == 3
    assert audited(daemon, "a") == sum(held(daemon).values())

    assert victim.is_cut_off(), "it had come to its end"
    assert STARTED <= victim.tokens <= HOLD < TOKENS
    assert [worker.go_on() for worker in others] == [expected[0], *expected[2:]]
    for worker in others:
        worker.end()
    assert daemon.gone("a")
    assert audited(daemon, "a") == 0


def test_a_tenant_is_refused_at_its_budget_while_the_other_goes_on(
    start_daemon: StartDaemon, start_worker: StartWorker
) -> None:
    daemon = start_daemon(config(a="device.max = 16M", b="device.max = 1M"))
    large, small = start_worker(daemon, "a"), start_worker(daemon, "b")
    large.begin(5)
    expected = large.go_on()

    large.begin(5)
    large.until(STARTED)
    small.begin(6, LONG)
    kind, text = small.next()
    assert kind == "refused", text
    assert text.startswith("tenant b: device budget 1.0 MiB, in use 0 B"), text
    assert text.endswith(" bytes short"), text
    figures = daemon.tenant("b")
    assert figures["refusals"] == 1
    assert figures["charged"] == figures["promised"] == figures["sequences"] == 0
    assert daemon.tenant("a")["sequences"] == 1, "the other tenant's sequence is still there"
    assert large.go_on() == expected
    assert daemon.tenant("a")["refusals"] == 0

    small.begin(6)  # what fits is served
    assert small.go_on() != expected
    assert daemon.tenant("b")["high_water"] <= 1 << 20
    for worker in (large, small):
        worker.end()
    assert daemon.gone("a")
    assert daemon.gone("b")
    assert audited(daemon, "a") == audited(daemon, "b") == 0
