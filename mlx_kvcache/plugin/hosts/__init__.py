"""What a host is: its cache classes, how its models are called and attend, and its files.

The only place that replaces functions and classes of a model. It must not know pools or forwards.
"""
