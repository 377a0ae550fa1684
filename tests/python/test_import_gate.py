"""tools/import-gate: public gate checkpoints become gate files, bit for bit, or are refused by name."""

import json
import os
import pickle
import resource
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import kvgate
from daemon import ROOT, Daemon, config, programs

TOOL = ROOT / "tools" / "import-gate"
PILOT = ROOT / "tests" / "data" / "pilot-lm"
WIDTH, SINKS = 16, 16

Layers = list[dict[str, Any] | None]


def load_tool() -> types.ModuleType:
    """The script as a module, so that most tests need no process of their own."""
    loader = SourceFileLoader("import_gate", str(TOOL))
    spec = spec_from_loader("import_gate", loader)
    assert spec
    module = module_from_spec(spec)
    sys.modules["import_gate"] = module
    loader.exec_module(module)
    return module


tool = load_tool()


def run_tool(*words: object) -> int:
    """The exit status of the tool in this process."""
    status = tool.main([str(word) for word in words])
    assert isinstance(status, int)
    return status


def run_script(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The tool as a user starts it, with the interpreter of the tests."""
    command = [sys.executable, str(TOOL), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def random_layer(heads: int, group: int, hidden: int, seed: int, sinks: int = SINKS) -> dict[str, Any]:
    """A layer as the public trainer saves it: an OrderedDict, projections and b in bf16, the rest in fp32."""
    make = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make)

    return OrderedDict(
        {
            "k_base": values(heads, 1, sinks, WIDTH),
            "b": values(heads, 1, group).bfloat16(),
            "q_proj.weight": values(heads * group * WIDTH, hidden).bfloat16(),
            "q_proj.bias": values(heads * group * WIDTH).bfloat16(),
            "k_proj.weight": values(heads * WIDTH, hidden).bfloat16(),
            "q_norm.weight": values(WIDTH),
            "k_norm.weight": values(WIDTH),
        }
    )


def save(path: Path, layers: object, **more: object) -> Path:
    """A checkpoint as the public trainer saves it, with the losses of the training as NumPy arrays."""
    losses = np.linspace(0, 1, 12).reshape(3, 4)
    torch.save({"module": layers, "loss": losses, "acc_train": losses.astype(np.float32), **more}, path)
    return path


def split(gate: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The layers of a gate file."""
    count = 1 + max(int(name.split(".")[1]) for name in gate)
    layers: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for name, tensor in gate.items():
        _, number, key = name.split(".", 2)
        layers[int(number)][key] = tensor
    return layers


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether names, shapes, dtypes and bytes are equal."""
    return found.keys() == expected.keys() and all(
        found[name].shape == tensor.shape and found[name].dtype == tensor.dtype and bits(found[name]) == bits(tensor)
        for name, tensor in expected.items()
    )


def metadata(path: Path) -> dict[str, str]:
    """What a gate file says about itself."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.fixture
def pilot(tmp_path: Path) -> Path:
    """The pilot model's gate as a public checkpoint."""
    return save(tmp_path / "pilot.pt", split(load_file(PILOT / "gate.safetensors")))


@pytest.fixture
def daemon(start_daemon: Callable[[str], Daemon]) -> Daemon:
    """A daemon with room for the pilot model's contexts."""
    return start_daemon(config("64M"))


# ---- what is written ----


def test_the_pilot_gate_comes_back_bit_for_bit(pilot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gate.safetensors"
    assert run_tool(pilot, PILOT, out) == 0
    assert same(load_file(out), load_file(PILOT / "gate.safetensors"))
    assert metadata(out) == {
        "format": "fast-kvzip-gate",
        "model_layers": "[0, 1, 2, 3, 4, 5]",
        "model_type": "qwen3",
        "hidden_size": "256",
        "kv_heads": "4",
        "query_heads": "2",
        "dim": "16",
        "sink": "16",
        "double_b": "false",
        "source": subprocess.check_output(["sha256sum", pilot], text=True).split()[0],
    }
    printed = capsys.readouterr().out
    assert f"{out}: 6 layers, 4 KV heads of 2 query heads, 16 sinks\n" in printed
    assert f"left out of {pilot}: 'acc_train', 'loss'\n" in printed


def test_the_same_checkpoint_gives_the_same_file(pilot: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for file in files:
        assert run_tool(pilot, PILOT / "config.json", file) == 0
    assert len({file.read_bytes() for file in files}) == 1


def test_the_public_loading_needs_the_numpy_stand_ins(pilot: Path) -> None:
    """Why there are any: torch's own safe loading refuses the public trainer's files."""
    with pytest.raises(pickle.UnpicklingError, match="numpy"):
        torch.load(pilot, weights_only=True)


def test_files_saved_with_numpy_1_are_read(pilot: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.pt"
    with zipfile.ZipFile(pilot) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(name, content)
    out = tmp_path / "gate.safetensors"
    assert run_tool(old, PILOT, out) == 0
    assert same(load_file(out), load_file(PILOT / "gate.safetensors"))


def test_double_b_doubles_b_and_nothing_else(pilot: Path, tmp_path: Path) -> None:
    out = tmp_path / "gate.safetensors"
    assert run_tool(pilot, PILOT, out, "--double-b") == 0
    expected = load_file(PILOT / "gate.safetensors")
    for name in expected:
        if name.endswith(".b"):
            half = load_file(out)[name].double() / 2
            assert torch.equal(half, expected[name].double())
            assert expected[name].dtype == torch.bfloat16
            expected[name] = expected[name] * 2
    assert same(load_file(out), expected)
    assert metadata(out)["double_b"] == "true"


# ---- the families of models ----

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 14, "num_key_value_heads": 2}
GEMMA = {"hidden_size": 64, "num_hidden_layers": 13, "num_attention_heads": 4, "num_key_value_heads": 2}


def families() -> dict[str, PreTrainedConfig]:
    """A small model of each family."""
    return {
        "qwen2": Qwen2Config(**SMALL),
        "qwen2-windows": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=32, max_window_layers=2),
        "qwen3": Qwen3Config(**(SMALL | {"num_attention_heads": 10}), head_dim=16),
        "llama": LlamaConfig(**(SMALL | {"num_attention_heads": 8})),
        "gemma3": Gemma3Config(text_config=GEMMA),
        "gemma3_text": Gemma3TextConfig(**GEMMA),
    }


def text_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that describes the language model."""
    return config.text_config if isinstance(config, Gemma3Config) else config


def global_layers(config: PreTrainedConfig) -> list[int]:
    """Numbers of the layers with global attention, as transformers sees it."""
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [i for i, name in enumerate(types) if name == "full_attention"]


def layers_for(config: PreTrainedConfig, every_layer: bool) -> Layers:
    """Random gates of the global layers; every_layer: one entry for each layer, None for the others."""
    group = config.num_attention_heads // config.num_key_value_heads
    numbers = global_layers(config)
    gates = {i: random_layer(config.num_key_value_heads, group, config.hidden_size, i) for i in numbers}
    return [gates.get(i) for i in (range(config.num_hidden_layers) if every_layer else numbers)]


def layout_for(config: PreTrainedConfig, layers: int, heads: int) -> kvgate.Layout:
    """What a worker registers for the model's gated layers."""
    return kvgate.Layout(
        model="test",
        hidden_dim=config.hidden_size,
        layers=layers,
        heads=heads,
        query_heads=config.num_attention_heads // config.num_key_value_heads,
        k_dim=32,
        v_dim=32,
        dtype="bf16",
        max_sequences=2,
        max_tokens=1024,
    )


@pytest.mark.parametrize("every_layer", [False, True])
@pytest.mark.parametrize("family", families())
def test_each_family_is_converted_and_loaded(family: str, every_layer: bool, tmp_path: Path, daemon: Daemon) -> None:
    config = families()[family]
    config.save_pretrained(tmp_path)
    text = text_of(config)
    numbers = global_layers(text)
    layers = layers_for(text, every_layer)
    out = tmp_path / "gate.safetensors"
    assert run_tool(save(tmp_path / "gate.pt", layers), tmp_path, out) == 0
    gates = [layer for layer in layers if layer]
    assert same(load_file(out), {f"layers.{i}.{k}": v for i, gate in enumerate(gates) for k, v in gate.items()})
    assert json.loads(metadata(out)["model_layers"]) == numbers
    assert metadata(out)["model_type"] == text.model_type
    with kvgate.Client(daemon.socket("a")) as client:
        client.register(layout_for(text, len(numbers), text.num_key_value_heads), 1 << 20)
        client.load_gate(out)


def test_the_daemon_checks_the_gate_that_it_loads(pilot: Path, tmp_path: Path, daemon: Daemon) -> None:
    """The tests above could not fail if it took anything."""
    config = Qwen3Config(**json.loads((PILOT / "config.json").read_text()))
    out = tmp_path / "gate.safetensors"
    assert run_tool(pilot, PILOT, out) == 0
    with kvgate.Client(daemon.socket("a")) as client:
        client.register(layout_for(config, 6, 8), 1 << 20)
        with pytest.raises(kvgate.KvgateError, match="4 KV heads"):
            client.load_gate(out)


PUBLIC = {  # config.json of the models that public gates exist for, as far as it matters here
    "Qwen2.5-7B-Instruct-1M": (
        {"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28}
        | {"num_key_value_heads": 4, "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28},
        (4, 7, range(28)),
    ),
    "Qwen2.5-14B-Instruct-1M": (
        {"model_type": "qwen2", "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40}
        | {"num_key_value_heads": 8, "use_sliding_window": False},
        (8, 5, range(48)),
    ),
    "Qwen3-4B-Instruct-2507": (
        {"model_type": "qwen3", "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "sliding_window": None, "use_sliding_window": False},
        (8, 4, range(36)),
    ),
    "Qwen3-14B": (
        {"model_type": "qwen3", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40}
        | {"num_key_value_heads": 8},
        (8, 5, range(40)),
    ),
    "gemma-3-12b-it": (
        {
            "model_type": "gemma3",
            "text_config": {"model_type": "gemma3_text", "hidden_size": 3840, "num_hidden_layers": 48}
            | {"num_attention_heads": 16, "num_key_value_heads": 8, "sliding_window": 1024},
        },
        (8, 2, range(5, 48, 6)),
    ),
    "gemma-3-4b-it": (
        {"model_type": "gemma3", "text_config": {"hidden_size": 2560, "num_hidden_layers": 34}},
        (4, 2, range(5, 34, 6)),
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_configurations_are_understood(name: str, tmp_path: Path) -> None:
    config, (heads, group, numbers) = PUBLIC[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = tool.read_model(tmp_path)
    assert (model.heads, model.group, list(model.gated)) == (heads, group, list(numbers))


# ---- the reference worker ----


def answer(daemon: Daemon, gate: Path, *words: object) -> str:
    """What kvgate-lm prints for the pilot model when a tenth of the context's KV is kept."""
    command: list[object] = [programs() / "kvgate-lm", "--socket", daemon.socket("a"), "--model", PILOT, "--gate", gate]
    done = subprocess.run(
        [str(word) for word in [*command, "--ratio", "0.1", *words]], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_reference_worker_answers_alike(pilot: Path, tmp_path: Path, daemon: Daemon) -> None:
    text = tmp_path / "text"
    text.write_text(json.loads((PILOT / "needles.jsonl").read_text().splitlines()[0])["context"][:1000])
    imported, other = tmp_path / "imported.safetensors", tmp_path / "other.safetensors"
    assert run_tool(pilot, PILOT, imported) == 0
    random = save(tmp_path / "random.pt", [random_layer(4, 2, 256, i) for i in range(6)])
    assert run_tool(random, PILOT, other) == 0
    words = ["--text", text, "--generate", 60]
    written = answer(daemon, PILOT / "gate.safetensors", *words)
    assert written
    assert answer(daemon, imported, *words) == written
    assert answer(daemon, other, *words) != written
    words = ["--needles", PILOT / "needles.jsonl", "--limit", 1, "--json"]
    report = json.loads(answer(daemon, imported, *words))
    expected = json.loads(answer(daemon, PILOT / "gate.safetensors", *words))
    for key in ("queries", "correct", "kv_bytes_held", "kv_bytes_full"):
        assert report[key] == expected[key]


# ---- what is refused ----


def change(layer: int, name: str, value: object) -> Callable[[Layers], object]:
    """Puts a value (or what a function makes of the present one) in place of a tensor."""

    def apply(layers: Layers) -> Layers:
        entry = layers[layer]
        assert entry is not None
        entry[name] = value(entry[name]) if callable(value) else value
        return layers

    return apply


def drop(layer: int, name: str) -> Callable[[Layers], object]:
    """Leaves a tensor out."""

    def apply(layers: Layers) -> Layers:
        entry = layers[layer]
        assert entry is not None
        del entry[name]
        return layers

    return apply


def with_element(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Sets the last element."""

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        result = tensor.clone()
        result.view(-1)[-1] = value
        return result

    return apply


HIDDEN, HEADS, GROUP = 64, 2, 4  # of the model in the tests below, which has 3 layers
REFUSED: dict[str, tuple[Callable[[Layers], object], list[str]]] = {
    "wide": (
        change(1, "q_proj.weight", torch.zeros(HEADS * GROUP * WIDTH, 65).bfloat16()),
        ["module[1]: q_proj.weight", "[128, 65]", "[128, 64]"],
    ),
    "heads": (
        change(0, "k_proj.weight", torch.zeros(48, HIDDEN).bfloat16()),
        ["module[0]: k_proj.weight", "[48, 64]", "[32, 64]"],
    ),
    "bias": (change(2, "q_proj.bias", torch.zeros(127).bfloat16()), ["module[2]: q_proj.bias", "[127]", "[128]"]),
    "group": (change(2, "b", torch.zeros(HEADS, 1, 5).bfloat16()), ["module[2]: b ", "[2, 1, 5]", "[2, 1, 4]"]),
    "rank": (change(2, "b", torch.zeros(HEADS, GROUP).bfloat16()), ["module[2]: b ", "[2, 4]", "[2, 1, 4]"]),
    "width": (change(1, "q_norm.weight", torch.ones(8)), ["module[1]: q_norm.weight", "[8]", "[16]"]),
    "width of k": (change(1, "k_norm.weight", torch.ones(32)), ["module[1]: k_norm.weight", "[32]", "[16]"]),
    "sinks": (
        change(1, "k_base", torch.zeros(HEADS, 1, 15, WIDTH)),
        ["module[1]: k_base", "[2, 1, 15, 16]", "[2, 1, 16, 16]"],
    ),
    "no sinks": (change(0, "k_base", torch.zeros(HEADS, 1, 0, WIDTH)), ["module[0]: k_base", "1 to 1024"]),
    "many sinks": (change(0, "k_base", torch.zeros(HEADS, 1, 1025, WIDTH)), ["module[0]: k_base", "1 to 1024"]),
    "base of heads": (
        change(0, "k_base", torch.zeros(3, 1, SINKS, WIDTH)),
        ["module[0]: k_base", "[3, 1, 16, 16]", "[2, 1, 16, 16]"],
    ),
    "no base": (drop(0, "k_base"), ["module[0]: k_base is missing"]),
    "missing": (drop(2, "k_norm.weight"), ["module[2]: k_norm.weight is missing"]),
    "unknown": (change(1, "k_proj.bias", torch.zeros(32)), ["module[1]: 'k_proj.bias' is no tensor of a gate"]),
    "integers": (
        change(1, "q_norm.weight", torch.ones(WIDTH, dtype=torch.int32)),
        ["module[1]: q_norm.weight", "torch.int32", "torch.bfloat16, torch.float16, torch.float32"],
    ),
    "doubles": (change(1, "b", torch.Tensor.double), ["module[1]: b ", "torch.float64"]),
    "sparse": (change(1, "k_proj.weight", torch.Tensor.to_sparse), ["module[1]: k_proj.weight", "sparse"]),
    "without data": (
        change(1, "b", torch.zeros(HEADS, 1, GROUP, device="meta")),
        ["module[1]: b ", "on meta"],
    ),
    "nan": (change(2, "q_proj.weight", with_element(float("nan"))), ["module[2]: q_proj.weight has 1 elements", "NaN"]),
    "inf": (change(0, "k_base", with_element(float("inf"))), ["module[0]: k_base has 1 elements", "infinite"]),
    "number": (change(1, "b", 1.0), ["module[1]: b is a float, expected a tensor"]),
    "array": (change(1, "b", np.zeros((HEADS, 1, GROUP))), ["module[1]: b is a NumPy object, expected a tensor"]),
    "few": (lambda layers: layers[:2], ['"module" has 2 layers, expected 3']),
    "many": (lambda layers: layers + layers[:1], ['"module" has 4 layers, expected 3']),
    "none": (lambda layers: [], ['"module" has 0 layers, expected 3']),
    "a layer of None": (lambda layers: [layers[0], None, layers[2]], ["module[1] is None, expected a dict"]),
    "a layer of tensor": (lambda layers: [layers[0], torch.zeros(1), layers[2]], ["module[1] is a Tensor"]),
    "a dict": (lambda layers: dict(enumerate(layers)), ['"module" is a dict, expected a list']),
}


def small_model(folder: Path) -> None:
    """The config.json of the model in the tests of refusals."""
    config = {"model_type": "qwen3", "hidden_size": HIDDEN, "num_hidden_layers": 3}
    config |= {"num_attention_heads": HEADS * GROUP, "num_key_value_heads": HEADS}
    (folder / "config.json").write_text(json.dumps(config))


def assert_refused(
    folder: Path, checkpoint: Path, texts: list[str], capsys: pytest.CaptureFixture[str], *options: str
) -> None:
    """The tool fails with one line that holds the texts, and writes nothing."""
    before = sorted(os.listdir(folder))
    assert run_tool(checkpoint, folder, folder / "gate.safetensors", *options) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("import-gate: "), printed.err
    assert printed.err.count("\n") == 1, printed.err
    for text in texts:
        assert text in printed.err
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model(tmp_path)
    layers: Layers = [random_layer(HEADS, GROUP, HIDDEN, i) for i in range(3)]
    path = save(tmp_path / "good.pt", layers)
    assert run_tool(path, tmp_path, tmp_path / "good.safetensors") == 0
    capsys.readouterr()
    apply, texts = REFUSED[case]
    path = save(tmp_path / "gate.pt", apply(layers))
    assert_refused(tmp_path, path, [str(path), *texts], capsys)


def test_a_gate_of_a_sliding_layer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Gemma3TextConfig(**GEMMA)
    config.save_pretrained(tmp_path)
    layers = layers_for(config, True)
    layers[3] = layers[5]
    path = save(tmp_path / "gate.pt", layers)
    assert_refused(tmp_path, path, ["module[3] is a OrderedDict, expected None", "sliding-window"], capsys)
    path = save(tmp_path / "gate.pt", layers_for(config, True)[:12])
    assert_refused(tmp_path, path, ['"module" has 12 layers, expected 13, or 2 (its global layers)'], capsys)
    layers = layers_for(config, False)
    path = save(tmp_path / "gate.pt", change(1, "b", torch.zeros(2))(layers))
    assert_refused(tmp_path, path, ["module[1] (layer 11 of the model): b has shape [2]"], capsys)


def test_a_b_that_cannot_be_doubled_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model(tmp_path)
    layers: Layers = [random_layer(HEADS, GROUP, HIDDEN, i) for i in range(3)]
    change(1, "b", with_element(3e38))(layers)
    path = save(tmp_path / "gate.pt", layers)
    assert_refused(tmp_path, path, ["module[1]: b: 2b is beyond torch.bfloat16"], capsys, "--double-b")
    assert run_tool(path, tmp_path, tmp_path / "gate.safetensors") == 0


CONFIGS: dict[str, tuple[object, list[str]]] = {
    "other family": ({"model_type": "mamba"}, ["model_type is 'mamba'", "qwen3"]),
    "no family": ({"model_type": None}, ["model_type is None"]),
    "no size": ({"hidden_size": None}, ["hidden_size is missing"]),
    "text": ({"hidden_size": "64"}, ["hidden_size is '64', expected a number from 1 to 1048576"]),
    "zero": ({"num_key_value_heads": 0}, ["num_key_value_heads is 0"]),
    "uneven": ({"num_key_value_heads": 3}, ["num_attention_heads is 8, expected a multiple", "3"]),
    "large": ({"num_hidden_layers": 10**9}, ["num_hidden_layers is 1000000000", "1 to 1048576"]),
    "first window": (
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": "1"},
        ["max_window_layers is '1', expected a number from 0"],
    ),
    "truth": ({"num_hidden_layers": True}, ["num_hidden_layers is True"]),
    "types": ({"layer_types": ["full_attention"] * 2}, ["layer_types has 2 entries, expected a list of 3"]),
    "type": ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, ["layer_types[1]", "linear_"]),
    "windows": ({"layer_types": ["sliding_attention"] * 3}, ["no full_attention"]),
    "gemma": ({"model_type": "gemma3"}, ["text_config is None, expected an object"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_does_not_fit_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model(tmp_path)
    path = save(tmp_path / "gate.pt", [random_layer(HEADS, GROUP, HIDDEN, i) for i in range(3)])
    changes, texts = CONFIGS[case]
    assert isinstance(changes, dict)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    assert_refused(tmp_path, path, [str(config), *texts], capsys)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100000])
def test_a_config_that_is_no_object_is_refused(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "gate.pt", [])
    (tmp_path / "config.json").write_bytes(content)
    assert_refused(tmp_path, path, [str(tmp_path / "config.json")], capsys)


@pytest.mark.parametrize("content", [b"", b"\x80\x02.", b"PK\x03\x04broken", b"text\n" * 100])
def test_a_file_that_is_no_checkpoint_is_refused(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_model(tmp_path)
    path = tmp_path / "gate.pt"
    path.write_bytes(content)
    assert_refused(tmp_path, path, [str(path), "no checkpoint"], capsys)


def test_a_truncated_checkpoint_is_refused(pilot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model(tmp_path)
    content = pilot.read_bytes()
    pilot.write_bytes(content[: len(content) // 2])
    assert_refused(tmp_path, pilot, [str(pilot), "no checkpoint"], capsys)


def test_damaged_checkpoints_never_get_past_the_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random damage to the pickle: a line on standard error, or a gate file whose tensors have the right shapes."""
    small_model(tmp_path)
    good = save(tmp_path / "good.pt", [random_layer(HEADS, GROUP, HIDDEN, i) for i in range(3)])
    with zipfile.ZipFile(good) as source:
        parts = {name: source.read(name) for name in source.namelist()}
    pickled = next(name for name in parts if name.endswith("data.pkl"))
    make, refused = np.random.default_rng(7), 0
    for i in range(150):
        damaged = bytearray(parts[pickled])
        for place in make.integers(0, len(damaged), 1 + i % 4):
            damaged[place] = make.integers(0, 256)
        path, out = tmp_path / "gate.pt", tmp_path / "gate.safetensors"
        with zipfile.ZipFile(path, "w") as target:
            for name, content in parts.items():
                target.writestr(name, bytes(damaged) if name == pickled else content)
        status = run_tool(path, tmp_path, out, "--force")
        printed = capsys.readouterr().err
        assert (status, printed.count("\n")) in [(0, 0), (1, 1)], printed
        refused += status
        if status == 0:
            shapes = {name: tensor.shape for name, tensor in load_file(out).items()}
            expected = tool.shapes_for(tool.read_model(tmp_path), SINKS)
            assert shapes == {f"layers.{i}.{key}": torch.Size(expected[key]) for i in range(3) for key in expected}
    assert refused > 50


def test_a_checkpoint_without_a_module_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model(tmp_path)
    path = tmp_path / "gate.pt"
    torch.save({"state\ndict": {}}, path)
    assert_refused(tmp_path, path, ['has no "module"; it has', "'state\\ndict'"], capsys)
    torch.save([1], path)
    assert_refused(tmp_path, path, ["is a list, expected a dict"], capsys)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("place", ["module", "beside"])
def test_a_malicious_pickle_is_not_run(
    form: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_model(tmp_path)
    marker = tmp_path / "ran"
    good: Layers = [random_layer(HEADS, GROUP, HIDDEN, i) for i in range(3)]
    trap = Malicious(f"touch {marker}")
    checkpoint = {"module": [*good[:2], trap]} if place == "module" else {"module": good, "acc": trap}
    path = tmp_path / "gate.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(checkpoint, protocol=2))
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=form == "zip")
    assert_refused(tmp_path, path, [str(path)], capsys)
    assert not marker.exists()
    # The file is what it seems to be: whoever trusts it runs the command.
    if form == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_the_refused_name_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model(tmp_path)
    path = tmp_path / "gate.pt"
    torch.save({"module": Malicious("true")}, path)
    assert_refused(tmp_path, path, ["posix.system", "nothing was run"], capsys)


# ---- files ----


def test_an_existing_file_is_replaced_only_by_force(
    pilot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gate.safetensors"
    out.write_text("mine")
    assert run_tool(pilot, PILOT, out) == 1
    assert f"{out}: exists already; --force replaces it" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert run_tool(pilot, PILOT, out, "--force") == 0
    assert same(load_file(out), load_file(PILOT / "gate.safetensors"))


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "gate.safetensors"
    out.write_text("mine")
    with pytest.raises(tool.GateError, match="exists already"):
        tool.write_whole(out, b"new", False)
    assert out.read_text() == "mine"
    assert os.listdir(tmp_path) == [out.name]


def test_the_checkpoint_is_not_overwritten(pilot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = pilot.read_bytes()
    assert run_tool(pilot, PILOT, pilot, "--force") == 1
    assert "is the checkpoint itself" in capsys.readouterr().err
    assert pilot.read_bytes() == before


@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_nothing_half_written(pilot: Path, tmp_path: Path, force: bool) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "gate.safetensors"
    if force:
        out.write_text("mine")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run_script(pilot, PILOT, out, *["--force"] * force, preexec_fn=limit)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(folder) == ([out.name] if force else [])
    assert not force or out.read_text() == "mine"


def test_the_script_runs_by_itself(pilot: Path, tmp_path: Path) -> None:
    out = tmp_path / "gate.safetensors"
    assert os.access(TOOL, os.X_OK)
    done = run_script(pilot, PILOT, out, umask=0o027)
    assert (done.returncode, done.stderr) == (0, "")
    assert out.stat().st_mode & 0o777 == 0o640


def test_files_that_are_not_there_are_named(pilot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "absent"
    for words in [(absent, PILOT, tmp_path / "new"), (pilot, absent, tmp_path / "new"), (pilot, PILOT, absent / "new")]:
        assert run_tool(*words) == 1
        printed = capsys.readouterr().err
        assert "No such file or directory" in printed
        assert str(absent) in printed
        assert printed.count("\n") == 1
    assert os.listdir(tmp_path) == [pilot.name]


def test_wrong_usage_is_status_2(pilot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as wrong:
        run_tool(pilot)
    assert wrong.value.code == 2
    assert "MODEL" in capsys.readouterr().err
