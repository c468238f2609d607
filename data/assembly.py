"""Assemblies: NetCDF4 arrays with named dimensions, as xarray writes and Brain-Score shares them.

NetCDF4 is HDF5: a dimension is a dimension scale, an array is a dataset that has scales attached,
a coordinate is another dataset along one of them (the levels of a MultiIndex come as one
coordinate each).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from data import InputError, check_content

ROWS = ("presentation", "stimulus_id", "image_id", "stimulus")  # names of the dimension of stimuli


class Assembly(NamedTuple):
    """One array and what stands along its dimensions."""

    values: np.ndarray  # numbers; a missing one is NaN
    dims: list  # names, one for each axis
    coords: dict  # {dimension: DataFrame, a coordinate each column}
    path: Path


def read_assembly(path):
    """The largest array of a NetCDF4 file. Raises InputError for what is missing, torn or other."""
    import h5py

    path = check_content(path)
    with open(path, "rb") as file:
        if file.read(3) == b"CDF":
            cure = "save it as NETCDF4 (xarray: to_netcdf(format='NETCDF4'))"
            raise InputError(f"{path} is a NetCDF3 file: {cure}")
    try:
        with h5py.File(path, "r") as file:
            return _read(file, path)
    except (OSError, RuntimeError, KeyError) as error:  # what HDF5 says of a file that ends early
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is torn, or no NetCDF4 file ({reason}): fetch it again") from None


def _read(file, path):
    variables = {name: item for name, item in file.items() if hasattr(item, "dims")}
    array = _largest_array(file, variables, path)
    dims = _dims(array, variables[array])
    coords = {}
    for dim, length in zip(dims, variables[array].shape):
        coords[dim] = pd.DataFrame(index=range(length))
    for name, item in variables.items():
        label = _plain(item.attrs.get("NAME", ""))
        if item.ndim != 1 or name == array or label.startswith("This is a netCDF dimension but"):
            continue
        (dim,) = _dims(name, item)
        if dim in coords:
            coords[dim][name] = _values(item)
    return Assembly(_values(variables[array]), dims, coords, path)


def _largest_array(file, variables, path):
    """The name of the array: numbers along named dimensions that are no coordinate of another."""
    coordinates = set()
    for item in (file, *variables.values()):  # xarray names coordinates in an attribute
        coordinates |= set(_plain(item.attrs.get("coordinates", "")).split())
    sizes = {}
    for name, item in variables.items():
        is_array = not item.is_scale and name not in coordinates and item.dtype.kind in "fiu"
        if is_array and all(_dims(name, item)):
            sizes[name] = (item.ndim, item.size)
    if not sizes:
        names = ", ".join(file) or "nothing"
        raise InputError(f"{path} holds no array with named dimensions, only {names}")
    return max(sizes, key=sizes.get)


def _dims(name, item):
    """The names of a dataset's dimensions, "" for one without."""
    if item.is_scale and item.ndim == 1:
        return [name]
    names = []
    for dim in item.dims:
        names.append(dim[0].name.rsplit("/", 1)[-1] if len(dim) else "")
    return names


def _values(item):
    """The content of a dataset: strings as str, missing numbers as NaN."""
    import h5py

    if h5py.check_string_dtype(item.dtype):
        return np.asarray(item.asstr()[()], dtype=object)
    values = item[()]
    for key in ("_FillValue", "missing_value"):
        if key in item.attrs:
            missing = values == np.ravel(item.attrs[key])[0]
            if missing.any():
                values = np.where(missing, np.nan, values)
    for key, operation in (("scale_factor", np.multiply), ("add_offset", np.add)):
        if key in item.attrs:  # packed into integers
            values = operation(values, np.ravel(item.attrs[key])[0])
    if _plain(item.attrs.get("dtype", "")) == "bool":
        values = values.astype(bool)
    return values


def _plain(value):
    """An attribute as a string."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def responses(assembly):
    """((P, V) float32, presentations, units): presentations in rows, neuroids in columns, and the
    DataFrames of their coordinates. A single time bin is taken off. Raises InputError."""
    dims = assembly.dims
    rows = next((name for name in ROWS if name in dims), None)
    if rows is None or "neuroid" not in dims:
        there = ", ".join(dims)
        raise InputError(f"{assembly.path} has the dimensions {there}, not presentation x neuroid")
    values = np.moveaxis(assembly.values, [dims.index(rows), dims.index("neuroid")], [0, 1])
    others = [dim for dim in dims if dim not in (rows, "neuroid")]
    if values.size != values.shape[0] * values.shape[1]:
        sizes = dict(zip(others, values.shape[2:]))
        raise InputError(f"{assembly.path} has several {sizes}: average or choose one before")
    y = np.ascontiguousarray(values.reshape(values.shape[:2]), dtype=np.float32)
    return y, assembly.coords[rows].copy(), assembly.coords["neuroid"].copy()


def without_gaps(y, missing, where):
    """(rows, columns, left_out): what of responses y (P, V) to keep, boolean, so that no gap stays.

    Units without any response go. Where others have gaps, `missing` goes: units or presentations.
    left_out: what went, in words; where: begins the sentence of the InputError if nothing stays.
    """
    recorded = np.isfinite(y)
    took_part = recorded.any(axis=0)
    rows = np.ones(len(y), bool)
    columns = took_part
    other = "presentations"
    if missing == "units":
        columns = recorded.all(axis=0)
    else:
        other = "units"
        rows = recorded[:, took_part].all(axis=1)
    if not took_part.any():
        raise InputError(f"{where}: there is not one response")
    if not rows.any() or not columns.any():
        raise InputError(
            f"{where}: all {missing} have gaps ({(~recorded).mean():.1%} of the responses are "
            f"missing); with missing={other} the {other} that have gaps are left out instead"
        )
    counts = {
        "units that took no part": (~took_part).sum(),
        "units with gaps": (took_part & ~columns).sum(),
        "presentations with gaps": (~rows).sum(),
    }
    return rows, columns, [f"{count:,} {what}" for what, count in counts.items() if count]
