"""Families against what others found on the same networks."""

from __future__ import annotations

import pytest
from torch import nn

from tests.zoo.models import MODELS
from torchlathe.ir import capture
from torchlathe.passes import ZeroInvariantGroups

# Networks of layers that Torch-Pruning knows, without concatenation or grouped channels, where
# its groups are whole axes.
COMMON = (
    "residual_cnn",
    "preactivation",
    "depthwise_conv",
    "squeeze_excite",
    "layer_norm_mlp",
    "post_norm_mlp",
    "swiglu",
    "shared_module",
    "frozen",
)


def _families(model: nn.Module, name: str):
    args, kwargs = MODELS[name].example(0)
    program = capture(model, args, kwargs, dynamic_shapes=MODELS[name].dynamic_shapes)
    return program.analysis(ZeroInvariantGroups)


@pytest.mark.parametrize("name", COMMON)
def test_groups_are_those_of_torch_pruning(name: str) -> None:
    torch_pruning = pytest.importorskip("torch_pruning")
    model = MODELS[name].build()
    model.requires_grad_(True)  # its graph is that of the gradients
    ours = {
        frozenset((s.name, s.axis) for s in family.slices if s.kind.value == "parameter")
        for family in _families(model, name).prunable
    }
    args, _ = MODELS[name].example(0)
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=args)
    names = {module: path for path, module in model.named_modules()}
    theirs = set()
    for group in graph.get_all_groups():
        found = set()
        for dependency, _ in group:
            module = dependency.target.module
            if module not in names:
                continue
            own = dict(module.named_parameters(recurse=False))
            out = graph.is_out_channel_pruning_fn(dependency.handler)
            for parameter, tensor in own.items():
                if out or tensor.dim() > 1:
                    axis = 0 if out or tensor.dim() == 1 else 1
                    found.add((f"{names[module]}.{parameter}", axis))
        theirs.add(frozenset(found))
    assert ours
    assert ours <= theirs, ours - theirs


def test_resnet18_has_as_many_groups_as_only_train_once_counts() -> None:
    """2,880 channels in zero-invariant groups, as OTO's tutorial on ResNet-18 prints."""
    families = _families(MODELS["tv_resnet18"].build(), "tv_resnet18")
    assert sum(family.extent for family in families.prunable) == 2880
