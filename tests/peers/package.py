"""A pytest plugin: the folder in PEERS_TESTS is the package `tests` of the host.

Tests import helpers from there. The rest of the host is its installed package, not the checkout around that
folder.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

_tests = ModuleType(f"{os.environ['PEERS_HOST'].replace('-', '_')}.tests")
_tests.__path__ = [os.environ["PEERS_TESTS"]]
sys.modules[_tests.__name__] = _tests
