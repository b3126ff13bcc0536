"""Garbage collection at any line of what has locks or tables: nothing waits, nothing is lost."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

SETUP = """
    import gc, sys
    import mlx.core as mx
    mx.set_default_device(mx.cpu)
    from mlx_lm.models import base, llama
    from mlx_kvcache.plugin import attach, detach, make_prompt_cache
    from mlx_kvcache.plugin.hosts import handles
    from tests.plugin.tiny import tiny_llama
    gc.disable()
    # What is here already need not be looked at in every collection.
    gc.freeze()
    model, tokens = tiny_llama(), mx.array([[1, 2, 3]])

    def garbage():
        '''Caches that only a collection finds, of the model and sometimes of one that is attached.'''
        cycle = [make_prompt_cache(model, rewind=9)]
        if len(seen) % 30 == 1:
            other = tiny_llama()
            attach(other)
            cycle += [make_prompt_cache(other), other]
        cycle.append(cycle)

    NAMES = "attach", "conversation", "observe", "pool", "probe", "handles", "trial"
    FILES = tuple(f"/{name}.py" for name in NAMES)

    def trace(frame, event, arg):
        return collect if frame.f_code.co_filename.endswith(FILES) else None

    seen = set()

    def collect(frame, event, arg):
        where = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and where not in seen:
            seen.add(where)
            sys.settrace(None)
            garbage()
            gc.collect()
            sys.settrace(trace)
        return collect

    def traced(act):
        sys.settrace(trace)
        try:
            return act()
        finally:
            sys.settrace(None)
"""

ACTS = """
    cache = traced(lambda: make_prompt_cache(model, capacity=9, overflow="shift"))
    traced(lambda: model(tokens, cache=cache))
    traced(lambda: (attach(model), detach(model)))
    traced(cache.close)
    caches = [make_prompt_cache(model, rewind=3)]
    traced(caches.clear)
"""

ENDS = """
    cache = None
    gc.collect()
    assert len(seen) > 150, len(seen)
    assert type(model) is llama.Model, type(model)
    assert not handles._users[llama.__name__]
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention
    assert sys.modules["mlx_lm.models.cache"].make_prompt_cache.__module__ == "mlx_lm.models.cache"
    print("all is put back")
"""


def test_a_collection_at_any_line_stops_nothing() -> None:
    program = dedent(SETUP + ACTS + ENDS)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.stdout, done.returncode) == ("all is put back\n", 0), done.stderr
