"""What can be read out of a prepared podcast beside embeddings: (events, target of each).

events is a DataFrame with start (s); a target that is NaN or '' is unknown.
"""

import numpy as np
import pandas as pd

from data import InputError, read_table


def content_words(podcast, window):
    """Content or function word."""
    return podcast.words, podcast.words["content"]


def part_of_speech(podcast, window):
    return podcast.words, podcast.words["pos"]


def sentence_onsets(podcast, window):
    """First words of sentences, against words that begin at least half a second after one."""
    words = podcast.words[podcast.words.sentence >= 0]  # -1: a word in no sentence
    first = words.start.groupby(words.sentence).transform("min")
    is_onset = words.start == first
    kept = is_onset | (words.start >= first + 0.5)
    return words[kept], np.where(is_onset, "onset", "inside")[kept]


def surprisal(podcast, window):
    """-ln of a word's probability, of all its tokens, under the model of the set's features."""
    for file in podcast.meta.get("tokens", {}).values():
        tokens = read_table(podcast.folder / file, na_values={"true_prob": [""]})
        if "true_prob" in tokens:
            nats = -np.log(tokens.true_prob.clip(lower=1e-12))
            nats = nats.groupby(tokens.word_idx).sum(skipna=False)
            return podcast.words, podcast.words.word_idx.map(nats).to_numpy(float)
    cure = "prepare it with features=gpt2-xl"
    raise InputError(f"task=surprisal: {podcast.folder} has no probabilities of tokens: {cure}")


def volume(podcast, window):
    """Loudness (dB) of the audio in steps as wide as the window (s), one after the other."""
    if "audio" not in podcast.meta:
        cure = "prepare it with audio_sfreq=100"
        raise InputError(f"task=volume: {podcast.folder} has no loudness of its audio: {cure}")
    audio = podcast.meta["audio"]
    power = np.square(np.fromfile(podcast.folder / audio["file"], "<f4").astype(float))
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
