"""The policy of one sequence: what is evicted, and when."""

import math
from dataclasses import dataclass

from kvgate import _library
from kvgate.checks import choice, whole

MODES = {"off": 0, "chunked": 1, "once": 2, "threshold": 3}
LEVELS = {"pair": 0, "pair-head": 1, "pair-layer": 2, "adakv-layer": 3}
RETAIN = {"none": 0, "host": 2}
_WINDOW_ABSOLUTE = 1
_FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class Policy:
    """What a sequence may keep.

    `ratio`: share of the context's KV to keep, (0, 1]. `prefix_tokens`: the system prompt, never evicted and not part
    of `context_tokens`. `chunk_tokens` 0: the prompt is one chunk. `window`: newest context tokens that an eviction
    leaves alone. `floor`: least pairs that stay of a row's evicted range. `threshold`: of mode "threshold". `budget`:
    decode eviction's tokens per head on average, 0 for none; `decode_first` and `decode_window`: tokens that it never
    drops, 0 for 4 and 128. `retain` "host": what evictions drop is kept in host memory, as far as the tenant's host
    budget goes, for `Sequence.recall()`. ValueError names field, value and limit.
    """

    ratio: float = 1.0
    mode: str = "chunked"
    level: str = "pair"
    prefix_tokens: int = 0
    context_tokens: int = 0
    chunk_tokens: int = 0
    max_new_tokens: int = 0
    window: int = 4096
    window_absolute: bool = False
    floor: int = 0
    threshold: float = 0.0
    budget: int = 0
    decode_first: int = 0
    decode_window: int = 0
    retain: str = "none"

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"ratio is {self.ratio}, outside (0, 1]")
        choice("mode", self.mode, MODES)
        choice("level", self.level, LEVELS)
        choice("retain", self.retain, RETAIN)
        if not math.isfinite(self.threshold) or abs(self.threshold) > _FLOAT32_MAX:
            raise ValueError(f"threshold is {self.threshold}, outside -{_FLOAT32_MAX:g} to {_FLOAT32_MAX:g}")
        for name in ("prefix_tokens", "context_tokens", "chunk_tokens", "max_new_tokens", "window", "floor", "budget"):
            whole(name, getattr(self, name))
        for name in ("decode_first", "decode_window"):
            whole(name, getattr(self, name))

    def to_c(self) -> "_library.PolicyStruct":
        """The same as a struct kvg_policy."""
        return _library.PolicyStruct(
            ratio=self.ratio,
            mode=MODES[self.mode],
            level=LEVELS[self.level],
            flags=(_WINDOW_ABSOLUTE if self.window_absolute else 0) | RETAIN[self.retain],
            prefix_tokens=self.prefix_tokens,
            context_tokens=self.context_tokens,
            chunk_tokens=self.chunk_tokens,
            max_new_tokens=self.max_new_tokens,
            window=self.window,
            floor=self.floor,
            threshold=self.threshold,
            budget=self.budget,
            decode_first=self.decode_first,
            decode_window=self.decode_window,
        )
