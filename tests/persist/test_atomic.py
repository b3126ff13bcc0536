"""Files that take another's place: what is seen meanwhile, and what is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlx_kvcache.persist.atomic import replacing, sweep

from .limits import reachable_folder, unprivileged

# Says that it holds its temporary file, and then holds it until it is killed.
HOLDER = """
import sys
from pathlib import Path
from mlx_kvcache.persist.atomic import replacing
with replacing(Path(sys.argv[1])) as file:
    print("held", flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def left_of(name: str, number: int = 0) -> str:
    """What a killed writer's temporary file is called."""
    return f".{name}.{number:012x}.part"


def test_the_old_file_is_there_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        assert len(names(tmp_path)) == 2
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == {"a"}


@pytest.mark.parametrize("error", [OSError, ZeroDivisionError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("old", [b"old", None])
def test_an_exception_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException], old: bytes | None
) -> None:
    path = tmp_path / "a"
    if old:
        path.write_bytes(old)
    with pytest.raises(error), replacing(path) as file:
        file.write(b"new")
        raise error
    assert {name: path.read_bytes() for name in names(tmp_path)} == ({"a": old} if old else {})


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "a") as file:
        file.write(b"new")
    assert names(tmp_path) == {"a"}


def test_two_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with replacing(path) as one:
        one.write(b"one")
        with replacing(path) as other:
            other.write(b"other")
        assert path.read_bytes() == b"other"
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == {"a"}


def test_sweep_spares_the_living(tmp_path: Path) -> None:
    """Of another process, until it is killed, and of this one."""
    path = tmp_path / "a"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        [held] = names(tmp_path)
        sweep(tmp_path)
        with replacing(path) as file:
            sweep(tmp_path, "a")
            file.write(b"new")
            assert held in names(tmp_path) and len(names(tmp_path)) == 2
        assert names(tmp_path) == {held, "a"}
        holder.kill()
    sweep(tmp_path, "a")
    assert names(tmp_path) == {"a"}


@pytest.mark.parametrize("name", ["a", "a.b", "a\nb", "[a]*", ".a", "a" * 200])
def test_sweep_removes_what_is_left_of_one_file_or_of_all(tmp_path: Path, name: str) -> None:
    others = {left_of(f"{name}.x"), left_of("x"), left_of(f"x.{name}")}
    # Files that only look similar belong to somebody else.
    foreign = {
        ".a.part",
        f".{name}.part",
        f"{name}.part",
        f".{name}.{0:011x}.part",
        f"{left_of(name)}.part",
        name,
    }
    for made in {left_of(name), left_of(name, 1)} | others | foreign:
        (tmp_path / made).write_bytes(b"")
    sweep(tmp_path, name)
    assert names(tmp_path) == others | foreign
    sweep(tmp_path)
    assert names(tmp_path) == foreign


def test_writing_sweeps(tmp_path: Path) -> None:
    (tmp_path / left_of("a")).write_bytes(b"half")
    with replacing(tmp_path / "a") as file:
        file.write(b"new")
    assert names(tmp_path) == {"a"}


def test_sweep_tolerates_what_it_may_not_touch(tmp_path: Path) -> None:
    sweep(tmp_path / "missing")
    with reachable_folder() as folder:
        (folder / left_of("a")).write_bytes(b"half")
        for mode in (0o500, 0o300, 0o000):
            folder.chmod(mode)
            with unprivileged():
                sweep(folder, "a")
        folder.chmod(0o700)
        assert names(folder) == {left_of("a")}


def test_a_folder_that_cannot_be_made_safe_is_refused_first(tmp_path: Path) -> None:
    """It may be written but not opened, so that a rename in it could not be made to last."""
    with reachable_folder() as folder:
        (folder / "a").write_bytes(b"old")
        folder.chmod(0o300)
        with unprivileged(), pytest.raises(PermissionError), replacing(folder / "a") as file:
            file.write(b"new")
        folder.chmod(0o700)
        assert (folder / "a").read_bytes() == b"old"
        assert names(folder) == {"a"}
