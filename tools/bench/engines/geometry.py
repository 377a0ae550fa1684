"""The models that are measured: their shapes, and random weights for them, made where they are used."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Geometry:
    """Shape of a decoder of the Qwen3 family. dtype is that of weights and KV."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    dtype: torch.dtype

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.query_heads // self.kv_heads

    @property
    def token_bytes(self) -> int:
        """K and V of one token, over all layers and heads."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


QWEN3_8B = Geometry("Qwen3-8B", 36, 4096, 12288, 32, 8, 128, 151936, torch.bfloat16)
TINY = Geometry("tiny", 4, 128, 256, 8, 2, 32, 512, torch.float32)


def with_layers(geometry: Geometry, layers: int) -> Geometry:
    """The same with fewer layers; 0: as it is."""
    if not layers or layers == geometry.layers:
        return geometry
    return replace(geometry, name=f"{geometry.name}, {layers} layers", layers=layers)


def make_model(geometry: Geometry, device: str, max_tokens: int, seed: int = 1) -> Any:
    """A Qwen3ForCausalLM with random weights, initialised on `device`, for inference."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=geometry.vocabulary,
        hidden_size=geometry.hidden,
        intermediate_size=geometry.intermediate,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.query_heads,
        num_key_value_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        max_position_embeddings=max_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(geometry.dtype)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)
