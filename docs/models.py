"""Writes docs/models.md: the features that work on each architecture of a host, found out by running them."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from mlx_kvcache import NotSupportedError
from mlx_kvcache.cells.visibility import Causal, Chunk, Rule, Window
from mlx_kvcache.plugin import make_prompt_cache
from mlx_kvcache.plugin.hosts.host import Host, logits_of
from mlx_kvcache.plugin.hosts.mlx_lm import MLX_LM
from mlx_kvcache.plugin.hosts.mlx_vlm import MLX_VLM
from mlx_kvcache.plugin.pool.pool import Pool
from tests.plugin.configurations import (
    CONFIGURATIONS,
    STAY_NARROW,
    UNBUILDABLE,
    build,
    model_modules,
    module_of,
)
from tests.plugin.configurations.vlm import (
    VLM_CONFIGURATIONS,
    VLM_NOT_BUILT,
    VLM_STAY_NARROW,
    build_language_model,
    language_modules,
)

PAGE = Path(__file__).parent / "models.md"

INTRODUCTION = """\
# Models

What the plug-in supports on each architecture of {hosts}.
`make models` finds this out by running small configurations with random weights. Tests compare each of them
with the logits of its library's own caches: prefill in one block and in uneven blocks, decoding past every
window and chunk border, rewinding, forking, and batches of rows of unequal length.

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
"""

TABLE = """\
| Model | Layers | Rewind | Fork | Shift | Quantize | Batch |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Part:
    """A host's part of the page.

    Attributes:
        text: what comes before the table, with the numbers of models.
        configurations: small configurations, by "module" or "module:variant".
        build: makes a model of a configuration, with wider heads if `is_wide`.
        narrow: configurations whose heads cannot be wider.
        modules: all model modules of the host.
        not_built: reasons why a module has no configuration.
        why_not: what these reasons have in common.
    """

    host: Host
    text: str
    configurations: Mapping[str, Any]
    build: Callable[..., nn.Module]
    narrow: set[str]
    modules: list[str]
    not_built: Mapping[str, str]
    why_not: str


PARTS = (
    Part(
        MLX_LM,
        "**{passing} of {modules}** model modules run; `tests/plugin/test_architectures.py` compares them.",
        CONFIGURATIONS,
        build,
        STAY_NARROW,
        model_modules(),
        UNBUILDABLE,
        "These models cannot run on the machine that made this page.",
    ),
    Part(
        MLX_VLM,
        "**{passing} of {modules}** modules with a language model run; "
        "`make test-architectures` compares them in\n`tests/plugin/test_vlm_architectures.py`. "
        "`tests/plugin/test_vlm_pictures.py` "
        "compares whole models with [pictures in the prompt](guides/images.md).",
        VLM_CONFIGURATIONS,
        build_language_model,
        VLM_STAY_NARROW,
        language_modules(),
        VLM_NOT_BUILT,
        "These modules have no small configuration, for the reasons given.",
    ),
)


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
    # Compiling a function takes up to seconds on a CPU, and each runs only a few times here.
    mx.disable_compile()
    names = " and ".join(f"{part.host.name} {part.host.version}" for part in PARTS)
    with tqdm(
        total=sum(len(part.configurations) for part in PARTS),
        unit="model",
        disable=not sys.stderr.isatty(),
    ) as progress:
        return INTRODUCTION.format(hosts=names) + "".join(
            text for part in PARTS for text in _section(part, progress)
        )


def _section(part: Part, progress: tqdm[Any]) -> Iterator[str]:
    rows, passing, refused = [], set(), {}
    for name in sorted(part.configurations):
        progress.update()
        try:
            model = part.build(name)
            pool = make_prompt_cache(model).pool
        except NotSupportedError as error:
            refused[name] = str(error)
            continue
        passing.add(module_of(name))
        rows.append(_row(part, name, pool))
    yield f"\n## {part.host.name} {part.host.version}\n\n"
    yield part.text.format(passing=len(passing), modules=len(part.modules)) + "\n\n"
    yield TABLE + "".join(rows)
    yield "\n### Refused\n\n"
    yield "`make_prompt_cache` and `attach` refuse these models before anything is computed.\n\n"
    yield from (f"- **{name}**: {why}.\n" for name, why in refused.items())
    yield f"\n### Not tried\n\n{part.why_not}\n\n"
    yield from (f"- **{name}**: {why}.\n" for name, why in part.not_built.items())


def _row(part: Part, name: str, pool: Pool) -> str:
    quantize = _quantize(part, name, pool)
    columns = name, _layers(pool), _rewind(pool), "yes", _shift(pool), quantize, _batch(pool)
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


def _quantize(part: Part, name: str, pool: Pool) -> str:
    if _has_no_keys(pool):
        return "no keys"
    if name in part.narrow:
        return "untried"
    model = part.build(name, is_wide=True)
    cache = make_prompt_cache(model, kv_bits=8, kv_group_size=32)
    for tokens in ([1, 2, 3], [4]):
        logits = logits_of(model, mx.array([tokens]), cache)
    return "yes" if mx.isfinite(logits).all().item() else "no"


def _batch(pool: Pool) -> str:
    if pool.batching == "apart":
        return "by row"
    return f"{pool.batching}, alike" if pool.layout.is_recurrent else pool.batching


if __name__ == "__main__":
    sys.exit(main())
