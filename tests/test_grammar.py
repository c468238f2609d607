"""data/grammar: labels recomputed from what is written, and nothing that gives a label away."""

import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from data import InputError
from data.grammar import prepare as grammar
from data.stimuli import read_meta, read_pairs, read_task
from data.tokens import Tokens, encoding, tokenizer_state
from tests.helpers import ROOT, prepare, run

SMALL = {"train": 200, "val": 60, "test": 120, "pairs": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grammar")
    prepare(grammar, out_dir=folder, **SMALL)
    return folder


@pytest.fixture(scope="module")
def tasks(folder):
    return {name: read_task(folder, name) for name in read_meta(folder)["tasks"]}


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


# ---- the labels, by other means than the grammar's

PAST = {"was", "were", "had", "did", "wrote", "built", "met", "slept", "said", "thought", "broke"}
PLURALS = {"children", "people", "matrices", "indices", "vertices", "axes", "criteria", "leaves"}
PLURALS |= {"hypotheses", "bases", "spectra", "formulae"}
TAGS = ("VB", "VBZ", "VBP", "VBD", "VBN", "VBG")
BINS = ("4-6", "7-8", "9-10", "11-13", "14-17", "18-24")


def number_of_noun(noun):
    ends_in_s = noun.endswith("s") and not noun.endswith("is")
    return "plural" if noun in PLURALS or ends_in_s else "singular"


def number_by_form(np):
    while find(np, "NP"):
        np = find(np, "NP")
    return number_of_noun(find(np, "NN", "NNS")[1])


def tense_by_form(row):
    vp = find(parsed(row.tree), "VP")
    verb = next(child[1] for child in vp[1:] if child[0] not in ("RB", "ADVP"))
    past = verb in {*PAST, "lost"} or (verb.endswith("ed") and verb != "proceed")
    return "past" if past else "present"


def object_by_form(row):
    vp = find(parsed(row.tree), "VP")
    while find(vp, "VP"):
        vp = find(vp, "VP")
    return number_by_form(find(vp, "NP"))


def nesting(row):
    """How deep the brackets go."""
    level = np.cumsum([{"(": 1, ")": -1}.get(letter, 0) for letter in row.tree])
    return str(level.max())


def top_by_form(row):
    labels = []
    for child in parsed(row.tree)[1:]:
        is_verb = child[0].startswith(("V", "M")) and child[0] != "VP"
        if child[0] not in ",.":
            labels.append("AUX" if is_verb else child[0])
    return " ".join(labels)


def bin_of(row):
    n = len(row.text.split())
    return next(label for label in BINS if n <= int(label.split("-")[1]))


def sign_of(row):
    words = set(spoken(row.text))
    assert "not" not in words, row.text
    signs = set()
    for category, listed in grammar.lexicon(0, 1).items():
        sign, _, kind = category.partition("_")
        forms = set(listed)
        if kind == "act":
            for tag in TAGS:
                forms.update(grammar.inflect(verb, tag) for verb in listed)
        if sign in ("good", "bad") and forms & words:
            signs.add({"good": "positive", "bad": "negative"}[sign])
    assert len(signs) == 1, row.text
    return signs.pop()


@pytest.mark.parametrize(
    "name, oracle",
    [
        ("length", bin_of),
        ("word_content", lambda row: " ".join(set(grammar.TARGETS) & set(spoken(row.text)))),
        ("depth", nesting),
        ("top_constituents", top_by_form),
        ("tense", tense_by_form),
        ("subj_number", lambda row: number_by_form(find(parsed(row.tree), "NP"))),
        ("obj_number", object_by_form),
        ("polarity", sign_of),
    ],
)
def test_labels_can_be_read_again(tasks, name, oracle):
    for row in tasks[name].itertuples():
        assert oracle(row) == row.label, row.text
        leaves = re.findall(r" ([^\s()]+)\)", row.tree)
        assert spoken(" ".join(leaves)) == spoken(row.text)


def groups(frame, label):
    """[(texts with this label, the others)] of each group, in order."""
    for _, group in frame.groupby("group"):
        chosen = group["label"] == label
        yield group["text"][chosen].tolist(), group["text"][~chosen].tolist()


def differences(a, b):
    """[(place, word, other word)] of two sentences of the same length, as lists of words."""
    assert len(a) == len(b), (a, b)
    return [(i, x, y) for i, (x, y) in enumerate(zip(a, b)) if x != y]


def test_shifted_and_inverted_sentences_are_their_twins_exchanged(tasks):
    for (good,), (bad,) in groups(tasks["bigram_shift"], "original"):
        a = spoken(good)
        b = spoken(bad)
        i = differences(a, b)[0][0]
        a[i], a[i + 1] = a[i + 1], a[i]
        assert a == b
    for (good,), (bad,) in groups(tasks["coord_inversion"], "original"):
        a = spoken(good)
        places = [i for i, word in enumerate(a) if word in ("and", "but")]
        assert any([*a[i + 1 :], a[i], *a[:i]] == spoken(bad) for i in places), (good, bad)
        second = a[places[0] + 1 :]
        assert {"they", "it", "them", "then", "also", "the"} & set(second)  # what tells the order


def test_odd_sentences_have_their_objects_exchanged(tasks):
    lexicon = grammar.lexicon(0, 1)
    singular = {}
    for noun in lexicon["thing"] + lexicon["human"]:
        singular |= {grammar.plural(noun): noun, noun: noun}
    for original, odd in groups(tasks["odd_man_out"], "original"):
        assert len(original) == 2
        assert Counter(spoken(" ".join(original))) == Counter(spoken(" ".join(odd)))
        for sentence in map(spoken, original):
            twins = [spoken(other) for other in odd if len(spoken(other)) == len(sentence)]
            ((_, noun, other),) = min((differences(sentence, twin) for twin in twins), key=len)
            people = {singular[noun] in lexicon["human"], singular[other] in lexicon["human"]}
            assert people == {True, False}, sentence


# ---- nothing gives a label away


def test_labels_are_balanced_in_every_split(folder, tasks):
    for name, frame in tasks.items():
        entry = read_meta(folder)["tasks"][name]
        n_labels = len(entry["labels"])
        for split, n in entry["sizes"].items():
            counts = frame["label"][frame["split"] == split].value_counts()
            assert set(counts) == {n // n_labels} and set(counts.index) == set(entry["labels"])
            assert SMALL[split] - 20 < n <= SMALL[split], name
        assert entry["chance"] == pytest.approx(1 / n_labels)


def test_length_says_nothing_about_the_label(tasks):
    """As many sentences of each length in words for every label; characters score at chance."""
    for name in set(tasks) - {"length"}:
        frame = tasks[name]
        n_words = frame["text"].str.split().str.len()
        counts = pd.crosstab([frame["split"], n_words], frame["label"])
        assert (counts.nunique(axis=1) == 1).all(), name
        chance = 1 / frame["label"].nunique()
        train = frame["split"] == "train"
        test = frame["split"] == "test"
        for size in (n_words, frame["text"].str.len() // 4):
            best = pd.crosstab(size[train], frame["label"][train]).idxmax(axis=1)
            accuracy = (size[test].map(best) == frame["label"][test]).mean()
            limit = chance + 3.5 * np.sqrt(chance * (1 - chance) / test.sum())
            assert accuracy <= limit, (name, accuracy)


FUNCTION_WORDS = """a an the this that these those some your our every each another many several all
two three no and but because although since though of near in from inside outside who when where why
how can could will would should must may might is are was were has have had do does did not ever
also then today sometimes often usually finally initially it itself they them themselves we us you
yourself"""
FUNCTION_WORDS = set(re.findall("[a-z]+", FUNCTION_WORDS))


def test_test_sentences_have_content_words_of_their_own(tasks):
    for name, frame in tasks.items():
        test = frame["split"] == "test"
        seen = set(spoken(" ".join(frame["text"][~test])))
        held_out = set(spoken(" ".join(frame["text"][test])))
        targets = set(grammar.TARGETS) if name == "word_content" else set()
        assert seen & held_out <= FUNCTION_WORDS | targets, name
        assert len(held_out - FUNCTION_WORDS) > 50


def test_no_sentence_twice_and_groups_whole(tasks):
    for name, frame in tasks.items():
        assert frame["text"].is_unique, name
        grouped = frame.groupby("group")
        assert (grouped["split"].nunique() == 1).all()
        assert (grouped.size() == grammar.TASKS[name].members).all()
        assert frame["text"].str.fullmatch(r"[A-Z][a-z]*(,? [a-z]+)*[.?]").all()
        assert not frame["text"].str.contains(r"\b(?:a [aeio]|an [^aeiou])", case=False).any()


def test_pairs_differ_in_one_word(folder, tasks):
    pairs = read_pairs(folder)
    assert len(pairs) == len(grammar.PARADIGMS)
    assert read_pairs(folder / "pairs") == dict(sorted(pairs.items()))
    for uid, members in pairs.items():
        assert len({pair["sentence_good"] for pair in members}) == SMALL["pairs"] == len(members)
        for pair in members:
            good = pair["sentence_good"].split()
            bad = pair["sentence_bad"].split()
            assert len(differences(good, bad)) == 1 and pair["UID"] == uid, pair
            if pair["one_prefix_method"]:
                for which in ("good", "bad"):
                    start = f"{pair['one_prefix_prefix']} {pair[f'one_prefix_word_{which}']}"
                    assert pair[f"sentence_{which}"].startswith(start)
    for (good,), (bad,) in groups(tasks["grammaticality"], "grammatical"):
        assert len(differences(good.split(), bad.split())) == 1
    assert set(tasks["grammaticality"]["violation"]) == {"", *pairs}


def test_number_mismatch_is_what_goes_wrong(folder):
    """Agreement by its words: the wrong one has the number that its subject has not."""
    pairs = read_pairs(folder)
    for pair in pairs["determiner_noun_agreement"]:
        determiner = pair["one_prefix_prefix"].split()[-1].lower()
        is_plural = number_of_noun(pair["one_prefix_word_good"]) == "plural"
        assert (determiner in ("these", "those")) == is_plural, pair
    for pair in pairs["subject_verb_agreement_pp_attractor"]:
        verb = pair["one_prefix_word_good"]
        plural_verb = verb in ("are", "were", "have", "do") or not verb.endswith("s")
        (subject, *_) = re.split(" (?:of|near|in|from) ", pair["one_prefix_prefix"])
        assert plural_verb == (number_of_noun(subject.split()[-1]) == "plural"), pair
    for pair in pairs["subject_verb_agreement_coordinated_subjects"]:
        assert pair["one_prefix_word_bad"].endswith("s")
        assert not pair["one_prefix_word_good"].endswith("s")


def test_a_seed_makes_the_same_files_and_another_seed_others(folder, tmp_path):
    options = [f"{key}={value}" for key, value in SMALL.items()]
    run("data/grammar/prepare", f"out_dir={tmp_path}", *options, env={"PYTHONHASHSEED": "7"})
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 1 + len(grammar.TASKS) + len(grammar.PARADIGMS)
    for file in files:
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes(), file
    other = grammar.make_task("tense", grammar.Config(seed=1, **SMALL))["frame"]["text"]
    shared = set(other) & set(read_task(folder, "tense")["text"])
    assert len(shared) < len(other) / 2


def test_a_grammar_that_runs_dry_says_so(monkeypatch):
    with pytest.raises(InputError, match="val=3 leaves labels without sentences: set 40 or more"):
        grammar.Config(val=3).check()

    def always(g):
        verb = grammar.Tree("VBZ", word="is", lemma="be")
        return grammar.Tree("S", verb), verb, "are"

    monkeypatch.setattr(grammar, "PARADIGMS", {"u": grammar.Paradigm(always, "agreement")})
    with pytest.raises(InputError, match="fewer than pairs=40 pairs of u: set a smaller pairs="):
        grammar.make_pairs(grammar.Config(pairs=40))
    labels = ["grammatical", "ungrammatical"]
    task = grammar.Task(grammar.draw_grammaticality, labels, members=2)
    monkeypatch.setattr(grammar, "TASKS", {"t": task})
    with pytest.raises(InputError, match="not yield 40 different sentences for 't', train: set"):
        grammar.make_task("t", grammar.Config(train=40))


def test_verbs_are_inflected():
    for forms in (
        "be is are was been being",
        "have has have had had having",
        "copy copies copy copied copied copying",
        "agree agrees agree agreed agreed agreeing",
        "write writes write wrote written writing",
        "push pushes push pushed pushed pushing",
    ):
        verb = forms.split()[0]
        assert " ".join(grammar.inflect(verb, tag) for tag in TAGS) == forms


def test_the_lexicon_is_in_the_embedded_corpus():
    """Every word at least 20 times in data/pydocs' training text, its forms together."""
    pydocs = ROOT / "data/pydocs"
    if not (pydocs / "meta.yaml").exists():
        pytest.skip("data/pydocs is not made")
    enc = encoding(tokenizer_state(pydocs))
    ids = Tokens(pydocs, "train").tokens
    counts = Counter()
    for start in range(0, len(ids), 1_000_000):
        text = enc.decode(ids[start : start + 1_000_000].tolist())
        counts.update(re.findall("[a-z]+", text.lower()))
    known = grammar.lexicon(0, 1) | {"target": grammar.TARGETS, "function": FUNCTION_WORDS}
    for category, words in known.items():
        for word in words:
            forms = {word}
            if category in ("agent", "thing", "tool", "human", "place"):
                forms.add(grammar.plural(word))
            elif category.split("_")[-1] in ("act", "meet", "go", "say"):
                forms |= {grammar.inflect(word, tag) for tag in ("VBZ", "VBD", "VBN", "VBG")}
            assert sum(counts[form] for form in forms) >= 20, word
