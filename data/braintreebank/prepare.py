"""BrainTreebank (Wang et al. 2024, arXiv 2411.08343), ten people with depth electrodes who watch
films, with the tasks and splits of Neuroprobe (arXiv 2509.21671).

    pip install neuroprobe            # for its word tables and constants; its code is not run
    python data/braintreebank/prepare.py root=path/to/braintreebank    # the benchmark's recordings
    python data/braintreebank/prepare.py root=... recordings=btbank1_0,btbank5_0 out_dir=out/btb

Writes one recording per film and person (data/recording.py) whose events are words and stretches
without speech, and for the benchmark's recordings neuroprobe.csv, the labelled windows of 15 binary
tasks with their splits. Recordings are read piece by piece.
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
# Neuroprobe's tasks that contrast the upper and the lower quarter of a column
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
    # the benchmark's contacts, or every contact in the brain
    electrodes: Literal["lite", "all"] = "lite"
    package: str = ""  # folder of neuroprobe, or of a clone; "": the installed package
    # ---- where from and where to
    root: str = ""  # unpacked files of braintreebank.dev; "": $ROOT_DIR_BRAINTREEBANK
    out_dir: str = ""  # "": this folder
    overwrite: bool = False  # make it again if it exists

    def check(self):
        for name in self.recordings:
            if not RECORDING.fullmatch(name):
                raise InputError(f"recordings={name}: give names like sub_1_trial001 or btbank1_1")


# ---- the package


def find_package(package):
    """Return the folder of the neuroprobe package; a clone has it one level down."""
    if not package:
        spec = importlib.util.find_spec("neuroprobe")
        if spec is None:
            cure = "pip install neuroprobe, or set package= to a clone"
            raise InputError(f"word tables and splits come from the package neuroprobe: {cure}")
        package = Path(spec.origin).parent
    for folder in (Path(package), Path(package) / "neuroprobe"):
        if (folder / "braintreebank_features_time_alignment").is_dir():
            return folder
    raise InputError(f"package={package} holds no braintreebank_features_time_alignment/")


class Settings(dict):
    """The constants of the package's config.py by name."""

    def __missing__(self, key):
        raise InputError(f"config.py of neuroprobe has no {key}: install version 0.1")


def read_settings(package):
    """Parse the package's config.py, without running it, into Settings."""
    path = package / "config.py"
    try:
        statements = ast.parse(check_content(path).read_text(encoding="utf-8")).body
    except SyntaxError as error:
        raise InputError(f"{path} is no Python ({error}): set package= to a whole copy") from None
    settings = Settings()
    for statement in statements:
        try:
            target = statement.targets[0]
            value = ast.literal_eval(statement.value)
        except (AttributeError, ValueError):
            continue  # an import, a path, or another name for a constant
        if isinstance(target, ast.Name):
            settings[target.id] = value
        elif isinstance(target, ast.Tuple):
            for name, item in zip(target.elts, value):
                settings[name.id] = item
        # others, such as os.environ["..."] = "...", set no constants
    return settings


def read_columns(path):
    """Read a table whose empty cells are missing, except in columns of text: a word may be NA."""
    columns = read_table(path, nrows=0).columns.difference(["text", "full_word"])
    return read_table(path, na_values=dict.fromkeys(columns, ["", "nan", "NaN"]))


def read_word_tables(root, package, film, person, trial):
    """Return words with the film's own columns, and silences; est_idx, est_end_idx are samples."""
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
    """Return the share of all values below each; 0 for NaN, as in the package's comparison."""
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
    """Return the rows with label 1 and label 0, the latter of `silences` for onset and speech."""
    if task == "speech":
        return np.arange(len(words)), np.arange(len(silences))
    values = column(words, f"the word table for the task {task}", COLUMNS[task]).to_numpy()
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
    """Return the windows of all tasks in the package's order: task, item, onset (s), label, and
    their part (train, val, test) in each split, by the rules in readme.md."""
    tables = []
    for task in TASKS:
        rng = np.random.RandomState(settings["NEUROPROBE_GLOBAL_RANDOM_SEED"])
        positive, negative = task_rows(task, words, silences)
        n = min(len(positive), len(negative), settings["NEUROPROBE_LITE_MAX_SAMPLES"] // 2)
        if n == 0:
            raise ValueError(f"all windows of the task {task} have the same label")
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
    """Remove the marks * and # from a contact's name."""
    return re.sub(r"[*#]", "", name)


def read_contacts(root, person, settings, electrodes):
    """Return the contacts to keep, with their number in the file (series), place (m) and region."""
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
    """Index a table of contacts by clean name, keeping the first row of each."""
    table = table.set_index(table["Electrode"].map(clean))
    return table[~table.index.duplicated()]


def make_events(words, silences):
    """Return an event per word and per stretch without speech: onset, duration (s), kind, word."""
    text = words["text"] if "text" in words else words["full_word"]
    words = words.assign(kind="word", word=text)
    table = pd.concat([words, silences.assign(kind="silence", word="")], ignore_index=True)
    table["onset"] = table["est_idx"] / SFREQ
    table["duration"] = (table["est_end_idx"] - table["est_idx"]) / SFREQ
    return table[["onset", "duration", "kind", "word"]]


def make_recording(root, folder, recording, channels, events, **meta):
    """Write one recording from its HDF5 file, thirty seconds at a time, and return its meta."""
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
    """Yield blocks (T, contacts) of thirty seconds."""
    for start in tqdm(range(0, len(series[0]), step), name, leave=False, disable=None):
        yield np.stack([one[start : start + step] for one in series], axis=1)


# ---- the set


def chosen_recordings(config, settings):
    """Return {sub_1_trial001: (1, 1), ...} for recordings=, or for the benchmark."""
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
    """Write one recording, and its labelled windows if it is in the benchmark."""
    person, trial = pair
    film = settings["BRAINTREEBANK_SUBJECT_TRIAL_MOVIE_NAME_MAPPING"][f"btbank{person}_{trial}"]
    windows = pd.DataFrame()
    try:
        words, silences = read_word_tables(root, package, film, person, trial)
        channels = read_contacts(root, person, settings, config.electrodes)
        events = make_events(words, silences)
        if pair in map(tuple, settings["NEUROPROBE_LITE_SUBJECT_TRIALS"]):
            windows = make_windows(words, silences, settings)
    except InputError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{recording}: a table in {root} or {package} does not hold what neuroprobe 0.1 reads "
            f"({type(error).__name__}: {' '.join(str(error).split())[:160]}): fetch it again"
        ) from None
    facts = {"subject": f"sub_{person}", "film": film, "trial": trial}
    meta = make_recording(root, folder, recording, channels, events, **facts)
    if len(windows):
        write_aside(folder / recording / "neuroprobe.csv", windows.to_csv(index=False))
    print(
        f"{recording}: {film}, {meta['samples'] / SFREQ:.0f} s, {len(channels)} contacts, "
        f"{len(words):,} words, {len(silences):,} silences, {len(windows):,} labelled windows",
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
        print(f"{folder} already has {', '.join(kept)} (overwrite=True makes them again)")
        return
    root = config.root or os.environ.get("ROOT_DIR_BRAINTREEBANK", "")
    if not root:
        raise InputError("give root=, the folder of the unpacked files of braintreebank.dev")
    train = f"{settings['DS_DM_TRAIN_SUBJECT_ID']}_trial{settings['DS_DM_TRAIN_TRIAL_ID']:03}"
    for recording, pair in todo.items():  # a stopped run continues with the next
        prepare(Path(root), folder, recording, pair, package, settings, config)
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
