"""Reader of BIDS folders and of every recording that MNE reads.

`find_recordings` lists the recordings of a BIDS folder, `open_raw` opens one as its sidecars
describe it, and `convert_files` converts a folder of any files to recordings (data/recording.py).
A dict of notes collects what was changed. Files that cannot be read correctly are refused.
"""

import csv
import hashlib
import json
import re
import warnings
from pathlib import Path

import mne
import mne_bids
import numpy as np
import pandas as pd

from data import InputError, check_content, column, files_state, read_table, read_text
from data.recording import SENSOR_UNITS, Recording, channel_positions, write_raw

BIDS_ENDINGS = (".vhdr", ".edf", ".bdf", ".set", ".fif", ".ds")
READABLE = (*BIDS_ENDINGS, ".fif.gz", ".gdf", ".cnt", ".mff", ".nwb")
NOT_RAW = (
    r"(^|/)(derivatives|sourcedata|code|\.[^/]*)/"
    r"|[-_](epo|ave|cov|fwd|inv|src|trans|ica|eve|proj|sol|bem|annot)\.fif(\.gz)?$"
)
NUMBERED = r"(-\d+\.fif(\.gz)?|_split-0*([2-9]|\d\d+)_.*)$"  # perhaps later parts of another file
# Kinds of sensors, one kind per recording: their channel types in MNE, and the range of the SD
# within a second (V, T, T/m) that a brain can produce.
SENSORS = {
    "eeg": (("eeg",), 1e-9, 1e-3),
    "ieeg": (("ecog", "seeg", "dbs"), 1e-9, 1e-2),
    "mag": (("mag",), 1e-17, 1e-9),
    "grad": (("grad",), 1e-16, 1e-8),
}
FOLDERS = {"meg": ("mag", "grad"), "ieeg": ("ieeg",)}  # kinds that these folders give first
# Channel types that channels.tsv may set; those of MEG are in the file.
CHANNEL_TYPES = ("eeg", "ecog", "seeg", "dbs", "eog", "ecg", "emg", "stim")
TYPE_NAMES = {"veog": "eog", "heog": "eog", "trig": "stim"}
VOLTS = {"v": 1.0, "mv": 1e-3, "uv": 1e-6, "nv": 1e-9}
METRES = {"m": 1.0, "cm": 1e-2, "mm": 1e-3}
# BIDS coordinate systems with x to the nose and y to the left; in the others x is to the right.
NOSE_FIRST = ("EEGLAB", "EEGLAB-HJ", "CTF", "4DBti", "KitYokogawa")
# Annotations and rows of events.tsv that mark segments, as MNE, EEGLAB and BrainVision call them.
SEGMENT = re.compile(r"(BAD|EDGE)(?![A-Z])|(bad|edge)[_ ]|Bad[_ ]|boundary$|New Segment")


# ---- tables and sidecars


def read_tsv(path, *columns):
    """Return a BIDS table with these columns as stripped text, NaN for n/a and empty cells.
    Quotation marks belong to the text, unless they enclose a cell or the header has some."""
    header = check_content(path).read_bytes().split(b"\n", 1)[0]
    quoting = csv.QUOTE_MINIMAL if b'"' in header else csv.QUOTE_NONE
    options = {"sep": "\t", "dtype": str, "na_values": ["n/a", ""], "quoting": quoting}
    table = read_table(path, columns, **options)
    for name in table:
        text = table[name].str.strip().str.replace('^"([^"]*)"$', r"\1", regex=True)
        table[name] = text.mask(text.isin(["n/a", ""]))
    return table


def read_json(path):
    """Return the content of a JSON file, {} for None. Raises InputError."""
    if path is None:
        return {}
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error})") from None


def read_facts(path):
    """Return a JSON sidecar as a dict, {} for None. Raises InputError."""
    facts = read_json(path)
    if not isinstance(facts, dict):
        raise InputError(f"{path} is not a JSON object: a sidecar consists of keys and values")
    return facts


def numbers(table, name, path):
    """Return a column as floats, NaN where it is empty or says nan. Raises InputError."""
    text = column(table, path, name).str.strip()
    text = text.str.replace(r"^([-+]?\d+),(\d+)$", r"\1.\2", regex=True)  # decimal commas
    text = text.mask(text.str.lower().isin(["nan", "na", "n/a", "none", ""]))
    values = pd.to_numeric(text, errors="coerce")
    wrong = table[name][values.isna() & text.notna()]
    if len(wrong):
        row = wrong.index[0]
        raise InputError(f"{path}: {name} '{wrong[row]}' in row {row + 1} is not a number")
    return values.astype(float)


def sidecar(path, root, suffix):
    """Return the nearest sidecar of a recording, searching upwards to root, or None: by BIDS'
    inheritance, a file such as sub-01_channels.tsv or a plain channels.tsv, all of whose entities
    are the recording's."""
    path = Path(path)
    entities = {"", *path.stem.split("_")}
    for folder in path.parents:
        matches = []
        for file in sorted(folder.glob(f"*{suffix}")):
            extra = set(file.name.removesuffix(suffix).split("_")) - entities
            if all(entity.startswith("space-") for entity in extra):
                matches.append(file)
        if matches:
            return max(matches, key=lambda file: len(file.name))
        if folder == Path(root):
            return None
    return None


# ---- finding recordings


def find_recordings(root, subjects=(), task="", sensors=""):
    """Return [(name, path)] of the raw recordings in a BIDS folder, named sub-01 or sub-01_run-1.
    Raises InputError for subjects without a recording."""
    subjects = find_subjects(root, subjects)
    datatypes = {"": ("eeg", "meg", "ieeg"), "eeg": ("eeg", "meg"), "ieeg": ("ieeg",)}
    for datatype in datatypes.get(sensors, ("meg",)):
        paths = _find_paths(root, subjects, datatype, task)
        if paths:
            break
    wanted = datatype if paths else sensors or "eeg, meg or ieeg"
    wanted += f" and task {task}" if task else ""
    for subject in subjects:
        if not any(path.name.startswith(f"sub-{subject}_") for path in paths):
            missing = f"no recording of {wanted} ({', '.join(BIDS_ENDINGS)})"
            raise InputError(f"{root}/sub-{subject} has {missing}: leave it out with subjects=")
    return list(zip(_names(paths), paths))


def find_subjects(root, names=()):
    """Return the subjects in a folder that names such as sub-01, 01 or 1 mean; all for no names."""
    folders = [path.name for path in sorted(Path(root).glob("sub-*")) if path.is_dir()]
    all_subjects = [name[4:] for name in folders if name != "sub-emptyroom"]
    if not all_subjects:
        raise InputError(f"root={root} is no BIDS folder: give the one with sub-01, sub-02, ...")
    subjects = []
    for name in names:
        name = name.removeprefix("sub-")
        matches = [subject for subject in all_subjects if subject.lstrip("0") == name.lstrip("0")]
        if name not in all_subjects and len(matches) != 1:
            raise InputError(f"{root} has no sub-{name}; it has {', '.join(all_subjects)}")
        subjects.append(name if name in all_subjects else matches[0])
    return subjects or all_subjects


def _find_paths(root, subjects, datatype, task):
    """Return the recordings of one datatype; of a split FIF recording only the first part."""
    for subject in subjects:
        for path in Path(root).glob(f"sub-{subject}/**/*_{datatype}.*"):
            check_content(path)  # mne-bids skips dangling links
    matches = mne_bids.find_matching_paths(
        root,
        subjects=subjects,
        tasks=task or None,
        suffixes=datatype,
        extensions=[*BIDS_ENDINGS, ".EDF", ".BDF"],
        datatypes=datatype,
        ignore_nosub=True,
    )
    paths = []
    for path in matches:
        is_first = path.split in (None, "01", "1")
        if is_first and path.acquisition not in ("crosstalk", "calibration"):
            paths.append(Path(path.fpath))
    return paths


def _names(paths):
    """Name recordings by their subject and the entities that differ within any subject. Raises
    InputError for files that differ only in format or processing (proc-sss)."""
    rows = []
    for path in paths:
        row = {part.split("-")[0]: part for part in path.stem.split("_")[:-1]}
        row.pop("split", None)
        row.pop("proc", None)
        rows.append(row)
    differs = pd.DataFrame(rows).groupby("sub").nunique(dropna=False).max() > 1
    names = []
    for row in rows:
        names.append("_".join(part for key, part in row.items() if differs.get(key, True)))
        if names.count(names[-1]) > 1:
            raise InputError(f"{names[-1]} exists in two formats, or as raw and proc-: keep one")
    return names


# ---- opening a recording


def open_raw(path, root, sensors=""):
    """Return an MNE Raw with one kind of sensors, and notes of what was changed. Raises InputError.

    Types, units and bad channels come from channels.tsv, positions from electrodes.tsv. sensors: a
    key of SENSORS, or "" for that of the folder, else the first present.
    """
    path = Path(path)
    notes = {}
    files_of(path)
    try:
        raw = mne.io.read_raw(path, verbose="error")
    except Exception as error:  # each format has its own errors for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read by MNE ({reason}): is it complete?") from None
    shows_gaps = path.suffix == ".fif"
    if path.suffix.lower() in (".edf", ".bdf"):
        raw, shows_gaps = _mend_edf(raw, path)
    _check_length(raw, path, sidecar(path, root, f"{path.stem.split('_')[-1]}.json"), shows_gaps)
    stated = _read_channels(raw, path, sidecar(path, root, "channels.tsv"))
    _pick_sensors(raw, path, sensors, notes)
    _set_units(raw, path, stated, notes)
    electrodes = sidecar(path, root, "electrodes.tsv")
    if electrodes:
        _read_electrodes(raw, electrodes, sidecar(path, root, "coordsystem.json"), notes)
    return raw, notes


def files_of(path):
    """Return all files of a recording: header, data, markers. Raises InputError."""
    files = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.stem}.*")
    return [check_content(file) for file in sorted(files)]


def made_of(path, root):
    """Return hashes of a recording's sidecars and files, which change when a file is replaced."""
    digest = hashlib.sha256()
    tables = ("events.tsv", "channels.tsv", "electrodes.tsv", "coordsystem.json")
    for name in (*tables, f"{path.stem.split('_')[-1]}.json"):
        file = sidecar(path, root, name)
        digest.update(check_content(file).read_bytes() if file else b"")
    return f"{digest.hexdigest()[:16]} {files_state(files_of(path))}"


def converted(folder, options, overwrite=False):
    """Return the complete Recording that was made with these options, or None."""
    try:
        recording = Recording(folder)
    except (ValueError, OSError):
        return None
    if overwrite or recording.meta.get("options") != options:
        return None
    print(f"{folder.name}: already exists", flush=True)
    return recording


def _check_length(raw, path, described, shows_gaps):
    """Refuse a truncated file, and one with gaps that its format cannot show."""
    facts = read_facts(described)
    if facts.get("RecordingType") == "discontinuous" and not shows_gaps:
        raise InputError(
            f"{path} is discontinuous, says {described.name}, and the file does not tell where: "
            "convert it to FIF or EDF+D, or correct RecordingType if onsets count the file's time"
        )
    stated = facts.get("RecordingDuration")
    seconds = raw.n_times / raw.info["sfreq"]
    if isinstance(stated, (int, float)) and seconds < 0.99 * stated - 1:
        lengths = f"{seconds:.0f} s long where {described.name} says {stated:.0f}"
        raise InputError(f"{path} is {lengths}: it is truncated, fetch it again")


def _mend_edf(raw, path):
    """Return the Raw of an EDF or BDF in real time, and whether the file shows its gaps. Channels
    of several rates are loaded: MNE resamples them, and reading in blocks would leave seams."""
    with open(path, "rb") as file:
        head = file.read(256)
        n_signals = int(head[252:256])
        fields = file.read(256 * n_signals)
    labels = np.char.strip(np.frombuffer(fields, "S16", n_signals))
    n_samples = np.frombuffer(fields, "S8", n_signals, offset=216 * n_signals).astype(int)
    is_text = np.char.endswith(labels, b" Annotations")
    if len(set(n_samples[~is_text])) > 1:
        raw.load_data(verbose="error")
    if head[192:197] not in (b"EDF+D", b"BDF+D"):
        return raw, False
    return _fill_gaps(raw, path, _read_stamps(path, head, is_text, n_samples)), True


def _read_stamps(path, head, is_text, n_samples):
    """Return the onset (s) of each record of an interrupted EDF+ or BDF+, with which its first
    annotation signal begins, such as +50.0."""
    if not is_text.any():
        raise InputError(f"{path} is interrupted and does not tell when: convert it to FIF")
    first = is_text.argmax()
    width = 2 if head[:1] == b"0" else 3  # bytes
    ends = np.cumsum(n_samples) * width
    records = np.memmap(path, np.uint8, "r", offset=int(head[184:192]))
    records = records[: len(records) // ends[-1] * ends[-1]].reshape(-1, ends[-1])
    start = ends[first] - n_samples[first] * width
    texts = np.ascontiguousarray(records[:, start : start + 32]).view("S32")[:, 0]
    return np.char.partition(texts, b"\x14")[:, 0].astype(float)


def _fill_gaps(raw, path, stamps):
    """Return a Raw in real time, 0 and annotated BAD in the gaps. stamps: onsets (s) of records."""
    sfreq = raw.info["sfreq"]
    width = raw.n_times // len(stamps)
    starts = np.round((stamps - stamps[0]) * sfreq).astype(int)
    gaps = np.flatnonzero(np.diff(starts) > width + 1)  # records before a gap
    if not len(gaps):
        return raw
    signal = np.zeros((len(raw.ch_names), starts[-1] + width))
    for first, last in zip([0, *gaps + 1], [*gaps, len(starts) - 1]):
        n = min((last - first + 1) * width, signal.shape[1] - starts[first])
        block = raw.get_data(start=first * width, stop=first * width + n)
        signal[:, starts[first] : starts[first] + n] = block
    begin = (starts[gaps] + width) / sfreq
    end = starts[gaps + 1] / sfreq
    annotations = mne.read_annotations(path)
    annotations.append(begin, end - begin, "BAD_ACQ_SKIP")
    filled = mne.io.RawArray(signal, raw.info, verbose="error")
    filled._orig_units = raw._orig_units
    return filled.set_annotations(annotations, verbose="error")


def _read_channels(raw, path, channels):
    """Set the types and bad channels of channels.tsv; returns its units in V, None without any."""
    if channels is None:
        if path.parent.name == "ieeg":  # most formats call every channel EEG
            contacts = [raw.ch_names[i] for i in mne.pick_types(raw.info, eeg=True)]
            raw.set_channel_types(dict.fromkeys(contacts, "seeg"), verbose="error")
        return None
    table = read_tsv(channels, "name").dropna(subset="name").drop_duplicates("name")
    table = table.set_index("name")
    for name, kind in zip(raw.ch_names, raw.get_channel_types()):
        if name not in table.index and kind != "stim":
            raise InputError(f"{channels} does not name the channel '{name}' of {path.name}")
    table = table.reindex(raw.ch_names).fillna("n/a")
    if "type" in table:
        types = table["type"].str.lower().replace(TYPE_NAMES)
        types = types[~types.str.startswith(("meg", "hlu", "n/a"))]
        types = types.where(types.isin(CHANNEL_TYPES), "misc")
        raw.set_channel_types(types.to_dict(), verbose="error")
    if "status" in table:
        raw.info["bads"] = table.index[table["status"].str.lower() == "bad"].tolist()
    return table["units"].map(volts) if "units" in table else None


def volts(unit):
    """Return a unit such as µV or microvolt in volts, NaN if it is not a unit of voltage."""
    short = unit.strip().lower().replace("micro", "u").replace("volts", "v").replace("volt", "v")
    return VOLTS.get(re.sub("[µμ]", "u", short), np.nan)


def _pick_sensors(raw, path, sensors, notes):
    """Keep the channels of one kind of sensors."""
    types = pd.Series(raw.get_channel_types())
    counts = {}
    for kind, (channel_types, *_) in SENSORS.items():
        if types.isin(channel_types).any():
            counts[kind] = int(types.isin(channel_types).sum())
    kinds = list(counts)
    if path.parent.name in FOLDERS:  # MEG and iEEG folders may hold EEG as well
        kinds.sort(key=lambda kind: kind not in FOLDERS[path.parent.name])
    if not kinds or sensors not in ("", *kinds):
        wanted = sensors or "eeg, ieeg, mag (MEG) or grad (MEG)"
        present = ", ".join(sorted(set(types)))
        raise InputError(
            f"{path} has no channel of type {wanted}, only {present}: see channels.tsv"
        )
    notes["sensors"] = sensors or kinds[0]
    raw.pick(list(SENSORS[notes["sensors"]][0]), exclude=())
    del counts[notes["sensors"]]
    notes["other_sensors"] = counts


def _set_units(raw, path, stated, notes):
    """Scale a Raw to V, T or T/m: by the file's unit, or if that is missing or impossible, by
    `stated`, the (C,) units of channels.tsv in V (NaN: none). Channels of a size that no brain
    produces are bad; if most are, raises InputError."""
    _, low, high = SENSORS[notes["sensors"]]
    in_file = pd.Series(raw._orig_units, dtype=object).reindex(raw.ch_names).fillna("V").map(volts)
    ratio = np.ones(len(in_file))
    if stated is not None:
        ratio = (stated / in_file.fillna(1.0)).reindex(raw.ch_names).fillna(1.0).to_numpy()
    sd = sd_within_seconds(raw)
    if not np.isfinite(sd).any():
        return  # flat
    factor = np.where(in_file.isna(), ratio, 1.0)
    if not low <= np.nanmedian(sd * factor) <= high:
        factor = ratio
    sd = sd * factor
    wrong = (sd < low) | (sd > high)  # flat channels are NaN
    if 2 * wrong.sum() >= np.isfinite(sd).sum():
        size = np.nanmedian(sd[wrong])
        unit = SENSOR_UNITS.get(raw.get_channel_types()[0], "V")
        raise InputError(
            f"{path}: a standard deviation of {size:.2g} {unit} within a second is no brain's "
            f"({low:g} to {high:g}): state the unit (µV, mV, V) in the column units of "
            "channels.tsv, or leave the file out if it is a test signal"
        )
    notes["implausible"] = np.array(raw.ch_names)[wrong].tolist()
    raw.info["bads"] = sorted({*raw.info["bads"], *notes["implausible"]})
    if (factor != 1).any():
        raw.load_data(verbose="error")
        raw.apply_function(lambda x: x * factor[:, None], picks="all", channel_wise=False)
        notes["units"] = "of channels.tsv"
    elif raw._orig_units and (ratio != 1).any():  # formats of MNE and EEGLAB have a fixed unit
        notes["units"] = "of the file, not those of channels.tsv"


def sd_within_seconds(raw, n=60):
    """Return the (C,) median SD within a second, over n seconds; NaN for a flat channel."""
    width = max(2, round(raw.info["sfreq"]))
    sds = []
    for start in np.unique(np.linspace(0, max(0, raw.n_times - width), n).astype(int)):
        sds.append(raw.get_data(start=start, stop=start + width).std(1))
    sds = np.where(np.array(sds) > 0, sds, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of channels that are NaN
        return np.nanmedian(sds, axis=0)


# ---- positions


def bare_name(name):
    """Strip what amplifiers add to channel names: 'EEG Fp1-Ref' → 'Fp1', 'Fc5.' → 'Fc5'."""
    name = re.sub(r"^(EEG|ECOG|SEEG|POL)[\s_-]+", "", name.strip(), flags=re.IGNORECASE)
    name = re.sub(r"[\s_-]+(REF|LE|AR|AVG|CAR|[AM][12]|A1A2|M1M2)$", "", name, flags=re.IGNORECASE)
    return name.strip(" .")


def match_names(names, known_names):
    """Return {name: its spelling in known_names}, ignoring case and what amplifiers add."""
    spelling = {name.lower(): name for name in known_names}
    matched = {}
    for name in sorted(names, key=lambda name: name.lower() not in spelling):
        for form in (name, bare_name(name)):
            match = spelling.get(form.lower())
            if match and match not in matched.values():
                matched[name] = match
                break
    return matched


def _rename(raw, known_names, notes):
    """Rename the channels that differ from known_names by more than their case."""
    renamed = {}
    for name, match in match_names(raw.ch_names, known_names).items():
        if name.lower() != match.lower():
            renamed[name] = match
    if renamed:
        raw.rename_channels(renamed, verbose="error")
        notes["renamed"] = notes.get("renamed", {}) | renamed


def set_places(raw, montage, notes):
    """Give EEG electrodes the positions of their names in one of MNE's montages. Contacts in the
    brain may have the same names (F3, C4) and are left alone."""
    if "eeg" not in raw:
        return
    try:
        standard = mne.channels.make_standard_montage(montage)
    except ValueError:
        montages = ", ".join(mne.channels.get_builtin_montages())
        raise InputError(f"montage='{montage}' is none of MNE's: {montages}") from None
    _rename(raw, standard.ch_names, notes)
    raw.set_montage(standard, match_case=False, on_missing="ignore", verbose="error")
    notes["positions"] = montage


def _read_electrodes(raw, electrodes, coordsystem, notes):
    """Set the positions of electrodes.tsv; with landmarks, in MNE's head frame."""
    table = read_tsv(electrodes, "name", "x", "y", "z").dropna(subset="name")
    table = table.drop_duplicates("name")
    facts = read_facts(coordsystem)
    prefix = "iEEG" if notes["sensors"] == "ieeg" else "EEG"
    unit = METRES.get(str(facts.get(f"{prefix}CoordinateUnits")).lower(), 1.0)
    landmark_unit = facts.get("AnatomicalLandmarkCoordinateUnits")
    landmark_unit = METRES.get(str(landmark_unit).lower(), unit)
    axes = np.eye(3)
    if facts.get(f"{prefix}CoordinateSystem") in NOSE_FIRST:
        axes = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    xyz = np.stack([numbers(table, axis, electrodes) for axis in "xyz"], axis=1) @ axes.T * unit
    rows = dict(zip(table["name"], xyz))
    _rename(raw, rows, notes)
    farthest = np.nanmax(np.abs(xyz), initial=0)
    if farthest > 0.5:  # a unit sphere is no head either
        cure = "state the unit of the positions (m, cm, mm) in coordsystem.json"
        raise InputError(f"{electrodes}: an electrode {farthest:.2f} m from the head: {cure}")
    places = {}
    for name, match in match_names(raw.ch_names, rows).items():  # fp1 is Fp1
        if np.isfinite(rows[match]).all():
            places[name] = rows[match]
    landmarks = {}
    stated = facts.get("AnatomicalLandmarkCoordinates")
    for name, bids_name in (("nasion", "NAS"), ("lpa", "LPA"), ("rpa", "RPA")):
        place = stated.get(bids_name) if isinstance(stated, dict) else "n/a"
        place = pd.to_numeric(pd.Series(place), errors="coerce")
        if place.notna().sum() == 3:
            landmarks[name] = axes @ place.to_numpy() * landmark_unit
    if places:
        frame = "unknown" if len(landmarks) == 3 else "head"
        montage = mne.channels.make_dig_montage(places, coord_frame=frame, **landmarks)
        raw.set_montage(montage, on_missing="ignore", verbose="error")


class NoPlaces(InputError):
    """No channel of a recording has a position: a folder of many continues without it."""


def find_places(raw, montage, name, notes, required=True):
    """Use a montage if no channel has a position yet, and note the channels without one. Raises
    NoPlaces if no channel has a position and one is required."""
    unknown = np.isnan(channel_positions(raw)).any(axis=1)
    if unknown.all() and montage not in ("", "none"):
        set_places(raw, montage, notes)
        unknown = np.isnan(channel_positions(raw)).any(axis=1)
    notes["without_position"] = np.array(raw.ch_names)[unknown].tolist()
    if unknown.all() and required:
        names = ", ".join(raw.ch_names[:5])
        cure = "give montage= with these names, or add electrodes.tsv"
        raise NoPlaces(f"{name}: no channel has a position ({names}, ...): {cure}")


# ---- bad segments


def clock_spans(raw):
    """Return the sorted [[begin, end]] (s, on the recording's clock) annotated as bad or joints."""
    spans = []
    for mark in raw.annotations:
        text = mark["description"]
        begin = float(mark["onset"])
        starts_recording = begin <= raw.first_time and not text.lower().startswith("bad")
        length = float(np.nan_to_num(mark["duration"]))
        if text.lower().endswith("boundary"):  # EEGLAB writes how much it cut out
            length = 0.0
        is_span = SEGMENT.match(text) or (text.lower() == "bad" and length > 0)
        concerns_some_channels = mark.get("ch_names")
        if is_span and not starts_recording and not concerns_some_channels:
            spans.append([begin, begin + length])
    return sorted(spans)


def take_segments(raw, table, columns, path):
    """Return the rows of events.tsv that are events; rows that mark segments annotate the Raw."""
    marks = np.zeros(len(table), dtype=bool)
    for name in columns:
        rows = table[name].fillna("").str.match(SEGMENT).to_numpy(bool)
        onset = numbers(table[rows], "onset", path)
        duration = numbers(table[rows], "duration", path) if "duration" in table else 0 * onset
        has_onset = onset.notna()
        begin = onset[has_onset] + raw.first_time
        texts = table[name][rows][has_onset]
        raw.annotations.append(begin, duration[has_onset].fillna(0.0), texts)
        marks |= rows
    return table[~marks]


def inside_spans(begin, end, spans):
    """Return (N,) whether each trial from begin to end (s) overlaps a span or crosses a joint."""
    inside = np.zeros(len(begin), dtype=bool)
    for first, last in spans:
        inside |= (begin < last) & (end >= first)
    return inside


# ---- a folder of files


def raw_files(folder):
    """Return the raw files under a folder, numbered ones last, and the names of skipped files."""
    paths = []
    skipped = []
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not name.lower().endswith(READABLE) or re.search(r"\.(ds|mff)/", name):
            continue
        if re.search(NOT_RAW, name):
            skipped.append(name)
        else:
            paths.append(path)
    paths.sort(key=lambda path: bool(re.search(NUMBERED, path.name)))
    return paths, skipped


def convert_files(folder, out, montage="", sensors="", places=True):
    """Convert every raw file under `folder` to a recording in `out`; returns their folders.

    Recordings of unchanged files are kept. montage: MNE's, for files without positions; places:
    leave out files that still have none.
    """
    targets = []
    later_parts = set()
    reason = None
    paths, skipped = raw_files(folder)
    if skipped:
        print(f"{folder}: not raw data, left out: {', '.join(skipped)}", flush=True)
    for path in paths:
        if path.resolve() in later_parts:
            print(f"{path.name}: read with the first part of its recording", flush=True)
            continue
        if _target(path, folder, out) in targets:
            raise InputError(f"{path} has the name of another file, but for blanks or /: rename it")
        try:
            recording = _convert_file(path, folder, out, montage, sensors, places)
        except NoPlaces as error:
            reason = error
            print(f"left out: {error}", flush=True)
            continue
        targets.append(recording.path)
        for name in recording.meta["files"][1:]:
            later_parts.add(path.with_name(name).resolve())
    if reason and not targets:
        raise reason
    return targets


def _convert_file(path, folder, out, montage, sensors, places):
    """Convert one file, or return the Recording made of it before."""
    target = _target(path, folder, out)
    options = {"montage": montage, "sensors": sensors, "made_of": made_of(path, folder)}
    recording = converted(target, options)
    if recording:
        return recording
    (target / "meta.yaml").unlink(missing_ok=True)
    raw, notes = open_raw(path, folder, sensors)
    find_places(raw, montage, path, notes, places)
    name = path.relative_to(folder)
    subject = re.search(r"sub-([A-Za-z0-9]+)", str(name))
    write_raw(
        target,
        raw,
        pd.DataFrame({"onset": [raw.first_time]}),
        subject=subject[1] if subject else path.name.split(".")[0],
        source=path.name,
        synthetic=False,
        options=options,
        files=[Path(file).name for file in raw.filenames if file],
        bad_spans=clock_spans(raw),
        reading=notes,
    )
    seconds = raw.n_times / raw.info["sfreq"]
    phrases = [f"{len(raw.ch_names)} channels", f"{seconds:.0f} s", *summary(notes)]
    print(f"{name}: {'; '.join(phrases)}", flush=True)
    return Recording(target)


def converted_files(folder, out):
    """Return the folders in `out` of the recordings that convert_files made of a folder."""
    targets = [_target(path, folder, out) for path in raw_files(folder)[0]]
    return [target for target in targets if (target / "meta.yaml").exists()]


def _target(path, folder, out):
    """Return the folder in `out` for the recording of a file."""
    return Path(out) / re.sub(r"[^\w.-]+", "_", str(Path(path).relative_to(folder)))


def summary(notes):
    """Return phrases on what was changed in a file."""
    phrases = []
    renamed = notes.get("renamed", {})
    if renamed:
        name, new = next(iter(renamed.items()))
        phrases.append(f"{len(renamed)} channels renamed as in {name} → {new}")
    for kind, n in notes.get("other_sensors", {}).items():
        phrases.append(f"{n} {kind} channels not read (sensors={kind})")
    if notes.get("segments"):
        phrases.append(f"{notes['segments']} rows mark segments (BAD..., EDGE, boundary)")
    for key in ("units", "edges"):
        if key in notes:
            phrases.append(f"{key} {notes[key]}")
    if notes.get("implausible"):
        names = ", ".join(notes["implausible"])
        phrases.append(f"no brain's size, marked bad (state units in channels.tsv): {names}")
    for key in ("bads", "flat", "nan", "without_position", "left_out"):
        if notes.get(key):
            phrases.append(f"{key.replace('_', ' ')}: {', '.join(notes[key])}")
    return phrases
