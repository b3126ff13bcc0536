"""Models in 16 bits are as near to float32 with these caches as with mlx-lm's own."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from benchmarks import decode, gpu, measure
from benchmarks.agreement import FULL, Found, Models, compared, models_of
from benchmarks.results import rows_of

CASES = {
    ("full", mx.bfloat16): ("unequal rows", "forks", "files", "removal", "shifting", "quantized rows"),
    ("full", mx.float16): ("shared prefix", "rewinding", "generated text"),
    ("window", mx.float16): ("unequal rows", "files"),
    ("latent", mx.bfloat16): ("unequal rows", "files"),
    ("chunks", mx.float16): ("going on",),
    ("recurrent", mx.bfloat16): ("unequal rows", "files"),
    ("hybrid", mx.float16): ("rewinding",),
}


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, mx.Dtype], Models]:
    return {key: models_of(*key) for key in CASES}


@pytest.mark.parametrize(
    ("kind", "dtype", "name"), [(*key, name) for key, names in CASES.items() for name in names]
)
def test_agrees(kind: str, dtype: mx.Dtype, name: str, models: dict[tuple[str, mx.Dtype], Models]) -> None:
    compared(name, name, FULL[name](models[kind, dtype]), dtype)


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_difference_is_noticed(wrong: float) -> None:
    exact = mx.random.normal((4, 96), key=mx.random.key(0))
    near = exact.astype(mx.float16)
    compared("", "", Found(near, near, exact), mx.float16)
    with pytest.raises(ArithmeticError, match="away from float32"):
        compared("", "", Found(near + wrong * (mx.arange(4) == 2)[:, None], near, exact), mx.float16)


def test_the_run_for_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends in time, writes what it has, and goes on after a failure."""

    def broken(_: object) -> Found:
        raise ValueError("on purpose")

    monkeypatch.setitem(FULL, "going on", broken)
    monkeypatch.setattr(gpu, "FOR_CHECKS", 0.1)
    # The run sets it, for itself.
    monkeypatch.setattr(measure, "MOST_SECONDS", measure.MOST_SECONDS)
    monkeypatch.setattr(gpu, "TIMES", {"decode": decode})
    out = tmp_path / "out.json"
    monkeypatch.setattr(
        "sys.argv", ["gpu", "--quick", "--device", "cpu", "--seconds", "8", "--json", str(out)]
    )
    assert gpu.main() == 1
    told, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert "decode.model.256" in rows_of(told)
    assert "on purpose" in told["agreement"]["failed"]["going on, full, float16"]
    assert "FAILED going on" in shown and "no time was left for:" in shown
