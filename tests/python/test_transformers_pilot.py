"""The pilot model with its gate: transformers on kvgate answers as kvgate-lm does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import kvgate.transformers
from daemon import ROOT, Daemon, config, programs

PILOT = ROOT / "tests" / "data" / "pilot-lm"
GATE = PILOT / "gate.safetensors"
BOS, QUERY, REPLY = 256, 258, 259
LONGEST = 8  # tokens of a code, its end included
CONTEXTS = 3

Needle = dict[str, Any]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(PILOT, dtype=torch.float32).eval()
    return loaded


def needles() -> list[Needle]:
    with (PILOT / "needles.jsonl").open(encoding="latin-1") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(CONTEXTS), strict=False)]


def reference(daemon: Daemon, folder: Path, contexts: list[Needle], *options: str) -> dict[str, Any]:
    """What kvgate-lm says of these contexts."""
    path = folder / "needles.jsonl"
    path.write_text("".join(json.dumps(context) + "\n" for context in contexts))
    command = [
        programs() / "kvgate-lm",
        "--socket",
        daemon.socket(),
        "--model",
        PILOT,
        "--gate",
        GATE,
        "--needles",
        path,
    ]
    command += ["--kv-dtype", "f32", "--threads", "1", "--json", *options]
    said: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=100).stdout)
    return said


@torch.no_grad()
def answers(
    model: PreTrainedModel, kv: kvgate.transformers.Attachment, ratio: float, needle: Needle
) -> tuple[list[bool], int]:
    """Which queries are answered right, each from what the context alone left, and the bytes of pairs that it left."""
    context = torch.tensor([[BOS, *needle["context"].encode("latin-1")]])
    right = []
    with kv.cache(context, ratio=ratio, prefix_tokens=1, max_new_tokens=64) as cache:
        model(context, past_key_values=cache, logits_to_keep=1)
        pairs = cache.info()[0].pairs
        for query in needle["queries"]:
            ids = torch.tensor([[QUERY, *query["name"].encode(), REPLY]])
            said = []
            while len(said) < LONGEST and (not said or said[-1] < 256):
                ids = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
                said.append(int(ids))
            right.append(bytes(t for t in said if t < 256).startswith(query["code"].encode()))
            cache.crop(context.shape[1] - cache.get_seq_length())
    return right, 2 * 32 * 4 * pairs


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_answers_are_those_of_kvgate_lm(
    model: PreTrainedModel, start_daemon: Any, tmp_path: Path, ratio: float
) -> None:
    daemon = start_daemon(config(size="128M"))
    found = []
    with kvgate.transformers.attach(model, daemon.socket(), gate=GATE, max_sequences=1) as kv:
        for needle in needles():
            right, held = answers(model, kv, ratio, needle)
            found.append(right)
            said = reference(daemon, tmp_path, [needle], "--ratio", str(ratio))
            assert (sum(right), len(right)) == (said["correct"], said["queries"])
            # Sums in another order move a score by its last bits, and a pair or two over the threshold.
            assert abs(held - said["kv_bytes_held"]) <= 4 * 2 * 32 * 4
    single = [{**needles()[0], "queries": [query]} for query in needles()[0]["queries"]] if ratio < 1 else []
    for needle, right in zip(single, found[0], strict=False):
        assert reference(daemon, tmp_path, [needle], "--ratio", str(ratio))["correct"] == right, needle["queries"]
    assert sum(map(sum, found)) >= (24 if ratio == 1.0 else 22)


def test_a_long_generation_within_a_budget_is_that_of_kvgate_lm(
    model: PreTrainedModel, start_daemon: Any, tmp_path: Path
) -> None:
    """The same hidden states of the prompt's chunks and of decoded tokens, at the same positions and events."""
    daemon, new, context = start_daemon(config(size="128M")), 150, needles()[1]
    options = ("--generate", str(new), "--ratio", "0.6", "--chunk", "1000", "--window", "50", "--decode-budget", "700")
    (said,) = reference(daemon, tmp_path, [context], *options)["generations"]
    ids = torch.tensor([[BOS, *context["context"].encode("latin-1")]])
    policy: dict[str, Any] = {"ratio": 0.6, "chunk": 1000, "window": 50, "budget": 700}
    held: dict[int, int] = {}
    kv = kvgate.transformers.attach(model, daemon.socket(), gate=GATE, max_sequences=1)
    with kv, kv.cache(ids, prefix_tokens=1, max_new_tokens=new, **policy) as cache:

        def look(*_: Any) -> bool:
            held[cache.columns] = cache.info()[0].pairs
            return False

        found = model.generate(
            input_ids=ids,
            past_key_values=cache,
            max_new_tokens=new,
            prefill_chunk_size=1000,
            do_sample=False,
            stopping_criteria=[look],
        )
    assert found[0, ids.shape[1] :].tolist() == said["tokens"]
    assert [event["tokens"] for event in said["events"]] == [3000, 3073]
    for event in said["events"]:
        assert abs(held[event["tokens"]] - event["pairs"]) <= 2, event
