"""The layout of a model's KV."""

import ctypes
from dataclasses import dataclass

from kvgate import _library
from kvgate.checks import choice, whole

DTYPES = {"bf16": 1, "f16": 2, "f32": 3}
_GROUP_GLOBAL = 1
_MODEL_BYTES = 127


@dataclass(frozen=True)
class Layout:
    """How one worker's model stores its KV: `layers` attention layers, all alike.

    `query_heads` counts the query heads of one KV head (the group size). `k_dim` and `v_dim` are elements of one token
    of one KV head. `max_sequences` of up to `max_tokens` tokens may live at once. ValueError names what is out of
    range; whether the daemon takes the layout is said by `Client.register()`.
    """

    model: str
    hidden_dim: int
    layers: int
    heads: int
    query_heads: int
    k_dim: int
    v_dim: int
    dtype: str
    max_sequences: int
    max_tokens: int

    def __post_init__(self) -> None:
        length = len(self.model.encode())
        if not 1 <= length <= _MODEL_BYTES:
            raise ValueError(f"model {self.model!r} has {length} bytes, outside 1 to {_MODEL_BYTES}")
        if "\0" in self.model:
            raise ValueError(f"model {self.model!r} has a NUL")
        choice("dtype", self.dtype, DTYPES)
        for name in ("hidden_dim", "layers", "heads", "query_heads", "k_dim", "v_dim", "max_sequences", "max_tokens"):
            whole(name, getattr(self, name), 1)

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of K or V."""
        return 4 if self.dtype == "f32" else 2

    def to_c(self) -> "_library.LayoutStruct":
        """The same as a struct kvg_layout."""
        dtype = DTYPES[self.dtype]
        layout = _library.LayoutStruct(
            model=self.model.encode(),
            hidden_dim=self.hidden_dim,
            group_count=1,
            max_sequences=self.max_sequences,
            max_tokens=self.max_tokens,
        )
        layout.groups[0] = _library.GroupStruct(
            kind=_GROUP_GLOBAL,
            layers=self.layers,
            head_count=self.heads,
            head_total=self.heads,
            world=1,
            k_dim=self.k_dim,
            v_dim=self.v_dim,
            k_dtype=dtype,
            v_dtype=dtype,
            block_tokens=_library.BLOCK_TOKENS,
            query_heads=self.query_heads,
        )
        assert ctypes.sizeof(layout) == _library.LAYOUT_BYTES
        return layout
