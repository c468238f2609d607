"""Natural Scenes Dataset (Allen et al. 2022): voxels of one person who saw photographs, up to three times each. From a local copy only.

    python data/nsd/prepare.py root=path/to/folder                      # voxels.nc and metadata.csv, images as metadata.csv names them
    python data/nsd/prepare.py root=path/to/folder images=path/to/png roi=LOC
    python warp.py dataset=nsd models=google/vit-base-patch16-224 layers=...

NSD is given out for a signed form (naturalscenesdataset.org) and is large: nothing is fetched here. `voxels.nc` is an array (presentation, neuroid) with
the coordinate stimulus_id, `metadata.csv` has the columns stimulus_id, filename, shared1000. The thousand images that everybody saw are the test set.
"""
import os, shutil, sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data.assembly import read_assembly, responses, take_part, whole
from data.stimuli import complete_encoding, read_encoding_meta, write_encoding

EMBEDDED = False  # needs a local copy: nobody starts this behind the user's back
HERE = Path(os.path.relpath(Path(__file__).resolve().parent))
YES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "": False}


@dataclass
class Config:
    root: str = ""                   # folder that holds voxels.nc and metadata.csv
    voxels: str = "voxels.nc"        # file in it
    metadata: str = "metadata.csv"   # file in it
    images: str = ""                 # folder of the images; "": root
    roi: str = ""                    # name of the region, where the file has none
    subject: str = ""                # whose voxels, where the file does not say
    missing: Literal["units", "presentations"] = "units"  # what is left out where a response is missing
    out_dir: str = ""                # "": this folder
    overwrite: bool = False          # make it again although it is there


def bring(source, target):
    """One image into the dataset: a hard link where the disk allows, else a copy."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def main(config):
    folder = Path(config.out_dir) if config.out_dir else HERE
    options = {key: value for key, value in asdict(config).items() if key not in ("root", "images", "out_dir", "overwrite")}
    if not config.overwrite and complete_encoding(folder):
        if (made := read_encoding_meta(folder).get("options")) != options:
            raise ValueError(f"{folder} was made with {made}: give overwrite=True to make it again, or another out_dir")
        return print(f"{folder}: there already (overwrite=True makes it again)")
    root, images = Path(config.root), Path(config.images or config.root)
    if not config.root or not root.is_dir():
        raise FileNotFoundError(f"root={config.root or '(nothing)'}: NSD comes from a local copy only; give the folder that holds {config.voxels} and "
                                f"{config.metadata} (access: naturalscenesdataset.org)")
    path = root / config.metadata
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give metadata= its name in root")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if lacks := [c for c in ("stimulus_id", "filename", "shared1000") if c not in table]:
        raise ValueError(f"{path} has no column '{lacks[0]}', only {', '.join(table)}")
    shared = table["shared1000"].str.strip().str.lower()
    if odd := sorted(set(shared) - set(YES)):
        raise ValueError(f"{path}: shared1000 is true or false, not '{odd[0]}'")
    table = table.assign(test=shared.map(YES)).drop_duplicates("stimulus_id").set_index("stimulus_id")

    assembly = read_assembly(root / config.voxels)
    y, presentations, units = responses(assembly)
    dim = next(d for d in assembly.dims if d != "neuroid")
    ids = pd.Series(assembly.column(dim, "stimulus_id", "image_id")).astype(str).to_numpy()
    if unknown := sorted(set(ids) - set(table.index)):
        raise ValueError(f"{path} lacks {len(unknown):,} stimuli of {assembly.path}, {unknown[0]} first: they do not belong together")
    there = take_part(y)
    rows, columns = whole(y[:, there], config.missing, str(assembly.path))
    columns = np.flatnonzero(there)[columns]
    for name, given in (("roi", config.roi), ("subject", config.subject)):
        if name not in units:
            units[name] = given
    stimulus, names = pd.factorize(ids[rows])
    chosen = table.loc[names].reset_index()
    for file in chosen.filename:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ValueError(f"{path}: '{file}' leads out of the folder: give names that start from images=")
        if not (images / file).is_file():
            raise FileNotFoundError(f"{images / file} is missing: give images= the folder that the names in {path} start from")
    for file in chosen.filename:
        bring(images / file, folder / "images" / file)
    stimuli = pd.DataFrame({"file": "images/" + chosen.filename, "group": chosen.stimulus_id, "split": np.where(chosen.test, "test", "train")})
    if stimuli["split"].nunique() < 2:
        raise ValueError(f"{assembly.path}: {'all' if chosen.test.all() else 'none'} of its stimuli are among the shared thousand of {path}: "
                         "there is nothing to train on, or nothing to test on")
    repeats = presentations[rows].reset_index(drop=True)
    repeats = repeats[[c for c in repeats if c not in ("stimulus", "repeat", "stimulus_id", "image_id")]]
    meta = write_encoding(folder, stimuli, y[rows][:, columns], repeats.assign(stimulus=stimulus), units.iloc[columns].reset_index(drop=True),
                          modality="fMRI", species="human", source="Natural Scenes Dataset (local copy)", synthetic=False, options=options,
                          left_out=[f"{len(y) - rows.sum():,} presentations and {y.shape[1] - len(columns):,} voxels"])
    n = meta["sizes"]
    print(f"{folder}: {n['stimuli']:,} images ({chosen.test.sum():,} of the shared thousand are the test set), {n['presentations']:,} presentations, "
          f"{n['units']:,} voxels; {meta['left_out'][0]} left out")


if __name__ == "__main__":
    main(configure(Config))
