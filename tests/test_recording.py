"""The recording format: what is written is what is read, whatever MNE knows comes along, and damage is a sentence."""
import mne
import numpy as np
import pandas as pd
import pytest

from data import recording


def a_raw(first_samp=100):
    rng = np.random.default_rng(0)
    info = mne.create_info(["Cz", "Pz", "stim"], 200.0, ["eeg", "eeg", "stim"])
    raw = mne.io.RawArray(rng.normal(size=(3, 1000)) * 1e-5, info, first_samp=first_samp, verbose="error")
    raw.set_montage(mne.channels.make_dig_montage({"Cz": [0, 0, 0.1]}, coord_frame="head"), on_missing="ignore", verbose="error")
    raw.info["bads"] = ["Pz"]
    return raw


def test_a_raw_comes_back_with_places_bads_and_first_sample(tmp_path):
    raw = a_raw()
    events = pd.DataFrame({"onset": [2.0, 1.0], "word": ["null", "NA"]})
    recording.write_raw(tmp_path / "s/sub-1", raw, events, subject="1", source="a test", synthetic=True, block_s=0.7)
    recording.write_set(tmp_path / "s", ["sub-1"], synthetic=True)
    read = recording.Recording(tmp_path / "s/sub-1")
    assert read.names == ["Cz", "Pz"] and read.good.tolist() == [True, False] and read.sfreq == 200 and read.unit == "V" and read.synthetic
    np.testing.assert_array_equal(read.signal, raw.get_data(picks=["Cz", "Pz"]).T.astype("f4"))
    np.testing.assert_allclose(read.xyz[0], [0, 0, 0.1], atol=1e-7)
    assert np.isnan(read.xyz[1]).all()
    assert read.events["word"].tolist() == ["null", "NA"]  # words, not missing values
    assert read.rows([2.0, 0.5]).tolist() == [300, 0]      # the clock starts first_sample before row 0
    assert recording.complete(tmp_path / "s") and recording.read_set(tmp_path / "s")["recordings"] == ["sub-1"]


def write(folder, **changes):
    given = dict(signal=np.zeros((10, 2), "f4"), channels=pd.DataFrame({"name": ["a", "b"]}), events=pd.DataFrame({"onset": [0.0]}), sfreq=10.0,
                 unit="V", subject="1", source="a test", synthetic=True) | changes
    return recording.write_recording(folder, **given)


@pytest.mark.parametrize("changes,words", [
    (dict(events=pd.DataFrame({"onset": [0.0, np.nan]})), "row 2 is not a finite number of seconds"),
    (dict(events=pd.DataFrame({"word": ["a"]})), "needs a column 'onset'"),
    (dict(channels=pd.DataFrame({"name": ["a", "a"]})), "'a' stands there twice"),
    (dict(channels=pd.DataFrame({"name": ["a", "b"], "status": ["good", "ugly"]})), "not 'ugly'"),
    (dict(signal=np.zeros((10, 3))), "2 channels"),
    (dict(sfreq=0), "sfreq=0"),
])
def test_what_does_not_fit_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "r", **changes)
    assert not (tmp_path / "r/meta.yaml").exists()


def test_damage_is_a_sentence(tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match="does not exist"):
        recording.Recording(tmp_path / "none")
    write(tmp_path / "r")
    (tmp_path / "r/signal.f32").write_bytes(b"\0" * 79)
    with pytest.raises(ValueError, match="79 bytes long where 10 samples of 2 channels take 80"):
        recording.Recording(tmp_path / "r")
    (tmp_path / "r/meta.yaml").write_text("format: other\n")
    with pytest.raises(ValueError, match="'other' where 'recording-1'"):
        recording.Recording(tmp_path / "r")
    with pytest.raises(ValueError, match="at least one recording"):
        recording.write_set(tmp_path, [], synthetic=True)
