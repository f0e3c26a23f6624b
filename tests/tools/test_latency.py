import time

import pytest
import torch

from torchlathe.tools.latency import Latency, compare_latency, quantile


def test_calls_are_interleaved_and_nothing_tracks_gradients() -> None:
    calls: list[str] = []
    weight = torch.ones(1, requires_grad=True)

    def made(name: str):
        def function(x, *, y):
            calls.append(name)
            assert not (weight * x).requires_grad
            time.sleep(0.002)

        return function

    latency = compare_latency(made("a"), made("b"), (torch.ones(2, 3),), {"y": 1}, rounds=5)
    assert calls == ["a", "b"] * 7  # a first call, one to find out how long it takes, five samples
    assert len(latency.original_ms) == len(latency.compiled_ms) == 5
    assert latency.inputs == ("float32[2, 3]",)
    assert (latency.device, latency.threads) == ("cpu", torch.get_num_threads())
    assert latency.original_median >= 2


def test_the_faster_one_is_faster() -> None:
    latency = compare_latency(
        lambda: time.sleep(0.006), lambda: time.sleep(0.002), rounds=10, budget_seconds=5
    )
    assert 1.5 < latency.speedup < 4
    assert 1.5 < latency.paired_speedup < 4


def test_the_budget_holds_and_one_round_is_always_taken() -> None:
    start = time.perf_counter()
    latency = compare_latency(
        lambda: time.sleep(0.05), lambda: time.sleep(0.05), rounds=1000, budget_seconds=0.3
    )
    assert time.perf_counter() - start < 1.5
    assert 2 <= len(latency.original_ms) <= 6
    slow = compare_latency(lambda: time.sleep(0.02), lambda: None, rounds=1000, budget_seconds=0.0)
    assert len(slow.original_ms) == 1


def test_quick_functions_are_called_often_for_one_sample() -> None:
    count = 0

    def function() -> None:
        nonlocal count
        count += 1

    latency = compare_latency(function, function, rounds=3)
    assert count > 2 * 3 * 10
    assert 0 < latency.original_median < 0.5


def test_drift_of_the_machine_does_not_reach_the_paired_ratio() -> None:
    first = tuple(float(10 * (i + 1)) for i in range(9))
    latency = Latency(first, tuple(x / 2 for x in first), 1, "cpu", ())
    assert latency.paired_speedup == 2.0
    assert latency.speedup == 2.0


def test_round_trip_and_summary() -> None:
    latency = Latency((1.0, 3.0, 2.0), (1.0, 1.0, 1.0), 4, "cpu", ("float32[2]",))
    data = latency.to_dict()
    assert Latency.from_dict(data) == latency
    assert data["summary"]["original_ms"] == {"p20": 1.4, "p50": 2.0, "p80": 2.6}
    assert data["summary"]["speedup"] == 2.0


def test_quantile() -> None:
    assert quantile([3.0], 0.8) == 3.0
    assert quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert quantile([1.0, 2.0], 1.0) == 2.0


def test_rounds_must_be_some() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        compare_latency(lambda: None, lambda: None, rounds=0)


def test_a_model_that_grows_its_cache_is_timed_on_what_was_given() -> None:
    cache, lengths = [torch.ones(2)], []

    def model(held: list[torch.Tensor]) -> None:
        held.append(held[0])
        lengths.append(len(held))

    compare_latency(model, model, (cache,), rounds=3, budget_seconds=0.0)
    assert set(lengths) == {2}
    assert len(cache) == 1
