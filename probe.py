"""What the hidden layers of an untouched language model know: one pass, every layer, honest probes.

    python probe.py                                             # the model of `python train.py` on data/grammar, offline, minutes
    python probe.py config/probe_gpt2.yaml                      # GPT-2 small to large; first: python data/probing/get_data.py -data_save_path data/probing
    torchrun --standalone --nproc_per_node=4 probe.py config/probe_gpt2.yaml
    streamlit run probe.py                                      # look at what is in out/

Each text goes through each model once. Hidden states are pooled while the model runs, one layer of one batch at a time, and only the pooled vectors
are kept, in a cache that other embedding studies may read (`cache=`, one folder a model and list of texts, under a hash of weights and token ids):

    meta.json      format, model, texts, layers [i, ...] (0 the embeddings, i after block i, the last one after the final norm), width, dtype, truncated
    lengths.npy    (N,) tokens of each text that are pooled
    POOLING.npy    (N, layers, width), POOLING a quantile of the tokens (0.0 the first, 1.0 the last) or mean, max, min: np.load(file, mmap_mode="r")
    POOLING.done   N bytes, 1 where the row of that file is written: what was interrupted goes on

Beside every score: the majority guess, the bag of embeddings (layer 0), the same architecture with random weights, a control task (a random label for
each word type), and the description length. Probes: nested, grouped, stratified cross-validation; intervals by the corrected resampled t; Holm over all
layers and poolings; the best layer is chosen on validation folds.
Hewitt & Liang 2019 (control tasks); Voita & Titov 2020 (online code); Nadeau & Bengio 2003 (corrected t); Conneau et al. 2018 (SentEval).
"""
# ruff: noqa: E402
import hashlib, html, json, math, os, re, sys, textwrap, time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from configurator import Run, aside, check, configure, key_seed, write_aside
from data.stimuli import read_meta, read_task


@dataclass
class Config:
    # ---- what is read
    lm: list[str] = field(default_factory=lambda: ["out/train"])  # run folders or checkpoints of ours, Hugging Face causal or masked models by name or folder
    dataset: list[str] = field(default_factory=lambda: [  # NAME/TASK under data/ (NAME: all of its tasks), or a .json file in the schema of data/probing
        "grammar/tense", "grammar/subj_number", "grammar/depth", "grammar/bigram_shift", "grammar/coord_inversion", "grammar/odd_man_out"])
    layers: list[int] = field(default_factory=list)  # hidden states: 0 the embeddings, -1 the last; none: all of them
    quantiles: list[str] = field(default_factory=lambda: ["0.5", "1.0", "mean"])  # tokens of a text: 0 the first, 1.0 the last; mean, max, min: of all tokens
    poolers: list[dict] = field(default_factory=list)  # more poolings, as PoolToken takes them: {layer: [2, 3], layer_method: extend, quantile: 1.0}
    max_texts: int = 0                     # of a dataset, the first ones; 0: all
    force_classification: bool = False     # round the labels of a regression to 0 and 1
    bos: bool = False                      # begin each text with the end-of-text token: context, never pooled
    # ---- probes
    probe: list[str] = field(default_factory=lambda: ["LDA", "Logistic"])  # see PROBES
    split: str = "given"                   # given: train and test as the dataset has them, if it has; cv: all sentences in folds
    n_folds: int = 5                       # outer folds; the inner ones are the same without the test fold
    n_seeds: int = 1                       # repetitions with other folds
    train_sizes: list[int] = field(default_factory=lambda: [100, 300, 1000])  # sample-size curve of the first closed-form probe
    baselines: list[str] = field(default_factory=lambda: ["layer0", "random_init", "control", "compression"])  # control: first probe; majority: always
    permutations: int = 0                  # p from this many shuffles of the labels, each through all folds (20 and more; slow); 0: from the corrected t
    shuffle_labels: bool = False           # the null: nothing may be found
    # ---- run
    batch_tokens: int = 4096               # tokens of a forward pass, pads included
    cache: str = "out/cache"               # pooled states, shared by all runs
    cache_dtype: str = "float32"           # float16 halves the disk
    keep_predictions: bool = True          # out-of-fold scores and projections for the app
    out_dir: str = "out/probe"             # results.csv, logs/, figures, what the app reads
    seed: int = 1337                       # folds, probes, random twin
    device: str = "auto"                   # of the language model: cuda, mps, cpu; pooled vectors are probed on the CPU
    dtype: str = "float32"                 # of the pass; auto: bfloat16 where the hardware has it

    POSITIVE = "batch_tokens"

    def check(self):
        for key, values, known in (("probe", self.probe, PROBES), ("baselines", self.baselines, BASELINES), ("split", [self.split], ["given", "cv"]),
                                   ("cache_dtype", [self.cache_dtype], ["float16", "float32"])):
            if wrong := [v for v in values if v not in known]:
                raise ValueError(f"option '{key}': there is no '{wrong[0]}', only {', '.join(known)}")
        if self.n_folds < 3 or self.n_seeds < 1:
            raise ValueError(f"n_folds={self.n_folds}, n_seeds={self.n_seeds}: three folds are needed (one to test, one to choose, one to learn), and one seed")
        for pooler in self.poolers:
            if wrong := set(pooler) - set(inspect.signature(PoolToken).parameters):
                raise ValueError(f"option 'poolers': there is no '{min(wrong)}', only {', '.join(inspect.signature(PoolToken).parameters)}")
            PoolToken(**pooler)


BASELINES = ["layer0", "random_init", "control", "compression"]


# ---- app: streamlit run probe.py
# Streamlit runs this file from its top at every click, so what stands up to the end of this section must stay light: no torch, no transformers.

UNDER_STREAMLIT = False
if __name__ == "__main__" and "streamlit" in sys.modules:
    from streamlit.runtime.scriptrunner import get_script_run_ctx
    UNDER_STREAMLIT = get_script_run_ctx(suppress_warning=True) is not None
if UNDER_STREAMLIT:
    import plotly.graph_objects as go
    import streamlit as st

NO_POOLING = "none"  # of a baseline that reads no model
NEEDED = ["model", "dataset", "probe", "baseline", "layer", "quantile", "metric", "score", "chance", "low", "high", "n"]  # of a table that is ours
NUMBERS = ["score", "chance", "low", "high", "n", "n_train", "params", "p", "p_holm"]
EXAMPLE = Path(__file__).resolve().parent / "data/probing/example"
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8172B3", "#937860"]
DASHES = {"random_init": "dash", "control": "dot", "layer0": "dashdot", "majority": "longdash"}


def cached(function):
    """st.cache_data under Streamlit, the function itself elsewhere. Readers take the file's mtime along, so that a file written again is read again."""
    return st.cache_data(function, show_spinner=False, max_entries=64) if UNDER_STREAMLIT else function


def mtime(path):
    """When the file was written (ns), 0 where there is none: a key for the app's caches."""
    return path.stat().st_mtime_ns if path.exists() else 0


def natural(value):
    """Sort key: numbers by size, then ranges like 3-5, then words."""
    numbers = [float(n) for n in re.findall(r"\d+\.?\d*", str(value))]
    return (len(numbers) or 99, numbers, str(value))


def find_runs(folder):
    """{name: folder} of the results to show: `folder` itself, what lies in it, newest first, and the bundled example."""
    found = sorted((p.parent for p in [folder / "results.csv", *folder.glob("*/results.csv")] if p.exists() and is_probe(p, mtime(p))),
                   key=lambda run: -mtime(run / "results.csv"))
    return {os.path.relpath(run): run for run in found} | ({"bundled example": EXAMPLE} if (EXAMPLE / "results.csv").exists() else {})


@cached
def is_probe(path, stamp):
    """Whether a results.csv (each of our scripts leaves one) is of this script, by its header."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return set(NEEDED) <= set(file.readline().rstrip("\r\n").split(","))


@cached
def read_results(path, stamp):
    """results.csv as a DataFrame: names as categories, the rest of them numbers, and `pooling` in words. Raises ValueError for a broken file."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        if not isinstance(table.index, pd.RangeIndex):  # what pandas makes of rows longer than the header
            raise ValueError("more fields than columns")
    except ValueError as e:  # pandas's errors and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is broken ({' '.join(str(e).split())}): write it again with python probe.py, which keeps what is measured") from None
    for column in NUMBERS:
        table[column] = pd.to_numeric(table.get(column, pd.Series(np.nan, table.index)), errors="coerce")
    for column in ("layer_method", "quantile_method", "synthetic"):
        table[column] = table[column].replace("None", "") if column in table else ""
    table["synthetic"] = table["synthetic"].isin(["True", "true", "1"])
    how = ["quantile", "quantile_method", "layer_method"]
    words = {key: pooling_name(*key) for key in table[how].drop_duplicates().itertuples(index=False, name=None)}
    table["pooling"] = [words[key] for key in zip(*(table[c] for c in how))]
    for column in table.columns.difference([*NUMBERS, "synthetic"]):
        table[column] = table[column].astype("category")
    return table.dropna(subset="score")


def pooling_name(quantile, quantile_method, layer_method):
    """Pooling in words, as the side bar lists it."""
    words = {"": NO_POOLING, "all": "all tokens", "0.0": "first token", "1.0": "last token", "attention": "", "best": "best"}
    words = words.get(quantile, f"quantile {quantile}")
    return ", ".join(filter(None, [words, quantile_method, f"layers {layer_method}" * bool(layer_method)]))


@cached
def read_arrays(path, stamp):
    """{name: array} of an .npz file."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@cached
def read_texts(path, stamp):
    """texts/DATASET.csv as a DataFrame text, label by index; empty when there is none."""
    if not path.exists():
        return pd.DataFrame({"text": [], "label": []}, dtype=str, index=pd.Index([], dtype="int64"))
    return pd.read_csv(path, dtype={"text": str, "label": str}, keep_default_na=False).set_index("index")


def find_sites(folder, columns):
    """DataFrame of the files of a folder named like columns joined by '__', one row each, and their path."""
    rows = [path.stem.rsplit("__", len(columns) - 1) + [str(path)] for path in sorted(folder.glob("*.npz"))]
    return pd.DataFrame([row for row in rows if len(row) == len(columns) + 1], columns=[*columns, "path"])


def full_size(rows):
    """The rows at the number of training texts that most of their kind have, the larger of equals: the others belong to the sample-size curve."""
    if rows.n_train.isna().all():
        return rows
    kind = ["model", "probe", "baseline"]
    sizes = rows.groupby([*kind, "n_train"], observed=True).size().rename("rows").reset_index().sort_values(["rows", "n_train"])
    usual = sizes.drop_duplicates(kind, keep="last").rename(columns={"n_train": "usual"})[[*kind, "usual"]]
    usual = rows[kind].merge(usual, how="left", on=kind).usual.to_numpy()
    return rows[rows.n_train.isna() | np.isnan(usual) | (rows.n_train == usual)]


def place(rows):
    """The rows of layers with their place on the axis, x, and how far they reach to both sides: 4 → 4 ± 0, '3-5' → 4 ± 1, 'all' → the middle ± half of
    the model."""
    ends = {}
    for layer in rows.layer.cat.categories:
        numbers = [float(n) for n in re.findall(r"\d+\.?\d*", layer)] or [1.0, last_layer(rows)]
        ends[layer] = min(numbers), max(numbers)
    low, high = np.array(list(ends.values()))[rows.layer.cat.codes].T
    return rows.assign(x=(low + high) / 2, reach=(high - low) / 2)


def last_layer(rows):
    """The deepest single layer among the rows; 1 when there is none."""
    return max((float(n) for n in rows.layer.unique() if re.fullmatch(r"\d+", str(n))), default=1.0) or 1.0


def roc(y, score):
    """(false positive rate, true positive rate, area) of y (n,) in {0, 1} and score (n,), equal scores in one step; area is Mann-Whitney's U / (P N)."""
    order = np.argsort(-score, kind="stable")
    y, score = y[order], score[order]
    ends = np.r_[np.diff(score) != 0, True]
    hits, n = np.r_[0, np.cumsum(y)[ends]], np.r_[0, np.arange(1, len(y) + 1)[ends]]
    tpr, fpr = hits / y.sum(), (n - hits) / (len(y) - y.sum())
    return fpr, tpr, np.trapezoid(tpr, fpr)


def at_threshold(y, score, threshold):
    """Accuracy, balanced accuracy, F1, true and false positive rate of score >= threshold."""
    said = score >= threshold
    tp, fp, fn, tn = (said & (y == 1)).sum(), (said & (y == 0)).sum(), (~said & (y == 1)).sum(), (~said & (y == 0)).sum()
    tpr, fpr = tp / max(tp + fn, 1), fp / max(fp + tn, 1)
    return {"accuracy": (tp + tn) / len(y), "balanced accuracy": (tpr + 1 - fpr) / 2, "F1": 2 * tp / max(2 * tp + fp + fn, 1),
            "true positive rate": tpr, "false positive rate": fpr}


def faint(color, alpha=0.15):
    """A colour '#rrggbb' as plotly's rgba, for bands behind lines."""
    return f"rgba({int(color[1:3], 16)},{int(color[3:5], 16)},{int(color[5:7], 16)},{alpha})"


def canvas(title, x, y, height=420, **layout):
    """An empty figure with its title and axes."""
    return go.Figure(layout=dict(title=title, xaxis_title=x, yaxis_title=y, height=height, **layout))


def layer_figure(rows, baselines, title, metric, relative):
    """Score by layer with its interval as a band, a colour per model and probe; baselines dashed; filled marks where Holm-corrected p < .05."""
    figure = canvas(title, "depth (share of layers)" if relative else "layer (0: embeddings)", metric, 460)
    rows = rows[["model", "probe", "pooling", "baseline", "layer", "score", "chance", "low", "high", "n", "p_holm"]]
    real = place(rows[rows.baseline == ""])
    extra = place(rows[(rows.baseline != "") & rows.baseline.isin(baselines)])
    own = dict(list(extra.groupby(["model", "probe"], observed=True)))
    said = "<b>%{y:.3f}</b> [%{customdata[1]:.3f}, %{customdata[2]:.3f}], n %{customdata[3]:.0f}, p (Holm) %{customdata[4]:.2g}"
    for i, ((model, probe, pooling), part) in enumerate(real.groupby(["model", "probe", "pooling"], observed=True)):
        color, name = COLORS[i % len(COLORS)], " · ".join([model, probe] + [pooling] * (real.pooling.nunique() > 1))
        whole = last_layer(part)
        scale = whole if relative else 1.0
        part = part.groupby("layer", observed=True)[["x", "reach", "score", "low", "high", "n", "p_holm"]].mean().reset_index().sort_values("x")
        single, joined = part[part.reach == 0], part[part.reach > 0]
        x = single.x / scale
        figure.add_scatter(x=[*x, *x[::-1]], y=[*single.high, *single.low[::-1]], fill="toself", fillcolor=faint(color), mode="lines", line_width=0,
                           hoverinfo="skip", legendgroup=name, showlegend=False)
        filled = np.where((single.p_holm < 0.05) | single.p_holm.isna(), color, "white")
        hover_columns = ["layer", "low", "high", "n", "p_holm"]
        figure.add_scatter(x=x, y=single.score, name=name, legendgroup=name, mode="lines+markers", line=dict(color=color, width=2.5),
                           marker=dict(size=8, color=filled, line=dict(color=color, width=1.5)), customdata=single[hover_columns].astype(object),
                           hovertemplate="layer %{customdata[0]}: " + said + f"<extra>{name}</extra>")
        if len(joined):
            figure.add_scatter(x=joined.x / scale, y=joined.score, mode="markers", marker=dict(symbol="line-ew-open", color=color), legendgroup=name,
                               showlegend=False, error_x=dict(array=joined.reach / scale, thickness=2), customdata=joined[hover_columns].astype(object),
                               hovertemplate="layers %{customdata[0]}: " + said + f"<extra>{name}</extra>")
        beside = own.get((model, probe), extra[:0])
        beside = beside[(beside.baseline != "majority") & ((beside.pooling == pooling) | (beside.baseline == "layer0"))]
        for baseline, base in beside.groupby("baseline", observed=True):
            base = base.groupby("x").score.mean()
            if len(base) == 1:  # one number: a line all the way
                base = pd.Series([base.iloc[0]] * 2, index=[0.0, whole])
            figure.add_scatter(x=base.index / scale, y=base, mode="lines", line=dict(color=color, dash=DASHES.get(baseline, "dash"), width=1.5),
                               name=baseline.replace("_", " "), legendgroup=name, hovertemplate="%{y:.3f}")
    end = [0, 1 if relative else last_layer(real)]
    levels = {"majority": extra.score[extra.baseline == "majority"].mean(), "chance": real.chance.mean()}
    for (name, level), dash in zip(levels.items(), ("longdash", "dot")):
        if np.isfinite(level):
            figure.add_scatter(x=end, y=[level] * 2, mode="lines", line=dict(color="#888888", dash=dash, width=1.5), name=name, hovertemplate="%{y:.3f}")
    return figure


def heat_figure(rows, title, metric):
    """Layer × pooling, the score of each cell."""
    grid = rows.pivot_table(index="pooling", columns="layer", values="score", aggfunc="mean", observed=True)
    quantile = rows.drop_duplicates("pooling").set_index("pooling")["quantile"]
    grid = grid.loc[sorted(grid.index, key=lambda pooling: natural(quantile[pooling])), sorted(grid.columns, key=natural)]
    figure = canvas(title, "layer", "", 380, xaxis_type="category", yaxis_type="category")
    return figure.add_heatmap(z=grid.to_numpy(), x=[str(c) for c in grid.columns], y=[str(q) for q in grid.index], colorscale="Viridis", colorbar_title=metric,
                              texttemplate="%{z:.2f}" if grid.size <= 150 else None, hovertemplate="layer %{x}, %{y}: <b>%{z:.3f}</b><extra></extra>")


def size_figure(rows, x, title, label, metric):
    """Score against a size on a logarithmic axis, one line per model and probe (per probe where the size is the model's)."""
    figure = canvas(title, label, metric, xaxis_type="log")
    for i, (name, part) in enumerate(rows.groupby(["probe"] if x == "params" else ["model", "probe"], observed=True)):
        part, color = part.sort_values(x), COLORS[i % len(COLORS)]
        figure.add_scatter(x=part[x], y=part.score, name=" · ".join(name), mode="lines+markers", line_color=color,
                           error_y=dict(array=part.high - part.score, arrayminus=part.score - part.low, color=faint(color, 0.6)),
                           customdata=part[["low", "high", "model", "layer"]].astype(object),
                           hovertemplate="%{customdata[2]}, layer %{customdata[3]}: <b>%{y:.3f}</b> [%{customdata[0]:.3f}, %{customdata[1]:.3f}]")
    figure.add_hline(rows.chance.mean(), line=dict(color="#888888", dash="dot"), annotation_text="chance")
    return figure


def show(figure, key):
    """Draw a figure as wide as the page."""
    st.plotly_chart(figure, key=key, width="stretch")


def pick(sites, columns, empty):
    """Select boxes that narrow the sites down to one; its path, or None when there are none."""
    if not len(sites):
        st.info(empty)
        return None
    for column, box in zip(columns, st.columns(len(columns))):
        options = sorted(sites[column].unique(), key=natural)
        index = len(options) - 1 if column in ("layer", "quantile") else 0
        choice = box.selectbox(column.capitalize(), options, index=index, key=f"site_{column}", bind="query-params")
        sites = sites[sites[column] == choice]
    return Path(sites.path.iloc[0])


def layers_tab(rows, baselines, title, metric):
    """Curves over layers, baselines dashed, and layers × quantiles where several were probed."""
    rows = full_size(rows)
    best, rows = rows[(rows.layer == "best") & rows.baseline.isin(["", "random_init"])], rows[rows.layer != "best"]
    relative = st.toggle("depth as a share of the model's layers", key="relative", bind="query-params")
    show(layer_figure(rows[rows.pooling.isin(st.session_state.pooling) | (rows.baseline != "")], baselines, title, metric, relative), "layer_curve")
    st.caption("Bands are 95 % intervals. Filled marks: p < .05 after Holm's correction over all layers and poolings. Dashed: the same model with random "
               "weights; a control task, labels that only knowing words by heart can give; layer 0, a bag of embeddings; the majority label.")
    if len(best):
        st.markdown("**The layer that each fold's own validation texts liked best**")
        st.dataframe(best[["model", "probe", "baseline", "score", "low", "high", "chance", "p", "n"]], hide_index=True, key="best")
    cells = rows[(rows.baseline == "") & (rows.layer_method == "") & (rows["quantile"] != "attention")]
    for (model, probe), part in cells.groupby(["model", "probe"], observed=True):
        if part.pooling.nunique() > 1:
            show(heat_figure(part, f"{title}: {model}, {probe}", metric), f"heat_{model}_{probe}")
    if cells.pooling.nunique() < 2:
        st.caption("A map of layers × quantiles appears where several were probed: `python probe.py quantiles=0.0,0.5,1.0`.")


def read_site(run, path):
    """The out-of-fold predictions of a site, with text and label."""
    arrays = read_arrays(path, mtime(path))
    texts_of = run / "texts" / f"{path.stem.rsplit('__', 4)[1]}.csv"
    table = pd.DataFrame({name: arrays[name] for name in ("index", "y", "score", "fold") if name in arrays and arrays[name].ndim == 1})
    if "score" not in table:  # (n, K) of K labels: the label that is said
        table["score"] = arrays["score"].argmax(1)
    table = table.join(read_texts(texts_of, mtime(texts_of)), on="index")
    return table, float(np.mean(arrays["threshold"])) if "threshold" in arrays and np.isfinite(arrays["threshold"]).all() else np.nan


def decision_tab(run, path, note):
    """ROC, and the scores of both classes under a threshold that the user moves."""
    table, threshold = read_site(run, path)
    y, score = table.y.to_numpy(), table.score.to_numpy(float)
    if not set(np.unique(y)) <= {0, 1} or len(np.unique(y)) < 2:
        return show(agreement_figure(table, note), "agreement")
    low, high = float(score.min()), float(score.max())
    start = min(max(threshold if np.isfinite(threshold) else (low + high) / 2, low), high)
    high = high if high > low else low + 1.0
    threshold = st.slider("Threshold (the probe's own was found on its training texts)", low, high, start, step=(high - low) / 500, format="%.3f",
                          key="threshold", bind="query-params")
    for box, (name, value) in zip(st.columns(5), at_threshold(y, score, threshold).items()):
        box.metric(name.capitalize(), f"{value:.3f}")
    fpr, tpr, area = roc(y, score)
    now = at_threshold(y, score, threshold)
    thin = np.unique(np.linspace(0, len(fpr) - 1, 2000).astype(int))
    left, right = st.columns(2)
    figure = canvas(f"ROC, area {area:.3f}{note}", "false positive rate", "true positive rate", showlegend=False)
    figure.add_scatter(x=[0, 1], y=[0, 1], line=dict(color="#999999", dash="dot"), hoverinfo="skip")
    figure.add_scatter(x=fpr[thin], y=tpr[thin], line=dict(color=COLORS[0], width=2.5))
    figure.add_scatter(x=[now["false positive rate"]], y=[now["true positive rate"]], marker=dict(size=13, color=COLORS[1]), mode="markers")
    with left:
        show(figure, "roc")
    edges = np.linspace(low, high, 41)
    figure = canvas(f"out-of-fold scores, n = {len(y)}{note}", "score", "texts", barmode="overlay", bargap=0)
    for label in (0, 1):
        names = table.label[y == label].dropna().unique()
        figure.add_bar(x=(edges[1:] + edges[:-1]) / 2, y=np.histogram(score[y == label], edges)[0], opacity=0.6, marker_color=COLORS[1 - label],
                       name=names[0] if len(names) == 1 else str(label))
    figure.add_vline(threshold, line=dict(color="#333333", dash="dash"))
    with right:
        show(figure, "histogram")


def agreement_figure(table, note):
    """What was said against what is so: a confusion matrix of labels, a cloud of numbers."""
    if whole_numbers(table) and table.y.nunique() <= 50:
        counts, names = pd.crosstab(table.y, table.score), dict(zip(table.y, table.label))
        figure = canvas(f"label said against label given, n = {len(table)}{note}", "said", "given", 520, xaxis_type="category", yaxis_type="category")
        return figure.add_heatmap(z=counts, x=[str(names.get(c, c)) for c in counts.columns], y=[str(names.get(c, c)) for c in counts.index],
                                  colorscale="Blues", texttemplate="%{z}")
    r = np.corrcoef(table.y, table.score)[0, 1] if table.score.std() > 0 and table.y.std() > 0 else 0.0
    figure = canvas(f"predicted against given, Pearson r = {r:.3f}, n = {len(table)}{note}", "given", "predicted", 520)
    return figure.add_scattergl(x=table.y, y=table.score, mode="markers", marker=dict(size=5, color=COLORS[0], opacity=0.5), text=hover(table),
                                hoverinfo="text+x+y")


def whole_numbers(table):
    """Whether scores are labels that were said, and no numbers on a scale."""
    return bool((table.y % 1 == 0).all() and (table.score % 1 == 0).all())


def examples_tab(run, path):
    """Every text with its out-of-fold score."""
    table, threshold = read_site(run, path)
    if set(table.y.unique()) <= {0, 1}:
        table["said"] = (table.score >= (threshold if np.isfinite(threshold) else 0.5)).astype(int)
    elif whole_numbers(table):
        table["said"] = table.score
    if "said" in table:
        table["right"] = table.said == table.y
    left, right = st.columns([3, 1])
    words = left.text_input("Texts that contain", key="contains", bind="query-params")
    if "right" in table and right.toggle("only mistakes", key="mistakes", bind="query-params"):
        table = table[~table.right]
    if words:
        table = table[table.text.fillna("").str.contains(words, case=False, regex=False)]
    st.caption(f"{len(table):,} texts; every one was scored by a probe that had not seen it.")
    st.dataframe(table, hide_index=True, width="stretch", height=480, lazy=True if len(table) > 5000 else None, column_order=[
        c for c in ("text", "label", "score", "said", "right", "y", "fold", "index") if c in table])
    st.download_button("Download as CSV", lambda: table.to_csv(index=False), f"{path.stem}.csv", "text/csv", on_click="ignore")


def hover(table):
    """Texts wrapped and escaped for a plotly label."""
    return ["<br>".join(map(html.escape, textwrap.wrap(text[:400], 60))) for text in table.text.fillna("")]


def projection_tab(run, path, dataset, note):
    """Texts in the plane of a layer's first two components."""
    arrays, texts_of = read_arrays(path, mtime(path)), run / "texts" / f"{dataset}.csv"
    table = pd.DataFrame({"x": arrays["xy"][:, 0], "y": arrays["xy"][:, 1], "index": arrays["index"]}).join(read_texts(texts_of, mtime(texts_of)), on="index")
    table = table.sample(min(len(table), 5000), random_state=0).fillna({"label": "", "text": ""})  # a browser shows no more
    figure = canvas("first two principal components, {:.0%} and {:.0%} of the variance".format(*arrays["explained"]) + note, "component 1", "component 2", 620)
    numbers = pd.to_numeric(table.label, errors="coerce")
    if numbers.notna().all() and numbers.nunique() > 20:
        figure.add_scattergl(x=table.x, y=table.y, mode="markers", text=hover(table), hoverinfo="text",
                             marker=dict(size=6, color=numbers, colorscale="Viridis", showscale=True))
    else:
        for i, label in enumerate(sorted(table.label.unique(), key=natural)):
            part = table[table.label == label]
            figure.add_scattergl(x=part.x, y=part.y, mode="markers", name=label, text=hover(part), hoverinfo="text+name",
                                 marker=dict(size=6, opacity=0.75, color=COLORS[i % len(COLORS)]))
    show(figure, "projection")


def sizes_tab(rows, title, metric):
    """At the layer chosen on validation folds; where a run has but one layer and pooling, at that one."""
    real = rows[rows.baseline == ""]
    real = real[real.layer == "best"] if (real.layer == "best").any() else real
    if (full := full_size(real)).groupby("model", observed=True).params.first().nunique() > 1:
        show(size_figure(full, "params", f"{title}: size of the model", "parameters", metric), "model_size")
    else:
        st.info("A curve over model sizes needs two models of different size: `python probe.py lm=gpt2,gpt2-medium`.")
    many = real.groupby(["model", "probe"], observed=True).n_train.transform("nunique") > 1
    if many.any():
        show(size_figure(real[many], "n_train", f"{title}: number of training texts", "texts learnt from", metric), "sample_size")
    else:
        st.info("A curve over numbers of training texts needs several: `python probe.py train_sizes=100,300,1000`.")
    st.caption("At the layer that validation texts chose, not the one that tests best. Bars are 95 % intervals.")


def table_tab(rows):
    """The numbers, to look at and as CSV."""
    shown = rows.drop(columns=[c for c in ("options", "pooling") if c in rows])
    st.dataframe(shown, hide_index=True, width="stretch", height=560, lazy=True if len(shown) > 5000 else None)
    st.download_button("Download this selection as CSV", lambda: shown.to_csv(index=False), "probe.csv", "text/csv", on_click="ignore")


def app():
    """The app: side bar, then one tab at a time. Every choice stands in the address, so that a link shows what you see."""
    st.set_page_config(page_title="probe", layout="wide")
    out = Path(next((a.split("=", 1)[1] for a in sys.argv[1:] if a.lstrip("-").startswith("out_dir=")), "out"))
    runs = find_runs(out)
    st.title("What do the hidden layers know?")
    if not runs:
        st.info(f"There are no results under `{out}` yet. Make some and reload this page:")
        st.code("python probe.py", language="bash")
        return
    bar = st.sidebar
    run = runs[bar.selectbox("Results", list(runs), key="results", bind="query-params")]
    try:
        table = read_results(run / "results.csv", mtime(run / "results.csv"))
    except ValueError as e:
        st.error(str(e))
        return
    if not len(table):
        st.info(f"`{run / 'results.csv'}` holds no scores yet. Go on with:")
        st.code("python probe.py", language="bash")
        return

    def names(column, rows):
        return sorted((v for v in rows[column].unique() if v != ""), key=natural)

    dataset = bar.selectbox("Dataset", names("dataset", table), key="dataset", bind="query-params")
    rows = table[table.dataset == dataset]
    metrics = names("metric", rows)
    metric = bar.selectbox("Metric", metrics, index=metrics.index("accuracy") if "accuracy" in metrics else 0, key="metric", bind="query-params")
    rows = rows[rows.metric == metric]
    real = rows[rows.baseline == ""]
    models, probes, poolings = names("model", real), names("probe", real), names("pooling", real[real.layer != "best"])
    chosen = bar.multiselect("Model", models, default=models[:3], key="model", bind="query-params")
    asked = bar.multiselect("Probe", probes, default=probes[:2], key="probe", bind="query-params")
    bar.multiselect("Pooling", poolings, default=["last token"] if "last token" in poolings else poolings[:1], key="pooling", bind="query-params")
    baselines = [b for b in DASHES if (rows.baseline == b).any()]
    baselines = bar.multiselect("Baselines", baselines, default=baselines, key="baseline", bind="query-params")
    rows = rows[rows.model.isin([*chosen, ""]) & rows.probe.isin([*asked, ""])]

    synthetic = bool(rows.synthetic.any())
    note = " (synthetic data)" if synthetic else ""
    if run == EXAMPLE:
        st.info("This is the small example that comes with the code. Your own results: `python probe.py`, then reload.")
    if synthetic:
        st.caption(f"**{dataset}** is synthetic: its sentences are written by rule.")
    if not (chosen and asked and st.session_state.pooling):
        st.warning("Choose at least one model, one probe and one pooling in the side bar.")
        return
    sites = find_sites(run / "predictions", ["model", "dataset", "probe", "layer", "quantile"])
    clouds = find_sites(run / "projections", ["model", "dataset", "layer", "quantile"])
    slug = dataset.replace("/", "-")
    sites = sites[(sites.dataset == slug) & sites.model.isin([m.replace("/", "-") for m in chosen]) & sites.probe.isin([p.replace("/", "-") for p in asked])]
    clouds = clouds[(clouds.dataset == slug) & clouds.model.isin([m.replace("/", "-") for m in chosen])]
    title = f"{dataset}{note}"
    layers, decision, examples, projection, sizes, numbers = st.tabs(["Layers", "Decision", "Examples", "Projection", "Sizes", "Table"], key="view",
                                                                     bind="query-params", on_change="rerun")
    if layers.open:
        with layers:
            layers_tab(rows, baselines, title, metric)
    for tab, draw in ((decision, lambda path: decision_tab(run, path, note)), (examples, lambda path: examples_tab(run, path))):
        if tab.open:
            with tab:
                if path := pick(sites, ["model", "probe", "layer", "quantile"], "No predictions are kept for this choice of model and probe."):
                    draw(path)
    if projection.open:
        with projection:
            if path := pick(clouds, ["model", "layer", "quantile"], "No projection is kept for this choice of model."):
                projection_tab(run, path, slug, note)
    if sizes.open:
        with sizes:
            sizes_tab(rows, title, metric)
    if numbers.open:
        with numbers:
            table_tab(rows)


if UNDER_STREAMLIT:
    app()
    st.stop()  # torch and the rest below are for the experiment


# ---- the experiment

import copy, fcntl, inspect

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import scipy.sparse
import scipy.stats
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis  # noqa: F401 (for probes of your own)
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

from convert import HiddenStates


# ---- data

class NLPDataset:
    """Labelled texts: len(), [i] → (text, label), texts, y (N,), kind (binary, multi, regression), groups (N,) of what no split may part (equal texts
    always), split (N,) or None, meta. source: a data-json file or dict: {data: {sentences, labels} (lists, or dicts "0", "1", ...), name, task, labels,
    ...}. Labels of a regression are scaled to [0, 1]; force_classification rounds them. Raises ValueError for a broken file, empty text, one class."""

    def __init__(self, source, force_classification=False, name=None):
        where, raw = (source, None) if not isinstance(source, dict) else (source.get("name", "the dict"), source)
        if raw is None:
            if not Path(source).exists():
                raise FileNotFoundError(f"no dataset {source}: write it with python data/probing/get_data.py -data_save_path {Path(source).parent}")
            try:
                raw = json.loads(Path(source).read_text(encoding="utf-8"))
            except (ValueError, UnicodeDecodeError) as e:
                raise ValueError(f"{source} is not JSON ({e}): download it again, or mend it") from None
        try:
            data = raw["data"]
            texts, labels = (list(part.values()) if isinstance(part, dict) else list(part) for part in (data["sentences"], data["labels"]))
            groups, split = (np.array(list(part.values()) if isinstance(part, dict) else part) if part else None
                             for part in (data.get("groups"), data.get("splits")))  # of the files that get_data.py writes
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{where} has no data: sentences and labels: see the schema in data/probing/readme.md") from None
        regression = raw.get("task", "Classification") == "Regression"
        if regression and not all(isinstance(v, (int, float)) and math.isfinite(v) for v in labels):
            raise ValueError(f"{where} is a regression, and not all of its labels are numbers")
        named = raw.get("labels") or {}
        named = {str(k): v for k, v in (named.items() if isinstance(named, dict) else enumerate(named))}
        if wrong := [v for v in labels if not isinstance(v, (str, int, float)) or v != v]:
            raise ValueError(f"{where} has the label {wrong[0]}: labels are numbers or names, one for each sentence")
        names = None
        if regression:
            labels = np.array(labels, float)
            if len(labels) and (labels.min() < 0 or labels.max() > 1):
                labels = (labels - labels.min()) / max(np.ptp(labels), 1e-12)
            if force_classification:
                regression, labels = False, np.round(labels).astype(int)
                names = [named.get("0", "0"), named.get("1", "1")]
        else:
            known = sorted(set(labels), key=lambda v: (isinstance(v, str), v))
            names = [str(named.get(str(int(v)) if not isinstance(v, str) else v, v)) for v in known]
            labels = np.array([known.index(v) for v in labels])
        self._finish(where, name or (Path(str(source)).stem if not isinstance(source, dict) else str(where)), texts, labels, regression, names,
                     {k: v for k, v in raw.items() if k != "data"}, groups, split if split is not None and {"train", "test"} <= set(split) else None)

    @classmethod
    def from_task(cls, folder, task):
        """A task of a folder in the format of data/stimuli.py, with its groups and its split."""
        self, frame, meta = cls.__new__(cls), read_task(folder, task), read_meta(folder)
        entry = meta["tasks"][task]
        info = dict(name=f"{Path(folder).name}/{task}", topic=task, language="En", task="Regression" if entry["kind"] == "regression" else "Classification",
                    type="Ordinal" if entry["kind"] == "regression" else "Nominal", n_categories=len(entry.get("labels", [])) or "inf", multiple=False,
                    link=meta.get("source", ""), synthetic=bool(meta.get("synthetic")), labels={str(i): v for i, v in enumerate(entry.get("labels", []))},
                    **{"average length": round(frame.text.str.split().str.len().mean(), 1)})
        self._finish(Path(folder) / entry["file"], info["name"], frame.text.tolist(), frame.y.to_numpy(), entry["kind"] == "regression", entry.get("labels"),
                     info, frame.group.to_numpy(), frame.split.to_numpy() if {"train", "test"} <= set(frame.split) else None)
        return self

    def _finish(self, where, name, texts, y, regression, names, meta, groups=None, split=None):
        if len(texts) != len(y):
            raise ValueError(f"{where} has {len(texts)} sentences and {len(y)} labels")
        if wrong := [part for part in (groups, split) if part is not None and len(part) != len(y)]:
            raise ValueError(f"{where} has {len(texts)} sentences, and groups or splits of {len(wrong[0])}")
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where}: sentence {i} is empty or no text: leave it out, with its label")
        if len(np.unique(y)) < 2:
            raise ValueError(f"{where}: all {len(y)} labels are the same, and nothing can be told apart")
        self.where, self.name, self.texts, self.y, self.label_names, self.meta = where, name, texts, np.asarray(y), names, {**meta, "size": len(texts)}
        self.kind = "regression" if regression else "binary" if len(names) == 2 else "multi"
        self.split, n = split, len(texts)
        # what shares a group or a text stays together
        own = np.arange(n) if groups is None else pd.factorize(pd.Series(groups).astype(str))[0]
        same = pd.factorize(pd.Series(texts).str.strip().str.lower())[0] + own.max() + 1
        graph = scipy.sparse.coo_matrix((np.ones(n), (own, same)), shape=(same.max() + 1,) * 2)
        self.groups = scipy.sparse.csgraph.connected_components(graph, directed=False)[1][own]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return self.texts[i], self.y[i]

    def first(self, n):
        """The first n texts (0: all)."""
        if not n or n >= len(self):
            return self
        parts = [np.arange(len(self))] if self.split is None else [np.flatnonzero(self.split == name) for name in np.unique(self.split)]
        keep = np.sort(np.concatenate([rows[:max(1, round(n * len(rows) / len(self)))] for rows in parts]))
        part = copy.copy(self)
        part._finish(self.where, self.name, [self.texts[i] for i in keep], self.y[keep], self.kind == "regression", self.label_names, self.meta,
                     self.groups[keep], None if self.split is None else self.split[keep])
        return part

    def load_embeds_into_memory(self, model, pooler, cache=None, batch_tokens=4096):
        """Embed and pool the whole dataset: X (N', H) float32, y (N',). self.index (N',) tells the text of each row: with 'concat' a text has several,
        and they may never be parted by a split (self.row_groups). cache: a folder; without one nothing is written."""
        if pooler.cacheable and cache is not None:
            layers = model.layers(pooler.layers(model.n_layer))
            states = pooled_states(model, self.texts, layers, pooler.poolings(), cache, batch_tokens)
            X, index = pooler.from_states(states)
        else:
            rows, parts = model.encode(self.texts)[0], {}
            for batch in length_batches(rows, batch_tokens):
                x, index = pooler.pool(model.run(*model.pad([rows[i] for i in batch]), keep=True))
                for i in range(len(batch)):
                    parts[batch[i]] = x[(index == i).to(x.device)].float().cpu().numpy()
            X, index = np.concatenate([parts[i] for i in range(len(rows))]), np.repeat(np.arange(len(rows)), [len(parts[i]) for i in range(len(rows))])
        self.index, self.row_groups = index, self.groups[index]
        return X, self.y[index]


def load_datasets(run, config, specs):
    """Every dataset of specs: NLPDatasets, dicts, .json files, NAME/TASK or NAME."""
    found = []
    for spec in specs:
        if isinstance(spec, NLPDataset):
            found.append(spec)
        elif isinstance(spec, dict) or str(spec).endswith(".json"):
            inside = Path(__file__).parent / "data" / str(spec) if isinstance(spec, str) else Path()
            found.append(NLPDataset(inside if inside.is_file() and not Path(spec).exists() else spec, config.force_classification))
        else:
            whole = Path(spec).is_dir() or (Path(__file__).parent / "data" / spec / "prepare.py").exists()
            name, task = (spec, None) if whole else (os.path.dirname(spec) or spec, os.path.basename(spec))
            folder = run.dataset(name)
            found += [NLPDataset.from_task(folder, t) for t in ([task] if task else read_meta(folder)["tasks"])]
    return [d.first(config.max_texts) for d in found]


def folds_of(dataset, y, k, seed):
    """Fold (N,) of each text: groups stay whole, labels (or, of a regression, tenths of them) are spread evenly. Where the dataset has a split, its parts are
    dealt alike. ValueError where a class is too rare."""
    tenths = max(1, min(10, len(y) // (2 * k)))  # fewer of them where texts are few
    strata = y if dataset.kind != "regression" else np.digitize(y, np.quantile(y, np.arange(1, tenths) / tenths))
    if dataset.split is not None:
        strata = strata * 2 + (dataset.split == "test")
    if dataset.kind != "regression" and (least := np.unique(y, return_counts=True)[1].min()) < k:
        raise ValueError(f"{dataset.where}: a label has {least} texts, and {k} folds want as many: give fewer n_folds= or drop the label")
    judged = np.ones(len(y), bool) if dataset.split is None or not (dataset.split == "test").any() else dataset.split == "test"
    if (least := len(np.unique(dataset.groups[judged]))) < k:
        raise ValueError(f"{dataset.where}: {least} groups of texts to judge, and {k} folds want as many: give fewer n_folds=, or split=cv")
    alone = len(np.unique(dataset.groups)) == len(y)
    splitter = (StratifiedKFold if alone else StratifiedGroupKFold)(k, shuffle=True, random_state=seed)
    folds = np.zeros(len(y), int)
    for i, (_, test) in enumerate(splitter.split(folds, strata, None if alone else dataset.groups)):
        folds[test] = i
    return folds


def shuffled(dataset, y, rng):
    """Labels with nothing to know: dealt among groups of equal size, within the parts of a given split, and within each group."""
    out, part = y.copy(), np.zeros(len(y), int) if dataset.split is None else (dataset.split == "test").astype(int)
    members = pd.Series(np.arange(len(y))).groupby(dataset.groups).apply(list)
    for _, same in members.groupby([members.map(len), members.map(lambda m: part[m[0]])]):
        rows = np.array(same.tolist())  # (groups, size)
        out[rows] = rng.permuted(y[rows][rng.permutation(len(rows))], axis=1)
    return out


def control_labels(dataset, seed):
    """Hewitt & Liang's control task for sentences: the label is drawn for a word type, here the sentence's longest word, with the frequencies of the real
    labels. Nothing but knowing the word by heart helps."""
    words = [max(text.split(), key=len).lower() for text in dataset.texts]
    values = np.sort(dataset.y)
    draw = {word: values[key_seed(seed, "control", word) % len(values)] for word in set(words)}
    return np.array([draw[word] for word in words])


# ---- model

def length_batches(rows, tokens):
    """Batches of indices of the rows (token lists), of nearly equal length, at most `tokens` tokens each with their padding."""
    batch = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if batch and len(rows[i]) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class LMModel(HiddenStates):
    """A language model that is only listened to: convert.HiddenStates, called with texts.
    Calling it with a list of texts gives {'hidden_states': (n_layer + 1) × (B, T, H), 'attention_mask' (B, T), 'input_ids' (B, T)}: state 0 is the
    embeddings, the last one is after the final norm, as transformers counts."""

    def random_twin(self, seed):
        return super().random_twin(key_seed(seed, "random twin"))

    @torch.no_grad()
    def run(self, ids, real, layers=(), take=None, keep=False):
        """One pass over ids (B, T). take(i, x) is called with each state of `layers` (B, T, H) while the model runs, and nothing is held; it ends
        at the deepest one. keep: the dictionary of all of them instead."""
        if not keep:
            return super().run(ids, real, layers, take)
        states = {}
        super().run(ids, real, range(self.n_layer + 1), states.__setitem__)
        pooled = real.clone()
        if self.bos:
            pooled[torch.arange(len(real)), real.int().argmax(1)] = False
        return {"hidden_states": tuple(states[i] for i in sorted(states)), "attention_mask": pooled.long(), "input_ids": ids}

    def __call__(self, texts):
        return self.run(*self.pad(self.encode([texts] if isinstance(texts, str) else texts)[0]), keep=True)

    def fingerprint(self):
        """Hash of architecture, weights and precision."""
        h = hashlib.sha256(f"{type(self.model).__name__} {self.dtype} {self.bos} {getattr(self.model, 'config', '')}".encode())
        for name, tensor in self.model.state_dict().items():
            h.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            h.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return h.hexdigest()


# ---- pooling

REDUCE = ("mean", "max", "min")


class PoolToken:
    """From a model's output dictionary to one vector a text (or several rows).

    layer: index into hidden_states (0 embeddings, n the last, -1 the last), a list, or 'all': 1 to n - 1. quantile: q takes the real token
    round(q (length - 1)) (halves to even), -1 is 1.0, the last one; a list; 'all': each token once. Where several are selected a method says what becomes
    of them: mean, max, min; extend (side by side, H grows); concat (rows of their own, at most one of the two). Tokens first, then layers.
    Quantiles that meet in one token of a short text count once (concat, mean), unless dedupe=False."""

    METHODS = (None, *REDUCE, "extend", "concat")

    def __init__(self, layer=-1, quantile=-1, layer_method=None, quantile_method=None, dedupe=True):
        self.layer, self.quantile, self.layer_method, self.quantile_method, self.dedupe = layer, quantile, layer_method, quantile_method, dedupe
        for what, value, method in (("layer", layer, layer_method), ("quantile", quantile, quantile_method)):
            if method not in self.METHODS:
                raise ValueError(f"{what}_method must be {', '.join(map(str, self.METHODS))}, not '{method}'")
            if method is None and (value == "all" or isinstance(value, (list, tuple)) and len(value) > 1):
                raise ValueError(f"{what}={value} selects several: give {what}_method= mean, max, min, extend or concat")
            if isinstance(value, str) and value != "all":
                raise ValueError(f"{what} must be a number, a list or 'all', not '{value}'")
        if layer_method == quantile_method == "concat":
            raise ValueError("layer_method and quantile_method are both concat: only one can be")
        if quantile != "all" and (wrong := [q for q in self.quantiles() if not 0 <= q <= 1]):
            raise ValueError(f"quantile {wrong[0]} is not between 0 and 1 (or -1, the last)")
        self.cacheable = quantile != "all" or quantile_method in REDUCE

    def quantiles(self):
        return [1.0 if q == -1 else float(q) for q in (self.quantile if isinstance(self.quantile, (list, tuple)) else [self.quantile])]

    def layers(self, n_layer):
        """Indices of the hidden states of a model of n_layer blocks."""
        if self.layer == "all":
            if n_layer < 2:
                raise ValueError("layer='all' is all but the first and the last state, and a model of one block has none: give their numbers")
            return list(range(1, n_layer))
        asked = self.layer if isinstance(self.layer, (list, tuple)) else [self.layer]
        if wrong := [i for i in asked if not -n_layer - 1 <= i <= n_layer]:
            raise ValueError(f"no layer {wrong[0]}: there are 0 (embeddings) to {n_layer}, -1 is the last")
        return [i % (n_layer + 1) for i in asked]

    def poolings(self):
        """Names in the cache that it is made of."""
        return [self.quantile_method] if self.quantile == "all" else [str(q) for q in self.quantiles()]

    def labels(self, n_layer):
        """(layer, quantile) as results name them."""
        layers = self.layers(n_layer)
        near = layers == list(range(layers[0], layers[-1] + 1))
        layer = layers[0] if len(layers) == 1 else f"{layers[0]}-{layers[-1]}" if near else "+".join(map(str, layers))
        return layer, "all" if self.quantile == "all" else "+".join(map(str, self.quantiles()))

    def site(self, n_layer):
        """What makes it another site than another PoolToken: quantiles 1.0 and -1 are one, which counts once in Holm's correction."""
        layers, quantiles = self.layers(n_layer), self.poolings()
        return (tuple(layers), tuple(quantiles), self.layer_method if len(layers) > 1 else None,
                self.quantile_method if len(quantiles) > 1 else None, self.dedupe or len(quantiles) == 1)

    def __call__(self, outputs):
        return self.pool(outputs)[0]

    def pool(self, outputs):
        """Rows (R, H') and the text of each (R,), from {'hidden_states', 'attention_mask'}; pads may stand on either side."""
        mask = torch.as_tensor(outputs["attention_mask"]).bool()  # (B, T)
        states = outputs["hidden_states"]
        if not mask.any(1).all():
            raise ValueError("a text without a token cannot be pooled: leave it out")
        x = torch.stack([states[i] for i in self.layers(len(states) - 1)], 1)  # (B, L, T, H)
        if self.quantile == "all":
            keep = mask
        else:
            at = token_index(mask, self.quantiles())  # (B, Q)
            x = x.gather(2, at[:, None, :, None].expand(-1, x.size(1), -1, x.size(3)))
            keep = self._first(at)
        return self._combine(x, keep)

    def from_states(self, states):
        """The same from cached States: X (R, H') numpy, index (R,)."""
        where = [states.layers.index(i) for i in self.layers(states.n_layer)]
        rows, index = [], []
        for at in range(0, len(states.lengths), 4096):  # (n, L, Q, H)
            x = torch.stack([torch.from_numpy(states.arrays[p][at:at + 4096][:, where].astype(np.float32)) for p in self.poolings()], 2)
            lengths = torch.from_numpy(states.lengths[at:at + 4096]).long()
            keep = torch.ones(len(x), 1, dtype=torch.bool) if self.quantile == "all" else \
                self._first(torch.stack([(q * (lengths.double() - 1)).round().long() for q in self.quantiles()], 1))
            part, of = self._combine(x, keep)
            rows.append(part.numpy())
            index.append(of.numpy() + at)
        return np.concatenate(rows), np.concatenate(index)

    def _first(self, at):
        """keep (B, Q): False where an earlier quantile of the text is the same token."""
        again = (at[:, :, None] == at[:, None, :]).tril(-1).any(2)
        return ~again if self.dedupe else torch.ones_like(again)

    def _combine(self, x, keep):
        """x (B, L, Q, H), keep (B, Q) → rows and their texts."""
        B, index = len(x), torch.arange(len(x), device=x.device)
        method, seen = self.quantile_method, keep[:, None, :, None].to(x.device)
        if x.size(2) == 1 and self.quantile != "all":
            x = x[:, :, 0]
        elif method == "mean":
            x = (x * seen).sum(2) / seen.sum(2)
        elif method in REDUCE:
            x = x.masked_fill(~seen, -math.inf).amax(2) if method == "max" else x.masked_fill(~seen, math.inf).amin(2)
        elif method == "extend":
            if self.quantile == "all" and not keep.all():
                raise ValueError("quantile='all' with extend wants texts of one length: take mean, max, min or concat")
            x = x.flatten(2)
        else:  # concat: (R, L, H)
            index = index[:, None].expand_as(keep)[keep]
            x = x.transpose(1, 2)[keep.to(x.device)]
        if x.size(1) == 1:
            return x[:, 0], index
        method = self.layer_method
        if method == "concat":
            return x.flatten(0, 1), index.repeat_interleave(x.size(1))
        assert method is not None and B
        return {"mean": lambda: x.mean(1), "max": lambda: x.amax(1), "min": lambda: x.amin(1), "extend": lambda: x.flatten(1)}[method](), index


def token_index(mask, quantiles):
    """(B, Q) positions of the quantiles among the real tokens of mask (B, T), wherever the pads are."""
    first, lengths = mask.int().argmax(1), mask.sum(1)
    at = torch.stack([(q * (lengths.double() - 1)).round().long() for q in quantiles], 1)
    return first[:, None] + at


# ---- the one pass

class States:
    """Pooled states of a list of texts: arrays {pooling: (N, layers, H) memmap}, lengths (N,), layers, n_layer."""

    def __init__(self, arrays, lengths, layers, n_layer, truncated):
        self.arrays, self.lengths, self.layers, self.n_layer, self.truncated = arrays, lengths, layers, n_layer, truncated


def pooled_states(model, texts, layers, poolings, folder, batch_tokens=4096, dtype="float32", progress=None, say=print):
    """States of all texts at all layers and poolings, out of the cache in `folder`, which is filled by one pass over the texts that it lacks. At any
    time one layer of one batch is held; memory does not depend on the number of texts. Format: this file's docstring."""
    rows, truncated = model.encode(texts)
    poolings = list(dict.fromkeys(p if p in REDUCE else str(float(p)) for p in poolings))
    key = hashlib.sha256(json.dumps(["pooled-1", model.fingerprint(), list(layers), dtype]).encode())
    for row in rows:
        key.update(np.array([len(row), *row], "<i8").tobytes())
    folder = Path(folder) / key.hexdigest()[:20]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another job that wants the same waits, then reads
        N, shape = len(rows), (len(rows), len(layers), model.width)
        lengths = np.array([len(row) - model.bos for row in rows])
        done = {}
        for p in poolings:
            flags, path = folder / f"{p}.done", folder / f"{p}.npy"
            if not (flags.exists() and path.exists()):
                np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
                flags.write_bytes(bytes(N))
            done[p] = np.frombuffer(flags.read_bytes(), np.uint8)
        todo = [p for p in poolings if not done[p].all()]
        if todo:
            left = np.flatnonzero(~np.all([done[p] for p in todo], 0).astype(bool))
            if truncated:
                say(f"{model.name}: {truncated} of {N} texts are longer than its {model.max_length} tokens and were cut")
            with aside(folder / "lengths.npy") as f:
                np.save(f, lengths)
            write_aside(folder / "meta.json", json.dumps(dict(format="pooled-1", model=model.name, texts=N, layers=list(layers), width=model.width, dtype=dtype,
                                                              truncated=truncated)))
            _fill(model, [rows[i] for i in left], left, list(layers), todo, folder, batch_tokens, dtype, progress)
        arrays = {p: np.load(folder / f"{p}.npy", mmap_mode="r") for p in poolings}
    return States(arrays, lengths, list(layers), model.n_layer, truncated)


def _fill(model, rows, numbers, layers, poolings, folder, batch_tokens, dtype, progress):
    """Run the texts `rows`, which are rows `numbers` of the files, and write each as soon as its batch is through: a record, then its flag."""
    quantiles = [float(p) for p in poolings if p not in REDUCE]
    order = [p for p in poolings if p not in REDUCE] + [p for p in poolings if p in REDUCE]
    files = {p: open(folder / f"{p}.npy", "r+b") for p in poolings}
    flags = {p: open(folder / f"{p}.done", "r+b") for p in poolings}
    start = {p: np.load(folder / f"{p}.npy", mmap_mode="r").offset for p in poolings}
    written, last = [], time.time()

    def settle():
        for p in poolings:
            os.fsync(files[p].fileno())
            for i in written:
                os.pwrite(flags[p].fileno(), b"\1", i)
        written.clear()
    try:
        for batch in length_batches(rows, batch_tokens):
            ids, real = model.pad([rows[i] for i in batch])
            if model.bos:
                real_tokens = real.clone()
                real_tokens[torch.arange(len(real)), real.int().argmax(1)] = False
            else:
                real_tokens = real
            at, count = token_index(real_tokens, quantiles) if quantiles else None, real_tokens.sum(1, keepdim=True)
            pooled = torch.empty(len(order), len(batch), len(layers), model.width, device=model.device)

            def take(i, x, at=at, count=count, pooled=pooled, mask=real_tokens[:, :, None]):
                out = pooled[:, :, layers.index(i)]  # (P, B, H)
                if quantiles:
                    out[:len(quantiles)] = x.gather(1, at[:, :, None].expand(-1, -1, x.size(2))).transpose(0, 1)
                for j, p in enumerate(order[len(quantiles):], len(quantiles)):
                    out[j] = (x.float() * mask).sum(1) / count if p == "mean" else \
                        x.masked_fill(~mask, -math.inf).amax(1) if p == "max" else x.masked_fill(~mask, math.inf).amin(1)
            model.run(ids, real, layers, take)
            records = pooled.cpu().numpy().astype(dtype)
            if not np.isfinite(records).all():
                raise ValueError(f"{model.name}: hidden states are not finite as {dtype}: give cache_dtype=float32, dtype=float32")
            size = records[0, 0].nbytes
            for j, p in enumerate(order):
                for k, i in enumerate(batch):
                    os.pwrite(files[p].fileno(), records[j, k], start[p] + int(numbers[i]) * size)
            written += [int(numbers[i]) for i in batch]
            if progress is not None:
                progress.update(len(batch))
            if time.time() - last > 10:
                settle()
                last = time.time()
    finally:
        settle()
        for f in [*files.values(), *flags.values()]:
            f.close()


# ---- probes fitted at all sites at once; X is (G, N, H): G sites (layers × poolings), N texts

def moments(X, Y):
    """What a closed-form probe needs of rows X (G, n, H) with targets Y (n, C): sums that add up over folds and are subtracted to leave one out."""
    found = dict(n=torch.tensor(float(len(Y))), s=X.sum(1), S=X.mT @ X, XY=X.mT @ Y.to(X.dtype), y=Y.sum(0))
    return {k: v.double() for k, v in found.items()}


def add(parts):
    """The moments of several folds as those of all their rows."""
    return {k: sum(p[k] for p in parts) for k in parts[0]}


def scaled(m):
    """Mean (G, H), scale (G, H) and covariance (G, H, H) of standardised features."""
    mu = m["s"] / m["n"]
    C = m["S"] / m["n"] - mu[:, :, None] * mu[:, None]
    sd = C.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    sd = torch.where(sd > 1e-6, sd, 1.0)  # a feature that never varies
    return mu, sd, C / (sd[:, :, None] * sd[:, None])


def unscaled(coef, intercept, mu, sd):
    """Weights for standardised features as weights for the features: (G, H, C), (G, 1, C), float32."""
    coef = coef / sd[:, :, None]
    return coef.float(), (intercept[:, None] - (mu[:, None] @ coef)).float()


def solve(A, B):
    """A⁻¹ B for positive definite A (G, H, H), B (G, H, C)."""
    return torch.cholesky_solve(B, torch.linalg.cholesky(A))


def ridge(m, alphas):
    """Ridge regression on standardised features at every penalty: as sklearn's Ridge(alpha) behind StandardScaler. [(W (G, H, C), b (G, 1, C)), ...]"""
    mu, sd, C = scaled(m)
    ybar = m["y"] / m["n"]
    xy = (m["XY"] / m["n"] - mu[:, :, None] * ybar) / sd[:, :, None]
    eye = torch.eye(C.size(1), dtype=C.dtype, device=C.device)
    return [unscaled(solve(C + (alpha / m["n"] + 1e-9) * eye, xy), ybar.expand(len(mu), -1), mu, sd) for alpha in alphas]


def lda(m, shrinkages):
    """Linear discriminant analysis on standardised features at every shrinkage towards the mean variance: as sklearn's LinearDiscriminantAnalysis(
    solver='lsqr', shrinkage=s) behind StandardScaler. Targets are one-hot; scores are log-posteriors up to a constant; two classes: their difference."""
    mu, sd, C = scaled(m)
    prior = (m["y"] / m["n"]).clamp_min(1e-12)
    means = (m["XY"] / m["y"].clamp_min(1) - mu[:, :, None]) / sd[:, :, None]  # (G, H, K)
    Sw = C - (means * prior) @ means.mT
    eye, found = torch.eye(C.size(1), dtype=C.dtype, device=C.device), []
    variance = Sw.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    for s in shrinkages:
        coef = solve((1 - s) * Sw + (s * variance + 1e-9) * eye, means)
        intercept = prior.log() - 0.5 * (means * coef).sum(1)
        if len(prior) == 2:
            coef, intercept = coef[..., 1:] - coef[..., :1], intercept[..., 1:] - intercept[..., :1]
        found.append(unscaled(coef, intercept, mu, sd))
    return found


def standardise(X, rows):
    """X (G, N, H) with mean 0 and variance 1 over `rows`."""
    Z = X - X[:, rows].mean(1, keepdim=True)
    sd = torch.linalg.vector_norm(Z[:, rows], dim=1, keepdim=True) / len(rows) ** 0.5
    return Z.mul_(torch.where(sd > 1e-6, 1 / sd, 1.0))


def times(X, d):
    """X (G, n, H) @ d (G, H, K), fast for one column too."""
    return X @ d if d.size(2) > 1 or X.is_cuda else torch.stack([x @ v for x, v in zip(X, d)])


def logistic(X, Y, C, tol=1e-4, max_iter=300, start=None, gram=None):
    """Logistic regression at G sites: X (G, n, H) standardised, Y (n, 1) of 0 and 1, or (n, K) one-hot. Minimises mean log-loss + |W|² / (2 C n),
    scikit-learn's objective, until no entry of a site's gradient exceeds tol. L-BFGS preconditioned by the Cholesky factor of the curvature's bound
    (Böhning 1992), exact line search along X d, so an iteration reads X twice. C: a number; gram: X.mT @ X where it is known. → W (G, H, K), b (G, 1, K)."""
    G, n, H = X.shape
    K, lam = Y.size(1), 1 / (C * n)
    bound = 0.25 if K == 1 else 0.5
    gram = (X.mT @ X if gram is None else gram) * (bound / n)
    gram.diagonal(dim1=1, dim2=2).add_(lam)
    factor = torch.linalg.cholesky(gram)
    theta = torch.zeros(G, H + 1, K, dtype=X.dtype, device=X.device) if start is None else start.clone()
    Z = times(X, theta[:, :-1]) + theta[:, -1:]  # (G, n, K)

    def probabilities(Z):
        return Z.sigmoid() if K == 1 else Z.softmax(-1)

    def dot(a, b):
        return (a * b).flatten(1).sum(1)[:, None, None]

    def precondition(g):
        return torch.cat([torch.cholesky_solve(g[:, :-1], factor), g[:, -1:] / bound], 1)

    history, old = [], None
    for _ in range(max_iter):
        R = (probabilities(Z) - Y) / n
        g = torch.cat([times(X.mT, R) + lam * theta[:, :-1], R.sum(1, keepdim=True)], 1)
        going = (g.abs().amax((1, 2)) > tol)[:, None, None]
        if not going.any():
            break
        if old is not None:
            s, y = theta - old[0], g - old[1]
            sy = dot(s, y)
            history = [*history, (s, y, torch.where(sy > 0, 1 / sy.clamp_min(1e-30), 0.0))][-8:]
        old = theta, g
        q, alphas = g, []
        for s, y, rho in reversed(history):
            alphas.append(rho * dot(s, q))
            q = q - alphas[-1] * y
        d = precondition(q)
        for (s, y, rho), alpha in zip(history, reversed(alphas)):
            d = d + s * (alpha - rho * dot(y, d))
        d = -d * going
        Zd = times(X, d[:, :-1]) + d[:, -1:]
        wd, dd = lam * dot(theta[:, :-1], d[:, :-1]), lam * dot(d[:, :-1], d[:, :-1])
        t = torch.ones(G, 1, 1, dtype=X.dtype, device=X.device)
        for _ in range(4):  # the loss along d is convex: Newton in one dimension
            P = probabilities(Z + t * Zd)
            slope = ((P - Y) * Zd).sum((1, 2), keepdim=True) / n + wd + t * dd
            mean = 0 if K == 1 else (P * Zd).sum(2, keepdim=True)
            curve = ((P * (1 - P) * Zd.square()) if K == 1 else P * (Zd - mean).square()).sum((1, 2), keepdim=True) / n + dd
            t = (t - slope / curve.clamp_min(1e-20)).clamp(0.05, 20.0)
        theta, Z = theta + t * d, Z + t * Zd
    return theta[:, :-1], theta[:, -1:]


class SingleStepOpt:
    """A probe in the manner of scikit-learn. A subclass sets self.name, self.discrete_targets (targets are 0 and 1, or classes) and self.classifier. fit(X, y),
    then probe(X) gives scores: (n,), or (n, K) of several classes. The threshold is found on scores of other texts (best_thresholds)."""

    name, discrete_targets, classifier = "", True, None

    def fit(self, X, y):
        self.classifier.fit(X, np.round(y).astype(int) if self.discrete_targets else y)
        return self

    def forward(self, X):
        for method in ("predict_proba", "decision_function", "transform", "predict"):
            if not self.discrete_targets and method != "predict" or not hasattr(self.classifier, method):
                continue
            scores = np.asarray(getattr(self.classifier, method)(X), float)
            if method == "predict" and self.discrete_targets and len(self.classifier.classes_) > 2:
                scores = (scores[:, None] == self.classifier.classes_).astype(float)
            return scores[:, 1] if scores.ndim == 2 and scores.shape[1] == 2 else scores[:, 0] if scores.ndim == 2 and scores.shape[1] == 1 else scores

    __call__ = forward

    @classmethod
    def of(cls, name, classifier, discrete_targets=True):
        """A constructor, input_size → probe, for any scikit-learn estimator."""
        def make(input_size):
            probe = cls()
            probe.name, probe.discrete_targets, probe.classifier = name, discrete_targets, make_pipeline(StandardScaler(), classifier())
            return probe
        return make


class MultiStepOpt(nn.Module):
    """A probe in the manner of torch: a subclass sets self.name and forward(X) → (n, 1) logits (binary), values (regression), or (n, K) logits. It is trained
    with Adam on standardised features, in batches, and the epoch that is best on the validation texts is kept. All sites are trained in one optimiser:
    their parameters are stacked, and forward is vmapped over them."""

    name, batch_size, max_epoch, min_steps, learning_rate, attention = "", 128, 30, 300, 3e-3, False

    def fit(self, X, y, X_val, y_val, kind="binary", seed=0):
        """One site alone: X (n, H), y (n,); numpy or torch."""
        X, X_val = (torch.as_tensor(x, dtype=torch.float32)[None] for x in (X, X_val))
        self.mu, self.sd = X.mean(1), X.std(1, correction=0).clamp_min(1e-6)
        stack = train_multistep([self], (X - self.mu[:, None]) / self.sd[:, None], torch.as_tensor(y), (X_val - self.mu[:, None]) / self.sd[:, None],
                                torch.as_tensor(y_val), kind, seed)
        self.load_state_dict({k: v[0] for k, v in stack.items()}, strict=False)
        return self

    @torch.no_grad()
    def predict(self, X):
        return self.eval()((torch.as_tensor(X, dtype=torch.float32) - self.mu) / self.sd)


class SingleLayer(MultiStepOpt):
    """A linear layer."""
    def __init__(self, input_size, output_size=1):
        super().__init__()
        self.name = "SingleLayer"
        self.linear = nn.Linear(input_size, output_size)

    def forward(self, X):
        return self.linear(X)


class DoubleLayer(MultiStepOpt):
    """One hidden layer of ReLUs."""
    def __init__(self, input_size, output_size=1, hidden=100):
        super().__init__()
        self.name = "DoubleLayer"
        self.net = nn.Sequential(nn.Linear(input_size, hidden), nn.ReLU(), nn.Linear(hidden, output_size))

    def forward(self, X):
        return self.net(X)


class GatedLayer(MultiStepOpt):
    """One hidden layer of gated linear units."""
    def __init__(self, input_size, output_size=1, hidden=100):
        super().__init__()
        self.name = "GatedLayer"
        self.gate, self.out = nn.Linear(input_size, 2 * hidden), nn.Linear(hidden, output_size)

    def forward(self, X):
        return self.out(F.glu(self.gate(X)))


class AttentionPool(MultiStepOpt):
    """softmax(q · h_t) pooling over a text's tokens, then a linear layer. It needs the states of every token: the model runs again in each epoch, a
    batch of token states lives as long as its batch, and the probes of all layers and all folds learn from it together."""

    max_epoch, min_steps, learning_rate, attention = 10, 200, 3e-3, True

    def __init__(self, input_size, output_size=1):
        super().__init__()
        self.name = "AttentionPool"
        self.query, self.linear = nn.Linear(input_size, 1), nn.Linear(input_size, output_size)

    def forward(self, X, mask):  # X (B, T, H), mask (B, T)
        X = F.layer_norm(X, X.shape[-1:])
        weight = self.query(X)[..., 0].masked_fill(~mask, -1e9).softmax(-1)
        return self.linear((weight[..., None] * X).sum(1))


def losses_of(out, y, kind):
    """Loss of each text: out (..., n, C), y (n,) → (..., n)."""
    if kind == "multi":
        return -out.log_softmax(-1).gather(-1, y.long().expand(out.shape[:-1])[..., None])[..., 0]
    out, y = out[..., 0], y.to(out.dtype).expand(out.shape[:-1])
    return F.binary_cross_entropy_with_logits(out, y, reduction="none") if kind == "binary" else (out - y).square()


def as_scores(out, kind):
    """Probabilities, or values, from a probe's outputs (..., n, C) → (..., n) or (..., n, K), float64 so that sure ones stay apart."""
    out = out.double()
    return (out.softmax(-1) if kind == "multi" else out[..., 0].sigmoid() if kind == "binary" else out[..., 0]).cpu().numpy()


def stacked(models):
    """Parameters of G equal modules, stacked, and the function (params, x (G, n, H), ...) → (G, n, C)."""
    params = {k: torch.stack([dict(m.named_parameters())[k].detach() for m in models]).requires_grad_(True) for k, _ in models[0].named_parameters()}
    buffers = dict(models[0].named_buffers())
    return params, torch.vmap(lambda p, *x: torch.func.functional_call(models[0], (p, buffers), x), in_dims=(0, 0), randomness="different")


def train_multistep(models, X, y, X_val, y_val, kind, seed):
    """Train G probes, one on each site of X (G, n, H), in one Adam. → stacked parameters of each site's best epoch on X_val, y_val."""
    params, forward = stacked(models)
    options, best, least = models[0], {k: v.detach().clone() for k, v in params.items()}, torch.full((len(models),), math.inf)
    optimizer = torch.optim.Adam(params.values(), lr=options.learning_rate)
    for epoch in range(max(options.max_epoch, options.min_steps // -(-len(y) // options.batch_size))):  # a few hundred texts need more epochs
        models[0].train()
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(key_seed(seed, epoch)))
        for rows in order.split(options.batch_size):
            optimizer.zero_grad()
            losses_of(forward(params, X[:, rows]), y[rows], kind).mean(1).sum().backward()
            optimizer.step()
        models[0].eval()
        with torch.no_grad():
            now = losses_of(forward(params, X_val), y_val, kind).mean(1)
            better = now < least
            least = torch.where(better, now, least)
            for k, v in params.items():
                best[k][better] = v.detach()[better]
    return best


CLOSED = {"Ridge": ridge, "LDA": lda}
GRIDS = {"Ridge": [1e-1, 1e0, 1e1, 1e2, 1e3, 1e4], "LDA": [0.003, 0.03, 0.1, 0.3, 0.7], "Logistic": [1e-3, 1e-2, 1e-1]}  # penalty, shrinkage, C
PROBES = {"LDA": None, "Ridge": None, "Logistic": None, "SingleLayer": SingleLayer, "DoubleLayer": DoubleLayer, "GatedLayer": GatedLayer,
          "AttentionPool": AttentionPool, "QDA": SingleStepOpt.of("QDA", lambda: QuadraticDiscriminantAnalysis(reg_param=0.1)),
          "NaiveBayes": SingleStepOpt.of("NaiveBayes", GaussianNB), "NearestCentroid": SingleStepOpt.of("NearestCentroid", NearestCentroid),
          "RandomForest": SingleStepOpt.of("RandomForest", lambda: RandomForestClassifier(200, random_state=0))}


# ---- evaluate

def best_thresholds(y, score):
    """Thresholds (...) of scores (..., n) for labels y (n,) of 0 and 1, said to be 1 where score >= threshold: the best one for accuracy and the best one for
    F1 of all that there are, by one sweep over the sorted scores."""
    score = np.asarray(score, float)
    order = np.argsort(-score, -1, kind="stable")
    s, hit = np.take_along_axis(score, order, -1), np.asarray(y)[order].astype(float)
    tp = np.concatenate([np.zeros((*s.shape[:-1], 1)), hit.cumsum(-1)], -1)  # the first 0, 1, ... n are said to be 1
    said, positives = np.arange(s.shape[-1] + 1), hit.sum(-1, keepdims=True)
    cuts = np.concatenate([np.nextafter(s[..., :1], np.inf), (s[..., 1:] + s[..., :-1]) / 2, s[..., -1:]], -1)
    possible = np.concatenate([np.ones_like(tp[..., :1], bool), s[..., 1:] < s[..., :-1], np.ones_like(tp[..., :1], bool)], -1)  # equal scores go together
    found = {}
    for what, value in (("accuracy", 2 * tp - said), ("f1", 2 * tp / np.maximum(said + positives, 1))):
        at = np.where(possible, value, -np.inf).argmax(-1)
        found[what] = np.take_along_axis(cuts, at[..., None], -1)[..., 0]
    return found


def evaluator(y, score, kind="binary", thresholds=None):
    """Measures of scores against y (n,), over any leading axes at once. binary, score (..., n): mse, accuracy and f1 (each at its own threshold),
    balanced_accuracy, auc, mcc. multi, score (..., n, K): accuracy, balanced_accuracy, f1 (macro). regression, score (..., n): mse, r2, pearson."""
    y, score = np.asarray(y), np.asarray(score, float)
    if kind == "regression":
        error, dev = np.square(score - y).mean(-1), score - score.mean(-1, keepdims=True)
        r = (dev * (y - y.mean())).mean(-1) / np.maximum(dev.std(-1) * y.std(), 1e-12)
        return dict(mse=error, r2=1 - error / max(y.var(), 1e-12), pearson=r)
    if kind == "multi":
        said, classes = score.argmax(-1), np.unique(y)
        right = said == y
        recall = np.stack([right[..., y == c].mean(-1) for c in classes])
        f1 = np.stack([2 * (right & (y == c)).sum(-1) / ((said == c).sum(-1) + (y == c).sum()) for c in classes])
        return dict(accuracy=right.mean(-1), balanced_accuracy=recall.mean(0), f1=f1.mean(0))
    thresholds = thresholds or dict(accuracy=0.5, f1=0.5)

    def counts(threshold):
        said = score >= np.asarray(threshold)[..., None]
        tp, fp = (said & (y == 1)).sum(-1).astype(float), (said & (y == 0)).sum(-1).astype(float)
        return tp, fp, (y == 0).sum() - fp, (y == 1).sum() - tp
    tp, fp, tn, fn = counts(thresholds["accuracy"])
    balanced = (tp / max((y == 1).sum(), 1) + tn / max((y == 0).sum(), 1)) / len(np.unique(y))
    found = dict(mse=np.square(score - y).mean(-1), accuracy=(tp + tn) / len(y), balanced_accuracy=balanced)
    found["mcc"] = (tp * tn - fp * fn) / np.sqrt(np.maximum((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn), 1))
    tp, fp, tn, fn = counts(thresholds["f1"])
    ranks = scipy.stats.rankdata(score, axis=-1)
    positives, negatives = (y == 1).sum(), (y == 0).sum()
    auc = (ranks[..., y == 1].sum(-1) - positives * (positives + 1) / 2 + (positives * negatives == 0) / 2) / max(positives * negatives, 1)
    return found | dict(f1=2 * tp / np.maximum(2 * tp + fp + fn, 1), auc=auc)


def constants(y_train, y, kind):
    """What the best constant answer, learnt on y_train, scores on y."""
    if kind == "regression":
        return dict(mse=np.square(y - y_train.mean()).mean(), r2=0.0, pearson=0.0)
    values, counts = np.unique(y_train, return_counts=True)
    top = values[counts.argmax()]
    share = (y == top).mean()
    if kind == "multi":
        k = len(np.unique(y))
        return dict(accuracy=share, balanced_accuracy=1 / k, f1=2 * share / (1 + share) / k)
    positive = (y == 1).mean()  # F1 of answering 1 always
    return dict(mse=np.square(y - y_train.mean()).mean(), accuracy=share, balanced_accuracy=0.5, f1=2 * positive / (1 + positive), auc=0.5, mcc=0.0)


def corrected_t(scores, chance, ratio, n_test):
    """Mean (...), 95 % interval and one-sided p (above chance) of scores (..., J) over J folds of n_test texts whose training sets overlap; ratio: a fold's
    size over that of what is learnt from, 1 / (k - 1) where the other folds are (Nadeau & Bengio 2003)."""
    J, mean = scores.shape[-1], scores.mean(-1)
    se = np.sqrt((1 / J + ratio) * scores.var(-1, ddof=1))
    se = np.maximum(se, 0.5 / (n_test * J))  # folds that agree by chance, or all perfect: no surer than half a text
    half = scipy.stats.t.ppf(0.975, J - 1) * se  # (...,)
    return mean, mean - half, mean + half, scipy.stats.t.sf((mean - chance) / se, J - 1)


def holm(p):
    """Holm's step-down correction of p-values (m,): family-wise error over all of them."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    out = np.empty_like(p)
    out[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return out


class Task:
    """What a probe is asked at some sites: y and kind, which rows may be learnt from and which are judged; index: the text of each row."""

    def __init__(self, dataset, y, index=None):
        self.dataset, self.kind = dataset, dataset.kind
        self.index = np.arange(len(y)) if index is None else index
        self.sentence_y, self.y = y, y[self.index]
        test = np.zeros(len(y), bool) if dataset.split is None else dataset.split == "test"
        self.learn, self.judge = ~test[self.index], (test if test.any() else ~test)[self.index]
        self.K = int(dataset.y.max()) + 1 if self.kind != "regression" else 1
        rows = torch.as_tensor(self.y)
        self.Y = F.one_hot(rows.long(), self.K).float() if self.kind != "regression" else rows.float()[:, None]

    def folds(self, k, seed):
        return folds_of(self.dataset, self.sentence_y, k, seed)[self.index]

    def of_size(self, n, k, seed):
        """The same with about n rows to learn from when one of k folds is left out: whole groups, drawn at random."""
        part, groups = copy.copy(self), self.dataset.groups[self.index]
        names = np.random.default_rng(key_seed(seed, "size")).permutation(np.unique(groups[self.learn]))
        counts = pd.Series(groups[self.learn]).value_counts().reindex(names).cumsum()
        part.learn = self.learn & np.isin(groups, names[counts.to_numpy() <= n * k / (k - 1)])
        return part


def nested(probe, X, task, folds, k, seed):
    """For each outer fold: (rows to choose on, scores there, test rows, scores there, number of rows learnt from). Scores (G, n) or (G, n, K). Penalties are
    chosen per site by the log-loss (squared error) on inner folds. probe: a name of PROBES, or input_size → SingleStepOpt or MultiStepOpt."""
    make = PROBES.get(probe) if isinstance(probe, str) else probe
    rows = [torch.as_tensor(np.flatnonzero(task.learn & (folds == f))) for f in range(k)]
    y = torch.as_tensor(task.y)
    if make is None and probe in CLOSED:
        X = X - X[:, torch.cat(rows)].mean(1, keepdim=True)  # any shift will do: it keeps the sums small
        parts, grid, cache = [moments(X[:, r], task.Y[r]) for r in rows], GRIDS[probe], {}

        def weights(*out):
            key = frozenset(out)
            if key not in cache:
                found = CLOSED[probe](add([p for f, p in enumerate(parts) if f not in out]), grid)
                cache[key] = [torch.stack(w) for w in zip(*found)]  # (A, G, H, C), (A, G, 1, C)
            return cache[key]
    for o in range(k):
        test = np.flatnonzero(task.judge & (folds == o))
        train = torch.cat([r for f, r in enumerate(rows) if f != o])
        if make is None and probe in CLOSED:
            inner = [f for f in range(k) if f != o]
            choose, out = torch.cat([rows[f] for f in inner]), []
            for f in inner:
                W, b = weights(o, f)
                out.append(X[:, rows[f]] @ W + b)  # (A, G, n_f, C)
            out = torch.cat(out, 2)
            best = _losses(probe, out, task, choose).mean(2).argmin(0)  # (G,)
            W, b = weights(o)
            site = torch.arange(len(X))
            final = X[:, test] @ W[best, site] + b[best, site]
            yield choose.numpy(), _closed_scores(probe, out[best, site], task), test, _closed_scores(probe, final, task), len(train)
            continue
        choose = rows[(o + 1) % k]
        fit = torch.cat([r for f, r in enumerate(rows) if f not in (o, (o + 1) % k)])
        Z = standardise(X, fit)
        if make is None:  # Logistic: C on the inner fold, then once more with it
            Y = task.Y if task.kind == "multi" else task.Y[:, 1:]
            out, start, some, held = [], None, Z[:, fit], Z[:, choose]
            gram = some.mT @ some
            for C in GRIDS[probe]:
                W, b = logistic(some, Y[fit], C, start=start, gram=gram)
                start = torch.cat([W, b], 1)
                out.append(times(held, W) + b)
            out = torch.stack(out)  # (A, G, n, C)
            best, final = losses_of(out, y[choose], task.kind).mean(2).argmin(0), torch.empty(len(X), len(test), Y.size(1))
            for a, C in enumerate(GRIDS[probe]):
                if (at := best == a).any():
                    W, b = logistic(Z[at][:, train], Y[train], C, start=start[at])
                    final[at] = Z[at][:, test] @ W + b
            yield choose.numpy(), as_scores(out[best, torch.arange(len(X))], task.kind), test, as_scores(final, task.kind), len(train)
            continue
        first = build(make, X.size(2), task)
        if isinstance(first, MultiStepOpt):
            models = []
            for _ in range(len(X)):  # every site starts from the same weights
                torch.manual_seed(key_seed(seed, first.name))
                models.append(build(make, X.size(2), task).to(X.device))
            params = train_multistep(models, Z[:, fit], y[fit], Z[:, choose], y[choose], task.kind, seed)
            forward = stacked(models)[1]
            with torch.no_grad():
                yield choose.numpy(), as_scores(forward(params, Z[:, choose]), task.kind), test, as_scores(forward(params, Z[:, test]), task.kind), len(fit)
        else:
            scores = []
            for site in X.cpu().numpy():
                one = build(make, X.size(2), task).fit(site[fit], task.y[fit])
                scores.append((one(site[choose]), one(site[test])))
            yield choose.numpy(), np.stack([s[0] for s in scores]), test, np.stack([s[1] for s in scores]), len(fit)


def _losses(probe, out, task, rows):
    """(A, G, n) losses of a closed-form probe's outputs: log-loss of LDA; of ridge the squared error."""
    if probe == "LDA":
        return losses_of(out, torch.as_tensor(task.y[rows]), task.kind)
    return (out - task.Y[rows]).square().sum(-1)


def _closed_scores(probe, out, task):
    if probe == "LDA":
        return as_scores(out, task.kind)
    out = out.double().cpu().numpy()
    return out[..., 0] if task.kind == "regression" else out[..., 1] if task.kind == "binary" else out


def build(make, width, task):
    """A probe of this input size, with an output for each class where it can have them."""
    if isinstance(make, type) and task.kind == "multi" and issubclass(make, MultiStepOpt):
        if "output_size" not in inspect.signature(make).parameters:
            raise ValueError(f"{task.dataset.name} has {task.K} classes and the probe {make.__name__} one output: give its constructor an output_size")
        return make(width, output_size=task.K)
    return make(width)


BOUNDS = {"mse": (0, np.inf), "r2": (-np.inf, 1), "pearson": (-1, 1), "mcc": (-1, 1)}  # the others are shares
PRIMARY = {"binary": "accuracy", "multi": "accuracy", "regression": "pearson"}


def judge(outer, task, part):
    """Measures of every outer fold (what nested yields) at its thresholds: dict of test (G, J) and val (G, J, the primary one), chance (J,), the
    out-of-fold scores of the first repetition, n_train, n_test, and the ratio of a fold to what is learnt from; part: the task as it was learnt."""
    tests, vals, chances, sizes, out = [], [], [], [], []
    for repeat, fold, (choose, chosen, test, scores, n_train) in outer:
        y = task.y
        thresholds = best_thresholds(y[choose], chosen) if task.kind == "binary" else None
        tests.append(evaluator(y[test], scores, task.kind, thresholds))
        vals.append(evaluator(y[choose], chosen, task.kind, thresholds)[PRIMARY[task.kind]])
        chances.append(constants(y[task.learn], y[test], task.kind))
        sizes.append((n_train, len(test)))
        if repeat == 0:
            out.append((test, scores, fold, thresholds))
    metrics = tests[0].keys()
    n_train, n_test = np.mean(sizes, 0)
    fold = part.learn.sum() / (1 + max(fold for _, fold, _ in outer))
    return dict(test={m: np.stack([t[m] for t in tests], -1) for m in metrics}, val=np.stack(vals, -1), ratio=fold / n_train,
                chance={m: np.array([c[m] for c in chances]) for m in metrics}, out=out, n_train=n_train, n_test=n_test)


def online_code(X, y, groups, kind, K, seed):
    """Voita & Titov's online code at G sites: the labels are sent block by block, each coded by a logistic probe that has learnt the blocks before; its
    penalty is the one that coded best so far. → bits (G, N) of every label."""
    N, bits = len(y), None
    names = np.random.default_rng(key_seed(seed, "online")).permutation(np.unique(groups))
    order = np.argsort(pd.Series(np.arange(len(names)), names).loc[groups].to_numpy(), kind="stable")
    ends = sorted({max(2 * K, int(round(p / 100 * N))) for p in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25, 50)} - {N}) + [N]
    bits, so_far = np.full((len(X), N), math.log2(K)), torch.zeros(len(GRIDS["Logistic"]), len(X))
    for end, after in zip(ends, ends[1:]):
        learn, code = order[:end], order[end:after]
        Z = standardise(X[:, order[:after]], torch.arange(end))
        known = Z[:, :end]
        gram = known.mT @ known
        Y = F.one_hot(torch.as_tensor(y[learn]).long(), K).float()
        Y = Y if kind == "multi" else Y[:, 1:]
        losses, start = [], None
        for C in GRIDS["Logistic"]:
            W, b = logistic(known, Y, C, start=start, gram=gram)
            start = torch.cat([W, b], 1)
            losses.append(losses_of(Z[:, end:] @ W + b, torch.as_tensor(y[code]), kind) / math.log(2))
        losses = torch.stack(losses)  # (A, G, n)
        bits[:, code] = losses[so_far.argmin(0) if end > ends[0] else torch.full((len(X),), 1), torch.arange(len(X))].numpy()
        so_far += losses.sum(2)
    return bits


def attention_nested(model, make, task, folds, k, seed, layers, batch_tokens):
    """nested() for attention pooling: probes of all layers × all outer folds learn from the same running model; each sees only texts of its own folds."""
    rows, y = model.encode(task.dataset.texts)[0], torch.as_tensor(task.y, device=model.device)
    torch.manual_seed(key_seed(seed, "attention"))
    probe = build(make, model.width, task).to(model.device)
    params = {n: p.detach().expand(len(layers), k, *p.shape).clone().requires_grad_(True) for n, p in probe.named_parameters()}
    one = lambda p, x, mask: torch.func.functional_call(probe, p, (x, mask))
    forward = torch.vmap(torch.vmap(one, in_dims=(0, None, None)), in_dims=(0, 0, None))
    fold = torch.as_tensor(folds)
    fits = torch.stack([torch.as_tensor(task.learn) & (fold != o) & (fold != (o + 1) % k) for o in range(k)]).to(model.device)  # (k, N)

    def outputs(batch):
        states = model.run(*model.pad([rows[i] for i in batch]), keep=True)
        x = torch.stack([states["hidden_states"][i] for i in layers]).float()  # (G, B, T, H)
        return forward(params, x, states["attention_mask"].bool())  # (G, k, B, C)

    optimizer, batches = torch.optim.Adam(params.values(), lr=probe.learning_rate), list(length_batches(rows, batch_tokens))
    for epoch in range(max(probe.max_epoch, probe.min_steps // len(batches))):
        for b in np.random.default_rng(key_seed(seed, epoch)).permutation(len(batches)):
            batch, mask = batches[b], fits[:, batches[b]]
            optimizer.zero_grad()
            loss = losses_of(outputs(batch), y[batch], task.kind) * mask
            (loss.sum(2) / mask.sum(1).clamp_min(1)).sum().backward()
            optimizer.step()
    with torch.no_grad():
        out = torch.cat([outputs(batch) for batch in batches], 2)[:, :, torch.argsort(torch.tensor(sum(batches, [])))]  # (G, k, N, C)
    for o in range(k):
        choose, test = np.flatnonzero(task.learn & (folds == (o + 1) % k)), np.flatnonzero(task.judge & (folds == o))
        yield choose, as_scores(out[:, o, choose], task.kind), test, as_scores(out[:, o, test], task.kind), int(fits[o].sum())


# ---- the sweep

class Sites:
    """Where one model is read on one dataset: poolers, grouped into batches of equal shape. batches() gives (indices of sites, X (G, N, H), index (N,))."""

    def __init__(self, model, dataset, poolers, config, run, note):
        self.model, self.dataset, self.poolers = model, dataset, poolers
        self.labels = [p.labels(model.n_layer) for p in poolers]
        cached = [p for p in poolers if p.cacheable]
        wanted = list(dict.fromkeys(name for p in cached for name in p.poolings()))
        self.layers = model.layers(config.layers)
        read = sorted({i for p in cached for i in p.layers(model.n_layer)})
        bar = run.progress(len(dataset), desc=f"{note} {dataset.name}")
        self.states = pooled_states(model, dataset.texts, read, wanted, config.cache, config.batch_tokens, config.cache_dtype, bar, run.print)
        bar.close()
        self.plain = [i for i, p in enumerate(poolers) if p.cacheable and len(p.layers(model.n_layer)) == len(p.poolings()) == 1]
        room = 2 ** 30 // (4 * model.width * (len(dataset) + 12 * model.width)) + 1  # sites at once: their vectors, sums and factors in a GB
        self.groups = [self.plain[i:i + room] for i in range(0, len(self.plain), room)] + [[i] for i in range(len(poolers)) if i not in self.plain]
        self.config = config

    def vectors(self, i):
        """(N, H) of a plain site."""
        p = self.poolers[i]
        return self.states.arrays[p.poolings()[0]][:, self.states.layers.index(p.layers(self.model.n_layer)[0])].astype(np.float32)

    def batches(self):
        for group in self.groups:
            if group[0] in self.plain:
                yield group, torch.from_numpy(np.stack([self.vectors(i) for i in group])), np.arange(len(self.dataset))
            else:
                p = self.poolers[group[0]]
                if p.cacheable:
                    X, index = p.from_states(self.states)
                else:
                    X, index = self.dataset.load_embeds_into_memory(self.model, p, None, self.config.batch_tokens)[0], self.dataset.index
                yield group, torch.from_numpy(X)[None], index


def measure(sites, probe, y, config, seeds, within=False, n_train=0):
    """{site: result} of a probe at all sites: judge()'s measures, a site each. within: learn from and judge the same part of a given split."""
    found, k = {}, config.n_folds
    make = PROBES.get(probe) if isinstance(probe, str) else probe
    if make is not None and getattr(make, "attention", False):
        groups = [([("attention", i) for i in sites.layers], None, np.arange(len(sites.dataset)))]
    else:
        groups = ((part, X[at:at + step], index) for group, X, index in sites.batches()  # closed forms are fastest while a site's vectors stay in the cache
                  for step in [len(group) if make is not None else max(1, 2 ** 23 // (4 * X[0].numel()))]
                  for at in range(0, len(group), step) for part in [group[at:at + step]])
    for group, X, index in groups:
        task = Task(sites.dataset, y, index)
        if within:
            task.judge = task.learn
        outer = []
        for seed in range(seeds):
            folds = folds_of(sites.dataset, sites.dataset.y, k, key_seed(config.seed, seed) % 2 ** 31)[index]
            part = task.of_size(n_train, k, seed) if n_train else task
            steps = attention_nested(sites.model, make, part, folds, k, config.seed, sites.layers, config.batch_tokens) if X is None else \
                nested(probe, X, part, folds, k, key_seed(config.seed, seed))
            outer += [(seed, fold, step) for fold, step in enumerate(steps)]
        result = judge(outer, task, part)
        learnt, judged = (len(np.unique(index[rows])) / max(rows.sum(), 1) for rows in (part.learn, task.judge))  # texts a row
        for g, i in enumerate(group):
            found[i] = dict(test={m: v[g] for m, v in result["test"].items()}, val=result["val"][g], chance=result["chance"], task=task,
                            n_train=result["n_train"] * learnt, n_test=result["n_test"] * judged, ratio=result["ratio"], n=len(np.unique(index[task.judge])),
                            out=[(rows, scores[g], fold, t and {m: v[g] for m, v in t.items()}) for rows, scores, fold, t in result["out"]])
    return found


def label_of(sites, i):
    """Layer, quantile and methods of a site as columns."""
    if isinstance(i, tuple):
        return dict(layer=i[1], quantile="attention", layer_method="", quantile_method="attention")
    (layer, quantile), p = sites.labels[i], sites.poolers[i]
    return dict(layer=layer, quantile=quantile, layer_method=(p.layer_method or "") if isinstance(layer, str) else "",
                quantile_method=(p.quantile_method or "") if quantile == "all" or "+" in quantile else "")


def write_rows(run, found, sites, asked, keys, null=None):
    """Rows of every site in `asked`, p corrected over all of them, and the row of the layer that was best on validation folds."""
    primary = PRIMARY[sites.dataset.kind]
    real, n_test = keys["baseline"] == "", found[asked[0]]["n_test"]
    for m in [m for m in found[asked[0]]["test"] if m != primary] + [primary]:
        stats = [corrected_t(found[i]["test"][m], found[i]["chance"][m].mean(), found[i]["ratio"], n_test) for i in asked]
        p = [s[3] for s in stats]
        p_holm = holm(p)
        if null is not None and m in null:  # (P, sites): p from shuffled labels; over all sites by the largest of them
            above = np.array([s[0] for s in stats])
            p, p_holm = ((1 + (other >= above).sum(0)) / (1 + len(null[m])) for other in (null[m], null[m].max(1, keepdims=True)))
        for i, (score, low, high, _), one, family in zip(asked, stats, p, p_holm):
            tested, (low, high) = real and m != "mse", np.clip([low, high], *BOUNDS.get(m, (0, 1)))
            run.result(score, found[i]["chance"][m].mean(), low, high, found[i]["n"], **keys, **label_of(sites, i), metric=m,
                       n_train=int(round(found[i]["n_train"])), p=float(one) if tested else None, p_holm=float(family) if tested else None)
    if len(asked) > 1:
        best = np.stack([found[i]["val"] for i in asked]).argmax(0)  # (J,): each fold takes the site that its own validation texts like best
        scores = np.array([found[asked[b]]["test"][primary][j] for j, b in enumerate(best)])
        chance = found[asked[0]]["chance"][primary].mean()
        score, low, high, one = corrected_t(scores, chance, found[asked[0]]["ratio"], n_test)
        low, high = np.clip([low, high], *BOUNDS.get(primary, (0, 1)))
        run.result(score, chance, low, high, found[asked[0]]["n"], **keys, layer="best", quantile="best", layer_method="",
                   quantile_method="", metric=primary, n_train=int(round(found[asked[0]]["n_train"])), p=float(one) if real else None,
                   p_holm=float(one) if real else None)
        return score, low, high, chance, asked[int(np.bincount(best).argmax())]


def slug(*names):
    """One file name out of several names."""
    return "__".join(str(n).replace("/", "-") for n in names)


def keep_for_app(run, found, sites, asked, probe_name):
    """Out-of-fold scores of the first repetition (binary tasks and regressions) and logs in the seed's form."""
    model, dataset = sites.model.name, sites.dataset
    (run.out / "logs").mkdir(exist_ok=True)
    log = {}
    for number, i in enumerate(asked):
        label, test = label_of(sites, i), found[i]["test"]
        data = {"Accuracy": list(test["accuracy"]), "F1": list(test["f1"])} if "accuracy" in test else {"MSE": list(test["mse"])}
        pooler = None if isinstance(i, tuple) else sites.poolers[i]
        log[f"experiment_{number}"] = dict(
            metadata=dataset.meta, expdata=dict(model=model, classifier=probe_name, layer=pooler.layer if pooler else label["layer"],
                                                quantile=pooler.quantile if pooler else "all", layer_method=pooler.layer_method if pooler else None,
                                                quantile_method=pooler.quantile_method if pooler else None, attention=pooler is None),
            data=data | {"train loss": [0], "validation loss": [0], "test loss": list(test.get("mse", [0]))})
        if run.config.keep_predictions and dataset.kind != "multi":
            rows, scores, fold = (np.concatenate(part) for part in zip(*((r, s, np.full(len(r), f)) for r, s, f, _ in found[i]["out"])))
            threshold = np.mean([t["accuracy"] for *_, t in found[i]["out"]]) if dataset.kind == "binary" else np.nan
            (run.out / "predictions").mkdir(exist_ok=True)
            layer, quantile = (f"{label[what]}" + f"-{how}" * (how not in ("", "mean", "attention"))
                               for what, how in (("layer", label["layer_method"]), ("quantile", label["quantile_method"])))
            with aside(run.out / "predictions" / f"{slug(model, dataset.name, probe_name, layer, quantile)}.npz") as f:
                np.savez(f, index=found[i]["task"].index[rows], y=found[i]["task"].y[rows], score=scores, fold=fold, threshold=float(threshold))
    write_aside(run.out / "logs" / f"{slug(model, dataset.name, probe_name)}.json", json.dumps(log))


def keep_projections(run, sites, asked):
    """The texts, and the first two principal components of every plain site."""
    dataset = sites.dataset
    for folder in ("texts", "projections"):
        (run.out / folder).mkdir(exist_ok=True)
    names = dataset.y if dataset.label_names is None else [dataset.label_names[int(v)] for v in dataset.y]
    table = pd.DataFrame(dict(index=np.arange(len(dataset)), text=dataset.texts, label=names))
    write_aside(run.out / "texts" / f"{slug(dataset.name)}.csv", table.to_csv(index=False))
    for i in (i for i in asked if i in sites.plain):
        X, label = sites.vectors(i), label_of(sites, i)
        X = torch.from_numpy(X - X.mean(0))
        value, vector = torch.linalg.eigh(X.T @ X)
        vector = vector[:, [-1, -2]] * vector[:, [-1, -2]].sum(0).sign()  # a sign of its own, the same on every machine
        method = f"-{label['quantile_method']}" if label["quantile_method"] in ("max", "min") else ""
        with aside(run.out / "projections" / f"{slug(sites.model.name, dataset.name, label['layer'], label['quantile'] + method)}.npz") as f:
            np.savez(f, xy=(X @ vector).numpy().astype(np.float32), index=np.arange(len(X)), explained=(value[[-1, -2]] / value.sum()).numpy())


class Finished:
    """Units of the sweep that are written whole, by any worker, with these options."""

    def __init__(self, run):
        self.run, self.path = run, run.out / f"units.part-{run.rank}.txt"
        lines = [line for part in run.out.glob("units.part-*.txt") for line in part.read_text().splitlines()]
        self.units = {line.split(" ", 1)[1] for line in lines if line.startswith(run.options_hash() + " ")}

    def __contains__(self, unit):
        return unit in self.units

    def add(self, unit):
        self.units.add(unit)
        with open(self.path, "a") as f:
            f.write(f"{self.run.options_hash()} {unit}\n")


def name_of(probe):
    return probe if isinstance(probe, str) else probe(4).name or probe.__name__


def probe_dataset(run, config, model, twin, dataset, probes, poolers, finished):
    """Everything about one model and one dataset."""
    y, mark = dataset.y, slug(model.name, dataset.name, "content", "")
    content = [model.fingerprint(), dataset.texts, y.tolist(), dataset.groups.tolist(), None if dataset.split is None else dataset.split.tolist()]
    content = mark + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    if any(unit.startswith(mark) and unit != content for unit in finished.units):
        raise ValueError(f"{run.out} holds results of {model.name} on {dataset.name} with other weights, texts or labels: delete it, or give another out_dir=")
    finished.add(content)
    if config.shuffle_labels:
        y = shuffled(dataset, y, np.random.default_rng(key_seed(config.seed, "shuffle")))
        dataset.y = y
    asked = list(range(len(poolers)))
    bag = next((i for i, p in enumerate(poolers) if p.layer == 0 and p.quantile == "all" and p.quantile_method == "mean"), None)
    if bag is None and "layer0" in config.baselines:  # the bag of embeddings is read in any case
        poolers, bag = [*poolers, PoolToken(0, "all", None, "mean")], len(poolers)
    usable = [p for p in probes if not (dataset.kind == "regression" and p in ("LDA", "Logistic", "QDA", "NaiveBayes", "NearestCentroid", "RandomForest"))]
    if len(usable) < len(probes):
        run.print(f"{dataset.name} is a regression: " + (f"only {', '.join(map(name_of, usable))} there" if usable else "Ridge instead of classifiers"))
    probes, primary = usable or ["Ridge"], PRIMARY[dataset.kind]
    synthetic = bool(dataset.meta.get("synthetic"))
    sites = {"": Sites(model, dataset, poolers, config, run, model.name)}
    if twin is not None:
        sites["random_init"] = Sites(twin, dataset, poolers, config, run, f"{model.name}, random weights,")
    if config.keep_predictions and slug(model.name, dataset.name) not in finished:
        keep_projections(run, sites[""], asked)
        finished.add(slug(model.name, dataset.name))
    for probe in probes:
        name, lines = name_of(probe), []
        for baseline, here in sites.items():
            unit = slug(model.name, dataset.name, name, baseline)
            if unit in finished:
                continue
            keys = dict(model=model.name, dataset=dataset.name, probe=name, baseline=baseline, params=model.params, synthetic=synthetic)
            found = measure(here, probe, y, config, config.n_seeds)
            mine = [i for i in found if not isinstance(i, tuple) and i in asked] or list(found)
            null = None
            if config.permutations and not baseline:
                rng, many = np.random.default_rng(key_seed(config.seed, "permutations")), []
                for _ in range(config.permutations):
                    shuffled_y = shuffled(dataset, y, rng)
                    many.append(measure(here, probe, shuffled_y, config, config.n_seeds))
                null = {m: np.array([[one[i]["test"][m].mean() for i in mine] for one in many]) for m in found[mine[0]]["test"]}
            best = write_rows(run, found, here, mine, keys, null)
            if best:
                lines.append(f"{'random weights' if baseline else name} {best[0]:.3f} [{best[1]:.3f}, {best[2]:.3f}]" +
                             ("" if baseline else f" (most often layer {label_of(here, best[4])['layer']})"))
            if not baseline:
                chance = found[mine[0]]["chance"]
                for m, values in chance.items():
                    run.result(values.mean(), values.mean(), *corrected_t(values, 0, found[mine[0]]["ratio"], found[mine[0]]["n_test"])[1:3],
                               found[mine[0]]["n"], **{**keys, "baseline": "majority"}, layer="", quantile="", layer_method="",
                               quantile_method="", metric=m, n_train=int(round(found[mine[0]]["n_train"])), p=None, p_holm=None)
                lines.append(f"majority {chance[primary].mean():.3f}")
                keep_for_app(run, found, here, mine, name)
                if bag in found and "layer0" in config.baselines:
                    write_rows(run, {bag: found[bag]}, here, [bag], {**keys, "baseline": "layer0"})
                    lines.append(f"bag of embeddings {found[bag]['test'][primary].mean():.3f}")
                pooled = [p for p in probes if not getattr(PROBES.get(p) if isinstance(p, str) else p, "attention", False)]
                if "control" in config.baselines and mine[0] in asked and pooled[:1] == [probe]:
                    lines.append(control(run, config, here, probe, y, mine, keys))
                if probe == next((p for p in probes if p in CLOSED), None):
                    for n in config.train_sizes:
                        if n < found[mine[0]]["n_train"] * 0.9 and n >= 4 * config.n_folds * (Task(dataset, y).K if dataset.kind != "regression" else 1):
                            write_rows(run, measure(here, probe, y, config, config.n_seeds, n_train=n), here, mine, keys)
            finished.add(unit)
        if lines:
            run.print(f"{model.name} {dataset.name}: best layer on validation: " + ", ".join(lines) + f" ({primary}, n = {len(dataset)})")
    if "compression" in config.baselines and dataset.kind != "regression":
        for baseline, here in sites.items():
            unit = slug(model.name, dataset.name, "code", baseline)
            if unit not in finished:
                compression(run, config, here, y, asked, dict(model=model.name, dataset=dataset.name, probe="Logistic", baseline=baseline, params=model.params,
                                                              synthetic=synthetic))
                finished.add(unit)


def control(run, config, sites, probe, y, mine, keys):
    """Control task and selectivity (Hewitt & Liang 2019), both labels learnt and judged within the part of the texts that shares its words."""
    primary = PRIMARY[sites.dataset.kind]
    real = measure(sites, probe, y, config, 1, within=True)
    other = measure(sites, probe, control_labels(sites.dataset, config.seed), config, 1, within=True)
    write_rows(run, {i: other[i] for i in mine}, sites, mine, {**keys, "baseline": "control"})
    gaps = [real[i]["test"][primary] - other[i]["test"][primary] for i in mine]
    stats = [corrected_t(gap, 0, real[i]["ratio"], real[i]["n_test"]) for gap, i in zip(gaps, mine)]
    for i, (score, low, high, p), p_holm in zip(mine, stats, holm([s[3] for s in stats])):
        run.result(score, 0.0, low, high, real[i]["n"], **keys, **label_of(sites, i), metric="selectivity",
                   n_train=int(round(real[i]["n_train"])), p=float(p), p_holm=float(p_holm))
    return f"control task {max(o['test'][primary].mean() for o in other.values()):.3f}"


def compression(run, config, sites, y, asked, keys):
    """Compression n log2 K / (bits of the online code) of the texts that may be learnt from, with a normal interval over texts."""
    for group, X, index in sites.batches():
        if not set(group) & set(asked):
            continue
        task = Task(sites.dataset, y, index)
        bits = online_code(X[:, task.learn], task.y[task.learn], sites.dataset.groups[index][task.learn], task.kind, task.K, config.seed)
        for i, b in zip(group, bits):
            if i in asked:
                total, spread = b.sum(), 1.96 * b.std() * math.sqrt(len(b))
                uniform = len(b) * math.log2(task.K)
                run.result(uniform / total, 1.0, uniform / (total + spread), uniform / max(total - spread, 1e-9), len(b), **keys, **label_of(sites, i),
                           metric="compression", n_train=len(b), p=None, p_holm=None)


def sites_of(config):
    """Poolers of the options: each layer × each quantile, then the ones written out."""
    plain = []
    for q in config.quantiles:
        if q not in REDUCE:
            try:
                q = float(q)
            except ValueError:
                raise ValueError(f"quantiles: '{q}' is neither a number between 0 and 1 nor mean, max or min") from None
        plain.append(q)
    return plain, [PoolToken(**p) for p in config.poolers]


def experiment(config, lms=None, datasets=None, probes=None, poolers=None):
    """The sweep: models × datasets dealt over the ranks, poolings × probes on each. Returns the results as a DataFrame."""
    run = Run(config)
    lms, probes = lms or config.lm, probes or config.probe
    datasets = [copy.copy(d) for d in load_datasets(run, config, datasets or config.dataset)]
    if config.split == "cv":
        for dataset in datasets:
            dataset.split = None
    quantiles, extra = sites_of(config)
    extra += poolers or []
    for dataset in datasets:
        folds_of(dataset, dataset.y, config.n_folds, 0)  # a label too rare for the folds is better known now than in an hour
    finished, at, model = Finished(run), None, None
    for m, d in run.share([(m, d) for m in range(len(lms)) for d in range(len(datasets))]):
        if m != at:
            model = LMModel(lms[m], run.device, run.dtype, bos=config.bos)
            twin, at = model.random_twin(config.seed) if "random_init" in config.baselines else None, m
            plain = [PoolToken(i, *(("all", None, q) if q in REDUCE else (q,))) for i in model.layers(config.layers) for q in quantiles]
            sites = {p.site(model.n_layer): p for p in reversed(plain + extra)}  # each once, the first of equals; an unknown layer raises before any work
        probe_dataset(run, config, model, twin, copy.copy(datasets[d]), probes, list(sites.values())[::-1], finished)
    table = run.merge()
    if run.master:
        plot_all(run.out, table)
        run.print(f"results.csv, logs and figures in {run.out}; look at them with: streamlit run probe.py")
    run.close()
    return table


def run_exp(dataset_paths, model_names, poolers=(), classifiers=("LDA",), n_folds=5, device="auto", logs_folder="out/probe", **options):
    """The experiment as a function. dataset_paths: data-json files, dicts, NLPDatasets or NAME/TASK; model_names: names, folders or {'model', 'tokenizer'};
    poolers: PoolTokens; classifiers: names of PROBES, or constructors input_size → SingleStepOpt or MultiStepOpt; options: further fields of Config.
    Returns the DataFrame of results.csv; raises as Config and the parts do."""
    names = [m if isinstance(m, str) else str(m.get("name", type(m["model"]).__name__)) for m in model_names]
    if poolers:
        options.setdefault("quantiles", [])
    config = Config(lm=names, dataset=[getattr(d, "name", None) or (d.get("name", "dict") if isinstance(d, dict) else str(d)) for d in dataset_paths],
                    probe=[name_of(c) for c in classifiers], n_folds=n_folds, device=device, out_dir=str(logs_folder),
                    poolers=[{k: v for k, v in vars(p).items() if k != "cacheable"} for p in poolers], **options)
    check(replace(config, probe=[c for c in classifiers if isinstance(c, str)]))
    return experiment(config, list(model_names), list(dataset_paths), list(classifiers))


# ---- plots

COLOURS = ["#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5", "#dfab01"]


def plot_all(out, table):
    """Layer curves and heatmap of every model, sample-size curves, and model-size curves where there are several models."""
    table = table.assign(number=pd.to_numeric(table.layer, errors="coerce"))
    full = table[table.n_train == table.groupby(["model", "dataset", "probe", "baseline", "metric"]).n_train.transform("max")]
    for model in table.model.unique():
        plot_layers(out / f"layers_{slug(model)}.png", full[full.model == model], model)
        plot_heatmap(out / f"heatmap_{slug(model)}.png", full[(full.model == model) & (full.baseline == "")], model)
    best = table[(table.layer == "best") & table.baseline.isin(["", "random_init"])]
    for column, label, path in (("n_train", "texts to learn from", "samples.png"), ("params", "parameters of the model", "sizes.png")):
        part = best if column == "n_train" else best[best.n_train == best.groupby(["model", "dataset", "probe", "baseline"]).n_train.transform("max")]
        counts = part[part.baseline == ""].groupby(["dataset", "probe"])[column].nunique()
        if len(counts) and counts.max() > 1:
            keep = counts[counts > 1].index
            plot_curves(out / path, part[pd.MultiIndex.from_frame(part[["dataset", "probe"]]).isin(keep)], column, label)


def panels(n, width=3.4, height=2.7):
    """Axes of n panels in a grid, and what to call after drawing."""
    columns = min(n, 3 if n in (5, 6, 9) else 4)
    fig, axes = plt.subplots(-(-n // columns), columns, figsize=(width * columns, height * -(-n // columns) + 0.9), squeeze=False, layout="constrained")
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return fig, list(axes.flat[:n])


def finish(fig, axes, path, title, table, legend=True):
    if legend:
        handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=max(2, int(fig.get_figwidth() / 1.9)), fontsize=8, frameon=False)
    title += "; synthetic sentences" if table.synthetic.astype(bool).any() else ""
    fig.suptitle(textwrap.fill(title, int(fig.get_figwidth() * 11)), fontsize=10)
    with aside(path) as f:
        fig.savefig(f, dpi=130, format="png")
    plt.close(fig)


def plot_layers(path, table, model):
    """Score over layers at the last token (or the last pooling there is) with its 95 % band, one panel a dataset, baselines dashed."""
    numbers = table[table.number.notna()]
    names = list(numbers[numbers.baseline == ""].dataset.unique())
    if not names:
        return
    fig, axes = panels(len(names))
    for ax, name in zip(axes, names):
        here, whole = numbers[numbers.dataset == name], table[table.dataset == name]
        metric = next(m for m in ("accuracy", "pearson") if (here.metric == m).any())
        here, whole = here[here.metric == metric], whole[whole.metric == metric]
        real = here[here.baseline == ""]
        quantiles = [q for q in real["quantile"].unique() if q != "attention"]
        quantile = "1.0" if "1.0" in quantiles else quantiles[-1] if quantiles else "attention"
        probes = list(real.probe.unique())
        for k, probe in enumerate(probes):
            part = real[(real.probe == probe) & real["quantile"].isin([quantile, "attention"])].sort_values("number")
            ax.plot(part.number, part.score, "o-", ms=3, c=COLOURS[k % 6], label=probe)
            ax.fill_between(part.number.astype(float), part.low, part.high, color=COLOURS[k % 6], alpha=0.13, lw=0)
        first = here[here.probe == probes[0]]
        for baseline, style, colour in (("random_init", "--", "#888888"), ("control", ":", "#888888")):
            part = first[(first.baseline == baseline) & (first["quantile"] == quantile)].sort_values("number")
            if len(part):
                ax.plot(part.number, part.score, style, c=colour, label=f"{dict(random_init='random weights', control='control task')[baseline]} ({probes[0]})")
        part = first[first.baseline == "layer0"]
        if len(part):
            ax.axhline(part.score.iloc[0], ls="-.", lw=1, c="#b08900", label=f"bag of embeddings ({probes[0]})")
        ax.axhline(whole[whole.baseline == "majority"].score.mean(), ls=(0, (1, 3)), lw=1.2, c="black", label="majority")
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("layer", fontsize=8)
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        ax.tick_params(labelsize=7)
    axes[0].set_ylabel(metric, fontsize=8)
    finish(fig, axes, path, f"{model}: what each layer knows at the last token (95 % bands)" if quantile == "1.0" else f"{model}: what each layer knows", table)


def plot_heatmap(path, table, model):
    """Score at every layer × pooling, one panel a dataset, first probe; on a scale from chance to 1."""
    part = table[table.number.notna() & table.metric.isin(["accuracy", "pearson"]) & (table["quantile"] != "attention")]
    names = list(part.dataset.unique())
    if not len(part):
        return
    fig, axes = panels(len(names), 3.2, 2.3)
    for ax, name in zip(axes, names):
        here = part[part.dataset == name]
        here = here[here.probe == here.probe.iloc[0]]
        how = here["quantile"].where(here["quantile_method"] == "", here["quantile_method"])
        grid = here.assign(how=how).pivot_table(index="how", columns="number", values="score", sort=False)
        image = ax.imshow(grid, cmap="viridis", vmin=here.chance.min(), vmax=max(grid.to_numpy().max(), here.chance.min() + 0.05), aspect="auto")
        bright = (here.chance.min() + grid.to_numpy().max()) / 2
        for (r, c), v in np.ndenumerate(grid.to_numpy()):
            if grid.size <= 90:
                ax.text(c, r, f"{v:.2f}".lstrip("0"), ha="center", va="center", fontsize=6.5, color="black" if v > bright else "white")
        ax.set_xticks(range(grid.shape[1]), [f"{c:.0f}" for c in grid.columns], fontsize=7)
        ax.set_yticks(range(grid.shape[0]), grid.index, fontsize=7)
        ax.set_title(f"{name} ({here.probe.iloc[0]})", fontsize=9)
        ax.set_xlabel("layer", fontsize=8)
        fig.colorbar(image, ax=ax, shrink=0.8).ax.tick_params(labelsize=6)
    finish(fig, axes, path, f"{model}: layer × quantile of the tokens, colours from chance up", table, legend=False)


def plot_curves(path, table, column, label):
    """Score at the layer chosen on validation folds over n_train or params."""
    names = list(table.dataset.unique())
    fig, axes = panels(len(names))
    for ax, name in zip(axes, names):
        here = table[table.dataset == name]
        for k, ((probe, model, baseline), part) in enumerate(here.groupby(["probe", "model" if column == "n_train" else "metric", "baseline"], sort=False)):
            part = part.sort_values(column)
            if baseline and len(part) < 2:
                continue
            ax.errorbar(part[column], part.score, yerr=[part.score - part.low, part.high - part.score], fmt="s--" if baseline else "o-", ms=3, capsize=2,
                        c="#888888" if baseline else COLOURS[k % 6],
                        label=(f"{probe}, {model}" if column == "n_train" else probe) + (", random weights" if baseline else ""))
        ax.axhline(here.chance.mean(), ls=(0, (1, 3)), c="black", lw=1.2, label="majority")
        ax.set_xscale("log")
        ax.set_title(name, fontsize=9)
        ax.set_xlabel(label, fontsize=8)
        ax.tick_params(labelsize=7, which="both")
    axes[0].set_ylabel(here.metric.iloc[0], fontsize=8)
    finish(fig, axes, path, f"at the layer chosen on validation folds, over {label} (95 %)", table)


def main(config):
    experiment(config)


if __name__ == "__main__":
    main(configure(Config))
