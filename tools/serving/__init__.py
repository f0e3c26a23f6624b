"""Serving an encoder over HTTP: batching, health, metrics; an example, with a load test."""

from torchlathe.tools.serving.batching import Batcher

__all__ = ["Batcher"]
