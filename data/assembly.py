"""Assemblies: NetCDF4 arrays with named dimensions and coordinates, as xarray writes them and Brain-Score publishes them. Read with h5py, fetched whole.

NetCDF4 is HDF5: a dimension is a dimension scale, an array is a dataset that has scales attached, a coordinate is another dataset along one of them
(the levels of a MultiIndex come as one coordinate each). Nothing here is averaged, scaled or left out, except by `take_part` and `whole`, which count.
"""
import hashlib, http.client, os, time, urllib.error, urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd


class Assembly(NamedTuple):
    """One array and what stands along its dimensions."""
    values: np.ndarray     # numbers; a missing one is NaN
    dims: list             # names, one for each axis
    coords: dict           # {dimension: DataFrame, a coordinate each column}
    attrs: dict            # of the array, strings and numbers
    path: Path

    def column(self, dim, *names):
        """(length,) the first of these coordinates that `dim` has; raises ValueError with those that are there."""
        table = self.coords[dim]
        for name in names:
            if name in table:
                return table[name].to_numpy()
        raise ValueError(f"{self.path} has no coordinate '{names[0]}' along {dim}, only {', '.join(table) or 'none'}: it is another file than was expected")


def read_assembly(path):
    """The array of a NetCDF4 file. Raises FileNotFoundError where there is none, ValueError, in a sentence, for what is torn or no NetCDF4."""
    import h5py
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give root= the file, or the folder that holds it")
    with open(path, "rb") as file:
        start = file.read(8)
    if start[:3] == b"CDF":
        raise ValueError(f"{path} is a NetCDF3 file: save it again as NETCDF4 (xarray: to_netcdf(format='NETCDF4'))")
    try:
        with h5py.File(path, "r") as file:
            return _read(file, path)
    except (OSError, RuntimeError, KeyError) as e:  # what HDF5 says of a file that ends too early
        raise ValueError(f"{path} is torn, or no NetCDF4 file ({' '.join(str(e).split())[:120]}): fetch it again") from None


def _read(file, path):
    variables = {name: item for name, item in file.items() if hasattr(item, "dims")}
    dims = {name: _dims(name, item) for name, item in variables.items()}
    about = [str(_plain(item.attrs.get("coordinates", ""))) for item in [file, *variables.values()]]
    beside = {name for text in about for name in text.split()}  # what xarray calls a coordinate
    arrays = [name for name, item in variables.items() if name not in beside and not item.is_scale and item.dtype.kind in "fiu" and all(dims[name])]
    if not arrays:
        raise ValueError(f"{path} holds no array with named dimensions, only {', '.join(file) or 'nothing'}")
    chosen = max(arrays, key=lambda name: (variables[name].ndim, variables[name].size))
    coords = {dim: {} for dim in dims[chosen]}
    for name, item in variables.items():
        nameless = str(_plain(item.attrs.get("NAME", ""))).startswith("This is a netCDF dimension but not")
        if item.ndim == 1 and dims[name] and dims[name][0] in coords and name != chosen and not nameless:
            coords[dims[name][0]][name] = _values(item)
    tables = {dim: pd.DataFrame(columns, index=range(n)) for (dim, columns), n in zip(coords.items(), variables[chosen].shape)}
    attrs = {key: _plain(value) for key, value in variables[chosen].attrs.items() if key not in ("DIMENSION_LIST", "REFERENCE_LIST", "coordinates")}
    return Assembly(_values(variables[chosen]), dims[chosen], tables, attrs, path)


def _dims(name, item):
    if item.is_scale and item.ndim == 1:
        return [name]
    return [dim[0].name.rsplit("/", 1)[-1] if len(dim) else "" for dim in item.dims]


def _values(item):
    """Content of a dataset as NumPy: strings as str, missing numbers as NaN."""
    import h5py
    if h5py.check_string_dtype(item.dtype):
        return np.asarray(item.asstr()[()], dtype=object)
    values = item[()]
    for key in ("_FillValue", "missing_value"):
        if key in item.attrs and (missing := values == np.ravel(item.attrs[key])[0]).any():
            values = np.where(missing, np.nan, values)
    return values.astype(bool) if _plain(item.attrs.get("dtype", "")) == "bool" else values


def _plain(value):
    value = value.item() if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.size == 1) else value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def responses(assembly):
    """((P, V) float32, presentations, units): the array with presentations as rows and neuroids as columns, a single time bin taken off.
    presentations, units: DataFrames of their coordinates. Raises ValueError, in a sentence, for other dimensions."""
    dims = list(assembly.dims)
    rows = next((name for name in ("presentation", "stimulus_id", "image_id", "stimulus") if name in dims), None)
    if rows is None or "neuroid" not in dims:
        raise ValueError(f"{assembly.path} has the dimensions {', '.join(dims)} where presentation and neuroid were expected")
    rest = [i for i, dim in enumerate(dims) if dim not in (rows, "neuroid")]
    if long := [f"{assembly.values.shape[i]} of {dims[i]}" for i in rest if assembly.values.shape[i] != 1]:
        raise ValueError(f"{assembly.path} has {', '.join(long)}: average or choose before, one response for each presentation is read")
    values = assembly.values.squeeze(tuple(rest))
    kept = [dim for dim in dims if dim in (rows, "neuroid")]
    return np.ascontiguousarray(values.T if kept[0] == "neuroid" else values, dtype=np.float32), assembly.coords[rows].copy(), assembly.coords["neuroid"].copy()


def take_part(y):
    """(V,) bool: units with any response at all in y (P, V). The others are of people who were not in this experiment."""
    return np.isfinite(y).any(0)


def whole(y, missing, where):
    """(rows, columns) of y (P, V), boolean, so that what is left has no gap: units with a gap go (missing=units), or presentations (presentations).
    Raises ValueError where nothing is left. where: for the sentence."""
    gaps = ~np.isfinite(y)
    columns = ~gaps.any(0) if missing == "units" else np.ones(y.shape[1], bool)
    rows = ~gaps.any(1) if missing == "presentations" else np.ones(y.shape[0], bool)
    if not rows.any() or not columns.any():
        other = {"units": "presentations", "presentations": "units"}[missing]
        raise ValueError(f"{where}: every one of {y.shape[missing == 'units']} {missing} has responses that are no numbers ({gaps.mean():.1%} of all): "
                         f"with missing={other} those {other} are left out that have them")
    return rows, columns


# ---- fetching

def sha1_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def fetch(url, path, sha1="", tries=4, pause=1.0):
    """Fetch url into path, going on from path.part where an earlier try stopped; it gets its name when size and sha1 (where given) are right.
    Raises FileNotFoundError when the server has no such file, OSError in a sentence when it cannot be reached or something else came."""
    path = Path(path)
    part, total, error = path.with_name(path.name + ".part"), None, "the connection was cut"
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(tries):
        time.sleep(pause * (2 ** attempt - 1))
        have = part.stat().st_size if part.exists() else 0
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=60) as response, open(part, "ab") as file:
                if have and response.status != 206:  # a server that knows no ranges sends it all again
                    file.truncate(0)
                    have = 0
                total = have + int(response.headers["Content-Length"])
                if attempt == 0:
                    print(f"{url}: {total / 1e6:.1f} MB" + (f", {have / 1e6:.1f} of them here" if have else ""), flush=True)
                while block := response.read(1 << 20):
                    file.write(block)
        except urllib.error.HTTPError as e:
            if e.code in (403, 404):  # what an S3 bucket says of a file that it does not have
                raise FileNotFoundError(f"{url} is not there (HTTP {e.code}): give root= a local copy, or url= another place") from None
            if e.code != 416:
                error = f"HTTP {e.code}"
                continue
            total = have  # nothing is left to send
        except (OSError, http.client.HTTPException) as e:
            error = getattr(e, "reason", e)
        if total is not None and part.exists() and part.stat().st_size == total:
            break
    have = part.stat().st_size if part.exists() else 0
    if total is None:
        raise OSError(f"{url} cannot be reached ({error}): go where there is network, or give root= a local copy")
    if have < total:
        raise OSError(f"{url}: {have:,} of {total:,} bytes came ({error}); run the same command again, it goes on from there")
    if have > total or (sha1 and (found := sha1_of(part)) != sha1):
        part.unlink()
        what = f"{have:,} bytes where {total:,} were sent" if have > total else f"sha1 {found} where {sha1} was published"
        raise OSError(f"{url} came damaged, or is another version ({what}), and was removed: run the same command again, or give root= a local copy")
    os.replace(part, path)
