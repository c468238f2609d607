"""Simulate a listening experiment in the file formats of Podcast ECoG, with a known ground truth:
which electrodes carry the words, and when.

    python data/synthetic_podcast/prepare.py                           # two people, 7.5 minutes
    python data/synthetic_podcast/prepare.py gain=0 out_dir=data/null  # nothing planted
    python data/synthetic_podcast/prepare.py lag_ms=150 subjects=4 seed=1 out_dir=data/other

Words are drawn independently from a Zipf distribution; each has a vector z, its type's plus jitter.
Latent sources, one per electrode, carry 1/f-like noise. Some also carry w·z for 0.1 s around
`lag_ms` after a word's onset, others the loudness of the audio, `volume_lag_ms` late. Neighbouring
electrodes mix sources. `nonlinear` adds what linear estimates of one electrode from the others miss
(see readme.md). The files have the layout of OpenNeuro ds005574, awkward cases included, and are
read by data/podcast/prepare.py.
"""

import json
import shutil
import sys
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure, key_seed
from data import InputError, check_options, folder_of, options_of
from data.podcast import prepare as podcast
from data.recording import complete, read_set

EMBEDDED = True  # needs no download, so scripts start this on first use

SFREQ, AUDIO_RATE = 512, 8000
VOLTS = 1e-5  # mean of a high-gamma envelope
SWING = 0.1  # SD of the background, relative to the mean
KERNEL_MS = 100  # duration of a word's response, centred on the lag
SPREAD = {0: 1.0, 1: 0.6, 2: 0.35}  # weight of sources by squared distance on the grid
LAYER, DIMS, SEMANTIC = 24, 64, 16  # of the features: layer, width, dimensions of z

# what `nonlinear` adds: SD of each part at nonlinear=1, in SD of the background
PARTS = {
    "drives": 2.0,
    "gating": 1.5,
    "bursts": 1.5,
    "moving": 1.5,
    "rhythm": 0.7,
    "harmonics": 0.7,
}
N_DRIVES, DRIVE_S = 3, 0.08  # shared processes, and their time constant
BURST_AT = 1.3  # threshold of a burst, in SD of a mixture of drives
FIELD_WIDTH = 0.6  # of the moving source, in SD of the two drives that move it
RHYTHM_HZ, RESET_S = 4.0, 0.1  # the rhythm restarts this long after each word's onset

# word types from frequent to rare, of which the first `vocabulary` are spoken
TYPES = """
the:function and:function a:function time:noun to:function I:function know:verb of:function
it:function people:noun say:verb that:function old:adjective in:function you:function house:noun
don't:function really:adverb he:function think:verb with:function water:noun good:adjective
they:function remember:verb on:function friend:noun little:adjective never:adverb it's:function
story:noun walk:verb always:adverb for:function night:noun beautiful:adjective laugh:verb
yesterday:adverb monkey:noun she:function river:noun strange:adjective listen:verb again:adverb
but:function mother:noun write:verb afternoon:noun happy:adjective we:function carry:verb
window:noun quietly:adverb music:noun because:function heavy:adjective forget:verb mountain:noun
from:function question:noun travel:verb green:adjective teacher:noun somewhere:adverb into:function
believe:verb garden:noun empty:adjective answer:noun their:function winter:noun discover:verb
gentle:adjective kitchen:noun suddenly:adverb under:function hospital:noun whisper:verb
narrow:adjective island:noun
"""
WORDS = [tuple(entry.split(":")) for entry in TYPES.split()]
PIECES = {  # how the made-up tokenizer cuts words
    "remember": ["rem", "ember"],
    "yesterday": ["y", "ester", "day"],
    "don't": ["don", "'t"],
    "it's": ["it", "'s"],
    "beautiful": ["beaut", "iful"],
    "afternoon": ["after", "noon"],
    "discover": ["dis", "cover"],
    "monkey": ["mon", "key"],
}


@dataclass
class Config:
    subjects: int = 2  # people
    minutes: float = 7.5  # of audio
    vocabulary: int = 40  # word types
    electrodes: int = 32  # of the first person; each further person has 6 fewer, at least 8
    gain: float = 2.0  # of a word's response, in SD of the noise at its source; 0: no words
    lag_ms: float = 300.0  # from a word's onset to the middle of its response
    volume_gain: float = 1.0  # of the loudness, likewise; 0: none
    volume_lag_ms: float = 100.0  # from the audio to the loudness response
    jitter: float = 0.5  # of a word's vector around its type's, in SD of the types
    nonlinear: float = 0.0  # strength of what a linear estimate misses; 1: as in PARTS
    seed: int = 0
    out_dir: str = ""  # "": this folder; the raw files go into its raw/
    overwrite: bool = False  # make it again if it exists

    POSITIVE = "subjects"
    SIGNED = "lag_ms volume_lag_ms"

    def check(self):
        if not 10 <= self.vocabulary <= len(WORDS):
            raise InputError(f"vocabulary={self.vocabulary}: give 10 to {len(WORDS)} word types")
        if self.electrodes < 8:
            raise InputError(f"electrodes={self.electrodes}: give at least 8")
        if self.minutes < 0.5:
            raise InputError(f"minutes={self.minutes}: give at least 0.5")


# ---- the audio


def make_transcript(config):
    """Return the words in order: type (rank), word as printed, start, end (s, NaN if unknown),
    onset (the true start) and share (the type's frequency)."""
    rng = np.random.default_rng(key_seed(config.seed, "transcript"))
    share = 1 / np.arange(1, config.vocabulary + 1)
    share /= share.sum()
    onset = 0.4 + np.cumsum(rng.uniform(0.25, 0.6, int(config.minutes * 60 / 0.25)))
    onset = onset[onset < config.minutes * 60 - 0.5]
    n = len(onset)
    types = rng.choice(config.vocabulary, n, p=share)
    odd = rng.choice(np.arange(10, n - 10, 3), 12, replace=False)
    onset[odd[:4]] = onset[odd[:4] - 1]  # two speakers at once,
    onset[odd[4:8]] = onset[odd[4:8] - 1] - 0.12  # or a word that began before its predecessor
    duration = rng.uniform(0.12, 0.24, n)  # independent of the type
    is_last = rng.random(n) < 1 / 8
    is_first = np.concatenate([[True], is_last[:-1]])
    marks = rng.random(n)
    printed = []
    for number, first, last, mark in zip(types, is_first, is_last, marks):
        word = WORDS[number][0]
        if first:
            word = word[0].upper() + word[1:]
        if last:
            word += ".?!"[int(3 * mark**3)]
        elif mark < 0.06:
            word += ","
        printed.append(word)
    table = pd.DataFrame({"type": types, "word": printed, "onset": onset})
    table["start"] = onset.round(3)
    table["end"] = (onset + duration).round(3)
    table["share"] = share[types]
    table.loc[odd[8:11], ["start", "end"]] = np.nan
    table.loc[odd[11], "end"] = np.nan
    return table


def make_vectors(table, config):
    """Return vectors z (words, SEMANTIC): the part of speech contributes to the type's vector, to
    which each word adds jitter. The variance over types is about 1."""
    rng = np.random.default_rng(key_seed(config.seed, "vectors"))
    parts = {}
    for part in ("function", "noun", "verb", "adjective", "adverb"):
        parts[part] = rng.normal(size=SEMANTIC)
    types = [0.6 * parts[part] + 0.8 * rng.normal(size=SEMANTIC) for _, part in WORDS]
    jitter = config.jitter * rng.normal(size=(len(table), SEMANTIC))
    return np.stack(types)[table["type"]] + jitter


def make_audio(table, config):
    """Return the audio (T,) in [-1, 1] at AUDIO_RATE and its envelope (t,) at SFREQ.

    Each word is a burst of noise of random loudness.
    """
    rng = np.random.default_rng(key_seed(config.seed, "audio"))
    seconds = config.minutes * 60
    envelope = np.full(round(seconds * SFREQ), 0.004)
    levels = np.exp(rng.normal(-2.4, 0.5, len(table)))
    ends = table["end"].fillna(table["onset"] + 0.18)
    for onset, end, level in zip(table["onset"], ends, levels):
        word = envelope[round(onset * SFREQ) : round(end * SFREQ)]
        word += level * np.hanning(len(word) + 2)[1:-1]
    times = np.arange(round(seconds * AUDIO_RATE)) / AUDIO_RATE
    amplitude = np.interp(times, np.arange(len(envelope)) / SFREQ, envelope)
    return np.clip(amplitude * rng.normal(size=len(amplitude)), -1, 1), envelope


# ---- the brain


def background(rng, samples, sources):
    """Return 1/f-like noise (samples, sources): the sum of three AR(1) processes."""
    from scipy.signal import lfilter

    noise = np.zeros((samples, sources), np.float32)
    for seconds in (0.015, 0.1, 0.7):
        phi = np.exp(-1 / (seconds * SFREQ))
        white = rng.normal(size=(samples, sources)).astype(np.float32)
        white *= np.float32(np.sqrt((1 - phi**2) / 3))
        noise += lfilter([1.0], [1.0, -phi], white, axis=0)
    return noise


def responses(onset, amplitude, samples, lag_ms):
    """Return (samples, sources): each word's amplitude (words, sources) as a boxcar within
    KERNEL_MS around lag_ms after its onset."""
    first = np.ceil((lag_ms - KERNEL_MS / 2) / 1000 * SFREQ).astype(int)
    last = np.floor((lag_ms + KERNEL_MS / 2) / 1000 * SFREQ).astype(int)
    steps = np.zeros((samples + 1, amplitude.shape[1]))
    rows = np.round(onset * SFREQ).astype(int)
    np.add.at(steps, np.clip(rows + first, 0, samples), amplitude)
    np.add.at(steps, np.clip(rows + last, 0, samples), -amplitude)
    return np.cumsum(steps, 0)[:-1].astype(np.float32)


def nonlinear_parts(rng, onset, channels, samples):
    """Yield (name, (samples, C)) for each of PARTS, functions of a few processes that a person's
    electrodes share: linear for the drives and the rhythm, else another per electrode."""
    from scipy.signal import lfilter

    count = len(channels)
    phi = np.exp(-1 / (DRIVE_S * SFREQ))
    drives = rng.normal(size=(samples, N_DRIVES))
    for _ in range(2):
        drives = lfilter([1.0], [1.0, -phi], drives, axis=0)
    drives = standardized(drives)
    yield "drives", drives @ random_directions(rng, count)
    gate = drives @ random_directions(rng, count)
    yield "gating", drives @ random_directions(rng, count) * (gate > 0)  # open or closed
    yield "bursts", np.abs(drives @ random_directions(rng, count)) > BURST_AT  # all or none
    grid = (channels["type"] == "ecog").to_numpy()
    place = channels[["y", "z"]].to_numpy()
    low, high = place[grid].min(0), place[grid].max(0)
    place = (place - low) / (high - low) * 3 - 1.5  # in SD of the drives
    distance = (drives[:, :1] - place[:, 0]) ** 2 + (drives[:, 1:2] - place[:, 1]) ** 2
    yield "moving", np.exp(-distance / (2 * FIELD_WIDTH**2)) * grid
    seconds = np.arange(samples) / SFREQ
    resets = np.sort(onset) + RESET_S
    last = np.searchsorted(resets, seconds, side="right")
    phase = 2 * np.pi * RHYTHM_HZ * (seconds - np.concatenate([[0.0], resets])[last])
    yield "rhythm", np.cos(phase[:, None] + rng.uniform(0, 2 * np.pi, count))
    multiple = rng.integers(2, 4, size=count)
    yield "harmonics", np.cos(multiple * phase[:, None] + rng.uniform(0, 2 * np.pi, count))


def random_directions(rng, count):
    """Return weights (N_DRIVES, count) of random mixtures of the drives, of unit variance."""
    weights = rng.normal(size=(N_DRIVES, count))
    return weights / np.linalg.norm(weights, axis=0)


def standardized(x):
    """Return x as float32 with zero mean and unit variance over time, 0 if constant."""
    x = x.astype(np.float32)
    x -= x.mean(0, dtype=np.float64).astype(np.float32)
    sd = x.std(0, dtype=np.float64).astype(np.float32)
    return x / np.where(sd > 0, sd, 1)


def make_montage(rng, number, config):
    """Return channels of person `number`, a DataFrame with name, type, x, y, z (mm), and their
    squared distances (C, C): a square grid, and a shaft far from it."""
    count = max(8, config.electrodes - 6 * (number - 1))
    depth = 4 if count >= 16 else 0
    n_grid = count - depth
    side = int(np.ceil(np.sqrt(n_grid)))
    cells = np.stack(np.divmod(np.arange(n_grid), side), axis=1)
    shaft = np.arange(depth)
    stems = ("LGA", "LGB") if number % 2 else ("LGB", "LF")
    half = (n_grid + 1) // 2
    names = [f"{stems[i // half]}{i % half + 1}" for i in range(n_grid)]
    names += [f"DA{i + 1}" for i in shaft]
    channels = pd.DataFrame({"name": names, "type": ["ecog"] * n_grid + ["seeg"] * depth})
    channels["x"] = np.concatenate([-62.0 + rng.normal(0, 1, n_grid), -25 - 5.0 * shaft])
    channels["y"] = np.concatenate([20.0 - 10.0 * cells[:, 0], np.full(depth, -20.0)])
    channels["z"] = np.concatenate([10.0 * cells[:, 1] - 25.0, np.full(depth, -15.0)])
    places = np.concatenate([cells, np.stack([100 + shaft, 0 * shaft], axis=1)])
    return channels, ((places[:, None] - places[None]) ** 2).sum(-1)


def make_subject(number, table, z, envelope, config):
    """Return one person's channels, signal (T, C) in SD of the background, and the names of the
    electrodes that carry {word: ..., volume: ...}."""
    rng = np.random.default_rng(key_seed(config.seed, "subject", number))
    channels, distance = make_montage(rng, number, config)
    n_grid = int((channels["type"] == "ecog").sum())
    mixing = np.vectorize(lambda d: SPREAD.get(d, 0.0))(distance)  # (C, sources)
    corner = distance[0 if number % 2 else n_grid - 1][:n_grid]
    word_sources = np.argsort(corner, kind="stable")[: max(2, n_grid // 5)]  # a patch of cortex
    volume_sources = np.argsort(-corner, kind="stable")[:2]  # in the opposite corner
    samples = len(envelope)
    signal = background(rng, samples, len(channels))
    weights = rng.normal(size=(SEMANTIC, len(word_sources)))
    weights /= np.linalg.norm(weights, axis=0)
    heard = responses(table["onset"].to_numpy(), z @ weights, samples, config.lag_ms)
    signal[:, word_sources] += config.gain * heard
    times = np.arange(samples) / SFREQ
    late = np.interp(times - config.volume_lag_ms / 1000, times, envelope)
    loudness = ((late - late.mean()) / late.std())[:, None].astype(np.float32)
    signal[:, volume_sources] += config.volume_gain * loudness
    signal = signal @ mixing.T.astype(np.float32)
    signal += 0.1 * rng.standard_normal(signal.shape, np.float32)
    signal /= np.linalg.norm(mixing, axis=1).astype(np.float32)
    if config.nonlinear:
        rng = np.random.default_rng(key_seed(config.seed, "nonlinear", number))
        for name, part in nonlinear_parts(rng, table["onset"].to_numpy(), channels, samples):
            signal += np.float32(config.nonlinear * PARTS[name]) * standardized(part)
    carriers = {"word": [], "volume": []}
    if config.gain:
        carriers["word"] = channels["name"][(mixing[:, word_sources] > 0).any(1)].tolist()
    if config.volume_gain:
        carriers["volume"] = channels["name"][(mixing[:, volume_sources] > 0).any(1)].tolist()
    return channels, signal, carriers


# ---- the tree of ds005574


def write_tsv(path, table):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, sep="\t", index=path.name == "transcript.tsv", na_rep="n/a")


def write_subject(root, number, table, z, envelope, config):
    """Write one person's files and return what is planted in them.

    The first person's recorder started late, everybody else's stopped early.
    """
    import mne

    subject = f"sub-{number:02d}"
    rng = np.random.default_rng(key_seed(config.seed, "files", number))
    channels, signal, carriers = make_subject(number, table, z, envelope, config)
    names = channels["name"].tolist()
    planted = carriers["word"] + carriers["volume"]
    clean = [name for name in names[:-1] if name not in planted]
    bad = clean[len(clean) // 2] if clean else names[0]  # carries nothing, if possible
    drift = 40 * np.sin(2 * np.pi * 0.37 * np.arange(len(signal)) / SFREQ)
    signal[:, names.index(bad)] = drift + 20 * rng.standard_normal(len(signal))
    start = 0
    if number == 1:
        start = round(2.3 * SFREQ)
        signal = signal[start:]
    else:
        signal = signal[: -round(3.1 * SFREQ)]
    volts = (VOLTS * (1 + SWING * signal)).T
    info = mne.create_info(names, SFREQ, channels["type"].tolist())
    if number > 1:  # the first person's is marked in channels.tsv only
        info["bads"] = [bad]
    folder = root / "derivatives" / "ecogprep" / subject / "ieeg"
    folder.mkdir(parents=True, exist_ok=True)
    raw = mne.io.RawArray(volts, info, first_samp=start, verbose="error")
    path = folder / f"{subject}_task-podcast_desc-highgamma_ieeg.fif"
    raw.save(path, overwrite=True, verbose="error")
    write_sidecars(root / subject / "ieeg" / subject, channels, bad)
    return {
        "electrodes": carriers["word"],
        "volume_electrodes": carriers["volume"],
        "bad": bad,
        "first_sample": start,
    }


def write_sidecars(stem, channels, bad):
    """Write channels.tsv, electrodes.tsv and coordsystem.json with the real ones' oddities."""
    table = channels[["name"]].assign(
        type=channels["type"].str.upper(),
        units="V",
        low_cutoff=70,
        high_cutoff=200,
        sampling_frequency=SFREQ,
        status=np.where(channels["name"] == bad, "bad", "good"),
        status_description=np.where(channels["name"] == bad, "noisy psd", "n/a"),
    )
    # a channel of the table that the derivative lacks
    table.loc[len(table)] = ["EKG1", "ECG", "V", 0, 256, SFREQ, "good", "n/a"]
    write_tsv(f"{stem}_task-podcast_channels.tsv", table)
    electrodes = channels[["name", "x", "y", "z"]].round(2)
    electrodes.loc[len(electrodes) - 1, ["x", "y", "z"]] = np.nan  # not found in the scan
    space = f"{stem}_space-MNI152NLin2009aSym"
    write_tsv(f"{space}_electrodes.tsv", electrodes)
    system = {"iEEGCoordinateSystem": "MNI152NLin2009aSym", "iEEGCoordinateUnits": "mm"}
    Path(f"{space}_coordsystem.json").write_text(json.dumps(system))


def make_tokens(rng, table):
    """Return the rows of transcript.tsv: a made-up tokenizer's tokens with probabilities."""
    share = table.groupby("type")["share"].first()
    ranks = share.rank(ascending=False, method="first").astype(int) - 1
    entropy = float(-(share * np.log(share)).sum())
    token_ids = {}
    rows = []
    for i, row in enumerate(table.itertuples()):
        bare = row.word.rstrip(".,?!")
        pieces = PIECES.get(bare.lower(), [bare])
        pieces = [bare[: len(pieces[0])], *pieces[1:], *row.word[len(bare) :]]
        for j, token in enumerate(pieces):
            if j == 0:
                token = f"Ġ{token}"
                prob = float(np.clip(row.share * np.exp(rng.normal(0, 0.3)), 1e-4, 0.9))
                guess = (ranks[row.type], prob, f"Ġ{WORDS[0][0]}", entropy + rng.normal(0, 0.1))
            else:  # later pieces are nearly certain
                guess = (0, float(rng.uniform(0.7, 0.99)), token, 0.3)
            token_id = token_ids.setdefault(token, len(token_ids) + 1000)
            rows.append((i, row.word, row.start, row.end, token, token_id, *guess))
    columns = "word_idx word start end hftoken token_id rank true_prob top_pred entropy"
    return pd.DataFrame(rows, columns=columns.split())


def write_features(folder, table, z, config):
    """Write transcript.tsv and features.hdf5 like GPT-2 XL's: a row per token, the words' vectors
    in one layer, noise in another."""
    import h5py

    rng = np.random.default_rng(key_seed(config.seed, "features"))
    tokens = make_tokens(rng, table)
    write_tsv(folder / "transcript.tsv", tokens)
    turn = np.linalg.qr(rng.normal(size=(DIMS, DIMS)))[0][:SEMANTIC]  # orthonormal rows
    layer = z[tokens["word_idx"]] @ turn + 0.15 * rng.normal(size=(len(tokens), DIMS))
    layer += rng.normal(size=DIMS)
    with h5py.File(folder / "features.hdf5", "w") as file:
        file[f"layer-{LAYER}"] = layer.astype(np.float32)
        file["layer-0"] = rng.normal(size=layer.shape).astype(np.float32)


def make_tree(root, config):
    """Write everything under root; dataset_description.json marks it synthetic, with the truth."""
    table = make_transcript(config)
    z = make_vectors(table, config)
    audio, envelope = make_audio(table, config)
    stimuli = root / "stimuli"
    (stimuli / "gpt2-xl").mkdir(parents=True)
    table[["word", "start", "end"]].to_csv(stimuli / "podcast_transcript.csv", index=False)
    pos = [WORDS[number][1] for number in table["type"]]
    table[["word", "start"]].assign(pos=pos).to_csv(stimuli / "pos.csv", index=False)
    write_features(stimuli / "gpt2-xl", table, z, config)
    with wave.open(str(stimuli / "podcast.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(AUDIO_RATE)
        file.writeframes((audio * 32767).astype("<i2").tobytes())
    subjects = {}
    for number in range(1, config.subjects + 1):
        subjects[f"sub-{number:02d}"] = write_subject(root, number, table, z, envelope, config)
    people = pd.DataFrame({"participant_id": list(subjects), "nyu_id": 900})
    people["nyu_id"] += people.index + 1
    write_tsv(root / "participants.tsv", people)
    planted = {"kernel_ms": KERNEL_MS, "subjects": subjects, "made_with": options_of(config)}
    for key in ("lag_ms", "gain", "volume_lag_ms", "volume_gain", "nonlinear"):
        planted[key] = getattr(config, key)
    planted["features"] = f"gpt2-xl layer-{LAYER} holds the vectors, layer-0 is noise"
    planted["null_tasks"] = "sentence onset"
    description = {
        "Name": "synthetic podcast (no person was recorded)",
        "BIDSVersion": "1.8.0",
        "License": "made up by this repository",
        "Synthetic": True,
        "Planted": planted,
    }
    (root / "dataset_description.json").write_text(json.dumps(description, indent=1))


# ---- main


def main(config):
    folder = folder_of(config, __file__)
    if complete(folder) and not config.overwrite:
        made_with = read_set(folder).get("planted", {}).get("made_with")
        check_options(folder, made_with, options_of(config))
        print(f"{folder} exists already (overwrite=True makes it again)")
        return
    raw = folder / "raw"
    (folder / "meta.yaml").unlink(missing_ok=True)
    shutil.rmtree(raw, ignore_errors=True)
    make_tree(raw, config)
    options = {"root": str(raw), "out_dir": str(folder), "pos": f"{raw}/stimuli/pos.csv"}
    podcast.main(podcast.Config(**options, overwrite=True))


if __name__ == "__main__":
    main(configure(Config))
