"""What kvgate has to know of a model: which layers keep KV in which layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from kvgate import Layout

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
_BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Geometry:
    """Shapes of a decoder's attention. Layers are the model's numbers, in order."""

    model: str
    hidden: int
    heads: int
    group: int
    head_dim: int
    dtype: str
    global_layers: tuple[int, ...]
    window_layers: tuple[int, ...]
    window: int

    def layout(self, layers: int, max_sequences: int, max_tokens: int) -> Layout:
        """A layout of `layers` layers of this model for sequences of max_tokens."""
        return Layout(
            model=self.model[:127],
            hidden_dim=self.hidden,
            layers=layers,
            heads=self.heads,
            query_heads=self.group,
            k_dim=self.head_dim,
            v_dim=self.head_dim,
            dtype=self.dtype,
            max_sequences=max_sequences,
            max_tokens=-(-max_tokens // _BLOCK_TOKENS) * _BLOCK_TOKENS,
        )


def _layer_types(config: Any) -> list[str]:
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["full_attention"] * config.num_hidden_layers
    for number, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"layer {number} of {config.model_type} is of type {kind}: kvgate keeps the KV of "
                "full_attention and sliding_attention layers"
            )
    return list(types)


def geometry_of(model: Any) -> Geometry:
    """The geometry of a transformers decoder. ValueError names what kvgate has no kernel for."""
    config = model.config.get_text_config(decoder=True)
    types = _layer_types(config)
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError(
            f"{config.model_type}: attn_logit_softcapping {config.attn_logit_softcapping} is not supported"
        )
    dtype = next(model.parameters()).dtype
    if dtype not in _DTYPES:
        raise ValueError(f"{config.model_type}: weights of {dtype}; KV is bfloat16, float16 or float32")
    heads = config.num_key_value_heads
    if "full_attention" not in types:
        raise ValueError(f"{config.model_type}: no layer has full attention, and only such layers can be evicted from")
    window_layers = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    return Geometry(
        model=f"{config.model_type}/{config.num_hidden_layers}x{config.hidden_size}",
        hidden=config.hidden_size,
        heads=heads,
        group=config.num_attention_heads // heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        dtype=_DTYPES[dtype],
        global_layers=tuple(i for i, kind in enumerate(types) if kind == "full_attention"),
        window_layers=window_layers,
        window=config.sliding_window if window_layers else 0,
    )


def check_gate(gate: str, shape: Geometry) -> None:
    """ValueError when a gate file says that it was made for another model. One that says nothing passes."""
    with safe_open(gate, framework="pt") as file:
        said = file.metadata() or {}
    own = {
        "model_type": shape.model.partition("/")[0],
        "hidden_size": str(shape.hidden),
        "model_layers": json.dumps(shape.global_layers),
    }
    for key, value in own.items():
        if key in said and said[key].replace(" ", "") != value.replace(" ", ""):
            raise ValueError(f"{gate}: its {key} is {said[key]}, the model's is {value}")


def attention_modules(model: torch.nn.Module, layers: int) -> list[torch.nn.Module]:
    """The model's attention modules in the order of their layers."""
    modules: list[Any] = list(model.modules())
    found = {int(m.layer_idx): m for m in modules if hasattr(m, "layer_idx") and hasattr(m, "o_proj")}
    if sorted(found) != list(range(layers)):
        raise ValueError(
            f"{type(model).__name__}: attention modules of layers {sorted(found)}, expected 0 to {layers - 1}"
        )
    return [found[i] for i in range(layers)]
