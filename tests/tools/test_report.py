import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.tools.sample_report import sample_report
from torchlathe.ir import ArtifactError
from torchlathe.tools import plots
from torchlathe.tools.report import Report, Totals
from torchlathe.tools.report_text import short_place

EMPTY = Report("Net", "", Totals(0, 0), Totals(0, 0))


@pytest.mark.parametrize("report", [sample_report(), EMPTY], ids=["full", "empty"])
def test_json_round_trip(report: Report, tmp_path: Path) -> None:
    assert Report.from_dict(json.loads(report.to_json())) == report
    report.save(tmp_path / "r.json")
    assert Report.load(tmp_path / "r.json") == report


def test_unknown_fields_are_left_out_and_known_ones_needed() -> None:
    data = sample_report().to_dict()
    data["later"] = 1
    data["before"]["later"] = 1
    assert Report.from_dict(data) == sample_report()
    del data["before"]
    with pytest.raises(ArtifactError, match="cannot be read: 'before'"):
        Report.from_dict(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "is not a report"), ("{}", "format None, expected 1")],
)
def test_what_is_not_a_report(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        Report.load(tmp_path / "r.json")


def test_text_tells_what_matters() -> None:
    text = str(sample_report())
    for part in (
        "Net<br> · structured-erase{sparsity=0.3},tidy · eager",
        "22.7 M      19.8 M       −12.8 %",
        "1.36 GFLOP  1.01 GFLOP       −25.7 %",
        "1.34× faster",
        "exact, error 3.2e-16",
        "(changed nothing)",
        "warning: a <warning> [encoder at nets/modeling.py:12 (forward)]",
        "95.0 %",
        "approximate (sigmoid(0))",
        "exact after correction (means still count)",
        "... and 10 smaller, 1 that cannot shrink",
        "it is an output",
        "and 2 more",
        "Dropped, never read by forward: pooler.weight",
        "Note: the weights are random",
        "median of 3 interleaved runs on cpu with 2 threads",
        "capture 3.10 s",
    ):
        assert part in text, part
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "\x1b" not in text


def test_text_of_an_empty_report() -> None:
    text = EMPTY.text()
    assert text.startswith("Net · no passes · eager\n")
    for absent in ("Passes", "Families", "Pinned", "latency", "FLOPs", "Outputs"):
        assert absent not in text


def test_brackets_in_names_are_not_markup() -> None:
    report = sample_report()
    strange = replace(
        report,
        model="[red]Net[/red]",
        families=(replace(report.families[0], name="[bold]x[/]"),),
        passes=({"spec": "p{names=[a,b]}", "seconds": 0.1},),
    )
    for part in ("[red]Net[/red]", "[bold]x[/]", "p{names=[a,b]}"):
        assert part in strange.text()
        assert part in strange.to_html()


def test_short_place() -> None:
    assert short_place("a.b at /x/y/z/w.py:3 (f)") == "a.b at z/w.py:3 (f)"
    assert short_place("z/w.py:3") == "z/w.py:3"
    assert short_place("/w.py:3") == "/w.py:3"
    assert short_place(None) == ""


# -- the page ----------------------------------------------------------------------------------


class Checker(HTMLParser):
    VOID = frozenset({"meta", "br", "link", "img", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"src", "href", "xlink:href"}:
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("report", [sample_report(), EMPTY], ids=["full", "empty"])
def test_page_is_well_formed_and_self_contained(report: Report, tmp_path: Path) -> None:
    text = report.to_html(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == text
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert all(link.startswith("#") and link[1:] in checker.ids for link in checker.links)
    assert "<script" not in text
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


def test_page_escapes_and_shows_everything() -> None:
    text = sample_report().to_html()
    assert "<title>Net&lt;br&gt; · torchlathe report</title>" in text
    assert "a &lt;warning&gt;" in text
    assert text.count("<svg") == 4
    for part in ("layer.19.up.weight:0", "pooler.weight", "1.34× faster", "gone", "7 more"):
        assert part in text, part


def test_page_is_the_same_each_time() -> None:
    assert sample_report().to_html() == sample_report().to_html()


def test_plots_are_xml_with_the_colours_of_the_page() -> None:
    report = sample_report()
    assert report.latency is not None
    drawings = [
        plots.sizes_plot(report),
        plots.latency_plot(report.latency),
        plots.layers_plot(report.parameters),
        plots.fidelity_plot(report.fidelity),
    ]
    for text in drawings:
        ElementTree.fromstring(text)
        assert "var(--" in text
        # No colour is left that would not follow the page.
        assert not set(re.findall(r"#[0-9a-f]{6}\b", text))


def test_plots_of_nothing_are_empty() -> None:
    assert plots.sizes_plot(EMPTY) == ""
    assert plots.layers_plot([]) == ""
    assert plots.fidelity_plot([]) == ""


def test_layers_add_up_what_belongs_together() -> None:
    text = plots.layers_plot(sample_report().parameters)
    assert "layer.1.up" in text
    assert "93.8 %" in text
    assert "0.0 %" in text
    assert "layer.1.up.bias" not in text
