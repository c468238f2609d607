"""A made-up listening experiment in the very files of Podcast ECoG, with a truth that is known: which electrodes carry the words, and when.

    python data/synthetic_podcast/prepare.py                                  # two people, 7.5 minutes, about 1,060 words of 40 types
    python data/synthetic_podcast/prepare.py gain=0 out_dir=data/null         # the same with nothing planted
    python data/synthetic_podcast/prepare.py lag_ms=150 subjects=4 seed=1 out_dir=data/other

Words are drawn independently from a Zipf distribution; each has a vector, z = its type's + a jitter of its own. Latent sources, each at an electrode,
carry noise (1/f-like), and some of them w·z for 0.1 s around `lag_ms` after a word's onset, or the loudness of the audio `volume_lag_ms` later.
Neighbouring electrodes mix sources. Files are written as OpenNeuro ds005574 has them and read by data/podcast/prepare.py, awkward cases included.
"""
import fcntl, hashlib, json, os, shutil, subprocess, sys, wave
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure, key_seed
from data.recording import complete, read_set

EMBEDDED = True  # made up, offline: scripts may start this on first use

PODCAST = Path(__file__).resolve().parents[1] / "podcast" / "prepare.py"  # the reader
SFREQ, AUDIO_RATE = 512, 8000
VOLTS, SWING = 1e-5, 0.1  # a high-gamma envelope: its mean, and the standard deviation of the background as a share of it
KERNEL_MS = 100           # how long a word's response lasts, the lag in its middle
SPREAD = {0: 1.0, 1: 0.6, 2: 0.35}  # what an electrode picks up from a source by squared distance on its grid; beyond that nothing
LAYER, DIMS, SEMANTIC = 24, 64, 16  # of the released-like features: layer, width, dimensions that hold z

# Word types from frequent to rare, with their part of speech. The first `vocabulary` of them are spoken; rank decides the frequency.
WORDS = [tuple(entry.split(":")) for entry in """
the:function and:function a:function time:noun to:function I:function know:verb of:function it:function people:noun say:verb that:function old:adjective
in:function you:function house:noun don't:function really:adverb he:function think:verb with:function water:noun good:adjective they:function
remember:verb on:function friend:noun little:adjective never:adverb it's:function story:noun walk:verb always:adverb for:function night:noun
beautiful:adjective laugh:verb yesterday:adverb monkey:noun she:function
river:noun strange:adjective listen:verb again:adverb but:function mother:noun write:verb afternoon:noun happy:adjective we:function
carry:verb window:noun quietly:adverb music:noun because:function heavy:adjective forget:verb mountain:noun from:function question:noun
travel:verb green:adjective teacher:noun somewhere:adverb into:function believe:verb garden:noun empty:adjective answer:noun their:function
winter:noun discover:verb gentle:adjective kitchen:noun suddenly:adverb under:function hospital:noun whisper:verb narrow:adjective island:noun
""".split()]
PIECES = {"remember": ["rem", "ember"], "yesterday": ["y", "ester", "day"], "don't": ["don", "'t"], "it's": ["it", "'s"], "beautiful": ["beaut", "iful"],
          "afternoon": ["after", "noon"], "discover": ["dis", "cover"], "monkey": ["mon", "key"]}  # how the made-up tokenizer cuts words


@dataclass
class Config:
    subjects: int = 2                # people
    minutes: float = 7.5             # of audio
    vocabulary: int = 40             # word types
    electrodes: int = 32             # of the first person; every further one has 6 fewer, down to 8
    gain: float = 2.0                # of a word's response, in standard deviations of the noise at its source; 0: nothing about words is planted
    lag_ms: float = 300.0            # when a word's response has its middle, after the onset
    volume_gain: float = 1.0         # of the loudness, likewise; 0: none
    volume_lag_ms: float = 100.0     # how late it follows the audio
    jitter: float = 0.5              # of a word's vector about its type's, in standard deviations of the types
    broadband: bool = False          # also write the cleaned broadband recording whose 70-200 Hz band has this envelope (signal=broadband)
    seed: int = 0                    # another seed, another experiment
    out_dir: str = ""                # "": this folder; the raw files go into raw/ in it
    overwrite: bool = False          # make it again although it is there

    SIGNED = "lag_ms volume_lag_ms"

    def check(self):
        if not 10 <= self.vocabulary <= len(WORDS):
            raise ValueError(f"vocabulary={self.vocabulary}: give 10 to {len(WORDS)} word types")
        if self.subjects < 1 or self.electrodes < 8:
            raise ValueError(f"subjects={self.subjects} electrodes={self.electrodes}: give at least one person with 8 electrodes")
        if self.minutes < 0.5:
            raise ValueError(f"minutes={self.minutes}: half a minute is the least that holds the awkward cases")


# ---- what is said

def make_transcript(config):
    """Words in order, one row each: type (rank), word as printed, start, end (s), NaN where nobody knows; true onsets in `onset`."""
    rng = np.random.default_rng(key_seed(config.seed, "transcript"))
    share = 1 / np.arange(1, config.vocabulary + 1)
    share /= share.sum()
    onset = 0.4 + np.cumsum(rng.uniform(0.25, 0.6, int(config.minutes * 60 / 0.25)))
    onset = onset[onset < config.minutes * 60 - 0.5]
    n = len(onset)
    kind = rng.choice(config.vocabulary, n, p=share)
    some = rng.choice(np.arange(10, n - 10, 3), 12, replace=False)
    onset[some[:4]] = onset[some[:4] - 1]            # two speakers at once,
    onset[some[4:8]] = onset[some[4:8] - 1] - 0.12   # or a word that began before the one before it in the transcript
    duration = rng.uniform(0.12, 0.24, n)            # says nothing about the type
    last = rng.random(n) < 1 / 8
    first = np.r_[True, last[:-1]]
    word = [WORDS[k][0] for k in kind]
    word = [w[0].upper() + w[1:] if f else w for w, f in zip(word, first)]
    word = [w + ".?!"[int(3 * r ** 3)] if l else w + "," if r < 0.06 else w for w, l, r in zip(word, last, rng.random(n))]
    table = pd.DataFrame({"type": kind, "word": word, "onset": onset, "start": onset.round(3), "end": (onset + duration).round(3), "share": share[kind]})
    table.loc[some[8:11], ["start", "end"]] = np.nan
    table.loc[some[11], "end"] = np.nan
    return table


def make_vectors(table, config):
    """(words, SEMANTIC) vectors z: of the type (its part of speech in it) plus a jitter of each word's own; unit variance over types, about."""
    rng = np.random.default_rng(key_seed(config.seed, "vectors"))
    parts = {part: rng.normal(size=SEMANTIC) for part in ("function", "noun", "verb", "adjective", "adverb")}
    types = np.stack([0.6 * parts[part] + 0.8 * rng.normal(size=SEMANTIC) for _, part in WORDS])
    return types[table["type"]] + config.jitter * rng.normal(size=(len(table), SEMANTIC))


def make_audio(table, config):
    """(T,) audio in [-1, 1] at AUDIO_RATE, and its envelope (t,) at SFREQ: each word a burst of noise, as loud as chance has it."""
    rng = np.random.default_rng(key_seed(config.seed, "audio"))
    envelope = np.full(round(config.minutes * 60 * SFREQ), 0.004)
    loud = np.exp(rng.normal(-2.4, 0.5, len(table)))
    for onset, end, level in zip(table["onset"], table["end"].fillna(table["onset"] + 0.18), loud):
        a, b = round(onset * SFREQ), min(round(end * SFREQ), len(envelope))
        envelope[a:b] += level * np.hanning(b - a + 2)[1:-1]
    slow = np.interp(np.arange(round(config.minutes * 60 * AUDIO_RATE)) / AUDIO_RATE, np.arange(len(envelope)) / SFREQ, envelope)
    return np.clip(slow * rng.normal(size=len(slow)), -1, 1), envelope


# ---- what a brain makes of it

def background(rng, samples, sources):
    """(samples, sources) noise with a spectrum that falls like 1/f: AR(1) of three time constants, unit variance."""
    from scipy.signal import lfilter
    out = np.zeros((samples, sources), np.float32)
    for seconds in (0.015, 0.1, 0.7):
        phi = np.exp(-1 / (seconds * SFREQ))
        white = rng.normal(size=(samples, sources)).astype(np.float32) * np.float32(np.sqrt((1 - phi ** 2) / 3))
        out += lfilter([1.0], [1.0, -phi], white, axis=0)
    return out


def responses(onset, amplitude, samples, lag_ms):
    """(samples, sources): each word's amplitude (words, sources) for KERNEL_MS around lag_ms after its onset. The boxcar never reaches beyond."""
    a = np.ceil((lag_ms - KERNEL_MS / 2) / 1000 * SFREQ).astype(int)
    b = np.floor((lag_ms + KERNEL_MS / 2) / 1000 * SFREQ).astype(int)
    steps = np.zeros((samples + 1, amplitude.shape[1]))
    rows = np.round(onset * SFREQ).astype(int)
    np.add.at(steps, np.clip(rows + a, 0, samples), amplitude)
    np.add.at(steps, np.clip(rows + b, 0, samples), -amplitude)
    return np.cumsum(steps, 0)[:-1].astype(np.float32)


def make_subject(number, table, z, envelope, config):
    """(names, xyz in mm (C, 3), types, signal (T, C) in units of the background, {word, volume: electrodes that carry it}) of one person."""
    rng = np.random.default_rng(key_seed(config.seed, "subject", number))
    count = max(8, config.electrodes - 6 * (number - 1))
    depth = 4 if count >= 16 else 0
    side = int(np.ceil(np.sqrt(count - depth)))
    grid = np.array([(i // side, i % side) for i in range(count - depth)])
    stems = ("LGA", "LGB") if number % 2 else ("LGB", "LF")
    half = (count - depth + 1) // 2
    names = [f"{stems[i // half]}{i % half + 1}" for i in range(count - depth)] + [f"DA{i + 1}" for i in range(depth)]
    place = np.concatenate([grid, [(100 + i, 0) for i in range(depth)]]) if depth else grid  # the shaft is far from the grid
    apart = ((place[:, None] - place[None]) ** 2).sum(-1)
    mixing = np.vectorize(lambda d: SPREAD.get(d, 0.0))(apart)  # (C, sources): a source sits at each electrode
    xyz = np.concatenate([np.c_[np.full(count - depth, -62.0) + rng.normal(0, 1, count - depth), grid @ [[-10.0, 0.0], [0.0, 10.0]] + [20.0, -25.0]],
                          np.c_[-25 - 5.0 * np.arange(depth), np.full(depth, -20.0), np.full(depth, -15.0)]])
    corner = apart[0] if number % 2 else apart[count - depth - 1]
    word_source = np.argsort(corner[:count - depth], kind="stable")[:max(2, (count - depth) // 5)]  # one patch of cortex
    away = np.argsort(-corner[:count - depth], kind="stable")[:2]                                   # loudness in the opposite corner
    samples = len(envelope)
    signal = background(rng, samples, count)
    weights = rng.normal(size=(SEMANTIC, len(word_source)))
    weights /= np.linalg.norm(weights, axis=0)
    signal[:, word_source] += config.gain * responses(table["onset"].to_numpy(), z @ weights, samples, config.lag_ms)
    late = np.interp(np.arange(samples) / SFREQ - config.volume_lag_ms / 1000, np.arange(samples) / SFREQ, envelope)
    signal[:, away] += config.volume_gain * ((late - late.mean()) / late.std())[:, None].astype(np.float32)
    signal = signal @ mixing.T.astype(np.float32) + 0.1 * rng.standard_normal((samples, count), np.float32)
    signal /= np.linalg.norm(mixing, axis=1).astype(np.float32)
    carry = {"word": [names[c] for c in np.flatnonzero((mixing[:, word_source] > 0).any(1))] if config.gain else [],
             "volume": [names[c] for c in np.flatnonzero((mixing[:, away] > 0).any(1))] if config.volume_gain else []}
    return names, xyz, ["ecog"] * (count - depth) + ["seeg"] * depth, signal, carry


# ---- the tree of ds005574

def write_tsv(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=path.name == "transcript.tsv", na_rep="" if path.suffix == ".csv" else "n/a")


def write_subject(root, number, table, z, envelope, config):
    """One person's files; returns what is planted in them. The first one's recorder was started late, every other one's stopped early."""
    import mne
    sub, rng = f"sub-{number:02d}", np.random.default_rng(key_seed(config.seed, "files", number))
    names, xyz, types, signal, carry = make_subject(number, table, z, envelope, config)
    clean = [c for c in range(len(names) - 1) if names[c] not in carry["word"] + carry["volume"]]
    bad = clean[len(clean) // 2] if clean else 0  # one that carries nothing, where there is one
    seconds = np.arange(len(signal)) / SFREQ
    signal[:, bad] = 40 * np.sin(2 * np.pi * 0.37 * seconds) + 20 * rng.standard_normal(len(signal))
    start, stop = (round(2.3 * SFREQ), len(signal)) if number == 1 else (0, len(signal) - round(3.1 * SFREQ))
    volts = (VOLTS * (1 + SWING * signal[start:stop])).T
    info = mne.create_info(names, SFREQ, types)
    info["bads"] = [names[bad]] if number > 1 else []  # the first one's bad channel is only in channels.tsv
    folder = root / "derivatives" / "ecogprep" / sub / "ieeg"
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{sub}_task-podcast_desc-highgamma_ieeg.fif": volts}
    if config.broadband:
        files[f"{sub}_task-podcast_ieeg.fif"] = broadband(rng, volts)
    for name, data in files.items():
        raw = mne.io.RawArray(data, info, first_samp=start, verbose="error")
        raw.save(folder / name, overwrite=True, verbose="error")
    ieeg = root / sub / "ieeg"
    channels = pd.DataFrame({"name": names, "type": [kind.upper() for kind in types], "units": "V", "low_cutoff": 70, "high_cutoff": 200,
                             "sampling_frequency": SFREQ, "status": ["bad" if c == bad else "good" for c in range(len(names))],
                             "status_description": ["noisy psd" if c == bad else "n/a" for c in range(len(names))]})
    channels.loc[len(channels)] = ["EKG1", "ECG", "V", 0, 256, SFREQ, "good", "n/a"]  # in the table, not in the derivative
    write_tsv(ieeg / f"{sub}_task-podcast_channels.tsv", channels)
    electrodes = pd.DataFrame({"name": names} | dict(zip("xyz", xyz.T.round(2))))
    electrodes.loc[len(names) - 1, ["x", "y", "z"]] = np.nan  # nobody found the last one in the scan
    write_tsv(ieeg / f"{sub}_space-MNI152NLin2009aSym_electrodes.tsv", electrodes)
    (ieeg / f"{sub}_space-MNI152NLin2009aSym_coordsystem.json").write_text(json.dumps({"iEEGCoordinateSystem": "MNI152NLin2009aSym",
                                                                                      "iEEGCoordinateUnits": "mm"}))
    return {"electrodes": carry["word"], "volume_electrodes": carry["volume"], "bad": names[bad], "first_sample": start}


def broadband(rng, envelope):
    """(C, T) in V: slow 1/f noise, and 70-200 Hz noise whose amplitude is the envelope."""
    from scipy.signal import butter, sosfiltfilt
    carrier = sosfiltfilt(butter(4, (70, 200), "bandpass", fs=SFREQ, output="sos"), rng.standard_normal(envelope.shape))
    slow = background(rng, envelope.shape[1], len(envelope)).T
    return 5 * VOLTS * slow + np.maximum(envelope, 0) * carrier / carrier.std()


def write_features(folder, table, z, config):
    """transcript.tsv and features.hdf5 as the release has them for GPT-2 XL: a row a token, the words' vectors in the layer."""
    import h5py
    rng = np.random.default_rng(key_seed(config.seed, "features"))
    share = table.groupby("type")["share"].first()
    rank = {kind: i for i, kind in enumerate(share.sort_values(ascending=False).index)}
    entropy = float(-(share * np.log(share)).sum())
    rows, owner, ids = [], [], {}
    for i, row in enumerate(table.itertuples()):
        bare = row.word.rstrip(".,?!")
        pieces = PIECES.get(bare.lower(), [bare])
        pieces = [bare[:len(pieces[0])], *pieces[1:]] + list(row.word[len(bare):])
        for j, piece in enumerate(pieces):
            token = ("Ġ" if j == 0 else "") + piece
            whole = j == 0  # the later pieces are all but sure
            prob = float(np.clip(row.share * np.exp(rng.normal(0, 0.3)), 1e-4, 0.9)) if whole else float(rng.uniform(0.7, 0.99))
            rows.append((i, row.word, row.start, row.end, token, ids.setdefault(token, len(ids) + 1000), rank[row.type] if whole else 0, prob,
                         "Ġ" + WORDS[0][0] if whole else token, entropy + float(rng.normal(0, 0.1)) if whole else 0.3))
            owner.append(i)
    columns = ["word_idx", "word", "start", "end", "hftoken", "token_id", "rank", "true_prob", "top_pred", "entropy"]
    write_tsv(folder / "transcript.tsv", pd.DataFrame(rows, columns=columns))
    turn = np.linalg.qr(rng.normal(size=(DIMS, DIMS)))[0][:SEMANTIC]  # (SEMANTIC, DIMS), orthonormal rows
    layer = z[owner] @ turn + 0.15 * rng.normal(size=(len(owner), DIMS)) + rng.normal(size=DIMS)
    with h5py.File(folder / "features.hdf5", "w") as file:
        file[f"layer-{LAYER}"] = layer.astype(np.float32)
        file["layer-0"] = rng.normal(size=layer.shape).astype(np.float32)  # a layer that knows nothing


def make_tree(root, config):
    """Everything under root; the truth goes into dataset_description.json, which marks it synthetic."""
    table = make_transcript(config)
    z = make_vectors(table, config)
    audio, envelope = make_audio(table, config)
    (root / "stimuli" / "gpt2-xl").mkdir(parents=True)
    write_tsv(root / "stimuli" / "podcast_transcript.csv", table[["word", "start", "end"]])
    write_tsv(root / "stimuli" / "pos.csv", table[["word", "start"]].assign(pos=[WORDS[k][1] for k in table["type"]]))
    write_features(root / "stimuli" / "gpt2-xl", table, z, config)
    with wave.open(str(root / "stimuli" / "podcast.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(AUDIO_RATE)
        file.writeframes((audio * 32767).astype("<i2").tobytes())
    planted = {f"sub-{n:02d}": write_subject(root, n, table, z, envelope, config) for n in range(1, config.subjects + 1)}
    write_tsv(root / "participants.tsv", pd.DataFrame({"participant_id": list(planted), "nyu_id": [901 + i for i in range(len(planted))]}))
    (root / "dataset_description.json").write_text(json.dumps({
        "Name": "synthetic podcast (no person was recorded)", "BIDSVersion": "1.8.0", "License": "made up by this repository", "Synthetic": True,
        "Planted": {"lag_ms": config.lag_ms, "kernel_ms": KERNEL_MS, "gain": config.gain, "volume_lag_ms": config.volume_lag_ms,
                    "volume_gain": config.volume_gain, "subjects": planted, "features": f"gpt2-xl layer-{LAYER} holds the vectors, layer-0 is noise",
                    "null_tasks": "sentence onset", "made_with": made_with(config)}}, indent=1))


def made_with(config):
    """Options and code: what decides whether a folder must be made again."""
    code = hashlib.sha256(Path(__file__).read_bytes() + PODCAST.read_bytes()).hexdigest()[:12]
    return {k: v for k, v in asdict(config).items() if k not in ("out_dir", "overwrite")} | {"code": code}


def main(config):
    folder = Path(config.out_dir) if config.out_dir else Path(os.path.relpath(Path(__file__).resolve().parent))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "making.tmp", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second one waits, then finds it made
        make(folder, config)


def make(folder, config):
    wanted = made_with(config)
    if not config.overwrite and complete(folder):
        made = read_set(folder).get("planted", {}).get("made_with", {})
        if made == wanted:
            print(f"{folder} is there already (overwrite=True makes it again)")
            return
        if differs := [k for k in wanted if k != "code" and made.get(k) != wanted[k]]:
            raise ValueError(f"{folder} was made with {differs[0]}={made.get(differs[0])}: give overwrite=True to make it again, or another out_dir")
        print(f"{folder} is of another version of this script: making it again", flush=True)
    raw = folder / "raw"
    (folder / "meta.yaml").unlink(missing_ok=True)
    shutil.rmtree(raw, ignore_errors=True)
    make_tree(raw, config)
    command = [sys.executable, str(PODCAST), f"root={raw}", f"out_dir={folder}", f"pos={raw / 'stimuli' / 'pos.csv'}", "overwrite=True"]
    if subprocess.run(command).returncode:
        raise ValueError(f"{PODCAST} could not read {raw}: its own message stands above")


if __name__ == "__main__":
    main(configure(Config))
