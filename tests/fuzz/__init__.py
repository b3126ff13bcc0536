"""Bytes and calls that nobody meant: whatever they are, a typed error or a right answer comes of them.

`python -m tests.fuzz --help` says how to run and to replay.
"""
