"""A load test on loopback: clients that send a request as soon as the one before is answered."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import socket
import subprocess
import sys
import time
from typing import Any

from torchlathe.tools.latency import quantile

__all__ = ["compare", "load", "serve", "wait_for"]

_START_SECONDS = 240.0


async def load(url: str, sentences: list[str], seconds: float, clients: int) -> dict[str, Any]:
    """Send requests of one sentence each for some time.

    Args:
        url: Of the server.
        sentences: Sent in turn.
        seconds: How long.
        clients: How many requests are under way at any time.

    Returns:
        Requests, failures, requests per second, and percentiles of the latency in milliseconds.
    """
    import httpx

    taken: list[float] = []
    failures = 0
    source = itertools.cycle(sentences)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        start = time.perf_counter()

        async def one() -> None:
            nonlocal failures
            while time.perf_counter() - start < seconds:
                begun = time.perf_counter()
                try:
                    answer = await client.post("/embed", json={"sentences": [next(source)]})
                except httpx.HTTPError:
                    failures += 1
                    await asyncio.sleep(0.1)
                    continue
                taken.append(1e3 * (time.perf_counter() - begun))
                failures += answer.status_code != 200

        await asyncio.gather(*(one() for _ in range(clients)))
        total = time.perf_counter() - start
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {
        "requests": len(taken),
        "failures": failures,
        "per_second": len(taken) / total,
        **{n: quantile(taken, share) if taken else None for n, share in shares.items()},
    }


def compare(parsed: argparse.Namespace) -> dict[str, Any]:
    """Serve the original and the compiled model, each in a process, and load them in turn.

    Twice each, in turn, so that a machine that slows down meanwhile does so for both.
    """
    from rich.console import Console

    from torchlathe.tools.sentence_encoder import documentation_sentences

    sentences = documentation_sentences()[100:400]
    common = ["--threads", str(parsed.threads)]
    kinds = {
        "original": [*common, "--original"],
        "compiled": [*common, "--passes", parsed.passes, "--backend", parsed.backend],
    }
    servers: dict[str, tuple[subprocess.Popen[bytes], str]] = {}
    console = Console(highlight=False)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    try:
        for name, words in kinds.items():
            servers[name] = serve(words)
        for process, url in servers.values():
            wait_for(url, process)
        for _ in range(2):
            for name, (_, url) in servers.items():
                found = asyncio.run(load(url, sentences, parsed.seconds / 2, parsed.clients))
                rows[name].append(found)
                console.print(f"{name}: {_numbers(found)}")
    finally:
        for process, _ in servers.values():
            process.terminate()
            process.wait()
    from torchlathe.tools.bench.machine import machine

    result = {
        "machine": machine(),
        "passes": parsed.passes,
        "backend": parsed.backend,
        "threads": parsed.threads,
        "clients": parsed.clients,
        "rows": rows,
    }
    if parsed.output:
        from torchlathe.ir.files import write_text

        write_text(parsed.output, json.dumps(result, indent=1) + "\n")
    return result


def _numbers(found: dict[str, Any]) -> str:
    text = f"{found['per_second']:.1f} per s, {found['failures']} failures"
    if found["p50"] is None:
        return text
    return f"{text}, p50 {found['p50']:.1f} ms, p99 {found['p99']:.1f} ms"


def serve(words: list[str]) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server in a process of its own, on a port that is free; returns it with its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torchlathe.tools.serving", "--port", str(port), *words]
    return subprocess.Popen(command), f"http://127.0.0.1:{port}"


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Until the server answers.

    Raises:
        TimeoutError: It does not.
        RuntimeError: It ended.
    """
    import httpx

    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.3)
    raise TimeoutError(f"{url} does not answer")
