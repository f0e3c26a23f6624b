"""`sparse-train` in pipelines: exact targets, exact erasing, resuming, reports, bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import torchlathe as tl
from tests.passes.sparse_models import ConvNet, Deep, Mlp, batches
from tests.passes.stacked_unets import StackedUnets
from torchlathe.ir import OptionError, PreconditionError
from torchlathe.passes import SparseTrain
from torchlathe.tools.plots import training_plot


def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, batch[1])


def data_of(shape: tuple[int, ...], count: int = 12) -> list[Any]:
    stream = batches(shape)
    return [next(stream) for _ in range(count)]


def compiled(model: nn.Module, data: list[Any], passes: str, **options: Any) -> Any:
    return tl.compile(
        model.eval(), passes, (data[0][0],), calibration=data, loss=loss, measure_latency=False,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("hesso", "periods=2"),
        ("cric", "method_options={sampling_steps:2,max_cycles:2},pruning=8"),
        pytest.param("dhspg", "method_options={penalty:0.1}", marks=pytest.mark.slow),
        pytest.param("hspg", "method_options={penalty:0.1,project_step:1}", marks=pytest.mark.slow),
    ],
    ids=["hesso", "cric", "dhspg", "hspg"],
)
def test_a_pipeline_trains_and_erases_exactly(method: str, more: str) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    data = data_of((8, 3, 6, 6))
    told: list[str] = []
    passes = f"sparse-train{{method={method},sparsity=0.5,steps=40,{more}}}"
    trained = compiled(model, data, passes, progress=told.append)
    small = compiled(model, data, f"{passes},structured-erase{{zeros=true}}")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name  # the caller's own
    record = small.program.history[0]
    assert record.statistics["groups"] == 20
    assert record.statistics["zero_groups"] == 10
    assert record.exactness == "trained"
    assert small.program.history[1].exactness == "exact"
    assert small.program.history[1].statistics["erased_units"] == 10
    curve = record.details["training"]["sparse-train"]
    assert curve["records"][-1]["group_sparsity"] == 0.5
    assert len(curve["losses"]) == len(curve["records"])
    assert any("10 of 10 groups zero" in line for line in told)
    drawing = training_plot(SimpleNamespace(passes=[record.to_dict()]))  # type: ignore[arg-type]
    assert "sparse-train" in drawing
    assert "zero groups" in drawing
    x = data[0][0]
    # Float32, on both sides of the erase.
    torch.testing.assert_close(small(x), trained(x), rtol=1e-5, atol=1e-5)
    assert small.conv1.weight.shape[0] < 12 or small.stem.weight.shape[0] < 8


def test_healing_keeps_what_is_left() -> None:
    torch.manual_seed(0)
    data = data_of((16, 6))
    passes = "sparse-train{steps=20,periods=2},structured-erase{zeros=true},heal{steps=5}"
    small = compiled(Mlp(), data, passes)
    assert [record.changed for record in small.program.history][:2] == [True, True]
    assert sum(p.numel() for p in small.parameters()) < 400


def test_whole_branches() -> None:
    torch.manual_seed(0)
    model = StackedUnets()
    data = [(torch.randn(2, 3, 32, 32), None) for _ in range(4)]

    def energy(outputs: torch.Tensor, _: Any) -> torch.Tensor:
        return outputs.square().mean()

    small = tl.compile(
        model.eval(),
        "sparse-train{method=h2spg,sparsity=0.3,steps=6,held_out=0.25},erase-operators{zeros=true}",
        (data[0][0],),
        calibration=data,
        loss=energy,
        measure_latency=False,
    )
    assert small.program.history[0].statistics["zero_branches"] >= 1
    assert small.program.history[1].statistics["erased_branches"] >= 1
    assert small.program.history[1].exactness == "exact"


@pytest.mark.parametrize(
    ("passes", "branches"),
    [
        ('sparse-train{method=h2spg,MORE,frozen=["blocks.1*"]}', {0, 2, 3}),
        ("insert-lora{rank=2},sparse-train{method=h2spg,MORE,decay-frozen=true},merge-lora",
         {0, 1, 2, 3}),
    ],
    ids=["frozen", "adapters"],
)  # fmt: skip
def test_branches_with_frozen_weights(passes: str, branches: set[int]) -> None:
    torch.manual_seed(0)
    model, data = Deep(), data_of((16, 6))
    before = copy.deepcopy(model.state_dict())
    more = "sparsity=0.4,steps=20,lr=0.01"
    small = compiled(model, data, f"{passes.replace('MORE', more)},erase-operators{{zeros=true}}")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    records = {str(record.spec).partition("{")[0]: record for record in small.program.history}
    assert records["sparse-train"].statistics["zero_branches"] >= 1
    assert records["erase-operators"].statistics["erased_branches"] >= 1
    assert records["erase-operators"].exactness == "exact"
    left = {int(name.split(".")[1]) for name in small.program.parameters if "blocks" in name}
    assert left >= {0, 1, 2, 3} - branches


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    data = data_of((16, 6))
    spec = "sparse-train{{steps=20,periods=2,checkpoint={},save_every=3}}"

    class Stop(Exception):
        pass

    def interrupt(line: str) -> None:
        if line.startswith("step 11 of"):
            raise Stop

    torch.manual_seed(0)
    model = Mlp()
    whole = compiled(model, data, spec.format(tmp_path / "a"))
    with pytest.raises(Exception, match=r".*"):
        compiled(model, data, spec.format(tmp_path / "b"), progress=interrupt)
    told: list[str] = []
    resumed = compiled(model, data, spec.format(tmp_path / "b"), progress=told.append)
    assert any("going on from step 9" in line for line in told)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_groups_that_are_not_trained_stay_whole() -> None:
    torch.manual_seed(0)
    model = Mlp()
    data = data_of((16, 6))
    found = compiled(model, data, "sparse-train{steps=10,periods=1,frozen=[enter.*]}")
    assert torch.equal(found.enter.weight, model.enter.weight)
    record = found.program.history[0]
    assert record.statistics["groups"] == 20
    notes = [d["message"] for d in record.diagnostics]
    assert any("enter.weight is not trained" in text for text in notes)


def test_early_stopping_waits_for_the_zeros() -> None:
    torch.manual_seed(0)
    data = data_of((16, 6))
    passes = "sparse-train{steps=60,periods=1,lr=0.5,patience=1,evaluate_every=1,keep_best=false}"
    found = compiled(Mlp(), data, passes)
    statistics = found.program.history[0].statistics
    assert statistics["zero_groups"] == 16
    assert 36 <= statistics["steps"] < 60
    assert statistics["stopped"] == "early"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "between 0 and 1"),
        ({"start": 50, "pruning": 60, "steps": 100}, "pruning ends after step 110"),
        ({"start": 0.5, "pruning": 0.6, "steps": 100}, "pruning ends after step 110"),
        ({"saliency": {"magnitud": 1.0}}, "no criterion magnitud"),
        ({"method": "hspg", "method_options": {"tolerance": 0.1}}, "hspg has no option tolerance"),
        ({"method_options": {"target_sparsity": 0.1}}, "hesso has no option target_sparsity"),
        ({"optimizer": "Adamw"}, "no Adamw"),
        ({"periods": 0}, "periods=0"),
    ],
    ids=[
        "sparsity",
        "past-the-end",
        "shares",
        "criterion",
        "method-option",
        "own-option",
        "base",
        "periods",
    ],
)
def test_bad_options_are_refused_before_any_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SparseTrain(**options)


def test_data_and_a_loss_are_needed() -> None:
    x = torch.randn(4, 6)
    with pytest.raises(PreconditionError, match="calibration"):
        tl.compile(Mlp().eval(), "sparse-train", (x,))
    with pytest.raises(PreconditionError, match="loss"):
        tl.compile(Mlp().eval(), "sparse-train", (x,), calibration=[(x, x)])
