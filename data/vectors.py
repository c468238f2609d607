"""Vectors for the words of a transcript: text files (GloVe), released features, language models."""

import hashlib
import math
from collections import Counter
from itertools import islice

import numpy as np
import pandas as pd

from data import InputError, check_content, read_table

# ---- files of word vectors: a line is a token and numbers, separated by spaces


def look_up(words, path):
    """(words, D) float32 of a text file, NaN where it has none: contractions whole, else the mean
    of what GloVe's tokenizer makes of them (do n't, it 's), else without the apostrophe."""
    forms = {word: spellings(word) for word in set(words)}
    wanted = set()
    for form in forms.values():
        wanted.update(*form)
    vectors = read_vectors(path, wanted)
    if not vectors:
        raise InputError(f"{path} has a vector for none of the words: give another file")
    found = {}
    for word in forms:
        found[word] = np.full(len(next(iter(vectors.values()))), np.nan, np.float32)
        for tokens in forms[word]:
            if all(token in vectors for token in tokens):
                found[word] = np.mean([vectors[token] for token in tokens], axis=0)
                break
    return np.stack([found[word] for word in words])


def spellings(word):
    """Lists of tokens under which a word may stand in a file, the best first."""
    forms = [[word]]
    cut = word.find("n't") if word.endswith("n't") else word.find("'")
    if cut > 0:
        forms.append([word[:cut], word[cut:]])
        forms.append([word.replace("'", "")])
    return forms


def read_vectors(path, wanted):
    """{token: (D,) float32} of those tokens in `wanted` that a file has. Raises InputError.

    A first line may hold sizes. Tokens may hold spaces, so a line is read from its end.
    """
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
        rule = "each line is a token and equally many numbers, separated by spaces"
        raise InputError(f"{path} is not a text file of word vectors: {rule}") from None
    return vectors


def count_dims(lines):
    """How many numbers a line ends with: most tokens are without spaces."""
    counts = Counter()
    for number, line in enumerate(lines):
        is_sizes = number == 0 and line.count(" ") == 1
        if not is_sizes:
            counts[line.rstrip().count(" ")] += 1
    n_dims = max(sorted(counts), key=counts.get, default=0)  # the fewest of equally many
    if n_dims < 1:
        raise ValueError("no vectors")
    return n_dims


# ---- features that came with the recordings


def released_features(folder, meta, name, layer, word_idx):
    """(words, D) float32: mean over each word's tokens of a prepared set's features, or NaN."""
    layers = meta["features"][name]
    key = f"layer-{layer}"
    if len(layers) == 1 and not next(iter(layers)).startswith("layer-"):
        key = next(iter(layers))
    if key not in layers:
        there = ", ".join(layers)
        cure = f"set layer=, or prepare it with layers={layer}"
        raise InputError(f"embedding={name} has no {key} in {folder}, only {there}: {cure}")
    path = folder / layers[key]
    shape = meta["arrays"][layers[key]]["shape"]
    dtype = np.dtype(meta["arrays"][layers[key]]["dtype"]).newbyteorder("<")
    if not path.is_file() or path.stat().st_size != math.prod(shape) * dtype.itemsize:
        cure = "run the set's prepare.py again with overwrite=True"
        raise InputError(f"{path} is missing or not as long as meta.yaml says: {cure}")
    tokens = read_table(folder / meta["tokens"][name])
    vectors = np.fromfile(path, dtype).reshape(shape).astype(np.float32)
    return mean_of_tokens(vectors, tokens.word_idx, word_idx)


def mean_of_tokens(vectors, word_of_token, words):
    """(words, D) mean of each word's vectors (tokens, D), NaN for a word without tokens."""
    means = pd.DataFrame(vectors).groupby(np.asarray(word_of_token)).mean()
    return means.reindex(words).to_numpy(np.float32)


# ---- language models: lm is a convert.HiddenStates


def static_vectors(lm, words):
    """(words, D) float32: the mean of lm's embeddings of a word's tokens, without any context."""
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
    """(words, D) float32: lm's states as it reads the transcript, behind half a context or more;
    the mean over a word's tokens. layer: as Hugging Face numbers, 0 the embeddings, -1 the last."""
    (layer,) = lm.layers([layer])
    n_special = len(lm.encode(["a"])[0][0]) - 1
    n_tokens = {word: len(lm.encode([" " + word])[0][0]) - n_special for word in set(words)}
    total = np.concatenate([[0], np.cumsum([n_tokens[word] for word in words])])
    room = min(lm.max_length, 1024) - n_special
    vectors = np.full((len(words), lm.width), np.nan, np.float32)
    begin = new = 0  # words from `begin` on are read, those from `new` on for the first time
    while new < len(words):
        end = np.searchsorted(total, total[begin] + room, side="right") - 1
        end = max(int(end), new + 1)
        states = states_of_words(lm, words[begin:end], layer)
        vectors[new:end] = states[new - begin :]
        new = end
        begin = int(np.searchsorted(total, total[new] - room // 2))
    return vectors


def states_of_words(lm, words, layer):
    """(words, D): states of a short text, given as its words."""
    text = " " + " ".join(words)
    ids, real = lm.pad(lm.encode([text])[0])
    states = lm.states(ids, real, [layer])[layer][0].detach().float().cpu().numpy()
    start, end = np.transpose(lm.offsets(text))
    word_start = np.cumsum([1] + [len(word) + 1 for word in words[:-1]])
    word_of_token = np.searchsorted(word_start, start, side="right") - 1
    covers = end > start  # special tokens do not
    return mean_of_tokens(states[covers], word_of_token[covers], range(len(words)))


# ---- as a decoder sees them


def project(values, train, n_dims):
    """(Y (N, D) float32, (mean, components, scale)) of values (N, D'), by the rows `train`.

    Y are the n_dims principal components (0: all dimensions, as they are), in one unit for all.
    """
    mean = values[train].mean(axis=0, dtype=np.float64)
    components = np.eye(values.shape[1])
    if n_dims:
        components = np.linalg.svd(values[train] - mean, full_matrices=False)[2][:n_dims].T
    y = (values - mean) @ components
    scale = math.sqrt(y[train].var(axis=0).mean()) or 1.0
    return (y / scale).astype(np.float32), (mean, components, scale)


# ---- no meaning at all


def arbitrary_vectors(words, n_dims, seed):
    """(words, n_dims) float32 uniform in (-1, 1): a word has its own, whatever else is drawn."""
    vectors = {}
    for word in set(words):
        digest = hashlib.sha256(repr((seed, "arbitrary", str(word))).encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little") >> 1)
        vectors[word] = rng.uniform(-1, 1, n_dims).astype(np.float32)
    return np.stack([vectors[word] for word in words])
