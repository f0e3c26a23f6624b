"""Sparse optimizers in training loops: schedulers, accumulation, AMP, resuming, processes."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

import torchlathe as tl
from tests.passes.sparse_models import ConvNet, Deep, Mlp, batches, groups_of, train
from torchlathe.ir import InputError
from torchlathe.optim import DHSPG, H2SPG, HESSO, HESSOCRIC, HSPG, SparseOptimizer
from torchlathe.passes import Segments

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "hesso": (HESSO, {"pruning_steps": 8, "periods": 2}),
    "cric": (HESSOCRIC, {"pruning_steps": 4, "sampling_steps": 3, "max_cycles": 2}),
    "dhspg": (DHSPG, {"pruning_steps": 12, "penalty": 0.1}),
    "hspg": (HSPG, {"pruning_steps": 12, "penalty": 0.1, "project_step": 2, "adapt_every": 2}),
}


def made(kind: str, model: nn.Module, x: torch.Tensor, **options: Any) -> SparseOptimizer:
    make, more = KINDS[kind]
    options = {"lr": 1e-2, "target_sparsity": 0.5, "start_step": 2, **more, **options}
    found: SparseOptimizer = make(groups_of(model, x), model, **options)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [1, 5, 12])
def test_resuming_is_bit_exact(kind: str, stop: int) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    data = batches((8, 3, 6, 6))
    x = next(data)[0]
    optimizer = made(kind, model, x, base=torch.optim.AdamW)
    train(model, optimizer, data, stop)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    more = [next(data) for _ in range(10)]
    train(model, optimizer, iter(more), 10)

    torch.manual_seed(1)
    other = ConvNet()
    resumed = made(kind, other, x, base=torch.optim.AdamW)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    train(other, resumed, iter(more), 10)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert torch.equal(optimizer.phase, resumed.phase)


def test_schedulers_and_parameter_groups() -> None:
    torch.manual_seed(0)
    model = Mlp()
    data = batches((16, 6))
    groups = [
        {"params": [p for n, p in model.named_parameters() if "norm" in n], "weight_decay": 0.0},
        {"params": [p for n, p in model.named_parameters() if "norm" not in n], "lr": 1e-3},
    ]
    optimizer = made("hesso", model, next(data)[0], params=groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.01], total_steps=12)
    rates = []
    for _ in range(12):
        train(model, optimizer, data, 1)
        rates.append(optimizer.param_groups[0]["lr"])
        if len(rates) < 12:
            schedule.step()
    assert len(set(rates)) == 12
    assert optimizer.base.param_groups[0]["lr"] == rates[-1]
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    assert optimizer.zero_groups == 16


def test_accumulated_gradients_are_one_step() -> None:
    torch.manual_seed(0)
    model = Mlp().double()
    other = copy.deepcopy(model)
    data = batches((16, 6), dtype=torch.float64)
    x = next(data)[0]
    one, two = (made("hesso", m, x, base=torch.optim.SGD) for m in (model, other))
    for _ in range(12):
        x, y = next(data)
        one.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        one.step()
        two.zero_grad()
        for part in range(4):
            rows = slice(4 * part, 4 * part + 4)
            (nn.functional.cross_entropy(other(x[rows]), y[rows]) / 4).backward()
        two.step()
    assert one.steps == two.steps == 12
    assert torch.equal(one.phase, two.phase)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        # Sums over the batch in another order.
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "place"), [("hesso", 3), ("cric", 20)])
def test_a_gradient_scaler_skips_whole_steps(kind: str, place: int) -> None:
    torch.manual_seed(0)
    model = Mlp()
    data = batches((16, 6))
    optimizer = made(kind, model, next(data)[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    skipped = 0
    for step in range(30):
        x, y = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step == place:
            model.head.weight.grad.fill_(torch.inf)  # type: ignore[union-attr]
        before = optimizer.steps
        scaler.step(optimizer, loss=loss.detach())
        scaler.update()
        skipped += optimizer.steps == before
    assert skipped == 1
    assert optimizer.steps == 29
    assert optimizer.zero_groups == 16


def test_probes_end_though_all_their_gradients_overflow() -> None:
    torch.manual_seed(0)
    model, plain = Mlp(), Mlp()
    plain.load_state_dict(model.state_dict())
    data = list(itertools.islice(batches((16, 6)), 30))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1000)
    with_scaler, alone = (made("cric", m, data[0][0]) for m in (model, plain))
    assert isinstance(with_scaler, HESSOCRIC)
    for x, y in data:
        loss = nn.functional.cross_entropy(model(x), y)
        with_scaler.zero_grad()
        scaler.scale(loss).backward()
        if with_scaler.stage == "probe":
            model.head.weight.grad.fill_(torch.inf)  # type: ignore[union-attr]
        scaler.step(with_scaler, loss=loss.detach())
        scaler.update()
        train(plain, alone, iter([(x, y)]), 1)
    assert with_scaler.finished
    # Scales are powers of two, and probes train nothing.
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_states_go_through_torch_distributed_checkpoint(stop: int) -> None:
    from torch.distributed.checkpoint import state_dict as dcp

    torch.manual_seed(0)
    model = Mlp()
    data = list(itertools.islice(batches((16, 6)), 20))
    optimizer = made("hesso", model, data[0][0])
    train(model, optimizer, iter(data[:stop]), stop)
    weights = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    sparse = optimizer.sparse_state()
    assert optimizer.steps == stop
    train(model, optimizer, iter(data[stop:]), 20 - stop)

    other = Mlp()
    resumed = made("hesso", other, data[0][0])
    other.load_state_dict(weights)
    with pytest.raises(InputError, match="has no part for HESSO"):
        dcp.set_optimizer_state_dict(other, resumed, saved)
    resumed.load_sparse_state(sparse)
    dcp.set_optimizer_state_dict(other, resumed, saved)
    train(other, resumed, iter(data[stop:]), 20 - stop)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(optimizer.phase, resumed.phase)


@pytest.mark.parametrize("kind", ["hspg", "dhspg"])
def test_rates_of_parameter_groups_are_each_their_own(kind: str) -> None:
    data = list(itertools.islice(batches((16, 6)), 20))
    found = []
    for order in (1, -1):
        torch.manual_seed(0)
        model = Mlp()
        first, *rest = model.parameters()
        groups = [{"params": [first], "lr": 1e-4}, {"params": rest, "lr": 1e-2}][::order]
        optimizer = made(kind, model, data[0][0], params=groups, base=torch.optim.SGD)
        train(model, optimizer, iter(data), 20)
        assert optimizer.zero_groups == optimizer.target
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=0, atol=0)


def test_a_closure_is_called_once() -> None:
    model = Mlp()
    x = torch.randn(8, 6)
    optimizer = made("cric", model, x, start_step=0)
    calls = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        calls.append(loss)
        return loss

    for _ in range(3):
        assert optimizer.step(closure) is calls[-1]
    assert len(calls) == 3


# -- processes -------------------------------------------------------------------------------------


def _wrapped(wrap: str, kind: str, x: torch.Tensor) -> tuple[Any, Any]:
    """A model over the processes, if any, and its optimizer."""
    torch.manual_seed(0)
    make: Any
    more: dict[str, Any]
    if kind == "h2spg":
        model: nn.Module = Deep().double()
        groups: Any = tl.capture(model.eval(), (x,)).analysis(Segments)
        make, more = H2SPG, {"pruning_steps": 8}
    else:
        model = Mlp().double()
        groups = groups_of(model, x)
        make, more = KINDS[kind]
    wrapped: Any = model
    if wrap == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    elif wrap == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in [m for m in model.modules() if isinstance(m, nn.Linear)][1:3]:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    return wrapped, make(groups, wrapped, lr=1e-2, target_sparsity=0.5, start_step=2, **more)


def _gone(optimizer: Any) -> tuple[Any, bool]:
    """What went, and whether the weights say so too."""
    if isinstance(optimizer, H2SPG):
        return optimizer.chosen, len(optimizer.chosen) == 2
    zero = optimizer.table.zero()
    return zero.nonzero().flatten().tolist(), torch.equal(zero, optimizer.phase == 2)


def _go_on(rank: int | None, wrapped: Any, optimizer: Any, data: Sequence[Any]) -> None:
    """Train on the rows of a process, or on all."""
    rows = slice(None) if rank is None else slice(8 * rank, 8 * rank + 8)
    for x, y in data:
        loss = nn.functional.cross_entropy(wrapped(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss.detach())


def _whole(wrapped: Any) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): t.full_tensor() if hasattr(t, "full_tensor") else t
        for name, t in wrapped.named_parameters()
    }


def _process(rank: int, folder: str, kind: str, wrap: str, stop: int) -> None:
    """Train, and from a state that was saved on the way once more."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        stream = batches((16, 6), dtype=torch.float64)
        x, data = next(stream)[0], [next(stream) for _ in range(26)]
        wrapped, optimizer = _wrapped(wrap, kind, x)
        _go_on(rank, wrapped, optimizer, data[:stop])
        path = f"{folder}/state{rank}.pt"
        torch.save((wrapped.state_dict(), optimizer.state_dict()), path)
        _go_on(rank, wrapped, optimizer, data[stop:])
        resumed, other = _wrapped(wrap, kind, x)
        of_model, of_optimizer = torch.load(path, weights_only=False)
        resumed.load_state_dict(of_model)
        other.load_state_dict(of_optimizer)
        _go_on(rank, resumed, other, data[stop:])
        torch.save((_gone(optimizer), _whole(wrapped), _whole(resumed)), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("wrap", "kind", "stop"),
    [
        ("fsdp", "hesso", 5),
        pytest.param("ddp", "hesso", 5, marks=pytest.mark.slow),
        pytest.param("ddp", "cric", 10, marks=pytest.mark.slow),
        pytest.param("fsdp", "dhspg", 8, marks=pytest.mark.slow),
        pytest.param("fsdp", "cric", 10, marks=pytest.mark.slow),
        pytest.param("fsdp", "h2spg", 5, marks=pytest.mark.slow),
    ],
)
def test_two_processes_do_what_one_does_and_are_resumed(
    tmp_path: Path, wrap: str, kind: str, stop: int
) -> None:
    spawn(_process, (str(tmp_path), kind, wrap, stop), nprocs=2)
    stream = batches((16, 6), dtype=torch.float64)
    model, optimizer = _wrapped("", kind, next(stream)[0])
    _go_on(None, model, optimizer, [next(stream) for _ in range(26)])
    assert _gone(optimizer)[1]
    for rank in range(2):
        gone, tensors, resumed = torch.load(tmp_path / f"{rank}.pt")
        assert gone == _gone(optimizer)
        for name, value in model.named_parameters():
            # Mean gradients are sums in another order, which 26 steps of Adam carry along.
            torch.testing.assert_close(tensors[name], value, rtol=1e-6, atol=1e-8)
            assert torch.equal(resumed[name], tensors[name]), name


def _pipeline(rank: int, folder: str, world: int, method: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
        )
    try:
        torch.manual_seed(0)
        model = Mlp().double().eval()
        stream = batches((16, 6), dtype=torch.float64)
        data = [next(stream) for _ in range(8)]
        program = tl.capture(model, (data[0][0],), dynamic_shapes="auto")
        spec = f"sparse-train{{method={method},steps=30,lr=0.01,{_PIPELINES[method]}}}"
        found = tl.PassManager(f"{spec},structured-erase{{zeros=true}}").run(
            program,
            calibration=data,
            loss=lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
        )
        result = {name: entry.tensor.detach() for name, entry in found.entries.items()}
        torch.save(result, f"{folder}/{world}_{rank}.pt")
    finally:
        if world > 1:
            dist.destroy_process_group()


_PIPELINES = {
    "hesso": "periods=3",
    "cric": "pruning=6,method_options={sampling_steps:2,max_cycles:2}",
}


@pytest.mark.slow
@pytest.mark.parametrize("method", _PIPELINES)
def test_a_pipeline_on_two_processes(tmp_path: Path, method: str) -> None:
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        spawn(_pipeline, (str(tmp_path / str(world)), world, method), nprocs=world)
    want = torch.load(tmp_path / "1" / "1_0.pt")
    for rank in range(2):
        found = torch.load(tmp_path / "2" / f"2_{rank}.pt")
        for name, value in want.items():
            # Mean gradients are sums in another order, which 30 steps of Adam carry along.
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)
