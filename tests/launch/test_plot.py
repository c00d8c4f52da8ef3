"""launch/plot.py on metrics as a run writes them, and on metrics that lack things."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy
import pytest

PLOT = Path(__file__).resolve().parents[2] / "launch/plot.py"
sys.path.insert(0, str(PLOT.parent))
import plot  # noqa: E402


def record(step, loss=2.0, ranks=2, load=((0.5, 0.3, 0.2), (0.3, 0.3, 0.4)), **more):
    imbalance = [max(layer) * len(layer) for layer in load]
    return {
        "step": step,
        "loss": loss,
        "ranks": ranks,
        "tokens_per_second": 1000.0 + step,
        "model_tflops": 0.5 + step / 2000,
        "step_seconds": 0.25,
        "data_seconds": 0.001 * step,
        "memory": 3 << 30,
        "gradient_norm": 1.0,
        "gradient_norms": {"experts": 0.8, "head": 0.6},
        "skipped": 0,
        "spikes": [],
        "load": load,
        "imbalance": sum(imbalance) / len(imbalance),
        "imbalance_per_layer": imbalance,
        **more,
    }


def write(folder, records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def run(folder, expect=0):
    result = subprocess.run(
        [sys.executable, PLOT, folder], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == expect, result.stdout + result.stderr
    return result.stdout + result.stderr


def pixels(path):
    return matplotlib.image.imread(path)[..., :3]


def has_curve_of_colour(path, colour):
    """Whether some 100 pixels are of about this colour."""
    distance = numpy.abs(pixels(path) - numpy.array(matplotlib.colors.to_rgb(colour))).max(axis=-1)
    return (distance < 0.05).sum() > 100


VALIDATED = {"validation_loss": 4.0 * math.log(2), "validation_bpb": 4.0}


def test_a_run_gives_three_pictures(tmp_path):
    write(
        tmp_path,
        [record(s, 3 - s / 50, **(VALIDATED if s % 20 == 0 else {})) for s in range(1, 101)],
    )
    run(tmp_path)
    assert has_curve_of_colour(tmp_path / "loss.png", "tab:blue")  # training
    assert has_curve_of_colour(tmp_path / "loss.png", "tab:red")  # validation
    for name in ("loss.png", "load.png", "speed.png"):
        height, width = pixels(tmp_path / name).shape[:2]
        assert width >= 800 and height >= 500


def test_without_validation_there_is_no_validation_curve_and_it_is_said(tmp_path):
    write(tmp_path, [record(s) for s in range(1, 30)])
    assert "no validation_loss" in run(tmp_path)
    assert not has_curve_of_colour(tmp_path / "loss.png", "tab:red")


def test_other_loads_make_another_picture(tmp_path):
    pictures = []
    for load in ([[0.5, 0.5], [0.5, 0.5]], [[0.9, 0.1], [0.5, 0.5]]):
        write(tmp_path, [record(s, load=load, imbalance=1.0, imbalance_per_layer=[1, 1]) for s in (1, 2, 3)])
        run(tmp_path)
        pictures.append(pixels(tmp_path / "load.png"))
    assert not numpy.array_equal(*pictures)


def test_the_legend_of_speeds_covers_no_line(tmp_path, monkeypatch):
    """Steps, data and communication so far apart that no corner of the axes is free."""
    drawn = []
    monkeypatch.setattr(plot, "finish", lambda figure, path: drawn.append(figure))
    more = [{"exposed_communication_seconds": 10 ** -(s % 4)} for s in range(1, 101)]
    assert plot.plot_speed([record(s, data_seconds=10 ** -(s % 5), **more[s - 1]) for s in range(1, 101)], tmp_path / "speed.png")
    (figure,) = drawn
    figure.canvas.draw()
    (legend,) = figure.legends
    assert legend.get_texts()[0].get_text() == "step" and len(legend.get_texts()) == 3
    box = legend.get_window_extent()
    assert figure.bbox.contains(*box.min) and figure.bbox.contains(*box.max)
    assert not any(axes.get_tightbbox().overlaps(box) or axes.get_legend() for axes in figure.axes)


def test_many_experts_and_layers_fit(tmp_path):
    load = [[1 / 128] * 128 for _ in range(24)]
    write(tmp_path, [record(s, load=load) for s in (1, 2, 3)])
    run(tmp_path)
    assert (tmp_path / "load.png").stat().st_size > 10_000


def test_one_record_is_enough(tmp_path):
    write(tmp_path, [record(1)])
    run(tmp_path)
    assert (tmp_path / "loss.png").exists() and (tmp_path / "load.png").exists()


def test_a_step_counts_as_it_was_logged_last(tmp_path):
    write(tmp_path, [record(1, 3.0), record(2, 2.5), record(3, 99.0), record(3, 2.0), record(4, 1.5)])
    records = plot.read_metrics(tmp_path / "metrics.jsonl")
    assert plot.series(records, "loss") == ([1, 2, 3, 4], [3.0, 2.5, 2.0, 1.5])


def test_ranks_of_a_resumed_run_are_in_the_title():
    assert plot.title_of([record(1, ranks=2), record(2, ranks=4)], "Loss") == "Loss, on 2 then 4 ranks"
    assert plot.title_of([record(1, ranks=1)], "Loss") == "Loss, on 1 rank"


def test_load_is_relative_to_the_mean_over_the_last_quarter():
    early = [record(s, load=[[1.0, 0.0]]) for s in range(1, 7)]
    late = [record(7, load=[[0.5, 0.5]]), record(8, load=[[0.7, 0.3]])]
    layers, steps = plot.mean_load(early + late)
    assert steps == [7, 8]
    assert layers == [pytest.approx([1.2, 0.8])]


def test_broken_lines_are_named_and_left_out(tmp_path):
    write(tmp_path, [record(1), record(2)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert "metrics.jsonl:3 is no metrics object" in run(tmp_path)
    assert (tmp_path / "loss.png").exists()


def test_a_loss_that_is_not_finite_does_not_stop_the_picture(tmp_path):
    write(tmp_path, [record(1), record(2, float("nan")), record(3)])
    run(tmp_path)
    assert (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(
    ("missing", "message", "pictures"),
    [
        ({"load"}, "no heat map", {"loss.png", "load.png", "speed.png"}),
        ({"imbalance"}, "no imbalance", {"loss.png", "load.png", "speed.png"}),
        ({"imbalance_per_layer"}, "", {"loss.png", "load.png", "speed.png"}),
        ({"load", "imbalance"}, "no load.png", {"loss.png", "speed.png"}),
        ({"loss"}, "no loss.png", {"load.png", "speed.png"}),
        ({"tokens_per_second"}, "no speed.png", {"loss.png", "load.png"}),
        ({"model_tflops", "step_seconds", "data_seconds", "memory", "gradient_norms"}, "", {"loss.png", "load.png", "speed.png"}),
        ({"ranks"}, "", {"loss.png", "load.png", "speed.png"}),
    ],
)
def test_missing_fields_are_said_and_the_rest_is_drawn(tmp_path, missing, message, pictures):
    write(tmp_path, [{k: v for k, v in record(s).items() if k not in missing} for s in (1, 2, 3)])
    output = run(tmp_path, expect=0 if len(pictures) == 3 else 1)
    assert message in output
    assert {path.name for path in tmp_path.glob("*.png")} == pictures


@pytest.mark.parametrize("text", [None, "", "\n\n", "no json\n"])
def test_nothing_to_plot_is_an_error(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    output = run(tmp_path, expect=1)
    assert "metrics.jsonl" in output and "Traceback" not in output


def test_losses_are_in_bits_a_byte_where_a_token_s_bytes_are_known():
    assert plot.unit_of_loss([record(1)]) == ("nats per token", 1)
    # Of two bytes a token, a nat a token is 1 / (2 ln 2) bits a byte.
    found = plot.unit_of_loss([record(1), record(2, validation_loss=3.0, validation_bpb=3.0 / 2 / math.log(2))])
    assert found == ("bits per byte", pytest.approx(0.5 / math.log(2)))


def write_eventful_run(folder):
    records = [record(s, 3 - s / 50, **(VALIDATED if s % 20 == 0 else {})) for s in range(1, 101)]
    records[40] |= {"spikes": [40, 41], "skipped": 3}
    write(folder, records)
    (folder / "options.json").write_text('{"model": {"hidden": 128, "note": "<b>"}, "data": 3}')


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path):
    pytest.importorskip("plotly")
    write_eventful_run(tmp_path)
    assert "report.html" in run(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=", page)
    assert "model: hidden</td><td>128" in page and "<b>&lt;b&gt;" not in page and "&lt;b&gt;" in page
    for what, value in {
        "steps": "100",
        "training, bits per byte": f"{(3 - 2) / math.log(2):.3f}",
        "held out, bits per byte": "4.000",
        "tokens/s": "1,100",
        "model GFLOP/s of a rank": "550",
        "peak memory of a rank": "3.00 GiB",
        "steps skipped": "3",
        "leaps of the loss": "2",
    }.items():
        assert f"<b>{value}</b><span>{what}</span>" in page, what
    assert page.count('class="chart') - page.count('class="charts') == 7


def test_a_browser_draws_the_report(tmp_path):
    """Every chart of it, without a network and without an error: the page as a browser leaves it."""
    pytest.importorskip("plotly")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium")
    write_eventful_run(tmp_path)
    run(tmp_path)
    page = tmp_path / "report.html"
    # Errors go into the page, where they are found.
    listener = "<script>addEventListener('error', e => document.title = 'error: ' + e.message)</script>"
    page.write_text(page.read_text().replace("<head>", "<head>" + listener, 1))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--window-size=1280,2400"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    result = subprocess.run(
        [browser, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    drawn = result.stdout
    assert "<title>Training run " in drawn, result.stderr
    assert drawn.count('class="plot-container plotly"') == 7
    assert drawn.count('class="trace scatter') >= 10
    for text in ("training", "held out", "leaps before", "experts", "of it, until the batch is there", "load / mean"):
        assert f">{text}</text>" in drawn, text
