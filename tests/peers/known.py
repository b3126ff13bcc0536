"""Tests of hosts that pass on their own caches and cannot pass on this package's, and why."""

from __future__ import annotations

_MLX_LM = {
    "test_evaluate.py::TestMLXLM::test_loglikelihood_rolling_mixed_lengths_is_independent_of_batch_size": (
        "the test's model is a plain class without parameters or layers, for which attach raises TypeError."
    ),
    "test_generate.py::TestGenerate::test_batch_max_kv_size_none_creates_regular_cache": (
        "the test asks for an instance of mlx-lm's own KVCache."
    ),
    "test_generate.py::TestGenerate::test_batch_max_kv_size_creates_rotating_cache": (
        "of mlx-lm 0.31: the test asks for an instance of its own RotatingKVCache; here it is a capacity."
    ),
    "test_models.py::TestModels::test_deepseek_v41": (
        "the model caches in a class of its own, LayerCache, which is not supported: attach raises "
        "NotSupportedError."
    ),
    "test_server.py::TestServerKVCacheQuantization::test_completion_quantizes_the_cache": (
        "the test asks for an instance of mlx-lm's own QuantizedKVCache."
    ),
}

_MLX_VLM = {
    "test_models.py::TestCohereCompass::test_batched_padding_matches_single_rows": (
        "the model takes a batch's padding from `attention_mask` only if entries have `left_padding`, as "
        "those of mlx-vlm's batches have; the test does not pass it to `_make_cache`."
    ),
    "test_models.py::TestInklingMTP::test_rollback_restore_replay": (
        "the model assigns to the `state` of its caches to drop what a drafter of kind mtp proposed; such "
        "drafters are refused on these caches."
    ),
    "test_models.py::TestLongcatFlashNgramModel::test_native_loader_ngram_context_and_dual_cache": (
        "called with a cache, the whole model writes a recurrent state before its language model is called, "
        "which raises CacheError."
    ),
    "test_models.py::TestModels::test_deepseek_v4_language_model": (
        "the model caches in PoolingCache, which is not supported: attach raises NotSupportedError."
    ),
    "test_models.py::TestModels::test_nemotron_parse": (
        "the model caches in SimpleKVCache, which is not supported: attach raises NotSupportedError."
    ),
    "test_turboquant.py::test_batch_generator_accepts_scheme_overrides": (
        "the test looks for the names of parameters that the replaced `_make_cache` takes as **kwargs."
    ),
} | dict.fromkeys(
    (
        "test_apc_exact_mode.py::test_clone_preserves_layer_count_and_types",
        *(
            f"test_apc_exact_mode.py::test_apc_exact_{name}[_make_tiny_{model}]"
            for name in (
                "longer_prefix_store_restore",
                "lookup_misses_on_wrong_prefix",
                "restore_does_not_corrupt_stored_entry",
                "restored_cache_generates_tokens",
                "store_and_restore_returns_cache",
                "warm_to_warm_produces_identical_output",
            )
            for model in ("gemma4", "qwen35")
        ),
    ),
    "the test copies caches by functions of mlx-vlm's prefix cache, which is replaced for attached models.",
)

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
