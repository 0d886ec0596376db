"""Run directories as one HTML page that needs nothing beside it: results, settings, curves, what estimators did."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from abste.errors import ConfigError, RunError
from abste.train.files import write_atomic
from abste.train.published import bits_of, estimator_text
from abste.train.recipe import Recipe
from abste.train.run import RunDirectory

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Record = dict[str, Any]

SIDES = ("weights", "activations")
MOST_BY_LAYER = 12
"""Runs that are drawn layer by layer; of more, totals alone."""
QUANTITIES = {
    "a": "blend a",
    "slope": "mean slope F'",
    "error": "estimating error, RMS",
    "variation_ratio": "squared variation of the gradient, in STE's",
    "variance_ratio": "variance of the gradient, in STE's",
    "beyond": "share beyond the clip",
    "flip_ratio": "share of weights that a step flips",
    "effective_lr": "effective learning rate",
}
"""Of diagnostics, in the order in which they are drawn."""
LOGARITHMIC = ("variation_ratio", "variance_ratio", "flip_ratio", "effective_lr")
COLOURS = ("#7b1e3a", "#2a7f9e", "#c08a1e", "#4a7c3a", "#6a4c93", "#d1495b", "#00798c", "#8d6a3f", "#3d5a80", "#777777")


@dataclass
class Run:
    """What a run directory says.

    Attributes:
        path: of the directory.
        recipe: as it was resolved.
        metrics: the lines of metrics.jsonl, in order.
        diagnostics: the lines of diagnostics.jsonl, where there are any.
        summary: of a finished run, else None.
        conversion: what was binarised, in words.
        label: how the page calls it: the part of its path that the runs do not share.
    """

    path: Path
    recipe: Recipe
    metrics: list[Record]
    diagnostics: list[Record]
    summary: Record | None
    conversion: str
    label: str = ""

    def of_kind(self, kind: str) -> list[Record]:
        """The lines of metrics.jsonl of one kind: train or evaluation."""
        return [record for record in self.metrics if record["kind"] == kind]

    @property
    def epoch(self) -> float:
        """How far it has come."""
        return float(self.metrics[-1]["epoch"]) if self.metrics else 0.0


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in some directories: a run directory is one, any other stands for all within it, such as a study's.

    Raises:
        RunError: a directory that is missing or holds no run, or a file of a run that cannot be read.
        ConfigError: a recipe that this version does not know.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise RunError(f"there is no directory {path}.")
        inside = [path] if _is_run(path) else sorted(file.parent for file in path.rglob("metrics.jsonl"))
        inside = [run for run in inside if _is_run(run)]
        if not inside:
            raise RunError(f"{path} holds no run: a run directory has a recipe.toml and a metrics.jsonl.")
        found += inside
    found = list({path.resolve(): path for path in found}.values())
    runs = [_read(path) for path in found]
    for run, label in zip(runs, _labels(found), strict=True):
        run.label = label
    return runs


def write_page(paths: Sequence[str | Path], out: str | Path) -> list[Run]:
    """Draw runs, finished or not, on one self-contained HTML page of about 5 MB.

    It has a table of the results, the settings in which the recipes differ, curves of accuracy, loss, learning rate
    and speed, what diagnostics recorded, in total and by layer, and each run's recipe, machine and conversion.

    Args:
        paths: run directories, or directories that hold some, such as that of a study.
        out: the HTML file to write; an older one is replaced when the new one is complete.

    Returns:
        The runs that are on the page.

    Raises:
        RunError: no runs where there should be some, or ``out`` cannot be written.
        ConfigError: ``out`` does not end in .html, or a recipe is unknown to this version.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"a report is a page: its name must end in .html, not {out.name!r}.")
    runs = find_runs(paths)
    write_atomic(out, render(runs).encode())
    return runs


def render(runs: Sequence[Run]) -> str:
    """The page of some runs, as HTML."""
    from plotly.offline import get_plotlyjs

    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    parts = [f"<h1>{html.escape(title)}</h1>", _results(runs), _caution(runs), _differences(runs)]
    parts += ["<h2>Learning</h2>", _embed(_curves(runs))]
    recorded = [run for run in runs if run.diagnostics]
    if recorded:
        parts += ["<h2>Estimators</h2>", _EXPLAINED, _embed(_totals(recorded))]
        if len(recorded) <= MOST_BY_LAYER:
            for run in recorded:
                parts += [f"<h3>By layer: {html.escape(run.label)}</h3>", _embed(_by_layer(run))]
        else:
            parts.append(f"<p>Layer by layer only up to {MOST_BY_LAYER} runs are drawn.</p>")
    parts += ["<h2>Runs</h2>", *map(_details, runs)]
    return _PAGE.format(title=html.escape(title), script=get_plotlyjs(), body="\n".join(parts))


# Reading


def _is_run(path: Path) -> bool:
    return (path / "recipe.toml").is_file() and (path / "metrics.jsonl").is_file()


def _read(path: Path) -> Run:
    run = RunDirectory(path)
    try:
        conversion = run.conversion.read_text(encoding="utf-8") if run.conversion.exists() else ""
    except (OSError, ValueError) as error:
        raise RunError(f"{run.conversion} cannot be read: {error}.") from error
    return Run(path, run.read_recipe(), run.read_metrics(), run.read_diagnostics(), run.read_summary(), conversion)


def _labels(paths: Sequence[Path]) -> list[str]:
    """The parts of the paths in which they differ; of a single one, its last."""
    parts = [list(path.resolve().parts) for path in paths]
    if len(parts) == 1:
        return [parts[0][-1]]
    for end in (0, -1):
        while len({part[end] for part in parts}) == 1 and min(map(len, parts)) > 1:
            for part in parts:
                del part[end]
    return ["/".join(part) for part in parts]


# Tables


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> str:
    """The first ``text`` columns are text, the others numbers."""

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = ["" if column < text else ' class="number"' for column in range(len(cells))]
        return "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f'<div class="wide"><table><tr>{row(head, "th")}</tr>{body}</table></div>'


def _results(runs: Sequence[Run]) -> str:
    columns: dict[str, Callable[[Run], str]] = {
        "run": lambda run: run.label,
        "network": lambda run: run.recipe.model.name,
        "bits": lambda run: bits_of(run.recipe),
        "weights": lambda run: _estimator(run, "weights"),
        "activations": lambda run: _estimator(run, "activations"),
        "epochs": _progress,
        "test, %": lambda run: _accuracy(run, "test"),
        "held out, %": lambda run: _accuracy(run, "held_out"),
        "test, averaged, %": lambda run: _averaged(run, "test"),
        "held out, averaged, %": lambda run: _averaged(run, "held_out"),
        "training, %": lambda run: _last(run, "accuracy", 100),
        "PFLOP": lambda run: _cost(run, "estimated_training_flops", 1e-15),
        "minutes": lambda run: _cost(run, "seconds", 1 / 60),
        "images/s": lambda run: _last(run, "samples_per_second", 1, ".0f"),
    }
    made = {name: [column(run) for run in runs] for name, column in columns.items()}
    kept = {name: cells for name, cells in made.items() if any(cells)}
    text = sum(name in kept for name in ("run", "network", "bits", "weights", "activations"))
    return _table(list(kept), list(zip(*kept.values(), strict=True)), text)


def _estimator(run: Run, side: str) -> str:
    chosen = getattr(run.recipe.binarize, side, None)
    return "" if chosen is None else estimator_text(chosen)


def _progress(run: Run) -> str:
    epochs = f"{run.recipe.train.epochs:g}"
    return epochs if run.summary else f"{run.epoch:.1f} of {epochs}"


def _accuracy(run: Run, split: str) -> str:
    """Of the last evaluation: of a run that goes on, what it has come to."""
    found = [record["accuracy"] for record in run.of_kind("evaluation") if record["split"] == split]
    if run.summary and split in run.summary:
        found.append(run.summary[split]["accuracy"])
    return f"{100 * found[-1]:.2f}" if found else ""


def _averaged(run: Run, split: str) -> str:
    """Of the averaged weights, by which studies judge a run that has them."""
    found = (run.summary or {}).get("averaged", {}).get(split)
    return f"{100 * found['accuracy']:.2f}" if found else ""


def _last(run: Run, key: str, factor: float, form: str = ".2f") -> str:
    """Of training."""
    records = run.of_kind("train")
    return f"{factor * records[-1][key]:{form}}" if records else ""


def _cost(run: Run, key: str, factor: float) -> str:
    value = (run.summary or {}).get("cost", {}).get(key)
    return "" if value is None else f"{factor * value:.3g}"


def _caution(runs: Sequence[Run]) -> str:
    """What the table does not support."""
    notes = []
    if any(run.summary is None for run in runs):
        notes.append("Unfinished runs show their last evaluation.")
    if len(runs) > 1:
        notes.append(
            "A difference between two runs may be that of their seeds: abste compare trains several and says what "
            "they support."
        )
    return "".join(f"<p>{note}</p>" for note in notes)


def _differences(runs: Sequence[Run]) -> str:
    """The keys of the recipes that are not the same in all."""
    if len(runs) == 1:
        return ""
    sections = [run.recipe.model_dump(exclude_none=True, exclude={"name", "description"}) for run in runs]
    flat = [dict(_flat(section)) for section in sections]
    rows = []
    for key in dict.fromkeys(key for one in flat for key in one):
        values = [one.get(key) for one in flat]
        # What runs without the section do not have either is said once, by its row.
        having = {value for value, one in zip(values, sections, strict=True) if key.split(".")[0] in one}
        if len(having if "." in key else set(values)) > 1:
            rows.append([key, *(value or "" for value in values)])
    if not rows:
        return "<h2>Settings</h2><p>All recipes are the same.</p>"
    return "<h2>Settings that differ</h2>" + _table(["key", *(run.label for run in runs)], rows, len(runs) + 1)


def _flat(recipe: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Sections and keys: ("train", "given"), ("train.epochs", "60")..."""
    for name, section in recipe.items():
        if not isinstance(section, dict):
            yield name, str(section)
            continue
        yield name, "given"
        for key, value in section.items():
            yield f"{name}.{key}", json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _details(run: Run) -> str:
    about = {"directory": str(run.path)}
    if run.summary:
        about |= {key: str(value) for key, value in run.summary["environment"].items()}
        about |= {f"git {key}": str(value) for key, value in (run.summary.get("git") or {}).items()}
        about |= {"parameters": f"{run.summary['cost']['parameters']:,}", "resumes": str(run.summary["resumes"])}
    blocks = [("recipe.toml", run.recipe.to_toml()), ("conversion", run.conversion)]
    inner = _table(["", ""], list(about.items()), 2)
    inner += "".join(f"<h4>{name}</h4><pre>{html.escape(text)}</pre>" for name, text in blocks if text)
    return f"<details><summary>{html.escape(run.label)}</summary>{inner}</details>"


# Figures


@dataclass
class _Panel:
    """One pair of axes: a title, and a curve (x, y) of each run by the kind of line."""

    title: str
    curves: list[tuple[Run, str, list[float], list[Any]]] = field(default_factory=list)
    log: bool = False


def _curves(runs: Sequence[Run]) -> Figure:
    accuracy = _Panel("accuracy, %: line training, dots evaluation")
    loss, rate, speed = _Panel("training loss"), _Panel("learning rate"), _Panel("images/s")
    for run in runs:
        training, evaluations = run.of_kind("train"), run.of_kind("evaluation")
        epochs = [record["epoch"] for record in training]
        accuracy.curves += [
            (run, "lines", epochs, [100 * record["accuracy"] for record in training]),
            (run, "markers", [e["epoch"] for e in evaluations], [100 * e["accuracy"] for e in evaluations]),
        ]
        for panel, key in ((loss, "loss"), (rate, "lr"), (speed, "samples_per_second")):
            panel.curves.append((run, "lines", epochs, [record[key] for record in training]))
    return _draw([accuracy, loss, rate, speed], "epoch", runs)


def _totals(runs: Sequence[Run]) -> Figure:
    panels = []
    for key, title in QUANTITIES.items():
        for side in SIDES:
            panel = _Panel(f"{title}: {side}", log=key in LOGARITHMIC)
            for run in runs:
                values = [_total(record, side, key) for record in run.diagnostics]
                if any(value is not None for value in values):
                    panel.curves.append((run, "lines", [record["step"] for record in run.diagnostics], values))
            if panel.curves:
                panels.append(panel)
    return _draw(panels, "step", runs)


def _total(record: Record, side: str, key: str) -> Any:
    """Over all layers; of the blend, which has no total, the mean."""
    if key != "a":
        return _value(record["total"].get(side), key)
    blends = [_value((layer or {}).get(side), key) for layer in record["layers"].values()]
    known = [blend for blend in blends if blend is not None]
    return fmean(known) if known else None


def _value(quantities: Record | None, key: str) -> Any:
    found = quantities or {}
    return (found.get("blend") or {}).get("a") if key == "a" else found.get(key)


def _draw(panels: Sequence[_Panel], x: str, runs: Sequence[Run]) -> Figure:
    from plotly.subplots import make_subplots

    rows = -(-len(panels) // 2)
    figure = make_subplots(rows, 2, subplot_titles=[panel.title for panel in panels], vertical_spacing=0.3 / rows)
    colours = {run.label: COLOURS[number % len(COLOURS)] for number, run in enumerate(runs)}
    named: set[str] = set()
    for number, panel in enumerate(panels):
        place = {"row": number // 2 + 1, "col": number % 2 + 1}
        for run, mode, xs, ys in panel.curves:
            figure.add_scatter(
                x=xs,
                y=ys,
                mode=mode,
                name=run.label,
                legendgroup=run.label,
                showlegend=run.label not in named,
                line={"color": colours[run.label], "width": 1.5},
                marker={"color": colours[run.label], "size": 7},
                **place,
            )
            named.add(run.label)
        figure.update_xaxes(title_text=x, **place)
        if panel.log:
            figure.update_yaxes(type="log", **place)
    return _styled(figure, 290 * rows + 130)


def _by_layer(run: Run) -> Figure:
    """A line for each layer, dark at the input; a menu chooses the quantity."""
    from plotly.colors import sample_colorscale
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=SIDES)
    layers = list(run.diagnostics[0]["layers"])
    shades = sample_colorscale("Viridis", [n / max(1, len(layers) - 1) * 0.9 for n in range(len(layers))])
    steps = [record["step"] for record in run.diagnostics]
    drawn: list[str] = []
    for key in QUANTITIES:
        for column, side in enumerate(SIDES, 1):
            for layer, shade in zip(layers, shades, strict=True):
                values = [_value((record["layers"].get(layer) or {}).get(side), key) for record in run.diagnostics]
                if any(value is not None for value in values):
                    figure.add_scatter(
                        x=steps,
                        y=values,
                        mode="lines",
                        name=layer,
                        legendgroup=layer,
                        line={"color": shade, "width": 1.2},
                        row=1,
                        col=column,
                    )
                    drawn.append(key)
    keys = list(dict.fromkeys(drawn))
    first = next(iter(keys), "")

    def shown(chosen: str) -> list[dict[str, Any]]:
        named: set[str] = set()
        visible, legend = [], []
        for trace, key in zip(figure.data, drawn, strict=True):
            visible.append(key == chosen)
            legend.append(key == chosen and trace.name not in named)
            named |= {trace.name} if key == chosen else set()
        return [{"visible": visible, "showlegend": legend}]

    for trace, visible, legend in zip(figure.data, *shown(first)[0].values(), strict=True):
        trace.update(visible=visible, showlegend=legend)
    buttons = [{"label": QUANTITIES[key], "method": "restyle", "args": shown(key)} for key in keys]
    figure.update_layout(updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.25}])
    figure.update_xaxes(title_text="step")
    return _styled(figure, 480)


def _styled(figure: Figure, height: int) -> Figure:
    figure.update_layout(
        template="simple_white",
        height=height,
        margin={"l": 50, "r": 20, "t": 50, "b": 110},
        font={"family": "system-ui, sans-serif", "size": 12},
        hovermode="x unified" if len(figure.data) <= 24 else "closest",
        paper_bgcolor="white",
        legend={"orientation": "h", "x": 0, "y": -60 / (height - 160), "yanchor": "top"},
    )
    figure.update_annotations(font_size=13)
    figure.update_xaxes(showgrid=True, gridcolor="#eee")
    figure.update_yaxes(showgrid=True, gridcolor="#eee")
    return figure


def _embed(figure: Figure) -> str:
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))


_EXPLAINED = (
    "<p>What diagnostics recorded, over all binary layers. The <i>estimating error</i> is the distance of the "
    "surrogate F to sign. How unstable gradients are is told beside those that STE, clipped at the same place, would "
    "make of the same upstream gradients: below 1 is steadier than STE.</p>"
)
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - abste</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; }}
body {{ max-width: 1200px; margin: 2em auto; padding: 0 1em; }}
h1, h2, h3, h4 {{ font-weight: 500; line-height: 1.2; }}
h2 {{ margin-top: 2em; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 14px; }}
th, td {{ padding: 0.3em 0.8em; border-bottom: 1px solid #e4e4e4; text-align: left; white-space: nowrap; }}
th {{ font-weight: 600; border-bottom-color: #999; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
details {{ border-bottom: 1px solid #e4e4e4; padding: 0.4em 0; }}
summary {{ cursor: pointer; }}
pre {{ background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 13px; }}
</style>
<script>{script}</script>
</head>
<body>
{body}
</body>
</html>
"""
