"""Published brains as stimuli with responses: on small files in the layouts in which xarray writes them."""
import hashlib
import http.server
import importlib.util
import sys
import threading
import zipfile

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data.assembly import fetch, read_assembly, responses
from data.recording import write_recording, write_set
from data.stimuli import Encoding, complete_encoding
from tests.helpers import ROOT, run


def script(name):
    """The module data/NAME/prepare.py."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a folder of images must stay one
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def make(name, **options):
    module = script(name)
    config = module.Config(**{key: str(value) if key in ("root", "out_dir", "images", "podcast") else value for key, value in options.items()})
    getattr(config, "check", lambda: None)()
    module.main(config)


def netcdf(path, values, dims, coords, name="data"):
    """A file as xarray and the NetCDF4 library lay it out: a scale for each dimension, coordinates attached to it and named by the array."""
    with h5py.File(path, "w", track_order=True) as f:
        f.attrs["_NCProperties"] = "version=2,netcdf=4.9.2,hdf5=1.14.2"
        for i, (dim, n) in enumerate(zip(dims, values.shape)):
            own = coords.get(dim)
            if own is not None:  # a dimension with a coordinate of its own name: that is its scale
                f.create_dataset(dim, data=np.asarray(own[1], dtype=object if np.asarray(own[1]).dtype.kind in "UO" else None),
                                 dtype=h5py.string_dtype() if np.asarray(own[1]).dtype.kind in "UO" else None)
                f[dim].make_scale(dim)
            else:
                f.create_dataset(dim, (n,), ">f4")
                f[dim].make_scale(f"This is a netCDF dimension but not a netCDF variable.{n:10d}")
            f[dim].attrs["_Netcdf4Dimid"] = np.int32(i)

        def put(key, array, along):
            array = np.asarray(array)
            text = array.dtype.kind in "UO"
            item = f.create_dataset(key, data=array.astype(object) if text else array, dtype=h5py.string_dtype() if text else None,
                                    **({} if text else {"compression": "gzip", "chunks": True}))
            for axis, dim in enumerate(along):
                item.dims[axis].attach_scale(f[dim])
            return item

        for key, (dim, array) in coords.items():
            if key not in dims:
                put(key, array, [dim])
        item = put(name, values, dims)
        item.attrs["_FillValue"] = np.asarray([np.nan], values.dtype)
        item.attrs["coordinates"] = " ".join(key for key in coords if key not in dims)
    return path


def tuckute(folder, n=40, seed=0, drop=()):
    y = np.random.default_rng(seed).standard_normal((n, 1))
    coords = dict(stimulus_id=("presentation", np.arange(1, n + 1)), stimulus=("presentation", [f"Sentence {i} is café." for i in range(n)]),
                  cond=("presentation", ["B"] * n), neuroid_id=("neuroid", [1]), subject_UID=("neuroid", ["848-853"]), roi=("neuroid", ["lang_LH_netw"]))
    return netcdf(folder / "assy_Tuckute2024_language.nc", y, ("presentation", "neuroid"), {k: v for k, v in coords.items() if k not in drop}), y


def pereira(folder, ceilings=True):
    """Two experiments of 12 and 18 sentences in passages of 3; 8 units: two in the first only, one in the second only, one with a gap."""
    rng = np.random.default_rng(1)
    experiment = np.array(["243sentences"] * 12 + ["384sentences"] * 18)
    passage = [f"passage {i // 3}" for i in range(30)]
    y = rng.standard_normal((30, 8))
    y[12:, :2], y[:12, 2], y[4, 3] = np.nan, np.nan, np.nan
    ids = [f"v{i}" for i in range(8)]
    netcdf(folder / "assy_Pereira2018_language.nc", y, ("presentation", "neuroid"), dict(
        stimulus_id=("presentation", [f"s{i}" for i in range(30)]), stimulus=("presentation", [f"S{i}." for i in range(30)]),
        experiment=("presentation", experiment), passage_label=("presentation", passage), neuroid_id=("neuroid", ids),
        subject=("neuroid", ["018", "018", "019"] + ["020"] * 5), atlas=("neuroid", ["language"] * 8)))
    if ceilings:
        r = np.linspace(0.3, 0.9, 7)
        r[6] = np.nan
        netcdf(folder / "ceiling_raw_Pereira2018_243sentences-linear.nc", r, ("neuroid",),
               dict(neuroid_id=("neuroid", [ids[i] for i in (7, 6, 5, 4, 3, 1, 0)])))
    return y


# ---- assemblies

def test_reads_what_xarray_writes(tmp_path):
    path, y = tuckute(tmp_path)
    a = read_assembly(path)
    assert a.dims == ["presentation", "neuroid"] and np.array_equal(a.values, y)
    assert a.coords["presentation"].stimulus.tolist()[3] == "Sentence 3 is café." and "presentation" not in a.coords["presentation"]
    assert a.coords["neuroid"].roi.tolist() == ["lang_LH_netw"]
    flipped = netcdf(tmp_path / "t.nc", y.T[..., None].astype("<f4"), ("neuroid", "image_id", "time_bin"), dict(
        image_id=("image_id", [f"i{k}" for k in range(40)]), region=("neuroid", ["IT"]), time_bin_start=("time_bin", [70])), name="dicarlo.set")
    got, rows, units = responses(read_assembly(flipped))
    assert got.shape == (40, 1) and np.allclose(got, y, atol=1e-6) and rows.image_id.tolist()[-1] == "i39" and units.region.tolist() == ["IT"]


def test_files_that_are_no_assemblies(tmp_path):
    path, y = tuckute(tmp_path)
    torn = tmp_path / "torn.nc"
    torn.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="torn"):
        read_assembly(torn)
    torn.write_bytes(b"CDF\x01" + bytes(100))
    with pytest.raises(ValueError, match="NetCDF3"):
        read_assembly(torn)
    torn.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="torn, or no NetCDF4"):
        read_assembly(torn)
    netcdf(torn, y, ("time", "channel"), {})
    with pytest.raises(ValueError, match="time, channel where presentation and neuroid"):
        responses(read_assembly(torn))
    netcdf(torn, np.zeros((4, 2, 3)), ("presentation", "neuroid", "time_bin"), {})
    with pytest.raises(ValueError, match="3 of time_bin"):
        responses(read_assembly(torn))


# ---- Brain-Score

def test_tuckute_from_a_local_copy(tmp_path, capsys):
    path, y = tuckute(tmp_path)
    make("brainscore", root=path, out_dir=tmp_path / "out")
    data = Encoding(tmp_path / "out" / "Tuckute2024")
    assert np.allclose(data.responses, y) and data.stimuli.text.iloc[7] == "Sentence 7 is café." and data.stimuli.group.nunique() == 40
    assert data.units[["roi", "subject"]].to_numpy().tolist() == [["lang_LH_netw", "848-853"]] and np.isnan(data.units.ceiling).all()
    assert data.stimuli.cond.iloc[0] == "B" and data.meta["published"] is False and not data.meta["synthetic"]
    assert "not the published version" in capsys.readouterr().out
    make("brainscore", root=tmp_path, out_dir=tmp_path / "out")  # the folder, and a second time
    assert "there already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="overwrite=True"):
        make("brainscore", root=tmp_path, out_dir=tmp_path / "out", context=1)


def test_pereira_is_one_dataset_an_experiment_with_its_ceilings(tmp_path, capsys):
    y = pereira(tmp_path)
    make("brainscore", set="Pereira2018", root=tmp_path, out_dir=tmp_path / "out")
    first, second = (Encoding(tmp_path / "out" / f"Pereira2018-{part}sentences") for part in (243, 384))
    # unit 2 was not there, 3 has a gap, 0's ceiling failed
    assert first.units.neuroid_id.tolist() == ["v1", "v4", "v5", "v6", "v7"] and np.allclose(first.responses, y[:12, [1, 4, 5, 6, 7]])
    assert np.allclose(first.units.ceiling, np.array([0.8, 0.6, 0.5, 0.4, 0.3]) ** 2)
    assert second.units.neuroid_id.tolist() == ["v2", "v3", "v4", "v5", "v6", "v7"] and np.allclose(second.responses, y[12:, 2:])
    assert first.stimuli.group.tolist() == [f"passage {i // 3}" for i in range(12)] and first.units.subject.tolist() == ["018"] + ["020"] * 4
    assert first.stimuli.text.tolist()[3:7] == ["S3.", "S3. S4.", "S3. S4. S5.", "S6."] and first.stimuli.piece.iloc[5] == "S5."
    assert any("1 units with gaps" in what for what in first.meta["left_out"]) and any("1 units took no part" in what for what in first.meta["left_out"])
    make("brainscore", set="Pereira2018", root=tmp_path, out_dir=tmp_path / "rows", missing="presentations", context=0, ceilings=False)
    rows = Encoding(tmp_path / "rows" / "Pereira2018-243sentences")
    assert len(rows.stimuli) == 11 and "S4." not in set(rows.stimuli.text) and rows.units.neuroid_id.tolist() == ["v0", "v1", "v3", "v4", "v5", "v6", "v7"]
    assert np.isnan(rows.units.ceiling).all()


def test_words_in_their_sentence_and_pieces_in_their_story(tmp_path):
    words = "ALEX WAS TIRED SO HE TOOK A NAP".split()
    order = np.random.default_rng(0).permutation(16)  # a file need not be in order
    y = np.arange(32.0).reshape(16, 2)
    netcdf(tmp_path / "assy_Fedorenko2016_language.nc", y[order], ("presentation", "neuroid"), dict(
        stimulus_id=("presentation", order), stimulus=("presentation", np.array(words * 2)[order]), word_num=("presentation", np.tile(np.arange(8), 2)[order]),
        sentence_id=("presentation", np.repeat([0, 1], 8)[order]), neuroid_id=("neuroid", [0, 1]), subject_UID=("neuroid", [1, 2])))
    make("brainscore", set="Fedorenko2016", root=tmp_path, out_dir=tmp_path)
    data = Encoding(tmp_path / "Fedorenko2016")
    at = {(g, t): data.responses[i, 0] for i, (g, t) in enumerate(zip(data.stimuli.group, data.stimuli.text))}
    assert at["0", "ALEX WAS TIRED"] == 4 and at["1", "ALEX"] == 16 and at["1", " ".join(words)] == 30 and len(at) == 16
    assert data.meta["modality"] == "ECoG"

    pieces = ["If you were ", "to journey. ", "It is ", "in this valley"]
    netcdf(tmp_path / "assy_Blank2014_fROI.nc", np.arange(8.0).reshape(4, 2), ("presentation", "neuroid"), dict(
        stimulus_id=("presentation", [f"Boar.{i}" for i in range(4)]), stimulus=("presentation", pieces), story=("presentation", ["Boar"] * 4),
        sentence_number_in_story=("presentation", [0, 0, 1, 1]), part_number_in_sentence=("presentation", [0, 1, 0, 1]),
        neuroid_id=("neuroid", ["a", "b"]), subject_id=("neuroid", ["090", "061"]), fROI_area=("neuroid", ["03_LH_IFG", "01_LH_PostTemp"])))
    make("brainscore", set="Blank2014", root=tmp_path, out_dir=tmp_path, context=2)
    data = Encoding(tmp_path / "Blank2014")
    assert data.stimuli.text.tolist() == ["If you were", "If you were to journey.", "If you were to journey. It is", "to journey. It is in this valley"]
    assert data.units.roi.tolist() == ["03_LH_IFG", "01_LH_PostTemp"] and set(data.stimuli.group) == {"Boar"}


def test_a_missing_coordinate_is_named_with_those_that_are_there(tmp_path):
    tuckute(tmp_path, drop=("stimulus",))
    with pytest.raises(ValueError, match="no coordinate 'stimulus' along presentation, only (stimulus_id, cond|cond, stimulus_id): it is another file"):
        make("brainscore", root=tmp_path, out_dir=tmp_path / "out")
    assert not (tmp_path / "out" / "Tuckute2024").exists()


def test_responses_that_are_no_numbers(tmp_path):
    path, y = tuckute(tmp_path)
    y[5] = np.nan
    with h5py.File(path, "a") as f:
        f["data"][:] = y
    with pytest.raises(ValueError, match="every one of 1 units has responses that are no numbers.*missing=presentations"):
        make("brainscore", root=tmp_path, out_dir=tmp_path / "out")
    make("brainscore", root=tmp_path, out_dir=tmp_path / "out", missing="presentations")
    assert len(Encoding(tmp_path / "out" / "Tuckute2024").stimuli) == 39
    with h5py.File(path, "a") as f:
        f["data"][:] = np.nan
    with pytest.raises(ValueError, match="not one response"):
        make("brainscore", root=tmp_path, out_dir=tmp_path / "out", missing="presentations", overwrite=True)


def test_bad_options_end_in_one_sentence(tmp_path):
    for options, said in ((["set=Tuckute2023"], "must be Tuckute2024 or Pereira2018 or Fedorenko2016 or Blank2014"),
                          ([f"root={tmp_path / 'none'}"], "does not exist"), ([f"root={tmp_path}"], "has no assy_Tuckute2024_language.nc"),
                          (["url=http://127.0.0.1:9/x", f"out_dir={tmp_path}"], "cannot be reached")):
        out, err = run("data/brainscore/prepare", *options, status=2, patch="import time; time.sleep = lambda s: None")
        assert said in err and "Traceback" not in err
    out, err = run("data/nsd/prepare", status=2)
    assert "local copy only" in err and "Traceback" not in err


# ---- fetching

class Server:
    """Serves {path: bytes} with ranges; breaks the first `cuts` answers in the middle."""

    def __init__(self, files, cuts=0):
        outer, self.asked = self, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                body, span = files.get(self.path), self.headers.get("Range")
                outer.asked.append((self.path, span))
                if body is None:
                    return self.send_error(403)
                start = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
                if start >= len(body):
                    return self.send_error(416)
                self.send_response(206 if span else 200)
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                short = len(outer.asked) <= cuts
                self.wfile.write(body[start:start + (len(body) - start) // 2] if short else body[start:])

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def test_fetch_goes_on_where_it_was_cut_and_checks(tmp_path):
    body = bytes(range(256)) * 100
    sha1 = hashlib.sha1(body).hexdigest()
    with Server({"/a": body}, cuts=2) as server:
        fetch(f"{server.url}/a", tmp_path / "a", sha1, pause=0)
        assert (tmp_path / "a").read_bytes() == body and [span for _, span in server.asked] == [None, "bytes=12800-", "bytes=19200-"]
        (tmp_path / "b.part").write_bytes(body)  # all of it came, and the process was killed then
        fetch(f"{server.url}/a", tmp_path / "b", sha1, pause=0)
        assert (tmp_path / "b").read_bytes() == body
        (tmp_path / "c.part").write_bytes(b"of another version")
        with pytest.raises(OSError, match="another version"):
            fetch(f"{server.url}/a", tmp_path / "c", sha1, pause=0)
        assert not (tmp_path / "c").exists() and not (tmp_path / "c.part").exists()
        with pytest.raises((FileNotFoundError, ValueError), match="403"):
            fetch(f"{server.url}/none", tmp_path / "d", pause=0)
    with Server({"/a": body}, cuts=9) as server, pytest.raises(OSError, match="goes on from there"):
        fetch(f"{server.url}/a", tmp_path / "e", sha1, tries=2, pause=0)
    assert 0 < (tmp_path / "e.part").stat().st_size < len(body)
    with pytest.raises(OSError, match="cannot be reached.*root="):
        fetch("http://127.0.0.1:9/a", tmp_path / "f", pause=0)


def test_a_set_is_fetched_once_and_without_ceilings_where_there_are_none(tmp_path, monkeypatch, capsys):
    pereira(tmp_path, ceilings=False)
    body = (tmp_path / "assy_Pereira2018_language.nc").read_bytes()
    module = script("brainscore")
    monkeypatch.setitem(module.SETS, "Pereira2018", module.SETS["Pereira2018"]._replace(sha1=hashlib.sha1(body).hexdigest()))
    with Server({"/assy_Pereira2018_language.nc": body}) as server:
        config = module.Config(set="Pereira2018", url=server.url, out_dir=str(tmp_path / "out"))
        module.main(config)
        assert "without ceilings" in capsys.readouterr().out and [path for path, _ in server.asked].count("/assy_Pereira2018_language.nc") == 1
        asked = len(server.asked)
        module.main(config)
        assert len(server.asked) == asked
    data = Encoding(tmp_path / "out" / "Pereira2018-384sentences")
    assert data.meta["published"] is True and np.isnan(data.units.ceiling).all()


# ---- images

def hvm(folder, zipped=True):
    """4 images of 2 objects, shown 3 times to 2 sites of IT and 1 of V4, not in order; one presentation with a gap."""
    rng = np.random.default_rng(0)
    shown = rng.permutation(np.tile(np.arange(4), 3))
    y = rng.standard_normal((3, 12, 1)).astype("<f4")
    y[1, 5] = np.nan
    netcdf(folder / "assy_dicarlo_MajajHong2015_public.nc", y, ("neuroid", "presentation", "time_bin"), dict(
        image_id=("presentation", [f"id{i}" for i in shown]), region=("neuroid", ["IT", "V4", "IT"]), animal=("neuroid", ["Tito", "Chabo", "Chabo"]),
        neuroid_id=("neuroid", ["a", "b", "c"]), time_bin_start=("time_bin", [70]), time_bin_end=("time_bin", [170])), name="dicarlo.MajajHong2015.public")
    pd.DataFrame({"image_id": [f"id{i}" for i in range(5)], "filename": [f"im{i}.png" for i in range(5)],
                  "object_name": ["bear", "bear", "car", "car", "car"]}).to_csv(folder / "image_dicarlo_hvm-public.csv", index=False)
    (folder / "images").mkdir()
    for i in range(4):
        Image.fromarray(np.full((4, 4), 60 * i, np.uint8)).save(folder / "images" / f"im{i}.png")
    if zipped:
        with zipfile.ZipFile(folder / "image_dicarlo_hvm-public.zip", "w") as z:
            for i in range(4):
                z.write(folder / "images" / f"im{i}.png", f"hvm/im{i}.png")
    return shown, y[:, :, 0].T


def test_majajhong_keeps_repeats_and_regions(tmp_path):
    shown, y = hvm(tmp_path)
    make("majajhong", root=tmp_path, out_dir=tmp_path / "out", group="object")
    data = Encoding(tmp_path / "out")
    keep = np.arange(12) != 5
    assert data.units.roi.tolist() == ["IT", "V4", "IT"] and np.allclose(data.responses, y[keep]) and data.kind == "image"
    files = data.stimuli.file.to_numpy()[data.presentations.stimulus]
    assert files.tolist() == [f"images/im{i}.png" for i in shown[keep]] and len(data.stimuli) == 4 and set(data.stimuli.group) == {"bear", "car"}
    for i in range(4):
        assert (tmp_path / "out" / "images" / f"im{i}.png").read_bytes() == (tmp_path / "images" / f"im{i}.png").read_bytes()
    make("majajhong", root=tmp_path, out_dir=tmp_path / "two", repeats=2)
    assert Encoding(tmp_path / "two").presentations.stimulus.value_counts().tolist() == [2, 2, 2, 2]


def test_majajhong_bad_copies(tmp_path):
    hvm(tmp_path)
    archive = tmp_path / "image_dicarlo_hvm-public.zip"
    archive.write_bytes(archive.read_bytes()[:-60])
    with pytest.raises(ValueError, match="torn, or no zip"):
        make("majajhong", root=tmp_path, out_dir=tmp_path / "out")
    archive.unlink()  # then the folder images/ is taken
    (tmp_path / "images" / "im2.png").unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="lacks 1 of 4 images, im2.png"):
        make("majajhong", root=tmp_path, out_dir=tmp_path / "out")
    (tmp_path / "image_dicarlo_hvm-public.csv").unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="has no image_dicarlo_hvm-public.csv"):
        make("majajhong", root=tmp_path, out_dir=tmp_path / "out")
    assert not complete_encoding(tmp_path / "out")


def nsd(folder):
    rng = np.random.default_rng(0)
    shown = np.repeat(np.arange(100, 112), 3)
    y = rng.standard_normal((36, 5)).astype("<f4")
    netcdf(folder / "voxels.nc", y, ("presentation", "neuroid"), dict(stimulus_id=("presentation", shown), session=("presentation", shown % 3),
                                                                      x=("neuroid", np.arange(5))))
    pd.DataFrame({"stimulus_id": range(100, 115), "filename": [f"a/im{i}.png" for i in range(15)], "shared1000": [i % 3 == 0 for i in range(15)]}
                 ).to_csv(folder / "metadata.csv", index=False)
    (folder / "a").mkdir()
    for i in range(12):
        Image.new("RGB", (4, 4), (i, i, i)).save(folder / "a" / f"im{i}.png")
    return y


def test_nsd_tests_on_the_shared_thousand(tmp_path):
    y = nsd(tmp_path)
    make("nsd", root=tmp_path, out_dir=tmp_path / "out", roi="LOC", subject="subj01")
    data = Encoding(tmp_path / "out")
    assert np.array_equal(data.responses, y) and data.presentations["repeat"].tolist() == [0, 1, 2] * 12
    assert data.stimuli.split.tolist() == ["test", "train", "train"] * 4 and data.stimuli.file.iloc[3] == "images/a/im3.png"
    assert set(data.units.roi) == {"LOC"} and set(data.units.subject) == {"subj01"} and "session" in data.presentations
    table = pd.read_csv(tmp_path / "metadata.csv")
    for change, error, said in ((lambda t: t.drop(columns="shared1000"), ValueError, "no column 'shared1000'"),
                                (lambda t: t.assign(shared1000="maybe"), ValueError, "not 'maybe'"), (lambda t: t.iloc[1:], ValueError, "lacks 1 stimuli"),
                                (lambda t: t.assign(shared1000=False), ValueError, "none of its stimuli"),
                                (lambda t: t.assign(filename="../" + t.filename), ValueError, "leads out"),
                                (lambda t: t.assign(filename="b" + t.filename), (FileNotFoundError, ValueError), "give images=")):
        change(table).to_csv(tmp_path / "metadata.csv", index=False)
        with pytest.raises(error, match=said):
            make("nsd", root=tmp_path, out_dir=tmp_path / "bad")


def photos(folder, n=12):
    for c, name in enumerate(("cat", "dog", "owl")):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (5, 4), (80 * c, 10 * i, 7)).save(folder / name / f"film{i // 3}_{i}.png")
    (folder / "empty").mkdir()
    return folder


def test_an_image_folder_keeps_groups_and_copies_together(tmp_path):
    root = photos(tmp_path / "photos")
    (root / "cat" / "film3_twin.png").write_bytes((root / "cat" / "film0_0.png").read_bytes())
    make("images", root=root, out_dir=tmp_path / "out", group="^(film[0-9]+)_")
    with pytest.raises(ValueError, match="made with"):
        make("images", root=root, out_dir=tmp_path / "out")
    data = Encoding(tmp_path / "out")
    assert len(data.stimuli) == 37 and data.meta["labels"] == ["cat", "dog", "owl"]
    assert [data.units.label[i] for i in np.argmax(data.responses, 1)] == data.stimuli.label.tolist() and (data.responses.sum(1) == 1).all()
    make("images", root=root, out_dir=tmp_path / "own", seed=3)
    own = Encoding(tmp_path / "own").stimuli
    assert own.group.nunique() == 36 and own[own.file.isin(["cat/film0_0.png", "cat/film3_twin.png"])].group.nunique() == 1
    assert (pd.crosstab(own.label, own.split).loc["dog", ["train", "val", "test"]] == [8, 2, 2]).all()
    make("images", root=root, out_dir=tmp_path / "few", classes=2, samples=5, seed=1)
    few = Encoding(tmp_path / "few").stimuli
    assert few.label.value_counts().tolist() == [5, 5]
    make("images", root=root, out_dir=tmp_path / "again", classes=2, samples=5, seed=1)
    assert Encoding(tmp_path / "again").stimuli.equals(few)


def test_bad_image_folders(tmp_path):
    root = photos(tmp_path / "photos", n=4)
    for options, said in ((dict(group="^x"), "finds nothing in the name"), (dict(group="("), "no regular expression"), (dict(val=0.6, test=0.5), "shares"),
                          (dict(samples=2), "class cat has 2 groups")):
        with pytest.raises(ValueError, match=said):
            make("images", root=root, out_dir=tmp_path / "out", **options)
    with pytest.raises(ValueError, match="in 0 subfolders"):
        make("images", root=root / "cat", out_dir=tmp_path / "out")
    with pytest.raises((FileNotFoundError, ValueError), match="is no folder"):
        make("images", root=tmp_path / "none")
    torn = root / "owl" / "film0_1.png"
    torn.write_bytes(torn.read_bytes()[:40])
    with pytest.raises(ValueError, match="film0_1.png is torn"):
        make("images", root=root, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_digits_are_scikit_learns(tmp_path):
    from sklearn.datasets import load_digits
    make("digits", out_dir=tmp_path)
    data, true = Encoding(tmp_path), load_digits()
    pixels = np.stack([np.asarray(Image.open(tmp_path / file)) for file in data.stimuli.file])
    assert np.array_equal(np.round(pixels / 255 * 16), true.images) and data.stimuli.label.astype(int).tolist() == true.target.tolist()
    shares = pd.crosstab(data.stimuli.label, data.stimuli.split, normalize="index")
    assert np.allclose(shares[["train", "val", "test"]], [0.6, 0.2, 0.2], atol=0.01)
    stamp = (tmp_path / "meta.yaml").stat().st_mtime_ns
    make("digits", out_dir=tmp_path)
    assert (tmp_path / "meta.yaml").stat().st_mtime_ns == stamp


# ---- the podcast

def test_podcast_words_with_their_windows(tmp_path):
    rng = np.random.default_rng(0)
    onset = np.array([0.1, 0.5, 1.0, 1.6, 1.3, 4.9])  # speakers overlap; the last window is outside
    words = pd.DataFrame(dict(onset=onset, duration=0.1, word="For night, he and they slept".split(), word_idx=range(6)))
    signals = {name: (rng.standard_normal((500, 3)) * 1e-5 + 3e-5).astype("<f4") for name in ("sub-01", "sub-02")}
    signals["sub-02"][:, 1] = 0
    for name, signal in signals.items():
        write_recording(tmp_path / name, signal, pd.DataFrame({"name": ["A", "B", "C"], "status": ["good", "good", "bad" if name == "sub-01" else "good"]}),
                        words, sfreq=100, unit="V", subject=name, source="made", synthetic=True)
    write_set(tmp_path, list(signals), synthetic=True)
    make("podcast_encoding", podcast=tmp_path, out_dir=tmp_path / "out", lag=0.2, width=0.1, context=2, block=1.0)
    data = Encoding(tmp_path / "out")
    assert data.stimuli.text.tolist() == ["For", "For night,", "For night, he", "night, he and", "he and they"] and data.meta["synthetic"]
    assert data.stimuli.group.tolist() == ["0", "0", "1", "1", "1"] and data.units.subject.tolist() == ["sub-01", "sub-01", "sub-02", "sub-02"]
    z = (signals["sub-02"] - signals["sub-02"].mean(0, dtype=float))[:, 2] / signals["sub-02"][:, 2].std(dtype=float)
    assert np.allclose(data.responses[:, 3], [z[round(t * 100) + 15:round(t * 100) + 25].mean() for t in onset[:5]], atol=1e-4)
    with pytest.raises(ValueError, match="no recording sub-09, only sub-01, sub-02"):
        make("podcast_encoding", podcast=tmp_path, out_dir=tmp_path / "bad", subjects=["sub-09"])
    with pytest.raises(ValueError, match="no window lies inside"):
        make("podcast_encoding", podcast=tmp_path, out_dir=tmp_path / "bad", lag=60.0)
    with pytest.raises((FileNotFoundError, ValueError), match="does not exist"):
        make("podcast_encoding", podcast=tmp_path / "none", out_dir=tmp_path / "bad")
