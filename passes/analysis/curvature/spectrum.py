"""Ends of a spectrum by Lanczos, and whole matrices of small nets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from torchlathe.ir import UnsupportedError
from torchlathe.passes.analysis.curvature.objective import Vector
from torchlathe.passes.statistics.storage import DEFAULT_LIMIT

if TYPE_CHECKING:
    import numpy as np

__all__ = ["End", "dense", "eigenvalues"]

End: TypeAlias = Literal["top", "bottom", "both"]
_SMALL = 24  # so few dimensions are computed whole


def dense(
    each: Callable[[Sequence[Vector]], Sequence[Vector]], like: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The whole matrix, a product per row; for small nets and tests.

    Args:
        each: ``M v`` of several vectors, as `Products.each`.
        like: Tensors of the parameters, whose elements in order are the axes.

    Returns:
        Shape (n, n), float64.
    """
    size = sum(t.numel() for t in like.values())
    units = [_vector(unit, like) for unit in torch.eye(size, dtype=torch.float64)]
    return torch.stack([_flat(row) for row in each(units)])


def eigenvalues(
    product: Callable[[Vector], Vector],
    like: Mapping[str, torch.Tensor],
    *,
    count: int = 1,
    end: End = "top",
    seed: int = 0,
    tolerance: float = 1e-3,
    room: int | None = None,
) -> list[float]:
    """Eigenvalues at the ends of the spectrum of a symmetric matrix, in descending order.

    Args:
        product: ``M v``.
        like: Tensors of the parameters that span the block.
        count: How many; with "both" half of them from each end.
        end: Which end.
        seed: Of the first vector.
        tolerance: Accuracy of the values, relative to the matrix' norm.
        room: Bytes for the vectors of Lanczos, 2 GiB by default: 20 of them, or fewer and the more
            restarts.

    Raises:
        UnsupportedError: It does not converge.

    Source: implicitly restarted Lanczos, ``scipy.sparse.linalg.eigsh`` (ARPACK).
    """
    import numpy as np
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    size = sum(t.numel() for t in like.values())
    if size <= max(_SMALL, count + 1):
        whole = dense(lambda vectors: [product(v) for v in vectors], like)
        values = torch.linalg.eigvalsh(whole).flip(0).tolist()
        return _ends(values, count, end)
    start = np.random.default_rng(seed).standard_normal(size)

    def matvec(vector: np.ndarray) -> np.ndarray:
        found = product(_vector(torch.from_numpy(vector.ravel()), like))
        return np.asarray(_flat(found).numpy())

    shift = _norm(matvec, start)
    if not shift:
        return [0.0] * count
    vectors = (DEFAULT_LIMIT if room is None else room) // (8 * size) - 5  # ARPACK's own
    found: list[float] = []
    halves = {"top": (count, 0), "bottom": (0, count), "both": (count - count // 2, count // 2)}
    for sign, wanted in zip((1.0, -1.0), halves[end], strict=True):
        if wanted:
            # Shifted, no wanted value is near zero, and the tolerance is relative to the norm.
            operator = LinearOperator(
                (size, size),
                matvec=lambda v, sign=sign: sign * matvec(v) + shift * v,  # type: ignore[misc]
                dtype=np.float64,
            )
            try:
                values = eigsh(
                    operator,
                    k=wanted,
                    which="LA",
                    v0=start,
                    tol=tolerance,
                    ncv=min(size, max(wanted + 3, min(vectors, max(20, 2 * wanted + 1)))),
                    return_eigenvectors=False,
                )
            except ArpackNoConvergence as error:
                raise UnsupportedError(
                    f"the eigenvalues of {', '.join(list(like)[:3])} did not converge: {error}",
                    hint="raise the tolerance, or ask for fewer",
                ) from error
            found += [sign * (float(value) - shift) for value in values]
    return sorted(found, reverse=True)


def _norm(matvec: Callable[[Any], Any], start: Any) -> float:
    """Somewhat above the largest magnitude of an eigenvalue, by a few steps of the power method."""
    vector, size = start / float((start @ start) ** 0.5), 0.0
    for _ in range(4):
        vector = matvec(vector)
        size = float((vector @ vector) ** 0.5)
        if not size:
            return 0.0
        vector = vector / size
    return 1.5 * size


def _ends(values: list[float], count: int, end: End) -> list[float]:
    count = min(count, len(values))
    if end == "top":
        return values[:count]
    if end == "bottom":
        return values[-count:]
    top = count - count // 2
    return values[:top] + values[len(values) - count // 2 :]


def _flat(vector: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().flatten().to("cpu", torch.float64) for t in vector.values()])


def _vector(flat: torch.Tensor, like: Mapping[str, torch.Tensor]) -> Vector:
    pieces = flat.split([t.numel() for t in like.values()])
    return {
        name: piece.to(t).reshape(t.shape)
        for (name, t), piece in zip(like.items(), pieces, strict=True)
    }
