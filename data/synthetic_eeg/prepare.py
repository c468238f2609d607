"""Made-up EEG of people who are shown objects five times a second, with a known answer: real BIDS and BrainVision files, read like anybody's.

    python data/synthetic_eeg/prepare.py
    python data/synthetic_eeg/prepare.py gain=0 out_dir=data/synthetic_eeg/null      # the null: the same brains, nothing about the object in them

What is planted: each object is a noun that is frequent in data/pydocs' training text, its meaning 8 numbers out of that text's co-occurrences (PPMI
and SVD; no language model has a part in it). Each number drives one dipole with a response of its own latency, in a sphere model with the
person's own places, orientations and latencies. What is not about the object: the same evoked response to every picture, 1/f background of 150 dipoles,
alpha, blinks, mains, a bad channel. Responses overlap, as they do at 200 ms from picture to picture. An oracle that knows the meanings (noise
normalisation and ridge) says how much of them can be read.
"""
import json, os, re, subprocess, sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import mne
import numpy as np
import pandas as pd
import scipy.cluster.hierarchy
import scipy.fft
import scipy.linalg
import scipy.signal
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure, write_aside
from data import tokens
from data.bids_eeg import prepare as bids
from data.recording import Recording, complete, read_set

EMBEDDED = True  # made from data/pydocs, offline: scripts may start this on first use
HERE = Path(__file__).resolve().parent

CHANNELS = ("Fp1 Fp2 F7 F3 Fz F4 F8 FC5 FC1 FC2 FC6 T7 C3 Cz C4 T8 CP5 CP1 CP2 CP6 P7 P3 Pz P4 P8 PO7 PO3 POz PO4 PO8 O1 O2").split()
SOA, WINDOW = 0.2, (0.05, 0.55)  # s from picture to picture; s after onset that the oracle reads
# Other right answers, for those of the text's nouns that are chosen.
SYNONYMS = {"function": "routine|procedure", "value": "quantity|amount", "number": "figure|numeral", "name": "title|designation", "file": "document",
            "method": "technique", "string": "text", "graph": "network", "output": "outcome", "model": "prototype", "module": "unit|library",
            "path": "route|way", "node": "vertex", "sequence": "series|succession", "image": "picture|photo", "instance": "example|specimen",
            "parameter": "setting", "user": "person|operator", "result": "outcome|finding", "element": "member|constituent", "error": "mistake|fault",
            "group": "set|cluster", "column": "pillar", "edge": "border|link", "label": "tag|mark", "dimension": "axis", "range": "span|extent",
            "vector": "arrow", "row": "line", "system": "arrangement", "mapping": "dictionary", "exception": "anomaly", "field": "area",
            "warning": "alert|caution", "tree": "hierarchy", "option": "choice|alternative", "message": "note|notice", "interval": "gap|period",
            "reference": "citation|pointer", "solution": "answer", "request": "query|demand", "operation": "action", "pattern": "motif|regularity",
            "product": "multiplication", "item": "entry|article", "component": "part|piece", "domain": "realm|territory", "pair": "couple|duo",
            "location": "place|position", "gradient": "slope", "signal": "sign", "container": "vessel|box", "view": "sight", "template": "stencil",
            "page": "sheet|leaf", "package": "parcel|bundle", "iteration": "repetition|pass", "equation": "formula", "sample": "specimen"}
NO_THINGS = {"end", "start", "case", "form", "way", "mean", "future", "default"}  # frequent nouns that nobody could be shown


@dataclass
class Config:
    out_dir: str = ""             # "": this folder; the raw files go to raw/ in it
    pydocs: str = ""              # prepared data/pydocs, "": the one beside this folder (made first where it is missing)
    seed: int = 0                 # fixes everything
    # ---- what is shown
    objects: int = 60             # nouns, the most frequent ones
    homographs: int = 2           # of them have a second object of the same name (tree1, tree2)
    images: int = 6               # pictures of each object; a block shows one picture of every object
    repeats: int = 10             # times that a picture is shown, twice in a block
    catch: float = 0.03           # share of catch trials
    # ---- who looks at it
    subjects: int = 4
    gain: float = 4.0             # µV at the best electrode for one standard deviation of one dimension of meaning; 0: the null
    dimensions: int = 8           # of meaning
    own: float = 0.3              # how far a person's generators are from the average one's: orientation (rad), place and strength
    background: float = 10.0      # µV, rms of the 1/f background
    raw_sfreq: float = 200.0      # Hz of the raw files
    # ---- signal: as data/bids_eeg
    l_freq: float = 0.1           # Hz, high-pass
    h_freq: float = 40.0          # Hz, low-pass
    notch: list[float] = field(default_factory=list)  # Hz
    reference: str = "average"    # average, channel names, or none
    sfreq: float = 100.0          # Hz after resampling
    montage: str = "none"         # positions are in electrodes.tsv
    bads: Literal["interpolate", "mark", "drop"] = "interpolate"  # the bad channel
    overwrite: bool = False       # make it again although it is there

    def check(self):
        bids.check_signal(self)
        for name, least in (("objects", 10), ("images", 2), ("repeats", 2), ("subjects", 1), ("dimensions", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least}")
        if self.raw_sfreq < 120:
            raise ValueError(f"raw_sfreq={self.raw_sfreq:g}: mains are at 50 Hz, so at least 120")
        if self.repeats % 2:
            raise ValueError(f"repeats={self.repeats}: a block shows its pictures twice, so an even number")


# ---- meaning

def read_words(pydocs):
    """The training text of data/pydocs: (N,) numbers of its lower-case words and punctuation marks, and their (V,) spellings in alphabetical order."""
    enc = tokens.encoding(tokens.tokenizer_state(pydocs))
    text = enc.decode_bytes(tokens.Tokens(pydocs, "train").tokens.tolist()).decode("utf-8", "replace")
    return pd.factorize(np.array(re.findall(r"[a-z]+|[.,:;()]", text.lower()), dtype=object), sort=True)


def nouns(ids, names, n):
    """The n most frequent singular nouns of a text, by how they are used: after an article, before what ends a noun phrase, with a plural."""
    of, counts = {w: i for i, w in enumerate(names)}, np.bincount(ids)
    some = lambda text: np.isin(ids, [of[w] for w in text.split() if w in of])
    framed = np.zeros(len(ids), bool)
    framed[1:-1] = some("a an the this each every another")[:-2] & some("of is . , ) ; : in for that with to from as has can and or")[2:]
    framed = np.bincount(ids[framed], minlength=len(names))
    share = framed / counts
    found = [w for w, i in of.items() if 3 <= len(w) <= 9 and w not in NO_THINGS and share[i] > 0.12 and counts[of.get(w + "s", of["."])] >= 0.08 * counts[i]
             and w + "s" in of and counts[i] >= 3e-5 * len(ids)]
    found = sorted(found, key=lambda w: (-counts[of[w]], w))
    if len(found) < n:
        raise ValueError(f"objects={n}: the text has only {len(found)} nouns that are frequent enough")
    return found[:n]


def meanings(ids, names, things, dimensions, reach=5, context=2000):
    """(things, dimensions) of unit variance: positive pointwise mutual information with the words up to `reach` away, then its SVD
    (Levy, Goldberg & Dagan 2015). Contexts are the most frequent words, punctuation left out."""
    counts = np.bincount(ids)
    spelled = np.array([w.isalpha() for w in names])
    order = np.argsort(-counts * spelled, kind="stable")[:context]
    column = np.full(len(names), -1)
    column[order] = np.arange(len(order))
    row = np.full(len(names), -1)
    row[np.searchsorted(names, things)] = np.arange(len(things))
    rows, columns, pairs = row[ids], column[ids], np.zeros(len(things) * len(order))
    for away in [a for a in range(-reach, reach + 1) if a]:
        here, there = (rows[away:], columns[:-away]) if away > 0 else (rows[:away], columns[-away:])
        both = (here >= 0) & (there >= 0)
        pairs += np.bincount(here[both] * len(order) + there[both], minlength=len(pairs))
    pairs = pairs.reshape(len(things), len(order))
    marginal = counts[order].astype(float) ** 0.75  # smoothed, as there
    with np.errstate(divide="ignore", invalid="ignore"):
        ppmi = np.nan_to_num(np.maximum(0, np.log(pairs / pairs.sum(1, keepdims=True) / (marginal / marginal.sum()))), posinf=0, neginf=0)
    u, s, v = np.linalg.svd(ppmi - ppmi.mean(0), full_matrices=False)
    u = u[:, :dimensions] * np.sign(v[:dimensions, np.abs(v[:dimensions]).argmax(1)].diagonal())  # a sign that is the same everywhere
    return (u - u.mean(0)) / u.std(0)


def make_objects(ids, names, config, rng):
    """objects.csv (object, word, synonyms, category, s1..s8) and the meaning of every picture, (objects, images, dimensions)."""
    things = nouns(ids, names, config.objects)
    vectors = meanings(ids, names, things, config.dimensions)
    category = scipy.cluster.hierarchy.fcluster(scipy.cluster.hierarchy.linkage(vectors, "ward"), 6, "maxclust")
    rows = [(f"{w}1" if i < config.homographs else w, w, v, c) for i, (w, v, c) in enumerate(zip(things, vectors, category))]
    rows += [(f"{w}2", w, v + 0.5 * rng.standard_normal(len(v)), c) for _, w, v, c in rows[:config.homographs]]  # the other kind of tree
    vectors = np.stack([v for _, _, v, _ in rows])
    kind = np.array([c for *_, c in rows])
    central = {c: rows[min(np.flatnonzero(kind == c), key=lambda i: np.square(vectors[i] - vectors[kind == c].mean(0)).sum())][1] for c in set(kind)}
    other = lambda w: "|".join(s for s in SYNONYMS.get(w, "").split("|") if s and s not in things)
    table = pd.DataFrame([(o, w, other(w), central[c]) for o, w, _, c in rows], columns=["object", "word", "synonyms", "category"])
    table = pd.concat([table, pd.DataFrame(vectors.round(6), columns=[f"s{d + 1}" for d in range(config.dimensions)])], axis=1)
    pictures = vectors[:, None] + 0.3 * rng.standard_normal((len(rows), config.images, config.dimensions))
    return table, pictures


# ---- brains

def noise_1f(rng, n, samples, exponent=1.0):
    """(n, samples) float32 of unit variance with a 1/f^exponent power spectrum."""
    frequency = np.arange(samples // 2 + 1, dtype=np.float32)
    amplitude = np.zeros_like(frequency)
    amplitude[1:] = frequency[1:] ** (-exponent / 2)
    spectrum = (rng.standard_normal((n, len(amplitude)), dtype=np.float32) + 1j * rng.standard_normal((n, len(amplitude)), dtype=np.float32)) * amplitude
    signal = scipy.fft.irfft(spectrum, samples, axis=1)
    return signal / signal.std(1, keepdims=True)


def head(scale):
    """An EEG info of CHANNELS on a head of this size (head frame, m) and its forward model: gain (C, sources, 3) in V/Am, sources (S, 3) in m."""
    montage = mne.channels.make_standard_montage("colin27_1005")
    info = mne.create_info(CHANNELS, 100.0, "eeg")
    info.set_montage(montage)
    places = {ch["ch_name"]: scale * ch["loc"][:3] for ch in info["chs"]}
    info = mne.create_info(CHANNELS, 100.0, "eeg")
    info.set_montage(mne.channels.make_dig_montage(places, coord_frame="head"))
    sphere = mne.make_sphere_model("auto", "auto", info, verbose="error")
    sources = mne.setup_volume_source_space(pos=15.0, sphere=sphere, mindist=15.0, verbose="error")
    forward = mne.make_forward_solution(info, None, sources, sphere, meg=False, verbose="error")
    gain = forward["sol"]["data"].reshape(len(CHANNELS), -1, 3)
    return np.array(list(places.values())), gain - gain.mean(0), forward["source_rr"]


def generators(config, rng):
    """The average person's: per dimension a place, an orientation, a latency (s) and a width (s). Posterior, 100 to 400 ms."""
    n = config.dimensions
    place = np.stack([rng.uniform(-0.05, 0.05, n), rng.uniform(-0.07, -0.02, n), rng.uniform(0.01, 0.08, n)], 1)
    axis = rng.standard_normal((n, 3))
    return {"place": place, "axis": axis / np.linalg.norm(axis, axis=1, keepdims=True), "latency": np.linspace(0.1, 0.4, n)[rng.permutation(n)],
            "width": rng.uniform(0.025, 0.05, n)}


def simulate(config, pictures, average, subject):
    """One person's session: (signal (C, T) in V, places (C, 3) in m, channels' status, events, their generators)."""
    rng = np.random.default_rng([config.seed, 1, subject])
    rate, (objects, images, _) = config.raw_sfreq, pictures.shape
    places, lead, sources = head(rng.uniform(0.95, 1.05))
    # -- what is shown when: a block shows one picture of every object twice, so repeats of a picture stand in blocks without any other picture
    events, start = [], 2.0
    for block, image in enumerate(np.concatenate([rng.permutation(images) for _ in range(config.repeats // 2)])):
        first, second = rng.permutation(objects), rng.permutation(objects)
        while first[-1] == second[0]:
            second = rng.permutation(objects)
        shown = [(int(o), int(image), 0) for o in [*first, *second]]
        for _ in range(round(config.catch * len(shown))):
            shown.insert(int(rng.integers(len(shown) + 1)), (-1, -1, 1))
        events += [(start + SOA * i, block, *what) for i, what in enumerate(shown)]
        start += SOA * len(shown) + 2.0
    events = pd.DataFrame(events, columns=["onset", "block", "object", "image", "target"])
    onset = np.round(events["onset"].to_numpy() * rate).astype(int)
    samples = round(start * rate)
    events["onset"] = onset / rate
    # -- what the pictures do to the brain
    n = config.dimensions
    axis = average["axis"] + config.own * rng.standard_normal((n, 3))
    place = average["place"] + 0.01 * config.own * rng.standard_normal((n, 3))
    latency = average["latency"] + 0.05 * config.own * rng.standard_normal(n)
    nearest = np.linalg.norm(sources - place[:, None], axis=2).argmin(1)
    maps = np.einsum("cni,ni->nc", lead[:, nearest], axis)  # (n, C)
    maps *= config.gain * 1e-6 * np.exp(config.own * rng.standard_normal((n, 1)) / 2) / np.abs(maps).max(1, keepdims=True)
    time = np.arange(0, 0.8, 1 / rate)
    def respond(weight, kernel):  # (T,) of what each event adds at its time
        impulses = np.zeros(samples)
        np.add.at(impulses, onset, weight)
        return scipy.signal.oaconvolve(impulses, kernel)[:samples]
    seen = events["target"].to_numpy() == 0
    weight = np.zeros((len(events), n))
    weight[seen] = pictures[events["object"][seen], events["image"][seen]]
    source = np.stack([respond(weight[:, d], np.exp(-0.5 * ((time - latency[d]) / average["width"][d]) ** 2)) for d in range(n)])
    signal = (maps.T @ source).astype(np.float32)  # (C, T)
    posterior = np.flatnonzero((sources[:, 1] < -0.03) & (sources[:, 2] > 0))
    for peak, width, volt in ((0.1, 0.02, 4e-6), (0.17, 0.025, -6e-6), (0.25, 0.05, 4e-6)):  # P1, N1, P2 to anything
        scalp = lead[:, rng.choice(posterior)] @ rng.standard_normal(3)
        signal += np.outer(scalp * volt / np.abs(scalp).max(), respond(1 + 2 * events["target"].to_numpy(), np.exp(-0.5 * ((time - peak) / width) ** 2)))
    # -- what else there is
    background = np.einsum("csi,si->cs", lead[:, rng.choice(len(sources), 150)], rng.standard_normal((150, 3))).astype(np.float32)
    background /= np.linalg.norm(background, axis=0).mean()
    background = background @ noise_1f(rng, 150, samples)
    signal += background * np.float32(config.background * 1e-6 / background.std())
    bursts = np.maximum(0, noise_1f(rng, 2, samples, 0.5)) * np.sin(2 * np.pi * rng.uniform(9, 11) * np.arange(samples) / rate + [[0], [1.5]])
    scalp = np.einsum("cni,ni->cn", lead[:, rng.choice(posterior, 2)], rng.standard_normal((2, 3)))
    signal += (scalp / np.abs(scalp).max(0) * 6e-6 @ bursts).astype(np.float32)
    lids = np.exp(-np.linalg.norm(places - [0, 0.1, 0.0], axis=1) / 0.03)  # falls off from the eyes
    blink = np.zeros(samples)
    blink[np.minimum(samples - 1, np.cumsum(rng.exponential(4.0, round(start / 4)) * rate + rate).astype(int))] = 1
    signal += np.outer(lids / lids.max() * 120e-6, scipy.signal.oaconvolve(blink, scipy.signal.windows.hann(round(0.35 * rate)))[:samples])
    phase = 2 * np.pi * 50 * np.arange(samples) / rate
    signal += np.outer(rng.uniform(0, 3e-6, len(CHANNELS)), np.sin(phase + rng.uniform(0, 6)))
    signal += 1e-6 * rng.standard_normal(signal.shape, dtype=np.float32)
    status = np.full(len(CHANNELS), "good")
    bad = rng.integers(2, len(CHANNELS))
    status[bad] = "bad"
    signal[bad] += 80e-6 * noise_1f(rng, 1, samples)[0]
    truth = {"latency_s": latency.round(4).tolist(), "place_m": sources[nearest].round(4).tolist(), "bad": CHANNELS[bad]}
    return signal, places, status, events, truth


# ---- BrainVision and BIDS

def write_brainvision(path, signal, names, sfreq, positions):
    """Write path.vhdr, .vmrk and .eeg (BrainVision Core Data Format 1.0). signal: (C, T) in V, kept as float32 µV; positions: samples of the markers."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = "".join(f"Ch{i}={name},,1,µV\n" for i, name in enumerate(names, 1))
    path.with_suffix(".vhdr").write_text(
        "Brain Vision Data Exchange Header File Version 1.0\n\n[Common Infos]\nCodepage=UTF-8\n"
        f"DataFile={path.stem}.eeg\nMarkerFile={path.stem}.vmrk\nDataFormat=BINARY\nDataOrientation=MULTIPLEXED\nNumberOfChannels={len(names)}\n"
        f"SamplingInterval={1e6 / sfreq:.12g}\n\n[Binary Infos]\nBinaryFormat=IEEE_FLOAT_32\n\n[Channel Infos]\n{channels}", encoding="utf-8")
    markers = "".join(f"Mk{i}=Stimulus,S  1,{p + 1},1,0\n" for i, p in enumerate(positions, 2))
    path.with_suffix(".vmrk").write_text(
        "Brain Vision Data Exchange Marker File, Version 1.0\n\n[Common Infos]\nCodepage=UTF-8\n"
        f"DataFile={path.stem}.eeg\n\n[Marker Infos]\nMk1=New Segment,,1,1,0,20000101000000000000\n{markers}", encoding="utf-8")
    with open(path.with_suffix(".eeg"), "wb") as file:
        np.ascontiguousarray(signal.T * np.float32(1e6), dtype="<f4").tofile(file)


def write_table(path, table):
    Path(path).write_text(table.to_csv(sep="\t", index=False, na_rep="n/a"), encoding="utf-8")


def write_bids(root, subject, signal, places, status, events, table, sfreq):
    """One person's files of a BIDS dataset. events: onset, block, object, image (indices, -1 for catch trials), target; table: objects.csv."""
    folder, stem = root / f"sub-{subject:02d}/eeg", f"sub-{subject:02d}_task-rsvp"
    seen = (events["target"] == 0).to_numpy()
    of = lambda column, other: np.where(seen, table[column].to_numpy()[events["object"]], other)
    name = of("object", "catch")
    rows = pd.DataFrame({"onset": events["onset"], "duration": 0.1, "object": name, "word": of("word", "n/a"), "synonyms": of("synonyms", "n/a"),
                         "image": [f"{o}_{i + 1:02d}.jpg" if there else "catch.jpg" for o, i, there in zip(name, events["image"], seen)],
                         "category": of("category", "n/a"), "block": events["block"] + 1, "target": events["target"],
                         "sample": np.round(events["onset"] * sfreq).astype(int)})
    write_brainvision(folder / f"{stem}_eeg", signal, CHANNELS, sfreq, rows["sample"])
    write_table(folder / f"{stem}_events.tsv", rows.replace("", "n/a"))
    write_table(folder / f"{stem}_channels.tsv", pd.DataFrame({"name": CHANNELS, "type": "EEG", "units": "µV", "sampling_frequency": sfreq, "status": status}))
    write_table(folder / f"sub-{subject:02d}_electrodes.tsv", pd.DataFrame({"name": CHANNELS, **{a: places[:, i].round(6) for i, a in enumerate("xyz")}}))
    (folder / f"sub-{subject:02d}_coordsystem.json").write_text(json.dumps({"EEGCoordinateSystem": "CapTrak", "EEGCoordinateUnits": "m"}, indent=1))
    (folder / f"{stem}_eeg.json").write_text(json.dumps({
        "TaskName": "rsvp", "SamplingFrequency": sfreq, "PowerLineFrequency": 50, "EEGReference": "average", "SoftwareFilters": "n/a",
        "EEGChannelCount": len(CHANNELS), "RecordingDuration": signal.shape[1] / sfreq, "RecordingType": "continuous", "Manufacturer": "synthetic"}, indent=1))


# ---- the oracle

def whitener(windows, kind):
    """Multivariate noise normalisation (Guggenmos, Sterzer & Cichy 2018): the inverse root of the channels' covariance, averaged over kinds of trials.
    windows: (N, C, T) of training trials; kind: (N,) what was shown. Returns (C, C)."""
    from sklearn.covariance import ledoit_wolf
    means = np.stack([windows[kind == k].mean(0) for k in np.unique(kind)])
    rest = windows - means[np.searchsorted(np.unique(kind), kind)]
    covariance = ledoit_wolf(rest.transpose(0, 2, 1).reshape(-1, windows.shape[1])[::7])[0]
    values, vectors = np.linalg.eigh(covariance)
    return vectors / np.sqrt(np.maximum(values, values.max() * 1e-6)) @ vectors.T  # an average reference has one direction less


def apart(rows, held, length):
    """(N,) which windows of `length` samples from `rows` share none with a held-out window (nor are held out). held: (N,) bool."""
    return np.abs(rows[:, None] - rows[held]).min(1, initial=length) >= length


def oracle(folder):
    """What a ridge that is told the true meanings reads from single trials, as rows {set, top1, low, high, top5, chance, n}: on pictures it was not
    trained on (whole blocks), on the last person (trained on the others), on held-out words (ranked among themselves) and on both.
    Training trials share no sample with any test trial; low and high are the 95 % interval over words."""
    table = pd.read_csv(folder / "objects.csv", keep_default_na=False)
    truth = table.groupby("word", sort=False)[[c for c in table if re.fullmatch(r"s\d+", c)]].mean()
    held = truth.index[3::6]  # every sixth word; homographs stand first and are not among them
    known = truth.index.difference(held, sort=False)
    people = []
    for name in read_set(folder)["recordings"]:
        recording = Recording(folder / name)
        events = recording.events[recording.events["target"] == 0]
        rows, length = recording.rows(events["onset"] + WINDOW[0]), round((WINDOW[1] - WINDOW[0]) * recording.sfreq)
        windows = recording.signal[rows[:, None] + np.arange(0, length, max(1, round(recording.sfreq / 50)))].transpose(0, 2, 1) * 1e6  # (N, C, T) µV
        image, word = events["image"].str[-6:-4].astype(int).to_numpy(), events["word"].to_numpy()
        last, new = image == image.max(), np.isin(word, held)
        clear = apart(rows, last | new, length)  # held-out words stand among the others in every block
        white = whitener(windows[clear], word[clear])
        people.append((np.einsum("cd,ndt->nct", white, windows).reshape(len(windows), -1), word, clear, last & ~new, new))

    def fit(some):
        x, y = (np.concatenate(parts) for parts in zip(*((x[clear], truth.loc[word[clear]]) for x, word, clear, _, _ in some)))
        gram = (x - x.mean(0)).T @ (x - x.mean(0))
        gram[np.diag_indices_from(gram)] += np.trace(gram) / len(gram)
        return x.mean(0), y.mean(0), scipy.linalg.solve(gram, (x - x.mean(0)).T @ (y - y.mean(0)), assume_a="pos")

    def ranks(model, person, which, among):
        (mean, scale, weights), (x, word, *_) = model, person
        candidates = truth.loc[among].to_numpy()
        cosine = ((x[which] - mean) @ weights + scale - candidates.mean(0)) @ (c := candidates - candidates.mean(0)).T / np.linalg.norm(c, axis=1)
        own = cosine[np.arange(which.sum()), pd.Index(among).get_indexer(word[which])]
        return pd.DataFrame({"word": word[which], "rank": (cosine > own[:, None]).sum(1)})

    within = [(fit([p]), p) for p in people]
    across = [(fit(people[:-1]), people[-1])] if len(people) > 1 else []
    rows = []
    for name, models in (("trial", within), ("object", within), ("subject", across), ("subject_object", across)):
        among = held if "object" in name else known
        found = pd.concat([ranks(model, person, person[4 if "object" in name else 3], among) for model, person in models]) if models else []
        if len(found):
            words = found.assign(hit=found["rank"] == 0).groupby("word")["hit"].agg(["sum", "size"]).to_numpy()  # (words, 2)
            drawn = words[np.random.default_rng(0).integers(len(words), size=(1000, len(words)))].sum(1)
            low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
            rows.append({"set": name, "top1": (found["rank"] == 0).mean(), "low": low, "high": high, "top5": (found["rank"] < 5).mean(),
                         "chance": 1 / len(among), "n": len(found)})
    return [{k: round(float(v), 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]


# ---- main

def main(config):
    folder = Path(config.out_dir) if config.out_dir else Path(os.path.relpath(HERE))
    options = {k: v for k, v in asdict(config).items() if k not in ("out_dir", "pydocs", "overwrite")}
    if not config.overwrite and complete(folder) and (folder / "objects.csv").exists():
        if read_set(folder).get("options") != options:
            raise ValueError(f"{folder} was made with other options: give overwrite=True to make it again, or another out_dir=")
        return print(f"{folder}: there already (overwrite=True makes it again)")
    pydocs = Path(config.pydocs) if config.pydocs else HERE.parent / "pydocs"
    if not (pydocs / "meta.yaml").exists() and (pydocs / "prepare.py").exists():
        subprocess.run([sys.executable, str(pydocs / "prepare.py")], check=True)
    rng = np.random.default_rng([config.seed, 0])
    table, pictures = make_objects(*read_words(pydocs), config, rng)
    average = generators(config, rng)
    root, truths = folder / "raw", {}
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset_description.json").write_text(json.dumps({"Name": "synthetic EEG, made up", "BIDSVersion": "1.9.0", "DatasetType": "raw",
                                                               "GeneratedBy": [{"Name": "data/synthetic_eeg/prepare.py"}]}, indent=1))
    people = [f"sub-{s:02d}" for s in range(1, config.subjects + 1)]
    write_table(root / "participants.tsv", pd.DataFrame({"participant_id": people}))
    for s, name in enumerate(people, 1):
        *brain, truths[name] = simulate(config, pictures, average, s)
        write_bids(root, s, *brain, table, config.raw_sfreq)
    reading = bids.Config(object_column="object", image_column="image", synonyms_column="synonyms", category_column="category", block_column="block",
                          target_column="target", overwrite=True, **{k: getattr(config, k) for k in bids.SIGNAL_OPTIONS})
    bids.convert(folder, root, reading, source="data/synthetic_eeg/prepare.py", synthetic=True, table=lambda events: table)
    found = oracle(folder)
    meta = read_set(folder) | {"options": options, "oracle": found, "truth": {
        "gain": config.gain, "latency_s": average["latency"].round(4).tolist(), "width_s": average["width"].round(4).tolist(),
        "dimensions": f"s1..s{config.dimensions} of objects.csv: PPMI and SVD of data/pydocs' training text",
        "subjects": truths}}
    write_aside(folder / "meta.yaml", yaml.safe_dump(meta, sort_keys=False, allow_unicode=True, width=1000))
    print(f"{folder}: synthetic; {len(table)} objects, gain {config.gain:g}; an oracle that knows the meanings, single trials:")
    print(pd.DataFrame(found).to_string(index=False))


if __name__ == "__main__":
    main(configure(Config))
