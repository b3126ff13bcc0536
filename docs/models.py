"""Writes docs/models.md: the features that work on each architecture of mlx-lm, found out by running them."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from tqdm import tqdm

from mlx_kvcache import NotSupportedError
from mlx_kvcache.cells.visibility import Causal, Chunk, Rule, Window
from mlx_kvcache.plugin import make_prompt_cache
from mlx_kvcache.plugin.pool.pool import Pool
from tests.plugin.configurations import (
    CONFIGURATIONS,
    STAY_NARROW,
    UNBUILDABLE,
    build,
    model_modules,
    module_of,
)

PAGE = Path(__file__).parent / "models.md"

INTRODUCTION = """\
# Models

What the plug-in supports on each architecture of mlx-lm {version}. `make models` finds this out by running
small configurations with random weights. **{passing} of {modules}** model modules run on its caches.
`tests/plugin/test_architectures.py` compares each of them with the logits of mlx-lm's own caches: prefill in
one block and in uneven blocks, decoding past every window and chunk border, rewinding, forking, and batches
of rows of unequal length.

- **Layers**: the number of layers of each kind. *full*: full attention; *window n*, *chunk n*: a sliding
  window or chunks of n tokens, as in the small configuration; *state*: a recurrent layer.
- **Rewind**: *any*: by any number of tokens; *any of the newest r*: by up to as many tokens as the option
  `rewind` says (64 by default), also after a window has slid; *checkpoints*: to the ends of blocks, to every
  64th decoded token, and to marks. Recurrent layers can do both; those of a model whose modules cannot be
  called again have checkpoints only (see [Hybrid and recurrent models](guides/hybrid.md)).
- **Fork**: without copying.
- **Shift** (`remove` from the middle, `overflow="shift"`): *offset*: later keys stay unchanged and the
  model's offset runs ahead of the number of tokens; *re-rotated*: each shift rotates the later keys, in
  float32; *states stay*: the states of recurrent layers go on knowing removed tokens; otherwise, the reason
  why it is refused.
- **Quantize** (`kv_bits`): quantized keys and values, tested with a head size of 32. *untried*: the small
  configuration has smaller heads; *no keys*: the model caches no keys or values.
- **Batch**: *ragged*: one call for all rows, and each row attends to its own keys; *gathered*: one call, for
  which the rows' keys and values are copied together; *by row*: one call for each row, because the model
  computes other results for a batch than for its rows; *alike*: only rows of the same length and padding
  share a call.

| Model | Layers | Rewind | Fork | Shift | Quantize | Batch |
|---|---|---|---|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if the page would change"
    )
    check = parser.parse_args().check
    page = _page()
    if check:
        return int(PAGE.read_text(encoding="utf-8") != page)
    PAGE.write_text(page, encoding="utf-8")
    return 0


def _page() -> str:
    rows, passing, refused = [], set(), {}
    for name in tqdm(sorted(CONFIGURATIONS), unit="model", disable=not sys.stderr.isatty()):
        try:
            model = build(name)
            pool = make_prompt_cache(model).pool
        except NotSupportedError as error:
            refused[name] = str(error)
            continue
        passing.add(module_of(name))
        rows.append(_row(name, model, pool))
    head = INTRODUCTION.format(version=mlx_lm.__version__, passing=len(passing), modules=len(model_modules()))
    return head + "".join(rows) + _exceptions(refused)


def _row(name: str, model: nn.Module, pool: Pool) -> str:
    columns = name, _layers(pool), _rewind(pool), "yes", _shift(pool), _quantize(name, pool), _batch(pool)
    return f"| {' | '.join(columns)} |\n"


def _layers(pool: Pool) -> str:
    counts = Counter(_kind(leaf.rule) for leaf in pool.leaves)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _kind(rule: Rule | None) -> str:
    if rule is None:
        return "state"
    if isinstance(rule, Causal):
        return "full"
    return f"{'chunk' if isinstance(rule, Chunk) else 'window'} {rule.size}" + (
        f" + {rule.sinks}" if isinstance(rule, Window) and rule.sinks else ""
    )


def _rewind(pool: Pool) -> str:
    if pool.layout.is_recurrent:
        return "any of the newest r, checkpoints" if pool.mixers else "checkpoints"
    if all(isinstance(rule, Causal) for rule in pool.layout.rules):
        return "any"
    return "any of the newest r"


def _shift(pool: Pool) -> str:
    scheme = pool.scheme
    if scheme.refusal:
        return scheme.refusal
    ways = [] if _has_no_keys(pool) else ["offset" if scheme.ahead else "re-rotated"]
    return ", ".join([*ways, "states stay"] if pool.layout.is_recurrent else ways)


def _has_no_keys(pool: Pool) -> bool:
    return all(leaf.rule is None for leaf in pool.leaves)


def _quantize(name: str, pool: Pool) -> str:
    if _has_no_keys(pool):
        return "no keys"
    if name in STAY_NARROW:
        return "untried"
    model = build(name, is_wide=True)
    cache = make_prompt_cache(model, kv_bits=8, kv_group_size=32)
    for tokens in ([1, 2, 3], [4]):
        logits = model(mx.array([tokens]), cache=cache)
    return "yes" if mx.isfinite(logits).all().item() else "no"


def _batch(pool: Pool) -> str:
    if pool.batching == "apart":
        return "by row"
    return f"{pool.batching}, alike" if pool.layout.is_recurrent else pool.batching


def _exceptions(refused: dict[str, str]) -> str:
    lines = [
        "\n## Refused\n\n",
        "`make_prompt_cache` and `attach` refuse these models before anything is computed.\n\n",
    ]
    lines += [f"- **{name}**: {why}.\n" for name, why in refused.items()]
    lines += ["\n## Not tried\n\n", "These models cannot run on the machine that made this page.\n\n"]
    lines += [f"- **{name}**: {why}.\n" for name, why in UNBUILDABLE.items()]
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
