"""The programs in examples/ and README.md's Python, run as a user runs them, against a real daemon."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import StartDaemon
from daemon import ROOT, Daemon, config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models import write_gate  # noqa: E402

PILOT = ROOT / "tests" / "data" / "pilot-lm"
PILOT_ROWS, PILOT_BLOCK = 24, 16 * (32 + 32) * 4  # layers x KV heads; bytes of 16 tokens of a head in float32
SECONDS = 180
NEEDLES = [json.loads(line) for line in (PILOT / "needles.jsonl").read_text().splitlines()]
FIGURES = re.compile(r"\[(\d+) tokens, KV (\d+) bytes; without eviction (\d+)\]")
LINE = re.compile(r"ratio (\S+): (\d+) \+ (\d+) tokens in \S+ s, KV (\S+) MiB held of (\S+) MiB: '(.*)'")


def start(program: str, *words: object, model: Path = PILOT) -> subprocess.Popen[str]:
    """Starts an example with a model, on the CPU."""
    command = [sys.executable, ROOT / "examples" / program, "--model", model, *words]
    return spawn([str(word) for word in command])


def spawn(command: list[str]) -> subprocess.Popen[str]:
    """Starts a program that imports the package under test."""
    found = importlib.util.find_spec("kvgate")
    assert found is not None
    assert found.origin is not None
    environment = {**os.environ, "PYTHONPATH": str(Path(found.origin).parents[1]), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], lines: str = "", status: int = 0) -> tuple[str, str]:
    """What it prints when it reads `lines`: standard output and standard error."""
    try:
        out, err = process.communicate(lines, timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out, err


def all_back(daemon: Daemon, tenant: str = "a") -> None:
    """No worker, no byte, and the books are right."""
    assert daemon.gone(tenant)
    assert daemon.ctl("audit")["clean"]


def test_generate_finds_the_needle_with_less_kv(daemon: Daemon) -> None:
    query = NEEDLES[0]["queries"][0]
    out, _ = finish(start("generate.py", "--socket", daemon.socket(), "--ratio", "1.0", "0.3"))
    rows = [LINE.fullmatch(line) for line in out.splitlines()]
    assert [row and row[1] for row in rows] == ["1.0", "0.3"], out
    whole, kept = (float(row[4]) for row in rows if row)
    full = float(rows[0][5]) if rows[0] else 0.0
    assert [row[6] for row in rows if row] == [query["code"]] * 2
    spare = 256 * PILOT_ROWS * PILOT_BLOCK / 16 / (1 << 20)  # room for tokens to come, and blocks that are not full
    assert full <= whole <= full + spare
    assert 0.3 * full <= kept <= 0.3 * full + spare
    all_back(daemon)


def test_generate_reads_a_prompt_file(daemon: Daemon, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt"
    prompt.write_text("Notes.\nThe code for KIVA is 48213.\nThe code for MORU is 70952.\n? KIVA\n")
    out, _ = finish(start("generate.py", "--socket", daemon.socket(), "--prompt-file", prompt, "--ratio", "1.0"))
    assert LINE.fullmatch(out.strip())[6] == "48213"  # type: ignore[index]


def test_chat_stays_within_its_budget(start_daemon: StartDaemon) -> None:
    budget = 256
    # The whole conversation would need more than 18 MiB.
    daemon = start_daemon(config(a="device.max = 5M"))
    lines = NEEDLES[0]["context"].splitlines()
    queries = NEEDLES[0]["queries"]
    talk = "".join(line + "\n" for line in lines) + "".join(f"? {query['name']}\n" for query in queries)
    out, err = finish(start("chat.py", "--socket", daemon.socket(), "--budget", budget), talk)

    answers = out.splitlines()
    assert len(answers) == len(queries)
    right = sum(answer == query["code"] for answer, query in zip(answers, queries, strict=True))
    assert right >= len(queries) - 2, f"{answers}, expected {queries}"

    turns = [tuple(map(int, match)) for match in FIGURES.findall(err)]
    assert len(turns) == sum(bool(line.strip()) for line in lines) + len(queries)
    # Per head: the budget, 128 tokens since the last eviction and 128 reserved, a block that is not full.
    limit = (budget // 16 + 256 // 16 + 1) * PILOT_ROWS * PILOT_BLOCK
    assert max(held for _, held, _ in turns) <= limit
    tokens, held, full = turns[-1]
    assert tokens > 3000
    assert full == tokens * PILOT_ROWS * PILOT_BLOCK // 16
    assert held < 0.2 * full
    figures = daemon.tenant()
    assert figures["refusals"] == 0
    assert 0 < figures["high_water"] <= 5 << 20
    all_back(daemon)


def chat_model(folder: Path) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """A small random model with a tokenizer of whole words and a chat template, saved to a folder with a gate."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<turn>", "<end>", "<unk>", *(f"w{i}" for i in range(92))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    turn = "{% for m in messages %}<turn> {{ m.content }} <end> {% endfor %}"
    tokenizer.chat_template = turn + "{% if add_generation_prompt %}<turn>{% endif %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(19)
    shape = transformers.Qwen3Config(
        vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, pad_token_id=0, bos_token_id=None,
        eos_token_id=2,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    write_gate(model, str(folder / "gate.safetensors"))
    return model, tokenizer


def test_chat_says_what_the_model_says_without_kvgate(daemon: Daemon, tmp_path: Path) -> None:
    """With a tokenizer, and a budget that is never reached: turn by turn the same text."""
    model, tokenizer = chat_model(tmp_path)
    lines = ["w1 w2 w3 w5 w8", "w13 w21", "w34 " * 150, "w55 w89 w2"]
    words = ["--socket", daemon.socket(), "--budget", "1500", "--max-new-tokens", "24"]
    out, err = finish(start("chat.py", *words, model=tmp_path), "".join(line + "\n" for line in lines))

    tokens: list[int] = []
    expected, lengths = [], []
    for line in lines:
        said_end = bool(tokens) and tokens[-1] == 2
        text = f"<turn> {line} <end> <turn>" if not tokens or said_end else f"<end> <turn> {line} <end> <turn>"
        tokens += tokenizer.encode(text, add_special_tokens=False)
        ids = torch.tensor([tokens])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[0].tolist()
        expected.append(tokenizer.decode(whole[len(tokens) :], skip_special_tokens=True))
        tokens = whole
        lengths.append(len(tokens))
    assert len(set(expected)) == len(lines), "the turns' texts are alike"
    assert out.splitlines() == expected
    assert [int(turn[0]) for turn in FIGURES.findall(err)] == lengths
    all_back(daemon)


def test_workers_go_on_when_one_is_killed(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config("128M"))
    out, _ = finish(
        start("workers.py", "--socket", daemon.socket(), "--workers", 3, "--kill", 1, "--max-new-tokens", 48)
    )
    rows = [line.partition(": ")[2] for line in out.splitlines()]
    killed = re.fullmatch(r"killed after (\d+) tokens", rows[1])
    assert killed, out
    assert 24 <= int(killed[1]) < 48
    for number in (0, 2):
        code = NEEDLES[number]["queries"][0]["code"]
        assert re.fullmatch(rf"\d+ \+ 48 tokens in \S+ s, KV \S+ MiB held: '{code}.*'", rows[number]), out
    all_back(daemon)


def test_errors_are_one_line_that_says_what_to_do(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(config(a="device.max = 1M"))
    here, missing = daemon.socket(), tmp_path / "none.sock"
    not_running = f"no kvgated at {missing}: start it with `kvgated --config FILE`"
    refused = "tenant a: device budget 1.0 MiB, in use 0 B, promised 0 B, the sequence needs "
    cases = [
        (start("generate.py", "--socket", missing), 1, f"generate.py: {not_running}"),
        (start("chat.py", "--socket", missing), 1, f"chat.py: {not_running}"),
        (start("workers.py", "--socket", missing), 1, f"workers.py: {not_running}"),
        (start("generate.py", "--socket", here), 1, f"generate.py: {refused}"),
        (start("chat.py", "--socket", here), 1, f"chat.py: {refused}"),
        (start("chat.py", "--socket", here, "--gate", missing), 1, f"chat.py: --gate {missing}: no such file"),
        (start("chat.py", "--socket", here, model=tmp_path), 1, f"chat.py: --model {tmp_path}: no config.json"),
        (start("chat.py", "--socket", here, "--budget", 132), 2, "chat.py: error: --budget 132: must be more"),
        (start("chat.py", "--socket", here, "--device", "cuda:9"), 1, "chat.py: --device cuda:9: the daemon's memory"),
        (
            start("workers.py", "--socket", here, "--kill", 4),
            2,
            "workers.py: error: --kill 4: there are workers 0",
        ),
    ]
    for process, status, message in cases:
        out, err = finish(process, "hello\n", status)
        last = err.splitlines()[-1]
        assert last.startswith(message), err
        assert "Traceback" not in err
        assert out == ""
    all_back(daemon)


def test_chat_ends_where_the_model_has_no_more_positions(daemon: Daemon) -> None:
    words = ["--socket", daemon.socket(), "--budget", "256", "--max-tokens", "200"]
    _, err = finish(start("chat.py", *words), ("word " * 19 + "end\n") * 3, 1)
    assert [int(turn[0]) for turn in FIGURES.findall(err)] == [100, 199]
    assert err.splitlines()[-1] == "chat.py: the conversation has 199 tokens and its next turn 99: --max-tokens is 200"
    all_back(daemon)


def test_the_readme_s_python_runs(daemon: Daemon, tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().partition("## From Python\n")[2].partition("\n## ")[0]
    [snippet] = re.findall(r"```python\n(.*?)```", section, re.S)
    assert snippet.count('"/run/kvgate/chat.sock"') == 1
    script = tmp_path / "snippet.py"
    script.write_text(snippet.replace('"/run/kvgate/chat.sock"', repr(daemon.socket())))
    out, _ = finish(spawn([sys.executable, str(script)]))
    assert out == NEEDLES[0]["queries"][0]["code"] + "\n"
    assert daemon.tenant()["high_water"] > 0, "its KV was in the daemon"
    all_back(daemon)
