"""One sequence of a batch: where it stands, and the room, commits and evictions that it needs of the daemon."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Literal

from kvgate import ContextInfo, EvictResult, KvgateError, Policy, RecallResult, RefusedError, Sequence

STEP_TOKENS = 128  # tokens that a decoding sequence reserves at once
EVENT_TOKENS = 128  # positions from one decode eviction to the next (method.md, section 3)


@dataclass
class Row:
    """A sequence in the daemon and the worker's view of it. Positions count the sequence's own tokens from 0."""

    sequence: Sequence
    policy: Policy
    limit: int  # tokens that it may have in all
    length: int = 0  # tokens written
    committed: int = 0
    reserved: int = 0
    fold: int = 0  # tokens that the last eviction folded into the rows' base lengths
    evicting: bool = False  # the first half of an eviction is under way
    ring: int = 0  # pairs that its ring in the sliding layers is said to hold, on a GPU
    window: Sequence | None = None  # the ring
    reserving: int = 0  # tokens of a reserve that is under way
    result: EvictResult | None = None
    shared: int = 0  # tokens of the context that it was attached to

    @property
    def slot(self) -> int:
        return self.sequence.slot

    @property
    def prompt(self) -> int:
        """Tokens of the prompt, a shared context and the protected prefix included."""
        return self.shared + self.policy.prefix_tokens + self.policy.context_tokens

    @property
    def in_prompt(self) -> bool:
        return self.length < self.prompt

    def commit(self) -> None:
        """Commits what is written."""
        if self.length > self.committed:
            self.sequence.commit(self.length - self.committed)
            self.committed = self.length

    def wanted(self, tokens: int) -> int:
        """Tokens to reserve when the next step has `tokens`: a decoding sequence takes some at once."""
        ahead = tokens if self.in_prompt else max(tokens, STEP_TOKENS)
        return max(tokens, min(ahead, self.limit - self.length))

    def make_room(self, tokens: int) -> None:
        """Room for `tokens` more tokens. RefusedError names the budget."""
        if self.length + tokens <= self.reserved:
            return
        if self.length + tokens > self.limit:
            raise ValueError(
                f"sequence {self.slot}: {self.length} tokens and {tokens} more, the cache was made for "
                f"{self.limit} (its inputs and max_new_tokens)"
            )
        self.commit()
        count = self.wanted(tokens)
        self.sequence.reserve(count)
        self.reserved = self.committed + count

    def evict(self, mode: Literal["prefill", "decode"], overlap: bool, next_tokens: int) -> None:
        """Starts an eviction; overlap: finish() ends it, and asks for the room of next_tokens behind it."""
        self.commit()
        if not overlap:
            self._evicted(self.sequence.evict(mode))
        else:
            self.sequence.evict_async(mode)
            self.evicting = True
        self.reserved = self.committed
        if overlap and next_tokens:
            self.reserving = self.wanted(next_tokens)
            self.sequence.reserve_async(self.reserving)

    def finish(self) -> None:
        """Ends what evict() started."""
        if self.evicting:
            self.evicting = False
            self._evicted(self.sequence.evict_finish())
        if self.reserving:
            count, self.reserving = self.reserving, 0
            try:
                self.sequence.reserve_finish()
            except RefusedError:
                # It was looked at before the eviction's memory was back in the pool: this one waits for that.
                self.sequence.reserve(count)
            self.reserved = self.committed + count

    def _evicted(self, result: EvictResult) -> None:
        """An eviction that had nothing to do folds nothing: the daemon says where the sequence stands."""
        self.result, self.fold = result, self.sequence.state().fold_pos

    # ---- what happens between steps: settled, and the next step reserves anew ----

    def _settle(self) -> None:
        self.finish()
        self.commit()
        self.reserved = self.committed

    def offload(self) -> int:
        """To the host; the next step, or restore(), brings it back. Bytes there."""
        self._settle()
        return self.sequence.offload()

    def idle(self) -> None:
        """The daemon may send it to the host until the next step or restore()."""
        self._settle()
        self.sequence.idle()

    def recall(self, ratio: float | None, budget: int | None) -> RecallResult:
        """Dropped pairs come back."""
        self._settle()
        result = self.sequence.recall(ratio, budget)
        self.fold = self.sequence.state().fold_pos
        return result

    def publish(self, key: bytes) -> ContextInfo:
        """Seals it under that key."""
        self._settle()
        info = self.sequence.publish(key)
        self.fold = self.sequence.state().fold_pos
        return info

    def free(self) -> None:
        """Gives everything back, whatever is under way. Harmless a second time."""
        with contextlib.suppress(KvgateError):
            self.finish()
        try:
            self.sequence.free()
        finally:
            if self.window is not None:
                self.window.free()

    def truncate(self, tokens: int) -> None:
        """Forgets the newest tokens. KvgateError: the last eviction was later."""
        self.finish()
        self.commit()
        self.sequence.truncate(self.length - tokens)
        self.length -= tokens
        self.committed = self.length


def row_policy(policy: Policy, tokens: int, prefix: int, max_new_tokens: int) -> Policy:
    """The policy of one sequence whose prompt has `tokens` tokens, the first `prefix` of them protected."""
    if not 0 <= prefix <= tokens:
        raise ValueError(f"prefix_tokens {prefix}: the prompt has {tokens}")
    return replace(policy, prefix_tokens=prefix, context_tokens=tokens - prefix, max_new_tokens=max_new_tokens)
