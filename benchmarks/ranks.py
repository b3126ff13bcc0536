"""Estimates the memory and the time per token of a model that is split over several ranks.

The estimate is for decoding one sequence: for each token, every rank reads its weights and its
keys and values once, and waits for the messages of the other ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

RECORD = 1024
"""The size in bytes of the record that ranks exchange before each call of the model."""


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder without experts, such as mlx-lm's llama.

    Attributes:
        weight_bytes, cache_bytes, sent_bytes: bytes for each weight, for each element of K or V,
            and for each element sent.
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
        """The number of weights in a layer."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.hidden * self.intermediate

    @property
    def outer_weights(self) -> int:
        """The number of weights in the output head.

        Each rank holds and reads all of them. The embedding is held, but not read whole.
        """
        return self.hidden * self.vocabulary

    @property
    def kv_per_token(self) -> float:
        """Bytes for the keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.cache_bytes


@dataclass(frozen=True)
class Link:
    """A link between neighbors in a ring: latency in seconds, bandwidth in bytes per second."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Chip:
    """The hardware of one rank.

    Attributes:
        reads: memory bandwidth in bytes per second.
        flops: multiplications and additions per second.
        memory: bytes for weights and caches.
    """

    reads: float
    flops: float
    memory: float


def flops_per_token(model: Model, context: int) -> float:
    """Multiplications and additions for a token after `context` tokens, over all ranks."""
    weights = model.layers * model.layer_weights + model.outer_weights
    return 2 * weights + 4 * model.layers * model.heads * model.head_dim * context


def weight_bytes(model: Model, ranks: int) -> float:
    """Bytes of a rank's weights: its share of the layers, and the whole embedding and head."""
    shared = model.layers * model.layer_weights / ranks
    return (shared + 2 * model.outer_weights) * model.weight_bytes


def tokens_held(model: Model, chip: Chip, ranks: int) -> float:
    """The number of tokens that fit beside the weights, if heads or layers divide evenly."""
    free = chip.memory - weight_bytes(model, ranks)
    return max(0.0, free / (model.kv_per_token / ranks))


def all_sum(link: Link, ranks: int, size: float) -> float:
    """Seconds for an all-sum of `size` bytes in a ring: each rank sends a share 2 (N - 1) times."""
    steps = 2 * (ranks - 1)
    return steps * (link.latency + size / ranks / link.bandwidth)


def all_gather(link: Link, ranks: int, size: float) -> float:
    """Seconds for an all-gather of `size` bytes from each rank in a ring."""
    return (ranks - 1) * (link.latency + size / link.bandwidth)


def bytes_sent(model: Model, way: str, ranks: int) -> float:
    """Bytes that a rank sends for one token, including the exchange of records."""
    state, vote = model.hidden * model.sent_bytes, (ranks - 1) * RECORD
    if way == "tensor":
        return 2 * model.layers * 2 * (ranks - 1) / ranks * state + vote
    return state + (ranks - 1) * state + vote


def waiting(model: Model, way: str, ranks: int, link: Link) -> float:
    """Seconds per token spent on communication: sums or transfers, and the exchange of records."""
    if ranks == 1:
        return 0.0
    state = model.hidden * model.sent_bytes
    vote = all_gather(link, ranks, RECORD)
    if way == "tensor":
        # After attention and after the feed-forward part of each layer.
        return 2 * model.layers * all_sum(link, ranks, state) + vote
    return (ranks - 1) * (link.latency + state / link.bandwidth) + all_gather(link, ranks, state) + vote


def computing(model: Model, way: str, ranks: int, chip: Chip, context: int) -> float:
    """Seconds per token spent on computation: the larger of reading memory and multiplying."""
    at_once = ranks if way == "tensor" else 1
    layers = model.layers * model.layer_weights / at_once
    read = (layers + model.outer_weights) * model.weight_bytes + model.kv_per_token * context / at_once
    multiplied = 2 * (layers + model.outer_weights)
    multiplied += 4 * model.layers * model.heads * model.head_dim * context / at_once
    return max(read / chip.reads, multiplied / chip.flops)


def seconds_per_token(model: Model, way: str, ranks: int, chip: Chip, link: Link, context: int) -> float:
    """Seconds per token of one sequence after `context` tokens. Pipeline ranks work one after another."""
    return computing(model, way, ranks, chip, context) + waiting(model, way, ranks, link)
