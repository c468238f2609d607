"""The app of probe.py, through streamlit.testing: what it shows is what the files say, it opens on anything, and it never imports torch."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score
from streamlit.testing.v1 import AppTest

SCRIPT = ROOT / "probe.py"
TABS = ["Layers", "Decision", "Examples", "Projection", "Sizes", "Table"]
MODELS = {"tiny": (4, 1e6), "org/big": (6, 8e6)}  # layers, parameters


def make_results(folder, seed=0):
    """The files of a run: two models, a task of two labels, one of three and a regression; predictions and projections of their last tokens."""
    rng, rows = np.random.default_rng(seed), []
    for name in ("predictions", "texts", "projections"):
        (folder / name).mkdir(parents=True)
    for dataset, metrics in {"grammar/polarity": ["accuracy", "auc"], "tense": ["accuracy"], "concreteness": ["r2"]}.items():
        chance = 0.0 if metrics == ["r2"] else 0.5
        slug, n = dataset.replace("/", "-"), 60
        y = rng.random(n) if metrics == ["r2"] else rng.integers(0, 2 if "auc" in metrics else 3, n)
        labels = y if metrics == ["r2"] else [["bad", "good", "mixed"][i] for i in y]
        texts = [f"sentence {i} with <b>signs</b> & more" for i in range(n)]
        pd.DataFrame(dict(index=range(n), text=texts, label=labels)).to_csv(folder / "texts" / f"{slug}.csv", index=False)
        for metric in metrics:
            common = dict(dataset=dataset, metric=metric, chance=chance, n=n, n_train=48, synthetic=True)
            rows.append(dict(common, model="", probe="", baseline="majority", layer="", quantile="", score=chance, low=chance - 0.05, high=chance + 0.05))
            for model, (depth, params) in MODELS.items():
                for probe in ("LDA", "logistic"):
                    for quantile in ("0.0", "0.5", "1.0"):
                        for layer in [*range(depth + 1), "2-4"]:
                            score = chance + 0.3 * rng.random()
                            row = dict(common, model=model, probe=probe, baseline="", layer=layer, quantile=quantile, params=params, score=score,
                                       low=score - 0.05, high=score + 0.05, p=0.01, p_holm=0.04 if layer == depth else 0.2,
                                       layer_method="mean" if layer == "2-4" else "")
                            rows.append(row)
                            if quantile == "1.0" and layer != "2-4":
                                rows += [dict(row, baseline=b, score=chance + 0.02) for b in ("random_init", "control")]
                    rows.append(dict(rows[-1], baseline="layer0", layer=0, layer_method="", quantile="all", quantile_method="mean", score=chance + 0.01))
                    for m in (8, 16, 48):
                        rows += [dict(row, layer=i, layer_method="", quantile="1.0", n_train=m, score=0.1) for i in range(depth + 1) if m < 48]
                        rows.append(dict(row, layer="best", layer_method="", quantile="best", n_train=m, score=chance + 0.01 * np.log(m)))
        for model, (depth, _) in MODELS.items():
            for layer in (0, depth):
                score = y + rng.normal(0, 0.4, n) if metrics == ["r2"] or "auc" in metrics else rng.integers(0, 3, n)
                key = f"{model.replace('/', '-')}__{slug}"
                np.savez(folder / "predictions" / f"{key}__LDA__{layer}__1.0.npz", index=np.arange(n), y=y, score=score, fold=np.arange(n) % 5, threshold=0.5)
                np.savez(folder / "projections" / f"{key}__{layer}__1.0.npz", index=np.arange(n), xy=rng.normal(size=(n, 2)), explained=[0.4, 0.2])
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    return pd.DataFrame(rows).astype({"layer": str})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    table = make_results(folder / "probe")
    (folder / "train").mkdir()
    (folder / "train/results.csv").write_text("score,chance,low,high,n\n1,0,0,1,3\n")  # of another script: never listed
    return folder, table


def start(folder, monkeypatch, script=SCRIPT, **address):
    monkeypatch.setattr(sys, "argv", ["probe.py", f"out_dir={folder}"])
    app = AppTest.from_file(str(script), default_timeout=30)
    for key, value in address.items():
        app.query_params[key] = value
    return good(app.run())


def good(app):
    assert not app.exception, app.exception[0].message + str(app.exception[0].stack_trace)
    return app


def figure(app, key):
    """The figure of a chart as the browser gets it, as a dict."""
    charts = [json.loads(c.proto.spec) for c in app.get("plotly_chart") if key in c.proto.id]
    assert len(charts) == 1, key
    return charts[0]


def values(array):
    """Numbers of a figure: a list, or plotly's binary."""
    if isinstance(array, dict):
        import base64
        return np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"]).astype(float)
    return np.array(array, float)


def test_layer_curve_is_the_table(results, monkeypatch):
    folder, table = results
    app = start(folder, monkeypatch, dataset="grammar/polarity", metric="auc")
    assert app.selectbox(key="results").options == [os.path.relpath(folder / "probe"), "bundled example"]
    chart = figure(app, "layer_curve")
    assert "synthetic" in chart["layout"]["title"]["text"]
    lines = {t["name"]: t for t in chart["data"] if t.get("mode") == "lines+markers"}
    assert set(lines) == {f"{m} · {p}" for m in MODELS for p in ("LDA", "logistic")}
    rows = table.query("dataset == 'grammar/polarity' and metric == 'auc' and model == 'org/big' and probe == 'LDA' and quantile == '1.0' and layer != '2-4'"
                       " and baseline == '' and n_train == 48").set_index("layer").score
    assert list(rows.index) == list("0123456")
    line = lines["org/big · LDA"]
    assert np.allclose(values(line["x"]), range(7)) and np.allclose(values(line["y"]), rows.to_numpy())
    assert list(line["marker"]["color"]) == ["white"] * 6 + [line["line"]["color"]]  # only the last layer is significant
    dashed = {t["name"] for t in chart["data"] if t.get("mode") == "lines" and "fill" not in t}
    assert dashed == {"random init", "control", "layer0", "majority", "chance"}
    band = next(t for t in chart["data"] if t.get("fill") == "toself" and t["legendgroup"] == "org/big · LDA")
    assert np.allclose(values(band["y"]), [*rows + 0.05, *(rows - 0.05)[::-1]])
    heat = next(t for t in json.loads(next(c for c in app.get("plotly_chart") if "heat_org/big_LDA" in c.proto.id).proto.spec)["data"])
    assert heat["y"] == ["first token", "quantile 0.5", "last token"] and heat["x"] == [str(i) for i in range(7)]


def test_filters_narrow_and_forget_what_no_longer_exists(results, monkeypatch):
    folder, _ = results
    app = start(folder, monkeypatch, dataset="grammar/polarity", metric="auc")
    good(app.multiselect(key="model").set_value(["tiny"]).run())
    good(app.multiselect(key="baseline").set_value(["random_init"]).run())
    chart = figure(app, "layer_curve")
    assert {t["name"] for t in chart["data"] if t.get("mode") == "lines+markers"} == {"tiny · LDA", "tiny · logistic"}
    assert {t["name"] for t in chart["data"] if t.get("mode") == "lines" and "fill" not in t} == {"random init", "chance"}
    good(app.selectbox(key="dataset").set_value("concreteness").run())
    assert app.selectbox(key="metric").value == "r2" and figure(app, "layer_curve")["layout"]["yaxis"]["title"]["text"] == "r2"
    good(app.multiselect(key="probe").set_value([]).run())
    assert "at least one" in app.warning[0].value


def test_threshold_moves_the_numbers(results, monkeypatch):
    folder, _ = results
    app = start(folder, monkeypatch, dataset="grammar/polarity", view="Decision", site_model="tiny", site_layer="4")
    arrays = np.load(folder / "probe/predictions/tiny__grammar-polarity__LDA__4__1.0.npz")
    y, score = arrays["y"], arrays["score"]
    assert f"{roc_auc_score(y, score):.3f}" in figure(app, "roc")["layout"]["title"]["text"]
    for threshold in (0.5, 0.9):
        if threshold != 0.5:
            good(app.slider(key="threshold").set_value(threshold).run())
        told = {m.label: m.value for m in app.metric}
        said = score >= app.slider(key="threshold").value
        assert told["Balanced accuracy"] == f"{balanced_accuracy_score(y, said):.3f}" and told["F1"] == f"{f1_score(y, said):.3f}"
        assert told["Accuracy"] == f"{(said == y).mean():.3f}"
    bars = figure(app, "histogram")["data"]
    assert [b["name"] for b in bars] == ["bad", "good"] and [values(b["y"]).sum() for b in bars] == [(y == 0).sum(), (y == 1).sum()]


def test_no_threshold_where_there_is_none(results, monkeypatch):
    folder, _ = results
    app = start(folder, monkeypatch, dataset="tense", view="Decision")
    assert not app.slider and figure(app, "agreement")["data"][0]["type"] == "heatmap"
    app = start(folder, monkeypatch, dataset="concreteness", view="Decision")
    assert not app.slider and "Pearson" in figure(app, "agreement")["layout"]["title"]["text"]


def test_examples_and_projection(results, monkeypatch):
    folder, _ = results
    app = start(folder, monkeypatch, dataset="grammar/polarity", view="Examples", site_model="tiny", site_layer="0", mistakes="true")
    arrays = np.load(folder / "probe/predictions/tiny__grammar-polarity__LDA__0__1.0.npz")
    wrong = np.flatnonzero((arrays["score"] >= 0.5) != arrays["y"])
    assert list(app.dataframe[0].value["index"]) == list(wrong) and not app.dataframe[0].value.right.any()
    good(app.text_input(key="contains").set_value(f"SENTENCE {wrong[0]} ").run())
    assert list(app.dataframe[0].value.text) == [f"sentence {wrong[0]} with <b>signs</b> & more"]
    app = start(folder, monkeypatch, dataset="grammar/polarity", view="Projection", site_model="tiny")
    points = figure(app, "projection")["data"]
    assert {p["name"] for p in points} == {"bad", "good"} and sum(len(p["text"]) for p in points) == 60
    assert all("&lt;b&gt;signs&lt;/b&gt; &amp; more" in text for p in points for text in p["text"])


def test_size_curves(results, monkeypatch):
    folder, table = results
    app = start(folder, monkeypatch, dataset="grammar/polarity", metric="accuracy", view="Sizes")
    line = next(t for t in figure(app, "model_size")["data"] if t["name"] == "LDA")
    assert list(values(line["x"])) == [1e6, 8e6] and np.allclose(values(line["y"]), 0.5 + 0.01 * np.log(48))
    line = next(t for t in figure(app, "sample_size")["data"] if t["name"] == "tiny · LDA")
    assert list(values(line["x"])) == [8, 16, 48] and np.allclose(values(line["y"]), 0.5 + 0.01 * np.log([8, 16, 48]))
    good(app.multiselect(key="model").set_value(["tiny"]).run())
    assert "two models" in app.info[0].value


def test_address_holds_the_state(results, monkeypatch):
    folder, _ = results
    app = start(folder, monkeypatch, dataset="tense", model=["org/big"], probe=["logistic"], view="Table")
    assert set(app.dataframe[0].value.dataset) == {"tense"} and set(app.dataframe[0].value.model) == {"org/big", ""}
    assert app.download_button and set(app.dataframe[0].value.probe) == {"logistic", ""}
    for widget in [*app.selectbox, *app.multiselect]:
        assert widget.proto.query_param_key == widget.key  # the browser writes each choice into the address
    app = start(folder, monkeypatch, dataset="nosuch", model=["nosuch"], view="nosuch", threshold="x")
    assert app.selectbox(key="dataset").value == "concreteness" and len(app.multiselect(key="model").value) == 2


def test_written_again_is_read_again(results, monkeypatch, tmp_path):
    folder, table = results
    shutil.copytree(folder / "probe", tmp_path / "probe")
    app = start(tmp_path, monkeypatch, dataset="tense", view="Table")
    table[table.dataset != "tense"].to_csv(tmp_path / "probe/results.csv", index=False)
    good(app.run())
    assert app.selectbox(key="dataset").options == ["concreteness", "grammar/polarity"]


def test_empty_broken_and_foreign(results, monkeypatch, tmp_path):
    folder, _ = results
    alone = shutil.copy(SCRIPT, tmp_path / "alone.py")  # away from the bundled example
    (tmp_path / "out").mkdir()
    app = start(tmp_path / "out", monkeypatch, alone)
    assert "no results" in app.info[0].value and app.code[0].value == "python probe.py"
    header = (folder / "probe/results.csv").read_text().splitlines()[0]
    (tmp_path / "out/results.csv").write_text(header + "\n")
    app = start(tmp_path / "out", monkeypatch, alone)
    assert "no scores" in app.info[0].value and app.code[0].value == "python probe.py"
    (tmp_path / "out/results.csv").write_text(header + "\n" + "1," * 90 + "\n")
    app = start(tmp_path / "out", monkeypatch, alone)
    assert "results.csv is broken" in app.error[0].value
    shutil.copytree(folder / "probe", tmp_path / "some/probe")
    shutil.rmtree(tmp_path / "some/probe/predictions")
    shutil.rmtree(tmp_path / "some/probe/projections")
    for view in ("Decision", "Projection"):
        assert " is kept" in start(tmp_path / "some", monkeypatch, view=view).info[0].value.replace("are kept", "is kept")


@pytest.mark.parametrize("view", TABS)
def test_bundled_example_opens_everywhere(view, monkeypatch, tmp_path):
    example = ROOT / "data/probing/example"
    assert sum(f.stat().st_size for f in example.rglob("*") if f.is_file()) < 200_000
    app = start(tmp_path, monkeypatch, view=view)
    assert "example" in app.info[0].value and any("synthetic" in c.value for c in app.caption)
    assert app.get("plotly_chart") or app.dataframe


def test_neither_torch_nor_transformers(results):
    folder, _ = results
    code = ("import sys\nfrom streamlit.testing.v1 import AppTest\n"
            f"app = AppTest.from_file({str(SCRIPT)!r}, default_timeout=60).run()\n"
            "print(app.title[0].value, len(app.exception), [m for m in ('torch', 'transformers', 'sklearn', 'matplotlib') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code, f"out_dir={folder}"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert out.stdout.strip() == "What do the hidden layers know? 0 []", out.stdout + out.stderr


@pytest.fixture(scope="module")
def server(results):
    """The app as `make app` starts it; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "streamlit", "run", str(SCRIPT), "--server.headless", "true", "--server.port", str(port), "--",
                                f"out_dir={results[0]}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/_stcore/health", timeout=5) as answer:
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
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not os.path.exists(table):
            pytest.skip("no /proc/net/tcp on this system")
        for line in open(table).read().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and int(local.split(":")[1], 16) == server:  # listening
                addresses.add(local.split(":")[0])
    assert addresses and addresses <= {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1, ::1


@pytest.mark.slow
def test_in_a_browser(server, tmp_path):
    """Draws in headless Chromium, without an error in its console; the picture is left in tmp_path/app.png to be looked at."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright and a Chromium")
    with playwright.sync_playwright() as engine:
        try:
            browser = engine.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("playwright finds no Chromium: playwright install chromium")
        page, errors = browser.new_page(viewport=dict(width=1400, height=1000)), []
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(f"http://localhost:{server}")
        page.wait_for_selector(".js-plotly-plot .scatterlayer .trace", timeout=60_000)
        page.screenshot(path=tmp_path / "app.png")
        assert not errors and page.locator("[data-testid=stException]").count() == 0
        browser.close()
