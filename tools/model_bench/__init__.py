"""Comparing models and artefacts: latency, throughput, peak memory, size and fidelity."""

from torchlathe.tools.model_bench.comparing import bench_models
from torchlathe.tools.model_bench.rows import ModelBench, ModelRow

__all__ = ["ModelBench", "ModelRow", "bench_models"]
