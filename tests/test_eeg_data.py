"""EEG as recordings: files of every format with known samples, in the states found in laboratories;
the traps of both THINGS sets; hostile pickles; a synthetic set that contains what it states.
"""

import json
import os
import pickle

import mne
import numpy as np
import pandas as pd
import pytest
import scipy.io

from data import InputError, recording
from data import raw as reader
from data.bids_eeg import prepare as bids
from data.synthetic_eeg import prepare as synthetic
from data.things_eeg1 import prepare as things1
from data.things_eeg2 import prepare as things2
from data.tokens import character_state, encoding, write_dataset
from tests.helpers import prepare, real
from tests.test_fetch import serve

NAMES = ["Fp1", "Cz", "Pz", "Oz"]
AS_IS = {"l_freq": 0.0, "h_freq": 0.0, "reference": "none", "sfreq": 0.0, "bads": "mark"}


# ---- files with known samples


def samples(sfreq=200.0, seconds=20, seed=0):
    """(4, T) V, smooth enough for any filter of the tests."""
    time = np.arange(int(sfreq * seconds)) / sfreq
    rng = np.random.default_rng(seed)
    signal = np.zeros((4, len(time)))
    for frequency in (1, 3, 7):
        signal += np.sin(2 * np.pi * frequency * time + rng.uniform(0, 6, (4, 1)))
    return 1e-5 * signal * rng.uniform(0.5, 1, (4, 1))


def write_edf(  # noqa: PLR0913
    path, data, sfreq, names, *, unit="uV", limit=400, starts=None, slow=0
):
    """EDF or BDF in records of a second; with `starts` (s) of the records, an interrupted EDF+.

    data: (C, T) in µV, or what `unit` calls it; it lies between -limit and limit. slow: how many of
    the last channels have every other sample only.
    """
    is_bdf = path.suffix == ".bdf"
    width = 3 if is_bdf else 2  # bytes
    high = 8388607 if is_bdf else 32767
    per = int(sfreq)
    n_records = data.shape[1] // per
    n_samples = [per] * (len(data) - slow) + [per // 2] * slow
    units = [unit] * len(data) if isinstance(unit, str) else unit
    notes = [] if starts is None else ["EDF Annotations"]
    n_signals = len(data) + len(notes)

    def fixed(size, *values):
        return b"".join(str(value).encode("latin-1").ljust(size)[:size] for value in values)

    header = b"\xffBIOSEMI" if is_bdf else fixed(8, 0)
    header += fixed(160, "") + b"01.01.2000.00.00" + fixed(8, 256 * (n_signals + 1))
    header += fixed(44, "EDF+D" if notes else "") + fixed(8, n_records, 1) + fixed(4, n_signals)
    header += fixed(16, *names, *notes) + fixed(80 * n_signals, "")
    header += fixed(8, *units, *[""] * len(notes))
    for bound in (-limit, limit, -high - 1, high):
        header += fixed(8, *[bound] * n_signals)
    header += fixed(80 * n_signals, "") + fixed(8, *n_samples, *[20] * len(notes))
    header += fixed(32 * n_signals, "")
    scaled = (data[:, : n_records * per] + limit) / (2 * limit) * (2 * high + 1) - high - 1
    digital = np.round(scaled).astype("<i4").reshape(len(data), n_records, per)
    body = b""
    for record in range(n_records):
        for channel, n in enumerate(n_samples):
            block = np.ascontiguousarray(digital[channel, record, :: per // n])
            body += block[:, None].view("u1").reshape(-1, 4)[:, :width].tobytes()
        if notes:
            body += f"+{starts[record]}\x14\x14".encode().ljust(width * 20, b"\0")
    path.write_bytes(header + body)


def raw_array(data, names=NAMES, types="eeg", sfreq=200.0, first_sample=0):
    info = mne.create_info(list(names), sfreq, types)
    return mne.io.RawArray(data, info, first_sample, verbose="error")


def write_set(path, data, sfreq, names):
    """EEGLAB's format; data: (C, T) in V."""
    channels = np.array([(n, "EEG") for n in names], dtype=[("labels", object), ("type", object)])
    eeg = {"data": data * 1e6, "srate": sfreq, "nbchan": len(data), "pnts": data.shape[1]}
    eeg |= {"trials": 1, "xmin": 0.0, "chanlocs": channels, "ref": "common"}
    empty = ("event", "epoch", "times", "icawinv", "icaweights", "icasphere", "icachansind")
    eeg |= dict.fromkeys(empty, []) | dict.fromkeys(("setname", "filename", "filepath"), "")
    scipy.io.savemat(path, {"EEG": eeg}, appendmat=False)


def write_format(path, data, sfreq, kind, names=NAMES, **options):
    """`data` (C, T) V in one of the formats, `path` without its ending."""
    names = list(names)[: len(data)]
    if kind == "vhdr":
        synthetic.write_brainvision(path, data.astype(np.float32), names, sfreq, [0])
    elif kind == "fif":
        raw = raw_array(data, names, sfreq=sfreq, first_sample=77)
        raw.save(path.with_suffix(".fif"), verbose="error")
    elif kind == "set":
        write_set(path.with_suffix(".set"), data, sfreq, names)
    else:
        write_edf(path.with_suffix(f".{kind}"), data * 1e6, sfreq, names, **options)


def events_tsv(n=6, **columns):
    table = {
        "onset": 1 + 2.0 * np.arange(n),
        "duration": 0.1,
        "word": ["stove", "ice_cream", "stove", "n/a", "ant", "ant"][:n],
        "thing": ["stove1", "ice_cream", "stove2", "catch", "ant", "ant"][:n],
        "file": ["f1.jpg", "f2.jpg", "f3.jpg", "f0.jpg", "f4.jpg", "f4.jpg"][:n],
        "other": ["range,cooking_stove", "n/a", "range", "n/a", "emmet|pismire", "ant"][:n],
        "catch": [0, 0, 0, 1, 0, 0][:n],
    }
    return pd.DataFrame(table | columns)


def make_bids(root, kind="vhdr", subject="01", stem="task-see", sfreq=200.0, data=None, **options):
    """A recording in a BIDS folder. options: events, channels, electrodes (False: none), names, and
    those of write_edf."""
    folder = root / f"sub-{subject}/eeg"
    folder.mkdir(parents=True, exist_ok=True)
    events = options.pop("events", events_tsv())
    channels = options.pop("channels", None)
    places = options.pop("electrodes", True)
    if data is None:
        data = samples(sfreq, seed=int(subject) - 1)
    if kind:
        write_format(folder / f"sub-{subject}_{stem}_eeg", data, sfreq, kind, **options)
    synthetic.write_table(folder / f"sub-{subject}_{stem}_events.tsv", events)
    if channels is not None:
        table = pd.DataFrame({"name": NAMES, "type": "EEG"} | channels)
        synthetic.write_table(folder / f"sub-{subject}_{stem}_channels.tsv", table)
    if places:
        xyz = {"x": [-30, 0, 0, 0], "y": [80, 0, -50, -90], "z": [0, 100, 70, 10]}
        table = pd.DataFrame({"name": NAMES, **xyz})
        synthetic.write_table(folder / f"sub-{subject}_electrodes.tsv", table)
        coordinates(folder, "CapTrak")
    synthetic.write_json(root / "dataset_description.json", Name="a synthetic test")
    return root


def coordinates(folder, system, landmark_unit="mm", **landmarks):
    facts = {"EEGCoordinateSystem": system, "EEGCoordinateUnits": "mm"}
    facts["AnatomicalLandmarkCoordinateUnits"] = landmark_unit
    facts["AnatomicalLandmarkCoordinates"] = landmarks
    synthetic.write_json(folder / f"{folder.parent.name}_coordsystem.json", **facts)


def convert(root, out, **options):
    """(meta of the set, its recordings), converted as they are unless options say otherwise."""
    prepare(bids, root=root, out_dir=out, **AS_IS | options)
    meta = recording.read_set(out)
    return meta, [recording.Recording(out / name) for name in meta["recordings"]]


# ---- formats, units, time


@pytest.mark.parametrize("kind", ["vhdr", "fif", "edf", "bdf", "set"])
def test_every_format_gives_the_same_samples(tmp_path, kind):
    meta, (one,) = convert(make_bids(tmp_path / "b", kind), tmp_path / "out")
    error = {"edf": 7e-9, "bdf": 3e-11}.get(kind, 1e-12)
    np.testing.assert_allclose(one.signal, samples().T, atol=error, rtol=1e-6)
    assert one.names == NAMES and one.unit == "V" and one.subject == "01"
    assert one.synthetic and meta["synthetic"] and "words" not in meta  # decode.py's transcript
    np.testing.assert_allclose(one.xyz[0], [-0.03, 0.08, 0], atol=1e-7)
    assert one.rows(one.events["onset"]).tolist() == [200, 600, 1000, 1800, 2200]
    assert (one.first_sample == 77) == (kind == "fif")
    assert one.meta["dropped"] == {"events without onset or word": 1}


def test_real_recordings(tmp_path, capsys):
    _, (one,) = convert(real("eeg_bids"), tmp_path / "out", word_column="trial_type")
    assert one.names[:3] == ["FPz", "EOG1", "F3"] and len(one.names) == 32 and one.unit == "V"
    assert len(one.signal) == 30_504 and np.isfinite(one.xyz).all() and not one.synthetic
    assert one.events["word"].value_counts().to_dict() == {"square": 80, "rt": 74}
    (target,) = reader.convert_files(real("edf"), tmp_path / "edf", montage="colin27_1005")
    one = recording.Recording(target)  # with dotted names
    assert len(one.names) == 64 and one.names[:2] == ["FC5", "FC3"]
    assert np.isfinite(one.xyz).all() and 123 < len(one.signal) / one.sfreq < 126
    assert "renamed as in Fc5. → FC5" in capsys.readouterr().out
    # 64 channels that jump between -1.5 and 1.8 mV, in a complete BIDS folder
    with pytest.raises(InputError, match="a standard deviation of 0.0018 V .*leave the file out"):
        convert(real("tiny_bids"), tmp_path / "out2", word_column="trial_type")


@pytest.mark.parametrize(
    "unit, stated, scale, units",
    [
        ("", "µV", 1, "of channels.tsv"),
        (".V", "uV", 1, "of channels.tsv"),
        ("n/a", "microvolt", 1, "of channels.tsv"),
        ("mV", "µV", 1, "of channels.tsv"),  # no brain is a thousand times as large
        ("uV", "mV", 0.01, "of the file, not those of channels.tsv"),  # both could be
        ("FIF", "µV", 1, ""),  # always in V
    ],
)
def test_units_are_the_files_or_the_sidecars(tmp_path, capsys, unit, stated, scale, units):
    data = scale * samples()
    kind = "fif" if unit == "FIF" else "edf"
    root = make_bids(tmp_path / "b", kind, unit=unit, channels={"units": stated}, data=data)
    _, (one,) = convert(root, tmp_path / "out")
    np.testing.assert_allclose(one.signal, data.T, atol=7e-9 if kind == "edf" else 1e-9)
    assert one.meta["preprocessing"].get("units", "") == units
    assert units in capsys.readouterr().out


def test_a_channel_in_another_unit_is_bad_and_named(tmp_path, capsys):
    """It takes no part in the average reference."""
    root = make_bids(tmp_path / "b", "edf", unit=["uV", "uV", "uV", ""])
    _, (one,) = convert(root, tmp_path / "out", reference="average")
    good = samples()[:3]
    np.testing.assert_allclose(one.signal[:, :3], (good - good.mean(axis=0)).T, atol=2e-8)
    assert one.good.tolist() == [True, True, True, False]
    output = capsys.readouterr().out
    assert "no brain's size, marked bad (state units in channels.tsv): Oz" in output


def test_a_gap_in_an_edf_stays_a_gap(tmp_path):
    """Ten seconds, five that were not recorded, ten; an event in the gap is dropped."""
    starts = [*range(10), *range(15, 25)]
    events = events_tsv(5, onset=[2, 9.5, 12, 16, 24], word=list("abcde"))
    root = make_bids(tmp_path / "b", "edf", starts=starts, events=events)
    _, (one,) = convert(root, tmp_path / "out")
    np.testing.assert_allclose(one.signal[3000:], samples().T[2000:], atol=7e-9)
    assert len(one.signal) == 5000 and not one.signal[2000:3000].any()
    assert one.events["word"].tolist() == list("abde") and one.meta["bad_spans"] == [[10.0, 15.0]]
    assert one.meta["dropped"] == {"events in BAD segments": 1}
    described = root / "sub-01/eeg/sub-01_task-see_eeg.json"
    described.write_text('{"RecordingType": "discontinuous", "RecordingDuration": 25}')
    assert len(convert(root, tmp_path / "out2")[1]) == 1
    make_bids(root, "edf")  # with no word of its gaps
    with pytest.raises(InputError, match="is discontinuous.*does not tell where"):
        convert(root, tmp_path / "out2")


def test_a_short_recording_is_reported_as_distorted(tmp_path, capsys):
    root = make_bids(tmp_path / "b", data=samples(seconds=3), events=events_tsv(1))
    convert(root, tmp_path / "out", l_freq=0.1)
    assert "too short for l_freq=0.1" in capsys.readouterr().out


def test_channels_of_two_rates_come_to_one_without_seams(tmp_path, recwarn):
    """MNE resamples what it is asked for: block by block, each block would have edges."""
    data = samples(190.0, 70)[:, : 200 * 66]
    write_edf(tmp_path / "two.edf", data * 1e6, 200.0, NAMES, slow=2)
    (target,) = reader.convert_files(tmp_path, tmp_path / "out", montage="colin27_1005")
    error = np.abs(recording.Recording(target).signal - data.T)
    assert error[1000:-1000].max() < 1e-7 and len(recwarn) == 0


def test_bad_segments_are_neither_words_nor_trials(tmp_path, capsys):
    """Marked in the file, where times are the recording's own, or in events.tsv."""
    events = events_tsv(word=["a", "b", "badger", "c", "d", "BADGER"])
    rows = [(3.05, 0.5, "BAD_blink"), (9.05, 0, "EDGE boundary"), (0.0, 0, "New Segment/")]
    rows.append((10.0, 9, "boundary"))  # EEGLAB's, where 9 s were cut out
    marks = pd.DataFrame(rows, columns=["onset", "duration", "word"])
    events = pd.concat([events, marks]).astype(object).fillna("n/a")
    root = make_bids(tmp_path / "b", kind="", events=events)
    raw = raw_array(samples(), first_sample=77)
    marks = ["bad jump", "badger", "bad", "bad"]  # the last is a word
    raw.set_annotations(mne.Annotations([6.9, 1.0, 18, 5], [1.0, 0.1, 1, 0], marks))
    raw.save(root / "sub-01/eeg/sub-01_task-see_eeg.fif", verbose="error")
    _, (one,) = convert(root, tmp_path / "out")
    assert one.events["word"].tolist() == ["a", "badger", "BADGER"]  # not at 3, 7 and 9 s
    assert one.meta["dropped"] == {"events in BAD segments": 3}
    assert "4 rows mark segments" in capsys.readouterr().out  # "bad apple" would be one, too
    spans = np.array(one.meta["bad_spans"]) - 77 / 200
    expected = [[3.05, 3.55], [6.9, 7.9], [9.05, 9.05], [10, 10], [18, 19]]
    np.testing.assert_allclose(spans, expected, atol=1e-3)


@pytest.mark.parametrize("kind, sfreq", [("vhdr", 512.0), ("fif", 250.0), ("fif", 200.0)])
def test_resampling_keeps_event_times_and_does_not_alias(tmp_path, kind, sfreq):
    onset = 3.0
    time = np.arange(int(20 * sfreq) + 3) / sfreq
    pulse = np.exp(-0.5 * ((time - onset) / 0.03) ** 2)
    fast = np.sin(2 * np.pi * min(110, sfreq / 2 - 20) * time)
    data = 1e-5 * np.stack([pulse, fast, np.sin(time), np.cos(time)])
    events = events_tsv(1, onset=[onset])
    root = make_bids(tmp_path / "b", kind, sfreq=sfreq, data=data, events=events)
    _, (one,) = convert(root, tmp_path / "out", sfreq=100.0)
    row = one.rows(one.events["onset"])[0]
    window = one.signal[row - 20 : row + 21, 0].astype(float)
    shift_ms = 10 * (window * np.arange(-20, 21)).sum() / window.sum()
    assert one.sfreq == 100 and abs(shift_ms) < 0.1
    assert np.abs(one.signal[50:-50, 1]).max() < 3e-7  # 110 Hz would be 10 Hz


# ---- events, names, places


def test_events_say_object_word_synonyms_and_picture(tmp_path):
    columns = {"word_column": "", "object_column": "thing", "image_column": "file"}
    columns |= {"synonyms_column": "other", "target_column": "catch"}
    meta, (one,) = convert(make_bids(tmp_path / "b"), tmp_path / "out", **columns)
    events = one.events
    assert events["word"].tolist() == ["stove", "ice cream", "stove", "catch", "ant", "ant"]
    assert events["target"].tolist() == [0, 0, 0, 1, 0, 0]
    assert events["object"].tolist() == ["stove1", "ice_cream", "stove2", "catch", "ant", "ant"]
    assert events["image"].tolist()[2:5] == ["f3.jpg", "f0.jpg", "f4.jpg"]
    assert events["synonyms"].tolist()[:2] == ["range|cooking stove", ""]
    assert events["synonyms"].tolist()[4] == "emmet|pismire"
    objects = pd.read_csv(tmp_path / "out/objects.csv", keep_default_na=False)
    assert objects["object"].tolist() == ["ant", "ice_cream", "stove1", "stove2"]
    assert meta["n_objects"] == 4 and meta["n_words"] == 3


# with a decimal comma, and onsets that nobody knows
LIKE_NUMBERS = 'onset\tword\n1,5\tnull\n2.5\tNA\n3\t007\n4\t1e5\n5\t"\n6\té\n'
LIKE_NUMBERS += "nan\ta\nNaN\tb\nn/a\tc\n\td\n"


@pytest.mark.parametrize(
    "content, onsets, words",
    [
        (LIKE_NUMBERS, [1.5, 2.5, 3, 4, 5, 6], ["null", "NA", "007", "1e5", '"', "é"]),
        ('onset\tword\n1\t"a"\n2\tb c\n3\tn/a\n', [1, 2], ["a", "b c"]),
        ('"onset"\t"word"\n1\t"a\tb"\n', [1], ["a b"]),
        ("\ufeffonset \tword \r\n1.0\tstove\t\r\n3\ta_b\t\r\n", [1, 3], ["stove", "a b"]),
        ("onset\tword\n1\tcafé\n2\tcafe\u0301\n", [1, 2], ["café", "café"]),
    ],
)
def test_tables_are_read_as_they_are(tmp_path, content, onsets, words):
    """channels.tsv is in Latin-1 and has blanks; events.tsv where it can be."""
    channels = {"type": ["EEG", "eeg ", "EEG", "EEG"], "status": ["good", " BAD", "good", "n/a "]}
    root = make_bids(tmp_path / "b", channels={**channels, "units": "µV"})
    table = root / "sub-01/eeg/sub-01_task-see_channels.tsv"
    table.write_bytes(table.read_text().encode("latin-1"))
    encoding = "latin-1" if "é" in words else "utf-8"
    events = root / "sub-01/eeg/sub-01_task-see_events.tsv"
    events.write_bytes(content.encode(encoding))
    meta, (one,) = convert(root, tmp_path / "out")
    assert one.events["onset"].tolist() == onsets and one.events["word"].tolist() == words
    n_left_out = len(content.splitlines()) - 1 - len(words)
    assert one.meta["dropped"].get("events without onset or word", 0) == n_left_out
    assert one.names == NAMES and one.good.tolist() == [True, False, True, True]
    assert meta["n_objects"] == meta["n_words"] == len(set(words))


def test_names_in_other_spellings_find_their_places(tmp_path, capsys):
    names = ["EEG Fp1-Ref", "CZ..", "Pz", "X9"]
    root = make_bids(tmp_path / "b", "edf", names=names, electrodes=False)
    _, (one,) = convert(root, tmp_path / "out")
    assert one.names == ["Fp1", "Cz", "Pz", "X9"]
    assert np.isfinite(one.xyz).all(1).tolist() == [True, True, True, False]
    assert one.xyz[2, 1] < -0.04 < 0.05 < one.xyz[1, 2]  # Pz behind, Cz above
    output = capsys.readouterr().out
    assert (
        "2 channels renamed as in EEG Fp1-Ref → Fp1" in output and "without position: X9" in output
    )
    assert one.meta["preprocessing"]["positions"] == "colin27_1005"
    assert reader.match_names(["EEG Cz-Pz", "Cz-A2", "Cz"], ["Cz"]) == {"Cz": "Cz"}


def test_positions_in_any_frame(tmp_path):
    root = make_bids(tmp_path / "b", names=["FP1", "CZ", "PZ", "OZ"])  # Fp1 in electrodes.tsv
    unknown = {"NAS": "n/a", "LPA": ["n/a"] * 3, "RPA": None}
    right = {"NAS": [0, 120, 5], "LPA": [-75, 20, 5], "RPA": [75, 20, 5]}  # at y = 20, z = 5
    in_cm = {"landmark_unit": "cm", "NAS": [0, 12, 0.5]}
    in_cm |= {"LPA": [-7.5, 2, 0.5], "RPA": [7.5, 2, 0.5]}
    front = {"NAS": [120, 0, 5], "LPA": [20, 75, 5], "RPA": [20, -75, 5]}
    for system, landmarks, place in (
        ("EEGLAB", {}, [-0.08, -0.03, 0]),
        ("EEGLAB", unknown, [-0.08, -0.03, 0]),
        ("CapTrak", right, [-0.03, 0.06, -0.005]),
        ("CapTrak", in_cm, [-0.03, 0.06, -0.005]),
        ("EEGLAB", front, [-0.08, -0.05, -0.005]),
    ):
        coordinates(root / "sub-01/eeg", system, **landmarks)
        _, (one,) = convert(root, tmp_path / "out")
        atol = 1e-6 if landmarks.get("RPA") else 1e-7
        np.testing.assert_allclose(one.xyz[0], place, atol=atol)


def test_a_recording_without_places_does_not_stop_the_others(tmp_path, capsys):
    root = make_bids(tmp_path / "b", electrodes=False)
    make_bids(root, subject="02", names=["E1", "E2", "E3", "E4"], electrodes=False)
    meta, _ = convert(root, tmp_path / "out")
    assert meta["recordings"] == ["sub-01"]
    assert "left out: sub-02: no channel has a position (E1, E2" in capsys.readouterr().out
    with pytest.raises(InputError, match="sub-02: no channel has a position.*give montage="):
        convert(root, tmp_path / "out", subjects=["02"])


@pytest.mark.parametrize("how", ["interpolate", "mark"])
def test_bad_flat_and_nan_channels(tmp_path, how):
    names = [*NAMES, "P3", "P4", "Fz", "C3"]
    data = np.concatenate([samples(), samples(seed=1)])
    data[1], data[2, 7] = 3e-6, np.nan
    given = {"data": data, "names": names, "electrodes": False}
    given["channels"] = {"name": names, "status": ["good"] * 3 + ["bad"] + ["good"] * 4}
    root = make_bids(tmp_path / "b", "fif", **given)
    _, (one,) = convert(root, tmp_path / "out", bads=how, reference="average")
    notes = one.meta["preprocessing"]
    assert notes["flat"] == ["Cz"] and notes["nan"] == ["Pz"]
    assert notes["bads"] == ["Cz", "Pz", "Oz"] and np.isfinite(one.signal).all()
    if how == "mark":
        assert np.array(names)[~one.good].tolist() == ["Cz", "Pz", "Oz"]
    else:  # splines put the neighbours' mean there
        assert one.good.all() and np.ptp(one.signal[:, 1]) > 1e-6
    np.testing.assert_allclose(one.signal[:, one.good].mean(1), 0, atol=1e-10)


# ---- the BIDS folder


def test_only_raw_data_are_found(tmp_path):
    root = tmp_path / "b"
    stems = ["ses-1_task-see_run-1", "ses-1_task-see_run-2"]
    for subject, stem in (("01", stems[0]), ("01", stems[1]), ("02", stems[0])):
        make_bids(root, subject=subject, stem=stem, electrodes=False)
    for other in ("derivatives/cleaned", "sourcedata", "code"):
        make_bids(root / other, stem=stems[0])
    names = [name for name, _ in reader.find_recordings(root)]
    assert names == ["sub-01_run-1", "sub-01_run-2", "sub-02_run-1"]
    for asked in ("sub-02", "02", "2"):
        assert [name for name, _ in reader.find_recordings(root, [asked])] == ["sub-02"]
    make_bids(root, "edf", subject="02", stem=stems[0], electrodes=False)
    make_bids(root, "fif", subject="03", electrodes=False)
    make_bids(root, "fif", subject="03", stem="task-see_proc-sss", electrodes=False)
    for subject, words in (("02", "in two formats, or"), ("03", ".* raw and proc-: keep one")):
        with pytest.raises(InputError, match=f"sub-{subject} exists {words}"):
            reader.find_recordings(root, [subject])


def test_missing_content_is_reported_before_any_work(tmp_path):
    root = make_bids(tmp_path / "b")
    make_bids(root, subject="02")
    for subject, name in (("02", "task-see_eeg.eeg"), ("01", "task-see_events.tsv")):
        path = root / f"sub-{subject}/eeg/sub-{subject}_{name}"
        path.unlink()
        path.symlink_to(f"../../.git/annex/objects/Xq/1z/{path.name}")
        with pytest.raises(InputError, match=f"_{name} is a git-annex link.*git annex get"):
            convert(root, tmp_path / subject, subjects=[] if subject == "02" else ["01"])
    assert not (tmp_path / "02").exists()


def make_other(root, kind, raw, types=None):
    """A person's MEG or iEEG in a BIDS folder."""
    folder = root / f"sub-01/{kind}"
    folder.mkdir(parents=True)
    raw.save(folder / f"sub-01_task-see_{kind}.fif", verbose="error")
    synthetic.write_table(folder / "sub-01_task-see_events.tsv", events_tsv())
    if types:
        table = pd.DataFrame({"name": raw.ch_names, "type": types})
        synthetic.write_table(folder / "sub-01_task-see_channels.tsv", table)
    return folder


def test_meg_is_read_in_its_own_units_one_kind_of_sensors_at_a_time(tmp_path, capsys):
    types = ["mag"] * 6 + ["grad"] * 6 + ["eeg"] * 2
    rng = np.random.default_rng(0)
    data = rng.normal(size=(14, 4000)) * np.repeat([1e-13, 5e-12, 1e-5], [6, 6, 2])[:, None]
    raw = raw_array(data, [f"M{i:02d}" for i in range(14)], types)
    for channel in raw.info["chs"]:
        channel["loc"][:3] = rng.normal(0, 0.08, 3)
    folder = make_other(tmp_path / "b", "meg", raw)
    (folder / "sub-01_acq-crosstalk_meg.fif").write_bytes(b"no raw data")
    _, (one,) = convert(tmp_path / "b", tmp_path / "out", bads="interpolate", reference="average")
    assert one.unit == "T" and set(one.channels["type"]) == {"mag"} and len(one.names) == 6
    np.testing.assert_allclose(one.signal, data[:6].T, rtol=1e-5)
    assert "6 grad channels not read (sensors=grad)" in capsys.readouterr().out
    _, (one,) = convert(tmp_path / "b", tmp_path / "out2", sensors="grad")
    assert one.unit == "T/m" and len(one.names) == 6
    with pytest.raises(InputError, match="no recording of ieeg"):
        convert(tmp_path / "b", tmp_path / "out3", sensors="ieeg")


def test_contacts_do_not_take_the_places_of_the_scalp(tmp_path):
    """Shafts C and F have contacts C3 and F3; electrodes on the scalp are not the first choice."""
    for i, types in enumerate([None, ["SEEG", "SEEG", "EEG", "EEG"]]):
        raw = raw_array(samples(), ["C3", "F3", "Cz", "Pz"])
        make_other(tmp_path / str(i), "ieeg", raw, types)
        with pytest.raises(InputError, match=r"no channel has a position \(C3, F3"):
            convert(tmp_path / str(i), tmp_path / "out")


def test_ieeg_folders_are_read(tmp_path):
    types = ["SEEG", "SEEG", "SEEG", "ECG"]
    raw = raw_array(samples(), ["LA1", "LA2", "LB1", "ECG"])
    folder = make_other(tmp_path / "b", "ieeg", raw, types)
    for space, shift in (("MNI152", 0), ("Other", 9)):
        xyz = pd.DataFrame({"name": ["LA1", "LA2", "LB1"], "x": [1 + shift, 2, 3], "y": 4, "z": 5})
        synthetic.write_table(folder / f"sub-01_space-{space}_electrodes.tsv", xyz)
    facts = {"iEEGCoordinateSystem": "MNI152", "iEEGCoordinateUnits": "mm"}
    synthetic.write_json(folder / "sub-01_space-MNI152_coordsystem.json", **facts)
    _, (one,) = convert(tmp_path / "b", tmp_path / "out", bads="interpolate")
    assert one.names == ["LA1", "LA2", "LB1"] and set(one.channels["type"]) == {"seeg"}
    np.testing.assert_allclose(one.xyz[0], [0.001, 0.004, 0.005], atol=1e-7)


def test_conversion_continues_and_notices_changes(tmp_path, capsys):
    root, out = make_bids(tmp_path / "b"), tmp_path / "out"
    make_bids(root, subject="02")
    convert(root, out)
    signal = out / "sub-01/signal.f32"
    before = signal.stat().st_mtime_ns
    (out / "meta.yaml").unlink()
    (out / "sub-02/signal.f32").write_bytes(b"torn")
    capsys.readouterr()
    convert(root, out)
    output = capsys.readouterr().out
    assert "sub-01: already exists" in output and "sub-02: 5 events" in output
    assert signal.stat().st_mtime_ns == before and recording.complete(out)
    convert(root, out, l_freq=1.0)
    assert signal.stat().st_mtime_ns != before  # other options, other signal
    make_bids(root, channels={"status": ["good", "good", "bad", "good"]})
    _, (mended, _) = convert(root, out, l_freq=1.0)
    assert mended.good.tolist() == [True, True, False, True]  # a table that somebody mended
    make_bids(root, data=samples(seed=5))  # as many bytes
    _, (mended, _) = convert(root, out)
    np.testing.assert_allclose(mended.signal, samples(seed=5).T, atol=1e-9)


BAD_OZ = {"status": ["good"] * 3 + ["bad"]}
ALONE = {"data": samples()[:1], "names": ["Cz"]}
ONE_ALIVE = samples() * [[1], [0], [0], [0]]
NO_UNIT = {"coordsystem.json": b'{"EEGCoordinateSystem": "CapTrak"}'}
UNIT_SPHERE = {"electrodes.tsv": b"name\tx\ty\tz\nCz\t0\t0\t1000\n"}  # of 1 m, in mm
TWO_WORDS = {"task-see_events.tsv": b"onset\tword\tword\n1\ta\tb\n"}
NAMED_ROWS = {"task-see_events.tsv": b"onset\tword\n1\t2.0\ta\n2\t3.0\tb\n"}  # as R writes them
TORN = {"task-see_eeg.json": b'{"RecordingDuration": 20}', "task-see_eeg.eeg": bytes(16_000)}
IN_MS = [10, 20, 4000, 6000, 8000, 10_000]  # the first two would lie inside
IN_SAMPLES = [2, 4, 800, 1200, 1600, 2000]
NO_UNITS = {"kind": "edf", "unit": ""}
TOO_LARGE = "_eeg.edf: a standard deviation .* is no brain's .* state the unit"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"files": {"task-see_events.tsv": None}}, "_eeg.vhdr has no events.tsv.*subjects="),
        ({"events": {"word": ["n/a"] * 6}}, "no event that can be used, for events without onset"),
        ({"word_column": "name"}, "word_column=. has no column 'name', only onset, duration"),
        ({"word_column": ""}, "word_column and object_column are both empty"),
        ({"events": {"onset": list("1a2345")}}, "onset 'a' in row 2 is not a number"),
        ({"events": {"onset": IN_MS}}, "4 of 5 onsets lie outside the 20 s .* in ms"),
        ({"events": {"onset": IN_SAMPLES}}, "3 of 5 onsets lie outside .* in samples"),
        ({"files": TWO_WORDS}, "two columns 'word': rename"),
        ({"files": NAMED_ROWS}, "events.tsv is not a CSV table .*Length of header"),
        ({"subjects": ["09"]}, "no sub-09; it has 01"),
        ({"task": "hear"}, "no recording of eeg, meg or ieeg and task hear"),
        ({"kind": ""}, "sub-01 has no recording of eeg, meg or ieeg.*subjects="),
        ({"files": TORN}, "is 5 s long where .* says 20: it is truncated"),
        ({"files": {"task-see_eeg.vhdr": b"Brain Vision\n"}}, "task-see_eeg.vhdr cannot be read"),
        ({"files": {"task-see_eeg.json": b"[]"}}, "sub-01_task-see_eeg.json is not a JSON object"),
        ({"channels": {"name": list("abcd")}}, "does not name the channel 'Fp1'"),
        ({"channels": {"type": "MISC"}}, "no channel of type .* only misc"),
        ({"files": NO_UNIT}, "100.00 m from the head"),
        ({"files": UNIT_SPHERE}, "1.00 m from the head"),
        ({"reference": "M1,M2"}, "reference=M1,M2: sub-01 has no good 'M1'"),
        ({"channels": BAD_OZ, "reference": "Oz"}, "reference=Oz: sub-01 has no good 'Oz'"),
        (ALONE | {"reference": "average"}, "has a single good channel: give reference=none"),
        ({"data": ONE_ALIVE}, "3 of 4 channels are bad .3 flat"),
        (NO_UNITS, TOO_LARGE),
        (NO_UNITS | {"channels": {"units": "V"}}, TOO_LARGE),
        ({"kind": "edf", "unit": ["uV", "uV", "", ""]}, TOO_LARGE),
        ({"kind": "fif", "data": samples() * 1e-6}, "is no brain's"),
    ],
)
def test_unreadable_data_are_refused(tmp_path, options, words):
    """options: `files` of other content, None for none; those of make_bids and of the script."""
    options = dict(options)
    files = options.pop("files", {})
    if "events" in options:
        options["events"] = events_tsv(**options["events"])
    script_options = {
        key: options.pop(key) for key in bids.Config.__annotations__ if key in options
    }
    root = make_bids(tmp_path / "b", **options)
    for name, content in files.items():
        path = root / "sub-01/eeg" / f"sub-01_{name}"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        convert(root, tmp_path / "out", **script_options)
    assert not (tmp_path / "out/meta.yaml").exists()


@pytest.mark.parametrize(
    "module, options, words",
    [
        (bids, {"root": "/nonexistent"}, "no BIDS folder: give the one with sub-01"),
        (bids, {"sfreq": 50.0}, "h_freq=40 is above half of sfreq=50"),
        (bids, {"l_freq": 50.0}, "l_freq=50 is not below"),
        (bids, {"montage": "mine"}, "montage='mine' is none of MNE's: .*colin27_1005"),
        (synthetic, {"repeats": 3}, "repeats=3"),
        (synthetic, {"objects": 2}, "objects=2: at least 10"),
        (synthetic, {"dimensions": 60}, "dimensions=60: fewer than objects=60"),
        (things1, {}, "subjects= is missing"),
        (things1, {"root": ".", "concepts": "nosuch"}, "concepts=nosuch does not exist"),
        (things2, {}, "root= is missing: give the folder with sub-01"),
    ],
)
def test_bad_options_are_refused(module, options, words):
    with pytest.raises(InputError, match=words):
        prepare(module, **options)


# ---- a folder of files


def test_a_folder_of_numbered_and_split_files(tmp_path, capsys):
    folder = tmp_path / "raw"
    (folder / "derivatives").mkdir(parents=True)
    raw = raw_array(samples()).set_montage("colin27_1005")
    for name in ("anna_raw.fif", "ben-1.fif", "ben-2.fif", "derivatives/anna_raw.fif"):
        raw.save(folder / name, verbose="error")
    raw.set_annotations(mne.Annotations([3.0], [1.0], ["BAD"]))
    long = mne.concatenate_raws([raw.copy() for _ in range(50)], verbose="error")
    long.save(folder / "carl_raw.fif", split_size="2MB", verbose="error")
    (folder / "anna-ica.fif").write_bytes(b"no raw data")
    write_edf(folder / "dora.edf", samples() * 1e6, 200.0, ["E1", "E2", "E3", "E4"])
    targets = reader.convert_files(folder, tmp_path / "out")
    names = ["anna_raw.fif", "carl_raw.fif", "ben-1.fif", "ben-2.fif"]
    assert [path.name for path in targets] == names
    assert reader.converted_files(folder, tmp_path / "out") == targets
    carl = recording.Recording(targets[1])
    assert len(carl.signal) == long.n_times and [3.0, 4.0] in carl.meta["bad_spans"]
    output = capsys.readouterr().out
    assert "carl_raw-1.fif: read with the first part" in output
    assert "left out: derivatives/anna_raw.fif" in output.replace("anna-ica.fif, ", "")
    assert "dora.edf: no channel has a position (E1" in output
    before = (targets[0] / "signal.f32").stat().st_mtime_ns
    reader.convert_files(folder, tmp_path / "out")
    assert (targets[0] / "signal.f32").stat().st_mtime_ns == before


def test_files_are_read_again_when_they_or_their_sidecars_change(tmp_path):
    """A header may stay as it is when its data change; places of the file's own stay, too."""
    folder = tmp_path / "raw"
    header = folder / "a.vhdr"
    for seed in (0, 1):
        synthetic.write_brainvision(header, samples(seed=seed), NAMES, 200.0, [0])
        os.utime(header, ns=(0, 0))
        (target,) = reader.convert_files(folder, tmp_path / "out", montage="colin27_1005")
        one = recording.Recording(target)
        np.testing.assert_allclose(one.signal, samples(seed=seed).T, atol=1e-10)
    table = {"name": NAMES, "status": ["good"] * 3 + ["bad"]}
    synthetic.write_table(folder / "channels.tsv", pd.DataFrame(table))
    xyz = {"name": NAMES, "x": 0.0, "y": 0.0, "z": [0.07, 0.08, 0.09, 0.1]}
    synthetic.write_table(folder / "electrodes.tsv", pd.DataFrame(xyz))
    (target,) = reader.convert_files(folder, tmp_path / "out", montage="colin27_1005")
    one = recording.Recording(target)
    assert one.good.tolist() == [True, True, True, False]
    np.testing.assert_allclose(one.xyz[:, 2], xyz["z"], atol=1e-7)


def test_files_without_places_with_one_name_or_missing(tmp_path):
    folder = tmp_path / "raw"
    (folder / "dora").mkdir(parents=True)
    write_edf(folder / "dora 1.edf", samples() * 1e6, 200.0, ["E1", "E2", "E3", "E4"])
    with pytest.raises(InputError, match="dora 1.edf: no channel has a position .*give montage="):
        reader.convert_files(folder, tmp_path / "out")
    options = {"out": tmp_path / "out", "places": False}
    assert len(reader.convert_files(folder, **options)) == 1
    twin = folder / "dora/1.edf"
    twin.write_bytes((folder / "dora 1.edf").read_bytes())
    with pytest.raises(InputError, match="1.edf has the name of another file"):
        reader.convert_files(folder, **options)
    twin.unlink()
    (folder / "emil.edf").symlink_to("../.git/annex/objects/emil.edf")
    with pytest.raises(InputError, match="emil.edf is a git-annex link"):
        reader.convert_files(folder, **options)


# ---- THINGS-EEG1


def eeg1_rows(n=12, sfreq=200.0):
    """events.tsv as OpenNeuro has it: two sequences and a test sequence, one catch trial."""
    things = ["stove2", "calf1", "stove1", "balance_beam", "go-kart", "calf1"] * (n // 6)
    pictures = [f"{t}_{1 + i:02d}s.jpg" for i, t in enumerate(things)]
    onset = 2 + 0.1 * np.arange(n) + 3.0 * (np.arange(n) // 6)
    table = pd.DataFrame({"onset": onset.round(3), "duration": 50, "object": things})
    table["stim"] = [f"stimuli\\{t}\\{p}" for t, p in zip(things, pictures)]
    table["blocksequencenumber"] = [0] * (n - 2) + [-1] * 2
    table["istarget"] = [0, 1] + [0] * (n - 2)
    table["sample"] = (onset * sfreq).round().astype(int)
    return table


@pytest.mark.parametrize("release", ["seconds and samples", "seconds", "samples", "ms", "flag"])
def test_eeg1_traps(tmp_path, release):
    rows = eeg1_rows()
    if release != "seconds and samples":
        rows = rows.drop(columns="sample")
    if release == "samples":
        rows["onset"] = eeg1_rows()["sample"]
    if release == "ms":
        rows["onset"] = (1000 * rows["onset"]).round().astype(int)
    if release == "flag":
        rows = rows.assign(isteststim=[0] * 10 + [1] * 2, blocksequencenumber=0)
    root = make_bids(tmp_path / "b", events=rows, stem="task-rsvp", electrodes=False)
    concepts = tmp_path / "things_concepts.tsv"
    concepts.write_text(
        "Word\tuniqueID\tWordNet Synonyms\tBottom-up Category (Human Raters)\n"
        'stove\tstove2\t"stove, kitchen_stove, range"\t"tool, appliance"\ncalf\tcalf1\t\tanimal\n'
    )
    prepare(things1, root=root, out_dir=tmp_path / "out", concepts=concepts, **AS_IS)
    meta = recording.read_set(tmp_path / "out")
    one = recording.Recording(tmp_path / "out/sub-01")
    events = one.events
    assert one.rows(events["onset"]).tolist() == eeg1_rows()["sample"].tolist()
    assert set(events["duration"].round(6)) == {0.05}
    words = ["stove", "calf", "stove", "balance beam", "go-kart", "calf"]
    assert events["word"].tolist()[:6] == words
    assert events["image"].tolist()[:2] == ["stove2_01s.jpg", "calf1_02s.jpg"]
    assert events["target"].tolist() == [0, 1] + [0] * 10
    assert events["phase"].tolist() == ["train"] * 10 + ["test"] * 2
    assert events["block"].tolist() == [1] * 6 + [2] * 6
    assert events["synonyms"].iloc[0] == "kitchen stove|range"
    assert events["category"].tolist()[:3] == ["tool", "animal", ""]
    assert meta["n_objects"] == 5 and meta["n_words"] == 4 and not meta["synthetic"]
    assert np.isfinite(one.xyz).all()
    concepts.write_text(concepts.read_text().replace("kitchen_stove", "cooker"))
    prepare(things1, root=root, out_dir=tmp_path / "out", concepts=concepts, **AS_IS)
    events = recording.Recording(tmp_path / "out/sub-01").events
    assert events["synonyms"].iloc[0] == "cooker|range"
    slow = pd.DataFrame({"onset": ["0", "7", "14"]})
    with pytest.raises(InputError, match="x.tsv: the column onset steps by 7, in no known unit"):
        things1.onsets_of(slow, "x.tsv", 200.0)


def test_eeg1_real_events_and_concepts():
    root = real("things_eeg1_ds003825")
    path = root / "sub-01/eeg/sub-01_task-rsvp_events.tsv"
    config = things1.Config(concepts=str(real("things_concepts") / "things_concepts.tsv"))
    events = things1.events_of(reader.read_tsv(path, "onset"), path, config, 1000.0)
    assert len(events) > 20_000 and events["object"].nunique() == 1854
    assert events["onset"].iloc[:2].round(3).tolist() == [10.724, 10.824]
    assert events["word"].iloc[4] == "stove" and (events["duration"] == 0.05).all()
    assert (events["synonyms"] != "").mean() > 0.4 and events["block"].nunique() > 50
    ant = events[events["object"] == "ant"].iloc[0]
    assert ant["synonyms"] == "emmet|pismire" and ant["category"] == "animal"
    assert not events["category"].str.contains('"').any()  # of quoted cells


def test_eeg1_is_fetched(tmp_path):  # tests/test_fetch.py stops and goes on
    rows = eeg1_rows()
    root = make_bids(tmp_path / "remote", events=rows, stem="task-rsvp", electrodes=False)
    with serve(root) as server:
        options = {"subjects": ["01"], "out_dir": tmp_path / "out", "url": server.url, **AS_IS}
        prepare(things1, **options)
        assert recording.complete(tmp_path / "out")
        prepare(things1, **options)
        assert server.sent["sub-01_task-rsvp_eeg.eeg"] == 64_000  # once
        with pytest.raises(InputError, match="sub-51_task-rsvp_eeg.vhdr does not exist"):
            prepare(things1, **options | {"subjects": ["51"]})


# ---- THINGS-EEG2


def metadata(root):
    train = np.repeat(["00001_aardvark", "00002_stove1", "00003_stove2"], 2).tolist()
    files = [f"{concept[6:]}_{i % 2:02d}s.jpg" for i, concept in enumerate(train)]
    lists = {"train_img_concepts_THINGS": train, "train_img_files": files}
    lists["test_img_concepts_THINGS"] = ["00007_ice_cream", "00008_ant"]
    lists["test_img_files"] = ["ice_cream_00s.jpg", "ant_00s.jpg"]
    np.save(root / "image_metadata.npy", lists)


def raw_eeg2(codes, sfreq=200.0):
    """A session's dictionary: the codes every 0.2 s from 1 s on, held for 2 samples; their rows."""
    data = np.concatenate([samples(), np.zeros((1, 4000))])
    at = (sfreq * (1 + 0.2 * np.arange(len(codes)))).astype(int)
    data[-1, at] = data[-1, at + 1] = codes
    session = {"raw_eeg_data": data, "ch_names": [*NAMES, "stim"], "sfreq": sfreq}
    return session | {"ch_types": ["eeg"] * 4 + ["stim"]}, at


def make_eeg2(root, codes=(1, 6, 99999, 3)):
    root.mkdir(exist_ok=True)
    metadata(root)
    (root / "sub-01.zip").touch()
    for session in ("ses-01", "ses-02"):
        folder = root / "sub-01" / session
        folder.mkdir(parents=True)
        np.save(folder / "raw_eeg_training.npy", raw_eeg2(codes)[0])
        np.save(folder / "raw_eeg_test.npy", raw_eeg2([2, 1, 2])[0])
    return root


def test_eeg2_raw(tmp_path):
    prepare(things2, root=make_eeg2(tmp_path / "b"), out_dir=tmp_path / "out", **AS_IS)
    meta = recording.read_set(tmp_path / "out")
    assert meta["recordings"][:2] == ["sub-01_ses-01_test", "sub-01_ses-01_train"]
    assert len(meta["recordings"]) == 4 and meta["n_objects"] == 5 and meta["n_words"] == 4
    one = recording.Recording(tmp_path / "out/sub-01_ses-01_train")
    np.testing.assert_allclose(one.signal, samples().T, rtol=1e-6)
    assert one.names == NAMES and np.isfinite(one.xyz).all()
    events = one.events
    assert one.rows(events["onset"]).tolist() == raw_eeg2([1] * 4)[1].tolist()
    assert events["object"].tolist() == ["aardvark", "stove2", "catch", "stove1"]
    assert events["word"].tolist() == ["aardvark", "stove", "", "stove"]
    assert events["target"].tolist() == [0, 0, 1, 0]
    assert events["image"].tolist()[:3] == ["aardvark_00s.jpg", "stove2_01s.jpg", "catch"]
    test = recording.Recording(tmp_path / "out/sub-01_ses-01_test").events
    assert test["word"].tolist() == ["ant", "ice cream", "ant"] and set(test["phase"]) == {"test"}


@pytest.mark.parametrize("cut", [0, 5])
def test_eeg2_epochs_stand_one_after_the_other(tmp_path, cut):
    root = tmp_path / "b"
    (root / "sub-01").mkdir(parents=True)
    metadata(root)
    rng, times, length = np.random.default_rng(0), np.arange(-20, 30) / 100, 50 - cut
    epochs = {}
    for phase, n, repeats in (("training", 6, 2), ("test", 2, 3)):
        epochs[phase] = rng.normal(size=(n, repeats, 4, length))
        session = {"preprocessed_eeg_data": epochs[phase], "ch_names": NAMES, "times": times}
        np.save(root / f"sub-01/preprocessed_eeg_{phase}.npy", session)
    prepare(things2, root=root, kind="preprocessed", out_dir=tmp_path / "out")
    one = recording.Recording(tmp_path / "out/sub-01_train")
    assert one.meta["epoch_samples"] == length
    assert one.meta["epoch_tmin"] == pytest.approx(times[cut])
    assert one.sfreq == 100 and one.unit == "a.u." and one.names == NAMES
    np.testing.assert_allclose(one.xyz[0], [-0.031, 0.115, 0.028], atol=1e-3)  # of the head
    begin = one.rows(one.events["onset"]) + round(one.meta["epoch_tmin"] * one.sfreq)
    assert begin.tolist() == [length * i for i in range(12)] and len(one.signal) == 12 * length
    for i, row in enumerate(begin):
        epoch = epochs["training"][i // 2, i % 2]
        np.testing.assert_allclose(one.signal[row : row + length], epoch.T, rtol=1e-6)
    assert one.events["image"].nunique() == 6 and one.events["word"].tolist()[-1] == "stove"
    for changes, words in (
        ({"times": np.arange(-200, 300, 10)}, "a rate of 0.1 Hz: .* times in s"),
        ({"times": ["a"] * 50}, "times does not hold numbers"),
        ({"preprocessed_eeg_data": np.full((2, 3, 4, length), np.nan)}, "picture 0 has NaN"),
    ):
        np.save(root / "sub-01/preprocessed_eeg_test.npy", session | changes)
        with pytest.raises(InputError, match=words):
            prepare(things2, root=root, kind="preprocessed", out_dir=tmp_path / "again")


@pytest.mark.parametrize("protocol, order", [(2, "C"), (5, "F")])
def test_pickles_of_plain_data_are_read(tmp_path, protocol, order):
    large = np.random.default_rng(0).normal(size=(7, 7000))
    objects = np.array(["u", {"v": 1}], dtype=object)
    data = {"large": np.asarray(large, order=order), "small": np.arange(5, dtype=">i2")}
    data |= {"one": np.float32(2.5), "names": np.array(["a", "bé"]), "objects": objects}
    data |= {"list": ["Fp1", ("x", 1, None, True, 2.5)], "none": {}, "sfreq": 1000}
    path = tmp_path / "a.npy"
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    np.testing.assert_equal(things2.read_dict(path, "large"), data)
    np.save(path, data)
    np.testing.assert_equal(things2.read_dict(path), data)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_pickles_with_code_are_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.npy"
    np.save(path, np.array({"raw_eeg_data": Hostile()}, dtype=object))
    with pytest.raises(InputError, match="it wants to call posix.mkdir"):
        things2.read_dict(path)
    for code in (
        b"cnumpy\nndarray\n(N}X\x0c\x00\x00\x00__setstate__K\x01stb.",  # sets a class's attribute
        b"cnumpy.core.multiarray\n_reconstruct\n}X\x01\x00\x00\x00aK\x01sb0}.",  # a function's
        b"K\x01.",
        b"\x8e" + (1 << 40).to_bytes(8, "little") + b"abc",
    ):
        path.write_bytes(code)
        with pytest.raises(InputError, match="a.npy"):
            things2.read_dict(path)
    assert not (tmp_path / "owned").exists()
    assert not hasattr(np._core.multiarray._reconstruct, "a")


SHORT_LISTS = {"train_img_concepts_THINGS": ["00001_ant"], "train_img_files": []}
FLAT = np.concatenate([np.zeros((4, 4000)), raw_eeg2([1])[0]["raw_eeg_data"][4:]])
SESSION = "sub-01/ses-01/raw_eeg_training.npy"


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("image_metadata.npy", None, "image_metadata.npy is missing: fetch it"),
        ("image_metadata.npy", {}, "lacks the key 'train_img_concepts"),
        ("image_metadata.npy", SHORT_LISTS, "are not lists of one length"),
        (SESSION, {"raw_eeg_data": raw_eeg2([1, 7])[0]["raw_eeg_data"]}, "code 7 is none"),
        (SESSION, {"raw_eeg_data": raw_eeg2([])[0]["raw_eeg_data"]}, "no event in its stim"),
        (SESSION, {"raw_eeg_data": FLAT}, "4 flat"),
        (SESSION, {"ch_names": ["a"]}, "does not fit 1 channel names"),
        (SESSION, {"raw_eeg_data": [["a"] * 9] * 5}, "raw_eeg_data does not hold numbers"),
        (SESSION, {"raw_eeg_data": [[1.0], [2.0, 3.0]]}, "raw_eeg_data does not hold numbers"),
        (SESSION, {"sfreq": "1 kHz"}, "sfreq does not hold numbers"),
        (SESSION, {"sfreq": 0.2}, "a rate of 0.2 Hz: sfreq must be in Hz"),
        (SESSION, {"ch_types": ["eeg"] * 5}, "0 stim channels"),
        (SESSION, {"ch_names": ["E1", "E2", "E3", "E4", "s"]}, "no channel has a position"),
        (SESSION, "torn", "cannot be read .*damaged"),
        ("sub-01/*/*.npy", None, "sub-01 has no ses-.*kind="),
    ],
)
def test_eeg2_refuses(tmp_path, name, changes, words):
    root = make_eeg2(tmp_path / "b")
    if changes is None:
        for path in root.glob(name):
            path.unlink()
    elif changes == "torn":
        os.truncate(root / name, 9000)
    else:
        whole = raw_eeg2([1, 2])[0] if name == SESSION else {}
        np.save(root / name, whole | changes)
    with pytest.raises(InputError, match=words):
        prepare(things2, root=root, out_dir=tmp_path / "out", **AS_IS)


# ---- synthetic

NOUNS = "tree stone river table window horse bread clock chair spoon garden bottle"
SMALL = {"objects": 12, "homographs": 1, "images": 4, "repeats": 8, "subjects": 2}
SMALL |= {"dimensions": 3, "own": 0.1}


@pytest.fixture(scope="module")
def pydocs(tmp_path_factory):
    """A small text in which the first six nouns keep one company and the others another."""
    rng, nouns, lines = np.random.default_rng(0), NOUNS.split(), []
    company = [["green", "old", "wet", "tall"], ["hot", "small", "clean", "round"]]
    for _ in range(3000):
        i = int(rng.integers(len(nouns)))
        noun, near = nouns[i], " ".join(rng.choice(company[i // 6], 3))
        uses = [f"the {noun} is {near}.", f"we {near} saw a {noun}, and {near} {noun}s."]
        lines.append(rng.choice([*uses, f"{near} see {noun}s of {near}."]))
    text, folder = " ".join(lines), tmp_path_factory.mktemp("pydocs")
    state = character_state(text)
    ids = encoding(state).encode_ordinary(text)
    write_dataset(folder, {"train": [ids], "val": [ids[:100]]}, state)
    return folder


@pytest.fixture(scope="module")
def sets(pydocs, tmp_path_factory):
    """{gain: folder} of a small set."""
    folders = {}
    for gain in (0, 6):
        folders[gain] = tmp_path_factory.mktemp("sets") / str(gain)
        prepare(synthetic, pydocs=pydocs, gain=float(gain), out_dir=folders[gain], **SMALL)
    return folders


def test_synthetic_files_are_brainvision_and_bids(sets):
    stem = sets[6] / "raw/sub-02/eeg/sub-02_task-rsvp_eeg"
    raw = mne.io.read_raw(stem.with_suffix(".vhdr"), verbose="error")
    assert raw.ch_names == synthetic.CHANNELS and raw.info["sfreq"] == 200
    described = json.loads(stem.with_suffix(".json").read_text())
    assert described["RecordingDuration"] == raw.n_times / 200
    assert "synthetic" in (sets[6] / "raw/dataset_description.json").read_text()
    one = recording.Recording(sets[6] / "sub-02")
    onsets = raw.annotations.onset[raw.annotations.description == "Stimulus/S  1"]
    np.testing.assert_allclose(one.events["onset"], onsets, atol=1e-9)  # as events.tsv has them
    assert one.synthetic and one.sfreq == 100 and len(one.signal) == raw.n_times // 2
    truth = recording.read_set(sets[6])["truth"]["subjects"]["sub-02"]
    assert one.meta["preprocessing"]["bads"] == [truth["bad"]] and np.isfinite(one.xyz).all()
    np.testing.assert_allclose(one.signal.mean(1), 0, atol=1e-9)  # average reference
    assert 5e-6 < one.signal.std() < 4e-5


def test_the_null_is_the_same_brain_without_the_objects(sets):
    """What gain adds lies in as many directions as meanings have, none before the first picture."""
    signals = {}
    for gain, folder in sets.items():
        path = folder / "raw/sub-01/eeg/sub-01_task-rsvp_eeg.eeg"
        signals[gain] = np.fromfile(path, "<f4").reshape(-1, 32)
    added = signals[6] - signals[0]
    values = np.linalg.svd(added, compute_uv=False)
    assert values[2] > 100 * values[3]
    first = round(200 * recording.Recording(sets[6] / "sub-01").events["onset"].min())
    assert np.abs(added[:first]).max() < 1e-6 * np.abs(added).max() and np.abs(added).max() > 2


def test_blocks_show_one_picture_of_every_object_twice(sets):
    events = recording.Recording(sets[6] / "sub-01").events
    seen = events[events["target"] == 0]
    for _, block in seen.groupby("block"):
        assert block["image"].str[-6:].nunique() == 1 and block["object"].nunique() == 13
        assert (block.groupby("object").size() == 2).all()
        assert (np.diff(block["onset"]) > 0.199).all()
        assert (block["object"].to_numpy()[1:] != block["object"].to_numpy()[:-1]).all()
    assert (seen.groupby("image").size() == 8).all() and seen["image"].nunique() == 13 * 4
    assert 0 < events["target"].sum() < 0.1 * len(events)
    objects = pd.read_csv(sets[6] / "objects.csv", keep_default_na=False)
    assert len(objects) == 13 and objects["word"].nunique() == 12 and objects["object"].is_unique
    shared = objects[objects["word"].duplicated(keep=False)]
    assert shared["object"].tolist() == [f"{shared['word'].iloc[0]}{n}" for n in (1, 2)]
    assert not set("|".join(objects["synonyms"]).split("|")) & set(objects["word"])


def test_training_windows_share_no_sample_with_held_out_ones():
    rng = np.random.default_rng(0)
    rows, held = rng.permutation(3000)[:100], rng.random(100) < 0.2
    taken = set()
    for row in rows[held]:
        taken.update(range(row, row + 20))
    clear = [taken.isdisjoint(range(row, row + 20)) for row in rows]
    assert synthetic.apart(rows, held, 20).tolist() == clear and 10 < sum(clear) < 80
    assert synthetic.apart(rows, held & False, 20).all()


def test_the_oracle_decodes_what_was_planted_and_nothing_from_the_null(sets):
    tables = {}
    for gain, folder in sets.items():
        tables[gain] = {row["set"]: row for row in recording.read_set(folder)["oracle"]}
    assert list(tables[6]) == ["trial", "object", "subject", "subject_object"]
    for name in ("trial", "subject"):
        planted, null = tables[6][name], tables[0][name]
        assert planted["low"] > 2 * planted["chance"] > planted["chance"] == 0.1
        assert null["low"] < null["chance"] < null["top1"] + 0.1
    for row in tables[6].values():
        assert row["low"] <= row["top1"] <= row["high"] and row["n"] > 50


def test_synthetic_data_are_reproducible_and_kept(sets, pydocs, tmp_path):
    options = {"pydocs": pydocs, "gain": 6.0, "out_dir": tmp_path, **SMALL, "subjects": 1}
    np.random.seed(1)
    prepare(synthetic, **options)
    hashes = [recording.read_meta(root / "sub-01")["sha256"] for root in (tmp_path, sets[6])]
    assert hashes[0] == hashes[1]
    before = (tmp_path / "meta.yaml").stat().st_mtime_ns
    prepare(synthetic, **options)
    assert (tmp_path / "meta.yaml").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="made with seed=0: give overwrite=True"):
        prepare(synthetic, **options, seed=1)
