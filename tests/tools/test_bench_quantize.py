"""The page of quantised models: what it says of peers is what the rows say."""

from __future__ import annotations

import json
from typing import Any

import torch

from torchlathe.tools.bench import bench_cache, bench_quantize, quantize_page
from torchlathe.tools.bench.minilm import without_padding
from torchlathe.tools.bench.quantize_peers import bits_with_scales


def _row(name: str, divergence: float, **more: Any) -> dict[str, Any]:
    return {
        "contestant": name,
        "bits": 4.5,
        "perplexity": 3.9,
        "divergence": divergence,
        **more,
    }


def test_the_page_says_where_a_peer_is_ahead() -> None:
    rows = [
        _row("w4a16, gptq", 0.002, swept=29, better_than_nearest=29),
        _row("w8a8", 0.004),
        _row("llm-compressor w4a16, gptq", 0.004, version="1"),
        _row("llm-compressor w8a8", 0.002, version="1"),
    ]
    result = {"characters": rows, "cpu": "C", "instructions": "I", "torch": "2"}
    text = quantize_page.measured(result)
    assert "| w4a16, gptq | llm-compressor w4a16, gptq | 2.00 | 4.00 | 0.50 |" in text
    assert "loses more (a ratio above 1.02) at: w8a8." in text
    assert "| w4a16, gptq | 4.50 | 3.900 | 2.00 | 29 of 29 |" in text


def test_what_is_said_of_peers_besides_numbers() -> None:
    plain = [_row("w8a8", 0.004), _row("llm-compressor w8a8", 0.002, version="1")]
    awq = [*plain, _row("llm-compressor w4a16, awq", 0.002, version="1")]
    for rows, missing in ((plain, True), (awq, False)):
        result = {"characters": rows, "cpu": "C", "instructions": "I", "torch": "2"}
        text = quantize_page.measured(result)
        assert ("There is no row of its AWQ and SmoothQuant" in text) == missing
        assert "Zero points are stored in 8 bits here and in 4 there" in text
        assert "Ratios up to 1.02 are within 2 %, which is not told apart." in text


def test_scales_count_for_peers_too() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(40, 8))
    assert bits_with_scales(model, 8, 0) == 8 + 32 * 16 / (64 * 8 + 40 * 8)
    assert bits_with_scales(model, 4, 32) == 4 + 16 * (2 * 8 + 2 * 8) / (64 * 8 + 40 * 8)


def test_rows_are_replaced_and_those_of_absent_peers_kept() -> None:
    rows = [_row("a", 1.0), _row("torchao b", 2.0)]
    bench_quantize._put(rows, _row("a", 3.0))
    assert [row["divergence"] for row in rows] == [3.0, 2.0]
    assert bench_quantize._whole(rows[0])
    assert not bench_quantize._whole({"contestant": "x", "perplexity": 4.0})
    rows += [_row("w4a16, gptq", 1.0), _row("llm-compressor w4a16, gptq", 1.0)]
    names = {"a", "torchao b", "w4a16, gptq", "llm-compressor w4a16, gptq"}
    assert bench_quantize._done(rows, []) == names
    assert bench_quantize._done(rows, ["gptq", "awq"]) == names - {"w4a16, gptq"}


def test_batches_without_padding_hold_every_sentence_once() -> None:
    def tokenizer(sentences: list[str]) -> dict[str, Any]:
        longest = max(len(sentence) for sentence in sentences)
        return {"input_ids": torch.zeros(len(sentences), longest), "of": sentences}

    sentences = ["aa", "b", "cc", "ddd", "e"]
    batches = without_padding(tokenizer, sentences)
    assert [batch["of"] for batch in batches] == [["b", "e"], ["aa", "cc"], ["ddd"]]


def test_the_page_is_what_the_results_say() -> None:
    page = quantize_page.PAGE.read_text(encoding="utf-8")
    assert page.endswith(quantize_page.measured(quantize_page.results()))


def test_the_largest_model_was_quantised_in_less_than_its_own_size_and_two_blocks() -> None:
    rows = quantize_page.results()["memory"]["rows"]
    largest = max(rows, key=lambda row: row["parameters"])
    assert largest["parameters"] > 1e9
    assert largest["peak_bytes"] < largest["model_bytes"] + 2 * largest["block_bytes"]


def test_the_page_of_caches_is_what_the_results_say() -> None:
    result = json.loads(bench_cache.RESULTS.read_text(encoding="utf-8"))
    page = bench_cache.PAGE.read_text(encoding="utf-8")
    assert page.endswith(bench_cache.measured(result))
