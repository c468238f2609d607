"""Where should the units of a language model sit on its cortical sheets before training?

    python init_pos.py                                       # seeded random permutations, as in the paper
    python init_pos.py scheme=swap                           # pre-optimised: units that respond alike move together
    python init_pos.py scheme=swap lm=out/train              # on the responses of a trained model instead of an untrained one
    python init_pos.py config/init_pos.yaml                  # the published preset, 12 layers x 784 units

Writes gpt2-positions/NAME.npz, which python train.py positions=NAME reads, and in out_dir a picture of every sheet and results.csv: a row per
layer with the spatial loss on text that the swaps have not seen (score; chance: that of another random permutation; low, high: 2.5 % and 97.5 % of
the windows; n: windows).

Margalit et al. 2024 (TDANN) for pre-optimisation by swaps; Rathi et al. 2025 (TopoLM) for random permutations.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import positions
from configurator import Run, configure, key_seed
from data.tokens import Tokens, encoding, read_meta, tokenizer_state, write_dataset
from model import GPT, GPTConfig, load_lm


@dataclass
class Config:
    # ---- layout
    scheme: Literal["random", "identity", "swap"] = "random"  # seeded permutations, unit i at cell i, or pre-optimised by swaps
    method: Literal["sheet", "window"] = "sheet"   # swap: best pairs of the whole sheet at once, or random trials window by window (published)
    swap_windows: int = 50                         # window: how many windows, each once while there are enough
    swap_trials: int = 50                          # window: trial swaps in each
    swap_rounds: int = 200                         # sheet: rounds of swaps at most; it ends by itself when none helps
    radius: int = 4                                # a window is the cells closer than this to its centre
    norm: float = float("inf")                     # in this p-norm: 1, 2, inf
    # ---- model whose responses are compared
    lm: str = ""                                   # a run folder, checkpoint or Hugging Face GPT-2, whose shape counts then; "": an untrained GPT
    n_layer: int = 4                               # blocks; each has two sheets, attention and mlp
    n_head: int = 4                                # attention heads
    n_embd: int = 256                              # units per sheet, a square
    block_size: int = 128                          # tokens of context
    bias: bool = False                             # biases in linear layers and LayerNorms
    tap: Literal["sublayer", "residual"] = "sublayer"  # what lies on the sheet: sublayer outputs, or the residual stream after them
    # ---- text
    init_data: str = "init-data"                   # dataset the model reads; the default folder is cut from `dataset` when it is missing
    dataset: str = "pydocs"                        # where that text comes from: its training part only
    samples: int = 16384                           # tokens to correlate over, and as many others to score on
    batch_size: int = 8                            # sequences at a time
    # ---- files and run
    name: str = ""                                 # of the positions file; "": SCHEME-{n_layer}x{n_embd}
    positions_dir: str = "gpt2-positions"          # its folder
    out_dir: str = "out/init_pos"                  # picture, results
    overwrite: bool = False                        # replace a positions file of that name
    seed: int = 1337                               # of the permutations, trials and the untrained model
    device: str = "auto"                           # cuda, mps, cpu
    dtype: str = "auto"                            # bfloat16 where the hardware has it; float16, float32

    POSITIVE = "swap_windows swap_trials swap_rounds norm n_layer n_head n_embd block_size batch_size"

    def check(self):
        if self.samples < 2:
            raise ValueError(f"option 'samples' must be at least 2 for a correlation, not {self.samples}")


# ---- data

def init_text(run, config):
    """Folder of the text that the model reads; the default one is made on first use, from the training part of `dataset`."""
    if config.init_data != "init-data" or Path("init-data/meta.yaml").exists():
        folder = run.dataset(config.init_data)
        if config.init_data == "init-data" and (cut_from := read_meta(folder).get("cut_from", config.dataset)) != config.dataset:
            raise ValueError(f"init-data was cut from {cut_from}, not from dataset={config.dataset}: remove the folder init-data to cut it again, "
                             f"or give dataset={cut_from}")
        return folder
    source = run.dataset(config.dataset)
    tokens = Tokens(source, "train")
    pieces = min(64, max(2, len(tokens) // 1024))  # from all over the text, every other one to score on
    starts = np.linspace(0, len(tokens) * (pieces - 1) // pieces, pieces).astype(int)
    windows = tokens.windows(starts, min(1024, len(tokens) // pieces))  # (pieces, length)
    run.print(f"init-data: made on first use, {windows.size:,} tokens from the training part of {config.dataset}")
    meta = read_meta(source)
    write_dataset("init-data", {"train": windows[::2], "val": windows[1::2]}, tokenizer_state(source),
                  cut_from=config.dataset, source=f"training part of {config.dataset}", synthetic=bool(meta.get("synthetic", False)))
    return Path("init-data")


def text_windows(folder, split, samples, length, tokenizer=None):
    """Windows (B, T) int64 that hold at least `samples` tokens of a split, evenly spread, T <= length; re-encoded where a tokenizer is given."""
    tokens = Tokens(folder, split)
    ids = tokens.windows([0], len(tokens))[0]
    if tokenizer is not None:
        ids = np.array(tokenizer.encode(encoding(tokenizer_state(folder)).decode(ids.tolist())), np.int64)
    if len(ids) < samples:
        raise ValueError(f"samples={samples} tokens are more than {tokens.path} holds ({len(ids):,}): take samples={len(ids)} or less, "
                         "or a longer text with init_data=")
    length = min(length, samples)
    rows = -(-samples // length)
    starts = np.linspace(0, len(ids) - length, rows).astype(int)
    return torch.as_tensor(np.stack([ids[s:s + length] for s in starts]))


# ---- responses

@torch.no_grad()
def response_correlations(run, model, idx, config):
    """{layer name: (C, C)}: correlations between the units of every sheet over config.samples of the tokens idx (B, T)."""
    names = positions.layer_names(model.config.n_layer)
    found = {name: [] for name in names}
    bar = run.progress(len(idx), desc="reading text")
    for batch in idx.split(config.batch_size):
        with run.autocast():
            hidden = model(batch.to(run.device), hidden=names).hidden
        for name in names:
            found[name].append(hidden[name].flatten(0, 1).float().cpu())
        bar.update(len(batch))
    bar.close()
    return {name: positions.correlations(torch.cat(found.pop(name))[:config.samples]) for name in names}


def lay_out(r, sheet, layer, start, config):
    """unit_at_cell (C,) of one layer under the scheme, from the correlations r (C, C) of its units and the layout that swaps start from."""
    if config.scheme == "random":
        return positions.random_positions(config.n_layer, config.n_embd, config.seed)[layer]
    if config.scheme == "identity":
        return np.arange(len(r))
    if config.method == "window":
        return positions.swap_window(r, sheet, start, config.swap_windows, config.swap_trials, seed=(config.seed, layer))[0]
    starts = (positions.spectral_layout(r, seed=(config.seed, layer)), start)  # a model trained with a sheet may have the better one
    start = min(starts, key=lambda u: sheet.losses(r[u][:, u]).mean())
    return positions.swap_sheet(r, sheet, start, rounds=config.swap_rounds)[0]


# ---- plots

def colours(r):
    """RGB (C, 3) of units by their correlations r (C, C): the first three principal components, each spread evenly over 0 to 1."""
    vectors = np.linalg.eigh(r.astype(np.float64))[1][:, ::-1][:, :3]
    vectors = vectors * np.where(vectors.sum(0) < 0, -1, 1)  # an eigenvector's sign is arbitrary
    return vectors.argsort(0).argsort(0) / (len(r) - 1)


def plot_sheets(path, title, layers, sheet, scheme):
    """A PNG with three panels per layer: the sheet with random positions, the sheet as laid out, and correlation against distance for both.

    layers: a list of (name, r, random, row, loss before, loss after)."""
    C = sheet.side ** 2
    at = np.stack(np.divmod(np.arange(C), sheet.side), 1)
    steps = np.linalg.norm(at[:, None] - at, axis=-1).round().astype(int).ravel()  # distance of two cells, whole steps
    near = (steps > 0) & (steps < sheet.side)  # farther ones are corner against corner
    count = np.bincount(steps[near])[1:]
    fig, axes = plt.subplots(len(layers) // 2, 6, figsize=(13, 2.1 * len(layers) // 2 + 1.1), squeeze=False, layout="constrained")
    for i, (name, r, random, row, before, after) in enumerate(layers):
        maps, (ax_before, ax_after, ax_curve) = colours(r), axes[i // 2, 3 * (i % 2):][:3]
        for ax, layout, loss, word, colour in ((ax_before, random, before, "random", "0.6"), (ax_after, row, after, scheme, "C3")):
            ax.imshow(maps[layout].reshape(sheet.side, sheet.side, 3))
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{name if ax is ax_before else ''} {word}: {loss:.3f}", fontsize=8)
            curve = np.bincount(steps[near], r[layout][:, layout].ravel()[near])[1:] / count
            ax_curve.plot(np.arange(1, len(curve) + 1), curve, color=colour, label=word, lw=1.5)
        ax_curve.axhline(0, color="0.85", lw=0.8, zorder=0)
        ax_curve.tick_params(labelsize=7)
        if i < 2:
            ax_curve.set_title("correlation by distance", fontsize=8)
            ax_curve.legend(fontsize=7, frameon=False)
        if i >= len(layers) - 2:
            ax_curve.set_xlabel("distance (cells)", fontsize=8)
    fig.suptitle(title, fontsize=9)
    fig.savefig(path, dpi=110)
    plt.close(fig)


# ---- the run

def main(config):
    run = Run(config)
    if config.lm:
        model, tokenizer = load_lm(config.lm, tap=config.tap)
        config.n_layer, config.n_embd = model.config.n_layer, model.config.n_embd
    name = config.name or f"{config.scheme}-{config.n_layer}x{config.n_embd}"
    path = Path(config.positions_dir) / f"{name}.npz"
    if path.exists() and not config.overwrite:
        raise FileExistsError(f"{path} is there already: give another name=, or replace it with overwrite=True")
    sheet = positions.Sheet(config.n_embd, config.radius, config.norm)

    folder = init_text(run, config)
    if not config.lm:
        tokenizer = None  # an untrained model takes the text's own
        model = GPT(GPTConfig(block_size=config.block_size, vocab_size=read_meta(folder)["vocab_size"], n_layer=config.n_layer, n_head=config.n_head,
                              n_embd=config.n_embd, bias=config.bias, tap=config.tap), seed=config.seed)
    model.to(run.device).eval()
    length = min(config.block_size, model.config.block_size)
    seen, unseen = (response_correlations(run, model, text_windows(folder, split, config.samples, length, tokenizer), config)
                    for split in ("train", "val"))

    rows, layers = [], []
    starts = positions.random_positions(config.n_layer, config.n_embd, config.seed)
    if hasattr(model, "unit_at_cell"):  # trained on a sheet: swaps start from its own layout
        starts = model.unit_at_cell.cpu().numpy()
        run.print(f"{config.lm} has positions of its own, from which swaps start; 'random' below are permutations that it was not trained with")
    chances = positions.random_positions(config.n_layer, config.n_embd, key_seed(config.seed, "chance"))
    bar = run.progress(len(seen), desc="sheets")
    for i, (layer, start, random) in enumerate(zip(seen, starts, chances)):
        row = lay_out(seen[layer], sheet, i, start, config)
        before, after, chance, scores = (sheet.losses(r[u][:, u]) for r in (seen[layer], unseen[layer]) for u in (random, row))  # (windows,) each
        run.print(f"{layer:<14} spatial loss: random {before.mean():.4f}, {config.scheme} {after.mean():.4f}; "
                  f"on unseen text: random {chance.mean():.4f}, {config.scheme} {scores.mean():.4f}")
        low, high = np.percentile(scores, [2.5, 97.5])
        run.result(round(scores.mean(), 6), round(chance.mean(), 6), round(low, 6), round(high, 6), len(scores), layer=layer, positions=name)
        rows.append(row)
        layers.append((layer, unseen[layer], random, row, chance.mean(), scores.mean()))
        bar.update()
    bar.close()

    how = config.scheme if config.scheme != "swap" else f"swap, {config.method}"
    who = config.lm or f"an untrained GPT (seed {config.seed})"
    where = "synthetic text" if read_meta(folder).get("synthetic") else "text"
    if run.master:
        positions.save_positions(str(path), np.stack(rows), scheme=config.scheme, method=config.method if config.scheme == "swap" else "", seed=config.seed,
                                 radius=config.radius, norm=str(config.norm), tap=config.tap, lm=config.lm, init_data=config.init_data)
        plot_sheets(run.out / f"{name}.png", f"{name} ({how}, radius {config.radius}): responses of {who}, {config.n_layer} layers x {config.n_embd} "
                    f"units, to {config.samples:,} tokens of unseen {where} ({folder})\ncolour: first three principal components of the units' "
                    "correlations; number: spatial loss", layers, sheet, config.scheme)
    run.merge()
    run.print(f"saved {path} ({path.stat().st_size / 1024:.0f} KB) and {run.out / name}.png; train with it: python train.py positions={name}")
    run.close()


if __name__ == "__main__":
    main(configure(Config))
