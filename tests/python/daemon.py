"""A real kvgated in a folder of the test's own."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 30
STOP_SECONDS = 30
GONE_SECONDS = 10

POOL = "[pool]\nkind = {kind}\ndevice.size = {size}\nextent_size = {extent}\n"


def programs() -> Path:
    """The folder of kvgated and kvgatectl: KVG_BUILD's bin, by default the one of the checkout's build/."""
    return Path(os.environ.get("KVG_BUILD") or ROOT / "build") / "bin"


def config(size: str = "32M", extent: str = "256K", kind: str = "host", host: str = "", **tenants: str) -> str:
    """A configuration: a pool of that size, and NAME="lines" for each tenant (tenant a, when none is named).

    host: bytes of the host tier; "": there is none.
    """
    text = POOL.format(kind=kind, size=size, extent=extent)
    text += f"host.size = {host}\n" if host else ""
    for name, lines in (tenants or {"a": ""}).items():
        text += f"\n[tenant {name}]\nsocket = {name}.sock\n{lines}\n"
    return text


class Daemon:
    """Runs from construction, when it is ready, to `stop()`."""

    def __init__(self, programs: Path, folder: Path, config: str) -> None:
        self._programs = Path(programs)
        self._folder = Path(folder)
        path = self._folder / "kvgated.conf"
        path.write_text(config, encoding="ascii")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(self._folder / "notify"))
            notify.settimeout(START_SECONDS)
            self._process = subprocess.Popen(
                [self._programs / "kvgated", "--config", path, "--state-dir", self._folder],
                env={**os.environ, "NOTIFY_SOCKET": notify.getsockname()},
            )
            try:
                while b"READY=1" not in notify.recv(4096).split(b"\n"):
                    pass
            except BaseException:
                self.kill()
                raise
        (self._folder / "notify").unlink()

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self._process.pid

    def socket(self, tenant: str = "a") -> str:
        """The path of a tenant's socket."""
        return str(self._folder / f"{tenant}.sock")

    def ctl(self, *words: str) -> Any:
        """What `kvgatectl --json WORDS` prints, parsed. CalledProcessError when it fails."""
        command = [self._programs / "kvgatectl", "--socket", self._folder / "admin.sock", "--json", *words]
        return json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout or b"null")

    def tenant(self, name: str = "a") -> dict[str, Any]:
        """A tenant's figures."""
        rows = self.ctl("tenants")["tenants"]
        found: dict[str, Any] = next(row for row in rows if row["name"] == name)
        return found

    def gone(self, name: str = "a", workers: int = 0) -> bool:
        """Whether the tenant comes down to so many workers, and to no memory at 0: a hang-up has no answer."""
        end = time.monotonic() + GONE_SECONDS
        while time.monotonic() < end:
            figures = self.tenant(name)
            if figures["workers"] == workers and (workers or figures["charged"] == figures["promised"] == 0):
                return True
        return False

    def kill(self) -> None:
        """Ends it without a chance to say goodbye."""
        self._process.kill()
        self._process.wait(STOP_SECONDS)

    def stop(self) -> None:
        """Ends it as a service manager does; fails when it does not end well. Harmless when it was killed."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            status = self._process.wait(STOP_SECONDS)
            assert status == 0, f"kvgated ended with status {status}"
