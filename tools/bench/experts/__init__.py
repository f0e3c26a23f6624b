"""Models and page of the benchmark of merged experts."""
