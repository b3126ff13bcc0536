"""How a code block is run: by its language, as a reader would."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import yaml
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from mlx_kvcache.plugin.attach import _all_models, _bind_all
from tests.docs.pages import ROOT

TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
ENDING = {"server": ["--help"], "examples.smollm2": ["--help"]}
"""What ends a command that would run for ever, or do again what the tests' hub has been made by."""
LAUNCHERS = {"mlx.launch", "mlx.distributed_config"}
LINES = "Hello\nq\n"
"""What somebody types into a chat."""
FORM = re.compile(
    r"(pip|python3? -m pip) install( -e| --editable| --no-deps| --upgrade)*( [\w.\[\],=<>-]+)+"
    r"|python3? -m venv [.\w]+"
    r"|(sudo )?apt-get install( -y)?( [\w.-]+)+"
    r"|git clone [\w.:/-]+"
    r"|cd [\w./-]+"
)
"""Commands that would change the machine, or need a network: only their form is looked at."""


class Reader:
    """Somebody who tries the blocks of one page, in order.

    Args:
        folder: where the page's commands run.
        environment: of these commands.
        path: the folder of a model, for commands that say PATH.
    """

    def __init__(self, folder: Path, environment: dict[str, str], path: Path) -> None:
        self.folder = folder
        self.environment = os.environ | environment
        self.path = path
        self.printed = ""
        self._python = PythonEvaluator()

    def document(self, page: Path) -> Document:
        """The page, its blocks bound to this reader."""
        return Document.parse(
            str(page),
            CodeBlockParser("python", self.python),
            CodeBlockParser("sh", self.shell),
            CodeBlockParser("text", self.text),
            CodeBlockParser("toml", parsed_by(_toml)),
            CodeBlockParser("json", parsed_by(json.loads)),
            CodeBlockParser("yaml", parsed_by(yaml.safe_load)),
            SkipParser(),
        )

    def python(self, example: Example) -> None:
        """Run it in the page's namespace."""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self._python(example)
        self.printed = out.getvalue()

    def text(self, example: Example) -> None:
        """It is what the block before it printed, where "..." stands for anything."""
        told = re.escape(_trimmed(example.parsed)).replace(r"\.\.\.", ".*")
        printed, self.printed = _trimmed(self.printed), ""
        assert re.fullmatch(told, printed, re.DOTALL), f"printed:\n{printed}"

    def shell(self, example: Example) -> None:
        """Run its commands, without a shell."""
        self.printed = ""
        for line in example.parsed.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                self._command(words)

    def _command(self, words: list[str]) -> None:
        name, *arguments = words[0].removeprefix(".venv/bin/"), *words[1:]
        if FORM.fullmatch(" ".join([name, *arguments])):
            return
        if name in LAUNCHERS:
            self._check_options(name, arguments)
        elif name == "make":
            assert set(arguments) <= TARGETS, f"no make target {arguments}"
        else:
            assert name in {"python", "python3"}, f"no rule for the command {name}"
            self.printed += self._run(arguments)

    def _check_options(self, name: str, arguments: list[str]) -> None:
        """Other machines cannot be reached from here: whether there are such options, and what they start."""
        own, _, started = " ".join(arguments).partition(" -- ")
        command = [str(Path(sys.executable).parent / name), "--help"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert all(
            word in re.findall(r"(?<!\S)\[?(--?[\w-]+)", told.replace(",", " "))
            for word in own.split()
            if word[0] == "-"
        ), own
        module = started.partition(" -m ")[2].split()
        assert not module or importlib.util.find_spec(module[0]), module

    def _run(self, arguments: list[str]) -> str:
        placed = [str(self.path) if argument == "PATH" else argument for argument in arguments]
        placed += [option for name in arguments for option in ENDING.get(name, [])]
        if placed[:2] == ["-m", "mlx_kvcache.plugin"] and placed[-1] == "--help":
            return _help_of(placed[1:])
        done = subprocess.run(
            [sys.executable, *placed],
            cwd=self.folder,
            env=self.environment,
            input=LINES,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def _help_of(arguments: list[str]) -> str:
    """Run a command that ends with its help in this process: another would first import mlx-lm."""
    module, before = arguments[0], len(_all_models)
    try:
        with (
            patch.object(sys, "argv", arguments),
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.suppress(SystemExit),
        ):
            runpy.run_module(module, run_name="__main__")
            raise AssertionError(f"{arguments} does not end")
    finally:
        # The command has attached all models.
        del _all_models[before:]
        _bind_all()
    assert "usage:" in out.getvalue(), f"{arguments} prints no help"
    return out.getvalue()


def parsed_by(parse: Callable[[str], object]) -> Callable[[Example], None]:
    """Whether a block can be read."""

    def evaluate(example: Example) -> None:
        parse(example.parsed)

    return evaluate


def _toml(text: str) -> object:
    # Part of Python since 3.11, which mlx-lm needs, too.
    return importlib.import_module("tomllib").loads(text)


def _trimmed(text: str) -> str:
    """Without spaces at the ends of lines, and empty lines around."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
