import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.passes.sample_passes import (
    ClampToRelu,
    Everything,
    Misbehave,
    NodeCount,
    NoRelu,
    Nothing,
    Picky,
    ReluCount,
    ReluToClamp,
    relus,
    small_net,
)
from torchlathe.ir import (
    Analysis,
    Error,
    OptionError,
    PassError,
    PreconditionError,
    Program,
    SpecError,
    VerifyError,
    capture,
)
from torchlathe.passes import (
    Exactness,
    Fact,
    PassContext,
    PassManager,
    PassResult,
    RewritePass,
    TunePass,
)

pytestmark = pytest.mark.usefixtures("samples")


def outputs(program: Program) -> torch.Tensor:
    with torch.no_grad():
        return program.run(*program.example_inputs[0])


# --- making one ----------------------------------------------------------------------------------


def test_passes_come_as_objects_classes_and_text() -> None:
    manager = PassManager([ReluToClamp(), Nothing, "picky{round-to=2},relu-count", ClampToRelu])
    text = "relu-to-clamp,nothing,picky{round-to=2},relu-count,clamp-to-relu"
    assert str(manager) == text
    assert PassManager(text) == manager
    assert hash(PassManager(text)) == hash(manager)
    assert PassManager(Nothing).passes == PassManager(Nothing()).passes == (Nothing(),)
    assert PassManager("nothing") != PassManager("relu-count")
    assert repr(PassManager("nothing", verify=True)) == "PassManager('nothing', verify='fast')"
    assert str(PassManager()) == ""


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"passes": "nothin"}, SpecError, "there is no pass nothin"),
        ({"passes": [3]}, OptionError, "expected a pass, a pass class or text, got int: 3"),
        ({"passes": [Picky]}, OptionError, "Picky needs round_to"),
        ({"passes": [RewritePass]}, OptionError, "RewritePass is abstract"),
        ({"verify": "slow"}, OptionError, "verify='slow' is not known"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], kind: type[Error], message: str) -> None:
    with pytest.raises(kind) as caught:
        PassManager(**arguments)
    assert caught.value.message.startswith(message)


# --- running -------------------------------------------------------------------------------------


def test_the_given_program_stays_as_it_was(program: Program) -> None:
    before, state = program.fingerprint(), outputs(program)
    result = PassManager("relu-to-clamp", verify="full").run(program)
    assert program.fingerprint() == before
    assert program.history == []
    assert relus(program)
    assert not relus(result)
    assert torch.equal(outputs(result), state)


def test_no_passes_give_an_equal_program(program: Program) -> None:
    result = PassManager().run(program)
    assert result is not program
    assert result.to_text() == program.to_text()
    assert result.history == []


def test_the_same_pass_twice_is_fine(program: Program) -> None:
    result = PassManager("relu-to-clamp,relu-to-clamp", verify="full").run(program)
    assert [record.changed for record in result.history] == [True, False]
    assert PassManager("relu-to-clamp").run(result).history[-1].changed is False


def test_text_gives_the_same_graph_as_objects(program: Program) -> None:
    manager = PassManager([ReluToClamp(), ClampToRelu(bend=1.5)])
    again = PassManager(str(manager))
    assert again.run(program).to_text() == manager.run(program).to_text()


def test_a_record_tells_what_happened(program: Program) -> None:
    result = PassManager("relu-count,relu-to-clamp,clamp-to-relu{bend=1.5}").run(program)
    counted, clamped, bent = result.history
    assert [r.spec for r in result.history] == [
        "relu-count",
        "relu-to-clamp",
        "clamp-to-relu{bend=1.5}",
    ]
    assert (counted.exactness, counted.changed) == ("analysis", False)
    assert counted.statistics == {"relus": 1}
    assert counted.analyses == {"computed": ["relu-count"], "reused": [], "dropped": []}
    assert counted.verification is None

    assert (clamped.exactness, clamped.changed) == ("exact", True)
    assert clamped.analyses["dropped"] == ["relu-count"]
    assert clamped.statistics == {"clamps": 1}
    assert clamped.diagnostics == [
        {"severity": "note", "message": "now a clamp", "name": "relu", "where": "1"}
    ]
    check = clamped.verification
    assert check["passed"] is True
    assert (check["level"], check["dtype"], check["tolerance"]) == ("fast", "float64", 1e-9)
    assert check["max_abs_error"] == check["max_rel_error"] == 0.0

    assert bent.exactness == "approximate"
    assert bent.verification["passed"] is None
    assert bent.verification["max_rel_error"] > 0.01
    assert bent.nodes_after == bent.nodes_before + 1

    for record in result.history:
        assert record.parameters_before == record.parameters_after == 4 * 8 + 8 + 8 * 3 + 3
        assert record.bytes_before == 4 * record.parameters_before
        assert record.flops_before == 2 * 2 * (4 * 8 + 8 * 3)
        assert record.seconds > 0
        assert record.peak_memory is None or record.peak_memory >= 0
        assert json.loads(json.dumps(record.to_dict())) == record.to_dict()
    assert json.loads(json.dumps(result.history[0].to_dict()))["spec"] == "relu-count"


def test_history_grows_over_runs(program: Program) -> None:
    once = PassManager("relu-to-clamp").run(program)
    twice = PassManager("clamp-to-relu").run(once)
    assert [r.spec for r in twice.history] == ["relu-to-clamp", "clamp-to-relu"]
    assert len(once.history) == 1


def test_new_nodes_know_the_pass_that_made_them(program: Program) -> None:
    text = PassManager("relu-to-clamp").run(program).to_text()
    assert "relu-to-clamp" in text


@pytest.mark.parametrize("verify", [True, False, "off", "fast", "full"])
def test_levels(program: Program, verify: Any) -> None:
    record = PassManager("relu-to-clamp", verify=verify).run(program).history[0]
    if verify in (False, "off"):
        assert record.verification is None
    else:
        assert record.verification["level"] == ("full" if verify == "full" else "fast")


# --- what passes are given -----------------------------------------------------------------------


class Probe(RewritePass):
    """Shows what it was given."""

    name: ClassVar[str] = "probe"
    seen: ClassVar[list[Any]] = []

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        self.seen.append((list(ctx.inputs()), ctx.seed, torch.rand(()).item(), ctx.loss))
        ctx.report("probing")
        return PassResult(changed=False)


@pytest.fixture
def seen() -> Iterator[list[Any]]:
    Probe.seen.clear()
    yield Probe.seen
    Probe.seen.clear()


def test_calibration_is_given_to_each_pass(program: Program, seen: list[Any]) -> None:
    x = torch.randn(3, 4)
    batches = iter([x, (x, "label"), {"input": x}, [x]])
    PassManager([Probe(), Probe()]).run(program, calibration=batches, loss=max)
    (args, _), (labelled, _), (_, kwargs), (listed, _) = seen[1][0]
    assert args[0] is labelled[0] is kwargs["input"] is listed[0] is x
    assert len(labelled) == 1  # the program takes one argument: the rest are labels
    assert seen[0][3] is max


def test_without_calibration_passes_see_the_example_inputs(
    program: Program, seen: list[Any]
) -> None:
    PassManager(Probe).run(program)
    assert seen[0][0] == [program.example_inputs]


def test_randomness_depends_on_the_seed_alone(program: Program, seen: list[Any]) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for seed in (1, 1, 2):
        PassManager([Probe(), Probe()]).run(program, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    draws = [draw for _, _, draw, _ in seen]
    assert len(set(draws[:4])) == 1
    assert draws[4] != draws[0]
    assert [seed for _, seed, _, _ in seen] == [1] * 4 + [2] * 2
    assert random.random() is not None


def test_progress_is_told(program: Program) -> None:
    lines: list[str] = []
    PassManager([Nothing(), Probe()]).run(program, progress=lines.append)
    assert lines == ["1/2 nothing", "2/2 probe", "probing"]


def test_a_pass_can_refuse_before_any_pass_runs(program: Program, seen: list[Any]) -> None:
    class Demanding(TunePass):
        name: ClassVar[str] = "demanding"

        def check(self, program: Program, ctx: PassContext) -> None:
            ctx.need("loss", "it trains")

        def run(self, program: Program, ctx: PassContext) -> PassResult:
            return PassResult(changed=False)

    manager = PassManager([Probe(), Demanding()])
    with pytest.raises(PreconditionError) as caught:
        manager.run(program)
    assert caught.value.message == "demanding needs loss: it trains"
    assert seen == []
    assert manager.run(program, loss=max).history[1].exactness == "trained"


# --- analyses ------------------------------------------------------------------------------------


class Reader(RewritePass):
    name: ClassVar[str] = "reader"
    requires: ClassVar[tuple[type[Analysis[Any]], ...]] = (ReluCount, NodeCount)
    preserves: ClassVar[frozenset[type[Analysis[Any]]]] = frozenset({NodeCount})

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return PassResult(False, {"relus": ctx.analysis(ReluCount)})


def test_analyses_are_computed_once_and_dropped_when_they_go_stale(program: Program) -> None:
    result = PassManager([Reader(), Reader(), ReluToClamp(), Reader()]).run(program)
    first, second, clamp, last = (record.analyses for record in result.history)
    assert first == {"computed": ["relu-count", "node-count"], "reused": [], "dropped": []}
    assert second == {"computed": [], "reused": ["relu-count", "node-count"], "dropped": []}
    assert clamp["dropped"] == ["relu-count"]  # the number of nodes is declared as preserved
    assert last == {"computed": ["relu-count"], "reused": ["node-count"], "dropped": []}
    assert [r.statistics.get("relus") for r in result.history] == [1, 1, None, 0]


def test_a_preserved_analysis_is_computed_again_at_level_full(program: Program) -> None:
    passes = [ReluCount(), Misbehave("lie_about_analysis")]
    assert PassManager(passes).run(program).analysis(ReluCount) == 1  # wrong, and not noticed
    with pytest.raises(PassError, match="declares that it preserves relu-count, but it does not"):
        PassManager(passes, verify="full").run(program)
    PassManager([Reader(), ReluToClamp()], verify="full").run(program)


def test_the_options_of_an_analysis_are_its_key(program: Program) -> None:
    @dataclass(frozen=True)
    class Listed(ReluCount):
        name: ClassVar[str] = "listed"
        names: list[str] = field(default_factory=list)

    with pytest.raises(OptionError) as caught:
        Listed()
    assert str(caught.value) == (
        "the options of listed cannot be the key of its cached result: unhashable type: 'list'\n"
        "  next:  use tuples instead of lists, and no dicts"
    )


# --- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            "clamp-to-relu,relu-to-clamp",
            'pass 1, clamp-to-relu, needs "no relu", which does not hold there: it is not true of '
            "the program, and no pass before provides it",
            "a legal order is relu-to-clamp,clamp-to-relu",
        ),
        (
            "relu-to-clamp,clamp-to-relu,nothing,clamp-to-relu{bend=2.0}",
            'pass 4, clamp-to-relu{bend=2.0}, needs "no relu", which does not hold there: '
            "clamp-to-relu breaks it",
            'put a pass that provides "no relu" before clamp-to-relu{bend=2.0}, or leave that out',
        ),
        (
            "relu-to-clamp,clamp-to-relu,clamp-to-relu,relu-to-clamp",
            'pass 3, clamp-to-relu, needs "no relu", which does not hold there: '
            "clamp-to-relu breaks it",
            "a legal order is relu-to-clamp,clamp-to-relu,relu-to-clamp,clamp-to-relu",
        ),
        (
            "clamp-to-relu",
            'pass 1, clamp-to-relu, needs "no relu", which does not hold there: it is not true of '
            "the program, and no pass before provides it",
            'put a pass that provides "no relu" before clamp-to-relu, or leave that out',
        ),
    ],
)
def test_an_illegal_order_is_refused(program: Program, text: str, message: str, hint: str) -> None:
    with pytest.raises(PreconditionError) as caught:
        PassManager(text).run(program)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_a_fact_may_hold_from_the_start() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    program = capture(net, (torch.randn(2, 4),))
    assert PassManager("clamp-to-relu").run(program).history[0].changed is False


def test_declared_facts_are_looked_at_at_level_full(program: Program) -> None:
    class NoTensor(Fact):
        name = "no tensor"

        @classmethod
        def holds(cls, program: Program) -> bool:
            return not program.entries

    class Boaster(ReluToClamp):
        name: ClassVar[str] = "boaster"
        provides: ClassVar[tuple[type[Fact], ...]] = (NoRelu, NoTensor)

    PassManager([Boaster()]).run(program)
    with pytest.raises(PassError, match='the pass provides "no tensor", which does not hold'):
        PassManager([Boaster()], verify="full").run(program)


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "level", "cause", "message"),
    [
        ("raise", "off", IndexError, "IndexError: no such thing as relu"),
        (
            "change_the_function",
            "fast",
            VerifyError,
            "the pass declares itself exact, but output 0",
        ),
        ("claim_no_change", "fast", VerifyError, "changed the program, but says that it did not"),
        ("claim_change", "fast", VerifyError, "says that it changed the program, but made no edit"),
        ("edit_raw", "full", VerifyError, "changed the program, but says that it did not"),
        ("return_nothing", "fast", VerifyError, "run() returned int instead of a PassResult"),
        ("write_in_place", "fast", VerifyError, "wrote into a tensor that it shares"),
        ("lose_metadata", "fast", VerifyError, "a node without metadata"),
    ],
)
def test_a_pass_that_misbehaves_is_told_on(
    program: Program, how: str, level: Any, cause: type[Exception], message: str
) -> None:
    before = program.fingerprint()
    manager = PassManager([Nothing(), Misbehave(how), Nothing()], verify=level)
    with pytest.raises(PassError) as caught:
        manager.run(program)
    error = caught.value
    start = f"pass 2 of 3, misbehave{{how={how}}}, failed after nothing: {cause.__name__}: "
    start = start.replace("{how=raise}", "")
    assert error.message.startswith(start)
    assert message in error.message
    assert error.hint is not None
    assert error.hint.endswith("the program is as it was before the pass")
    assert isinstance(error.__cause__, cause)
    if how != "write_in_place":
        assert program.fingerprint() == before
    assert program.history == []


def test_an_error_names_the_node_and_the_line(program: Program) -> None:
    with pytest.raises(PassError) as caught:
        PassManager(Misbehave()).run(program)
    where = caught.value.where
    assert where is not None
    node, line = where.split("; ")
    assert node.startswith("%relu = aten.")
    assert line.startswith(__file__.replace("test_manager", "sample_passes"))
    assert line.endswith("(_raise)")


def test_the_first_node_that_differs_is_named(program: Program) -> None:
    with pytest.raises(PassError) as caught:
        PassManager(Misbehave("change_the_function")).run(program)
    assert "first node that differs is %relu = aten.sigmoid.default in 1" in caught.value.message


def test_the_program_is_rolled_back_before_anyone_sees_it(program: Program) -> None:
    manager = PassManager([ReluToClamp(), Misbehave("claim_no_change")])
    from torchlathe.passes import Instrument

    class Last(Instrument):
        def exit_pipeline(self, program: Program, error: BaseException | None) -> None:
            self.text, self.history, self.error = program.to_text(), len(program.history), error

    last = Last()
    manager.instruments = (last,)
    with pytest.raises(PassError) as caught:
        manager.run(program)
    assert isinstance(caught.value.__cause__, IndexError)  # there is no relu left to misuse
    assert last.error is caught.value
    assert last.history == 1
    assert last.text == PassManager(ReluToClamp).run(program).to_text()


def test_a_broken_program_is_refused_before_any_pass(program: Program) -> None:
    del relus(program)[0].meta["val"]
    with pytest.raises(VerifyError, match="a node without metadata"):
        PassManager(Nothing).run(program)
    PassManager(Everything, verify="off")


def test_what_an_interrupt_leaves(program: Program) -> None:
    class Impatient(Nothing):
        name: ClassVar[str] = "impatient"

        def run(self, program: Program, ctx: PassContext) -> PassResult:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PassManager(Impatient()).run(program)


# --- exactness -----------------------------------------------------------------------------------


class ZeroRow(RewritePass):
    """Zeros a row of the first weight, and says so, or says that it is approximate."""

    name: ClassVar[str] = "zero-row"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    approximate: ClassVar[bool] = False
    honest: ClassVar[bool] = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        def zeroed(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name != "0.weight":
                return tensor
            tensor = tensor.detach().clone()
            tensor[0] = 0
            return tensor

        with program.edit() as edit:
            edit.set_tensor("0.weight", zeroed("0.weight", program.tensor("0.weight")))
        return PassResult(
            changed=True,
            reference=zeroed if self.honest else None,
            exactness=Exactness.APPROXIMATE if self.approximate else None,
        )


def test_an_exact_pass_is_compared_with_its_reference(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = program.tensor("0.weight").clone()
    record = PassManager(ZeroRow()).run(program).history[0]
    assert record.verification["passed"]
    assert record.verification["max_abs_error"] == 0.0
    assert torch.equal(program.tensor("0.weight"), weight)
    monkeypatch.setattr(ZeroRow, "honest", False)
    with pytest.raises(PassError, match=r"output 0 differs by .* first node that differs is %lin"):
        PassManager(ZeroRow()).run(program)
    monkeypatch.setattr(ZeroRow, "approximate", True)
    record = PassManager(ZeroRow()).run(program).history[0]
    assert record.exactness == "approximate"
    assert record.verification["max_rel_error"] > 0
    assert record.verification["passed"] is None


def test_weights_without_values_cannot_be_compared() -> None:
    with FakeTensorMode():
        net = small_net()
        program = capture(net, (torch.randn(2, 4),))
    record = PassManager("relu-to-clamp", verify="full").run(program).history[0]
    assert "fake tensors" in record.verification["skipped"]
