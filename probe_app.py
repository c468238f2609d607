"""The app of probe.py: look at what its runs left under out/.

    streamlit run probe_app.py [-- out_dir=path/to/runs]

Layer curves with 95 % bands and every baseline, layers x poolings, scores under a threshold that
you move, each text with its out-of-fold score, texts in the plane of two components, curves over
training texts and model sizes, and the numbers as CSV. Every choice stands in the address, so a
link shows what you see. Streamlit runs this file from its top at each click: it stays light, and
loads neither torch nor transformers.
"""

import html
import os
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st
from sklearn import metrics

EXAMPLE = Path(__file__).resolve().parent / "data/probing/example"
NAMES = ["model", "dataset", "probe", "baseline", "layer", "quantile", "metric"]
NUMBERS = ["score", "chance", "low", "high", "n", "n_train", "params", "p", "p_holm"]
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8172B3", "#937860"]
GREY = "#888888"
DASHES = {
    "random_init": "dash",
    "control": "dot",
    "layer0": "dashdot",
    "majority": "longdash",
}


# ---- reading; the time a file was written is an argument, so that a new file is read again

cached = st.cache_data(show_spinner=False, max_entries=64)


def mtime(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def find_runs(out):
    """{name: folder} of `out` itself and the runs in it, newest first, and the bundled example."""
    paths = [out / "results.csv", *out.glob("*/results.csv")]
    paths = [path for path in paths if path.exists() and is_of_probe(path, mtime(path))]
    runs = {}
    for path in sorted(paths, key=mtime, reverse=True):
        runs[os.path.relpath(path.parent)] = path.parent
    if (EXAMPLE / "results.csv").exists():
        runs["bundled example"] = EXAMPLE
    return runs


@cached
def is_of_probe(path, stamp):
    """Whether the header of a results.csv is probe.py's: other scripts write such tables, too."""
    with open(path, encoding="utf-8", errors="replace") as file:
        header = file.readline().strip().split(",")
    return {*NAMES, *NUMBERS[:5]} <= set(header)


@cached
def read_results(path, stamp):
    """results.csv as a DataFrame: names are categories, `pooling` says quantile and methods."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        if not isinstance(table.index, pd.RangeIndex):  # rows longer than the header
            raise ValueError("more fields than columns")
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is broken ({reason}): write it again with probe.py") from None
    for column in NUMBERS:
        numbers = table.get(column, pd.Series(np.nan, table.index))
        table[column] = pd.to_numeric(numbers, errors="coerce")
    for column in ("layer_method", "quantile_method", "synthetic"):
        table[column] = table[column].replace("None", "") if column in table else ""
    table["synthetic"] = table.synthetic.isin(["True", "true", "1"])
    how = ["quantile", "quantile_method", "layer_method"]
    pooling = table[how].drop_duplicates()
    pooling["pooling"] = [pooling_name(*names) for names in pooling.itertuples(index=False)]
    table = table.merge(pooling, how="left", on=how)
    for column in table.columns.difference([*NUMBERS, "synthetic"]):
        table[column] = table[column].astype("category")
    return table[np.isfinite(table.score)]


def pooling_name(quantile, quantile_method, layer_method):
    words = {"": "none", "all": "all tokens", "0.0": "first token", "1.0": "last token"}
    words |= {"best": "best", "attention": ""}
    parts = [words.get(quantile, f"quantile {quantile}"), quantile_method]
    if layer_method:
        parts.append(f"layers {layer_method}")
    return ", ".join(part for part in parts if part)


@cached
def read_arrays(path, stamp):
    with np.load(path) as file:
        return dict(file)


@cached
def read_texts(path, stamp):
    """texts/DATASET.csv: text and label, by index; empty where there is none."""
    if not path.exists():
        empty = pd.Index([], dtype="int64")
        return pd.DataFrame({"text": [], "label": []}, dtype=str, index=empty)
    text = {"text": str, "label": str}
    return pd.read_csv(path, dtype=text, keep_default_na=False).set_index("index")


def read_scores(run, path):
    """Out-of-fold scores of one site with text and label, and the probe's own threshold or NaN."""
    arrays = read_arrays(path, mtime(path))
    columns = {name: arrays[name] for name in ("index", "y", "score", "fold") if name in arrays}
    texts = run / "texts" / f"{path.stem.rsplit('__', 4)[1]}.csv"
    table = pd.DataFrame(columns).join(read_texts(texts, mtime(texts)), on="index")
    return table, float(np.mean(arrays.get("threshold", np.nan)))


def find_sites(folder, columns):
    """DataFrame of the files of a folder whose names are these columns joined by '__'."""
    rows = []
    for path in sorted(folder.glob("*.npz")):
        names = path.stem.rsplit("__", len(columns) - 1)
        if len(names) == len(columns):
            rows.append([*names, str(path)])
    return pd.DataFrame(rows, columns=[*columns, "path"])


def slug(name):
    return str(name).replace("/", "-")


# ---- choosing rows


def natural(value):
    """Sort key: numbers by size, then ranges like 3-5, then words."""
    numbers = [float(number) for number in re.findall(r"\d+\.?\d*", str(value))]
    return (len(numbers) or 99, numbers, str(value))


def values_of(column):
    return sorted((value for value in column.unique() if value != ""), key=natural)


def full_size(rows):
    """Rows at the usual number of training texts of their kind: no points of a size curve."""
    kind = ["model", "probe", "baseline"]
    counts = rows.groupby([*kind, "n_train"], observed=True).size().reset_index(name="count")
    counts = counts.sort_values(["count", "n_train"]).drop_duplicates(kind, keep="last")
    usual = rows[kind].merge(counts, how="left", on=kind).n_train.to_numpy()
    return rows[np.isnan(usual) | rows.n_train.isna() | (rows.n_train == usual)]


def last_layer(rows):
    """The deepest single layer among the rows; 1 where there is none."""
    layers = pd.to_numeric(rows.layer.astype(str), errors="coerce")
    return max(layers.max(), 1.0) if layers.notna().any() else 1.0


def with_places(rows):
    """Rows with x, the place of their layers, and their reach: '4' 4 ± 0, '3-5' 4 ± 1."""
    depth = last_layer(rows)
    middle, reach = {}, {}
    for layer in rows.layer.unique():
        ends = [float(number) for number in re.findall(r"\d+\.?\d*", str(layer))] or [1.0, depth]
        middle[layer] = (min(ends) + max(ends)) / 2
        reach[layer] = (max(ends) - min(ends)) / 2
    layer = rows.layer.astype(object)
    return rows.assign(x=layer.map(middle).astype(float), reach=layer.map(reach).astype(float))


# ---- figures


def canvas(title, x, y, height=420, **layout):
    """An empty figure; the legend stands below it, where a phone has room."""
    legend = {"orientation": "h", "y": -0.2}
    margin = {"l": 50, "r": 10, "t": 60, "b": 40}
    axes = {"xaxis_title": x, "yaxis_title": y, "legend": legend, "margin": margin}
    return go.Figure(layout={"title": title, "height": height, **axes, **layout})


def show(figure, key):
    st.plotly_chart(figure, key=key, width="stretch")


def faint(colour, alpha=0.15):
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


HOVER = (
    "layer %{customdata[0]}: <b>%{y:.3f}</b> [%{customdata[1]:.3f}, %{customdata[2]:.3f}], "
    "n %{customdata[3]:.0f}, p (Holm) %{customdata[4]:.2g}"
)


def layer_figure(rows, poolings, baselines, title, metric, relative):
    """Scores by layer, a colour for each model, probe and pooling; baselines are dashed."""
    x_title = "depth (share of layers)" if relative else "layer (0: embeddings)"
    figure = canvas(title, x_title, metric, 480)
    rows = with_places(rows)
    real = rows[(rows.baseline == "") & rows.pooling.isin(poolings)]
    for i, (names, part) in enumerate(real.groupby(["model", "probe", "pooling"], observed=True)):
        name = " · ".join(names if len(poolings) > 1 else names[:2])
        scale = last_layer(part) if relative else 1.0
        colour = COLOURS[i % len(COLOURS)]
        draw_curve(figure, part.drop_duplicates("layer").sort_values("x"), scale, name, colour)
        beside = rows[(rows.model == names[0]) & (rows.probe == names[1])]
        for baseline in set(baselines) - {"majority"}:
            extra = beside[beside.baseline == baseline]
            if baseline != "layer0":
                extra = extra[extra.pooling == names[2]]
            draw_baseline(figure, extra, baseline, last_layer(part), scale, name, colour)
    end = [0, 1 if relative else last_layer(real)]
    levels = {"chance": real.chance.mean()}
    if "majority" in baselines:
        levels["majority"] = rows.score[rows.baseline == "majority"].mean()
    for name, level in levels.items():
        if np.isfinite(level):
            line = {"color": GREY, "dash": DASHES.get(name, "dot"), "width": 1.5}
            figure.add_scatter(x=end, y=[level] * 2, mode="lines", line=line, name=name)
    return figure


def draw_curve(figure, part, scale, name, colour):
    """Single layers as a line with a band, filled marks where p < .05; joined ones as bars."""
    single, joined = part[part.reach == 0], part[part.reach > 0]
    hover = ["layer", "low", "high", "n", "p_holm"]
    x = single.x / scale
    same = {"legendgroup": name, "hovertemplate": f"{HOVER}<extra>{name}</extra>"}
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
        **same,
    )
    if len(joined):
        figure.add_scatter(
            x=joined.x / scale,
            y=joined.score,
            mode="markers",
            marker={"symbol": "line-ew-open", "color": colour},
            error_x={"array": joined.reach / scale, "thickness": 2},
            showlegend=False,
            customdata=joined[hover].astype(object),
            **same,
        )


def draw_baseline(figure, rows, baseline, depth, scale, name, colour):
    """A dashed line over layers, or all the way where it is one number."""
    rows = rows[(rows.layer != "best") & (rows.reach == 0)].groupby("x").score.mean()
    if len(rows) == 1:
        rows = pd.Series([rows.iloc[0]] * 2, index=[0.0, depth])
    if len(rows):
        figure.add_scatter(
            x=rows.index / scale,
            y=rows,
            mode="lines",
            line={"color": colour, "dash": DASHES[baseline], "width": 1.5},
            name=baseline.replace("_", " "),
            legendgroup=name,
            hovertemplate="%{y:.3f}",
        )


def heat_figure(rows, title, metric):
    """Layer x pooling, the score of each cell."""
    grid = rows.pivot_table(
        index="pooling", columns="layer", values="score", aggfunc="mean", observed=True
    )
    quantile = rows.drop_duplicates("pooling").set_index("pooling")["quantile"]
    poolings = sorted(grid.index, key=lambda pooling: natural(quantile[pooling]))
    grid = grid.loc[poolings, sorted(grid.columns, key=natural)]
    figure = canvas(title, "layer", "", 380, xaxis_type="category", yaxis_type="category")
    return figure.add_heatmap(
        z=grid.to_numpy(),
        x=[str(layer) for layer in grid.columns],
        y=[str(pooling) for pooling in grid.index],
        colorscale="Viridis",
        colorbar_title=metric,
        texttemplate="%{z:.2f}" if grid.size <= 150 else None,
        hovertemplate="layer %{x}, %{y}: <b>%{z:.3f}</b><extra></extra>",
    )


def size_figure(rows, x, title, label, metric):
    """Scores over a size, on a logarithmic axis; of models, a line for each probe."""
    figure = canvas(title, label, metric, xaxis_type="log")
    kind = ["probe"] if x == "params" else ["model", "probe"]
    for i, (names, part) in enumerate(rows.groupby(kind, observed=True)):
        part, colour = part.sort_values(x), COLOURS[i % len(COLOURS)]
        up, down = part.high - part.score, part.score - part.low
        figure.add_scatter(
            x=part[x],
            y=part.score,
            name=" · ".join(names),
            mode="lines+markers",
            line_color=colour,
            error_y={"array": up, "arrayminus": down, "color": faint(colour, 0.6)},
            customdata=part[["model", "layer"]].astype(object),
            hovertemplate="%{customdata[0]}, layer %{customdata[1]}: <b>%{y:.3f}</b>",
        )
    line = {"color": GREY, "dash": "dot"}
    figure.add_hline(rows.chance.mean(), line=line, annotation_text="chance")
    return figure


def roc_figure(y, score, at, note):
    """The ROC curve, and the place (fpr, tpr) of the threshold on it."""
    fpr, tpr, _ = metrics.roc_curve(y, score)
    thin = np.unique(np.linspace(0, len(fpr) - 1, 2000).astype(int))
    title = f"ROC, area {metrics.roc_auc_score(y, score):.3f}{note}"
    figure = canvas(title, "false positive rate", "true positive rate", showlegend=False)
    figure.add_scatter(x=[0, 1], y=[0, 1], line={"color": GREY, "dash": "dot"}, hoverinfo="skip")
    figure.add_scatter(x=fpr[thin], y=tpr[thin], line={"color": COLOURS[0], "width": 2.5})
    marker = {"size": 13, "color": COLOURS[1]}
    return figure.add_scatter(x=[at[0]], y=[at[1]], marker=marker, mode="markers")


def histogram_figure(table, threshold, low, high, note):
    """Scores of both classes, and the threshold."""
    edges = np.linspace(low, high, 41)
    title = f"out-of-fold scores, n = {len(table)}{note}"
    figure = canvas(title, "score", "texts", barmode="overlay", bargap=0)
    for label in (0, 1):
        part = table[table.y == label]
        names = part.label.dropna().unique()
        figure.add_bar(
            x=(edges[1:] + edges[:-1]) / 2,
            y=np.histogram(part.score, edges)[0],
            opacity=0.6,
            marker_color=COLOURS[1 - label],
            name=names[0] if len(names) == 1 else str(label),
        )
    figure.add_vline(threshold, line={"color": "#333333", "dash": "dash"})
    return figure


def agreement_figure(table, note):
    """Predictions against labels: a confusion matrix of classes, a cloud of values."""
    if are_classes(table) and table.y.nunique() <= 50:
        counts = pd.crosstab(table.y, table.score)
        names = dict(zip(table.y, table.label))
        title = f"predicted label against label, n = {len(table)}{note}"
        axes = {"xaxis_type": "category", "yaxis_type": "category"}
        return canvas(title, "predicted", "label", 520, **axes).add_heatmap(
            z=counts,
            x=[str(names.get(number, number)) for number in counts.columns],
            y=[str(names.get(number, number)) for number in counts.index],
            colorscale="Blues",
            texttemplate="%{z}",
        )
    r = table.y.corr(table.score)
    title = f"prediction against label, Pearson r = {r:.3f}, n = {len(table)}{note}"
    marker = {"size": 5, "color": COLOURS[0], "opacity": 0.5}
    return canvas(title, "label", "prediction", 520).add_scattergl(
        x=table.y, y=table.score, mode="markers", marker=marker, text=hover_texts(table)
    )


def are_classes(table):
    return bool((table.y % 1 == 0).all() and (table.score % 1 == 0).all())


def hover_texts(table):
    """Texts wrapped and escaped for the label of a point."""
    texts = []
    for text in table.text.fillna(""):
        texts.append("<br>".join(html.escape(line) for line in textwrap.wrap(text[:400], 60)))
    return texts


# ---- tabs


def layers_tab(rows, choice):
    """Curves over layers, baselines dashed; layers x poolings where several were probed."""
    rows = full_size(rows)
    best = rows[(rows.layer == "best") & rows.baseline.isin(["", "random_init"])]
    rows = rows[rows.layer != "best"]
    label = "depth as a share of the model's layers"
    relative = st.toggle(label, key="relative", bind="query-params")
    title, metric = choice["title"], choice["metric"]
    curves = (choice["poolings"], choice["baselines"], title, metric, relative)
    show(layer_figure(rows, *curves), "layer_curve")
    st.caption(
        "Bands are 95 % intervals. Filled marks: p < .05 after Holm's correction over all layers "
        "and poolings. Dashed: the same model with random weights; a control task, whose labels "
        "only knowing words by heart can give; layer 0, a bag of embeddings; the majority label."
    )
    if len(best):
        st.markdown("**The layer that each fold's validation texts liked best**")
        columns = ["model", "probe", "baseline", "score", "low", "high", "chance", "p", "n"]
        st.dataframe(best[columns], hide_index=True, key="best")
    cells = rows[(rows.baseline == "") & (rows.layer_method == "")]
    cells = cells[cells["quantile"] != "attention"]
    for (model, probe), part in cells.groupby(["model", "probe"], observed=True):
        if part.pooling.nunique() > 1:
            figure = heat_figure(part, f"{title}: {model}, {probe}", metric)
            show(figure, f"heat_{model}_{probe}")


def pick(sites, columns, empty):
    """Select boxes that narrow the sites down to the path of one; None where there are none."""
    if not len(sites):
        st.info(empty)
        return None
    for column, box in zip(columns, st.columns(len(columns))):
        options = values_of(sites[column])
        last = len(options) - 1 if column in ("layer", "quantile") else 0
        names = {"key": f"site_{column}", "bind": "query-params"}
        choice = box.selectbox(column.capitalize(), options, index=last, **names)
        sites = sites[sites[column] == choice]
    return Path(sites.path.iloc[0])


def decision_tab(run, path, note):
    """ROC, and the scores of both classes under a threshold that the user moves."""
    table, start = read_scores(run, path)
    if set(table.y.unique()) != {0, 1}:
        show(agreement_figure(table, note), "agreement")
        return
    low, high = float(table.score.min()), float(table.score.max())
    if not np.isfinite(start):
        start = (low + high) / 2
    start = min(max(start, low), high)
    high = high if high > low else low + 1.0
    threshold = st.slider(
        "Threshold (the probe's own was found on its validation texts)",
        low,
        high,
        start,
        step=(high - low) / 500,
        format="%.3f",
        key="threshold",
        bind="query-params",
    )
    y, predicted = table.y, (table.score >= threshold).astype(int)
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
        show(roc_figure(y, table.score, (fpr, tpr), note), "roc")
    with right:
        show(histogram_figure(table, threshold, low, high, note), "histogram")


def examples_tab(run, path):
    """Every text with its out-of-fold score."""
    table, threshold = read_scores(run, path)
    if set(table.y.unique()) <= {0, 1}:
        cut = threshold if np.isfinite(threshold) else 0.5
        table["predicted"] = (table.score >= cut).astype(int)
    elif are_classes(table):
        table["predicted"] = table.score
    if "predicted" in table:
        table["right"] = table.predicted == table.y
    left, right = st.columns([3, 1])
    words = left.text_input("Texts that contain", key="contains", bind="query-params")
    if "right" in table and right.toggle("only mistakes", key="mistakes", bind="query-params"):
        table = table[~table.right]
    if words:
        table = table[table.text.fillna("").str.contains(words, case=False, regex=False)]
    st.caption(f"{len(table):,} texts, each scored by a probe that had not seen it.")
    order = ["text", "label", "score", "predicted", "right", "y", "fold", "index"]
    table = table[[column for column in order if column in table]]
    show_table(table, f"{path.stem}.csv", "Download as CSV")


def show_table(table, file, label):
    lazy = True if len(table) > 5000 else None
    st.dataframe(table, hide_index=True, width="stretch", height=480, lazy=lazy)
    names = {"mime": "text/csv", "on_click": "ignore"}
    st.download_button(label, lambda: table.to_csv(index=False), file, **names)


def projection_tab(run, path, dataset, note):
    """Texts in the plane of a layer's first two components; a browser shows 5,000 of them."""
    arrays = read_arrays(path, mtime(path))
    x, y = arrays["xy"].T
    texts = run / "texts" / f"{dataset}.csv"
    table = pd.DataFrame({"x": x, "y": y, "index": arrays["index"]})
    table = table.sample(min(len(table), 5000), random_state=0)
    table = table.join(read_texts(texts, mtime(texts)), on="index").fillna({"label": ""})
    shares = "{:.0%} and {:.0%} of the variance".format(*arrays["explained"])
    title = f"first two principal components, {shares}{note}"
    figure = canvas(title, "component 1", "component 2", 620)
    numbers = pd.to_numeric(table.label, errors="coerce")
    groups = [(label, table[table.label == label]) for label in values_of(table.label)]
    colours = [{"color": COLOURS[i % len(COLOURS)]} for i in range(len(groups))]
    if numbers.notna().all() and numbers.nunique() > 20:
        groups = [("", table)]
        colours = [{"color": numbers, "colorscale": "Viridis", "showscale": True}]
    for (label, part), colour in zip(groups or [("", table)], colours or [{}]):
        marker = {"size": 6, "opacity": 0.75, **colour}
        points = {"x": part.x, "y": part.y, "text": hover_texts(part), "hoverinfo": "text+name"}
        figure.add_scattergl(**points, mode="markers", name=label, marker=marker)
    show(figure, "projection")


def sizes_tab(rows, choice):
    """At the layer chosen on validation folds; where there is but one layer, at that one."""
    real = rows[rows.baseline == ""]
    if (real.layer == "best").any():
        real = real[real.layer == "best"]
    title, metric = choice["title"], choice["metric"]
    full = full_size(real)
    if full.groupby("model", observed=True).params.first().nunique() > 1:
        figure = size_figure(full, "params", f"{title}: size of the model", "parameters", metric)
        show(figure, "model_size")
    else:
        command = "`python probe.py lm=gpt2,gpt2-medium`"
        st.info(f"A curve over model sizes needs two models of different size: {command}.")
    many = real.groupby(["model", "probe"], observed=True).n_train.transform("nunique") > 1
    if many.any():
        name = f"{title}: number of training texts"
        figure = size_figure(real[many], "n_train", name, "training texts", metric)
        show(figure, "sample_size")
    else:
        command = "`python probe.py train_sizes=100,300,1000`"
        st.info(f"A curve over numbers of training texts needs several: {command}.")
    st.caption("At the layer that validation texts chose. Bars are 95 % intervals.")


# ---- the app


def choose_run(bar):
    """The folder and the table that the side bar names; (None, None), and why, without one."""
    out = Path("out")
    for argument in sys.argv[1:]:
        if argument.lstrip("-").startswith("out_dir="):
            out = Path(argument.split("=", 1)[1])
    runs = find_runs(out)
    if not runs:
        st.info(f"There are no results under `{out}` yet. Make some and reload this page:")
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
        st.info(f"`{path}` holds no scores yet. Go on with:")
        st.code("python probe.py", language="bash")
        return None, None
    return run, table


def choose_rows(bar, table):
    """The rows that the side bar narrows the table down to, and its choices."""

    def choose(label, options, default):
        key = {"key": label.lower(), "bind": "query-params"}
        return bar.multiselect(label, options, default=default, **key)

    names = values_of(table.dataset)
    dataset = bar.selectbox("Dataset", names, key="dataset", bind="query-params")
    rows = table[table.dataset == dataset]
    names = values_of(rows.metric)
    index = names.index("accuracy") if "accuracy" in names else 0
    metric = bar.selectbox("Metric", names, index=index, key="metric", bind="query-params")
    rows = rows[rows.metric == metric]
    real = rows[(rows.baseline == "") & (rows.layer != "best")]
    models, probes, poolings = (values_of(real[key]) for key in ("model", "probe", "pooling"))
    choice = {"dataset": dataset, "metric": metric}
    choice["models"] = choose("Model", models, models[:3])
    choice["probes"] = choose("Probe", probes, probes[:2])
    usual = ["last token"] if "last token" in poolings else poolings[:1]
    choice["poolings"] = choose("Pooling", poolings, usual)
    baselines = [name for name in DASHES if (rows.baseline == name).any()]
    choice["baselines"] = choose("Baseline", baselines, baselines)
    rows = rows[rows.model.isin([*choice["models"], ""])]
    return rows[rows.probe.isin([*choice["probes"], ""])], choice


def draw_tabs(run, rows, choice, note):
    """Six tabs, of which only the open one is drawn."""
    names = ["Layers", "Decision", "Examples", "Projection", "Sizes", "Table"]
    tabs = st.tabs(names, key="view", bind="query-params", on_change="rerun")
    is_open = [name for name, tab in zip(names, tabs) if tab.open]
    dataset = slug(choice["dataset"])
    models = [slug(model) for model in choice["models"]]
    for name in is_open:
        with tabs[names.index(name)]:
            if name == "Layers":
                layers_tab(rows, choice)
            elif name in ("Decision", "Examples"):
                columns = ["model", "dataset", "probe", "layer", "quantile"]
                sites = find_sites(run / "predictions", columns)
                sites = sites[(sites.dataset == dataset) & sites.model.isin(models)]
                sites = sites[sites.probe.isin([slug(probe) for probe in choice["probes"]])]
                empty = "No predictions are kept for this choice of model and probe."
                path = pick(sites, ["model", "probe", "layer", "quantile"], empty)
                if path and name == "Decision":
                    decision_tab(run, path, note)
                elif path:
                    examples_tab(run, path)
            elif name == "Projection":
                sites = find_sites(run / "projections", ["model", "dataset", "layer", "quantile"])
                sites = sites[(sites.dataset == dataset) & sites.model.isin(models)]
                empty = "No projection is kept for this choice of model."
                path = pick(sites, ["model", "layer", "quantile"], empty)
                if path:
                    projection_tab(run, path, dataset, note)
            elif name == "Sizes":
                sizes_tab(rows, choice)
            else:
                hidden = ["options", "pooling"]
                table = rows.drop(columns=[column for column in hidden if column in rows])
                show_table(table, "probe.csv", "Download this selection as CSV")


def app():
    st.set_page_config(page_title="probe", layout="wide")
    st.title("What do the hidden layers know?")
    run, table = choose_run(st.sidebar)
    if run is None:
        return
    rows, choice = choose_rows(st.sidebar, table)
    note = ""
    if run == EXAMPLE:
        st.info("This is the small example that comes with the code. Your own: `python probe.py`.")
    if rows.synthetic.any():
        note = " (synthetic data)"
        st.caption(f"**{choice['dataset']}** is synthetic: its sentences are written by rule.")
    choice["title"] = choice["dataset"] + note
    if choice["models"] and choice["probes"] and choice["poolings"]:
        draw_tabs(run, rows, choice, note)
    else:
        st.warning("Choose at least one model, one probe and one pooling in the side bar.")


app()
