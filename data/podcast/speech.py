"""A prepared podcast, and the decoding targets other than embeddings.

A task returns (events, a target for each): events is a DataFrame with start (s); targets that are
NaN or '' are unknown.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from data import InputError, check_content, column, read_table
from data.recording import Recording, read_set


@dataclass
class Podcast:
    """A prepared set of speech: words.csv, its recordings, and its name in figures (source)."""

    folder: Path
    meta: dict
    words: pd.DataFrame
    recordings: list
    source: str


def read_podcast(folder, name):
    """Read the Podcast in a prepared folder that the user called `name`."""
    meta = read_set(folder)
    if "words" not in meta:
        cure = "give a set with a transcript, as data/podcast/prepare.py makes them"
        raise InputError(f"{folder / 'meta.yaml'} names no words: {cure}")
    times = {"start": float, "end": float}
    options = {"dtype": times, "na_values": dict.fromkeys(times, [""])}
    words = read_table(folder / meta["words"], ["word_idx", "word", "start"], **options)
    recordings = [Recording(folder / recording) for recording in meta["recordings"]]
    if meta["synthetic"] and "synthetic" not in name:
        name += ", synthetic"
    return Podcast(folder, meta, words, recordings, name)


@dataclass
class Target:
    """What to decode: one row per event, in order of time.

    kind: vectors, with values (N, D) float32; classes, (N,) int64; or number, (N, 1) float32.
    start: (N,) s; labels: (N,) word types; names: of the classes; notes: {reason: number of events
    left out}.
    """

    kind: str
    values: np.ndarray
    start: np.ndarray
    labels: np.ndarray
    names: list = field(default_factory=list)
    notes: dict = field(default_factory=dict)

    def only(self, kept, reason):
        """Return the target of the events `kept` (N,) bool, counting the rest under `reason`."""
        notes = {**self.notes, reason: int((~kept).sum())}
        values, start, labels = self.values[kept], self.start[kept], self.labels[kept]
        return replace(self, values=values, start=start, labels=labels, notes=notes)


def as_target(events, values, word):
    """Make a Target of a value per event, leaving out events without an onset or a value.

    events: DataFrame with start (s) and, for words, the column `word`.
    """
    values = np.asarray(values)
    start = events.start.to_numpy(float)
    labels = np.arange(len(events)).astype(str)
    if word in events:
        labels = events[word].to_numpy(str)
    if values.ndim == 2:
        kind = "vectors"
        has_value = np.isfinite(values).all(axis=1) & (labels != "")
    elif values.dtype.kind == "f":
        kind = "number"
        has_value = np.isfinite(values)
        values = values[:, None]
    else:
        kind = "classes"
        has_value = ~np.isin(values.astype(str), ["", "nan", "None"])
    timed = np.isfinite(start)
    kept = np.flatnonzero(timed & has_value)
    if len(kept) == 0:
        raise InputError("no word has an onset and a target: check task= and embedding=")
    kept = kept[np.argsort(start[kept], kind="stable")]
    notes = {"without onset": (~timed).sum(), "without target": (timed & ~has_value).sum()}
    if kind != "classes":
        return Target(kind, values[kept].astype(np.float32), start[kept], labels[kept], [], notes)
    names, values = np.unique(values[kept].astype(str), return_inverse=True)
    return Target(kind, values, start[kept], labels[kept], names.tolist(), notes)


def describe(podcast, montage, target):
    """Return a sentence that says what is decoded from what."""
    left_out = [f"{n} {reason}" for reason, n in target.notes.items() if n]
    return (
        f"{podcast.source}: {len(montage.names)} electrodes of {len(montage.people)} people, "
        f"{len(target.start):,} events at each lag, {len(set(target.labels)):,} types "
        f"({', '.join(left_out) or 'none'} left out)"
    )


# ---- tasks


def content_words(podcast, window):
    """Content or function word."""
    return podcast.words, column(podcast.words, podcast.folder, "content")


def part_of_speech(podcast, window):
    return podcast.words, column(podcast.words, podcast.folder, "pos")


def sentence_onsets(podcast, window):
    """First words of sentences against words at least half a second after one."""
    sentence = column(podcast.words, podcast.folder, "sentence")
    words = podcast.words[sentence >= 0]  # -1: a word in no sentence
    first = words.start.groupby(words.sentence).transform("min")
    is_onset = words.start == first
    kept = is_onset | (words.start >= first + 0.5)
    return words[kept], np.where(is_onset, "onset", "inside")[kept]


def surprisal(podcast, window):
    """-ln of the probability of a word's tokens under the model of the set's features."""
    for file in podcast.meta.get("tokens", {}).values():
        tokens = read_table(podcast.folder / file, na_values={"true_prob": [""]})
        if "true_prob" in tokens:
            nats = -np.log(tokens.true_prob.clip(lower=1e-12))
            nats = nats.groupby(tokens.word_idx).sum(skipna=False)
            return podcast.words, podcast.words.word_idx.map(nats).to_numpy(float)
    cure = "prepare it with features=gpt2-xl"
    raise InputError(f"task=surprisal: {podcast.folder} has no true_prob of tokens: {cure}")


def volume(podcast, window):
    """Loudness (dB) of the audio in consecutive steps as long as the window (s)."""
    if "audio" not in podcast.meta:
        cure = "prepare it with audio_sfreq=100"
        raise InputError(f"task=volume: {podcast.folder} has no loudness of its audio: {cure}")
    audio = podcast.meta["audio"]
    path = check_content(podcast.folder / audio["file"])
    power = np.square(np.fromfile(path, "<f4").astype(float))
    width = max(1, round(window * audio["sfreq"]))
    power = power[: len(power) // width * width].reshape(-1, width).mean(axis=1)
    start = (np.arange(len(power)) + 0.5) * width / audio["sfreq"]
    return pd.DataFrame({"start": start}), 10 * np.log10(np.maximum(power, 1e-12))


TASKS = {
    "content": content_words,
    "pos": part_of_speech,
    "sentence_onset": sentence_onsets,
    "surprisal": surprisal,
    "volume": volume,
}
