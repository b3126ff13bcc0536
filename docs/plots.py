"""Draws the pictures of benchmark results."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.rows import Curve, Row

CHIEF = {
    "window.rewind": "rewind in a window that has slid",
    "edits.remove": "remove half of 4,096 tokens",
    "forks.16": "fork a prompt 16 times",
    "forks.16.bytes": "bytes of these forks",
    "saving.32": "save, load and go on",
    "sessions.first": "2nd conversation on a prefix",
    "sessions.hit": "hit in a store of conversations",
    "sessions.bytes": "bytes of 8 on one prefix",
    "batches.ragged": "decode a ragged batch",
    "many.stall": "stall while a prompt joins",
    "growth.512": "peak while growing to 8,192",
    "window.decode": "decode in a window",
    "decode.model.4096": "decode after 4,096",
    "prefill.4096": "prefill 4,096",
    "host.evaluated.4096": "update alone, evaluated",
}
"""The rows that the first picture shows, with their labels."""

mpl.rcParams["svg.hashsalt"] = "mlx_kvcache"


def gain(row: Row) -> float:
    """How many times faster or smaller than the peer."""
    assert row.ratio is not None
    return row.ratio if row.kind == "speed" else 1 / row.ratio


def chief(rows: Mapping[str, Row]) -> Figure:
    """Bars of how many times faster or smaller each row is than its peer, on a logarithmic scale."""
    shown = [(label, rows[key]) for key, label in CHIEF.items() if key in rows]
    figure = Figure(figsize=(8, 0.36 * len(shown) + 1))
    axis = figure.subplots()
    for y, (_, row) in enumerate(reversed(shown)):
        value = gain(row)
        axis.barh(y, value - 1, left=1, color="#1f5fa8" if value >= 1 else "#c0392b", height=0.6)
        axis.annotate(
            f" {value:,.0f}" if value >= 10 else f" {value:.2f}",
            (max(value, 1), y),
            va="center",
            fontsize=8,
        )
        axis.annotate(f"{row.peer} ", (min(value, 1), y), va="center", ha="right", fontsize=7, color="0.45")
    axis.set_yticks(range(len(shown)), [label for label, _ in reversed(shown)], fontsize=8)
    axis.set_xscale("log")
    axis.set_xlim(0.05, 3 * max(gain(row) for _, row in shown))
    axis.axvline(1, color="0.4", linewidth=1)
    axis.set_xlabel("times as fast, or as small, as the peer named in gray (logarithmic)", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def decoding(rows: Mapping[str, Row]) -> Figure:
    """Milliseconds per token by context, for a whole model and for cache and attention alone."""
    figure = Figure(figsize=(8, 3.4))
    for axis, what, title in zip(
        figure.subplots(1, 2), ("model", "attention"), ("the model", "cache and attention"), strict=True
    ):
        found = [
            (int(key.split(".")[2]), row)
            for key, row in rows.items()
            if key.startswith(f"decode.{what}.") and not key.endswith("bare")
        ]
        bare = [
            (int(key.split(".")[2]), row)
            for key, row in rows.items()
            if key.startswith(f"decode.{what}.") and key.endswith("bare")
        ]
        for points, label, style in (
            ([(x, row.ours) for x, row in found], "here", "o-"),
            ([(x, row.theirs) for x, row in found], "KVCache", "s--"),
            ([(x, row.theirs) for x, row in bare], "prepared K/V, no cache", "^:"),
        ):
            if not points:
                continue
            axis.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens of context")
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("milliseconds per token")
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return figure


def curve(told: Curve) -> Figure:
    """Draws lines over the same x axis."""
    figure = Figure(figsize=(8, 3.8))
    axis = figure.subplots()
    for index, (name, values) in enumerate(told.lines.items()):
        axis.plot(told.x, values, label=name, linewidth=2 if index == 0 else 1.2)
    axis.set_xlabel(told.x_label)
    axis.set_ylabel(told.y_label)
    axis.set_title(told.title, fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def bits(rows: Mapping[str, Row]) -> Figure:
    """Bytes against how far predictions move, for each choice of bit widths."""
    figure = Figure(figsize=(7, 4))
    axis = figure.subplots()
    for name, share in formats(rows):
        nats = {text: divergence(rows, text, name) for text in ("topics", "gemma3")}
        if "," in name or nats["topics"] is None:
            continue
        alike = " and " not in name
        color = "C0" if alike else "C1"
        axis.scatter(share, nats["topics"], color=color)
        if nats["gemma3"] is not None:
            axis.scatter(share, nats["gemma3"], facecolors="none", edgecolors=color)
        axis.annotate(
            name,
            (share, nats["topics"]),
            xytext=(-6 if alike else 6, -3),
            textcoords="offset points",
            ha="right" if alike else "left",
            fontsize=8,
        )
    axis.set_yscale("log")
    axis.set_xlim(0.1, 0.6)
    axis.set_xlabel("bytes of keys and values, as a share of float16")
    axis.set_ylabel("KL divergence from float, nats")
    title = "dots: SmolLM2, circles: Gemma 3; blue: one width, orange: one for keys and one for values"
    axis.set_title(title, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


WAYS = {
    "0": "spliced",
    "0.05": "spliced, 5 % computed again",
    "0.15": "spliced, 15 % computed again",
    "lost": "text after the change lost",
}
"""What was measured of a changed prompt, by the last part of a row's key."""


def splices(rows: Mapping[str, Row]) -> Figure:
    """How far predictions are from a fresh computation's, for each change of a prompt."""
    figure = Figure(figsize=(8, 4))
    axis = figure.subplots()
    found = changes(rows)
    names = list(dict.fromkeys(name for name, _ in found))
    for index, (way, label) in enumerate(WAYS.items()):
        values = [rows[f"splice.divergence.{found[name, way]}"].ours for name in names]
        color = "C1" if way == "lost" else f"C{0 if index == 0 else index + 1}"
        size = 30 if way in ("0", "lost") else 14
        axis.scatter(values, range(len(names)), label=label, color=color, s=size)
    axis.set_xscale("log")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("KL divergence from a fresh computation, mean of 255 tokens, nats")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def changes(rows: Mapping[str, Row]) -> dict[tuple[str, str], str]:
    """The changes of prompts and the ways that were measured, each with the end of its rows' keys."""
    found = {}
    for key, row in rows.items():
        if key.startswith("splice.loss."):
            end = key.removeprefix("splice.loss.")
            way = next(way for way in ("0.05", "0.15", "lost", "0") if end.endswith(f".{way}"))
            name, _, _ = row.work.rpartition(", ")
            found[name, way] = end
    return found


TEXTS = {
    "topics": "SmolLM2-135M-Instruct on the first 2,048 tokens of `pydoc_data.topics`",
    "code": "SmolLM2-135M-Instruct on the first 2,048 tokens of the source of `argparse`",
    "gemma3": "Gemma 3 270M, which has a window of 512 tokens in 15 of its 18 layers, on the first 1,024 "
    "tokens of `pydoc_data.topics`",
}
"""Where bit widths were measured, by the part of the rows' keys."""


def formats(rows: Mapping[str, Row]) -> list[tuple[str, float]]:
    """Each choice of bit widths, and its share of float16's bytes."""
    found, begin = [], "bits.bytes.topics."
    for key, row in rows.items():
        if key.startswith(begin):
            assert row.ratio is not None
            found.append((key.removeprefix(begin), row.ratio))
    return found


def divergence(rows: Mapping[str, Row], text: str, end: str) -> float | None:
    """The KL divergence from float in nats, by the end of its row's key; None if not measured."""
    row = rows.get(f"bits.divergence.{text}.{end}")
    return None if row is None else row.ours


def loss(rows: Mapping[str, Row], text: str, end: str) -> float | None:
    """The increase of the loss on a text in per cent, by the end of its row's key; None if not measured."""
    row = rows.get(f"bits.loss.{text}.{end}")
    return None if row is None or row.ratio is None else 100 * (row.ratio - 1)
