"""Measures ranks on this machine, over loopback, for comparison with the estimates of `ranks.py`.

    make bench-ranks

measures with 1, 2 and 4 ranks and writes benchmarks/results/ranks/MACHINE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen2

from benchmarks import ranks
from benchmarks.machine import machine, name
from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.ranks.launch import launch
from tests.plugin.ranks.setting import split

FOLDER = Path(__file__).parent / "results" / "ranks"
MODEL = ranks.Model(4, 512, 8, 8, 64, 1408, 2048, weight_bytes=4, cache_bytes=4, sent_bytes=4)
CONTEXT, TOKENS, REPEATS = 256, 5, 7
LARGE = 1 << 20
SIZES = (1, 2, 4)


def main() -> None:
    """Measure with every number of ranks, and write the results."""
    argparse.ArgumentParser(prog="python -m benchmarks.ranks_here", description=__doc__).parse_args()
    # One core for each rank: otherwise a single process would use all cores, as several do together.
    os.environ |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    told: dict[str, Any] = {"machine": machine(), "load": os.getloadavg()[0], "ranks": {}}
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            for done in launch(size, Path(folder), module="benchmarks.ranks_here"):
                if done.returncode:
                    raise SystemExit(done.stdout)
            told["ranks"][size] = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name()}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told, indent=1))


def rank(folder: Path) -> None:
    """Run the measurements on one rank. Rank 0 writes the results into the folder."""
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init()
    found: dict[str, float] = {}
    if group.size() > 1:
        small, large = mx.zeros(MODEL.hidden), mx.zeros(LARGE // 4)
        record = mx.zeros(ranks.RECORD, mx.uint8)
        found["all_sum"] = _median(lambda: mx.distributed.all_sum(small, group=group))
        found["all_sum of 1 MB"] = _median(lambda: mx.distributed.all_sum(large, group=group))
        found["vote"] = _median(lambda: mx.distributed.all_gather(record, group=group))
    for way, module in (("tensor", llama), ("pipeline", qwen2)):
        model = _model(way, module, group)
        found[way] = _token(model, group)
        found[f"{way}, nothing compared"] = _token(model, None)
    if group.rank() == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def _model(way: str, module: Any, group: mx.distributed.Group) -> nn.Module:
    """Make this rank's shard of a model with random weights."""
    mx.random.seed(0)
    arguments = {
        "model_type": way,
        "num_hidden_layers": MODEL.layers,
        "hidden_size": MODEL.hidden,
        "intermediate_size": MODEL.intermediate,
        "num_attention_heads": MODEL.heads,
        "num_key_value_heads": MODEL.kv_heads,
        "vocab_size": MODEL.vocabulary,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    }
    return split(module.Model(module.ModelArgs.from_dict(arguments)), way, group)


def _token(model: nn.Module, group: mx.distributed.Group | None) -> float:
    """Seconds per token after a prompt of CONTEXT tokens."""
    cache = make_prompt_cache(model, group=group)
    mx.eval(model(mx.arange(CONTEXT)[None], cache=cache))
    token = mx.array([[1]])
    return _median(lambda: model(token, cache=cache), TOKENS)


def _median(work: Callable[[], mx.array], times: int = REPEATS) -> float:
    """The median seconds of several runs, after three warm-up runs."""
    seconds = []
    for _ in range(3 + times):
        start = time.perf_counter()
        mx.eval(work())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


if __name__ == "__main__":
    if "MLX_RANK" in os.environ:
        rank(Path(sys.argv[1]))
    else:
        main()
