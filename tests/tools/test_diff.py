"""Two programs side by side: alignment, where the error starts, and how it grows."""

import json
import math

import pytest
import torch
from torch import nn

import torchlathe as tl
from torchlathe.ir import InputError, OptionError, capture
from torchlathe.passes import PassManager
from torchlathe.tools.cli import main
from torchlathe.tools.diff import ProgramDiff, diff


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), Block(8, 16), Block(8, 16), nn.Linear(8, 3)).eval()


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def test_equal_programs_differ_nowhere() -> None:
    program = capture(net(), (X,))
    found = diff(program, program.copy())
    assert found.equal
    assert not found.starts
    assert not found.only_first
    assert all(row.error == 0.0 for row in found.compared)
    assert "nowhere" in found.text()


def test_the_error_starts_at_the_weight_that_was_changed() -> None:
    program, other = capture(net(), (X,)), net()
    with torch.no_grad():
        other.get_parameter("1.down.weight").mul_(1.1)
    found = diff(program, other)  # captured anew: aligned by provenance
    (start,) = found.starts
    assert (start.module, start.op) == ("1.down", "aten.linear.default")
    assert start.before == 0.0
    assert math.isinf(start.growth)
    # The bias is not scaled, so the error is below a tenth.
    assert start.error is not None
    assert 0.02 < start.error < 0.1
    assert not found.equal
    after = [row for row in found.compared if row.index > start.index]
    assert all(row.before > 0 for row in after)
    text = found.text()
    assert "1.down" in text
    assert "Where it grows most" in text


def test_two_mistakes_are_two_starts_where_the_second_adds_its_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(x), self.b(x)

    torch.manual_seed(0)
    first, second = Two(), Two()
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        second.a.bias.add_(1)
        second.b.weight.neg_()
    found = diff(first, second, X)
    assert [row.module for row in found.starts] == ["a", "b"]
    assert [name for name, _ in found.outputs] == ["[0]", "[1]"]
    assert found.grows(1)[0].module in ("a", "b")


def test_erased_indices_are_left_out_of_the_comparison() -> None:
    """The hidden units that stayed are equal; what was lost shows where they are summed."""
    program = capture(net(), (X,))
    erased = PassManager("structured-erase{sparsity=0.4,include=[1.up.weight:0]}").run(program)
    found = diff(program, erased)
    rows = {(row.module, row.op): row for row in found.compared}
    up = rows["1.up", "aten.linear.default"]
    assert up.matched < 1
    assert up.error == pytest.approx(0, abs=1e-6)  # float32 in another order of summation
    assert [row.module for row in found.starts] == ["1.down"]


def test_a_layer_that_became_two_is_compared_where_its_value_comes_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    x = torch.randn(8, 64)
    program = capture(model, (x,))
    split = PassManager("low-rank-split{rank=8,include=[0.weight]}").run(program)
    # Other inputs than the eight that the split was fitted to, on which rank 8 is exact.
    found = diff(program, split, torch.randn(8, 64))
    (start,) = found.starts
    assert start.module == "0"
    assert start.made_by.startswith("low-rank-split")


def test_a_fused_op_is_compared_with_the_last_op_that_went_into_it(tmp_path) -> None:
    model = Block(64, 128).eval()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    compiled = tl.compile(model, "quantize,fuse-kernels{choose=rule}", (x,), measure_latency=False)
    compiled.save(tmp_path / "fused.tl")
    for second in (compiled, tl.load(tmp_path / "fused.tl")):
        found = diff(model, second, x)
        rows = {row.name: row for row in found.compared}
        # The activation and the sum with the input are in the ops, and stand for those nodes.
        assert rows["relu"].op == rows["add"].op == "torchlathe.w8a8_linear.default"
        ((_, output),) = found.outputs
        assert output == rows["add"]
        with torch.no_grad():
            want = float((compiled(x) - model(x)).norm() / model(x).norm())
        assert output.error == pytest.approx(want, rel=1e-3)  # float32 in one, float64 in the other
        assert want < 0.02


def test_float64_leaves_rounding_out() -> None:
    program = capture(net(), (X,))
    erased = PassManager("structured-erase{sparsity=0.4,include=[1.up.weight:0]}").run(program)
    found = diff(program, erased, dtype=torch.float64, threshold=1e-12)
    assert [row.module for row in found.starts] == ["1.down"]


def test_other_inputs_and_compiled_models() -> None:
    model = net()
    compiled = tl.compile(model, (), X, dynamic_shapes="auto", measure_latency=False)
    found = tl.diff(compiled, compiled, torch.randn(9, 6), names=("a", "b"))
    assert found.inputs == ("float32[9, 6]",)
    assert (found.first, found.second) == ("a", "b")
    assert found.equal


def test_nan_is_a_problem_and_no_number() -> None:
    program, other = capture(net(), (X,)), net()
    with torch.no_grad():
        other.get_parameter("3.bias").fill_(math.nan)
    found = diff(program, other)
    (_, row), *_ = found.outputs
    assert row.problem == "NaN or infinity"
    assert not found.equal
    json.loads(found.to_json())


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="there are no inputs"):
        diff(net(), net())
    program = capture(net(), (X,))
    with pytest.raises(InputError, match="must not be negative"):
        diff(program, program, threshold=-1)
    with pytest.raises(InputError, match="dimension 1"):
        diff(program, program, torch.randn(4, 7))


def test_the_picture_is_the_same_for_the_same_diff(tmp_path) -> None:
    program, other = capture(net(), (X,)), net()
    with torch.no_grad():
        other.get_parameter("1.down.weight").mul_(1.1)
    found = diff(program, other)
    for name in ("a.svg", "b.svg", "c.png"):
        found.picture(tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").stat().st_size > 5000
    with pytest.raises(OptionError, match=r"not x\.jpg"):
        found.picture(tmp_path / "x.jpg")


def test_the_command_line(tmp_path, capsys) -> None:
    model = net()
    tl.compile(model, (), X, measure_latency=False).save(tmp_path / "a.tl")
    passes = "structured-erase{sparsity=0.4,include=[1.up.weight:0]}"
    tl.compile(model, passes, X, measure_latency=False).save(tmp_path / "b.tl")
    names = [str(tmp_path / "a.tl"), str(tmp_path / "b.tl")]
    assert main(["diff", *names, "--picture", str(tmp_path / "d.svg"), "--all"]) == 0
    out = capsys.readouterr().out
    assert "The error starts" in out
    assert "All values" in out
    assert main(["diff", *names, "--json", "--fail"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["starts"]
    assert main(["diff", names[0], names[0], "--fail"]) == 0
    assert main(["diff", *names, "--threshold", "-1"]) == 2


def test_rows_come_as_plain_values() -> None:
    program = capture(net(), (X,))
    found = diff(program, program)
    assert isinstance(found, ProgramDiff)
    data = found.to_dict()
    assert data["rows"][0]["error"] == 0.0
    assert json.loads(found.to_json()) == json.loads(json.dumps(data))
