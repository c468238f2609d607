"""Synthetic EEG of people who see five objects per second, with a known answer.

    python data/synthetic_eeg/prepare.py
    python data/synthetic_eeg/prepare.py gain=0 out_dir=data/synthetic_eeg/null  # the null

The files are real BIDS and BrainVision files and are read as such. Each object is a frequent noun
of data/pydocs' training text; its meaning is 8 numbers from that text's co-occurrences (PPMI and
SVD, no language model). Each number drives one dipole with its own latency, in a sphere model with
each person's own places, orientations and latencies. Unrelated to the object are the evoked
response to every picture, the 1/f background of 150 dipoles, alpha, blinks, mains and a bad
channel. Responses overlap, since pictures follow each other after 200 ms. An oracle that knows the
meanings (noise normalisation and ridge) measures how much of them can be read. The null has the
same brains without any response to the object.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import mne
import numpy as np
import pandas as pd
import scipy.cluster.hierarchy
import scipy.fft
import scipy.signal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError, already_made, embedded, folder_of, options_of, tokens, write_yaml
from data.bids_eeg import prepare as bids
from data.recording import Recording, complete, read_set

EMBEDDED = True  # made offline from data/pydocs: scripts may run this on first use

CHANNELS = """
Fp1 Fp2 F7 F3 Fz F4 F8 FC5 FC1 FC2 FC6 T7 C3 Cz C4 T8 CP5 CP1 CP2 CP6 P7 P3 Pz P4 P8 PO7 PO3 POz PO4
PO8 O1 O2
"""
CHANNELS = CHANNELS.split()
RATE = 200.0  # Hz of the raw files
SOA = 0.2  # s from one picture to the next
CATCH = 0.03  # share of catch trials
BACKGROUND = 10.0  # µV, rms of the 1/f background
WINDOW = (0.05, 0.55)  # s after onset that the oracle reads
# P1, N1 and P2 of every picture: peak and width (s), size (V)
EVOKED = ((0.1, 0.02, 4e-6), (0.17, 0.025, -6e-6), (0.25, 0.05, 4e-6))
# Other right answers for the nouns that may be chosen.
WORDS = """
function=routine|procedure value=quantity|amount number=figure|numeral name=title|designation
file=document method=technique string=text graph=network output=outcome model=prototype
module=unit|library path=route|way node=vertex sequence=series|succession image=picture|photo
instance=example|specimen parameter=setting user=person|operator result=outcome|finding
element=member|constituent error=mistake|fault group=set|cluster column=pillar edge=border|link
label=tag|mark dimension=axis range=span|extent vector=arrow row=line system=arrangement
mapping=dictionary exception=anomaly field=area warning=alert|caution tree=hierarchy
option=choice|alternative message=note|notice interval=gap|period reference=citation|pointer
solution=answer request=query|demand operation=action pattern=motif|regularity
product=multiplication item=entry|article component=part|piece domain=realm|territory
pair=couple|duo location=place|position gradient=slope signal=sign container=vessel|box view=sight
template=stencil page=sheet|leaf package=parcel|bundle iteration=repetition|pass equation=formula
sample=specimen
"""
SYNONYMS = dict(pair.split("=") for pair in WORDS.split())
# Frequent nouns that no picture could show.
NOT_SHOWN = {"end", "start", "case", "form", "way", "mean", "future", "default"}


@dataclass
class Config:
    out_dir: str = ""  # "": this folder; the raw files go to its raw/
    pydocs: str = ""  # prepared data/pydocs, "": the one next to this folder (made if missing)
    seed: int = 0  # fixes everything
    # ---- what is shown
    objects: int = 60  # the most frequent nouns
    homographs: int = 2  # how many of them have a second object of the same name (tree1, tree2)
    images: int = 6  # pictures of each object; a block shows one picture of every object
    repeats: int = 10  # how often a picture is shown, twice per block
    # ---- who sees it
    subjects: int = 4
    gain: float = 4.0  # µV at the best electrode for one SD of a dimension of meaning; 0: the null
    dimensions: int = 8  # of meaning
    own: float = 0.3  # how far a person's generators are from the average: angle (rad), place, size
    overwrite: bool = False  # make it again even if it exists

    def check(self):
        least = {"objects": 10, "images": 2, "repeats": 2, "subjects": 1, "dimensions": 2}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise InputError(f"{name}={getattr(self, name)}: at least {lowest}")
        if self.repeats % 2:
            raise InputError(f"repeats={self.repeats}: an even number, two in each block")
        if self.dimensions >= self.objects:
            raise InputError(f"dimensions={self.dimensions}: fewer than objects={self.objects}")


# ---- meaning


def read_words(pydocs):
    """Return data/pydocs' training text in lower case as (N,) numbers, and its (V,) words."""
    enc = tokens.encoding(tokens.tokenizer_state(pydocs))
    ids = tokens.Tokens(pydocs, "train").tokens.tolist()
    text = enc.decode_bytes(ids).decode("utf-8", "replace").lower()
    return pd.factorize(np.array(re.findall(r"[a-z]+|[.,:;()]", text), dtype=object), sort=True)


def nouns(ids, names, n):
    """Return the n most frequent singular nouns of a text: words that follow an article, precede
    the end of a noun phrase, and have a plural."""
    number = dict(zip(names, range(len(names))))
    counts = np.bincount(ids)

    def is_one_of(words):
        return np.isin(ids, [number[word] for word in words.split() if word in number])

    after = is_one_of("a an the this each every another")
    before = is_one_of("of is . , ) ; : in for that with to from as has can and or")
    framed = np.zeros(len(ids), dtype=bool)
    framed[1:-1] = after[:-2] & before[2:]
    share = np.bincount(ids[framed], minlength=len(names)) / counts
    words = []
    for word, i in number.items():
        plural = number.get(f"{word}s")
        if plural is None or counts[plural] < 0.08 * counts[i] or counts[i] < 3e-5 * len(ids):
            continue
        if 3 <= len(word) <= 9 and word not in NOT_SHOWN and share[i] > 0.12:
            words.append(word)
    words.sort(key=lambda word: (-counts[number[word]], word))
    if len(words) < n:
        raise InputError(f"objects={n}: the text has only {len(words)} frequent nouns")
    return words[:n]


def meanings(ids, names, things, dimensions, reach=5, context=2000):
    """Return (things, dimensions) of unit variance: SVD of the PPMI with the most frequent words up
    to `reach` words away (Levy, Goldberg & Dagan 2015)."""
    counts = np.bincount(ids)
    is_word = np.array([name.isalpha() for name in names])
    contexts = np.argsort(-counts * is_word, kind="stable")[:context]
    column = np.full(len(names), -1)
    column[contexts] = np.arange(len(contexts))
    row = np.full(len(names), -1)
    row[np.searchsorted(names, things)] = np.arange(len(things))
    rows = row[ids]
    columns = column[ids]
    pairs = np.zeros(len(things) * len(contexts))
    for away in range(1, reach + 1):
        for thing, other in ((rows[away:], columns[:-away]), (rows[:-away], columns[away:])):
            both = (thing >= 0) & (other >= 0)
            cell = thing[both] * len(contexts) + other[both]
            pairs += np.bincount(cell, minlength=len(pairs))
    pairs = pairs.reshape(len(things), len(contexts))
    expected = counts[contexts].astype(float) ** 0.75  # smoothed as in the paper
    expected /= expected.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log(pairs / pairs.sum(1, keepdims=True) / expected)
        ppmi = np.nan_to_num(np.maximum(0, pmi), posinf=0, neginf=0)
    u, _, v = np.linalg.svd(ppmi - ppmi.mean(0), full_matrices=False)
    largest = np.abs(v[:dimensions]).argmax(1)
    u = u[:, :dimensions] * np.sign(v[np.arange(dimensions), largest])  # fixes the sign
    return (u - u.mean(0)) / u.std(0)


def make_objects(ids, names, config, rng):
    """Return objects.csv and the meaning of every picture (objects, images, dimensions)."""
    words = nouns(ids, names, config.objects)
    vectors = meanings(ids, names, words, config.dimensions)
    tree = scipy.cluster.hierarchy.linkage(vectors, "ward")
    clusters = scipy.cluster.hierarchy.fcluster(tree, 6, "maxclust")
    table = pd.DataFrame({"object": words, "word": words, "synonyms": ""})
    for i, word in enumerate(words):
        synonyms = SYNONYMS.get(word, "").split("|")
        table.loc[i, "synonyms"] = "|".join(s for s in synonyms if s and s not in words)
    second = table[: config.homographs].copy()
    table.loc[second.index, "object"] = second["word"] + "1"
    second["object"] = second["word"] + "2"  # the other kind of tree
    table = pd.concat([table, second], ignore_index=True)
    first = vectors[: config.homographs]
    vectors = np.concatenate([vectors, first + 0.5 * rng.standard_normal(first.shape)])
    clusters = np.concatenate([clusters, clusters[: config.homographs]])
    table["category"] = ""
    for cluster in set(clusters):  # named after its most central word
        members = np.flatnonzero(clusters == cluster)
        distance = np.square(vectors[members] - vectors[members].mean(0)).sum(1)
        table.loc[members, "category"] = table["word"][members[distance.argmin()]]
    columns = [f"s{d + 1}" for d in range(config.dimensions)]
    table = table.join(pd.DataFrame(vectors.round(6), columns=columns))
    pictures = vectors[:, None] + 0.3 * rng.standard_normal(
        (len(vectors), config.images, config.dimensions)
    )
    return table, pictures


# ---- brains


def noise_1f(rng, n, samples, exponent=1.0):
    """Return (n, samples) float32 of unit variance with a 1/f^exponent power spectrum."""
    frequency = np.arange(samples // 2 + 1, dtype=np.float32)
    amplitude = np.zeros_like(frequency)
    amplitude[1:] = frequency[1:] ** (-exponent / 2)
    shape = (n, len(amplitude))
    real = rng.standard_normal(shape, dtype=np.float32)
    imaginary = rng.standard_normal(shape, dtype=np.float32)
    signal = scipy.fft.irfft((real + 1j * imaginary) * amplitude, samples, axis=1)
    return signal / signal.std(1, keepdims=True)


def head(scale):
    """Return a head's channels (C, 3) in m, gain (C, S, 3) in V/Am and sources (S, 3) in m."""
    info = mne.create_info(CHANNELS, 100.0, "eeg")
    info.set_montage(mne.channels.make_standard_montage("colin27_1005"))
    places = {ch["ch_name"]: scale * ch["loc"][:3] for ch in info["chs"]}
    info = mne.create_info(CHANNELS, 100.0, "eeg")
    info.set_montage(mne.channels.make_dig_montage(places, coord_frame="head"))
    sphere = mne.make_sphere_model("auto", "auto", info, verbose="error")
    space = mne.setup_volume_source_space(pos=15.0, sphere=sphere, mindist=15.0, verbose="error")
    forward = mne.make_forward_solution(info, None, space, sphere, meg=False, verbose="error")
    gain = forward["sol"]["data"].reshape(len(CHANNELS), -1, 3)
    return np.array(list(places.values())), gain - gain.mean(0), forward["source_rr"]


def generators(config, rng):
    """Return the average (posterior) place, axis, latency (s) and width (s) of each dimension."""
    n = config.dimensions
    sideways = rng.uniform(-0.05, 0.05, n)
    backwards = rng.uniform(-0.07, -0.02, n)
    upwards = rng.uniform(0.01, 0.08, n)
    axis = rng.standard_normal((n, 3))
    return {
        "place": np.stack([sideways, backwards, upwards], 1),
        "axis": axis / np.linalg.norm(axis, axis=1, keepdims=True),
        "latency": np.linspace(0.1, 0.4, n)[rng.permutation(n)],
        "width": rng.uniform(0.025, 0.05, n),
    }


def schedule(config, n_objects, n_images, rng):
    """Return the events of a session and its duration (s).

    A block shows one picture of every object twice, so each of an object's pictures has its own
    blocks. Columns: onset (s, on a sample), block, object, image (-1 for catch trials), target.
    """
    events = []
    start = 2.0
    rounds = [rng.permutation(n_images) for _ in range(config.repeats // 2)]
    for block, image in enumerate(np.concatenate(rounds)):
        first = rng.permutation(n_objects)
        second = rng.permutation(n_objects)
        while first[-1] == second[0]:
            second = rng.permutation(n_objects)
        shown = [(int(thing), int(image), 0) for thing in [*first, *second]]
        for _ in range(round(CATCH * len(shown))):
            shown.insert(int(rng.integers(len(shown) + 1)), (-1, -1, 1))
        for i, trial in enumerate(shown):
            events.append((start + SOA * i, block, *trial))
        start += SOA * len(shown) + 2.0
    events = pd.DataFrame(events, columns=["onset", "block", "object", "image", "target"])
    events["onset"] = np.round(events["onset"] * RATE).astype(int) / RATE
    return events, start


def respond(weight, peak, width, events, samples):
    """Return (samples,) the sum of a Gaussian response (s) to each event, times its weight."""
    time = np.arange(0, 0.8, 1 / RATE)
    rows = np.round(events["onset"].to_numpy() * RATE).astype(int)
    impulses = np.zeros(samples)
    np.add.at(impulses, rows, weight)
    kernel = np.exp(-0.5 * ((time - peak) / width) ** 2)
    return scipy.signal.oaconvolve(impulses, kernel)[:samples]


def simulate(config, pictures, average, subject):
    """Return one session: signal (C, T) in V, places (C, 3) in m, status, events, truth."""
    rng = np.random.default_rng([config.seed, 1, subject])
    places, lead, sources = head(rng.uniform(0.95, 1.05))
    events, seconds = schedule(config, *pictures.shape[:2], rng)
    samples = round(seconds * RATE)
    n = config.dimensions
    axis = average["axis"] + config.own * rng.standard_normal((n, 3))
    place = average["place"] + 0.01 * config.own * rng.standard_normal((n, 3))
    latency = average["latency"] + 0.05 * config.own * rng.standard_normal(n)
    nearest = np.linalg.norm(sources - place[:, None], axis=2).argmin(1)
    maps = np.einsum("cni,ni->nc", lead[:, nearest], axis)  # (n, C)
    strength = np.exp(config.own * rng.standard_normal((n, 1)) / 2)
    maps *= config.gain * 1e-6 * strength / np.abs(maps).max(1, keepdims=True)
    seen = events["target"].to_numpy() == 0
    weight = np.zeros((len(events), n))
    weight[seen] = pictures[events["object"][seen], events["image"][seen]]
    source = np.empty((n, samples))
    for d in range(n):
        width = average["width"][d]
        source[d] = respond(weight[:, d], latency[d], width, events, samples)
    signal = (maps.T @ source).astype(np.float32)
    posterior = np.flatnonzero((sources[:, 1] < -0.03) & (sources[:, 2] > 0))
    for peak, width, volt in EVOKED:
        scalp = lead[:, rng.choice(posterior)] @ rng.standard_normal(3)
        size = 1 + 2 * events["target"].to_numpy()
        evoked = respond(size, peak, width, events, samples)
        signal += np.outer(scalp * volt / np.abs(scalp).max(), evoked)
    add_background(signal, lead, posterior, rng)
    add_artefacts(signal, places, seconds, rng)
    bad = rng.integers(2, len(CHANNELS))
    signal[bad] += 80e-6 * noise_1f(rng, 1, samples)[0]
    status = np.full(len(CHANNELS), "good")
    status[bad] = "bad"
    truth = {
        "latency_s": latency.round(4).tolist(),
        "place_m": sources[nearest].round(4).tolist(),
        "bad": CHANNELS[bad],
    }
    return signal, places, status, events, truth


def add_background(signal, lead, posterior, rng):
    """Add 1/f activity of 150 dipoles and two alpha rhythms to a signal (C, T)."""
    samples = signal.shape[1]
    chosen = lead[:, rng.choice(lead.shape[1], 150)]
    maps = np.einsum("csi,si->cs", chosen, rng.standard_normal((150, 3))).astype(np.float32)
    maps /= np.linalg.norm(maps, axis=0).mean()
    background = maps @ noise_1f(rng, 150, samples)
    signal += background * np.float32(BACKGROUND * 1e-6 / background.std())
    waxing = np.maximum(0, noise_1f(rng, 2, samples, 0.5))
    alpha = 2 * np.pi * rng.uniform(9, 11)
    bursts = waxing * np.sin(alpha * np.arange(samples) / RATE + [[0], [1.5]])
    chosen = lead[:, rng.choice(posterior, 2)]
    maps = np.einsum("cni,ni->cn", chosen, rng.standard_normal((2, 3)))
    signal += (maps / np.abs(maps).max(0) * 6e-6 @ bursts).astype(np.float32)


def add_artefacts(signal, places, seconds, rng):
    """Add blinks, mains at 50 Hz and sensor noise to a signal (C, T)."""
    samples = signal.shape[1]
    lids = np.exp(-np.linalg.norm(places - [0, 0.1, 0.0], axis=1) / 0.03)  # decays from the eyes
    pauses = rng.exponential(4.0, round(seconds / 4)) * RATE + RATE
    blinks = np.zeros(samples)
    blinks[np.minimum(samples - 1, np.cumsum(pauses).astype(int))] = 1
    shape = scipy.signal.windows.hann(round(0.35 * RATE))
    signal += np.outer(lids / lids.max() * 120e-6, scipy.signal.oaconvolve(blinks, shape)[:samples])
    size = rng.uniform(0, 3e-6, len(CHANNELS))
    phase = 2 * np.pi * 50 * np.arange(samples) / RATE + rng.uniform(0, 6)
    signal += np.outer(size, np.sin(phase))
    signal += 1e-6 * rng.standard_normal(signal.shape, dtype=np.float32)


# ---- BrainVision and BIDS


def write_brainvision(path, signal, names, sfreq, positions):
    """Write path.vhdr, .vmrk and .eeg (BrainVision Core Data Format 1.0). signal: (C, T) in V,
    stored as float32 µV; positions: samples of the markers."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    common = f"[Common Infos]\nCodepage=UTF-8\nDataFile={path.stem}.eeg\n"
    header = [
        "Brain Vision Data Exchange Header File Version 1.0\n",
        f"{common}MarkerFile={path.stem}.vmrk\nDataFormat=BINARY\nDataOrientation=MULTIPLEXED",
        f"NumberOfChannels={len(names)}\nSamplingInterval={1e6 / sfreq:.12g}\n",
        "[Binary Infos]\nBinaryFormat=IEEE_FLOAT_32\n\n[Channel Infos]",
    ]
    header += [f"Ch{i}={name},,1,µV" for i, name in enumerate(names, 1)]
    markers = [
        "Brain Vision Data Exchange Marker File, Version 1.0\n",
        f"{common}\n[Marker Infos]\nMk1=New Segment,,1,1,0,20000101000000000000",
    ]
    markers += [f"Mk{i}=Stimulus,S  1,{at + 1},1,0" for i, at in enumerate(positions, 2)]
    path.with_suffix(".vhdr").write_text("\n".join([*header, ""]), encoding="utf-8")
    path.with_suffix(".vmrk").write_text("\n".join([*markers, ""]), encoding="utf-8")
    with open(path.with_suffix(".eeg"), "wb") as file:
        np.ascontiguousarray(signal.T * np.float32(1e6), dtype="<f4").tofile(file)


def write_table(path, table):
    Path(path).write_text(table.to_csv(sep="\t", index=False, na_rep="n/a"), encoding="utf-8")


def write_json(path, **facts):
    Path(path).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def write_bids(root, subject, person, table):
    """Write one person's BIDS files. person: from `simulate`; table: objects.csv."""
    signal, places, status, events, _ = person
    folder = root / f"sub-{subject:02d}/eeg"
    stem = f"sub-{subject:02d}_task-rsvp"
    rows = shown_events(events, table)
    write_brainvision(folder / f"{stem}_eeg", signal, CHANNELS, RATE, rows["sample"])
    write_table(folder / f"{stem}_events.tsv", rows.replace("", "n/a"))
    channels = pd.DataFrame({"name": CHANNELS, "type": "EEG", "units": "µV"})
    channels = channels.assign(sampling_frequency=RATE, status=status)
    write_table(folder / f"{stem}_channels.tsv", channels)
    electrodes = pd.DataFrame({"name": CHANNELS})
    electrodes[["x", "y", "z"]] = places.round(6)
    write_table(folder / f"sub-{subject:02d}_electrodes.tsv", electrodes)
    coordinates = {"EEGCoordinateSystem": "CapTrak", "EEGCoordinateUnits": "m"}
    write_json(folder / f"sub-{subject:02d}_coordsystem.json", **coordinates)
    facts = {"TaskName": "rsvp", "SamplingFrequency": RATE, "PowerLineFrequency": 50}
    facts |= {"EEGReference": "average", "SoftwareFilters": "n/a", "RecordingType": "continuous"}
    write_json(folder / f"{stem}_eeg.json", **facts, RecordingDuration=signal.shape[1] / RATE)


def shown_events(events, table):
    """Return events.tsv of scheduled events, whose objects are rows of objects.csv."""
    is_catch = events["target"] == 1
    rows = table.iloc[events["object"]].reset_index(drop=True)  # -1, the last, for catch trials
    rows = rows[["object", "word", "synonyms", "category"]].mask(is_catch, "n/a")
    rows["object"] = rows["object"].mask(is_catch, "catch")
    number = (events["image"] + 1).astype(str).str.zfill(2)
    rows["image"] = (rows["object"] + "_" + number + ".jpg").mask(is_catch, "catch.jpg")
    rows["block"] = events["block"] + 1
    rows["target"] = events["target"]
    rows["sample"] = np.round(events["onset"] * RATE).astype(int)
    rows.insert(0, "onset", events["onset"])
    rows.insert(1, "duration", 0.1)
    return rows


# ---- the oracle


def whitener(windows, kind):
    """Return the inverse root (C, C) of the covariance of windows (N, C, T) around the mean of each
    kind (N,) of trials: multivariate noise normalisation (Guggenmos, Sterzer & Cichy 2018)."""
    from sklearn.covariance import ledoit_wolf

    kinds, number = np.unique(kind, return_inverse=True)
    means = np.stack([windows[kind == k].mean(0) for k in kinds])
    rest = windows - means[number]
    rest = rest.transpose(0, 2, 1).reshape(-1, windows.shape[1])
    values, vectors = np.linalg.eigh(ledoit_wolf(rest[::7])[0])
    values = np.maximum(values, values.max() * 1e-6)  # an average reference removes one direction
    return vectors / np.sqrt(values) @ vectors.T


def apart(rows, held, length):
    """Return (N,) which windows of `length` samples from `rows` do not overlap a held-out one."""
    return np.abs(rows[:, None] - rows[held]).min(1, initial=length) >= length


@dataclass
class Trials:
    """One person's trials: features x (N, V), word (N,), and masks (N,) of those that may train
    (clear), show the picture held out with its blocks (last), or a held-out word (new)."""

    x: np.ndarray
    word: np.ndarray
    clear: np.ndarray
    last: np.ndarray
    new: np.ndarray


def read_trials(recording, held_words):
    """Return the whitened windows of a Recording as Trials, at 50 samples per second."""
    events = recording.events[recording.events["target"] == 0]
    rows = recording.rows(events["onset"] + WINDOW[0])
    length = round((WINDOW[1] - WINDOW[0]) * recording.sfreq)
    samples = np.arange(0, length, max(1, round(recording.sfreq / 50)))
    windows = recording.signal[rows[:, None] + samples].transpose(0, 2, 1) * 1e6  # (N, C, T) µV
    image = events["image"].str.extract(r"_(\d+)\.", expand=False).astype(int).to_numpy()
    word = events["word"].to_numpy()
    last = image == image.max()
    new = np.isin(word, held_words)
    clear = apart(rows, last | new, length)  # every block has held-out words among the others
    white = whitener(windows[clear], word[clear])
    x = np.einsum("cd,ndt->nct", white, windows).reshape(len(windows), -1)
    return Trials(x, word, clear, last & ~new, new)


def fit_ridge(people, truth):
    """Fit ridge from people's clear trials to the meanings of their words."""
    from sklearn.linear_model import Ridge

    x = np.concatenate([trials.x[trials.clear] for trials in people])
    y = np.concatenate([truth.loc[trials.word[trials.clear]] for trials in people])
    return Ridge(alpha=x.var(0).mean() * len(x)).fit(x, y)


def rank_words(model, trials, which, truth, among):
    """Return a table of each trial's word and its rank `among` words, 0 the best."""
    candidates = truth.loc[among].to_numpy()
    centred = candidates - candidates.mean(0)
    predicted = model.predict(trials.x[which]) - candidates.mean(0)
    cosine = predicted @ centred.T / np.linalg.norm(centred, axis=1)
    word = trials.word[which]
    right = cosine[np.arange(len(word)), pd.Index(among).get_indexer(word)]
    return pd.DataFrame({"word": word, "rank": (cosine > right[:, None]).sum(1)})


def oracle(folder):
    """Return what ridge on the true meanings decodes from single trials, a row per test set.

    Columns: set, top1, low, high (95 % interval over words), top5, chance, n. The sets are unseen
    pictures (whole blocks), held-out words (ranked among themselves), the last person (trained on
    the others), and both. No training trial overlaps a test trial.
    """
    table = pd.read_csv(folder / "objects.csv", keep_default_na=False)
    dimensions = [column for column in table if re.fullmatch(r"s\d+", column)]
    truth = table.groupby("word", sort=False)[dimensions].mean()
    held = truth.index[3::6]  # every sixth word; none of the homographs, which come first
    known = truth.index.difference(held, sort=False)
    names = read_set(folder)["recordings"]
    people = [read_trials(Recording(folder / name), held) for name in names]
    within = [(fit_ridge([trials], truth), trials) for trials in people]
    models_of = {"trial": within, "object": within}
    if len(people) > 1:
        across = [(fit_ridge(people[:-1], truth), people[-1])]
        models_of |= {"subject": across, "subject_object": across}
    rows = []
    for name, models in models_of.items():
        among = held if "object" in name else known
        parts = []
        for model, trials in models:
            which = trials.new if "object" in name else trials.last
            parts.append(rank_words(model, trials, which, truth, among))
        rows.append({"set": name, **score_ranks(pd.concat(parts)), "chance": 1 / len(among)})
    return rows


def score_ranks(ranks):
    """Return top-1 with its interval over words, and top-5, of a table of word and rank."""
    hits = (ranks["rank"] == 0).groupby(ranks["word"]).agg(["sum", "size"]).to_numpy()
    drawn = np.random.default_rng(0).integers(len(hits), size=(1000, len(hits)))
    sums = hits[drawn].sum(1)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    scores = {"top1": (ranks["rank"] == 0).mean(), "low": low, "high": high}
    scores["top5"] = (ranks["rank"] < 5).mean()
    return {key: round(float(score), 4) for key, score in scores.items()} | {"n": len(ranks)}


def main(config):
    folder = folder_of(config, __file__)
    options = options_of(config, "pydocs")
    if already_made(folder, options, complete, config.overwrite):
        return
    pydocs = Path(config.pydocs) if config.pydocs else embedded("pydocs")
    rng = np.random.default_rng([config.seed, 0])
    table, pictures = make_objects(*read_words(pydocs), config, rng)
    average = generators(config, rng)
    truths = write_people(folder / "raw", config, table, pictures, average)
    meta = read_people(folder, config, table)
    scores = oracle(folder)
    truth = {
        "gain": config.gain,
        "latency_s": average["latency"].round(4).tolist(),
        "width_s": average["width"].round(4).tolist(),
        "dimensions": f"s1..s{config.dimensions} of objects.csv: PPMI and SVD of data/pydocs' text",
        "subjects": truths,
    }
    write_yaml(folder / "meta.yaml", meta | {"options": options, "oracle": scores, "truth": truth})
    print(f"synthetic, gain {config.gain:g}; an oracle that knows the meanings, single trials:")
    print(pd.DataFrame(scores).to_string(index=False))


def read_people(folder, config, table):
    """Convert the BIDS dataset like any other; returns the meta of the set."""
    columns = ("object", "image", "synonyms", "category", "block", "target")
    options = {f"{name}_column": name for name in columns}
    reading = bids.Config(**options, montage="none", overwrite=True)
    meta = {"source": "data/synthetic_eeg/prepare.py", "synthetic": True}
    return bids.convert(folder, folder / "raw", reading, table=lambda events: table, **meta)


def write_people(root, config, table, pictures, average):
    """Write the BIDS dataset of all people; returns {sub-01: its truth}."""
    root.mkdir(parents=True, exist_ok=True)
    facts = {"Name": "synthetic EEG", "BIDSVersion": "1.9.0", "DatasetType": "raw"}
    write_json(root / "dataset_description.json", **facts)
    truths = {}
    for subject in range(1, config.subjects + 1):
        person = simulate(config, pictures, average, subject)
        write_bids(root, subject, person, table)
        truths[f"sub-{subject:02d}"] = person[-1]
    write_table(root / "participants.tsv", pd.DataFrame({"participant_id": list(truths)}))
    return truths


if __name__ == "__main__":
    main(configure(Config))
