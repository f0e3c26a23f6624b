"""Requests that come at the same time, answered by one call of the model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["Batcher"]


class Batcher:
    """Collects items until there are enough, or the first has waited long enough.

    One thread runs the model: a second call at the same time would share the cores and be slower.

    Args:
        run: From a list of items to as many results, in their order.
        most: Items of one call.
        wait: Seconds that the first item waits for others.
        observe: Called with the number of items of each call, for metrics.
    """

    def __init__(
        self,
        run: Callable[[list[Any]], Sequence[Any]],
        *,
        most: int = 16,
        wait: float = 0.002,
        observe: Callable[[int], object] = lambda count: None,
    ) -> None:
        if most < 1 or wait < 0:
            raise ValueError(f"most must be at least 1 and wait not negative, got {most}, {wait}")
        self._run, self._most, self._wait, self._observe = run, most, wait, observe
        self._queue: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Items that no call has taken yet."""
        return self._queue.qsize()

    async def start(self) -> None:
        """Begin to answer."""
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Finish the call that is running, and refuse what waits."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        while not self._queue.empty():
            _, future = self._queue.get_nowait()
            future.cancel()
        self._thread.shutdown()

    async def submit(self, item: Any) -> Any:
        """The result for one item.

        Raises:
            Exception: What the model raised for the batch that the item was in.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        await self._queue.put((item, future))
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            end = loop.time() + self._wait
            while len(batch) < self._most:
                left = end - loop.time()
                try:
                    # What is there already is taken even if the time is over.
                    batch.append(
                        self._queue.get_nowait()
                        if left <= 0
                        else await asyncio.wait_for(self._queue.get(), left)
                    )
                except (asyncio.QueueEmpty, TimeoutError):
                    break
            self._observe(len(batch))
            items = [item for item, _ in batch]
            try:
                results = await loop.run_in_executor(self._thread, self._run, items)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
