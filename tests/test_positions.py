"""positions.py against naive oracles: loops, recomputation, a pair at a time."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import input_error

import positions
from data import InputError
from positions import (
    Sheet,
    closeness,
    correlations,
    moran,
    spatial_loss,
    swap_gain,
    swap_gains,
    swap_sheet,
    swap_window,
    window_cells,
)

INF = float("inf")


def textbook_loss(x, units, near, kind, accum):
    """One window after the other, one triangle, in float64."""
    lower = np.tril_indices(len(near), -1)
    losses = []
    for window in units:
        r = np.corrcoef(np.asarray(x, np.float64)[:, window].T)[lower]
        if kind == "absolute":
            losses.append(np.abs(r - near[lower]).mean())
        else:
            losses.append((1 - np.corrcoef(r, near[lower])[0, 1]) / 2)
    return max(losses) if accum == "maximum" else np.mean(losses)


def smooth_responses(side, tokens=600, seed=0, noise=0.3):
    """x (tokens, side²): column c is a unit that belongs in cell c of a smooth map."""
    rng = np.random.default_rng(seed)
    cells = np.stack(np.divmod(np.arange(side * side), side), 1)
    kernel = np.exp(-np.square(cells[:, None] - cells).sum(-1) / (2 * (side / 5) ** 2))
    x = rng.standard_normal((tokens, side * side)) @ kernel
    return x / x.std() + noise * rng.standard_normal(x.shape)


def window_of(side=6, radius=3):
    cells = window_cells(side, radius)
    return torch.as_tensor(cells), torch.tensor(closeness(cells[0], side), dtype=torch.float32)


def is_permutation(row):
    return sorted(row.tolist()) == list(range(len(row)))


# ---- the sheet


def test_windows_by_radius_and_norm():
    assert window_cells(28, 5).shape == (400, 81)  # the published sizes
    assert window_cells(28, 10).shape == (100, 361)
    grid = np.stack(np.divmod(np.arange(81), 9), 1)
    for norm in (1, 2, INF):
        cells = window_cells(9, 3, norm)
        centres = [(i, j) for i in range(2, 7) for j in range(2, 7)]
        for centre, window in zip(centres, cells, strict=True):
            distance = np.linalg.norm(grid - centre, norm, axis=1)
            assert window.tolist() == np.flatnonzero(distance < 3).tolist()
            assert np.allclose(closeness(window, 9), closeness(cells[0], 9))
    assert closeness([0, 1, 9 + 1], 9)[0].tolist() == [1, 1 / 2, 1 / (1 + 2**0.5)]


def test_a_hexagonal_sheet_is_one_function(monkeypatch):
    def hexagons(cells, side):
        row, column = np.divmod(np.asarray(cells), side)
        return np.stack([row * 3**0.5 / 2, column + row % 2 / 2], axis=1)

    monkeypatch.setattr(positions, "places_of", hexagons)
    positions.neighbours.cache_clear()
    cells = window_cells(12, 3, 2)
    assert cells.shape[1] == 1 + 6 + 6 + 6 + 12  # at distances of 0, 1, 3 ** .5, 2, 7 ** .5
    assert {0, 1} == set(cells[:, 0] // 12 % 2)  # around odd rows and even ones
    assert all(np.allclose(closeness(window, 12), closeness(cells[0], 12)) for window in cells)
    assert positions.neighbours(12).sum(1).max() == 6
    place = hexagons(np.arange(144), 12)
    assert moran(np.sin(place[:, 0] / 4).reshape(12, 12)) > 0.8
    r = correlations(smooth_responses(12))
    assert is_permutation(swap_sheet(r, Sheet(144, 3), rounds=3)[0])
    with pytest.raises(InputError, match="radius=4: no window fits on"):
        window_cells(8, 4)  # rows are nearer to one another, windows reach further
    positions.neighbours.cache_clear()


def test_errors_are_sentences():
    for make, words in (
        (partial(positions.sheet_side, 250), "n_embd=250 is not a square.*take 225 or 256"),
        (partial(window_cells, 16, 0), "radius=0 leaves no window.*take 2 to 8"),
        (partial(window_cells, 16, 1), "radius=1 leaves no window.*take 2 to 8"),
        (partial(window_cells, 16, 9), "radius=9 leaves no window.*take 2 to 8"),
        (partial(positions.head_mosaic, 12, 784), "16 heads of 49"),
    ):
        input_error(words, make)
    assert len(window_cells(16, 8)) == 4 and len(window_cells(15, 8)) == 1


def test_window_draws_are_keyed_and_without_replacement():
    def draw(seed, count, n_windows=400):
        generator = torch.Generator().manual_seed(seed)
        return positions.draw_windows(24, n_windows, count, generator)

    numbers = draw(1, 5)
    assert numbers.shape == (24, 5)
    assert torch.equal(numbers, draw(1, 5)) and not torch.equal(numbers, draw(2, 5))
    assert all(len(set(row)) == 5 for row in numbers.tolist())
    assert len(set(map(tuple, numbers.tolist()))) == 24  # each sheet its own
    assert torch.equal(draw(1, 1000), torch.arange(400).repeat(24, 1))
    assert not draw(1, 5, n_windows=1).any()


def test_layouts():
    rows = positions.random_positions(3, 64, seed=5)
    assert rows.shape == (6, 64) and all(map(is_permutation, rows))
    assert len({tuple(row) for row in rows}) == 6
    assert (rows == positions.random_positions(3, 64, seed=5)).all()
    assert (rows != positions.random_positions(3, 64, seed=6)).any()
    mosaic = positions.head_mosaic(16, 784)
    assert is_permutation(mosaic)
    heads = mosaic.reshape(4, 7, 4, 7) // 49
    assert (heads == np.arange(16).reshape(4, 1, 4, 1)).all()  # each head one square patch
    assert positions.layer_names(1) == ["layer.0.attn", "layer.0.mlp"]


def test_positions_files(tmp_path):
    rows = positions.random_positions(2, 64)
    path = tmp_path / "new" / "a.npz"
    positions.save_positions(path, rows, scheme="random", seed=0)
    assert (positions.load_positions(path, 2, 64) == rows).all()
    assert [file.name for file in path.parent.iterdir()] == ["a.npz"]
    with pytest.raises(InputError, match="is for 2 layers x 64 units, but the model has 4 .* 81 "):
        positions.load_positions(path, 4, 81)
    rows[1, 0] = rows[1, 1]
    positions.save_positions(path, rows)
    input_error("does not place every unit exactly", positions.load_positions, path, 2, 64)
    whole = path.read_bytes()
    for torn in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(torn)
        input_error("a.npz is not a positions file", positions.load_positions, path, 2, 64)


# ---- spatial loss


@pytest.mark.parametrize("norm", [1, 2, INF])
@pytest.mark.parametrize("count", [2, None])  # gathered units, or blocks of one Gram matrix
def test_spatial_loss_is_the_textbook_loop(norm, count):
    x = torch.as_tensor(smooth_responses(8, tokens=120, noise=1), dtype=torch.float32)
    cells = window_cells(8, 3, norm)[:count]
    units = positions.random_positions(1, 64)[0][cells]
    near = closeness(cells[0], 8)
    inputs = [x.view(4, 30, 64), torch.tensor(units), torch.tensor(near).float()]
    for kind in ("relative", "absolute"):
        for accum in ("mean", "maximum"):
            loss = spatial_loss(*inputs, kind, accum)
            assert abs(loss.item() - textbook_loss(x, units, near, kind, accum)) < 1e-5
            with torch.autocast("cpu", torch.bfloat16):
                half = spatial_loss(*inputs, kind, accum)
            assert half.dtype is torch.float32 and half == loss


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_constant_units_and_tiny_batches_give_finite_gradients(kind):
    some_constant = torch.randn(50, 36)
    some_constant[:, [0, 7]] = 0.1
    some_constant[:, 14] = 0
    units, near = window_of()
    for x in (
        some_constant,
        some_constant[:1],
        some_constant[:2],
        torch.zeros(50, 36),
        torch.full((50, 36), 0.1),
        torch.randn(50, 1).repeat(1, 36),
        torch.full((50, 36), 1e4) + 1e-3 * torch.randn(50, 36),  # all but constant
        1e-14 * torch.randn(50, 36),  # all but silent
    ):
        x = x.clone().requires_grad_()
        for windows in (units, units[:1]):
            loss = spatial_loss(x, windows, near, kind)
            (grad,) = torch.autograd.grad(loss, x)
            assert loss.isfinite() and grad.norm() < 1e4
            assert kind == "absolute" or 0 <= loss <= 1
    r = correlations(some_constant)
    assert not r[[0, 7, 14]].any() and np.isfinite(r).all()
    weight = torch.randn(36, 12)  # of the rival
    weight[[3, 20]] = 0
    weight.requires_grad_()
    (grad,) = torch.autograd.grad(positions.weight_loss(weight, torch.arange(36)), weight)
    assert grad.norm() < 1e4


# ---- Moran's I


def naive_moran(values, queen):
    """Row-standardised weights, a double loop over cells."""
    z = values - values.mean()
    total = 0
    for cell in np.ndindex(z.shape):
        around = []
        for other in np.ndindex(z.shape):
            steps = np.abs(np.subtract(cell, other))
            if (steps.max() if queen else steps.sum()) == 1:
                around.append(z[other])
        total += z[cell] * np.mean(around)
    return total / np.square(z).sum()


def test_moran():
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((400, 12, 12))
    for neighbours in ("queen", "rook"):
        scores = moran(maps, neighbours)
        for i in range(3):
            assert np.isclose(scores[i], naive_moran(maps[i], neighbours == "queen"))
        assert abs(scores.mean() + 1 / 143) < 4 * scores.std() / 20  # expected: -1 / (N - 1)
    i, j = np.mgrid[:28, :28]
    assert moran(np.sin(i / 9) + np.cos(j / 9)) > 0.97
    assert moran((-1.0) ** (i + j), "rook") == pytest.approx(-1, abs=1e-12)
    assert np.isnan(moran(np.ones((5, 5))))


# ---- swaps


def test_swap_gain_is_a_full_recompute():
    n = 25
    d = closeness(window_cells(9, 3)[0], 9)
    r = np.corrcoef(np.random.default_rng(0).standard_normal((n, 60)))
    lower = np.tril_indices(n, -1)

    def loss(r):
        return (1 - np.corrcoef(r[lower], d[lower])[0, 1]) / 2

    spread = r[lower].var() * d[lower].var() * len(lower[0]) ** 2
    r0 = r - np.eye(n)
    d0 = d - np.eye(n)
    gains = swap_gains(r0, d0)
    for a, b in np.ndindex(n, n):
        new = np.arange(n)
        new[[a, b]] = b, a
        fall = loss(r) - loss(r[new][:, new])
        gain = swap_gain(r0, d0, a, b)
        assert abs(gain / (2 * np.sqrt(spread)) - fall) < 1e-10
        assert abs(gain - gains[a, b]) < 1e-10


@pytest.mark.parametrize("norm", [2, INF])
def test_swaps_find_a_hidden_map(norm):
    hidden = np.random.default_rng(1).permutation(100)
    x = smooth_responses(10)[:, hidden]
    r = correlations(x)
    sheet = Sheet(100, 3, norm)
    start = np.arange(100)
    near = torch.tensor(closeness(sheet.cells[0], 10)).float()

    def loss(layout):
        return spatial_loss(torch.as_tensor(x), torch.as_tensor(layout[sheet.cells]), near).item()

    layout = swap_window(r, sheet, start, 200, 50, seed=3)
    assert is_permutation(layout)
    assert (layout == swap_window(r, sheet, start, 200, 50, seed=3)).all()  # deterministic
    final = {"window": loss(layout)}
    for name, swap in {
        "sheet": partial(swap_sheet, r, sheet),
        "sheet from start": partial(swap_sheet, r, sheet, start),
    }.items():
        layout, losses = swap()
        assert is_permutation(layout) and (layout == swap()[0]).all()  # deterministic
        assert abs(losses[-1] - loss(layout)) < 1e-5
        assert name == "sheet" or abs(losses[0] - loss(start)) < 1e-5
        assert (np.diff(losses) < 0).all()  # the loss falls in every round
        final[name] = losses[-1]
    assert (start == np.arange(100)).all()  # not changed in place
    assert loss(np.argsort(hidden)) < 0.05 and loss(start) > 0.45
    assert max(final.values()) < 0.25 and final["sheet"] < final["window"]
    _, losses = swap_sheet(r, sheet, start, stop_loss=0.4)
    assert losses[-1] <= 0.4 < losses[-2]
    assert len(swap_sheet(r, sheet, start, rounds=2)[1]) == 3


# ---- the rival


def test_weight_loss_is_topoloss():
    topoloss = pytest.importorskip("topoloss")
    net = torch.nn.Sequential(torch.nn.Linear(20, 144, bias=False))
    for factor in (3.0, 4.0, 5.5):
        options = {"factor_h": factor, "factor_w": factor, "scale": 1.0}
        layer = topoloss.LaplacianPyramid.from_layer(model=net, layer=net[0], **options)
        reference = topoloss.TopoLoss(losses=[layer]).compute(model=net).item()
        order = torch.randperm(144)
        shuffled = torch.empty_like(net[0].weight)
        shuffled[order] = net[0].weight.detach()  # unit order[c] lies on cell c
        loss = positions.weight_loss(shuffled, order, factor).item()
        assert loss == pytest.approx(reference, abs=1e-6)


def test_slopes_are_the_gradient_of_the_mean_loss():
    sheet = Sheet(64, 3, dtype=np.float64)
    r = np.corrcoef(np.random.default_rng(0).standard_normal((64, 90))) - np.eye(64)
    A, B = sheet.slopes(r)
    off_diagonal = torch.as_tensor(1 - np.eye(25))
    leaf = torch.tensor(r, requires_grad=True)
    blocks = leaf[sheet.cells[:, :, None], sheet.cells[:, None]]  # (M, n, n)
    near = torch.as_tensor(sheet.near[np.ix_(sheet.cells[0], sheet.cells[0])])
    total = (blocks * off_diagonal).sum((1, 2))
    variance = (blocks.square() * off_diagonal).sum((1, 2)) - total.square() / 600
    corr = (blocks * near).sum((1, 2)) / (variance * near.square().sum()).sqrt()
    loss = (0.5 * (1 - corr)).mean()
    (grad,) = torch.autograd.grad(loss, leaf)
    assert abs(loss.item() - sheet.losses(r).mean()) < 1e-12 and grad.abs().max() > 1e-5
    expected = 2 * (1 - np.eye(64)) * grad.numpy()
    assert np.abs(A + 2 * r * B - expected).max() < 1e-12


def test_a_trial_never_raises_its_windows_loss():
    sheet = Sheet(64, 3)
    r = correlations(smooth_responses(8, noise=1))
    layout = positions.random_positions(1, 64)[0]
    for seed in range(30):  # one window, a few trials at a time
        window = np.random.default_rng(seed).permutation(len(sheet.cells))[0]
        new = swap_window(r, sheet, layout, 1, 4, seed)
        before = sheet.losses(r[layout][:, layout])[window]
        after = sheet.losses(r[new][:, new])[window]
        cells = sheet.cells[window]
        assert after <= before + 1e-6 and set(new[cells]) == set(layout[cells])
        layout = new
    assert is_permutation(swap_window(r, sheet, layout, 100, 2))  # each window at least twice
