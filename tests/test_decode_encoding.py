"""decode_encoding.py finds the planted electrodes and lag, and nothing where nothing is."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from test_decode import PLANTED, hurt_copy, of_one_word

import decode
import decode_encoding
from configurator import InputError, check
from decode_encoding import Config


def encoded(dataset, out, **options):
    """electrodes.csv of a whole run in this process, by electrode."""
    options = {"lags": [-300.0, 300.0], "n_folds": 3, "pca": 8, "device": "cpu", **options}
    config = Config(dataset=str(dataset), out_dir=str(out), **options)
    check(config)
    decode_encoding.main(config)
    return pd.read_csv(out / "electrodes.csv").set_index("electrode")


def test_it_finds_lag_and_electrodes_and_splits_the_spaces(podcast, tmp_path, capsys):
    spaces = {"embedding": ["gpt2-xl", "arbitrary"], "n_shifts": 200}
    electrodes = encoded(podcast, tmp_path, lags=[-300.0, 600.0, 0.0, 300.0], **spaces)
    table = pd.read_csv(tmp_path / "encoding.csv")
    significant = table[table.p_max < 0.05]
    assert set(significant.electrode) == PLANTED and set(significant.lag) == {300.0}
    assert set(electrodes.index[electrodes.p_max < 0.05]) == PLANTED
    assert set(electrodes.index[electrodes.q < 0.05]) >= PLANTED
    assert (electrodes.lag[list(PLANTED)] == 300).all()
    best = table[(table.lag == 300.0) & table.electrode.isin(PLANTED)]
    assert (best.low < best.r).all() and (best.r < best.high).all()
    assert np.allclose(best["r_gpt2-xl"] + best.r_arbitrary, best.r, atol=0.02)
    assert (best["r_gpt2-xl"] > best.r_arbitrary).all()
    results = pd.read_csv(tmp_path / "results.csv")
    assert set(results.electrode) == set(electrodes.index) and results.p.notna().all()
    assert {"encoding.png", "electrodes.png"} <= {path.name for path in tmp_path.iterdir()}
    assert "5 of 14 electrodes follow the embeddings" in capsys.readouterr().out


def test_a_gap_changes_no_other_electrode_and_runs_go_on(podcast, tmp_path, capsys, monkeypatch):
    whole = encoded(podcast, tmp_path / "whole", lags=[300.0], n_shifts=300)
    assert "too few" not in capsys.readouterr().out
    hurt = hurt_copy(podcast, tmp_path / "set")
    hurt = encoded(hurt, tmp_path / "hurt", lags=[300.0], n_shifts=300)
    assert "(NaN): sub-01 LGA4, sub-01 LGB4" in capsys.readouterr().out
    assert set(whole.index) - set(hurt.index) == {"sub-01 LGA4", "sub-01 LGB4"}
    assert np.allclose(hurt.score, whole.loc[hurt.index, "score"], atol=1e-5)
    assert set(hurt.index[hurt.q < 0.05]) == PLANTED
    first = encoded(podcast, tmp_path / "few", lags=[300.0], n_shifts=15)
    assert "n_shifts=15 is too few" in capsys.readouterr().out
    next(tmp_path.glob("few/jobs/*/*.npz")).write_bytes(b"")  # as after a full disk
    again = encoded(podcast, tmp_path / "few", lags=[300.0], n_shifts=15)
    pd.testing.assert_frame_equal(again, first)
    assert "2 folds of an earlier run are reused" in capsys.readouterr().out
    monkeypatch.setattr(decode_encoding, "encode_fold", None)
    again = encoded(podcast, tmp_path / "few", lags=[300.0], n_shifts=15)
    pd.testing.assert_frame_equal(again, first)


def test_correlations_of_shifted_words_are_numpys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 600)), rng.normal(size=(40, 600))
    b[:, 0] = 1  # an electrode that never varies
    orders = decode.circular(np.array([0.3, 0.8]), 40, 2)
    r = decode_encoding.correlations(a, b, orders)
    assert (r[:, 0] == 0).all()
    for p, order in enumerate(orders):
        assert np.isclose(r[p, 599], np.corrcoef(a[:, 599], b[order, 599])[0, 1], atol=1e-6)


def test_the_columns_of_the_heat_map_lie_around_their_lags(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "pcolormesh", lambda axis, edges, *rest, **style: drawn.append(edges))
    monkeypatch.setattr(Figure, "colorbar", lambda *args, **options: None)
    for lags in ([-300.0, 0.0, 100.0, 700.0], [300.0]):
        r = np.zeros((len(lags), 2))
        decode_encoding.plot_encoding(tmp_path / "a.png", lags, r, 0.1, np.nan, "")
        assert (drawn[-1][:-1] < lags).all() and (lags < drawn[-1][1:]).all()
    assert decode.all_lags(Config(lags=[300.0, -300.0, 300.0])) == [-300.0, 300.0]


REFUSED = [
    ({"dataset": "same", "embedding": ["arbitrary"]}, "are the same word, or have the same target"),
    ({"embedding": ["nosuch"]}, "neither lm, static"),
    ({"window": 0.0}, "window=0.0 s"),
    ({"lag_step": 0.0, "lags": []}, "lag_step"),
]


def test_bad_input_is_refused_in_a_sentence(podcast, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_one_word(podcast, tmp_path / "same")
    for options, words in REFUSED:
        with pytest.raises(InputError, match=words):
            encoded(**{"dataset": podcast, "out": tmp_path / "run", **options})
