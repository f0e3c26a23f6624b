"""The model zoo of `bench_coverage`: networks of other people's packages, small, random weights."""
