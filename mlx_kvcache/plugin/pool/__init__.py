"""Pools of cells that all prompt caches of a model share, and the conversations in them.

A conversation is a sequence with limits that can be rewound, forked, shifted and closed. This package
does not know how a model is called.
"""
