"""The examples of docs/writing_passes.md and docs/writing_rules.md, from outside the package."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchlathe.ir import OptionError, Program, capture
from torchlathe.ir.verifying import verify
from torchlathe.passes import Pass, PassManager, get_pass, load_plugin, parse_pipeline, registry

DOCS = Path(__file__).resolve().parents[2] / "docs"
MINE = DOCS / "examples" / "my_passes.py"

pytestmark = pytest.mark.usefixtures("own_registry")


@pytest.fixture
def plugin(own_registry: None) -> tuple[type[Pass], ...]:
    return load_plugin(MINE)


# --- the pages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["passes", "rules"])
def test_the_page_shows_the_file(name: str) -> None:
    page = (DOCS / f"writing_{name}.md").read_text()
    blocks = re.findall(rf"<!-- file: my_{name}\.py -->\n```python\n(.*?)```", page, re.DOTALL)
    assert (
        "\n\n\n".join(map(str.strip, blocks)) + "\n"
        == (DOCS / "examples" / f"my_{name}.py").read_text()
    )


def lines_of(path: Path) -> dict[str, int]:
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            assert node.end_lineno is not None
            found[node.name] = node.end_lineno - first + 1
    return found


def test_the_examples_are_short() -> None:
    lines = lines_of(MINE)
    assert lines["DeadChannels"] <= 60
    assert lines["FoldBatchNorm"] + lines["batch_norms"] <= 60
    assert lines["DropResidual"] + lines["residual"] <= 60
    rules = [line for line in (DOCS / "examples" / "my_rules.py").read_text().splitlines() if line]
    assert len(rules) <= 15


# --- counting dead channels ----------------------------------------------------------------------


def test_dead_channels(plugin: Any) -> None:
    first, second = nn.Linear(4, 8), nn.Linear(8, 8)
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        first.weight[[1, 5]] = 0
        second.weight[3] = 1e-4
    program = capture(net.eval(), (torch.randn(2, 4),))
    dead = get_pass("dead-channels")
    assert program.analysis(dead) == {"0.weight": 2}  # type: ignore[arg-type, comparison-overlap]
    text = "dead-channels{threshold=0.001},dead-channels"
    records = PassManager(text, verify="full").run(program).history
    assert [r.statistics for r in records] == [
        {"layers": 2, "channels": 3},
        {"layers": 1, "channels": 2},
    ]


# --- folding BatchNorm ---------------------------------------------------------------------------


def trained(net: nn.Module) -> nn.Module:
    """Give the norms statistics and weights that are not those of a new module."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            for name, tensor in module.state_dict(keep_vars=True).items():
                if name == "running_var":
                    nn.init.uniform_(tensor, 0.1, 3.0)
                elif tensor.is_floating_point():
                    nn.init.normal_(tensor)
    return net.eval()


def fold(net: nn.Module, x: torch.Tensor) -> Program:
    program = capture(net, (x,), dynamic_shapes="auto")
    folded = PassManager("fold-batch-norm", verify="full").run(program)
    verify(folded, "full")
    with torch.no_grad():
        for inputs in (x, torch.randn(x.shape[0] + 1, *x.shape[1:]).to(x.dtype)):
            torch.testing.assert_close(folded.run(inputs), net(inputs), rtol=1e-3, atol=1e-4)
    return folded


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9)),
        (nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), (2, 4, 9, 9)),
        (nn.Sequential(nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3), nn.ReLU()), (2, 2, 5, 5, 5)),
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8, eps=0.1)), (2, 4, 9, 9)),
        (nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)), (2, 4, 5, 5)),
    ],
    ids=["1d", "no-bias", "3d", "grouped", "no-affine"],
)
def test_norms_are_folded(plugin: Any, net: nn.Module, shape: tuple[int, ...]) -> None:
    folded = fold(trained(net), torch.randn(shape))
    record = folded.history[0]
    assert record.statistics == {"folded": 1}
    assert record.verification["passed"]
    assert "norm" not in folded.to_text()
    assert set(folded.parameters) == {"0.weight", "0.bias"}
    again = PassManager("fold-batch-norm").run(folded)
    assert again.history[1].changed is False


class Branches(nn.Module):
    """A norm after a convolution that is read twice, or whose weight is shared, must stay."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if self.how == "read twice":
            return self.norm(y) + y
        if self.how == "shared":
            return self.norm(y) + self.conv(x * 2)
        if self.how == "computed":
            return self.norm(nn.functional.conv2d(x, self.conv.weight * 2, self.conv.bias))
        return self.norm(torch.relu(y))


@pytest.mark.parametrize("how", ["read twice", "shared", "computed", "relu between"])
def test_near_misses_are_left_alone(plugin: Any, how: str) -> None:
    record = fold(trained(Branches(how)), torch.randn(2, 3, 4, 4)).history[0]
    assert record.changed is False
    assert record.statistics == {"folded": 0}


class InPlace(nn.Module):
    """Writes through a view: capture flattens the graph, and norms have another form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        y[:, 0].add_(1.0)
        return y


def test_the_flattened_form_of_a_norm_is_folded(plugin: Any) -> None:
    net, x = trained(InPlace()), torch.randn(2, 3, 4, 4)
    targets = {str(node.target) for node in capture(net, (x,)).nodes}
    assert "aten._native_batch_norm_legit_no_training.default" in targets
    assert fold(net, x).history[0].statistics == {"folded": 1}


# --- dropping residual branches ------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, gain: float, swapped: bool = False) -> None:
        super().__init__()
        self.linear, self.swapped = nn.Linear(6, 6), swapped
        with torch.no_grad():
            self.linear.weight.mul_(gain)
            self.linear.bias.mul_(gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.linear(x))
        return y + x if self.swapped else x + y


def test_idle_branches_are_dropped(plugin: Any) -> None:
    net = nn.Sequential(Residual(1e-3), Residual(1.0), Residual(1e-3, True), Residual(0.0)).eval()
    program = capture(net, (torch.randn(4, 6),))
    result = PassManager("drop-residual", verify="full").run(program)
    record = result.history[0]
    assert record.exactness == "approximate"
    assert record.statistics["dropped"] == 3
    assert [d["name"] for d in record.diagnostics] == ["add", "add_2", "add_3"]
    assert 0 < record.statistics["error"] < 0.01
    assert record.statistics["error"] == pytest.approx(record.verification["max_rel_error"])
    assert set(result.parameters) == {"1.linear.weight", "1.linear.bias"}
    assert PassManager("drop-residual").run(result).history[1].changed is False


def test_the_calibration_data_decides(plugin: Any) -> None:
    net = nn.Sequential(Residual(0.1), nn.Linear(6, 2)).eval()
    program = capture(net, (torch.full((4, 6), 100.0),))
    assert PassManager("drop-residual{threshold=0.05}").run(program).history[0].changed
    small = [torch.full((4, 6), 0.1), torch.full((4, 6), 0.2)]
    kept = PassManager("drop-residual{threshold=0.05}").run(program, calibration=small)
    assert kept.history[0].changed is False
    assert kept.history[0].statistics == {"dropped": 0, "error": 0.0}


class Sums(nn.Module):
    """Sums that are no residual branches: of two branches, broadcast, and scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.row = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x) + self.b(x)
        return torch.add(y + self.row(y), torch.relu(y), alpha=2) + 1


def test_other_sums_are_left_alone(plugin: Any) -> None:
    program = capture(Sums().eval(), (torch.randn(4, 6),))
    assert not PassManager("drop-residual{threshold=0.99}").run(program).history[0].changed


def test_a_bad_threshold_is_refused_at_its_place(plugin: Any) -> None:
    with pytest.raises(OptionError) as caught:
        parse_pipeline("drop-residual{threshold=1.5}")
    assert str(caught.value) == (
        "threshold must be in [0, 1), got 1.5\n"
        "    drop-residual{threshold=1.5}\n"
        "                  ^^^^^^^^^"
    )


# --- from the command line, and installed --------------------------------------------------------


def run(*words: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "torchlathe", *words]
    environment = {"PYTHONPATH": f"{DOCS.parent}:{cwd}", "COLUMNS": "160", "NO_COLOR": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_takes_the_file(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()\n"
    )
    text = run(
        *("compile", "nets:net", "--inputs", "float32[batch=2,3,8,8]", "--no-latency"),
        *("--plugin", str(MINE), "--passes", "fold-batch-norm,dead-channels"),
        cwd=tmp_path,
    )
    assert "fold-batch-norm" in text
    assert "exact" in text


def test_an_entry_point_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_registry: None
) -> None:
    shutil.copy(MINE, tmp_path / "my_installed_passes.py")
    info = tmp_path / "my_passes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-passes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[torchlathe.passes]\n"
        "fold-batch-norm = my_installed_passes:FoldBatchNorm\n"
        "drop-residual = my_installed_passes:DropResidual\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    text = "fold-batch-norm,drop-residual{threshold=0.5}"
    manager = PassManager(text)
    assert str(manager) == text
    assert PassManager(str(manager)) == manager
    assert type(manager.passes[0]).__module__ == "my_installed_passes"
    assert registry.plugin_of(type(manager.passes[0])) is None
    assert "drop-residual" in run("passes", cwd=tmp_path)
    sys.modules.pop("my_installed_passes")


def test_a_rule_comes_with_a_plugin() -> None:
    from torchlathe.ir.axes import rule_of

    assert load_plugin(DOCS / "examples" / "my_rules.py") == ()
    program_of_op = torch.fx.Graph()
    x = program_of_op.placeholder("x")
    node = program_of_op.call_function(torch.ops.mylib.scaled_linear.default, (x, x, 0.5))
    assert rule_of(node) is not None
