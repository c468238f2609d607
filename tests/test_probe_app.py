"""The app of probe.py, through streamlit.testing: it shows what the files say, opens on anything,
and imports neither torch nor transformers."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from itertools import product

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score
from streamlit.testing.v1 import AppTest

SCRIPT = ROOT / "probe_app.py"
MODELS = {"tiny": (4, 1e6), "org/big": (6, 8e6)}  # layers, parameters
CLASSES = {"grammar/polarity": 2, "tense": 3}
DATASETS = {"grammar/polarity": ["accuracy", "auc"], "tense": ["accuracy"], "concreteness": ["r2"]}


def rows_of(rng, common, model, probe):
    """Rows of one model and probe: three poolings, joined layers, baselines, size curves."""
    depth, params = MODELS[model]
    chance = common["chance"]
    rows = []

    def add(layer, quantile, score, **keys):
        row = {"model": model, "probe": probe, "params": params, "p": 0.01, "p_holm": 0.2}
        row |= {"layer": layer, "quantile": quantile, "baseline": "", "layer_method": ""}
        row |= {"score": score, "low": score - 0.05, "high": score + 0.05}
        rows.append({**common, **row, **keys})

    for quantile in ("0.0", "0.5", "1.0"):
        for layer in range(depth + 1):
            p_holm = 0.04 if layer == depth else 0.2
            add(layer, quantile, chance + 0.3 * rng.random(), p_holm=p_holm)
        add("2-4", quantile, chance + 0.1, layer_method="mean")
    for layer in range(depth + 1):
        add(layer, "1.0", chance + 0.02, baseline="random_init")
        add(layer, "1.0", chance + 0.02, baseline="control")
        add(layer, "1.0", 0.1, n_train=8)
    add(0, "all", chance + 0.01, baseline="layer0", quantile_method="mean")
    add("", "", chance, baseline="majority")
    for n in (8, 16, 48) if common["metric"] != "auc" else ():
        add("best", "best", chance + 0.01 * np.log(n), n_train=n)
    return rows


def make_results(folder):
    """A run of two models on a task of two labels, one of three and a regression."""
    rng = np.random.default_rng(0)
    rows = []
    for name in ("predictions", "texts", "projections"):
        (folder / name).mkdir(parents=True)
    index = np.arange(60)
    texts = pd.DataFrame({"index": index})
    texts["text"] = [f"sentence {i} with <b>signs</b> & more" for i in index]
    for dataset, metrics in DATASETS.items():
        slug = dataset.replace("/", "-")
        y = rng.integers(0, CLASSES[dataset], 60) if dataset in CLASSES else rng.random(60)
        labels = np.array(["bad", "good", "mixed"])[y] if dataset in CLASSES else y
        texts.assign(label=labels).to_csv(folder / "texts" / f"{slug}.csv", index=False)
        common = {"dataset": dataset, "n": 60, "n_train": 48, "synthetic": True}
        common["chance"] = 0.5 if dataset in CLASSES else 0.0
        for metric, model, probe in product(metrics, MODELS, ("LDA", "logistic")):
            rows += rows_of(rng, {**common, "metric": metric}, model, probe)
        for model, (depth, _) in MODELS.items():
            key = f"{model.replace('/', '-')}__{slug}"
            for layer in (0, depth):
                score = rng.integers(0, 3, 60) if dataset == "tense" else y + rng.normal(0, 0.4, 60)
                scores = {"index": index, "y": y, "score": score, "fold": index % 5}
                path = folder / "predictions" / f"{key}__LDA__{layer}__1.0.npz"
                np.savez(path, **scores, threshold=0.5)
                plane = {"index": index, "xy": rng.normal(size=(60, 2)), "explained": [0.4, 0.2]}
                np.savez(folder / "projections" / f"{key}__{layer}__1.0.npz", **plane)
    table = pd.DataFrame(rows)
    table.to_csv(folder / "results.csv", index=False)
    return table.astype({"layer": str})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    table = make_results(folder / "probe")
    (folder / "train").mkdir()  # results of another script: never listed
    (folder / "train/results.csv").write_text("score,chance,low,high,n\n1,0,0,1,3\n")
    return folder, table


@pytest.fixture
def start(results, monkeypatch):
    """The app on a folder of runs, at an address."""

    def run(folder=results[0], script=SCRIPT, **address):
        monkeypatch.setattr(sys, "argv", ["probe_app.py", f"out_dir={folder}"])
        app = AppTest.from_file(str(script), default_timeout=60)
        for key, value in address.items():
            app.query_params[key] = value
        return good(app.run())

    return run


def good(app):
    assert not app.exception, app.exception[0].message + str(app.exception[0].stack_trace)
    return app


def figure(app, key):
    """The figure of a chart as the browser gets it, as a dict."""
    charts = [chart for chart in app.get("plotly_chart") if key in chart.proto.id]
    assert len(charts) == 1, key
    return json.loads(charts[0].proto.spec)


def values(array):
    """Numbers of a figure: a list, or plotly's binary."""
    if isinstance(array, dict):
        return np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"]).astype(float)
    return np.array(array, float)


def lines_of(chart, mode):
    return {line["name"]: line for line in chart["data"] if line.get("mode") == mode}


def dashed_of(chart):
    return {line["name"] for line in chart["data"] if "dash" in line.get("line", {})}


def test_layer_curve_is_the_table(start, results):
    folder, table = results
    app = start(dataset="grammar/polarity", metric="auc")
    runs = [os.path.relpath(folder / "probe"), "bundled example"]
    assert app.selectbox(key="results").options == runs
    chart = figure(app, "layer_curve")
    assert "synthetic" in chart["layout"]["title"]["text"]
    lines = lines_of(chart, "lines+markers")
    assert set(lines) == set(map(" · ".join, product(MODELS, ("LDA", "logistic"))))
    where = {"dataset": "grammar/polarity", "metric": "auc", "model": "org/big", "probe": "LDA"}
    where |= {"quantile": "1.0", "layer_method": "", "baseline": "", "n_train": 48}
    rows = table[(table[list(where)] == pd.Series(where)).all(axis=1)].set_index("layer").score
    line = lines["org/big · LDA"]
    assert list(rows.index) == list("0123456") and np.allclose(values(line["x"]), range(7))
    assert np.allclose(values(line["y"]), rows.to_numpy())
    filled = line["line"]["color"]  # the last layer alone is significant
    assert list(line["marker"]["color"]) == ["white"] * 6 + [filled]
    traces = chart["data"]
    band = traces[traces.index(line) - 1]
    assert band["fill"] == "toself" and band["legendgroup"] == "org/big · LDA"
    assert np.allclose(values(band["y"]), [*rows + 0.05, *(rows - 0.05)[::-1]])
    assert dashed_of(chart) == {"random init", "control", "layer0", "majority", "chance"}
    heat = figure(app, "heat_org/big_LDA")["data"][0]
    assert heat["y"] == ["first token", "quantile 0.5", "last token"]
    assert heat["x"] == list("0123456")


def test_filters_narrow_and_forget_what_no_longer_exists(start):
    app = start(dataset="grammar/polarity", metric="auc")
    good(app.multiselect(key="model").set_value(["tiny"]).run())
    good(app.multiselect(key="baseline").set_value(["random_init"]).run())
    chart = figure(app, "layer_curve")
    assert set(lines_of(chart, "lines+markers")) == {"tiny · LDA", "tiny · logistic"}
    assert dashed_of(chart) == {"random init", "chance"}
    good(app.selectbox(key="dataset").set_value("concreteness").run())
    assert app.selectbox(key="metric").value == "r2"
    assert figure(app, "layer_curve")["layout"]["yaxis"]["title"]["text"] == "r2"
    good(app.multiselect(key="probe").set_value([]).run())
    assert "at least one" in app.warning[0].value


def test_threshold_moves_the_numbers_where_there_is_one(start, results):
    site = {"site_model": "tiny", "site_layer": "4"}
    app = start(dataset="grammar/polarity", view="Decision", **site)
    arrays = np.load(results[0] / "probe/predictions/tiny__grammar-polarity__LDA__4__1.0.npz")
    y, score = arrays["y"], arrays["score"]
    assert f"{roc_auc_score(y, score):.3f}" in figure(app, "roc")["layout"]["title"]["text"]
    good(app.slider(key="threshold").set_value(0.9).run())
    predicted = score >= app.slider(key="threshold").value
    shown = {metric.label: metric.value for metric in app.metric}
    assert shown["Accuracy"] == f"{accuracy_score(y, predicted):.3f}"
    assert shown["Balanced accuracy"] == f"{balanced_accuracy_score(y, predicted):.3f}"
    assert shown["F1"] == f"{f1_score(y, predicted):.3f}"
    bars = figure(app, "histogram")["data"]
    for label, (bar, name) in enumerate(zip(bars, ("bad", "good"))):
        assert bar["name"] == name and len(values(bar["x"])) == np.sum(y == label)
    app = start(dataset="tense", view="Decision")
    assert not app.slider and figure(app, "agreement")["data"][0]["type"] == "heatmap"
    app = start(dataset="concreteness", view="Decision")
    title = figure(app, "agreement")["layout"]["title"]["text"]
    assert not app.slider and "Pearson" in title


def test_examples_and_projection(start, results):
    address = {"dataset": "grammar/polarity", "site_model": "tiny"}
    app = start(**address, view="Examples", site_layer="0", mistakes="true")
    arrays = np.load(results[0] / "probe/predictions/tiny__grammar-polarity__LDA__0__1.0.npz")
    wrong = np.flatnonzero((arrays["score"] >= 0.5) != arrays["y"])
    assert list(app.dataframe[0].value["index"]) == list(wrong)
    good(app.text_input(key="contains").set_value(f"SENTENCE {wrong[0]} ").run())
    assert list(app.dataframe[0].value["index"]) == [wrong[0]]
    app = start(**address, view="Projection")
    points = pd.DataFrame(figure(app, "projection")["data"]).explode("hovertext")
    assert set(points.name) == {"bad", "good"} and len(points) == 60
    assert points.hovertext.str.contains("&lt;b&gt;signs&lt;/b&gt; &amp; more").all()


def test_size_curves(start):
    app = start(dataset="grammar/polarity", metric="accuracy", view="Sizes")
    line = lines_of(figure(app, "model_size"), "lines+markers")["LDA"]
    assert list(values(line["x"])) == [1e6, 8e6]
    assert np.allclose(values(line["y"]), 0.5 + 0.01 * np.log(48))
    line = lines_of(figure(app, "sample_size"), "lines+markers")["tiny · LDA"]
    assert list(values(line["x"])) == [8, 16, 48]
    assert np.allclose(values(line["y"]), 0.5 + 0.01 * np.log([8, 16, 48]))
    good(app.multiselect(key="model").set_value(["tiny"]).run())
    assert "two models" in app.info[0].value
    app = start(dataset="grammar/polarity", metric="auc", view="Sizes")  # of no chosen layer
    assert "no auc at a layer" in app.info[0].value and not app.get("plotly_chart")


def test_address_holds_the_state(start):
    app = start(dataset="tense", model=["org/big"], probe=["logistic"], view="Table")
    shown = app.dataframe[0].value
    assert set(shown.dataset) == {"tense"} and set(shown.model) == {"org/big"}
    assert app.download_button and set(shown.probe) == {"logistic"}
    for widget in [*app.selectbox, *app.multiselect]:
        assert widget.proto.query_param_key == widget.key  # the browser writes it into the address
    app = start(dataset="nosuch", model=["nosuch"], view="nosuch", threshold="x")
    assert app.selectbox(key="dataset").value == "concreteness"
    assert len(app.multiselect(key="model").value) == 2


def test_written_again_is_read_again_however_large(start, results, tmp_path):
    """Large tables are handed to the browser piece by piece, a projection as 5,000 points."""
    folder, table = results
    shutil.copytree(folder / "probe", tmp_path / "probe")
    path = tmp_path / "probe/results.csv"
    app = start(tmp_path, dataset="tense", view="Table")
    table[table.dataset != "tense"].to_csv(path, index=False)
    good(app.run())
    assert app.selectbox(key="dataset").options == ["concreteness", "grammar/polarity"]
    many = pd.concat([table.assign(model=f"{table.model[1]}-{i}") for i in range(100)])
    many.to_csv(path, index=False)
    n = 10_000
    texts = pd.DataFrame({"index": range(n), "text": "a text", "label": "x"})
    texts.to_csv(tmp_path / "probe/texts/tense.csv", index=False)
    plane = {"index": np.arange(n), "xy": np.zeros((n, 2)), "explained": [0.4, 0.2]}
    np.savez(tmp_path / "probe/projections/tiny-0__tense__9__1.0.npz", **plane)
    app = start(tmp_path, dataset="tense", model=["tiny-0"], view="Projection")
    assert sum(len(part["hovertext"]) for part in figure(app, "projection")["data"]) == 5000
    app = start(tmp_path, dataset="tense", view="Table")
    assert len(app.dataframe[0].value) > 100


def test_empty_broken_and_foreign(start, results, tmp_path):
    folder, _ = results
    alone = shutil.copy(SCRIPT, tmp_path / "alone.py")  # away from the bundled example
    path = tmp_path / "out/results.csv"
    path.parent.mkdir()
    header = (folder / "probe/results.csv").read_text().splitlines()[0]
    for content, says in (("", "no results"), (header + "\n", "no scores")):
        if content:
            path.write_text(content)
        app = start(path.parent, alone)
        assert says in app.info[0].value and app.code[0].value == "python probe.py"
    path.write_text(header + "\n" + "1," * 90 + "\n")
    app = start(path.parent, alone)
    assert "results.csv is broken" in app.error[0].value
    shutil.copytree(folder / "probe", tmp_path / "some/probe")
    for view, name in (("Decision", "predictions"), ("Projection", "projections")):
        shutil.rmtree(tmp_path / "some/probe" / name)
        app = start(tmp_path / "some", view=view)
        assert "kept for this choice" in app.info[0].value


def test_bundled_example_opens(start, tmp_path):
    example = ROOT / "data/probing/example"
    assert sum(path.stat().st_size for path in example.rglob("*")) < 250_000
    for view in ("Decision", "Projection"):  # of the files in predictions/, texts/, projections/
        app = start(tmp_path, view=view)
        assert "example" in app.info[0].value and any("synthetic" in c.value for c in app.caption)
        assert app.get("plotly_chart")


def test_neither_torch_nor_transformers(results):
    folder, _ = results
    code = (
        "import sys\nfrom streamlit.testing.v1 import AppTest\n"
        f"app = AppTest.from_file({str(SCRIPT)!r}, default_timeout=60).run()\n"
        "heavy = [name for name in ('torch', 'transformers') if name in sys.modules]\n"
        "print(app.title[0].value, len(app.exception), heavy)"
    )
    command = [sys.executable, "-c", code, f"out_dir={folder}"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert out.stdout.strip() == "What do the hidden layers know? 0 []", out.stdout + out.stderr


@pytest.fixture(scope="module")
def server(results):
    """The app as `make app` starts it; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(SCRIPT), "--server.headless", "true"]
    command += ["--server.port", str(port), "--", f"out_dir={results[0]}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    address = f"http://localhost:{port}/_stcore/health"
    for _ in range(600):
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                assert answer.read() == b"ok"
            break
        except OSError:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
    yield port
    process.terminate()
    process.communicate(timeout=30)


def test_server_listens_on_this_machine_only(server):
    addresses = set()
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not os.path.exists(path):
            pytest.skip("no /proc/net/tcp on this system")
        with open(path) as file:
            lines = file.read().splitlines()[1:]
        for line in lines:
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and int(local.split(":")[1], 16) == server:  # listening
                addresses.add(local.split(":")[0])
    here = {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1, ::1
    assert addresses and addresses <= here


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 390])  # a desk, a phone
def test_in_a_browser(server, tmp_path, width):
    """Headless Chromium draws it without an error, within its width; tmp_path/app.png shows it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs a Chromium")
    with playwright.sync_playwright() as engine:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            browser = engine.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("playwright finds no Chromium: playwright install chromium")
        page = browser.new_page(viewport={"width": width, "height": 1000})
        errors = []
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(f"http://localhost:{server}")
        page.wait_for_selector(".js-plotly-plot .scatterlayer .trace", timeout=60_000)
        page.screenshot(path=tmp_path / "app.png")
        assert not errors and page.locator("[data-testid=stException]").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
