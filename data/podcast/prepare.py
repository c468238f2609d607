"""Prepare Podcast ECoG (Zada et al. 2025, Sci Data 12:1135; OpenNeuro ds005574): nine people, 1,330
electrodes, half an hour of one podcast.

    python data/podcast/prepare.py subjects=3                # fetch high gamma of sub-03 (1 GB)
    python data/podcast/prepare.py subjects=1,2,3            # add more later
    python data/podcast/prepare.py root=path/to/ds005574     # from a local copy, all subjects
    python data/podcast/prepare.py root=... sentences=all_sentences_podcast.csv pos=tags.csv

Writes one recording per subject (data/recording.py), the transcript, the released features with
their tokens, and the loudness of the audio. Nothing is cut, averaged or scaled here; the scripts do
that.
"""

import io
import os
import re
import sys
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError, check_content, column, folder_of, options_of, read_table, write_aside
from data.fetch import NETWORK_ERRORS, RemoteReader, download, look_up
from data.raw import METRES, clock_spans, inside_spans, read_json, sd_within_seconds
from data.recording import made_recordings, write_recording, write_set

EMBEDDED = False  # must be downloaded, so no script starts this by itself
BUCKET = "https://s3.amazonaws.com/openneuro.org/ds005574"
BRAIN_TYPES = ("ecog", "seeg", "dbs")  # not scalp, trigger, heart or empty channels
MISSING = ["", "n/a", "N/A", "nan", "NaN"]
POS_CLASSES = ("noun", "verb", "adjective", "adverb", "other")  # pos_class 0 to 4 of the benchmark
TOKEN_COLUMNS = ["word_idx", "token_id", "token", "true_prob", "rank", "entropy", "top_pred"]
ABBREVIATIONS = {"mr", "mrs", "ms", "dr", "st", "jr", "sr", "vs", "etc", "e.g", "i.e", "u.s"}

# English closed-class words, auxiliaries included; all others are content words
FUNCTION_WORDS = """
a an the this that these those each every either neither some any no all both half such what which
whose whatever whichever another other i me my mine myself you your yours yourself yourselves he him
his himself she her hers herself it its itself we us our ours ourselves they them their theirs
themselves one ones who whom whoever someone somebody something anyone anybody anything everyone
everybody everything nobody nothing none of in to for with on at from by about as into like through
after over between out against during without before under around among up down off above near onto
upon within along across behind beyond toward towards until till since per via than despite except
inside outside and or but nor so yet if because although though while whereas unless whether once
when where why how that's then there here be am is are was were been being do does did done doing
have has had having can could will would shall should may might must ought not n't to yes yeah oh uh
um well okay ok just too very also only even
"""
FUNCTION_WORDS = set(FUNCTION_WORDS.split())


@dataclass
class Config:
    subjects: list[int] = field(default_factory=list)  # 1 to 9; none: all of the local copy
    # the envelope of 70-200 Hz, or the cleaned recording that it was made from
    signal: Literal["highgamma", "broadband"] = "highgamma"
    space: str = "MNI152NLin2009aSym"  # for electrode positions
    features: list[str] = field(default_factory=lambda: ["gpt2-xl"])  # folders under stimuli/
    layers: list[int] = field(default_factory=lambda: [24])  # for features that have layers
    sentences: str = ""  # CSV with sentence_onset and sentence_offset; "": full stops, or pauses
    pause: float = 0.4  # s of silence that end a sentence in a transcript without full stops
    pos: str = ""  # CSV or TSV with start or onset, and pos, class or pos_class; "": none
    audio_sfreq: int = 100  # Hz of the loudness; 0: no audio
    # ---- where from and where to
    root: str = ""  # local copy; "": $PODCAST_ROOT, or else fetched into ds005574/ in out_dir
    url: str = BUCKET  # where to fetch from
    out_dir: str = ""  # "": this folder
    overwrite: bool = False  # make it again if it exists

    POSITIVE = "pause"


# ---- where things are in ds005574


def signal_names(subject, kind):
    """Return the paths that a subject's signal has in newer and older snapshots."""
    description = "_desc-highgamma" if kind == "highgamma" else ""
    stem = f"derivatives/ecogprep/{subject}/ieeg/{subject}_task"
    return [f"{stem}-{task}{description}_ieeg.fif" for task in ("podcast", "monkey")]


def wanted_files(subjects, config):
    """Return lists of the possible paths of each file, required and optional, but features.hdf5."""
    required = [["participants.tsv"], ["stimuli/podcast_transcript.csv"]]
    optional = [["dataset_description.json"]]
    for name in config.features:
        required.append([f"stimuli/{name}/transcript.tsv"])
    if config.audio_sfreq:
        required.append(["stimuli/podcast.wav"])
    for subject in subjects:
        required.append(signal_names(subject, config.signal))
        required.append([f"{subject}/ieeg/{subject}_task-podcast_channels.tsv"])
        for what in ("electrodes.tsv", "coordsystem.json"):
            optional.append([f"{subject}/ieeg/{subject}_space-{config.space}_{what}"])
    return required, optional


def find(root, names):
    """Return the first of these paths under root that exists, or None."""
    for name in names:
        if os.path.lexists(root / name):
            return check_content(root / name)
    return None


def need(root, names, remedy="complete the copy, or leave root= out to fetch what is missing"):
    """Return the first of these paths under root that exists, or raise InputError."""
    path = find(root, names)
    if path is None:
        raise InputError(f"{root} has no {' or '.join(names)}: {remedy}")
    return path


def local_root(root):
    """Return the folder with the tree: root itself, or ds005574/ or data/ inside it."""
    for folder in (Path(root), Path(root) / "ds005574", Path(root) / "data"):
        if (folder / "participants.tsv").exists() or (folder / "stimuli").exists():
            return folder
    raise InputError(f"root={root} holds no copy of ds005574 (participants.tsv, stimuli/)")


def read_columns(path, columns, numeric=()):
    """Read a CSV or TSV that must have `columns`; n/a counts as missing in `numeric` ones only."""
    separator = "\t" if str(path).endswith(".tsv") else ","
    missing = dict.fromkeys(numeric, MISSING)
    kinds = {"word": str, "name": str, **dict.fromkeys(numeric, float)}
    return read_table(path, columns, sep=separator, na_values=missing, dtype=kinds)


# ---- fetching


def fetch_missing(root, subjects, config):
    """Fetch the subjects' missing files, and only the chosen layers of features.hdf5."""
    required, optional = wanted_files(subjects, config)
    files = []
    for names in required + optional:
        if find(root, names):
            continue
        for name in names:
            file = look_up(f"{config.url}/{urllib.parse.quote(name)}", root / name)
            if file is not None:
                files.append(file)
                break
        else:
            if names in required:
                raise InputError(f"{config.url} has no {' or '.join(names)}: give subjects 1 to 9")
    download(files, root)
    for name in config.features:
        file = f"stimuli/{name}/features.hdf5"
        fetch_layers(root / file, f"{config.url}/{file}", config.layers)


def fetch_layers(path, url, layers):
    """Add the chosen layers of a remote features.hdf5 to the local one."""
    import h5py

    content = {}
    if path.is_file():
        with h5py.File(path, "r") as file:
            content = {key: file[key][:] for key in file}
    wanted = {f"layer-{layer}" for layer in layers}
    if wanted <= set(content) or "vectors" in content:
        return
    remote = look_up(url, path)
    if remote is None:
        return  # read_features says what is missing
    try:
        with h5py.File(io.BufferedReader(RemoteReader(remote), 1 << 18), "r") as file:
            for key in layer_keys(file, url, layers):
                print(f"{url}: {key}, {file[key].nbytes / 1e6:.0f} MB", flush=True)
                content[key] = file[key][:]
    except NETWORK_ERRORS as error:
        cure = f"run the command again, or download it to {path}"
        raise InputError(f"{url} cannot be read in parts ({error}): {cure}") from None
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for key, layer in content.items():
            file[key] = layer
    write_aside(path, buffer.getvalue())


# ---- the transcript


def read_words(path, config):
    """Return the transcript, a row per word with word_idx, word, start, end (s), norm_word,
    sentence (-1: none), pos and content, and a dictionary of facts about it."""
    table = read_columns(path, ["word", "start", "end"], numeric=("start", "end"))
    words = table[["word", "start", "end"]].copy()
    words.insert(0, "word_idx", np.arange(len(words)))
    onsets = words["start"].dropna()
    if not len(onsets):
        raise InputError(f"{path}: no word has an onset (column 'start')")
    check_times(words, path)
    words["norm_word"] = words["word"].map(normalised)
    words["sentence"], rule = number_sentences(words, config)
    words["pos"] = ""
    if config.pos:
        words["pos"] = parts_of_speech(words, config.pos)
    words["content"] = words["norm_word"].map(content_class)
    facts = {
        "words": len(words),
        "without_onset": len(words) - len(onsets),
        "sentences": len(set(words["sentence"]) - {-1}),
        "sentences_by": rule,
    }
    return words, facts


def check_times(words, path):
    """Refuse times that are not in s and words that end before they start."""
    step = words["start"].sort_values().diff().median()
    if step > 5:
        cure = "are they in ms, or in samples? They must be in s"
        raise InputError(f"{path}: a word every {step:.3g} s (column 'start'): {cure}")
    wrong = np.isinf(words["start"]) | np.isinf(words["end"]) | (words["end"] < words["start"])
    if wrong.any():
        word, start, end = words.loc[wrong.idxmax(), ["word", "start", "end"]]
        times = f"'{word}' in row {wrong.idxmax() + 1} is from {start} to {end} s"
        raise InputError(f"{path}: {times}: correct it, or leave an unknown time empty")


def normalised(word):
    """Lower a word and strip its outer punctuation: don't and twenty-one stay whole."""
    return re.sub(r"^[^\w]+|[^\w]+$", "", str(word).lower().replace("’", "'"))


def content_class(word):
    """Return 'function' for a normalised closed-class word or a contraction that begins with one
    (it's), 'content' for others, '' for ''."""
    if not word:
        return ""
    stem = word.removesuffix("n't").split("'")[0]
    contraction = "'" in word and (stem in FUNCTION_WORDS or stem in ("ca", "wo", "let"))
    return "function" if word in FUNCTION_WORDS or contraction else "content"


def number_sentences(words, config):
    """Return each word's sentence number and the rule: a table, full stops, or, if these are as
    rare as in the release (two in 5,136 words), pauses."""
    if config.sentences:
        return sentences_of_table(words, config.sentences), f"table {config.sentences}"
    is_end = words["word"].str.contains(r"[.?!][\"'”’)\]]*$")
    is_end &= ~words["norm_word"].isin(ABBREVIATIONS)
    if is_end.sum() >= len(words) / 50:
        return is_end.cumsum().shift(fill_value=0).astype(int), "full stops"
    ordered = words.dropna(subset=["start"]).sort_values("start", kind="stable")
    ends = ordered["end"].fillna(ordered["start"]).cummax()
    numbers = (ordered["start"] - ends.shift() >= config.pause).cumsum()
    return numbers.reindex(words.index, fill_value=-1), f"pauses of {config.pause:g} s"


def sentences_of_table(words, path, tolerance=1e-3):
    """Return each word's sentence number, the later if two overlap, -1 for none."""
    columns = ["sentence_onset", "sentence_offset"]
    table = read_columns(path, columns, columns).dropna(subset=columns)
    onsets, offsets = table[columns].sort_values("sentence_onset", kind="stable").to_numpy().T
    starts = words["start"].to_numpy()[:, None]
    inside = (starts >= onsets - tolerance) & (starts <= offsets + tolerance)  # (words, sentences)
    if not inside.any():
        raise InputError(f"sentences={path}: none of them holds a word of the transcript")
    last = len(onsets) - 1 - inside[:, ::-1].argmax(1)
    return np.where(inside.any(1), last, -1)


def parts_of_speech(words, path):
    """Look up each word's part of speech by onset (to 10 ms) and, in a table with words, by word:
    '' if unknown, the first of several rows (tokens)."""
    table = read_columns(path, [], numeric=("start", "onset"))
    onsets = column(table, f"pos={path}", "start", "onset")
    tags = column(table, f"pos={path}", "pos_class", "class", "pos").astype(str)
    if set(tags) <= set("01234"):
        tags = tags.map(dict(zip("01234", POS_CLASSES)))
    tag_of = {}
    for key, tag in zip(word_keys(table, onsets), tags):
        tag_of.setdefault(key, tag)
    if "word" not in table:
        words = words[["start"]]
    matched = [tag_of.get(key, "") for key in word_keys(words, words["start"])]
    if not any(matched):
        raise InputError(f"pos={path} has no word of the transcript at its onset")
    return matched


def word_keys(table, onsets):
    """Return (normalised word, or '' without words; onset in 10 ms) for each row."""
    onsets = onsets.fillna(-1).mul(100).round().astype(int)
    words = table["word"].map(normalised) if "word" in table else [""] * len(table)
    return zip(words, onsets)


# ---- released features, and the audio


def layer_keys(file, path, layers):
    """Return the datasets of a features.hdf5 to read: `layers`, or all if it has no layers."""
    available = [int(key.removeprefix("layer-")) for key in file if key.startswith("layer-")]
    if not available:
        return sorted(file)
    missing = set(layers) - set(available)
    if missing:
        layers = ", ".join(map(str, sorted(available)))
        raise InputError(f"{path} has no layer {min(missing)}, only {layers}: choose with layers=")
    return [f"layer-{layer}" for layer in layers]


def read_features(root, name, layers, words):
    """Return tokens (TOKEN_COLUMNS) and {key: (tokens, dims) float32} of released features."""
    import h5py

    cure = f"leave '{name}' out of features=, or complete the copy"
    path = need(root, [f"stimuli/{name}/transcript.tsv"], cure)
    table = read_columns(path, ["word_idx"], numeric=("true_prob", "entropy"))
    table = table.rename(columns={"hftoken": "token"})
    same = table["word_idx"].between(0, len(words) - 1)
    if "word" in table and same.all():
        same = table["word"].map(normalised) == words["norm_word"].loc[table["word_idx"]].array
    if (~same).sum() > 0.01 * len(table):
        problem = f"{(~same).sum()} of {len(table)} rows are not the transcript's words"
        raise InputError(f"{path}: {problem}: take both from the same snapshot")
    path = need(root, [f"stimuli/{name}/features.hdf5"], cure)
    arrays = {}
    try:
        with h5py.File(path, "r") as file:
            for key in layer_keys(file, path, layers):
                arrays[key] = np.asarray(file[key], np.float32)
    except OSError as error:
        raise InputError(f"{path} is not a whole HDF5 file ({error}): fetch it again") from None
    for key, array in arrays.items():
        if array.ndim != 2 or len(array) != len(table):
            raise InputError(f"{path}: {key} has shape {array.shape} for {len(table)} tokens")
    return table[[column for column in TOKEN_COLUMNS if column in table]], arrays


def loudness(path, sfreq):
    """Return (n,) float32, the audio's root mean square (full scale 1) in [k, k + 1) / sfreq s."""
    from scipy.io import wavfile

    try:
        rate, audio = wavfile.read(path, mmap=True)  # (T,) or (T, channels)
    except Exception as error:  # scipy raises whatever its parser stumbles over
        raise InputError(f"{path} is not a whole WAV file ({error}): fetch it again") from None
    if sfreq > rate:
        raise InputError(f"audio_sfreq={sfreq} is above the {rate} Hz of {path}")
    n_values = int(len(audio) * sfreq / rate)
    edges = np.round(np.arange(n_values + 1) * rate / sfreq).astype(np.int64)
    full_scale = np.iinfo(audio.dtype).max if audio.dtype.kind == "i" else 1.0
    power = np.empty(n_values)
    for start in range(0, n_values, 1000):  # ten seconds at a time
        stop = min(start + 1000, n_values)
        piece = audio[edges[start] : edges[stop]].astype(np.float64) / full_scale
        square = (piece**2).reshape(len(piece), -1).mean(1)
        sums = np.add.reduceat(square, edges[start:stop] - edges[start])
        power[start:stop] = sums / np.diff(edges[start : stop + 1])
    return np.sqrt(power).astype(np.float32)


# ---- subjects and electrodes


def subject_ids(root, numbers, signal):
    """Return the subjects asked for (sub-03), or all with a signal, and {nyu_id: subject}."""
    table = read_columns(need(root, ["participants.tsv"]), ["participant_id"])
    participants = table["participant_id"].astype(str).tolist()
    available = []
    for subject in participants:
        if any((root / name).is_file() for name in signal_names(subject, signal)):
            available.append(subject)
    subjects = [f"sub-{number:02d}" for number in numbers] or available or participants[:1]
    remedy = f"signal={signal} exists for {', '.join(available) or 'nobody'}"
    for subject in subjects:
        need(root, signal_names(subject, signal), remedy)
    nyu_ids = {}
    if "nyu_id" in table:
        nyu_ids = dict(zip(table["nyu_id"].astype(str), participants))
    return subjects, nyu_ids


def read_channels(root, subject, raw, space):
    """Read channels.tsv for the brain channels of a Raw, with positions (m); bad ones are marked in
    the table or in the file."""
    path = need(root, [f"{subject}/ieeg/{subject}_task-podcast_channels.tsv"])
    table = read_columns(path, ["name", "type", "status"])
    table = table.drop_duplicates("name").set_index("name").reindex(raw.ch_names)
    file_types = pd.Series(raw.get_channel_types(), index=raw.ch_names)
    table["type"] = table["type"].fillna(file_types).str.lower()
    is_bad = (table["status"] == "bad") | table.index.isin(raw.info["bads"])
    table["status"] = np.where(is_bad, "bad", "good")
    table = table[table["type"].isin(BRAIN_TYPES)].rename_axis("name")
    table[["x", "y", "z"]] = read_positions(root, subject, space).reindex(table.index)
    return table.reset_index()


def read_positions(root, subject, space):
    """Read x, y, z (m) by name from electrodes.tsv, in the sidecar's unit, or else guessed."""
    stem = f"{subject}/ieeg/{subject}_space-{space}"
    path = find(root, [f"{stem}_electrodes.tsv"])
    if path is None:
        return pd.DataFrame(columns=["x", "y", "z"], dtype=float)
    table = read_columns(path, ["name", "x", "y", "z"], numeric=("x", "y", "z"))
    table = table.drop_duplicates("name").set_index("name")[["x", "y", "z"]]
    unit = read_json(find(root, [f"{stem}_coordsystem.json"])).get("iEEGCoordinateUnits", "")
    farthest = table.abs().max(axis=None)
    scale = METRES.get(unit, 1e-3 if farthest > 1 else 1.0)
    if farthest * scale > 0.3:
        problem = f"an electrode lies {farthest * scale:.2f} m from the origin, outside any head"
        raise InputError(f"{path}: {problem}: correct the unit in the sidecar ({unit or 'none'})")
    return table * scale


# ---- recordings


def open_signal(path):
    """Open a derivative (FIF, in V) as an MNE Raw."""
    import mne

    with open(path, "rb") as file:  # MNE reads a torn file silently: check the last tag
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4))
        whole = file.read() == b"\xff" * 4
    try:
        raw = mne.io.read_raw_fif(path, verbose="error")
    except Exception:  # MNE raises whatever its parser stumbles over
        whole = False
    if not whole:
        raise InputError(f"{path} is not a whole FIF file: fetch it again")
    sd = np.nanmedian(sd_within_seconds(raw))
    if sd > 1e-2:
        raise InputError(f"{path}: an SD of {sd:.2g} V is too large for a brain: save it in V")
    return raw


def signal_blocks(raw, names, label, seconds=30):
    """Yield blocks (T, channels) of a Raw in V, channels in the order of `names`."""
    step = round(seconds * raw.info["sfreq"])
    for start in tqdm(range(0, raw.n_times, step), label, leave=False, disable=None):
        yield raw.get_data(names, start, min(start + step, raw.n_times), verbose="error").T


def word_events(words, raw):
    """Return an event per word that is heard, and {reason: number of words dropped}."""
    heard = words[words["start"].notna()]
    duration = (heard["end"] - heard["start"]).clip(lower=0).fillna(0)
    events = pd.DataFrame({"onset": heard["start"], "duration": duration})
    events = events.join(heard[["word", "norm_word", "word_idx"]])
    in_bad = inside_spans(events["onset"], events["onset"] + duration, clock_spans(raw))
    dropped = {"words_without_onset": len(words) - len(heard), "words_in_bad": int(in_bad.sum())}
    return events[~in_bad], dropped


def make_recording(root, folder, subject, words, nyu_ids, config):
    """Write one subject as a recording."""
    path = need(root, signal_names(subject, config.signal))
    raw = open_signal(path)
    channels = read_channels(root, subject, raw, config.space)
    kept = channels[channels["status"] == "good"]
    if not len(kept):
        raise InputError(f"{subject}: all {len(channels)} electrodes are marked bad ({path})")
    events, dropped_words = word_events(words, raw)
    sfreq = float(raw.info["sfreq"])
    rows = np.round(events["onset"] * sfreq) - raw.first_samp
    located = int(kept["x"].notna().sum())
    meta = write_recording(
        folder / subject,
        signal_blocks(raw, kept["name"].tolist(), path.name),
        kept,
        events,
        sfreq=sfreq,
        unit="V",
        subject=subject,
        first_sample=raw.first_samp,
        synthetic=is_synthetic(root),
        source=str(path.relative_to(root)),
        kind=config.signal,
        space=config.space if channels["x"].notna().any() else "unknown",
        nyu_id={name: number for number, name in nyu_ids.items()}.get(subject, ""),
        bad_electrodes=channels["name"][channels["status"] == "bad"].tolist(),
        dropped={"bad": len(channels) - len(kept), **dropped_words},
        events_outside=int((~rows.between(0, raw.n_times - 1)).sum()),
        bad_spans=clock_spans(raw),
    )
    print(
        f"{subject}: {len(kept)} of {len(channels)} electrodes ({len(meta['bad_electrodes'])} bad, "
        f"{located} located), {meta['samples'] / sfreq:.0f} s at {sfreq:g} Hz, "
        f"{meta['events_outside']} words outside",
        flush=True,
    )


def is_synthetic(root):
    return bool(read_json(find(root, ["dataset_description.json"])).get("Synthetic", False))


def find_tree(folder, kept, config):
    """Return the tree (local or fetched), the subjects to make, and {nyu_id: subject}."""
    local = config.root or os.environ.get("PODCAST_ROOT", "")
    if local:
        root = local_root(local)
    else:
        root = folder / "ds005574"
        subjects = [f"sub-{number:02d}" for number in config.subjects]
        if not subjects and not kept:
            cure = "give 1 to 9 (0.3 to 1 GB each), or set root= to a local copy of ds005574"
            raise InputError(f"subjects= must name whom to fetch, such as subjects=3: {cure}")
        if set(subjects) <= set(kept):
            return root, [], {}
        root.mkdir(parents=True, exist_ok=True)
        fetch_missing(root, subjects, config)
    subjects, nyu_ids = subject_ids(root, config.subjects, config.signal)
    return root, [subject for subject in subjects if subject not in kept], nyu_ids


def write_stimuli(root, folder, words, config):
    """Write the transcript, features and audio, and return their part of the set's meta."""
    tables = {"words.csv": words}
    arrays = {}
    meta = {"words": "words.csv", "tokens": {}, "features": {}, "arrays": {}}
    for name in config.features:
        tokens, layers = read_features(root, name, config.layers, words)
        file = "tokens.csv" if name == "gpt2-xl" else f"{name}_tokens.csv"
        meta["tokens"][name] = file
        tables[file] = tokens
        for key, array in layers.items():
            bits = 16 if np.abs(array).max(initial=0) < 6e4 else 32  # the range of float16
            file = f"{name}_{key}.f{bits}"
            arrays[file] = array.astype(f"<f{bits // 8}")
            meta["features"].setdefault(name, {})[key] = file
            meta["arrays"][file] = {"shape": list(array.shape), "dtype": f"float{bits}"}
    if config.audio_sfreq:
        path = need(root, ["stimuli/podcast.wav"], "complete the copy, or give audio_sfreq=0")
        arrays["audio.f32"] = loudness(path, config.audio_sfreq)
        meta["audio"] = {
            "file": "audio.f32",
            "sfreq": config.audio_sfreq,
            "samples": len(arrays["audio.f32"]),
            "what": "root mean square, full scale 1; sample k covers [k, k + 1) / sfreq s on the "
            "clock of the onsets",
        }
    for name, table in tables.items():
        write_aside(folder / name, table.to_csv(index=False))
    for name, array in arrays.items():
        write_aside(folder / name, array.tobytes())
    return meta


def main(config):
    folder = folder_of(config, __file__)
    options = options_of(config, "subjects", "root", "url")
    kept = [] if config.overwrite else made_recordings(folder, options)
    root, subjects, nyu_ids = find_tree(folder, kept, config)
    if not subjects:
        print(f"{folder} already has {', '.join(kept)} (overwrite=True makes them again)")
        return
    words, facts = read_words(need(root, ["stimuli/podcast_transcript.csv"]), config)
    folder.mkdir(parents=True, exist_ok=True)
    if not kept:
        (folder / "meta.yaml").unlink(missing_ok=True)
    elif (folder / "words.csv").read_text(encoding="utf-8") != words.to_csv(index=False):
        cure = "set overwrite=True to make all of it again, or another out_dir="
        raise InputError(f"{folder} was made with a different transcript than {root} has: {cure}")
    meta = write_stimuli(root, folder, words, config)
    for subject in subjects:
        make_recording(root, folder, subject, words, nyu_ids, config)
    recordings = sorted({*kept, *subjects})
    description = read_json(find(root, ["dataset_description.json"]))
    meta |= {
        "transcript": facts,
        "options": options,
        "source": description.get("Name", "OpenNeuro ds005574"),
        "licence": description.get("License", "see the dataset's own description"),
    }
    if "Planted" in description:
        meta["planted"] = description["Planted"]
    write_set(folder, recordings, synthetic=is_synthetic(root), **meta)
    print(
        f"{folder}: {', '.join(recordings)}; {facts['words']:,} words, {facts['without_onset']} "
        f"without onset, {facts['sentences']} sentences ({facts['sentences_by']}), "
        f"features {', '.join(meta['arrays']) or 'none'}; {meta['source']}"
    )


if __name__ == "__main__":
    main(configure(Config))
