#!/usr/bin/env python3
"""What the kernels of the kind cuda are compared with: the same work in PyTorch, on the same GPU.

Usage: tools/rivals/rivals.py [--json FILE|-] [--only PREFIX] [--golden FILE] [--like GPU_JSON]

Needs PyTorch and a CUDA device; exits with 77 without them. Each row has the id of the row of `kvgate-bench gpu`
that does the same work; several rivals may share one id. Times are medians of CUDA events, behind a pause
of the device in which the work is enqueued, as kvgate-bench takes them. Inputs are random and rotate past the cache.
The rivals are written from the formulas of Fast KVzip (arXiv 2601.17668). --golden is a golden file of the gate
(tests/data/golden/gate_g4.safetensors): the eager gate must agree with it, or it would be a rival of something else.
--like is what kvgate-bench gpu --json wrote: the dense attention then reads as many bytes as its ragged rows.
"""

import argparse
import datetime
import json
import math
import os
import statistics
import struct
import sys
import time
import warnings

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    torch = None

# The geometry of Qwen3-8B.
LAYERS, HEADS, GROUP, WIDTH, HIDDEN, HEAD_DIM = 36, 8, 4, 16, 4096, 128
EPSILON = 1e-6
PAUSE_FILLS = 6  # of 1 GiB: 2 ms in which the host gets ahead of the device
GOLDEN_ERROR = 4e-3  # of the reference's own bf16 arithmetic, relative Frobenius

rows = []
only = ""


# ---- timing


def sample(work, count, turn):
    """Microseconds of `count` repetitions, enqueued while the device is busy with something else."""
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
    for _ in range(PAUSE_FILLS):
        sample.pause.fill_(0x5A)
    for start, end in zip(starts, ends, strict=False):
        start.record()
        work(turn)
        end.record()
        turn += 1
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in zip(starts, ends, strict=False)]


def measure(work):
    """Median microseconds of work(turn): at least 30 repetitions and 50 ms, or half a second."""
    if not hasattr(sample, "pause"):
        sample.pause = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    for turn in range(3):
        work(turn)
    torch.cuda.synchronize()
    samples = sample(work, 1, 0)
    began = time.monotonic()
    batch = 10 if samples[0] < 10e3 else 1
    while len(samples) < 500 and (len(samples) < 30 or sum(samples) < 50e3):
        if len(samples) >= 5 and time.monotonic() - began > 0.5:
            break
        samples += sample(work, batch, len(samples))
    return statistics.median(samples)


def graphed(work, turns=2):
    """work(turn) captured in a CUDA graph for each of a few turns, and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work(0)
    torch.cuda.current_stream().wait_stream(stream)
    graphs = []
    for turn in range(turns):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work(turn)
        graphs.append(graph)
    return lambda turn: graphs[turn % turns].replay()


def wants(row_id):
    return row_id.startswith(only)


def add(row_id, rival, work, graph=False, parts=1):
    """Measures one rival and keeps its row; one that fails is said and left out. parts: work does that many at once."""
    try:
        us = measure(graphed(work) if graph else work) / parts
    except Exception as error:  # a backend that does not take these shapes, or no memory
        print(f"rivals: {row_id}: {rival}: {str(error).splitlines()[0]}", file=sys.stderr)
        torch.cuda.synchronize()
        return None
    rows.append({"id": row_id, "rival": rival, "us": round(us, 2)})
    print(f"{row_id:26} {us:12.1f}  {rival}", flush=True)
    return us


# ---- the gate


def rms_norm(x, weight):
    """Over the last dimension, in fp32; rounded to the input's type before the weight, as the reference does."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)).to(x.dtype)


def gate_epilogue(q, k, gate):
    """Scores [..., H, T] from q [..., T, H, G, d] and k [..., T, H, d]."""
    q, k = rms_norm(q, gate["q_norm"]), rms_norm(k, gate["k_norm"])
    scale = 1 / math.sqrt(q.shape[-1])
    z = (q * k.unsqueeze(-2)).sum(-1) * scale + gate["b"]
    sinks = torch.einsum("...thgd,...hsd->...thgs", q, gate["k_base"]) * scale
    p = 1 / (1 + torch.exp(sinks - z.unsqueeze(-1)).sum(-1))
    return p.mean(-1).transpose(-1, -2)


def gate_reference(hidden, gate):
    """Scores [H, T] of hidden states [T, D], as a framework computes them."""
    heads, group, width = gate["shape"]
    q = F.linear(hidden, gate["wq"], gate["bq"]).view(-1, heads, group, width)
    k = F.linear(hidden, gate["wk"]).view(-1, heads, width)
    return gate_epilogue(q, k, gate)


def gate_stacked(hidden, gate):
    """Scores [L, H, T] of hidden [L, T, D]: one batched product with all of the layers' weights."""
    heads, group, width = gate["shape"]
    out = torch.bmm(hidden, gate["w"].transpose(1, 2))
    split = heads * group * width
    q = (out[..., :split] + gate["bq"].unsqueeze(1)).unflatten(-1, (heads, group, width))
    return gate_epilogue(q, out[..., split:].unflatten(-1, (heads, width)), gate)


def random_gate(layers):
    """Weights of that many layers, stacked in front; 0 layers: of one, without that dimension."""

    def normal(*shape, deviation=1.0, dtype=torch.bfloat16):
        shape = ((layers,) if layers else ()) + shape
        return (torch.randn(shape, device="cuda") * deviation).to(dtype)

    inputs = 1 / math.sqrt(HIDDEN)
    gate = {
        "shape": (HEADS, GROUP, WIDTH),
        "wq": normal(HEADS * GROUP * WIDTH, HIDDEN, deviation=inputs),
        "bq": normal(HEADS * GROUP * WIDTH, deviation=0.1),
        "wk": normal(HEADS * WIDTH, HIDDEN, deviation=inputs),
        "q_norm": torch.rand(WIDTH, device="cuda") + 0.5,
        "k_norm": torch.rand(WIDTH, device="cuda") + 0.5,
        "b": normal(1, HEADS, GROUP, deviation=0.5),
        "k_base": normal(HEADS, 16, WIDTH, dtype=torch.float32),
    }
    gate["w"] = torch.cat([gate["wq"], gate["wk"]], -2)
    return gate


def layer_of(gate, layer):
    return {name: value[layer] if name in ("wq", "bq", "wk", "b", "k_base") else value for name, value in gate.items()}


def read_safetensors(path):
    """The tensors of a file in that format, on the CPU."""
    types = {"BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    with open(path, "rb") as file:
        data = bytearray(file.read())
    size = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + size])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            part = data[8 + size + begin : 8 + size + end]
            tensors[name] = torch.frombuffer(part, dtype=types[entry["dtype"]]).view(entry["shape"])
    return tensors


def check_golden(path):
    """How far the eager gate is from a golden file's true scores: relative Frobenius."""
    file = {name: tensor.cuda() for name, tensor in read_safetensors(path).items()}
    heads, _, group = file["b"].shape
    width = file["k_norm.weight"].shape[0]
    gate = {
        "shape": (heads, group, width),
        "wq": file["q_proj.weight"],
        "bq": file["q_proj.bias"],
        "wk": file["k_proj.weight"],
        "q_norm": file["q_norm.weight"],
        "k_norm": file["k_norm.weight"],
        "b": file["b"].view(1, heads, group),
        "k_base": file["k_base"].view(heads, -1, width),
    }
    score, true = gate_reference(file["hidden"], gate).double(), file["score_f64"]
    return float((score - true).norm() / true.norm())


def bench_gate_long():
    if not wants("gate-hidden-16000"):
        return
    gate = random_gate(0)
    hidden = [torch.randn(16000, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    add("gate-hidden-16000", "PyTorch, eager", lambda turn: gate_reference(hidden[turn % 2], gate))
    compiled = torch.compile(gate_reference, dynamic=False)
    add("gate-hidden-16000", "PyTorch, torch.compile", lambda turn: compiled(hidden[turn % 2], gate))
    name = "PyTorch, torch.compile in a CUDA graph"
    add("gate-hidden-16000", name, lambda turn: compiled(hidden[turn % 2], gate), True)


def bench_gate_layers():
    if not wants("gate-hidden-128x36"):
        return
    gate = random_gate(LAYERS)
    gates = [layer_of(gate, layer) for layer in range(LAYERS)]
    hidden = torch.randn(LAYERS, 128, HIDDEN, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(gate_reference, dynamic=False)
    compiled_stacked = torch.compile(gate_stacked, dynamic=False)
    error = (gate_stacked(hidden, gate)[3] - gate_reference(hidden[3], gates[3])).norm()
    assert error < 1e-2 * gate_reference(hidden[3], gates[3]).norm(), "the stacked gate differs"

    def each(function):
        return lambda turn: [function(hidden[layer], gates[layer]) for layer in range(LAYERS)]

    row_id = "gate-hidden-128x36"
    add(row_id, "PyTorch, eager, layer by layer", each(gate_reference))
    add(row_id, "PyTorch, torch.compile, layer by layer", each(compiled))
    add(row_id, "one bmm and a compiled epilogue in a CUDA graph", lambda turn: compiled_stacked(hidden, gate), True)


# ---- selection and eviction


def bench_select():
    row_id = "select-threshold-4.6M"
    if not wants(row_id):
        return
    count = LAYERS * HEADS * 16000
    kept = int(count * 0.3)
    # Most scores near zero, as gates give them.
    scores = [torch.rand(count, device="cuda").pow(4) for _ in range(4)]

    def by_sort(turn):
        return torch.sort(scores[turn % 4], descending=True).values[kept - 1]

    def by_topk(turn):
        return torch.topk(scores[turn % 4], kept, sorted=False).values.min()

    assert by_sort(0) == by_topk(0)
    add(row_id, "torch.sort", by_sort)
    add(row_id, "torch.sort in a CUDA graph", by_sort, True)
    add(row_id, "torch.topk", by_topk)


def bench_evict():
    row_id = "evict-moves-30"
    if not wants(row_id):
        return
    shape = (LAYERS, HEADS * 16000, HEAD_DIM)
    k = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    v = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    keep = torch.rand(shape[:2], device="cuda") < 0.3
    lists = [keep[layer].nonzero().squeeze(1) for layer in range(LAYERS)]

    def by_mask(turn):
        for layer in range(LAYERS):
            k[layer][keep[layer]]
            v[layer][keep[layer]]

    def by_index(turn):
        for layer in range(LAYERS):
            k[layer].index_select(0, lists[layer])
            v[layer].index_select(0, lists[layer])

    add(row_id, "boolean mask, layer by layer", by_mask)
    add(row_id, "index_select, the lists made before, layer by layer", by_index)


# ---- the cache


def bench_append():
    """K and V of one token of each sequence: a new cache, as the reference makes it, or a place in one kept for it."""

    def caches(batch, keys, count):
        shape = (batch, HEADS, keys, HEAD_DIM)
        return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]

    def measure_append(row_id, batch, keys, layers, parts):
        if not wants(row_id):
            return
        cache, new = caches(batch, keys, 4), caches(batch, 1, 1)[0]
        place = torch.randint(0, keys, (batch,), device="cuda")
        each = torch.arange(batch, device="cuda")

        def by_cat(turn):
            for i in range(2 * layers):
                torch.cat([cache[i % 4], new], dim=-2)

        def in_place(turn):
            for i in range(2 * layers):
                cache[i % 4][each, :, place] = new[:, :, 0]

        add(row_id, "torch.cat of the cache and the tokens", by_cat, parts=parts)
        add(row_id, "index_put into a cache of fixed size, in a CUDA graph", in_place, True, parts)

    measure_append("append-b1-38400", 1, 38400, LAYERS, 1)
    measure_append("append-b128", 128, 7200, 2, 2)


def dense_shapes(like):
    """Rows of attention: id to (batch, keys). The ragged ones are as long as the bytes that ours read say."""
    shapes = {
        "attend-b1-38400": (1, 38400),
        "attend-ragged-b1": (1, 7200),
        "attend-ragged-b16": (16, 7200),
        "attend-ragged-b128": (128, 7200),
    }
    rate = like.get("rates", {}).get("copy_bytes_per_second", 0)
    for row in like.get("rows", []):
        if row["id"] in shapes and row.get("floor_us") and rate:
            batch = shapes[row["id"]][0]
            size = row["floor_us"] * 1e-6 * rate
            shapes[row["id"]] = batch, max(1, round(size / (batch * HEADS * HEAD_DIM * 4)))
    return shapes


def bench_attention(like):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for row_id, (batch, keys) in dense_shapes(like).items():
        if not wants(row_id):
            continue
        # Several layers' caches in one graph, more than the device's cache holds, as a decode step has them.
        size = batch * HEADS * keys * HEAD_DIM * 4
        layers = max(2, min(LAYERS, (1 << 30) // size))
        shape = (batch, HEADS, keys, HEAD_DIM)
        k = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
        v = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
        q = torch.randn(batch, HEADS * GROUP, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

        def attend(turn, q=q, k=k, v=v):
            for layer in range(len(k)):
                F.scaled_dot_product_attention(q, k[layer], v[layer], enable_gqa=True)

        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            name = backend.name.split("_")[0].lower()
            with sdpa_kernel(backend):
                add(row_id, f"torch SDPA ({name}), dense, {batch} x {keys} keys", attend, True, layers)
        del attend, k, v


def bench_copy():
    row_id = "copy-blocks-to-host-8k"
    if not wants(row_id):
        return
    blocks, size = 32768, 8192  # 256 MiB
    device = torch.randint(0, 256, (blocks, size), device="cuda", dtype=torch.uint8)
    host = torch.empty((blocks, size), dtype=torch.uint8, pin_memory=True)
    order = torch.randperm(blocks).tolist()
    pairs = [(host[i], device[j]) for i, j in enumerate(order)]
    index = torch.tensor(order, device="cuda")

    def one_by_one(turn):
        for target, source in pairs:
            target.copy_(source, non_blocking=True)

    def gathered(turn):
        host.copy_(device.index_select(0, index), non_blocking=True)

    for name, work in (("a copy for each block", one_by_one), ("index_select, then one copy", gathered)):
        us = add(row_id, f"PyTorch, {name}", work)
        if us:
            rows[-1]["bytes"] = blocks * size
            rows[-1]["bytes_per_second"] = round(blocks * size / us * 1e6)


# ---- the program


def machine():
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def parse():
    parser = argparse.ArgumentParser(usage=__doc__.splitlines()[2].removeprefix("Usage: "))
    parser.add_argument("--json", default="")
    parser.add_argument("--only", default="")
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument("--golden", default=os.path.join(here, "../../tests/data/golden/gate_g4.safetensors"))
    parser.add_argument("--like", default="")
    return parser.parse_args()


def main():
    global only
    options = parse()
    only = options.only
    if not torch or not torch.cuda.is_available():
        print("rivals: no PyTorch, or no CUDA device for it", file=sys.stderr)
        return 77
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    torch.manual_seed(1)
    like = {}
    if options.like:
        with open(options.like, encoding="utf-8") as file:
            like = json.load(file)
    error = check_golden(options.golden)
    print(
        f"the eager gate is within {error:.2e} of the golden file's true scores (allowed: {GOLDEN_ERROR})", flush=True
    )
    if not error <= GOLDEN_ERROR:
        print("rivals: the eager gate computes something else than the golden file", file=sys.stderr)
        return 1
    for bench in (
        bench_select,
        bench_evict,
        bench_append,
        lambda: bench_attention(like),
        bench_copy,
        bench_gate_long,
        bench_gate_layers,
    ):
        bench()
        torch.cuda.empty_cache()
    result = {
        "program": "tools/rivals/rivals.py",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": machine(),
        "golden": {"file": os.path.basename(options.golden), "error": error, "allowed": GOLDEN_ERROR},
        "rows": rows,
    }
    if options.json == "-":
        print(json.dumps(result, indent=1))
    elif options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
