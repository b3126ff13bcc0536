"""The cells that all prompt caches of a model share, and the conversations in them.

A conversation is a sequence with limits: it is rewound, forked, shifted and closed here. It must not
know how a model is called.
"""
