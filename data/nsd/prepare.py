"""Natural Scenes Dataset (Allen et al. 2022): voxels of one person who saw photographs.

    python data/nsd/prepare.py root=path/to/folder     # voxels.nc, metadata.csv and the images
    python data/nsd/prepare.py root=path/to/folder images=path/to/png roi=LOC
    python warp.py dataset=nsd models=google/vit-base-patch16-224 layers=...

NSD is given out for a signed form (naturalscenesdataset.org) and is large: it is read from a local
copy only. `voxels.nc` is an array (presentation, neuroid) with the coordinate stimulus_id,
`metadata.csv` has the columns stimulus_id, filename, shared1000. Each photograph was seen up to
three times; the thousand that everybody saw are the test set.
"""

import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError
from data.assembly import column, read_assembly, responses, without_gaps
from data.stimuli import already_made, print_sizes, read_csv, write_encoding

EMBEDDED = False  # needs a local copy: nobody starts this behind the user's back
HERE = Path(os.path.relpath(Path(__file__).resolve().parent))
YES = {"true", "1", "1.0"}
NO = {"false", "0", "0.0", ""}


@dataclass
class Config:
    root: str = ""  # folder that holds voxels.nc and metadata.csv
    voxels: str = "voxels.nc"  # file in it
    metadata: str = "metadata.csv"  # file in it
    images: str = ""  # folder of the images; "": root
    roi: str = ""  # name of the region, where the file has none
    subject: str = ""  # whose voxels, where the file does not say
    missing: Literal["units", "presentations"] = "units"  # what goes where a response is missing
    out_dir: str = ""  # "": this folder
    overwrite: bool = False  # make it again although it is there

    def check(self):
        if not self.root or not Path(self.root).is_dir():
            raise InputError(
                f"root={self.root or '(nothing)'} is no folder: NSD comes from a local copy only; "
                f"give the folder that holds {self.voxels} and {self.metadata} (access: "
                "naturalscenesdataset.org)"
            )


def read_metadata(path):
    """DataFrame of the photographs: stimulus_id (also the index), filename, shared (bool)."""
    table = read_csv(path)
    for name in ("stimulus_id", "filename", "shared1000"):
        column(table, path, name)
    said = table["shared1000"].str.strip().str.lower()
    for odd in set(said) - YES - NO:
        raise InputError(f"{path}: shared1000 is true or false, not '{odd}'")
    table["shared"] = said.isin(YES)
    return table.drop_duplicates("stimulus_id").set_index("stimulus_id", drop=False)


def link_images(files, source, folder):
    """Bring images into the dataset: hard links where the disk allows, else copies."""
    for file in files:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise InputError(f"'{file}' leads out of the folder: give names that start in {source}")
        if not (source / file).is_file():
            raise InputError(
                f"{source / file} is missing: give images= the folder in which the names of the "
                "metadata start"
            )
    for file in files:
        target = folder / file
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link((source / file).resolve(), target)
        except OSError:
            shutil.copyfile(source / file, target)


def describe_stimuli(metadata, shown, path):
    """DataFrame of stimuli, a row a photograph that was shown; the shared ones are the test set."""
    photographs = metadata.loc[shown]
    if photographs["shared"].nunique() < 2:
        found = "all" if photographs["shared"].all() else "none"
        raise InputError(
            f"{found} of the stimuli shown are among the shared thousand of {path}: there is "
            "nothing to train on, or nothing to test on"
        )
    return pd.DataFrame(
        {
            "file": "images/" + photographs["filename"],
            "group": photographs["stimulus_id"],
            "split": np.where(photographs["shared"], "test", "train"),
        }
    )


def main(config):
    folder = Path(config.out_dir) if config.out_dir else HERE
    options = asdict(config)
    for key in ("root", "images", "out_dir", "overwrite"):
        del options[key]
    if already_made(folder, options, config.overwrite):
        return
    root = Path(config.root)
    metadata = read_metadata(root / config.metadata)
    assembly = read_assembly(root / config.voxels)
    y, presentations, units = responses(assembly)
    ids = column(presentations, assembly.path, "stimulus_id", "image_id").astype(str)
    unknown = sorted(set(ids) - set(metadata.index))
    if unknown:
        raise InputError(
            f"{root / config.metadata} lacks {len(unknown):,} stimuli of {assembly.path}, "
            f"{unknown[0]} first: they do not belong together"
        )
    rows, columns, left_out = without_gaps(y, config.missing, str(assembly.path))
    for name, given in (("roi", config.roi), ("subject", config.subject)):
        if name not in units:
            units[name] = given
    stimulus, shown = pd.factorize(ids[rows])
    stimuli = describe_stimuli(metadata, shown, root / config.metadata)
    images = Path(config.images or root)
    link_images(metadata.loc[shown, "filename"], images, folder / "images")
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
