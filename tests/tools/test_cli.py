import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tools import nets
from torchlathe import __version__
from torchlathe.backends import load
from torchlathe.tools.cli import main
from torchlathe.tools.report import Report

ROOT = Path(__file__).resolve().parents[2]
HALF = "structured-erase{sparsity=0.5}"
PLUGIN = """
from dataclasses import dataclass, field
from typing import ClassVar
from torchlathe.passes import PassResult, RewritePass

@dataclass(frozen=True)
class Idle(RewritePass):
    \"\"\"Does nothing at all.

    Attributes:
        times: How often it does
            nothing.
    \"\"\"

    name: ClassVar[str] = "idle-for-tests"
    times: int = 1

    def run(self, program, ctx):
        return PassResult(False, {"times": self.times})
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "nets.py").write_text(Path(nets.__file__).read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def compile_json(capsys, *words: str) -> Report:
    assert main(["compile", "nets.py:pair", "--no-latency", "--json", *words]) == 0
    return Report.from_dict(json.loads(capsys.readouterr().out))


# -- compile -----------------------------------------------------------------------------------


def test_compile_saves_and_reports(capsys) -> None:
    words = ["-p", HALF, "--dynamic", "auto", "-o", "out/small.tl", "--report", "out/small.html"]
    assert main(["compile", "nets.py:pair", *words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for part in ("Net · structured-erase", "parameters", "latency", "wrote the model to out/small"):
        assert part in captured.out
    model = load("out/small.tl")
    assert model(torch.randn(7, 16)).shape == (7, 10)
    assert Path("out/small.html").read_text().startswith("<!doctype html>")
    assert main(["inspect", "out/small.tl", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"]["parameters"] == sum(p.numel() for p in model.parameters())


def test_compile_json_and_report_as_json(capsys) -> None:
    report = compile_json(capsys, "-p", HALF, "--report", "r.json")
    assert Report.load("r.json") == report
    assert report.latency is None
    assert report.after.parameters < report.before.parameters
    assert report.passes[0]["verification"]["passed"]


def test_a_saved_model_can_be_compiled_on(capsys) -> None:
    first = compile_json(capsys, "-p", HALF, "-o", "one.tl")
    assert main(["compile", "one.tl", "-p", HALF, "--no-latency", "--json"]) == 0
    second = Report.from_dict(json.loads(capsys.readouterr().out))
    assert second.before.parameters == first.after.parameters
    assert len(second.passes) == 1


def test_an_exported_program_can_be_compiled(capsys) -> None:
    torch.export.save(torch.export.export(*nets.pair()), "net.pt2")
    assert main(["compile", "net.pt2", "-p", HALF, "--no-latency"]) == 0
    assert "structured-erase" in capsys.readouterr().out


def test_no_passes_is_a_pipeline_too(capsys) -> None:
    report = compile_json(capsys)
    assert report.before == report.after
    assert report.fidelity[0].relative_error == pytest.approx(0, abs=1e-6)


def test_pipeline_from_a_file(capsys) -> None:
    Path("p.txt").write_text("# halves it\nstructured-erase{sparsity=0.5},\nstructured-erase\n")
    assert len(compile_json(capsys, "-p", "@p.txt").passes) == 2


def test_print_and_dump(capsys) -> None:
    words = ["-p", HALF, "--no-latency", "--print-ir-after", "all", "--dump-ir", "dump"]
    assert main(["compile", "nets.py:pair", *words]) == 0
    assert "# after pass 1: structured-erase" in capsys.readouterr().err
    assert sorted(path.name for path in Path("dump").iterdir()) == [
        "000_input.txt",
        "001_structured-erase.txt",
    ]


def test_verify_and_seed(capsys) -> None:
    random = "structured-erase{importance=random}"
    one, two, other = (
        compile_json(capsys, "-p", random, "--verify", level, "--seed", seed)
        for level, seed in (("off", "1"), ("full", "1"), ("fast", "2"))
    )
    assert one.passes[0]["verification"] is None
    assert two.passes[0]["verification"]["passed"]
    assert one.parameters == two.parameters
    assert one.fidelity != other.fidelity


def test_plugins(capsys) -> None:
    Path("plugin.py").write_text(PLUGIN)
    report = compile_json(capsys, "-p", "idle-for-tests{times=3}", "--plugin", "plugin.py")
    assert report.passes[0]["statistics"] == {"times": 3}
    assert main(["passes", "idle-for-tests", "--plugin", "plugin.py"]) == 0
    shown = capsys.readouterr().out
    assert "Does nothing at all." in shown
    assert "How often it does nothing." in shown
    assert "Attributes:" not in shown
    assert "plugin.py" in shown


def test_random_weights_are_noted(capsys) -> None:
    Path("config.json").write_text(
        json.dumps(
            {
                "model_type": "bert",
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 64,
                "vocab_size": 99,
            }
        )
    )
    assert main(["compile", "config.json", "-p", HALF, "--no-latency"]) == 0
    assert "Note: the weights are random" in capsys.readouterr().out


# -- inspect -----------------------------------------------------------------------------------


def test_inspect_shows_families_pins_and_cost(capsys) -> None:
    assert main(["inspect", "nets.py:pair", "--dynamic", "auto"]) == 0
    out = capsys.readouterr().out
    for part in (
        "Net · 3 operations",
        "inputs: args[0]: float32[s0=4, 16]",
        "outputs: output: float32[s0, 10]",
        "up.weight:0",
        "Pinned",
        "Cost by operator",
        "Cost by module",
    ):
        assert part in out


@pytest.mark.parametrize(
    ("option", "heading", "absent"),
    [
        ("--families", "Families", ["Pinned", "Cost"]),
        ("--pins", "Pinned", ["Families", "Cost"]),
        ("--cost", "Cost by module", ["Families", "Pinned"]),
        ("--text", "aten.linear", ["Families", "Pinned", "Cost"]),
    ],
)
def test_sections_one_by_one(option: str, heading: str, absent: list[str], capsys) -> None:
    assert main(["inspect", "nets.py:pair", option]) == 0
    out = capsys.readouterr().out
    assert heading in out
    assert not any(part in out for part in absent)


def test_inspect_limits(capsys) -> None:
    assert main(["inspect", "nets.py:pair", "--cost", "--limit", "1"]) == 0
    assert "... and 1 cheaper" in capsys.readouterr().out
    assert main(["inspect", "nets.py:pair", "--cost", "--all"]) == 0
    assert "cheaper" not in capsys.readouterr().out


def test_inspect_json_has_what_was_asked_for(capsys) -> None:
    assert main(["inspect", "nets.py:pair", "--pins", "--text", "--terms", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"model", "totals", "pins", "text"} <= set(found)
    assert not {"families", "cost"} & set(found)


def test_graph_picture(capsys) -> None:
    assert main(["inspect", "nets.py:pair", "--graph", "made/g.svg"]) == 0
    assert "wrote the picture to made/g.svg" in capsys.readouterr().out
    assert Path("made/g.svg").exists()


# -- passes ------------------------------------------------------------------------------------


def test_passes(capsys) -> None:
    assert main(["passes"]) == 0
    out = capsys.readouterr().out
    assert "structured-erase" in out
    assert "analysis" in out
    assert main(["passes", "structured_erase"]) == 0
    out = capsys.readouterr().out
    for part in ("sparsity", "0.5", "share of the prunable parameters", "keep-at-least"):
        assert part in out


def test_passes_json(capsys) -> None:
    assert main(["passes", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert "structured-erase" in names
    assert main(["passes", "structured-erase", "--json"]) == 0
    options = {o["name"]: o for o in json.loads(capsys.readouterr().out)["options"]}
    assert options["scope"]["default"] == "global"
    assert all(option["help"] for option in options.values())


# -- help and errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["compile", "plan", "inspect", "passes"])
def test_help_has_examples(command: str, capsys) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:\n" in out
    assert f"torchlathe {command}" in out
    assert "None" not in out


def test_version_and_no_command(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"torchlathe {__version__}\n"
    assert main([]) == 0
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("complie x", "unknown command 'complie'", "did you mean compile?"),
        ("frobnicate", "unknown command 'frobnicate'", "known are compile, plan, inspect, passes"),
        ("compile x --pases y", "unknown option '--pases'", "did you mean --passes"),
        ("inspect x --pin", "unknown option '--pin'", "did you mean --pins"),
        ("inspect x y", "unexpected argument 'y'", "torchlathe inspect --help"),
        ("compile", "the following arguments are required: MODEL", "torchlathe compile --help"),
        ("compile x --seed z", "argument --seed: invalid int value: 'z'", "--help"),
        ("compile x --verify fats", "unknown value 'fats' for --verify", "did you mean fast?"),
        ("compile x -p @none", "there is no pipeline file none", None),
        ("compile x -o .", ". is a folder", None),
        ("inspect x --graph a.jpg", "cannot draw into a.jpg", ".svg"),
        ("inspect x --limit 0", "--limit must be at least 1", None),
        ("compile x", "there is no model x", "name a model as one of"),
        (
            "compile nets.py:pair -p structured-erse",
            "there is no pass structured-erse",
            "structured-e",
        ),
        ("compile nets.py:pair -p structured-erase{sparsty=1}", "no option sparsty", "sparsity"),
        ("compile nets.py:pair -p structured-erase{sparsity=2}", "sparsity is 2.0", "0.5 halves"),
        ("compile nets.py:pair -p structured-erase{", "structured-erase{", None),
        ("compile nets.py:pair --backend eagre", "eagre", "eager"),
        ("compile nets.py:pair --inputs float32[2,17]", "does not run on the example", "(2, 17)"),
        ("compile nets.py:branch", "branches on the values of a tensor", "torch.where"),
        ("compile nets.py:pair --plugin none.py", "none.py", None),
        ("passes structured", "there is no pass structured", "structured-erase"),
    ],
)
def test_errors_are_messages(line: str, message: str, hint: str | None, capsys) -> None:
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert hint is None or hint in captured.err.partition("next:")[2]
    assert "Traceback" not in captured.err


def test_bad_options_are_refused_before_the_model_is_loaded(capsys) -> None:
    assert main(["compile", "nets.py:failing", "-p", "structured-erase{sparsity=2}"]) == 2
    assert "sparsity is 2.0" in capsys.readouterr().err


def test_the_place_of_an_error_is_told(capsys) -> None:
    assert main(["compile", "nets.py:failing"]) == 2
    err = capsys.readouterr().err
    assert "nets.py:failing failed: ValueError: no weights here" in err
    assert "where:" in err


@pytest.mark.parametrize("words", [["--debug", "inspect", "x"], ["inspect", "x", "--debug"]])
def test_debug_shows_the_traceback(words: list[str], capsys) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "error: there is no model x here" in err


def test_a_defect_has_its_own_exit_code(capsys, monkeypatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("torchlathe.tools.models.load_model", broken)
    assert main(["inspect", "x"]) == 1
    assert "error: RuntimeError: a bug" in capsys.readouterr().err


def test_interrupting(capsys, monkeypatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchlathe.tools.models.load_model", interrupted)
    assert main(["inspect", "x"]) == 130


def run_command(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=ROOT, check=False, **options
    )


def test_help_and_wrong_usage_need_no_torch() -> None:
    code = (
        "import sys; from torchlathe.tools.cli import main; "
        "code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    assert run_command("-c", code, "--help").returncode == 0
    assert run_command("-c", code, "compile", "--help").returncode == 0
    assert run_command("-c", code, "complie").returncode == 2


def test_a_reader_that_stops_early_is_no_error() -> None:
    done = run_command(
        "-c",
        "import subprocess, sys\n"
        "run = [sys.executable, '-m', 'torchlathe', 'passes', '--json']\n"
        "p = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE)\n"
        "p.stdout.close()\n"
        "print(p.stderr.read().decode(), p.wait())",
    )
    assert done.stdout.split() == ["0"]
