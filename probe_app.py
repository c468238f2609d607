"""The app for probe.py: explore the results of its runs in out/.

    streamlit run probe_app.py [-- out_dir=path/to/runs]

It shows layer curves with 95 % bands and every baseline, layers x poolings, scores at a threshold
that you move, each text with its out-of-fold score, texts in the plane of two components, curves
over training texts and model sizes, and the numbers as CSV. The URL holds every choice, so a link
shows what you see. Streamlit reruns this file at every click, so it stays light and imports neither
torch nor transformers.
"""

import html
import os
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import streamlit as st
from sklearn import metrics

EXAMPLE = Path(__file__).resolve().parent / "data/probing/example"
NAMES = ["model", "dataset", "probe", "baseline", "layer", "quantile", "metric"]
METHODS = ["layer_method", "quantile_method"]
NUMBERS = ["score", "chance", "low", "high", "n", "n_train", "params", "p", "p_holm"]
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8172B3", "#937860"]
GREY = "#888888"
DASHES = {"random_init": "dash", "control": "dot", "layer0": "dashdot", "majority": "longdash"}


# ---- reading; `stamp`, a file's time of change, makes the cache read a changed file again

cached = st.cache_data(show_spinner=False, max_entries=64)


def mtime(path):
    """Return when a file was written (ns), or 0 if it does not exist."""
    return path.stat().st_mtime_ns if path.exists() else 0


def find_runs(out):
    """Return {name: folder}: `out` and the runs in it, newest first, then the bundled example."""
    runs = {}
    paths = [*out.glob("results.csv"), *out.glob("*/results.csv")]
    for path in sorted(paths, key=mtime, reverse=True):
        with open(path, encoding="utf-8", errors="replace") as file:
            header = file.readline().strip().split(",")
        if {*NAMES, *NUMBERS[:5]} <= set(header):  # other scripts write results.csv, too
            runs[os.path.relpath(path.parent)] = path.parent
    if EXAMPLE.exists():
        runs["bundled example"] = EXAMPLE
    return runs


@cached
def read_results(path, stamp):
    """Read results.csv: names as categories, `pooling` for the quantile and methods in words."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        if not isinstance(table.index, pd.RangeIndex):  # rows longer than the header
            raise ValueError("more fields than columns")
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is broken ({reason}): rerun probe.py") from None
    columns = table.columns.union([*METHODS, *NUMBERS, "synthetic"], sort=False)
    table = table.reindex(columns=columns, fill_value="")
    for column in NUMBERS:
        table[column] = pd.to_numeric(table[column], errors="coerce")
    table["synthetic"] = table.synthetic == "True"
    poolings = table[["quantile", *METHODS]].drop_duplicates()
    poolings["pooling"] = [pooling_name(*names) for names in poolings.itertuples(index=False)]
    table = table.merge(poolings)
    names = table.columns.difference([*NUMBERS, "synthetic"])
    table[names] = table[names].astype("category")
    return table[np.isfinite(table.score)]


def pooling_name(quantile, layer_method, quantile_method):
    """Return a pooling in words, for menus and legends."""
    words = {"": "none", "all": "all tokens", "0.0": "first token", "1.0": "last token"}
    words |= {"best": "best", "attention": "attention"}
    parts = [words.get(quantile, f"quantile {quantile}"), quantile_method]
    if layer_method:
        parts.append(f"layers {layer_method}")
    return ", ".join(part for part in parts if part)


@cached
def read_arrays(path, stamp):
    """Read a file of predictions or projections as {name: array}."""
    with np.load(path) as file:
        return dict(file)


@cached
def read_texts(path, stamp):
    """Read texts/DATASET.csv: text and label, by index."""
    dtypes = {"text": str, "label": str}
    return pd.read_csv(path, dtype=dtypes, keep_default_na=False, index_col="index")


def read_scores(run, path):
    """Return a site's out-of-fold scores, texts and labels, and the probe's threshold or NaN."""
    arrays = dict(read_arrays(path, mtime(path)))
    threshold = float(arrays.pop("threshold", np.nan))
    texts = run / "texts" / f"{path.stem.rsplit('__', 4)[1]}.csv"
    return pd.DataFrame(arrays).join(read_texts(texts, mtime(texts)), on="index"), threshold


def find_sites(folder, columns, choice):
    """List the chosen files of a folder in a DataFrame; '__' separates the columns in a name."""
    rows = []
    for path in sorted(folder.glob("*.npz")):
        names = path.stem.rsplit("__", len(columns) - 1)
        if len(names) == len(columns):
            rows.append([*names, path])
    sites = pd.DataFrame(rows, columns=[*columns, "path"])
    for column, chosen in choice.items():
        if column in columns:
            sites = sites[sites[column].isin([name.replace("/", "-") for name in chosen])]
    return sites


# ---- choosing rows


def natural(value):
    """Return a sort key: numbers by size, then ranges such as 3-5, then words."""
    numbers = [float(number) for number in re.findall(r"\d+\.?\d*", str(value))]
    return (len(numbers) or 99, numbers, str(value))


def values_of(column):
    """Return a column's distinct values except '', in natural order."""
    return sorted((value for value in column.unique() if value != ""), key=natural)


def full_size(rows):
    """Leave out the rows of learning curves, which have fewer training texts than usual."""
    sizes = rows.groupby(["model", "probe", "baseline"], observed=True).n_train
    most_common = sizes.transform(lambda n: n.mode().max())
    return rows[most_common.isna() | rows.n_train.isna() | (rows.n_train == most_common)]


def last_layer(rows):
    """Return the deepest single layer among the rows, or 1 if there is none."""
    layers = pd.to_numeric(rows.layer.astype(str), errors="coerce")
    return np.nanmax([1.0, *layers])


def with_places(rows):
    """Add x, the centre of each row's layers, and reach: '4' is 4 ± 0, '3-5' is 4 ± 1."""
    depth = last_layer(rows)
    ends = {}
    for layer in rows.layer.unique():
        numbers = [float(number) for number in re.findall(r"\d+\.?\d*", layer)] or [1.0, depth]
        ends[layer] = (min(numbers), max(numbers))
    ends = pd.DataFrame(ends, index=["first", "last"]).T.reindex(rows.layer.astype(str))
    x = (ends["first"] + ends["last"]).to_numpy() / 2
    return rows.assign(x=x, reach=ends["last"].to_numpy() - x)


# ---- figures


def show(figure, key, title, height=480):
    """Draw a figure with its legend below, where phones have room."""
    legend = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "title": None}
    margin = {"l": 50, "r": 10, "t": 60, "b": 40}
    figure.update_layout(title=title, height=height, legend=legend, margin=margin)
    st.plotly_chart(figure, key=key, width="stretch")


def faint(colour):
    """Return a colour #rrggbb made transparent, for bands."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def layer_figure(rows, choice, relative):
    """Plot scores by layer, a colour per model, probe and pooling, with dashed baselines."""
    figure = go.Figure()
    rows = with_places(rows)
    real = rows[(rows.baseline == "") & rows.pooling.isin(choice["pooling"])]
    for i, (names, part) in enumerate(real.groupby(["model", "probe", "pooling"], observed=True)):
        name = " · ".join(names if len(choice["pooling"]) > 1 else names[:2])
        depth = last_layer(part)
        scale = depth if relative else 1.0
        style = {"colour": COLOURS[i % len(COLOURS)], "name": name, "scale": scale}
        draw_curve(figure, part.drop_duplicates("layer").sort_values("x"), **style)
        single = rows[(rows.model == names[0]) & (rows.probe == names[1]) & (rows.reach == 0)]
        for baseline in set(choice["baseline"]) - {"majority"}:
            baseline_rows = single[single.baseline == baseline]
            if baseline != "layer0":
                baseline_rows = baseline_rows[baseline_rows.pooling == names[2]]
            draw_baseline(figure, baseline_rows, baseline, depth, **style)
    levels = {"chance": real.chance.mean()}
    if "majority" in choice["baseline"]:
        levels["majority"] = rows.score[rows.baseline == "majority"].mean()
    end = 1.0 if relative else last_layer(real)
    for name, level in levels.items():
        line = {"color": GREY, "dash": DASHES.get(name, "dot"), "width": 1.5}
        figure.add_scatter(x=[0, end], y=[level] * 2, mode="lines", line=line, name=name)
    x_title = "relative depth" if relative else "layer (0: embeddings)"
    return figure.update_layout(xaxis_title=x_title, yaxis_title=choice["metric"])


HOVER = (
    "layer %{customdata[0]}: <b>%{y:.3f}</b> [%{customdata[1]:.3f}, %{customdata[2]:.3f}], "
    "n %{customdata[3]:.0f}, p (Holm) %{customdata[4]:.2g}"
)


def draw_curve(figure, rows, colour, name, scale):
    """Draw single layers as a line and band, filled where p < .05; combined layers as bars."""
    single = rows[rows.reach == 0]
    combined = rows[rows.reach > 0]
    hover = ["layer", "low", "high", "n", "p_holm"]
    shared = {"legendgroup": name, "hovertemplate": f"{HOVER}<extra>{name}</extra>"}
    x = single.x / scale
    figure.add_scatter(
        x=[*x, *x[::-1]],
        y=[*single.high, *single.low[::-1]],
        fill="toself",
        fillcolor=faint(colour),
        mode="lines",
        line_width=0,
        hoverinfo="skip",
        legendgroup=name,
        showlegend=False,
    )
    filled = np.where((single.p_holm < 0.05) | single.p_holm.isna(), colour, "white")
    figure.add_scatter(
        x=x,
        y=single.score,
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": 2.5},
        marker={"size": 8, "color": filled, "line": {"color": colour, "width": 1.5}},
        customdata=single[hover].astype(object),
        **shared,
    )
    figure.add_scatter(
        x=combined.x / scale,
        y=combined.score,
        mode="markers",
        marker={"symbol": "line-ew-open", "color": colour},
        error_x={"array": combined.reach / scale, "thickness": 2},
        showlegend=False,
        customdata=combined[hover].astype(object),
        **shared,
    )


def draw_baseline(figure, rows, baseline, depth, colour, name, scale):
    """Draw a dashed line over layers, or straight across if the baseline is a single score."""
    scores = rows[rows.layer != "best"].groupby("x").score.mean()
    if len(scores) == 1:
        scores = pd.Series(scores.iloc[0], index=[0.0, depth])
    if len(scores):
        line = {"color": colour, "dash": DASHES[baseline], "width": 1.5}
        names = {"name": baseline.replace("_", " "), "legendgroup": name}
        figure.add_scatter(x=scores.index / scale, y=scores, mode="lines", line=line, **names)


def heat_figure(rows, metric):
    """Plot the score of each layer x pooling as a heat map."""
    grid = rows.pivot_table("score", "pooling", "layer", observed=True)
    quantile = rows.drop_duplicates("pooling").set_index("pooling")["quantile"]
    poolings = sorted(grid.index, key=lambda pooling: natural(quantile[pooling]))
    grid = grid.loc[poolings, sorted(grid.columns, key=natural)]
    text = ".2f" if grid.size <= 150 else False
    options = {"origin": "lower", "aspect": "auto", "color_continuous_scale": "Viridis"}
    figure = px.imshow(grid, text_auto=text, labels={"color": metric}, **options)
    return figure.update_xaxes(type="category").update_yaxes(title=None)


def size_figure(rows, x, label, metric):
    """Plot scores over log size: a line per probe, and per model unless x is the model size."""
    rows = rows.sort_values(x).assign(up=rows.high - rows.score, down=rows.score - rows.low)
    rows["curve"] = rows.probe.astype(str)
    if x != "params":
        rows["curve"] = rows.model.astype(str) + " · " + rows.curve
    errors = {"error_y": "up", "error_y_minus": "down", "hover_data": ["model", "layer"]}
    labels = {x: label, "score": metric}
    colours = {"color": "curve", "color_discrete_sequence": COLOURS}
    figure = px.line(rows, x, "score", log_x=True, markers=True, labels=labels, **errors, **colours)
    line = {"color": GREY, "dash": "dot"}
    return figure.add_hline(rows.chance.mean(), line=line, annotation_text="chance")


def roc_figure(y, score, at):
    """Plot the ROC curve and the threshold on it, at (fpr, tpr)."""
    fpr, tpr, _ = metrics.roc_curve(y, score)
    thin = np.unique(np.linspace(0, len(fpr) - 1, 2000).astype(int))
    figure = px.line(x=fpr[thin], y=tpr[thin], color_discrete_sequence=COLOURS)
    figure.add_scatter(x=[0, 1], y=[0, 1], line={"color": GREY, "dash": "dot"}, hoverinfo="skip")
    figure.add_scatter(x=[at[0]], y=[at[1]], marker={"size": 13, "color": COLOURS[1]})
    axes = {"xaxis_title": "false positive rate", "yaxis_title": "true positive rate"}
    return figure.update_layout(showlegend=False, **axes)


def agreement_figure(table):
    """Plot predictions against labels: a confusion matrix for classes, a scatter for values."""
    if not are_classes(table):
        text = hover_texts(table)
        labels = {"y": "label", "score": "prediction"}
        return px.scatter(table, "y", "score", hover_name=text, opacity=0.5, labels=labels)
    names = dict(zip(table.y, table.label))
    counts = pd.crosstab(table.y, table.score).rename(index=names, columns=names)
    labels = {"x": "predicted", "y": "label", "color": "texts"}
    return px.imshow(counts, origin="lower", text_auto=True, labels=labels)


def are_classes(table):
    """Return whether labels and scores are whole numbers, as those of several classes are."""
    return bool((table.y % 1 == 0).all() and (table.score % 1 == 0).all())


def hover_texts(table):
    """Wrap and escape the texts for hover labels."""
    texts = []
    for text in table.text.fillna(""):
        texts.append("<br>".join(html.escape(line) for line in textwrap.wrap(text[:400], 60)))
    return texts


# ---- tabs


def layers_tab(rows, choice):
    """Show curves over layers with dashed baselines, and layers x poolings if there are several."""
    rows = full_size(rows)
    best = rows[(rows.layer == "best") & rows.baseline.isin(["", "random_init"])]
    rows = rows[rows.layer != "best"]
    label = "depth relative to the model's number of layers"
    relative = st.toggle(label, key="relative", bind="query-params")
    show(layer_figure(rows, choice, relative), "layer_curve", choice["title"], 480)
    st.caption(
        "Bands are 95 % intervals. Filled marks: p < .05, Holm-corrected over all layers and "
        "poolings. Dashed: the same model with random weights; a control task, which only "
        "memorised words can solve; layer 0, a bag of embeddings; the majority label."
    )
    if len(best):
        st.markdown("**Scores at the layer chosen on each fold's validation texts**")
        columns = ["model", "probe", "baseline", "score", "low", "high", "chance", "p", "n"]
        st.dataframe(best[columns], hide_index=True, key="best")
    cells = rows[(rows.baseline == "") & (rows.layer_method == "")]
    cells = cells[cells["quantile"] != "attention"]
    for (model, probe), part in cells.groupby(["model", "probe"], observed=True):
        if part.pooling.nunique() > 1:
            title = f"{choice['title']}: {model}, {probe}"
            show(heat_figure(part, choice["metric"]), f"heat_{model}_{probe}", title)


def pick(sites, columns, empty):
    """Let the user select one site and return its path, or None if there are no sites."""
    if not len(sites):
        st.info(empty)
        return None
    for column, box in zip(columns, st.columns(len(columns))):
        options = values_of(sites[column])
        last = len(options) - 1 if column in ("layer", "quantile") else 0
        names = {"key": f"site_{column}", "bind": "query-params"}
        choice = box.selectbox(column.capitalize(), options, index=last, **names)
        sites = sites[sites[column] == choice]
    return sites.path.iloc[0]


def decision_tab(run, path, note):
    """Show the ROC curve and both classes' scores at a threshold that the user moves."""
    table, start = read_scores(run, path)
    title = f"out-of-fold scores, n = {len(table)}{note}"
    if set(table.y.unique()) != {0, 1}:
        if not are_classes(table):
            title = f"Pearson r = {table.y.corr(table.score):.3f}, {title}"
        show(agreement_figure(table), "agreement", title, 520)
        return
    low = float(table.score.min())
    high = float(table.score.max())
    if high == low:
        high = low + 1.0
    if not np.isfinite(start):
        start = (low + high) / 2
    start = min(max(start, low), high)
    label = "Threshold (starts at the probe's own, set on validation texts)"
    options = {"step": (high - low) / 500, "format": "%.3f", "bind": "query-params"}
    threshold = st.slider(label, low, high, start, key="threshold", **options)
    y = table.y
    predicted = (table.score >= threshold).astype(int)
    tpr = metrics.recall_score(y, predicted)
    fpr = 1 - metrics.recall_score(y, predicted, pos_label=0)
    numbers = {
        "Accuracy": metrics.accuracy_score(y, predicted),
        "Balanced accuracy": (tpr + 1 - fpr) / 2,
        "F1": metrics.f1_score(y, predicted),
        "True positive rate": tpr,
        "False positive rate": fpr,
    }
    for box, (name, value) in zip(st.columns(len(numbers)), numbers.items()):
        box.metric(name, f"{value:.3f}")
    left, right = st.columns(2)
    with left:
        area = metrics.roc_auc_score(y, table.score)
        show(roc_figure(y, table.score, (fpr, tpr)), "roc", f"ROC, area {area:.3f}{note}")
    with right:
        options = {"color": "label", "nbins": 40, "barmode": "overlay", "opacity": 0.6}
        table["label"] = table.label.fillna(y.astype(str))
        figure = px.histogram(table.sort_values("y"), "score", **options)
        show(figure.add_vline(threshold, line_dash="dash"), "histogram", title)


def examples_tab(run, path):
    """Show every text with its out-of-fold score."""
    table, threshold = read_scores(run, path)
    if set(table.y.unique()) <= {0, 1}:
        cut = threshold if np.isfinite(threshold) else 0.5
        table["predicted"] = (table.score >= cut).astype(int)
    elif are_classes(table):
        table["predicted"] = table.score
    if "predicted" in table:
        table["right"] = table.predicted == table.y
    left, right = st.columns([3, 1])
    words = left.text_input("Texts containing", key="contains", bind="query-params")
    if "right" in table and right.toggle("mistakes only", key="mistakes", bind="query-params"):
        table = table[~table.right]
    if words:
        table = table[table.text.fillna("").str.contains(words, case=False, regex=False)]
    st.caption(f"{len(table):,} texts, each scored by a probe that was not trained on it.")
    order = ["text", "label", "score", "predicted", "right", "y", "fold", "index"]
    table = table[[column for column in order if column in table]]
    show_table(table, f"{path.stem}.csv", "Download as CSV")


def show_table(table, file, label):
    """Show a scrolling table and a button that downloads it as the CSV `file`."""
    lazy = True if len(table) > 5000 else None
    st.dataframe(table, hide_index=True, width="stretch", height=480, lazy=lazy)
    names = {"mime": "text/csv", "on_click": "ignore"}
    st.download_button(label, lambda: table.to_csv(index=False), file, **names)


def projection_tab(run, path, note):
    """Show up to 5,000 texts in the plane of a layer's first two principal components."""
    arrays = read_arrays(path, mtime(path))
    texts = run / "texts" / f"{path.stem.rsplit('__', 3)[1]}.csv"
    table = pd.DataFrame(arrays["xy"], columns=["x", "y"]).assign(index=arrays["index"])
    table = table.sample(min(len(table), 5000), random_state=0)
    table = table.join(read_texts(texts, mtime(texts)), on="index").fillna("")
    numbers = pd.to_numeric(table.label, errors="coerce")
    if numbers.notna().all() and numbers.nunique() > 20:
        table["label"] = numbers
    options = {"color": "label", "opacity": 0.75, "render_mode": "webgl"}
    figure = px.scatter(table, "x", "y", hover_name=hover_texts(table), **options)
    shares = "{:.0%} and {:.0%} of the variance".format(*arrays["explained"])
    show(figure, "projection", f"first two principal components, {shares}{note}", 620)


def sizes_tab(rows, choice):
    """Show scores over sizes, at the layer chosen on validation folds or the only layer."""
    real = rows[rows.baseline == ""]
    if (real.layer == "best").any():
        real = real[real.layer == "best"]
    title = choice["title"]
    metric = choice["metric"]
    if real.duplicated(["model", "probe", "n_train"]).any():
        st.info(f"There is no {metric} at a layer chosen on validation texts: see Layers.")
        return
    full = full_size(real)
    if full.groupby("model", observed=True).params.first().nunique() > 1:
        figure = size_figure(full, "params", "parameters", metric)
        show(figure, "model_size", f"{title}: model size")
    else:
        st.info("A curve over model sizes needs two models: `python probe.py lm=gpt2,gpt2-medium`.")
    many = real.groupby(["model", "probe"], observed=True).n_train.transform("nunique") > 1
    if many.any():
        figure = size_figure(real[many], "n_train", "training texts", metric)
        show(figure, "sample_size", f"{title}: number of training texts")
    else:
        st.info("A curve over training texts needs `python probe.py train_sizes=100,300,1000`.")
    st.caption("Scores at the layer chosen on validation texts. Bars are 95 % intervals.")


# ---- the app


def choose_run(bar):
    """Return the folder and table chosen in the side bar; else say why, and return (None, None)."""
    out = Path("out")
    for argument in sys.argv[1:]:
        if argument.lstrip("-").startswith("out_dir="):
            out = Path(argument.split("=", 1)[1])
    runs = find_runs(out)
    if not runs:
        st.info(f"There are no results in `{out}` yet. Run this, then reload the page:")
        st.code("python probe.py", language="bash")
        return None, None
    run = runs[bar.selectbox("Results", list(runs), key="results", bind="query-params")]
    path = run / "results.csv"
    try:
        table = read_results(path, mtime(path))
    except ValueError as error:
        st.error(str(error))
        return None, None
    if not len(table):
        st.info(f"`{path}` holds no scores yet. Continue with:")
        st.code("python probe.py", language="bash")
        return None, None
    return run, table


def choose_rows(bar, table):
    """Return the rows that the side bar selects, and its choices."""
    names = values_of(table.dataset)
    dataset = bar.selectbox("Dataset", names, key="dataset", bind="query-params")
    rows = table[table.dataset == dataset]
    names = sorted(rows.metric.unique(), key=lambda name: name not in ("accuracy", "pearson"))
    metric = bar.selectbox("Metric", names, key="metric", bind="query-params")
    rows = rows[rows.metric == metric]
    real = rows[(rows.baseline == "") & (rows.layer != "best")]
    baselines = [name for name in DASHES if (rows.baseline == name).any()]
    options = {key: values_of(real[key]) for key in ("model", "probe", "pooling")}
    last_token = [name for name in options["pooling"] if name == "last token"]
    start = {"model": options["model"][:3], "probe": options["probe"][:2]}
    start |= {"pooling": last_token or options["pooling"][:1], "baseline": baselines}
    choice = {"dataset": [dataset], "metric": metric}
    for key, names in {**options, "baseline": baselines}.items():
        bind = {"key": key, "bind": "query-params"}
        choice[key] = bar.multiselect(key.capitalize(), names, default=start[key], **bind)
    chosen = rows.model.isin(choice["model"]) & rows.probe.isin(choice["probe"])
    return rows[chosen], choice


def site_tab(run, name, choice, note):
    """Let the user pick a site, then draw the tab on it."""
    columns = ["model", "dataset", "probe", "layer", "quantile"]
    if name == "Projection":
        columns.remove("probe")
    folder = run / ("projections" if name == "Projection" else "predictions")
    sites = find_sites(folder, columns, choice)
    columns.remove("dataset")
    path = pick(sites, columns, f"No {folder.name} were kept for this choice of model and probe.")
    if path and name == "Decision":
        decision_tab(run, path, note)
    elif path and name == "Examples":
        examples_tab(run, path)
    elif path:
        projection_tab(run, path, note)


def draw_tabs(run, rows, choice, note):
    """Lay out six tabs and draw only the open one."""
    names = ["Layers", "Decision", "Examples", "Projection", "Sizes", "Table"]
    tabs = st.tabs(names, key="view", bind="query-params", on_change="rerun")
    for name, tab in zip(names, tabs):
        if not tab.open:
            continue
        with tab:
            if name == "Layers":
                layers_tab(rows, choice)
            elif name == "Sizes":
                sizes_tab(rows, choice)
            elif name == "Table":
                table = rows.drop(columns=rows.columns.intersection(["options", "pooling"]))
                show_table(table, "probe.csv", "Download this selection as CSV")
            else:
                site_tab(run, name, choice, note)


def app():
    """Draw the page: menus in the side bar and a tab per view."""
    st.set_page_config(page_title="probe", layout="wide")
    st.title("What do the hidden layers know?")
    run, table = choose_run(st.sidebar)
    if run is None:
        return
    rows, choice = choose_rows(st.sidebar, table)
    note = ""
    if run == EXAMPLE:
        st.info("This example comes with the code. For your own results, run `python probe.py`.")
    if rows.synthetic.any():
        note = " (synthetic data)"
        st.caption(f"**{choice['dataset'][0]}** is synthetic, generated by rules.")
    choice["title"] = choice["dataset"][0] + note
    if choice["model"] and choice["probe"] and choice["pooling"]:
        draw_tabs(run, rows, choice, note)
    else:
        st.warning("Choose at least one model, one probe and one pooling in the side bar.")


app()
