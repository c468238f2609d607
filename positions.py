"""Where each unit of a layer sits on a square cortical sheet, and what follows from it: windows, the spatial loss, swaps, Moran's I.

A layer of C = side² units has a permutation `unit_at_cell` (C,): cell c, in raster order, holds unit unit_at_cell[c]. Everything else is
derived. A window is a set of cells around a centre; the cells of every window are listed in the same order, so the distances inside a
window are one constant matrix for all windows and layers. A map on the sheet is values[unit_at_cell].reshape(side, side).

The spatial loss is the one of Margalit et al. 2024 (TDANN) and Rathi et al. 2025 (TopoLM): 1/2 (1 - corr(r, D)), r the correlations of the
units' activations and D = 1 / (1 + distance) their closeness, over the pairs of units of a window.
"""
import collections
import io
import json
import os
import pickle
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F


# ---- the sheet

def layer_names(n_layer):
    """The spatial layers in order: ['layer.0.attn', 'layer.0.mlp', 'layer.1.attn', ...]."""
    return [f"layer.{i}.{sublayer}" for i in range(n_layer) for sublayer in ("attn", "mlp")]


def sheet_side(n_units):
    """Side of the square sheet of n_units cells; ValueError where n_units is no square."""
    side = int(n_units ** 0.5)
    if side * side != n_units:
        raise ValueError(f"n_embd={n_units} is not a square, so its units fill no square sheet: take {side ** 2} or {(side + 1) ** 2}, "
                         "or positions=none")
    return side


def window_cells(side, radius, norm=float("inf")):
    """Cells (M, n) of every window that lies whole on the sheet: all cells closer than `radius` to a centre in the p-norm `norm` (1, 2, inf).

    With the published inf norm a window is (2·radius-1)² cells, centres stay radius-1 cells from the edge: M = (side - 2(radius-1))²."""
    reach = radius - 1
    if radius < 2 or 2 * reach + 1 > side:
        raise ValueError(f"radius={radius} leaves no window on a sheet of {side} x {side} units: take 2 to {(side + 1) // 2}")
    offsets = np.stack(np.mgrid[-reach:reach + 1, -reach:reach + 1], -1).reshape(-1, 2)
    offsets = offsets[np.linalg.norm(offsets, ord=norm, axis=1) < radius]  # (n, 2)
    centres = np.stack(np.mgrid[reach:side - reach, reach:side - reach], -1).reshape(-1, 2)  # (M, 2)
    return ((centres[:, None] + offsets) @ (side, 1)).astype(np.int64)


def closeness(cells, side):
    """D (n, n): 1 / (1 + Euclidean distance) between cells (n,) of the sheet, in cells."""
    at = np.stack(np.divmod(np.asarray(cells), side), -1).astype(np.float64)  # (n, 2)
    return 1 / (1 + np.linalg.norm(at[:, None] - at, axis=-1))


def draw_windows(n_layers, n_windows, count, generator):
    """Ids (n_layers, count) of windows drawn without replacement, each layer its own; all of them, in order, where count is 0 or too large."""
    if not 0 < count < n_windows:
        return torch.arange(n_windows).repeat(n_layers, 1)
    return torch.rand(n_layers, n_windows, generator=generator).argsort(1)[:, :count]


# ---- layouts: unit_at_cell (n_layers, C)

def random_positions(n_layer, n_units, seed=0):
    """Each spatial layer its own seeded permutation: unit_at_cell (2·n_layer, n_units) int64."""
    sheet_side(n_units)
    return np.stack([np.random.default_rng((seed, layer)).permutation(n_units) for layer in range(2 * n_layer)])


def identity_positions(n_layer, n_units):
    """Unit i at cell i in every layer."""
    sheet_side(n_units)
    return np.tile(np.arange(n_units), (2 * n_layer, 1))


def head_mosaic(n_head, n_units):
    """unit_at_cell (n_units,) with each attention head a square patch of a square mosaic (16 heads x 49 units: 4 x 4 patches of 7 x 7)."""
    patches, patch = round(n_head ** 0.5), round((n_units // n_head) ** 0.5)
    if patches ** 2 != n_head or patch ** 2 * n_head != n_units:
        raise ValueError(f"head_loss=True wants a square number of heads of square size, not n_head={n_head} with n_embd={n_units} "
                         "(16 heads of 49 units, say)")
    units = np.arange(n_units).reshape(patches, patches, patch, patch)  # (head row, head column, row, column)
    return units.transpose(0, 2, 1, 3).reshape(-1)


def save_positions(path, unit_at_cell, **facts):
    """One small .npz: an int32 permutation (C,) per spatial layer under its name, and the facts of its making as JSON. Written aside and renamed."""
    names = layer_names(len(unit_at_cell) // 2)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, facts=json.dumps(facts), **{name: row.astype(np.int32) for name, row in zip(names, unit_at_cell)})
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.tmp", "wb") as f:
        f.write(buffer.getvalue())
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def load_positions(path, n_layer, n_units):
    """unit_at_cell (2·n_layer, n_units) int64 from an .npz of save_positions, or from a folder of TopoLM's layer.N.attn.pkl and layer.N.mlp.pkl;
    ValueError where it is torn, or made for another shape."""
    remedy = f"make one with python init_pos.py n_layer={n_layer} n_embd={n_units}"
    if not os.path.exists(path):
        raise FileNotFoundError(f"no positions file {path}: {remedy}, or leave positions= out for the seeded permutation")
    try:
        if os.path.isdir(path):
            found = read_layer_pickles(path)[0]
        else:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files if name.startswith("layer.")}
    except ValueError as e:
        if os.path.isdir(path):
            raise ValueError(str(e)) from None
        raise ValueError(f"{path} is no positions file ({type(e).__name__}): {remedy}") from None
    except Exception as e:
        raise ValueError(f"{path} is no positions file ({type(e).__name__}): {remedy}") from None
    names = layer_names(n_layer)
    if sorted(found) != sorted(names) or any(found[name].shape != (n_units,) for name in names):
        shape = f"{len(found) // 2} layers x {len(next(iter(found.values()), ()))} units"
        raise ValueError(f"{path} is for {shape}, the model has {n_layer} layers x {n_units} units: {remedy}")
    rows = np.stack([found[name] for name in names]).astype(np.int64)
    if not (np.sort(rows, 1) == np.arange(n_units)).all():
        raise ValueError(f"{path} does not place every unit once (no permutation): {remedy}")
    return rows


# ---- position files of the published TopoLM

class Holder:
    """What a pickled object of somebody else's class becomes: its attributes and nothing else."""


def read_pickle(path, allowed=()):
    """The object in a pickle file, made of plain types, of Holders for the class names in `allowed` and, where there are any, of torch tensors, whose
    nested pickles are read with weights_only=True. Raises ValueError for a torn file, and for one that asks for anything else, code say."""
    known = {("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2, ("collections", "OrderedDict"): collections.OrderedDict,
             ("torch.storage", "_load_from_bytes"): lambda b: torch.load(io.BytesIO(b), weights_only=True)} if allowed else {}

    class Restricted(pickle.Unpickler):
        def find_class(self, module, name):
            if name in allowed:
                return Holder
            if (module, name) not in known:
                raise pickle.UnpicklingError(f"it wants {module}.{name}")
            return known[module, name]

    try:
        with open(path, "rb") as f:
            return Restricted(f).load()
    except Exception as e:  # a torn pickle raises nearly anything
        raise ValueError(f"{path} cannot be read ({type(e).__name__}: {' '.join(str(e).split())[:120]}): it is torn, or not what its name says") from None


def read_layer_pickles(folder):
    """TopoLM's position files layer.N.attn.pkl and layer.N.mlp.pkl: {layer: unit_at_cell (C,)}, and {radius, windows} that they were made for.

    A file gives each unit's coordinates (C, 2) on the sheet, the first taken as its row. The published swap-optimised ones put several units on one cell
    and leave others empty: that is said, and the units are placed with the least total displacement, one a cell (an assignment problem)."""
    names = sorted((f[:-4] for f in os.listdir(folder) if f.startswith("layer.") and f.endswith(".pkl")), key=lambda n: [p.zfill(4) for p in n.split(".")])
    if not names:
        raise ValueError(f"{folder} holds no position files: layer.0.attn.pkl, layer.0.mlp.pkl and so on, or one .npz of init_pos.py")
    rows, shared, facts = {}, [], {}
    for name in names:
        path = os.path.join(folder, f"{name}.pkl")
        layer = read_pickle(path, allowed=("LayerPositions",))
        at: Any = getattr(layer, "coordinates", None)
        if not torch.is_tensor(at) or at.dim() != 2 or at.size(1) != 2 or not at.float().isfinite().all():
            raise ValueError(f"{path} holds no coordinates (units, 2): it is no position file of TopoLM")
        at = at.double().numpy()
        rows[name], moved = place_units(at)
        if moved.any():
            shared.append((name, len(np.unique(at, axis=0)), moved))
        masks: Any = getattr(layer, "neighborhood_indices", None)
        if torch.is_tensor(masks) and masks.dim() == 2:
            facts = dict(radius=int(round((masks[0].sum().item() ** 0.5 + 1) / 2)), windows=int(getattr(layer, "neighborhoods_per_batch", 0)))
    if shared and os.environ.get("RANK", "0") == "0":
        name, cells, moved = shared[0]
        print(f"{folder}: {len(shared)} of {len(names)} position files are no permutations; in {name} {len(moved)} units share {cells} cells. One unit a cell "
              f"now: {np.count_nonzero(moved)} of them moved, by {moved[moved > 0].mean():.1f} cells on average, {moved.max():.1f} at most.", file=sys.stderr)
    return rows, facts


def place_units(coordinates):
    """unit_at_cell (C,) that puts units of coordinates (C, 2), row and column, on the cells of their square sheet with the least total displacement,
    and how far each unit moved (C,), in cells. Coordinates that fill the sheet are taken as they are."""
    from scipy.optimize import linear_sum_assignment
    side = sheet_side(len(coordinates))
    cell = np.rint(coordinates).astype(np.int64) @ (side, 1)
    if not (np.array_equal(np.sort(cell), np.arange(side * side)) and np.array_equal(np.stack(np.divmod(cell, side), 1), coordinates)):
        cells = np.stack(np.divmod(np.arange(side * side), side), 1)
        cell = linear_sum_assignment(np.linalg.norm(coordinates[:, None] - cells, axis=-1))[1]  # of each unit
    moved = np.linalg.norm(np.stack(np.divmod(cell, side), 1) - coordinates, axis=1)
    return np.argsort(cell), moved


# ---- spatial loss

def onednn(weight):
    """May products without a gradient go straight to oneDNN? Float32 takes it half the time of MKL, torch's choice, on AMD's CPUs."""
    there = weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")
    return there and (weight.dtype is torch.float32 or weight.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(x, weight, bias=None, packed=None):
    """x (..., I) @ weight (O, I).T + bias without a gradient; packed: the weight in oneDNN's own layout, where there is one."""
    if packed is not None or onednn(weight) and x.dtype is weight.dtype:
        return torch.ops.mkldnn._linear_pointwise(x, weight if packed is None else packed, bias, "none", [], "")
    return F.linear(x, weight, bias)


def normalise(x):
    """Columns of x (T, C) centred and of unit length in float32, so that z.T @ z are Pearson correlations; a constant column becomes zeros."""
    x = x.float()
    scale = x.square().sum(0)
    x = x - x.mean(0)
    energy = x.square().sum(0)
    alive = energy > 1e-11 * scale + 1e-30  # below that, what is left of a constant unit is rounding
    return x * torch.where(alive, energy, 1.0).rsqrt() * alive


def window_correlations(x, units):
    """Pearson correlations (K, n, n), float32, over the T rows of x (T, C) between the units (K, n) of each window."""
    z = normalise(x)  # (T, C)
    K, n = units.shape
    if K * n * n < z.size(1) ** 2:  # few windows: gather their units
        return WindowCorrelations.apply(z, units)
    return (z.t() @ z)[units[:, :, None], units[:, None, :]]  # many: one Gram matrix of the layer, then its blocks


class WindowCorrelations(torch.autograd.Function):
    """z (T, C), units (K, n) → z.T @ z within each window, (K, n, n). Backward takes one product instead of two, and adds window by window, whose units are
    distinct: rows are copied, where a scattered sum would go element by element."""

    @staticmethod
    def forward(ctx, z, units):
        gathered = z.t().index_select(0, units.flatten()).view(*units.shape, -1)  # (K, n, T)
        ctx.save_for_backward(gathered, units)
        ctx.width = z.size(1)
        return gathered @ gathered.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        gathered, units = ctx.saved_tensors
        grad = (grad + grad.transpose(1, 2)) @ gathered  # (K, n, T)
        out = grad.new_zeros(ctx.width, grad.size(2))
        for rows, one in zip(units, grad):
            out[rows] = out[rows] + one
        return out.t().contiguous(), None


def spatial_loss(x, units, near, kind="relative", accum="mean"):
    """How far from "nearby units are alike" a layer is, over the K windows given.

    x (..., C): activations of one spatial layer, every leading index a token.
    units (K, n): the units in each window's cells. near (n, n): closeness() of those cells.
    kind: 'relative', 1/2 (1 - corr(r, D)) in [0, 1] (Margalit et al. 2024), or 'absolute', mean |r - D| over pairs (Lee et al. 2020).
    accum: 'mean' or 'maximum' over the windows. Correlations are float32 under any autocast; constant units count as uncorrelated.
    For every window of the sheet, units may be unit_at_cell (C,) and near a WholeSheet (kind 'relative')."""
    if isinstance(near, WholeSheet):
        return whole_sheet_loss(x, units, near, accum)
    with torch.autocast(x.device.type, enabled=False):
        r = window_correlations(x.flatten(0, -2), units)  # (K, n, n)
        n = r.size(1)
        q = n * (n - 1)
        off = 1 - torch.eye(n, device=r.device)
        if kind == "absolute":
            loss = ((r - near).abs() * off).sum((1, 2)) / q
        else:
            d = (near - (near * off).sum() / q) * off  # centred closeness: the mean of r falls out of the cross term
            r = r * off
            s1, s2 = r.sum((1, 2)), r.square().sum((1, 2))
            var = (s2 - s1.square() / q).clamp_min(1e-9)  # all correlations equal: rho is 0, not 0/0
            loss = 0.5 * (1 - (r * d).sum((1, 2)) * (var * d.square().sum()).rsqrt())
        return loss.max() if accum == "maximum" else loss.mean()


class WholeSheet(NamedTuple):
    """Constants of the loss over every square window of a sheet (whole_sheet). Units are taken in pairs of the sheet's rows that can share a window
    (P of them, each pair once or, inside a strip of rows, twice): times (P, side, side) is how often a pair of units is to count, near
    (P, side, side) that times its centred closeness, box (W, side) is 1 where one of the W window columns covers a column, both (W, P) where a window
    row covers both rows of a pair, scale () the squared norm of a window's centred closeness."""
    times: torch.Tensor
    near: torch.Tensor
    box: torch.Tensor
    both: torch.Tensor
    scale: torch.Tensor


STRIP = 4  # rows of the sheet in a strip: small ones compute fewer pairs twice, large ones make larger matrix products


def whole_sheet(side, radius):
    """WholeSheet of all windows of p-norm inf on a side x side sheet."""
    near = closeness(window_cells(side, radius)[0], side)
    pairs: np.ndarray = ~np.eye(len(near), dtype=bool)
    wide = 2 * radius - 1
    mean = near[pairs].mean()
    first = np.arange(-(-side // STRIP) * STRIP)[:, None]
    second = first // STRIP * STRIP + np.arange(STRIP + wide - 1)  # a row of a strip, and each row from the strip's first on that may share a window
    i, k = (np.broadcast_to(row, second.shape).ravel() for row in (first, second))
    real, i, k = (i < side) & (k < side), i.clip(max=side - 1), k.clip(max=side - 1)
    times = np.where(i // STRIP == k // STRIP, 1.0, 2.0)[:, None, None] * real[:, None, None] * (1 - (i == k)[:, None, None] * np.eye(side))
    closer = closeness(np.arange(side * side), side).reshape(side, side, side, side)[i, :, k] - mean
    column, start = np.arange(side), np.arange(side - wide + 1)[:, None]
    box = ((column >= start) & (column < start + wide)).astype(float)
    return WholeSheet(*(torch.as_tensor(a, dtype=torch.float32) for a in
                        (times, times * closer, box, box[:, i] * box[:, k] * real, np.square(near - mean)[pairs].sum())))


@torch.library.custom_op("nanocortex::strip_products", mutates_args=())
def strip_products(z: torch.Tensor, strip: int, wide: int) -> torch.Tensor:
    """Products of z (C, T), float32, without a gradient: each strip of so many rows with the `wide` rows from its first on, (strips, strip, wide), zeros
    beyond the last. An operator of our own: the compiler has no place for oneDNN's."""
    r = z.new_zeros(-(-len(z) // strip), strip, wide)
    for at, block in zip(range(0, len(z), strip), r):
        a, b = z[at:at + strip], z[at:at + wide]
        block[:len(a), :len(b)] = linear(a, b)
    return r


@strip_products.register_fake
def _(z, strip, wide):
    return z.new_empty(-(-len(z) // strip), strip, wide)


class StripCorrelations(torch.autograd.Function):
    """Correlations of z (T, C) between the units of each strip of the sheet and those that share a window with it, (strips, strip, strip + reach):
    z.T @ z without the pairs that are far apart, and most pairs once. Its products are float32, its gradient's of the type `dtype`."""

    @staticmethod
    def forward(ctx, z, unit_at_cell, strip, reach, dtype):
        z = z.t()[unit_at_cell]  # (C, T), in the order of the cells
        ctx.save_for_backward(z.to(dtype), unit_at_cell)
        ctx.strip, ctx.wide = strip, strip + reach
        return strip_products(z, strip, ctx.wide)

    @staticmethod
    def backward(ctx, grad):
        (z, unit_at_cell), strip, wide = ctx.saved_tensors, ctx.strip, ctx.wide
        C, starts = len(z), range(0, len(z), strip)
        once = torch.cat([F.pad(block[:C - at, :C - at], (at, max(0, C - at - wide))) for at, block in zip(starts, grad.to(z.dtype))])
        both = once + once.t()  # (C, C), the gradient of all correlations of a unit in its row
        bands = [(slice(at, at + strip), slice(max(0, at + strip - wide), at + wide)) for at in starts]
        dz = torch.cat([both[rows, near] @ z[near] for rows, near in bands])  # (C, T)
        return dz[unit_at_cell.argsort()].t().to(grad.dtype).contiguous(), None, None, None, None


def whole_sheet_loss(x, unit_at_cell, sheet, accum="mean"):
    """spatial_loss (relative) over every window of a sheet, at a third of its cost: box sums of r, r² and r·D over pairs of rows and columns.
    x (..., C), unit_at_cell (C,), sheet: a WholeSheet."""
    with torch.autocast(x.device.type, enabled=False):
        (P, side, _), wide = sheet.times.shape, sheet.box.size(1) - sheet.box.size(0) + 1
        dtype = torch.bfloat16 if x.dtype is torch.bfloat16 else torch.float32
        r = StripCorrelations.apply(normalise(x.flatten(0, -2)), unit_at_cell, STRIP * side, (wide - 1) * side, dtype)
        r = r.view(-1, STRIP, side, STRIP + wide - 1, side).transpose(2, 3).reshape(P, side, side)
        sums = torch.stack([r * sheet.times, r.square() * sheet.times, r * sheet.near])  # (3, P, side, side)
        pairs = (sheet.box[:, :, None] * sheet.box[:, None]).flatten(1)  # (W, side * side): both columns of a pair are in the window's
        s1, s2, cross = (sheet.both @ sums.flatten(2)) @ pairs.t()  # (W, W) each, a window each
        var = (s2 - s1.square() / (wide ** 2 * (wide ** 2 - 1))).clamp_min(1e-9)
        loss = 0.5 * (1 - cross * (var * sheet.scale).rsqrt())
        return loss.max() if accum == "maximum" else loss.mean()


def weight_loss(weight, unit_at_cell, factor=3.0):
    """TopoLoss, the rival (Deb et al. 2025, arXiv 2501.16396): how far the sheet of incoming weights is from its own blurred version.

    weight (C, in): of the linear layer whose output units lie on the sheet; unit_at_cell (C,). The sheet is shrunk bilinearly by `factor` per axis and
    enlarged again; loss = 1 - mean over cells of the cosine between a cell's weights and its blurred ones, in float32. Needs no activations."""
    side = sheet_side(len(weight))
    with torch.autocast(weight.device.type, enabled=False):
        sheet = weight.float()[unit_at_cell].t().reshape(1, -1, side, side)
        small = torch.nn.functional.interpolate(sheet, scale_factor=1 / factor, mode="bilinear")
        blurred = torch.nn.functional.interpolate(small, size=(side, side), mode="bilinear")
        return 1 - torch.cosine_similarity(sheet, blurred, dim=1).mean()


# ---- Moran's I

def moran(values, neighbours="queen"):
    """Moran's I of maps (..., side, side): near 0 for noise (-1/(N-1) expected), near 1 for smooth fields, -1 for a checkerboard under 'rook'.

    I = (N/W) Σ_ij w_ij z_i z_j / Σ_i z_i², z centred, w row-standardised (each cell's neighbours share the weight 1, the convention of PySAL).
    neighbours: 'queen' (8) as published for TopoLM, or 'rook' (4). A constant map has no I: nan."""
    if neighbours not in ("queen", "rook"):
        raise ValueError(f"neighbours must be 'queen' or 'rook', not '{neighbours}'")
    z = np.asarray(values, np.float64)
    z = z - z.mean((-1, -2), keepdims=True)
    rows, columns = z.shape[-2:]
    steps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0) and (neighbours == "queen" or i * j == 0)]
    padded = np.pad(z, [(0, 0)] * (z.ndim - 2) + [(1, 1), (1, 1)])
    here = np.pad(np.ones((rows, columns)), 1)

    def around(a):
        return sum(a[..., 1 + i:1 + i + rows, 1 + j:1 + j + columns] for i, j in steps)

    with np.errstate(invalid="ignore", divide="ignore"):
        return (z * around(padded) / around(here)).sum((-1, -2)) / np.square(z).sum((-1, -2))


# ---- swaps: a layout of correlations r fixed, pre-optimised before training (Margalit et al. 2024)

class Sheet:
    """The windows of a square sheet in the form that swaps use; a constant of the sheet, one for all layers.

    cells (M, n): the cells of every window. inside (M, C): 1 where a window has a cell. near (C, C): the closeness of any two cells, minus its
    mean over the pairs of a window, with a zero diagonal. Raises ValueError as sheet_side and window_cells do."""

    def __init__(self, n_units, radius, norm=float("inf"), dtype=np.float32):
        self.side = sheet_side(n_units)
        self.cells = window_cells(self.side, radius, norm)
        self.pairs = self.cells.shape[1] * (self.cells.shape[1] - 1)
        self.inside = np.zeros((len(self.cells), n_units), dtype)
        np.put_along_axis(self.inside, self.cells, 1, 1)
        near = closeness(np.arange(n_units), self.side)
        np.fill_diagonal(near, 0)
        near -= near[np.ix_(self.cells[0], self.cells[0])].sum() / self.pairs
        np.fill_diagonal(near, 0)
        self.near = near.astype(dtype)
        self.near_energy = np.square(near[np.ix_(self.cells[0], self.cells[0])]).sum()

    def sums(self, r):
        """Over the pairs of cells in each window, from the correlations r (C, C) between cells, of zero diagonal: Σ r, Σ r near and the
        variance Σ r² - (Σ r)² / pairs; (M,) float64 each."""
        s1, s2, cross = (((self.inside @ a) * self.inside).sum(1, dtype=np.float64) for a in (r, r * r, r * self.near))
        return s1, cross, np.maximum(s2 - s1 * s1 / self.pairs, 1e-9)

    def losses(self, r):
        """Relative spatial loss (M,) of every window; equals spatial_loss."""
        _, cross, var = self.sums(r)
        return 0.5 * (1 - cross / np.sqrt(var * self.near_energy))

    def slopes(self, r):
        """(A, B), (C, C) each: the mean loss changes by Σ_{i<j} A_ij d(r_ij) + B_ij d(r_ij²), to first order in the windows' sums."""
        s1, cross, var = self.sums(r)
        by_var = cross / (4 * var ** 1.5 * self.near_energy ** 0.5)  # dL / d(var), var = Σ r² - (Σ r)² / pairs
        by_cross = -1 / (2 * np.sqrt(var * self.near_energy))
        spread = lambda weights: (self.inside.T * (2 * weights / len(self.inside)).astype(r.dtype)) @ self.inside  # onto the pairs of cells
        A = spread(by_cross) * self.near - spread(2 * by_var * s1 / self.pairs)
        B = spread(by_var)
        np.fill_diagonal(A, 0)
        np.fill_diagonal(B, 0)
        return A, B


def correlations(x):
    """Pearson correlations (C, C), float32 numpy, between the columns of x (T, C), with a zero diagonal: O(T C²), made once per layer.
    Constant units count as uncorrelated, as in normalise()."""
    x = torch.as_tensor(x).detach().float().cpu().numpy()
    mean = x.mean(0)
    z = x - mean
    r = z.T @ z  # numpy sees the symmetry and makes one half, in half of torch's time
    energy = r.diagonal().copy()
    alive = energy > 1e-11 * (energy + len(x) * mean * mean) + 1e-30
    scale = alive / np.sqrt(np.where(alive, energy, 1))
    r *= scale
    r *= scale[:, None]
    np.fill_diagonal(r, 0)
    return r


def swap_gain(r, near, a, b):
    """Rise of the cross term Σ_{i<j} r_ij near_ij when the units in cells a and b change places: Σ_{k≠a,b} (r_ak - r_bk)(near_bk - near_ak), in O(n).

    r, near (n, n), symmetric, of zero diagonal. A swap moves the correlations of a window about and changes neither their mean nor their variance,
    so that window's loss falls by gain / (2 sqrt(Σ_{i<j} (r - mean)² Σ_{i<j} (near - mean)²))."""
    return (r[a] - r[b]) @ (near[b] - near[a]) + 2 * r[a, b] * near[a, b]


def swap_gains(r, near):
    """swap_gain of all pairs at once (n, n): M + Mᵀ - m 1ᵀ - 1 mᵀ + 2 r ⊙ near, with M = r near and m its diagonal."""
    m = r @ near
    gains = m + m.T
    gains -= m.diagonal()
    gains -= m.diagonal()[:, None]
    gains += 2 * r * near
    return gains


def swap_window(r, sheet, unit_at_cell, windows=50, trials=50, seed=0):
    """Pre-optimisation as published: in each of `windows` random windows (each once, while there are enough), `trials` random pairs of cells
    trade units, unless that raises the window's loss.

    r (C, C): correlations of the units. sheet: a Sheet. unit_at_cell (C,): where it starts.
    Returns the new unit_at_cell and [mean loss over all windows before, after]."""
    rng, row = np.random.default_rng(seed), np.array(unit_at_cell)
    near = sheet.near[np.ix_(sheet.cells[0], sheet.cells[0])]  # (n, n), the same in every window
    rounds = -(-windows // len(sheet.cells))
    for window in np.concatenate([rng.permutation(len(sheet.cells)) for _ in range(rounds)])[:windows]:
        units = row[sheet.cells[window]]
        local = r[np.ix_(units, units)]
        for a, b in zip(*(rng.integers(len(units) - k, size=trials) for k in (0, 1))):
            b += b >= a  # any cell but a
            if swap_gain(local, near, a, b) >= 0:
                local[[a, b]] = local[[b, a]]
                local[:, [a, b]] = local[:, [b, a]]
                units[[a, b]] = units[[b, a]]
        row[sheet.cells[window]] = units
    return row, [sheet.losses(r[u][:, u]).mean() for u in (unit_at_cell, row)]


def spectral_layout(r, seed=0):
    """unit_at_cell (C,) with like units together: the first principal component of the correlations r (C, C) orders the units into columns of
    the sheet, the second orders each column. A place to start swaps from, after the quadratic placement of Hall 1970."""
    side = sheet_side(len(r))
    v = np.random.default_rng(seed).standard_normal((len(r), 8)).astype(r.dtype)
    for _ in range(6):  # subspace iteration, close enough for an ordering
        v = np.linalg.qr(r @ v)[0]
    columns = np.argsort(v[:, 0], kind="stable").reshape(side, side)
    return np.take_along_axis(columns, np.argsort(v[columns, 1], 1, kind="stable"), 1).T.flatten()


def swap_sheet(r, sheet, unit_at_cell=None, rounds=200, stop_loss=0.0, seed=0):
    """Pre-optimisation of the whole sheet: in each round every cell names its best partner, and as many of these pairs as are disjoint trade
    units at once. A round counts only when the exact loss falls; else it is tried with half of its pairs, and ends the search at none.

    The gain of a pair is the fall of the mean loss over all windows, overlaps and edges included: exact in the windows' sums of r, r² and
    r near, first order in how the loss follows from these.
    r (C, C): correlations of the units. sheet: a Sheet. unit_at_cell (C,): where it starts, None for spectral_layout(r, seed).
    Stops at stop_loss, or after `rounds`. Returns the new unit_at_cell and the mean loss over all windows: [at the start, after each round]."""
    row = spectral_layout(r, seed) if unit_at_cell is None else np.array(unit_at_cell)
    r = r[row][:, row]  # between cells from here on
    losses, batch = [sheet.losses(r).mean()], len(row)
    while len(losses) <= rounds and losses[-1] > stop_loss:
        A, B = sheet.slopes(r)
        pairs = disjoint_pairs(-swap_gains(r, A) - swap_gains(r * r, B))[:batch]
        while len(pairs):
            moved = np.arange(len(row))
            moved[pairs] = moved[pairs[:, ::-1]]
            new = r[moved][:, moved]
            loss = sheet.losses(new).mean()
            if loss < losses[-1] - 1e-7:  # above rounding
                break
            pairs = pairs[:len(pairs) // 2]
        else:
            break  # not even the best pair alone helps
        row, r, batch = row[moved], new, 2 * len(pairs)
        losses.append(loss)
    return row, losses


def disjoint_pairs(gains):
    """Pairs (P, 2) of cells, best first, none twice: each cell with the partner it gains most with, while both are free and the gain is positive."""
    partner = gains.argmax(1)
    gain = gains[np.arange(len(gains)), partner]
    free, pairs = [True] * len(gains), []
    for a in np.argsort(-gain, kind="stable").tolist():
        b = int(partner[a])
        if gain[a] > 0 and free[a] and free[b]:
            free[a] = free[b] = False
            pairs.append((a, b))
    return np.array(pairs, np.int64).reshape(-1, 2)
