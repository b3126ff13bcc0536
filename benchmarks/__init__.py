"""Measures this package; each figure is compared with another implementation in the same run."""
