"""What cannot be captured: the error says what and where, and nothing else is printed."""

import logging
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim

from torchlathe.ir import CaptureError, Error, InputError, UnsupportedError, capture
from torchlathe.ir.quiet import quiet_torch

R = torch.randn


class Branches(nn.Module):
    def forward(self, x):
        y = x * 2
        if y.sum() > 0:  # the line to be named
            return y
        return x


class Unflattenable:
    def __init__(self, x):
        self.x = x


class ReturnsObject(nn.Module):
    def forward(self, x):
        return Unflattenable(x)


class Mismatched(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.b = nn.Linear(7, 2)

    def forward(self, x):
        return self.b(self.a(x))


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class WritesInput(nn.Module):
    def forward(self, x):
        x[0] = 1
        return x


class CountsAndBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        self.calls.add_(1)
        x.add_(torch.rand(4))
        x = nn.functional.batch_norm(
            x, self.norm.running_mean, self.norm.running_var, None, None, True
        )
        return x if x.max() > 0 else -x


class Conditional(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))


class HalvesEven(nn.Module):
    def forward(self, x):
        return x.view(2, x.shape[0] // 2) if x.shape[0] < 100 else x


def error_of(kind, model, *inputs, **options):
    with pytest.raises(kind) as caught:
        capture(model, inputs, **options)
    assert isinstance(caught.value, Error)
    assert caught.value.hint
    return caught.value


def test_a_branch_on_values_names_the_line():
    error = error_of(CaptureError, Branches(), torch.ones(3))
    assert "branches on the values of a tensor" in error.message
    assert "\n" not in error.message
    assert "test_capture_errors.py" in error.where
    assert "if y.sum() > 0:  # the line to be named" in error.where
    assert "torch.where" in error.hint
    assert error.__cause__ is not None


def test_an_object_that_cannot_be_flattened():
    error = error_of(CaptureError, ReturnsObject(), torch.ones(3))
    assert "Unflattenable" in error.message
    assert "http" not in error.message
    assert "register_pytree_node" in error.hint


def test_a_model_that_does_not_run_is_an_input_error():
    error = error_of(InputError, Mismatched(), R(3, 4))
    assert "does not run on the example inputs" in error.message
    assert "mat1 and mat2 shapes cannot be multiplied" in error.message
    assert "return self.b(self.a(x))" in error.where
    assert "(3, 4)" in error.hint


def test_inputs_that_forward_does_not_take():
    error = error_of(InputError, nn.Linear(4, 2), R(3, 4), R(3, 4))
    assert "does not run" in error.message
    error = error_of(InputError, nn.Linear(4, 2), R(3, 4), R(3, 4), dynamic_shapes="auto")
    assert "do not fit forward(input: torch.Tensor) -> torch.Tensor" in error.message


def test_a_dimension_that_the_model_fixes():
    class Fixed(nn.Module):
        def forward(self, x):
            return x + torch.ones(3, 1)

    error = error_of(CaptureError, Fixed(), R(3, 4), dynamic_shapes=({0: Dim("rows")},))
    assert "dynamic_shapes allows more than the model does" in error.message
    assert "rows" in error.message
    assert "TORCH_LOGS" not in error.message
    assert "Dim.AUTO" in error.hint


def test_a_range_that_is_too_wide_comes_with_the_suggestion():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(16, 4))

        def forward(self, x):
            return x + self.table[: x.shape[0]]

    error = error_of(CaptureError, Table(), R(3, 4), dynamic_shapes=({0: Dim("rows")},))
    assert "max=16" in error.message
    assert "narrow the range" in error.hint


@pytest.mark.parametrize(
    ("model", "name"), [(Counts(), "calls"), (WritesInput(), "x")], ids=["buffer", "input"]
)
def test_writes_that_outlive_the_call(model, name):
    x = torch.zeros(2, 2)
    error = error_of(UnsupportedError, model, x)
    assert error.message == f"the forward code writes into {name}"
    assert torch.equal(x, torch.zeros(2, 2))
    assert all(not b.any() for b in model.buffers())


def test_looking_for_the_cause_changes_nothing():
    model = CountsAndBranches()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = R(3, 4)
    given, random = x.clone(), torch.get_rng_state()
    error_of(CaptureError, model, x)
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_control_flow_names_its_line():
    error = error_of(UnsupportedError, Conditional(), R(3))
    assert "control flow" in error.message
    assert "cond" in error.where
    assert "test_capture_errors.py" in error.where


@pytest.mark.parametrize(
    "model", [torch.relu, "resnet50", nn.Linear], ids=["function", "text", "class"]
)
def test_something_else_than_a_module(model):
    error = error_of(InputError, model, R(3))
    assert "expected an nn.Module or an ExportedProgram" in error.message


def test_unknown_dynamic_shapes_text():
    error_text = "dynamic_shapes='atuo' is not known; the one text is \"auto\""
    with pytest.raises(InputError, match="is not known") as caught:
        capture(nn.Linear(4, 2), (R(3, 4),), dynamic_shapes="atuo")
    assert caught.value.message == error_text


@pytest.mark.parametrize("inputs", [3, R, {1, 2}], ids=["number", "function", "set"])
def test_example_inputs_of_another_type(inputs):
    with pytest.raises(InputError, match="example_inputs must be a tuple of arguments"):
        capture(nn.Linear(4, 2), inputs)


def test_keywords_given_twice():
    with pytest.raises(InputError, match="keywords were given twice"):
        capture(nn.Linear(4, 2), {"input": R(3, 4)}, {"input": R(3, 4)})


def test_dynamic_shapes_of_another_structure():
    error_of(CaptureError, nn.Linear(4, 2), R(3, 4), dynamic_shapes=({0: Dim("a")}, None))


# -- nothing is printed ----------------------------------------------------------------------

FAILING = [Branches(), ReturnsObject(), Mismatched(), Counts(), WritesInput(), Conditional()]


@pytest.mark.parametrize("model", FAILING, ids=lambda m: type(m).__name__)
def test_a_failing_capture_prints_nothing(model, capfd):
    with pytest.raises(Error):
        capture(model, (R(3, 4),))
    assert capfd.readouterr() == ("", "")


def test_a_capture_prints_and_warns_of_nothing(capfd):
    class Slices(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(4, 4)

        def forward(self, x):
            y = self.rnn(x)[0] * 1
            y[:, 1:] = 0
            return y

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(Slices(), (R(3, 2, 4),), dynamic_shapes="auto")
    assert capfd.readouterr() == ("", "")


class Talks(nn.Module):
    def forward(self, x):
        print("to stdout")
        print("to stderr", file=sys.stderr)
        logging.getLogger("mine").warning("a log")
        warnings.warn("careful", UserWarning, stacklevel=1)
        return x + 1


def test_what_the_model_says_is_heard(capfd, caplog):
    with pytest.warns(UserWarning, match="careful"):
        capture(Talks(), (R(3),))
    out, err = capfd.readouterr()
    assert "to stdout" in out
    assert "to stderr" in err
    assert "a log" in caplog.text


def test_loggers_filters_and_streams_are_restored(capfd):
    logger = logging.getLogger("torch")
    before = (logger.level, list(warnings.filters), sys.stderr)
    with pytest.raises(Error):
        capture(Branches(), (torch.ones(3),))
    capture(nn.Linear(3, 3), (R(2, 3),))
    assert (logger.level, list(warnings.filters), sys.stderr) == before


def test_torch_is_heard_where_its_logs_were_asked_for(monkeypatch):
    logger = logging.getLogger("torch")
    with quiet_torch():
        assert not logging.getLogger("torch._dynamo").isEnabledFor(logging.ERROR)
    monkeypatch.setenv("TORCH_LOGS", "+dynamo")
    with quiet_torch():
        assert logging.getLogger("torch._dynamo").isEnabledFor(logging.ERROR)
    monkeypatch.delenv("TORCH_LOGS")
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with quiet_torch():
            assert logger.level == logging.INFO
    finally:
        logger.setLevel(level)
