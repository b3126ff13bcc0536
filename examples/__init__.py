"""Runnable examples: python -m examples.01_causal, and so on."""
