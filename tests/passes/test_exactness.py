"""What makes erasing exact beyond zeroed writers: zeroed readers, and frozen constants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlathe as tl
from tests.passes.test_families import Net
from torchlathe.ir import Program
from torchlathe.passes import PassManager, ZeroInvariantGroups
from torchlathe.passes.rewrite.erasing.shrink import erase_units

TWICE = "structured-erase{sparsity=0.3},structured-erase{sparsity=0.3}"


def program_of(model: nn.Module, *shapes: tuple[int, ...]) -> Program:
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.2)
    inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return tl.capture(model.double().eval(), inputs)


def family_of(program: Program, tensor: str, axis: int) -> Any:
    return program.analysis(ZeroInvariantGroups).of(tensor, axis)[0]


def check(program: Program, passes: str = TWICE) -> Program:
    """The verifier compares with the zeroed model in float64."""
    after = PassManager(passes, verify="full").run(program)
    assert after.history[0].changed
    for record in after.history:
        assert record.exactness == "exact"
        assert record.verification["max_rel_error"] < 1e-12
    return after


# -- zeroed readers ------------------------------------------------------------------------------


def gated(m: Any, x: Tensor) -> Tensor:
    return m.leave(m.enter(x).sigmoid())


def test_readers_are_zeroed_where_writers_are_no_use() -> None:
    """One half in every channel meets zero padding: no bias can stand for it."""
    model: Any = Net(gated, enter=nn.Conv2d(3, 6, 1), leave=nn.Conv2d(6, 2, 3, padding=1))
    program = program_of(model, (2, 3, 5, 5))
    family = family_of(program, "enter.weight", 0)
    assert (family.exactness, family.zeroed_by) == ("exact", "readers")
    assert [(s.name, s.axis) for s in family.zeroed] == [("leave.weight", 1)]
    assert family.writers  # roles are what they were
    after = check(program.copy(), "structured-erase{sparsity=0.5}")
    assert set(after.zeroed) == {"leave.weight"}
    # By hand: the erased model is the one whose columns are zero.
    gone = after.zeroed["leave.weight"][1]
    model.leave.weight.data[:, gone] = 0
    (x,), _ = program.example_inputs
    torch.testing.assert_close(after.run(x), model(x), rtol=1e-12, atol=1e-12)


def test_the_compiled_model_zeroes_readers_too() -> None:
    model: Any = Net(gated, enter=nn.Conv2d(3, 6, 1), leave=nn.Conv2d(6, 2, 3, padding=1)).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    compiled = tl.compile(model.eval(), "structured-erase", (x,), measure_latency=False)
    twin: Any = compiled.zeroed_reference(model)
    assert torch.equal(twin.enter.weight, model.enter.weight)
    assert not torch.equal(twin.leave.weight, model.leave.weight)
    torch.testing.assert_close(compiled(x), twin(x), rtol=1e-12, atol=1e-12)


def test_zeros_asks_for_zeros_in_the_readers() -> None:
    model = Net(gated, enter=nn.Conv2d(3, 6, 1), leave=nn.Conv2d(6, 2, 3, padding=1))
    program = program_of(model, (2, 3, 5, 5))
    program.entries["leave.weight"].tensor.data[:, [1, 4]] = 0
    program.entries["enter.weight"].tensor.data[[2]] = 0  # no use: its sigmoid is one half
    program.entries["enter.bias"].tensor.data[[2]] = 0
    (x,), _ = program.example_inputs
    want = program.run(x)
    after = PassManager("structured-erase{zeros=true}", verify="full").run(program)
    assert after.kept["enter.weight"][0].tolist() == [0, 2, 3, 5]
    torch.testing.assert_close(after.run(x), want, rtol=1e-12, atol=1e-12)


def test_both_are_zeroed_where_one_is_not_enough() -> None:
    """The norm needs zeros before it, and the padded layer behind the sigmoid zero columns."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.enter(x)
        normed = m.norm(x.movedim(1, -1)).movedim(-1, 1)
        return m.one(normed) + m.two(x.sigmoid())

    model = Net(run, enter=nn.Conv2d(3, 6, 1), norm=nn.LayerNorm(6),
                one=nn.Conv2d(6, 2, 1), two=nn.Conv2d(6, 2, 3, padding=1))  # fmt: skip
    program = program_of(model, (2, 3, 5, 5))
    family = family_of(program, "enter.weight", 0)
    assert (family.exactness, family.zeroed_by) == ("exact-after-correction", "all")
    check(program)


def test_a_fold_leaves_out_what_another_family_does_not_read() -> None:
    """Rows of one layer are heads x channels: heads fold, channels go with their columns."""

    def run(m: Any, x: Tensor) -> Tensor:
        heads = m.enter(x).sigmoid().view(-1, 3, 4)
        return m.leave((heads * m.shift.sigmoid()).flatten(1))

    model = Net(run, enter=nn.Linear(4, 12), shift=nn.Parameter(torch.randn(4)),
                leave=nn.Linear(12, 2))  # fmt: skip
    program = program_of(model, (5, 4))
    families = program.analysis(ZeroInvariantGroups).prunable
    units = {f: torch.tensor([1]) for f in families}
    assert len(units) == 2
    twin = {n: e.tensor.clone() for n, e in program.entries.items()}
    (x,), _ = program.example_inputs
    copy = program.copy()
    zeroing = erase_units(program, units)
    want = copy.run(x, replace_tensor=zeroing)
    torch.testing.assert_close(program.run(x), want, rtol=1e-12, atol=1e-12)
    assert twin  # the tensors of the copy are those that were captured


@pytest.mark.parametrize("how", ["expanded", "fused", "einsum"])
def test_query_heads_of_a_group(how: str) -> None:
    kv, rep, d = 2, 3, 2

    def run(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = m.q(x).view(b, n, kv * rep, d).transpose(1, 2)
        k, v = (p(x).view(b, n, kv, d).transpose(1, 2) for p in (m.k, m.v))
        if how == "fused":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        elif how == "expanded":
            k, v = (t[:, :, None].expand(b, kv, rep, n, d).flatten(1, 2) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            s = torch.einsum("bgrnd,bgmd->bgrnm", q.unflatten(1, (kv, rep)), k) * d**-0.5
            y = torch.einsum("bgrnm,bgmd->bgrnd", s.softmax(-1), v).flatten(1, 2)
        return m.o(y.transpose(1, 2).flatten(2))

    model = Net(run, q=nn.Linear(5, kv * rep * d), k=nn.Linear(5, kv * d), v=nn.Linear(5, kv * d),
                o=nn.Linear(kv * rep * d, 5))  # fmt: skip
    program = program_of(model, (2, 4, 5))
    repeat = program.analysis(ZeroInvariantGroups).by_name("q.weight:0/1")
    assert repeat.extent == rep
    assert (repeat.exactness, repeat.zeroed_by) == ("exact", "readers")
    assert [(s.name, s.axis, s.repeat) for s in repeat.zeroed] == [("o.weight", 1, kv * d)]
    after = check(program, 'structured-erase{sparsity={"q.weight:0/1": 0.6}}')
    assert after.entries["q.weight"].tensor.shape == (kv * d, 5)
    assert after.entries["v.weight"].tensor.shape == (kv * d, 5)


# -- frozen constants ----------------------------------------------------------------------------


def standardised(m: Any, x: Tensor) -> Tensor:
    w = m.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-3)
    return m.leave(F.conv2d(m.enter(x), w, m.bias).relu())


def standardised_by_batch_norm(m: Any, x: Tensor) -> Tensor:
    """As timm writes it."""
    w = F.batch_norm(m.weight.reshape(1, 8, -1), None, None, training=True, momentum=0.0)
    return m.leave(F.conv2d(m.enter(x), w.reshape(m.weight.shape), m.bias).relu())


@pytest.mark.parametrize("run", [standardised, standardised_by_batch_norm])
def test_standardised_weights_keep_their_statistics(run: Any) -> None:
    model = Net(run, enter=nn.Conv2d(3, 6, 1), weight=nn.Parameter(torch.randn(8, 6, 3, 3)),
                bias=nn.Parameter(torch.randn(8)), leave=nn.Conv2d(8, 2, 1))  # fmt: skip
    program = program_of(model, (2, 3, 5, 5))
    family = family_of(program, "weight", 1)
    assert (family.exactness, family.zeroed_by) == ("exact-after-correction", "writers")
    assert "keeps the value that its parameters gave it" in family.reasons[0]
    assert family.frozen
    inputs, _ = program.example_inputs
    after = check(program, "structured-erase{sparsity=0.4}")
    assert after.entries["enter.weight"].tensor.shape[0] < 6
    assert any("frozen" in name for name in after.entries)
    assert after.run(*inputs).isfinite().all()
    check(after, "structured-erase{sparsity=0.3}")


def test_a_softmax_over_parameters_is_frozen() -> None:
    """A learned mixture of heads: its weights are numbers, which stay as they are."""

    def run(m: Any, x: Tensor) -> Tensor:
        mixed = (m.mix.softmax(0)[:, None] * m.enter(x).view(-1, 4, 3)).flatten(1)
        return m.leave(mixed)

    model = Net(run, enter=nn.Linear(5, 12), mix=nn.Parameter(torch.randn(4)),
                leave=nn.Linear(12, 2))  # fmt: skip
    program = program_of(model, (6, 5))
    heads = family_of(program, "mix", 0)
    assert heads.exactness == "exact-after-correction"
    check(program, f'structured-erase{{sparsity={{"{heads.name}": 0.5}}}}')


def test_meta_tensors_freeze_to_shapes() -> None:
    weight, bias = nn.Parameter(torch.randn(8, 6, 3, 3)), nn.Parameter(torch.randn(8))
    model = Net(standardised, enter=nn.Conv2d(3, 6, 1), weight=weight, bias=bias,
                leave=nn.Conv2d(8, 2, 1))  # fmt: skip
    program = tl.capture(model.to("meta").eval(), (torch.randn(2, 3, 5, 5, device="meta"),))
    erase_units(program, {family_of(program, "weight", 1): torch.tensor([0, 3])})
    assert program.entries["weight"].tensor.shape == (8, 4, 3, 3)
