#!/usr/bin/env python3
"""A conversation whose KV stays within a budget, however long it gets.

    examples/chat.py --model FOLDER --gate gate.safetensors --socket /run/kvgate/chat.sock --budget 1024

Reads the user's lines from standard input; what the model says goes to standard output, and the KV's bytes after each
turn to standard error. All turns share one cache: each feeds only its new tokens. Every 128 tokens kvgated evicts the
pairs with the lowest scores, down to --budget tokens per head on average; it promises that much when the conversation
begins, or refuses. Works with any folder that has a model, a gate and a tokenizer, and with the byte-level model in
tests/data/pilot-lm: there `? NAME` asks for the code of NAME, and other lines are only read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import common

if TYPE_CHECKING:
    import kvgate.transformers

PIECE = 128  # tokens that are fed at once: evictions come as often while a long line is read
ALWAYS_HELD = 4 + 128  # a sequence's first tokens and its newest, which decode eviction never drops


class Conversation:
    """One sequence that grows turn by turn. Its memory is the daemon's until close()."""

    def __init__(
        self, kv: kvgate.transformers.Attachment, text: common.Text, budget: int, room: int, answer: int
    ) -> None:
        self._kv, self._text = kv, text
        self._budget, self._room, self._answer = budget, room, answer
        self.tokens: list[int] = []
        self.cache: kvgate.transformers.KvgateCache | None = None

    def say(self, line: str) -> str | None:
        """The model's answer to a line; None when it only reads it. ValueError: no room for the line."""
        fresh = self._text.turn(line, self.tokens)
        answers = self._text.wants_answer(line)
        free = self._room - len(self.tokens) - len(fresh)
        if free < 1:
            raise ValueError(
                f"the conversation has {len(self.tokens)} tokens and its next turn {len(fresh)}: --max-tokens "
                f"is {self._room}"
            )
        tokens, limit = self.tokens + fresh, min(self._answer, free) if answers else 1
        if self.cache is None:
            self.cache = self._create(len(fresh))
        said = common.greedy(self._kv.model, tokens, self.cache, prefill_chunk_size=PIECE, max_new_tokens=limit)
        # The last token that generate() gives has no KV yet: one that nobody wanted is forgotten by leaving it out.
        self.tokens = tokens + said if answers else tokens
        return self._text.decode(said) if answers else None

    def _create(self, tokens: int) -> kvgate.transformers.KvgateCache:
        """A cache whose prompt is the first piece; all that follows counts as decoded, which the budget bounds."""
        first = min(tokens, PIECE)
        return self._kv.cache([first], budget=self._budget, max_new_tokens=self._room - first)

    def figures(self) -> str:
        """Tokens and bytes."""
        assert self.cache is not None
        assert self._kv.client.layout is not None
        held = sum(info.bytes for info in self.cache.info())
        full = common.full_bytes(self._kv.client.layout, len(self.tokens))
        return f"[{len(self.tokens)} tokens, KV {held} bytes; without eviction {full}]"

    def close(self) -> None:
        """Gives the memory back."""
        if self.cache is not None:
            self.cache.free()


def lines() -> Iterator[str]:
    """The user's lines, after a prompt on a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--budget", type=common.positive, default=1024, help="tokens per head to keep on average")
    parser.add_argument("--max-new-tokens", type=common.positive, default=256, help="of one answer")
    parser.add_argument(
        "--max-tokens", type=common.positive, help="of the conversation (default: the model's positions)"
    )
    options = parser.parse_args()
    if options.budget <= ALWAYS_HELD:
        parser.error(f"--budget {options.budget}: must be more than {ALWAYS_HELD}, the tokens that always stay")
    options = common.checked(options)
    import kvgate.transformers

    model, text = common.load(options)
    room = min(options.max_tokens or sys.maxsize, model.config.get_text_config().max_position_embeddings)
    with kvgate.transformers.attach(
        model, options.socket, gate=options.gate, name="chat", max_sequences=1, max_tokens=room
    ) as kv:
        talk(Conversation(kv, text, options.budget, room, options.max_new_tokens))


def talk(conversation: Conversation) -> None:
    """Turn by turn, until standard input ends."""
    try:
        for line in lines():
            answer = conversation.say(line)
            if answer is not None:
                print(answer, flush=True)
            print(conversation.figures(), file=sys.stderr, flush=True)
    finally:
        conversation.close()


if __name__ == "__main__":
    with common.one_line_errors():
        main()
