"""Brains that read and listen, as Brain-Score publishes them (brain-score.org/language), as stimuli with responses for warp.py.

    python data/brainscore/prepare.py set=Tuckute2024                   # fetched once: 1,000 sentences, the mean language network of 5 people
    python data/brainscore/prepare.py set=Pereira2018                   # 243 and 384 sentences of short passages, 13,553 voxels of 10 people
    python data/brainscore/prepare.py set=Fedorenko2016                 # 52 sentences word by word, 97 electrodes of 5 people
    python data/brainscore/prepare.py set=Blank2014                     # 8 stories in pieces of 2 s, 60 regions of 5 people
    python data/brainscore/prepare.py set=Pereira2018 root=path/to/assy_Pereira2018_language.nc     # from a local copy: the file or its folder
    python warp.py dataset=brainscore/Tuckute2024 models=gpt2 layers=6

A dataset is data/brainscore/SET, of Pereira2018 one for each experiment (SET-243sentences, SET-384sentences): not everybody was in both. What belongs
together (passage, sentence, story) is one group, which no split tears apart. A stimulus is what a reader has before him: the piece itself, with
what went before it in its group.
Tuckute et al. 2024, Pereira et al. 2018, Fedorenko et al. 2016, Blank et al. 2014; Schrimpf et al. 2021 (the benchmarks, their ceilings).
"""
import os, sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data.assembly import fetch, read_assembly, responses, sha1_of, take_part, whole
from data.stimuli import complete_encoding, read_encoding_meta, write_encoding

EMBEDDED = False  # must be downloaded: nobody starts this behind the user's back
HERE = Path(os.path.relpath(Path(__file__).resolve().parent))


class Published(NamedTuple):
    """One published set: its files and what they call things."""
    file: str               # the assembly, and the sha1 that Brain-Score's registry has for it
    sha1: str
    modality: str
    subject: tuple          # coordinates of a unit, the first that is there
    roi: tuple
    group: str              # coordinate of a presentation, "": every stimulus its own
    order: tuple            # coordinates that sort a group, (): as in the file
    context: int            # pieces of its group before a stimulus that are read with it
    parts: dict = {}        # {experiment: (file of ceilings, its sha1)}


SETS = {
    "Tuckute2024": Published("assy_Tuckute2024_language.nc", "5c8fc7f3e24cc1af5f5296459377b638b6492641", "fMRI", ("subject_UID",), ("roi",), "", (), 0),
    "Pereira2018": Published("assy_Pereira2018_language.nc", "f8434b4022f5b2c862f0ff2854d5b3f5f2a7fb96", "fMRI", ("subject",), ("roi", "region", "atlas"),
                             "passage_label", (), 100, {
        "243sentences": ("ceiling_raw_Pereira2018_243sentences-linear.nc", "525a6ac8c14ad826c63fdd71faeefb8ba542d5ac"),
        "384sentences": ("ceiling_raw_Pereira2018_384sentences-linear.nc", "ce2044a7713426870a44131a99bfc63d8843dae0")}),
    "Fedorenko2016": Published("assy_Fedorenko2016_language.nc", "2966b6d78e972a72068aa6907377483f427e8d9a", "ECoG", ("subject_UID",), (),
                               "sentence_id", ("word_num",), 100),
    "Blank2014": Published("assy_Blank2014_fROI.nc", "af1e868821b897cb1684e4c8dcd33977121ef552", "fMRI", ("subject_id",), ("fROI_area",),
                           "story", ("sentence_number_in_story", "part_number_in_sentence"), 20),
}


@dataclass
class Config:
    set: Literal["Tuckute2024", "Pereira2018", "Fedorenko2016", "Blank2014"] = "Tuckute2024"  # which
    context: int = -1                # pieces of the group before a stimulus that are read with it; -1: as the set is read (see readme.md), 0: none
    missing: Literal["units", "presentations"] = "units"  # what is left out where a response is missing
    ceilings: bool = True            # take the published ones where there are any (Pereira2018)
    # where from and where to
    root: str = ""                   # local copy, file or folder; "": fetched into files/ in out_dir
    url: str = "https://brainscore-storage.s3.amazonaws.com/brainscore-language"  # where to fetch from
    out_dir: str = ""                # "": this folder
    overwrite: bool = False          # make it again although it is there

    def check(self):
        if self.context < -1:
            raise ValueError(f"context={self.context}: give a number of pieces, 0 for none, or -1 for the set's own")


def find(config, folder, name, sha1, must=True):
    """Path of a published file: in root, or fetched. None where it need not be there and is not."""
    if config.root:
        root = Path(config.root)
        if not root.exists():
            raise FileNotFoundError(f"root={config.root} does not exist: give {name}, or the folder that holds it")
        path = root if must and root.is_file() else (root if root.is_dir() else root.parent) / name
        if not path.is_file():
            if must:
                raise FileNotFoundError(f"{root} has no {name}: give root= the file or its folder, or leave it out to fetch it")
            return None
        return path
    path = folder / "files" / name
    if not path.is_file() or sha1_of(path) != sha1:
        try:
            fetch(f"{config.url}/{name}", path, sha1)
        except FileNotFoundError as e:
            if must:
                raise
            print(f"without ceilings: {e}", flush=True)
            return None
    return path


def in_context(pieces, group, order, context):
    """Texts: each piece after at most `context` pieces before it in its group. order: (n,) places within the group."""
    texts = [""] * len(pieces)
    for rows in pd.Series(range(len(pieces))).groupby(np.asarray(group, dtype=str)).groups.values():
        rows = np.asarray(rows)[np.argsort(np.asarray(order)[rows], kind="stable")]
        for i, row in enumerate(rows):
            texts[row] = " ".join(" ".join(pieces[r] for r in rows[max(0, i - context):i + 1]).split())  # some pieces bring their own spaces
    return texts


def ceilings_of(path, unit_ids):
    """(V,) R² that the best model could reach, from Brain-Score's ceilings: Pearson's r with a brain of infinitely many other people, one a unit."""
    assembly = read_assembly(path)
    if assembly.dims != ["neuroid"]:
        raise ValueError(f"{path} has the dimensions {', '.join(assembly.dims)} where one ceiling for each neuroid was expected: "
                         "give ceilings=False to do without")
    r = pd.Series(assembly.values, index=assembly.column("neuroid", "neuroid_id").astype(str))
    r = r[~r.index.duplicated()].reindex(unit_ids).to_numpy(float)
    return np.clip(r, 0, 1) ** 2


def make(config, folder, name, part, published, assembly, sha1):
    """Write one dataset from an assembly, or from one experiment of it."""
    y, presentations, units = responses(assembly)
    dim = next(d for d in assembly.dims if d not in ("neuroid", "time_bin"))
    pieces = assembly.column(dim, "stimulus", "sentence").astype(str)
    rows = np.ones(len(y), bool)
    if part:
        rows = assembly.column(dim, "experiment").astype(str) == part
        if not rows.any():
            raise ValueError(f"{assembly.path} has no experiment {part}, only {', '.join(sorted(set(map(str, presentations['experiment']))))}")
    group = assembly.column(dim, published.group).astype(str) if published.group else np.arange(len(y)).astype(str)
    keys = [assembly.column(dim, key) for key in reversed(published.order)]
    order = np.argsort(np.lexsort(keys)) if keys else np.arange(len(y))
    units["neuroid_id"] = assembly.column("neuroid", "neuroid_id").astype(str)
    units["roi"] = next((units[c].astype(str) for c in published.roi if c in units), "language")
    units["subject"] = assembly.column("neuroid", *published.subject).astype(str)

    context = published.context if config.context < 0 else config.context
    texts = np.array(in_context(pieces[rows], group[rows], order[rows], context), dtype=object)
    y, presentations, pieces, group = y[rows], presentations[rows].reset_index(drop=True), pieces[rows], group[rows]
    there = take_part(y)
    if not there.any():
        raise ValueError(f"{assembly.path}: there is not one response in {name}")
    kept_rows, whole_units = whole(y[:, there], config.missing, f"{assembly.path}, {name}")
    kept = np.flatnonzero(there)[whole_units]
    units = units.iloc[kept].reset_index(drop=True)
    said = [f"{(~there).sum():,} units took no part"] * bool((~there).any()) + [f"{(~whole_units).sum():,} units with gaps left out"] * \
        bool((~whole_units).any()) + [f"{(~kept_rows).sum():,} presentations with gaps left out"] * bool((~kept_rows).any())

    if part and config.ceilings and (path := find(config, folder, *published.parts[part], must=False)):
        units["ceiling"] = ceilings_of(path, units["neuroid_id"])
        known = units["ceiling"].notna().to_numpy()
        if not known.any():
            raise ValueError(f"{path} has the ceilings of other units: none of {len(units)} neuroid_ids of {assembly.path} is in it")
        if not known.all():  # published ceilings are a fit, which failed for some
            said.append(f"{(~known).sum():,} units without a ceiling left out")
            units, kept = units[known].reset_index(drop=True), kept[known]

    ids = presentations["stimulus_id"].astype(str) if "stimulus_id" in presentations else pd.Series(range(len(presentations))).astype(str)
    stimulus = pd.factorize(ids[kept_rows] + "\t" + texts[kept_rows])[0]  # a stimulus that comes again is a repeat
    first = np.flatnonzero(kept_rows)[np.unique(stimulus, return_index=True)[1]]
    stimuli = pd.DataFrame({"text": texts[first], "group": group[first], "split": "", "piece": pieces[first]})
    extra = presentations.iloc[first].reset_index(drop=True)
    stimuli = stimuli.join(extra[[c for c in extra if c not in (*stimuli, "stimulus", "file")]])
    meta = write_encoding(folder / name, stimuli, y[kept_rows][:, kept], pd.DataFrame({"stimulus": stimulus}), units, modality=published.modality,
                          species="human", source=f"Brain-Score {assembly.path.name}", synthetic=False, file_sha1=sha1, published=sha1 == published.sha1,
                          left_out=said, options=options(config, published))
    n = meta["sizes"]
    print(f"{folder / name}: {n['stimuli']:,} stimuli in {stimuli.group.nunique():,} groups, {n['units']:,} units of {units.subject.nunique()} subjects"
          + "".join(f"; {what}" for what in said) + (f"; median ceiling r {units.ceiling.median() ** 0.5:.3f}" if "ceiling" in units else ""))


def options(config, published):
    return {"context": published.context if config.context < 0 else config.context, "missing": config.missing, "ceilings": config.ceilings}


def main(config):
    folder, published = Path(config.out_dir) if config.out_dir else HERE, SETS[config.set]
    names = {f"{config.set}-{part}" if part else config.set: part for part in published.parts or [""]}
    if not config.overwrite:
        for name in [name for name in names if complete_encoding(folder / name)]:
            if (made := read_encoding_meta(folder / name).get("options")) != options(config, published):
                raise ValueError(f"{folder / name} was made with {made}: give overwrite=True to make it again, or another out_dir")
            print(f"{folder / name}: there already (overwrite=True makes it again)")
            del names[name]
    if not names:
        return
    path = find(config, folder, published.file, published.sha1)
    if (sha1 := sha1_of(path)) != published.sha1:
        print(f"{path} is not the published version of {published.file} (sha1 {sha1}, published {published.sha1})", flush=True)
    assembly = read_assembly(path)
    for name, part in names.items():
        make(config, folder, name, part, published, assembly, sha1)


if __name__ == "__main__":
    main(configure(Config))
