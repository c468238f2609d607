"""Saved decoders on a new recording: words with their scores for every event.

    python decode.py apply=out/decode recording=PATH

PATH is a prepared recording (data/recording.py) with the electrodes that the decoders read, or a
set with the same people. Of each fold, the decoder of the lag that its validation words chose is
taken; scores are means over folds. decode.py calls this file; copy both to change it.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import scipy.special
import torch

import decode
from configurator import InputError, Run, key_seed
from data import write_aside
from data.montage import Montage
from data.recording import Recording, read_set
from decode import Config, Decoder, Windows
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
            f"missing samples: the decoders read {state['sfreq']:g} Hz, and every sample"
        )
    return montage, chosen[0][0].events


def scores_of(out, state):
    """DataFrame (events, names) of what a saved decoder's outputs (events, members, D) say.

    The cosine of outputs and a word's vector, probabilities of classes, or the number itself.
    """
    if state["target"] == "vectors":
        scores = decode.unit(out).mean(axis=1) @ state["vectors"].numpy().T
    elif state["target"] == "classes":
        scores = scipy.special.softmax(out.mean(axis=1), axis=1)
    else:
        scores = out.mean(axis=1) * state["scale"] + state["pca"]["mean"].numpy()
    return pd.DataFrame(scores, columns=state["names"])


def decode_events(states, montage, events, config, cache):
    """(events whose windows are recorded, DataFrame (events, names) of scores)."""
    windows = Windows(montage, config, cache)
    rows = montage.rows(events.onset.to_numpy())
    inside = np.ones(len(events), bool)
    for state in states:
        inside &= montage.inside(windows.first(rows, state["lag"]), windows.width)
    if not inside.any():
        raise InputError("no event has its window in the recording")
    tables = []
    for state in states:
        X = torch.as_tensor(windows.at(rows[:, inside], state["lag"]))
        shape, output_dim = X.shape[1:], state["output_dim"]
        decoder = Decoder(state["spec"], config.model_params, shape, output_dim, state["target"])
        decoder.load_state_dict(state["weights"])
        tables.append(scores_of(decode.predict(decoder, X), state))
    scores = pd.concat(tables).groupby(level=0).mean()
    return events[inside].reset_index(drop=True), scores


def apply_decoders(config):
    """Write scores.csv, and score them where the words of a new recording are known."""
    states = load_decoders(config.apply)
    trained = Config(**states[0]["config"])
    if config.out_dir == Config.out_dir:
        config.out_dir = f"{config.apply}/applied"
    run = Run(config)
    montage, events = same_electrodes(config.recording, states[0], trained.reference)
    n_events = len(events)
    events, scores = decode_events(states, montage, events, trained, run.out.parent / "cache")
    table = events.filter(list(dict.fromkeys(["onset", "word", trained.word])))
    if len(scores.columns) > 1:
        table = table.assign(best=scores.columns[scores.to_numpy().argmax(axis=1)])
    table = pd.concat([table, scores.add_prefix("score ")], axis=1)
    write_aside(run.out / "scores.csv", table.to_csv(index=False))
    lags = ", ".join(f"{state['lag']:g}" for state in states)
    run.print(
        f"{config.recording}: {len(events):,} events, {n_events - len(events)} with a window "
        f"outside left out; {len(states)} decoders, of {lags} ms; {len(scores.columns):,} scores "
        f"an event in {run.out / 'scores.csv'}"
    )
    if set(montage.checksums()) & set(states[0]["recordings"]):
        run.print("the decoders were trained on this very recording: its scores are no test")
    elif trained.word in events and states[0]["target"] == "vectors":
        score_words(run, config, scores, events[trained.word].to_numpy(str))
    run.close()


def score_words(run, config, scores, labels):
    """Word ROC-AUC on a new recording whose words are known, as a row of results.csv."""
    known = np.isin(labels, scores.columns)
    y = scores.columns.get_indexer(labels[known])
    log_p = scipy.special.log_softmax(scores.to_numpy()[known], axis=1)

    def measure(kept, shifts):
        orders = decode.circular(shifts, int(kept.sum()), 5)
        return {"auc": np.nanmean(decode.word_auc(log_p[kept], y[kept], orders), axis=1)}

    shifts = np.random.default_rng(key_seed(config.seed, "shift")).random(config.n_shifts)
    fold = decode.Fold(0, y, y, np.arange(len(y)), shifts)
    scores = decode.with_intervals(measure, fold, len(y))
    row = decode.intervals_of(scores).loc["auc"]
    p = float(decode.p_value(scores.score, decode.null_of(scores).T.to_numpy())[0])
    keys = {"data": config.recording, "model": config.apply, "metric": "auc", "p": p}
    run.result(row.score, row.chance, row.low, row.high, len(y), **keys)
    run.merge()
    run.print(
        f"word ROC-AUC {row.score:.3f} [{row.low:.3f}, {row.high:.3f}], shifted words "
        f"{row.chance:.3f}, p = {p:.4f}, n = {len(y):,}"
    )
