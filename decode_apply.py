"""Saved decoders on a new recording: words with their scores for every event.

    python decode.py apply=out/decode recording=PATH

PATH is a prepared recording (data/recording.py) with the electrodes that the decoders read, or a
set with the same people. Of each fold, the decoder of the lag that its validation words chose is
taken; scores are means over folds. decode.py, or a copy of it, calls this file with its own code.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import special

from configurator import InputError, Run
from data import write_aside
from data.montage import Montage
from data.recording import Recording, read_set
from model import load_checkpoint


def load_decoders(folder):
    """Checkpoints: the saved decoder of each fold at the lag that its validation words chose."""
    best = {}
    for path in sorted((Path(folder) / "models").glob("lag_*_fold_*.pt")):
        state = load_checkpoint(path)
        fold = path.stem.rpartition("_")[2]
        if fold not in best or state["val"] > best[fold]["val"]:
            best[fold] = state
    states = list(best.values())
    if not states:
        raise InputError(
            f"apply={folder} holds no decoder in models/: give the out folder of a finished run "
            "with save_models=True"
        )
    for state in states:
        if state["config"] != states[0]["config"]:
            raise InputError(f"apply={folder}: models/ holds decoders of runs with other options")
    return states


def same_electrodes(path, state, reference):
    """(Montage, events) of a new recording or set, with the electrodes of a saved decoder."""
    folders = [Path(path)]
    if not (folders[0] / "signal.f32").exists():
        folders = [folders[0] / name for name in read_set(path)["recordings"]]
    electrodes = pd.Series(state["electrodes"]).str.split(" ", n=1, expand=True)
    people = electrodes.groupby(0, sort=False)[1]
    chosen = []
    for person, names in people:
        by_name = [folder for folder in folders if folder.name == person]
        if len(folders) == len(people) == 1:
            by_name = folders  # another recording of theirs
        recording = Recording(by_name[0]) if by_name else None
        there = pd.Index(recording.names if by_name else [])
        missing = names[~names.isin(there)]
        if len(missing):
            raise InputError(
                f"recording={path} lacks electrodes of {person} that the decoders read: "
                f"{', '.join(missing[:5])}"
            )
        chosen.append((recording, there.get_indexer(names)))
    montage = Montage(chosen, reference)
    if montage.gaps or montage.sfreq != state["sfreq"]:
        raise InputError(
            f"recording={path} has {montage.sfreq:g} Hz and {len(montage.gaps)} electrodes with "
            f"gaps or constant: the decoders read {state['sfreq']:g} Hz, and every sample"
        )
    return montage, chosen[0][0].events


def scores_of(decode, state, X, model_params):
    """DataFrame (events, names) of what a saved decoder says of windows X; decode: the script.

    The cosine of outputs and a word's vector, probabilities of classes, or the number itself.
    """
    shape, output_dim = X.shape[1:], state["output_dim"]
    decoder = decode.Decoder(state["spec"], model_params, shape, output_dim, state["target"])
    decoder.load_state_dict(state["weights"])
    out = decode.predict(decoder, X)  # (events, members, D)
    if state["target"] == "vectors":
        scores = decode.unit(out).mean(axis=1) @ state["vectors"].numpy().T
    elif state["target"] == "classes":
        scores = special.softmax(out.mean(axis=1), axis=1)
    else:
        scores = out.mean(axis=1) * state["scale"] + state["pca"]["mean"].numpy()
    return pd.DataFrame(scores, columns=state["names"])


def apply_decoders(config):
    """Write scores.csv: an event a row, a word a column."""
    decode = sys.modules[type(config).__module__]
    Config = type(config)
    states = load_decoders(config.apply)
    trained = Config(**states[0]["config"])
    trained.device = config.device
    if config.out_dir == Config.out_dir:
        config.out_dir = f"{config.apply}/applied"
    run = Run(config)
    montage, events = same_electrodes(config.recording, states[0], trained.reference)
    windows = decode.make_windows(trained, montage, run.out.parent / "cache")
    rows = montage.rows(events.onset.to_numpy())
    inside = np.ones(len(events), bool)
    for state in states:
        inside &= montage.inside(windows.first(rows, state["lag"]), windows.width)
    if not inside.any():
        raise InputError(f"recording={config.recording}: no event has its window in it")
    events = events[inside].reset_index(drop=True)
    tables = []
    for state in states:
        X = torch.as_tensor(windows.at(rows[:, inside], state["lag"]))
        tables.append(scores_of(decode, state, X, trained.model_params))
    scores = pd.concat(tables).groupby(level=0).mean()
    table = events.filter(list(dict.fromkeys(["onset", "word", trained.word])))
    if len(scores.columns) > 1:
        table = table.assign(best=scores.columns[scores.to_numpy().argmax(axis=1)])
    table = pd.concat([table, scores.add_prefix("score ")], axis=1)
    write_aside(run.out / "scores.csv", table.to_csv(index=False))
    lags = ", ".join(f"{state['lag']:g}" for state in states)
    run.print(
        f"{config.recording}: {len(events):,} events, {(~inside).sum()} with a window outside or "
        f"BAD left out; {len(states)} decoders, of {lags} ms; {run.out / 'scores.csv'}"
    )
    if set(montage.checksums()) & set(states[0]["recordings"]):
        run.print("the decoders were trained on this very recording: its scores are no test")
    run.close()
