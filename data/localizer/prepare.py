"""Make stimuli for finding language-selective units.

    python data/localizer/prepare.py

Sentences, word lists, jabberwocky and non-words after the design of Fedorenko et al. 2010, and
concrete and abstract nouns and verbs after the design of Moseley & Pulvermüller 2014.
"""

import collections
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError, already_made, embedded, folder_of, write_aside, write_yaml
from data.stimuli import read_task

EMBEDDED = True  # made from data/grammar, offline: scripts may start this on first use
FORMAT = "localizer-1"

LISTS = {
    "concrete noun": "table window door wall floor house room car wheel road bridge river stone "
    "tree leaf garden bird dog cat horse fish hand foot eye arm face book page paper pen box bag "
    "bottle cup knife clock lamp chair screen button",
    "abstract noun": "idea reason truth belief hope fear doubt choice chance cause effect rule law "
    "right duty freedom power value cost risk theory concept notion meaning sense purpose intent "
    "skill habit custom trust pride honor faith mood spirit style trend status mercy",
    "concrete verb": "run walk jump climb swim throw catch kick push pull lift carry drop hit cut "
    "break tear fold wash clean cook eat drink bite chew grab hold shake wave point press draw "
    "paint write dig plant pour spill kneel crawl",
    "abstract verb": "think know believe doubt hope fear trust agree deny claim argue infer assume "
    "suppose imagine remember forget learn understand decide choose prefer want need intend plan "
    "expect predict explain describe define compare consider ignore accept reject admire respect "
    "regret allow",
}
FUNCTION_WORDS = (
    "a an the this that these those some any no every each all both many few much more most other "
    "another such one two three he she it they we you i him her them us me his its their our your "
    "my himself herself itself themselves who which whom whose what where when why how and or but "
    "nor so if because although while since before after until as than of in on at by for with "
    "from to into over under between through about against is are was were be been being am do "
    "does did has have had having will would can could may might must shall should not never "
    "always often also only there here then now very quite too out up down off"
)
FUNCTION = set(FUNCTION_WORDS.split())


@dataclass
class Config:
    out_dir: str = ""  # "": this folder
    items: int = 120  # sentences, and as many stimuli of each of the three other kinds
    seed: int = 0  # for all random choices
    overwrite: bool = False  # rebuild an existing dataset


class NonWords:
    """Word-like strings, drawn from the letter trigrams of a vocabulary but not in it."""

    def __init__(self, vocabulary, rng):
        self.rng = rng
        self.words = set(vocabulary)
        self.of_word = {}
        self.next = collections.defaultdict(list)
        for word in sorted(self.words):
            padded = f"^^{word}$"
            for i in range(len(padded) - 2):
                self.next[padded[i : i + 2]].append(padded[i + 2])

    def __call__(self, word):
        """Return a non-word about as long as the word, always the same for the same word."""
        taken = self.words | set(self.of_word.values())
        while word not in self.of_word:
            string = self.draw()
            if abs(len(string) - len(word)) <= 1 and string not in taken:
                self.of_word[word] = string
        return self.of_word[word]

    def draw(self):
        string = "^^"
        while not string.endswith("$") and len(string) < 20:
            string += self.rng.choice(self.next[string[-2:]])
        return string[2:-1]


def make(sentences, items, seed):
    """Make text, condition, item: the four kinds from sentences (tuples of words), and LISTS."""
    rng = random.Random(seed)
    chosen = sorted(rng.sample(sorted(sentences), items))
    vocabulary = set().union(*sentences)
    for words in LISTS.values():
        vocabulary |= set(words.split())
    nonword = NonWords(vocabulary, rng)
    pool = []
    for sentence in chosen:
        pool += sentence
    rng.shuffle(pool)
    rows = []
    for item, sentence in enumerate(chosen):
        shuffled = pool[: len(sentence)]
        pool = pool[len(sentence) :]
        kinds = {"sentences": sentence, "words": shuffled}
        kinds["jabberwocky"] = [w if w in FUNCTION else nonword(w) for w in sentence]
        kinds["nonwords"] = [nonword(w) for w in shuffled]
        rows += [(" ".join(words), kind, item) for kind, words in kinds.items()]
    for kind, words in LISTS.items():
        rows += [(word, kind, item) for item, word in enumerate(words.split())]
    return pd.DataFrame(rows, columns=["text", "condition", "item"])


def read_sentences(grammar):
    """Return the sentences of three tasks with 6 to 12 words and no numbers, as tuples of words."""
    sentences = set()
    for task in ("tense", "subj_number", "obj_number"):
        for text in read_task(grammar, task)["text"]:
            words = tuple(text.rstrip(".?!").lower().split())
            if 6 <= len(words) <= 12 and all(word.isalpha() for word in words):
                sentences.add(words)
    return sentences


def is_complete(folder):
    return (folder / "meta.yaml").is_file() and (folder / "localizer.csv").is_file()


def main(config):
    folder = folder_of(config, __file__)
    version = {"format": FORMAT, "seed": config.seed, "items": config.items}
    if already_made(folder, {}, is_complete, config.overwrite, **version):
        return
    sentences = read_sentences(embedded("grammar"))
    if len(sentences) < config.items:
        available = f"data/grammar has only {len(sentences)} sentences of 6 to 12 words"
        raise InputError(f"items={config.items}: {available}: set a smaller items=")
    table = make(sentences, config.items, config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / "localizer.csv", table.to_csv(index=False))
    meta = {**version, "synthetic": True, "stimuli": len(table)}
    write_yaml(folder / "meta.yaml", meta)
    print(f"{folder}: {len(table)} stimuli, {table['condition'].nunique()} conditions")


if __name__ == "__main__":
    main(configure(Config))
