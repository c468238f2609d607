"""Stimuli for finding language-selective units, made here: sentences, word lists, jabberwocky and non-words in the manner of Fedorenko et al. 2010,
and concrete and abstract nouns and verbs in the manner of Moseley & Pulvermüller 2014.

    python data/localizer/prepare.py
"""
import collections, random, subprocess, sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure, write_aside
from data.stimuli import read_task, read_tasks

EMBEDDED = True  # made from data/grammar, offline: scripts may start this on first use
HERE = Path(__file__).resolve().parent

LISTS = {
    "concrete noun": "table window door wall floor house room car wheel road bridge river stone tree leaf garden bird dog cat horse fish hand foot eye arm "
                     "face book page paper pen box bag bottle cup knife clock lamp chair screen button",
    "abstract noun": "idea reason truth belief hope fear doubt choice chance cause effect rule law right duty freedom power value cost risk theory concept "
                     "notion meaning sense purpose intent skill habit custom trust pride honor faith mood spirit style trend status mercy",
    "concrete verb": "run walk jump climb swim throw catch kick push pull lift carry drop hit cut break tear fold wash clean cook eat drink bite chew grab "
                     "hold shake wave point press draw paint write dig plant pour spill kneel crawl",
    "abstract verb": "think know believe doubt hope fear trust agree deny claim argue infer assume suppose imagine remember forget learn understand decide "
                     "choose prefer want need intend plan expect predict explain describe define compare consider ignore accept reject admire respect regret "
                     "allow",
}
FUNCTION = set("a an the this that these those some any no every each all both many few much more most other another such one two three "
               "he she it they we you i him her them us me his its their our your my himself herself itself "
               "themselves who which whom whose what where when why how and or but nor so "
               "if because although while since before after until as than of in on at by for with from to into over under between through about against "
               "is are was were be been being am do does did has have had having will would can could may might must shall should not never always often "
               "also only there here then now very quite too out up down off".split())


@dataclass
class Config:
    out_dir: str = ""        # "": this folder
    items: int = 120         # sentences, and as many of each of the three other kinds
    seed: int = 0            # fixes everything
    overwrite: bool = False  # make it again although it is there


class NonWords:
    """Strings that look like words: a letter-trigram chain over a vocabulary, without its words (the same string for the same word)."""

    def __init__(self, vocabulary, rng):
        self.words, self.rng, self.made = set(vocabulary), rng, {}
        self.next = collections.defaultdict(list)
        for word in sorted(self.words):
            padded = f"^^{word}$"
            for i in range(len(padded) - 2):
                self.next[padded[i:i + 2]].append(padded[i + 2])

    def __call__(self, word):
        """A non-word about as long as the word."""
        if word not in self.made:
            taken = self.words | set(self.made.values())
            while True:
                string = "^^"
                while not string.endswith("$") and len(string) < 20:
                    string += self.rng.choice(self.next[string[-2:]])
                string = string[2:-1]
                if abs(len(string) - len(word)) <= 1 and string not in taken:
                    break
            self.made[word] = string
        return self.made[word]


def make(sentences, items, seed):
    """DataFrame text, condition, item: the four kinds made of the same sentences (lists of lower-case words), then the word lists."""
    rng = random.Random(seed)
    chosen = sorted(rng.sample(sorted(sentences), items))
    nonword = NonWords({w for s in sentences for w in s} | {w for words in LISTS.values() for w in words.split()}, rng)
    pool = [w for s in chosen for w in s]
    rng.shuffle(pool)
    rows = []
    for item, sentence in enumerate(chosen):
        shuffled, pool = pool[:len(sentence)], pool[len(sentence):]
        kinds = dict(sentences=sentence, words=shuffled, jabberwocky=[w if w in FUNCTION else nonword(w) for w in sentence],
                     nonwords=[nonword(w) for w in shuffled])
        rows += [(" ".join(words), kind, item) for kind, words in kinds.items()]
    for kind, words in LISTS.items():
        rows += [(word, kind, item) for item, word in enumerate(words.split())]
    return pd.DataFrame(rows, columns=["text", "condition", "item"])


def main(config):
    folder = Path(config.out_dir) if config.out_dir else HERE
    if (folder / "meta.yaml").exists() and (folder / "localizer.csv").exists() and not config.overwrite:
        return print(f"{folder}: there already (overwrite=True makes it again)")
    grammar = HERE.parent / "grammar"
    if not (grammar / "meta.yaml").exists():
        subprocess.run([sys.executable, str(grammar / "prepare.py")], check=True)
    sentences = {tuple(text.rstrip(".?!").lower().split()) for name in ("tense", "subj_number", "obj_number") if name in read_tasks(grammar)
                 for text in read_task(grammar, name).text}
    sentences = {s for s in sentences if 6 <= len(s) <= 12 and all(w.isalpha() for w in s)}
    if len(sentences) < config.items:
        raise ValueError(f"items={config.items}: data/grammar has only {len(sentences)} sentences of 6 to 12 words; take fewer")
    table = make(sentences, config.items, config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / "localizer.csv", table.to_csv(index=False))
    write_aside(folder / "meta.yaml", f"format: localizer-1\nsynthetic: true\nseed: {config.seed}\nitems: {config.items}\nstimuli: {len(table)}\n")
    print(f"{folder / 'localizer.csv'}: {len(table)} stimuli, {table.condition.nunique()} conditions")


if __name__ == "__main__":
    main(configure(Config))
