"""Keeping torch quiet while it captures: what fails is raised, and need not be printed too.

A failed capture prints logs, partial graphs and tracebacks to the standard error, and a
successful one warns of its own deprecated code. None of it tells a user of torchlathe more than
the error that `capture` raises, which has the failure of torch as its cause.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

__all__ = ["error_chain", "logging_kept", "quiet_torch"]

# Modules that torch's warnings are attributed to, by the depth of their call.
_SOURCES = r"(torch|contextlib|copyreg)(\.|$)"


def error_chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from or during, outermost first."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        if cause in chain:
            break
        chain.append(cause)
    return chain


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Silence torch's logs, warnings and dumps; what the model itself prints still appears.

    ``TORCH_LOGS``, or a logging level below warnings, asks for torch's output: then all of it
    stays. Levels, filters and streams are as before at the end.
    """
    logger = logging.getLogger("torch")
    if os.environ.get("TORCH_LOGS") or 0 < logger.level < logging.WARNING:
        yield
        return
    level = logger.level
    # Loggers below without a level of their own follow; one that a user has set does not.
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), _without_dumps():
            for category in (UserWarning, FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=_SOURCES)
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def logging_kept() -> Iterator[None]:
    """Undo what a library does to the root logger, which is the user's."""
    root = logging.getLogger()
    level, handlers, filters = root.level, list(root.handlers), list(root.filters)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:], root.filters[:] = handlers, filters


@contextlib.contextmanager
def _without_dumps() -> Iterator[None]:
    """Hold back the standard error, and drop the partial graph that export prints of a failure."""
    stream = sys.stderr
    held = io.StringIO()
    dumps: list[str] = []
    try:
        with contextlib.redirect_stderr(held):
            yield
    except Exception as error:
        graphs = (getattr(link, "partial_fx_graph", None) for link in error_chain(error))
        dumps = [f"{graph}\n" for graph in graphs if graph is not None]
        raise
    finally:
        text = held.getvalue()
        for dump in dumps:
            text = text.replace(dump, "")
        if text and stream is not None:
            stream.write(text)
