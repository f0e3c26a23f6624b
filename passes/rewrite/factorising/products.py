"""Products and eigenvectors in float64 that hold few copies of a matrix at a time.

Weights are float32 or less, and all sums are made in float64. A matrix that is read is widened by
blocks of rows, so that beside a result there is only a block of it; eigensolvers overwrite their
matrix and return no more vectors than are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

__all__ = ["Moment", "Read", "Wide", "blocks", "eigenvalues", "largest", "orthonormal"]

Read: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

# Rows of a block: as many as make products fast, and few of the whole.
_FEWEST, _MOST, _PARTS = 128, 512, 8
# Below this size LAPACK's workspace is nothing, and torch's solvers are at hand.
_SMALL = 256


def blocks(rows: int) -> Iterator[slice]:
    """Slices that cover so many rows."""
    step = max(_FEWEST, min(_MOST, rows // _PARTS))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass(frozen=True)
class Wide:
    """``M = D W`` in float64, of which a block of rows is there at a time.

    Attributes:
        weight: W, (outs, ins), of any floating dtype.
        scale: The diagonal of D, (outs,) float64; None for ones.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix: (outs, ins)."""
        outs, ins = self.weight.shape
        return int(outs), int(ins)

    def rows(self, part: slice) -> torch.Tensor:
        """A block of rows; not to be changed, for it may be the weight."""
        block = self.weight[part].detach().double()
        return block if self.scale is None else block * self.scale[part, None]

    def map(self, read: Read, columns: int) -> torch.Tensor:
        """What a map of rows makes of all of them, (outs, columns)."""
        found = self._new(self.shape[0], columns)
        for part in blocks(self.shape[0]):
            found[part] = read(self.rows(part))
        return found

    def of(self, other: torch.Tensor) -> torch.Tensor:
        """M X, for X (ins, n)."""
        return self.map(lambda block: block @ other, int(other.shape[1]))

    def under(self, other: torch.Tensor) -> torch.Tensor:
        """X' M, for X (outs, n)."""
        found = self._new(int(other.shape[1]), self.shape[1]).zero_()
        for part in blocks(self.shape[0]):
            found.addmm_(other[part].T, self.rows(part))
        return found

    def outer(self, read: Read) -> torch.Tensor:
        """M A M' with both triangles, where ``read`` multiplies rows with A, a symmetric matrix."""
        outs = self.shape[0]
        found = self._new(outs, outs)
        for part in blocks(outs):
            own = read(self.rows(part))
            for other in blocks(outs):
                if other.start > part.start:
                    break
                block = own @ self.rows(other).T
                found[part, other] = block
                found[other, part] = block.T
        return found

    def inner(self, read: Read) -> torch.Tensor:
        """C' M' M C with both triangles, where ``read`` multiplies rows with C, (ins, ins)."""
        ins = self.shape[1]
        found = self._new(ins, ins).zero_()
        for part in blocks(self.shape[0]):
            own = read(self.rows(part))
            found.addmm_(own.T, own)
        return found

    def inner_product(self, other: Wide) -> float:
        """tr(M X'), for another one of the same shape."""
        parts = blocks(self.shape[0])
        return sum(float((self.rows(part) * other.rows(part)).sum()) for part in parts)

    def _new(self, rows: int, columns: int) -> torch.Tensor:
        return self.weight.new_empty(rows, columns, dtype=torch.float64)


@dataclass(frozen=True)
class Moment:
    """Second moment ``A = (S_1 + ...) / count - m m'``, whose sums are read where they lie.

    They may be in memory-mapped files: with wide inputs they are many times the size of the weight.

    Attributes:
        sums: Of products of the inputs, each (ins, ins) float64.
        count: Of samples.
        mean: m, (ins,) float64; None where nothing is taken off.
    """

    sums: tuple[torch.Tensor, ...]
    count: float
    mean: torch.Tensor | None = None

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """X A, for X (n, ins) in float64."""
        found = rows @ self.sums[0].to(rows.device)
        for more in self.sums[1:]:
            found.addmm_(rows, more.to(rows.device))
        found /= self.count
        if self.mean is not None:
            mean = self.mean.to(rows.device)
            found.addr_(rows @ mean, mean, alpha=-1)
        return found

    def diagonal(self) -> torch.Tensor:
        """Of A, (ins,)."""
        found = sum((part.diagonal() for part in self.sums[1:]), self.sums[0].diagonal())
        found = found / self.count
        return found if self.mean is None else found - self.mean.square()

    def dense(self) -> torch.Tensor:
        """A, a new tensor (ins, ins)."""
        found = self.sums[0] / self.count
        for more in self.sums[1:]:
            found.add_(more, alpha=1 / self.count)
        return found if self.mean is None else found.addr_(self.mean, self.mean, alpha=-1)


def largest(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The largest eigenvalues of a symmetric matrix, rising, with their vectors.

    Args:
        matrix: Shape (n, n) float64 with both triangles, contiguous; it is overwritten.
        count: How many, at least 1.

    Returns:
        Values (count,), vectors (n, count), and the sum of the other values.
    """
    size, whole = len(matrix), float(matrix.diagonal().sum())
    if _by_lapack(matrix):
        first = size - count + 1
        found = _solved(matrix, lambda lapack, a: lapack.dsyevr(
            a, range="I", il=first, iu=size, overwrite_a=1))  # fmt: skip
        if found is not None:
            values, vectors = (torch.from_numpy(array) for array in found[:2])
            values = values[:count].clone()
            return values, vectors, whole - float(values.sum())
    if matrix.device.type == "cpu":
        vectors = matrix.mT  # the solver works in place, on columns
        values = matrix.new_empty(size)
        torch.linalg.eigh(vectors, out=(values, vectors))
    else:
        values, vectors = torch.linalg.eigh(matrix)
    return values[size - count :], vectors[:, size - count :], float(values[: size - count].sum())


def eigenvalues(matrix: torch.Tensor) -> torch.Tensor:
    """All eigenvalues of a symmetric matrix, rising, (n,); as `largest`, it is overwritten."""
    if _by_lapack(matrix):
        found = _solved(matrix, lambda lapack, a: lapack.dsyevd(a, compute_v=0, overwrite_a=1))
        if found is not None:
            return torch.from_numpy(found[0])
    values: torch.Tensor = torch.linalg.eigvalsh(matrix)
    return values


def orthonormal(vectors: torch.Tensor) -> torch.Tensor:
    """A basis of what columns span, by QR; columns may depend on each other."""
    basis: torch.Tensor = torch.linalg.qr(vectors).Q
    return basis


def _by_lapack(matrix: torch.Tensor) -> bool:
    return matrix.device.type == "cpu" and len(matrix) >= _SMALL


def _solved(matrix: torch.Tensor, solver: Callable[[Any, Any], Any]) -> Any:
    """What a solver of LAPACK returns; None without scipy, or where it does not converge.

    With None the matrix is as it was. scipy's solvers work in the matrix itself, and `dsyevr` makes
    only as many vectors as are asked for: torch's has a workspace of twice the matrix.
    """
    try:
        from scipy.linalg import lapack
    except ImportError:
        return None
    diagonal = matrix.diagonal().clone()
    *found, failed = solver(lapack, matrix.numpy().T)
    if not failed:
        return found
    # All but what is above the diagonal is lost.
    above = matrix.triu(1)
    torch.add(above, above.T, out=matrix)
    matrix.diagonal().copy_(diagonal)
    return None
