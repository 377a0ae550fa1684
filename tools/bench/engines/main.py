#!/usr/bin/env python3
"""Hugging Face transformers on kvgate, measured beside its own cache and beside eviction that only masks.

Run as `kvgate-bench engines` or by itself. Parts:
  prefill  prompts through the model: tokens a second, KV bytes, share of scoring and eviction
  decode   batches with long contexts (filled, not computed), one token of each a step, evictions included
  fit      how many contexts fit into a fixed amount of KV memory
  workers  one load divided among processes, with and without MPS
The model has Qwen3-8B's shape and random weights. Rows go to --json one by one; a file of the same commit is gone on
with. --table and --svg read such a file and draw it. Exit status: 0; 1 for an error; 2 for a usage error; 77 without
what it needs (PyTorch, transformers, kvgate, a GPU of --device cuda).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
_PACKAGE = Path(__file__).resolve().parents[3] / "client" / "python"

PARTS = ("prefill", "decode", "fit", "workers")
METHODS = ("kvgate", "dynamic", "masked", "room")
STAGES = ("hidden", "preact", "none")
OK, FAIL, USAGE, SKIP = 0, 1, 2, 77


def _words(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        words = text.split(",")
        for word in words:
            if word not in known:
                raise argparse.ArgumentTypeError(f"'{word}': known are {', '.join(known)}")
        return words

    return parse


def _whole(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}': a whole number above 0 is wanted")
    return int(text)


def _wholes(text: str) -> list[int]:
    return [_whole(word) for word in text.split(",")]


def _shares(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': numbers separated by commas are wanted") from None
    for share in found:
        if not 0 < share <= 1:
            raise argparse.ArgumentTypeError(f"ratio {share:g}: above 0 and at most 1")
    return found


def _switches(text: str) -> list[bool]:
    for word in text.split(","):
        if word not in ("on", "off"):
            raise argparse.ArgumentTypeError(f"'{word}': on or off")
    return [word == "on" for word in text.split(",")]


# What --tiny changes: a model and contexts that a CPU decodes in seconds.
TINY = {
    "lengths": "600",
    "chunk": "256",
    "fill_chunk": "256",
    "window": "64",
    "context": "512",
    "batches": "3",
    "steps": "16",
    "repeats": "1",
    "pool": "16M",
    "fit_pool": "4M",
    "extent": "256K",
    "workers": "2",
    "worker_total": "2",
    "worker_context": "256",
    "worker_layers": "2",
    "mps": "off",
    "stages": "hidden",
    "device": "cpu",
}


def parser() -> argparse.ArgumentParser:
    """The options. Lists are separated by commas."""
    found = argparse.ArgumentParser("kvgate-bench engines", description=__doc__.split("\n")[0])
    add = found.add_argument
    add("--part", type=_words(PARTS), default=list(PARTS), help="prefill, decode, fit, workers")
    add("--methods", type=_words(METHODS), default=["kvgate", "dynamic", "masked"], help=", ".join(METHODS))
    add("--ratios", type=_shares, default=[1.0, 0.3], help="shares of KV to keep")
    add("--lengths", type=_wholes, default="16000,64000", help="prefill: tokens of a prompt")
    add("--chunk", type=_whole, default="16000", help="tokens of a chunk of a prompt")
    add("--window", type=_whole, default="4096", help="newest tokens that an eviction leaves alone")
    add("--batches", type=_wholes, default="1,4,16,64,128", help="decode: sequences")
    add("--context", type=_whole, default="32768", help="decode, fit: tokens of a context")
    add("--fill-chunk", type=_whole, default="2048", help="decode, workers: tokens of a chunk of a filled context")
    add("--stages", type=_words(STAGES), default=list(STAGES), help="decode at a ratio below 1: hidden, preact, none")
    add("--steps", type=_whole, default="128", help="decode, workers: tokens of a run (128: one event each)")
    add("--repeats", type=_whole, default="3", help="runs of a row")
    add("--row-seconds", type=float, default=30.0, help="no further run of a row begins after that")
    add("--layers", type=int, default=0, help="fewer layers than the model has")
    add("--workers", type=_wholes, default="1,2,4,8", help="workers: processes")
    add("--worker-total", type=_whole, default="32", help="workers: sequences of all together")
    add("--worker-context", type=_whole, default="8192", help="workers: tokens of a context")
    add("--worker-layers", type=_whole, default="8", help="workers: layers of the model, whose weights each holds")
    add("--mps", type=_switches, default="off,on", help="workers: off, on")
    add("--under-mps", action="store_true", help="prefill, decode, fit: all of it as clients of an MPS server")
    add("--pool", default="110G", help="the daemon's device.size")
    add("--fit-pool", default="40G", help="fit: KV memory")
    add("--extent", default="", help="the daemon's extent_size; default: its own")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with a daemon of the kind host")
    add("--tiny", action="store_true", help="a tiny model on the CPU and the kind host: that all of it runs")
    add("--programs", help="the folder of kvgated and kvgatectl")
    add("--json", type=Path, help="the results")
    add("--commit", default="", help="goes into the results")
    add("--table", type=Path, metavar="JSON", help="a Markdown table of results, to standard output")
    add("--svg", type=Path, metavar="JSON", help="a chart of the decode rows, to standard output")
    add("--as-worker", action="store_true", help=argparse.SUPPRESS)
    add("--worker-batch", type=_whole, default="1", help=argparse.SUPPRESS)
    add("--socket", default="", help=argparse.SUPPRESS)
    return found


def parse(words: list[str]) -> argparse.Namespace:
    """The options; those of --tiny are its own where they are not given. Ends the program with 2 where one is wrong."""
    found = parser()
    if "--tiny" in words:
        found.set_defaults(**TINY)
    options = found.parse_args(words)
    if options.under_mps and "workers" in options.part:
        found.error("--under-mps: the part workers has --mps")
    if "workers" in options.part and any(options.worker_total % count for count in options.workers):
        found.error(f"--worker-total {options.worker_total}: not a multiple of every count of --workers")
    return options


def lacks(options: argparse.Namespace) -> str:
    """What is missing on this machine, in one line; "": nothing."""
    try:
        import torch
    except ImportError as error:
        return f"PyTorch is missing ({error}): install torch for {sys.executable}"
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        return f"transformers is missing ({error}): install it for {sys.executable}"
    if options.device == "cuda" and torch.cuda.device_count() == 0:
        return "no GPU: PyTorch finds no CUDA device (--tiny runs on the CPU)"
    if "kvgate" not in options.methods:
        return ""
    if _PACKAGE.is_dir() and str(_PACKAGE) not in sys.path:
        sys.path.append(str(_PACKAGE))  # an installed package comes first
    try:
        import kvgate.transformers  # noqa: F401
    except (ImportError, OSError) as error:
        return f"the Python package kvgate does not load ({error}): pip install ./client/python"
    return ""


def report(options: argparse.Namespace) -> int:
    """--table and --svg."""
    from engines import report as drawing

    try:
        if options.table:
            sys.stdout.write(drawing.table(drawing.read(options.table)))
        if options.svg:
            sys.stdout.write(drawing.chart(drawing.read(options.svg)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"kvgate-bench: engines: {error}", file=sys.stderr)
        return FAIL
    return OK


def measure(options: argparse.Namespace) -> int:
    """The parts, one after the other."""
    import torch

    if options.tiny:
        torch.set_num_threads(1)  # threads cost more than they save
    from engines import decode, fit, prefill, workers
    from engines.geometry import QWEN3_8B, with_layers
    from engines.geometry import TINY as TINY_MODEL
    from engines.results import Results
    from engines.setup import Setup

    whole = with_layers(TINY_MODEL if options.tiny else QWEN3_8B, options.layers)
    small = with_layers(whole, min(options.worker_layers, whole.layers))
    about = {"model": whole.name, "window": options.window, "command": " ".join(sys.argv[1:])}
    results = Results(options.json, options.commit, about)
    for part in ["worker"] if options.as_worker else options.part:
        setup = Setup(options, small if part in ("worker", "workers") else whole, options.device, results)
        run = {"prefill": prefill.run, "decode": decode.run, "fit": fit.run, "workers": workers.run}
        try:
            ({**run, "worker": workers.be_worker})[part](setup)
        finally:
            setup.end()
    return FAIL if results.failed else OK


def main(words: list[str]) -> int:
    """The exit status."""
    options = parse(words)
    if options.table or options.svg:
        return report(options)
    missing = lacks(options)
    if missing:
        print(f"kvgate-bench: engines: {missing}", file=sys.stderr)
        return SKIP
    from engines.service import mps

    try:
        with mps(options.under_mps):
            return measure(options)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"kvgate-bench: engines: {error}", file=sys.stderr)
        return FAIL


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
