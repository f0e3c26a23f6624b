"""Parts of the benchmark of low-rank splits."""
