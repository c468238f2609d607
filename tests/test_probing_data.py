"""data/probing/get_data.py on small files in the layouts of their makers, and over a server that breaks off."""
import http.server
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import threading
import zipfile

import pandas as pd
import pytest
import yaml
from helpers import ROOT

SCRIPT = ROOT / "data/probing/get_data.py"
spec = importlib.util.spec_from_file_location("get_data", SCRIPT)
get_data = importlib.util.module_from_spec(spec)
sys.modules["get_data"] = get_data  # where dataclasses look up the types of their fields
spec.loader.exec_module(get_data)
SEED_KEYS = ["data", "name", "link", "topic", "task", "size", "average length", "multiple", "type", "n_categories", "labels", "language"]


def run(*options, status=0):
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, options)], capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def tarred(path, files, link=None):
    with tarfile.open(path, "w") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
        if link:
            member = tarfile.TarInfo(link[0])
            member.type, member.linkname = tarfile.SYMTYPE, link[1]
            archive.addfile(member)


ETHICS = {f"ethics/commonsense/cm_{split}.csv": 'label,input,is_short,edited\n0,"I fed the cat, twice.",True,False\n1,I kicked the cat.,True,False\n'
                                                f'1,"A long {split} story.",False,False\n' for split in ("train", "test")}
PAIR = '{{"sentence_good": "Cats {0} sleep.", "sentence_bad": "Cats {0} sleeps.", "UID": "{1}", "linguistics_term": "subject_verb"}}\n'


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder of local copies of every set but the grammar."""
    root = tmp_path_factory.mktemp("copies")
    zipped(root / "SST-2.zip", {"SST-2/train.tsv": 'sentence\tlabel\na "fine" film \t1\na dull film \t0\n', "SST-2/dev.tsv": "sentence\tlabel\nso-so \t0\n"})
    zipped(root / "CoLA.zip", {"CoLA/train.tsv": "gj04\t1\t\tHe left.\ngj04\t0\t*\tLeft he has.\nbroken line\n", "CoLA/dev.tsv": "gj04\t1\t\tShe left.\n"})
    (root / "data/probing").mkdir(parents=True)
    for task in get_data.SENTEVAL:
        (root / "data/probing" / f"{task}.txt").write_text(f"tr\t10\tOne {task} .\nva\t2\tTwo .\nte\t2\tThree .\n")
    zipped(root / "blimp-master.zip", {f"blimp-master/data/{uid}.jsonl": PAIR.format(1, uid) + PAIR.format(2, uid) for uid in ("agr", "bind")}
           | {"blimp-master/README.md": "x"})
    (root / get_data.BRYSBAERT).write_text("Word\tBigram\tConc.M\tConc.SD\nroadsweeper\t0\t4.85\t0.37\nidea\t0\t1.5\t1\n")
    tarred(root / "ethics.tar", ETHICS | {"../evil.txt": "x", "/tmp/evil.txt": "x"})
    labels = {"amazon_polarity": [0, 1], "app_reviews": [1, 5], "humor": [True, False], "dutch_social": ["neg", "pos"], "hate_speech18": [0, 1],
              "liar": [5, 3], "humicroedit": [0.0, 1.5], "sst": [0.25, 0.75], "tweets_hate_speech": [0, 1]}
    for name, source in get_data.HUB.items():
        for split in source.splits:
            folder = root / name / source.config / split
            folder.mkdir(parents=True)
            text, label = source.columns
            frame = pd.DataFrame({text: [f"first {split} <cats/>", f"second {split} <cats/>"], label: labels[name], "edit": "dogs"})
            if name == "hate_speech18":
                frame.loc[2] = ["a relation", 2, ""]
            frame.to_parquet(folder / "0000.parquet")
    return root


def read(folder, file):
    content = json.loads((folder / file).read_text())
    assert list(content)[:len(SEED_KEYS)] == SEED_KEYS
    sentences, labels = content["data"]["sentences"], content["data"]["labels"]
    assert list(sentences) == list(labels) == [str(i) for i in range(content["size"])]
    return content, dict(zip(sentences.values(), labels.values()))


def test_every_set_from_local_copies(copies, tmp_path):
    names = [n for n in get_data.SETS if n != "grammar"]
    said = run("-data_save_path", tmp_path, f"root={copies}", "sets=" + ",".join(names))
    content, labels = read(tmp_path, "sst2.json")
    assert labels == {'a "fine" film': 1, "a dull film": 0, "so-so": 0} and content["labels"] == {"0": "Negative", "1": "Positive"}
    assert sorted(content["data"]["splits"].values()) == ["test", "train", "train"] and "published file has 68,221" in said
    assert read(tmp_path, "cola.json")[1] == {"He left.": 1, "Left he has.": 0, "She left.": 1}
    content, labels = read(tmp_path, "senteval_tree_depth.json")
    assert content["labels"] == {"0": "2", "1": "10"} and labels == {"One tree_depth .": 1, "Two .": 0, "Three .": 0}
    assert set(content["data"]["splits"].values()) == {"train", "val", "test"} and len(list(tmp_path.glob("senteval_*.json"))) == 10
    content, labels = read(tmp_path, "blimp_agr.json")
    assert labels == {"Cats 1 sleep.": 1, "Cats 1 sleeps.": 0, "Cats 2 sleep.": 1, "Cats 2 sleeps.": 0} and content["topic"] == "subject verb"
    assert {(text.split()[1], g) for text, g in zip(content["data"]["sentences"].values(), content["data"]["groups"].values())} == {("1", "0"), ("2", "1")}
    content, labels = read(tmp_path, "concreteness.json")
    assert labels == {"roadsweeper": 0.9625, "idea": 0.125} and (content["task"], content["n_categories"]) == ("Regression", "inf")
    content, labels = read(tmp_path, "ethics.json")
    assert labels == {"I fed the cat, twice.": 0, "I kicked the cat.": 1} and content["size"] == 4  # the short ones of both files
    assert not list(tmp_path.glob("**/evil*"))
    assert read(tmp_path, "app_reviews.json")[1] == {"first train <cats/>": 0.0, "second train <cats/>": 1.0}
    assert read(tmp_path, "humor.json")[1] == {"first train <cats/>": 1, "second train <cats/>": 0}
    assert read(tmp_path, "hate_speech18.json")[1] == {"first train <cats/>": 0, "second train <cats/>": 1}  # and no relation
    assert read(tmp_path, "liar.json")[1]["first test <cats/>"] == 0.0 and read(tmp_path, "liar.json")[1]["second test <cats/>"] == 1.0
    assert read(tmp_path, "humicroedit.json")[1]["second train dogs"] == 0.5
    assert read(tmp_path, "sst.json")[0]["size"] == 6 and read(tmp_path, "dutch_social.json")[0]["language"] == "Nl"


def test_probe_reads_what_is_written(copies, tmp_path):
    import probe
    run(tmp_path, f"root={copies}", "sets=cola,concreteness,blimp,senteval")  # a bare folder is the path too
    cola = probe.NLPDataset(str(tmp_path / "cola.json"))
    assert cola.kind == "binary" and dict(cola[i] for i in range(3)) == {"He left.": 1, "Left he has.": 0, "She left.": 1}
    assert probe.NLPDataset(str(tmp_path / "concreteness.json")).kind == "regression"
    assert sorted(cola.split) == ["test", "train", "train"]
    blimp = probe.NLPDataset(str(tmp_path / "blimp_agr.json"))
    assert len({(text.split()[1], group) for text, group in zip(blimp.texts, blimp.groups)}) == len(set(blimp.groups)) == 2  # pairs stay together
    assert probe.NLPDataset(str(tmp_path / "senteval_past_present.json")).label_names == ["2", "10"]


def test_grammar_is_exported_offline(tmp_path):
    run("-data_save_path", tmp_path, "sets=grammar", "max_texts=100")
    content, labels = read(tmp_path, "grammar_bigram_shift.json")
    assert content["synthetic"] and content["size"] == 100 and sorted(labels.values()) == [0] * 50 + [1] * 50
    groups = pd.Series(content["data"]["groups"]).value_counts()
    assert (groups == 2).all()  # both twins, or none
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.json")}
    assert "there already" in run("-data_save_path", tmp_path, "sets=grammar", "max_texts=100")
    (tmp_path / "grammar_tense.json").write_text("{}")  # not what was written: made again, and the same
    assert "there already" not in run("-data_save_path", tmp_path, "sets=grammar", "max_texts=100")
    assert before == {p.name: p.read_bytes() for p in tmp_path.glob("*.json")} and not list(tmp_path.glob("*.tmp*"))


def test_a_missing_set_stops_no_other(copies, tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some/CoLA.zip").write_bytes((copies / "CoLA.zip").read_bytes())
    (tmp_path / "some/SST-2.zip").write_bytes((copies / "SST-2.zip").read_bytes()[:-30])
    said = run("-data_save_path", tmp_path / "out", f"root={tmp_path / 'some'}", "sets=sst2,cola,ethics", status=2)
    error = next(line for line in said.splitlines() if line.startswith("error: "))
    assert "sst2, ethics could not be had" in error and "root=" in error and "Traceback" not in said
    assert "SST-2.zip is broken" in said and "ethics.tar" in said and read(tmp_path / "out", "cola.json")


def test_a_link_in_an_archive_is_not_followed(tmp_path):
    tarred(tmp_path / "ethics.tar", {}, link=("ethics/commonsense/cm_train.csv", "/etc/passwd"))
    with pytest.raises(ValueError, match="link or a folder"):
        list(get_data.ethics(tmp_path))


@pytest.mark.parametrize("options, words", [
    (["sets=nosuch"], ["nosuch", "blimp"]), (["root=nosuch"], ["root=nosuch", "SST-2.zip"]), (["-data_save_path"], ["-data_save_path", "folder"]),
    (["sest=cola"], ["'sest'", "'sets'"])])
def test_bad_options(options, words, tmp_path):
    said = run(*options, status=2)
    assert "Traceback" not in said and all(w in said for w in words), said


@pytest.mark.parametrize("file, content, words", [
    ("Concreteness", "Wort\tM\na\t1\n", ["Word"]), ("Concreteness", "Word\tConc.M\na\t9\nb\t1\n", ["label"]),
    ("Concreteness", "Word\tConc.M\na\t2\nb\t2\n", ["fewer than two"]), ("Concreteness", b"\xff\xfe", ["UTF-8"])])
def test_foreign_files(file, content, words, tmp_path):
    (tmp_path / get_data.BRYSBAERT).write_bytes(content if isinstance(content, bytes) else content.encode())
    said = run("-data_save_path", tmp_path / "out", f"root={tmp_path}", "sets=concreteness", status=2)
    assert "Traceback" not in said and all(w in said for w in words), said


# ---- the network, on this machine

class Breaking(http.server.BaseHTTPRequestHandler):
    """Serves `content` with ranges, and breaks off after 1,000 bytes as long as `breaks` lasts."""
    content, breaks, ranges, asked = b"", 0, True, []

    def do_GET(self):
        start = int(self.headers["Range"].split("=")[1].rstrip("-")) if self.headers["Range"] and self.ranges else 0
        Breaking.asked.append(start)
        if self.path != "/file.zip":
            return self.send_error(404)
        body = self.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if Breaking.breaks:
            Breaking.breaks -= 1
            body = body[:1000]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Breaking.content, Breaking.breaks, Breaking.ranges, Breaking.asked = bytes(range(256)) * 20, 0, True, []
    get_data.DEAD.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def test_a_download_is_resumed_and_checked(server, tmp_path):
    path, sources = tmp_path / "file.zip", {}
    Breaking.breaks = 5
    with pytest.raises(OSError, match="does not come whole"):
        get_data.download(f"{server}/file.zip", path, sources)
    assert not path.exists() and path.with_name("file.zip.part").stat().st_size == 3000 and Breaking.asked == [0, 1000, 2000]
    get_data.download(f"{server}/file.zip", path, sources)  # two more breaks, and on to the end
    assert path.read_bytes() == Breaking.content and Breaking.asked[3:] == [3000, 4000, 5000] and not list(tmp_path.glob("*.part"))
    get_data.download(f"{server}/file.zip", path, sources)  # noted with its checksum: not asked for again
    assert len(Breaking.asked) == 6
    path.write_bytes(b"other")
    get_data.download(f"{server}/file.zip", path, sources)
    assert path.read_bytes() == Breaking.content


def test_a_server_without_ranges_begins_again(server, tmp_path):
    Breaking.breaks, Breaking.ranges = 1, False
    get_data.download(f"{server}/file.zip", tmp_path / "file.zip", {})
    assert (tmp_path / "file.zip").read_bytes() == Breaking.content


def test_no_network_is_one_sentence(server, tmp_path, monkeypatch, capsys):
    with pytest.raises(OSError, match="HTTP 404.*root="):
        get_data.download(f"{server}/other.zip", tmp_path / "other.zip", {})
    monkeypatch.setattr(get_data, "URLS", {"sst2": {"SST-2.zip": "http://127.0.0.1:9/SST-2.zip"}, "cola": {"CoLA.zip": "http://127.0.0.1:9/CoLA.zip"}})
    with pytest.raises((OSError, ValueError), match="sst2, cola could not be had .* root="):
        get_data.main(get_data.Config(data_save_path=str(tmp_path), sets=["sst2", "cola"]))
    assert capsys.readouterr().out.count("not reachable") == 2
    assert yaml.safe_load((tmp_path / "sources.yaml").read_text())["sets"] == {}
