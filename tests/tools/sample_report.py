"""A made-up report with everything that a report can hold."""

from __future__ import annotations

from torchlathe.tools.fidelity import OutputFidelity
from torchlathe.tools.latency import Latency
from torchlathe.tools.report import FamilyRow, ParameterRow, PinRow, Report, Totals

PLACE = "encoder at /opt/lib/site-packages/nets/modeling.py:12 (forward)"


def record(spec: str, before: int, after: int) -> dict[str, object]:
    return {
        "spec": spec,
        "seconds": 0.84,
        "changed": before != after,
        "exactness": "exact",
        "nodes_before": 20,
        "nodes_after": 20,
        "parameters_before": before,
        "parameters_after": after,
        "bytes_before": 4 * before,
        "bytes_after": 4 * after,
        "flops_before": 60.0 * before,
        "flops_after": 60.0 * after,
        "statistics": {"erased_units": 4212, "scope": "global"},
        "diagnostics": [
            {"severity": "warning", "message": "a <warning>", "name": "linear_3", "where": PLACE},
            {"severity": "note", "message": "a note", "name": None, "where": None},
        ],
        "analyses": {"computed": ["axis-terms"], "reused": [], "dropped": []},
        "verification": {"level": "fast", "max_rel_error": 3.2e-16, "passed": True},
        "peak_memory": None,
    }


def sample_report() -> Report:
    families = [
        FamilyRow(
            "stem.weight:0", 32, 32, 40_000, "exact-after-correction", ("means still count",)
        ),
        FamilyRow("gate.weight:0", 32, 32, 30_000, "approximate", (f"sigmoid(0): %gate {PLACE}",)),
    ]
    families += [
        FamilyRow(f"layer.{i}.up.weight:0", 64, 64 - 4 * i, 10_000 - i, "exact") for i in range(20)
    ]
    families.append(
        FamilyRow("head.weight:0", 10, 10, 200, "approximate", ("it is an output",), False)
    )
    return Report(
        model="Net<br>",
        pipeline="structured-erase{sparsity=0.3},tidy",
        before=Totals(22_713_216, 90_852_864, 1.36e9, 20),
        after=Totals(19_800_000, 79_200_000, 1.01e9, 20),
        passes=(
            record("structured-erase{sparsity=0.3}", 22_713_216, 19_800_000),
            record("tidy", 19_800_000, 19_800_000),
        ),
        latency=Latency((14.0, 14.5, 14.1), (10.0, 10.5, 30.0), 2, "cpu", ("int64[8, 32]",)),
        fidelity=(
            OutputFidelity("logits", (8, 10), "float32", 4, 0.98, 0.91, 0.19, 1.2, 0.95, 0.0),
            OutputFidelity("count", (8,), "int64", 4, equal=1.0, note="an integer"),
        ),
        fidelity_inputs="4 calibration batches",
        families=tuple(families),
        pins=(PinRow("it is an output", (PLACE, PLACE, PLACE), ("head.weight:0",), 200),),
        parameters=(
            ParameterRow("layer.1.up.weight", (64, 16), (60, 16)),
            ParameterRow("layer.1.up.bias", (64,), (60,)),
            ParameterRow("gone.weight", (4, 4), None),
        ),
        dropped=("pooler.weight",),
        inputs=("ids: int64[8, 32]",),
        seconds=6.3,
        stages={"capture": 3.1, "passes": 1.1, "measure": 2.1},
        versions={"torchlathe": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
        notes=("the weights are random",),
    )
