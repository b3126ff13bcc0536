"""Writes docs/benchmarks.md and the figures in README.md and guides/quantize.md, and draws their pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import replies
from benchmarks.bounds import BOUNDS
from benchmarks.machine import described
from benchmarks.results import FOLDER, curves_of, rows_of
from benchmarks.rows import Row
from docs import plots

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PICTURES = DOCS / "pictures"
PAGE = DOCS / "benchmarks.md"
QUANTIZE = DOCS / "guides" / "quantize.md"
CHANGES = DOCS / "guides" / "changing.md"
BEGIN, END = "<!-- figures: made by `make figures` -->\n", "<!-- end of figures -->\n"

INTRODUCTION = """# Benchmarks

`make figures` writes this page from [`benchmarks/results`](../benchmarks/results), which `make bench`,
`make bench-endless` and `make bench-chat` write. Each benchmark does the same work here and in a peer.
The two run in turn in one process, after a warm-up, and the benchmark stops if their results differ.
Times are medians. A ratio is the median of the ratios of neighboring runs, with its quartiles. "Peak" is
the largest increase in the memory of MLX's arrays during one run, here and in the peer.

`python -m benchmarks --list` lists the benchmarks, `python -m benchmarks decode --quick` runs one, and
`make bench-check` compares the ratios of a quick run with their bounds. The bounds are in
[`benchmarks/bounds.py`](../benchmarks/bounds.py); 🔴 marks a result that misses its bound, and ⚪ one that
misses a bound that the CPU's BLAS alone decides.

**Counts.** On a GPU each primitive is a kernel to launch, and Python builds the graph of the next token
beside it. `make bench-graph` counts both, so that a machine without a GPU shows them, too: `graph` has
the primitives of a decoded token, without views and with MLX's fused functions as one, and the calls of
Python functions in this package's files, for each layer and against mlx-lm's caches. It also counts the
steps in which the package waits for MLX although nobody asks for a result. Every choice that depends on
the device is made as on a GPU. Counts are the same on every machine, and a test compares them with
their bounds.

**On a GPU.** `make bench-gpu` takes at most eight minutes on a Mac or on a machine with an NVIDIA GPU.
It first compares logits in float16 and bfloat16 with mlx-lm's caches and with float32, for all kinds of
cache, and then measures times on a model of a billion parameters with random weights, 16 layers in
bfloat16. Nothing is downloaded but packages. If you have such a machine, please run it and send the
file that it writes:

1. Clone this repository.
2. On a Mac, run `make bench-gpu`. With an NVIDIA GPU, run `make .venv/demo` and
   `.venv/bin/pip install 'mlx[cuda13]'` first.
3. The file has the name of your chip, such as `benchmarks/results/darwin-arm64-apple-m3-gpu.json`.

Attach the file to an issue of the kind "Something is slow", or open a pull request that adds it to
`benchmarks/results`; `make figures` makes a section of this page from it. The table at the end of the
output says what failed, if anything did, and what there was no time for.
"""


OLDER = {
    "linux-x86_64-nvidia-h100-80gb-hbm3-gpu": (
        "These figures are older than two changes that concern GPUs most, and could not be measured again "
        "yet: rows that decode together now lie in one array, so that a step of 8 equal rows launches 0.93 "
        "times as many primitives as BatchKVCache's instead of 1.60 times; and a decoded token takes less "
        "than half as many calls of Python functions. `graph` above counts both."
    ),
}
"""By machine, what has changed since it was measured."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and fail if a file is out of date"
    )
    parser.add_argument(
        "--formats", action="store_true", help="write nothing, and print the tables of bytes against loss"
    )
    chosen = parser.parse_args()
    if chosen.formats:
        told = json.loads(next(iter(sorted(FOLDER.glob("*.json")))).read_text(encoding="utf-8"))
        print(_bits(told, rows_of(told)), end="")
        return 0
    is_check = chosen.check
    stale = {path: text for path, text in written() if not path.exists() or path.read_bytes() != text}
    for path, content in stale.items():
        if not is_check:
            path.write_bytes(content)
        print(f"{path.relative_to(ROOT)} {'is out of date' if is_check else 'is new'}")
    return int(is_check and bool(stale))


def written() -> Iterator[tuple[Path, bytes]]:
    """Each file with its new content."""
    told = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
    yield PAGE, "\n".join([INTRODUCTION, *(_machine(name, found) for name, found in told.items())]).encode()
    first = next(iter(told.values()))
    rows = rows_of(first)
    yield ROOT / "README.md", _placed(ROOT / "README.md", _summary(first, rows))
    yield QUANTIZE, _placed(QUANTIZE, _bits(first, rows) + _replies(rows))
    yield PICTURES / "bits.svg", _svg(plots.bits(rows))
    yield CHANGES, _placed(CHANGES, _splices(first, rows))
    yield PICTURES / "splice.svg", _svg(plots.splices(rows))
    for name, found in told.items():
        own = rows_of(found)
        yield PICTURES / f"{name}.svg", _svg(plots.chief(own))
        if any(key.startswith("decode.") for key in own):
            yield PICTURES / f"{name}-decode.svg", _svg(plots.decoding(own))
        for curve in curves_of(found):
            yield PICTURES / f"{name}-{curve.key}.svg", _svg(plots.curve(curve))


def _machine(name: str, told: Mapping[str, Any]) -> str:
    """The section of one machine."""
    rows, blas = rows_of(told), _blas(told)
    lines = [f"## {_where(told)}", "", *([OLDER[name], ""] if name in OLDER else [])]
    lines += [f"![speed relative to the peers](pictures/{name}.svg)", ""]
    lines += ["### Bounds", "", *_bounded(rows, blas), ""]
    for benchmark, entry in told.items():
        quick = " A quick run." if entry["quick"] else ""
        lines += [f"### {benchmark}", "", f"{entry['date']}, {entry['seconds']} s.{quick}", ""]
        if benchmark == "decode":
            lines += [f"![milliseconds per token by context](pictures/{name}-decode.svg)", ""]
        lines += [f"![{c['title']}](pictures/{name}-{c['key']}.svg)\n" for c in entry["curves"]]
        lines += ["| work | here | peer | | ratio | quartiles | peak, MB |", "|---|---|---|---|---|---|---|"]
        lines += [_joined(_cells(rows[row["key"]], blas)) for row in entry["rows"]] + [""]
        for what, text in entry.get("failed", {}).items():
            lines += [f"🔴 {what} failed: `{text.splitlines()[-1]}`", ""]
    return "\n".join(lines)


def _where(told: Mapping[str, Any]) -> str:
    return described(next(iter(told.values()))["machine"])


def _blas(told: Mapping[str, Any]) -> str:
    blas: str = next(iter(told.values()))["machine"]["blas"]
    return blas


def _cells(row: Row, blas: str) -> list[str]:
    theirs = "" if row.theirs is None else _figure(row.theirs, row.unit)
    spread = "" if row.spread is None else f"{row.spread[0]:.2f} to {row.spread[1]:.2f}"
    peak = "" if row.peak is None else " and ".join(f"{part / 1e6:.1f}" for part in row.peak)
    ours = _figure(row.ours, row.unit)
    return [row.work, ours, row.peer, theirs, _ratio(row, blas), spread, peak]


def _joined(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(value: float, unit: str) -> str:
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text + (f" {unit}" if unit in ("s", "ms", "us", "MB", "nats") else "")


def _mark(row: Row, blas: str) -> str:
    """The mark of a result that misses its bound."""
    bound = BOUNDS.get(row.key)
    if bound is None or bound.is_met(row):
        return ""
    return "⚪" if blas and bound.is_of_blas else "🔴"


def _ratio(row: Row, blas: str) -> str:
    if row.ratio is None:
        return ""
    word = "as fast" if row.kind == "speed" else "as much"
    text = f"{row.ratio:,.0f}" if row.ratio >= 100 else f"{row.ratio:.3g}"
    return f"{text} {word} {_mark(row, blas)}".rstrip()


def _short(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _bounded(rows: Mapping[str, Row], blas: str) -> list[str]:
    """The table of bounds, and the reasons why some are missed."""
    lines = ["| work | peer | result | bound |", "|---|---|---|---|"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for key, bound in BOUNDS.items():
        if key not in rows:
            continue
        row, mark = rows[key], _mark(rows[key], blas)
        limit = f"{'at least' if row.kind == 'speed' else 'at most'} {_short(bound.limit)}"
        wanted = "" if bound.wanted is None else f"; {bound.wanted:.3g} is wanted"
        result = _short(bound.figure(row))
        what = row.unit if bound.of_value else ("times as fast" if row.kind == "speed" else "times as much")
        shown = f"{mark} **{result}**" if mark else result
        lines.append(f"| {row.work} | {row.peer} | {shown} | {f'{limit} {what}'.rstrip()}{wanted} |")
        # The reasons were found on CPUs.
        if mark and bound.reason and blas:
            reasons.setdefault((mark, bound.reason), []).append(row.work)
    for (mark, reason), works in reasons.items():
        lines += ["", f"{mark} {'; '.join(works)}: {reason}"]
    return lines


def _summary(told: Mapping[str, Any], rows: Mapping[str, Row]) -> str:
    """The figures in README.md."""
    name = min(FOLDER.glob("*.json")).stem
    lines = [
        f"![speed relative to the peers](docs/pictures/{name}.svg)",
        "",
        f"{_where(told)}. Peers run in turn in the same process.",
        "",
        "| work | here | peer | | ratio |",
        "|---|---|---|---|---|",
        *(_joined(_cells(rows[key], _blas(told))[:5]) for key in plots.CHIEF if key in rows),
        "",
        "🔴 marks a result that misses its bound, ⚪ one that the CPU's BLAS decides. "
        "[`docs/benchmarks.md`](docs/benchmarks.md) has all figures with their bounds, the "
        "reasons for misses, and the spread and memory of each result.",
    ]
    return "\n".join(lines) + "\n"


def _bits(told: Mapping[str, Any], rows: Mapping[str, Row]) -> str:
    lines = [
        f"On {_where(told)}. *Loss* is the increase of the loss over a cache in float, *KL* the mean KL "
        "divergence of the predictions from that cache's, in nats. *Centered* is with another text as "
        "`kv_text`, *all* with `kv_recent=0`, and *plain* without the transform, too. Bytes are those with "
        "copies in float, which take 0.008. With copies, texts are read in blocks of 8, because a longer "
        "block would see many of its own tokens in float; without, in blocks of 256. Empty cells were not "
        "measured. KIVI quantizes keys by channel; VeloxQuant-MLX keeps 16 to 79 tokens in float for it."
    ]
    shares = dict(plots.formats(rows))
    for text, title in plots.TEXTS.items():
        ways = {name: name for name in shares} | (_PEERS if text in ("topics", "code") else {})
        lines += [
            "",
            f"{title}:",
            "",
            "| bits of keys and values | bytes, as a share of float16 | loss | KL | centered: loss | KL "
            "| all: loss | KL | plain: loss | KL |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, called in ways.items():
            cells = [
                of(rows, text, f"{name}{end}")
                for end in ("", ".centered", ".rounded", ".plain")
                for of in (_increase, _divergence)
            ]
            if any(cells):
                share = shares.get(name) or _share(name)
                lines.append(f"| {called} | {share:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _replies(rows: Mapping[str, Row]) -> str:
    sizes = [prompt for prompt, _ in replies.SIZES]
    lines = [
        "",
        f"Replies of SmolLM2 to {len(sizes)} prompts of {min(sizes)} to {max(sizes)} tokens, with "
        f"{sum(new for _, new in replies.SIZES)} tokens in all:",
        "",
        "| options | largest change of a log probability, first token | later tokens "
        "| KL of later tokens, the largest mean of a reply | tokens that are not the likeliest any more |",
        "|---|---|---|---|---|",
    ]
    for way, (name, _) in replies.WAYS.items():
        first, later, apart, changed = (
            rows[f"replies.{key}.{way}"].ours for key in ("first", "later", "divergence", "changed")
        )
        lines.append(f"| {name} | {first:.2f} | {later:.2f} | {apart:.5f} | {changed:.0f} |")
    return "\n".join(lines) + "\n"


_PEERS = {
    "4.mlx-lm": "4, mlx-lm's cache",
    "4.kivi": "4, KIVI of VeloxQuant-MLX",
    "3.kivi": "3, KIVI of VeloxQuant-MLX",
}


def _share(peer: str) -> float:
    """The bytes of a peer's 2,048 tokens, as a share of float16. KIVI has 48 of them in float on average."""
    bits, _, way = peer.partition(".")
    in_float = 48 / 2048 if way == "kivi" else 0
    return in_float + (1 - in_float) * (int(bits) + 0.5) / 16


def _divergence(rows: Mapping[str, Row], text: str, end: str) -> str:
    nats = plots.divergence(rows, text, end)
    return "" if nats is None else f"{nats:.4f}"


def _increase(rows: Mapping[str, Row], text: str, end: str) -> str:
    more = plots.loss(rows, text, end)
    return "" if more is None else f"{more:+.1f}%"


def _splices(told: Mapping[str, Any], rows: Mapping[str, Row]) -> str:
    lines = [
        "SmolLM2-135M-Instruct on the 255 tokens that follow a changed prompt, on "
        f"{_where(told)}. Each cell has the increase of the loss over that of a fresh computation, and how "
        "often both predict the same next token.",
        "",
        f"| change | {' | '.join(plots.WAYS.values())} |",
        f"|---|{'---|' * len(plots.WAYS)}",
    ]
    found = plots.changes(rows)
    for name in dict.fromkeys(name for name, _ in found):
        cells = []
        for way in plots.WAYS:
            end = found[name, way]
            ratio = rows[f"splice.loss.{end}"].ratio
            assert ratio is not None
            cells.append(f"{100 * (ratio - 1):+.1f}%, {100 * rows[f'splice.agreement.{end}'].ours:.0f}%")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _placed(path: Path, block: str) -> bytes:
    """A page with a new block between its markers."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"cannot write figures to {path}: it lacks the markers {BEGIN.strip()} and {END.strip()}"
        )
    return (before + BEGIN + block + END + after).encode()


def _svg(figure: Figure) -> bytes:
    data = BytesIO()
    figure.savefig(data, format="svg", metadata={"Date": None})
    return data.getvalue()


if __name__ == "__main__":
    sys.exit(main())
