"""A training run on one page: report.html, which needs no network. Used by launch/plot.py."""

import html
import json
import math

try:
    import plotly.graph_objects as go
    from plotly.offline import get_plotlyjs
except ImportError:
    go = None

STYLE = """
:root { color-scheme: light; --ink: #1c2430; --faint: #667085; --line: #e4e7ec; --blue: #2563eb; --warn: #b42318; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 24px; margin: 0; } p.about { color: var(--faint); margin: 2px 0 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-bottom: 16px; }
.card, .chart, details { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 12px 14px; } .card b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.card span { color: var(--faint); font-size: 13px; } .card.warn b { color: var(--warn); }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
@media (max-width: 900px) { .charts { grid-template-columns: minmax(0, 1fr); } }
.chart { padding: 12px 8px 4px; min-width: 0; } .chart.wide { grid-column: 1 / -1; }
.chart h2 { font-size: 15px; margin: 0 8px; } .chart p { color: var(--faint); font-size: 13px; margin: 0 8px; }
details { margin-top: 16px; padding: 10px 14px; } summary { cursor: pointer; }
table { border-collapse: collapse; margin-top: 8px; } td { padding: 1px 18px 1px 0; font-variant-numeric: tabular-nums; }
td:first-child { color: var(--faint); }
"""
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style><script>{script}</script></head>
<body><main><h1>{title}</h1><p class="about">{about}</p>
<div class="cards">{cards}</div><div class="charts">{charts}</div>{options}</main></body></html>
"""


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def points(records, *path):
    """(steps, values) where `path` leads to a finite number."""
    steps, values = [], []
    for record in records:
        value = record
        for name in path:
            inside = isinstance(value, dict) and name in value
            inside = inside or (isinstance(value, list) and isinstance(name, int) and name < len(value))
            value = value[name] if inside else None
        if is_number(value):
            steps.append(record["step"])
            values.append(value)
    return steps, values


def line(figure, records, path, name, colour=None, factor=1.0, mode="lines", **more):
    steps, values = points(records, *path)
    if steps:
        values = [value * factor for value in values]
        style = {"color": colour or COLOURS[len(figure.data) % len(COLOURS)], "width": 1.8}
        figure.add_trace(go.Scatter(x=steps, y=values, name=name, mode=mode, line=style, **more))
    return bool(steps)


def finished(figure, y, log=False, height=330, **layout):
    if not figure.data:
        return None
    figure.update_layout(
        template="plotly_white", height=height, margin={"l": 64, "r": 20, "t": 10, "b": 10}, hovermode="x unified",
        legend={"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0}, showlegend=len(figure.data) > 1, font={"size": 12}, **layout,
    )  # fmt: skip
    figure.update_xaxes(title="step")
    figure.update_yaxes(title=y, type="log" if log else "linear", **({"exponentformat": "power", "dtick": 1} if log else {}))
    return figure


def flops_unit(records):
    """Its name, and what a TFLOP/s is of it."""
    return ("GFLOP/s", 1e3) if max(points(records, "model_tflops")[1], default=1) < 1 else ("TFLOP/s", 1.0)


def loss_chart(records, unit):
    """`unit`: name, and what a nat a token is of it."""
    name, factor = unit
    figure = go.Figure()
    line(figure, records, ["loss"], "training", factor=factor)
    line(figure, records, ["validation_loss"], "held out", COLOURS[1], factor, "lines+markers")
    by_step = dict(zip(*points(records, "loss")))
    spikes = {record["step"]: record["spikes"] for record in records if record.get("spikes")}
    spikes = {step: steps for step, steps in spikes.items() if step in by_step}
    if spikes:
        figure.add_trace(
            go.Scatter(
                x=list(spikes), y=[by_step[step] * factor for step in spikes], mode="markers", name="leaps before",
                text=[f"step {', '.join(map(str, steps))}" for steps in spikes.values()],
                marker={"color": COLOURS[3], "symbol": "triangle-up", "size": 11},
            )
        )  # fmt: skip
    return finished(figure, name)


def norms_chart(records):
    figure = go.Figure()
    parts = sorted({part for record in records for part in (record.get("gradient_norms") or {})})
    for part in parts:
        line(figure, records, ["gradient_norms", part], part)
    line(figure, records, ["gradient_norm"], "whole", "#111827")
    return finished(figure, "L2 norm", log=True)


def speed_chart(records):
    figure = go.Figure()
    line(figure, records, ["tokens_per_second"], "tokens/s")
    return finished(figure, "tokens/s", yaxis_rangemode="tozero")


def flops_chart(records):
    figure = go.Figure()
    name, factor = flops_unit(records)
    line(figure, records, ["model_tflops"], f"model {name}", COLOURS[2], factor)
    return finished(figure, f"{name} of a rank", yaxis_rangemode="tozero")


def time_chart(records):
    figure = go.Figure()
    line(figure, records, ["step_seconds"], "step")
    line(figure, records, ["data_seconds"], "of it, until the batch is there")
    line(figure, records, ["exposed_communication_seconds"], "of it, communication alone")
    return finished(figure, "seconds", log=True)


def imbalance_chart(records):
    figure = go.Figure()
    layers = max((len(record.get("imbalance_per_layer") or []) for record in records), default=0)
    for layer in range(layers):
        shade = round(200 * layer / max(1, layers - 1))
        colour = f"rgb({30 + shade // 2}, {64 + shade // 2}, {235 - shade // 3})"
        line(figure, records, ["imbalance_per_layer", layer], f"layer {layer}", colour, opacity=0.55)
    line(figure, records, ["imbalance"], "mean", "#111827")
    return finished(figure, "fullest expert over the mean", height=360)


def load_chart(load, steps):
    """`load`: [layers][experts] over the mean."""
    if not load:
        return None
    most = max(2.0, max(map(max, load)))
    scale = [[0, "#1d4ed8"], [0.5 / most, "#93c5fd"], [1 / most, "#ffffff"], [1, "#b91c1c"]]
    figure = go.Figure(
        go.Heatmap(
            z=load, zmin=0, zmax=most, colorscale=scale, colorbar={"title": "load / mean"},
            texttemplate="%{z:.2f}" if len(load[0]) <= 16 and len(load) <= 16 else None,
            hovertemplate="layer %{y}, expert %{x}: %{z:.2f}<extra></extra>",
        )
    )  # fmt: skip
    figure = finished(figure, "layer", height=170 + 26 * min(len(load), 20))
    figure.update_xaxes(title=f"expert (steps {steps[0]} to {steps[-1]})", dtick=1 if len(load[0]) <= 32 else None)
    figure.update_yaxes(autorange="reversed", dtick=1 if len(load) <= 32 else None)
    return figure


def human(value, digits=3):
    """12,345 or 1.23."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def cards(records, unit):
    """(what, value, whether it is a warning)"""
    name, factor = unit
    last = {key: value for record in records for key, value in record.items()}
    found = [("steps", human(last["step"]), False)]
    for key, label in (("loss", "training"), ("validation_loss", "held out")):
        if is_number(last.get(key)):
            found.append((f"{label}, {name}", f"{last[key] * factor:.3f}", False))
    if is_number(last.get("tokens_per_second")):
        found.append(("tokens/s", human(last["tokens_per_second"]), False))
    if is_number(last.get("model_tflops")):
        mfu = f" · MFU {100 * last['mfu']:.1f} %" if is_number(last.get("mfu")) else ""
        flops, times = flops_unit(records)
        found.append((f"model {flops} of a rank{mfu}", human(last["model_tflops"] * times), False))
    if is_number(last.get("memory")):
        found.append(("peak memory of a rank", f"{last['memory'] / 2**30:.2f} GiB", False))
    if is_number(last.get("imbalance")):
        found.append(("imbalance", f"{last['imbalance']:.2f}", False))
    for key, label in (("skipped", "steps skipped"), ("spikes", "leaps of the loss")):
        counts = [record[key] for record in records if key in record]
        total = sum(len(count) if isinstance(count, list) else count for count in counts if is_number(count) or count)
        if counts:
            found.append((label, human(total), total > 0))
    return found


def options_table(path):
    try:
        groups = json.loads(path.read_text())
    except (OSError, ValueError):
        return ""
    rows = [
        f"<tr><td>{html.escape(f'{group}: {name}')}</td><td>{html.escape(str(value))}</td></tr>"
        for group, values in groups.items()
        if isinstance(values, dict)
        for name, value in values.items()
    ]
    return f"<details><summary>Options</summary><table>{''.join(rows)}</table></details>" if rows else ""


def write_report(records, unit, load, load_steps, directory):
    """DIR/report.html; False where plotly is missing."""
    if go is None:
        return False
    charts = [
        ("Loss", "", loss_chart(records, unit), False),
        ("Gradient norm", "of each part of the model, before clipping", norms_chart(records), False),
        ("Speed", "over all ranks", speed_chart(records), False),
        ("Model FLOP/s", "6 for each weight a token meets, and causal attention; nothing recomputed counts",
         flops_chart(records), False),
        ("Time of a step", "", time_chart(records), False),
        ("Imbalance", "1: every expert has as many tokens", imbalance_chart(records), False),
        ("Load of each expert", "over the mean of its layer, in the last quarter of the run",
         load_chart(load, load_steps), True),
    ]  # fmt: skip
    drawn = "".join(
        f'<section class="chart{" wide" if wide else ""}"><h2>{title}</h2><p>{about or "&nbsp;"}</p>'
        + figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})
        + "</section>"
        for title, about, figure, wide in charts
        if figure
    )
    ranks = sorted({record["ranks"] for record in records if is_number(record.get("ranks"))})
    about = f"steps {records[0]['step']} to {records[-1]['step']}"
    if ranks:
        about += f", on {' then '.join(map(str, ranks))} rank{'' if ranks == [1] else 's'}"
    page = PAGE.format(
        title=html.escape(f"Training run {directory.resolve().name}"), about=about, style=STYLE, script=get_plotlyjs(),
        cards="".join(
            f'<div class="card{" warn" if warn else ""}"><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>'
            for what, value, warn in cards(records, unit)
        ),
        charts=drawn, options=options_table(directory / "options.json"),
    )  # fmt: skip
    (directory / "report.html").write_text(page, encoding="utf-8")
    return True
