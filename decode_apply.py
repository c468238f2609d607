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

from configurator import InputError, Run, key_seed
from data import write_aside
from data.montage import Montage
from data.recording import Recording, read_set
from decode import (
    Config,
    Decoder,
    Fold,
    Windows,
    circular,
    p_value,
    predict,
    unit,
    with_intervals,
    word_auc,
)
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
    if any(state["config"] != states[0]["config"] for state in states):
        raise InputError(f"apply={folder}: models/ holds decoders of runs with different options")
    return states


def same_electrodes(path, state, reference):
    """(Montage, events) of a new recording or set, with the electrodes of a saved decoder."""
    folders = [Path(path)]
    if not (folders[0] / "signal.f32").exists():
        folders = [folders[0] / name for name in read_set(path)["recordings"]]
    recordings = {folder.name: Recording(folder) for folder in folders}
    electrodes = {}
    for name in state["electrodes"]:
        person, _, electrode = name.partition(" ")
        electrodes.setdefault(person, []).append(electrode)
    chosen = []
    for person, names in electrodes.items():
        recording = recordings.get(person)
        if recording is None and len(recordings) == len(electrodes) == 1:
            recording = next(iter(recordings.values()))  # another recording of theirs
        missing = sorted(set(names) - set(recording.names if recording else []))
        if missing:
            raise InputError(
                f"recording={path} lacks electrodes of {person} that the decoders read: "
                f"{', '.join(missing[:5])}"
            )
        chosen.append((recording, np.array([recording.names.index(name) for name in names])))
    montage = Montage(chosen, reference)
    if montage.gaps:
        raise InputError(f"recording={path}: samples are missing (NaN) in {montage.gaps[0]}")
    if montage.sfreq != state["sfreq"]:
        raise InputError(
            f"recording={path} has {montage.sfreq:g} Hz, the decoders read {state['sfreq']:g} Hz"
        )
    return montage, chosen[0][0].events


def scores_of(out, state):
    """DataFrame (events, names) of what a saved decoder's outputs (events, members, D) say.

    The cosine of outputs and a word's vector, probabilities of classes, or the number itself.
    """
    if state["target"] == "vectors":
        scores = unit(out).mean(axis=1) @ state["vectors"].numpy().T
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
        X = torch.as_tensor(windows.at(rows[:, inside], [state["lag"]])[0])
        shape, output_dim = X.shape[1:], state["output_dim"]
        decoder = Decoder(state["spec"], config.model_params, shape, output_dim, state["target"])
        decoder.load_state_dict(state["weights"])
        tables.append(scores_of(predict(decoder, X), state))
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
    table = events[[name for name in ("onset", "word", trained.word) if name in events]]
    if len(scores.columns) > 1:
        table = table.assign(best=scores.columns[scores.to_numpy().argmax(axis=1)])
    table = pd.concat([table, scores.add_prefix("score ")], axis=1)
    write_aside(run.out / "scores.csv", table.to_csv(index=False))
    run.print(
        f"{config.recording}: {len(events):,} events, {n_events - len(events)} with a window "
        f"outside left out; {len(states)} decoders, of "
        f"{', '.join(format(state['lag'], 'g') for state in states)} ms; {len(scores.columns):,} "
        f"scores an event in {run.out / 'scores.csv'}"
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
        each = word_auc(log_p[kept], y[kept], circular(shifts, int(kept.sum()), 5))
        return {"auc": np.nanmean(each, axis=1)}

    shifts = np.random.default_rng(key_seed(config.seed, "shift")).random(config.n_shifts)
    score = with_intervals(measure, Fold(0, y, y, np.arange(len(y)), shifts), len(y))["auc"]
    p, chance = float(p_value(score.value, score.null)), score.null.mean()
    keys = {"data": config.recording, "model": config.apply, "metric": "auc", "p": p}
    run.result(score.value, chance, score.low, score.high, score.n, **keys)
    run.merge()
    run.print(
        f"word ROC-AUC {score.value:.3f} [{score.low:.3f}, {score.high:.3f}], shifted words "
        f"{chance:.3f}, p = {p:.4f}, n = {score.n:,}"
    )
