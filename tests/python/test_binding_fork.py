"""A forked child holds nothing of a client and cannot use it; the parent goes on."""

import json
import os
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

import kvgate
from binding import GROUP, K_DIM, STAGING, Filled, connected, descriptors, layout, policy
from daemon import Daemon


class Child:
    """A fork that calls `work`, reports what it returns as JSON, and lives until `end()`."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._said, say = os.pipe()
        hold, self._hold = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other libraries' threads do not matter here
            self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self._hold)
                os.write(say, json.dumps(work()).encode())
                os.close(say)
                os.read(hold, 1)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(say)
        os.close(hold)

    def answer(self) -> Any:
        """What `work` returned."""
        with open(self._said, "rb", closefd=True) as said:
            return json.loads(said.read())

    def end(self) -> None:
        """Lets it go; it must end well."""
        os.close(self._hold)
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == 0


def text_of(use: Callable[[], Any]) -> str:
    """What a call that must fail says."""
    try:
        use()
    except (kvgate.KvgateError, BufferError) as error:
        return str(error)
    return "no error"


def test_a_child_holds_nothing(daemon: Daemon) -> None:
    before = descriptors()
    with connected(daemon.socket()) as client:
        sequence = Filled(client, 300).sequence
        figures = daemon.tenant()
        opened = [target for number, target in descriptors().items() if before.get(number) != target]
        assert len(opened) == 2, "the socket and the doorbell"

        def work() -> list[Any]:
            with open("/proc/self/maps", encoding="ascii") as maps:
                mapped = [line for line in maps if "memfd:" in line]
            return [[target for target in descriptors().values() if "pipe:" not in target], mapped]

        child = Child(work)
        open_in_child, mapped_in_child = child.answer()
        assert mapped_in_child == []
        assert [t for t in open_in_child if "socket:" in t and t not in before.values()] == []
        assert sum("eventfd" in t for t in open_in_child) == sum("eventfd" in t for t in before.values())
        assert daemon.tenant() == figures
        client.nop()
        assert sequence.evict().pairs_dropped > 0
        child.end()


def test_a_child_cannot_use_it(daemon: Daemon) -> None:
    with connected(daemon.socket()) as client:
        sequence, view = Filled(client, 100).sequence, client.view()
        row = np.zeros((1, GROUP, K_DIM), np.float32)

        def work() -> list[str]:
            uses: list[Callable[[], Any]] = [
                client.nop,
                client.view,
                client.fileno,
                lambda: client.mapped_bytes,
                lambda: client.create(policy(10)),
                lambda: sequence.reserve(1),
                sequence.state,
                sequence.query,
                lambda: sequence.row(0, 0),
                lambda: sequence.attend(0, 0, 99, 1, 1.0, row),
            ]
            said = [text_of(use) for use in uses]
            assert text_of(view.ids.numpy).endswith("its memory is gone")
            assert client.closed
            # Leaving blocks is harmless.
            sequence.free()
            client.close()
            return said

        child = Child(work)
        wanted = f"client binding belongs to process {os.getpid()}: a forked child cannot use it"
        assert child.answer() == [wanted] * 10
        child.end()
        assert sequence.query().pairs > 0
        assert client.sequences == [sequence]


def test_the_daemon_hears_of_the_parents_end(daemon: Daemon) -> None:
    """Though the child lives on."""
    with connected(daemon.socket()) as client:
        Filled(client, 100)
        child = Child(lambda: None)
        assert child.answer() is None
    assert daemon.gone()
    child.end()


def test_a_child_may_have_a_client_of_its_own(daemon: Daemon) -> None:
    with connected(daemon.socket()) as client:
        sequence = Filled(client, 100).sequence

        def work() -> list[int]:
            with kvgate.Client(daemon.socket(), "child") as own:
                own.register(layout(), STAGING)
                filled = Filled(own, 200)
                return [filled.sequence.query().pairs, daemon.tenant()["workers"]]

        child = Child(work)
        assert child.answer() == [200 * 6, 2]
        child.end()
        assert sequence.query().pairs == 100 * 6


def test_a_fork_amid_calls(daemon: Daemon) -> None:
    """Calls whose second half is to come stay the parent's."""
    with connected(daemon.socket()) as client:
        sequence = Filled(client, 300).sequence
        sequence.evict_async()
        sequence.reserve_async(20)
        child = Child(lambda: text_of(sequence.evict_finish))
        assert "belongs to process" in child.answer()
        assert sequence.evict_finish().pairs_dropped > 0
        sequence.reserve_finish()
        child.end()
        assert sequence.state().reserved_pos >= 320


def test_forks_while_another_thread_calls(daemon: Daemon) -> None:
    """The child waits for no thread that it does not have."""
    stop = threading.Event()
    with connected(daemon.socket()) as client:
        sequence = Filled(client, 100).sequence

        def calls() -> None:
            while not stop.is_set():
                client.nop()
                sequence.query()

        def work() -> list[Any]:
            text = text_of(client.nop)
            sequence.free()
            client.close()
            return [text, sum("eventfd" in target for target in descriptors().values())]

        eventfds = sum("eventfd" in target for target in descriptors().values()) - 1  # without the doorbell
        thread = threading.Thread(target=calls)
        thread.start()
        try:
            for _ in range(20):
                child = Child(work)
                text, left = child.answer()
                assert "belongs to process" in text
                assert left == eventfds
                child.end()
        finally:
            stop.set()
            thread.join()
        assert sequence.query().pairs == 600
