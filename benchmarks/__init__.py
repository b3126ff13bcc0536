"""Figures about this package, each beside a peer in the same run."""
