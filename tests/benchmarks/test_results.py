"""Results as files, and the bounds on them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import save_config, save_model

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.bounds import BOUNDS, Bound
from benchmarks.measure import check_equal, peak_of, speed
from benchmarks.results import FOLDER, curves_of, rows_of, write
from benchmarks.rows import Curve, Row, less
from benchmarks.setting import Setting
from docs.benchmarks import written
from tests.plugin.tiny import tiny_llama

FAST = Row("a.speed", "some work", "ms", 1.5, "a peer", 3.0, "speed", 2.0, (1.9, 2.125), 7, (1000, 2000))
SMALL = less("a.bytes", "some bytes", "MB", 10.0, "a peer", 40.0)
VALUE = Row("a.value", "a value", "", 0.25)
LINES = Curve("a", "some lines", "x", "y", [1.0, 2.0], {"here": [0.5, 0.25]})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    other = Row("b", "else", "s", 1.0)
    write(path, "one", [FAST, SMALL, VALUE, LINES], 12.3, is_quick=False)
    write(path, "two", [other], 1, is_quick=True)
    told = json.loads(path.read_text())
    assert list(told) == ["one", "two"] and told["one"]["machine"]["mlx"]
    assert list(rows_of(told).values()) == [FAST, SMALL, VALUE, other]
    assert curves_of(told) == [LINES]
    write(path, "one", [FAST], 1, is_quick=False)
    assert list(rows_of(json.loads(path.read_text()))) == ["a.speed", "b"]


def test_a_bound_is_on_the_better_side() -> None:
    assert Bound(2.0).is_met(FAST) and not Bound(2.01).is_met(FAST)
    assert Bound(0.25).is_met(SMALL) and not Bound(0.24).is_met(SMALL)
    assert Bound(0.25, of_value=True).is_met(VALUE) and not Bound(0.2, of_value=True).is_met(VALUE)
    assert Bound(3.0, quick=2.0).is_met(FAST, is_quick=True)


def test_both_sides_take_turns() -> None:
    order: list[str] = []

    def work(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    row = speed("k", "w", "ms", lambda: work("ours", 0.5), "p", lambda: work("theirs", 1.0), 4, per=10)
    assert (row.ours, row.theirs, row.ratio, row.runs) == (50.0, 100.0, 2.0, 4)
    assert order[2:] == ["theirs", "ours", "ours", "theirs"] * 2


def test_different_results_are_no_comparison() -> None:
    check_equal(mx.array([1000.0, 1.0]), mx.array([1000.5, 1.0]))
    for other in ([1002.0, 1.0], [float("nan"), 1.0]):
        with pytest.raises(RuntimeError, match="differ"):
            check_equal(mx.array(other), mx.array([1000.0, 1.0]))


def test_the_peak_is_that_of_the_work() -> None:
    kept = mx.zeros((1 << 20,))
    mx.eval(kept)
    assert peak_of(lambda: mx.eval(mx.zeros((1 << 20,)) + 1)) >= 4 << 20
    assert peak_of(lambda: None) == 0


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no model nowhere"):
        Setting("nowhere").load("tiny")


def test_pages_say_what_the_results_say() -> None:
    """After `make bench` comes `make figures`. Pictures differ with the version of matplotlib."""
    found = dict(written())
    assert {path.suffix for path in found} == {".md", ".svg"} and all(path.exists() for path in found)
    assert all(path.read_bytes() == content for path, content in found.items() if path.suffix == ".md")


def test_bounds_are_on_rows_that_there_are() -> None:
    found: dict[str, Row] = {}
    for path in FOLDER.glob("*.json"):
        found |= rows_of(json.loads(path.read_text(encoding="utf-8")))
    quick = {"decode.model.2048", "decode.attention.2048", "prefill.1024", "host.evaluated.1024"}
    absent = {key for key in BOUNDS if key not in found and key.removesuffix(".bare") not in quick}
    assert not absent


class Shorter(Setting):
    """A quick run whose long contexts are a quarter as long."""

    def of(self, usual: Any, quick: Any) -> Any:
        return quick // 4 if isinstance(quick, int) and quick > 500 else quick


def test_a_model_of_another_shape(tmp_path: Path, tokenizer: Any) -> None:
    """A folder with a model of 16 bits and other heads, as a hub would give."""
    model = tiny_llama(mx.float16, hidden_size=256, vocab_size=512)
    save_model(tmp_path, model)
    save_config(asdict(model.args), tmp_path / "config.json")
    tokenizer.save_pretrained(tmp_path)
    setting = Shorter(str(tmp_path), is_quick=True)
    rows = [row for name in ("decode", "edits", "saving") for row in BENCHMARKS[name](setting)]
    assert len(rows) > 12 and all(row.ours > 0 for row in rows)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks", "generation", "drift", "--quick", "--model", "tiny"]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {"generation", "drift.float16.again"} <= set(rows_of(json.loads(out.read_text())))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "speed"])
    with pytest.raises(SystemExit):
        main()
    assert "no benchmark speed" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--list"])
    assert main() == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("decode", "endless"))
