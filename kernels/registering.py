"""Registers ops that run Triton kernels on GPUs and plain torch ops elsewhere.

An op is a `torch.library.triton_op` whose body branches on the device. That is the one form that
stays a single node in FX and under `torch.export`, decomposes under Inductor, and is packaged by
AOTInductor for a CPU with nothing of Python left; it needs no fake and no Triton to be registered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["register"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def register(name: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A decorator that registers a function as ``torchlathe::name`` and gives back the op."""

    def registered(function: Callable[_P, _R]) -> Callable[_P, _R]:
        # Without Triton torch warns that it finds no kernels in the function, which is so.
        logger = logging.getLogger("torch._library.triton")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            made = torch.library.triton_op(f"torchlathe::{name}", function, mutates_args={})
        finally:
            logger.setLevel(level)
        return made

    return registered
