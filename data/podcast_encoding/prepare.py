"""The podcast as stimuli with responses: a word with the words before it, and the mean high gamma of every electrode around a lag.

    python data/podcast/prepare.py subjects=3                           # first: the recordings
    python data/podcast_encoding/prepare.py                             # 200 ms around 300 ms after a word's onset
    python data/podcast_encoding/prepare.py podcast=path/to/prepared lag=0.15 width=0.1 context=16
    python warp.py dataset=podcast_encoding models=gpt2 layers=6

No embeddings: a model reads the text itself. Heard once, so there are no repeats and no ceilings. Neighbouring words share their sound and their brain:
a stretch of the story is one group, which no split tears apart.
"""
import os, sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data.recording import Recording, read_set
from data.stimuli import complete_encoding, read_encoding_meta, write_encoding

EMBEDDED = False  # needs data/podcast, which must be downloaded
HERE = Path(os.path.relpath(Path(__file__).resolve().parent))


@dataclass
class Config:
    podcast: str = ""                # prepared podcast; "": data/podcast beside this folder
    subjects: list[str] = field(default_factory=list)  # recordings of it, none: all
    lag: float = 0.3                 # s after the onset of a word, middle of the window
    width: float = 0.2               # s, of the window
    context: int = 32                # words before a word that are read with it
    block: float = 30.0              # s of story that are one group
    out_dir: str = ""                # "": this folder
    overwrite: bool = False          # make it again although it is there

    SIGNED = "lag"

    def check(self):
        if self.width <= 0 or self.block <= 0 or self.context < 0:
            raise ValueError(f"width={self.width}, block={self.block} (s) must be above 0 and context={self.context} (words) not below")


def windows(recording, onset, lag, width):
    """(P, C) mean of the signal in [onset + lag - width/2, onset + lag + width/2), in standard deviations of each channel over the recording, and
    (P,) whether the window lies inside it. onset: (P,) s."""
    start, stop = recording.rows(onset + lag - width / 2), recording.rows(onset + lag + width / 2)
    stop = np.maximum(stop, start + 1)
    inside = (start >= 0) & (stop <= len(recording.signal))
    total, squares = np.zeros(recording.signal.shape[1]), np.zeros(recording.signal.shape[1])
    for a in range(0, len(recording.signal), 1 << 16):
        piece = recording.signal[a:a + (1 << 16)].astype(np.float64)
        total, squares = total + piece.sum(0), squares + np.square(piece).sum(0)
    mean = total / len(recording.signal)
    sd = np.sqrt(np.maximum(squares / len(recording.signal) - mean ** 2, 0))
    y = np.zeros((len(onset), len(mean)), np.float32)
    for i in np.flatnonzero(inside):
        y[i] = (recording.signal[start[i]:stop[i]].mean(0, dtype=np.float64) - mean) / np.where(sd > 0, sd, 1)
    return y, inside, sd > 0


def main(config):
    folder = Path(config.out_dir) if config.out_dir else HERE
    options = {key: value for key, value in asdict(config).items() if key not in ("podcast", "out_dir", "overwrite")}
    if not config.overwrite and complete_encoding(folder):
        if (made := read_encoding_meta(folder).get("options")) != options:
            raise ValueError(f"{folder} was made with {made}: give overwrite=True to make it again, or another out_dir")
        return print(f"{folder}: there already (overwrite=True makes it again)")
    podcast = Path(config.podcast) if config.podcast else HERE.parent / "podcast"
    meta = read_set(podcast)  # says how to make it where it is not there
    if unknown := [name for name in config.subjects if name not in meta["recordings"]]:
        raise ValueError(f"{podcast} has no recording {unknown[0]}, only {', '.join(meta['recordings'])}")

    words, parts, units, inside = None, [], [], True
    for name in config.subjects or meta["recordings"]:
        recording = Recording(podcast / name)
        if lacks := [c for c in ("word", "word_idx") if c not in recording.events]:
            raise ValueError(f"{recording.path / 'events.csv'} has no column '{lacks[0]}', only {', '.join(recording.events)}")
        heard = recording.events.assign(word_idx=recording.events.word_idx.astype(int)).sort_values("word_idx", ignore_index=True)
        heard = heard[heard.word.astype(str).str.strip() != ""].drop_duplicates("word_idx").reset_index(drop=True)
        if words is not None and (len(words) != len(heard) or (words[["word_idx", "word"]] != heard[["word_idx", "word"]]).to_numpy().any()):
            raise ValueError(f"{podcast}: {name} heard other words than {units[0].subject.iloc[0]}: give subjects= those who heard the same")
        words = heard if words is None else words
        y, within, alive = windows(recording, heard.onset.to_numpy(), config.lag, config.width)
        good = recording.good & alive
        parts.append(y[:, good])
        units.append(pd.DataFrame({"roi": "", "subject": recording.subject, "name": recording.names}).assign(**dict(zip("xyz", recording.xyz.T)))[good])
        inside = inside & within
    if not np.any(inside):
        raise ValueError(f"lag={config.lag}, width={config.width}: no window lies inside the recordings")
    said = words.word.astype(str).str.strip().to_numpy()
    texts = [" ".join(said[max(0, i - config.context):i + 1]) for i in range(len(said))]
    stimuli = pd.DataFrame({"text": texts, "group": (words.onset // config.block).astype(int).astype(str), "split": "", "word": said,
                            "word_idx": words.word_idx, "onset": words.onset})[inside].reset_index(drop=True)
    meta = write_encoding(folder, stimuli, np.concatenate(parts, axis=1)[inside], units=pd.concat(units, ignore_index=True), modality="ECoG", species="human",
                          source=str(meta.get("source", podcast.name)), synthetic=meta["synthetic"], options=options,
                          left_out=[f"{(~inside).sum():,} words whose window is outside a recording"])
    n = meta["sizes"]
    print(f"{folder}: {n['stimuli']:,} words in {stimuli.group.nunique()} stretches of {config.block:g} s, {n['units']:,} electrodes; "
          f"{meta['left_out'][0]} left out" + ("; synthetic" if meta["synthetic"] else ""))


if __name__ == "__main__":
    main(configure(Config))
