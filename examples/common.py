"""What the examples share: their options, loading a model's folder, text to tokens and back, errors in one line.

PyTorch and transformers take seconds to import. They are imported where they are needed, after the options are checked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvgate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIB = 1 << 20
BOS, END, QUERY, REPLY = 256, 257, 258, 259  # of models whose other tokens are bytes, as tests/data/pilot-lm
BYTE_VOCABULARY = 272


def parser(documentation: str) -> argparse.ArgumentParser:
    """The options that every example has."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="folder of a transformers model")
    parser.add_argument("--gate", type=Path, metavar="FILE", help="its gate (default: FOLDER/gate.safetensors)")
    parser.add_argument(
        "--socket", default=os.environ.get("KVGATE_SOCKET"), help="the tenant's (default: $KVGATE_SOCKET)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: where the daemon has its memory)")
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1, for options."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """The options with gate and device filled in. KvgateError: no daemon; ValueError: what does not fit."""
    if not (options.model / "config.json").is_file():
        raise ValueError(f"--model {options.model}: no config.json there")
    options.gate = options.gate or options.model / "gate.safetensors"
    if not options.gate.is_file():
        raise ValueError(f"--gate {options.gate}: no such file; tools/import-gate makes gates for kvgate")
    if not options.socket:
        raise ValueError("no socket: give --socket, or set KVGATE_SOCKET")
    with kvgate.Client(options.socket, "example") as client:
        options.device = options.device or ("cuda" if client.kind == "cuda" else "cpu")
        if options.device.startswith("cuda") != (client.kind == "cuda"):
            raise ValueError(f"--device {options.device}: the daemon's memory is of the kind {client.kind}")
    return options


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, Text]:
    """The model, ready to generate (bfloat16 on a GPU, float32 on a CPU), and what reads and writes its tokens."""
    import torch
    import transformers

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: PyTorch finds no GPU here")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, local_files_only=True)
    text = ByteText() if model.config.vocab_size == BYTE_VOCABULARY else TokenizerText(options.model)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = text.end[0]
    return model.to(options.device).eval(), text


class Text:
    """Text to tokens and back."""

    end: list[int]  # the tokens that end an answer

    def prompt(self, text: str) -> list[int]:
        """The tokens of a text from the start."""
        raise NotImplementedError

    def turn(self, line: str, before: list[int]) -> list[int]:
        """The tokens of the user's next line in a conversation that had the tokens `before`."""
        raise NotImplementedError

    def wants_answer(self, line: str) -> bool:
        """Whether the model speaks after that line."""
        return True

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens."""
        raise NotImplementedError


class ByteText(Text):
    """Bytes and four special tokens. A last line `? NAME` asks for the code of NAME; other lines are only read."""

    end = [END]  # noqa: RUF012

    def prompt(self, text: str) -> list[int]:
        head, newline, last = text.rstrip("\n").rpartition("\n")
        if not self.wants_answer(last):
            return [BOS, *text.encode()]
        return [BOS, *(head + newline).encode(), *self._question(last)]

    def turn(self, line: str, before: list[int]) -> list[int]:
        tokens = self._question(line) if self.wants_answer(line) else [*line.encode(), ord("\n")]
        return tokens if before else [BOS, *tokens]

    @staticmethod
    def _question(line: str) -> list[int]:
        return [QUERY, *line.removeprefix("?").strip().encode(), REPLY]

    def wants_answer(self, line: str) -> bool:
        return line.startswith("?")

    def decode(self, tokens: list[int]) -> str:
        return bytes(token for token in tokens if token < BOS).decode(errors="replace")


class TokenizerText(Text):
    """The tokenizer in the model's folder, with its chat template if it has one."""

    _ANSWER = "kvgate-answer"  # stands for the model's answer in a template

    def __init__(self, folder: Path) -> None:
        import transformers

        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"--model {folder}: its tokenizer has no end token (eos_token)")
        self.end = [self._tokenizer.eos_token_id]

    def prompt(self, text: str) -> list[int]:
        return self.turn(text, []) if self._tokenizer.chat_template else self._encode(text, True)

    def turn(self, line: str, before: list[int]) -> list[int]:
        if not self._tokenizer.chat_template:
            return self._encode(line + "\n", not before)
        user = {"role": "user", "content": line}
        if not before:
            return self._encode(self._render([user]), False)
        # What the template puts between an answer and the next one. Rendering the whole conversation again could change
        # tokens that are in the cache: templates leave out what the model thought, and text is split anew.
        earlier = [{"role": "user", "content": "-"}, {"role": "assistant", "content": self._ANSWER}]
        tokens = self._encode(self._render([*earlier, user]).rpartition(self._ANSWER)[2], False)
        ended = before[-1] in self.end and tokens[0] == before[-1]
        return tokens[1:] if ended else tokens

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _render(self, messages: list[dict[str, str]]) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _encode(self, text: str, start: bool) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=start)
        return tokens


def prompt_text(options: argparse.Namespace, number: int) -> str:
    """What --prompt-file has, or context `number` of the model folder's needles.jsonl with a question after it."""
    if options.prompt_file:
        return str(options.prompt_file.read_text())
    needles = options.model / "needles.jsonl"
    if not needles.is_file():
        raise ValueError("no prompt: give --prompt-file")
    contexts = [json.loads(line) for line in needles.read_text().splitlines()]
    context = contexts[number % len(contexts)]
    return f"{context['context']}\n? {context['queries'][0]['name']}"


def full_bytes(layout: kvgate.Layout, tokens: int) -> int:
    """Bytes of `tokens` tokens' K and V when nothing is evicted."""
    size = 4 if layout.dtype == "f32" else 2
    return tokens * layout.layers * layout.heads * (layout.k_dim + layout.v_dim) * size


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line and status 1 where the daemon refuses or an argument does not fit."""
    try:
        yield
    except (OSError, ValueError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def greedy(model: Any, tokens: list[int], cache: Any, **options: Any) -> list[int]:
    """model.generate() of one sequence, greedy, with its KV in `cache`: the tokens that it adds."""
    import torch

    ids = torch.tensor([tokens], device=model.device)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False, **options
    )
    added: list[int] = out[0, len(tokens) :].tolist()
    return added
