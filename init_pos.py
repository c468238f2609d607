"""Place the units of a language model on its cortical sheets before training.

    python init_pos.py                           # seeded random permutations, as in the paper
    python init_pos.py scheme=swap               # move units that respond alike together
    python init_pos.py scheme=swap lm=out/train  # by the responses of a trained model
    python init_pos.py config/init_pos.yaml      # the published preset, 12 layers x 784 units

Writes gpt2-positions/NAME.npz, which python train.py positions=NAME reads, and in out_dir a figure
of all sheets and results.csv with a row per sheet: the spatial loss on text that the swaps have not
seen (score), the same for another random permutation (chance), the 2.5th and 97.5th percentiles
over windows (low, high), and the number of windows (n).

Margalit et al. 2024 (TDANN) for swaps; Rathi et al. 2025 (TopoLM) for random permutations.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure

import positions
from configurator import Run, configure, key_seed
from convert import load_lm
from data import InputError
from data.tokens import Tokenizer, Tokens, read_meta, split_ids, tokenizer_state, write_dataset
from model import GPT, GPTConfig


@dataclass
class Config:
    # ---- layout
    scheme: Literal["random", "identity", "swap"] = "random"  # identity: unit i at cell i
    method: Literal["sheet", "window"] = "sheet"  # swap best pairs, or try random ones (published)
    swap_windows: int = 50  # window: number of windows, none twice while others are left
    swap_trials: int = 50  # window: trial swaps in each
    radius: int = 4  # a window holds the cells closer than this to its centre
    norm: float = float("inf")  # in this p-norm: 1, 2, inf
    # ---- model whose responses are compared
    lm: str = ""  # run folder, checkpoint or Hugging Face GPT-2 (its shape wins); "": untrained
    n_layer: int = 4  # blocks; each has two sheets, attention and mlp
    n_head: int = 4  # attention heads
    n_embd: int = 256  # units per sheet, a square
    block_size: int = 128  # tokens of context
    bias: bool = False  # biases in linear layers and LayerNorms
    tap: Literal["sublayer", "residual"] = "sublayer"  # on the sheet: its output, or the stream
    # ---- text
    init_data: str = "init-data"  # dataset that the model reads; the default is cut from `dataset`
    dataset: str = "pydocs"  # source of the default init-data: its training part
    samples: int = 16384  # tokens to correlate over, and as many to score on
    batch_size: int = 8  # sequences per batch
    # ---- files and run
    name: str = ""  # of the positions file; "": SCHEME-{n_layer}x{n_embd}
    positions_dir: str = "gpt2-positions"  # folder of the positions file
    out_dir: str = "out/init_pos"  # figure, results
    overwrite: bool = False  # replace a positions file of the same name
    seed: int = 1337  # for the permutations, the trials and the untrained model
    device: str = "auto"  # cuda, mps, cpu
    dtype: str = "auto"  # bfloat16 where faster; float16, float32

    POSITIVE = "swap_windows swap_trials norm n_layer n_head n_embd block_size batch_size"

    def check(self):
        if self.samples < 2:
            raise InputError(f"option 'samples' must be at least 2, not {self.samples}")
        if "/" in self.name:
            raise InputError(f"name={self.name} has a folder in it: give that as positions_dir=")


# ---- data


def init_text(run, config):
    """Return the folder of the text that the model reads; the default is made on first use."""
    is_default = config.init_data == "init-data"
    if is_default and not Path("init-data/meta.yaml").exists():
        cut_init_text(run, config)
    folder = run.dataset(config.init_data)
    source = read_meta(folder).get("cut_from", config.dataset)
    if is_default and source != config.dataset:
        raise InputError(f"init-data was cut from {source}: give dataset={source}, or remove it")
    return folder


def cut_init_text(run, config):
    """Make init-data from pieces spread over the training part of config.dataset."""
    source = run.dataset(config.dataset)
    tokens = Tokens(source, "train")
    n_pieces = min(64, max(2, len(tokens) // 1024))
    starts = np.linspace(0, len(tokens) * (n_pieces - 1) // n_pieces, n_pieces).astype(int)
    pieces = tokens.windows(starts, min(1024, len(tokens) // n_pieces))  # (n_pieces, length)
    run.print(f"init-data: made on first use, {pieces.size:,} training tokens of {config.dataset}")
    write_dataset(
        "init-data",
        {"train": pieces[::2], "val": pieces[1::2]},  # val: the pieces to score on
        tokenizer_state(source),
        cut_from=config.dataset,
        source=f"training part of {config.dataset}",
        synthetic=bool(read_meta(source).get("synthetic", False)),
    )


def text_windows(folder, split, samples, length, tokenizer):
    """Return evenly spaced windows (B, T) int64, T <= length, of at least `samples` tokens.

    Their ids are those of `tokenizer`.
    """
    ids = split_ids(folder, split, tokenizer)
    if len(ids) < samples:
        available = f"the {split} split of {folder} has only {len(ids):,} tokens"
        raise InputError(f"samples={samples}: {available}: give fewer, or another init_data=")
    length = min(length, samples)
    n_rows = -(-samples // length)
    starts = np.linspace(0, len(ids) - length, n_rows).astype(int)
    return torch.from_numpy(np.stack([ids[start : start + length] for start in starts]))


# ---- responses and layouts


@dataclass
class Layer:
    """The layout of a sheet and a random one to compare it with."""

    name: str
    r: np.ndarray  # (C, C), correlations of its units over unseen text
    random: np.ndarray  # (C,), a random unit_at_cell
    unit_at_cell: np.ndarray  # (C,), the chosen layout


@torch.no_grad()
def response_correlations(run, model, idx, config):
    """Return {sheet: (C, C)}: correlations between its units over the tokens idx (B, T)."""
    names = positions.layer_names(model.config.n_layer)
    responses = {name: [] for name in names}
    bar = run.progress(len(idx), desc="reading text")
    for batch in idx.split(config.batch_size):
        with run.autocast():
            hidden = model(batch.to(run.device), hidden=names).hidden
        for name in names:
            responses[name].append(hidden[name].flatten(0, 1).float().cpu())
        bar.update(len(batch))
    bar.close()
    correlations = {}
    for name in names:
        x = torch.cat(responses.pop(name))
        correlations[name] = positions.correlations(x[: config.samples])
    return correlations


def lay_out(r, sheet, layer, start, config):
    """Return unit_at_cell (C,) of a sheet, from its correlations r (C, C) and a layout `start`."""
    if config.scheme == "random":
        return positions.random_positions(config.n_layer, config.n_embd, config.seed)[layer]
    if config.scheme == "identity":
        return np.arange(len(r))
    seed = (config.seed, layer)
    if config.method == "window":
        n_windows, n_trials = config.swap_windows, config.swap_trials
        return positions.swap_window(r, sheet, start, n_windows, n_trials, seed=seed)
    spectral = positions.spectral_layout(r, seed=seed)
    if losses_of(sheet, r, spectral).mean() <= losses_of(sheet, r, start).mean():
        start = spectral  # unless a model trained on a sheet has a better layout
    return positions.swap_sheet(r, sheet, start)[0]


def losses_of(sheet, r, unit_at_cell):
    """Return the spatial loss (windows,) of a layout, given the correlations r (C, C) of units."""
    return sheet.losses(r[unit_at_cell][:, unit_at_cell])


def report_layer(run, config, sheet, seen, layer):
    """Print the spatial losses of a Layer next to random ones, and add a row to results.csv."""
    losses = losses_of(sheet, layer.r, layer.unit_at_cell)
    chance = losses_of(sheet, layer.r, layer.random).mean()
    seen_chance = losses_of(sheet, seen, layer.random).mean()
    seen_loss = losses_of(sheet, seen, layer.unit_at_cell).mean()
    run.print(
        f"{layer.name:<14} spatial loss {seen_loss:.4f} (random {seen_chance:.4f}), "
        f"on unseen text {losses.mean():.4f} (random {chance:.4f})"
    )
    low, high = np.percentile(losses, [2.5, 97.5])
    numbers = np.round([losses.mean(), chance, low, high], 6)
    run.result(*numbers, len(losses), layer=layer.name, positions=config.name)


# ---- plots


def colours(r):
    """Return RGB (C, 3) for units: ranks on the first three components of r (C, C), from 0 to 1."""
    vectors = np.linalg.eigh(r.astype(np.float64))[1][:, ::-1][:, :3]
    vectors = vectors * np.where(vectors.sum(0) < 0, -1, 1)  # an eigenvector's sign is arbitrary
    return vectors.argsort(0).argsort(0) / (len(r) - 1)


def plot_sheets(path, title, layers, sheet, scheme):
    """Draw each sheet, random and as chosen: units that respond alike look alike."""
    figure = Figure(figsize=(9, 2.1 * len(layers) // 2 + 1.1), layout="constrained")
    panels = figure.subplots(len(layers) // 2, 4, squeeze=False).reshape(-1, 2)
    for layer, (left, right) in zip(layers, panels):
        colour_of = colours(layer.r)
        columns = [("random", left, layer.random), (scheme, right, layer.unit_at_cell)]
        for label, axis, unit_at_cell in columns:
            loss = losses_of(sheet, layer.r, unit_at_cell).mean()
            axis.imshow(colour_of[unit_at_cell].reshape(sheet.side, sheet.side, 3))
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{label}: {loss:.3f}", fontsize=8)
        left.set_ylabel(layer.name, fontsize=8)
    figure.suptitle(f"{title}\ncolours: first three components of correlations; numbers: losses")
    figure.savefig(path, dpi=110)


# ---- the run


def load_model(run, config, folder):
    """Return the model whose responses are compared, and its tokenizer."""
    if config.lm:
        model, tokenizer = load_lm(config.lm, tap=config.tap)
        config.n_layer = model.config.n_layer
        config.n_embd = model.config.n_embd
    else:
        keys = ["block_size", "n_layer", "n_head", "n_embd", "bias", "tap"]
        shape = {key: getattr(config, key) for key in keys}
        shape["vocab_size"] = read_meta(folder)["vocab_size"]
        model = GPT(GPTConfig(**shape), seed=config.seed)
        tokenizer = Tokenizer(tokenizer_state(folder))
    return model.to(run.device).eval(), tokenizer


def main(config):
    run = Run(config)
    folder = init_text(run, config)
    model, tokenizer = load_model(run, config, folder)
    config.name = config.name or f"{config.scheme}-{config.n_layer}x{config.n_embd}"
    path = Path(config.positions_dir) / f"{config.name}.npz"
    if path.exists() and not config.overwrite:
        raise InputError(f"{path} already exists: give another name=, or overwrite=True")
    sheet = positions.Sheet(config.n_embd, config.radius, config.norm)
    length = min(config.block_size, model.config.block_size)
    correlations = {}
    for split in ("train", "val"):  # train for the swaps, val for the scores
        idx = text_windows(folder, split, config.samples, length, tokenizer)
        correlations[split] = response_correlations(run, model, idx, config)
    starts = positions.random_positions(config.n_layer, config.n_embd, config.seed)
    if config.scheme == "swap" and hasattr(model, "unit_at_cell"):
        starts = model.unit_at_cell.cpu().numpy()
        run.print(f"swaps may start from the positions that {config.lm} was trained with")
    chance_seed = key_seed(config.seed, "chance")
    randoms = positions.random_positions(config.n_layer, config.n_embd, chance_seed)
    layers = []
    for i, (name, seen) in enumerate(correlations["train"].items()):
        unit_at_cell = lay_out(seen, sheet, i, starts[i], config)
        layer = Layer(name, correlations["val"][name], randoms[i], unit_at_cell)
        report_layer(run, config, sheet, seen, layer)
        layers.append(layer)
    picture = run.out / f"{config.name}.png"
    if run.master:
        options = {**asdict(config), "norm": str(config.norm)}
        layouts = np.stack([layer.unit_at_cell for layer in layers])
        positions.save_positions(path, layouts, **options)
        model_name = config.lm or "an untrained GPT"
        text = "synthetic text" if read_meta(folder).get("synthetic") else "text"
        title = f"{config.name}: responses of {model_name} to unseen {text} ({folder})"
        plot_sheets(picture, title, layers, sheet, config.scheme)
    run.merge()
    run.print(f"saved {path} and {picture}; train with it: python train.py positions={path}")
    run.close()


if __name__ == "__main__":
    main(configure(Config))
