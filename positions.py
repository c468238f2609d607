"""Layouts of units on square cortical sheets: windows, spatial losses, Moran's I and swaps.

A layer of C = side² units has a permutation `unit_at_cell` (C,): cell c, in raster order, holds
unit unit_at_cell[c]. A map on the sheet is values[unit_at_cell].reshape(side, side). A window is
a set of cells around a centre, listed in raster order, so that all windows and layers share one
matrix of distances.

The spatial loss follows Margalit et al. 2024 (TDANN) and Rathi et al. 2025 (TopoLM):
1/2 (1 - corr(r, D)) over the pairs of units in a window, where r are the correlations between
their activations and D = 1 / (1 + distance) is their closeness.
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
    """Return the names of the sheets: ['layer.0.attn', 'layer.0.mlp', 'layer.1.attn', ...]."""
    names = []
    for i in range(n_layer):
        names += [f"layer.{i}.attn", f"layer.{i}.mlp"]
    return names


def sheet_side(n_units):
    """Return the side of a sheet of n_units cells. Raises InputError if n_units is no square."""
    side = int(n_units**0.5)
    if side * side != n_units:
        sizes = f"{side**2} or {(side + 1) ** 2}"
        raise InputError(f"n_embd={n_units} is not a square: take {sizes}, or positions=none")
    return side


def places_of(cells, side):
    """Return the row and column (n, 2) of cells (n,) on the sheet.

    Windows, closeness, neighbours, swaps and Moran's I all build on it. For a hexagonal sheet, say,
    move every other row by half a column and set rows 3 ** 0.5 / 2 apart. Code that takes cells
    for pixels stays square: weight_loss, head_mosaic, the blur of topography.contrast_map, and
    pictures.
    """
    return np.stack(np.divmod(np.asarray(cells), side), axis=1).astype(np.float64)


def offsets(cells, side):
    """Return the displacements (n, n, 2) between cells (n,), in cells."""
    places = places_of(cells, side)
    return places - places[:, None]


def closeness(cells, side):
    """Return D (n, n): 1 / (1 + Euclidean distance in cells) between cells (n,)."""
    return 1 / (1 + np.linalg.norm(offsets(cells, side), axis=-1))


def window_cells(side, radius, norm=float("inf")):
    """Return the cells (M, n) of every window that fits on the sheet.

    A window holds the cells closer than `radius` to its centre in the p-norm `norm` (1, 2, inf).
    With the published inf it is a square with sides of 2·radius - 1 cells.
    """
    most = (side + 1) // 2
    if not 2 <= radius <= most:
        raise InputError(f"radius={radius} leaves no window on {side} x {side}: take 2 to {most}")
    displacements = offsets(np.arange(side * side), side)
    inside = np.linalg.norm(displacements, norm, axis=-1) < radius - 1e-9  # exclude rounding errors
    n_cells = inside.sum(1)
    centres = np.flatnonzero(n_cells == n_cells.max())  # windows at the edge have fewer
    shapes = displacements[centres][inside[centres]].reshape(len(centres), -1, 2)
    if not np.allclose(shapes, shapes[0]):
        raise InputError(f"radius={radius}: no window fits on the sheet, take a smaller radius")
    return inside[centres].nonzero()[1].reshape(len(centres), -1)


@cache
def neighbours(side, kind="queen"):
    """Return which cells touch (C, C): 'queen' (corners count, as in TopoLM) or 'rook'."""
    distance = np.linalg.norm(offsets(np.arange(side * side), side), axis=-1)
    return (distance > 0) & (distance < (1.5 if kind == "queen" else 1.1))


def draw_windows(n_sheets, n_windows, count, generator):
    """Draw window numbers (n_sheets, count), for each sheet without replacement."""
    if count >= n_windows:
        return torch.arange(n_windows).repeat(n_sheets, 1)
    return torch.rand(n_sheets, n_windows, generator=generator).argsort(1)[:, :count]


# ---- layouts: unit_at_cell (2 n_layer, C)


def random_positions(n_layer, n_units, seed=0):
    """Draw a permutation for each sheet: unit_at_cell (2 n_layer, n_units) int64."""
    sheet_side(n_units)
    rows = []
    for sheet in range(2 * n_layer):
        rows.append(np.random.default_rng((seed, sheet)).permutation(n_units))
    return np.stack(rows)


def head_mosaic(n_head, n_units):
    """Lay heads out as a mosaic, unit_at_cell (n_units,): 16 heads of 49 units in 4 x 4 patches."""
    patches = round(n_head**0.5)
    patch = round((n_units // n_head) ** 0.5)
    if patches**2 != n_head or patch**2 * n_head != n_units:
        example = "16 heads of 49 units, say"
        raise InputError(f"head_loss needs a square number of heads of square size: {example}")
    units = np.arange(n_units).reshape(patches, patches, patch, patch)
    return units.transpose(0, 2, 1, 3).reshape(-1)  # head row, row, head column, column


def save_positions(path, unit_at_cell, **facts):
    """Write an .npz: an int32 permutation (C,) for each sheet, and `facts` about them as JSON."""
    names = layer_names(len(unit_at_cell) // 2)
    arrays = {name: row.astype(np.int32) for name, row in zip(names, unit_at_cell)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as file:
        np.savez_compressed(file, facts=json.dumps(facts), **arrays)


def load_positions(path, n_layer, n_units):
    """Read a file of save_positions: unit_at_cell (2 n_layer, n_units) int64.

    convert.load_positions also reads TopoLM's folders.
    """
    if not os.path.lexists(path):
        raise InputError(f"positions file {path} is missing: make one with python init_pos.py")
    check_content(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            layers = {name: file[name] for name in file.files if name != "facts"}
    except Exception as error:  # a torn file raises nearly anything
        reason = type(error).__name__
        raise InputError(f"{path} is not a positions file ({reason}): make it again") from None
    return stack_layers(layers, n_layer, n_units, path)


def stack_layers(layers, n_layer, n_units, path):
    """Stack {layer name: permutation}, read from `path`, to unit_at_cell (2 n_layer, n_units)."""
    names = layer_names(n_layer)
    if sorted(layers) != sorted(names) or any(len(row) != n_units for row in layers.values()):
        file_units = len(next(iter(layers.values()), ()))
        file_size = f"{len(layers) // 2} layers x {file_units} units"
        model_size = f"{n_layer} layers x {n_units} units"
        raise InputError(f"{path} is for {file_size}, but the model has {model_size}")
    rows = np.stack([layers[name] for name in names]).astype(np.int64)
    if not (np.sort(rows, axis=1) == np.arange(n_units)).all():
        raise InputError(f"{path} does not place every unit exactly once: make it again")
    return rows


# ---- spatial loss


def normalise(x):
    """Centre rows x (C, T) and scale them to unit length, in float32: z @ z.T are correlations.

    Rows that are constant up to rounding, or almost silent, become zeros.
    """
    x = x.float()
    mean = x.mean(1, keepdim=True)
    x = x - mean
    energy = x.square().sum(1, keepdim=True)
    alive = energy > 1e-11 * (energy + x.size(1) * mean.square()) + 1e-12
    return x * (torch.where(alive, energy, 1.0).rsqrt() * alive)


def relative(r, near, off_diagonal, n_pairs):
    """Return 1/2 (1 - corr(r, D)), in [0, 1] (Margalit et al. 2024)."""
    r = r * off_diagonal
    # with closeness centred, the mean of r drops out of the cross term
    d = (near - (near * off_diagonal).sum() / n_pairs) * off_diagonal
    variance = r.square().sum((1, 2)) - r.sum((1, 2)).square() / n_pairs
    variance = variance.clamp_min(1e-9)  # if all correlations are equal, corr is 0 instead of 0/0
    corr = (r * d).sum((1, 2)) * (variance * d.square().sum()).rsqrt()
    return 0.5 * (1 - corr)


def absolute(r, near, off_diagonal, n_pairs):
    """Return the mean of |r - D| (Lee et al. 2020)."""
    return ((r - near).abs() * off_diagonal).sum((1, 2)) / n_pairs


# Losses (K,) of windows, from the correlations r (K, n, n) of their units, their closeness D as
# near (n, n), and off_diagonal (n, n), which is 1 for the n_pairs pairs that count.
SPATIAL_KINDS = {"relative": relative, "absolute": absolute}


def spatial_loss(x, units, near, kind="relative", accum="mean"):
    """Measure how far a sheet is from "nearby units respond alike", over K of its windows.

    x (..., C): activations; every leading index is a token. units (K, n): the units in each
    window's cells. near (n, n): closeness() of those cells. kind: a name in SPATIAL_KINDS. accum:
    'mean' or 'maximum' over the windows. Computes in float32 even under autocast.
    """
    with torch.autocast(x.device.type, enabled=False):
        n = units.size(1)
        z = normalise(x.flatten(0, -2).T.index_select(0, units.flatten())).unflatten(0, (-1, n))
        r = z @ z.mT  # (K, n, n)
        losses = SPATIAL_KINDS[kind](r, near, 1 - torch.eye(n, device=r.device), n * (n - 1))
        return losses.max() if accum == "maximum" else losses.mean()


def weight_loss(weight, unit_at_cell, factor=3.0):
    """Compare a sheet of weights with its blurred self (TopoLoss, Deb et al. 2025).

    weight (C, in): the weights of the linear layer whose output units lie on the sheet. The sheet
    is shrunk bilinearly by `factor` along each axis and enlarged again; the loss is 1 - cosine
    between each cell's weights and its blurred ones, averaged over cells, in float32.
    """
    side = sheet_side(len(weight))
    with torch.autocast(weight.device.type, enabled=False):
        sheet = weight.float()[unit_at_cell].T.reshape(1, -1, side, side)
        small = F.interpolate(sheet, scale_factor=1 / factor, mode="bilinear")
        blurred = F.interpolate(small, size=(side, side), mode="bilinear")
        # eps keeps the gradient finite where all weights of a cell are zero
        return 1 - F.cosine_similarity(sheet, blurred, dim=1, eps=1e-4).mean()


# ---- Moran's I


def moran(values, kind="queen"):
    """Return Moran's I of maps (..., side, side): near 1 for smooth fields, -1/(N - 1) for noise.

    I = (N/W) Σ_ij w_ij z_i z_j / Σ_i z_i², with z centred and w row-standardised (each cell's
    neighbours share the weight 1, as in PySAL). NaN for constant maps.
    """
    values = np.asarray(values, np.float64)
    near = neighbours(values.shape[-1], kind).astype(np.float64)
    z = values.reshape(*values.shape[:-2], -1)
    z = z - z.mean(-1, keepdims=True)
    neighbour_means = z @ near / near.sum(0)
    with np.errstate(invalid="ignore"):
        return (z * neighbour_means).sum(-1) / np.square(z).sum(-1)


# ---- swaps: a layout from correlations, made before training (Margalit et al. 2024)


class Sheet:
    """The windows of a square sheet in the form that swaps use, shared by all layers.

    cells (M, n): the cells of every window. inside (M, C): 1 for the cells of a window. near
    (C, C): the closeness of two cells minus its mean over a window's pairs, with a zero diagonal.
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
        """Return Σ r, Σ r near and the variance Σ r² - (Σ r)² / pairs of each window, (M,) each.

        r (C, C): correlations between cells, with a zero diagonal.
        """

        def over_windows(products):
            return ((self.inside @ products) * self.inside).sum(1, dtype=np.float64)

        total = over_windows(r)
        variance = np.maximum(over_windows(r * r) - total * total / self.n_pairs, 1e-9)
        return total, over_windows(r * self.near), variance

    def losses(self, r):
        """Return the relative spatial loss (M,) of every window, as spatial_loss does."""
        _, cross, variance = self.sums(r)
        return 0.5 * (1 - cross / np.sqrt(variance * self.near_energy))

    def slopes(self, r):
        """Return A and B, (C, C) each: how the mean loss depends on the correlations.

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
        """Sum the windows' weights (M,) over the windows that hold each pair of cells (C, C)."""
        weights = (2 * weights / len(self.inside)).astype(self.inside.dtype)
        return (self.inside.T * weights) @ self.inside


def correlations(x):
    """Return Pearson correlations (C, C) between the columns of x (T, C), as float32 numpy.

    The diagonal is zero; constant units count as uncorrelated.
    """
    z = normalise(torch.as_tensor(x).detach().T).cpu().numpy()
    r = z @ z.T  # numpy uses the symmetry and computes one half
    np.fill_diagonal(r, 0)
    return r


def swap_gain(r, near, a, b):
    """Return how much Σ_{i<j} r_ij near_ij rises when the units in cells a and b trade places.

    Σ_{k≠a,b} (r_ak - r_bk)(near_bk - near_ak), in O(n). r and near are (n, n), symmetric, with a
    zero diagonal. A swap changes neither the mean nor the variance of a window's correlations, so
    its loss falls by gain / (2 sqrt(Σ_{i<j} (r - mean)² Σ_{i<j} (near - mean)²)).
    """
    return (r[a] - r[b]) @ (near[b] - near[a]) + 2 * r[a, b] * near[a, b]


def swap_gains(r, near):
    """Return swap_gain of all pairs (n, n): M + Mᵀ - m 1ᵀ - 1 mᵀ + 2 r ⊙ near.

    M = r near, and m is its diagonal.
    """
    m = r @ near
    gains = m + m.T
    gains -= m.diagonal()
    gains -= m.diagonal()[:, None]
    gains += 2 * r * near
    return gains


def swap_window(r, sheet, unit_at_cell, windows=50, trials=50, seed=0):
    """Pre-optimise a layout as published: random pairs of cells trade units in random windows.

    A swap is kept unless it raises the window's loss. No window is drawn again before all have
    been. r (C, C): correlations of the units. unit_at_cell (C,): the layout to start from.
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
        second += second >= first  # any other cell
        for a, b in zip(first, second):
            if swap_gain(local, near, a, b) >= 0:
                local[[a, b]] = local[[b, a]]
                local[:, [a, b]] = local[:, [b, a]]
                units[[a, b]] = units[[b, a]]
        layout[sheet.cells[window]] = units
    return layout


def spectral_layout(r, seed=0):
    """Return unit_at_cell (C,) with similar units together, to start swaps from (Hall 1970).

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
    """Pre-optimise the whole sheet with many disjoint swaps at once.

    In each round every cell picks its best partner, and the disjoint ones among these pairs trade
    units. A round is kept only if the exact loss falls; otherwise the better half of its pairs is
    tried, and so on, and the search ends when not even one pair helps. The gain of a pair is the
    fall of the mean loss over all windows, to first order in the windows' sums of r, r² and r near.

    r (C, C): correlations of the units. unit_at_cell (C,): the layout to start from, or None for
    spectral_layout(r, seed). Returns the new unit_at_cell, and the mean loss over all windows at
    the start and after each round.
    """
    layout = spectral_layout(r, seed) if unit_at_cell is None else np.array(unit_at_cell)
    r = r[layout][:, layout]  # from here on between cells
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
    """Halve `pairs` until swapping them lowers the loss; return them, and the new r and loss."""
    while len(pairs):
        moved = np.arange(len(r))
        moved[pairs] = moved[pairs[:, ::-1]]
        swapped = r[moved][:, moved]
        swapped_loss = sheet.losses(swapped).mean()
        if swapped_loss < loss - 1e-7:  # more than rounding
            return pairs, swapped, swapped_loss
        pairs = pairs[: len(pairs) // 2]
    return pairs, r, loss


def disjoint_pairs(gains):
    """Pair each cell with its best partner while both are free: (P, 2), best first."""
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
