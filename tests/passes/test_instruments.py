import io
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.passes.sample_passes import relus
from torchlathe.ir import PassError, Program, SpecError
from torchlathe.passes import (
    DumpIR,
    Instrument,
    Pass,
    PassManager,
    PassRecord,
    PrintIR,
    Statistics,
    StopAfter,
    Timing,
)

pytestmark = pytest.mark.usefixtures("samples")

PIPELINE = "relu-count,relu-to-clamp,clamp-to-relu{bend=1.5}"


class Log(Instrument):
    def __init__(self, skip: str = "") -> None:
        self.calls: list[str] = []
        self.skip = skip

    def enter_pipeline(self, program: Program, passes: Sequence[Pass]) -> None:
        self.calls.append(f"enter {len(passes)}")

    def should_run(self, position: int, item: Pass, program: Program) -> bool:
        return item.name != self.skip

    def before_pass(self, position: int, item: Pass, program: Program) -> None:
        self.calls.append(f"before {position} {item.name} {len(relus(program))}")

    def after_pass(self, position: int, item: Pass, program: Program, record: PassRecord) -> None:
        assert program.history[-1] is record
        self.calls.append(f"after {position} {record.spec} {len(relus(program))}")

    def exit_pipeline(self, program: Program, error: BaseException | None) -> None:
        self.calls.append(f"exit {type(error).__name__}")


def test_hooks_are_called_in_order(program: Program) -> None:
    log = Log()
    PassManager("relu-to-clamp,clamp-to-relu", instruments=[log]).run(program)
    assert log.calls == [
        "enter 2",
        "before 1 relu-to-clamp 1",
        "after 1 relu-to-clamp 0",
        "before 2 clamp-to-relu 0",
        "after 2 clamp-to-relu 1",
        "exit NoneType",
    ]


def test_any_instrument_can_skip_a_pass(program: Program) -> None:
    first, second = Log(skip="clamp-to-relu"), Log()
    result = PassManager("relu-to-clamp,clamp-to-relu", instruments=[first, second]).run(program)
    assert [record.spec for record in result.history] == ["relu-to-clamp"]
    assert (
        first.calls
        == second.calls
        == ["enter 2", "before 1 relu-to-clamp 1", "after 1 relu-to-clamp 0", "exit NoneType"]
    )


def test_a_failing_run_leaves_by_the_exit(program: Program) -> None:
    log = Log()
    with pytest.raises(PassError):
        PassManager("misbehave", instruments=[log]).run(program)
    assert log.calls == ["enter 1", "before 1 misbehave 1", "exit PassError"]


def test_what_an_instrument_raises_is_not_swallowed(program: Program) -> None:
    class Broken(Instrument):
        def after_pass(
            self, position: int, item: Pass, program: Program, record: PassRecord
        ) -> None:
            raise RuntimeError("broken")

    log = Log()
    with pytest.raises(RuntimeError, match="broken"):
        PassManager("nothing", instruments=[Broken(), log]).run(program)
    assert log.calls[-1] == "exit RuntimeError"


# --- printing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "only_changed", "printed"),
    [
        ("all", True, [2, 3]),
        ("all", False, [1, 2, 3]),
        ("relu_to_clamp", True, [2]),
        ("relu-count, clamp-to-relu", True, [3]),
        (["relu-count"], False, [1]),
        ("structured-erase", True, []),
    ],
)
def test_print_ir(
    program: Program, after: str | list[str], only_changed: bool, printed: list[int]
) -> None:
    file = io.StringIO()
    instrument = PrintIR(after, only_changed=only_changed, file=file)
    result = PassManager(PIPELINE, instruments=[instrument]).run(program)
    text = file.getvalue()
    assert list(map(int, re.findall(r"^# after pass (\d)", text, re.MULTILINE))) == printed
    if 3 in printed:
        start = "# after pass 3: clamp-to-relu{bend=1.5}\n"
        assert text.endswith(start + result.to_text().rstrip() + "\n")


def test_print_ir_names_must_exist(program: Program) -> None:
    with pytest.raises(SpecError) as caught:
        PassManager("nothing", instruments=[PrintIR("relu-to-klamp")]).run(program)
    assert str(caught.value) == (
        "cannot print after relu-to-klamp: there is no such pass\n"
        "  next:  did you mean relu-to-clamp?"
    )


def test_the_environment_asks_for_printing(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHLATHE_PRINT_IR_AFTER", "relu-to-clamp")
    PassManager(PIPELINE).run(program)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("# after pass 2: relu-to-clamp\nprogram Sequential\n")
    assert captured.err.count("# after") == 1


def test_dump_ir(program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "dump"
    result = PassManager(PIPELINE, instruments=[DumpIR(folder)]).run(program)
    names = ["000_input", "001_relu-count", "002_relu-to-clamp", "003_clamp-to-relu"]
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.txt" for name in names]
    texts = [(folder / f"{name}.txt").read_text() for name in names]
    assert texts[0] == texts[1] == program.to_text().rstrip() + "\n"
    assert texts[3] == result.to_text().rstrip() + "\n"
    assert texts[2] != texts[3]


# --- numbers -------------------------------------------------------------------------------------


def test_timing(program: Program) -> None:
    timing = Timing()
    PassManager(PIPELINE, instruments=[timing]).run(program)
    assert [spec for spec, _, _ in timing.seconds] == PIPELINE.split(",")
    assert all(own > 0 for _, own, _ in timing.seconds)
    assert [checking > 0 for _, _, checking in timing.seconds] == [False, True, True]
    lines = str(timing).splitlines()
    assert lines[0].split() == ["pass", "[s]", "check", "[s]", "pass"]
    assert [line.split()[-1] for line in lines[1:]] == [*PIPELINE.split(","), "total"]


def test_statistics_add_up(program: Program) -> None:
    statistics = Statistics()
    text = "relu-count,relu-to-clamp,clamp-to-relu,relu-count"
    PassManager(text, instruments=[statistics]).run(program)
    assert statistics.totals == {
        "relu-count": {"relus": 2},
        "relu-to-clamp": {"clamps": 1},
        "clamp-to-relu": {},
    }
    assert [line.split() for line in str(statistics).splitlines()] == [
        ["2", "relu-count", "relus"],
        ["1", "relu-to-clamp", "clamps"],
    ]


def test_stop_after_finds_the_pass_that_does_the_damage(program: Program) -> None:
    text = "relu-to-clamp,clamp-to-relu{bend=1.5},relu-count"
    errors = []
    for count in range(4):
        result = PassManager(text, instruments=[StopAfter(count)]).run(program)
        assert len(result.history) == count
        args, _ = program.example_inputs
        with torch.no_grad():
            errors.append(float((result.run(*args) - program.run(*args)).abs().max()))
    assert errors[:2] == [0.0, 0.0]
    assert errors[2] == errors[3] > 0.0
