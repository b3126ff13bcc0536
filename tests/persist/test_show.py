"""What the command says of files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_kvcache import (
    Batch,
    CausalCache,
    EncoderCache,
    Quantization,
    RecurrentCache,
    SlidingWindowCache,
    WrapperCache,
)
from mlx_kvcache.persist import save, schema
from mlx_kvcache.persist.show import FLOAT, GONE, PACKED, WIDTH, shown
from tests.persist.samples import Change

from .test_files import lie


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_kvcache.persist", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A window with sinks that has slid, full attention of which the end is packed, and a recurrence."""
    monkeypatch.setattr(schema, "CHUNK", 8)
    causal = CausalCache()
    wrapper = WrapperCache(SlidingWindowCache(16, sinks=8), causal, RecurrentCache(), EncoderCache())
    wrapper.init(mx.float16, capacity=200, quantization=Quantization((8, None), group_size=32, after=32))
    for sequence, n in ((0, 32), (0, 0), (1, 32)):
        if not n:
            wrapper.copy_prefix(0, 1, 32)
            continue
        kv = mx.ones((1, 2, n, 32))
        with wrapper.forward(Batch.run(sequence, wrapper.end(sequence), n)):
            for layer_type in (0, 1):
                wrapper.set_layer_type(layer_type)
                for layer in range(2):
                    wrapper.layer(layer).put(kv, kv)
            wrapper.set_layer_type(2)
            wrapper.layer(0).put(mx.zeros((3,)))
    save(tmp_path / "a", wrapper, 1, range(64), {"configuration": "1234"})
    return tmp_path / "a"


def test_a_file_and_its_pictures(path: Path) -> None:
    done = run("show", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tokens    64, token IDs stored" in done.stdout
    assert "all checksums match" in done.stdout
    assert "model     configuration: '1234'" in done.stdout
    assert "window size 16 sinks 8" in done.stdout
    assert FLOAT * 8 + GONE * 40 + PACKED * 16 in done.stdout
    assert FLOAT * 32 + PACKED * 32 in done.stdout
    assert "[0, 32) float, [32, 64) quantized" in done.stdout
    assert "layers 0 to 1: 2 heads, keys 32 wide in 8 bits (groups of 32, from F16), values" in done.stdout
    assert "states after 32, 64 tokens" in done.stdout
    assert all(len(line) < 160 for line in done.stdout.splitlines())
    assert any(GONE * (WIDTH // 2) in line for line in done.stdout.splitlines())


def test_damage_is_said_and_makes_the_command_fail(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = run("show", path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{path}: corrupt file: checksum mismatch in array ")
    assert run("show", path, "--quick").returncode == 0
    assert run("show", path.parent / "missing").returncode == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda header, arrays: header.update(caches=3),
        lambda header, arrays: header["caches"][0]["children"][1]["runs"][0].update(length=99),
        lambda header, arrays: header["caches"][0]["children"][1]["layers"]["0"].update(codecs=[[8], None]),
        lambda header, arrays: header.pop("model"),
    ],
)
def test_lies_are_said_too(path: Path, change: Change) -> None:
    lie(path, change)
    done = run("show", path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{path}: ") and "Traceback" not in done.stderr


def test_an_empty_file_of_a_cache(tmp_path: Path) -> None:
    cache = CausalCache()
    cache.init()
    save(tmp_path / "a", cache, 0)
    assert "no tokens stored" in "\n".join(shown(tmp_path / "a"))


THEIRS = Path(__file__).parents[1] / "plugin" / "files"


@pytest.mark.parametrize(("version", "held"), [("0_31_3", 20), ("0_32_2", 256)])
def test_files_of_mlx_lm_are_shown(version: str, held: int) -> None:
    done = run("show", THEIRS / f"mlx_lm_{version}_three.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines = done.stdout.splitlines()
    assert first.endswith("written by mlx-lm's save_prompt_cache (no checksums)")
    assert lines == [
        "tokens    20",
        "metadata  'model': 'none'",
        "",
        f"  layers 0, 2: KVCache, F16 [1, 1, {held}, 32], F16 [1, 1, {held}, 32]",
        "  layers 1: RotatingKVCache, F16 [1, 1, 8, 32], F16 [1, 1, 8, 32]",
    ]
    done = run("show", THEIRS / f"mlx_lm_{version}_every.safetensors")
    assert done.returncode == 0
    for name in ("tokens    20", "layers 7: CacheList, ", "layers 8: ArraysCache, ", "QuantizedKVCache, U32"):
        assert name in done.stdout


def test_lies_in_files_of_mlx_lm(tmp_path: Path) -> None:
    """Nothing that they name is looked up, and what makes no sense is shown or refused, not raised."""
    path, odd = tmp_path / "a.safetensors", {"0.0": mx.zeros((1, 2)), "0.2": mx.array(7)}
    for told in (
        {"1.0": "KVCache", "2.0": ""},
        {"1.0": "os.system", "2.0": ""},
        {"1.9999999999999": "KVCache", "2.0": ""},
        {"2.0": "KVCache"},
        {"2.0": "RotatingKVCache"},
        {"2.0": "x" * 10_000},
        {"1.x": "y" * 10_000, "2.0": "KVCache"},
    ):
        mx.save_safetensors(str(path), odd, told)
        done = run("show", path)
        assert "Traceback" not in done.stderr and all(len(line) < 300 for line in done.stdout.splitlines())
    for other in ({}, {"format": "mlx"}):
        mx.save_safetensors(str(path), odd, other)
        done = run("show", path)
        assert done.returncode == 1 and "such as a model's weights or adapters" in done.stderr


def test_help_says_what_the_pictures_mean() -> None:
    assert "show" in run("--help").stdout
    assert PACKED in run("show", "--help").stdout
