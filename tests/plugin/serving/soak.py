"""A server under mixed requests: every valid one is answered as by a fresh cache, the others with an error.

`make soak-server` runs it with SmolLM2 and a tiny second model, which take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx_lm
from tqdm import tqdm

from examples import smollm2
from tests.folders import written

CAPACITY = 160
SYSTEM = "You answer in one short sentence. "
QUESTIONS = [
    "What is the capital of France?",
    "What is the capital of Japan?",
    "What do bees make?",
    "Which colour is the sky?",
    "What is two and two?",
    "What is the opposite of hot?",
]
TOKENS = 4


class Request(NamedTuple):
    """What a client asks for."""

    kind: str
    body: dict[str, Any]
    expected: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="how many in all")
    parser.add_argument("--clients", type=int, default=8, help="how many at the same time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a tiny model in the place of SmolLM2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not soak(Path(folder), options):
            sys.exit(1)


def soak(folder: Path, options: argparse.Namespace) -> bool:
    """Run the requests and print what came of them. Returns whether all is as it should be."""
    first, second = models(folder, options.tiny)
    requests = mixed(random.Random(options.seed), first, second, options.requests)
    switches = sum(a.body["model"] != b.body["model"] for a, b in pairwise(requests))
    found: Counter[str] = Counter()
    memory: list[int] = []
    with server(first) as (url, process):
        health(url)
        with ThreadPoolExecutor(options.clients) as clients:
            waiting = [clients.submit(ask, url, request) for request in requests]
            for done, one in enumerate(tqdm(as_completed(waiting), total=len(waiting), unit="request")):
                found[one.result()] += 1
                if done >= 1.5 * 100 * options.requests / max(1, switches) or done == len(waiting) - 1:
                    memory.append(resident(process.pid))
        alive = health(url)
    lines = [f"{options.requests} requests of {options.clients} clients, about {switches} switches of model"]
    lines += [f"{count:5} {outcome}" for outcome, count in sorted(found.items())]
    after, end = (f"{size / 2**20:.0f} MB" for size in (memory[0], memory[-1]))
    lines.append(f"/health {alive}; RSS {after} after 100 switches, {end} at the end")
    sys.stdout.write("\n".join(lines) + "\n")
    bad = sum(count for outcome, count in found.items() if outcome.startswith("BAD"))
    return not bad and alive == 200 and memory[-1] <= 1.05 * memory[0]


def models(folder: Path, is_tiny: bool) -> tuple[Path, Path]:
    """Two model folders."""
    meta: Any
    _, meta = mx.load(str(smollm2.find()), return_metadata=True)
    second = written(folder / "second", smollm2._tokenizer(meta), layers=2)
    if is_tiny:
        return written(folder / "first", smollm2._tokenizer(meta), layers=3), second
    smollm2.export(folder / "first", mx.float32)
    return folder / "first", second


def mixed(rng: random.Random, first: Path, second: Path, n: int) -> list[Request]:
    """Requests at random: six of ten are valid ones of the first model."""
    valid = {path: expected(path) for path in (first, second)}
    requests = []
    for _ in range(n):
        kind = rng.choices(
            ["valid", "other model", "too long", "unknown model", "cancelled"], [60, 16, 8, 8, 8]
        )[0]
        path = second if kind == "other model" else first
        prompt, text = rng.choice(list(valid[path].items()))
        body = {"prompt": prompt, "model": str(path), "max_tokens": TOKENS, "temperature": 0.0}
        if kind == "too long":
            body["prompt"] = SYSTEM * 60
        elif kind == "unknown model":
            body["model"] = "no/such"
        elif kind == "cancelled":
            body |= {"stream": True, "max_tokens": 60}
        elif rng.random() < 0.2:
            # Answered by itself, not in a batch.
            body["seed"] = 1
        requests.append(Request(kind, body, text))
    return requests


def expected(path: Path) -> dict[str, str]:
    """By prompt: what mlx-lm replies with a fresh cache of its own."""
    model, tokenizer = mlx_lm.load(str(path))
    prompts = [SYSTEM + question for question in QUESTIONS]
    return {prompt: mlx_lm.generate(model, tokenizer, prompt, max_tokens=TOKENS) for prompt in prompts}


def ask(url: str, request: Request) -> str:
    """What came of a request, in a few words."""
    data = json.dumps(request.body).encode()
    post = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(post, timeout=600) as response:
            if request.kind == "cancelled":
                response.readline()
                return "cancelled"
            text = json.load(response)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        is_refused = request.kind in ("too long", "unknown model")
        message = json.load(error)["error"]
        return f"refused {request.kind}: {error.code}" if is_refused else f"BAD {request.kind}: {message}"
    except OSError as error:
        return f"BAD {request.kind}: {error!r}"
    if request.kind in ("too long", "unknown model"):
        return f"BAD {request.kind}: answered"
    return f"answered {request.kind}" if text == request.expected else f"BAD {request.kind}: {text!r}"


def health(url: str) -> int:
    """The status of /health, once the server answers."""
    while True:
        with (
            contextlib.suppress(urllib.error.URLError),
            urllib.request.urlopen(f"{url}/health", timeout=600) as response,
        ):
            return int(response.status)
        time.sleep(0.1)


@contextlib.contextmanager
def server(model: Path) -> Any:
    """mlx-lm's server with every model attached: its URL and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_kvcache.plugin", "--capacity", str(CAPACITY), "server"]
    arguments = ["--model", str(model), "--port", str(port), "--log-level", "ERROR"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    log = Path(tempfile.gettempdir()) / f"soak-server-{port}.log"
    with log.open("w") as errors:
        process = subprocess.Popen([*command, *arguments], env=environment, stderr=errors)
        try:
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.terminate()
            process.wait()


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
