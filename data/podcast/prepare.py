"""Podcast ECoG (Zada et al. 2025, Scientific Data 12:1135; OpenNeuro ds005574): nine people, 1,330 electrodes, half an hour of one podcast.

    python data/podcast/prepare.py subjects=3                          # fetched: high gamma of sub-03 (about 1 GB), transcript, one layer of GPT-2 XL
    python data/podcast/prepare.py subjects=1,2,3                      # more can be added later
    python data/podcast/prepare.py root=path/to/ds005574               # from a local copy (git-annex links are followed), every subject it has
    python data/podcast/prepare.py subjects=3 electrodes='LG[AB]*'     # by regular expression, from a name's beginning, as MNE does
    python data/podcast/prepare.py root=... electrodes=sig_elecs.csv   # by a table with columns subject (sub-03, 3 or an nyu_id) and elec

Writes one recording a subject (data/recording.py), the transcript, the released features with the tokens they belong to, and the loudness of the
audio. Nothing is cut, averaged or scaled here: windows, lags and z-scores are the scripts'.
"""
import hashlib, http.client, io, json, os, re, shutil, sys, time, urllib.error, urllib.parse, urllib.request, warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import aside, configure
from data.recording import complete, read_set, write_recording, write_set

EMBEDDED = False  # must be downloaded: nobody starts this behind the user's back
HERE = Path(os.path.relpath(Path(__file__).resolve().parent))
BUCKET = "https://s3.amazonaws.com/openneuro.org/ds005574"
BRAIN = ("ecog", "seeg", "dbs")  # channel types that are kept: the rest of a recording is scalp, triggers, hearts and silence

# English words of the closed classes, auxiliaries included: what is not among them is a content word.
FUNCTION = set("""
a an the this that these those each every either neither some any no all both half such what which whose whatever whichever another other
i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its itself we us our ours ourselves they them their
theirs themselves one ones who whom whoever someone somebody something anyone anybody anything everyone everybody everything nobody nothing none
of in to for with on at from by about as into like through after over between out against during without before under around among up down off above
near onto upon within along across behind beyond toward towards until till since per via than despite except inside outside
and or but nor so yet if because although though while whereas unless whether once when where why how that's then there here
be am is are was were been being do does did done doing have has had having can could will would shall should may might must ought
not n't to yes yeah oh uh um well okay ok just too very also only even
""".split())
ABBREVIATIONS = set("mr mrs ms dr st jr sr vs etc e.g i.e u.s".split())  # a full stop after these ends no sentence


@dataclass
class Config:
    subjects: list[int] = field(default_factory=list)  # 1 to 9; none: every one of the local copy
    signal: Literal["highgamma", "broadband", "raw"] = "highgamma"  # envelope of 70-200 Hz, the cleaned recording, or the EDF as recorded
    electrodes: str = ""             # "": all; a regular expression (matched from a name's beginning), or a CSV with columns subject and elec
    bads: Literal["drop", "mark"] = "drop"  # bad channels: left out, or kept with status bad
    space: str = "MNI152NLin2009aSym"  # of the electrode positions
    features: list[str] = field(default_factory=lambda: ["gpt2-xl"])  # released features: folders under stimuli/; none: features=
    layers: list[int] = field(default_factory=lambda: [24])  # of a model that has layers
    pos: str = ""                    # CSV or TSV with columns word, start and pos: parts of speech for the transcript; "": none
    audio_sfreq: int = 100           # Hz of the loudness; 0: no audio
    # where from and where to
    root: str = ""                   # local copy; "": $PODCAST_ROOT, or else fetched into ds005574/ in out_dir
    url: str = BUCKET                # where to fetch from
    out_dir: str = ""                # "": this folder
    overwrite: bool = False          # make it again although it is there

    def check(self):
        if self.audio_sfreq < 0:
            raise ValueError(f"audio_sfreq={self.audio_sfreq}: give a rate in Hz, or 0 for no audio")
        try:
            self.electrodes.endswith(".csv") or re.compile(self.electrodes)
        except re.error as e:
            raise ValueError(f"electrodes={self.electrodes} is no regular expression ({e}) and no .csv file") from None


# ---- where things are in ds005574

def signal_names(sub, kind):
    """Paths that a subject's signal may have, the present one first (older snapshots called the task differently)."""
    if kind == "raw":
        return [f"{sub}/ieeg/{sub}_task-podcast_ieeg.edf"]
    desc = "_desc-highgamma" if kind == "highgamma" else ""
    return [f"derivatives/ecogprep/{sub}/ieeg/{sub}_task-{task}{desc}_ieeg.fif" for task in ("podcast", "monkey")]


def wanted_files(subs, config):
    """[(paths to try in turn, whether one must be there)] of everything but features.hdf5, which is read in parts."""
    files = [(["participants.tsv"], True), (["dataset_description.json"], False), (["stimuli/podcast_transcript.csv"], True)]
    files += [([f"stimuli/{name}/transcript.tsv"], True) for name in config.features]
    files += [(["stimuli/podcast.wav"], True)] * bool(config.audio_sfreq)
    for sub in subs:
        files += [(signal_names(sub, config.signal), True), ([f"{sub}/ieeg/{sub}_task-podcast_channels.tsv"], True)]
        files += [([f"{sub}/ieeg/{sub}_space-{config.space}_{what}"], False) for what in ("electrodes.tsv", "coordsystem.json")]
    return files


def here(root, names):
    """The first of these paths under root that is a file with content; None when there is none. A git-annex link without content is none."""
    return next((root / name for name in names if (root / name).is_file()), None)


def need(root, names, remedy="complete the copy, or leave root= out to fetch what is missing"):
    path = here(root, names)
    if path is None:
        empty = next((name for name in names if (root / name).is_symlink()), None)
        what = f"{root / empty} is a git-annex link without content" if empty else f"{root} has no {' or '.join(names)}"
        raise FileNotFoundError(f"{what}: {remedy}")
    return path


def local_root(root):
    """The folder that holds the tree: root itself, or data/ or ds005574/ inside it."""
    for folder in (Path(root), Path(root) / "ds005574", Path(root) / "data"):
        if any((folder / name).exists() for name in ("participants.tsv", "stimuli", "derivatives/ecogprep")):
            return folder
    raise FileNotFoundError(f"root={root} holds no copy of ds005574 (participants.tsv, stimuli/, derivatives/ecogprep/): give the folder that does")


# ---- fetching

def ask(url, start=None, stop=None, method="GET"):
    span = {} if start is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
    return urllib.request.urlopen(urllib.request.Request(url, headers=span, method=method), timeout=60)


def head(url):
    """(bytes, md5 or '') of a remote file, or None when there is none. Raises OSError in a sentence when the place cannot be reached."""
    try:
        with ask(url, method="HEAD") as response:
            etag = response.headers.get("ETag", "").strip('"')
            return int(response.headers["Content-Length"]), etag if re.fullmatch("[0-9a-f]{32}", etag) else ""  # of a file uploaded in parts it is no md5
    except urllib.error.HTTPError as e:
        if e.code in (403, 404):  # what an S3 bucket says of a file that it does not have
            return None
        reason = f"HTTP {e.code}"
    except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", e)
    raise OSError(f"{url} cannot be reached ({reason}): go where there is network, or give root= a local copy of ds005574")


def fetch(url, path, size, md5="", progress=None, tries=5, pause=1.0):
    """Fetch a file of `size` bytes into path, going on from path.part where an earlier try left off. It gets its name when size and md5 are right."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    error = "the connection was cut"
    if progress is not None and part.exists():
        progress.update(part.stat().st_size)
    for attempt in range(tries):
        have = part.stat().st_size if part.exists() else 0
        if have > size:  # of another version
            part.unlink()
            have = 0
        if have == size:
            break
        try:
            time.sleep(pause * (2 ** attempt - 1))
            with ask(url, have or None) as response, open(part, "ab") as file:
                if have and response.status != 206:  # a server that knows no ranges sends it all again
                    file.truncate(0)
                while block := response.read(1 << 20):
                    file.write(block)
                    if progress is not None:
                        progress.update(len(block))
        except (OSError, http.client.HTTPException) as e:
            error = getattr(e, "reason", e)
    have = part.stat().st_size if part.exists() else 0
    if have != size:
        raise OSError(f"{url}: {have:,} of {size:,} bytes came ({error}); run the same command again, it goes on from there")
    if md5:
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            part.unlink()
            raise OSError(f"{url} came damaged (md5 {found} where the server says {md5}) and was removed: run the same command again")
    os.replace(part, path)


class Remote(io.RawIOBase):
    """A remote file that is read where it is asked for: of 1.7 GB of features one layer."""

    def __init__(self, url, size):
        self.url, self.size, self.at = url, size, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.at

    def seek(self, offset, whence=0):
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer):
        n = min(len(buffer), self.size - self.at)
        if n <= 0:
            return 0
        with ask(self.url, self.at, self.at + n) as response:
            data = response.read()
        if response.status != 206 or len(data) != n:
            raise OSError(f"{len(data):,} bytes came where {n:,} were asked for")
        buffer[:n] = data
        self.at += n
        return n


def fetch_all(root, url, subs, config):
    """Fetch what the subjects need and is not there yet: sizes and free space first, then file by file; of features.hdf5 only the chosen layers."""
    import h5py
    todo, remote = [], {}
    for names, must in wanted_files(subs, config):
        if here(root, names):
            continue
        found = next(((name, entry) for name in names if (entry := head(f"{url}/{urllib.parse.quote(name)}"))), None)
        if found:
            todo.append((found[0], *found[1]))
        elif must:
            raise FileNotFoundError(f"{url} has no {' or '.join(names)}: choose among the subjects 1 to 9, or give root= a local copy")
    for name in config.features:
        file, parts = f"stimuli/{name}/features.hdf5", root / "stimuli" / name
        done = (parts / "features_vectors.hdf5").is_file() or all((parts / f"features_layer-{n}.hdf5").is_file() for n in config.layers)
        if not here(root, [file]) and not done and (entry := head(f"{url}/{urllib.parse.quote(file)}")):
            remote[name] = (f"{url}/{urllib.parse.quote(file)}", entry[0])
    size, free = sum(entry[1] for entry in todo), shutil.disk_usage(root).free
    if todo:
        print(f"{url}: {len(todo)} files, {size / 1e9:.2f} GB, into {root} ({free / 1e9:.0f} GB free); the prepared copy takes about as much again", flush=True)
    if 2.1 * size > free:
        raise OSError(f"{root} has {free / 1e9:.1f} GB free where {2.1 * size / 1e9:.1f} GB are needed: choose fewer subjects=, or a larger disk")
    with tqdm(total=size, unit="B", unit_scale=True, disable=None if todo else True) as bar:
        for name, bytes, md5 in todo:
            bar.set_description(Path(name).name)
            fetch(f"{url}/{urllib.parse.quote(name)}", root / name, bytes, md5, bar)
    for name, (address, bytes) in remote.items():
        try:
            with h5py.File(io.BufferedReader(Remote(address, bytes), 1 << 18), "r") as file:
                for key in layer_keys(file, address, config.layers):
                    print(f"{address}: {key}, {file[key].nbytes / 1e6:.0f} MB", flush=True)
                    copy = io.BytesIO()
                    with h5py.File(copy, "w") as layer:
                        layer[key] = file[key][:]
                    with aside(root / "stimuli" / name / f"features_{key}.hdf5") as out:
                        out.write(copy.getbuffer())
        except (OSError, http.client.HTTPException) as e:
            raise OSError(f"{address} cannot be read in parts ({e}): run the same command again, or fetch it by hand to {root / 'stimuli' / name}") from None


# ---- tables

def read_table(path, columns, missing=()):
    """DataFrame of a CSV or TSV; a word may be spelled 'null' or 'NA', so only in the columns `missing` is n/a or an empty cell missing."""
    try:
        table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", keep_default_na=False,
                            na_values={column: ["", "n/a", "nan", "NaN"] for column in missing})
    except (ValueError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is no table ({' '.join(str(e).split())})") from None
    if lacks := [column for column in columns if column not in table]:
        raise ValueError(f"{path} has no column '{lacks[0]}', only {', '.join(map(str, table.columns))}")
    for column in missing:
        if column in table:
            try:
                table[column] = table[column].astype(float)
            except ValueError as e:
                raise ValueError(f"{path}: column '{column}' holds no numbers ({e})") from None
    return table


def normalised(word):
    """Lower case without outer punctuation; what stands inside stays: don't, twenty-one."""
    return re.sub(r"^[^\w]+|[^\w]+$", "", str(word).lower().replace("’", "'"))


def is_function(word):
    """Whether a normalised word is of a closed class; a contraction is when what it contracts is (don't, it's)."""
    stem = word.removesuffix("n't") if word.endswith("n't") else word.split("'")[0]
    return word in FUNCTION or "'" in word and (stem in FUNCTION or stem in ("ca", "wo", "let"))


def read_words(path, pos=""):
    """The transcript, one row a word in its order: word_idx, word, start, end (s), norm_word, sentence, pos, content; and what is odd in it, counted."""
    table = read_table(path, ["word", "start", "end"], missing=("start", "end"))
    words = pd.DataFrame({"word_idx": np.arange(len(table)), "word": table["word"].astype(str), "start": table["start"], "end": table["end"]})
    words["norm_word"] = words["word"].map(normalised)
    ends = words["word"].str.contains(r"[.?!][\"'”’)\]]*$") & ~words["norm_word"].isin(ABBREVIATIONS)
    words["sentence"] = ends.cumsum().shift(fill_value=0).astype(int)
    words["pos"] = parts_of_speech(words, Path(pos)) if pos else ""
    words["content"] = ["" if not word else "function" if is_function(word) else "content" for word in words["norm_word"]]
    onset = words["start"].dropna()
    if not len(onset):
        raise ValueError(f"{path}: no word has an onset (column 'start')")
    odd = {"words": len(words), "without_onset": int(words["start"].isna().sum()), "same_onset_as_another": int(onset.duplicated().sum()),
           "before_the_word_before": int((onset.diff() < 0).sum()), "sentences": int(words["sentence"].iloc[-1]) + 1}
    return words, odd


def parts_of_speech(words, path):
    """Part of speech of each word ('' where unknown) out of another table of the same podcast: matched by word and onset (to 10 ms)."""
    if not path.is_file():
        raise FileNotFoundError(f"pos={path} does not exist: give a CSV or TSV with columns word, start and pos")
    table = read_table(path, ["word", "start", "pos"], missing=("start",))
    key = lambda t: list(zip(t["word"].map(normalised), t["start"].fillna(-1).mul(100).round().astype(int)))
    known = dict(zip(key(table), table["pos"].astype(str)))
    found = [known.get(k, "") for k in key(words)]
    if not any(found):
        raise ValueError(f"{path} knows none of the transcript's words at their onsets: it is of another recording")
    return found


def layer_keys(file, path, layers):
    """Names of the datasets of a features.hdf5 that are wanted: its layers among `layers`, or all that it has when it has none."""
    have = sorted((key for key in file if key.startswith("layer-")), key=lambda key: int(key.split("-")[1]))
    if not have:
        return sorted(file)
    if lacks := [n for n in layers if f"layer-{n}" not in have]:
        raise ValueError(f"{path} has no layer {lacks[0]}, only {', '.join(key[6:] for key in have)}: choose among them with layers=")
    return [f"layer-{n}" for n in layers]


def read_features(root, name, layers, words):
    """Tokens of released features (DataFrame: word_idx, token_id, token, true_prob, rank, entropy, top_pred where known) and {key: (tokens, dims) float32}."""
    import h5py
    path = need(root, [f"stimuli/{name}/transcript.tsv"], f"leave '{name}' out of features=, or complete the copy")
    table = read_table(path, ["word_idx"], missing=("start", "end", "true_prob", "entropy")).rename(columns={"hftoken": "token"})
    tokens = table[[c for c in ("word_idx", "token_id", "token", "true_prob", "rank", "entropy", "top_pred") if c in table]]
    if not tokens["word_idx"].between(0, len(words) - 1).all():
        raise ValueError(f"{path} counts words up to {tokens['word_idx'].max()}, the transcript has {len(words)}: they are of different snapshots")
    if "word" in table:
        theirs, ours = table["word"].map(normalised).to_numpy(), words["norm_word"].to_numpy()[table["word_idx"]]
        wrong = np.flatnonzero(theirs != ours)
        if len(wrong) > 0.01 * len(table):
            raise ValueError(f"{path}, row {wrong[0] + 1}: word {table['word_idx'][wrong[0]]} is '{theirs[wrong[0]]}', in the transcript it is "
                             f"'{ours[wrong[0]]}' ({len(wrong)} such rows): they are of different snapshots")
    arrays, whole = {}, here(root, [f"stimuli/{name}/features.hdf5"])
    for file_path in [whole] if whole else sorted(path.parent.glob("features_*.hdf5")):  # a whole copy, or the layers that were fetched
        try:
            with h5py.File(file_path, "r") as file:
                keys = layer_keys(file, file_path, layers) if whole else [key for key in file if not key.startswith("layer-") or int(key[6:]) in layers]
                arrays |= {key: np.asarray(file[key], np.float32) for key in keys}
        except OSError as e:
            raise ValueError(f"{file_path} is no whole HDF5 file ({e}): fetch it again") from None
    if not arrays:
        need(root, [f"stimuli/{name}/features.hdf5"], f"leave '{name}' out of features=, or complete the copy")
    for key, array in arrays.items():
        if array.ndim != 2 or len(array) != len(tokens):
            raise ValueError(f"stimuli/{name}: {key} has the shape {array.shape} where {path.name} has {len(tokens)} tokens")
    return tokens, arrays


def loudness(path, sfreq):
    """(n,) float32: root mean square of the audio (full scale 1, channels together) in [k, k + 1) / sfreq seconds."""
    from scipy.io import wavfile
    try:
        rate, audio = wavfile.read(path, mmap=True)  # (T,) or (T, channels)
    except Exception as e:  # scipy raises whatever its parser stumbles over
        raise ValueError(f"{path} is no whole WAV file ({e}): fetch it again, or give audio_sfreq=0") from None
    if sfreq > rate:
        raise ValueError(f"audio_sfreq={sfreq} is above the {rate} Hz of {path}")
    edges = np.round(np.arange(int(len(audio) * sfreq / rate) + 1) * rate / sfreq).astype(np.int64)
    scale = np.iinfo(audio.dtype).max if audio.dtype.kind == "i" else 1.0
    power = np.empty(len(edges) - 1)
    for a in range(0, len(power), 1000):  # ten seconds at a time
        b = min(a + 1000, len(power))
        square = (audio[edges[a]:edges[b]].astype(np.float64) / scale) ** 2
        power[a:b] = np.add.reduceat(square.reshape(len(square), -1).mean(1), edges[a:b] - edges[a]) / np.diff(edges[a:b + 1])
    return np.sqrt(power).astype(np.float32)


# ---- electrodes

def subject_ids(root, wanted, kind):
    """['sub-03', ...] and {nyu_id: 'sub-03', ...}: the wanted subjects, or all that have a signal. Raises in a sentence that says which there are."""
    path = need(root, ["participants.tsv"])
    table = read_table(path, ["participant_id"])
    known = table["participant_id"].astype(str).tolist()
    have = [sub for sub in known if here(root, signal_names(sub, kind))]
    for sub in (subs := [f"sub-{n:02d}" for n in wanted] or have):
        if sub not in known:
            raise ValueError(f"{path} has no {sub}, only {', '.join(known)}: choose among them with subjects=")
        if sub not in have:
            need(root, signal_names(sub, kind), f"with signal={kind} it has {', '.join(have) or 'nobody'}; complete the copy, or leave root= out to fetch it")
    if not subs:
        need(root, signal_names(known[0], kind), f"nobody of {', '.join(known)} has a file for signal={kind}; complete the copy, or choose another signal=")
    return subs, dict(zip(table["nyu_id"].astype(str), known)) if "nyu_id" in table else {}


def electrode_table(path, nyu):
    """{subject: [electrode, ...]} of a CSV with columns subject and elec, a subject being sub-03, 3 or the nyu_id of participants.tsv."""
    if not path.is_file():
        raise FileNotFoundError(f"electrodes={path} does not exist: give a CSV with columns subject and elec, or a regular expression")
    table = read_table(path, ["subject", "elec"])
    subject = table["subject"].astype(str).map(lambda s: nyu.get(s) or (f"sub-{int(s):02d}" if s.isdigit() else s))
    return table["elec"].astype(str).groupby(subject).agg(list).to_dict()


def chosen(names, sub, electrodes, nyu):
    """Those of `names` that electrodes= asks for, in their order, and which names of a table the recording does not have."""
    if not electrodes.endswith(".csv"):
        return [name for name in names if re.match(electrodes, name)], []
    listed = electrode_table(Path(electrodes), nyu).get(sub, [])
    return [name for name in names if name in listed], [name for name in listed if name not in names]


def said(names):
    """'LGA (64), LGB (63)': names by what stands before their number, for a message."""
    return ", ".join(f"{stem or 'no letters'} ({n})" for stem, n in Counter(re.sub(r"\d+$", "", name) for name in names).items())


def positions(root, sub, space):
    """{name: (x, y, z) in m} of electrodes.tsv; {} when there is none. BIDS gives mm, and a sidecar may say so; a metre-sized head is refused."""
    path = here(root, [f"{sub}/ieeg/{sub}_space-{space}_electrodes.tsv"])
    if path is None:
        return {}
    table = read_table(path, ["name", "x", "y", "z"], missing=("x", "y", "z"))
    sidecar = here(root, [f"{sub}/ieeg/{sub}_space-{space}_coordsystem.json"])
    try:
        unit = json.loads(sidecar.read_text(encoding="utf-8")).get("iEEGCoordinateUnits", "") if sidecar else ""
    except ValueError:
        raise ValueError(f"{sidecar} is not JSON: fetch it again, or remove it") from None
    far = np.nanmax(np.abs(table[["x", "y", "z"]].to_numpy()), initial=0)
    scale = {"m": 1.0, "cm": 1e-2, "mm": 1e-3}.get(unit, 1e-3 if far > 1 else 1.0)
    if far * scale > 0.3:
        raise ValueError(f"{path}: an electrode {far * scale:.2f} m from the origin (unit '{unit or 'unknown'}' of the sidecar) is in nobody's head")
    return dict(zip(table["name"].astype(str), map(tuple, table[["x", "y", "z"]].to_numpy() * scale)))


# ---- recordings

def open_raw(path):
    """MNE Raw of a FIF or EDF file, not loaded. Raises ValueError when the file is not whole."""
    import mne
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of how others name their files
            warnings.filterwarnings("error", "Number of records", RuntimeWarning)  # a torn EDF is read with a warning,
            if path.suffix == ".fif" and file.seek(-4, os.SEEK_END) and file.read() != b"\xff" * 4:  # a torn FIF without one: no last tag
                raise EOFError("its end is missing")
            raw = (mne.io.read_raw_edf if path.suffix == ".edf" else mne.io.read_raw_fif)(path, preload=False, verbose="warning")
            raw.get_data(start=max(0, raw.n_times - 1), verbose="error")
        return raw
    except Exception as e:  # MNE raises whatever its parser stumbles over
        said = f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"
        raise ValueError(f"{path} is not a whole {path.suffix[1:].upper()} file ({said}): fetch it again") from None


def make_recording(root, folder, sub, words, nyu, config, synthetic):
    """Write one subject as a recording and return its meta."""
    path = need(root, signal_names(sub, config.signal))
    raw = open_raw(path)
    bids = read_table(need(root, [f"{sub}/ieeg/{sub}_task-podcast_channels.tsv"]), ["name", "type", "status"])
    bids["name"] = bids["name"].astype(str)
    bids = bids.drop_duplicates("name").set_index("name")
    kinds = {name: str(bids["type"].get(name, kind)).lower() for name, kind in zip(raw.ch_names, raw.get_channel_types())}
    brain = [name for name in raw.ch_names if kinds[name] in BRAIN]
    bad = [name for name in brain if name in raw.info["bads"] or bids["status"].get(name) == "bad"]
    names, unknown = chosen(brain, sub, config.electrodes, nyu)
    asked = len(names)
    if config.bads == "drop":
        names = [name for name in names if name not in bad]
    if not names:
        why = f"{asked} match, all of them bad (bads=mark keeps them)" if asked else "none of its names match"
        raise ValueError(f"electrodes={config.electrodes} leaves nothing of {sub}, {why}: it has {said(n for n in brain if n not in bad)}")
    if unknown:
        print(f"{sub}: not in the recording, but in {config.electrodes}: {', '.join(unknown)}", flush=True)
    xyz = positions(root, sub, config.space)
    channels = pd.DataFrame([dict(name=name, type=kinds[name], **dict(zip("xyz", xyz.get(name, (np.nan,) * 3))), status="bad" if name in bad else "good")
                             for name in names])
    extra = bids.reindex(names).drop(columns=["type", "status"]).reset_index(drop=True)
    channels = pd.concat([channels, extra[[c for c in extra if c not in channels]]], axis=1)
    heard = words[np.isfinite(words["start"])]
    events = pd.DataFrame({"onset": heard["start"], "duration": (heard["end"] - heard["start"]).clip(lower=0).fillna(0)}
                          | {c: heard[c] for c in ("word", "norm_word", "word_idx")})
    sfreq, step = float(raw.info["sfreq"]), round(30 * raw.info["sfreq"])
    rows = np.round(heard["start"].to_numpy() * sfreq) - raw.first_samp

    def blocks():
        for a in tqdm(range(0, raw.n_times, step), sub, leave=False, disable=None):
            block = raw.get_data(names, a, min(a + step, raw.n_times), verbose="error").T  # (t, C), in the order of `names`
            if not np.isfinite(block).all():
                wrong = names[np.flatnonzero(~np.isfinite(block).all(0))[0]]
                raise ValueError(f"{path}: {wrong} has samples that are no numbers between {a / sfreq:.0f} and {a / sfreq + 30:.0f} s: leave it out with "
                                 "electrodes=, or mark it bad in channels.tsv")
            yield block

    return write_recording(
        folder / sub, blocks(), channels, events, sfreq=sfreq, unit="V", subject=sub, first_sample=raw.first_samp, synthetic=synthetic,
        source=str(path.relative_to(root)), kind=config.signal, space=config.space if xyz else "unknown",
        nyu_id=next((number for number, s in nyu.items() if s == sub), ""), electrodes=len(names), electrodes_in_file=len(brain),
        located=int(np.isfinite(channels["x"]).sum()), bad_electrodes=bad,
        dropped={"bad": asked - len(names), "not_selected": len(brain) - asked, "not_in_file": unknown, "words_without_onset": len(words) - len(heard)},
        events_outside=int(((rows < 0) | (rows >= raw.n_times)).sum()))


# ---- main

def main(config):
    folder = Path(config.out_dir) if config.out_dir else HERE
    options = {key: value for key, value in asdict(config).items() if key not in ("subjects", "root", "url", "out_dir", "overwrite")}
    kept = []
    if not config.overwrite and complete(folder):
        made = read_set(folder).get("options") or {}
        if differs := [key for key in options if made.get(key) != options[key]]:
            raise ValueError(f"{folder} was made with {differs[0]}={made.get(differs[0])}: give overwrite=True to make it again with "
                             f"{differs[0]}={options[differs[0]]}, or another out_dir")
        kept = read_set(folder)["recordings"]
    if where := config.root or os.environ.get("PODCAST_ROOT", ""):
        root = local_root(where)
        subs, nyu = subject_ids(root, config.subjects, config.signal)
    else:
        root, subs = folder / "ds005574", [f"sub-{n:02d}" for n in config.subjects]
        if not subs and not kept:
            raise ValueError("subjects= says whom to fetch (1 to 9, 0.3 to 1 GB each; subjects=3 say), or root= where a local copy of ds005574 is")
    if set(subs) <= set(kept):
        print(f"{folder} has {', '.join(kept)} already (overwrite=True makes them again)")
        return
    if not where:
        root.mkdir(parents=True, exist_ok=True)
        fetch_all(root, config.url, subs, config)
        subs, nyu = subject_ids(root, config.subjects, config.signal)
    if config.electrodes.endswith(".csv") and not config.subjects:
        listed = electrode_table(Path(config.electrodes), nyu)
        if not set(subs) & set(listed):
            raise ValueError(f"{config.electrodes} lists electrodes of {', '.join(listed)}, and {root} has {', '.join(subs)}: nobody is in both")
        subs = [sub for sub in subs if sub in listed]
    described = here(root, ["dataset_description.json"])
    try:
        described = json.loads(described.read_text(encoding="utf-8")) if described else {}
    except ValueError:
        raise ValueError(f"{described} is not JSON: fetch it again") from None
    synthetic = bool(described.get("Synthetic", False))

    words, odd = read_words(need(root, ["stimuli/podcast_transcript.csv"]), config.pos)
    tables, arrays = {"words.csv": words}, {}
    meta = {"words": "words.csv", "tokens": {}, "features": {}, "arrays": {}}
    for name in config.features:
        tokens, layers = read_features(root, name, config.layers, words)
        meta["tokens"][name] = "tokens.csv" if name == "gpt2-xl" else f"{name}_tokens.csv"
        tables[meta["tokens"][name]] = tokens
        for key, array in layers.items():
            short = np.abs(array).max(initial=0) < 6e4  # half precision holds it
            file = f"{name}_{key}.f{'16' if short else '32'}"
            arrays[file] = array.astype("<f2" if short else "<f4")
            meta["features"].setdefault(name, {})[key] = file
            meta["arrays"][file] = {"shape": list(array.shape), "dtype": "float16" if short else "float32"}
    if config.audio_sfreq:
        arrays["audio.f32"] = loudness(need(root, ["stimuli/podcast.wav"], "complete the copy, or give audio_sfreq=0"), config.audio_sfreq).astype("<f4")
        meta["audio"] = {"file": "audio.f32", "sfreq": config.audio_sfreq, "samples": len(arrays["audio.f32"]), "what": "root mean square, full scale 1; "
                         "sample k is of [k, k + 1) / sfreq s on the clock of the onsets"}

    folder.mkdir(parents=True, exist_ok=True)
    if kept and (folder / "words.csv").read_text(encoding="utf-8") != words.to_csv(index=False):
        raise ValueError(f"{folder} was made with another transcript than {root} has: give overwrite=True to make all of it again, or another out_dir")
    if not kept:
        (folder / "meta.yaml").unlink(missing_ok=True)
    for name, table in tables.items():
        with aside(folder / name) as file:
            file.write(table.to_csv(index=False).encode())
    for name, array in arrays.items():
        with aside(folder / name) as file:
            file.write(array.tobytes())
    for sub in subs:
        if sub not in kept:
            one = make_recording(root, folder, sub, words, nyu, config, synthetic)
            print(f"{sub}: {one['electrodes']} of {one['electrodes_in_file']} electrodes ({len(one['bad_electrodes'])} bad, {one['located']} located), "
                  f"{one['samples'] / one['sfreq']:.0f} s at {one['sfreq']:g} Hz, {one['events_outside']} words outside", flush=True)
    write_set(folder, sorted({*kept, *subs}), synthetic=synthetic, **meta, transcript=odd, options=options,
              source=described.get("Name", "OpenNeuro ds005574"), licence=described.get("License", "see the dataset's own description (OpenNeuro ds005574)"),
              **({"planted": described["Planted"]} if "Planted" in described else {}))
    print(f"{folder}: {', '.join(sorted({*kept, *subs}))}; {odd['words']:,} words, {odd['without_onset']} without onset"
          + "".join(f", {name} {', '.join(keys)}" for name, keys in meta["features"].items()) + (", synthetic" if synthetic else ""))


if __name__ == "__main__":
    main(configure(Config))
