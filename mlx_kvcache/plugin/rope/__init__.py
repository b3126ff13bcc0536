"""Which rotation a model's cached keys carry, and how keys move to other positions without drift.

It must not know pools.
"""
