"""transformers on kvgate, as a method to be measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import kvgate.transformers as on_kvgate
from engines.clock import free_memory, synchronize
from engines.method import Bench, Make, Method, Workload
from engines.service import Daemon

Staging = Literal["hidden", "preact"]


class Kvgate(Method):
    """One connection to a daemon, with one cache at a time. gate None: nothing can be evicted.

    batch and max_tokens are the connection's: no workload may have more sequences or longer ones. daemon: the one
    behind `socket`, where it is this process's to ask.
    """

    name = "kvgate"

    def __init__(
        self,
        bench: Bench,
        socket: str,
        batch: int,
        max_tokens: int,
        gate: Path | None = None,
        stage: Staging = "hidden",
        daemon: Daemon | None = None,
    ) -> None:
        self.bench, self._socket, self._daemon = bench, socket, daemon
        self._batch, self._max_tokens, self._gate, self._stage = batch, max_tokens, gate, stage
        self.attachment: Any = None
        self.cache: Any = None

    def _attach(self) -> None:
        if self.attachment is None:
            self.attachment = on_kvgate.attach(
                self.bench.model,
                self._socket,
                gate=self._gate,
                name="kvgate-bench",
                max_sequences=self._batch,
                max_tokens=self._max_tokens,
                stage=self._stage,
            )

    def open(self, work: Workload) -> None:
        self.work = work
        self._attach()
        self.attachment.measure = work.measure
        self.cache = self.attachment.cache(
            list(work.lengths),
            ratio=work.ratio,
            chunk=work.chunk,
            window=work.window,
            max_new_tokens=work.new_tokens,
            budget=work.decode_budget,
        )

    def fill(self, make: Make) -> None:
        """KvgateError with ENOSPC where the daemon refuses."""
        self.cache.fill(self.work.lengths, make, chunk=self.work.chunk)
        self.settle()

    def settle(self) -> None:
        self.cache.settle()
        synchronize(self.bench.device)

    def kv_bytes(self) -> int:
        """Of the extents that are granted to this worker: what the daemon charges."""
        self.settle()
        return int(self.attachment.client.mapped_bytes)

    def watch(self, on: bool) -> None:
        self.attachment.measure = on

    def accounts(self) -> dict[str, int]:
        if self._daemon is None:
            return {}
        tenant = self._daemon.tenant()
        return {
            "charged_bytes": tenant.get("charged", 0),
            "kv_peak_bytes": tenant.get("high_water", 0),
            "overhead_bytes": self._daemon.overhead(),
        }

    def shares(self) -> dict[str, float]:
        seconds = dict(self.attachment.timing)
        if not seconds:
            return {}  # nothing was scored or evicted, or it is not measured (the kind host)
        return {"gate": seconds.get("stage", 0.0), "evict": seconds.get("evict", 0.0)}

    def close(self) -> None:
        if self.cache is not None:
            self.cache.free()
        self.cache = None
        free_memory(self.bench.device)

    def detach(self) -> None:
        """Ends the connection. Harmless a second time."""
        self.close()
        if self.attachment is not None:
            self.attachment.detach()
        self.attachment = None
        free_memory(self.bench.device)
