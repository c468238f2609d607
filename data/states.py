"""Pool the hidden states of tokens into vectors of texts (PoolToken), and cache the pooled states.

The cache has one folder per model, list of texts and set of poolings:

    meta.json      model, texts, layers [i, ...] (0: the embeddings, i: after block i; the last one
                   after the final norm), width, dtype, truncated
    lengths.npy    (N,) tokens of each text
    POOLING.npy    (N, layers, width); POOLING is a quantile of the tokens (0.0: first, 1.0: last)
                   or a name in REDUCE; read it with np.load(file, mmap_mode="r")
    done           number of finished texts, shortest first: an interrupted pass continues there

The folder's name is a hash of weights, token ids, layers, poolings and this file, so an edited
pooling gets a new folder. A folder with incomplete files is filled again.
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

# Reductions of several vectors to one: x (..., T, H) and real (..., T, 1), bool, -> (..., H).
# Where real is False, x is padding and must not count. An entry added here becomes a name for
# quantiles=, quantile_method= and layer_method= of probe.py.
REDUCE = {
    "mean": lambda x, real: (x * real).sum(-2) / real.sum(-2),
    "max": lambda x, real: x.masked_fill(~real, -math.inf).amax(-2),
    "min": lambda x, real: x.masked_fill(~real, math.inf).amin(-2),
}


def token_at(lengths, quantile):
    """Return the token position of a quantile in texts of these lengths (halves round to even)."""
    return (quantile * (lengths.double() - 1)).round().long()


def pool_tokens(x, real, pooling):
    """Pool x (B, T, H) over its real (B, T) tokens, pads on either side, to (B, H), float32."""
    if pooling in REDUCE:
        return REDUCE[pooling](x.float(), real[:, :, None])
    columns = real.int().argmax(1) + token_at(real.sum(1), float(pooling))
    return x[torch.arange(len(x), device=x.device), columns].float()


@dataclass
class PoolToken:
    """Pool a model's output dictionary to one vector per text, or several.

    layer: index into hidden_states (0: the embeddings, n or -1: the last), a list, or 'all': 1 to
    n - 1. quantile: 0: the first token, 1.0 or -1: the last; a list; 'all': every token; a name in
    REDUCE: that reduction of all tokens. The method combines several layers or tokens: a name in
    REDUCE; 'extend': side by side, H grows; 'concat': as separate rows, for one of the two only.
    Tokens are combined first, then layers. Quantiles that fall on the same token count once.
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
                choices = f"must be one of {', '.join(methods)}, not {method}"
                raise InputError(f"poolers: {what}_method for {what}={value} {choices}")
        if self.layer_method == self.quantile_method == "concat":
            raise InputError("layer_method and quantile_method are both concat: change one of them")
        self.quantiles = []
        if self.quantile != "all":
            numbers = pd.to_numeric(pd.Series(self.quantile), errors="coerce").replace(-1, 1.0)
            self.quantiles = numbers.astype(float).tolist()
            if not numbers.between(0, 1).all():
                choices = f"a number from 0 to 1, -1 (the last), 'all', {', '.join(REDUCE)}"
                raise InputError(f"quantile {self.quantile!r} is none of {choices}")
            if len(self.quantiles) == 1:
                self.quantile = self.quantiles[0]
        self.poolings = list(map(str, self.quantiles)) or [self.quantile_method]  # in the cache
        self.cacheable = self.poolings[0] not in ("extend", "concat")

    def layers(self, n_layer):
        """Return the indices of the selected hidden states of a model with n_layer blocks."""
        numbers = np.arange(n_layer + 1)
        if self.layer == "all" and n_layer > 1:
            return numbers[1:-1].tolist()
        try:
            return np.atleast_1d(numbers[np.asarray(self.layer)]).tolist()
        except IndexError:
            choices = f"0 (embeddings) to {n_layer}, -1 (the last), 'all' (neither first nor last)"
            raise InputError(f"there is no layer {self.layer}, only {choices}") from None

    def label(self, n_layer):
        """Return its columns in the results; poolers with equal labels are the same."""
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
        """Return rows (R, H') and their texts (R,) from {'hidden_states', 'attention_mask'}."""
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
        """Return the same from cached States, as arrays: X (R, H') and index (R,)."""
        layers = list(map(states.layers.index, self.layers(states.n_layer)))
        parts = [states.arrays[pooling][:, layers] for pooling in self.poolings]
        x = torch.from_numpy(np.stack(parts, 2)).float()
        x, index = self._combine(x, self._unequal(torch.from_numpy(states.lengths)))
        return x.numpy(), index.numpy()

    def _unequal(self, lengths):
        """Return (B, Q): False where an earlier quantile of the text is the same token."""
        at = torch.stack([token_at(lengths, q) for q in self.quantiles or [1.0]], 1)
        return ~(at[:, :, None] == at[:, None, :]).tril(-1).any(2)

    def _combine(self, x, keep):
        """Combine x (B, L, Q, H), masked by keep (B, Q), into rows and their texts."""
        if self.quantile == "all" and self.quantile_method == "extend" and not keep.all():
            raise InputError("quantile='all' with extend needs texts of equal length: use concat")
        x, texts = combine(x, keep, self.quantile_method)  # (R, L, H')
        every = torch.ones_like(x[:, :, 0], dtype=torch.bool)
        x, rows = combine(x[:, None], every, self.layer_method)
        return x[:, 0], texts[rows]


def combine(x, keep, method):
    """Combine x (B, L, S, H), masked by keep (B, S), into (R, L, H') and each row's index in B."""
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
    """Return the States of all texts from the folder `cache`; one pass computes missing ones.

    model: convert.HiddenStates with a fingerprint(). Only one layer of a batch is held at a time.
    """
    rows, truncated = model.encode(texts)
    layers = list(layers)
    poolings = sorted(poolings)
    key = json.dumps([model.fingerprint(), layers, poolings, dtype, rows, file_hash(__file__)])
    folder = Path(cache) / hashlib.sha256(key.encode()).hexdigest()[:20]
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.array(list(map(len, rows)))
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another job with the same key waits, then reads
        try:
            done = int((folder / "done").read_text())
            open_arrays(folder, poolings)
        except (OSError, ValueError, EOFError):  # missing or incomplete
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
    """Run the texts from `start`, shortest first, and write each batch as soon as it is pooled.

    Each batch opens the arrays again, so that written pages do not stay in memory.
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
                problem = f"hidden states are not finite as {array.dtype}"
                remedy = "set cache_dtype=float32 and dtype=float32"
                raise InputError(f"{model.name}: {problem}: {remedy}")
            array[batch] = part
        bar.update(len(batch))
        counter = folder / "done.tmp"  # no fsync: after the rename a kill loses nothing
        counter.write_text(str(stop))
        counter.replace(folder / "done")
        start = stop
    bar.close()


def pool_batch(model, rows, layers, poolings):
    """Return the pooled states (poolings, B, layers, H) of a batch of token lists."""
    ids, real = model.pad(rows)
    shape = (len(poolings), len(rows), len(layers), model.width)
    pooled = torch.empty(shape, device=ids.device)

    def take(layer, state):
        for number, pooling in enumerate(poolings):
            pooled[number, :, layers.index(layer)] = pool_tokens(state, real, pooling)

    model.run(ids, real, layers, take)
    return pooled.cpu().numpy()
