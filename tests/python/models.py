"""Small random models of each family that the tests run, made here: nothing is downloaded."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = ("qwen2", "qwen3", "llama", "gemma3")
VOCABULARY = 97
WINDOW = 24  # of gemma3's sliding layers

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def make_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of random weights, large enough that greedy decoding does not settle on one token at once."""
    torch.manual_seed(FAMILIES.index(family) + 7)
    model: PreTrainedModel
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**_SHAPE))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=16))
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**_SHAPE))
    else:
        types = ["sliding_attention", "full_attention"] * 2
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(
                **_SHAPE,
                head_dim=32,
                layer_types=types,
                sliding_window=WINDOW,
                query_pre_attn_scalar=32,
                tie_word_embeddings=False,  # tied ones repeat the last token for ever
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.to(dtype).eval()


def gated_layers(model: PreTrainedModel) -> int:
    """How many layers have full attention."""
    return list(model.config.layer_types).count("full_attention") if hasattr(model.config, "layer_types") else 4


def write_gate(model: PreTrainedModel, path: str) -> None:
    """A gate of random weights for the model's layers with full attention."""
    config, tensors = model.config, {}
    heads, dim, sinks = config.num_key_value_heads, 16, 4
    group = config.num_attention_heads // heads
    generator = torch.Generator().manual_seed(11)
    for layer in range(gated_layers(model)):
        name = f"layers.{layer}."
        tensors[name + "q_proj.weight"] = torch.randn(
            heads * group * dim, config.hidden_size, generator=generator
        ).bfloat16()
        tensors[name + "q_proj.bias"] = torch.randn(heads * group * dim, generator=generator).bfloat16()
        tensors[name + "k_proj.weight"] = torch.randn(heads * dim, config.hidden_size, generator=generator).bfloat16()
        tensors[name + "b"] = torch.randn(heads, 1, group, generator=generator).bfloat16()
        tensors[name + "q_norm.weight"] = torch.ones(dim)
        tensors[name + "k_norm.weight"] = torch.ones(dim)
        tensors[name + "k_base"] = torch.randn(heads, 1, sinks, dim, generator=generator)
    save_file(
        tensors, path, metadata={"format": "fast-kvzip-gate", "dim": "16", "sink": str(sinks), "groups": str(group)}
    )


def prompts(lengths: list[int], seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts of these lengths, padded on the left: token ids and attention mask, [B][longest]."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(2, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    return ids * mask, mask
