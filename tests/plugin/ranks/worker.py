"""One rank: runs scenarios by name, in order, and says which it has passed."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

import mlx.core as mx

from tests.plugin.ranks import alike, disagreements, matrix
from tests.plugin.ranks.launch import TIMEOUT
from tests.plugin.ranks.setting import Setting

if __name__ == "__main__":
    # A hang shows where it is.
    faulthandler.dump_traceback_later(TIMEOUT - 10, exit=True)
    mx.set_default_device(mx.cpu)
    setting = Setting(mx.distributed.init(strict=True, backend="ring"), Path(sys.argv[1]))
    for name in sys.argv[2:]:
        scenario, _, argument = name.partition("=")
        found = next(getattr(m, scenario) for m in (alike, disagreements, matrix) if hasattr(m, scenario))
        found(setting, argument) if argument else found(setting)
        print("passed", name, flush=True)  # noqa: T201  # read by whoever launched this
