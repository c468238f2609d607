"""Majaj, Hong et al. 2015: 256 sites of IT and V4 in two macaques, 3,200 public images of objects on backgrounds, each shown some 50 times.

    python data/majajhong/prepare.py                                    # fetched once from Brain-Score's buckets
    python data/majajhong/prepare.py root=path/to/folder                # from a local copy: the assembly (.nc), the table (.csv), the images (.zip or a folder)
    python data/majajhong/prepare.py assembly=it.nc root=path/to/folder # another assembly of the same images, such as one that was averaged before
    python warp.py dataset=majajhong roi=IT models=microsoft/resnet-18 layers=...

Spike counts 70 to 170 ms after onset, as published. Every presentation is kept, so that the ceiling comes from the repeats.
"""
import os, sys, zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data.assembly import fetch, read_assembly, responses, sha1_of, take_part, whole
from data.stimuli import complete_encoding, read_encoding_meta, write_encoding

EMBEDDED = False  # must be downloaded: nobody starts this behind the user's back
HERE = Path(os.path.relpath(Path(__file__).resolve().parent))
FILES = {"assy_dicarlo_MajajHong2015_public.nc": "13d28ca0ce88ee550b54db3004374ae19096e9b9",  # sha1, of Brain-Score's registry
         "image_dicarlo_hvm-public.csv": "5ca7a3da00d8e9c694a9cd725df5ba0ad6d735af",
         "image_dicarlo_hvm-public.zip": "8aa44e038d7b551efa8077467622f9d48d72e473"}


@dataclass
class Config:
    group: Literal["image", "object"] = "image"  # what no split tears apart: an image, or all images of one of the 64 objects
    repeats: int = 0                 # at most so many presentations of each image, 0: all
    missing: Literal["units", "presentations"] = "presentations"  # what is left out where a response is missing
    # where from and where to
    assembly: str = next(iter(FILES))  # file name
    root: str = ""                   # folder of a local copy; "": fetched into files/ in out_dir
    url: str = "https://brainio-brainscore.s3.amazonaws.com"  # where to fetch from
    out_dir: str = ""                # "": this folder
    overwrite: bool = False          # make it again although it is there

    def check(self):
        if self.repeats < 0:
            raise ValueError(f"repeats={self.repeats}: give a number of presentations, or 0 for all")


def find_files(config, folder):
    """(assembly, table, zip or folder of images) as paths, of the local copy or fetched."""
    names = [config.assembly, *list(FILES)[1:]]
    if not config.root:
        for name in names:
            path, sha1 = folder / "files" / name, FILES.get(name, "")
            if not path.is_file() or (sha1 and sha1_of(path) != sha1):
                fetch(f"{config.url}/{name}", path, sha1)
        return [folder / "files" / name for name in names]
    root = Path(config.root)
    if not root.is_dir():
        raise FileNotFoundError(f"root={config.root} is no folder: give the one that holds {', '.join(names)}")
    paths = [root / name for name in names]
    if not paths[2].is_file():
        paths[2] = next((p for p in (root / Path(names[2]).stem, root / "images") if p.is_dir()), paths[2])
    if lacks := [path.name for path in paths if not path.exists()]:
        raise FileNotFoundError(f"{root} has no {lacks[0]}: complete the copy ({', '.join(names)}; images also as a folder images/), or leave root= out")
    return paths


def read_table(path):
    """DataFrame of the images, indexed by image_id, with the column `file`."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column, names in (("image_id", ("image_id", "stimulus_id")), ("file", ("filename", "image_file_name"))):
        name = next((n for n in names if n in table), None)
        if name is None:
            raise ValueError(f"{path} has no column '{names[0]}', only {', '.join(table)}")
        table[column] = table[name]
    return table.drop_duplicates("image_id").set_index("image_id")


def take_images(source, wanted, folder):
    """Put the files of `wanted` (names in a zip or a folder, whatever folders are around them) into folder, by their bare names."""
    folder.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        where = {p.name: p for p in source.rglob("*") if p.is_file()}
        read = lambda name: where[name].read_bytes()
    else:
        try:
            archive = zipfile.ZipFile(source)
        except zipfile.BadZipFile as e:
            raise ValueError(f"{source} is torn, or no zip ({e}): fetch it again") from None
        where = {Path(name).name: name for name in archive.namelist() if not name.endswith("/")}
        read = lambda name: archive.read(where[name])
    if lacks := [name for name in wanted if name not in where]:
        raise FileNotFoundError(f"{source} lacks {len(lacks):,} of {len(wanted):,} images, {lacks[0]} first: complete it")
    for name in wanted:
        try:
            content = read(name)
        except (zipfile.BadZipFile, OSError, EOFError) as e:
            raise ValueError(f"{source}: {name} cannot be read ({e}): fetch it again") from None
        (folder / name).write_bytes(content)


def main(config):
    folder = Path(config.out_dir) if config.out_dir else HERE
    options = {key: value for key, value in asdict(config).items() if key not in ("root", "url", "out_dir", "overwrite")}
    if not config.overwrite and complete_encoding(folder):
        if (made := read_encoding_meta(folder).get("options")) != options:
            raise ValueError(f"{folder} was made with {made}: give overwrite=True to make it again, or another out_dir")
        return print(f"{folder}: there already (overwrite=True makes it again)")
    paths = find_files(config, folder)
    assembly, table = read_assembly(paths[0]), read_table(paths[1])
    y, presentations, units = responses(assembly)
    dim = next(d for d in assembly.dims if d not in ("neuroid", "time_bin"))
    ids = assembly.column(dim, "image_id", "stimulus_id").astype(str)
    if unknown := sorted(set(ids) - set(table.index)):
        raise ValueError(f"{paths[1]} lacks {len(unknown):,} images of {paths[0]}, {unknown[0]} first: they are not of the same set")
    units["roi"] = assembly.column("neuroid", "region").astype(str)
    units["subject"] = units["animal"].astype(str) if "animal" in units else ""

    there = take_part(y)
    rows, columns = whole(y[:, there], config.missing, str(paths[0]))
    if config.repeats:
        rows &= (pd.Series(rows).groupby(ids).cumsum() <= config.repeats).to_numpy()
    columns = np.flatnonzero(there)[columns]
    stimulus, names = pd.factorize(ids[rows])
    images = table.loc[names].reset_index()
    take_images(paths[2], [Path(f).name for f in images.file], folder / "images")
    stimuli = pd.DataFrame({"file": ["images/" + Path(f).name for f in images.file], "group": images.image_id, "split": ""})
    if config.group == "object":
        if "object_name" not in images:
            raise ValueError(f"group=object: {paths[1]} has no column 'object_name', only {', '.join(table)}")
        stimuli["group"] = images.object_name
    stimuli = stimuli.join(images[[c for c in ("image_id", "object_name", "category_name", "var", "variation") if c in images]])
    said = [f"{(~there).sum():,} sites without any response", f"{len(y) - rows.sum():,} presentations and {there.sum() - len(columns):,} sites left out"]
    meta = write_encoding(folder, stimuli, y[rows][:, columns], pd.DataFrame({"stimulus": stimulus}), units.iloc[columns].reset_index(drop=True),
                          modality="spikes", species="macaque", source=f"Majaj, Hong et al. 2015 ({paths[0].name})", synthetic=False,
                          file_sha1=sha1_of(paths[0]), left_out=said, options=options)
    n, rois = meta["sizes"], units.roi.iloc[columns].value_counts()
    print(f"{folder}: {n['stimuli']:,} images, {n['presentations']:,} presentations, " + ", ".join(f"{c} sites of {roi}" for roi, c in rois.items())
          + "".join(f"; {what}" for what in said))


if __name__ == "__main__":
    main(configure(Config))
