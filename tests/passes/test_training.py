"""The trainer: against plain torch, interrupted, and shared by processes."""

from __future__ import annotations

import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchlathe as tl
from tests.passes.training_worker import NormNet, TiedDecoder, loss, make, train
from torchlathe.ir import ArtifactError, InputError, OptionError, PreconditionError
from torchlathe.passes.base import PassContext
from torchlathe.passes.tune.training import (
    KeepMasks,
    Trainer,
    TrainingModule,
    TrainingOptions,
    masks_of_zeros,
    store,
)

ROOT = Path(__file__).parents[2]
torch.set_num_threads(1)  # everything here is small


def worker(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*start, "-m", "tests.passes.training_worker", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def plain_training(model: nn.Module, batches: list[Any], steps: int, lr: float) -> list[float]:
    """The same in plain torch: train mode, AdamW, cosine, two batches a step, clipped."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, stream = [], iter(batches * 100)
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(2):
            x, labels = next(stream)
            found = F.cross_entropy(model(x).flatten(0, -2), labels.flatten()) / 2
            found.backward()
            total += float(found.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(total)
    return losses


@pytest.mark.parametrize("kind", ["norm", "tied"])
def test_it_trains_as_plain_torch_does(kind: str) -> None:
    _, batches = make(kind)
    torch.manual_seed(0)
    model: nn.Module = NormNet() if kind == "norm" else TiedDecoder()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = plain_training(model, batches[:-1], 12, 1e-2)
    _, result = train(kind, accumulate=2, shuffle=False, dropout=False)
    # Both compute in float32, in another order where ops are fused: some ulps of losses about 2.
    assert result.losses == pytest.approx(plain, abs=2e-5)
    state = model.state_dict()
    for name, value in result.tensors.items():
        # AdamW divides by the root of squares: what is nearly zero may move by lr * 1e-3.
        assert torch.allclose(value, state[name], atol=2e-5), name
    assert ("body.1.running_mean" in result.tensors) == (kind == "norm")


def test_in_float64_batch_norm_follows_the_batches_exactly() -> None:
    torch.manual_seed(0)
    model = NormNet().double().eval()
    _, batches = make("norm")
    batches = [(x.double(), y) for x, y in batches]
    program = tl.capture(deepcopy(model), (batches[0][0],), dynamic_shapes="auto")
    module = TrainingModule(program, program.parameters).train()
    for x, _ in batches:
        outputs, _ = module(x)
        assert torch.allclose(outputs[0], model.train()(x), atol=1e-12)
    own = module.tensor("stem.1.running_var")
    assert torch.allclose(own, model.stem[1].running_var, atol=1e-12)  # type: ignore[arg-type]
    outputs, _ = module.eval()(batches[0][0])
    assert torch.allclose(outputs[0], model.eval()(batches[0][0]), atol=1e-12)
    # The program is as it was captured.
    assert torch.equal(program.tensor("stem.1.running_mean"), torch.zeros(6).double())


def test_dropout_is_drawn_in_training_only() -> None:
    program, batches = make("tied")
    module = TrainingModule(program, program.parameters)
    x = batches[0][0]
    module.train()
    assert not torch.equal(module(x)[0][0], module(x)[0][0])
    module.eval()
    assert torch.equal(module(x)[0][0], module(x)[0][0])
    assert torch.allclose(module(x)[0][0], program.run(x), atol=1e-6)
    off = TrainingModule(program, program.parameters, dropout=False).train()
    assert torch.equal(off(x)[0][0], off(x)[0][0])


def test_what_was_given_stays_as_it_is_and_ties_stay() -> None:
    program, _ = make("tied")
    before = {name: value.detach().clone() for name, value in program.parameters.items()}
    trainer, result = train("tied")
    for name, value in trainer.program.parameters.items():
        assert torch.equal(value, before[name])
        assert value.grad is None
    changed = store(trainer.program, result.tensors, "test")
    assert set(changed) == set(before)
    assert trainer.program.aliases == {"head.weight": "embed.weight"}
    assert torch.equal(trainer.program.tensor("head.weight"), result.tensors["embed.weight"])


def test_blocks_and_recomputed_activations_change_nothing() -> None:
    for kind in ("norm", "tied"):
        _, plain = train(kind, dropout=False)
        trainer, again = train(kind, dropout=False, recompute=True)
        assert len(trainer.module.blocks) >= 2
        assert plain.losses == again.losses
        for name, value in plain.tensors.items():
            assert torch.equal(value, again.tensors[name]), name


@pytest.mark.parametrize("kind", ["norm", "tied"])
def test_a_killed_run_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    out, folder = tmp_path / "out.safetensors", tmp_path / "states"
    dead = worker(kind, str(out), f"checkpoint={folder}", "die=8")
    assert dead.returncode == -9
    assert not out.exists()
    assert len(list(folder.iterdir())) == 1
    _, resumed = train(kind, checkpoint=str(folder))
    assert resumed.resumed_at == 6
    _, whole = train(kind)
    assert resumed.losses == whole.losses
    assert resumed.evaluations == whole.evaluations
    for name, value in whole.tensors.items():
        assert torch.equal(value, resumed.tensors[name]), name
    _, done = train(kind, checkpoint=str(folder))
    assert done.resumed_at == 12
    assert torch.equal(done.tensors[name], whole.tensors[name])


@pytest.mark.slow
def test_two_killed_processes_go_on_bit_for_bit(tmp_path: Path) -> None:
    out, folder = tmp_path / "out.safetensors", tmp_path / "states"
    dead = worker("norm", str(out), f"checkpoint={folder}", "die=8", processes=2)
    assert dead.returncode != 0
    assert not out.exists()
    found = []
    for options in ([f"checkpoint={folder}"], []):
        done = worker("norm", str(out), *options, processes=2)
        assert done.returncode == 0, done.stderr
        found.append(load_file(out))
    resumed, whole = found
    assert resumed.pop("resumed") == 6
    assert whole.pop("resumed") == 0
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_another_run_leaves_the_checkpoint_alone(tmp_path: Path) -> None:
    _, first = train("norm", checkpoint=str(tmp_path))
    _, second = train("norm", checkpoint=str(tmp_path), lr=2e-2)
    assert second.resumed_at == 0
    assert first.losses != second.losses
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_checkpoint_is_an_error(tmp_path: Path) -> None:
    train("norm", checkpoint=str(tmp_path))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ArtifactError, match="cannot be read"):
        train("norm", checkpoint=str(tmp_path))


def test_a_shuffling_loader_is_resumed_too(tmp_path: Path) -> None:
    program, batches = make("norm")
    xs, ys = (torch.cat(each) for each in zip(*batches, strict=True))
    options = TrainingOptions(steps=11, lr=1e-2, save_every=4, checkpoint=str(tmp_path))

    def run(limit: int | None) -> Any:
        torch.manual_seed(7)
        loader = DataLoader(TensorDataset(xs, ys), batch_size=6, shuffle=True)
        ctx = PassContext(program, "test", loader, seed=3)
        trainer = Trainer(program, ctx, options, objective=loss)
        if limit is not None:
            step = trainer._one_step

            def stop(parts: Any) -> float:
                if trainer.step == limit:
                    raise KeyboardInterrupt
                return step(parts)

            trainer._one_step = stop  # type: ignore[method-assign]
        return trainer.run()

    with pytest.raises(KeyboardInterrupt):
        run(10)
    resumed = run(None)
    assert resumed.resumed_at == 8
    next(iter(tmp_path.iterdir())).unlink()
    assert run(None).losses == resumed.losses


@pytest.mark.parametrize("kind", ["tied", pytest.param("norm", marks=pytest.mark.slow)])
def test_two_processes_compute_what_one_does(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    done = worker(kind, str(out), "accumulate=2", f"checkpoint={tmp_path / 's'}", processes=2)
    assert done.returncode == 0, done.stderr
    found = load_file(out)
    _, alone = train(kind, dropout=False, accumulate=2)
    # Sums over samples are taken in another order.
    assert found.pop("losses").tolist() == pytest.approx(alone.losses, abs=1e-5)
    found.pop("resumed")
    assert found.keys() == alone.tensors.keys()
    for name, value in alone.tensors.items():
        assert torch.allclose(value, found[name], atol=1e-5), name
    # What two processes saved, one can go on from.
    _, again = train(kind, dropout=False, accumulate=2, checkpoint=str(tmp_path / "s"))
    assert again.resumed_at == 12


def test_zeros_stay_under_momentum_and_weight_decay() -> None:
    program, batches = make("norm")
    with program.edit() as edit:
        weight = program.tensor("body.0.weight").detach().clone()
        weight[::2] = 0
        edit.set_tensor("body.0.weight", weight)
        edit.set_tensor("head.bias", torch.zeros(4))
    masks = masks_of_zeros(program, program.parameters)
    assert set(masks) == {"body.0.weight"}  # biases begin at zero as a whole
    options = TrainingOptions(steps=8, lr=1e-2, optimizer_options={"weight_decay": 0.5})
    trainer = Trainer(
        program,
        PassContext(program, "test", batches),
        options,
        objective=loss,
        hooks=[KeepMasks(masks)],
    )
    result = trainer.run()
    found = result.tensors["body.0.weight"]
    assert int(found[::2].count_nonzero()) == 0
    assert not torch.equal(found[1::2], weight[1::2])
    state = trainer.optimizer.state[trainer.parameters["body.0.weight"]]
    assert int(state["exp_avg"][::2].count_nonzero()) == 0


def test_frozen_and_trainable_patterns() -> None:
    _, result = train("norm", frozen=("stem.*",), batch_norm=False)
    names = set(result.tensors)
    assert names == {"body.0.weight", "body.1.weight", "body.1.bias"} | {
        "head.weight",
        "head.bias",
    }
    _, result = train("tied", trainable=("head.*", "gain"))
    assert set(result.tensors) == {"embed.weight", "gain"}
    with pytest.raises(OptionError, match=r"trainable has 'nothing.\*', which fits no parameter"):
        train("tied", trainable=("nothing.*",))
    with pytest.raises(PreconditionError, match="no parameter to train"):
        train("tied", frozen=("*",))


def test_it_ends_with_the_best_state_it_saw() -> None:
    # A learning rate that can only do harm.
    trainer, result = train("norm", lr=30.0, clip=None, keep_best=True, optimizer="SGD")
    assert result.best is not None
    assert result.best["loss"] == min(e["loss"] for e in result.evaluations)
    assert result.best["loss"] <= result.evaluations[0]["loss"]
    if result.best["step"] == 0:
        for name, value in result.tensors.items():
            assert torch.equal(value, trainer.program.tensor(name))


def test_early_stop_and_divergence() -> None:
    _, result = train("norm", lr=5.0, patience=1, evaluate_every=1, keep_best=True)
    assert result.stopped == "early"
    assert result.steps < 12

    trainer, _ = train("tied", steps=1)
    trainer = Trainer(
        trainer.program,
        ctx := PassContext(trainer.program, "test", make("tied")[1]),
        TrainingOptions(steps=5),
        objective=lambda f: loss(f) * (float("nan") if f.training and f.step == 2 else 1.0),
    )
    result = trainer.run()
    assert (result.stopped, result.steps) == ("diverged", 2)
    assert "try a smaller lr" in ctx.diagnostics[0].message
    trainer.options = replace(trainer.options, keep_best=False)
    with pytest.raises(InputError, match="became nan at step 3"):
        trainer._diverged(float("nan"))


def test_bfloat16_autocast_trains_and_keeps_dtypes() -> None:
    _, result = train("tied", amp=True, dropout=False)
    _, plain = train("tied", dropout=False)
    # bfloat16 has 8 bits: products are off by 0.4 %, and the loss is about 2.4.
    assert result.losses == pytest.approx(plain.losses, abs=0.05)
    assert {value.dtype for value in result.tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "AdamX"}, "torch.optim has no AdamX"),
        ({"optimizer": "LBFGS"}, "needs a closure"),
        ({"optimizer_options": {"beta": 1}}, "does not take optimizer_options"),
        ({"lr": 0.0}, "lr is 0.0, but must be positive"),
        ({"steps": 0}, "steps is 0, but must be at least 1"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"warmup": -1}, "warmup is -1, but must not be negative"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TrainingOptions(**options)


def test_schedules() -> None:
    cosine = TrainingOptions(warmup=3)
    factors = [cosine.factor(step, 13) for step in range(13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert replace(cosine, schedule="linear").factor(8, 13) == 0.5
    assert replace(cosine, schedule="constant").factor(12, 13) == 1.0


def test_bad_data_and_losses() -> None:
    program, batches = make("norm")

    def run(data: Any, objective: Any = loss, **options: Any) -> None:
        ctx = PassContext(program, "test", data)
        Trainer(program, ctx, TrainingOptions(steps=2, **options), objective=objective).run()

    with pytest.raises(InputError, match="no batch"):
        run([])
    with pytest.raises(InputError, match="must be one number"):
        run(batches, lambda f: f.outputs)
    with pytest.raises(InputError, match="does not depend on the parameters"):
        run(batches, lambda f: f.outputs.detach().sum())
    with pytest.raises(InputError, match="does not fit the program"):
        run([torch.randn(2, 5, 8, 8)] * 3)
    one = torch.randn(1, 6)
    norm = tl.capture(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)).eval(), (one,))
    ctx = PassContext(norm, "test", [one, one])
    with pytest.raises(InputError, match="more than one value per channel"):
        Trainer(norm, ctx, TrainingOptions(steps=1), objective=lambda f: f.outputs.sum()).run()
