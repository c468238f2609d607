"""A small English grammar whose every sentence comes with its tree.

    python data/grammar/prepare.py
    python data/grammar/prepare.py seed=1 out_dir=data/grammar1

It writes agreement minimal pairs in the style of BLiMP (Warstadt et al. 2020), grammatical and
ungrammatical sentences, and the ten probing tasks of SentEval (Conneau et al. 2018) with polarity
beside them. Labels are read off the tree. Test sentences use content words that no training
sentence has, and only the label of `length` can be told from how long a sentence is.
"""

import random
import sys
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError, already_made, file_hash, folder_of, options_of
from data.stimuli import complete, write_tasks

EMBEDDED = True  # written by rule: scripts may start this on first use


@dataclass
class Config:
    out_dir: str = ""  # "": this folder
    seed: int = 0  # another seed, other sentences
    train: int = 2000  # sentences of each task, out of one half of the lexicon
    val: int = 500  # out of the same half
    test: int = 1000  # out of the other half
    pairs: int = 500  # minimal pairs of each paradigm, out of the whole lexicon
    overwrite: bool = False  # make it again although it is there

    def check(self):
        for key in ("train", "val", "test", "pairs"):
            n = getattr(self, key)
            if n < 40:
                raise InputError(f"{key}={n} leaves labels without sentences: give 40 or more")


# ---- lexicon
# Every word occurs at least 20 times, in one form or another, in the training text of data/pydocs.
# Left of the bar: train and val; right: test. No string stands on both sides (nor in two parts of
# speech), and opposites (valid, invalid) stay on the same one.


def paired(text):
    """{left: right} of "left right, left right"."""
    return dict(pair.split() for pair in text.split(", "))


LEXICON = {
    "agent": "user author operator parent caller agent observer expert speaker consumer child "
    "visitor | manager client worker artist member writer reader developer driver person editor "
    "listener",
    "thing": "file function value array object graph module index argument token column buffer "
    "message template package dataset script matrix criterion leaf | list tensor method string "
    "model path sequence dictionary variable table vector library program figure paper vertex axis "
    "hypothesis basis spectrum formula",
    # things that do something, and agents that are no software
    "tool": "module function script package | model program library method",
    "human": "user author parent expert speaker child visitor | manager artist member writer "
    "developer person listener",
    "place": "directory archive database browser container session | folder repository server "
    "environment registry workspace project",
    # verbs by what they take: a thing, an agent, nothing, a clause
    "act": "open write load print import edit merge store create parse close share insert attach "
    "encode | save delete export download upload rename sort convert generate build extract modify "
    "append truncate display",
    "meet": "help warn advise instruct encourage | ask notify meet assist contact",
    "go": "work wait agree sleep | arrive respond proceed listen",
    "say": "say note expect realize claim | report assume discover suggest think",
    "thing_adjective": "large new local binary empty raw original random partial linear standard "
    "global temporary internal | small old remote digital full hidden initial special external "
    "basic long short public private separate",
    "agent_adjective": "new local active anonymous typical | old remote quiet registered "
    "interested",
    "manner": "quickly automatically directly explicitly repeatedly manually eventually "
    "temporarily | immediately silently separately randomly locally frequently implicitly "
    "independently",
    # words with a sign, used for polarity only
    "good_adjective": "valid useful correct safe efficient easy nice good clear helpful | fast "
    "accurate stable robust strong perfect reliable flexible reasonable convenient",
    "bad_adjective": "invalid useless incorrect unsafe inefficient bad redundant ambiguous noisy "
    "wrong | slow inaccurate unstable weak expensive malformed difficult tricky poor illegal",
    "good_manner": "correctly safely efficiently easily nicely | perfectly accurately properly "
    "successfully carefully",
    "bad_manner": "incorrectly accidentally | slowly arbitrarily",
    "good_act": "improve fix | restore simplify",
    "bad_act": "break lose | reject destroy",
}
# of word_content: by its nature the same words in every split
TARGETS = """
image window tree header font button widget thread chart theorem kernel stream grid video loop
surface paragraph recipe queue title
"""
TARGETS = TARGETS.split()
IRREGULAR_PLURALS = paired(
    "child children, person people, matrix matrices, index indices, vertex vertices, axis axes, "
    "criterion criteria, leaf leaves, hypothesis hypotheses, basis bases, spectrum spectra, "
    "formula formulae"
)
IRREGULAR_FORMS = {
    "VB": {"be": "be"},
    "VBP": {"be": "are"},
    "VBG": {"be": "being"},
    "VBZ": {"be": "is", "have": "has", "do": "does"},
    "VBD": paired(
        "write wrote, build built, meet met, sleep slept, say said, think thought, break broke, "
        "lose lost, have had, do did"
    ),
    "VBN": paired(
        "write written, build built, meet met, sleep slept, say said, think thought, break broken, "
        "lose lost, have had, do done, be been"
    ),
}
SINGULAR, PLURAL = "singular", "plural"
OTHER = {SINGULAR: PLURAL, PLURAL: SINGULAR}
WAS = {SINGULAR: "was", PLURAL: "were"}
PRESENT = {SINGULAR: "VBZ", PLURAL: "VBP"}  # the tag of a finite verb
ITSELF = {SINGULAR: "itself", PLURAL: "themselves"}
IT = {SINGULAR: "it", PLURAL: "them"}  # as an object
DETERMINERS = {
    SINGULAR: ["the"] * 6 + ["a", "a", "this", "that", "your", "our"],
    PLURAL: ["the"] * 6 + ["some", "some", "these", "those", "your", "our"],
}
DEMONSTRATIVES = {SINGULAR: ("this", "that"), PLURAL: ("these", "those")}
QUANTIFIERS = {
    SINGULAR: ("every", "each", "another"),
    PLURAL: ["many", "several", "all", "two", "three"],
}
MODALS = ["can", "could", "will", "would", "should", "must", "may", "might"]
SENTENCE_ADVERBS = ["today", "sometimes", "often", "usually", "finally", "initially"]
SUBORDINATORS = ("because", "although", "since", "though")
FLIP = paired(  # the other number; of they and we, the other case
    "is are, was were, has have, does do, this these, that those, itself themselves, they them, "
    "we us"
)
FLIP |= {right: left for left, right in FLIP.items()}


def ends_in_consonant_y(word):
    return word.endswith("y") and word[-2] not in "aeiou"


def add_s(word):
    """A noun's regular plural, a verb's third person."""
    if ends_in_consonant_y(word):
        return word[:-1] + "ies"
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    return word + "s"


def plural(noun):
    return IRREGULAR_PLURALS.get(noun) or add_s(noun)


def inflect(verb, tag, number=SINGULAR):
    """The form of a verb under a Penn Treebank tag: VB open, VBZ opens, VBP open, VBD opened, VBN
    opened, VBG opening. The number is for was, were."""
    if verb == "be" and tag == "VBD":
        return WAS[number]
    if verb in IRREGULAR_FORMS.get(tag, {}):
        return IRREGULAR_FORMS[tag][verb]
    if tag == "VBZ":
        return add_s(verb)
    if tag in ("VBD", "VBN"):
        if ends_in_consonant_y(verb):
            return verb[:-1] + "ied"
        return verb + ("d" if verb.endswith("e") else "ed")
    if tag == "VBG":
        silent_e = verb.endswith("e") and not verb.endswith("ee")
        return (verb[:-1] if silent_e else verb) + "ing"
    return verb  # VB, VBP, MD


def lexicon(*sides):
    """{category: words} of one side of the bar (0: train and val, 1: test), or of both."""
    chosen = {}
    for category, words in LEXICON.items():
        halves = words.split("|")
        chosen[category] = " ".join(halves[side] for side in sides).split()
    return chosen


# ---- trees


class Tree:
    """A phrase with its children (None and False are left out), or a word with its lemma.

    label: a Penn Treebank tag; category: a content word's place in LEXICON.
    """

    def __init__(self, label, *children, word="", lemma="", category=""):
        self.label = label
        self.children = [child for child in children if child]
        self.word = word
        self.lemma = lemma or word
        self.category = category

    def __str__(self):
        """(S (NP (DT the) (NN user)) ...)"""
        return f"({self.label} {self.word or ' '.join(map(str, self.children))})"

    def leaves(self):
        if self.word:
            return [self]
        leaves = []
        for child in self.children:
            leaves += child.leaves()
        return leaves

    def depth(self):
        """Labels on the longest way from the root to a word."""
        return 1 + max((child.depth() for child in self.children), default=0)

    def child(self, *labels):
        """The first child with one of these labels, or None."""
        return next((child for child in self.children if child.label in labels), None)


VERBS = ("VBZ", "VBP", "VBD", "VB", "VBN", "VBG", "MD")
COMMA = Tree(",", word=",")
PERIOD = Tree(".", word=".")
QUESTION = Tree(".", word="?")


def finite(clause):
    """The verb that carries tense and number."""
    vp = clause if clause.label == "VP" else clause.child("VP")
    while not vp.child(*VERBS):
        vp = vp.child("VP")
    return vp.child(*VERBS)


def innermost(clause):
    """The VP of the main verb, below its auxiliaries; and so the place of its object."""
    vp = clause.child("VP")
    while vp.child("VP"):
        vp = vp.child("VP")
    return vp


def head(np):
    """The noun of a noun phrase."""
    while np.child("NP"):
        np = np.child("NP")
    return np.child("NN", "NNS")


def number_of(np):
    return SINGULAR if head(np).label == "NN" else PLURAL


def top_of(sentence):
    """What stands right below the root, without punctuation; auxiliaries all under one name."""
    labels = []
    for child in sentence.children:
        if child.label not in ",.":
            labels.append("AUX" if child.label in VERBS else child.label)
    return " ".join(labels)


def words(tree):
    """The words and marks of a tree; its articles become a or an, as the next word wants it."""
    leaves = tree.leaves()
    for leaf, following in zip(leaves, leaves[1:]):
        if leaf.word in ("a", "an"):
            vowel = following.word[0] in "aeiou" and not following.word.startswith("use")
            leaf.word = "an" if vowel else "a"
    return [leaf.word for leaf in leaves]


def text(words):
    """A list of words and marks as a sentence."""
    sentence = " ".join(words)
    for mark in ",.?":
        sentence = sentence.replace(f" {mark}", mark)
    return sentence[0].upper() + sentence[1:]


# ---- grammar
# Every choice draws from one generator: the order of the draws is part of a seed's sentences.


class Grammar:
    """Random trees. rng: random.Random; words: {category: [lemma]}; depth: how deep clauses nest.

    A frame is what a verb takes: act (a thing), meet (an agent), go (nothing), say (a clause), be
    (an adjective).
    """

    def __init__(self, rng, words):
        self.rng = rng
        self.words = words
        self.recent = deque(maxlen=8)

    def chance(self, p):
        return self.rng.random() < p

    def one(self, of):
        """A member of a sequence; or a word of a category, if possible none of the last eight."""
        if not isinstance(of, str):
            return self.rng.choice(of)
        fresh = [word for word in self.words[of] if word not in self.recent]
        word = self.rng.choice(fresh or self.words[of])
        self.recent.append(word)
        return word

    def number(self):
        return self.one((SINGULAR, PLURAL))

    def adverb(self, of="manner"):
        category = "manner" if of == "manner" else ""
        return Tree("ADVP", Tree("RB", word=self.one(of), category=category))

    def adjective(self, category):
        category = "agent_adjective" if category == "agent" else "thing_adjective"
        return Tree("JJ", word=self.one(category), category=category)

    def noun(self, category, number, lemma):
        if number == SINGULAR:
            return Tree("NN", word=lemma, lemma=lemma, category=category)
        return Tree("NNS", word=plural(lemma), lemma=lemma, category=category)

    def np(self, category="agent", number=None, depth=0, det="", adjective=None, lemma=""):
        """A noun phrase: determiner, perhaps an adjective, noun; with depth, perhaps a
        prepositional phrase or a relative clause."""
        number = number or self.number()
        noun = self.noun(category, number, lemma or self.one(category))
        if adjective is None:
            adjective = self.chance(0.25)
        determiner = Tree("DT", word=det or self.one(DETERMINERS[number]))
        np = Tree("NP", determiner, adjective and self.adjective(category), noun)
        if depth and self.chance(0.5):
            if category != "place" and self.chance(0.4):
                return Tree("NP", np, self.relative(category, number, depth))
            return Tree("NP", np, self.attribute(category, depth))
        return np

    def attribute(self, category, depth=1, number=None):
        """A prepositional phrase: (author) of the file, (file) in the folder, (folder) of ..."""
        choices = [("in", "place"), ("from", "place"), ("of", "agent")]
        if category == "agent":
            choices = [("of", "thing"), ("near", "agent")]
        elif category == "place":
            choices = [("of", "agent")]
        preposition, of = self.one(choices)
        return Tree("PP", Tree("IN", word=preposition), self.np(of, number, depth - 1))

    def relative(self, category, number, depth=1, other=None):
        """A relative clause: (the user) who opened the file, (the file) that the user opened.
        other: the number of the noun inside it."""
        if category == "agent" and self.chance(0.5):
            who = self.one(("who", "that"))
            frame = self.one(("act", "act", "meet"))
            object = self.object(frame, depth - 1, other)
            clause = Tree("S", self.vp(number, frame=frame, object=object))
        else:
            who = "that"
            other = other or self.number()
            frame = "meet" if category == "agent" else "act"
            subject = self.np("agent", other, depth - 1)
            clause = Tree("S", subject, self.vp(other, frame=frame, object="gap", place=False))
        return Tree("SBAR", Tree("WHNP", Tree("WP", word=who)), clause)

    def place(self, depth=0):
        preposition = Tree("IN", word=self.one(("in", "inside", "outside")))
        return Tree("PP", preposition, self.np("place", depth=depth))

    def object(self, frame, depth=0, number=None):
        return self.np("agent" if frame == "meet" else "thing", number, depth)

    def vp(self, number, tense=None, frame="act", depth=0, aspect=None, **options):
        """A verb phrase with its auxiliaries. aspect: simple, progressive, perfect, negated or
        modal; options: of `complements`."""
        aspect = aspect or self.one(("simple",) * 5 + ("progressive", "perfect", "negated"))
        if frame == "say" and aspect != "negated":  # nobody is noting that
            aspect = "simple"
        now = PRESENT[number]
        if (tense or self.one(("past", "present"))) == "past":
            now = "VBD"
        negation = aspect == "negated" and Tree("RB", word="not")
        if frame == "be":
            verb = Tree(now, word=inflect("be", now, number), lemma="be")
            return Tree("VP", verb, negation, Tree("ADJP", self.adjective("thing")))
        modal = self.one(MODALS)
        auxiliary, tag = {
            "simple": ("", now),
            "progressive": ("be", "VBG"),
            "perfect": ("have", "VBN"),
            "negated": ("do", "VB"),
            "modal": (modal, "VB"),
        }[aspect]
        lemma = self.one(frame)
        verb = Tree(tag, word=inflect(lemma, tag, number), lemma=lemma, category=frame)
        before, after = self.complements(frame, depth, bool(auxiliary), **options)
        vp = Tree("VP", before, verb, *after)
        if not auxiliary:
            return vp
        tag = "MD" if aspect == "modal" else now
        verb = Tree(tag, word=inflect(auxiliary, tag, number), lemma=auxiliary)
        return Tree("VP", verb, negation, vp)

    def complements(self, frame, depth, has_auxiliary, object=None, adverb=True, place=True):
        """What stands before the verb, and the list of what stands after it. object: a noun phrase
        (None: some, "gap": none); adverb: may have one (or the word); place: may end with one."""
        if frame == "say":
            clause = self.clause(depth=max(depth - 1, 0))
            return None, [Tree("SBAR", Tree("IN", word="that"), clause)]
        if frame == "go" or object == "gap":
            object = None
        else:
            object = object or self.object(frame, depth)
        if place and frame != "meet" and self.chance(0.2):
            place = self.place(max(depth - 1, 0))
        else:
            place = None
        if isinstance(adverb, str):
            return self.adverb([adverb]), [object, place]
        if adverb and self.chance(0.25):
            adverb = self.adverb()
            return (adverb, [object, place]) if has_auxiliary else (None, [object, place, adverb])
        return None, [object, place]

    def clause(self, number=None, tense=None, frame=None, depth=0, subject=None, **options):
        """S: a subject and a verb phrase. options: of `vp`, and middle: surely, or surely not, an
        adverb before a verb without auxiliary."""
        middle = options.pop("middle", None)
        number = number or self.number()
        frames = ("act",) * 6 + ("meet", "meet", "go", "be") + ("say",) * bool(depth)
        frame = frame or self.one(frames)
        category = "agent"
        if frame == "be":
            category = "thing"
        elif frame == "act" and self.chance(0.2):
            category = "tool"
        if middle is None:
            undecided = not {"adverb", "aspect"} & set(options)
            middle = frame not in ("be", "say") and undecided and self.chance(0.12)
        if middle:
            options |= {"aspect": "simple", "adverb": False}
        subject = subject or self.np(category, number, depth)
        adverb = middle and self.adverb()
        return Tree("S", subject, adverb, self.vp(number, tense, frame, depth, **options))

    def sentence(self, **options):
        """A clause with its period."""
        return Tree("S", *self.clause(**options).children, PERIOD)

    def question(self, depth=0):
        """SQ without its mark: a clause whose auxiliary moved to the front."""
        frame = self.one(("act", "meet"))
        aspect = self.one(("progressive", "perfect", "negated", "modal"))
        clause = self.clause(frame=frame, aspect=aspect, depth=depth)
        vp = clause.child("VP")
        return Tree("SQ", vp.children[0], clause.child("NP"), vp.child("VP"))

    def construction(self, top, depth=0):
        """A sentence with these top constituents."""
        if top == "VP":
            frame = self.one(("act", "act", "meet"))
            vp = self.vp(PLURAL, frame=frame, aspect="modal", depth=depth)
            return Tree("S", vp.child("VP"), PERIOD)
        if top == "AUX NP VP":
            return Tree("SQ", *self.question(depth).children, QUESTION)
        if top == "WHADVP SQ":
            adverb = Tree("WRB", word=self.one(("when", "where", "why", "how")))
            return Tree("SBARQ", Tree("WHADVP", adverb), self.question(depth), QUESTION)
        if top == "S CC S":
            first = self.clause(depth=depth)
            conjunction = Tree("CC", word=self.one(("and", "but")))
            return Tree("S", first, conjunction, self.clause(depth=depth), PERIOD)
        if top == "NP ADVP VP":
            frame = self.one(("act", "act", "meet", "go"))
            return self.sentence(frame=frame, middle=True, depth=depth)
        sentence = self.sentence(middle=False, depth=depth)
        if top == "NP VP":
            return sentence
        if top == "PP NP VP":
            front = self.place(depth)
        elif top == "ADVP NP VP":
            front = self.adverb(SENTENCE_ADVERBS)
        else:  # SBAR NP VP
            subordinator = Tree("IN", word=self.one(SUBORDINATORS))
            front = Tree("SBAR", subordinator, self.clause(depth=max(depth - 1, 0)))
        return Tree("S", front, COMMA, *sentence.children)

    def any(self, depth=0):
        """A sentence of any construction."""
        return self.construction(self.one(TOPS), depth)


TOPS = "NP VP, NP ADVP VP, PP NP VP, ADVP NP VP, SBAR NP VP, S CC S, VP, AUX NP VP, WHADVP SQ"
TOPS = TOPS.split(", ")


# ---- minimal pairs
# A paradigm returns a grammatical tree, the word in it that goes wrong, and what that becomes.


def flip(leaf):
    """The other number (or case) of a word."""
    if leaf.label == "NN":
        return plural(leaf.lemma)
    if leaf.label == "NNS":
        return leaf.lemma
    return FLIP.get(leaf.word) or inflect(leaf.lemma, "VBP" if leaf.label == "VBZ" else "VBZ")


def agreeing(g, subject, number, **options):
    """The sentence that a subject begins, in the present tense; its finite verb goes wrong."""
    if head(subject).category == "thing":
        frame = "be"
    else:
        frame = g.one(("act", "act", "meet", "go"))
    tree = g.sentence(subject=subject, number=number, tense="present", frame=frame, **options)
    return tree, finite(tree), flip(finite(tree))


def subject_verb(g):
    number = g.number()
    return agreeing(g, g.np("agent", number), number, aspect="simple")


def subject_auxiliary(g):
    aspects = ["act progressive", "act perfect", "act negated", "meet progressive", "be simple"]
    frame, aspect = g.one(aspects).split()
    tense = "present" if aspect in ("perfect", "negated") else None  # had and did have no number
    tree = g.sentence(frame=frame, aspect=aspect, tense=tense)
    return tree, finite(tree), flip(finite(tree))


def pp_attractor(g):
    number = g.number()
    category = g.one(("agent", "thing"))
    noun = g.np(category, number)
    attractor = g.attribute(category, number=OTHER[number])
    return agreeing(g, Tree("NP", noun, attractor), number)


def relative_clause(g):
    number = g.number()
    category = g.one(("agent", "agent", "thing"))
    noun = g.np(category, number)
    attractor = g.relative(category, number, other=OTHER[number])
    return agreeing(g, Tree("NP", noun, attractor), number)


def coordinated_verbs(g):
    number = g.number()
    options = {"aspect": "simple", "adverb": False}
    first = g.vp(number, "present", g.one(("act", "meet")), **options)
    second = g.vp(number, "present", g.one(("act", "meet")), **options)
    both = Tree("VP", first, Tree("CC", word="and"), second)
    tree = Tree("S", g.np("agent", number), both, PERIOD)
    return tree, finite(second), flip(finite(second))


def coordinated_subjects(g):
    first = g.np("agent", SINGULAR)
    both = Tree("NP", first, Tree("CC", word="and"), g.np("agent", SINGULAR))
    return agreeing(g, both, PLURAL)


def determined(g, determiners, category="", **options):
    """A sentence whose object begins with one of determiners[number]; that word, and its noun."""
    number = g.number()
    category = category or g.one(("agent", "thing"))
    np = g.np(category, number, det=g.one(determiners[number]), **options)
    tree = g.sentence(frame="meet" if category == "agent" else "act", object=np)
    return tree, np.child("DT"), np.child("NN", "NNS")


def determiner_noun(g, **options):
    tree, _, noun = determined(g, DEMONSTRATIVES, **options)
    return tree, noun, flip(noun)


def determiner_noun_irregular(g):
    nouns = []
    for category in ("agent", "thing"):
        nouns += [(category, lemma) for lemma in g.words[category] if lemma in IRREGULAR_PLURALS]
    category, lemma = g.one(nouns)
    return determiner_noun(g, category=category, lemma=lemma)


def determiner(g):
    tree, word, _ = determined(g, DEMONSTRATIVES)
    return tree, word, flip(word)


def quantifier_noun(g):
    tree, _, noun = determined(g, QUANTIFIERS)
    return tree, noun, flip(noun)


def pronoun(word):
    return Tree("NP", Tree("PRP", word=word))


def reflexive_number(g):
    number = g.number()
    object = pronoun(ITSELF[number])
    subject = g.np("tool", number)
    tree = g.sentence(number=number, subject=subject, frame="act", object=object)
    return tree, object.children[0], flip(object.children[0])


def reflexive_person(g):
    persons = (("you", "yourself", "themselves"), ("they", "themselves", "yourself"))
    subject, right, wrong = g.one(persons)
    object = pronoun(right)
    tree = g.sentence(number=PLURAL, subject=pronoun(subject), frame="meet", object=object)
    return tree, object.children[0], wrong


def pronoun_case(g):
    if g.chance(0.5):
        moved = pronoun(g.one(("they", "we")))
        tree = g.sentence(number=PLURAL, subject=moved, frame=g.one(("act", "meet")))
    else:
        moved = pronoun(g.one(("them", "us")))
        tree = g.sentence(frame="meet", object=moved)
    return tree, moved.children[0], flip(moved.children[0])


def verb_form(g):
    frame = g.one(("act", "meet"))
    aspect = g.one(("progressive", "perfect", "negated", "modal"))
    tree = g.sentence(frame=frame, aspect=aspect)
    verb = innermost(tree).child(*VERBS)
    wrong = {"VBG": ("VB",), "VBN": ("VB", "VBG"), "VB": ("VBG", "VBN")}
    return tree, verb, inflect(verb.lemma, g.one(wrong[verb.label]))


def transitivity(g):
    tree = g.sentence(frame=g.one(("act", "meet")))
    verb = innermost(tree).child(*VERBS)
    return tree, verb, inflect(g.one("go"), verb.label)


def polarity_item(g):
    number = g.number()
    subject = g.np("agent", number, det="no")
    frame = g.one(("act", "meet"))
    tree = g.sentence(number=number, subject=subject, frame=frame, aspect="perfect", adverb="ever")
    wrong = {SINGULAR: ("the", "this", "every"), PLURAL: ("the", "these", "many")}
    return tree, subject.child("DT"), g.one(wrong[number])


@dataclass
class Paradigm:
    """Minimal pairs of one kind: one sentence and the same with a wrong word."""

    make: Callable  # Grammar → tree, word, wrong word
    term: str
    field: str = "morphology"
    local: bool = True  # wrong by what stands before the word (BLiMP's one_prefix_method)


SUBJECT_VERB = "subject_verb_agreement"
DETERMINER_NOUN = "determiner_noun_agreement"
with_adjective = partial(determiner_noun, adjective=True)
PARADIGMS = {
    "subject_verb_agreement": Paradigm(subject_verb, SUBJECT_VERB),
    "subject_verb_agreement_auxiliary": Paradigm(subject_auxiliary, SUBJECT_VERB),
    "subject_verb_agreement_pp_attractor": Paradigm(pp_attractor, SUBJECT_VERB),
    "subject_verb_agreement_relative_clause": Paradigm(relative_clause, SUBJECT_VERB),
    "subject_verb_agreement_coordinated_verbs": Paradigm(coordinated_verbs, SUBJECT_VERB),
    "subject_verb_agreement_coordinated_subjects": Paradigm(coordinated_subjects, SUBJECT_VERB),
    "determiner_noun_agreement": Paradigm(
        partial(determiner_noun, adjective=False), DETERMINER_NOUN
    ),
    "determiner_noun_agreement_adjective": Paradigm(with_adjective, DETERMINER_NOUN),
    "determiner_noun_agreement_irregular": Paradigm(determiner_noun_irregular, DETERMINER_NOUN),
    "determiner_noun_agreement_determiner": Paradigm(determiner, DETERMINER_NOUN, local=False),
    "quantifier_noun_agreement": Paradigm(quantifier_noun, "quantifiers", "semantics"),
    "reflexive_number_agreement": Paradigm(reflexive_number, "anaphor_agreement"),
    "reflexive_person_agreement": Paradigm(reflexive_person, "anaphor_agreement"),
    "pronoun_case": Paradigm(pronoun_case, "case", local=False),
    "auxiliary_verb_form": Paradigm(verb_form, "verb_form"),
    "transitive_verb": Paradigm(transitivity, "argument_structure", "syntax", local=False),
    "npi_ever": Paradigm(polarity_item, "npi_licensing", "semantics", local=False),
}


def minimal_pair(g, paradigm):
    """The words of a grammatical sentence, of the ungrammatical one, and where they differ."""
    tree, leaf, wrong = paradigm.make(g)
    good = words(tree)
    right = leaf.word
    leaf.word = wrong
    bad = words(tree)
    leaf.word = right
    return good, bad, tree.leaves().index(leaf)


def make_pairs(config):
    """{UID: [pair in BLiMP's layout]}, out of the whole lexicon."""
    pairs = {}
    for uid, paradigm in PARADIGMS.items():
        g = Grammar(random.Random(f"{config.seed} pairs {uid}"), lexicon(0, 1))
        drawn = {}
        for _ in range(100 * config.pairs):
            pair = minimal_pair(g, paradigm)
            drawn.setdefault(text(pair[0]), pair)
            if len(drawn) == config.pairs:
                break
        else:
            found = f"fewer than pairs={config.pairs} pairs of {uid}"
            raise InputError(f"the grammar has {found}: give a smaller pairs=")
        pairs[uid] = []
        for number, (good, bad, place) in enumerate(drawn.values()):
            pair = blimp_pair(good, bad, place, paradigm)
            pairs[uid].append(pair | {"pairID": str(number)})
    return pairs


def blimp_pair(good, bad, place, paradigm):
    """A minimal pair with the keys that BLiMP's files have."""
    pair = {"sentence_good": text(good), "sentence_bad": text(bad)}
    if paradigm.local:
        pair["one_prefix_prefix"] = text(good[:place])
        pair["one_prefix_word_good"] = good[place]
        pair["one_prefix_word_bad"] = bad[place]
    return pair | {
        "field": paradigm.field,
        "linguistics_term": paradigm.term,
        "one_prefix_method": paradigm.local,
    }


# ---- tasks
# Each draws a group: samples {label, text, template, ...} that must stay in one split, most often
# a single one. An empty group is drawn again. The docstring describes the task in meta.yaml.


def sample(label, sentence, template, **more):
    return {"label": label, "text": sentence, "template": template, **more}


def twins(sentences, template):
    """A sample of each of {label: words}."""
    return [sample(label, text(words), template) for label, words in sentences.items()]


def of_tree(label, tree):
    return [sample(label, text(words(tree)), top_of(tree), tree=str(tree))]


BINS = [(4, 6), (7, 8), (9, 10), (11, 13), (14, 17), (18, 24)]


def draw_length(g):
    """number of words; length is the label"""
    tree = g.any(g.rng.randrange(4))
    n_words = len(text(words(tree)).split())
    for low, high in BINS:
        if low <= n_words <= high:
            return of_tree(f"{low}-{high}", tree)
    return []


def draw_word_content(g):
    """which of 20 nouns the sentence has; these are the same in every split, the other words are
    not"""
    tree = g.any(g.rng.randrange(2))
    leaves = tree.leaves()
    nouns = [leaf for leaf in leaves if leaf.label == "NN" and leaf.category == "thing"]
    if not nouns:
        return []
    noun = g.one(nouns)
    noun.word = noun.lemma = g.one(TARGETS)
    return of_tree(noun.word, tree)


DEPTHS = ["6", "7", "8", "9"]


def draw_depth(g):
    """labels on the longest way from the root of the tree to a word"""
    tree = g.any(g.rng.randrange(3))
    depth = str(tree.depth())
    return of_tree(depth, tree) if depth in DEPTHS else []


def draw_top_constituents(g):
    """the constituents right below the root"""
    # most imperatives are shorter than all others: draw more of them, and two clauses of short ones
    top = g.one([*TOPS, "VP"])
    depth = g.one((1, 2, 3))
    depth = {"S CC S": 0, "SBAR NP VP": 0, "PP NP VP": 1}.get(top, depth)
    tree = g.construction(top, depth)
    return of_tree(top_of(tree), tree)


def simple(g, **options):
    """A declarative sentence, sometimes with something in front."""
    tree = g.sentence(depth=g.rng.randrange(3), **options)
    if not g.chance(0.3):
        return tree
    front = g.place() if g.one((True, False)) else g.adverb(SENTENCE_ADVERBS)
    return Tree("S", front, COMMA, *tree.children)


def draw_tense(g):
    """tense of the main clause"""
    tree = simple(g)
    return of_tree("past" if finite(tree).label == "VBD" else "present", tree)


def draw_subj_number(g):
    """number of the main clause's subject"""
    tree = simple(g)
    return of_tree(number_of(tree.child("NP")), tree)


def draw_obj_number(g):
    """number of the main clause's object"""
    tree = simple(g, frame=g.one(("act", "act", "meet")))
    return of_tree(number_of(innermost(tree).child("NP")), tree)


SHIFTS = ["DT NN", "DT JJ", "JJ NN", "NN IN", "IN DT", "VB DT", "NN VB"]  # never swapped in English


def draw_bigram_shift(g):
    """whether two adjacent words were swapped; each with its twin"""
    tree = simple(g)
    kinds = []
    for leaf in tree.leaves():
        kinds.append({"MD": "VB", "WP": "IN"}.get(leaf.label, leaf.label[:2]))
    original = words(tree)
    pairs = [" ".join(pair) for pair in zip(kinds, kinds[1:])]
    places = []
    for i, pair in enumerate(pairs):
        around = original[max(i - 1, 0) : i + 2]
        if pair in SHIFTS and not {"a", "an"} & set(around):  # an article's form would tell
            places.append(i)
    if not places:
        return []
    place = g.one(places)
    shifted = original.copy()
    shifted[place : place + 2] = original[place + 1], original[place]
    return twins({"original": original, "shifted": shifted}, pairs[place])


def draw_coord_inversion(g):
    """whether two coordinated clauses changed places; each with its twin"""
    # the second takes up the first by a pronoun, a definite noun, `then` or `also`
    cue = g.one(("they", "it", "then", "also", "definite"))
    tense = g.one(("past", "present"))
    number = g.number()
    object_number = g.number()
    if cue == "they":
        number = PLURAL
    if cue == "they" or g.chance(0.7):
        subject = g.np("agent", number)
    else:
        subject = pronoun(g.one(("you", "we", "they")))
        number = PLURAL
    determiner = ""
    if cue == "definite":
        determiner = {SINGULAR: "a", PLURAL: "some"}[object_number]
    thing = g.np("thing", object_number, det=determiner)
    first = g.clause(number, tense, "act", subject=subject, object=thing)
    second = second_clause(g, cue, tense, object_number, head(thing).lemma)
    conjunction = Tree("CC", word="and" if cue == "also" else g.one(("and", "but")))
    original = words(Tree("S", first, conjunction, second, PERIOD))
    inverted = words(Tree("S", second, conjunction, first, PERIOD))
    return twins({"original": original, "inverted": inverted}, cue)


def second_clause(g, cue, tense, object_number, lemma):
    """A clause with the cue that it is the second; lemma: of the first one's object."""
    if cue == "they":
        frame = g.one(("act", "meet", "go"))
        return g.clause(PLURAL, tense, frame, subject=pronoun("they"))
    if cue == "it":
        object = pronoun(IT[object_number])
        return g.clause(tense=tense, frame="act", object=object, place=False)
    if cue == "definite":
        object = g.np("thing", object_number, det="the", adjective=False, lemma=lemma)
        return g.clause(tense=tense, frame="act", object=object)
    if cue == "then":
        then = g.adverb(("then",))
        clause = g.clause(tense=tense, frame=g.one(("act", "meet")))
        return Tree("S", then, *clause.children)
    frame = g.one(("act", "meet"))
    clause = g.clause(tense=tense, frame=frame, aspect="simple", adverb=False)
    return Tree("S", clause.child("NP"), g.adverb(("also",)), clause.child("VP"))


def draw_odd_man_out(g):
    """whether the object is of a kind that the verb does not take; two sentences, and the two with
    their objects exchanged"""
    number = g.number()
    things = [noun for noun in g.words["thing"] if noun not in g.words["tool"]]
    lemmas = {"thing": g.one(things), "agent": g.one("human")}
    objects = []
    for category, lemma in lemmas.items():
        objects.append(g.np(category, number, det="the", adjective=False, lemma=lemma))
    about_thing = simple(g, frame="act", object=objects[0])
    about_agent = simple(g, frame="meet", object=objects[1])
    samples = [
        sample("original", text(words(about_thing)), "thing"),
        sample("original", text(words(about_agent)), "agent"),
    ]
    thing = head(objects[0])
    agent = head(objects[1])
    thing.word, agent.word = agent.word, thing.word
    samples.append(sample("odd", text(words(about_thing)), "thing"))
    samples.append(sample("odd", text(words(about_agent)), "agent"))
    return samples


SIGNED = {"thing_adjective": "adjective", "manner": "manner", "act": "act"}


def draw_polarity(g):
    """the sign of the adjectives, adverbs and verbs that have one"""
    # one or two words of one sign in a sentence of neutral ones
    frame = g.one(("act", "act", "be"))
    aspect = g.one(("simple", "simple", "progressive", "perfect"))
    tree = simple(g, frame=frame, aspect=aspect)
    sign = g.one(("good", "bad"))
    leaves = tree.leaves()
    if any(leaf.word == "not" for leaf in leaves):  # would turn the sign
        return []
    places = [leaf for leaf in leaves if leaf.category in SIGNED]
    n_signed = g.one((1, 1, 2))
    for leaf in g.rng.sample(places, min(len(places), n_signed)):
        leaf.category = f"{sign}_{SIGNED[leaf.category]}"
        leaf.lemma = g.one(leaf.category)
        leaf.word = inflect(leaf.lemma, leaf.label) if leaf.label in VERBS else leaf.lemma
    return of_tree("positive" if sign == "good" else "negative", tree)


def draw_grammaticality(g):
    """whether a sentence is English; each with its twin that differs in one word, whose kind
    `violation` names"""
    uid = g.one(list(PARADIGMS))
    good, bad, _ = minimal_pair(g, PARADIGMS[uid])
    return [
        sample("grammatical", text(good), uid, violation=""),
        sample("ungrammatical", text(bad), uid, violation=uid),
    ]


@dataclass
class Task:
    """Labelled sentences of one kind."""

    draw: Callable  # Grammar → group of samples
    labels: list
    members: int = 1  # samples in a group; several have as many of each label, of equal lengths
    by_length: bool = True


LENGTHS = [f"{low}-{high}" for low, high in BINS]
TASKS = {
    "grammaticality": Task(draw_grammaticality, ["ungrammatical", "grammatical"], members=2),
    "length": Task(draw_length, LENGTHS, by_length=False),
    "word_content": Task(draw_word_content, TARGETS),
    "depth": Task(draw_depth, DEPTHS),
    "top_constituents": Task(draw_top_constituents, TOPS),
    "tense": Task(draw_tense, ["past", "present"]),
    "subj_number": Task(draw_subj_number, [SINGULAR, PLURAL]),
    "obj_number": Task(draw_obj_number, [SINGULAR, PLURAL]),
    "bigram_shift": Task(draw_bigram_shift, ["original", "shifted"], members=2),
    "coord_inversion": Task(draw_coord_inversion, ["original", "inverted"], members=2),
    "odd_man_out": Task(draw_odd_man_out, ["original", "odd"], members=4),
    "polarity": Task(draw_polarity, ["negative", "positive"]),
}


def matched(task, g, n, seen):
    """Groups of about n samples: every label as often, and as often at every length; no text in
    `seen`, which grows. None when the grammar has no more to say."""
    labels = task.labels if task.members == 1 else [None]  # twins balance themselves
    wanted = n // (task.members * len(labels))
    cells = defaultdict(lambda: {label: [] for label in labels})  # length → label → groups
    for _ in range(300 * n):
        group = task.draw(g)
        texts = {sample["text"] for sample in group}
        if not group or len(texts) < len(group) or texts & seen:
            continue
        seen |= texts
        label = group[0]["label"] if task.members == 1 else None
        cell = cells[len(group[0]["text"].split()) if task.by_length else 0]
        if len(cell[label]) >= wanted:
            continue
        cell[label].append(group)
        if sum(map(smallest, cells.values())) == wanted:
            return balanced(cells)
    return None


def smallest(cell):
    """How many groups every label of a cell has."""
    return min(len(groups) for groups in cell.values())


def balanced(cells):
    """The groups of all cells, as many of every label in each, in the order of lengths."""
    chosen = []
    for length in sorted(cells):
        cell = cells[length]
        for groups in cell.values():
            chosen += groups[: smallest(cell)]
    return chosen


def make_task(name, config):
    """{frame, kind, labels, description} of one task, as `write_tasks` takes it."""
    task = TASKS[name]
    rows = []
    seen = set()
    n_groups = 0
    for split in ("train", "val", "test"):
        n = getattr(config, split)
        rng = random.Random(f"{config.seed} {name} {split}")
        drawn = matched(task, Grammar(rng, lexicon(1 if split == "test" else 0)), n, seen)
        if drawn is None:
            found = f"{n} different sentences for '{name}', {split}"
            raise InputError(f"the grammar does not yield {found}: give a smaller {split}=")
        rng.shuffle(drawn)
        for group in drawn:
            for member in rng.sample(group, len(group)):
                rows.append({"split": split, "group": n_groups, **member})
            n_groups += 1
    description = " ".join(task.draw.__doc__.split())
    about = {"kind": "classification", "labels": task.labels, "description": description}
    return {"frame": pd.DataFrame(rows), **about}


def main(config):
    folder = folder_of(config, __file__)
    options = options_of(config)
    grammar = file_hash(__file__)
    if already_made(folder, options, complete, config.overwrite, grammar=grammar):
        return
    tasks = {name: make_task(name, config) for name in TASKS}
    meta = write_tasks(
        folder,
        tasks,
        make_pairs(config),
        synthetic=True,
        source="written by rule by data/grammar/prepare.py",
        options=options,
        grammar=grammar,
    )
    n_sentences = sum(len(task["frame"]) for task in tasks.values())
    n_pairs = sum(entry["pairs"] for entry in meta["pairs"].values())
    print(
        f"{folder}: {len(tasks)} tasks of {n_sentences:,} sentences, {n_pairs:,} minimal pairs in "
        f"{len(meta['pairs'])} paradigms"
    )


if __name__ == "__main__":
    main(configure(Config))
