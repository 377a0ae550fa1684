"""transformers on the cuda kind: tokens and logits against its own attention. Skipped without a GPU."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import kvgate.transformers
from conftest import StartDaemon
from daemon import Daemon, config
from models import FAMILIES, make_model, prompts, write_gate

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

TOKENS, STEPS, CHUNK = 700, 48, 300
GREEDY = {"max_new_tokens": 40, "do_sample": False}


@pytest.fixture
def gpu_daemon(start_daemon: StartDaemon) -> Daemon:
    """A daemon of the cuda kind."""
    return start_daemon(config(size="2G", extent="2M", kind="cuda"))


def wide_model() -> PreTrainedModel:
    """Heads and groups of a real model (8 query heads for 2 KV heads of 128), few layers, usual initialisation."""
    torch.manual_seed(5)
    shape = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 4096}
    return Qwen3ForCausalLM(Qwen3Config(**shape, **heads)).eval().to("cuda", torch.bfloat16)


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: torch.Tensor, cache: object) -> torch.Tensor:
    """Logits of given tokens [B][TOKENS], the last STEPS of them fed one by one, the others in chunks."""
    parts, begin = [], 0
    while begin < TOKENS:
        width = min(CHUNK, TOKENS - STEPS - begin) if begin < TOKENS - STEPS else 1
        step = tokens[:, begin : begin + width]
        parts.append(model(input_ids=step, past_key_values=cache, use_cache=True).logits.double())
        begin += width
    return torch.cat(parts, 1)


def test_logits_lie_within_the_spread_of_transformers_own(gpu_daemon: Daemon) -> None:
    """In bf16 each implementation rounds in its own way: ours is no farther from float32 than theirs are."""
    model = wide_model()
    tokens = torch.randint(0, 512, (3, TOKENS), generator=torch.Generator().manual_seed(9)).cuda()
    with (
        kvgate.transformers.attach(model, gpu_daemon.socket(), max_tokens=1024) as kv,
        kv.cache([TOKENS - STEPS] * 3, max_new_tokens=STEPS) as cache,
    ):
        ours = logits_of(model, tokens, cache)
        assert all(sequence.query().committed_pos > 0 for sequence in cache.sequences)
    theirs = []
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        theirs.append(logits_of(model, tokens, DynamicCache()))
    exact = logits_of(model.float(), tokens, DynamicCache())
    errors = [(logits - exact).square().mean().sqrt().item() for logits in (ours, *theirs)]
    worst = [(logits - exact).abs().max().item() for logits in (ours, *theirs)]
    between = [(ours - other).square().mean().sqrt().item() for other in theirs]
    spread = (theirs[0] - theirs[1]).square().mean().sqrt().item()
    print(
        f"rms to float32: ours {errors[0]:.5f}, eager {errors[1]:.5f}, sdpa {errors[2]:.5f}; largest {worst}; "
        f"eager to sdpa {spread:.5f}, ours to them {between}"
    )
    assert 0 < errors[0] <= 1.05 * max(errors[1:])
    assert worst[0] <= 1.5 * max(worst[1:])
    assert min(between) <= 1.1 * spread


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["hidden", "preact"])
def test_tokens_are_transformers_own(gpu_daemon: Daemon, tmp_path: Path, family: str, stage: str) -> None:
    """Greedy decoding in float32 of a ragged batch, whole and in chunks."""
    model = make_model(family).cuda()
    ids, mask = (tensor.cuda() for tensor in prompts([70, 33, 50]))
    own = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    write_gate(model.cpu(), str(tmp_path / "gate.safetensors"))
    model.cuda()
    gate = tmp_path / "gate.safetensors"
    with kvgate.transformers.attach(model, gpu_daemon.socket(), gate=gate, max_tokens=1024, stage=stage) as kv:
        for chunk in (16000, 20):
            assert torch.equal(kv.generate(ids, mask, chunk=chunk, **GREEDY), own)
        with kv.cache(mask, ratio=0.3, chunk=20, window=4, budget=140, max_new_tokens=300) as cache:
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                prefill_chunk_size=20,
                max_new_tokens=300,
                do_sample=False,
            )
            layers = list(getattr(model.config, "layer_types", ["full_attention"] * 4)).count("full_attention")
            heads = model.config.num_key_value_heads
            held = [info.pairs / (layers * heads) for info in cache.info()]
            assert all(139 <= pairs <= 140 + 128 for pairs in held), held
