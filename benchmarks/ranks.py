"""How bytes and times of a model grow with the ranks that it is split over, on paper.

One token at a time, which is what generating for one reader is: every rank reads its weights and
its keys and values once for each token, and waits for what the others send.
"""

from __future__ import annotations

from dataclasses import dataclass

RECORD = 1024
"""Bytes in which each rank tells the others what it is about to do, once for each call of the model."""


@dataclass(frozen=True)
class Model:
    """A decoder without experts, as mlx-lm's llama.

    Attributes:
        weight_bytes, cache_bytes, sent_bytes: bytes of a weight, of an element of K or V, and of one
            that is sent.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    weight_bytes: float
    cache_bytes: float = 2
    sent_bytes: float = 2

    @property
    def layer_weights(self) -> int:
        """Weights of a layer."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.hidden * self.intermediate

    @property
    def outer_weights(self) -> int:
        """Weights of the head, which each rank has and reads whole; the embedding is only looked up."""
        return self.hidden * self.vocabulary

    @property
    def kv_per_token(self) -> float:
        """Bytes of keys and values of a token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.cache_bytes


@dataclass(frozen=True)
class Link:
    """Between neighbors in a ring: seconds that a message takes at least, and bytes per second."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Chip:
    """One machine.

    Attributes:
        reads: bytes per second from its memory.
        flops: multiplications and additions per second.
        memory: bytes for weights and caches.
    """

    reads: float
    flops: float
    memory: float


def flops_per_token(model: Model, context: int) -> float:
    """Multiplications and additions of a token after `context` others, in all ranks together."""
    weights = model.layers * model.layer_weights + model.outer_weights
    return 2 * weights + 4 * model.layers * model.heads * model.head_dim * context


def weight_bytes(model: Model, ranks: int) -> float:
    """Bytes of a rank's weights, split in either way: its share of the layers; embedding and head whole."""
    shared = model.layers * model.layer_weights / ranks
    return (shared + 2 * model.outer_weights) * model.weight_bytes


def tokens_held(model: Model, chip: Chip, ranks: int) -> float:
    """How many tokens' keys and values fit beside the weights, where heads or layers can be dealt out."""
    free = chip.memory - weight_bytes(model, ranks)
    return max(0.0, free / (model.kv_per_token / ranks))


def all_sum(link: Link, ranks: int, size: float) -> float:
    """Seconds to add up `size` bytes in a ring: each rank sends a share 2 (N - 1) times."""
    steps = 2 * (ranks - 1)
    return steps * (link.latency + size / ranks / link.bandwidth)


def all_gather(link: Link, ranks: int, size: float) -> float:
    """Seconds until every rank has `size` bytes of every other one."""
    return (ranks - 1) * (link.latency + size / link.bandwidth)


def bytes_sent(model: Model, way: str, ranks: int) -> float:
    """Bytes that a rank sends for one token, the vote included."""
    state, vote = model.hidden * model.sent_bytes, (ranks - 1) * RECORD
    if way == "tensor":
        return 2 * model.layers * 2 * (ranks - 1) / ranks * state + vote
    return state + (ranks - 1) * state + vote


def waiting(model: Model, way: str, ranks: int, link: Link) -> float:
    """Seconds of a token in which ranks wait for each other: sums or handing over, and the vote."""
    if ranks == 1:
        return 0.0
    state = model.hidden * model.sent_bytes
    vote = all_gather(link, ranks, RECORD)
    if way == "tensor":
        # After attention and after the feed-forward part of each layer.
        return 2 * model.layers * all_sum(link, ranks, state) + vote
    return (ranks - 1) * (link.latency + state / link.bandwidth) + all_gather(link, ranks, state) + vote


def computing(model: Model, way: str, ranks: int, chip: Chip, context: int) -> float:
    """Seconds of a token in which something is computed, wherever: the larger of reading and multiplying."""
    at_once = ranks if way == "tensor" else 1
    layers = model.layers * model.layer_weights / at_once
    read = (layers + model.outer_weights) * model.weight_bytes + model.kv_per_token * context / at_once
    multiplied = 2 * (layers + model.outer_weights)
    multiplied += 4 * model.layers * model.heads * model.head_dim * context / at_once
    return max(read / chip.reads, multiplied / chip.flops)


def seconds_per_token(model: Model, way: str, ranks: int, chip: Chip, link: Link, context: int) -> float:
    """Of one sequence after `context` tokens. A pipeline's ranks work one after the other."""
    return computing(model, way, ranks, chip, context) + waiting(model, way, ranks, link)
