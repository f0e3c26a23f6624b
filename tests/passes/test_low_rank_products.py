"""Products and eigenvectors that hold few copies: against plain float64 algebra."""

from typing import Any

import pytest
import torch

from torchlathe.passes.rewrite.factorising import products
from torchlathe.passes.rewrite.factorising.products import (
    Moment,
    Wide,
    blocks,
    eigenvalues,
    largest,
)
from torchlathe.passes.rewrite.factorising.splits import spectrum, whitened_split

# Sums of a few hundred products of numbers near one, in float64.
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rows", [1, 127, 128, 700, 5000])
def test_blocks_cover_each_row_once(rows: int) -> None:
    found = [row for part in blocks(rows) for row in range(rows)[part]]
    assert found == list(range(rows))


@pytest.mark.parametrize("scaled", [False, True])
def test_products_by_blocks_are_those_of_the_whole(scaled: bool) -> None:
    weight = random(300, 40).float()
    scale = random(300, seed=1).abs() + 0.1 if scaled else None
    whole = weight.double() if scale is None else weight.double() * scale[:, None]
    wide = Wide(weight, scale)
    root = random(40, 40, seed=2)
    moment = root @ root.T
    other, tall = random(40, 7, seed=3), random(300, 7, seed=4)
    torch.testing.assert_close(wide.of(other), whole @ other, **CLOSE)
    torch.testing.assert_close(wide.under(tall), tall.T @ whole, **CLOSE)
    outer = wide.outer(lambda rows: rows @ moment)
    torch.testing.assert_close(outer, whole @ moment @ whole.T, **CLOSE)
    torch.testing.assert_close(outer, outer.T, **CLOSE)
    read = whole @ root
    torch.testing.assert_close(wide.inner(lambda rows: rows @ root), read.T @ read, **CLOSE)
    assert wide.inner_product(wide) == pytest.approx(float(whole.square().sum()), rel=1e-12)


def test_a_moment_of_sums_is_the_covariance() -> None:
    first, second = random(50, 12), random(30, 12, seed=1) + 1
    data = torch.cat([first, second])
    moment = Moment((first.T @ first, second.T @ second), len(data), data.mean(0))
    wanted = torch.cov(data.T, correction=0)
    torch.testing.assert_close(moment.dense(), wanted, **CLOSE)
    torch.testing.assert_close(moment.diagonal(), wanted.diagonal(), **CLOSE)
    rows = random(5, 12, seed=2)
    torch.testing.assert_close(moment.read(rows), rows @ wanted, **CLOSE)
    weight = random(20, 12, seed=3)
    split, plain = (whitened_split(weight, given, 4) for given in (moment, wanted))
    torch.testing.assert_close(split.product, plain.product, **CLOSE)
    torch.testing.assert_close(
        spectrum(weight, inputs=moment), spectrum(weight, inputs=wanted), **CLOSE
    )


@pytest.mark.parametrize("kind", ["decaying", "few directions", "one value", "zeros"])
@pytest.mark.parametrize("size", [40, 300])  # by torch, and by LAPACK's solver for some vectors
def test_largest_eigenvalues(kind: str, size: int) -> None:
    basis = torch.linalg.qr(random(size, size)).Q
    values = {
        "decaying": torch.logspace(0, -12, size, dtype=torch.float64),
        "few directions": torch.arange(size).lt(5).double(),
        "one value": torch.ones(size, dtype=torch.float64),
        "zeros": torch.zeros(size, dtype=torch.float64),
    }[kind]
    matrix = (basis * values) @ basis.T
    matrix = (matrix + matrix.T) / 2
    count = size // 3
    found, vectors, rest = largest(matrix.clone(), count)
    torch.testing.assert_close(found, values[:count].flip(0), **CLOSE)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(count).double(), **CLOSE)
    torch.testing.assert_close(matrix @ vectors, vectors * found, **CLOSE)
    assert rest == pytest.approx(float(values[count:].sum()), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(eigenvalues(matrix.clone()), values.flip(0), **CLOSE)


def test_a_solver_that_does_not_converge_leaves_it_to_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from scipy.linalg import lapack

    def failing(matrix: Any, **options: Any) -> Any:
        # As LAPACK does: what is below the diagonal of the rows is lost, and the diagonal.
        rows = torch.from_numpy(matrix.T)
        rows.copy_(rows.triu(1))
        return None, None, 0, None, 1

    matrix = random(300, 400)
    matrix = matrix @ matrix.T
    wanted = largest(matrix.clone(), 10)
    monkeypatch.setattr(lapack, "dsyevr", failing)
    found = largest(matrix.clone(), 10)
    torch.testing.assert_close(found[0], wanted[0], **CLOSE)
    assert found[2] == pytest.approx(wanted[2], rel=1e-9)
    assert products._SMALL <= 300
