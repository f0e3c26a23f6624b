"""The parts of the benchmark of distillation."""
