"""What a part needs, made once: the model, its gate and the gate's file."""

from __future__ import annotations

import argparse
import errno
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engines.clock import settle_python
from engines.gate import Gate
from engines.geometry import Geometry, make_model
from engines.method import Bench, DoesNotFitError, Pool
from engines.results import Results
from engines.service import find_programs


@dataclass(frozen=True)
class Setup:
    """Options and what is shared by the rows of a part."""

    options: argparse.Namespace
    geometry: Geometry
    device: str
    results: Results
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="kvgate-engines.")))

    @property
    def kind(self) -> str:
        """The daemon's kind of memory."""
        return "cuda" if self.device.startswith("cuda") else "host"

    @property
    def suffix(self) -> str:
        """Behind the ids of kvgate's rows."""
        return "/mps" if self.options.under_mps else ""

    @property
    def programs(self) -> Path:
        """The folder with kvgated. FileNotFoundError."""
        return find_programs(self.options.programs)

    @property
    def gate_file(self) -> Path:
        """Where prepare() writes the gate."""
        return self.folder / "gate.safetensors"

    def prepare(self, max_tokens: int) -> Bench:
        """The model and its gate, on the device. Takes seconds."""
        settle_python()
        began = time.monotonic()
        gate = Gate(self.geometry, self.device)
        gate.write(self.gate_file)
        model = make_model(self.geometry, self.device, max_tokens)
        took = time.monotonic() - began
        print(f"# {self.geometry.name} with random weights on {self.device}: {took:.1f} s", flush=True)
        return Bench(model=model, geometry=self.geometry, gate=gate, device=self.device)

    def pool(self, tokens: int) -> Pool:
        """Random K, V and hidden states for chunks of up to `tokens` tokens."""
        return Pool(self.geometry, self.device, tokens)

    def tokens(self, batch: int, count: int, seed: int = 4) -> torch.Tensor:
        """Random token ids [batch, count] on the device."""
        generator = torch.Generator("cpu").manual_seed(seed)
        ids = torch.randint(0, self.geometry.vocabulary, (batch, count), generator=generator)
        return ids.to(self.device)

    def end(self) -> None:
        """Removes the files."""
        shutil.rmtree(self.folder, ignore_errors=True)


def refusal(row: dict[str, Any], needs: int, text: str) -> dict[str, Any]:
    """The row of something that does not fit."""
    return {**row, "fits": False, "needs_bytes": needs, "text": text}


def attempt(row: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row with what work() measures; or that there is no room; or, with a trace on stderr, what went wrong.

    A row that fails does not end the run: what comes after it is worth having.
    """
    needs = int(row.get("full_bytes", 0) * row.get("ratio", 1.0)) if row["method"] == "kvgate" else row["full_bytes"]
    try:
        return row | work()
    except DoesNotFitError as error:
        return refusal(row, error.needs or needs, str(error))
    except torch.OutOfMemoryError as error:
        return refusal(row, needs, out_of_room(error))
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return refusal(row, needs, str(error))
        traceback.print_exc()
        return {**row, "error": f"{type(error).__name__}: {error}".splitlines()[0]}


def out_of_room(error: Exception) -> str:
    """The first sentence of an error of memory."""
    return str(error).split(". GPU")[0].splitlines()[0]
