"""EEG as recordings: BIDS in every format with known samples, the traps of both THINGS sets in their real layouts, hostile pickles, and a synthetic set
that holds what it says it holds."""
import http.server, io, json, os, pickle, subprocess, sys, threading
from pathlib import Path

import mne
import numpy as np
import pandas as pd
import pytest
import scipy.io
import yaml

from configurator import configure
from data import recording
from data.bids_eeg import prepare as bids
from data.synthetic_eeg import prepare as synthetic
from data.things_eeg1 import prepare as things1
from data.things_eeg2 import prepare as things2
from data.tokens import character_state, encoding, write_dataset

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["Fp1", "Cz", "Pz", "Oz"]
AS_IS = dict(l_freq=0.0, h_freq=0.0, reference="none", sfreq=0.0, bads="mark")


# ---- a BIDS folder with samples that are known

def samples(sfreq=200.0, seconds=20, seed=0):
    """(4, T) V, smooth enough for any filter of the tests."""
    time = np.arange(int(sfreq * seconds)) / sfreq
    rng = np.random.default_rng(seed)
    return 1e-5 * np.sum([np.sin(2 * np.pi * f * time + rng.uniform(0, 6, (4, 1))) for f in (1, 3, 7)], axis=0) * rng.uniform(0.5, 1, (4, 1))


def events_tsv(n=6, **columns):
    table = {"onset": 1 + 2.0 * np.arange(n), "duration": 0.1, "word": ["stove", "ice_cream", "stove", "n/a", "ant", "ant"][:n],
             "thing": ["stove1", "ice_cream", "stove2", "catch", "ant", "ant"][:n], "file": [f"f{i}.jpg" for i in (1, 2, 3, 0, 4, 4)][:n],
             "other": ["range,cooking_stove", "n/a", "range", "n/a", "emmet|pismire", "emmet|pismire"][:n], "catch": [0, 0, 0, 1, 0, 0][:n]} | columns
    return pd.DataFrame(table)


def write_format(path, data, sfreq, kind):
    """`data` (C, T) V in one of the formats, `path` without its ending."""
    names = NAMES[:len(data)]
    if kind == "vhdr":
        synthetic.write_brainvision(path, data.astype(np.float32), names, sfreq, [0])
    elif kind == "fif":
        raw = mne.io.RawArray(data, mne.create_info(names, sfreq, "eeg"), first_samp=77, verbose="error")
        raw.save(path.with_suffix(".fif"), verbose="error")
    elif kind == "set":
        eeg = dict(data=data * 1e6, srate=sfreq, nbchan=len(data), pnts=data.shape[1], trials=1, xmin=0.0, chanlocs=np.array(
            [(n, "EEG") for n in names], dtype=[("labels", object), ("type", object)]), event=[], epoch=[], ref="common", times=[], setname="", filename="",
            filepath="", icawinv=[], icaweights=[], icasphere=[], icachansind=[])
        scipy.io.savemat(path.with_suffix(".set"), {"EEG": eeg}, appendmat=False)
    else:  # edf, bdf: integers of 2 or 3 bytes, in records of a second
        low, high, size, bits = (-32768, 32767, 2, b"0       ") if kind == "edf" else (-8388608, 8388607, 3, b"\xffBIOSEMI")
        records, per = data.shape[1] // int(sfreq), int(sfreq)
        field = lambda values, width: b"".join(str(v).encode().ljust(width)[:width] for v in values)
        c = len(data)
        head = (bits if kind == "bdf" else b"0".ljust(8)) + b" " * 160 + b"01.01.2000.00.00"[:8] + b"00.00.00" + str(256 * (c + 1)).encode().ljust(8)
        head += (b"24BIT" if kind == "bdf" else b"").ljust(44) + str(records).encode().ljust(8) + b"1".ljust(8) + str(c).encode().ljust(4)
        head += field(names, 16) + b" " * 80 * c + field(["uV"] * c, 8) + field([-100] * c, 8) + field([100] * c, 8) + field([low] * c, 8)
        head += field([high] * c, 8) + b" " * 80 * c + field([per] * c, 8) + b" " * 32 * c
        digital = np.round((data * 1e6 + 100) / 200 * (high - low) + low).astype("<i4").reshape(c, records, per).transpose(1, 0, 2)
        path.with_suffix(f".{kind}").write_bytes(head + digital[..., None].view("u1").reshape(*digital.shape, 4)[..., :size].tobytes())


def make_bids(root, kind="vhdr", subjects=("01",), sfreq=200.0, events=None, stem="task-see", data=None, electrodes=True, status=None):
    for i, subject in enumerate(subjects):
        folder = root / f"sub-{subject}/eeg"
        folder.mkdir(parents=True, exist_ok=True)
        write_format(folder / f"sub-{subject}_{stem}_eeg", samples(sfreq, seed=i) if data is None else data, sfreq, kind)
        synthetic.write_table(folder / f"sub-{subject}_{stem}_events.tsv", events_tsv() if events is None else events)
        if status:
            synthetic.write_table(folder / f"sub-{subject}_{stem}_channels.tsv", pd.DataFrame({"name": NAMES, "type": "EEG", "status": status}))
        if electrodes:
            xyz = pd.DataFrame({"name": NAMES, "x": [-30, 0, 0, 0], "y": [80, 0, -50, -90], "z": [0, 100, 70, 10]})
            synthetic.write_table(folder / f"sub-{subject}_electrodes.tsv", xyz)
            (folder / f"sub-{subject}_coordsystem.json").write_text('{"EEGCoordinateSystem": "CapTrak", "EEGCoordinateUnits": "mm"}')
    (root / "dataset_description.json").write_text('{"Name": "a synthetic test", "BIDSVersion": "1.9.0"}')
    return root


def convert(root, out, **options):
    bids.main(bids.Config(root=str(root), out_dir=str(out), **options))
    return recording.read_set(out), [recording.Recording(out / name) for name in recording.read_set(out)["recordings"]]


def started(module, *options):
    """A prepare script, in this process."""
    return module.main(configure(module.Config, [str(o) for o in options]))


def command(name, *options, status=0):
    """A prepare script as a user runs it; the sentence where it must be refused."""
    done = subprocess.run([sys.executable, str(ROOT / f"data/{name}/prepare.py"), *map(str, options)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == status, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr and len(lines) == (status == 2), done.stderr
    return lines[0] if lines else done.stdout


def test_brainvision_files_hold_exact_samples_and_markers(tmp_path):
    signal = samples().astype(np.float32)
    synthetic.write_brainvision(tmp_path / "a_eeg", signal, NAMES, 200.0, [0, 17, 3999])
    raw = mne.io.read_raw_brainvision(tmp_path / "a_eeg.vhdr", verbose="error")
    assert raw.ch_names == NAMES and raw.info["sfreq"] == 200 and raw.n_times == 4000
    np.testing.assert_array_equal((raw.get_data() * 1e6).astype(np.float32), signal * np.float32(1e6))
    assert [round(a["onset"] * 200) for a in raw.annotations if a["description"] == "Stimulus/S  1"] == [0, 17, 3999]


@pytest.mark.parametrize("kind, error", [("vhdr", 1e-12), ("fif", 1e-12), ("edf", 4e-9), ("bdf", 2e-11), ("set", 1e-12)])
def test_every_format_gives_the_same_samples(tmp_path, kind, error):
    meta, (one,) = convert(make_bids(tmp_path / "b", kind), tmp_path / "out", **AS_IS)
    np.testing.assert_allclose(one.signal, samples().T, atol=error, rtol=1e-6)
    assert one.names == NAMES and one.unit == "V" and one.subject == "01" and one.synthetic and meta["synthetic"]
    np.testing.assert_allclose(one.xyz[0], [-0.03, 0.08, 0], atol=1e-7)
    assert one.rows(one.events["onset"]).tolist() == [200, 600, 1000, 1800, 2200] and (one.first_sample == 77) == (kind == "fif")
    assert one.meta["dropped"]["events without onset or word"] == 1 == meta["dropped"]["events without onset or word"]


def test_events_say_object_word_synonyms_and_picture(tmp_path):
    meta, (one,) = convert(make_bids(tmp_path / "b"), tmp_path / "out", **AS_IS, word_column="", object_column="thing", image_column="file",
                           synonyms_column="other", target_column="catch")
    events = one.events
    assert events["word"].tolist() == ["stove", "ice cream", "stove", "catch", "ant", "ant"] and events["target"].tolist() == [0, 0, 0, 1, 0, 0]
    assert events["object"].tolist() == ["stove1", "ice_cream", "stove2", "catch", "ant", "ant"]
    assert events["image"].tolist() == ["f1.jpg", "f2.jpg", "f3.jpg", "f0.jpg", "f4.jpg", "f4.jpg"]
    assert events["synonyms"].tolist() == ["range|cooking stove", "", "range", "", "emmet|pismire", "emmet|pismire"]
    objects = pd.read_csv(tmp_path / "out/objects.csv", keep_default_na=False)
    assert objects["object"].tolist() == ["ant", "ice_cream", "stove1", "stove2"] and meta["objects"] == 4 and meta["words"] == 3


@pytest.mark.parametrize("name, word", [("stove2", "stove"), ("ice_cream", "ice cream"), ("t-shirt", "t-shirt"), ("baton4", "baton"), ("7up", "7up")])
def test_unique_names_become_words(name, word):
    assert bids.word_of(name) == word


def test_sessions_and_runs_are_told_apart_in_names(tmp_path):
    root = tmp_path / "b"
    for stem in ("ses-1_task-see_run-1", "ses-1_task-see_run-2"):
        make_bids(root, stem=stem, electrodes=False)
    make_bids(root, subjects=("02",), stem="ses-1_task-see_run-1", electrodes=False)
    assert [n for n, _ in bids.find(root)] == ["sub-01_run-1", "sub-01_run-2", "sub-02_run-1"]
    assert [n for n, _ in bids.find(root, ["sub-02"])] == ["sub-02"]


@pytest.mark.parametrize("how", ["interpolate", "mark", "drop"])
def test_bad_flat_and_nan_channels(tmp_path, how):
    data = np.concatenate([samples(), samples(seed=1), samples(seed=2)])[:8]
    names = ["Fp1", "Cz", "Pz", "Oz", "P3", "P4", "Fz", "C3"]
    data[1], data[2, 7] = 3e-6, np.nan
    info = mne.create_info(names, 200.0, "eeg")
    raw = mne.io.RawArray(data, info, verbose="error")
    raw.info["bads"] = ["Oz"]
    done = bids.preprocess(raw, bids.Config(**AS_IS | dict(bads=how, reference="average")), "r")
    assert done["flat"] == ["Cz"] and done["nan"] == ["Pz"] and done["bads"] == ["Cz", "Pz", "Oz"] and np.isfinite(raw.get_data()).all()
    if how == "drop":
        assert raw.ch_names == ["Fp1", "P3", "P4", "Fz", "C3"]
    elif how == "mark":
        assert raw.info["bads"] == ["Cz", "Pz", "Oz"]
    else:  # splines put the neighbours' mean there
        assert not raw.info["bads"] and np.ptp(raw.get_data("Cz")) > 1e-6
    good = raw.get_data(picks=[n for n in raw.ch_names if n not in raw.info["bads"]])
    np.testing.assert_allclose(good.mean(0), 0, atol=1e-10)  # the average of what is good


def test_positions_in_any_frame(tmp_path):
    root = make_bids(tmp_path / "b")
    (folder,) = root.glob("sub-01/eeg")
    (folder / "sub-01_coordsystem.json").write_text('{"EEGCoordinateSystem": "EEGLAB", "EEGCoordinateUnits": "mm"}')  # x to the nose
    _, (one,) = convert(root, tmp_path / "out", **AS_IS)
    np.testing.assert_allclose(one.xyz[0], [-0.08, -0.03, 0], atol=1e-7)
    (folder / "sub-01_coordsystem.json").write_text(json.dumps({"EEGCoordinateSystem": "CapTrak", "EEGCoordinateUnits": "mm", "AnatomicalLandmarkCoordinates": {
        "NAS": [0, 120, 5], "LPA": [-75, 20, 5], "RPA": [75, 20, 5]}}))  # the ears' line is at y = 20, z = 5
    _, (one,) = convert(root, tmp_path / "out2", **AS_IS)
    np.testing.assert_allclose(one.xyz[0], [-0.03, 0.06, -0.005], atol=1e-6)
    (folder / "sub-01_coordsystem.json").write_text(json.dumps({"EEGCoordinateSystem": "EEGLAB", "EEGCoordinateUnits": "mm", "AnatomicalLandmarkCoordinates": {
        "NAS": [120, 0, 5], "LPA": [20, 75, 5], "RPA": [20, -75, 5]}}))
    _, (one,) = convert(root, tmp_path / "out4", **AS_IS)
    np.testing.assert_allclose(one.xyz[0], [-0.08, -0.05, -0.005], atol=1e-6)
    for path in folder.glob("*electrodes.tsv"):
        path.unlink()
    _, (one,) = convert(root, tmp_path / "out3", **AS_IS)
    assert np.isfinite(one.xyz).all() and one.xyz[3, 1] < -0.05 < 0.05 < one.xyz[1, 2]  # Oz behind, Cz above
    assert one.meta["preprocessing"]["positions"] == "colin27_1005"


def test_resampling_keeps_event_times_and_does_not_alias(tmp_path):
    sfreq, onset = 512.0, 3.0
    time = np.arange(int(20 * sfreq)) / sfreq
    data = np.stack([1e-5 * np.exp(-0.5 * ((time - onset) / 0.03) ** 2), 1e-5 * np.sin(2 * np.pi * 110 * time), 1e-6 * np.sin(time), 1e-6 * np.cos(time)])
    for kind in ("vhdr", "fif"):
        events = events_tsv(1, onset=[onset])
        _, (one,) = convert(make_bids(tmp_path / kind, kind, sfreq=sfreq, data=data, events=events), tmp_path / f"{kind}-out", **AS_IS | dict(sfreq=100.0))
        assert one.sfreq == 100 and abs(one.signal[:, 0].argmax() - one.rows(one.events["onset"])[0]) <= 1
        assert np.abs(one.signal[50:-50, 1]).max() < 3e-7  # 110 Hz would be 10 Hz


def test_conversion_goes_on_where_it_was(tmp_path, capsys):
    root, out = make_bids(tmp_path / "b", subjects=("01", "02")), tmp_path / "out"
    convert(root, out, **AS_IS)
    before = (out / "sub-01/signal.f32").stat().st_mtime_ns
    (out / "meta.yaml").unlink()
    (out / "sub-02/signal.f32").write_bytes(b"torn")
    capsys.readouterr()
    convert(root, out, **AS_IS)
    assert "sub-01: there already" in (said := capsys.readouterr().out) and "sub-02: 5 events" in said
    assert (out / "sub-01/signal.f32").stat().st_mtime_ns == before and recording.complete(out)
    convert(root, out, **AS_IS | dict(l_freq=1.0))
    assert (out / "sub-01/signal.f32").stat().st_mtime_ns != before  # other options, other signal
    make_bids(tmp_path / "b", status=["good", "good", "bad", "good"])
    _, (mended, _) = convert(root, out, **AS_IS | dict(l_freq=1.0))
    assert not mended.good[2] and mended.good.sum() == 3  # a table that somebody mended is read again


def spoil(folder, what):
    stem = folder / "sub-01/eeg/sub-01_task-see"
    if what == "events":
        Path(f"{stem}_events.tsv").unlink()
    elif what == "eeg":
        for part in stem.parent.glob("*_eeg.*"):
            part.unlink()
    elif what == "torn":
        Path(f"{stem}_eeg.json").write_text('{"RecordingDuration": 20}')
        with open(f"{stem}_eeg.eeg", "r+b") as file:
            file.truncate(4 * 4 * 1000)
    elif what == "header":
        Path(f"{stem}_eeg.vhdr").write_text("Brain Vision Data Exchange Header File Version 1.0\n")
    elif what == "names":
        synthetic.write_table(f"{stem}_channels.tsv", pd.DataFrame({"name": ["A1", "A2"], "type": "EEG"}))
    elif what == "types":
        synthetic.write_table(f"{stem}_channels.tsv", pd.DataFrame({"name": NAMES, "type": "MISC"}))


@pytest.mark.parametrize("options, events, what, words", [
    ({}, {}, "events", ["sub-01_task-see_eeg.vhdr", "no events.tsv", "subjects="]),
    ({}, {"word": ["n/a"] * 6}, "", ["events.tsv", "no event with an onset and a word", "subjects="]),
    ({"word_column": "name"}, {}, "", ["no column 'name'", "word_column", "onset, duration, word"]),
    ({"image_column": "stim"}, {}, "", ["no column 'stim'", "image_column"]),
    ({"word_column": ""}, {}, "", ["word_column and object_column are both empty"]),
    ({}, {"onset": ["a"] * 6}, "", ["onset 'a' in row 1 is no number"]),
    ({}, {"onset": np.arange(6) * 1e4 + 1e5}, "", ["every onset lies outside the 20 s", "samples or ms"]),
    ({"subjects": ["09"]}, {}, "", ["no sub-09", "there are 01"]),
    ({"task": "hear"}, {}, "", ["no EEG recording", "'hear'"]),
    ({}, {}, "eeg", ["sub-01", "no EEG recording", "subjects="]),
    ({}, {}, "torn", ["is 5 s long", "says 20", "torn"]),
    ({}, {}, "header", ["sub-01_task-see_eeg.vhdr cannot be read"]),
    ({}, {}, "names", ["does not name the channel 'Fp1'"]),
    ({}, {}, "types", ["no channel of type EEG"]),
    ({"montage": "none"}, {}, "places", ["sub-01: no channel has a position (Fp1", "electrodes.tsv", "montage="]),
    ({"reference": "M1,M2"}, {}, "", ["reference=M1,M2", "no channel 'M1'"]),
    ({}, {}, "flat", ["3 of 4 channels are bad (3 flat"]),
])
def test_what_cannot_be_read_is_a_sentence(tmp_path, options, events, what, words):
    data = samples() * np.array([[1], [0], [0], [0]]) if what == "flat" else None
    root = make_bids(tmp_path / "b", events=events_tsv(**events), data=data, electrodes=what != "places")
    spoil(root, what)
    with pytest.raises((ValueError, FileNotFoundError)) as refusal:
        convert(root, tmp_path / "out", **AS_IS | options)
    assert all(w in str(refusal.value) for w in words), refusal.value
    assert not (tmp_path / "out/meta.yaml").exists()


@pytest.mark.parametrize("options, words", [
    (["root=/nonexistent"], "root=/nonexistent is no BIDS folder"), ([], "root= is missing"), (["sfreq=50"], "h_freq=40 is above half of sfreq=50"),
    (["l_freq=50"], "l_freq=50 is not below"), (["montage=mine"], "montage='mine' is none of MNE's: .*colin27_1005"), (["l_freq=-1"], "at least 0"),
    (["bads=keep"], "option 'bads' must be interpolate or mark or drop")])
def test_bad_options_are_refused(options, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        started(bids, *options)


def test_the_command_refuses_with_one_sentence(tmp_path):
    assert "no BIDS folder" in command("bids_eeg", "root=/nonexistent", status=2)
    assert "subjects= is missing" in command("things_eeg1", f"out_dir={tmp_path}", status=2)
    assert "root=... must be the folder" in command("things_eeg2", status=2)


# ---- THINGS-EEG1

def eeg1_rows(n=12, sfreq=200.0):
    """events.tsv as OpenNeuro has it: two sequences and a test sequence, one catch trial."""
    things = ["stove2", "calf1", "stove1", "balance_beam", "go-kart", "calf1"] * (n // 6)
    onset = 2 + 0.1 * np.arange(n) + 3.0 * (np.arange(n) // 6)
    stim = [f"stimuli\\{t}\\{t}_{1 + i:02d}s.jpg" for i, t in enumerate(things)]
    return pd.DataFrame({"onset": onset.round(3), "duration": 50, "eventnumber": np.arange(n), "objectnumber": 1, "object": things, "sequencenumber": 0,
                         "blocksequencenumber": [0] * (n - 2) + [-1] * 2, "stim": stim, "istarget": [0, 1] + [0] * (n - 2),
                         "stimname": [s.rsplit("\\", 1)[1] for s in stim], "sample": (onset * sfreq).round().astype(int)})


def make_eeg1(root, rows):
    return make_bids(root, events=rows, stem="task-rsvp", electrodes=False)


@pytest.mark.parametrize("release", ["seconds and samples", "seconds", "samples", "renamed"])
def test_eeg1_traps(tmp_path, release):
    rows = eeg1_rows()
    if release != "seconds and samples":
        rows = rows.drop(columns="sample").assign(onset=rows["sample"] if release == "samples" else rows["onset"])
    root = make_eeg1(tmp_path / "b", rows)
    if release == "renamed":  # another mirror's: s, forward slashes, test pictures in a list
        rows = rows.assign(duration=0.05, stim=rows["stim"].str.replace("\\", "/"), blocksequencenumber=0)
        (make_eeg1(root, rows) / "test_images.csv").write_text("go-kart/go-kart_11s.jpg\ncalf1/calf1_12s.jpg\n")
    concepts = tmp_path / "things_concepts.tsv"
    concepts.write_text("Word\tuniqueID\tWordNet Synonyms\tBottom-up Category (Human Raters)\nstove\tstove2\tstove, kitchen_stove, range\ttool, appliance\n"
                        "calf\tcalf1\t\tanimal\n")
    things1.main(things1.Config(root=str(root), out_dir=str(tmp_path / "out"), concepts=str(concepts), **AS_IS))
    meta, one = recording.read_set(tmp_path / "out"), recording.Recording(tmp_path / "out/sub-01")
    events = one.events
    assert one.rows(events["onset"]).tolist() == eeg1_rows()["sample"].tolist() and set(events["duration"].round(6)) == {0.05}
    assert events["word"].tolist()[:6] == ["stove", "calf", "stove", "balance beam", "go-kart", "calf"]
    assert events["image"].tolist()[:2] == ["stove2_01s.jpg", "calf1_02s.jpg"] and events["target"].sum() == 1 == events["target"].iloc[1]
    assert events["phase"].tolist() == ["train"] * 10 + ["test"] * 2 and events["block"].tolist() == [1] * 6 + [2] * 6
    assert events["synonyms"].iloc[0] == "kitchen stove|range" and events["category"].iloc[0] == "tool" and events["category"].iloc[2] == ""
    assert meta["objects"] == 5 and meta["words"] == 4 and not meta["synthetic"] and np.isfinite(one.xyz).all()


class Server(http.server.BaseHTTPRequestHandler):
    """Files with ranges, as S3 gives them; `broken` cuts every answer short."""
    root, broken, log = None, 0, []

    def do_HEAD(self, body=False):
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            Server.log.append((path.name, start))
            self.wfile.write(data[start:start + self.broken] if self.broken else data[start:])

    def do_GET(self):
        self.do_HEAD(body=True)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    Server.root, Server.broken, Server.log = make_eeg1(tmp_path / "remote", eeg1_rows()), 0, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_eeg1_is_fetched_and_goes_on_after_a_stop(server, tmp_path, capsys):
    config = things1.Config(url=server, subjects=["01"], out_dir=str(tmp_path / "out"), **AS_IS)
    Server.broken = 5000
    with pytest.raises(OSError, match=r"sub-01_task-rsvp_eeg.eeg: 5,000 of 64,000 bytes .* run the same command again"):
        things1.main(config)
    Server.broken = 0
    things1.main(config)
    assert ("sub-01_task-rsvp_eeg.eeg", 5000) in Server.log and recording.complete(tmp_path / "out")
    asked = len(Server.log)
    things1.main(config)
    assert len(Server.log) == asked and "0.00 GB of it to fetch" in capsys.readouterr().out
    (tmp_path / "out/raw/sub-01/eeg/sub-01_task-rsvp_eeg.eeg").write_bytes(b"torn")
    things1.main(config)
    assert len(Server.log) == asked + 1  # by its size
    with pytest.raises((OSError, ValueError), match="HTTP 404"):
        things1.main(things1.Config(url=server, subjects=["51"], out_dir=str(tmp_path / "out")))


def test_eeg1_refuses(tmp_path, monkeypatch, server):
    root = make_eeg1(tmp_path / "b", eeg1_rows())
    with pytest.raises((OSError, ValueError), match="concepts=nosuch is not there"):
        started(things1, f"root={root}", "concepts=nosuch", f"out_dir={tmp_path / 'out'}")
    with pytest.raises(OSError, match="cannot be reached"):
        started(things1, "subjects=1", "url=http://127.0.0.1:9", f"out_dir={tmp_path / 'out'}")
    with pytest.raises(ValueError, match="no column 'stim'.*is this ds003825"):
        things1.events_of(eeg1_rows().drop(columns="stim").astype(str), "events.tsv", things1.Config(), 200.0)
    monkeypatch.setattr(things1.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10_000}))
    with pytest.raises(OSError, match="choose fewer subjects"):
        things1.fetch_subjects(server, tmp_path / "full", ["01"])


# ---- THINGS-EEG2

CONCEPTS = ["00001_aardvark", "00002_stove1", "00003_stove2"]


def metadata(root, images=2):
    found = {}
    for phase, concepts, n in (("train", CONCEPTS, images), ("test", ["00007_ice_cream", "00008_ant"], 1)):
        found[f"{phase}_img_concepts_THINGS"] = [c for c in concepts for _ in range(n)]
        found[f"{phase}_img_files"] = [f"{c[6:]}_{i:02d}s.jpg" for c in concepts for i in range(n)]
    np.save(root / "image_metadata.npy", found)


def raw_eeg2(codes, sfreq=200.0):
    """A session's dictionary: the codes every 0.2 s from 1 s on, held for 2 samples."""
    data, at = np.concatenate([samples(), np.zeros((1, 4000))]), (sfreq * (1 + 0.2 * np.arange(len(codes)))).astype(int)
    data[-1, at] = data[-1, at + 1] = codes
    return {"raw_eeg_data": data, "ch_names": [*NAMES, "stim"], "ch_types": ["eeg"] * 4 + ["stim"], "sfreq": sfreq}, at


def make_eeg2(root, codes=(1, 6, 99999, 3)):
    root.mkdir(exist_ok=True)
    metadata(root)
    for session in ("ses-01", "ses-02"):
        folder = root / "sub-01" / session
        folder.mkdir(parents=True)
        np.save(folder / "raw_eeg_training.npy", raw_eeg2(codes)[0])
        np.save(folder / "raw_eeg_test.npy", raw_eeg2([2, 1, 2])[0])
    return root


def test_eeg2_raw(tmp_path):
    things2.main(things2.Config(root=str(make_eeg2(tmp_path / "b")), out_dir=str(tmp_path / "out"), **AS_IS))
    meta = recording.read_set(tmp_path / "out")
    assert meta["recordings"] == ["sub-01_ses-01_test", "sub-01_ses-01_train", "sub-01_ses-02_test", "sub-01_ses-02_train"]
    one = recording.Recording(tmp_path / "out/sub-01_ses-01_train")
    np.testing.assert_allclose(one.signal, samples().T, rtol=1e-6)
    assert one.names == NAMES and np.isfinite(one.xyz).all() and one.rows(one.events["onset"]).tolist() == raw_eeg2([1] * 4)[1].tolist()
    assert one.events["object"].tolist() == ["aardvark", "stove2", "catch", "stove1"] and one.events["word"].tolist() == ["aardvark", "stove", "", "stove"]
    assert one.events["target"].tolist() == [0, 0, 1, 0] and one.events["image"].tolist() == ["aardvark_00s.jpg", "stove2_01s.jpg", "catch", "stove1_00s.jpg"]
    test = recording.Recording(tmp_path / "out/sub-01_ses-01_test").events
    assert test["word"].tolist() == ["ant", "ice cream", "ant"] and set(test["phase"]) == {"test"} and meta["objects"] == 5 and meta["words"] == 4


@pytest.mark.parametrize("cut", [0, 5])
def test_eeg2_epochs_stand_one_after_the_other(tmp_path, cut):
    root = tmp_path / "b"
    (root / "sub-01").mkdir(parents=True)
    metadata(root)
    rng, times = np.random.default_rng(0), np.arange(-20, 30) / 100
    for phase, n, repeats in (("training", 6, 2), ("test", 2, 3)):
        data = rng.normal(size=(n, repeats, 4, 50 - cut))
        np.save(root / f"sub-01/preprocessed_eeg_{phase}.npy", {"preprocessed_eeg_data": data, "ch_names": NAMES, "times": times})
        if phase == "training":
            train = data
    things2.main(things2.Config(root=str(root), kind="preprocessed", out_dir=str(tmp_path / "out")))
    meta, one = recording.read_set(tmp_path / "out"), recording.Recording(tmp_path / "out/sub-01_train")
    tmin, length = times[cut], 50 - cut
    assert meta["epoch_samples"] == one.meta["epoch_samples"] == length and meta["epoch_tmin"] == one.meta["epoch_tmin"] == pytest.approx(tmin)
    assert one.sfreq == 100 and one.unit == "a.u."
    first = one.rows(one.events["onset"]) + round(meta["epoch_tmin"] * one.sfreq)  # where each event's epoch starts
    assert first.tolist() == [length * i for i in range(12)] and len(one.signal) == 12 * length
    for (picture, repeat), row in zip([(p, r) for p in range(6) for r in range(2)], first):
        np.testing.assert_allclose(one.signal[row:row + length], train[picture, repeat].T, rtol=1e-6)
    assert one.events["image"].nunique() == 6 and one.events["word"].tolist()[-1] == "stove"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_plain_data_are_read_and_large_arrays_are_mapped(tmp_path, protocol, order, monkeypatch):
    monkeypatch.setattr(things2, "LARGE", 1 << 18)
    data = {"raw_eeg_data": np.asarray(np.random.default_rng(0).normal(size=(7, 70_000)), order=order), "small": np.arange(5, dtype=">i2"),
            "one": np.float32(2.5), "names": np.array(["a", "bé"]), "list": ["Fp1", ("x", 1, None, True, 2.5)], "none": {}, "sfreq": 1000,
            "objects": np.array(["u", {"v": 1}], dtype=object)}
    path = tmp_path / "a.npy"
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    found = things2.read_dict(path, "raw_eeg_data")
    np.testing.assert_array_equal(found["raw_eeg_data"], data["raw_eeg_data"])
    base = found["raw_eeg_data"]
    while not isinstance(base, np.memmap) and getattr(base, "base", None) is not None:
        base = base.base
    assert isinstance(base, np.memmap) == (protocol > 2)
    assert found["small"].tolist() == [0, 1, 2, 3, 4] and found["one"] == 2.5 and found["names"].tolist() == ["a", "bé"] and found["objects"] == ["u", {"v": 1}]
    assert found["list"] == data["list"] and found["none"] == {} and found["sfreq"] == 1000
    np.save(path, data)
    np.testing.assert_array_equal(things2.read_dict(path)["raw_eeg_data"], data["raw_eeg_data"])


class Hostile:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("call, args, words", [(os.system, ("touch {}",), "posix.system"), (eval, ("open('{}', 'w')",), "eval"), (np.load, ("{}",), "numpy"),
                                               (getattr, (np, "save"), "getattr"), (io.open, ("{}", "w"), "open")])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickles_are_refused_and_nothing_happens(tmp_path, call, args, words, protocol):
    mark = tmp_path / "owned"
    args = tuple(a.format(mark) if isinstance(a, str) else a for a in args if not hasattr(a, "__path__")) or ("save",)
    for name, thing in (("a.npy", np.array({"raw_eeg_data": Hostile(call, *args)}, dtype=object)), ("b.npy", {"k": Hostile(call, *args)})):
        if name == "a.npy":
            np.save(tmp_path / name, thing)
        else:
            (tmp_path / name).write_bytes(pickle.dumps(thing, protocol=protocol))
        with pytest.raises(ValueError, match=rf"{name} is refused: it asks for .*{words}"):
            things2.read_dict(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("code", [
    b"cnumpy\nndarray\n(N}X\x0c\x00\x00\x00__setstate__K\x01stb.",      # sets an attribute of a class that later files use
    b"cnumpy.core.multiarray\n_reconstruct\n}X\x01\x00\x00\x00aK\x01sb0}.",  # or of a function, and then says nothing
    b"cnumpy\nload\n(X\x01\x00\x00\x00atR.", b"(X\x02\x00\x00\x00idos\nsystem\n.", b"\x82\x01.", b"Pos.system\n.", b"K\x01.", b"", b"garbage", b"\x80\x09.",
    b"\x8e" + (1 << 40).to_bytes(8, "little") + b"abc"])
def test_bytes_of_any_kind_are_a_sentence(tmp_path, code):
    before = [dict(vars(known)) for known in things2._Unpickler.KNOWN.values() if hasattr(known, "__dict__")]
    (tmp_path / "a.npy").write_bytes(code)
    with pytest.raises(ValueError, match="a.npy"):
        things2.read_dict(tmp_path / "a.npy")
    assert before == [dict(vars(known)) for known in things2._Unpickler.KNOWN.values() if hasattr(known, "__dict__")]


def change(root, **changes):
    path = root / "sub-01/ses-01/raw_eeg_training.npy"
    np.save(path, raw_eeg2([1, 2])[0] | changes)


@pytest.mark.parametrize("spoiled, words", [
    (lambda r: (r / "image_metadata.npy").unlink(), "image_metadata.npy is not there: fetch it from osf.io"),
    (lambda r: (r / "image_metadata.npy").write_bytes(pickle.dumps({"train_img_files": []})), "lacks the key 'train_img_concepts_THINGS'"),
    (lambda r: change(r, raw_eeg_data=raw_eeg2([1, 7])[0]["raw_eeg_data"]), "code 7 is none of the 6 pictures"),
    (lambda r: change(r, raw_eeg_data=raw_eeg2([])[0]["raw_eeg_data"]), "no event in its stim channel"),
    (lambda r: change(r, ch_names=["a"]), "does not fit 1 channel names"),
    (lambda r: change(r, ch_types=["eeg"] * 5), "0 stim channels"),
    (lambda r: change(r, ch_names=["E1", "E2", "E3", "E4", "stim"]), r"no channel has a position \(E1"),
    (lambda r: change(r, raw_eeg_data=np.concatenate([np.zeros((4, 4000)), raw_eeg2([1])[0]["raw_eeg_data"][4:]])), "4 flat"),
    (lambda r: os.truncate(r / "sub-01/ses-01/raw_eeg_training.npy", 9000), "ends too early .*fetch it again"),
    (lambda r: np.save(r / "sub-01/ses-01/raw_eeg_training.npy", np.zeros(3)), "an array of float64"),
    (lambda r: [p.unlink() for p in r.glob("sub-01/*/*.npy")], "sub-01 has no ses-.*kind="),
])
def test_eeg2_refuses(tmp_path, spoiled, words):
    root = make_eeg2(tmp_path / "b")
    spoiled(root)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        things2.main(things2.Config(root=str(root), out_dir=str(tmp_path / "out"), **AS_IS))


# ---- synthetic

NOUNS = "tree stone river table window horse bread clock chair spoon garden bottle".split()


@pytest.fixture(scope="module")
def pydocs(tmp_path_factory):
    """A small text in which the first six nouns keep one company and the others another."""
    rng, lines = np.random.default_rng(0), []
    for _ in range(6000):
        i = int(rng.integers(len(NOUNS)))
        near = " ".join(rng.choice(["green", "old", "wet", "tall"] if i < 6 else ["hot", "small", "clean", "round"], 3))
        lines.append(rng.choice([f"the {NOUNS[i]} is {near}.", f"we {near} saw a {NOUNS[i]}, and {near} {NOUNS[i]}s.", f"{near} see {NOUNS[i]}s of {near}."]))
    text, folder = " ".join(lines), tmp_path_factory.mktemp("pydocs")
    state = character_state(text)
    ids = encoding(state).encode_ordinary(text)
    write_dataset(folder, {"train": [ids], "val": [ids[:100]]}, state)
    return folder


SMALL = ["objects=12", "homographs=1", "images=4", "repeats=8", "subjects=2", "dimensions=3", "own=0.1"]


@pytest.fixture(scope="module")
def made(pydocs, tmp_path_factory):
    """{gain: folder} of a small set."""
    folders = {gain: tmp_path_factory.mktemp("made") / str(gain) for gain in (0, 6)}
    for gain, folder in folders.items():
        started(synthetic, f"pydocs={pydocs}", f"out_dir={folder}", f"gain={gain}", *SMALL)
    return folders


def test_nouns_and_meanings_are_the_text_s_own(pydocs):
    ids, names = synthetic.read_words(pydocs)
    found = synthetic.nouns(ids, names, 12)
    assert sorted(found) == sorted(NOUNS)
    vectors = synthetic.meanings(ids, names, NOUNS, 3)
    np.testing.assert_allclose(vectors.std(0), 1)
    unit = vectors[:, 0] / np.abs(vectors[:, 0]).max()
    assert min(abs(unit[:6].mean() - unit[6:].mean()), 1) > 5 * unit[:6].std()  # the company they keep
    with pytest.raises(ValueError, match="objects=13: the text has only 12 nouns"):
        synthetic.nouns(ids, names, 13)


def test_synthetic_files_are_brainvision_and_bids(made):
    raw = mne.io.read_raw(made[6] / "raw/sub-02/eeg/sub-02_task-rsvp_eeg.vhdr", verbose="error")
    assert raw.ch_names == synthetic.CHANNELS and raw.info["sfreq"] == 200
    described = json.loads((made[6] / "raw/sub-02/eeg/sub-02_task-rsvp_eeg.json").read_text())
    assert described["RecordingDuration"] == raw.n_times / 200 and "synthetic" in (made[6] / "raw/dataset_description.json").read_text()
    one = recording.Recording(made[6] / "sub-02")
    onsets = raw.annotations.onset[raw.annotations.description == "Stimulus/S  1"]
    np.testing.assert_allclose(one.events["onset"], onsets, atol=1e-9)  # markers and events.tsv say the same
    assert one.synthetic and one.sfreq == 100 and len(one.signal) == raw.n_times // 2 and np.isfinite(one.xyz).all()
    assert one.meta["preprocessing"]["bads"] == [recording.read_set(made[6])["truth"]["subjects"]["sub-02"]["bad"]]
    np.testing.assert_allclose(one.signal.mean(1), 0, atol=1e-9)  # average reference
    assert 5e-6 < one.signal.std() < 4e-5


def test_the_null_is_the_same_brain_without_the_objects(made):
    """What gain adds lies in as many directions as meanings have, and nowhere before the first picture."""
    with_, without = (np.fromfile(made[g] / "raw/sub-01/eeg/sub-01_task-rsvp_eeg.eeg", "<f4").reshape(-1, 32) for g in (6, 0))
    added = with_ - without
    values = np.linalg.svd(added, compute_uv=False)
    assert values[2] > 100 * values[3]
    first = round(200 * recording.Recording(made[6] / "sub-01").events["onset"].min())
    assert np.abs(added[:first]).max() < 1e-6 * np.abs(added).max() and np.abs(added).max() > 2


def test_blocks_show_one_picture_of_every_object_twice(made):
    events = recording.Recording(made[6] / "sub-01").events
    seen = events[events["target"] == 0]
    for _, block in seen.groupby("block"):
        assert block["image"].str[-6:].nunique() == 1 and (block.groupby("object").size() == 2).all() and block["object"].nunique() == 13
        assert (np.diff(block["onset"]) > 0.199).all() and (block["object"].to_numpy()[1:] != block["object"].to_numpy()[:-1]).all()
    assert (seen.groupby("image").size() == 8).all() and seen["image"].nunique() == 13 * 4 and 0 < events["target"].sum() < 0.1 * len(events)
    objects = pd.read_csv(made[6] / "objects.csv", keep_default_na=False)
    assert len(objects) == 13 and objects["word"].nunique() == 12 and objects["object"].is_unique
    shared = objects[objects["word"].duplicated(keep=False)]
    assert shared["object"].tolist() == [shared["word"].iloc[0] + n for n in "12"]
    assert not set("|".join(objects["synonyms"]).split("|")) & set(objects["word"])


def test_training_windows_share_no_sample_with_held_out_ones():
    rng = np.random.default_rng(0)
    rows, held = rng.permutation(3000)[:100], rng.random(100) < 0.2
    taken = {s for row in rows[held] for s in range(row, row + 20)}
    clear = [not taken & set(range(row, row + 20)) for row in rows]
    assert synthetic.apart(rows, held, 20).tolist() == clear and 10 < sum(clear) < 80
    assert synthetic.apart(rows, held & False, 20).all()


def test_the_oracle_finds_what_was_planted_and_nothing_in_the_null(made):
    tables = {gain: {row["set"]: row for row in recording.read_set(folder)["oracle"]} for gain, folder in made.items()}
    assert list(tables[6]) == ["trial", "object", "subject", "subject_object"]
    for name in ("trial", "subject"):
        assert tables[6][name]["low"] > 2 * tables[6][name]["chance"] > tables[6][name]["chance"] == 0.1
        assert tables[0][name]["low"] < tables[0][name]["chance"] < tables[0][name]["top1"] + 0.1
    for row in tables[6].values():
        assert row["low"] <= row["top1"] <= row["high"] and row["n"] > 50


def test_synthetic_is_the_same_again_and_stays(made, pydocs, tmp_path):
    options = [f"pydocs={pydocs}", "gain=6", *SMALL, f"out_dir={tmp_path}"]
    command("synthetic_eeg", *options)  # in a process of its own
    for name in ("sub-01", "sub-02"):
        assert yaml.safe_load((tmp_path / name / "meta.yaml").read_text())["sha256"] == recording.Recording(made[6] / name).meta["sha256"]
    before = (tmp_path / "meta.yaml").stat().st_mtime_ns
    started(synthetic, *options)
    assert (tmp_path / "meta.yaml").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="made with other options: give overwrite=True"):
        started(synthetic, *options, "seed=1")


@pytest.mark.parametrize("option, words", [("repeats=3", "even number"), ("objects=2", "objects=2: at least 10"), ("bads=keep", "'bads'"),
                                           ("raw_sfreq=90", "raw_sfreq=90"), ("sfreq=60", "h_freq=40")])
def test_synthetic_refuses(option, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        started(synthetic, option, f"out_dir={tmp_path}")
