"""What the Python tests share: the library of the build under test, and a real daemon."""

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from daemon import ROOT, Daemon, config, programs

os.environ.setdefault("KVGATE_LIBRARY", str(programs().parent / "lib" / "libkvgate.so.1"))
if importlib.util.find_spec("kvgate") is None:
    sys.path.insert(0, str(ROOT / "client" / "python"))

StartDaemon = Callable[..., Daemon]


@pytest.fixture
def start_daemon() -> Iterator[StartDaemon]:
    """start_daemon(configuration=config()) -> Daemon, ready; all are stopped at the test's end."""
    daemons: list[Daemon] = []
    folders: list[Path] = []

    def start(text: str = config()) -> Daemon:
        # Not tmp_path: a socket's path has at most 107 bytes.
        folders.append(Path(tempfile.mkdtemp(prefix="kvg-py.")))
        daemons.append(Daemon(programs(), folders[-1], text))
        return daemons[-1]

    try:
        yield start
        for daemon in daemons:
            daemon.stop()
    finally:
        for daemon in daemons:
            daemon.kill()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> Daemon:
    """A daemon of the host kind with 32 MiB and tenant a."""
    return start_daemon()
