"""Apply saved decoders to a new recording: word scores for each event.

    python decode.py apply=out/decode recording=PATH

PATH is a prepared recording (data/recording.py) with the decoders' electrodes, or a set with the
same people. Each fold contributes its decoder at the lag that its validation words chose; scores
are means over folds. decode.py, or a copy of it, calls this file.
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
    """Load each fold's decoder at the lag that its validation words chose."""
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
    return states


def same_electrodes(path, state, reference):
    """Return the Montage of a new recording or set with a decoder's electrodes, and its events."""
    folders = [Path(path)]
    if not (folders[0] / "signal.f32").exists():
        folders = [folders[0] / name for name in read_set(path)["recordings"]]
    electrodes = pd.Series(state["electrodes"]).str.split(" ", n=1, expand=True)
    people = electrodes.groupby(0, sort=False)[1]
    by_name = {folder.name: folder for folder in folders}
    chosen = []
    for person, names in people:
        if len(folders) == len(people) == 1:
            by_name = {person: folders[0]}  # another recording of the only person
        if person not in by_name:
            raise InputError(
                f"recording={path} has no {person}, whose electrodes the decoders read"
            )
        recording = Recording(by_name[person])
        missing = names[~names.isin(np.array(recording.names)[recording.good])]
        if len(missing):
            raise InputError(
                f"recording={path} lacks good electrodes of {person} that the decoders read: "
                f"{', '.join(missing[:5])}"
            )
        chosen.append((recording, pd.Index(recording.names).get_indexer(names)))
    montage = Montage(chosen, reference)
    if montage.gaps or montage.sfreq != state["sfreq"]:
        raise InputError(
            f"recording={path} has {montage.sfreq:g} Hz and {len(montage.gaps)} electrodes with "
            f"gaps or constant: the decoders need {state['sfreq']:g} Hz and every sample"
        )
    return montage, chosen[0][0].events


def scores_of(decode, state, X, model_params):
    """Return a saved decoder's scores for windows X as a DataFrame (events, names): cosines with
    word vectors, class probabilities, or the number itself. decode: the module decode.py."""
    shape, output_dim = X.shape[1:], state["output_dim"]
    decoder = decode.Decoder(state["spec"], model_params, shape, output_dim, state["target"])
    decoder.load_state_dict(state["weights"])
    z = ((X - decoder.mean) / decoder.scale).transpose(0, 1).flatten(1)  # (channels, ...)
    sd, size = z.std(dim=1).median(), z.square().mean(dim=1).median().sqrt()
    if sd < 0.1 or size > 10:
        raise InputError(
            f"recording=: its z-scores have SD {sd:.2g} and root mean square {size:.2g}, not about "
            "1 as in training: prepare it in the same unit, with the same kind of signal"
        )
    out = decode.predict(decoder, X)  # (events, members, D)
    if state["target"] == "vectors":
        scores = decode.unit(out).mean(axis=1) @ state["vectors"].numpy().T
    elif state["target"] == "classes":
        scores = special.softmax(out.mean(axis=1), axis=1)
    else:
        scores = out.mean(axis=1) * state["scale"] + state["pca"]["mean"].numpy()
    return pd.DataFrame(scores, columns=state["names"])


def apply_decoders(config):
    """Write scores.csv: a row per event, a column per word."""
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
        raise InputError(f"recording={config.recording}: no event has its window inside it")
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
        f"{config.recording}: {len(events):,} events, {(~inside).sum()} left out with a window "
        f"outside or in a BAD segment; {len(states)} decoders, at {lags} ms; "
        f"{run.out / 'scores.csv'}"
    )
    if set(montage.checksums()) & set(states[0]["recordings"]):
        run.print("the decoders were trained on this very recording: these scores are no test")
    run.close()
