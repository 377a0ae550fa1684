#!/usr/bin/env python3
"""Generates from one long prompt, keeping less and less of its KV, and says what the KV held in kvgated.

    examples/generate.py --model tests/data/pilot-lm --socket /run/kvgate/chat.sock --ratio 1.0 0.3 0.1

One process, one model. Without --prompt-file the prompt is the first context of the folder's needles.jsonl and a
question about it. The prompt is fed in chunks, and after each chunk the gate's lowest scores are evicted.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import common

if TYPE_CHECKING:
    import kvgate.transformers


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--ratio", type=float, nargs="+", default=[1.0, 0.3], help="shares of the prompt's KV to keep")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="text to go on from")
    parser.add_argument("--chunk", type=common.positive, default=16000, help="tokens between two evictions")
    parser.add_argument("--max-new-tokens", type=common.positive, default=32)
    options = common.checked(parser.parse_args())
    import kvgate.transformers

    model, text = common.load(options)
    prompt = text.prompt(common.prompt_text(options, 0))
    room = len(prompt) + options.max_new_tokens
    with kvgate.transformers.attach(
        model, options.socket, gate=options.gate, name="generate", max_sequences=1, max_tokens=room
    ) as kv:
        for ratio in options.ratio:
            run(kv, text, prompt, ratio, options.chunk, options.max_new_tokens)


def run(
    kv: kvgate.transformers.Attachment, text: common.Text, prompt: list[int], ratio: float, chunk: int, limit: int
) -> None:
    """Generates once and prints a line. The cache's memory is back in the daemon's pool afterwards."""
    begin = time.perf_counter()
    with kv.cache([len(prompt)], ratio=ratio, chunk=chunk, max_new_tokens=limit) as cache:
        tokens = common.greedy(kv.model, prompt, cache, prefill_chunk_size=chunk, max_new_tokens=limit)
        held = sum(info.bytes for info in cache.info())
    assert kv.client.layout is not None
    full = common.full_bytes(kv.client.layout, len(prompt) + len(tokens))
    print(
        f"ratio {ratio}: {len(prompt)} + {len(tokens)} tokens in {time.perf_counter() - begin:.1f} s, "
        f"KV {held / common.MIB:.1f} MiB held of {full / common.MIB:.1f} MiB: {text.decode(tokens)!r}",
        flush=True,
    )


if __name__ == "__main__":
    with common.one_line_errors():
        main()
