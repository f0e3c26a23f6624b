"""``python -m torchlathe.tools.serving``: serve MiniLM, original or compiled, or load-test both."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Serve a model until interrupted, or compare the original and the compiled one under load."""
    parser = argparse.ArgumentParser(prog="python -m torchlathe.tools.serving")
    parser.add_argument("--passes", default="quantize", help="pipeline; empty for none")
    parser.add_argument("--backend", default="onnx", help="of the compiled model (default onnx)")
    parser.add_argument("--original", action="store_true", help="serve the model as it was")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--load-test", action="store_true", help="compare both on loopback")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load test")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("-o", "--output", help="write the results of the load test as JSON")
    parsed = parser.parse_args(argv)
    needed = ("fastapi", "prometheus_client", "uvicorn", *(["httpx"] * parsed.load_test))
    if missing := [name for name in needed if find_spec(name) is None]:
        parser.error(f"{', '.join(missing)} is not installed: pip install 'torchlathe[serve]'")
    if parsed.load_test:
        from torchlathe.tools.serving.loading import compare

        compare(parsed)
        return 0
    import uvicorn

    from torchlathe.backends import get_backend
    from torchlathe.ir import Error
    from torchlathe.passes import PassManager

    try:
        PassManager(parsed.passes)  # a name that is not known is refused before anything is loaded
        get_backend(parsed.backend)
        app = application(parsed)
    except Error as error:
        sys.stderr.write(f"{error}\n")
        return 2
    uvicorn.run(app, host="127.0.0.1", port=parsed.port, log_level="warning")
    return 0


def application(parsed: argparse.Namespace) -> Any:
    """The application for these arguments."""
    import torch

    import torchlathe as tl
    from torchlathe.tools.demo_minilm import load_encoder
    from torchlathe.tools.sentence_encoder import documentation_sentences
    from torchlathe.tools.serving.app import encode_with, make_app

    torch.set_num_threads(parsed.threads)
    model, tokens = load_encoder()
    name = "original"
    if not parsed.original:
        example = tokens(documentation_sentences()[:8])
        sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=256)}
        model = tl.compile(
            model,
            parsed.passes,
            example_kwargs=example,
            dynamic_shapes={key: sizes for key in example},
            backend=parsed.backend,
            measure_latency=False,
        )
        name = f"{parsed.passes or 'no passes'} · {parsed.backend}"
    return make_app(encode_with(model, tokens), name=name)


if __name__ == "__main__":
    sys.exit(main())
