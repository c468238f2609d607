"""A small English grammar whose every sentence comes with its tree: agreement minimal pairs in the style of BLiMP (Warstadt et al. 2020),
grammatical and ungrammatical sentences, and the ten probing tasks of SentEval (Conneau et al. 2018) with polarity beside them.

    python data/grammar/prepare.py
    python data/grammar/prepare.py seed=1 out_dir=data/grammar1

Labels are read off the tree. Test sentences use content words that no training sentence has, and only the label
of `length` can be told from how long a sentence is.
"""
import hashlib, os, random, sys
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data.stimuli import complete, read_meta, write_tasks

EMBEDDED = True  # written by rule: scripts may start this on first use


@dataclass
class Config:
    out_dir: str = ""                # "": this folder
    seed: int = 0                    # another seed, other sentences
    train: int = 2000                # sentences of each task (rounded down to a multiple of its labels), out of one half of the lexicon
    val: int = 500                   # out of the same half
    test: int = 1000                 # out of the other half
    pairs: int = 500                 # minimal pairs of each paradigm, out of the whole lexicon
    overwrite: bool = False          # make it again although it is there

    def check(self):
        for key in ("train", "val", "test", "pairs"):
            if getattr(self, key) < 40:
                raise ValueError(f"{key}={getattr(self, key)} leaves labels without sentences: give 40 or more")


# ---- lexicon
# Every word occurs at least 20 times, in one form or another, in the training text of data/pydocs. Left of the bar: train and val; right: test.
# No string stands on both sides (nor in two parts of speech), and opposites (valid, invalid) stay on the same one.

LEXICON = {
    "agent": "user author operator parent caller agent observer expert speaker consumer child visitor |"
             "manager client worker artist member writer reader developer driver person editor listener",
    "thing": "file function value array object graph module index argument token column buffer message template package dataset script matrix"
             " criterion leaf |"
             "list tensor method string model path sequence dictionary variable table vector library program figure paper vertex axis hypothesis"
             " basis spectrum formula",
    "tool": "module function script package | model program library method",  # things that do something
    "human": "user author parent expert speaker child visitor | manager artist member writer developer person listener",  # agents, no software
    "place": "directory archive database browser container session | folder repository server environment registry workspace project",
    "act": "open write load print import edit merge store create parse close share insert attach encode |"          # agent → thing
           "save delete export download upload rename sort convert generate build extract modify append truncate display",
    "meet": "help warn advise instruct encourage | ask notify meet assist contact",                                 # agent → agent
    "go": "work wait agree sleep | arrive respond proceed listen",                                                  # agent, no object
    "say": "say note expect realize claim | report assume discover suggest think",                                  # agent → clause
    "thing_adjective": "large new local binary empty raw original random partial linear standard global temporary internal |"
                       "small old remote digital full hidden initial special external basic long short public private separate",
    "agent_adjective": "new local active anonymous typical | old remote quiet registered interested",
    "manner": "quickly automatically directly explicitly repeatedly manually eventually temporarily |"
              "immediately silently separately randomly locally frequently implicitly independently",
    # polarity: words with a sign, used in that task only
    "good_adjective": "valid useful correct safe efficient easy nice good clear helpful |"
                      "fast accurate stable robust strong perfect reliable flexible reasonable convenient",
    "bad_adjective": "invalid useless incorrect unsafe inefficient bad redundant ambiguous noisy wrong |"
                     "slow inaccurate unstable weak expensive malformed difficult tricky poor illegal",
    "good_manner": "correctly safely efficiently easily nicely | perfectly accurately properly successfully carefully",
    "bad_manner": "incorrectly accidentally | slowly arbitrarily",
    "good_act": "improve fix | restore simplify",
    "bad_act": "break lose | reject destroy",
}
TARGETS = ("image window tree header font button widget thread chart theorem kernel stream grid video loop surface paragraph recipe queue title"
           ).split()  # of word_content: by its nature the same words in every split
IRREGULAR_PLURALS = {"child": "children", "person": "people", "matrix": "matrices", "index": "indices", "vertex": "vertices", "axis": "axes",
                     "criterion": "criteria", "leaf": "leaves", "hypothesis": "hypotheses", "basis": "bases", "spectrum": "spectra",
                     "formula": "formulae"}
IRREGULAR_VERBS = {"write": ("wrote", "written"), "build": ("built", "built"), "meet": ("met", "met"), "sleep": ("slept", "slept"),
                   "say": ("said", "said"), "think": ("thought", "thought"), "break": ("broke", "broken"), "lose": ("lost", "lost")}
AUXILIARIES = {"have": ("has", "have", "had", "had", "having"), "do": ("does", "do", "did", "done", "doing")}  # VBZ VBP VBD VBN VBG
SINGULAR, PLURAL = "singular", "plural"
OTHER = {SINGULAR: PLURAL, PLURAL: SINGULAR}
DETERMINERS = {SINGULAR: "the the the the the the a a this that your our".split(), PLURAL: "the the the the the the some some these those your our".split()}
QUANTIFIERS = {SINGULAR: "every each another".split(), PLURAL: "many several all two three".split()}
MODALS = "can could will would should must may might".split()
SENTENCE_ADVERBS = "today sometimes often usually finally initially".split()
SUBORDINATORS = "because although since though".split()
FLIP = {"is": "are", "was": "were", "has": "have", "does": "do", "this": "these", "that": "those", "itself": "themselves",  # number
        "they": "them", "we": "us"}                                                                                         # case
FLIP |= {right: left for left, right in FLIP.items()}


def plural(noun):
    regular = noun + "es" if noun.endswith(("s", "x", "ch", "sh")) else noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"
    return IRREGULAR_PLURALS.get(noun, regular)


def inflect(verb, tag, number=SINGULAR):
    """The form of a verb under a Penn Treebank tag: VB open, VBZ opens, VBP open, VBD opened, VBN opened, VBG opening."""
    if verb == "be":
        past = "was" if number == SINGULAR else "were"
        return {"VB": "be", "VBZ": "is", "VBP": "are", "VBD": past, "VBN": "been", "VBG": "being"}[tag]
    if tag in ("VB", "MD"):
        return verb
    y = verb.endswith("y") and verb[-2] not in "aeiou"
    third = verb[:-1] + "ies" if y else verb + "es" if verb.endswith(("s", "x", "ch", "sh")) else verb + "s"
    past = verb[:-1] + "ied" if y else verb + "d" if verb.endswith("e") else verb + "ed"
    participle = verb[:-1] + "ing" if verb.endswith("e") and not verb.endswith("ee") else verb + "ing"
    forms = AUXILIARIES.get(verb) or (third, verb, *IRREGULAR_VERBS.get(verb, (past, past)), participle)
    return dict(zip(("VBZ", "VBP", "VBD", "VBN", "VBG"), forms))[tag]


def lexicon(*sides):
    """{category: words} of one side of the bar (0: train and val, 1: test), or of both."""
    return {category: [word for side in sides for word in words.split("|")[side].split()] for category, words in LEXICON.items()}


# ---- trees

class Tree:
    """A phrase with its children, or a word with its lemma; the label is a Penn Treebank tag. `category` is a content word's place in LEXICON."""

    def __init__(self, label, *children, word="", lemma="", category=""):
        self.label, self.children = label, [child for child in children if child]
        self.word, self.lemma, self.category = word, lemma or word, category

    def __str__(self):
        """(S (NP (DT the) (NN user)) ...)"""
        return f"({self.label} {self.word or ' '.join(map(str, self.children))})"

    def leaves(self):
        return [self] if self.word else [leaf for child in self.children for leaf in child.leaves()]

    def depth(self):
        """Labels on the longest way from the root to a word."""
        return 1 + max((child.depth() for child in self.children), default=0)

    def child(self, *labels):
        return next((child for child in self.children if child.label in labels), None)


VERBS = ("VBZ", "VBP", "VBD", "VB", "VBN", "VBG", "MD")
COMMA, PERIOD, QUESTION = (Tree(label, word=word) for label, word in ((",", ","), (".", "."), (".", "?")))


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
    return {"NN": SINGULAR, "NNS": PLURAL}[head(np).label]


def tense_of(clause):
    return {"VBD": "past", "VBZ": "present", "VBP": "present"}[finite(clause).label]


def top_of(sentence):
    """What stands right below the root, without punctuation; auxiliaries all under one name."""
    return " ".join("AUX" if child.label in VERBS else child.label for child in sentence.children if child.label not in ",.")


def words(tree):
    """The words and marks of a tree as a list; its articles become a or an, as the next word wants it."""
    leaves = tree.leaves()
    for leaf, following in zip(leaves, leaves[1:]):
        if leaf.word in ("a", "an"):
            leaf.word = "an" if following.word[0] in "aeiou" and not following.word.startswith("use") else "a"
    return [leaf.word for leaf in leaves]


def text(words):
    """A list of words and marks as a sentence."""
    sentence = " ".join(words)
    for mark in ",.?":
        sentence = sentence.replace(f" {mark}", mark)
    return sentence[0].upper() + sentence[1:]


# ---- grammar

class Grammar:
    """Random trees. rng: random.Random; words: {category: [lemma]}. A frame is what a verb takes: act (a thing), meet (an agent), go (nothing),
    say (a clause), be (an adjective). `depth` bounds how deep modifiers and clauses may nest."""

    def __init__(self, rng, words):
        self.rng, self.words, self.recent = rng, words, deque(maxlen=8)

    def chance(self, p):
        return self.rng.random() < p

    def one(self, of):
        """A member of a sequence, or a word of a category, if possible one that was not said just now."""
        if not isinstance(of, str):
            return self.rng.choice(of)
        self.recent.append(word := self.rng.choice([word for word in self.words[of] if word not in self.recent] or self.words[of]))
        return word

    def number(self):
        return self.one((SINGULAR, PLURAL))

    def adverb(self, of="manner"):
        return Tree("ADVP", Tree("RB", word=self.one(of), category="manner" if of == "manner" else ""))

    def adjective(self, category):
        category = "agent_adjective" if category == "agent" else "thing_adjective"
        return Tree("JJ", word=self.one(category), category=category)

    def np(self, category="agent", number=None, depth=0, det="", adjective=None, lemma=""):
        """A noun phrase: determiner, perhaps an adjective, noun, and with depth perhaps a prepositional phrase or a relative clause."""
        number, lemma = number or self.number(), lemma or self.one(category)
        noun = Tree("NN" if number == SINGULAR else "NNS", word=lemma if number == SINGULAR else plural(lemma), lemma=lemma, category=category)
        with_adjective = self.chance(0.25) if adjective is None else adjective
        np = Tree("NP", Tree("DT", word=det or self.one(DETERMINERS[number])), with_adjective and self.adjective(category), noun)
        if depth and self.chance(0.5):
            np = Tree("NP", np, self.relative(category, number, depth) if category != "place" and self.chance(0.4) else self.attribute(category, depth))
        return np

    def attribute(self, category, depth=1, number=None):
        """A prepositional phrase beside a noun: (the author) of the file, (the file) in the folder, (the folder) of the user."""
        choices = {"agent": [("of", "thing"), ("near", "agent")], "place": [("of", "agent")]}
        preposition, of = self.one(choices.get(category, [("in", "place"), ("from", "place"), ("of", "agent")]))
        return Tree("PP", Tree("IN", word=preposition), self.np(of, number, depth - 1))

    def relative(self, category, number, depth=1, other=None):
        """A relative clause beside a noun of this category and number: (the user) who opened the file, (the file) that the user opened.
        other: the number of the noun inside it."""
        if category == "agent" and self.chance(0.5):
            who, frame = self.one(("who", "that")), self.one(("act", "act", "meet"))
            inside = [self.vp(number, frame=frame, object=self.object(frame, depth - 1, other))]
        else:
            who, other, frame = "that", other or self.number(), "meet" if category == "agent" else "act"
            inside = [self.np("agent", other, depth - 1), self.vp(other, frame=frame, object="gap", place=False)]
        return Tree("SBAR", Tree("WHNP", Tree("WP", word=who)), Tree("S", *inside))

    def place(self, depth=0):
        return Tree("PP", Tree("IN", word=self.one(("in", "inside", "outside"))), self.np("place", depth=depth))

    def object(self, frame, depth=0, number=None):
        return self.np("agent" if frame == "meet" else "thing", number, depth)

    def vp(self, number, tense=None, frame="act", depth=0, aspect=None, object=None, adverb=True, place=True):
        """A verb phrase with its auxiliaries around it. aspect: simple, progressive, perfect, negated or modal; object: a noun phrase to take
        (None: some, "gap": none); adverb: may have one (or the word for it); place: may end with one."""
        aspect = aspect or self.one(("simple",) * 5 + ("progressive", "perfect", "negated"))
        if frame == "say" and aspect != "negated":  # nobody is noting that
            aspect = "simple"
        now = "VBD" if (tense or self.one(("past", "present"))) == "past" else "VBZ" if number == SINGULAR else "VBP"
        negation = aspect == "negated" and Tree("RB", word="not")
        if frame == "be":
            return Tree("VP", Tree(now, word=inflect("be", now, number), lemma="be"), negation, Tree("ADJP", self.adjective("thing")))
        auxiliary, tag = {"simple": (None, now), "progressive": ("be", "VBG"), "perfect": ("have", "VBN"), "negated": ("do", "VB"),
                          "modal": (self.one(MODALS), "VB")}[aspect]
        lemma, before = self.one(frame), None
        if frame == "say":
            after = [Tree("SBAR", Tree("IN", word="that"), self.clause(depth=max(depth - 1, 0)))]
        else:
            after = [None if frame == "go" or object == "gap" else object or self.object(frame, depth),
                     place and frame != "meet" and self.chance(0.2) and self.place(max(depth - 1, 0))]
            if isinstance(adverb, str):
                before = self.adverb([adverb])
            elif adverb and self.chance(0.25):
                before, after = (self.adverb(), after) if auxiliary else (None, [*after, self.adverb()])
        vp = Tree("VP", before, Tree(tag, word=inflect(lemma, tag, number), lemma=lemma, category=frame), *after)
        if auxiliary:
            tag = "MD" if aspect == "modal" else now
            vp = Tree("VP", Tree(tag, word=inflect(auxiliary, tag, number), lemma=auxiliary), negation, vp)
        return vp

    def clause(self, number=None, tense=None, frame=None, depth=0, subject=None, middle=None, **options):
        """S: a subject, perhaps (middle: surely, or surely not) an adverb before a verb without auxiliary, and a verb phrase."""
        number = number or self.number()
        frame = frame or self.one(("act",) * 6 + ("meet", "meet", "go", "be") + ("say",) * bool(depth))
        category = "thing" if frame == "be" else "tool" if frame == "act" and self.chance(0.2) else "agent"
        if middle is None:
            middle = frame not in ("be", "say") and options.keys().isdisjoint(("adverb", "aspect")) and self.chance(0.12)
        if middle:
            options |= {"aspect": "simple", "adverb": False}
        return Tree("S", subject or self.np(category, number, depth), middle and self.adverb(), self.vp(number, tense, frame, depth, **options))

    def sentence(self, **options):
        """A clause with its period."""
        return Tree("S", *self.clause(**options).children, PERIOD)

    def question(self, depth=0):
        """SQ without its mark: a clause whose auxiliary moved to the front."""
        s = self.clause(frame=self.one(("act", "meet")), aspect=self.one(("progressive", "perfect", "negated", "modal")), depth=depth)
        return Tree("SQ", s.child("VP").children[0], s.child("NP"), s.child("VP").child("VP"))

    def construction(self, top, depth=0):
        """A sentence with these top constituents."""
        if top == "VP":
            return Tree("S", self.vp(PLURAL, frame=self.one(("act", "act", "meet")), aspect="modal", depth=depth).child("VP"), PERIOD)
        if top == "AUX NP VP":
            return Tree("SQ", *self.question(depth).children, QUESTION)
        if top == "WHADVP SQ":
            return Tree("SBARQ", Tree("WHADVP", Tree("WRB", word=self.one(("when", "where", "why", "how")))), self.question(depth), QUESTION)
        if top == "S CC S":
            return Tree("S", self.clause(depth=depth), Tree("CC", word=self.one(("and", "but"))), self.clause(depth=depth), PERIOD)
        if top == "NP ADVP VP":
            return self.sentence(frame=self.one(("act", "act", "meet", "go")), middle=True, depth=depth)
        s = self.sentence(middle=False, depth=depth)
        if top == "NP VP":
            return s
        front = {"PP NP VP": lambda: self.place(depth), "ADVP NP VP": lambda: self.adverb(SENTENCE_ADVERBS),
                 "SBAR NP VP": lambda: Tree("SBAR", Tree("IN", word=self.one(SUBORDINATORS)), self.clause(depth=max(depth - 1, 0)))}[top]()
        return Tree("S", front, COMMA, *s.children)

    def any(self, depth=0):
        """A sentence of any construction."""
        return self.construction(self.one(TOPS), depth)


TOPS = ["NP VP", "NP ADVP VP", "PP NP VP", "ADVP NP VP", "SBAR NP VP", "S CC S", "VP", "AUX NP VP", "WHADVP SQ"]


# ---- minimal pairs
# A paradigm returns a grammatical tree, the word in it that goes wrong, and what that becomes.

def flip(leaf):
    """The other number (or case) of a word."""
    if leaf.label in ("NN", "NNS"):
        return plural(leaf.lemma) if leaf.label == "NN" else leaf.lemma
    return FLIP.get(leaf.word) or inflect(leaf.lemma, "VBP" if leaf.label == "VBZ" else "VBZ")


def agreeing(g, subject, number, **options):
    """The sentence that a subject begins, in the present tense; its finite verb goes wrong."""
    frame = "be" if head(subject).category == "thing" else g.one(("act", "act", "meet", "go"))
    s = g.sentence(subject=subject, number=number, tense="present", frame=frame, **options)
    return s, finite(s), flip(finite(s))


def subject_verb(g):
    number = g.number()
    return agreeing(g, g.np("agent", number), number, aspect="simple")


def subject_auxiliary(g):
    frame, aspect = g.one((("act", "progressive"), ("act", "perfect"), ("act", "negated"), ("meet", "progressive"), ("be", "simple")))
    s = g.sentence(frame=frame, aspect=aspect, tense="present" if aspect in ("perfect", "negated") else None)  # had and did have no number
    return s, finite(s), flip(finite(s))


def pp_attractor(g):
    number, category = g.number(), g.one(("agent", "thing"))
    return agreeing(g, Tree("NP", g.np(category, number), g.attribute(category, number=OTHER[number])), number)


def relative_clause(g):
    number, category = g.number(), g.one(("agent", "agent", "thing"))
    return agreeing(g, Tree("NP", g.np(category, number), g.relative(category, number, other=OTHER[number])), number)


def coordinated_verbs(g):
    number = g.number()
    first, second = (g.vp(number, "present", g.one(("act", "meet")), aspect="simple", adverb=False) for _ in range(2))
    s = Tree("S", g.np("agent", number), Tree("VP", first, Tree("CC", word="and"), second), PERIOD)
    return s, finite(second), flip(finite(second))


def coordinated_subjects(g):
    return agreeing(g, Tree("NP", g.np("agent", SINGULAR), Tree("CC", word="and"), g.np("agent", SINGULAR)), PLURAL)


def determined(g, determiners, category="", **options):
    """A sentence whose object begins with one of determiners[number], with that determiner and its noun."""
    number, category = g.number(), category or g.one(("agent", "thing"))
    np = g.np(category, number, det=g.one(determiners[number]), **options)
    return g.sentence(frame="meet" if category == "agent" else "act", object=np), np.child("DT"), np.child("NN", "NNS")


def determiner_noun(g, **options):
    s, _, noun = determined(g, {SINGULAR: ("this", "that"), PLURAL: ("these", "those")}, **options)
    return s, noun, flip(noun)


def determiner_noun_irregular(g):
    category, lemma = g.one([(category, lemma) for category in ("agent", "thing") for lemma in g.words[category] if lemma in IRREGULAR_PLURALS])
    return determiner_noun(g, category=category, lemma=lemma)


def determiner(g):
    s, determiner, _ = determined(g, {SINGULAR: ("this", "that"), PLURAL: ("these", "those")})
    return s, determiner, flip(determiner)


def quantifier_noun(g):
    s, _, noun = determined(g, QUANTIFIERS)
    return s, noun, flip(noun)


def pronoun(word):
    return Tree("NP", Tree("PRP", word=word))


def reflexive_number(g):
    number = g.number()
    itself = pronoun("itself" if number == SINGULAR else "themselves")
    return g.sentence(number=number, subject=g.np("tool", number), frame="act", object=itself), itself.children[0], flip(itself.children[0])


def reflexive_person(g):
    subject, right, wrong = g.one((("you", "yourself", "themselves"), ("they", "themselves", "yourself")))
    object = pronoun(right)
    return g.sentence(number=PLURAL, subject=pronoun(subject), frame="meet", object=object), object.children[0], wrong


def pronoun_case(g):
    if g.chance(0.5):
        moved = pronoun(g.one(("they", "we")))
        s = g.sentence(number=PLURAL, subject=moved, frame=g.one(("act", "meet")))
    else:
        moved = pronoun(g.one(("them", "us")))
        s = g.sentence(frame="meet", object=moved)
    return s, moved.children[0], flip(moved.children[0])


def verb_form(g):
    s = g.sentence(frame=g.one(("act", "meet")), aspect=g.one(("progressive", "perfect", "negated", "modal")))
    verb = innermost(s).child(*VERBS)
    return s, verb, inflect(verb.lemma, g.one({"VBG": ("VB",), "VBN": ("VB", "VBG"), "VB": ("VBG", "VBN")}[verb.label]))


def transitivity(g):
    s = g.sentence(frame=g.one(("act", "meet")))
    verb = innermost(s).child(*VERBS)
    return s, verb, inflect(g.one("go"), verb.label)


def polarity_item(g):
    number = g.number()
    subject = g.np("agent", number, det="no")
    s = g.sentence(number=number, subject=subject, frame=g.one(("act", "meet")), aspect="perfect", adverb="ever")
    return s, subject.child("DT"), g.one(("the", "this", "every") if number == SINGULAR else ("the", "these", "many"))


@dataclass
class Paradigm:
    """Minimal pairs of one kind: one sentence and the same with a wrong word."""
    make: Callable          # Grammar → tree, word, wrong word
    field: str
    term: str
    local: bool = True      # whether the wrong word is wrong by what stands before it (BLiMP's one_prefix_method)
    same_word: bool = True  # whether right and wrong are forms of one word (BLiMP's lexically_identical)


PARADIGMS = {
    "subject_verb_agreement": Paradigm(subject_verb, "morphology", "subject_verb_agreement"),
    "subject_verb_agreement_auxiliary": Paradigm(subject_auxiliary, "morphology", "subject_verb_agreement"),
    "subject_verb_agreement_pp_attractor": Paradigm(pp_attractor, "morphology", "subject_verb_agreement"),
    "subject_verb_agreement_relative_clause": Paradigm(relative_clause, "morphology", "subject_verb_agreement"),
    "subject_verb_agreement_coordinated_verbs": Paradigm(coordinated_verbs, "morphology", "subject_verb_agreement"),
    "subject_verb_agreement_coordinated_subjects": Paradigm(coordinated_subjects, "morphology", "subject_verb_agreement"),
    "determiner_noun_agreement": Paradigm(lambda g: determiner_noun(g, adjective=False), "morphology", "determiner_noun_agreement"),
    "determiner_noun_agreement_adjective": Paradigm(lambda g: determiner_noun(g, adjective=True), "morphology", "determiner_noun_agreement"),
    "determiner_noun_agreement_irregular": Paradigm(determiner_noun_irregular, "morphology", "determiner_noun_agreement"),
    "determiner_noun_agreement_determiner": Paradigm(determiner, "morphology", "determiner_noun_agreement", local=False),
    "quantifier_noun_agreement": Paradigm(quantifier_noun, "semantics", "quantifiers"),
    "reflexive_number_agreement": Paradigm(reflexive_number, "morphology", "anaphor_agreement"),
    "reflexive_person_agreement": Paradigm(reflexive_person, "morphology", "anaphor_agreement", same_word=False),
    "pronoun_case": Paradigm(pronoun_case, "morphology", "case", local=False),
    "auxiliary_verb_form": Paradigm(verb_form, "morphology", "verb_form"),
    "transitive_verb": Paradigm(transitivity, "syntax", "argument_structure", local=False, same_word=False),
    "npi_ever": Paradigm(polarity_item, "semantics", "npi_licensing", local=False, same_word=False),
}


def minimal_pair(g, paradigm):
    """The words of a grammatical sentence, of the ungrammatical one, and the place where they differ."""
    tree, leaf, wrong = paradigm.make(g)
    good, right = words(tree), leaf.word
    leaf.word = wrong
    bad = words(tree)
    leaf.word = right
    return good, bad, tree.leaves().index(leaf)


def make_pairs(config):
    """{UID: [pair in BLiMP's layout]}, out of the whole lexicon."""
    pairs = {}
    for uid, paradigm in PARADIGMS.items():
        g, found = Grammar(random.Random(f"{config.seed} pairs {uid}"), lexicon(0, 1)), {}
        for _ in range(100 * config.pairs):
            good, bad, at = minimal_pair(g, paradigm)
            found.setdefault(text(good), (good, bad, at))
            if len(found) == config.pairs:
                break
        else:
            raise ValueError(f"the grammar has fewer than pairs={config.pairs} pairs of {uid}: give a smaller pairs=")
        pairs[uid] = []
        for number, (good, bad, at) in enumerate(found.values()):
            prefix = {"one_prefix_prefix": text(good[:at]), "one_prefix_word_good": good[at], "one_prefix_word_bad": bad[at]} if paradigm.local else {}
            pairs[uid].append({"sentence_good": text(good), "sentence_bad": text(bad), **prefix, "field": paradigm.field,
                               "linguistics_term": paradigm.term, "UID": uid, "simple_LM_method": True, "one_prefix_method": paradigm.local,
                               "two_prefix_method": False, "lexically_identical": paradigm.same_word, "pairID": str(number)})
    return pairs


# ---- tasks
# Each draws a group: the samples {label, text, template, ...} that must stay in one split, most often a single one.

def sample(label, sentence, template, **more):
    return {"label": label, "text": sentence, "template": template, **more}


def of_tree(label, tree):
    return [sample(label, text(words(tree)), top_of(tree), tree=str(tree))]


BINS = [(4, 6), (7, 8), (9, 10), (11, 13), (14, 17), (18, 24)]


def draw_length(g):
    tree = g.any(g.rng.randrange(4))
    n = len(text(words(tree)).split())
    return [group for low, high in BINS if low <= n <= high for group in of_tree(f"{low}-{high}", tree)]


def draw_word_content(g):
    tree = g.any(g.rng.randrange(2))
    nouns = [leaf for leaf in tree.leaves() if leaf.label == "NN" and leaf.category == "thing"]
    if not nouns:
        return []
    noun = g.one(nouns)
    noun.word = noun.lemma = g.one(TARGETS)
    return of_tree(noun.word, tree)


DEPTHS = ["6", "7", "8", "9"]


def draw_depth(g):
    tree = g.any(g.rng.randrange(3))
    return of_tree(str(tree.depth()), tree) if str(tree.depth()) in DEPTHS else []


def draw_top_constituents(g):
    top = g.one(TOPS + ["VP"])  # most imperatives are shorter than all others: draw more of them, and make two clauses of short ones
    tree = g.construction(top, {"S CC S": 0, "SBAR NP VP": 0, "PP NP VP": 1}.get(top, g.one((1, 2, 3))))
    return of_tree(top_of(tree), tree)


def simple(g, **options):
    """A declarative sentence, sometimes with something in front."""
    tree = g.sentence(depth=g.rng.randrange(3), **options)
    front = g.chance(0.3) and g.one((g.place, lambda: g.adverb(SENTENCE_ADVERBS)))()
    return Tree("S", front, COMMA, *tree.children) if front else tree


def draw_tense(g):
    tree = simple(g)
    return of_tree(tense_of(tree), tree)


def draw_subj_number(g):
    tree = simple(g)
    return of_tree(number_of(tree.child("NP")), tree)


def draw_obj_number(g):
    tree = simple(g, frame=g.one(("act", "act", "meet")))
    return of_tree(number_of(innermost(tree).child("NP")), tree)


SHIFTS = {("DT", "NN"), ("DT", "JJ"), ("JJ", "NN"), ("NN", "IN"), ("IN", "DT"), ("VB", "DT"), ("NN", "VB")}  # never again a sentence


def draw_bigram_shift(g):
    tree = simple(g)
    kinds = [{"MD": "VB", "WP": "IN"}.get(leaf.label, leaf.label[:2]) for leaf in tree.leaves()]
    original = words(tree)
    places = [i for i, pair in enumerate(zip(kinds, kinds[1:])) if pair in SHIFTS and not {"a", "an"} & set(original[max(i - 1, 0):i + 2])]
    if not places:  # a file, an index: the article's form would give the shift away
        return []
    at = g.one(places)
    shifted = original[:at] + [original[at + 1], original[at]] + original[at + 2:]
    return [sample("original", text(original), kinds[at] + " " + kinds[at + 1]), sample("shifted", text(shifted), kinds[at] + " " + kinds[at + 1])]


def draw_coord_inversion(g):
    """Two clauses whose order shows: the second takes up the first by a pronoun, a definite noun, `then` or `also`."""
    cue, tense, number, object_number = g.one(("they", "it", "then", "also", "definite")), g.one(("past", "present")), g.number(), g.number()
    number = PLURAL if cue == "they" else number
    subject = g.np("agent", number) if cue == "they" or g.chance(0.7) else pronoun(g.one(("you", "we", "they")))
    number = number if subject.child("DT") else PLURAL
    thing = g.np("thing", object_number, det=("a" if object_number == SINGULAR else "some") if cue == "definite" else "")
    first = g.clause(number, tense, "act", subject=subject, object=thing)
    if cue == "they":
        second = g.clause(PLURAL, tense, g.one(("act", "meet", "go")), subject=pronoun("they"))
    elif cue == "it":
        second = g.clause(tense=tense, frame="act", object=pronoun("it" if object_number == SINGULAR else "them"), place=False)
    elif cue == "definite":
        second = g.clause(tense=tense, frame="act", object=g.np("thing", object_number, det="the", adjective=False, lemma=head(thing).lemma))
    elif cue == "then":
        second = Tree("S", g.adverb(("then",)), *g.clause(tense=tense, frame=g.one(("act", "meet"))).children)
    else:
        second = g.clause(tense=tense, frame=g.one(("act", "meet")), aspect="simple", adverb=False)
        second = Tree("S", second.child("NP"), g.adverb(("also",)), second.child("VP"))
    conjunction = Tree("CC", word=g.one(("and", "but")) if cue != "also" else "and")
    orders = {"original": (first, conjunction, second), "inverted": (second, conjunction, first)}
    return [sample(label, text(words(Tree("S", *order, PERIOD))), cue) for label, order in orders.items()]


def draw_odd_man_out(g):
    """Two sentences, one about a thing and one about an agent, and the same two with these nouns exchanged."""
    number, things = g.number(), [noun for noun in g.words["thing"] if noun not in g.words["tool"]]
    objects = [g.np(category, number, det="the", adjective=False, lemma=lemma) for category, lemma in (("thing", g.one(things)), ("agent", g.one("human")))]
    trees = [simple(g, frame=frame, object=object) for frame, object in zip(("act", "meet"), objects)]
    nouns = [head(innermost(tree).child("NP")) for tree in trees]
    samples = [sample("original", text(words(tree)), noun.category) for tree, noun in zip(trees, nouns)]
    nouns[0].word, nouns[1].word = nouns[1].word, nouns[0].word
    return samples + [sample("odd", text(words(tree)), noun.category) for tree, noun in zip(trees, nouns)]


def draw_polarity(g):
    """One or two words of one sign in a sentence of neutral ones."""
    tree = simple(g, frame=g.one(("act", "act", "be")), aspect=g.one(("simple", "simple", "progressive", "perfect")))
    sign = g.one(("good", "bad"))
    slots = {"thing_adjective": "adjective", "manner": "manner", "act": "act"}
    if any(leaf.word == "not" for leaf in tree.leaves()):  # would turn the sign
        return []
    leaves = [leaf for leaf in tree.leaves() if leaf.category in slots]
    for leaf in g.rng.sample(leaves, min(len(leaves), g.one((1, 1, 2)))):
        leaf.category = f"{sign}_{slots[leaf.category]}"
        leaf.lemma = g.one(leaf.category)
        leaf.word = inflect(leaf.lemma, leaf.label) if leaf.label in VERBS else leaf.lemma
    signs = {leaf.category.split("_")[0] for leaf in tree.leaves() if leaf.category.startswith(("good_", "bad_"))}
    return of_tree({"good": "positive", "bad": "negative"}[signs.pop()], tree)


def draw_grammaticality(g):
    uid = g.one(list(PARADIGMS))
    good, bad, _ = minimal_pair(g, PARADIGMS[uid])
    return [sample("grammatical", text(good), uid, violation=""), sample("ungrammatical", text(bad), uid, violation=uid)]


@dataclass
class Task:
    """Labelled sentences of one kind."""
    draw: Callable        # Grammar → group of samples
    labels: list
    description: str
    members: int = 1      # samples in a group; where there are several, each label has as many of the same lengths
    by_length: bool = True


TASKS = {
    "grammaticality": Task(draw_grammaticality, ["ungrammatical", "grammatical"], "whether a sentence is English; each with its twin that differs "
                           "in one word, whose kind `violation` names", members=2),
    "length": Task(draw_length, [f"{low}-{high}" for low, high in BINS], "number of words; length is the label", by_length=False),
    "word_content": Task(draw_word_content, TARGETS, "which of 20 nouns the sentence has; these are the same in every split, the other words are not"),
    "depth": Task(draw_depth, DEPTHS, "labels on the longest way from the root of the tree to a word"),
    "top_constituents": Task(draw_top_constituents, TOPS, "the constituents right below the root"),
    "tense": Task(draw_tense, ["past", "present"], "tense of the main clause"),
    "subj_number": Task(draw_subj_number, [SINGULAR, PLURAL], "number of the main clause's subject"),
    "obj_number": Task(draw_obj_number, [SINGULAR, PLURAL], "number of the main clause's object"),
    "bigram_shift": Task(draw_bigram_shift, ["original", "shifted"], "whether two adjacent words were swapped; each with its twin", members=2),
    "coord_inversion": Task(draw_coord_inversion, ["original", "inverted"], "whether two coordinated clauses changed places; each with its twin", members=2),
    "odd_man_out": Task(draw_odd_man_out, ["original", "odd"], "whether the object is of a kind that the verb does not take; two sentences, and the "
                        "two with their objects exchanged", members=4),
    "polarity": Task(draw_polarity, ["negative", "positive"], "the sign of the adjectives, adverbs and verbs that have one"),
}


def matched(task, g, n, seen):
    """Groups of about n samples, none of a text in `seen` (which grows): every label as often, and as often at every length. None when the
    grammar has no more to say."""
    kinds = task.labels if task.members == 1 else [None]
    wanted, found = n // (task.members * len(kinds)), 0
    cells = defaultdict(lambda: {kind: [] for kind in kinds})  # length → kind → groups
    for _ in range(300 * n):
        group = task.draw(g)
        texts = {s["text"] for s in group}
        if not group or len(texts) < len(group) or texts & seen:
            continue
        seen |= texts
        kind = group[0]["label"] if task.members == 1 else None
        cell = cells[len(group[0]["text"].split()) if task.by_length else 0]
        if len(cell[kind]) >= wanted:
            continue
        full = min(map(len, cell.values()))
        cell[kind].append(group)
        found += min(map(len, cell.values())) - full
        if found == wanted:
            return [group for _, cell in sorted(cells.items()) for groups in cell.values() for group in groups[:min(map(len, cell.values()))]]
    return None


def make_task(name, config):
    """{frame, kind, labels, description} of one task, as `write_tasks` takes it."""
    task, rows, seen, groups = TASKS[name], [], set(), 0
    for split in ("train", "val", "test"):
        g = Grammar(random.Random(f"{config.seed} {name} {split}"), lexicon(1 if split == "test" else 0))
        drawn = matched(task, g, getattr(config, split), seen)
        if drawn is None:
            raise ValueError(f"the grammar does not yield {getattr(config, split)} different sentences for '{name}', {split}: give a smaller {split}=")
        g.rng.shuffle(drawn)
        for group in drawn:
            rows += [{"split": split, "group": groups} | s for s in g.rng.sample(group, len(group))]
            groups += 1
    return {"frame": pd.DataFrame(rows), "kind": "classification", "labels": task.labels, "description": task.description}


# ---- main

def settings(config):
    """What makes a difference to the dataset: the options, and the grammar, which is this file."""
    options = {key: value for key, value in asdict(config).items() if key not in ("out_dir", "overwrite")}
    return {"options": options, "grammar": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}


def main(config):
    folder = Path(config.out_dir) if config.out_dir else Path(os.path.relpath(Path(__file__).resolve().parent))
    wanted = settings(config)
    if not config.overwrite and complete(folder):
        meta = read_meta(folder)
        if meta.get("options") != wanted["options"]:
            raise ValueError(f"{folder} was made with {meta.get('options')}: give overwrite=True to make it again, or another out_dir")
        if meta.get("grammar") == wanted["grammar"]:
            print(f"{folder} is there already (overwrite=True makes it again)")
            return
        print(f"{folder} is of another version of the grammar: making it again")
    meta = write_tasks(folder, {name: make_task(name, config) for name in TASKS}, make_pairs(config), synthetic=True,
                       source="written by rule by data/grammar/prepare.py", **wanted)
    sentences = sum(sum(entry["sizes"].values()) for entry in meta["tasks"].values())
    print(f"{folder}: {len(meta['tasks'])} tasks of {sentences:,} sentences, {sum(entry['pairs'] for entry in meta['pairs'].values()):,} minimal "
          f"pairs in {len(meta['pairs'])} paradigms")


if __name__ == "__main__":
    main(configure(Config))
