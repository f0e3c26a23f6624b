"""The parts of the benchmark of sparse training."""
