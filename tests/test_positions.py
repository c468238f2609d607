"""positions.py and init_pos.py against naive oracles: textbook loops, full recomputation, one pair at a time."""
import subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import positions
from data.tokens import character_state, write_dataset
from positions import Sheet, closeness, correlations, moran, sheet_side, spatial_loss, swap_gain, swap_gains, swap_sheet, swap_window, window_cells

ROOT = Path(__file__).resolve().parents[1]
INF = float("inf")


def textbook_loss(x, units, near, kind, accum):
    """One window after the other, one triangle, in float64."""
    lower = np.tril_indices(len(near), -1)
    losses = []
    for window in units:
        r, d = np.corrcoef(np.asarray(x, np.float64)[:, window].T)[lower], near[lower]
        losses.append(np.abs(r - d).mean() if kind == "absolute" else (1 - np.corrcoef(r, d)[0, 1]) / 2)
    return max(losses) if accum == "maximum" else np.mean(losses)


def smooth_responses(side, tokens=600, seed=0, noise=0.3):
    """x (tokens, side²) of units whose responses vary smoothly over the sheet: column c is the unit that belongs in cell c."""
    rng = np.random.default_rng(seed)
    at = np.stack(np.divmod(np.arange(side * side), side), 1)
    kernel = np.exp(-np.square(at[:, None] - at).sum(-1) / (2 * (side / 5) ** 2))
    x = rng.standard_normal((tokens, side * side)) @ kernel
    return x / x.std() + noise * rng.standard_normal(x.shape)


def is_permutation(row):
    return sorted(row.tolist()) == list(range(len(row)))


# ---- the sheet

def test_windows_by_radius_and_norm():
    assert window_cells(28, 5).shape == (400, 81) and window_cells(28, 10).shape == (100, 361)  # the published sizes
    for norm in (1, 2, INF):
        cells = window_cells(9, 3, norm)
        for centre, window in zip([(i, j) for i in range(2, 7) for j in range(2, 7)], cells):
            wanted = [9 * i + j for i in range(9) for j in range(9) if np.linalg.norm(np.subtract((i, j), centre), norm) < 3]
            assert window.tolist() == wanted
        assert all(np.allclose(closeness(window, 9), closeness(cells[0], 9)) for window in cells)  # one constant for all windows
    assert closeness([0, 1, 9 + 1], 9)[0].tolist() == [1, 1 / 2, 1 / (1 + 2 ** 0.5)]


def test_errors_are_sentences():
    with pytest.raises(ValueError, match="n_embd=250 is not a square.*take 225 or 256"):
        sheet_side(250)
    for radius in (1, 0, 9):
        with pytest.raises(ValueError, match=f"radius={radius} leaves no window on a sheet of 16 x 16 units: take 2 to 8"):
            window_cells(16, radius)
    assert len(window_cells(16, 8)) == 4 and len(window_cells(15, 8)) == 1  # the largest radius that the sentence promises
    with pytest.raises(ValueError, match="16 heads of 49"):
        positions.head_mosaic(12, 784)


def test_window_draws_are_keyed_and_without_replacement():
    draw = lambda seed, count: positions.draw_windows(24, 400, count, torch.Generator().manual_seed(seed))
    ids = draw(1, 5)
    assert ids.shape == (24, 5) and torch.equal(ids, draw(1, 5)) and not torch.equal(ids, draw(2, 5))
    assert all(len(set(row)) == 5 for row in ids.tolist()) and len(set(map(tuple, ids.tolist()))) == 24
    assert torch.equal(draw(1, 0), torch.arange(400).repeat(24, 1)) and draw(1, 1000).shape == (24, 400)


def test_layouts():
    rows = positions.random_positions(3, 64, seed=5)
    assert rows.shape == (6, 64) and all(map(is_permutation, rows)) and len({tuple(row) for row in rows}) == 6
    assert (rows == positions.random_positions(3, 64, seed=5)).all() and (rows != positions.random_positions(3, 64, seed=6)).any()
    assert (positions.identity_positions(3, 64) == np.arange(64)).all()
    mosaic = positions.head_mosaic(16, 784)
    assert is_permutation(mosaic)
    patches = mosaic.reshape(4, 7, 4, 7)
    assert all((patches[i, :, j] // 49 == 4 * i + j).all() for i in range(4) for j in range(4))  # each head one square patch
    assert positions.layer_names(2) == ["layer.0.attn", "layer.0.mlp", "layer.1.attn", "layer.1.mlp"]


def test_positions_files(tmp_path):
    rows, path = positions.random_positions(2, 64), str(tmp_path / "new" / "a.npz")
    positions.save_positions(path, rows, scheme="random", seed=0)
    assert (positions.load_positions(path, 2, 64) == rows).all() and [p.name for p in (tmp_path / "new").iterdir()] == ["a.npz"]
    with pytest.raises(ValueError, match="a.npz is for 2 layers x 64 units, the model has 4 layers x 81 units: make one with python init_pos.py"):
        positions.load_positions(path, 4, 81)
    with pytest.raises((OSError, ValueError), match="no positions file .*b.npz: make one"):
        positions.load_positions(str(tmp_path / "b.npz"), 2, 64)
    rows[1, 0] = rows[1, 1]
    positions.save_positions(path, rows)
    with pytest.raises(ValueError, match="does not place every unit once"):
        positions.load_positions(path, 2, 64)
    whole = Path(path).read_bytes()
    for torn in (whole[:len(whole) // 2], b"", b"text"):
        Path(path).write_bytes(torn)
        with pytest.raises(ValueError, match="a.npz is no positions file"):
            positions.load_positions(path, 2, 64)


# ---- spatial loss

@pytest.mark.parametrize("norm", [1, 2, INF])
@pytest.mark.parametrize("count", [2, 0])  # gathered units of few windows; blocks of one Gram matrix for all of them
def test_spatial_loss_is_the_textbook_loop(norm, count):
    x = torch.as_tensor(smooth_responses(8, tokens=120, noise=1), dtype=torch.float32)
    cells = window_cells(8, 3, norm)[slice(count or None)]
    units = positions.random_positions(1, 64)[0][cells]
    near = closeness(cells[0], 8)
    for kind in ("relative", "absolute"):
        for accum in ("mean", "maximum"):
            ours = spatial_loss(x.view(4, 30, 64), torch.as_tensor(units), torch.tensor(near).float(), kind, accum)
            assert abs(ours.item() - textbook_loss(x, units, near, kind, accum)) < 1e-5


def window_of(x, side=6, radius=3):
    cells = window_cells(side, radius)
    return torch.as_tensor(cells), torch.tensor(closeness(cells[0], side), dtype=torch.float32)


@pytest.mark.parametrize("side,radius", [(5, 2), (6, 3), (9, 4), (10, 3)])  # strips of the sheet that fit it, and that do not
@pytest.mark.parametrize("accum", ["mean", "maximum"])
def test_every_window_at_once_is_every_window(side, radius, accum):
    x = torch.as_tensor(smooth_responses(side, tokens=120, noise=1), dtype=torch.float32).requires_grad_()
    unit_at_cell = torch.as_tensor(positions.random_positions(1, side * side, 3)[0])
    cells = window_cells(side, radius)
    one = spatial_loss(x, unit_at_cell[cells], torch.as_tensor(closeness(cells[0], side), dtype=torch.float32), accum=accum)
    whole = spatial_loss(x, unit_at_cell, positions.whole_sheet(side, radius), accum=accum)
    assert torch.allclose(one, whole, atol=1e-6)
    (a,), (b,) = torch.autograd.grad(one, x), torch.autograd.grad(whole, x)
    assert torch.allclose(a, b, atol=1e-5 * a.abs().max())


def test_every_window_in_half_precision():
    x = torch.as_tensor(smooth_responses(9, tokens=200, noise=1), dtype=torch.float32).bfloat16()
    unit_at_cell, sheet = torch.as_tensor(positions.random_positions(1, 81, 3)[0]), positions.whole_sheet(9, 4)
    half, full = x.clone().requires_grad_(), x.float().requires_grad_()
    a, b = spatial_loss(half, unit_at_cell, sheet), spatial_loss(full, unit_at_cell, sheet)
    a.backward(), b.backward()
    assert abs(a - b) < 1e-6 and half.grad.dtype is torch.bfloat16  # the loss is float32, its gradient as fine as the activations
    assert (half.grad.float() - full.grad).norm() < 0.01 * full.grad.norm()


def test_spatial_loss_is_float32_under_autocast():
    x = torch.randn(200, 36)
    units, near = window_of(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert spatial_loss(x, units, near) == spatial_loss(x.clone(), units, near)
        inside = spatial_loss(x, units, near)
    assert inside.dtype is torch.float32 and inside == spatial_loss(x, units, near)


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_no_nan_from_constant_units_or_tiny_batches(kind):
    dead = torch.randn(50, 36)
    dead[:, [0, 7]], dead[:, 14] = 0.1, 0
    shifted = torch.full((50, 36), 1e4) + 1e-3 * torch.randn(50, 36)  # constant up to rounding
    for x in (dead, dead[:1], dead[:2], torch.zeros(50, 36), torch.full((50, 36), 0.1), torch.randn(50, 1).repeat(1, 36), shifted):
        x = x.clone().requires_grad_()
        for units in (window_of(x)[0], window_of(x)[0][:1]):
            loss = spatial_loss(x, units, window_of(x)[1], kind)
            grad, = torch.autograd.grad(loss, x)
            assert loss.isfinite() and grad.isfinite().all()
            assert kind == "absolute" or 0 <= loss <= 1
    r = correlations(dead)
    assert not r[[0, 7, 14]].any() and np.isfinite(r).all()


def test_renaming_units_leaves_the_loss_alone():
    x = torch.randn(100, 36)
    units, near = window_of(x)
    new = torch.randperm(36)  # unit i is called new[i]
    renamed = torch.empty_like(x)
    renamed[:, new] = x
    assert torch.allclose(spatial_loss(x, units, near), spatial_loss(renamed, new[units], near), atol=1e-6)


@pytest.mark.parametrize("count", [1, 4])
def test_gradient_is_that_of_the_loop(count):
    x = torch.randn(40, 36)
    units, near = window_of(x)
    units = units[:count]
    ours, = torch.autograd.grad(spatial_loss(x.requires_grad_(), units, near), x)
    y = x.detach().double().requires_grad_()
    i, j = np.tril_indices(25, -1)
    loop = [(1 - torch.corrcoef(torch.stack([torch.corrcoef(y[:, window].T)[i, j], near.double()[i, j]]))[0, 1]) / 2 for window in units]
    theirs, = torch.autograd.grad(sum(loop) / count, y)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


# ---- Moran's I

def naive_moran(m, queen):
    """Row-standardised weights, a double loop over cells."""
    z, (rows, columns) = m - m.mean(), m.shape
    total = 0
    for i in range(rows):
        for j in range(columns):
            around = [z[k, l] for k in range(rows) for l in range(columns)
                      if (max if queen else lambda *a: sum(a))(abs(k - i), abs(l - j)) == 1]
            total += z[i, j] * np.mean(around)
    return total / np.square(z).sum()


def test_moran():
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((400, 12, 12))
    for neighbours in ("queen", "rook"):
        assert np.allclose(moran(maps[:3], neighbours), [naive_moran(m, neighbours == "queen") for m in maps[:3]])
        scores = moran(maps, neighbours)
        assert abs(scores.mean() + 1 / 143) < 4 * scores.std() / 20  # expected under noise: -1 / (N - 1)
    i, j = np.mgrid[:28, :28]
    assert moran(np.sin(i / 9) + np.cos(j / 9)) > 0.97
    assert moran((-1.0) ** (i + j), "rook") == pytest.approx(-1, abs=1e-12)
    assert np.isnan(moran(np.ones((5, 5))))
    with pytest.raises(ValueError, match="'queen' or 'rook'"):
        moran(maps, "bishop")


# ---- swaps

def test_swap_gain_is_a_full_recompute():
    n, rng = 25, np.random.default_rng(0)
    d = closeness(window_cells(9, 3)[0], 9)
    r = np.corrcoef(rng.standard_normal((n, 60)))
    loss = lambda r: (1 - np.corrcoef(r[lower], d[lower])[0, 1]) / 2
    lower = np.tril_indices(n, -1)
    spread = 2 * np.sqrt(np.square(r[lower] - r[lower].mean()).sum() * np.square(d[lower] - d[lower].mean()).sum())
    r0, d0 = r - np.eye(n), d - np.eye(n)
    gains = swap_gains(r0, d0)
    for a in range(n):
        for b in range(n):
            gain = swap_gain(r0, d0, a, b)
            new = np.arange(n)
            new[[a, b]] = b, a
            assert abs(loss(r) - gain / spread - loss(r[new][:, new])) < 1e-10 and abs(gain - gains[a, b]) < 1e-10


def test_slopes_are_the_gradient_of_the_mean_loss():
    sheet = Sheet(64, 3, dtype=np.float64)
    r = np.corrcoef(np.random.default_rng(0).standard_normal((64, 90))) - np.eye(64)
    A, B = sheet.slopes(r)
    off = torch.as_tensor(1 - np.eye(25))
    leaf = torch.tensor(r, requires_grad=True)
    blocks = leaf[sheet.cells[:, :, None], sheet.cells[:, None]]  # (M, n, n)
    near = torch.as_tensor(sheet.near[np.ix_(sheet.cells[0], sheet.cells[0])])
    var = (blocks.square() * off).sum((1, 2)) - (blocks * off).sum((1, 2)).square() / 600
    loss = (0.5 * (1 - (blocks * near).sum((1, 2)) / (var * near.square().sum()).sqrt())).mean()
    grad, = torch.autograd.grad(loss, leaf)
    assert abs(loss.item() - sheet.losses(r).mean()) < 1e-12
    assert np.abs(A + 2 * r * B - 2 * (1 - np.eye(64)) * grad.numpy()).max() < 1e-12 and grad.abs().max() > 1e-5


@pytest.mark.parametrize("norm", [2, INF])
def test_swaps_find_a_hidden_map(norm):
    hidden = np.random.default_rng(1).permutation(100)
    x = smooth_responses(10)[:, hidden]
    sheet, r, start = Sheet(100, 3, norm), correlations(x), np.arange(100)
    near = torch.tensor(closeness(sheet.cells[0], 10)).float()
    loss = lambda row: spatial_loss(torch.as_tensor(x), torch.as_tensor(row[sheet.cells]), near).item()
    planted = loss(np.argsort(hidden))
    found = {}
    for name, swap in dict(window=lambda: swap_window(r, sheet, start, 200, 50, seed=3), sheet=lambda: swap_sheet(r, sheet),
                           sheet_from_start=lambda: swap_sheet(r, sheet, start)).items():
        row, losses = swap()
        assert is_permutation(row) and (row == swap()[0]).all()  # deterministic
        assert abs(losses[-1] - loss(row)) < 1e-5
        assert name == "sheet" or abs(losses[0] - loss(start)) < 1e-5
        assert name == "window" or all(b < a for a, b in zip(losses, losses[1:]))  # the exact loss falls in every round
        found[name] = losses[-1]
    assert (start == np.arange(100)).all()  # not changed in place
    assert planted < 0.05 and loss(start) > 0.45 and max(found.values()) < 0.25 and found["sheet"] < found["window"]
    row, losses = swap_sheet(r, sheet, start, stop_loss=0.4)
    assert losses[-1] <= 0.4 < losses[-2] and len(swap_sheet(r, sheet, start, rounds=2)[1]) == 3


def test_a_trial_never_raises_its_windows_loss():
    x = smooth_responses(8, noise=1)
    sheet, r = Sheet(64, 3), correlations(x)
    row = positions.random_positions(1, 64)[0]
    for seed in range(30):  # one window, a few trials at a time
        window = np.random.default_rng(seed).permutation(len(sheet.cells))[0]
        new, _ = swap_window(r, sheet, row, 1, 4, seed)
        before, after = (sheet.losses(r[u][:, u])[window] for u in (row, new))
        assert after <= before + 1e-6 and set(new[sheet.cells[window]]) == set(row[sheet.cells[window]])
        row = new
    assert is_permutation(swap_window(r, sheet, row, 100, 2)[0])  # more windows than there are: each at least twice


# ---- init_pos.py

def init_pos(folder, *options):
    command = [sys.executable, str(ROOT / "init_pos.py"), "init_data=text", "n_layer=1", "n_head=2", "n_embd=64", "radius=3", "block_size=32",
               "samples=300", "device=cpu", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_init_pos(tmp_path):
    rng = np.random.default_rng(0)
    write_dataset(tmp_path / "text", {split: [rng.integers(0, 26, 400)] for split in ("train", "val")}, character_state("abcdefghijklmnopqrstuvwxyz"),
                  source="random letters", synthetic=True)
    done = init_pos(tmp_path, "scheme=swap", "name=a")
    assert done.returncode == 0, done.stderr
    assert all(map(is_permutation, positions.load_positions(str(tmp_path / "gpt2-positions/a.npz"), 1, 64)))
    assert (tmp_path / "out/init_pos/a.png").stat().st_size > 10_000
    header, *rows = [line.split(",") for line in (tmp_path / "out/init_pos/results.csv").read_text().splitlines()]
    rows = [dict(zip(header, row)) for row in rows]
    assert [row["layer"] for row in rows] == ["layer.0.attn", "layer.0.mlp"] and rows[0]["n"] == "16"
    assert all(float(row["low"]) <= float(row["score"]) <= float(row["high"]) and float(row["score"]) < float(row["chance"]) for row in rows)
    again = init_pos(tmp_path, "scheme=swap", "name=a")
    assert again.returncode == 2 and "a.npz is there already: give another name=, or replace it with overwrite=True" in again.stderr
    short = init_pos(tmp_path, "samples=500")
    assert short.returncode == 2 and "samples=500 tokens are more than" in short.stderr and "Traceback" not in short.stderr


def test_the_preset_is_the_published_one():
    path = ROOT / "config/init_pos.yaml"
    preset = yaml.safe_load(path.read_text())
    assert path.read_text().startswith("# python init_pos.py config/init_pos.yaml")
    wanted = dict(scheme="swap", method="window", swap_windows=50, radius=10, swap_trials=50, n_layer=12, n_embd=784, n_head=16)
    assert {key: preset[key] for key in wanted} == wanted
