"""The page that draws runs."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from abste.errors import ConfigError, RunError
from abste.report import find_runs, write_page
from abste.report.page import QUANTITIES
from abste.train import fit, load_recipe

TINY = ["train.threads=1", "train.epochs=2", "model.kwargs.width=4", "train.log_every=5", "model.name=resnet8_bireal"]


class Page(HTMLParser):
    """Its tables, as lists of rows, its text, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.fetched: list[str] = []
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.fetched += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if self._tag not in ("script", "style"):
            self.text += data


def figures(text: str) -> list[tuple[list[Any], Any]]:
    """(traces, layout) of each."""
    found, decoder = [], json.JSONDecoder()
    for match in re.finditer(r'Plotly\.newPlot\(\s*"[\w-]+",\s*', text):
        traces, end = decoder.raw_decode(text, match.end())
        layout, _ = decoder.raw_decode(text, re.compile(r",\s*").match(text, end).end())  # type: ignore[union-attr]
        found.append((traces, layout))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with diagnostics, and one that stopped."""
    root = tmp_path_factory.mktemp("runs")
    blend = '{name = "ab_tanh", blend = "learned"}'
    for name, estimator in (("ste", "ste"), ("blend", blend)):
        overrides = [f"binarize.weights={estimator}", f"binarize.activations={estimator}", "diagnostics.every=10"]
        fit(load_recipe("digits-resnet8-w1a32", [*TINY, *overrides]), None, root / name / "seed-0", progress=False)
    recipe = load_recipe("digits-resnet8-w1a32", [*TINY, "binarize.weights=ste", "train.seed=1"])
    fit(recipe, None, root / "ste" / "seed-1", progress=False, max_steps=30)
    return root


def test_a_page(runs: Path, tmp_path: Path) -> None:
    written = write_page([runs], tmp_path / "page.html")
    assert [run.label for run in written] == ["blend/seed-0", "ste/seed-0", "ste/seed-1"]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == []

    head, *rows = page.tables[0]
    table = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    summary = json.loads((runs / "ste" / "seed-0" / "summary.json").read_text())
    assert table["ste/seed-0"]["test, %"] == f"{100 * summary['test']['accuracy']:.2f}"
    assert table["ste/seed-0"]["bits"] == "W1A1"
    assert table["blend/seed-0"]["weights"] == "ab_tanh(blend=learned)"
    assert table["ste/seed-1"]["epochs"] == f"{30 / 22:.1f} of 2"
    assert table["ste/seed-1"]["minutes"] == "" != table["ste/seed-0"]["minutes"]

    differing = {row[0]: row[1:] for row in page.tables[1][1:]}
    assert differing["train.seed"] == ["0", "0", "1"]
    assert differing["binarize.activations"] == ['{"name": "ab_tanh", "blend": "learned"}', "ste", ""]
    assert differing["diagnostics"] == ["given", "given", ""]
    assert "train.epochs" not in differing
    assert "diagnostics.every" not in differing

    drawn = figures(text)
    assert len(drawn) == 4  # learning, totals, and two runs by layer
    lines = [json.loads(line) for line in (runs / "ste" / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert any(trace["name"] == "ste/seed-0" and trace["y"] == losses for trace in drawn[0][0])
    titles = {annotation["text"] for annotation in drawn[1][1]["annotations"]}
    assert {"blend a: weights", "estimating error, RMS: activations"} <= titles
    record = json.loads((runs / "blend" / "seed-0" / "diagnostics.jsonl").read_text().splitlines()[-1])
    mean = fmean(layer["activations"]["blend"]["a"] for layer in record["layers"].values())
    assert any(trace["y"][-1] == pytest.approx(mean) for trace in drawn[1][0])


def test_a_run_that_averages_shows_what_studies_judge(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "ste" / "seed-0", tmp_path / "average")
    summary = json.loads((run / "summary.json").read_text())
    summary["averaged"] = {"test": {**summary["test"], "accuracy": 0.875}}
    (run / "summary.json").write_text(json.dumps(summary))
    write_page([run, runs / "blend"], tmp_path / "page.html")
    head, *rows = Page((tmp_path / "page.html").read_text(encoding="utf-8")).tables[0]
    column = head.index("test, averaged, %")
    assert sorted(row[column] for row in rows) == ["", "87.50"]
    assert head[column - 1] == "test, %" and "held out, averaged, %" not in head


def test_the_menu_shows_one_quantity_at_a_time(runs: Path, tmp_path: Path) -> None:
    write_page([runs / "blend" / "seed-0"], tmp_path / "page.html")
    traces, layout = figures((tmp_path / "page.html").read_text(encoding="utf-8"))[-1]
    records = [json.loads(x) for x in (runs / "blend" / "seed-0" / "diagnostics.jsonl").read_text().splitlines()]
    layers = list(records[0]["layers"])
    buttons = layout["updatemenus"][0]["buttons"]
    assert {button["label"] for button in buttons} == set(QUANTITIES.values())
    seen = [False] * len(traces)
    for button in buttons:
        (change,) = button["args"]
        shown = [trace for trace, visible in zip(traces, change["visible"], strict=True) if visible]
        assert [trace["name"] for trace in shown][: len(layers)] == layers
        assert sum(change["showlegend"]) == len(layers)
        assert not any(a and b for a, b in zip(seen, change["visible"], strict=True))
        seen = [a or b for a, b in zip(seen, change["visible"], strict=True)]
    assert all(seen)
    assert [trace["visible"] for trace in traces] == buttons[0]["args"][0]["visible"]
    first = [record["layers"][layers[0]]["weights"]["blend"]["a"] for record in records]
    assert traces[0]["y"] == first


def test_a_line_that_is_being_written(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "ste" / "seed-1", run)
    before = find_runs([run])[0].metrics
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "train", "st')
    assert find_runs([run])[0].metrics == before
    assert len(find_runs([run, tmp_path, run / ".." / "run"])) == 1


def test_text_is_text(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "<b>&run"
    shutil.copytree(runs / "ste" / "seed-0", run)
    write_page([run], tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.tables[0][1][0] == "<b>&run"


def test_what_is_no_run(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "nowhere", "there is no directory"), (tmp_path / "empty", "holds no run")):
        with pytest.raises(RunError, match=message):
            write_page([runs, path], tmp_path / "page.html")
    with pytest.raises(ConfigError, match=r"its name must end in \.html"):
        write_page([runs], tmp_path / "page.txt")
    assert not list(tmp_path.glob("page.*"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("summary.json", "{", r"summary\.json is damaged: Expecting"),
        ("summary.json", "[]", r"summary\.json is damaged: \[\] is of the wrong type"),
        ("metrics.jsonl", "[1]\n", r"line 1 of .*metrics\.jsonl is damaged: \[1\] is of the wrong type"),
        ("metrics.jsonl", '\n{"kind": "test"}\n', r"line 2 of .*metrics\.jsonl is damaged: .* is of the wrong type"),
        ("metrics.jsonl", '{"kind": "train", "epoch": "1"}\n', r'metrics\.jsonl is damaged: train: epoch: "1" is of'),
        ("metrics.jsonl", '{"kind": "train", "epoch": 1}\n', r"metrics\.jsonl is damaged: train: accuracy: it is miss"),
        ("metrics.jsonl", "{}{}\n{}\n", r"line 1 of .*metrics\.jsonl is damaged: Extra data"),
        (
            "diagnostics.jsonl",
            '{"step": 1, "total": {}}\n',
            r"line 1 of .*diagnostics\.jsonl is damaged: layers: it is",
        ),
        ("diagnostics.jsonl", '{"step": 1, "total": 1, "layers": {}}\n', r"diagnostics\.jsonl is damaged: total: 1 is"),
    ],
)
def test_a_damaged_run(file: str, content: str, message: str, runs: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(runs / "ste" / "seed-0", broken)
    (broken / file).write_text(content)
    with pytest.raises(RunError, match=message) as raised:
        write_page([broken], tmp_path / "page.html")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("page.*"))
