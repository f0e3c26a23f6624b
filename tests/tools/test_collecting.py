import json
import math

import pytest
import torch
from torch import nn

from tests.tools.nets import Net
from torchlathe.backends import CompiledModel
from torchlathe.ir import capture
from torchlathe.passes import PassManager
from torchlathe.tools.collecting import collect_report, pin_rows, record_dict
from torchlathe.tools.inspecting import inspect_program
from torchlathe.tools.report import ParameterRow, Report

PIPELINE = "structured-erase{sparsity=0.5}"


@pytest.fixture(scope="module")
def compressed():
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 16)
    before = capture(model, (x,), dynamic_shapes="auto")
    after = PassManager(PIPELINE).run(before)
    return model, before, after, CompiledModel(after)


def test_report_of_an_erased_model(compressed) -> None:
    model, before, after, compiled = compressed
    report = collect_report(
        before,
        after,
        original=model,
        compiled=compiled,
        calibration=[torch.randn(3, 16) for _ in range(20)],
        pipeline=PIPELINE,
        latency_seconds=0.05,
        stages={"capture": 1.0},
        notes=["a note"],
    )
    assert Report.from_dict(json.loads(report.to_json())) == report
    assert report.before.parameters == sum(p.numel() for p in model.parameters())
    assert report.after.parameters == sum(p.numel() for p in compiled.parameters())
    assert (report.before.bytes, report.before.nodes) == (4 * report.before.parameters, 3)
    assert report.before.flops == 2 * 4 * (16 * 64 + 64 * 10)
    (family,) = [row for row in report.families if row.prunable]
    kept = compiled.get_parameter("up.weight").shape[0]
    assert (family.name, family.extent, family.kept) == ("up.weight:0", 64, kept)
    assert family.parameters == 64 * (16 + 1 + 10)
    assert ParameterRow("down.weight", (10, 64), (10, kept)) in report.parameters
    assert {row.name for row in report.parameters} == {"up.weight", "up.bias", "down.weight"}
    assert [row.reason for row in report.pins]
    (entry,) = report.fidelity
    assert (entry.batches, report.fidelity_inputs) == (8, "8 calibration batches")
    assert report.latency is not None
    assert report.stages.keys() == {"capture", "measure"}
    assert report.seconds == pytest.approx(sum(report.stages.values()))
    assert report.inputs == ("args[0]: float32[4, 16]",)
    assert report.passes[0]["spec"] == PIPELINE
    assert PIPELINE in report.text()
    assert "a note" in report.to_html()


def test_without_callables_nothing_is_measured(compressed) -> None:
    _, before, after, _ = compressed
    report = collect_report(before, after)
    assert (report.latency, report.fidelity, report.fidelity_inputs) == (None, (), "")


def test_only_the_passes_of_this_run_are_told(compressed) -> None:
    _, _, after, _ = compressed
    again = PassManager(PIPELINE).run(after)
    assert len(again.history) == 2
    report = collect_report(after, again)
    assert len(report.passes) == 1
    assert report.passes[0]["parameters_before"] == report.before.parameters


def test_labels_of_batches_are_left_out(compressed) -> None:
    model, before, after, compiled = compressed
    batches = [(torch.randn(2, 16), torch.tensor([1, 2]))]
    report = collect_report(
        before, after, original=model, compiled=compiled, calibration=batches, latency_seconds=0
    )
    assert report.fidelity[0].shape == (2, 10)
    assert report.fidelity_inputs == "1 calibration batch"


def test_batches_that_do_not_fit_are_told_and_left_out() -> None:
    model, x = Net().eval(), torch.randn(4, 16)
    program = capture(model, (x,))
    compiled = CompiledModel(program)
    batches = [x, torch.randn(3, 16)]
    report = collect_report(
        program, program, original=model, compiled=compiled, calibration=batches, latency_seconds=0
    )
    assert report.fidelity_inputs == "1 calibration batch"
    (note,) = report.notes
    assert note.startswith("1 of 2 calibration batches do not fit what was captured")
    report = collect_report(
        program,
        program,
        original=model,
        compiled=compiled,
        calibration=batches[1:],
        latency_seconds=0,
    )
    assert report.fidelity_inputs == "the example inputs"
    assert len(report.notes) == 1


def test_records_become_plain() -> None:
    record = {"spec": "p", "statistics": {"a": math.inf, "b": torch.float32}, "names": {"y", "x"}}
    plain = record_dict(record)
    assert plain == {
        "spec": "p",
        "statistics": {"a": "inf", "b": "torch.float32"},
        "names": ["x", "y"],
    }
    assert record_dict("p") == {"spec": "p"}


def test_inspection() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x, *, y):
            return {"out": self.net(x) + y, "n": 3}

    inputs = (torch.randn(4, 16),)
    program = capture(Two(), inputs, {"y": torch.randn(4, 1)}, dynamic_shapes="auto")
    found = inspect_program(program, notes=("a note",))
    assert found.inputs == ("args[0]: float32[s0=4, 16]", "y: float32[s0=4, 1]")
    assert found.outputs == ("out: float32[s0, 10]", "n: 3")
    assert found.cost is not None
    assert found.cost.operators[0].name == "aten.linear.default"
    assert found.cost.operators[0].calls == 2
    assert {row.name for row in found.cost.modules} == {"net", "net.up", "net.down", "(top)"}
    assert sum(row.flops for row in found.cost.modules) == found.totals.flops
    assert 0 < found.free_share <= 1
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_pins_are_grouped_by_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    program = capture(model, (torch.randn(2, 3, 9, 9),))
    rows = pin_rows(inspect_program(program).result)
    reasons = [row.reason for row in rows]
    assert len(set(reasons)) == len(reasons)
    (kernel,) = [row for row in rows if "kernel" in row.reason]
    assert len(kernel.families) == 4
    assert len(kernel.places) == 2
