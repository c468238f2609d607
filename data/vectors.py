"""Vectors for the words of a transcript: text files (GloVe), released features, language models."""

import functools
import hashlib
import math
from collections import Counter
from itertools import islice

import numpy as np
import pandas as pd

from data import InputError, check_content, read_table

# ---- files of word vectors: each line is a token and numbers, separated by spaces


def look_up(words, path):
    """Return (words, D) float32 from a text file, NaN for a word that it lacks, see spellings."""
    wanted = set()
    for word in set(words):
        wanted.update(*spellings(word))
    vectors = read_vectors(path, wanted)
    if not vectors:
        raise InputError(f"{path} has a vector for none of the words: give another file")
    unknown = np.full_like(next(iter(vectors.values())), np.nan)

    @functools.cache
    def vector_of(word):
        for tokens in spellings(word):
            if vectors.keys() >= set(tokens):
                return np.mean([vectors[token] for token in tokens], axis=0)
        return unknown

    return np.stack([vector_of(word) for word in words])


def spellings(word):
    """Return lists of tokens whose mean stands for a word: itself, GloVe's (do n't, it 's), its."""
    forms = [[word]]
    cut = word.find("n't") if word.endswith("n't") else word.find("'")
    if cut > 0:
        forms.append([word[:cut], word[cut:]])
        forms.append([word.replace("'", "")])
    return forms


def read_vectors(path, wanted):
    """Return {token: (D,) float32} for the tokens in `wanted` that a file has. Its first line may
    hold sizes; tokens may contain spaces, so lines are split from the right."""
    vectors = {}
    try:
        with open(check_content(path), encoding="utf-8-sig") as file:
            n_dims = count_dims(islice(file, 1000))
            file.seek(0)
            for line in file:
                if line.partition(" ")[0] in wanted or line.count(" ") > n_dims:
                    token, *numbers = line.rstrip().rsplit(" ", n_dims)
                    if token in wanted and len(numbers) == n_dims:
                        vectors[token] = np.array(numbers, np.float32)
    except ValueError:
        rule = "each line must be a token and the same number of values, separated by spaces"
        raise InputError(f"{path} is not a text file of word vectors: {rule}") from None
    return vectors


def count_dims(lines):
    """Return how many numbers a line ends with: most tokens contain no space."""
    counts = Counter()
    for number, line in enumerate(lines):
        is_sizes = number == 0 and line.count(" ") == 1
        if not is_sizes:
            counts[line.rstrip().count(" ")] += 1
    n_dims = max(sorted(counts), key=counts.get, default=0)  # of ties the smallest
    if n_dims < 1:
        raise ValueError("no vectors")
    return n_dims


# ---- features that came with the recordings


def released_features(folder, meta, name, layer, word_idx):
    """Return (words, D) float32, the mean over each word's tokens of released features, or NaN."""
    layers = meta["features"][name]
    key = f"layer-{layer}"
    if len(layers) == 1 and not next(iter(layers)).startswith("layer-"):
        key = next(iter(layers))
    if key not in layers:
        available = ", ".join(layers)
        cure = f"set layer=, or prepare it with layers={layer}"
        raise InputError(f"embedding={name} has no {key} in {folder}, only {available}: {cure}")
    path = folder / layers[key]
    shape = meta["arrays"][layers[key]]["shape"]
    dtype = np.dtype(meta["arrays"][layers[key]]["dtype"]).newbyteorder("<")
    if not path.is_file() or path.stat().st_size != math.prod(shape) * dtype.itemsize:
        cure = "run the set's prepare.py again with overwrite=True"
        raise InputError(f"{path} is missing or has not the size in meta.yaml: {cure}")
    tokens = read_table(folder / meta["tokens"][name])
    vectors = np.fromfile(path, dtype).reshape(shape).astype(np.float32)
    return mean_of_tokens(vectors, tokens.word_idx, word_idx)


def mean_of_tokens(vectors, word_of_token, words):
    """Average each word's vectors (tokens, D): (words, D), NaN for a word without tokens."""
    means = pd.DataFrame(vectors).groupby(np.asarray(word_of_token)).mean()
    return means.reindex(words).to_numpy(np.float32)


# ---- language models: lm is a convert.HiddenStates


def static_vectors(lm, words):
    """Return (words, D) float32, the mean of lm's token embeddings for each word."""
    if hasattr(lm.model, "get_input_embeddings"):
        table = lm.model.get_input_embeddings()
    else:
        table = lm.model.transformer.wte  # ours
    weights = table.weight.detach().float().cpu().numpy()
    vectors = {}
    for word in set(words):
        (row,), _ = lm.encode([" " + word])
        start, end = np.transpose(lm.offsets(" " + word))
        vectors[word] = weights[np.array(row)[end > start]].mean(axis=0)
    return np.stack([vectors[word] for word in words])


def contextual_vectors(lm, words, layer):
    """Return (words, D) float32, the mean of lm's states over each word's tokens, read after half a
    context or more. layer: as in Hugging Face, 0 for the embeddings, -1 for the last."""
    (layer,) = lm.layers([layer])
    n_special = len(lm.encode(["a"])[0][0]) - 1
    n_tokens = {word: len(lm.encode([" " + word])[0][0]) - n_special for word in set(words)}
    total = np.cumsum([0, *map(n_tokens.get, words)])
    room = min(lm.max_length, 1024) - n_special
    vectors = np.full((len(words), lm.width), np.nan, np.float32)
    begin = new = 0  # words from `begin` on are read, from `new` on for the first time
    while new < len(words):
        end = np.searchsorted(total, total[begin] + room, side="right") - 1
        end = max(int(end), new + 1)
        states = states_of_words(lm, words[begin:end], layer)
        vectors[new:end] = states[new - begin :]
        new = end
        begin = int(np.searchsorted(total, total[new] - room // 2))
    return vectors


def states_of_words(lm, words, layer):
    """Return (words, D), the states of a short text given as words."""
    text = " " + " ".join(words)
    ids, real = lm.pad(lm.encode([text])[0])
    states = lm.states(ids, real, [layer])[layer][0].detach().float().cpu().numpy()
    start, end = np.transpose(lm.offsets(text))
    word_start = np.cumsum([1] + [len(word) + 1 for word in words[:-1]])
    word_of_token = np.searchsorted(word_start, start, side="right") - 1
    covers = end > start  # special tokens cover nothing
    return mean_of_tokens(states[covers], word_of_token[covers], range(len(words)))


# ---- targets of a fold


def project(values, train, n_dims):
    """Project values (N, D') on n_dims principal components of the rows `train` (0: keep them all).

    Return Y (N, n_dims) float32, scaled by one number, and (mean, components, scale).
    """
    mean = values[train].mean(axis=0, dtype=np.float64)
    components = np.eye(values.shape[1])
    if n_dims:
        components = np.linalg.svd(values[train] - mean, full_matrices=False)[2][:n_dims].T
    y = (values - mean) @ components
    scale = math.sqrt(y[train].var(axis=0).mean()) or 1.0
    return (y / scale).astype(np.float32), (mean, components, scale)


# ---- without meaning


def arbitrary_vectors(words, n_dims, seed):
    """Return (words, n_dims) float32, uniform in (-1, 1), keyed by the word alone."""
    vectors = {}
    for word in set(words):
        digest = hashlib.sha256(repr((seed, "arbitrary", str(word))).encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little") >> 1)
        vectors[word] = rng.uniform(-1, 1, n_dims).astype(np.float32)
    return np.stack([vectors[word] for word in words])
