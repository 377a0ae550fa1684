"""A gate of Fast KVzip with random weights: its file for kvgate, and its scores in plain PyTorch for the rivals.

Written from the formulas of the paper (arXiv 2601.17668), as a framework computes them.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as functional

from engines.geometry import Geometry

WIDTH, SINKS, EPSILON = 16, 16, 1e-6


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Over the last dimension; fp32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON))


class Gate:
    """Weights of all layers on one device. The sinks of a head are alike, as they are in public gates."""

    def __init__(self, geometry: Geometry, device: str, seed: int = 2) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.geometry = geometry
        self.layers = [self._layer(generator, device) for _ in range(geometry.layers)]

    def _layer(self, generator: torch.Generator, device: str) -> dict[str, torch.Tensor]:
        heads, group, hidden = self.geometry.kv_heads, self.geometry.group, self.geometry.hidden

        def normal(shape: tuple[int, ...], deviation: float, dtype: torch.dtype) -> torch.Tensor:
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            return (values * deviation).to(dtype)

        half, wide = torch.bfloat16, torch.float32
        return {
            "q_proj.weight": normal((heads * group * WIDTH, hidden), hidden**-0.5, half),
            "q_proj.bias": normal((heads * group * WIDTH,), 0.5, half),
            "k_proj.weight": normal((heads * WIDTH, hidden), hidden**-0.5, half),
            "b": normal((heads, 1, group), 1.0, half),
            "q_norm.weight": 1 + normal((WIDTH,), 0.1, wide),
            "k_norm.weight": 1 + normal((WIDTH,), 0.1, wide),
            "k_base": normal((heads, 1, 1, WIDTH), 1.0, wide).repeat(1, 1, SINKS, 1),
        }

    def write(self, path: Path) -> None:
        """The file that kvgate loads."""
        from safetensors.torch import save_file

        tensors = {
            f"layers.{number}.{name}": tensor.cpu().contiguous()
            for number, layer in enumerate(self.layers)
            for name, tensor in layer.items()
        }
        save_file(tensors, str(path))

    def scores(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 [B, H, T] of hidden states [B, T, D]."""
        heads, group = self.geometry.kv_heads, self.geometry.group
        gate = self.layers[layer]
        rows = hidden.to(torch.bfloat16)
        q = functional.linear(rows, gate["q_proj.weight"], gate["q_proj.bias"]).unflatten(-1, (heads, group, WIDTH))
        k = functional.linear(rows, gate["k_proj.weight"]).unflatten(-1, (heads, WIDTH))
        q, k = _rms_norm(q, gate["q_norm.weight"]), _rms_norm(k, gate["k_norm.weight"])
        scale = 1 / math.sqrt(WIDTH)
        z = (q * k.unsqueeze(-2)).sum(-1) * scale + gate["b"].squeeze(1).float()
        sinks = torch.einsum("...hgd,hsd->...hgs", q, gate["k_base"].squeeze(1)) * scale
        share = 1 / (1 + torch.exp(sinks - z.unsqueeze(-1)).sum(-1))
        return share.mean(-1).transpose(-1, -2)
