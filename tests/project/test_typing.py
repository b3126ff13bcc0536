"""Types of the package as its user's type checker sees them."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONSUMER = """
from collections.abc import Iterator

import mlx.core as mx

from mlx_kvcache import Batch, CacheFullError, CausalCache, Quantization, attention, rope_shift, slide
from mlx_kvcache.persist import Opened, load, save


def turn(q: mx.array, k: mx.array, v: mx.array) -> Iterator[mx.array]:
    cache = CausalCache(shift=rope_shift(dims=64))
    cache.init(dtype=mx.float16, quantization=Quantization(8))
    try:
        with cache.forward(Batch(positions=[0, 1], sequences=[0, 0])) as same:
            reveal_type(same)
            yield attention(q, k, v, cache.layer(0), scale=0.125)
    except CacheFullError as error:
        reveal_type(error.needed)
    reveal_type(slide(cache, 0))
    reveal_type(save("a", cache, 0, tokens=[1, 2]))
    opened: Opened = load("a", cache, 1)
    reveal_type(opened.tokens)
    cache.remove("0", 1)
"""


def test_a_user_is_told_types(tmp_path: Path) -> None:
    """py.typed is there, all that is used has types, and a wrong argument is found."""
    assert files("mlx_kvcache").joinpath("py.typed").is_file()
    (tmp_path / "consumer.py").write_text(CONSUMER)
    # With the cache that `make check` leaves, or NumPy alone takes half a minute.
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "consumer.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    told = [line.split(": ", 1)[1] for line in done.stdout.splitlines() if "consumer.py" in line]
    assert told == [
        'note: Revealed type is "mlx_kvcache.caches.causal.CausalCache"',
        'note: Revealed type is "int"',
        'note: Revealed type is "int"',
        'note: Revealed type is "int"',
        'note: Revealed type is "list[int] | None"',
        'error: Argument 1 to "remove" of "PlanningCache" has incompatible type "str"; '
        'expected "int"  [arg-type]',
    ]
