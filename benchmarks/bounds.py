"""Defines the bounds that benchmark results must meet, in full and in quick runs."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.rows import Row


class Bound(NamedTuple):
    """A bound on a row.

    Attributes:
        limit: the bound for a full run: a minimum for kind "speed", a maximum otherwise.
        quick: the bound for a quick run, wide enough for a busy machine; None for no bound.
        of_value: whether the bound is on the row's value instead of its ratio.
        reason: why the bound is not met, if known.
        is_of_blas: whether on a CPU its BLAS alone decides if the bound is met.
        wanted: what is wanted instead of the limit, which is the figure of today.
    """

    limit: float
    quick: float | None = None
    of_value: bool = False
    reason: str = ""
    is_of_blas: bool = False
    wanted: float | None = None

    def limit_of(self, is_quick: bool) -> float | None:
        """The bound for this kind of run, or None."""
        return self.quick if is_quick else self.limit

    def is_met(self, row: Row, is_quick: bool = False) -> bool:
        limit, figure = self.limit_of(is_quick), self.figure(row)
        return limit is None or (figure >= limit if row.kind == "speed" else figure <= limit)

    def figure(self, row: Row) -> float:
        """The figure of the row that is compared with the bound."""
        if self.of_value:
            return row.ours
        assert row.ratio is not None
        return row.ratio


OPERATIONS = (
    "two assignments and two slices a layer, and nothing else, are about as fast as the bound (the rows "
    "`its four operations`), so that any bookkeeping misses it. `mx.slice` is built faster, but copies."
)
FAR = (
    "this text repeats what was said more than 1,024 tokens ago, which full attention finds and no cache of "
    "that size can hold: an exact window of 1,024 misses the bound, too."
)
NOISE = (
    "the model takes nine tenths of this step, and its time varies by more than the cache's share from run "
    "to run; cache and attention alone are faster than the peer's."
)
SHORT = (
    "MLX's own attention multiplies one row at a time, for which OpenBLAS has a short way on processors with "
    "AVX-512, up to some 1,200 keys: it is then about as fast as the products here, to which the cache comes."
)
LOADING = "the prompt is there after a fifth of it; then the model is loaded, and reads its first tokens."
SMALL = "an update of 256 tokens' cache is not small beside attention to them."


def aim(limit: float, wanted: float, of_value: bool = False) -> Bound:
    """A bound on a count: what it is now, until it is what is wanted."""
    return Bound(limit, limit, of_value, wanted=wanted)


COUNTS = {
    "graph.one": Bound(1.0, 1.0),
    "graph.window": Bound(1.0, 1.0),
    "graph.chunks": Bound(0.9, 0.9),
    "graph.hybrid": Bound(0.98, 0.98),
    "graph.fork": Bound(1.0, 1.0),
    "graph.packed": aim(1.39, 1.0),
    "graph.packed.half": Bound(1.0, 1.0),
    "graph.packed.half.4": aim(1.31, 1.12),
    "graph.batch.2": Bound(0.93, 0.93),
    "graph.batch.8": Bound(0.93, 0.93),
    "graph.batch.32": Bound(0.93, 0.93),
    "graph.alike.8": Bound(0.93, 0.93),
    "graph.ragged.2": aim(1.14, 1.10),
    "graph.ragged.8": Bound(1.14, 1.14),
    "graph.ragged.32": Bound(1.14, 1.14),
    "graph.windows.8": Bound(0.82, 0.82),
    "graph.packed.8": aim(1.95, 1.5),
    "graph.forks.8": Bound(1.25, 1.25),
    "graph.forks.stored": Bound(1.25, 1.25),
    "graph.forks.stored.2": aim(1.68, 1.5),
    "graph.forks.stored.8": aim(2.27, 1.5),
    "graph.many.1": Bound(0.93, 0.93),
    "graph.many.8": Bound(0.93, 0.93),
    "calls.many.1": Bound(12.8, 12.8, of_value=True),
    "calls.many.8": Bound(28.1, 28.1, of_value=True),
    "calls.one": Bound(9.5, 9.5, of_value=True),
    "calls.window": Bound(9.8, 9.8, of_value=True),
    "calls.fork": Bound(9.5, 9.5, of_value=True),
    "calls.packed": aim(35.4, 10, of_value=True),
    "calls.batch.8": Bound(16.3, 16.3, of_value=True),
    "calls.batch.32": Bound(18.3, 18.3, of_value=True),
    "calls.ragged.8": Bound(40.4, 40.4, of_value=True),
    "calls.forks.8": Bound(41.3, 41.3, of_value=True),
    "evaluations.one.most": Bound(1, 1, of_value=True),
    "evaluations.batch.8.most": Bound(1, 1, of_value=True),
    "evaluations.batch.8.living.most": Bound(1, 1, of_value=True),
}
"""Bounds on counts, which are the same on every machine: the figures of today, so that none rises."""

BOUNDS = COUNTS | {
    "graph.time.one.256": Bound(0.8, wanted=1.0),
    "graph.time.one.4096": Bound(0.8, wanted=1.0),
    "graph.time.batch.8.256": Bound(0.8, wanted=1.0),
    "graph.time.batch.8.4096": Bound(0.8, wanted=1.0),
    "graph.time.one.256.36": Bound(0.9, wanted=1.0),
    "graph.time.batch.8.256.36": Bound(0.9, wanted=1.0),
    "chat.prompt": Bound(3.0, of_value=True),
    "chat.started": Bound(5.0, of_value=True, reason=LOADING),
    "chat.key": Bound(50.0, of_value=True),
    "decode.model.256": Bound(1.0, 0.85, reason=NOISE),
    "decode.model.1024": Bound(1.0, reason=SHORT, is_of_blas=True),
    "decode.model.2048": Bound(1.0, 0.85),
    "decode.model.4096": Bound(1.0),
    "decode.model.16384": Bound(1.0),
    "decode.model.256.bare": Bound(0.97, 0.85),
    "decode.model.1024.bare": Bound(0.97, reason=SHORT, is_of_blas=True),
    "decode.model.2048.bare": Bound(0.97, 0.85),
    "decode.model.4096.bare": Bound(0.97),
    "decode.model.16384.bare": Bound(0.97),
    "decode.attention.256": Bound(1.0, 0.85),
    "decode.attention.1024": Bound(1.0, reason=SHORT, is_of_blas=True),
    "decode.attention.2048": Bound(1.0, 0.85),
    "decode.attention.4096": Bound(1.0),
    "decode.attention.16384": Bound(1.0),
    "decode.attention.256.bare": Bound(0.97, 0.75, reason=SMALL),
    "decode.attention.1024.bare": Bound(0.97, reason=SHORT, is_of_blas=True),
    "decode.attention.2048.bare": Bound(0.97, 0.85),
    "decode.attention.4096.bare": Bound(0.97),
    "decode.attention.16384.bare": Bound(0.97),
    "prefill.1024": Bound(1.0, 0.85),
    "prefill.4096": Bound(1.0),
    "growth.512": Bound(1.13, 1.13, of_value=True),
    "growth.64": Bound(1.13, of_value=True),
    "growth.1": Bound(1.13, of_value=True),
    "window.decode": Bound(1.0, 0.85, reason=SHORT, is_of_blas=True),
    "window.plugin": Bound(1.0, 0.85, reason=SHORT, is_of_blas=True),
    "window.rewind": Bound(100, 20),
    "edits.remove": Bound(50, 10),
    "hybrid.rollback": Bound(1 / 0.35, 1.5),
    "hybrid.restore": Bound(2.0, 1.2),
    "hybrid.prefill": Bound(0.97, 0.8),
    "hybrid.decode": Bound(0.98, 0.8, reason=NOISE),
    "hybrid.primitives": Bound(1.0, 1.0),
    "forks.16": Bound(15, 1.5),
    "forks.16.bytes": Bound(1 / 50, 1 / 10),
    "batches.short": Bound(0.97, 0.75),
    "batches.equal": Bound(1.04, 0.75, reason=SHORT, is_of_blas=True),
    "batches.ragged": Bound(2.5, 1.5),
    "many.throughput": Bound(1.0, 0.75),
    "many.decode": Bound(0.95, 0.6, wanted=1.0),
    "many.stall": Bound(1.0),
    "saving.shared.bytes": Bound(1.1, 1.1),
    "agent.computed": Bound(1.15),
    "agent.wait": Bound(10),
    "host.evaluated.256": Bound(1 / 0.8, reason=OPERATIONS),
    "host.evaluated.4096": Bound(1 / 0.8, reason=OPERATIONS),
    "host.evaluated.16384": Bound(1 / 0.8, reason=OPERATIONS),
    "host.evaluated.1024": Bound(1 / 0.8, 0.8, reason=OPERATIONS),
    "endless.below.shift": Bound(1.03, reason=FAR),
    "endless.after.shift": Bound(1.03),
}
"""Bounds by the key of the row."""
