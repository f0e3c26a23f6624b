"""Serving: batching of requests, and the web application."""

import asyncio
from importlib.util import find_spec
from typing import Any

import pytest

from torchlathe.tools.serving import Batcher
from torchlathe.tools.serving.app import make_app

needs_fastapi = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("fastapi", "prometheus_client", "httpx")),
    reason="needs fastapi, prometheus-client and httpx",
)


def lengths(sentences: list[str]) -> list[list[float]]:
    if any("bad" in sentence for sentence in sentences):
        raise ValueError("a bad sentence")
    return [[float(len(sentence))] for sentence in sentences]


def run_batched(items: list[str], **options: Any) -> tuple[list[Any], list[int]]:
    sizes: list[int] = []

    async def main() -> list[Any]:
        batcher = Batcher(lengths, observe=sizes.append, **options)
        await batcher.start()
        found = await asyncio.gather(
            *(batcher.submit(item) for item in items), return_exceptions=True
        )
        await batcher.stop()
        return found

    return asyncio.run(main()), sizes


def test_items_are_answered_in_batches_each_with_its_own_result() -> None:
    items = ["x" * n for n in range(1, 11)]
    found, sizes = run_batched(items, most=4, wait=0.2)
    assert found == [[float(n)] for n in range(1, 11)]
    assert sum(sizes) == 10
    assert max(sizes) == 4
    assert len(sizes) == 3


def test_a_lone_item_does_not_wait_for_ever() -> None:
    found, sizes = run_batched(["abc"], most=64, wait=0.01)
    assert found == [[3.0]]
    assert sizes == [1]


def test_an_error_reaches_those_of_its_batch_and_the_next_one_works() -> None:
    found, _ = run_batched(["fine", "bad"], most=1, wait=0)
    assert found[0] == [4.0]
    assert isinstance(found[1], ValueError)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Batcher(lengths, most=0)


@needs_fastapi
def test_the_application() -> None:
    from fastapi.testclient import TestClient

    with TestClient(make_app(lengths, name="lengths")) as client:
        assert client.get("/health").json()["model"] == "lengths"
        answer = client.post("/embed", json={"sentences": ["one", "three"]})
        assert answer.json() == {"vectors": [[3.0], [5.0]]}
        assert client.post("/embed", json={"sentences": []}).status_code == 422
        assert client.post("/embed", json={"sentences": ["bad"]}).status_code == 500
        metrics = client.get("/metrics").text
        assert "sentences_total 2.0" in metrics
        assert "failures_total 1.0" in metrics
        assert "batch_size_bucket" in metrics
