"""data/stimuli.py and data/grammar: the format and its sentences, labels recomputed from what is written, and nothing that gives a label away."""
import json, re, subprocess, sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.grammar import prepare as grammar
from data.stimuli import complete, read_meta, read_pairs, read_task, read_tasks, write_tasks
from data.tokens import Tokens, encoding, tokenizer_state

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(train=400, val=100, test=200, pairs=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grammar")
    grammar.main(grammar.Config(out_dir=str(folder), **SMALL))
    return folder


@pytest.fixture(scope="module")
def tasks(folder):
    return {name: read_task(folder, name) for name in read_tasks(folder)}


def spoken(text):
    """The words of a sentence, as they are in its middle."""
    return re.findall(r"[a-z']+", text.lower())


def parsed(bracketed):
    """'(S (NP (DT the) ...) ...)' → [label, child, ...], a word being [label, string]."""
    stack = [[]]
    for token in re.findall(r"\(|\)|[^\s()]+", bracketed):
        if token == "(":
            stack.append([])
        elif token == ")":
            stack[-2].append(stack.pop())
        else:
            stack[-1].append(token)
    return stack[0][0]


def find(tree, *labels):
    return next((child for child in tree[1:] if child[0] in labels), None)


# ---- the labels

PAST = {"was", "were", "had", "did", "wrote", "built", "met", "slept", "said", "thought", "broke", "lost"}
PLURALS = {"children", "people", "matrices", "indices", "vertices", "axes", "criteria", "leaves", "hypotheses", "bases", "spectra", "formulae"}


def number_by_form(np):
    """Number by the noun's ending."""
    while find(np, "NP"):
        np = find(np, "NP")
    noun = find(np, "NN", "NNS")[1]
    return "plural" if noun in PLURALS or noun.endswith("s") and not noun.endswith("is") else "singular"


def finite_by_form(tree):
    verb = next(child[1] for child in find(tree, "VP")[1:] if child[0] not in ("RB", "ADVP"))
    return "past" if verb in PAST or verb.endswith("ed") and verb != "proceed" else "present"


def object_by_form(tree):
    vp = find(tree, "VP")
    while find(vp, "VP"):
        vp = find(vp, "VP")
    return number_by_form(find(vp, "NP"))


def nesting(bracketed):
    """How deep the brackets go."""
    level = np.cumsum([{"(": 1, ")": -1}.get(c, 0) for c in bracketed])
    return str(level.max())


def top_by_form(tree):
    return " ".join("AUX" if child[0].startswith(("V", "M")) and child[0] != "VP" else child[0] for child in tree[1:] if child[0] not in ",.")


def bin_of(text):
    n = len(text.split())
    return next(label for label in ("4-6", "7-8", "9-10", "11-13", "14-17", "18-24") if n <= int(label.split("-")[1]))


SIGNS = {
    "positive": "valid useful correct safe efficient easy nice good clear helpful fast accurate stable robust strong perfect reliable flexible reasonable"
                " convenient correctly safely efficiently easily nicely perfectly accurately properly successfully carefully improve fix restore simplify",
    "negative": "invalid useless incorrect unsafe inefficient bad redundant ambiguous noisy wrong slow inaccurate unstable weak expensive malformed"
                " difficult tricky poor illegal incorrectly accidentally slowly arbitrarily break lose reject destroy broke broken lost losing"}


def sign_of(text):
    found = set()
    for sign, known in ((sign, known) for sign, words in SIGNS.items() for known in words.split()):
        forms = {known + ending for ending in ("", "s", "es", "d", "ed", "ing")} | {known[:-1] + ending for ending in ("ing", "ies", "ied")}
        found |= {sign} if forms & set(spoken(text)) else set()
    assert len(found) == 1 and "not" not in spoken(text), text
    return found.pop()


@pytest.mark.parametrize("name, oracle", [
    ("length", lambda row: bin_of(row.text)),
    ("word_content", lambda row: " ".join(set(grammar.TARGETS) & set(spoken(row.text)))),
    ("depth", lambda row: nesting(row.tree)),
    ("top_constituents", lambda row: top_by_form(parsed(row.tree))),
    ("tense", lambda row: finite_by_form(parsed(row.tree))),
    ("subj_number", lambda row: number_by_form(find(parsed(row.tree), "NP"))),
    ("obj_number", lambda row: object_by_form(parsed(row.tree))),
    ("polarity", lambda row: sign_of(row.text)),
])
def test_labels_can_be_read_again(tasks, name, oracle):
    for row in tasks[name].itertuples():
        assert oracle(row) == row.label, row.text
        assert spoken(" ".join(re.findall(r" ([^\s()]+)\)", row.tree))) == spoken(row.text)


def groups(frame, label):
    """[(texts with this label, the others)] of each group, in order."""
    for _, group in frame.groupby("group"):
        yield group["text"][group["label"] == label].tolist(), group["text"][group["label"] != label].tolist()


def test_shifted_sentences_have_one_adjacent_swap(tasks):
    for (good,), (bad,) in groups(tasks["bigram_shift"], "original"):
        a, b = spoken(good), spoken(bad)
        i = next(i for i, pair in enumerate(zip(a, b)) if len(set(pair)) == 2)
        assert a[:i] + [a[i + 1], a[i]] + a[i + 2:] == b, (good, bad)


def test_inverted_sentences_have_their_clauses_exchanged(tasks):
    for (good,), (bad,) in groups(tasks["coord_inversion"], "original"):
        a, b = spoken(good), spoken(bad)
        places = [i for i, word in enumerate(a) if word in ("and", "but")]
        assert any(a[i + 1:] + [a[i]] + a[:i] == b for i in places), (good, bad)
        second = a[places[0] + 1:]
        assert {"they", "it", "them", "then", "also", "the"} & set(second)  # what gives the order away


def test_odd_sentences_have_their_objects_exchanged(tasks):
    things, people = (set(grammar.lexicon(0, 1)[category]) for category in ("thing", "human"))
    for original, odd in groups(tasks["odd_man_out"], "original"):
        assert Counter(spoken(" ".join(original))) == Counter(spoken(" ".join(odd))) and len(original) == 2
        for sentence in original:
            twin = min(odd, key=lambda other: sum(a != b for a, b in zip(spoken(sentence), spoken(other))) + 99 * (len(sentence.split()) != len(other.split())))
            changed = [pair for pair in zip(spoken(sentence), spoken(twin)) if len(set(pair)) == 2]
            singular = [{grammar.plural(noun): noun for noun in things | people}.get(word, word) for word in changed[0]]
            assert len(changed) == 1 and len({word in people for word in singular}) == 2, (sentence, twin)


# ---- nothing gives a label away

def test_labels_are_balanced_in_every_split(folder, tasks):
    for name, frame in tasks.items():
        entry = read_tasks(folder)[name]
        for split, n in entry["sizes"].items():
            counts = frame["label"][frame["split"] == split].value_counts()
            assert set(counts) == {n // len(entry["labels"])} and set(counts.index) == set(entry["labels"]), name
            assert SMALL[split] - 20 < n <= SMALL[split]
        assert entry["chance"] == pytest.approx(1 / len(entry["labels"]))


def test_length_says_nothing_about_the_label(tasks):
    """Words: as many sentences of each length for every label. Characters: what the commonest label at a length scores stays at chance."""
    for name, frame in tasks.items():
        if name == "length":
            continue
        words, chance = frame["text"].str.split().str.len(), 1 / frame["label"].nunique()
        assert (pd.crosstab([frame["split"], words], frame["label"]).nunique(axis=1) == 1).all(), name
        train, test = (frame[frame["split"] == split] for split in ("train", "test"))
        for size in (lambda f: f["text"].str.split().str.len(), lambda f: f["text"].str.len() // 4):
            best = train.groupby(size(train))["label"].agg(lambda labels: labels.value_counts().sort_index().idxmax())
            accuracy = (size(test).map(best) == test["label"]).mean()
            assert accuracy <= chance + 3.5 * np.sqrt(chance * (1 - chance) / len(test)), (name, accuracy)


FUNCTION_WORDS = set("""a an the this that these those some your our every each another many several all two three no and but because although since though
    of near in from inside outside who when where why how can could will would should must may might is are was were has have had do does did not ever
    also then today sometimes often usually finally initially it itself they them themselves we us you yourself""".split())


def test_test_sentences_have_content_words_of_their_own(tasks):
    for name, frame in tasks.items():
        seen, held_out = (set(spoken(" ".join(frame["text"][(frame["split"] == "test") == side]))) for side in (False, True))
        assert seen & held_out <= FUNCTION_WORDS | (set(grammar.TARGETS) if name == "word_content" else set()), name
        assert len(held_out - FUNCTION_WORDS) > 50


def test_no_sentence_twice_and_groups_whole(tasks):
    for name, frame in tasks.items():
        assert frame["text"].is_unique, name
        assert (frame.groupby("group")["split"].nunique() == 1).all()
        assert (frame.groupby("group").size() == grammar.TASKS[name].members).all()
        assert frame["text"].str.fullmatch(r"[A-Z][a-z]*(,? [a-z]+)*[.?]").all()
        assert not frame["text"].str.contains(r"\b(?:a [aeio]|an [^aeiou])", case=False).any()


# ---- minimal pairs

def test_pairs_differ_in_one_word(folder, tasks):
    pairs = read_pairs(folder)
    assert len(pairs) == len(grammar.PARADIGMS) and read_pairs(folder / "pairs") == dict(sorted(pairs.items()))
    for uid, members in pairs.items():
        assert len(members) == SMALL["pairs"] == len({pair["sentence_good"] for pair in members})
        for pair in members:
            good, bad = pair["sentence_good"].split(), pair["sentence_bad"].split()
            changed = [i for i, (a, b) in enumerate(zip(good, bad)) if a != b]
            assert len(good) == len(bad) and len(changed) == 1 and pair["UID"] == uid, pair
            if pair["one_prefix_method"]:
                assert pair["sentence_good"].startswith(f"{pair['one_prefix_prefix']} {pair['one_prefix_word_good']}")
                assert pair["sentence_bad"].startswith(f"{pair['one_prefix_prefix']} {pair['one_prefix_word_bad']}")
    for (good,), (bad,) in groups(tasks["grammaticality"], "grammatical"):
        assert sum(a != b for a, b in zip(good.split(), bad.split())) == 1 and len(good.split()) == len(bad.split())
    assert set(tasks["grammaticality"]["violation"]) == {"", *pairs}


def test_number_mismatch_is_what_goes_wrong(folder):
    """The agreement paradigms, by their words: the wrong one has the number that its subject (or determiner) has not."""
    pairs = read_pairs(folder)
    for pair in pairs["determiner_noun_agreement"]:
        determiner, noun = pair["one_prefix_prefix"].split()[-1].lower(), pair["one_prefix_word_good"]
        assert (determiner in ("these", "those")) == (number_by_form(["NP", ["NN", noun]]) == "plural"), pair
    for pair in pairs["subject_verb_agreement_pp_attractor"]:
        plural_verb = pair["one_prefix_word_good"] in ("are", "were", "have", "do") or not pair["one_prefix_word_good"].endswith("s")
        number = {preposition: pair["one_prefix_prefix"].split(f" {preposition} ")[0].split()[-1] for preposition in ("of", "near", "in", "from")
                  if f" {preposition} " in pair["one_prefix_prefix"]}
        assert len(number) == 1 and plural_verb == (number_by_form(["NP", ["NN", *number.values()]]) == "plural"), pair
    for pair in pairs["subject_verb_agreement_coordinated_subjects"]:
        assert pair["one_prefix_word_bad"].endswith("s") and not pair["one_prefix_word_good"].endswith("s")


# ---- the dataset

def test_a_seed_makes_the_same_files_and_another_seed_others(folder, tmp_path):
    again = tmp_path / "again"
    subprocess.run([sys.executable, "data/grammar/prepare.py", f"out_dir={again}", *(f"{k}={v}" for k, v in SMALL.items())], cwd=ROOT, check=True,
                   env={"PYTHONHASHSEED": "7"}, stdout=subprocess.DEVNULL)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 1 + len(grammar.TASKS) + len(grammar.PARADIGMS)
    assert all((again / file).read_bytes() == (folder / file).read_bytes() for file in files)
    other = set(grammar.make_task("tense", grammar.Config(seed=1, **SMALL))["frame"]["text"])
    assert len(other & set(read_task(folder, "tense")["text"])) < len(other) / 2


def test_made_once(folder, capsys):
    before = (folder / "meta.yaml").stat().st_mtime_ns
    grammar.main(grammar.Config(out_dir=str(folder), **SMALL))
    assert "is there already" in capsys.readouterr().out and (folder / "meta.yaml").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="was made with .*overwrite=True"):
        grammar.main(grammar.Config(out_dir=str(folder), seed=5, **SMALL))
    with pytest.raises(ValueError, match="val=3 leaves labels without sentences: give 40 or more"):
        grammar.Config(val=3).check()
    meta = read_meta(folder)
    assert meta["synthetic"] is True and meta["options"]["seed"] == 0 and len(meta["grammar"]) == 64


def test_a_grammar_that_runs_dry_says_so(monkeypatch):
    def always(g):
        tree = grammar.Tree("S", verb := grammar.Tree("VBZ", word="is", lemma="be"))
        return tree, verb, "are"
    monkeypatch.setattr(grammar, "PARADIGMS", {"u": grammar.Paradigm(always, "morphology", "agreement")})
    with pytest.raises(ValueError, match="fewer than pairs=40 pairs of u: give a smaller pairs="):
        grammar.make_pairs(grammar.Config(pairs=40))
    monkeypatch.setattr(grammar, "TASKS", {"t": grammar.Task(grammar.draw_grammaticality, ["grammatical", "ungrammatical"], "", members=2)})
    with pytest.raises(ValueError, match="does not yield 40 different sentences for 't', train: give a smaller train="):
        grammar.make_task("t", grammar.Config(train=40))


def test_the_lexicon_is_in_the_embedded_corpus():
    """Every word at least 20 times in data/pydocs' training text, its forms together."""
    if not (ROOT / "data/pydocs/meta.yaml").exists():
        pytest.skip("data/pydocs is not made")
    enc, ids = encoding(tokenizer_state(ROOT / "data/pydocs")), Tokens(ROOT / "data/pydocs", "train").tokens
    said = Counter(word for i in range(0, len(ids), 1_000_000) for word in re.findall("[a-z]+", enc.decode(ids[i:i + 1_000_000].tolist()).lower()))
    rare = {}
    for category, words in (grammar.lexicon(0, 1) | {"target": grammar.TARGETS, "function": sorted(FUNCTION_WORDS)}).items():
        for word in words:
            forms = {word}
            if category in ("agent", "thing", "tool", "human", "place"):
                forms |= {grammar.plural(word)}
            elif category.split("_")[-1] in ("act", "meet", "go", "say"):
                forms |= {grammar.inflect(word, tag) for tag in ("VBZ", "VBD", "VBN", "VBG")}
            if (n := sum(said[form] for form in forms)) < 20:
                rare[word] = n
    assert not rare
