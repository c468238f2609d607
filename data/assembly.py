"""Assemblies: NetCDF4 arrays with named dimensions, as xarray writes and Brain-Score shares them.

NetCDF4 is HDF5: dimensions are dimension scales, an array is a dataset with scales attached, and a
coordinate is a dataset along one of them (one for each level of a MultiIndex).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from data import InputError, check_content

ROWS = ("presentation", "stimulus_id", "image_id", "stimulus")  # what the dimension is called


class Assembly(NamedTuple):
    """One array and its coordinates."""

    values: np.ndarray  # numbers, NaN where missing
    dims: list  # name of each axis
    coords: dict  # {dimension: DataFrame with a column for each coordinate}
    path: Path


def read_assembly(path):
    """Read the largest array of a NetCDF4 file. Raises InputError."""
    import h5py

    path = check_content(path)
    with open(path, "rb") as file:
        if file.read(3) == b"CDF":
            remedy = "save it as NETCDF4 (xarray: to_netcdf(format='NETCDF4'))"
            raise InputError(f"{path} is a NetCDF3 file: {remedy}")
    try:
        with h5py.File(path, "r") as file:
            return _read(file, path)
    except (OSError, RuntimeError, KeyError) as error:  # a file that ends early
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is torn or not NetCDF4 ({reason}): fetch it again") from None


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
    """Return the name of the largest numeric array that is not a coordinate."""
    coordinates = set()
    for item in (file, *variables.values()):  # xarray lists them in an attribute
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
    """Return the names of a dataset's dimensions, "" where there is none."""
    if item.is_scale and item.ndim == 1:
        return [name]
    names = []
    for dim in item.dims:
        names.append(dim[0].name.rsplit("/", 1)[-1] if len(dim) else "")
    return names


def _values(item):
    """Return the content of a dataset: strings as str, missing numbers as NaN."""
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
    """Return an attribute as a string."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def responses(assembly):
    """Return responses (presentations, neuroids), float32, and their coordinates as DataFrames."""
    dims = assembly.dims
    rows = next((name for name in ROWS if name in dims), None)
    if rows is None or "neuroid" not in dims:
        names = ", ".join(dims)
        raise InputError(f"{assembly.path} has the dimensions {names}, not presentation x neuroid")
    values = np.moveaxis(assembly.values, [dims.index(rows), dims.index("neuroid")], [0, 1])
    others = [dim for dim in dims if dim not in (rows, "neuroid")]
    if values.size != values.shape[0] * values.shape[1]:
        sizes = dict(zip(others, values.shape[2:]))
        raise InputError(f"{assembly.path} has several {sizes}: average them or choose one first")
    y = np.ascontiguousarray(values.reshape(values.shape[:2]), dtype=np.float32)
    return y, assembly.coords[rows].copy(), assembly.coords["neuroid"].copy()


def without_gaps(y, missing, where):
    """Return (rows, columns, left_out): what to keep of responses y (P, V), bool, and a report.

    Drops units without any response; of the others, drops units or presentations (`missing`) with
    gaps. where: begins the InputError if nothing is left.
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
        raise InputError(f"{where}: there are no responses")
    if not rows.any() or not columns.any():
        raise InputError(
            f"{where}: all {missing} have gaps ({(~recorded).mean():.1%} of the responses are "
            f"missing); missing={other} leaves out the {other} with gaps instead"
        )
    counts = {
        "units that took no part": (~took_part).sum(),
        "units with gaps": (took_part & ~columns).sum(),
        "presentations with gaps": (~rows).sum(),
    }
    return rows, columns, [f"{count:,} {what}" for what, count in counts.items() if count]
