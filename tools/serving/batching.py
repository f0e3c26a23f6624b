"""Requests that come at the same time, answered by one call of the model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["Batcher", "BusyError"]

Waiting = tuple[Any, "asyncio.Future[Any]"]


class BusyError(RuntimeError):
    """An item that is not taken: too many wait, or the service stops."""


class Batcher:
    """Collects items until there are enough, or the first has waited long enough.

    One thread runs the model: a second call at the same time would share the cores and be slower.

    Args:
        run: From a list of items to as many results, in their order.
        most: Items of one call.
        wait: Seconds that the first item waits for others.
        limit: Items that may wait; more are refused.
        observe: Called with the number of items of each call, for metrics.
    """

    def __init__(
        self,
        run: Callable[[list[Any]], Sequence[Any]],
        *,
        most: int = 16,
        wait: float = 0.002,
        limit: int = 1024,
        observe: Callable[[int], object] = lambda count: None,
    ) -> None:
        if most < 1 or wait < 0 or limit < 1:
            raise ValueError(
                "most and limit must be at least 1 and wait not negative, "
                f"got {most}, {limit}, {wait}"
            )
        self._run, self._most, self._wait, self._observe = run, most, wait, observe
        self._limit, self._stopping = limit, False
        self._queue: asyncio.Queue[Waiting | None] = asyncio.Queue()
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
        """Answer what was submitted already, and refuse what comes now."""
        self._stopping = True
        if self._task is not None:
            self._queue.put_nowait(None)  # behind all that waits
            await self._task
        self._thread.shutdown()

    async def submit(self, item: Any) -> Any:
        """The result for one item.

        Raises:
            BusyError: Too many wait, or the service stops.
            Exception: What the model raised for this item.
        """
        if self._stopping or self.waiting >= self._limit:
            raise BusyError("the service stops" if self._stopping else "too many requests wait")
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((item, future))
        return await future

    async def submit_all(self, items: Iterable[Any]) -> list[Any]:
        """The results for several items, or an error for all: nothing is computed for nobody."""
        tasks = [asyncio.ensure_future(self.submit(item)) for item in items]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()  # those that still wait are left out
            raise

    async def _work(self) -> None:
        while True:
            batch, last = await self._next()
            if batch:
                self._observe(len(batch))
                await self._answer(batch)
            if last:
                return

    async def _next(self) -> tuple[list[Waiting], bool]:
        """Items that go together, and whether none will come after."""
        first = await self._queue.get()
        batch: list[Waiting] = []
        loop = asyncio.get_running_loop()
        end = loop.time() + self._wait
        while first is not None:
            if not first[1].done():  # whoever asked may be gone
                batch.append(first)
            if len(batch) == self._most:
                return batch, False
            left = end - loop.time()
            try:
                # What is there already is taken even if the time is over.
                first = (
                    self._queue.get_nowait()
                    if left <= 0
                    else await asyncio.wait_for(self._queue.get(), left)
                )
            except (asyncio.QueueEmpty, TimeoutError):
                return batch, False
        return batch, True

    async def _answer(self, batch: Sequence[Waiting]) -> None:
        items = [item for item, _ in batch]
        try:
            results = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._all, items
            )
        except Exception as error:
            if len(batch) > 1:  # one item's fault is not the others'
                for one in batch:
                    await self._answer([one])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)

    def _all(self, items: list[Any]) -> Sequence[Any]:
        try:
            results = self._run(items)
        except StopIteration as error:  # which no future can hold
            raise RuntimeError("the model raised StopIteration") from error
        if len(results) != len(items):
            raise ValueError(f"{len(results)} results for {len(items)} items")
        return results
