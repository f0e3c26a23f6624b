"""Sparse optimizers: how many groups become zero, when, how, and what stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchlathe as tl
from tests.passes.sparse_models import Concat, ConvNet, Mlp, batches, groups_of, train
from torchlathe.ir import InputError, OptionError, PreconditionError
from torchlathe.optim import DHSPG, HESSO, HESSOCRIC, HSPG, Saliency, SparseOptimizer
from torchlathe.passes.tune.optim.groups import Sums
from torchlathe.passes.tune.optim.half_space import outside_half_space, penalties
from torchlathe.passes.tune.optim.hesso import left_after

ALL = pytest.mark.parametrize(
    ("make", "more"),
    [
        (HESSO, {"pruning_steps": 8, "periods": 2}),
        (HESSOCRIC, {"pruning_steps": 6, "sampling_steps": 3, "max_cycles": 2}),
        (DHSPG, {"pruning_steps": 12, "penalty": 0.1}),
        (HSPG, {"pruning_steps": 12, "penalty": 0.1, "project_step": 2}),
    ],
    ids=["hesso", "cric", "dhspg", "hspg"],
)


def made(model: nn.Module, x: Tensor, make: Any = HESSO, **options: Any) -> SparseOptimizer:
    options = {"lr": 1e-2, "target_sparsity": 0.5, "start_step": 2, **options}
    found: SparseOptimizer = make(groups_of(model, x), model, **options)
    return found


# -- how many, and that they stay zero -------------------------------------------------------------


@ALL
@pytest.mark.parametrize("sparsity", [0.3, 0.62])
def test_as_many_groups_are_zero_as_asked_for(
    make: Any, more: dict[str, Any], sparsity: float
) -> None:
    torch.manual_seed(0)
    model = Mlp()
    data = batches((16, 6))
    optimizer = made(model, next(data)[0], make, target_sparsity=sparsity, **more)
    train(model, optimizer, data, 40)
    assert optimizer.finished
    assert optimizer.table.count == 32
    assert optimizer.target == optimizer.zero_groups == int(32 * sparsity)
    assert torch.equal(optimizer.table.zero(), optimizer.phase == 2)  # those, and no others
    for name, units in optimizer.zero_units().items():
        assert len(units) < optimizer.table.chosen[0].extent or not name.startswith("enter")


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
        (torch.optim.AdamW, {"weight_decay": 0.5}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
        (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    ],
    ids=["sgd", "adamw", "rmsprop", "adam"],
)
def test_zeros_stay_zero_whatever_the_base_does(base: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    data = batches((8, 3, 6, 6))
    optimizer = made(model, next(data)[0], base=base, pruning_steps=4, **options)
    train(model, optimizer, data, 6)
    zero = optimizer.table.zero()
    assert int(zero.sum()) == optimizer.target
    for _ in range(5):
        train(model, optimizer, data, 1)
        assert torch.equal(optimizer.table.zero(), zero)


def test_no_family_is_emptied_and_round_numbers_are_kept() -> None:
    torch.manual_seed(0)
    model = Mlp(16, 40)
    data = batches((16, 6))
    # By magnitude alone the whole hidden layer would go first.
    with torch.no_grad():
        model.up.weight.mul_(1e-3)
        model.up.bias.mul_(1e-3)
    least: dict[str, Any] = {"saliency": "magnitude", "pruning_steps": 4, "target_sparsity": 0.7}
    optimizer = made(copy.deepcopy(model), next(data)[0], keep_at_least=3, **least)
    train(model, optimizer, data, 1)
    optimizer = made(model, next(data)[0], keep_at_least=3, **least)
    train(model, optimizer, data, 6)
    counts = {name: len(units) for name, units in optimizer.zero_units().items()}
    assert counts == {"enter.weight:0": 2, "up.weight:0": 37}
    model = Mlp(16, 40)
    optimizer = made(model, next(data)[0], divisible=8, **least)
    train(model, optimizer, data, 6)
    kept = [f.extent - len(optimizer.zero_units().get(f.name, ())) for f in optimizer.table.chosen]
    assert all(k % 8 == 0 for k in kept)
    assert optimizer.zero_groups <= optimizer.target


def test_counts_of_periods_add_up() -> None:
    model = Mlp()
    data = batches((16, 6))
    optimizer = made(model, next(data)[0], target_sparsity=0.66, pruning_steps=12, periods=4)
    zeros = []
    for _ in range(15):
        train(model, optimizer, data, 1)
        zeros.append(optimizer.zero_groups)
    # 21 of 32: 5, 10, 15, and the rest with the last period.
    assert zeros == [0] * 4 + [5] * 3 + [10] * 3 + [15] * 3 + [21] * 2
    assert optimizer.group_sparsity == 21 / 32


# -- decay -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_decay_is_a_line(steps: int) -> None:
    x = 1.0
    for step in range(steps):
        x *= left_after(step, steps)
        assert x == pytest.approx(1 - (step + 1) / steps, abs=1e-12)  # of rounding
    assert x == 0.0


def test_without_gradients_groups_decay_along_a_line_and_the_rest_stays() -> None:
    torch.manual_seed(0)
    model = Mlp().double()
    before = copy.deepcopy(model.state_dict())
    data = batches((16, 6), dtype=torch.float64)
    optimizer = made(
        model, next(data)[0], base=torch.optim.SGD, lr=0.0, start_step=0, pruning_steps=8
    )
    masks: dict[str, Tensor] = {}
    for step in range(8):
        train(model, optimizer, data, 1)
        if not step:
            masks = {n: model.state_dict()[n] != t for n, t in before.items()}
        for name, tensor in model.state_dict().items():
            want = torch.where(masks[name], before[name] * (1 - (step + 1) / 8), before[name])
            # The factors are rounded; what does not decay is multiplied by exactly one.
            torch.testing.assert_close(tensor, want, rtol=1e-12, atol=0)
            assert torch.equal(tensor[~masks[name]], before[name][~masks[name]])
    rows = masks["up.weight"].all(1)
    assert torch.equal(rows, masks["up.bias"])
    assert not masks["head.weight"].any()


def test_only_the_slices_of_a_concatenation_decay() -> None:
    torch.manual_seed(0)
    model = Concat()
    data = batches((8, 3, 6, 6))
    optimizer = made(model, next(data)[0], pruning_steps=4, include=("b.weight:0",))
    assert optimizer.table.count == 10
    train(model, optimizer, data, 8)
    units = optimizer.zero_units()["b.weight:0"]
    assert len(units) == 5
    assert model.norm.weight.eq(0).nonzero().flatten().tolist() == (6 + units).tolist()
    assert not model.a.weight.eq(0).any()


# -- saliency --------------------------------------------------------------------------------------


@st.composite
def sums(draw: Any) -> Sums:
    count = draw(st.integers(2, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    d = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        x[0] = 0
    size = torch.randint(1, 50, (count,), generator=generator).double()
    return Sums((x * x).sum(1), (x * d).sum(1), (d * d).sum(1), size)


@settings(deadline=None, max_examples=30)
@given(given_sums=sums(), seed=st.integers(0, 2**31))
def test_saliency_knows_no_order(given_sums: Sums, seed: int) -> None:
    order = torch.randperm(len(given_sums.sizes), generator=torch.Generator().manual_seed(seed))
    names = ("weights", "products", "directions", "sizes")
    shuffled = Sums(*(getattr(given_sums, name)[order] for name in names))
    scores = Saliency().scores(given_sums)
    # Norms over all groups are sums, in another order.
    torch.testing.assert_close(Saliency().scores(shuffled), scores[order], rtol=1e-12, atol=1e-14)
    first = Saliency(0, 0, 0, 1, 0).scores(given_sums).argsort(stable=True)
    second = Saliency(0, 0, 0, 0, 1).scores(given_sums).argsort(stable=True)
    products = given_sums.products.abs()
    # Both Taylor criteria rank alike but for products whose squares are the same number.
    torch.testing.assert_close(products[first], products[second], rtol=1e-6, atol=1e-12)


def test_saliency_follows_permuted_channels() -> None:
    torch.manual_seed(0)
    model = Mlp().double()
    other = copy.deepcopy(model)
    order = torch.randperm(20)
    with torch.no_grad():
        other.up.weight.copy_(model.up.weight[order])
        other.up.bias.copy_(model.up.bias[order])
        other.down.weight.copy_(model.down.weight[:, order])
    found = []
    for one in (model, other):
        data = batches((16, 6), dtype=torch.float64)
        optimizer = made(one, next(data)[0], pruning_steps=3)
        train(one, optimizer, data, 6)
        found.append(optimizer.zero_units()["up.weight:0"])
    assert sorted(order[found[1]].tolist()) == found[0].tolist()


def test_the_sign_of_the_cosine_turns_its_ranking_round() -> None:
    x, d = torch.tensor([1.0, 1.0, 1.0]).double(), torch.tensor([1.0, 0.0, -1.0]).double()
    given_sums = Sums(x * x, x * d, torch.ones(3).double(), torch.ones(3).double())
    up = Saliency(0, 0, 1, 0, 0).scores(given_sums)
    down = Saliency(0, 0, 1, 0, 0, cosine_sign=-1).scores(given_sums)
    assert up.argsort().tolist() == [2, 1, 0]
    assert down.argsort().tolist() == [0, 1, 2]


# -- half space ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), epsilon=st.floats(0, 0.99))
def test_projection_makes_nothing_larger_and_twice_is_once(seed: int, epsilon: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, trial = (torch.randn(40, 6, generator=generator, dtype=torch.float64) for _ in range(2))

    def project(y: Tensor) -> Tensor:
        outside = outside_half_space((y * x).sum(1), (x * x).sum(1), epsilon)
        return y.masked_fill(outside[:, None], 0)

    once = project(trial)
    assert bool((once.norm(dim=1) <= trial.norm(dim=1)).all())
    assert torch.equal(project(once), once)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31))
def test_lambda_in_its_window_serves_loss_and_norm(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, d = (torch.randn(50, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    given_sums = Sums((x * x).sum(1), (x * d).sum(1), (d * d).sum(1), torch.full((50,), 7.0))
    # Twice the lower end of the window, or its middle where that is past the upper end.
    found = penalties(given_sums, 1e-6, 2.0, 1e9)
    move = -(d + found[:, None] * x / x.norm(dim=1, keepdim=True))
    grows = given_sums.products < 0
    assert bool(((move * x).sum(1) < 0)[grows].all())  # the norm falls
    assert bool(((move * d).sum(1) < 0)[grows].all())  # and so does the loss
    below = -(d + 0.999 * (-given_sums.products / x.norm(dim=1) ** 2)[:, None] * x)
    assert bool(((below * x).sum(1) > 0)[grows].all())  # under it the norm would not


def test_half_space_never_projects_past_the_target() -> None:
    torch.manual_seed(0)
    model = Mlp()
    data = batches((16, 6))
    optimizer = made(
        model, next(data)[0], HSPG, penalty=50.0, project_step=1, pruning_steps=8, start_step=0
    )
    for _ in range(6):
        train(model, optimizer, data, 1)
        assert optimizer.zero_groups <= optimizer.target
    # The penalty takes groups past the origin so fast that nothing is left for the last stretch.
    assert optimizer.zero_groups == optimizer.target
    train(model, optimizer, data, 4)
    assert optimizer.zero_groups == optimizer.target


@pytest.mark.parametrize("make", [HSPG, DHSPG])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_few_steps_of_pruning_reach_the_target_too(make: Any, steps: int) -> None:
    torch.manual_seed(0)
    model = Mlp()
    data = batches((16, 6))
    optimizer = made(model, next(data)[0], make, pruning_steps=steps, start_step=1)
    train(model, optimizer, data, steps + 1)
    assert optimizer.finished
    assert optimizer.zero_groups == optimizer.target
    assert int(optimizer.table.zero().sum()) == optimizer.target


# -- CRIC ------------------------------------------------------------------------------------------


class Gate(nn.Module):
    """A hidden unit of the smallest weights through which all that matters goes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 1, bias=False)
        with torch.no_grad():
            self.up.weight.normal_(0, 1.0)
            self.up.bias.zero_()
            self.up.weight[0] = torch.tensor([0.01, 0.0, 0.0, 0.0])
            self.down.weight.fill_(1e-3)
            self.down.weight[0, 0] = 100.0

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(x)))
        return result


@pytest.mark.parametrize(
    ("make", "more", "stays"),
    [
        (HESSO, {"saliency": "magnitude", "pruning_steps": 10}, False),
        (HESSOCRIC, {"pruning_steps": 10, "sampling_steps": 5}, True),
    ],
    ids=["magnitude", "cric"],
)
def test_cric_keeps_an_indispensable_unit_of_low_magnitude(
    make: Any, more: dict[str, Any], stays: bool
) -> None:
    torch.manual_seed(0)
    model = Gate()
    x = torch.randn(256, 4)
    optimizer = made(model, x, make, base=torch.optim.SGD, lr=1e-6, target_sparsity=0.6, **more)
    for _ in range(120):
        loss = nn.functional.mse_loss(model(x)[:, 0], torch.relu(x[:, 0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
    assert optimizer.finished
    assert optimizer.zero_groups == 7
    assert (0 not in optimizer.zero_units()["up.weight:0"].tolist()) is stays


def test_cycles_put_weights_and_statistics_back() -> None:
    torch.manual_seed(0)
    model = ConvNet()
    data = batches((8, 3, 6, 6))
    optimizer = made(model, next(data)[0], HESSOCRIC, start_step=0, sampling_steps=2, max_cycles=3)
    assert isinstance(optimizer, HESSOCRIC)
    train(model, optimizer, data, 1)
    saved = {name: value.clone() for name, value in optimizer._saved.items()}
    assert "bn.running_mean" in saved
    seen = 0
    while not optimizer.decays:
        train(model, optimizer, data, 1)
        seen += 1
        at_end = optimizer.decays or (optimizer.stage == "cycle" and not optimizer._at)
        if at_end:
            for name, value in saved.items():
                assert torch.equal(model.state_dict()[name], value), name
    assert seen <= 6 + 3 * 2  # a step for each of three shares of two families, and the cycles


def test_cric_asks_for_the_loss() -> None:
    model = Mlp()
    x = torch.randn(4, 6)
    optimizer = made(model, x, HESSOCRIC, start_step=0)
    model(x).sum().backward()
    with pytest.raises(PreconditionError, match="looks at the loss"):
        optimizer.step()


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_sparsity": 0.0}, "between 0 and 1"),
        ({"target_sparsity": 1.0}, "between 0 and 1"),
        ({"start_step": -1}, "start_step is -1"),
        ({"pruning_steps": 50, "total_steps": 51}, "pruning ends after step 52"),
        ({"pruning_steps": 4, "periods": 5}, "periods is 5"),
        ({"target_sparsity": 0.99, "keep_at_least": 4}, "the families can spare 24"),
        ({"include": ("nowhere.*",)}, "matches no family"),
        ({"exclude": ("*",)}, "no family is left"),
        ({"saliency": "magnitud"}, "no criterion magnitud"),
        ({"saliency": {"cosine": -1.0}}, "none may be negative"),
        ({"divisible": 0}, "divisible 0"),
        ({"learning_rate": 1.0}, "has an option learning_rate"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.replace(" ", "-"),
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        made(Mlp(), torch.randn(4, 6), **options)


def test_groups_of_another_model_are_refused() -> None:
    groups = groups_of(Mlp(), torch.randn(4, 6))
    with pytest.raises(InputError, match=r"which the model does not have"):
        HESSO(groups, nn.Linear(2, 2), lr=0.1)
    with pytest.raises(InputError, match=r"has shape \(16, 6\), but \(12, 6\)"):
        HESSO(groups, Mlp(16), lr=0.1)


def test_the_state_of_another_run_is_refused() -> None:
    x = torch.randn(4, 6)
    optimizer = made(Mlp(), x)
    with pytest.raises(InputError, match="no part for HESSO"):
        optimizer.load_state_dict(torch.optim.AdamW(Mlp().parameters()).state_dict())
    with pytest.raises(InputError, match="of 36 groups"):
        optimizer.load_state_dict(made(Mlp(16), x).state_dict())


def test_states_of_other_optimizers_and_of_earlier_versions_are_refused() -> None:
    x = torch.randn(4, 6)
    cric = made(Mlp(), x, HESSOCRIC)
    with pytest.raises(InputError, match=r"not of a HESSOCRIC like this one: stage is not in it"):
        cric.load_state_dict(made(Mlp(), x).state_dict())
    state = cric.state_dict()
    state["sparse"]["saved"] = {"of_old": torch.zeros(3)}
    with pytest.raises(InputError, match=r"the weights of of_old, which no cycle"):
        cric.load_state_dict(state)


def test_the_state_of_another_schedule_is_refused() -> None:
    model = Mlp()
    x = torch.randn(4, 6)
    state = made(model, x, HESSO, pruning_steps=8, periods=2).state_dict()
    with pytest.raises(InputError, match="'periods': 2"):
        made(model, x, HESSO, pruning_steps=8, periods=4).load_state_dict(state)


def test_copies_are_refused_and_tied_parameters_are_one() -> None:
    model = Mlp()
    optimizer = made(model, torch.randn(4, 6), HESSO)
    with pytest.raises(TypeError, match="load its state_dict"):
        copy.deepcopy(optimizer)
    tensors = {**dict(model.named_parameters()), "again": model.head.weight}
    found = HESSO(groups_of(model, torch.randn(4, 6)), tensors, lr=1e-2)
    assert len(found.param_groups[0]["params"]) == len(list(model.parameters()))


def test_optim_is_public() -> None:
    assert tl.optim.HESSO is HESSO
    assert {"HESSO", "HESSOCRIC", "DHSPG", "HSPG", "H2SPG"} <= set(tl.optim.__all__)


def test_one_copy_of_the_prunable_tensors_while_groups_go_and_none_after() -> None:
    torch.manual_seed(0)
    model = Mlp()
    x = torch.randn(8, 6)
    optimizer = made(model, x, HESSO, lr=1e-2, start_step=2, pruning_steps=6, periods=3)
    prunable = {place.name: place.tensor.numel() for place in optimizer.table.places}

    def held() -> int:
        return sum(tensor.numel() for tensor in optimizer.table._memory.values())

    most = []
    for _ in range(10):
        model(x).square().mean().backward()
        optimizer.step()
        most.append(held())
    assert most[:2] == [0, 0]
    assert max(most) == sum(prunable.values())
    assert most[7:] == [0, 0, 0]
