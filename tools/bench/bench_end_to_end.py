"""End to end on this machine: original models on several runtimes, against torchlathe's pipelines.

All contestants of a case take the same inputs with the same threads, and are called in turn in each
round; times are CPU seconds of the process, since other programs run on the machine too. Fidelity
is the least cosine of a row of the output, on inputs that no pass has seen. Source:
own; int8 of ONNX Runtime is ``onnxruntime.quantization.quantize_dynamic``, that of torchao
``Int8DynamicActivationInt8WeightConfig`` under the inductor.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchlathe.ir.files import write_text

__all__ = ["CASES", "main", "measure"]

RESULTS = Path(__file__).resolve().parent / "results" / "end_to_end_cpu.json"

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A model of the benchmark.

    Attributes:
        name: In the table.
        make: Gives the model, example inputs, test inputs, and calibration batches.
        weights: "pretrained" or "random".
        pipelines: Passes of torchlathe, each with a backend.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Inputs, Inputs, list[Any]]]
    weights: str
    pipelines: tuple[tuple[str, str], ...]


def _minilm() -> tuple[nn.Module, Inputs, Inputs, list[Any]]:
    from torchlathe.tools.demo_minilm import load_encoder
    from torchlathe.tools.sentence_encoder import documentation_sentences

    model, tokens = load_encoder()
    sentences = documentation_sentences()
    batches = [_padded(tokens(sentences[i : i + 16])) for i in range(0, 64, 16)]
    return model, ((), batches[0]), ((), _padded(tokens(sentences[100:116]))), batches


def _padded(batch: dict[str, torch.Tensor], length: int = 48) -> dict[str, torch.Tensor]:
    """One length for all, since every runtime gets a static graph."""
    pad = torch.nn.functional.pad
    return {name: pad(value, (0, length - value.shape[1])) for name, value in batch.items()}


def _bert() -> tuple[nn.Module, Inputs, Inputs, list[Any]]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(), add_pooling_layer=False).eval()
    return model, *_text(30000, 4, 64)


def _text(vocabulary: int, batch: int, length: int) -> tuple[Inputs, Inputs, list[Any]]:
    def one() -> dict[str, torch.Tensor]:
        ids = torch.randint(1000, vocabulary, (batch, length))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return ((), one()), ((), one()), [one()]


def _vision(name: str) -> Callable[[], tuple[nn.Module, Inputs, Inputs, list[Any]]]:
    def make() -> tuple[nn.Module, Inputs, Inputs, list[Any]]:
        import torchvision

        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None).eval()
        images = [torch.randn(2, 3, 224, 224) for _ in range(3)]
        return model, ((images[0],), {}), ((images[1],), {}), [images[2]]

    return make


_ERASED = "structured-erase{sparsity=0.1,include=[*.intermediate.dense.weight:0]},quantize"
CASES = {
    case.name: case
    for case in (
        Case(
            "MiniLM-L6 (16 sentences)",
            _minilm,
            "pretrained",
            (
                ("quantize", "onnx"),
                ("quantize", "openvino"),
                ("quantize{scheme=w8a16}", "openvino"),
                (_ERASED, "onnx"),
                (_ERASED, "openvino"),
                ("quantize,fuse-kernels{runtime=inductor}", "inductor{freezing=true}"),
            ),
        ),
        Case(
            "BERT-base size (4 x 64)",
            _bert,
            "random",
            (
                ("quantize", "onnx"),
                ("quantize", "openvino"),
                ("quantize{scheme=w8a16}", "openvino"),
                ("quantize,fuse-kernels{runtime=inductor}", "inductor{freezing=true}"),
            ),
        ),
        Case(
            "ResNet-50 size (2 x 224)",
            _vision("resnet50"),
            "random",
            (("", "openvino"), ("", "inductor{freezing=true}"), ("quantize", "openvino")),
        ),
        Case(
            "ViT-B/16 size (2 x 224)",
            _vision("vit_b_16"),
            "random",
            (
                ("quantize", "onnx"),
                ("quantize", "openvino"),
                ("quantize{scheme=w8a16}", "openvino"),
            ),
        ),
    )
}


def measure(case: Case, threads: int, seconds: float, torchao: str | None) -> dict[str, Any]:
    """Measure one case.

    Args:
        case: The model.
        threads: Of every runtime.
        seconds: For the rounds.
        torchao: Folder with torchao; None leaves it out.
    """
    from torchlathe.tools.compat import define_torchvision_ops
    from torchlathe.tools.fidelity import compare_outputs
    from torchlathe.tools.model_bench.comparing import interleaved

    define_torchvision_ops()
    torch.set_num_threads(threads)
    model, example, test, calibration = case.make()
    rows: list[dict[str, Any]] = []
    runs: list[Callable[..., Any]] = []
    for name, make in _contestants(case, model, example, calibration, torchao):
        start = time.perf_counter()
        row: dict[str, Any] = {"name": name}
        try:
            run = make()
            found = compare_outputs(_first(model), _first(run), [test])
            row |= {"cosine": min(f.worst_cosine or 0.0 for f in found)}
            runs.append(run)
            row["run"] = len(runs) - 1
        except Exception as error:
            row["problem"] = f"{type(error).__name__}: {error}"[:300]
        row["seconds"] = time.perf_counter() - start
        rows.append(row)
        print(f"  {name}: {row.get('problem') or format(row['cosine'], '.5f')}", flush=True)
    args, kwargs = test
    samples = interleaved(runs, args, kwargs, seconds=seconds, rounds=40, clock=time.process_time)
    for row in rows:
        if (index := row.pop("run", None)) is not None:
            row["ms"] = samples[index]
    return {"weights": case.weights, "threads": threads, "rows": rows}


def _first(run: Callable[..., Any]) -> Callable[..., Any]:
    """The first tensor of what a model gives, which all runtimes have in one place."""
    from torch.utils import _pytree as pytree

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        leaves = pytree.tree_leaves(run(*args, **kwargs))
        first: torch.Tensor = next(x for x in leaves if isinstance(x, torch.Tensor))
        return first

    return call


def _contestants(
    case: Case, model: nn.Module, example: Inputs, calibration: list[Any], torchao: str | None
) -> list[tuple[str, Callable[[], Callable[..., Any]]]]:
    import torchlathe as tl
    from torchlathe.backends import CompiledModel

    args, kwargs = example
    program = tl.capture(model, args, kwargs)

    def plain(backend: str) -> Callable[[], Any]:
        return lambda: CompiledModel(program, backend, source=model)

    def ours(passes: str, backend: str) -> Callable[[], Any]:
        def make() -> Any:
            manager = tl.PassManager(passes, verify="off")
            after = manager.run(program.copy(), calibration=calibration)
            return CompiledModel(after, backend, source=model)

        return make

    found: list[tuple[str, Callable[[], Any]]] = [
        ("original, eager", lambda: model),
        ("original, inductor", plain("inductor")),
        ("original, onnxruntime fp32", plain("onnx")),
        ("original, onnxruntime dynamic int8", lambda: _onnxruntime_int8(program, model)),
        ("original, OpenVINO fp32", plain("openvino")),
    ]
    if torchao is not None:
        found.append(("torchao int8 + inductor", lambda: _torchao(model, torchao)))
    found += [
        (f"torchlathe {passes or 'no passes'} · {backend}", ours(passes, backend))
        for passes, backend in case.pipelines
        if (passes, backend) != ("", "openvino")
    ]
    return found


def _onnxruntime_int8(program: Any, model: nn.Module) -> Callable[..., Any]:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from torchlathe.backends import CompiledModel
    from torchlathe.tools.model_bench.contestants import contestant

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        CompiledModel(program, "onnx", source=model, check=False).export(path)
        quantised = path.with_name("int8.onnx")
        quantize_dynamic(path, quantised, weight_type=QuantType.QInt8, per_channel=True)
        one = contestant(str(quantised), (), {}, dynamic=False, seed=0)
    return one.run


def _torchao(model: nn.Module, folder: str) -> Callable[..., Any]:
    import copy

    if folder not in sys.path:
        sys.path.append(folder)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    own = copy.deepcopy(model)
    quantize_(own, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(own, options={"freezing": True})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; cases that are measured already are left alone."""
    parser = argparse.ArgumentParser(description="End to end on this machine")
    parser.add_argument("--case", action="append", help="part of a name; default: all")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--torchao", metavar="DIR", help="folder with torchao (pip install -t)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args(argv)
    from torchlathe.tools.bench.machine import machine

    result: dict[str, Any] = {"cases": {}}
    with contextlib.suppress(OSError):
        result = json.loads(parsed.out.read_text(encoding="utf-8"))
    for name, case in CASES.items():
        wanted = not parsed.case or any(part in name for part in parsed.case)
        if not wanted or (name in result["cases"] and not parsed.again):
            continue
        print(name, flush=True)
        found = measure(case, parsed.threads, parsed.seconds, parsed.torchao)
        result["cases"][name] = found
        result["machine"] = machine()
        write_text(parsed.out, json.dumps(result, indent=1) + "\n")
        break  # one case a call keeps a call short
    return 0


if __name__ == "__main__":
    sys.exit(main())
