"""Describes the machine on which figures are measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx


def machine() -> dict[str, str]:
    """Collect the device, the system and the versions of packages."""
    return {
        "device": _device(),
        "blas": _blas(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
        "numpy": version("numpy"),
    }


def described(told: dict[str, str]) -> str:
    """Format the result of `machine` as one line."""
    blas = f" with {told['blas']}" if told["blas"] else ""
    return (
        f"{told['system']}, {told['device']}{blas}, Python {told['python']}, "
        f"mlx {told['mlx']}, mlx-lm {told['mlx-lm']}"
    )


def name() -> str:
    """The machine's name, for file names."""
    kind = "gpu" if _is_gpu() else "cpu"
    chip = _chip().replace(" ", "-") if _is_gpu() else f"{os.cpu_count()}-cores"
    return f"{platform.system()}-{platform.machine()}-{chip}-{kind}".lower()


def _is_gpu() -> bool:
    return mx.default_device().type == mx.gpu


def _chip() -> str:
    return str(mx.device_info().get("device_name", "unknown"))


def _device() -> str:
    return f"GPU {_chip()}" if _is_gpu() else "CPU"


def _blas() -> str:
    """The BLAS library that MLX uses on the CPU; "" on a GPU."""
    if _is_gpu():
        return ""
    if platform.system() == "Darwin":
        return "Accelerate"
    loaded = Path("/proc/self/maps").read_text(encoding="utf-8") if Path("/proc/self/maps").exists() else ""
    return "OpenBLAS" if "openblas-pthread" in loaded else "the reference BLAS of MLX's wheel"
