"""docs/engine-guide.md: its code runs as it stands, its C compiles, and the tests that it names are there."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kvgate
from daemon import ROOT, Daemon, config

GUIDE = ROOT / "docs" / "engine-guide.md"
GATE = ROOT / "tests" / "data" / "pilot-lm" / "gate.safetensors"
LAYERS, HEADS, GROUP, DIM, HIDDEN, TOKENS = 6, 4, 2, 32, 256, 1200
SCALE = DIM**-0.5

StartDaemon = Callable[[str], Daemon]


def blocks(language: str, cuda: bool = False) -> list[str]:
    """The guide's code in a language, in order; cuda: that which is marked as needing a GPU, otherwise the rest."""
    found = re.findall(rf"^(<!-- cuda -->\n)?```{language}\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    return [code for mark, code in found if bool(mark) == cuda]


class Model:
    """Random projections of `TOKENS` positions, and what attention over given positions must say.

    k, v [layers][heads][tokens][dim], values that bf16 holds; q [layers][heads][tokens][query_heads][dim]; hidden
    [layers][tokens][hidden] bf16.
    """

    def __init__(self, guide: SimpleNamespace, seed: int = 1) -> None:
        make = torch.Generator().manual_seed(seed)
        self.guide = guide
        self.k = torch.randn(LAYERS, HEADS, TOKENS, DIM, generator=make).bfloat16().float()
        self.v = torch.randn(LAYERS, HEADS, TOKENS, DIM, generator=make).bfloat16().float()
        self.q = torch.randn(LAYERS, HEADS, TOKENS, GROUP, DIM, generator=make)
        self.hidden = torch.randn(LAYERS, TOKENS, HIDDEN, generator=make).bfloat16()
        self.out: list[torch.Tensor] = []

    def forward(self, sequence: kvgate.Sequence, begin: int, count: int, data: int | None = None) -> None:
        """The guide's attention in every layer, for tokens of which the data begins at `data` (default: `begin`).

        out: per layer [heads][count][query_heads][dim].
        """
        at = slice(begin if data is None else data, (begin if data is None else data) + count)
        self.out = []
        for layer in range(LAYERS):
            q, k, v = self.q[layer, :, at], self.k[layer, :, at], self.v[layer, :, at]
            out = self.guide.attention(sequence, layer, begin, q, k, v, self.hidden[layer, at])
            self.out.append(torch.stack([torch.from_numpy(head) for head in out]))

    def expect(self, fed: list[int], count: int) -> None:
        """The last `count` tokens of those fed saw all tokens fed up to each."""
        hidden = torch.ones(count, len(fed), dtype=torch.bool).triu(len(fed) - count + 1)
        for layer in range(LAYERS):
            k, v, q = self.k[layer][:, fed], self.v[layer][:, fed], self.q[layer][:, fed[-count:]]
            logits = SCALE * torch.einsum("htgd,hsd->htgs", q, k)
            weights = torch.softmax(logits.masked_fill(hidden[None, :, None], -torch.inf), dim=-1)
            expected = torch.einsum("htgs,hsd->htgd", weights, v)
            torch.testing.assert_close(self.out[layer], expected, atol=2e-4, rtol=2e-4)


@pytest.fixture
def guide(daemon: Daemon) -> Iterator[SimpleNamespace]:
    """What the guide's Python defines, connected to a daemon of the host kind."""
    yield from run_guide(daemon)


def run_guide(daemon: Daemon) -> Iterator[SimpleNamespace]:
    """Runs the guide's Python; its client is closed in the end."""
    names: dict[str, Any] = {"socket": daemon.socket(), "gate": GATE, "torch": torch}
    try:
        for code in blocks("python"):
            exec(compile(code, str(GUIDE), "exec"), names)
        yield SimpleNamespace(**names)
    finally:
        if "client" in names:
            names["client"].close()


def policy(tokens: int, **changes: Any) -> kvgate.Policy:
    """Of a prompt of `tokens` tokens whose first is the prefix."""
    fields = {"ratio": 1.0, "prefix_tokens": 1, "context_tokens": tokens - 1, "max_new_tokens": 256}
    return kvgate.Policy(**{**fields, **changes})


# ---- the sections, in their order ----


def test_chunked_prefill_holds_a_chunk_and_what_was_kept(guide: SimpleNamespace) -> None:
    tokens, chunk = 1000, 256
    model, peaks = Model(guide), []
    rules = policy(tokens, ratio=0.3, chunk_tokens=chunk, window=16, window_absolute=True)
    with guide.client.create(rules) as sequence:

        def forward(sequence: kvgate.Sequence, begin: int, count: int) -> None:
            peaks.append(guide.client.mapped_bytes)
            model.forward(sequence, begin, count)

        guide.prefill(sequence, forward, tokens, chunk)
        held = sequence.query().pairs / (tokens * LAYERS * HEADS)
        assert 0.27 < held < 0.33
        after = guide.client.mapped_bytes
    with guide.client.create(policy(tokens)) as sequence:
        guide.prefill(sequence, model.forward, tokens, tokens)
        assert sequence.query().pairs == tokens * LAYERS * HEADS
        assert after < 0.5 * guide.client.mapped_bytes
        assert max(peaks) < 0.8 * guide.client.mapped_bytes


def test_chunks_without_eviction_see_everything(guide: SimpleNamespace) -> None:
    model = Model(guide)
    with guide.client.create(policy(300)) as sequence:
        guide.prefill(sequence, model.forward, 300, 100)
        model.expect(list(range(300)), 100)


def test_an_eviction_needs_scores_and_gives_unused_room_back(guide: SimpleNamespace) -> None:
    model = Model(guide)
    with guide.client.create(policy(200, ratio=0.5)) as sequence:
        sequence.reserve(200)
        for layer in range(LAYERS):
            for head in range(HEADS):
                sequence.append(layer, head, 0, model.k[layer, head, :200], model.v[layer, head, :200])
        sequence.commit(200)
        with pytest.raises(kvgate.KvgateError, match="layer 0 is scored to") as error:
            sequence.evict()
        assert error.value.strerror
        for layer in range(LAYERS):
            sequence.stage_hidden(layer, 0, model.hidden[layer, :200])
        sequence.reserve(100)
        assert sequence.state().reserved_pos >= 300
        sequence.evict()
        assert sequence.state().reserved_pos < 216  # what is left is in blocks that hold pairs


def test_sequences_of_one_batch_are_independent(guide: SimpleNamespace) -> None:
    model = Model(guide)
    positions = {}
    for tokens in (100, 128, 217):
        sequence = guide.client.create(policy(tokens))
        guide.prefill(sequence, model.forward, tokens, 100)
        positions[sequence] = tokens
    fed = dict(positions)

    def forward(sequence: kvgate.Sequence, position: int, count: int) -> None:
        assert position == fed[sequence]
        model.forward(sequence, position, count)
        model.expect(list(range(position + 1)), 1)
        fed[sequence] += 1

    for _ in range(3):
        guide.decode_step(positions, forward)
    assert fed == positions
    assert sorted(fed.values()) == [103, 131, 220]


def test_decode_events_hold_the_budget(guide: SimpleNamespace) -> None:
    model, budget = Model(guide), 200
    due = [guide.client.create(policy(300, budget=budget)) for _ in range(3)]
    other = guide.client.create(policy(50))
    for sequence in due:
        guide.prefill(sequence, model.forward, 300, 300)
    results = guide.decode_events(due)
    assert [result.pairs_held for result in results] == [budget * LAYERS * HEADS] * 3
    for sequence in due:
        assert sequence.state().reserved_pos >= 428
    due[0].evict_async("decode")
    assert other.query().pairs == 0
    with pytest.raises(kvgate.KvgateError, match="under way"):
        due[0].query()
    due[0].evict_finish()


def fill(client: kvgate.Client, running: list[kvgate.Sequence]) -> str:
    """Admits sequences until the daemon refuses one; what it said."""
    for _ in range(client.layout.max_sequences if client.layout else 0):
        try:
            running.append(client.create(policy(256)))
        except kvgate.RefusedError as refusal:
            return str(refusal)
    return "nothing was refused"


def test_admission_refuses_and_a_freed_sequence_makes_room(start_daemon: StartDaemon) -> None:
    for guide in run_guide(start_daemon(config("4M"))):
        model = Model(guide)
        running: list[kvgate.Sequence] = []
        assert re.search(r"\d+ bytes short", fill(guide.client, running))
        assert running
        for sequence in running:  # what is admitted can be fed to its end
            guide.prefill(sequence, model.forward, 256, 256)
        count = len(running)
        sequence, preempted = guide.admit(policy(256), running)
        assert len(preempted) == 1
        assert len(running) == count - 1
        guide.prefill(sequence, model.forward, 256, 256)
        model.expect(list(range(256)), 256)
        with pytest.raises(kvgate.RefusedError):
            guide.admit(policy(4096), running)
        assert not running


def test_rejected_drafts_leave_no_trace(guide: SimpleNamespace) -> None:
    model = Model(guide)
    with guide.client.create(policy(200, budget=150)) as sequence:
        guide.prefill(sequence, model.forward, 200, 200)
        guide.verify(sequence, lambda *place: model.forward(*place, data=500), 200, 5, 2)
        assert sequence.state().committed_pos == 202
        guide.verify(sequence, model.forward, 202, 4, 4)
        model.expect([*range(200), 500, 501, *range(202, 206)], 4)
        assert sequence.evict("decode").pairs_held == 150 * LAYERS * HEADS
        with pytest.raises(kvgate.KvgateError, match="205"):
            sequence.truncate(205)


def test_questions_about_one_context(guide: SimpleNamespace) -> None:
    model, answers = Model(guide), []
    rules = policy(400, ratio=0.4, window=16, window_absolute=True)
    with guide.client.create(rules) as sequence:
        guide.prefill(sequence, model.forward, 400, 400)
        for question in (600, 700, 600):
            guide.ask(sequence, lambda *place, data=question: model.forward(*place, data=data), 400, 20)
            answers.append(torch.stack(model.out))
    assert torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[0], answers[1])


def test_a_context_is_read_once(guide: SimpleNamespace) -> None:
    model, reads = Model(guide), []
    rules = policy(400, ratio=0.4, window=16, window_absolute=True)
    after = kvgate.Policy(mode="off", max_new_tokens=64)

    def read(rules: kvgate.Policy) -> kvgate.Sequence:
        reads.append(rules)
        sequence: kvgate.Sequence = guide.client.create(rules)
        guide.prefill(sequence, model.forward, 400, 400)
        return sequence

    outs = []
    for _ in range(2):
        with guide.shared(rules, after, list(range(400)), 0, read) as sequence:
            assert sequence.residency().shared_pos == 400
            guide.ask(sequence, lambda *place: model.forward(*place, data=600), 400, 20)
            outs.append(torch.stack(model.out))
    assert len(reads) == 1
    assert torch.equal(outs[0], outs[1])
    with read(rules) as sequence:
        guide.ask(sequence, lambda *place: model.forward(*place, data=600), 400, 20)
        assert torch.equal(torch.stack(model.out), outs[0])


def test_a_pause_and_a_closer_look(start_daemon: StartDaemon) -> None:
    for guide in run_guide(start_daemon(config(host="32M"))):
        model = Model(guide)
        rules = policy(400, ratio=0.2, window=16, window_absolute=True, retain="host")
        with guide.client.create(rules) as sequence:
            guide.prefill(sequence, model.forward, 400, 400)
            guide.pause(sequence)
            assert sequence.residency().idle
            guide.go_on(sequence, 20)
            assert not sequence.residency().idle
            held = sequence.query().pairs
            assert guide.look_closer(sequence, 0.5) > 0
            assert sequence.query().pairs > 2 * held


def test_a_paged_kernel_reads_the_tables(guide: SimpleNamespace) -> None:
    model = Model(guide)
    with guide.client.create(policy(500, ratio=0.3, window=16, window_absolute=True)) as sequence:
        guide.prefill(sequence, model.forward, 500, 500)
        sequence.reserve(1)
        model.forward(sequence, 500, 1)
        sequence.commit(1)
        lengths = {sequence.row_length(layer, head) for layer in range(LAYERS) for head in range(HEADS)}
        assert len(lengths) > 1
        for layer in range(LAYERS):
            out = guide.paged_attention(sequence, layer, model.q[layer, :, 500])
            torch.testing.assert_close(out, model.out[layer][:, 0], atol=2e-4, rtol=2e-4)


# ---- the rest of the page ----


def test_the_c_compiles(tmp_path: Path) -> None:
    code = blocks("c")
    assert len(code) >= 2
    source = tmp_path / "guide.c"
    source.write_text("#include <math.h>\n#include <kvgate.h>\n" + "\n".join(code))
    compiler = shutil.which("cc")
    assert compiler, "no C compiler"
    folders = [f"-I{ROOT / 'client'}", f"-I{ROOT / 'proto'}"]
    flags = ["-std=gnu11", "-fsyntax-only", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-Wno-unused-function"]
    done = subprocess.run([compiler, *flags, *folders, str(source)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_tests_that_it_names_are_there() -> None:
    table = GUIDE.read_text().split("## What is tested where")[1]
    found = 0
    for line in table.splitlines():
        path = None
        for word in re.findall(r"`(tests/[^`]+|::[^`]+)`", line):
            file, _, name = word.partition("::")
            path = ROOT / file if file else path
            assert path is not None
            assert path.exists(), word
            if name:
                assert re.search(rf"\b{name}\(", path.read_text()), word
                found += 1
    assert found > 15


def needs_gpu() -> None:
    """Skips where there is no GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


def test_a_decode_step_in_a_graph(start_daemon: StartDaemon) -> None:
    """The guide's CUDA code: one graph serves other sequences and what an eviction leaves."""
    needs_gpu()
    text = "[pool]\nkind = cuda\ndevice.size = 256M\nextent_size = 2M\n[tenant a]\nsocket = a.sock\n"
    names: dict[str, Any] = {"torch": torch}
    for code in blocks("python", cuda=True):
        exec(compile(code, str(GUIDE), "exec"), names)
    with kvgate.Client(start_daemon(text).socket()) as client:
        stream = torch.cuda.Stream()
        client.set_stream(stream)
        client.register(layout_of_the_test(), 1 << 20)
        with torch.cuda.stream(stream):
            Graphs(client, SimpleNamespace(**names), stream).run()


def layout_of_the_test() -> kvgate.Layout:
    """Two layers, small enough for a reference on the CPU."""
    return kvgate.Layout("guide", 64, 2, HEADS, GROUP, DIM, DIM, "bf16", max_sequences=4, max_tokens=1024)


class Graphs:
    """Sequences on the GPU whose decode steps are one captured graph, against attention over what their rows hold."""

    def __init__(self, client: kvgate.Client, guide: SimpleNamespace, stream: torch.cuda.Stream) -> None:
        def device(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

        self.client, self.stream = client, stream
        self.slots = torch.full((2,), -1, dtype=torch.int32, device="cuda")
        self.q, self.k = device(2, 2, HEADS * GROUP * DIM), device(2, 2, HEADS * DIM)
        self.v, self.out = device(2, 2, HEADS * DIM), device(2, 2, HEADS * GROUP * DIM)
        arguments = (client, 2, SCALE, self.slots, self.q, self.k, self.v, self.out)
        self.graph = guide.capture(lambda: guide.decode(*arguments), self.slots, stream)

    def prompt(self, tokens: int, ratio: float) -> kvgate.Sequence:
        """A sequence whose prompt is written, staged with random scores and committed."""
        sequence = self.client.create(policy(tokens, ratio=ratio, window=16, window_absolute=True))
        sequence.reserve(tokens)
        slots = torch.full((tokens,), sequence.slot, dtype=torch.int32, device="cuda")
        index = torch.arange(tokens, dtype=torch.int32, device="cuda")
        for layer in range(2):
            k, v = (torch.randn(tokens, HEADS * DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            self.client.cuda_append(layer, tokens, slots, index, k, HEADS * DIM, v, HEADS * DIM)
            sequence.stage_scores(layer, 0, torch.rand(tokens, HEADS))
        self.client.cuda_advance(slots[:1], 1, tokens)
        sequence.commit(tokens)
        sequence.evict()
        self.stream.synchronize()
        return sequence

    def step(self, sequences: list[kvgate.Sequence]) -> None:
        """One replay for these sequences, and the check of every head."""
        for sequence in sequences:
            sequence.reserve(1)
        slots = [sequence.slot for sequence in sequences] + [-1] * (2 - len(sequences))
        self.slots.copy_(torch.tensor(slots, dtype=torch.int32))
        self.k.normal_()
        self.v.normal_()
        self.q.normal_()
        self.graph.replay()
        self.stream.synchronize()
        for sequence in sequences:
            sequence.commit(1)
        for layer in range(2):
            self.check(layer, sequences)

    def check(self, layer: int, sequences: list[kvgate.Sequence]) -> None:
        """The graph's attention against the tables in both forms."""
        count, view = len(sequences), self.client.view()
        cap = view.row_cap
        table = torch.zeros(count, HEADS, cap, dtype=torch.int32, device="cuda")
        lengths = torch.zeros(count, HEADS, dtype=torch.int32, device="cuda")
        indptr = torch.zeros(count * HEADS + 1, dtype=torch.int32, device="cuda")
        indices = torch.zeros(count * HEADS * cap, dtype=torch.int32, device="cuda")
        last = torch.zeros(count * HEADS, dtype=torch.int32, device="cuda")
        self.client.cuda_export_table(layer, count, self.slots, 0, table, cap, lengths)
        self.client.cuda_export_csr(layer, count, self.slots, 0, indptr, indices, last)
        self.stream.synchronize()
        k_cache, v_cache = view.k_blocks.torch(), view.v_blocks.torch()
        for i in range(count * HEADS):
            sequence, head = divmod(i, HEADS)
            pages = indices[indptr[i] : indptr[i + 1]].long()
            length = (len(pages) - 1) * 16 + int(last[i])
            assert length == int(lengths[sequence, head])
            assert torch.equal(pages, table[sequence, head, : len(pages)].long())
            k = k_cache[pages].reshape(-1, DIM)[:length].float()
            v = v_cache[pages].reshape(-1, DIM)[:length].float()
            newest = self.k[layer, sequence].reshape(HEADS, DIM)[head].float()
            assert torch.equal(k[-1], newest)
            q = self.q[layer, sequence].reshape(HEADS, GROUP, DIM)[head].float()
            out = self.out[layer, sequence].reshape(HEADS, GROUP, DIM)[head].float()
            expected = torch.softmax(SCALE * q @ k.T, dim=-1) @ v
            torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)

    def run(self) -> None:
        """Steps of one sequence, of two, and after evictions."""
        first = self.prompt(200, 1.0)
        for _ in range(3):
            self.step([first])
        second = self.prompt(500, 0.3)
        for _ in range(20):
            self.step([second, first])
        first.free()
        self.step([second])
