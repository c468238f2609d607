"""The recording format: what is written is what is read, damage is a sentence, hours fit."""

import tracemalloc

import mne
import numpy as np
import pandas as pd
import pytest

from data import InputError, recording
from data.montage import choose_electrodes


def make_raw(*types):
    data = np.random.default_rng(0).normal(size=(2, 1000)) * 1e-5
    info = mne.create_info(["Cz", "Pz"], 200.0, list(types))
    return mne.io.RawArray(data, info, first_samp=100, verbose="error")


def test_a_raw_comes_back_with_places_bads_and_first_sample(tmp_path):
    raw = make_raw("eeg", "eeg")
    montage = mne.channels.make_dig_montage({"Cz": [0, 0, 0.1]}, coord_frame="head")
    raw.set_montage(montage, on_missing="ignore", verbose="error")
    raw.info["bads"] = ["Pz"]
    events = pd.DataFrame({"onset": [2.0, 1.0], "word": ["null", "NA"], "object": ["007", "010"]})
    recording.write_raw(tmp_path / "s/sub-1", raw, events, block_s=0.7, **META)
    recording.write_set(tmp_path / "s", ["sub-1"], synthetic=True)
    read = recording.Recording(tmp_path / "s/sub-1")
    assert read.names == ["Cz", "Pz"] and read.good.tolist() == [True, False]
    assert read.sfreq == 200 and read.unit == "V" and read.synthetic and read.subject == "1"
    np.testing.assert_array_equal(read.signal, raw.get_data().T.astype("f4"))
    np.testing.assert_allclose(read.xyz[0], [0, 0, 0.1], atol=1e-7)
    assert np.isnan(read.xyz[1]).all()
    assert read.events["word"].tolist() == ["null", "NA"]  # words, not missing values
    assert read.events["object"].tolist() == ["007", "010"]  # nor numbers
    assert read.rows([2.0, 0.5]).tolist() == [300, 0]  # the clock starts before row 0
    assert recording.complete(tmp_path / "s")
    assert recording.read_set(tmp_path / "s")["recordings"] == ["sub-1"]
    with pytest.raises(InputError, match="cannot hold channels in T and T/m"):
        recording.write_raw(tmp_path / "r", make_raw("mag", "grad"), events, **META)
    recording.write_raw(tmp_path / "r", make_raw("grad", "grad"), events, **META)
    assert recording.Recording(tmp_path / "r").unit == "T/m"


META = {"subject": "1", "source": "a test", "synthetic": True}


def write(folder, **changes):
    arguments = {"signal": np.zeros((10, 2), "f4"), "channels": pd.DataFrame({"name": ["a", "b"]})}
    arguments |= {"events": pd.DataFrame({"onset": [0.0]}), "sfreq": 10.0, "unit": "V"}
    return recording.write_recording(folder, **arguments | META | changes)


@pytest.mark.parametrize(
    "part, value, words",
    [
        ("events", {"onset": [0.0, np.nan]}, "row 2 is not a finite number"),
        ("events", {"onset": ["a"]}, "onset must be a number"),
        ("events", {"word": ["a"]}, "no column 'onset'"),
        ("channels", {"name": ["a", "a"]}, "two channels have the name 'a'"),
        ("channels", {"name": ["a", "b"], "status": "x"}, "must be good or bad, not x"),
        ("channels", {"name": ["a", "b"], "x": ["left", "0"]}, "x must be a number"),
        ("channels", {"label": ["a"]}, "no column 'name'"),
        ("signal", np.zeros((10, 3)), "2 channels"),
        ("sfreq", 0, "sfreq=0"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, part, value, words):
    if isinstance(value, dict):
        value = pd.DataFrame(value)
    with pytest.raises(InputError, match=words):
        write(tmp_path / "r", **{part: value})
    assert not (tmp_path / "r/meta.yaml").exists()


def test_damage_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        recording.Recording(tmp_path / "none")
    write(tmp_path / "r")
    (tmp_path / "r/signal.f32").write_bytes(b"\0" * 79)
    with pytest.raises(InputError, match="has 79 bytes, but 10 samples of 2 channels take 80"):
        recording.Recording(tmp_path / "r")
    (tmp_path / "r/signal.f32").unlink()
    with pytest.raises(InputError, match="signal.f32 is missing"):
        recording.Recording(tmp_path / "r")
    recording.write_set(tmp_path, ["r"], synthetic=True)
    assert not recording.complete(tmp_path)
    (tmp_path / "r/meta.yaml").write_text("format: other\n")
    with pytest.raises(InputError, match="'other', not 'recording-1'"):
        recording.Recording(tmp_path / "r")
    with pytest.raises(InputError, match="at least one recording"):
        recording.write_set(tmp_path, [], synthetic=True)


def test_channels_are_chosen_by_a_regular_expression_or_a_table(tmp_path, capsys):
    write(tmp_path / "r", channels=pd.DataFrame({"name": ["LA1", "LB1"]}))
    read = recording.Recording(tmp_path / "r")
    assert choose_electrodes([read], channels="LB")[0][1].tolist() == [1]
    with pytest.raises(InputError, match=r"channels=L\( is no regular expression"):
        choose_electrodes([read], channels="L(")
    table = tmp_path / "electrodes.csv"
    table.write_text("subject,elec\nr,LB1\n09,LZ9\n")
    assert choose_electrodes([read], electrodes=table)[0][1].tolist() == [1]
    table.write_text("subject,elec\nr,LB1\nr,LB11\n")
    assert choose_electrodes([read], electrodes=table)[0][1].tolist() == [1]
    assert "r has no LB11 of " in capsys.readouterr().out


@pytest.mark.parametrize("bands", [[], [[5, 15], [20, 40]]])
def test_a_long_signal_is_resampled_piece_by_piece(tmp_path, bands, monkeypatch):
    """As all at once, in a fraction of the file's size; channels in any order, rates uneven."""
    monkeypatch.setattr(recording, "PIECE", 100_000)
    signal = np.random.default_rng(0).normal(size=(400_000, 24)).astype("f4")
    channels = pd.DataFrame({"name": [f"E{i}" for i in range(24)]})
    write(tmp_path / "r", signal=signal, channels=channels, sfreq=128.0)
    read = recording.Recording(tmp_path / "r")
    recipe = {"sfreq": 30.0, "bands": bands}
    recording.envelope(signal[:1000, :1], 128.0, 5, 15)  # whose imports take memory
    recording.resampled(read.signal[:2000], read.sfreq, recipe, [7, 3])  # imports are no memory
    tracemalloc.start()
    out = recording.resampled(read.signal, read.sfreq, recipe, [7, 3])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.75 * signal.nbytes and len(out) == 93_750
    if not bands:  # blocks of 4 or 5 samples
        np.testing.assert_allclose(out[1, :, 0], signal[4:9, [7, 3]].mean(0), atol=1e-6)
    monkeypatch.setattr(recording, "PIECE", 1 << 21)  # all at once
    whole = recording.resampled(signal, 128.0, recipe, [7, 3])
    assert np.abs(out - whole)[100:-100].max() < 0.02 * whole.std()
