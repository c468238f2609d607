"""Published brains as stimuli with responses: on small files in the layouts that xarray writes."""

import hashlib
import zipfile

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data import InputError
from data.assembly import read_assembly, responses
from data.brainscore import prepare as brainscore
from data.digits import prepare as digits
from data.majajhong import prepare as majajhong
from data.nsd import prepare as nsd
from data.podcast_encoding import prepare as podcast_encoding
from data.recording import write_recording, write_set
from data.stimuli import Encoding, complete_encoding
from data.synthetic_brain import prepare as synthetic_brain
from tests.helpers import prepare
from tests.test_fetch import serve


def netcdf(path, values, dims=("presentation", "neuroid"), name="data", fill=np.nan, **coords):
    """A file as xarray lays it out with the NetCDF4 library.

    coords: dimension={coordinate: array}. Each dimension is a scale; coordinates are attached to
    their dimension's scale, and named in an attribute of the array.
    """
    with h5py.File(path, "w", track_order=True) as file:

        def put(key, array):
            array = np.asarray(array)
            if array.dtype.kind in "UO":
                kind = h5py.string_dtype()
                return file.create_dataset(key, data=array.astype(object), dtype=kind)
            return file.create_dataset(key, data=array, compression="gzip")

        names = []
        for dim, n in zip(dims, values.shape):
            others = dict(coords.get(dim, {}))
            if dim in others:  # a coordinate of the dimension's own name is its scale
                put(dim, others.pop(dim)).make_scale(dim)
            else:
                scale = file.create_dataset(dim, (n,), ">f4")
                scale.make_scale(f"This is a netCDF dimension but not a netCDF variable.{n:10d}")
            for key, array in others.items():
                put(key, array).dims[0].attach_scale(file[dim])
            names += others
        item = put(name, values)
        for axis, dim in enumerate(dims):
            item.dims[axis].attach_scale(file[dim])
        item.attrs["_FillValue"] = np.asarray([fill], values.dtype)
        item.attrs["coordinates"] = " ".join(names)
    return path


def tuckute(folder, n=40):
    y = np.random.default_rng(0).standard_normal((n, 1))
    rows = {"stimulus_id": np.arange(1, n + 1), "cond": ["B"] * n}
    rows["stimulus"] = [f"Sentence {i} is café." for i in range(n)]
    units = {"neuroid_id": [1], "subject_UID": ["848-853"], "roi": ["lang_LH_netw"]}
    path = folder / "assy_Tuckute2024_language.nc"
    return netcdf(path, y, presentation=rows, neuroid=units), y


def pereira(folder, ceilings=True):
    """Two experiments of 12 and 18 sentences in passages of 3, and 8 units.

    Two units are in the first experiment only, one in the second only, one has a gap.
    """
    y = np.random.default_rng(1).standard_normal((30, 8))
    y[12:, :2] = np.nan
    y[:12, 2] = np.nan
    y[4, 3] = np.nan
    rows = {"stimulus_id": [f"s{i}" for i in range(30)], "stimulus": [f"S{i}." for i in range(30)]}
    rows["experiment"] = ["243sentences"] * 12 + ["384sentences"] * 18
    rows["passage_label"] = [f"passage {i // 3}" for i in range(30)]
    units = {"neuroid_id": [f"v{i}" for i in range(8)], "atlas": ["language"] * 8}
    units["subject"] = ["018", "018", "019"] + ["020"] * 5
    netcdf(folder / "assy_Pereira2018_language.nc", y, presentation=rows, neuroid=units)
    if ceilings:
        r = np.array([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, np.nan])
        path = folder / "ceiling_raw_Pereira2018_243sentences-linear.nc"
        published = [f"v{i}" for i in (7, 6, 5, 4, 3, 1, 0)]
        netcdf(path, r, ("neuroid",), neuroid={"neuroid_id": published})
    return y


def test_other_orders_of_dimensions_and_packed_numbers(tmp_path):
    y = np.random.default_rng(0).standard_normal((40, 1))
    coords = {"image_id": {"image_id": [f"i{k}" for k in range(40)]}}
    coords |= {"neuroid": {"region": ["IT"]}, "time_bin": {"time_bin_start": [70]}}
    dims = ("neuroid", "image_id", "time_bin")
    path = tmp_path / "t.nc"
    netcdf(path, y.T[..., None].astype("<f4"), dims, name="dicarlo.set", **coords)
    values, rows, units = responses(read_assembly(path))
    assert values.shape == (40, 1) and np.allclose(values, y, atol=1e-6)
    assert rows.image_id.tolist()[-1] == "i39" and units.region.tolist() == ["IT"]
    netcdf(path, np.array([[100, -32768], [-50, 7]], "<i2"), fill=-32768)
    with h5py.File(path, "a") as file:
        file["data"].attrs["scale_factor"] = np.array([0.01])
        file["data"].attrs["add_offset"] = 1.0
    np.testing.assert_allclose(read_assembly(path).values, [[2.0, np.nan], [0.5, 1.07]])


def test_files_that_are_no_assemblies(tmp_path):
    path, y = tuckute(tmp_path)
    contents = {
        path.read_bytes()[:-2000]: "torn",
        b"CDF\x01" + bytes(100): "NetCDF3",
        b"<html>not found</html>": "torn or not NetCDF4",
    }
    for content, sentence in contents.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=sentence):
            read_assembly(path)
    netcdf(path, y, ("time", "channel"))
    with pytest.raises(InputError, match="time, channel, not presentation x neuroid"):
        responses(read_assembly(path))
    netcdf(path, np.zeros((4, 2, 3)), ("presentation", "neuroid", "time_bin"))
    with pytest.raises(InputError, match="several {'time_bin': 3}"):
        responses(read_assembly(path))


# ---- Brain-Score


def test_tuckute_from_a_local_copy(tmp_path, capsys):
    path, y = tuckute(tmp_path)
    prepare(brainscore, root=path, out_dir=tmp_path / "out")
    data = Encoding(tmp_path / "out" / "Tuckute2024")
    assert np.allclose(data.responses, y) and data.inputs()[7] == "Sentence 7 is café."
    assert data.stimuli.group.nunique() == 40 and np.isnan(data.units.ceiling).all()
    assert data.units[["roi", "subject"]].to_numpy().tolist() == [["lang_LH_netw", "848-853"]]
    assert data.stimuli.cond[0] == "B" and "presentation" not in data.stimuli
    assert data.meta["published"] is False and not data.meta["synthetic"]
    assert "not the published version" in capsys.readouterr().out
    prepare(brainscore, root=tmp_path, out_dir=tmp_path / "out")  # the folder, a second time
    assert "there already" in capsys.readouterr().out
    with pytest.raises(InputError, match="made with context=0: give overwrite=True"):
        prepare(brainscore, root=tmp_path, out_dir=tmp_path / "out", context=1)


def test_pereira_is_one_dataset_an_experiment_with_its_ceilings(tmp_path):
    y = pereira(tmp_path)
    prepare(brainscore, set="Pereira2018", root=tmp_path, out_dir=tmp_path)
    first = Encoding(tmp_path / "Pereira2018-243sentences")
    # unit 2 was not there, 3 has a gap, 0 has no ceiling
    assert first.units.neuroid_id.tolist() == ["v1", "v4", "v5", "v6", "v7"]
    left_out = ["1 units that took no part", "1 units with gaps", "1 units without a ceiling"]
    assert first.meta["left_out"] == left_out
    assert np.allclose(first.responses, y[:12, [1, 4, 5, 6, 7]])
    assert np.allclose(first.units.ceiling, np.array([0.8, 0.6, 0.5, 0.4, 0.3]) ** 2)
    assert first.stimuli.group.tolist() == [f"passage {i // 3}" for i in range(12)]
    assert first.units.subject.tolist() == ["018"] + ["020"] * 4
    assert first.inputs()[3:7] == ["S3.", "S3. S4.", "S3. S4. S5.", "S6."]
    assert first.stimuli.piece[5] == "S5."
    second = Encoding(tmp_path / "Pereira2018-384sentences")
    assert second.units.neuroid_id.tolist() == ["v2", "v3", "v4", "v5", "v6", "v7"]
    assert np.allclose(second.responses, y[12:, 2:]) and np.isnan(second.units.ceiling).all()


def test_pereira_without_context_gaps_and_ceilings(tmp_path):
    pereira(tmp_path, ceilings=False)
    options = {"missing": "presentations", "context": 0}
    prepare(brainscore, set="Pereira2018", root=tmp_path, out_dir=tmp_path, **options)
    data = Encoding(tmp_path / "Pereira2018-243sentences")
    assert len(data.stimuli) == 11 and "S4." not in data.inputs() and "S5." in data.inputs()
    assert data.units.neuroid_id.tolist() == ["v0", "v1", "v3", "v4", "v5", "v6", "v7"]
    assert np.isnan(data.units.ceiling).all()


def test_words_are_read_in_their_sentence(tmp_path):
    words = ["ALEX", "WAS", "TIRED", "SO", "HE", "TOOK", "A", "NAP"]
    others = [f"{word}S" for word in words]
    order = np.random.default_rng(0).permutation(16)  # a file need not be in order
    rows = {"stimulus_id": order, "stimulus": np.array(words + others)[order]}
    rows["word_num"] = np.tile(np.arange(8.0), 2)[order]
    rows["sentence_id"] = np.repeat([0, 1], 8)[order]
    units = {"neuroid_id": [0, 1], "subject_UID": [1, 2]}
    path = tmp_path / "assy_Fedorenko2016_language.nc"
    netcdf(path, np.arange(32.0).reshape(16, 2)[order], presentation=rows, neuroid=units)
    prepare(brainscore, set="Fedorenko2016", root=tmp_path, out_dir=tmp_path)
    data = Encoding(tmp_path / "Fedorenko2016")
    of = {key: y[0] for key, y in zip(zip(data.stimuli.group, data.inputs()), data.responses)}
    assert of["0", "ALEX WAS TIRED"] == 4 and of["1", "ALEXS"] == 16
    assert of["1", " ".join(others)] == 30 and len(of) == 16
    assert data.meta["modality"] == "ECoG" and set(data.units.roi) == {"language"}
    with h5py.File(path, "a") as file:
        file["word_num"][3] = np.nan
    with pytest.raises(InputError, match="a presentation has no word_num to sort it by"):
        prepare(brainscore, set="Fedorenko2016", root=tmp_path, out_dir=tmp_path / "nan")


def test_pieces_are_read_in_their_story(tmp_path):
    rows = {"stimulus_id": [f"Boar.{i}" for i in range(4)], "story": ["Boar"] * 4}
    rows["stimulus"] = ["If you were ", "to journey. ", "It is ", "in this valley"]
    rows["sentence_number_in_story"] = [0, 0, 1, 1]
    rows["part_number_in_sentence"] = [0, 1, 0, 1]
    units = {"neuroid_id": ["a", "b"], "subject_id": ["090", "061"]}
    units["fROI_area"] = ["03_LH_IFG", "01_LH_PostTemp"]
    path = tmp_path / "assy_Blank2014_fROI.nc"
    netcdf(path, np.arange(8.0).reshape(4, 2), presentation=rows, neuroid=units)
    prepare(brainscore, set="Blank2014", root=tmp_path, out_dir=tmp_path, context=2)
    data = Encoding(tmp_path / "Blank2014")
    assert data.inputs() == [
        "If you were",
        "If you were to journey.",
        "If you were to journey. It is",
        "to journey. It is in this valley",
    ]
    assert data.units.roi.tolist() == ["03_LH_IFG", "01_LH_PostTemp"]
    assert set(data.stimuli.group) == {"Boar"}


def test_responses_that_are_no_numbers(tmp_path):
    path, y = tuckute(tmp_path)
    with h5py.File(path, "a") as file:
        file["data"][5] = np.nan
    with pytest.raises(InputError, match="all units have gaps.*missing=presentations"):
        prepare(brainscore, root=tmp_path, out_dir=tmp_path)
    prepare(brainscore, root=tmp_path, out_dir=tmp_path, missing="presentations")
    assert len(Encoding(tmp_path / "Tuckute2024").stimuli) == 39
    with h5py.File(path, "a") as file:
        file["data"][:] = np.nan
    with pytest.raises(InputError, match="no responses"):
        prepare(brainscore, root=tmp_path, out_dir=tmp_path, overwrite=True)


def test_bad_options(tmp_path):
    for module, options, sentence in (
        (brainscore, {"root": tmp_path}, "assy_Tuckute2024_language.nc is missing"),
        (brainscore, {"context": -2}, "context=-2"),
        (nsd, {}, "local copy"),
    ):
        with pytest.raises(InputError, match=sentence):
            prepare(module, **options)


def test_a_set_is_fetched_once_and_without_ceilings_where_there_are_none(tmp_path, capsys):
    pereira(tmp_path, ceilings=False)
    path = tmp_path / "assy_Pereira2018_language.nc"
    options = {"set": "Pereira2018", "out_dir": str(tmp_path / "out")}
    with serve(tmp_path) as server, pytest.MonkeyPatch.context() as patch:
        sha1 = hashlib.sha1(path.read_bytes()).hexdigest()
        patch.setattr(brainscore.SETS["Pereira2018"], "sha1", sha1)
        prepare(brainscore, url=server.url, **options)
        assert "no ceilings" in capsys.readouterr().out
        n_requests = server.asked
        prepare(brainscore, url=server.url, **options)
        assert server.asked == n_requests and server.sent[path.name] == path.stat().st_size
    data = Encoding(tmp_path / "out" / "Pereira2018-384sentences")
    assert data.meta["published"] is True and np.isnan(data.units.ceiling).all()


# ---- images


def hvm(folder):
    """4 images of 2 objects, shown 3 times to 3 sites, not in order; one presentation has a gap."""
    rng = np.random.default_rng(0)
    shown = rng.permutation(np.tile(np.arange(4), 3))
    y = rng.standard_normal((3, 12, 1)).astype("<f4")
    y[1, 5] = np.nan
    units = {"neuroid_id": list("abc"), "region": ["IT", "V4", "IT"]}
    coords = {"neuroid": units | {"animal": ["Tito", "Chabo", "Chabo"]}}
    coords["presentation"] = {"image_id": [f"id{i}" for i in shown]}
    coords["time_bin"] = {"time_bin_start": [70]}
    path = folder / "assy_dicarlo_MajajHong2015_public.nc"
    dims = ("neuroid", "presentation", "time_bin")
    netcdf(path, y, dims, name="dicarlo.MajajHong2015.public", **coords)
    table = pd.DataFrame({"image_id": [f"id{i}" for i in range(5)]})
    table["filename"] = [f"im{i}.png" for i in range(5)]
    table["object_name"] = ["bear", "bear", "car", "car", "car"]
    table.to_csv(folder / "image_dicarlo_hvm-public.csv", index=False)
    (folder / "images").mkdir()
    with zipfile.ZipFile(folder / "image_dicarlo_hvm-public.zip", "w") as archive:
        for i in range(4):
            path = folder / "images" / f"im{i}.png"
            Image.fromarray(np.full((4, 4), 60 * i, np.uint8)).save(path)
            archive.write(path, f"hvm/im{i}.png")
    return shown, y[:, :, 0].T


def test_majajhong_keeps_repeats_and_regions(tmp_path):
    shown, y = hvm(tmp_path)
    prepare(majajhong, root=tmp_path, out_dir=tmp_path / "out", group="object")
    data = Encoding(tmp_path / "out")
    kept = np.arange(12) != 5
    assert data.units.roi.tolist() == ["IT", "V4", "IT"] and data.kind == "image"
    assert np.allclose(data.responses, y[kept])
    files = data.stimuli.file.to_numpy()[data.presentations.stimulus]
    assert files.tolist() == [f"images/im{i}.png" for i in shown[kept]]
    assert len(data.stimuli) == 4 and set(data.stimuli.group) == {"bear", "car"}
    for path in data.inputs():
        assert path.read_bytes() == (tmp_path / "images" / path.name).read_bytes()


def test_majajhong_bad_copies(tmp_path):
    hvm(tmp_path)

    def refused(sentence):
        with pytest.raises(InputError, match=sentence):
            prepare(majajhong, root=tmp_path, out_dir=tmp_path / "out")

    archive = tmp_path / "image_dicarlo_hvm-public.zip"
    archive.write_bytes(archive.read_bytes()[:-60])
    refused("torn or not a zip")
    archive.unlink()  # then the folder images/ is taken
    other = tmp_path / "images" / "again" / "im1.png"
    other.parent.mkdir()
    other.write_bytes((tmp_path / "images" / "im1.png").read_bytes())
    refused("holds two images 'im1.png'")
    other.unlink()
    (tmp_path / "images" / "im2.png").unlink()
    refused("lacks 1 of 4 images, im2.png")
    (tmp_path / "image_dicarlo_hvm-public.csv").unlink()
    refused("has no image_dicarlo_hvm-public.csv")
    assert not complete_encoding(tmp_path / "out")


def make_nsd(folder):
    y = np.random.default_rng(0).standard_normal((36, 5)).astype("<f4")
    shown = np.repeat(np.arange(100, 112), 3)
    rows = {"stimulus_id": shown, "session": shown % 3}
    netcdf(folder / "voxels.nc", y, presentation=rows, neuroid={"x": np.arange(5)})
    table = pd.DataFrame({"stimulus_id": range(100, 115)})
    table["filename"] = [f"a/im{i}.png" for i in range(15)]
    table["shared1000"] = table["stimulus_id"] % 3 == 1
    table.to_csv(folder / "metadata.csv", index=False)
    (folder / "a").mkdir()
    for i in range(12):
        Image.new("RGB", (4, 4), (i, i, i)).save(folder / "a" / f"im{i}.png")
    return y, table


def test_nsd_tests_on_the_shared_thousand(tmp_path):
    y, _ = make_nsd(tmp_path)
    prepare(nsd, root=tmp_path, out_dir=tmp_path / "out", roi="LOC", subject="subj01")
    data = Encoding(tmp_path / "out")
    assert np.array_equal(data.responses, y) and "session" in data.presentations
    assert data.presentations["repeat"].tolist() == [0, 1, 2] * 12
    assert data.stimuli.split.tolist() == ["test", "train", "train"] * 4
    assert data.stimuli.file[3] == "images/a/im3.png"
    assert set(data.units.roi) == {"LOC"} and data.units["subject"].unique() == ["subj01"]


def test_images_that_lie_in_the_dataset_already_stay(tmp_path):
    """root= may be the dataset's own folder: nobody's only copy is unlinked."""
    _, table = make_nsd(tmp_path)
    (tmp_path / "a").rename(tmp_path / "images")
    table.assign(filename=table.filename.str[2:]).to_csv(tmp_path / "metadata.csv", index=False)
    before = {path: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    for _ in range(2):
        options = {"images": tmp_path / "images", "out_dir": tmp_path, "overwrite": True}
        prepare(nsd, root=tmp_path, **options)
    assert before == {path: path.read_bytes() for path in Encoding(tmp_path).inputs()}


@pytest.mark.parametrize(
    "column, value, sentence",
    [
        ("shared1000", None, "no column 'shared1000'"),
        ("shared1000", "maybe", "not 'maybe'"),
        ("stimulus_id", range(101, 116), "lacks 1 stimuli"),
        ("shared1000", False, "none of the stimuli"),
        ("filename", "../a/im1.png", "is outside the folder"),
        ("filename", "ba/im1.png", "give images="),
    ],
)
def test_nsd_bad_metadata(tmp_path, column, value, sentence):
    _, table = make_nsd(tmp_path)
    table[column] = value
    if value is None:
        table = table.drop(columns=column)
    table.to_csv(tmp_path / "metadata.csv", index=False)
    with pytest.raises(InputError, match=sentence):
        prepare(nsd, root=tmp_path, out_dir=tmp_path / "bad")


def test_digits_are_scikit_learns(tmp_path):
    prepare(digits, out_dir=tmp_path)
    data = Encoding(tmp_path)
    expected = load_digits()
    pixels = np.stack([np.asarray(Image.open(path)) for path in data.inputs()])
    assert np.array_equal(np.round(pixels / 255 * 16), expected.images)
    assert data.stimuli.label.astype(int).tolist() == expected.target.tolist()
    assert data.responses.argmax(1).tolist() == expected.target.tolist()
    shares = pd.crosstab(data.stimuli.label, data.stimuli.split, normalize="index")
    assert np.allclose(shares[["train", "val", "test"]], [0.6, 0.2, 0.2], atol=0.01)


def test_phrases_are_single_tokens_in_all_combinations(tmp_path):
    class Encoding:
        def encode(self, word):
            return [0] if word.strip() not in ("all", "Find") else [0, 1]

    phrases = synthetic_brain.phrases(Encoding())
    assert len(phrases) == len(set(phrases)) == 7 * 3 * 8 * 7
    assert all(words[2] != words[3] for words in phrases)


def test_podcast_words_with_their_windows(tmp_path):
    rng = np.random.default_rng(0)
    onset = np.array([0.1, 0.5, 1.0, 1.6, 1.3, 4.9])  # people overlap; the last one is outside
    words = pd.DataFrame({"onset": onset, "duration": 0.1, "word_idx": range(6)})
    words["word"] = ["For", "night,", "he", "and", "they", "slept"]
    about = {"sfreq": 100, "unit": "V", "source": "made", "synthetic": True}
    for name, status in (("sub-01", ["good", "good", "bad"]), ("sub-02", ["good"] * 3)):
        signal = (rng.standard_normal((500, 3)) * 1e-5 + 3e-5).astype("<f4")
        if name == "sub-02":
            signal[:, 1] = 0
        channels = pd.DataFrame({"name": ["A", "B", "C"], "status": status})
        write_recording(tmp_path / name, signal, channels, words, subject=name, **about)
    write_set(tmp_path, ["sub-01", "sub-02"], synthetic=True)
    options = {"podcast": tmp_path, "out_dir": tmp_path / "out", "lag": 0.2, "width": 0.1}
    prepare(podcast_encoding, **options, context=2, block=1.0)
    data = Encoding(tmp_path / "out")
    texts = ["For", "For night,", "For night, he", "night, he and", "he and they"]
    assert data.inputs() == texts and data.meta["synthetic"]
    assert data.stimuli.group.tolist() == ["0", "0", "1", "1", "1"]
    assert data.units.subject.tolist() == ["sub-01", "sub-01", "sub-02", "sub-02"]
    x = signal[:, 2].astype(float)
    z = (x - x.mean()) / x.std()
    windows = [z[round(t * 100) + 15 : round(t * 100) + 25].mean() for t in onset[:5]]
    assert np.allclose(data.responses[:, 3], windows, atol=1e-4)
    assert data.meta["left_out"] == [
        "1 words whose window is outside a recording",
        "1 electrodes that are flat or hold NaN: sub-02 B",
    ]
    options["overwrite"] = True
    prepare(podcast_encoding, **options, subjects=["1"])
    assert Encoding(tmp_path / "out").units.name.tolist() == ["A", "B"]
    for changes, sentence in (
        ({"subjects": ["sub-09"]}, "has no sub-09, only sub-01, sub-02"),
        ({"lag": 60.0}, "no word has its window inside a recording: lag=60"),
        ({"podcast": tmp_path / "none"}, "does not exist"),
    ):
        with pytest.raises(InputError, match=sentence):
            prepare(podcast_encoding, **options | changes)
