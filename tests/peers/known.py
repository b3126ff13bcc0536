"""Tests of hosts that pass on their own caches and cannot pass on this package's, and why."""

from __future__ import annotations

_MLX_LM = {
    "test_evaluate.py::TestMLXLM::test_loglikelihood_rolling_mixed_lengths_is_independent_of_batch_size": (
        "the test's model is a plain class without parameters or layers, for which attach raises TypeError."
    ),
    "test_generate.py::TestGenerate::test_batch_max_kv_size_none_creates_regular_cache": (
        "the test asks for an instance of mlx-lm's own KVCache."
    ),
    "test_models.py::TestModels::test_deepseek_v41": (
        "the model caches in a class of its own, LayerCache, which is not supported: attach raises "
        "NotSupportedError."
    ),
    "test_server.py::TestServerKVCacheQuantization::test_completion_quantizes_the_cache": (
        "the test asks for an instance of mlx-lm's own QuantizedKVCache."
    ),
}

_NO_MODULE = "the test's model is a plain class, for which attach raises TypeError."
_NO_LAYERS = (
    "the test's model is a SimpleNamespace without layers: attached, the server and the check of drafters "
    "first make a cache for the model."
)
_MLX_VLM = {
    f"{file}::{name}": reason
    for file, reason, names in (
        (
            "test_generate.py",
            _NO_MODULE,
            (
                "TestBatchGenerator::test_make_cache_converts_left_padded_pooling_cache",
                "TestBatchTurboQuantizedKVStart::test_default_preserves_immediate_quantization",
                "TestBatchTurboQuantizedKVStart::test_defers_to_float_below_threshold",
                "TestBatchTurboQuantizedKVStart::test_immediate_when_start_zero",
                "TestBatchTurboQuantizedKVStart::test_quantizes_at_or_above_threshold",
            ),
        ),
        (
            "test_server.py",
            _NO_LAYERS,
            (
                "test_server_caches_apc_mode_when_model_initializes",
                "test_server_demotes_incompatible_mtp_drafter_to_ar",
                "test_server_includes_processor_specific_stop_tokens",
                "test_server_serves_ar_requests_after_drafter_mismatch",
            ),
        ),
        (
            "test_speculative.py",
            _NO_LAYERS,
            (
                "test_drafter_compatibility_ignores_unknown_backbone_free_drafters",
                *(
                    f"test_mtp_drafter_compatibility_accepts_matching_target[{name}]"
                    for name in (
                        "gemma4-backbone-hidden-size",
                        "gemma4-unified-backbone-hidden-size",
                        "target-hidden-size",
                        "text-config-hidden-size",
                    )
                ),
            ),
        ),
    )
    for name in names
}

TOO_LARGE = {
    "mlx-lm": frozenset(
        f"test_models.py::TestModels::test_{name}"
        for name in ("cohere", "cohere2", "gpt_neox", "gptj", "phi3", "qwen")
    ),
    "mlx-vlm": frozenset[str](),
}
"""Tests that the attached run leaves out. They make models of up to 35 billion random weights and never
compute them. A call on these caches starts to compute what it stores, because other threads may use it."""

KNOWN = {
    host: reasons
    | dict.fromkeys(TOO_LARGE[host], "the model needs more memory than most machines have; see TOO_LARGE.")
    for host, reasons in (("mlx-lm", _MLX_LM), ("mlx-vlm", _MLX_VLM))
}
"""Reasons by host and test: `file::class::name`. A fault of this package is mended, not listed."""
