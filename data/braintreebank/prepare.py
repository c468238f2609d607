"""BrainTreebank (Wang et al. 2024, arXiv 2411.08343): ten people with depth electrodes watch films;
with the tasks and splits of Neuroprobe (arXiv 2509.21671).

    pip install neuroprobe            # its word tables and constants are read, its code is not run
    python data/braintreebank/prepare.py root=path/to/braintreebank    # the benchmark's recordings
    python data/braintreebank/prepare.py root=... recordings=btbank1_0,btbank5_0 out_dir=out/btb

Writes one recording a film and person (data/recording.py), every word and every stretch without
speech as its events, and for the benchmark's recordings neuroprobe.csv: the labelled windows of 15
binary tasks, and which split has each. A recording is never in memory as a whole.
"""

import ast
import importlib.util
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError, check_content, column, folder_of, read_table, write_aside
from data.raw import read_json
from data.recording import made_recordings, write_recording, write_set

EMBEDDED = False  # must be downloaded
SFREQ = 2048
RECORDING = re.compile(r"(?:sub_|btbank)(\d+)_(?:trial)?(\d+)")
# Neuroprobe's tasks. Those that tell the upper quarter of a column from its lower one:
QUARTERS = {
    "volume": "rms",
    "delta_volume": "delta_rms",
    "pitch": "enhanced_pitch",
    "gpt2_surprisal": "gpt2_surprisal",
    "word_length": "word_length",
    "global_flow": "max_global_magnitude",
    "local_flow": "max_vector_magnitude",
    "frame_brightness": "mean_pixel_brightness",
}
TASKS = ["onset", "speech", "volume", "delta_volume", "pitch", "word_index", "word_gap"]
TASKS += ["gpt2_surprisal", "word_head_pos", "word_part_speech", "word_length", "global_flow"]
TASKS += ["local_flow", "frame_brightness", "face_num"]


@dataclass
class Config:
    # sub_1_trial001, or btbank1_1; none: the benchmark's
    recordings: list[str] = field(default_factory=list)
    # the benchmark's contacts, or every contact that carries brain
    electrodes: Literal["lite", "all"] = "lite"
    package: str = ""  # folder of neuroprobe, or of a clone; "": where it is installed
    # ---- where from and where to
    root: str = ""  # unpacked files of braintreebank.dev; "": $ROOT_DIR_BRAINTREEBANK
    out_dir: str = ""  # "": this folder
    overwrite: bool = False  # make it again although it is there

    def check(self):
        for name in self.recordings:
            if not RECORDING.fullmatch(name):
                raise InputError(f"recordings={name}: give names such as sub_1_trial001, btbank1_1")


# ---- what the package fixes


def find_package(package):
    """Folder of the neuroprobe package, installed or given; a clone has it one level down."""
    if not package:
        spec = importlib.util.find_spec("neuroprobe")
        if spec is None:
            cure = "pip install neuroprobe, or give package= a clone of it"
            raise InputError(
                f"word tables, tasks and splits come with the package neuroprobe: {cure}"
            )
        package = Path(spec.origin).parent
    for folder in (Path(package), Path(package) / "neuroprobe"):
        if (folder / "braintreebank_features_time_alignment").is_dir():
            return folder
    raise InputError(f"package={package} holds no braintreebank_features_time_alignment/")


class Settings(dict):
    """The constants of the package's config.py by name."""

    def __missing__(self, key):
        raise InputError(f"config.py of neuroprobe has no {key}: this reads its version 0.1")


def read_settings(package):
    """Settings of the package, whose config.py is parsed and not run."""
    path = package / "config.py"
    try:
        statements = ast.parse(check_content(path).read_text(encoding="utf-8")).body
    except SyntaxError as error:
        raise InputError(f"{path} is no Python ({error}): give package= a whole copy") from None
    settings = Settings()
    for statement in statements:
        try:
            target = statement.targets[0]
            value = ast.literal_eval(statement.value)
        except (AttributeError, ValueError):
            continue  # an import; a path, or a name for something above
        if isinstance(target, ast.Name):
            settings[target.id] = value
        elif isinstance(target, ast.Tuple):
            for name, item in zip(target.elts, value):
                settings[name.id] = item
        # others, such as os.environ["..."] = "...", set no constant
    return settings


def read_columns(path):
    """A table whose empty cells are missing, except in the columns of text: a word may be NA."""
    columns = read_table(path, nrows=0).columns.difference(["text", "full_word"])
    return read_table(path, na_values=dict.fromkeys(columns, ["", "nan", "NaN"]))


def read_word_tables(root, package, film, person, trial):
    """(words with the film's own columns, silences); est_idx and est_end_idx are samples."""
    stem = package / "braintreebank_features_time_alignment" / f"subject{person}_trial{trial}"
    words = read_columns(f"{stem}_words_df.csv")
    silences = read_columns(f"{stem}_nonverbal_df.csv")
    features = read_columns(root / "transcripts" / film / "features.csv").set_index("Unnamed: 0")
    for name in features.columns.difference(words.columns, sort=False):
        words[name] = words["original_index"].map(features[name])
    pitch = read_json(package / "pitch_volume_features" / f"{film}_pitch_volume_features.json")
    pitches = {f"{float(start):.5f}": entry["enhanced_pitch"] for start, entry in pitch.items()}
    words["enhanced_pitch"] = words["start"].map("{:.5f}".format).map(pitches)
    return words, silences


# ---- tasks and splits


def share_below(values):
    """Share of all values below each; NaN is above nothing, as the package's comparison has it."""
    values = np.asarray(values, float)
    share = np.searchsorted(np.sort(values), values) / len(values)
    return np.where(np.isnan(values), 0.0, share)


COLUMNS = {
    **QUARTERS,
    "onset": "is_onset",
    "word_gap": "sentence",
    "word_index": "idx_in_sentence",
    "word_head_pos": "bin_head",
    "word_part_speech": "pos",
    "face_num": "face_num",
}


def task_rows(task, words, silences):
    """(rows of words whose label is 1, rows whose label is 0) of a task; in onset and speech the
    label 0 belongs to rows of `silences`."""
    if task == "speech":
        return np.arange(len(words)), np.arange(len(silences))
    place = f"the word table of the task {task}"
    values = column(words, place, COLUMNS[task]).to_numpy()
    if task == "onset":
        return np.flatnonzero(values == 1), np.arange(len(silences))
    if task in QUARTERS:
        share = share_below(values)
        return np.flatnonzero(share > 0.75), np.flatnonzero(share < 0.25)
    if task == "word_gap":  # silence before a word that does not open a sentence
        inside = 1 + np.flatnonzero(values[1:] == values[:-1])
        share = share_below((words["start"] - words["end"].shift()).to_numpy()[inside])
        return inside[share >= 0.75], inside[share < 0.25]
    if task == "word_part_speech":
        return np.flatnonzero(values == "VERB"), np.flatnonzero(values == "NOUN")
    values = values.astype(int)
    if task == "face_num":
        return np.flatnonzero(values > 0), np.flatnonzero(values == 0)
    return np.flatnonzero(values == 0), np.flatnonzero(values == 1)  # word_index, word_head_pos


def make_windows(words, silences, settings):
    """DataFrame of every task's windows: task, item, onset (s), label, and their part (train, val,
    test) in each split, in the package's order.

    Both classes are drawn to the same size by the package's seed, then dealt in turn, a 1 first.
    Within a session the items are cut into contiguous folds; of the one left out the first half
    validates. Across sessions and people another recording trains; `across` has this one's part.
    """
    tables = []
    for task in TASKS:
        rng = np.random.RandomState(settings["NEUROPROBE_GLOBAL_RANDOM_SEED"])
        positive, negative = task_rows(task, words, silences)
        n = min(len(positive), len(negative), settings["NEUROPROBE_LITE_MAX_SAMPLES"] // 2)
        positive = np.sort(rng.choice(positive, size=n, replace=False))
        negative = np.sort(rng.choice(negative, size=n, replace=False))
        negative_table = silences if task in ("onset", "speech") else words
        samples = np.empty(2 * n)
        samples[0::2] = words["est_idx"].to_numpy()[positive].astype(int)
        samples[1::2] = negative_table["est_idx"].to_numpy()[negative].astype(int)
        items = np.arange(2 * n)
        table = pd.DataFrame({"task": task, "item": items, "onset": samples / SFREQ})
        table["label"] = 1 - items % 2
        for k, held_out in enumerate(np.array_split(items, settings["NEUROPROBE_LITE_N_FOLDS"])):
            table[f"within_{k}"] = "train"
            middle = len(held_out) // 2
            table.loc[held_out[:middle], f"within_{k}"] = "val"
            table.loc[held_out[middle:], f"within_{k}"] = "test"
        table["across"] = np.where(items < n, "val", "test")
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


# ---- recordings


def clean(name):
    """A contact's name without the marks * and #."""
    return re.sub(r"[*#]", "", name)


def read_contacts(root, person, settings, electrodes):
    """The contacts that are kept: name, type, status, series (their number in the file), x, y, z
    (m, on a standard cortex) and region."""
    subject = f"sub_{person}"
    labels = read_json(root / "electrode_labels" / subject / "electrode_labels.json")
    corrupted = read_json(root / "corrupted_elec.json").get(subject, [])
    table = pd.DataFrame({"name": list(map(clean, labels)), "type": "seeg"})
    is_bad = table["name"].isin(list(map(clean, corrupted)))
    table["status"] = np.where(is_bad, "bad", "good")
    table["series"] = table.index
    if electrodes == "lite":
        lite = settings["NEUROPROBE_LITE_ELECTRODES"].get(f"btbank{person}", [])
        table = table[table["name"].isin(lite) & ~is_bad]
    else:
        table = table[~table["name"].str.upper().str.match("DC|TRIG")]
    table = table.set_index("name")
    places = read_columns(root / "localization" / "elec_coords_full.csv")
    places = by_contact(places[places["Subject"] == subject])
    table[["x", "y", "z"]] = places[["X", "Y", "Z"]].reindex(table.index) / 1000
    regions = by_contact(read_table(root / "localization" / subject / "depth-wm.csv"))
    table["region"] = regions["DesikanKilliany"].reindex(table.index)
    return table.reset_index()


def by_contact(table):
    """A table of contacts by their clean names, the first row of each."""
    table = table.set_index(table["Electrode"].map(clean))
    return table[~table.index.duplicated()]


def make_events(words, silences):
    """One event a word and a stretch without speech: onset, duration (s), kind, word."""
    text = words["text"] if "text" in words else words["full_word"]
    words = words.assign(kind="word", word=text)
    table = pd.concat([words, silences.assign(kind="silence", word="")], ignore_index=True)
    table["onset"] = table["est_idx"] / SFREQ
    table["duration"] = (table["est_end_idx"] - table["est_idx"]) / SFREQ
    return table[["onset", "duration", "kind", "word"]]


def make_recording(root, folder, recording, channels, events, **meta):
    """Write one recording from its HDF5 file, thirty seconds at a time. Returns its meta."""
    import h5py

    path = root / f"{recording}.h5"
    if not path.exists():
        path = root / "all_subject_data" / f"{recording}.h5"
    check_content(path)
    try:
        with h5py.File(path, "r") as file:
            series = [file[f"data/electrode_{number}"] for number in channels["series"]]
            blocks = read_blocks(series, recording)
            about = {"sfreq": SFREQ, "unit": "a.u.", "source": path.name, "synthetic": False}
            return write_recording(folder / recording, blocks, channels, events, **about, **meta)
    except (OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path} is no whole recording ({reason}): fetch it again") from None


def read_blocks(series, name, step=30 * SFREQ):
    """(T, contacts) blocks of thirty seconds."""
    for start in tqdm(range(0, len(series[0]), step), name, leave=False, disable=None):
        yield np.stack([one[start : start + step] for one in series], axis=1)


# ---- the set


def chosen_recordings(config, settings):
    """{sub_1_trial001: (1, 1), ...} of recordings=, or of the benchmark."""
    films = settings["BRAINTREEBANK_SUBJECT_TRIAL_MOVIE_NAME_MAPPING"]
    pairs = [RECORDING.fullmatch(name).groups() for name in config.recordings]
    chosen = {}
    for pair in pairs or settings["NEUROPROBE_LITE_SUBJECT_TRIALS"]:
        person, trial = map(int, pair)
        if f"btbank{person}_{trial}" not in films:
            raise InputError(f"recordings: no btbank{person}_{trial}, only {', '.join(films)}")
        chosen[f"sub_{person}_trial{trial:03}"] = (person, trial)
    return chosen


def prepare(root, folder, recording, pair, package, settings, config):
    """Write one recording, and its labelled windows where the benchmark has it."""
    person, trial = pair
    film = settings["BRAINTREEBANK_SUBJECT_TRIAL_MOVIE_NAME_MAPPING"][f"btbank{person}_{trial}"]
    words, silences = read_word_tables(root, package, film, person, trial)
    channels = read_contacts(root, person, settings, config.electrodes)
    facts = {"subject": f"sub_{person}", "film": film, "trial": trial}
    events = make_events(words, silences)
    made = make_recording(root, folder, recording, channels, events, **facts)
    n_windows = 0
    if pair in [tuple(lite) for lite in settings["NEUROPROBE_LITE_SUBJECT_TRIALS"]]:
        windows = make_windows(words, silences, settings)
        write_aside(folder / recording / "neuroprobe.csv", windows.to_csv(index=False))
        n_windows = len(windows)
    print(
        f"{recording}: {film}, {made['samples'] / SFREQ:.0f} s, {len(channels)} contacts, "
        f"{len(words):,} words, {len(silences):,} silences, {n_windows:,} labelled windows",
        flush=True,
    )


def main(config):
    folder = folder_of(config, __file__)
    package = find_package(config.package)
    settings = read_settings(package)
    chosen = chosen_recordings(config, settings)
    options = {"electrodes": config.electrodes}
    if config.overwrite:
        (folder / "meta.yaml").unlink(missing_ok=True)
    kept = made_recordings(folder, options)
    todo = {recording: pair for recording, pair in chosen.items() if recording not in kept}
    if not todo:
        print(f"{folder} has {', '.join(kept)} already (overwrite=True makes them again)")
        return
    where = config.root or os.environ.get("ROOT_DIR_BRAINTREEBANK", "")
    if not where:
        raise InputError("give root=, the folder of what braintreebank.dev offers, unpacked")
    root = Path(where)
    train = f"{settings['DS_DM_TRAIN_SUBJECT_ID']}_trial{settings['DS_DM_TRAIN_TRIAL_ID']:03}"
    for recording, pair in todo.items():  # a stopped run goes on with the next
        prepare(root, folder, recording, pair, package, settings, config)
        kept = sorted({*kept, recording})
        write_set(
            folder,
            kept,
            synthetic=False,
            options=options,
            source="BrainTreebank (braintreebank.dev), tasks and splits of neuroprobe",
            across_people=f"sub_{train}",
            tasks=TASKS,
        )


if __name__ == "__main__":
    main(configure(Config))
