"""Turn the podcast into stimuli with responses: each word with the words before it, and the mean
high gamma of each electrode around a lag.

    python data/podcast/prepare.py subjects=3                       # first, the recordings
    python data/podcast_encoding/prepare.py                         # 200 ms around 300 ms
    python data/podcast_encoding/prepare.py podcast=path/to/prepared lag=0.15 width=0.1 context=16
    python warp.py dataset=podcast_encoding models=gpt2 layers=6

Models read the text itself. The podcast was heard once, so no response has repeats or a ceiling.
Neighbouring words share sound and brain activity, so a stretch of the story is one group, which
stays in one split.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError, already_made, column, folder_of, options_of
from data.montage import choose_people
from data.recording import Recording, read_set
from data.stimuli import complete_encoding, print_sizes, write_encoding

EMBEDDED = False  # needs data/podcast, which must be downloaded


@dataclass
class Config:
    podcast: str = ""  # prepared podcast; "": data/podcast
    subjects: list[str] = field(default_factory=list)  # none: all
    lag: float = 0.3  # s from a word's onset to the middle of the window
    width: float = 0.2  # s, of the window
    context: int = 32  # words read before each word
    block: float = 30.0  # s of story per group
    out_dir: str = ""  # "": this folder
    overwrite: bool = False  # make it again if it exists

    POSITIVE = "width block"
    SIGNED = "lag"


def heard_words(recording):
    """Return a row per heard word in the transcript's order: word_idx, word, onset."""
    events = recording.events
    path = recording.path / "events.csv"
    word_idx = column(events, path, "word_idx").astype(int)
    words = events.assign(word_idx=word_idx, word=column(events, path, "word").str.strip())
    words = words[words["word"] != ""].sort_values("word_idx").drop_duplicates("word_idx")
    return words.reset_index(drop=True)


def mean_responses(recording, onset, lag, width):
    """Return z-scored means (words, C) of the signal in [onset + lag - width/2, onset + lag +
    width/2), whether the windows lie inside (words,), and the channels' SD (C,)."""
    signal = recording.signal
    start = recording.rows(onset + lag - width / 2)
    stop = np.maximum(recording.rows(onset + lag + width / 2), start + 1)
    inside = (start >= 0) & (stop <= len(signal))
    total = np.zeros(signal.shape[1])
    squares = np.zeros(signal.shape[1])
    for first in range(0, len(signal), 1 << 16):
        piece = signal[first : first + (1 << 16)].astype(np.float64)
        total += piece.sum(0)
        squares += np.square(piece).sum(0)
    mean = total / len(signal)
    sd = np.sqrt(np.maximum(squares / len(signal) - mean**2, 0))
    responses = np.zeros((len(onset), len(mean)), np.float32)
    for i in np.flatnonzero(inside):
        window_mean = signal[start[i] : stop[i]].mean(0, dtype=np.float64)
        responses[i] = (window_mean - mean) / np.where(sd > 0, sd, 1)
    return responses, inside, sd


def read_podcast(recordings, config):
    """Return the words, responses (words, electrodes), a table of electrodes with ok (whether they
    have a signal), and whether each word's window lies inside every recording (words,)."""
    words = heard_words(recordings[0])
    responses = []
    units = []
    inside = True
    for recording in recordings:
        heard = heard_words(recording)
        if not words[["word_idx", "word"]].equals(heard[["word_idx", "word"]]):
            cure = "choose people who heard the same with subjects="
            first = recordings[0].path.name
            raise InputError(f"{recording.path} has other words than {first}: {cure}")
        onset = heard["onset"].to_numpy()
        means, is_inside, sd = mean_responses(recording, onset, config.lag, config.width)
        responses.append(means[:, recording.good])
        inside = inside & is_inside
        table = pd.DataFrame({"roi": "", "subject": recording.subject, "name": recording.names})
        table[["x", "y", "z"]] = recording.xyz
        units.append(table.assign(ok=sd > 0)[recording.good])  # the SD of a NaN is NaN
    return words, np.concatenate(responses, axis=1), pd.concat(units, ignore_index=True), inside


def main(config):
    folder = folder_of(config, __file__)
    options = options_of(config, "podcast")
    if already_made(folder, options, complete_encoding, config.overwrite):
        return
    prepared = Path(__file__).resolve().parents[1] / "podcast"
    podcast = Path(config.podcast or os.path.relpath(prepared))
    about = read_set(podcast)
    recordings = [Recording(podcast / name) for name in about["recordings"]]
    recordings = choose_people(recordings, config.subjects)
    words, responses, units, inside = read_podcast(recordings, config)
    if not inside.any():
        window = f"lag={config.lag}, width={config.width} (s)"
        raise InputError(f"{podcast}: no word has its window inside a recording: {window}")
    ok = units.pop("ok").to_numpy()
    silent = (units["subject"] + " " + units["name"])[~ok]
    spoken = words["word"].tolist()
    texts = [" ".join(spoken[max(0, i - config.context) : i + 1]) for i in range(len(spoken))]
    group = (words["onset"] // config.block).astype(int).astype(str)
    stimuli = words[["word", "word_idx", "onset"]].assign(text=texts, group=group, split="")
    meta = write_encoding(
        folder,
        stimuli[inside].reset_index(drop=True),
        responses[inside][:, ok],
        units=units[ok],
        modality="ECoG",
        species="human",
        source=str(about.get("source", podcast.name)),
        synthetic=about["synthetic"],
        options=options,
        left_out=[
            f"{(~inside).sum():,} words whose window is outside a recording",
            f"{len(silent)} electrodes that are flat or hold NaN: {', '.join(silent) or 'none'}",
        ],
    )
    print_sizes(folder, meta)


if __name__ == "__main__":
    main(configure(Config))
