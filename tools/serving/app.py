"""The web application: ``POST /embed``, ``GET /health`` and ``GET /metrics``."""

# No postponed annotations: FastAPI reads those of the functions below, which are local.

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from torchlathe.tools.serving.batching import Batcher, BusyError

__all__ = ["encode_with", "make_app"]

_MOST_SENTENCES = 256
_MOST_CHARACTERS = 10_000  # of a sentence; the model reads its first tokens only


def encode_with(
    model: Callable[..., Any], tokens: Callable[[Sequence[str]], dict[str, Any]]
) -> Callable[[list[str]], list[list[float]]]:
    """A function from sentences to vectors.

    Args:
        model: From token ids and mask to (sentences, width).
        tokens: From sentences to the model's keyword arguments.
    """
    import torch

    def run(sentences: list[str]) -> list[list[float]]:
        with torch.inference_mode():
            vectors: list[list[float]] = model(**tokens(sentences)).tolist()
        return vectors

    return run


def make_app(
    encode: Callable[[list[str]], Sequence[list[float]]],
    *,
    name: str = "encoder",
    most: int = 16,
    wait: float = 0.002,
    limit: int = 1024,
) -> Any:
    """The application.

    Args:
        encode: From sentences to vectors; called in one thread.
        name: Of the model, in ``/health``.
        most: Sentences of one call of the model.
        wait: Seconds that a sentence waits for others.
        limit: Sentences that may wait; requests beyond are refused with 503.
    """
    from fastapi import FastAPI, HTTPException, Response
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        generate_latest,
    )
    from pydantic import BaseModel, Field

    registry = CollectorRegistry()
    sentences = Counter("sentences_total", "Sentences embedded", registry=registry)
    failures = Counter("failures_total", "Requests that failed", registry=registry)
    refused = Counter("refused_total", "Requests refused when busy", registry=registry)
    seconds = Histogram("request_seconds", "Seconds of a request", registry=registry)
    sizes = Histogram(
        "batch_size", "Sentences of a call", registry=registry, buckets=(1, 2, 4, 8, 16, 32, 64)
    )
    batcher = Batcher(encode, most=most, wait=wait, limit=limit, observe=sizes.observe)
    Gauge("queue_length", "Sentences that wait", registry=registry).set_function(
        lambda: batcher.waiting
    )

    Sentence = Annotated[str, Field(max_length=_MOST_CHARACTERS)]

    class Request(BaseModel):
        sentences: list[Sentence] = Field(min_length=1, max_length=_MOST_SENTENCES)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        encode(["The first call is slower than those that follow."])
        await batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(title="torchlathe", lifespan=lifespan)

    @app.post("/embed")
    async def embed(request: Request) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            vectors = await batcher.submit_all(request.sentences)
        except BusyError as error:
            refused.inc()
            raise HTTPException(503, str(error), headers={"Retry-After": "1"}) from error
        except Exception as error:
            failures.inc()
            raise HTTPException(500, f"{type(error).__name__}: {error}") from error
        sentences.inc(len(request.sentences))
        seconds.observe(time.perf_counter() - start)
        return {"vectors": vectors}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "waiting": batcher.waiting}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app
