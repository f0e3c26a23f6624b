"""Arguments are flattened as they were captured, and held against it."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from torchlathe.ir import InputError, capture
from torchlathe.ir.inputs import input_paths

R = torch.randn


class Model(nn.Module):
    def forward(self, x, rest, *, mode="sum", mask=None, table=None):
        y = x @ rest[0] + rest[1]["b"]
        if mask is not None:
            y = y * mask
        return getattr(y, mode)()


def program(dynamic=True, **options):
    dim = Dim("n", min=2, max=8)
    kwargs = {"mode": "sum", "mask": R(3, 1), "table": {"p": R(1), "q": R(2)}, **options}
    shapes = {
        "x": {0: dim},
        "rest": [None, {"b": None}],
        "mode": None,
        "mask": {0: dim},
        "table": {"p": None, "q": None},
    }
    return capture(
        Model(),
        (R(3, 4), [R(4, 5), {"b": R(5)}]),
        kwargs,
        dynamic_shapes=shapes if dynamic else None,
    )


def call(n=3, **changes):
    args = {"x": R(n, 4), "w": R(4, 5), "b": R(5), **changes}
    kwargs = {
        "mode": changes.get("mode", "sum"),
        "mask": changes.get("mask", R(n, 1)),
        "table": changes.get("table", {"p": R(1), "q": R(2)}),
    }
    return (args["x"], [args["w"], {"b": args["b"]}]), kwargs


def message(**changes):
    args, kwargs = call(**changes)
    with pytest.raises(InputError) as caught:
        program().run(*args, **kwargs)
    assert caught.value.hint
    return caught.value.message


def test_paths_are_what_a_caller_would_write():
    assert input_paths(program()) == [
        "args[0]",
        "args[1][0]",
        "args[1][1]['b']",
        "mode",
        "mask",
        "table['p']",
        "table['q']",
    ]


@pytest.mark.parametrize("n", [2, 3, 8])
def test_sizes_within_the_range_run(n):
    args, kwargs = call(n)
    torch.testing.assert_close(program().run(*args, **kwargs), Model()(*args, **kwargs))


def test_keys_come_in_any_order():
    args, kwargs = call()
    mixed = dict(reversed(kwargs.items()))
    mixed["table"] = dict(reversed(kwargs["table"].items()))
    p = program()
    assert torch.equal(p.run(*args, **mixed), p.run(*args, **kwargs))
    flat = p.flatten_inputs(args, mixed)
    assert flat[-2] is kwargs["table"]["p"]


def test_a_static_extent():
    assert message(w=R(4, 6)) == "input args[1][0]: dimension 1 is static with extent 5, got 6"


def test_the_range_of_a_dynamic_extent():
    assert message(n=9) == "input args[0]: dimension 0 must be in [2, 8], got 9"


def test_extents_that_belong_together():
    assert message(mask=R(4, 1)) == "input mask: dimension 0 is 4, but s0 is 3 elsewhere"


def test_rank():
    assert message(x=R(3, 2, 4)) == ("input args[0]: expected 2 dimensions (s0, 4), got (3, 2, 4)")


def test_dtype():
    text = message(b=torch.zeros(5, dtype=torch.float64))
    assert text == "input args[1][1]['b']: expected torch.float32, got torch.float64"


def test_something_else_than_a_tensor():
    assert message(x=3) == "input args[0]: expected a tensor, got 3"
    assert message(x=None) == "input args[0]: expected a tensor, got None"


def test_a_constant_that_changed():
    assert message(mode="mean") == (
        "input mode: the graph was captured with the constant 'sum', not 'mean'"
    )

    # Equal by ==, yet another graph might have been traced.
    class Flag(nn.Module):
        def forward(self, x, flag):
            return x + 1 if flag is True else x - 1

    p = capture(Flag(), (R(3), True))
    p.run(R(3), True)
    with pytest.raises(InputError, match="captured with the constant True, not 1"):
        p.run(R(3), 1)


def test_none_is_a_constant():
    class Optional(nn.Module):
        def forward(self, x, mask=None):
            return x if mask is None else x * mask

    p = capture(Optional(), (R(3), None))
    assert p.run(x := R(3), None) is x
    with pytest.raises(InputError, match="captured with the constant None, not a tensor"):
        p.run(R(3), R(3))
    with pytest.raises(InputError, match="called with \\(Tensor\\), but captured with"):
        p.run(R(3))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((R(3, 4),), {}),
        ((R(3, 4), (R(4, 5), {"b": R(5)})), {"mode": "sum"}),
        ((R(3, 4), [R(4, 5), {"c": R(5)}]), {"mode": "sum"}),
    ],
    ids=["nothing", "too few", "tuple for list", "other key"],
)
def test_another_structure(args, kwargs):
    with pytest.raises(InputError) as caught:
        program().run(*args, **kwargs)
    assert caught.value.message.startswith("called with (")
    assert "but captured with (Tensor, list, mode=str, mask=Tensor, table=dict)" in str(
        caught.value
    )


def test_by_position_is_not_by_name():
    p = capture(nn.Linear(4, 2), (R(3, 4),))
    with pytest.raises(InputError, match="the same way, by position or by name"):
        p.run(input=R(3, 4))


def test_related_extents_are_checked():
    class Shifted(nn.Module):
        def forward(self, a, b):
            return a[1:] + b

    dim = Dim("n", min=2, max=20)
    p = capture(
        Shifted(), {"b": R(8), "a": R(9)}, dynamic_shapes={"a": {0: dim + 1}, "b": {0: dim}}
    )
    assert p.run(a=R(6), b=R(5)).shape == (5,)
    with pytest.raises(InputError, match=r"dimension 0 must be s0 \+ 1 = 6, got 7"):
        p.run(a=R(7), b=R(5))


def test_nothing_is_checked_into_the_shape_environment():
    p = program()
    guards = len(p.fake_mode.shape_env.guards)
    for n in (2, 5, 8):
        args, kwargs = call(n)
        p.run(*args, **kwargs)
        p.cost()
        p.to_text()
    assert len(p.fake_mode.shape_env.guards) == guards
