"""From the hidden states of tokens to vectors of texts: PoolToken, and a cache of what it needs,
one folder for each model, list of texts and poolings.

    meta.json      model, texts, layers [i, ...] (0 the embeddings, i after block i, the last one
                   after the final norm), width, dtype, truncated
    lengths.npy    (N,) tokens of each text
    POOLING.npy    (N, layers, width); POOLING is a quantile of the tokens (0.0 the first, 1.0 the
                   last) or a name in REDUCE: np.load(file, mmap_mode="r")
    done           how many texts are finished, from the shortest: a killed pass goes on from there

The folder's name is a hash of weights, token ids, what is pooled, and this file: whoever edits a
pooling gets a new folder. A folder whose files are torn is filled anew.
"""

import fcntl
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from data import InputError, file_hash, write_aside

# What makes one vector of several: x (..., T, H) and real (..., T, 1), bool, -> (..., H). An entry
# more is one name more for quantiles=, quantile_method= and layer_method= of probe.py. Where real
# is False x is padding, which must not count.
REDUCE = {
    "mean": lambda x, real: (x * real).sum(-2) / real.sum(-2),
    "max": lambda x, real: x.masked_fill(~real, -math.inf).amax(-2),
    "min": lambda x, real: x.masked_fill(~real, math.inf).amin(-2),
}


def token_at(lengths, quantile):
    """Which token of texts of these lengths a quantile is (halves go to the even one)."""
    return (quantile * (lengths.double() - 1)).round().long()


def pool_tokens(x, real, pooling):
    """x (B, T, H) pooled over its real (B, T) tokens, pads on either side: (B, H), float32."""
    if pooling in REDUCE:
        return REDUCE[pooling](x.float(), real[:, :, None])
    columns = real.int().argmax(1) + token_at(real.sum(1), float(pooling))
    return x[torch.arange(len(x), device=x.device), columns].float()


@dataclass
class PoolToken:
    """From a model's output dictionary to one vector a text, or to several.

    layer: index into hidden_states (0 the embeddings, n or -1 the last), a list, or 'all': 1 to
    n - 1. quantile: 0 the first token, 1.0 or -1 the last one; a list; 'all': each token once; a
    name in REDUCE: of all tokens. Where several are selected, their method says what becomes of
    them: a name in REDUCE; 'extend': side by side, H grows; 'concat': rows of their own, at most
    one of the two. Tokens come first, then layers. Quantiles that meet in one token count once.
    """

    layer: int | list | str = -1
    quantile: float | list | str = -1
    layer_method: str | None = None
    quantile_method: str | None = None

    def __post_init__(self):
        if self.quantile in list(REDUCE):
            self.quantile_method = self.quantile
            self.quantile = "all"
        methods = [*REDUCE, "extend", "concat"]
        for what in ("layer", "quantile"):
            value = getattr(self, what)
            method = getattr(self, f"{what}_method")
            several = value == "all" or np.size(value) > 1
            if method not in methods and (several or method):
                wanted = f"must be one of {', '.join(methods)}, not {method}"
                raise InputError(f"poolers: {what}_method of {what}={value} {wanted}")
        if self.layer_method == self.quantile_method == "concat":
            raise InputError("layer_method and quantile_method are both concat: only one can be")
        self.quantiles = []
        if self.quantile != "all":
            numbers = pd.to_numeric(pd.Series(self.quantile), errors="coerce").replace(-1, 1.0)
            self.quantiles = numbers.astype(float).tolist()
            if not numbers.between(0, 1).all():
                names = f"a number from 0 to 1, -1 (the last), 'all', {', '.join(REDUCE)}"
                raise InputError(f"quantile {self.quantile!r} is none of {names}")
            if len(self.quantiles) == 1:
                self.quantile = self.quantiles[0]
        self.poolings = list(map(str, self.quantiles)) or [self.quantile_method]  # in the cache
        self.cacheable = self.poolings[0] not in ("extend", "concat")

    def layers(self, n_layer):
        """Indices of the hidden states of a model of n_layer blocks."""
        numbers = np.arange(n_layer + 1)
        if self.layer == "all" and n_layer > 1:
            return numbers[1:-1].tolist()
        try:
            return np.atleast_1d(numbers[np.asarray(self.layer)]).tolist()
        except IndexError:
            names = f"0 (embeddings) to {n_layer}, -1 (the last), 'all' (neither first nor last)"
            raise InputError(f"there is no layer {self.layer}, only {names}") from None

    def label(self, n_layer):
        """Its columns in the results; poolers of equal labels are one."""
        layers = self.layers(n_layer)
        layer = "+".join(map(str, layers))
        if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
            layer = f"{layers[0]}-{layers[-1]}"
        return {
            "layer": layer,
            "quantile": "+".join(map(str, self.quantiles)) or "all",
            "layer_method": self.layer_method if len(layers) > 1 else "",
            "quantile_method": self.quantile_method if len(self.quantiles) != 1 else "",
        }

    def __call__(self, outputs):
        return self.pool(outputs)[0]

    def pool(self, outputs):
        """Rows (R, H') and the text of each (R,), from {'hidden_states', 'attention_mask'}."""
        real = torch.as_tensor(outputs["attention_mask"]).bool()
        states = outputs["hidden_states"]
        layers = []
        for layer in self.layers(len(states) - 1):
            x = states[layer]
            if self.cacheable:
                x = torch.stack([pool_tokens(x, real, pooling) for pooling in self.poolings], 1)
            layers.append(x.float())
        keep = self._unequal(real.sum(1)) if self.cacheable else real
        return self._combine(torch.stack(layers, 1), keep)

    def from_states(self, states):
        """The same from cached States: X (R, H') and index (R,), as arrays."""
        layers = list(map(states.layers.index, self.layers(states.n_layer)))
        parts = [states.arrays[pooling][:, layers] for pooling in self.poolings]
        x = torch.from_numpy(np.stack(parts, 2)).float()
        x, index = self._combine(x, self._unequal(torch.from_numpy(states.lengths)))
        return x.numpy(), index.numpy()

    def _unequal(self, lengths):
        """(B, Q): False where an earlier quantile of the text is the same token."""
        at = torch.stack([token_at(lengths, q) for q in self.quantiles or [1.0]], 1)
        return ~(at[:, :, None] == at[:, None, :]).tril(-1).any(2)

    def _combine(self, x, keep):
        """x (B, L, Q, H) of which keep (B, Q) counts -> rows and their texts."""
        if self.quantile == "all" and self.quantile_method == "extend" and not keep.all():
            raise InputError("quantile='all' with extend wants texts of one length")
        x, texts = combine(x, keep, self.quantile_method)  # (R, L, H')
        every = torch.ones_like(x[:, :, 0], dtype=torch.bool)
        x, rows = combine(x[:, None], every, self.layer_method)
        return x[:, 0], texts[rows]


def combine(x, keep, method):
    """x (B, L, S, H) over S, of which keep (B, S) counts: (R, L, H'), and which of B each is."""
    index = torch.arange(len(x), device=x.device)
    if x.size(2) == 1:
        return x[:, :, 0], index
    if method in REDUCE:
        return REDUCE[method](x, keep[:, None, :, None]), index
    if method == "extend":
        return x.flatten(2), index
    return x.transpose(1, 2)[keep], index[:, None].expand_as(keep)[keep]


# ---- the cache


@dataclass
class States:
    """Pooled states of a list of texts: arrays {pooling: (N, layers, H) memmap}."""

    arrays: dict
    lengths: np.ndarray
    layers: list
    n_layer: int


def pooled_states(model, texts, layers, poolings, cache, batch_tokens=4096, dtype="float32"):
    """States of all texts, out of the folder `cache`, which one pass fills where it lacks them.

    model: convert.HiddenStates with a fingerprint(). One layer of one batch is held at a time.
    """
    rows, truncated = model.encode(texts)
    layers = list(layers)
    poolings = sorted(poolings)
    key = json.dumps([model.fingerprint(), layers, poolings, dtype, rows, file_hash(__file__)])
    folder = Path(cache) / hashlib.sha256(key.encode()).hexdigest()[:20]
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.array(list(map(len, rows)))
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another job that wants the same waits, then reads
        try:
            done = int((folder / "done").read_text())
            open_arrays(folder, poolings)
        except (OSError, ValueError, EOFError):  # not there, or torn
            done = 0
            shape = (len(rows), len(layers), model.width)
            for name in poolings:
                np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
            np.save(folder / "lengths.npy", lengths)
            meta = {"model": model.name, "texts": len(rows), "layers": layers}
            meta |= {"width": model.width, "dtype": dtype, "truncated": truncated}
            write_aside(folder / "meta.json", json.dumps(meta))
            write_aside(folder / "done", "0")
            if truncated:
                limit = f"longer than its {model.max_length} tokens and were cut"
                print(f"{model.name}: {truncated} of {len(rows)} texts are {limit}")
        if done < len(rows):
            fill(model, rows, layers, poolings, folder, batch_tokens, done)
    return States(open_arrays(folder, poolings), lengths, layers, model.n_layer)


def open_arrays(folder, poolings):
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in poolings}


def fill(model, rows, layers, poolings, folder, batch_tokens, start):
    """Run the texts from `start`, the shortest first; write each batch as soon as it is pooled.

    The arrays are opened anew for each batch: what is written does not stay in memory.
    """
    order = np.argsort(list(map(len, rows)), kind="stable")
    bar = tqdm(total=len(rows), initial=start, desc=model.name, mininterval=5)
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and len(rows[order[stop]]) * (stop + 1 - start) <= batch_tokens:
            stop += 1
        batch = order[start:stop]
        pooled = pool_batch(model, [rows[i] for i in batch], layers, poolings)
        for name, part in zip(poolings, pooled):
            array = np.load(folder / f"{name}.npy", mmap_mode="r+")
            part = part.astype(array.dtype)
            if not np.isfinite(part).all():
                cure = f"not finite as {array.dtype}: give cache_dtype=float32, dtype=float32"
                raise InputError(f"{model.name}: hidden states are {cure}")
            array[batch] = part
        bar.update(len(batch))
        counter = folder / "done.tmp"  # renamed, not flushed: a killed process loses nothing by it
        counter.write_text(str(stop))
        counter.replace(folder / "done")
        start = stop
    bar.close()


def pool_batch(model, rows, layers, poolings):
    """(poolings, B, layers, H) of a batch of token lists."""
    ids, real = model.pad(rows)
    shape = (len(poolings), len(rows), len(layers), model.width)
    pooled = torch.empty(shape, device=ids.device)

    def take(layer, state):
        for number, pooling in enumerate(poolings):
            pooled[number, :, layers.index(layer)] = pool_tokens(state, real, pooling)

    model.run(ids, real, layers, take)
    return pooled.cpu().numpy()
