"""Brains reading and listening, as published by Brain-Score (brain-score.org/language).

    python data/brainscore/prepare.py set=Tuckute2024    # 1,000 sentences, mean of 5 people (fMRI)
    python data/brainscore/prepare.py set=Pereira2018    # 243 and 384 sentences, 13,553 voxels
    python data/brainscore/prepare.py set=Fedorenko2016  # 52 sentences word by word, 97 electrodes
    python data/brainscore/prepare.py set=Blank2014      # 8 stories in pieces of 2 s, 60 regions
    python data/brainscore/prepare.py set=Pereira2018 root=path/to/assy_Pereira2018_language.nc
    python warp.py dataset=brainscore/Tuckute2024 models=gpt2 layers=6

Fetched once, or read from a local copy (root=, a file or its folder). Each dataset is
data/brainscore/SET; Pereira2018 has one per experiment (SET-243sentences, SET-384sentences), since
not everybody took part in both. A passage, sentence or story is one group and is never split. A
stimulus is read in context: the piece itself after the pieces before it in its group.

Tuckute et al. 2024, Pereira et al. 2018, Fedorenko et al. 2016, Blank et al. 2014; Schrimpf et al.
2021 (the benchmarks and their ceilings).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError, already_made, column, file_hash, folder_of
from data.assembly import read_assembly, responses, without_gaps
from data.fetch import download, look_up
from data.stimuli import complete_encoding, print_sizes, write_encoding

EMBEDDED = False  # must be downloaded: no script runs this on its own


@dataclass
class Published:
    """One published set: its files and the names in them."""

    file: str  # the assembly
    sha1: str  # in Brain-Score's registry
    modality: str
    subject: str  # coordinate of a unit
    roi: list  # coordinates of a unit, the first that exists
    group: str = ""  # coordinate of a presentation; "": one group per stimulus
    order: list = field(default_factory=list)  # coordinates that sort a group; []: as in the file
    context: int = 0  # pieces of its group read before a stimulus
    ceilings: dict = field(default_factory=dict)  # {experiment: (file, sha1)}


SETS = {
    "Tuckute2024": Published(
        file="assy_Tuckute2024_language.nc",
        sha1="5c8fc7f3e24cc1af5f5296459377b638b6492641",
        modality="fMRI",
        subject="subject_UID",
        roi=["roi"],
    ),
    "Pereira2018": Published(
        file="assy_Pereira2018_language.nc",
        sha1="f8434b4022f5b2c862f0ff2854d5b3f5f2a7fb96",
        modality="fMRI",
        subject="subject",
        roi=["roi", "region", "atlas"],
        group="passage_label",
        context=100,
        ceilings={
            "243sentences": (
                "ceiling_raw_Pereira2018_243sentences-linear.nc",
                "525a6ac8c14ad826c63fdd71faeefb8ba542d5ac",
            ),
            "384sentences": (
                "ceiling_raw_Pereira2018_384sentences-linear.nc",
                "ce2044a7713426870a44131a99bfc63d8843dae0",
            ),
        },
    ),
    "Fedorenko2016": Published(
        file="assy_Fedorenko2016_language.nc",
        sha1="2966b6d78e972a72068aa6907377483f427e8d9a",
        modality="ECoG",
        subject="subject_UID",
        roi=[],
        group="sentence_id",
        order=["word_num"],
        context=100,
    ),
    "Blank2014": Published(
        file="assy_Blank2014_fROI.nc",
        sha1="af1e868821b897cb1684e4c8dcd33977121ef552",
        modality="fMRI",
        subject="subject_id",
        roi=["fROI_area"],
        group="story",
        order=["sentence_number_in_story", "part_number_in_sentence"],
        context=20,
    ),
}


@dataclass
class Config:
    set: Literal["Tuckute2024", "Pereira2018", "Fedorenko2016", "Blank2014"] = "Tuckute2024"
    context: int = -1  # pieces of its group read before a stimulus; -1: the set's own, 0: none
    missing: Literal["units", "presentations"] = "units"  # what to drop if a response is missing
    # where from and where to
    root: str = ""  # local copy, file or folder; "": fetch it into files/ in out_dir
    url: str = "https://brainscore-storage.s3.amazonaws.com/brainscore-language"  # to fetch from
    out_dir: str = ""  # "": this folder
    overwrite: bool = False  # replace an existing dataset

    def check(self):
        if self.context < -1:
            raise InputError(f"context={self.context}: give a number of pieces, 0, or -1")


# ---- files


def find(config, folder, name, sha1):
    """Return the path of a published file, in root or fetched; None if it does not exist."""
    if config.root:
        root = Path(config.root)
        path = (root if root.is_dir() else root.parent) / name
        return path if path.is_file() else None
    path = folder / "files" / name
    if not path.is_file():
        file = look_up(f"{config.url}/{name}", path, sha1)
        if file is None:
            print(f"{config.url} has no {name}", flush=True)
            return None
        download([file], path.parent)
    return path


def read_ceilings(path, unit_ids):
    """Return (V,) the R² that the best model could reach, NaN where unpublished."""
    assembly = read_assembly(path)
    r = pd.Series(dtype=float)
    if assembly.dims == ["neuroid"]:
        names = column(assembly.coords["neuroid"], path, "neuroid_id").astype(str)
        r = pd.Series(assembly.values, index=names)
    r = r[~r.index.duplicated()].reindex(unit_ids).to_numpy(float)
    if np.isnan(r).all():
        raise InputError(f"{path} has no ceilings of these units: remove it from root=")
    return np.clip(r, 0, 1) ** 2


# ---- one dataset


def in_context(pieces, groups, order, context):
    """Return texts: each piece after up to `context` pieces (by `order`) of its group."""
    table = pd.DataFrame({"piece": pieces, "group": groups, "order": order})
    texts = pd.Series("", table.index)
    for _, members in table.sort_values("order", kind="stable").groupby("group"):
        for i, row in enumerate(members.index):
            text = " ".join(members["piece"].iloc[max(0, i - context) : i + 1])
            texts[row] = " ".join(text.split())  # some pieces bring their own spaces
    return texts.to_numpy()


def describe_presentations(presentations, published, context, path):
    """Return the coordinates of presentations with text, piece, group and split."""
    pieces = column(presentations, path, "stimulus", "sentence").astype(str)
    groups = np.arange(len(pieces)).astype(str)
    order = np.arange(len(pieces))
    if published.group:
        groups = column(presentations, path, published.group).astype(str)
    if published.order:
        keys = [column(presentations, path, name) for name in reversed(published.order)]
        for key in keys:
            if key.isna().any():
                raise InputError(f"{path}: a presentation has no {key.name} to sort it by")
        order = np.argsort(np.lexsort(keys))
    texts = in_context(pieces, groups, order, context)
    others = presentations.drop(columns=["stimulus", "file"], errors="ignore")
    return others.assign(text=texts, piece=pieces, group=groups, split="")


def describe_units(units, published, path):
    """Return the coordinates of units with neuroid_id, roi and subject as text."""
    rois = [units[name].astype(str) for name in published.roi if name in units]
    return units.assign(
        neuroid_id=column(units, path, "neuroid_id").astype(str),
        roi=rois[0] if rois else "language",
        subject=column(units, path, published.subject).astype(str),
    )


def make(config, folder, experiment, assembly, about):
    """Write the dataset of an assembly, or of one experiment in it."""
    published = SETS[config.set]
    y, presentations, units = responses(assembly)
    if experiment:
        rows = column(presentations, assembly.path, "experiment").astype(str) == experiment
        if not rows.any():
            raise InputError(f"{assembly.path} has no experiment {experiment}")
        y, presentations = y[rows], presentations[rows].reset_index(drop=True)
    units = describe_units(units, published, assembly.path)
    presentations = describe_presentations(
        presentations, published, about["options"]["context"], assembly.path
    )
    rows, columns, left_out = without_gaps(y, config.missing, f"{assembly.path}, {folder.name}")
    path = None
    if experiment:
        path = find(config, folder.parent, *published.ceilings[experiment])
        if path is None:
            print("no ceilings: none are published, or none are in root=", flush=True)
    if path:
        units["ceiling"] = read_ceilings(path, units["neuroid_id"])
        unknown = columns & units["ceiling"].isna().to_numpy()
        if unknown.any():  # their fit failed
            left_out.append(f"{unknown.sum():,} units without a ceiling")
            columns = columns & ~unknown

    presentations = presentations[rows]
    ids = presentations.get("stimulus_id", presentations.index.to_series()).astype(str)
    names = ids + "\t" + presentations["text"]
    stimulus, _ = pd.factorize(names)  # the same text again is a repeat
    meta = write_encoding(
        folder,
        presentations[~names.duplicated()],
        y[rows][:, columns],
        pd.DataFrame({"stimulus": stimulus}),
        units[columns],
        left_out=left_out,
        **about,
    )
    print_sizes(folder, meta)


def main(config):
    folder = folder_of(config, __file__)
    published = SETS[config.set]
    options = {
        "context": published.context if config.context < 0 else config.context,
        "missing": config.missing,
    }
    todo = {}
    for experiment in published.ceilings or [""]:
        name = f"{config.set}-{experiment}" if experiment else config.set
        if not already_made(folder / name, options, complete_encoding, config.overwrite):
            todo[experiment] = folder / name
    if not todo:
        return
    path = Path(config.root)
    if not path.is_file():
        path = find(config, folder, published.file, published.sha1)
    if path is None:
        cure = "give root= the file or its folder; without root= it is fetched"
        raise InputError(f"{published.file} is missing: {cure}")
    sha1 = file_hash(path, "sha1")
    if sha1 != published.sha1:
        print(f"{path} is not the published version of {published.file} (by its sha1)", flush=True)
    assembly = read_assembly(path)
    about = {
        "modality": published.modality,
        "species": "human",
        "source": f"Brain-Score {path.name}",
        "synthetic": False,
        "file_sha1": sha1,
        "published": sha1 == published.sha1,
        "options": options,
    }
    for experiment, target in todo.items():
        make(config, target, experiment, assembly, about)


if __name__ == "__main__":
    main(configure(Config))
