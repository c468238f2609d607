"""BrainTreebank (Wang et al. 2024, arXiv 2411.08343): ten people with depth electrodes watch films; with the tasks and splits of Neuroprobe (arXiv 2509.21671).

    pip install neuroprobe                                                           # its word tables, electrodes and rules are read, never its code
    python data/braintreebank/prepare.py root=path/to/braintreebank                  # a local copy: the benchmark's 12 recordings of 6 people
    python data/braintreebank/prepare.py recordings=sub_1_trial001               # fetched from braintreebank.dev: sizes first, then file by file
    python data/braintreebank/prepare.py root=... recordings=btbank1_0,btbank5_0 out_dir=out/btb   # others, to pretrain on

Writes one recording a film and person (data/recording.py), every word and every stretch without speech as its events, and for the benchmark's
recordings neuroprobe.csv: the labelled windows of 15 binary tasks, and which split has each. Read block by block: a recording is never in memory.
"""
import ast, html.parser, importlib.util, json, os, re, shutil, sys, urllib.parse, zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure, write_aside
from data.podcast.prepare import ask, fetch, head, read_table
from data.recording import complete, read_set, write_recording, write_set

EMBEDDED = False  # must be downloaded: nobody starts this behind the user's back
HERE = Path(os.path.relpath(Path(__file__).resolve().parent))
SFREQ = 2048
RECORDING = re.compile(r"(?:sub_|btbank)(\d+)_(?:trial)?(\d+)")

# Neuroprobe's tasks: the column of the word tables whose upper quarter is to be told from its lower one, and the rest by rules (see labelled()).
QUARTERS = {"volume": "rms", "delta_volume": "delta_rms", "pitch": "enhanced_pitch", "gpt2_surprisal": "gpt2_surprisal", "word_length": "word_length",
            "global_flow": "max_global_magnitude", "local_flow": "max_vector_magnitude", "frame_brightness": "mean_pixel_brightness"}
TASKS = ["onset", "speech", "volume", "delta_volume", "pitch", "word_index", "word_gap", "gpt2_surprisal", "word_head_pos", "word_part_speech", "word_length",
         "global_flow", "local_flow", "frame_brightness", "face_num"]


@dataclass
class Config:
    recordings: list[str] = field(default_factory=list)  # sub_1_trial001, or btbank1_1; none: the benchmark's
    electrodes: Literal["lite", "all"] = "lite"  # the benchmark's contacts, or every contact that carries brain
    package: str = ""                # folder of neuroprobe (config.py, braintreebank_features_time_alignment/); "": where it is installed
    # where from and where to
    root: str = ""                   # local copy; "": $ROOT_DIR_BRAINTREEBANK, or else fetched into braintreebank/ in out_dir
    url: str = "https://braintreebank.dev/"  # the page whose links are fetched
    out_dir: str = ""                # "": this folder
    overwrite: bool = False          # make it again although it is there

    def check(self):
        for name in self.recordings:
            if not RECORDING.fullmatch(name):
                raise ValueError(f"recordings={name} is no recording's name: sub_1_trial001, say, or btbank1_1")


# ---- what the package fixes

def find_package(asked):
    """Folder of the neuroprobe package, installed or given; a clone has it one level down. Nothing of it is run."""
    spec = None if asked else importlib.util.find_spec("neuroprobe")
    tried = [Path(asked), Path(asked) / "neuroprobe"] if asked else [Path(spec.origin).parent] if spec else []
    for folder in tried:
        if (folder / "braintreebank_features_time_alignment").is_dir():
            return folder
    raise FileNotFoundError(f"package={asked} holds no braintreebank_features_time_alignment/" if asked else
                            "the word tables, tasks and splits come with the package neuroprobe: pip install neuroprobe, or give package= a clone of it")


def settings(package):
    """{name: value} of the constants in the package's config.py: seed, recordings, electrodes, films."""
    path, found = package / "config.py", {}
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError) as e:
        raise ValueError(f"{path} cannot be read ({e}): give package= a whole copy of neuroprobe") from None
    for line in body:
        if isinstance(line, ast.Assign):
            try:
                value = ast.literal_eval(line.value)
            except ValueError:
                continue  # a path, or a name for something above
            target = line.targets[0]
            found.update({target.id: value} if isinstance(target, ast.Name) else dict(zip([t.id for t in target.elts], value)))
    for key in ("NEUROPROBE_GLOBAL_RANDOM_SEED", "NEUROPROBE_LITE_SUBJECT_TRIALS", "NEUROPROBE_LITE_MAX_SAMPLES", "NEUROPROBE_LITE_N_FOLDS",
                "NEUROPROBE_LITE_ELECTRODES", "BRAINTREEBANK_SUBJECT_TRIAL_MOVIE_NAME_MAPPING", "DS_DM_TRAIN_SUBJECT_ID", "DS_DM_TRAIN_TRIAL_ID"):
        if key not in found:
            raise ValueError(f"{path} has no {key}: this reads neuroprobe 0.1")
    return found


def read_tables(root, package, film, person, trial):
    """(words, silences) of a recording: DataFrames whose est_idx and est_end_idx are samples of its file, the film's own columns joined to the words."""
    folder, stem = package / "braintreebank_features_time_alignment", f"subject{person}_trial{trial}"
    words = read_table(present(folder / f"{stem}_words_df.csv"), ["est_idx", "est_end_idx", "start", "end", "original_index"])
    silences = read_table(present(folder / f"{stem}_nonverbal_df.csv"), ["est_idx", "est_end_idx"])
    features = read_table(present(root / "transcripts" / film / "features.csv"), ["Unnamed: 0"]).set_index("Unnamed: 0")
    for column in features.columns.difference(words.columns, sort=False):
        words[column] = words["original_index"].map(features[column])
    pitch = package / "pitch_volume_features" / f"{film}_pitch_volume_features.json"
    heard = {f"{float(k):.5f}": v for k, v in json.loads(present(pitch).read_text()).items()}  # by the time of the word's start
    words["enhanced_pitch"] = [heard.get(f"{s:.5f}", {}).get("enhanced_pitch", np.nan) for s in words["start"]]
    return words, silences


def present(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: complete the copy (root=) or the package (package=)")
    return path


def quarter(values):
    """Share of all values below each, NaN below nothing, as the package's comparison has it."""
    values = np.asarray(values, float)
    return np.where(np.isnan(values), 0.0, np.searchsorted(np.sort(values), values) / len(values))


def labelled(task, words, silences):
    """(rows of words that are 1, rows that are 0) of a task; in onset and speech the 0 are rows of silences."""
    def column(name):
        if name not in words:
            raise ValueError(f"task {task} needs the column '{name}', and neither the word table nor the film's features.csv has it")
        return words[name].to_numpy()
    if task in QUARTERS:
        share = quarter(column(QUARTERS[task]))
        return np.flatnonzero(share > 0.75), np.flatnonzero(share < 0.25)
    if task in ("onset", "speech"):
        return np.flatnonzero(column("is_onset") == 1) if task == "onset" else np.arange(len(words)), np.arange(len(silences))
    if task == "word_gap":  # silence before a word that does not open a sentence
        inside = 1 + np.flatnonzero(column("sentence")[1:] == column("sentence")[:-1])
        share = quarter(column("start")[inside] - column("end")[inside - 1])
        return inside[share >= 0.75], inside[share < 0.25]
    name, one, zero = {"face_num": ("face_num", lambda x: x > 0, lambda x: x == 0), "word_index": ("idx_in_sentence", lambda x: x == 0, lambda x: x == 1),
                       "word_head_pos": ("bin_head", lambda x: x == 0, lambda x: x == 1),
                       "word_part_speech": ("pos", lambda x: x == "VERB", lambda x: x == "NOUN")}[task]
    values = column(name) if task == "word_part_speech" else column(name).astype(int)
    return np.flatnonzero(one(values)), np.flatnonzero(zero(values))


def windows(words, silences, fixed):
    """DataFrame of every task's windows in the package's order: task, item, onset (s), label, and what each is in each split (train, val, test).

    Both classes are drawn to the same size, at most half of the 3,500 samples each, by the package's seed, then dealt in turn, a 1 first. Within a session
    the items are cut into contiguous folds; of the one left out the first half validates, the second is tested. Across sessions and people all items of
    another recording train, and `across` says which of this one's validate and which are tested."""
    out = []
    for task in TASKS:
        random, sides = np.random.RandomState(fixed["NEUROPROBE_GLOBAL_RANDOM_SEED"]), labelled(task, words, silences)
        n = min(len(sides[0]), len(sides[1]), fixed["NEUROPROBE_LITE_MAX_SAMPLES"] // 2)
        one, zero = (np.sort(random.choice(side, size=n, replace=False)) for side in sides)
        start = np.empty(2 * n)
        start[0::2] = words["est_idx"].to_numpy()[one].astype(int)
        start[1::2] = (silences if task in ("onset", "speech") else words)["est_idx"].to_numpy()[zero].astype(int)
        table = pd.DataFrame({"task": task, "item": np.arange(2 * n), "onset": start / SFREQ, "label": np.tile([1, 0], n)})
        half = np.where(np.arange(2 * n) < n, "val", "test")
        for k, held in enumerate(np.array_split(np.arange(2 * n), fixed["NEUROPROBE_LITE_N_FOLDS"])):
            part = np.full(2 * n, "train", dtype=object)
            part[held[:len(held) // 2]], part[held[len(held) // 2:]] = "val", "test"
            table[f"within_{k}"] = part
        out.append(table.assign(across=half))
    return pd.concat(out, ignore_index=True)


# ---- recordings

def clean(name):
    """A contact's name without the marks * and #."""
    return re.sub(r"[*#]", "", name)


def read_json(path):
    try:
        return json.loads(present(path).read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not JSON: fetch it again") from None


def contacts(root, person, fixed, electrodes):
    """DataFrame of the contacts that are kept: name, type, place (m, on a standard cortex), status, region, and series, their number in the files."""
    names = [clean(n) for n in read_json(root / "electrode_labels" / f"sub_{person}" / "electrode_labels.json")]
    bad = {clean(n) for n in read_json(root / "corrupted_elec.json").get(f"sub_{person}", [])}
    table = pd.DataFrame({"name": names, "type": "seeg", "status": ["bad" if n in bad else "good" for n in names], "series": range(len(names))})
    lite = fixed["NEUROPROBE_LITE_ELECTRODES"].get(f"btbank{person}", [])
    keep = table["name"].isin(lite) & (table["status"] == "good") if electrodes == "lite" else ~table["name"].str.upper().str.match("DC|TRIG")
    table = table[keep].reset_index(drop=True)
    places = read_table(present(root / "localization" / "elec_coords_full.csv"), ["Subject", "Electrode", "X", "Y", "Z"], missing=("X", "Y", "Z"))
    regions = read_table(present(root / "localization" / f"sub_{person}" / "depth-wm.csv"), ["Electrode", "DesikanKilliany"])

    def by_name(rows):
        return rows.assign(Electrode=rows["Electrode"].map(clean)).drop_duplicates("Electrode").set_index("Electrode").reindex(table["name"])
    table[["x", "y", "z"]] = by_name(places[places["Subject"] == f"sub_{person}"])[["X", "Y", "Z"]].to_numpy() / 1000
    table["region"] = by_name(regions)["DesikanKilliany"].to_numpy()
    return table


def make_recording(root, folder, person, trial, words, silences, fixed, electrodes, film):
    """Write one recording from its HDF5 file, thirty seconds at a time. Returns its meta."""
    import h5py
    name = f"sub_{person}_trial{trial:03}"
    path = next((p for p in (root / f"{name}.h5", root / "all_subject_data" / f"{name}.h5") if p.is_file()), None) or present(root / f"{name}.h5")
    channels = contacts(root, person, fixed, electrodes)
    if not len(channels):
        raise ValueError(f"{name}: none of the contacts in electrode_labels.json are among the benchmark's: electrodes=all keeps every one")
    events = pd.concat([pd.DataFrame({"onset": t["est_idx"] / SFREQ, "duration": (t["est_end_idx"] - t["est_idx"]) / SFREQ, "kind": kind,
                                      "word": t["text"] if "text" in t else ""}) for kind, t in (("word", words), ("silence", silences))], ignore_index=True)
    try:
        with h5py.File(path, "r") as file:
            series = [file[f"data/electrode_{i}"] for i in channels["series"]]
            if len({len(s) for s in series}) > 1:
                raise ValueError(f"{path} has series of different lengths: fetch it again")

            def blocks(step=30 * SFREQ):
                for a in tqdm(range(0, len(series[0]), step), name, leave=False, disable=None):
                    yield np.stack([s[a:a + step] for s in series], 1)  # (t, C)
            return write_recording(folder / name, blocks(), channels, events, sfreq=SFREQ, unit="a.u.", subject=f"sub_{person}", source=path.name,
                                   synthetic=False, film=film, trial=trial)
    except (OSError, KeyError) as e:
        raise ValueError(f"{path} is no whole recording ({' '.join(str(e).split())[:160]}): fetch it again") from None


# ---- fetching

class Links(html.parser.HTMLParser):
    """Addresses of a page's links."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found += [value for key, value in attributes if tag == "a" and key == "href" and value]


def fetch_all(root, url, pairs):
    """Fetch and unpack what these recordings need and is not there. No checksums are published: sizes are the server's, and a zip checks its own sums."""
    try:
        page = ask(url).read().decode("utf-8", "replace")
    except OSError as e:
        raise OSError(f"{url} cannot be reached ({getattr(e, 'reason', e)}): go where there is network, or give root= a local copy (all of it is about "
                      "130 GB zipped)") from None
    wanted = {f"sub_{p}_trial{t:03}": root / f"sub_{p}_trial{t:03}.h5" for p, t in pairs} | {
        n: root / n for n in ("localization", "electrode_labels", "transcripts")} | {"corrupted_elec": root / "corrupted_elec.json"}
    todo = []
    for link in Links(page).found:
        address = urllib.parse.urljoin(url, link)
        name = Path(urllib.parse.urlparse(address).path).name
        there = wanted.pop(name.split(".")[0], None)
        if there is not None and not there.exists():
            entry = head(address)
            if entry is None:
                raise FileNotFoundError(f"{address} is not there, though {url} links to it: give root= a local copy")
            todo.append((name, address, entry[0]))
    if lacking := [n for n, there in wanted.items() if not there.exists()]:
        raise FileNotFoundError(f"{url} has no link to {lacking[0]}: fetch it by hand into {root}, or give root= a local copy")
    size, free = sum(entry[2] for entry in todo), shutil.disk_usage(root).free
    print(f"{url}: {len(todo)} files, {size / 1e9:.2f} GB zipped, into {root} ({free / 1e9:.0f} GB free); unpacked and prepared they take about four times "
          "as much", flush=True)
    if 4 * size > free:
        raise OSError(f"{root} has {free / 1e9:.1f} GB free where about {4 * size / 1e9:.1f} GB are needed: choose fewer recordings=, or a larger disk")
    with tqdm(total=size, unit="B", unit_scale=True, disable=None if todo else True) as bar:
        for name, address, bytes in todo:
            bar.set_description(name)
            fetch(address, root / name, bytes, progress=bar)
            if name.endswith(".zip"):
                unpack(root / name, root)


def unpack(path, root):
    """Unpack a zip beside itself and remove it; its sums are checked while it is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                target = (root / member.filename).resolve()
                if not target.is_relative_to(root.resolve()):
                    raise ValueError(f"{path} would write outside of {root}")
                if not member.is_dir():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    part = target.with_name(target.name + ".tmp")
                    with archive.open(member) as source, open(part, "wb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
                    os.replace(part, target)
    except zipfile.BadZipFile as e:
        path.unlink()
        raise OSError(f"{path} came damaged ({e}) and was removed: run the same command again") from None
    path.unlink()


# ---- main

def main(config):
    folder = Path(config.out_dir) if config.out_dir else HERE
    package = find_package(config.package)
    fixed = settings(package)
    lite = [tuple(pair) for pair in fixed["NEUROPROBE_LITE_SUBJECT_TRIALS"]]
    pairs = [tuple(map(int, RECORDING.fullmatch(name).groups())) for name in config.recordings] or lite
    films = fixed["BRAINTREEBANK_SUBJECT_TRIAL_MOVIE_NAME_MAPPING"]
    if unknown := [f"btbank{p}_{t}" for p, t in pairs if f"btbank{p}_{t}" not in films]:
        raise ValueError(f"recordings: there is no {unknown[0]}, only {', '.join(films)}")
    options = {key: value for key, value in asdict(config).items() if key == "electrodes"}
    kept = []
    if config.overwrite:
        (folder / "meta.yaml").unlink(missing_ok=True)
    if complete(folder):
        made = read_set(folder)
        if made.get("options") != options:
            raise ValueError(f"{folder} was made with {made.get('options')}: give overwrite=True to make it again with {options}, or another out_dir")
        kept = made["recordings"]
    pairs = [(p, t) for p, t in pairs if f"sub_{p}_trial{t:03}" not in kept]
    if not pairs:
        print(f"{folder} has {', '.join(kept)} already (overwrite=True makes them again)")
        return
    where = config.root or os.environ.get("ROOT_DIR_BRAINTREEBANK", "")
    root = Path(where) if where else folder / "braintreebank"
    if where and not root.is_dir():
        raise FileNotFoundError(f"root={where} does not exist: give the folder that holds sub_1_trial001.h5 and electrode_labels/")
    if not where:
        root.mkdir(parents=True, exist_ok=True)
        fetch_all(root, config.url, pairs)
    for person, trial in pairs:  # each is whole when the set's meta.yaml names it: a stopped run goes on with the next
        film, name = films[f"btbank{person}_{trial}"], f"sub_{person}_trial{trial:03}"
        words, silences = read_tables(root, package, film, person, trial)
        one = make_recording(root, folder, person, trial, words, silences, fixed, config.electrodes, film)
        found = ""
        if (person, trial) in lite:
            table = windows(words, silences, fixed)
            write_aside(folder / name / "neuroprobe.csv", table.to_csv(index=False))
            found = f", {len(table):,} windows of {table['task'].nunique()} tasks"
        kept = sorted({*kept, name})
        write_set(folder, kept, synthetic=False, options=options, source="BrainTreebank (braintreebank.dev), tasks and splits of neuroprobe",
                  across_people=f"sub_{fixed['DS_DM_TRAIN_SUBJECT_ID']}_trial{fixed['DS_DM_TRAIN_TRIAL_ID']:03}", tasks=TASKS)
        print(f"{name}: {film}, {one['samples'] / SFREQ:.0f} s, {len(words):,} words, {len(silences):,} silences{found}", flush=True)


if __name__ == "__main__":
    main(configure(Config))
