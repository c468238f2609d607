"""The 1,797 handwritten digits of scikit-learn (8 x 8 pixels, UCI) as a set of images to classify. Made here, offline.

    python data/digits/prepare.py
    python warp.py task=classification dataset=data/digits models=my_file.py:constructor layers=...    # as images
    python warp.py config/warp_digits.yaml                                                             # as vectors, from scikit-learn itself

Grey levels 0 to 16 are stored as 0 to 255 (times 255/16, rounded): none is lost. Split 60/20/20 in each class; who wrote which digit is not told.
"""
import os, sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data.stimuli import complete_encoding, read_encoding_meta, write_encoding

EMBEDDED = True  # made from what is installed, offline: scripts may start this on first use


@dataclass
class Config:
    out_dir: str = ""                # "": this folder
    seed: int = 0                    # of the split
    overwrite: bool = False          # make it again although it is there


def main(config):
    from PIL import Image
    from sklearn.datasets import load_digits
    folder = Path(config.out_dir) if config.out_dir else Path(os.path.relpath(Path(__file__).resolve().parent))
    options = {"seed": config.seed}
    if not config.overwrite and complete_encoding(folder):
        if (made := read_encoding_meta(folder).get("options")) != options:
            raise ValueError(f"{folder} was made with {made}: give overwrite=True to make it again, or another out_dir")
        return print(f"{folder}: there already (overwrite=True makes it again)")
    data = load_digits()
    rng = np.random.default_rng(config.seed)
    split = np.full(len(data.target), "train", dtype="<U5")
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(data.target == digit))
        n = round(0.2 * len(rows))
        split[rows[:n]], split[rows[n:2 * n]] = "test", "val"
    files = [f"{digit}/{i:04d}.png" for i, digit in enumerate(data.target)]
    for file, image in zip(files, data.images):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(folder / file)
    labels = [str(digit) for digit in range(10)]
    stimuli = pd.DataFrame({"file": files, "split": split, "label": data.target.astype(str)})
    write_encoding(folder, stimuli, np.eye(10, dtype=np.float32)[data.target], units=pd.DataFrame({"label": labels}), modality="labels", species="none",
                   source="scikit-learn, load_digits", synthetic=False, labels=labels, options=options)
    print(f"{folder}: {len(files):,} digits; " + ", ".join(f"{part} {(split == part).sum():,}" for part in ("train", "val", "test")))


if __name__ == "__main__":
    main(configure(Config))
