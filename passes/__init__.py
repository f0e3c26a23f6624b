"""Passes and the manager that runs them.

What passes are made of is here at once; each pass itself is imported when it is first used.
"""

if __name__ != "torchlathe.passes":
    raise ImportError("import torchlathe.passes, not passes")

from importlib import import_module
from typing import TYPE_CHECKING

from torchlathe.passes.base import (
    AnalysisPass,
    DataAnalysis,
    Diagnostic,
    Exactness,
    Fact,
    Pass,
    PassContext,
    PassRecord,
    PassResult,
    RewritePass,
    TunePass,
)
from torchlathe.passes.instruments import (
    DumpIR,
    Instrument,
    PrintIR,
    Statistics,
    StopAfter,
    Timing,
)
from torchlathe.passes.manager import PassLike, PassManager
from torchlathe.passes.options import Option, options_of
from torchlathe.passes.registry import TABLE, all_passes, get_pass, load_plugin, pass_names
from torchlathe.passes.spec import parse_pipeline, pipeline_text

if TYPE_CHECKING:
    from torchlathe.passes.analysis.curvature import HessianSensitivity
    from torchlathe.passes.analysis.experts import ExpertLayers
    from torchlathe.passes.analysis.explain import Explanation, explain
    from torchlathe.passes.analysis.families import ZeroInvariantGroups
    from torchlathe.passes.analysis.segments import Segments
    from torchlathe.passes.analysis.sharing.coloring import SharingColoring
    from torchlathe.passes.rewrite.branches.erase_operators import EraseOperators
    from torchlathe.passes.rewrite.erasing.structured_erase import StructuredErase
    from torchlathe.passes.rewrite.experts.merge_experts import MergeExperts
    from torchlathe.passes.rewrite.experts.prune_experts import PruneExperts
    from torchlathe.passes.rewrite.factorising.low_rank import LowRankSplit
    from torchlathe.passes.rewrite.lowering.fuse_kernels import FuseKernels
    from torchlathe.passes.rewrite.quantising.quantize import Quantize
    from torchlathe.passes.rewrite.quantising.quantize_cache import QuantizeCache
    from torchlathe.passes.rewrite.reordering.reorder_linear import ReorderLinear
    from torchlathe.passes.rewrite.sharing.fit_layer_basis import FitLayerBasis
    from torchlathe.passes.rewrite.sharing.share_parameters import ShareParameters
    from torchlathe.passes.rewrite.sparsifying.permute_channels import PermuteChannels
    from torchlathe.passes.rewrite.sparsifying.sparsify_nm import SparsifyNM
    from torchlathe.passes.rewrite.tensor_networks.insert_adapters import InsertAdapters
    from torchlathe.passes.rewrite.tensor_networks.kronecker_split import KroneckerSplit
    from torchlathe.passes.rewrite.tensor_networks.quantize_cores import QuantizeCores
    from torchlathe.passes.rewrite.tensor_networks.tensor_train_split import TensorTrainSplit
    from torchlathe.passes.tune.adapting.lora import InsertLora, MergeLora
    from torchlathe.passes.tune.distill import Distill
    from torchlathe.passes.tune.heal import Heal
    from torchlathe.passes.tune.sparse_train import SparseTrain

__all__ = [
    "AnalysisPass",
    "DataAnalysis",
    "Diagnostic",
    "Distill",
    "DumpIR",
    "EraseOperators",
    "Exactness",
    "ExpertLayers",
    "Explanation",
    "Fact",
    "FitLayerBasis",
    "FuseKernels",
    "Heal",
    "HessianSensitivity",
    "InsertAdapters",
    "InsertLora",
    "Instrument",
    "KroneckerSplit",
    "LowRankSplit",
    "MergeExperts",
    "MergeLora",
    "Option",
    "Pass",
    "PassContext",
    "PassLike",
    "PassManager",
    "PassRecord",
    "PassResult",
    "PermuteChannels",
    "PrintIR",
    "PruneExperts",
    "Quantize",
    "QuantizeCache",
    "QuantizeCores",
    "ReorderLinear",
    "RewritePass",
    "Segments",
    "ShareParameters",
    "SharingColoring",
    "SparseTrain",
    "SparsifyNM",
    "Statistics",
    "StopAfter",
    "StructuredErase",
    "TensorTrainSplit",
    "Timing",
    "TunePass",
    "ZeroInvariantGroups",
    "all_passes",
    "explain",
    "get_pass",
    "load_plugin",
    "options_of",
    "parse_pipeline",
    "pass_names",
    "pipeline_text",
]

_HOME = {target.partition(":")[2]: target.partition(":")[0] for target in TABLE.values()}
_HOME |= dict.fromkeys(("Explanation", "explain"), "torchlathe.passes.analysis.explain")


def __getattr__(name: str) -> object:
    if name in _HOME:
        value: object = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'torchlathe.passes' has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
