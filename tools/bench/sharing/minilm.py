"""MiniLM with its curvature, and what embeddings of sentences make of a colouring."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchlathe.ir import Program, capture
from torchlathe.passes import PassContext, SharingColoring
from torchlathe.passes.analysis.sharing.alignment import Gauge
from torchlathe.passes.analysis.sharing.bases import BasisLayer
from torchlathe.passes.analysis.sharing.budgets import Solution
from torchlathe.passes.analysis.sharing.candidates import (
    LayerType,
    find_candidates,
    fused_types,
    layer_types,
)
from torchlathe.passes.analysis.sharing.coloring import (
    ColoredType,
    Coloring,
    SharedClass,
    class_costs,
    form_of,
)
from torchlathe.passes.analysis.sharing.costs import ClassCosts, Offers, WeighedLayer
from torchlathe.passes.analysis.sharing.weighing import weigh_layers
from torchlathe.passes.rewrite.sharing.applying import apply_coloring
from torchlathe.tools.demo_minilm import load_encoder
from torchlathe.tools.sentence_encoder import documentation_sentences

__all__ = ["Encoder"]

_BATCH = 16
_CHOSEN_ON = 96  # sentences that the shrinkage of the curvature was chosen on; not used here
_OPTIONS = SharingColoring(mode="basis")


class Encoder:
    """MiniLM, its calibration and test sentences, and the costs of classes of its layers.

    Args:
        calibration: How many sentences to calibrate with.
        test: How many others to test on.
        cache: Folder for moments and costs, so that a run can go on where another stopped.
    """

    def __init__(self, calibration: int, test: int, cache: Path) -> None:
        model, self.tokenize = load_encoder()
        sentences = documentation_sentences()
        random.Random(0).shuffle(sentences)
        self.calibration = sentences[:calibration]
        start = calibration + _CHOSEN_ON
        self.test = sentences[start : start + test]
        assert not set(self.calibration) & set(self.test)
        example = self.tokenize(self.calibration[:4])
        shape = {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("sequence", max=512)}
        self.program: Program = capture(
            model, (), example, dynamic_shapes={"input_ids": shape, "attention_mask": shape}
        )
        self.cache = cache / f"{calibration}"
        self.cache.mkdir(parents=True, exist_ok=True)
        self.types = layer_types(find_candidates(self.program))
        self.fused = fused_types(self.types)
        self.size = sum(layer.size for part in self.types for layer in part.layers)
        self._weighed: dict[str, dict[str, WeighedLayer]] = {}
        self._costs: dict[tuple[str, str], ClassCosts] = {}
        self.reference = self.embed(self.program)

    def batches(self, sentences: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Tokens of the sentences."""
        for start in range(0, len(sentences), _BATCH):
            yield dict(self.tokenize(sentences[start : start + _BATCH]))

    def embed(self, program: Program) -> Tensor:
        """Unit vectors of the test sentences, (sentences, width)."""
        tensors = [program.tensor(name) for name in program.tensor_nodes]
        found = []
        with torch.inference_mode():
            for batch in self.batches(self.test):
                flat = program.flatten_inputs((), batch)
                found.append(program.graph_module(*tensors, *flat)[0])
        return torch.cat(found)

    def weighed(self, curvature: str) -> Mapping[str, WeighedLayer]:
        """Weights with their curvature: "inputs" or "outputs"."""
        if curvature not in self._weighed:
            path = self.cache / "moments.pt"
            if not path.exists():
                layers = [layer for part in self.types for layer in part.layers]
                ctx = PassContext(self.program, "bench", list(self.batches(self.calibration)))
                found = weigh_layers(self.program, ctx, layers, "outputs")
                bases = {name: layer.basis for name, layer in found.items()}
                torch.save(
                    {n: (b.weight, b.inputs, b.outputs) for n, b in bases.items() if b}, path
                )
            self._weighed[curvature] = {
                name: _weighed(curvature, *parts) for name, parts in torch.load(path).items()
            }
        return self._weighed[curvature]

    def costs(self, part: LayerType, curvature: str) -> ClassCosts:
        """Offers of all classes of a type, kept on disk for the curvature of the outputs."""
        key = (part.name, curvature)
        if key not in self._costs:
            costs = class_costs(_OPTIONS, part, self.weighed(curvature))
            path = self.cache / f"{curvature}_{abs(hash_text(part.name))}.pt"
            if path.exists():
                for mask, offers in torch.load(path).items():
                    costs._found[_members(mask)] = Offers(*offers)
            elif curvature == "outputs":
                count = len(part)
                for mask in range(1, 1 << count):
                    costs.offers(_members(mask))
                torch.save(
                    {
                        sum(1 << i for i in members): (o.parameters, o.costs, o.ranks)
                        for members, o in costs._found.items()
                    },
                    path,
                )
            self._costs[key] = costs
        return self._costs[key]

    def coloring(self, types: Sequence[LayerType], solution: Solution, curvature: str) -> Coloring:
        """A solution as what can be written into the program."""
        found = []
        for part, one in zip(types, solution.types, strict=True):
            costs = self.costs(part, curvature)
            classes = []
            for members, pick in zip(one.classes, one.picks, strict=True):
                offers = costs.offers(members)
                names = tuple(layer.name for i in sorted(members) for layer in part.members[i])
                classes.append(
                    SharedClass(
                        names,
                        int(offers.ranks[pick]),
                        int(offers.parameters[pick]),
                        float(offers.costs[pick]),
                    )
                )
            layers = tuple(layer.name for layer in part.layers)
            found.append(ColoredType(part.name, layers, tuple(classes), None, None))
        weighed = self.weighed(curvature)
        return Coloring("basis", tuple(found), Gauge({}, {}), weighed, self.size, solution.gap)

    def fidelity(self, coloring: Coloring, rounds: int) -> dict[str, Any]:
        """Cosines of the test embeddings with those of the original, and the size."""
        program = self.program.copy()
        before = sum(t.numel() for t in program.parameters.values())
        apply_coloring(program, coloring, rounds=rounds)
        after = sum(t.numel() for t in program.parameters.values())
        cosines = (self.embed(program) * self.reference).sum(1).double()
        return {
            "cosine": float(cosines.mean()),
            "cosine_5_percent": float(cosines.quantile(0.05)),
            "saved_of_layers": (before - after) / self.size,
        }


def hash_text(text: str) -> int:
    """The same number in every process."""
    import zlib

    return zlib.crc32(text.encode())


def _members(mask: int) -> frozenset[int]:
    return frozenset(i for i in range(mask.bit_length()) if mask >> i & 1)


def _weighed(curvature: str, weight: Tensor, inputs: Tensor, outputs: Tensor) -> WeighedLayer:
    if curvature == "inputs":
        scale = 2 / float((weight @ inputs * weight).sum())
        basis = BasisLayer(weight, inputs * scale)
    else:
        basis = BasisLayer(weight, inputs, outputs)
    return WeighedLayer(weight, form_of(basis), basis)
