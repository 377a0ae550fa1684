"""A daemon of the benchmark's own, and an MPS control daemon where one is asked for."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START_SECONDS = 60
STOP_SECONDS = 60
TENANT = "bench"


def find_programs(named: str | None) -> Path:
    """The folder with kvgated: as named, $KVG_BUILD/bin, or build/bin of the source tree. FileNotFoundError."""
    tree = Path(__file__).resolve().parents[3]
    places = [Path(named)] if named else []
    if not named and os.environ.get("KVG_BUILD"):
        places.append(Path(os.environ["KVG_BUILD"]) / "bin")
    if not named:
        places += [tree / "build" / "bin"]
        found = shutil.which("kvgated")
        places += [Path(found).parent] if found else []
    for place in places:
        if os.access(place / "kvgated", os.X_OK):
            return place.resolve()
    raise FileNotFoundError(f"no kvgated in {', '.join(map(str, places))}: name its folder with --programs")


class Daemon:
    """kvgated with one tenant, in a temporary folder of its own. Ends with `with`.

    kind: "cuda" or "host"; size: of the pool, as kvgated reads it ("110G"); programs: the folder of the binaries.
    """

    def __init__(self, programs: Path, kind: str, size: str, extent: str = "") -> None:
        self._programs = programs
        self.folder = Path(tempfile.mkdtemp(prefix="kvgate-engines."))
        self.socket = str(self.folder / "a.sock")
        extra = f"extent_size = {extent}\n" if extent else ""
        allows = "ipc = yes\n" if kind == "cuda" else ""
        (self.folder / "kvgated.conf").write_text(
            f"[pool]\nkind = {kind}\ndevice.size = {size}\n{extra}[daemon]\nwait_ms = 60000\n"
            f"[tenant {TENANT}]\nsocket = a.sock\n{allows}",
            encoding="ascii",
        )
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Daemon:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            notify.bind(str(self.folder / "notify"))
            notify.settimeout(0.2)
            with (self.folder / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    [self._programs / "kvgated", "--config", self.folder / "kvgated.conf", "--state-dir", self.folder],
                    env={**os.environ, "NOTIFY_SOCKET": str(self.folder / "notify")},
                    stdout=log,
                    stderr=log,
                )
            for _ in range(5 * START_SECONDS):
                with contextlib.suppress(TimeoutError):
                    if b"READY=1" in notify.recv(4096).split(b"\n"):
                        return
                if self._process.poll() is not None:
                    break
        finally:
            notify.close()
        raise RuntimeError(f"kvgated does not start: {self._log() or 'it says nothing'}")

    def _log(self) -> str:
        with contextlib.suppress(OSError):
            return " | ".join((self.folder / "log").read_text(errors="replace").splitlines()[-5:])
        return ""

    def _stop(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process and self._process.returncode:
            print(f"engines: kvgated ended with {self._process.returncode}: {self._log()}", file=sys.stderr)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ask(self, *words: str) -> dict[str, Any]:
        """What kvgatectl answers; {} where it is not there or says no."""
        command = [str(self._programs / "kvgatectl"), "--socket", str(self.folder / "admin.sock"), "--json", *words]
        try:
            answer = subprocess.run(command, capture_output=True, timeout=30, check=True).stdout
            return dict(json.loads(answer))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            print(f"engines: kvgatectl {' '.join(words)}: {error}", file=sys.stderr)
            return {}

    def tenant(self) -> dict[str, int]:
        """The tenant's accounts in bytes: "charged" and "high_water" among others."""
        tenants = self._ask("tenants").get("tenants", [])
        return {name: int(value) for name, value in (tenants[0] if tenants else {}).items() if _whole(value)}

    def overhead(self) -> int:
        """Bytes on the device outside of budgets: tables, staging, gates, scratch."""
        value = self._ask("status").get("overhead", 0)
        return int(value) if _whole(value) else 0


def _whole(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and value.isdigit())


@contextlib.contextmanager
def mps(wanted: bool) -> Iterator[None]:
    """Processes started inside are clients of an MPS server of our own. RuntimeError where it does not start."""
    if not wanted:
        yield
        return
    folder = tempfile.mkdtemp(prefix="kvgate-mps.")
    names = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, folder))
    try:
        _control("-d")
        try:
            yield
        finally:
            _control(text="quit -t 10\n")
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def _control(*options: str, text: str = "") -> None:
    try:
        subprocess.run(
            ["nvidia-cuda-mps-control", *options],
            input=text.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"nvidia-cuda-mps-control {' '.join(options) or text.strip()}: {error}") from None
