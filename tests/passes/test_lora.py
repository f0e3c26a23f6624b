"""Low-rank adapters: inserted, trained to zero groups, merged, and erased."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchlathe as tl
from torchlathe.ir import OptionError, PreconditionError
from torchlathe.passes import InsertLora, PassManager
from torchlathe.tools.compat import define_torchvision_ops


class Net(nn.Module):
    """A residual layer with a norm, between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(6, 12), nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        found: torch.Tensor = self.head(self.norm(x))
        return found


def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return F.cross_entropy(outputs, batch[1])


@functools.cache
def task() -> tuple[nn.Module, list[Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = torch.randn(128, 6)
    labels = (inputs[:, :4]).argmax(1)
    return Net().eval(), list(zip(inputs.split(16), labels.split(16), strict=True))


def run(passes: str, **more: Any) -> tl.Program:
    model, data = task()
    program = tl.capture(model, (data[0][0],), dynamic_shapes="auto")
    return PassManager(passes, **more).run(program, calibration=data, loss=loss)


TRAIN = "sparse-train{sparsity=0.5,steps=30,lr=0.01,periods=3,decay-frozen=true}"


def test_adapters_change_nothing_until_they_train_and_when_they_are_merged() -> None:
    model, data = task()
    x = data[0][0]
    inserted = run("insert-lora{rank=2}", verify="full")
    torch.testing.assert_close(inserted.run(x), model(x))
    trained = {name for name, value in inserted.parameters.items() if value.requires_grad}
    assert trained == {
        f"{layer}.lora_{part}.weight"
        for layer in ("enter", "up", "down", "head")
        for part in ("down", "up")
    }
    assert all(p.requires_grad for p in model.parameters())  # the user's model is as it was
    both = run("insert-lora{rank=2},heal{method=distil,steps=1},merge-lora", verify="full")
    assert both.parameters.keys() == dict(model.named_parameters()).keys()
    assert all(p.requires_grad for p in both.parameters.values())


def test_merging_is_the_sum_of_both() -> None:
    _, data = task()
    x = data[0][0]
    program = run("insert-lora{rank=3,include=[up.*]}")
    with program.edit(by="test") as edit:
        edit.set_tensor("up.lora_up.weight", torch.randn(20, 3))
    want = program.run(x)
    merged = PassManager("merge-lora{thaw=false}", verify="full").run(program)
    # Sums of 12 products in another order.
    torch.testing.assert_close(merged.run(x), want, rtol=1e-5, atol=1e-5)
    assert "up.lora_up.weight" not in merged.entries
    assert not any(p.requires_grad for p in merged.parameters.values())


@pytest.mark.parametrize("method", ["hesso", "cric", "dhspg"])
def test_groups_of_base_and_adapter_become_zero_and_are_erased_exactly(method: str) -> None:
    more = {"cric": ",method_options={sampling_steps:2,max_cycles:2}"}.get(method, "")
    train = TRAIN.replace("}", f",method={method}{more}}}")
    if method == "cric":
        train = train.replace("steps=30", "steps=60")
    model, data = task()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, x = data, data[0][0]
    trained = run(f"insert-lora{{rank=2}},{train}")
    statistics = trained.history[1].statistics
    assert statistics["zero_groups"] == int(0.5 * 32)
    assert statistics["loss_after"] < statistics["loss_before"]
    merged = PassManager("merge-lora").run(trained)
    erased = PassManager("structured-erase{zeros=true}", verify="full").run(merged)
    widths = erased.tensor("up.weight").shape[0] + erased.tensor("enter.weight").shape[0]
    assert widths == 32 - 16
    torch.testing.assert_close(erased.run(x), trained.run(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_left_of_frozen_weights_is_as_it_was() -> None:
    model, _ = task()
    trained = run(f"insert-lora{{rank=2}},{TRAIN}")
    for name, value in model.named_parameters():
        now = trained.tensor(name)
        assert torch.equal(now[now != 0], value[now != 0])
    assert int((trained.tensor("up.weight").abs().sum(1) == 0).sum()) > 0


def test_as_text_with_healing_and_resumed(tmp_path: Path) -> None:
    _, data = task()
    train = TRAIN.replace("}", f',checkpoint="{tmp_path}",save-every=4}}')
    text = (
        f"insert-lora{{rank=2}},{train},merge-lora,structured-erase{{zeros=true}},"
        "heal{method=distil,steps=5}"
    )

    def stop(told: str) -> None:
        if told.startswith("step 20 "):
            raise KeyboardInterrupt

    program = tl.capture(task()[0], (data[0][0],), dynamic_shapes="auto")
    with pytest.raises(KeyboardInterrupt):
        PassManager(text).run(program, calibration=data, loss=loss, progress=stop)
    resumed = PassManager(text).run(program, calibration=data, loss=loss)
    for file in tmp_path.iterdir():
        file.unlink()
    whole = PassManager(text).run(program, calibration=data, loss=loss)
    for name, value in whole.parameters.items():
        assert torch.equal(value, resumed.tensor(name)), name


def test_a_model_of_transformers() -> None:
    define_torchvision_ops()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    data = [torch.randint(40, (4, 7)) for _ in range(6)]
    program = tl.capture(model, (data[0],), dynamic_shapes="auto")

    def language(outputs: Any, tokens: torch.Tensor) -> torch.Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    text = (
        "insert-lora{rank=2,exclude=[lm_head*]},"
        "sparse-train{sparsity=0.4,steps=20,lr=0.01,periods=2,decay-frozen=true,"
        "include=[*up_proj*]}"
    )
    trained = PassManager(text).run(program, calibration=data, loss=language)
    assert trained.history[1].statistics["zero_groups"] == int(0.4 * 64)
    erased = PassManager("merge-lora,structured-erase{zeros=true}").run(trained)
    want, got = (p.run(data[0]) for p in (trained, erased))
    torch.testing.assert_close(_logits(got), _logits(want), rtol=1e-5, atol=1e-5)
    widths = [erased.tensor(f"model.layers.{i}.mlp.up_proj.weight").shape[0] for i in range(2)]
    assert sum(widths) == 64 - int(0.4 * 64)


def _logits(outputs: Any) -> torch.Tensor:
    found = outputs["logits"] if hasattr(outputs, "keys") else outputs
    return found if isinstance(found, torch.Tensor) else found[0]


def test_bad_input() -> None:
    with pytest.raises(OptionError, match="rank is 0"):
        InsertLora(rank=0)
    record = run("merge-lora").history[0]
    assert not record.changed
    assert "no adapter to merge" in record.diagnostics[0]["message"]
    with pytest.raises(tl.Error, match="no family is left"):
        run("insert-lora{rank=2},sparse-train{steps=10}")
    assert issubclass(PreconditionError, tl.Error)


def test_adapters_of_any_name_and_twice_are_merged() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 2, batch_first=True)
            self.outer = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.outer(self.inner(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model, x = Attending().eval(), torch.randn(2, 5, 16)
    program = tl.PassManager("insert-lora{rank=4},insert-lora{rank=2}").run(tl.capture(model, (x,)))
    assert sum("lora" in name for name in program.parameters) == 12
    for name in program.parameters:
        if "lora_up" in name:
            program.tensor(name).detach().normal_()
    want = program.run(x)
    merged = tl.PassManager("merge-lora").run(program)
    assert not any("lora" in name for name in merged.parameters)
    torch.testing.assert_close(merged.run(x), want, rtol=1e-4, atol=1e-4)  # sums of some hundreds


def test_what_is_only_called_an_adapter_stays() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.lora_down = nn.Linear(8, 8), nn.Linear(8, 2)
            self.lora_up = nn.Linear(2, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.lora_up(self.lora_down(2 * x))

    torch.manual_seed(0)
    model, x = Own().eval(), torch.randn(3, 8)
    merged = tl.PassManager("merge-lora").run(tl.capture(model, (x,)))
    assert "lora_up.weight" in merged.parameters
    torch.testing.assert_close(merged.run(x), model(x))
