"""What `torchlathe.tools.bench.bench_end_to_end` measures: cases, and contestants."""
