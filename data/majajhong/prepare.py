"""Majaj, Hong et al. 2015: 256 sites of IT and V4 in two macaques that saw 3,200 public images.

    python data/majajhong/prepare.py                       # fetched once from Brain-Score's buckets
    python data/majajhong/prepare.py root=path/to/folder   # a local copy: assembly, table, images
    python data/majajhong/prepare.py assembly=it.nc root=path/to/folder   # another assembly
    python warp.py dataset=majajhong roi=IT models=microsoft/resnet-18 layers=...

Objects on unrelated backgrounds, each image shown about 50 times; spike counts 70 to 170 ms after
onset, as published. All presentations are kept, so scripts can estimate ceilings from repeats.
"""

import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError, already_made, column, file_hash, folder_of, options_of
from data.assembly import read_assembly, responses, without_gaps
from data.fetch import download, need
from data.stimuli import complete_encoding, link_images, print_sizes, read_csv, write_encoding

EMBEDDED = False  # must be downloaded: no script runs this on its own
ASSEMBLY = "assy_dicarlo_MajajHong2015_public.nc"
TABLE = "image_dicarlo_hvm-public.csv"
IMAGES = "image_dicarlo_hvm-public.zip"
SHA1 = {  # in Brain-Score's registry
    ASSEMBLY: "13d28ca0ce88ee550b54db3004374ae19096e9b9",
    TABLE: "5ca7a3da00d8e9c694a9cd725df5ba0ad6d735af",
    IMAGES: "8aa44e038d7b551efa8077467622f9d48d72e473",
}


@dataclass
class Config:
    group: Literal["image", "object"] = "image"  # never split: an image, or an object
    missing: Literal["units", "presentations"] = "presentations"  # what to drop if one is missing
    # where from and where to
    assembly: str = ASSEMBLY  # file name
    root: str = ""  # folder of a local copy; "": fetch it into files/ in out_dir
    url: str = "https://brainio-brainscore.s3.amazonaws.com"  # where to fetch from
    out_dir: str = ""  # "": this folder
    overwrite: bool = False  # replace an existing dataset


def find_files(config, folder):
    """Return the assembly, the table, and the zip or folder of images; fetch them without root=."""
    names = [config.assembly, TABLE, IMAGES]
    root = Path(config.root or folder / "files")
    paths = [root / name for name in names]
    if not config.root:
        files = []
        for path in paths:
            if not path.is_file():
                files.append(need(f"{config.url}/{path.name}", path, SHA1.get(path.name, "")))
        download(files, root)
    for unpacked in (root / "images", root / Path(IMAGES).stem):
        if unpacked.is_dir() and not paths[2].is_file():
            paths[2] = unpacked
    for path in paths:
        if not path.exists():
            cure = f"it needs {', '.join(names)} (or images/); without root= they are fetched"
            raise InputError(f"root={config.root} has no {path.name}: {cure}")
    return paths


def read_images(path):
    """Read a DataFrame of images with image_id and filename, whatever the file calls them."""
    table = read_csv(path)
    table["image_id"] = column(table, path, "image_id", "stimulus_id")
    table["filename"] = column(table, path, "filename", "image_file_name")
    table["filename"] = table["filename"].map(lambda name: Path(name).name)
    return table.drop_duplicates("image_id").set_index("image_id", drop=False)


def find_images(source, wanted, folder):
    """Return {name: path} of images in a folder, or in a zip, unpacked into `folder`."""
    if source.is_file():
        try:
            with zipfile.ZipFile(source) as archive:
                archive.extractall(folder)
        except (zipfile.BadZipFile, EOFError) as error:
            raise InputError(f"{source} is torn or not a zip ({error}): fetch it again") from None
        source = folder
    places = {}
    for path in source.rglob("*"):
        if "__MACOSX" in path.parts:
            continue
        if path.name in wanted and path.name in places:
            raise InputError(f"{source} holds two images '{path.name}': remove the wrong one")
        places[path.name] = path
    lacking = [name for name in wanted if name not in places]
    if lacking:
        count = f"{len(lacking)} of {len(wanted)} images"
        raise InputError(f"{source} lacks {count}, {lacking[0]} first")
    return {name: places[name] for name in wanted}


def describe_images(images, by_object, path):
    """Return a DataFrame of stimuli, one row per image."""
    stimuli = images[["image_id"]].assign(
        file="images/" + images["filename"], group=images["image_id"], split=""
    )
    if by_object:
        stimuli["group"] = column(images, path, "object_name")
    for name in ("object_name", "category_name", "var", "variation"):
        if name in images:
            stimuli[name] = images[name]
    return stimuli


def main(config):
    folder = folder_of(config, __file__)
    options = options_of(config, "root", "url")
    if already_made(folder, options, complete_encoding, config.overwrite):
        return
    assembly_path, table_path, images_path = find_files(config, folder)
    assembly = read_assembly(assembly_path)
    images = read_images(table_path)
    y, presentations, units = responses(assembly)
    ids = column(presentations, assembly_path, "image_id", "stimulus_id").astype(str)
    unknown = sorted(set(ids) - set(images.index))
    if unknown:
        lacks = f"lacks {len(unknown):,} images of {assembly_path}, {unknown[0]} first"
        raise InputError(f"{table_path} {lacks}: they belong to different sets")
    units["roi"] = column(units, assembly_path, "region").astype(str)
    units["subject"] = units["animal"].astype(str) if "animal" in units else ""

    rows, columns, left_out = without_gaps(y, config.missing, str(assembly_path))
    stimulus, shown = pd.factorize(ids[rows])
    images = images.loc[shown]
    names = images["filename"].tolist()
    link_images(find_images(images_path, names, folder / "files/unpacked"), folder / "images")
    meta = write_encoding(
        folder,
        describe_images(images, config.group == "object", table_path),
        y[rows][:, columns],
        pd.DataFrame({"stimulus": stimulus}),
        units[columns],
        modality="spikes",
        species="macaque",
        source=f"Majaj, Hong et al. 2015 ({assembly_path.name})",
        synthetic=False,
        file_sha1=file_hash(assembly_path, "sha1"),
        left_out=left_out,
        options=options,
    )
    print_sizes(folder, meta)


if __name__ == "__main__":
    main(configure(Config))
