"""The file of arrays: what goes in comes out, for other readers too, whatever happens to the writers."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors

from mlx_kvcache import CacheFileError
from mlx_kvcache.persist.container import SIZES, Stored, read_arrays, read_contents, write

from .limits import reachable_folder, small_disk, small_files, unprivileged
from .samples import HEADER, assert_same, few, load, stored


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (0,), (2, 0, 3), (1, 1, 1, 1, 3)])
def test_round_trip(tmp_path: Path, shape: tuple[int, ...]) -> None:
    arrays = {f"of {dtype}": stored(dtype, *shape, seed=i) for i, dtype in enumerate(SIZES)}
    path = tmp_path / "a.safetensors"
    assert write(path, HEADER, arrays) == path.stat().st_size
    contents = read_contents(path)
    assert (contents.path, contents.header, contents.size) == (path, HEADER, path.stat().st_size)
    assert_same(dict(read_arrays(contents)), arrays)
    for entry in contents.entries.values():
        assert entry.begin % SIZES[entry.dtype] == 0


def test_without_arrays_and_with_odd_names(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, {}, {})
    assert load(path) == ({}, {})
    arrays = {name: stored("U8", i) for i, name in enumerate(["", "é", "a/b", '"', "\n", "header"])}
    write(path, {}, arrays)
    assert_same(load(path)[1], arrays)


def test_other_readers(tmp_path: Path) -> None:
    """mx.load knows all types but float64."""
    arrays = few() | {f"of {dtype}": stored(dtype, 2, 3) for dtype in SIZES}
    path = tmp_path / "a.safetensors"
    write(path, HEADER, arrays)
    theirs = {name: field for name, field in safetensors.deserialize(path.read_bytes()) if name != "checksum"}
    assert theirs.keys() == arrays.keys()
    for name, (dtype, shape, data) in arrays.items():
        assert (theirs[name]["dtype"], tuple(theirs[name]["shape"])) == (dtype, shape)
        assert bytes(theirs[name]["data"]) == data.tobytes()

    del arrays["of F64"]
    write(path, HEADER, arrays)
    loaded = mx.load(str(path))
    assert isinstance(loaded, dict) and loaded.keys() == arrays.keys() | {"checksum"}
    assert loaded["of BF16"].dtype == mx.bfloat16
    for name, (_, shape, data) in arrays.items():
        assert loaded[name].shape == shape
        if data.size:
            np.testing.assert_array_equal(loaded[name].reshape(-1).view(mx.uint8), data)


def test_chosen_arrays_in_the_order_asked_for(path: Path) -> None:
    contents = read_contents(path)
    assert list(contents.entries) == [f"array {i}" for i in (3, 0, 1, 4, 2, 5)]
    chosen = ["array 2", "array 0"]
    found = list(read_arrays(contents, chosen))
    assert [name for name, _ in found] == chosen
    assert_same(dict(found), {name: few()[name] for name in chosen})
    with pytest.raises(KeyError, match="nothing"):
        list(read_arrays(contents, ["nothing"]))


def test_arrays_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, {}, {f"{i}": stored("U8", 1 << 20, seed=i) for i in range(8)})
    contents = read_contents(path)
    tracemalloc.start()
    for _, array in read_arrays(contents):
        assert array.data.size == 1 << 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20


@pytest.mark.parametrize(
    ("header", "arrays", "message"),
    [
        ({"x": float("nan")}, {}, "not JSON compliant"),
        ({"x": float("inf")}, {}, "not JSON compliant"),
        ({}, {"checksum": stored("U8", 16)}, "array name 'checksum' is reserved"),
        ({}, {"__metadata__": stored("U8", 1)}, "array name '__metadata__' is reserved"),
        ({}, {"x": Stored("F8", (1,), np.zeros(1, np.uint8))}, "dtype 'F8'"),
        (
            {},
            {"x": Stored("F32", (3,), np.zeros(8, np.uint8))},
            r"has 8 bytes \(from 0 to 8\), but shape \[3\] of F32 takes 12",
        ),
        ({}, {"x": Stored("U8", (4,), np.zeros(8, np.uint8)[::2])}, "expected contiguous bytes"),
        ({}, {"x": Stored("U8", (2, 2), np.zeros((2, 2), np.uint8))}, r"\(2, 2\), expected contiguous bytes"),
        ({}, {"x": Stored("U8", (4,), np.zeros(4, np.int8))}, "'x' is int8"),
        ({}, {"x": Stored("U8", (2**31, 0), np.zeros(0, np.uint8))}, "numbers from 0 to 2147483647"),
        ({}, {"x": Stored("U8", (1,) * 65, np.zeros(1, np.uint8))}, "65 dimensions; the limit is 64"),
    ],
)
def test_what_cannot_be_held_is_not_written(
    path: Path, header: dict[str, Any], arrays: dict[str, Stored], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(path, header, arrays)
    assert_same(load(path)[1], few())


def test_a_head_too_long_to_be_read_is_not_written(path: Path) -> None:
    with pytest.raises(CacheFileError, match=r"the header takes 16,77.* bytes; the limit is 16,777,216"):
        write(path, {"x": "x" * (16 << 20)}, {})
    assert_same(load(path)[1], few())


@pytest.mark.parametrize("limit", ["disk", "file size"])
@pytest.mark.parametrize("old", [True, False])
def test_no_room(tmp_path: Path, limit: str, old: bool) -> None:
    """A full disk, and a limit that can be set everywhere."""
    path = tmp_path / "a.safetensors"
    big = {f"{i}": stored("U8", 1 << 18, seed=i) for i in range(8)}
    with small_disk(tmp_path) if limit == "disk" else small_files(1 << 20):
        if old:
            write(path, HEADER, few())
        with pytest.raises(
            CacheFileError, match=r"a\.safetensors: cannot be written \(209.* bytes\): "
        ) as error:
            write(path, HEADER, big)
        assert isinstance(error.value.__cause__, OSError)
        assert error.value.__cause__.errno == (errno.ENOSPC if limit == "disk" else errno.EFBIG)
        assert list(tmp_path.iterdir()) == [path] * old
        if old:
            assert_same(load(path)[1], few())


def test_permissions() -> None:
    with reachable_folder() as folder:
        path, secret = folder / "a.safetensors", folder / "secret.safetensors"
        left = folder / f".{path.name}.{0:012x}.part"
        for made in (path, secret):
            write(made, HEADER, few())
        left.write_bytes(b"half")
        secret.chmod(0)
        folder.chmod(0o500)
        with unprivileged():
            assert_same(load(path)[1], few())
            with pytest.raises(CacheFileError, match=r"written \(\d+ bytes\): Permission denied"):
                write(path, {}, {})
            with pytest.raises(CacheFileError, match=r"secret.*: cannot be read: Permission denied"):
                read_contents(secret)
        assert_same(load(path)[1], few())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "cannot be {}: No such file"),
        ("missing/a", "cannot be {}: No such file"),
        ("file/a", "cannot be {}: Not a directory"),
        ("x" * 300, "cannot be {}: File name too long"),
        ("a\0b", "null (byte|character)"),
    ],
)
def test_places_that_are_none(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheFileError, match=message.format("read")):
        read_contents(tmp_path / name)
    if name != "missing":
        with pytest.raises(CacheFileError, match=message.format(r"written \(\d+ bytes\)")):
            write(tmp_path / name, {}, {})


def test_places_that_hold_no_file(tmp_path: Path) -> None:
    with pytest.raises(CacheFileError, match=f"{tmp_path}: a folder, not a file"):
        read_contents(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CacheFileError, match=r"folder: cannot be written \(\d+ bytes\): Is a directory"):
        write(tmp_path / "folder", {}, {})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CacheFileError, match="pipe: not a regular file"):
        read_contents(tmp_path / "pipe")
    for unnamed in (Path(), Path("/")):
        with pytest.raises(CacheFileError, match="empty name"):
            write(unnamed, {}, {})


def test_replaced_between_head_and_arrays(path: Path) -> None:
    """By a file of the same size, and by one of another."""
    contents = read_contents(path)
    for other in (few() | {"array 2": stored("U8", 5, seed=9)}, {}):
        write(path, HEADER, other)
        with pytest.raises(CacheFileError, match=rf"replaced after .* had {contents.size}"):
            list(read_arrays(contents, ["array 0"], verify=False))


def test_reading_removes_what_killed_writers_left(path: Path) -> None:
    left = [path.with_name(f".{path.name}.{i:012x}.part") for i in range(2)]
    for temporary in left:
        temporary.write_bytes(b"half")
    read_contents(path)
    assert list(path.parent.iterdir()) == [path]
    left[0].write_bytes(b"half")
    path.unlink()
    with pytest.raises(CacheFileError, match="No such file"):
        read_contents(path)
    assert list(path.parent.iterdir()) == []


def test_killed_writers(tmp_path: Path) -> None:
    """After each kill, the file is absent or whole, and one reading leaves nothing else in the folder."""
    command = [sys.executable, "-m", "tests.persist.killing", str(tmp_path / "a.safetensors"), "200", "1"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    # The kills must come while files are written, too, or nothing is tested.
    assert counts["left"] >= 10
    assert counts["whole"] >= 10
    assert counts["versions"] >= 2
