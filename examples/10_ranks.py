"""Runs a model on several ranks, each with a shard of the cache, and compares it with one process.

    mlx.launch -n 2 --backend ring -- .venv/bin/python -m examples.10_ranks
    mlx.launch -n 4 --backend ring -- .venv/bin/python -m examples.10_ranks pipeline

Without mlx.launch there is one rank.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen2

from mlx_kvcache import RanksDisagreeError
from mlx_kvcache.plugin import PromptCache, make_prompt_cache

# SmolLM2's 3 KV heads cannot be divided by 2 or 4, so these models have 8. mlx-lm pipelines Qwen2, not Llama.
SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}


def models(way: str, group: mx.distributed.Group) -> tuple[nn.Module, nn.Module]:
    """Make a model with random weights, the same on every rank, and this rank's shard of it."""
    mx.random.seed(0)
    module = qwen2 if way == "pipeline" else llama
    whole = module.Model(module.ModelArgs.from_dict({"model_type": way, **SIZES}))
    mx.eval(whole.parameters())
    part = copy.deepcopy(whole)
    if way == "pipeline":
        part.model.pipeline(group)
    else:
        part.shard(group)
    return whole, part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("way", nargs="?", default="tensor", choices=("tensor", "pipeline"))
    way = parser.parse_args().way
    # Different devices add in different orders, so all ranks use the CPU.
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init()
    whole, part = models(way, group)
    one, ours = make_prompt_cache(whole), make_prompt_cache(part, group=group)

    def told(what: str, tokens: list[int], one: PromptCache, ours: PromptCache) -> None:
        """Read tokens with both models and print the difference of their logits."""
        expected, found = whole(mx.array([tokens]), cache=one), part(mx.array([tokens]), cache=ours)
        mx.eval(expected, found)
        worst = mx.abs(expected - found).max().item()
        if group.rank() == 0:
            print(f"{what:<28} {ours.position:4} tokens, logits differ by {worst:.1e}", flush=True)

    told("a prompt", list(range(1, 201)), one, ours)
    told("a token", [7], one, ours)
    one.rewind(50)
    ours.rewind(50)
    told("rewound by 50", [8, 9], one, ours)
    branch = one.fork(), ours.fork()
    told("a fork", [10, 11], *branch)
    one.remove(20, 80)
    ours.remove(20, 80)
    told("[20, 80) removed", [12], one, ours)
    with tempfile.TemporaryDirectory() as folder:
        ours.save(Path(folder) / "chat.safetensors")
        (file,) = Path(folder).iterdir()
        loaded = PromptCache.load(Path(folder) / "chat.safetensors", part, group=group)
    told("saved and loaded", [13], one.fork(), loaded)

    print(
        f"rank {group.rank()} of {group.size()}: {ours.nbytes:,} of {one.nbytes:,} bytes in "
        f"{len(ours)} layers, file {file.name}",
        flush=True,
    )
    try:
        # Rank 0 rewinds fewer tokens than the others.
        ours.rewind(3 if group.rank() else 2)
    except RanksDisagreeError as error:
        print(f"rank {group.rank()}: {error}", flush=True)
    else:
        one.rewind(2)
    told("afterwards", [14], one, ours)


if __name__ == "__main__":
    main()
