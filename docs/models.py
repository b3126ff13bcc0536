"""Writes docs/models.md: what can be done on each of mlx-lm's architectures, found out by trying."""

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

What the plug-in does on each architecture of mlx-lm {version}, found out by `make models` on small
configurations with random weights. **{passing} of {modules}** model modules run on its caches, and
`tests/plugin/test_architectures.py` holds each of them to the logits of mlx-lm's own caches: prefill in one
block and in uneven ones, decoding past every border, going back, forking, batches of unequal rows.

- **Layers**: how many of each kind. *full*: attention to everything; *window n*, *chunk n*: the size is that
  of the small configuration; *state*: a recurrence's arrays.
- **Rewind**: *any* number of tokens; *newest*: as many as `rewind` says (64 unless told), also after a window
  has slid; *checkpoints*: recurrences go back to the ends of blocks and every 64th decoded token
  (`resume_point` tells).
- **Fork**: without copying.
- **Shift** (`remove` from the middle, `overflow="shift"`): *offset*: later keys stay as they are and the
  model's offset runs ahead; *re-rotated*: later keys are rotated for each shift, in float32; else why not.
- **Quantize** (`kv_bits`): keys and values in fewer bits, tried with heads of 32 features. *untried*: the
  small configuration has narrower heads; *no keys*: there is nothing to quantize.
- **Batch**: *ragged*: one call for all rows, each attending to its own history; *gathered*: one call, for
  which the histories are copied together; *by row*: a call for each, because the model gives other results
  for a batch than for its rows; *alike*: rows of the same length and padding in one call.

| Model | Layers | Rewind | Fork | Shift | Quantize | Batch |
|---|---|---|---|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page would change")
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
    rules = pool.layout.rules
    if None in rules:
        rewind = "checkpoints"
    elif all(isinstance(rule, Causal) for rule in rules):
        rewind = "any"
    else:
        rewind = "newest"
    columns = name, _layers(pool), rewind, "yes", _shift(pool), _quantize(name, pool), _batch(pool)
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


def _shift(pool: Pool) -> str:
    if pool.layout.is_recurrent:
        return "a state cannot forget"
    scheme = pool.scheme
    return scheme.refusal or ("offset" if scheme.ahead else "re-rotated")


def _quantize(name: str, pool: Pool) -> str:
    if all(leaf.rule is None for leaf in pool.leaves):
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
    lines = ["\n## Refused\n\n", "By `make_prompt_cache` and `attach`, before anything is computed.\n\n"]
    lines += [f"- **{name}**: {why}.\n" for name, why in refused.items()]
    lines += ["\n## Not tried\n\n", "They cannot run where this page was made.\n\n"]
    lines += [f"- **{name}**: {why}.\n" for name, why in UNBUILDABLE.items()]
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
