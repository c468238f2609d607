"""Where each unit of a layer lies on a square cortical sheet, and what follows from it.

A layer of C = side² units has a permutation `unit_at_cell` (C,): cell c, in raster order, holds
unit unit_at_cell[c]. A map on the sheet is values[unit_at_cell].reshape(side, side). A window is
a set of cells around a centre, listed in raster order, so that the distances inside a window are
one constant matrix for all windows and layers.

The spatial loss is that of Margalit et al. 2024 (TDANN) and Rathi et al. 2025 (TopoLM):
1/2 (1 - corr(r, D)), with r the correlations of the units' activations and D = 1 / (1 + distance)
their closeness, over the pairs of units of a window.
"""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from data import InputError, aside, check_content

# ---- the sheet


def layer_names(n_layer):
    """The sheets in order: ['layer.0.attn', 'layer.0.mlp', 'layer.1.attn', ...]."""
    names = []
    for i in range(n_layer):
        names += [f"layer.{i}.attn", f"layer.{i}.mlp"]
    return names


def sheet_side(n_units):
    """Side of the square sheet of n_units cells. Raises InputError where n_units is no square."""
    side = int(n_units**0.5)
    if side * side != n_units:
        sizes = f"{side**2} or {(side + 1) ** 2}"
        raise InputError(f"n_embd={n_units} is not a square: take {sizes}, or positions=none")
    return side


def places_of(cells, side):
    """Where cells (n,) lie on the sheet: row and column (n, 2).

    Windows, closeness, neighbours, swaps and Moran's I follow from it: for hexagons, say, move
    every other row by half a column and bring rows together to 3 ** 0.5 / 2. What takes the cells
    for the pixels of an image stays square: weight_loss and head_mosaic, the blur of
    topography.contrast_map, and pictures.
    """
    return np.stack(np.divmod(np.asarray(cells), side), axis=1).astype(np.float64)


def offsets(cells, side):
    """How far cells (n,) lie from one another: (n, n, 2), in cells."""
    places = places_of(cells, side)
    return places - places[:, None]


def closeness(cells, side):
    """D (n, n): 1 / (1 + Euclidean distance), in cells, between cells (n,) of the sheet."""
    return 1 / (1 + np.linalg.norm(offsets(cells, side), axis=-1))


def window_cells(side, radius, norm=float("inf")):
    """Cells (M, n) of every window that lies wholly on the sheet.

    A window holds the cells closer than `radius` to its centre in the p-norm `norm` (1, 2, inf).
    With the published inf it is a square of 2·radius - 1 cells a side.
    """
    most = (side + 1) // 2
    if not 2 <= radius <= most:
        raise InputError(f"radius={radius} leaves no window on {side} x {side}: take 2 to {most}")
    apart = offsets(np.arange(side * side), side)
    inside = np.linalg.norm(apart, norm, axis=-1) < radius - 1e-9  # rounding makes no cell nearer
    n_cells = inside.sum(1)
    centres = np.flatnonzero(n_cells == n_cells.max())  # windows at the edge have fewer
    shapes = apart[centres][inside[centres]].reshape(len(centres), -1, 2)
    if not np.allclose(shapes, shapes[0]):
        raise InputError(f"radius={radius}: no window lies wholly on the sheet, take a smaller one")
    return inside[centres].nonzero()[1].reshape(len(centres), -1)


@cache
def neighbours(side, kind="queen"):
    """Which cells touch (C, C): 'queen', corners included, as published for TopoLM, or 'rook'."""
    distance = np.linalg.norm(offsets(np.arange(side * side), side), axis=-1)
    return (distance > 0) & (distance < (1.5 if kind == "queen" else 1.1))


def draw_windows(n_sheets, n_windows, count, generator):
    """Numbers (n_sheets, count) of windows, drawn for each sheet without replacement."""
    if count >= n_windows:
        return torch.arange(n_windows).repeat(n_sheets, 1)
    return torch.rand(n_sheets, n_windows, generator=generator).argsort(1)[:, :count]


# ---- layouts: unit_at_cell (2 n_layer, C)


def random_positions(n_layer, n_units, seed=0):
    """A seeded permutation for each sheet: unit_at_cell (2 n_layer, n_units) int64."""
    sheet_side(n_units)
    rows = []
    for sheet in range(2 * n_layer):
        rows.append(np.random.default_rng((seed, sheet)).permutation(n_units))
    return np.stack(rows)


def head_mosaic(n_head, n_units):
    """unit_at_cell (n_units,) with heads as a mosaic: 16 heads of 49 units in 4 x 4 patches."""
    patches = round(n_head**0.5)
    patch = round((n_units // n_head) ** 0.5)
    if patches**2 != n_head or patch**2 * n_head != n_units:
        raise InputError("head_loss needs a square number of heads of square size: 16 heads of 49")
    units = np.arange(n_units).reshape(patches, patches, patch, patch)
    return units.transpose(0, 2, 1, 3).reshape(-1)  # head row, row, head column, column


def save_positions(path, unit_at_cell, **facts):
    """Write an .npz: an int32 permutation (C,) for each sheet, and as JSON how they were made."""
    names = layer_names(len(unit_at_cell) // 2)
    arrays = {name: row.astype(np.int32) for name, row in zip(names, unit_at_cell)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as file:
        np.savez_compressed(file, facts=json.dumps(facts), **arrays)


def load_positions(path, n_layer, n_units):
    """unit_at_cell (2 n_layer, n_units) int64 from a file of save_positions.

    convert.load_positions reads TopoLM's folders, too.
    """
    if not os.path.lexists(path):
        raise InputError(f"positions file {path} is missing: make one with python init_pos.py")
    check_content(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            layers = {name: file[name] for name in file.files if name != "facts"}
    except Exception as error:  # a torn file raises nearly anything
        reason = type(error).__name__
        raise InputError(f"{path} is no positions file ({reason}): make it again") from None
    return stack_layers(layers, n_layer, n_units, path)


def stack_layers(layers, n_layer, n_units, path):
    """unit_at_cell (2 n_layer, n_units) int64 from {layer name: permutation} that `path` holds."""
    names = layer_names(n_layer)
    if sorted(layers) != sorted(names) or any(len(row) != n_units for row in layers.values()):
        n_found = len(next(iter(layers.values()), ()))
        found = f"{len(layers) // 2} layers x {n_found} units"
        raise InputError(f"{path} is for {found}, the model has {n_layer} layers x {n_units} units")
    rows = np.stack([layers[name] for name in names]).astype(np.int64)
    if not (np.sort(rows, axis=1) == np.arange(n_units)).all():
        raise InputError(f"{path} does not place every unit once (no permutation)")
    return rows


# ---- spatial loss


def normalise(x):
    """z of rows x (C, T), centred and of unit length in float32: z @ z.T are correlations.

    A row that is constant but for rounding, or all but silent, becomes zeros.
    """
    x = x.float()
    mean = x.mean(1, keepdim=True)
    x = x - mean
    energy = x.square().sum(1, keepdim=True)
    alive = energy > 1e-11 * (energy + x.size(1) * mean.square()) + 1e-12
    return x * (torch.where(alive, energy, 1.0).rsqrt() * alive)


def relative(r, near, off_diagonal, n_pairs):
    """1/2 (1 - corr(r, D)), in [0, 1] (Margalit et al. 2024)."""
    r = r * off_diagonal
    # centred closeness: the mean of r falls out of the cross term
    d = (near - (near * off_diagonal).sum() / n_pairs) * off_diagonal
    variance = r.square().sum((1, 2)) - r.sum((1, 2)).square() / n_pairs
    variance = variance.clamp_min(1e-9)  # all correlations equal: corr is 0, not 0/0
    corr = (r * d).sum((1, 2)) * (variance * d.square().sum()).rsqrt()
    return 0.5 * (1 - corr)


def absolute(r, near, off_diagonal, n_pairs):
    """Mean |r - D| (Lee et al. 2020)."""
    return ((r - near).abs() * off_diagonal).sum((1, 2)) / n_pairs


# Losses (K,) of windows: r (K, n, n) correlations of their units, near (n, n) their closeness D,
# off_diagonal (n, n) 1 for the pairs that count, of which there are n_pairs.
SPATIAL_KINDS = {"relative": relative, "absolute": absolute}


def spatial_loss(x, units, near, kind="relative", accum="mean"):
    """How far a sheet is from "nearby units respond alike", over K of its windows.

    x (..., C): activations; every leading index is a token. units (K, n): the units in each
    window's cells. near (n, n): closeness() of those cells. kind: a name in SPATIAL_KINDS. accum:
    'mean' or 'maximum' over the windows. Float32 under any autocast.
    """
    with torch.autocast(x.device.type, enabled=False):
        n = units.size(1)
        z = normalise(x.flatten(0, -2).T.index_select(0, units.flatten())).unflatten(0, (-1, n))
        r = z @ z.mT  # (K, n, n)
        losses = SPATIAL_KINDS[kind](r, near, 1 - torch.eye(n, device=r.device), n * (n - 1))
        return losses.max() if accum == "maximum" else losses.mean()


def weight_loss(weight, unit_at_cell, factor=3.0):
    """TopoLoss, the rival (Deb et al. 2025): how far a sheet of weights is from its blurred self.

    weight (C, in): of the linear layer whose output units lie on the sheet. The sheet is shrunk
    bilinearly by `factor` per axis and enlarged again; the loss is 1 - mean over cells of the
    cosine between a cell's weights and its blurred ones, in float32.
    """
    side = sheet_side(len(weight))
    with torch.autocast(weight.device.type, enabled=False):
        sheet = weight.float()[unit_at_cell].T.reshape(1, -1, side, side)
        small = F.interpolate(sheet, scale_factor=1 / factor, mode="bilinear")
        blurred = F.interpolate(small, size=(side, side), mode="bilinear")
        # eps keeps the gradient of a cell without weights finite
        return 1 - F.cosine_similarity(sheet, blurred, dim=1, eps=1e-4).mean()


# ---- Moran's I


def moran(values, kind="queen"):
    """Moran's I of maps (..., side, side): near 1 for smooth fields, -1/(N - 1) for noise.

    I = (N/W) Σ_ij w_ij z_i z_j / Σ_i z_i², z centred and w row-standardised (each cell's
    neighbours share the weight 1, as in PySAL). A constant map has no I: nan.
    """
    values = np.asarray(values, np.float64)
    near = neighbours(values.shape[-1], kind).astype(np.float64)
    z = values.reshape(*values.shape[:-2], -1)
    z = z - z.mean(-1, keepdims=True)
    around = z @ near / near.sum(0)  # mean over the neighbours of each cell
    with np.errstate(invalid="ignore"):
        return (z * around).sum(-1) / np.square(z).sum(-1)


# ---- swaps: a layout for given correlations, made before training (Margalit et al. 2024)


class Sheet:
    """The windows of a square sheet in the form that swaps use, one for all layers.

    cells (M, n): of every window. inside (M, C): 1 where a window has a cell. near (C, C): the
    closeness of any two cells minus its mean over the pairs of a window, with a zero diagonal.
    """

    def __init__(self, n_units, radius, norm=float("inf"), dtype=np.float32):
        self.side = sheet_side(n_units)
        self.cells = window_cells(self.side, radius, norm)
        n = self.cells.shape[1]
        self.n_pairs = n * (n - 1)
        self.inside = np.zeros((len(self.cells), n_units), dtype)
        np.put_along_axis(self.inside, self.cells, 1, axis=1)
        near = closeness(np.arange(n_units), self.side)
        np.fill_diagonal(near, 0)
        window = np.ix_(self.cells[0], self.cells[0])
        near -= near[window].sum() / self.n_pairs
        np.fill_diagonal(near, 0)
        self.near = near.astype(dtype)
        self.near_energy = np.square(near[window]).sum()

    def sums(self, r):
        """Σ r, Σ r near and the variance Σ r² - (Σ r)² / pairs in every window, (M,) each.

        r (C, C): correlations between cells, of zero diagonal.
        """

        def over_windows(products):
            return ((self.inside @ products) * self.inside).sum(1, dtype=np.float64)

        total = over_windows(r)
        variance = np.maximum(over_windows(r * r) - total * total / self.n_pairs, 1e-9)
        return total, over_windows(r * self.near), variance

    def losses(self, r):
        """Relative spatial loss (M,) of every window; equals spatial_loss."""
        _, cross, variance = self.sums(r)
        return 0.5 * (1 - cross / np.sqrt(variance * self.near_energy))

    def slopes(self, r):
        """A and B, (C, C) each: how the mean loss follows the correlations.

        To first order in the windows' sums it changes by Σ_{i<j} A_ij d(r_ij) + B_ij d(r_ij²).
        """
        total, cross, variance = self.sums(r)
        by_variance = cross / (4 * variance**1.5 * self.near_energy**0.5)  # dL / d variance
        by_cross = -1 / (2 * np.sqrt(variance * self.near_energy))
        A = self._over_pairs(by_cross) * self.near
        A -= self._over_pairs(2 * by_variance * total / self.n_pairs)
        B = self._over_pairs(by_variance)
        np.fill_diagonal(A, 0)
        np.fill_diagonal(B, 0)
        return A, B

    def _over_pairs(self, weights):
        """What a weight of each window (M,) is for the pairs of cells (C, C)."""
        weights = (2 * weights / len(self.inside)).astype(self.inside.dtype)
        return (self.inside.T * weights) @ self.inside


def correlations(x):
    """Pearson correlations (C, C), float32 numpy, between the columns of x (T, C).

    The diagonal is zero; constant units count as uncorrelated.
    """
    z = normalise(torch.as_tensor(x).detach().T).cpu().numpy()
    r = z @ z.T  # numpy sees the symmetry and computes one half
    np.fill_diagonal(r, 0)
    return r


def swap_gain(r, near, a, b):
    """Rise of the cross term Σ_{i<j} r_ij near_ij when the units in cells a and b trade places.

    Σ_{k≠a,b} (r_ak - r_bk)(near_bk - near_ak), in O(n). r, near (n, n), symmetric, of zero
    diagonal. A swap changes neither the mean nor the variance of a window's correlations, so its
    loss falls by gain / (2 sqrt(Σ_{i<j} (r - mean)² Σ_{i<j} (near - mean)²)).
    """
    return (r[a] - r[b]) @ (near[b] - near[a]) + 2 * r[a, b] * near[a, b]


def swap_gains(r, near):
    """swap_gain of all pairs at once (n, n): M + Mᵀ - m 1ᵀ - 1 mᵀ + 2 r ⊙ near.

    M = r near, and m its diagonal.
    """
    m = r @ near
    gains = m + m.T
    gains -= m.diagonal()
    gains -= m.diagonal()[:, None]
    gains += 2 * r * near
    return gains


def swap_window(r, sheet, unit_at_cell, windows=50, trials=50, seed=0):
    """Pre-optimisation as published: random pairs of cells trade units in random windows.

    A swap is undone where it raises the window's loss. Windows are drawn without replacement
    while there are enough. r (C, C): correlations of the units. unit_at_cell (C,): where it starts.
    Returns the new unit_at_cell.
    """
    rng = np.random.default_rng(seed)
    layout = np.array(unit_at_cell)
    near = sheet.near[np.ix_(sheet.cells[0], sheet.cells[0])]  # (n, n), the same in every window
    n_rounds = -(-windows // len(sheet.cells))
    order = np.concatenate([rng.permutation(len(sheet.cells)) for _ in range(n_rounds)])
    for window in order[:windows]:
        units = layout[sheet.cells[window]]
        local = r[np.ix_(units, units)]
        first = rng.integers(len(units), size=trials)
        second = rng.integers(len(units) - 1, size=trials)
        second += second >= first  # any cell but the first
        for a, b in zip(first, second):
            if swap_gain(local, near, a, b) >= 0:
                local[[a, b]] = local[[b, a]]
                local[:, [a, b]] = local[:, [b, a]]
                units[[a, b]] = units[[b, a]]
        layout[sheet.cells[window]] = units
    return layout


def spectral_layout(r, seed=0):
    """unit_at_cell (C,) with like units together, to start swaps from (Hall 1970).

    The first principal component of r (C, C) orders the units into columns, the second each column.
    """
    side = sheet_side(len(r))
    v = np.random.default_rng(seed).standard_normal((len(r), 8)).astype(r.dtype)
    for _ in range(6):  # subspace iteration, close enough for an ordering
        v = np.linalg.qr(r @ v)[0]
    columns = np.argsort(v[:, 0], kind="stable").reshape(side, side)
    within = np.argsort(v[columns, 1], axis=1, kind="stable")
    return np.take_along_axis(columns, within, axis=1).T.flatten()


def swap_sheet(r, sheet, unit_at_cell=None, rounds=200, stop_loss=0.0, seed=0):
    """Pre-optimisation of the whole sheet, many disjoint swaps at once.

    In each round every cell names its best partner, and as many of these pairs as are disjoint
    trade units. A round counts only when the exact loss falls; else half of its pairs are tried,
    and the search ends when not even one pair helps. The gain of a pair is the fall of the mean
    loss over all windows, to first order in the windows' sums of r, r² and r near.

    r (C, C): correlations of the units. unit_at_cell (C,): where it starts, None for
    spectral_layout(r, seed). Returns the new unit_at_cell and the mean losses over all windows:
    at the start, and after each round.
    """
    layout = spectral_layout(r, seed) if unit_at_cell is None else np.array(unit_at_cell)
    r = r[layout][:, layout]  # between cells from here on
    losses = [sheet.losses(r).mean()]
    n_pairs = len(layout)
    while len(losses) <= rounds and losses[-1] > stop_loss:
        A, B = sheet.slopes(r)
        gains = -swap_gains(r, A) - swap_gains(r * r, B)
        pairs = disjoint_pairs(gains)[:n_pairs]
        pairs, r, loss = _helpful_swaps(r, sheet, pairs, losses[-1])
        if not len(pairs):
            break
        layout[pairs] = layout[pairs[:, ::-1]]
        losses.append(loss)
        n_pairs = 2 * len(pairs)
    return layout, losses


def _helpful_swaps(r, sheet, pairs, loss):
    """The first of `pairs`, halved until the loss falls; r and loss after swapping them."""
    while len(pairs):
        moved = np.arange(len(r))
        moved[pairs] = moved[pairs[:, ::-1]]
        swapped = r[moved][:, moved]
        swapped_loss = sheet.losses(swapped).mean()
        if swapped_loss < loss - 1e-7:  # above rounding
            return pairs, swapped, swapped_loss
        pairs = pairs[: len(pairs) // 2]
    return pairs, r, loss


def disjoint_pairs(gains):
    """Pairs (P, 2) of cells, best first: each cell with its best partner while both are free."""
    partner = gains.argmax(1)
    gain = gains[np.arange(len(gains)), partner]
    free = [True] * len(gains)
    pairs = []
    for a in np.argsort(-gain, kind="stable").tolist():
        b = int(partner[a])
        if gain[a] > 0 and free[a] and free[b]:
            free[a] = free[b] = False
            pairs.append((a, b))
    return np.array(pairs, np.int64).reshape(-1, 2)
