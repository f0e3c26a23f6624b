# mypy: disable-error-code="arg-type,assignment,call-arg,misc"
# Packed weights are tuples that are spread over arguments.
"""Two zeros in each four weights: dense, unless a table says that the library is faster."""

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.making import relative
from torchlathe.ir import OptionError
from torchlathe.kernels.semi_structured import op
from torchlathe.kernels.tuning.table import TileTable, tile_for, using
from torchlathe.tools.kernels import tuning

BRAIN = torch.bfloat16


def weight_of(n: int, k: int, dtype: torch.dtype = BRAIN) -> torch.Tensor:
    order = torch.rand(n, k // 4, 4).argsort(2)
    return (torch.randn(n, k // 4, 4) * (order < 2)).flatten(1).to(dtype)


def test_on_a_cpu_it_is_the_dense_layer() -> None:
    weight, x = weight_of(40, 64), torch.randn(2, 3, 64).to(BRAIN)
    bias, residual = torch.randn(40).to(BRAIN), torch.randn(2, 3, 40).to(BRAIN)
    assert op.compress(weight) is None
    args = (x, weight, None, bias, residual, 40, "relu")
    found = torch.ops.torchlathe.semi_structured_linear(*args)
    wanted = F.relu(x.double() @ weight.double().T + bias.double()) + residual.double()
    assert relative(found, wanted) < 3 * torch.finfo(BRAIN).eps
    exact = op.reference(
        x.double(), weight, None, bias, residual, out_features=40, activation="relu"
    )
    assert relative(exact, wanted) < 1e-12
    torch.library.opcheck(torch.ops.torchlathe.semi_structured_linear.default, args)


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (torch.ones(8, 8), "4 of four weights are not zero"),
        (torch.ones(8, 6), "has no fours"),
        (torch.ones(8), "has no fours"),
    ],
    ids=["dense", "six", "one-axis"],
)
def test_other_weights_are_refused(weight: torch.Tensor, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        op.compress(weight)


def test_few_tokens_are_never_sparse() -> None:
    weight = weight_of(8, 8)
    for m, bucket in ((1, 0), (1023, 0), (1024, 1024), (1025, 2048)):
        assert op.problem_of(torch.zeros(m, 8), weight).bucket == bucket


@pytest.mark.parametrize("speed", [0.5, 0.97, 2.0], ids=["faster", "hardly", "slower"])
def test_the_table_says_which(tmp_path, monkeypatch, speed: float) -> None:
    class Clock:
        def prepare(self, calls):
            return calls[0].__name__

        def seconds(self, prepared: str) -> float:
            return speed if prepared == "sparse" else 1.0

    monkeypatch.setattr(op, "compress", lambda weight: weight)
    monkeypatch.setattr(op, "sparse_product", lambda x, weight: F.linear(x, weight))
    table = TileTable("false", "3.6.0", tmp_path)
    device = torch.device("cpu")
    options = {"shapes": [(16, 32)], "tokens": (1024,)}
    assert tuning.tune_semi_structured(device, Clock(), table, **options) == 1
    problem = op.problem_of(torch.zeros(1000 + 24, 32).half(), torch.zeros(16, 32))
    with using(TileTable("false", "3.6.0", tmp_path), 132):
        assert tile_for(problem, "cuda") == (op.SPARSE if speed == 0.5 else None)


def test_a_wrong_product_is_not_used(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(op, "compress", lambda weight: weight)
    monkeypatch.setattr(op, "sparse_product", lambda x, weight: 1.1 * F.linear(x, weight))
    table = TileTable("false", "3.6.0", tmp_path)
    options = {"shapes": [(16, 32)], "tokens": (1024,)}
    tuning.tune_semi_structured(torch.device("cpu"), None, table, **options)
    assert list(table.entries.values()) == [None]
    assert "the sparse product is another than the dense one" in caplog.text


def test_without_the_library_nothing_is_tuned(tmp_path) -> None:
    table = TileTable("false", "3.6.0", tmp_path)
    assert tuning.tune_semi_structured(torch.device("cpu"), None, table, shapes=[(16, 32)]) == 0
