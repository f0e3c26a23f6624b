"""Serving an encoder over HTTP: batching, health, metrics; an example, with a load test."""

from torchlathe.tools.serving.batching import Batcher, BusyError

__all__ = ["Batcher", "BusyError"]
