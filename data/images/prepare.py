"""A folder of images, one subfolder a class, as a classification set: limited, split, and checked.

    python data/images/prepare.py root=path/to/photos                   # photos/cat/*.png, photos/dog/*.jpg ... into data/images/photos
    python data/images/prepare.py root=path/to/photos classes=50 samples=100 seed=1
    python data/images/prepare.py root=path/to/frames group='^(.*?)_'   # what the name has before the first _ (a film, a person) stays in one split
    python warp.py task=classification dataset=data/images/photos models=microsoft/resnet-18 layers=...

Written as stimuli with responses (data/stimuli.py): stimuli.csv has the columns label, group and split, a response is 1 for the image's class and 0 for the
others. Images that are the same byte for byte are one group: a test image was never trained on.
"""
import hashlib, os, re, shutil, sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data.stimuli import complete_encoding, read_encoding_meta, write_encoding

EMBEDDED = False  # needs a folder of yours
HERE = Path(os.path.relpath(Path(__file__).resolve().parent))
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass
class Config:
    root: str = ""                   # the folder with a folder for each class
    classes: int = 0                 # at most so many classes, drawn by the seed; 0: all
    samples: int = 0                 # at most so many images of each class, drawn by the seed; 0: all
    group: str = ""                  # regular expression on a file's name: what it finds (its first bracket) is the group; "": each image its own
    val: float = 0.2                 # of each class
    test: float = 0.2                # of each class
    seed: int = 0                    # of limits and splits
    out_dir: str = ""                # "": a folder here with the name of root
    overwrite: bool = False          # make it again although it is there

    def check(self):
        if min(self.classes, self.samples) < 0 or min(self.val, self.test) <= 0 or self.val + self.test >= 1:
            raise ValueError(f"classes={self.classes}, samples={self.samples}, val={self.val}, test={self.test}: limits are 0 or more, shares above 0 and "
                             "below 1 together")
        try:
            re.compile(self.group)
        except re.error as e:
            raise ValueError(f"group={self.group} is no regular expression ({e})") from None


def choose(root, config):
    """DataFrame of the chosen images: path, label, group (identical files share it)."""
    rng = np.random.default_rng(config.seed)
    found = {p.name: sorted(f for f in p.rglob("*") if f.suffix.lower() in SUFFIXES) for p in sorted(root.iterdir()) if p.is_dir()}
    names = [name for name, files in found.items() if files]
    if len(names) < 2:
        raise ValueError(f"root={root} has images in {len(names)} subfolders, and two classes are needed: a folder for each class, {', '.join(SUFFIXES)} in it")
    if config.classes:
        names = sorted(rng.permutation(names)[:config.classes])
    rows = []
    for name in names:
        files = [found[name][i] for i in sorted(rng.permutation(len(found[name]))[:config.samples or None])]
        for file in files:
            match = re.search(config.group, file.name) if config.group else None
            if config.group and not match:
                raise ValueError(f"group={config.group} finds nothing in the name {file.name} ({file}): every image needs a group")
            rows.append((file, name, (match[1] if match.re.groups else match[0]) if match else str(file.relative_to(root))))
    table = pd.DataFrame(rows, columns=["path", "label", "group"])
    of_content, same = {}, {}  # a group -> the group it is joined to

    def joined(group):
        while group in same:
            group = same[group]
        return group

    for path, group in zip(table["path"], table["group"]):
        digest = hashlib.sha256(path.read_bytes()).digest()
        first, group = joined(of_content.setdefault(digest, group)), joined(group)
        if first != group:
            same[group] = first
    return table.assign(group=[joined(group) for group in table["group"]])


def split_groups(label, group, val, test, seed):
    """(n,) train, val or test: whole groups, about these shares of every class."""
    rng, part = np.random.default_rng([seed, 1]), {}
    home = pd.Series(np.asarray(label)).groupby(np.asarray(group)).first()  # the class of a group that has images of several
    sizes = pd.Series(np.asarray(group)).value_counts()
    for name in sorted(set(home)):
        groups = sorted(home.index[home == name])
        if len(groups) < 3:
            raise ValueError(f"class {name} has {len(groups)} groups of images that must stay together, and train, val and test need one each: "
                             "take more samples, or a finer group")
        groups = [groups[i] for i in rng.permutation(len(groups))]
        total, i = sizes[groups].sum(), 0
        for which, share, leave in (("test", test, 2), ("val", val, 1)):  # at least one group each, and as near to the share as whole groups come
            start, done = i, 0
            while i < len(groups) - leave and (i == start or done + sizes[groups[i]] / 2 <= share * total):
                part[groups[i]] = which
                done += sizes[groups[i]]
                i += 1
        part |= dict.fromkeys(groups[i:], "train")
    return np.array([part[g] for g in group])


def check_image(path):
    from PIL import Image
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as e:
        raise ValueError(f"{path} is torn, or no image ({e}): take it out of the folder, or put a whole one there") from None


def main(config):
    root = Path(config.root)
    if not config.root or not root.is_dir():
        raise FileNotFoundError(f"root={config.root or '(nothing)'} is no folder: give the one that has a folder of images for each class")
    folder = Path(config.out_dir) if config.out_dir else HERE / root.resolve().name
    options = {key: value for key, value in asdict(config).items() if key not in ("root", "out_dir", "overwrite")}
    if not config.overwrite and complete_encoding(folder):
        if (made := read_encoding_meta(folder).get("options")) != options:
            raise ValueError(f"{folder} was made with {made}: give overwrite=True to make it again, or another out_dir")
        return print(f"{folder}: there already (overwrite=True makes it again)")
    if folder.resolve() == root.resolve():
        raise ValueError(f"out_dir={folder} is root itself: give another place")
    table = choose(root, config)
    labels = sorted(set(table["label"]))
    table["split"] = split_groups(table["label"], table["group"], config.val, config.test, config.seed)
    table["file"] = [str(path.relative_to(root)) for path in table["path"]]
    for path in table["path"]:
        check_image(path)
    for label in labels:  # of an older choice
        shutil.rmtree(folder / label, ignore_errors=True)
    for path, file in zip(table["path"], table["file"]):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), folder / file)
        except OSError:  # another disk
            shutil.copyfile(path, folder / file)
    which = np.array([labels.index(label) for label in table["label"]])
    meta = write_encoding(folder, table[["file", "group", "split", "label"]], np.eye(len(labels), dtype=np.float32)[which],
                          units=pd.DataFrame({"label": labels}), modality="labels", species="none", source=root.resolve().name, synthetic=False, labels=labels,
                          options=options)
    print(f"{folder}: {meta['sizes']['stimuli']:,} images of {len(labels)} classes in {table['group'].nunique():,} groups; "
          + ", ".join(f"{split} {n:,}" for split, n in table["split"].value_counts(sort=False).items()))


if __name__ == "__main__":
    main(configure(Config))
