"""The results: one JSON file, written again after each row, so that a run that is killed leaves what it has."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = "kvgate-engines-1"


def machine() -> dict[str, str]:
    """GPU, driver and versions; without a CUDA context, which would keep MPS from being tried."""
    import torch
    import transformers

    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    found["kernel"] = platform.release()
    found["processor"] = _processor()
    found["cores"] = str(os.cpu_count())
    found["cuda"] = str(torch.version.cuda or "")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()[0]
        found["gpu"], found["driver"], found["memory"] = (part.strip() for part in line.split(","))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        found["gpu"] = ""
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


class Results:
    """Rows by their ids. A file of an earlier run is gone on with, so that parts may be run one by one."""

    def __init__(self, path: Path | None, commit: str, about: dict[str, Any]) -> None:
        self._path = path
        self.data: dict[str, Any] = {"schema": SCHEMA, "commit": commit, "date": "", "machine": machine(), **about}
        self.data["rows"] = []
        self.failed = False  # a row of this run has an error
        if path and path.exists():
            self.data["rows"] = self._earlier(path, commit)

    @staticmethod
    def _earlier(path: Path, commit: str) -> list[dict[str, Any]]:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        if data.get("schema") != SCHEMA:
            raise ValueError(f"{path}: schema {data.get('schema')!r}, expected {SCHEMA!r}")
        if data.get("commit") != commit:
            raise ValueError(f"{path}: rows of commit {data.get('commit')!r}, this run is of {commit!r}: name another")
        return list(data["rows"])

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row, or puts it in the place of the one with its id; prints it and writes the file."""
        rows = self.data["rows"]
        row = {**row, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        places = [i for i, other in enumerate(rows) if other["id"] == row["id"]]
        if places:
            rows[places[0]] = row
        else:
            rows.append(row)
        self.failed |= "error" in row
        print(line_of(row), flush=True)
        self.write()

    def write(self) -> None:
        """Replaces the file in one step."""
        if not self._path:
            return
        self.data["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        draft = self._path.with_name(self._path.name + ".part")
        draft.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        draft.replace(self._path)


def line_of(row: dict[str, Any]) -> str:
    """A row as one line of text."""
    if "error" in row:
        return f"{row['id']:48} FAILED: {row['error']}"
    if not row.get("fits", True):
        return f"{row['id']:48} does not fit: {row.get('needs_bytes', 0) / 1e9:.1f} GB of KV; {row.get('text', '')}"
    parts = []
    if row.get("tokens_per_second"):
        rate = row["tokens_per_second"]
        parts.append(f"{rate['median']:10.1f} tokens/s ({rate['min']:.1f} to {rate['max']:.1f})")
    if row.get("kv_bytes"):
        parts.append(f"KV {row['kv_bytes'] / 1e9:.3f} GB")
    if row.get("share"):
        parts.append(", ".join(f"{name} {share * 100:.2f}%" for name, share in row["share"].items()))
    if row.get("batch_fits") is not None:
        parts.append(f"{row['batch_fits']} sequences fit, {row['batch_computed']} computed")
    return f"{row['id']:48} " + "; ".join(parts)
