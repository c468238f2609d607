"""The 1,797 handwritten digits of scikit-learn (8 x 8 pixels, UCI) as images with responses.

    python data/digits/prepare.py
    python warp.py dataset=digits models=my_file.py:constructor layers=...

The only images made offline. A response is 1 for the image's digit and 0 for the others. Grey
levels 0 to 16 are stored as round(level * 255 / 16), without loss. Each digit is split 60/20/20.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import already_made, folder_of, options_of
from data.stimuli import complete_encoding, print_sizes, write_encoding

EMBEDDED = True  # made offline from what is installed: scripts may run this on first use


@dataclass
class Config:
    out_dir: str = ""  # "": this folder
    seed: int = 0  # of the split
    overwrite: bool = False  # replace an existing dataset


def make_split(digits, seed):
    """Return (n,) train, val or test, in equal shares of every digit."""
    rng = np.random.default_rng(seed)
    split = np.full(len(digits), "train", dtype="<U5")
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(digits == digit))
        n = round(0.2 * len(rows))
        split[rows[:n]] = "test"
        split[rows[n : 2 * n]] = "val"
    return split


def main(config):
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = folder_of(config, __file__)
    options = options_of(config)
    if already_made(folder, options, complete_encoding, config.overwrite):
        return
    digits = load_digits()
    files = []
    for i, image in enumerate(digits.images):
        files.append(f"{digits.target[i]}/{i:04d}.png")
        (folder / files[i]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(folder / files[i])
    split = make_split(digits.target, config.seed)
    stimuli = pd.DataFrame({"file": files, "split": split, "label": digits.target.astype(str)})
    labels = list("0123456789")
    meta = write_encoding(
        folder,
        stimuli,
        np.eye(10, dtype=np.float32)[digits.target],
        units=pd.DataFrame({"label": labels}),
        modality="labels",
        species="none",
        source="scikit-learn, load_digits",
        synthetic=False,
        labels=labels,
        options=options,
    )
    print_sizes(folder, meta)


if __name__ == "__main__":
    main(configure(Config))
