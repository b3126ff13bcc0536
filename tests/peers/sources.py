"""What the runs need: a host's tests, and a model that stands for those of the hub."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path


class Missing(Exception):
    """Something that the runs need is not there."""


def tests_of(host: str, version: str, folder: Path, given: Path | None) -> Path:
    """The folder with the tests of a host: the given one, or for mlx-lm that of its sdist."""
    if given is None and host == "mlx-lm":
        return _unpacked(version, folder)
    problem = "has no tests in its sdist" if given is None else f"has no tests (test_*.py) in {given}"
    if given is None or not any(given.glob("test_*.py")):
        raise Missing(
            f"{host} {version} {problem}; pass --tests FOLDER, such as the folder mlx_vlm/tests of a "
            "checkout of mlx-vlm's repository, at the same version if possible"
        )
    return given.absolute()


def _unpacked(version: str, folder: Path) -> Path:
    """The folder with the tests of a version of mlx-lm, downloaded and unpacked where it is missing."""
    tests = folder / f"mlx_lm-{version}" / "tests"
    if tests.exists():
        return tests
    sdist = folder / f"mlx_lm-{version}.tar.gz"
    if not sdist.exists():
        sys.stdout.write(f"downloading the sdist of mlx-lm {version}\n")
        sys.stdout.flush()
        command = ["download", "--quiet", "--no-deps", "--no-binary", "mlx-lm", "--dest", str(folder)]
        done = subprocess.run([sys.executable, "-m", "pip", *command, f"mlx-lm=={version}"], check=False)
        if done.returncode or not sdist.exists():
            raise Missing(f"pip could not download the sdist of mlx-lm {version}; expected {sdist}")
    with tarfile.open(sdist) as archive:
        # Not the package, which Python might import instead of the installed one.
        members = [m for m in archive if m.name.startswith(f"mlx_lm-{version}/tests/")]
        if not members:
            raise Missing(f"the sdist of mlx-lm {version} has no tests: {sdist}")
        # Renamed at the end: what an interrupt left would be taken for all of the tests.
        unfinished = folder / "unfinished"
        archive.extractall(unfinished, members, filter="data")
    (unfinished / f"mlx_lm-{version}").rename(tests.parent)
    return tests


def chosen(tests: Path, names: Sequence[str] | None) -> list[str]:
    """The names of the test files to run, all by default."""
    there = sorted(path.name for path in tests.glob("test_*.py"))
    if unknown := set(names or ()) - set(there):
        raise Missing(f"{tests} has no test files {sorted(unknown)}; it has {', '.join(there)}")
    return list(names or there)


def model(folder: Path) -> Path:
    """The folder of SmolLM2, written where it is missing."""
    path = folder / "smollm2"
    if not path.exists():
        sys.stdout.write("writing SmolLM2 as a folder for mlx-lm (538 MB)\n")
        sys.stdout.flush()
        unfinished = folder / "smollm2.unfinished"
        done = subprocess.run([sys.executable, "-m", "examples.smollm2", str(unfinished)], check=False)
        if done.returncode:
            raise Missing("SmolLM2 could not be written; see the message above")
        unfinished.rename(path)
    return path


def environment(host: str, tests: Path, model: Path, root: Path) -> dict[str, str]:
    """Variables of both runs."""
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    # Threads of OpenBLAS wait for each other by spinning. Nothing is asked of the hub.
    fixed = {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    own = {"PEERS_HOST": host, "PEERS_TESTS": str(tests), "PEERS_MODEL": str(model), "PYTHONPATH": path}
    return fixed | own
