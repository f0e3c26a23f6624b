"""Attributes of layers whose meaning is known: a literal table by class.

What the parameters' shapes do not say, such as groups, is read from the op in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from torchlathe.backends.module.stand_ins import (
    CompactAttention,
    CompensatedGroupNorm,
    CompensatedLayerNorm,
    Erased,
)
from torchlathe.ir.axes.rule import argument

__all__ = ["correct_layer"]


def correct_layer(module: nn.Module, op: fx.Node | None) -> bool:
    """Let the attributes of a known layer fit the parameters that it has now.

    Args:
        module: Changed in place.
        op: The op that reads its weight after the passes, or its input where it has none.

    Returns:
        Whether the class is known; of others nothing is changed.
    """
    for kind, correct in _TABLE:
        if isinstance(module, kind):
            correct(module, op)
            return True
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        # transformers' linear layer with a transposed weight.
        _transposed_linear(module)
        return True
    return False


def _given(op: fx.Node | None, name: str) -> Any:
    return None if op is None else argument(op, name)


def _linear(module: Any, op: fx.Node | None) -> None:
    module.out_features, module.in_features = module.weight.shape


def _transposed_linear(module: Any) -> None:
    module.nx, module.nf = module.weight.shape


def _bilinear(module: Any, op: fx.Node | None) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _convolution(module: Any, op: fx.Node | None) -> None:
    groups = _given(op, "groups")
    module.groups = module.groups if groups is None else int(groups)
    first, second = module.weight.shape[:2]
    if module.transposed:
        module.in_channels, module.out_channels = first, second * module.groups
    else:
        module.out_channels, module.in_channels = first, second * module.groups


def _channel_norm(module: Any, op: fx.Node | None) -> None:
    for tensor in (module.running_mean, module.weight):
        if tensor is not None:
            module.num_features = len(tensor)
            return
    if (channels := _input_extent(op, 1)) is not None:
        module.num_features = channels


def _group_norm(module: Any, op: fx.Node | None) -> None:
    groups = _given(op, "num_groups")
    module.num_groups = module.num_groups if groups is None else int(groups)
    channels = len(module.weight) if module.weight is not None else _input_extent(op, 1)
    module.num_channels = module.num_channels if channels is None else channels


def _layer_norm(module: Any, op: fx.Node | None) -> None:
    shape = _given(op, "normalized_shape")
    if module.weight is not None:
        shape = module.weight.shape
    if shape is not None and all(isinstance(n, int) for n in shape):
        module.normalized_shape = tuple(shape)
    eps = _given(op, "eps")
    if eps is not None and isinstance(module, nn.RMSNorm):
        module.eps = float(eps)


def _embedding(module: Any, op: fx.Node | None) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _prelu(module: Any, op: fx.Node | None) -> None:
    module.num_parameters = module.weight.numel()


def _recurrent(module: Any, op: fx.Node | None) -> None:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    module.input_size = module.weight_ih_l0.shape[1]
    module.hidden_size = module.weight_ih_l0.shape[0] // gates
    if module.proj_size:
        module.proj_size = module.weight_hh_l0.shape[1]
    # It runs on a list of its own.
    module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def _recurrent_cell(module: Any, op: fx.Node | None) -> None:
    module.hidden_size = module.weight_hh.shape[1]
    module.input_size = module.weight_ih.shape[1]


def _attention(module: Any, op: fx.Node | None) -> None:
    """Embedding sizes; heads are `module_parts`' business."""
    module.embed_dim = module.out_proj.weight.shape[0]
    keys, values = module.embed_dim, module.embed_dim
    if module.in_proj_weight is None:
        keys, values = module.k_proj_weight.shape[1], module.v_proj_weight.shape[1]
    module.kdim, module.vdim = keys, values
    module.head_dim = module.embed_dim // module.num_heads


def _nothing(module: Any, op: fx.Node | None) -> None:
    pass


def _input_extent(op: fx.Node | None, axis: int) -> int | None:
    source = op.args[0] if op is not None and op.args else None
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not isinstance(value.shape[axis], int):
        return None
    return int(value.shape[axis])


_TABLE: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Callable[..., None]], ...] = (
    ((CompensatedLayerNorm, CompensatedGroupNorm, CompactAttention, Erased), _nothing),
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    (nn.modules.conv._ConvNd, _convolution),
    (nn.modules.batchnorm._NormBase, _channel_norm),
    (nn.GroupNorm, _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.PReLU, _prelu),
    (nn.RNNBase, _recurrent),
    (nn.modules.rnn.RNNCellBase, _recurrent_cell),
    (nn.MultiheadAttention, _attention),
)
