"""Natural Scenes Dataset (Allen et al. 2022): voxels of one person who saw photographs.

    python data/nsd/prepare.py root=path/to/folder     # voxels.nc, metadata.csv and the images
    python data/nsd/prepare.py root=path/to/folder images=path/to/png roi=LOC
    python warp.py dataset=nsd models=google/vit-base-patch16-224 layers=...

NSD is large and needs a signed form (naturalscenesdataset.org), so it is read from a local copy
only. `voxels.nc` is an array (presentation, neuroid) with the coordinate stimulus_id;
`metadata.csv` has the columns stimulus_id, filename, shared1000. Each photograph was seen up to
three times; the thousand that everybody saw are the test set.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError, already_made, column, folder_of, options_of
from data.assembly import read_assembly, responses, without_gaps
from data.stimuli import complete_encoding, link_images, print_sizes, read_csv, write_encoding

EMBEDDED = False  # needs a local copy: no script runs this on its own
SHARED = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "": False}


@dataclass
class Config:
    root: str = ""  # folder that holds voxels.nc and metadata.csv
    voxels: str = "voxels.nc"  # file in it
    metadata: str = "metadata.csv"  # file in it
    images: str = ""  # folder of the images; "": root
    roi: str = ""  # name of the region if the file has none
    subject: str = ""  # whose voxels if the file does not say
    missing: Literal["units", "presentations"] = "units"  # what to drop if a response is missing
    out_dir: str = ""  # "": this folder
    overwrite: bool = False  # replace an existing dataset

    def check(self):
        if not self.root or not Path(self.root).is_dir():
            cure = f"give the folder of your local copy of {self.voxels} and {self.metadata}"
            root = self.root or "(nothing)"
            raise InputError(f"root={root} does not exist, or is a file: {cure}")


def read_metadata(path):
    """Read a DataFrame of photographs: stimulus_id (also the index), filename, shared (bool)."""
    table = read_csv(path)
    column(table, path, "filename")
    stated = column(table, path, "shared1000").str.strip().str.lower()
    for odd in set(stated) - set(SHARED):
        raise InputError(f"{path}: shared1000 must be true or false, not '{odd}'")
    table["shared"] = stated.map(SHARED)
    table.index = column(table, path, "stimulus_id")
    return table[~table.index.duplicated()]


def find_images(files, source):
    """Return {name: path} of images in a folder. Raises InputError."""
    for file in files:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise InputError(f"'{file}' is outside the folder: give names relative to {source}")
        if not (source / file).is_file():
            cure = "give images= the folder that the names in the metadata are relative to"
            raise InputError(f"{source / file} is missing: {cure}")
    return {file: source / file for file in files}


def describe_stimuli(metadata, shown, path):
    """Return a DataFrame of the photographs shown; the shared ones are the test set."""
    photographs = metadata.loc[shown]
    if photographs["shared"].nunique() < 2:
        share = "all" if photographs["shared"].all() else "none"
        problem = f"{share} of the stimuli shown are among the shared thousand of {path}"
        raise InputError(f"{problem}: there is nothing to train on, or nothing to test on")
    return pd.DataFrame(
        {
            "file": "images/" + photographs["filename"],
            "group": photographs["stimulus_id"],
            "split": np.where(photographs["shared"], "test", "train"),
        }
    )


def main(config):
    folder = folder_of(config, __file__)
    options = options_of(config, "root", "images")
    if already_made(folder, options, complete_encoding, config.overwrite):
        return
    root = Path(config.root)
    metadata = read_metadata(root / config.metadata)
    assembly = read_assembly(root / config.voxels)
    y, presentations, units = responses(assembly)
    ids = column(presentations, assembly.path, "stimulus_id", "image_id").astype(str)
    unknown = sorted(set(ids) - set(metadata.index))
    if unknown:
        lacks = f"lacks {len(unknown):,} stimuli of {assembly.path}, {unknown[0]} first"
        raise InputError(f"{root / config.metadata} {lacks}: do the files belong together?")
    rows, columns, left_out = without_gaps(y, config.missing, str(assembly.path))
    for name, value in (("roi", config.roi), ("subject", config.subject)):
        if name not in units:
            units[name] = value
    stimulus, shown = pd.factorize(ids[rows])
    stimuli = describe_stimuli(metadata, shown, root / config.metadata)
    images = Path(config.images or root)
    link_images(find_images(metadata.loc[shown, "filename"], images), folder / "images")
    known = presentations.columns.isin(["stimulus", "repeat", "stimulus_id", "image_id"])
    meta = write_encoding(
        folder,
        stimuli,
        y[rows][:, columns],
        presentations.loc[rows, ~known].assign(stimulus=stimulus),
        units[columns],
        modality="fMRI",
        species="human",
        source="Natural Scenes Dataset (local copy)",
        synthetic=False,
        options=options,
        left_out=left_out,
    )
    print_sizes(folder, meta)


if __name__ == "__main__":
    main(configure(Config))
