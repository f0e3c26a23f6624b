"""The parts of `bench_quality`: nets, contestants, and the page with its plots."""
