"""In-place ops become functional ones, with the values that they left behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlathe.ir import TensorKind, UnsupportedError, capture
from torchlathe.ir.functional import functionalize_in_place

R = torch.randn


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x):
        return self.function(self, x)


def relu_(m, x):
    y = m.linear(x)
    F.relu_(y)
    return y + F.relu(y - 1, inplace=True)


def chain(m, x):
    y = m.linear(x)
    y.add_(1).mul_(2).clamp_(min=0)
    y -= x
    return y, y.sum()


def powers(m, x):
    y = m.linear(x).abs()
    y.pow_(-0.5)
    return y.pow_(x.abs())


def through_a_view(m, x):
    y = m.linear(x)
    y.view(-1).add_(1)
    return y


def view_read_later(m, x):
    y = m.linear(x)
    view = y.t()
    y.relu_()
    return view * 2


def view_made_later(m, x):
    y = m.linear(x)
    y.relu_()
    return y.t() * 2


def slice_written(m, x):
    y = m.linear(x)
    y[:, 1:3] = x[:, :2]
    y[0].zero_()
    return y


def index_written(m, x):
    y = torch.zeros(2, 4)
    y[torch.tensor([1]), torch.tensor([2])] = x[0, 0]
    return y + x


def masked_fill_(m, x):
    y = m.linear(x)
    return y.masked_fill_(y < 0, -1.0)


def split_written(m, x):
    y = m.linear(x)
    first, second = y[:, :2], y[:, 2:]
    first.mul_(second)
    return y


def half_stays_half(m, x):
    return (x * 2).half().add_(x)


def comparison_in_place(m, x):
    return (x * 2).eq_(x)


def integer_division_in_place(m, x):
    return (x * 10).long().floor_divide_(3)


def squeeze_in_place(m, x):
    y = m.linear(x).unsqueeze(0)
    y.squeeze_(0)
    return y.transpose_(0, 1)


def literal_written(m, x):
    y = torch.tensor([1.0, 2.0, 3.0, 4.0])
    y += 1
    return x + y


def parameter_copy_written(m, x):
    w = m.linear.weight.clone()
    w.mul_(2)
    return F.linear(x, w)


def dropped_dropout(m, x):
    y = F.dropout(m.linear(x), 0.5, training=False)
    y.add_(1)
    return y


def out_variant(m, x):
    y = torch.empty(2, 4)
    torch.add(x, 1, out=y)
    return y * 2


def batch_statistics(m, x):
    return F.batch_norm(x, m.mean, m.var, training=True)


def einsum_view_alone(m, x):
    y = torch.einsum("ij->ji", m.linear(x))
    y.add_(1)
    return y


def one_of_two_results(m, x):
    values, indices = m.linear(x).topk(2)
    values /= values.sum(-1, keepdim=True)
    return values, indices


def views_of_two_results(m, x):
    a, b = m.linear(x).unbind(0)
    c = torch.stack([a, b])
    c += 1
    return a, b, c


WRITES = [
    relu_,
    powers,
    chain,
    through_a_view,
    view_read_later,
    view_made_later,
    slice_written,
    index_written,
    masked_fill_,
    split_written,
    half_stays_half,
    comparison_in_place,
    integer_division_in_place,
    squeeze_in_place,
    literal_written,
    parameter_copy_written,
    dropped_dropout,
    out_variant,
    batch_statistics,
    einsum_view_alone,
    one_of_two_results,
    views_of_two_results,
]


def mutable_targets(program):
    return [
        str(n.target)
        for n in program.nodes
        if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable
    ]


@pytest.mark.parametrize("function", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [None, "auto"])
def test_values_are_those_of_the_model(function, dynamic):
    model = Model(function).eval()
    program = capture(model, (R(2, 4),), dynamic_shapes=dynamic)
    assert not mutable_targets(program)
    x = R(2, 4)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    result = program.run(x.clone())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), f"running the program wrote into {name}"
    expected = model(x.clone())
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_plain_cases_keep_their_ops():
    program = capture(Model(relu_), (R(2, 4),))
    targets = [str(n.target) for n in program.nodes if n.op == "call_function"]
    assert targets == [
        "aten.linear.default",
        "aten.relu.default",
        "aten.sub.Tensor",
        "aten.relu.default",
        "aten.add.Tensor",
    ]


def test_batch_statistics_do_not_touch_the_running_ones():
    program = capture(Model(batch_statistics), (R(2, 4),))
    assert set(program.carried) == {"mean", "var", "table"}
    assert not program.entries


def test_a_hidden_view_that_is_written_is_refused():
    def einsum_view(m, x):
        y = m.linear(x)
        torch.einsum("ij->ji", y).add_(1)
        return y

    with pytest.raises(UnsupportedError, match="einsum") as caught:
        capture(Model(einsum_view), (R(2, 4),))
    assert "test_functional.py" in caught.value.where
    assert "clone the view" in caught.value.hint


def test_a_graph_that_cannot_be_rewritten_is_told():
    exported = torch.export.export(Model(slice_written).eval(), (R(2, 4),))
    assert not functionalize_in_place(exported.graph)
    exported = torch.export.export(Model(relu_).eval(), (R(2, 4),))
    assert functionalize_in_place(exported.graph)


# -- wrapped regions -------------------------------------------------------------------------


def no_grad_region(m, x):
    with torch.no_grad():
        y = m.linear(x)
        with torch.enable_grad():
            y = m.linear(y)
        z = y.detach() * 2
    return y + z


def disabled_autocast(m, x):
    with torch.autocast("cpu", enabled=False):
        y = m.linear(x)
        with torch.no_grad():
            y = y * 2
    return y


def enabled_autocast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.linear(x)


def literal_in_a_region(m, x):
    with torch.no_grad():
        return x + torch.tensor([1.0, 2.0, 3.0, 4.0])


def write_in_a_region(m, x):
    with torch.no_grad():
        y = m.linear(x)
        y[0] = 1
    return y * 2


@pytest.mark.parametrize(
    "function",
    [no_grad_region, disabled_autocast, enabled_autocast, literal_in_a_region, write_in_a_region],
    ids=lambda f: f.__name__,
)
def test_regions_are_flat(function):
    model = Model(function).eval()
    program = capture(model, (R(2, 4),), dynamic_shapes="auto")
    assert all(n.op in ("placeholder", "call_function", "output") for n in program.nodes)
    assert not [n for n in program.nodes if "wrap_with" in str(n.target)]
    x = R(3, 4)
    torch.testing.assert_close(program.run(x), model(x), rtol=0, atol=0)


def test_the_twin_of_an_overload_takes_the_same_arguments():
    program = capture(Model(powers), (R(2, 4),))
    targets = [str(n.target) for n in program.nodes if "pow" in str(n.target)]
    assert targets == ["aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor"]


def test_complex_views_can_be_made_of_odd_slices():
    def rotate(m, x):
        pairs = m.linear(x)[:, :2].unflatten(-1, (1, 2))
        return torch.view_as_real(torch.view_as_complex(pairs) * (1 + 2j))

    model = Model(rotate)
    program = capture(model, (R(2, 4),), dynamic_shapes="auto")
    names = [n.target for n in program.nodes if n.op == "call_function"]
    assert names.index(torch.ops.aten.contiguous.default) < names.index(
        torch.ops.aten.view_as_complex.default
    )
    x = R(3, 4)
    torch.testing.assert_close(program.run(x), model(x), rtol=0, atol=0)


def test_a_literal_becomes_a_constant():
    program = capture(Model(literal_in_a_region), (R(2, 4),))
    (entry,) = program.entries.values()
    assert entry.kind is TensorKind.CONSTANT
