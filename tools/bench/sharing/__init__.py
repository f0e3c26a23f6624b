"""Parts of the benchmark of sharing parameters."""
