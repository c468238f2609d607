"""What every script starts with, and nothing about any experiment.

    config = configure(Config)      # dataclass defaults < YAML files < key=value, checked by type
    run = Run(config)               # device, precision, ranks, seeds, out folder, log, results

Everything random is keyed, `run.generator(step, micro, "dropout")`: a run that stops at any step
needs nothing but the step to go on, on any number of ranks. Bad input raises InputError, which ends
the script with one sentence and exit status 2.
"""

import ast
import ctypes
import dataclasses
import datetime
import difflib
import errno
import fcntl
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
import runpy
import signal
import subprocess
import sys
import time
import types
import typing
from operator import methodcaller
from pathlib import Path

import yaml

if typing.TYPE_CHECKING:
    import torch
    import torch.distributed as dist

from data import InputError, aside, read_yaml, write_aside  # noqa: F401 (the scripts import them)

HERE = Path(__file__).resolve().parent
# options that cannot change a result, so they do not help to identify a row of results
PLUMBING = "out_dir device compile init_from overwrite log_interval wandb_log wandb_project"
# columns of a row of results that are measured; the others say what was measured
MEASURED = "score chance low high n p p_holm p_corrected shuffled"
LARGEST = 10**12  # no option but a seed is meant to be larger
# what a value that is not of its option's type raises
NOT_PARSED = (ValueError, TypeError, KeyError, OverflowError, RecursionError, yaml.YAMLError)


# ---- options


def configure(Config, argv=None):
    """An instance of the dataclass `Config`: its defaults, then YAML files, then key=value.

    Any number of YAML files may be given; a bare name is looked up in config/. key=value may be
    written --key=value; dots reach into options that are dictionaries. --help prints every option
    and exits. A Config may set RENAMED = {"old": "new"}, POSITIVE, SHARES, SIGNED (see `check`).
    """
    sys.excepthook = _print_one_sentence
    _user_code.clear()  # another script in this process may have loaded some
    script_code(Config)
    if argv is None:
        argv = sys.argv[1:]
    if "-h" in argv or "--help" in argv:
        print(_manual(Config))
        raise SystemExit(0)
    config = Config()
    config.given = {}  # {option that a file or an argument set: its place among the words of argv}
    for place, argument in enumerate(argv):
        if "=" not in argument:
            _read_config_file(config, argument, place)
    for argument in argv:
        key, equals, value = argument.partition("=")
        if re.search("[\ud800-\udfff]", argument):
            raise InputError(f"{argument!r} has bytes that are no UTF-8: type it anew")
        if equals:
            _set_option(config, key.removeprefix("--"), value, "command line")
            config.given[key.removeprefix("--").partition(".")[0]] = len(argv)  # above any file
    _choose_length(config)
    check(config)
    return config


def _choose_length(config):
    """Of max_iters and minutes, the one that was given later counts.

    Given side by side, max_iters counts: in config.yaml it is what the minutes came to.
    """
    given = config.given
    if given.get("max_iters", -1) >= given.get("minutes", math.inf):
        config.minutes = 0.0
    elif "minutes" in given:
        given.pop("max_iters", None)


def _read_config_file(config, name, place):
    path = Path(name)
    if not path.is_file():
        path = HERE / "config" / name
    if not path.is_file():
        raise InputError(f"no config file '{name}' here or in {path.parent} (see --help)")
    try:
        text = path.read_text(encoding="utf-8")
        values = read_yaml(text) or {}
        as_typed = yaml.load(text, yaml.BaseLoader)  # every scalar a string: 01 stays 01
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not a YAML file: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no 'key: value' lines: write one option per line")
    kinds = typing.get_type_hints(type(config))
    for key, value in values.items():
        if kinds.get(key) in (str, list[str], list[dict | str]) and value is not None:
            value = _as_typed(value, as_typed.get(key, value))  # a merged key is not there
        _set_option(config, str(key), value, path)
        config.given[str(key).partition(".")[0]] = place


def _set_option(config, key, value, source):
    """Set one option from `value`, a string or what YAML made of it; `source` is for the error."""
    name, dot, inner = key.partition(".")
    kinds = typing.get_type_hints(type(config))
    if name not in kinds:
        new_name = getattr(config, "RENAMED", {}).get(name)
        if new_name:
            raise InputError(f"{source}: option '{name}' is now called '{new_name}'")
        raise InputError(f"{source}: unknown option '{key}'{_nearest(name, kinds)}")
    if dot:
        group = getattr(config, name)
        if not isinstance(group, dict):
            raise InputError(f"{source}: option '{name}' is not a group of options: no '{key}'")
        try:
            group[inner] = read_yaml(value) if isinstance(value, str) else value
        except NOT_PARSED:
            raise InputError(f"{source}: option '{key}' is no YAML: quote it, '{value}'") from None
        return
    try:
        setattr(config, name, _parse(value, kinds[name]))
    except NOT_PARSED:
        wanted = inspect.formatannotation(kinds[name])
        if typing.get_origin(kinds[name]) is typing.Literal:
            wanted = " or ".join(str(choice) for choice in typing.get_args(kinds[name]))
        raise InputError(f"{source}: option '{key}' must be {wanted}, not '{value}'") from None


def _nearest(key, allowed):
    """The end of a sentence about an unknown key."""
    near = difflib.get_close_matches(key, allowed, 1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; there are {', '.join(sorted(allowed))}"


def _one_line(error):
    return " ".join(str(error).split())


def _parse(value, kind):
    """`value`, a string or what YAML made of it, as the type `kind`; raises if it is not one."""
    origin = typing.get_origin(kind) or kind
    choices = typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):  # int | None, int | Literal["sheet"]
        return _parse_union(value, choices)
    if origin is typing.Literal:
        return {str(choice).lower(): choice for choice in choices}[str(value).lower()]
    if origin is str and not isinstance(value, (list, dict)):
        return "" if value is None else str(value)
    if origin is list:
        return _parse_list(value, choices[0])
    if isinstance(value, str):
        value = read_yaml(value)
    if origin is bool:
        return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
    if origin in (int, float):
        return _parse_number(value, origin)
    if not isinstance(value, origin):
        raise TypeError(value)
    return value


def _parse_number(value, kind):
    number = float(value)
    if isinstance(value, bool) or math.isnan(number) or (kind is int and number % 1):
        raise ValueError(value)
    return kind(value)


def _parse_union(value, kinds):
    if types.NoneType in kinds and str(value).lower() in ("none", "null", ""):
        return None
    try:
        return _parse(value, kinds[0])
    except (ValueError, TypeError):
        return _parse(value, kinds[1])


def _as_typed(value, typed):
    """YAML's `value` with scalars as they are `typed`, but in dicts: 01 and null are names, too."""
    if isinstance(value, list):
        return list(map(_as_typed, value, typed))
    return value if isinstance(value, dict) else typed


def _parse_list(value, kind):
    """A list, given as `[a, b]` or `a,b`. Strings stay as typed."""
    if isinstance(value, str):
        text = value if value.startswith("[") else f"[{value}]"
        value = read_yaml(text)
        if kind in (str, dict | str):
            value = _as_typed(value, yaml.load(text, yaml.BaseLoader))
    if not isinstance(value, list):
        value = [value]
    return [_parse(item, kind) for item in value]


def check(config):
    """Check the range of every number, then run the Config's own check(), if it has one.

    A number is at least 0, unless the Config names it in the strings POSITIVE (above 0; a list: not
    empty), SHARES (0 to 1) or SIGNED (any number; so is one whose default is negative).
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        wanted = _wanted_range(config, field, value)
        if wanted:
            raise InputError(f"option '{field.name}' must be {wanted}, not {value}")
    if hasattr(config, "check"):
        config.check()


def _wanted_range(config, field, value):
    """The range a number should have been in, '' where it is."""

    def is_named_in(rule):
        return field.name in getattr(config, rule, "").split()

    if value == [] and is_named_in("POSITIVE"):
        return "a list of at least one"
    if not isinstance(value, (int, float)):
        return ""
    default = field.default if isinstance(field.default, (int, float)) else 0
    if math.isinf(value) and not math.isinf(default):
        return "finite"
    if LARGEST < value < math.inf and field.name != "seed":
        return f"below {LARGEST:.0e}"
    if value <= 0 and is_named_in("POSITIVE"):
        return "above 0"
    if not 0 <= value <= 1 and is_named_in("SHARES"):
        return "between 0 and 1"
    if value < 0 <= default and not is_named_in("SIGNED"):
        return "at least 0"
    return ""


def check_keys(given, allowed, option):
    """Refuse a key of the dictionary option `option` that nothing reads."""
    for key in given:
        if key not in allowed:
            raise InputError(f"option '{option}' has no key '{key}'{_nearest(key, allowed)}")


# files of the users' own, as they were loaded: they help to identify rows of results
_user_code: dict[Path, bytes] = {}


def load_function(spec, option):
    """The function that spec, `my_file.py:name`, names. The file may import its neighbours."""
    file, _, name = spec.partition(":")
    folder = Path(file).resolve().parent
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        function = runpy.run_path(file, run_name=Path(file).stem)[name]
        files = user_files(file)
        _user_code.update({path: path.read_bytes() for path in files})
    except Exception as error:  # a user's file may raise anything
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise InputError(f"option '{option}': no {spec} ({reason}); give my_file.py:name") from None
    for path in files[1:]:  # a neighbour's name may be taken, by ours or another file's neighbour
        loaded = getattr(sys.modules.get(path.stem), "__file__", None)
        if loaded and path.parent == folder and Path(loaded).resolve() != path:
            raise InputError(f"{path} has the name of {loaded}, which is loaded instead: rename it")
    return function


def user_files(file):
    """A file of the users' own and all that it imports from its folder: packages, in functions."""
    files = [Path(file).resolve()]
    folder = files[0].parent
    for path in files:  # which grows
        for imported in _imports_of(path, folder):
            if imported not in files:
                files.append(imported)
    return files


def _imports_of(path, folder):
    """The files in a folder that the code in `path` imports, wherever in it."""
    files = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        start = folder
        level = getattr(node, "level", 0)  # the dots of a relative import
        if level:
            start = path.parents[level - 1]
        for alias in node.names:
            place = start
            name = f"{getattr(node, 'module', None) or ''}.{alias.name}"
            for part in filter(None, name.split(".")):
                place = place / part
                files += [place.with_name(f"{part}.py"), place / "__init__.py"]
    return [file for file in files if file.is_file()]


def _manual(Config):
    """--help: the script's docstring, then every option, its default, choices and comment."""
    lines = [inspect.getdoc(sys.modules[Config.__module__]) or "", "", "options (key=value):"]
    defaults = dataclasses.asdict(Config())
    kinds = typing.get_type_hints(Config)
    for line in inspect.getsource(Config).partition("\n    def ")[0].splitlines():
        field = re.match(r"    (\w+)\s*:", line)
        comment = line.rpartition("# ")[2] if "# " in line else ""
        if field and field[1] in defaults:
            name, kind = field[1], kinds[field[1]]
            if typing.get_origin(kind) is typing.Literal:
                choices = ", ".join(map(str, typing.get_args(kind)))
                comment = f"{choices}; {comment}".removesuffix("; ")
            lines.append(f"  {name}={defaults[name]}".ljust(34) + comment)
        elif line.startswith("    #"):
            lines.append(f" {comment}")
        elif comment:  # of an option that takes several lines
            lines[-1] += comment
    return "\n".join(lines)


def _print_one_sentence(kind, error, trace):
    """The excepthook: bad input and a full disk end in one sentence; anything else is a bug."""
    full_disk = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    no_right = (errno.EACCES, errno.EPERM, errno.EROFS)
    if issubclass(kind, KeyboardInterrupt):
        raise SystemExit(128 + signal.SIGINT)
    if issubclass(kind, InputError):
        sentence = _one_line(error)
    elif issubclass(kind, OSError) and error.errno in full_disk:
        sentence = f"{error.filename or 'a file'} could not be written ({error.strerror}): "
        sentence += "make room, then start again; what was finished is kept"
    elif issubclass(kind, OSError) and error.errno in no_right:
        sentence = f"{error.filename or 'a file'} may not be read or written ({error.strerror}): "
        sentence += "give another out_dir= or dataset=, or the right to it"
    else:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# ---- keys and hashes


def key_seed(*key):
    """A 63-bit seed from any key, the same on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def hash_options(options):
    """Short hash of those of a dict of options that can change a result."""
    kept = {key: value for key, value in options.items() if key not in PLUMBING.split()}
    return _hash(json.dumps(kept, sort_keys=True, default=str))


def hash_code(Config):
    """Short hash of the code that makes the rows of `Config`; comments do not count."""
    hashes = map(_hash_source, [*script_code(Config), *_user_code.values()])
    return _hash("".join(sorted(hashes)))[:6]


@functools.cache
def script_code(Config):
    """Its script and those that it imports from its folder, model.py and convert.py, and a user's
    script that imports it, as this process runs them.

    Read when a script starts, since one may edit it for the next run while this one goes on.
    """
    script = _file_of(Config.__module__)
    if not script.is_file():
        return []
    paths = {script, HERE / "model.py", HERE / "convert.py"}
    paths |= {path for path in _imports_of(script, script.parent) if path.parent == script.parent}
    paths -= {HERE / "configurator.py"}
    caller = _file_of("__main__")
    if caller.is_file() and script in _imports_of(caller, HERE):
        paths.add(caller)
    return [path.read_bytes() for path in paths if path.is_file()]


def _file_of(module):
    return Path(getattr(sys.modules[module], "__file__", None) or "no file").resolve()


@functools.cache  # each row of results asks for it, and parsing a script takes 0.1 s
def _hash_source(source):
    return _hash(ast.dump(ast.parse(source)))


def keep_memory():
    """Let glibc keep up to 2 GB of freed memory: fresh pages cost a CPU more than arithmetic."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another libc
        return
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its largest


# ---- the run


class Run:
    """Device, precision, ranks, seeds, out folder, log, checkpoints and results of one run.

    Attributes: rank, world, master, device (torch.device), dtype, scaler, out (Path), config, seed;
    stopped: the number of the signal that asked us to stop, or 0; content: set by a script to a
    hash of what its options only name (weights, data), so that rows of other content do not count.
    """

    def __init__(self, config):
        global torch, dist  # imported when a run starts: prepare scripts need no torch (4 s)
        import torch
        import torch.distributed as dist

        self.config = config
        self.content = ""
        self.began_from = ""  # a resumed run's first init_from
        self.start = time.time()
        self.stopped = 0
        self._stops_at_steps = False  # whether the script calls stopping()
        self._reuse_said = False
        self._overwrites = False  # an earlier run's files are still to be removed
        self._has_begun = True  # a resumed run writes its config.yaml once it has
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.master = self.rank == 0
        # the same when torchrun starts a script again, or SLURM a job
        self.launch = os.environ.get("SLURM_JOB_ID") or f"launcher {os.getppid()}"
        self.device = choose_device(getattr(config, "device", "auto"))
        if self.device.type == "cpu":
            keep_memory()
        if self.world > 1:
            self._join_ranks()
        self._set_up_torch()
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        self.out = Path(config.out_dir)
        self._open_folder()
        self.wandb = None
        if self.master and getattr(config, "wandb_log", False):
            self.wandb = self._open_wandb()

    def _set_up_torch(self):
        """Seed, precision and determinism, as the options say."""
        config = self.config
        self.seed = config.seed
        torch.manual_seed(key_seed(self.seed))
        self.dtype = choose_dtype(getattr(config, "dtype", "auto"), self.device)
        if self.reduce(int(self.dtype is torch.float32), "max"):
            self.dtype = torch.float32  # on every rank, if one is quicker in it
        half = self.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        if getattr(config, "deterministic", False):
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        elif self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")

    def autocast(self):
        """Context of the run's precision; leaves float32 alone."""
        return torch.autocast(self.device.type, self.dtype, self.dtype is not torch.float32)

    def generator(self, *key):
        """A torch.Generator (CPU) keyed by (seed, *key): what it draws depends on nothing else."""
        return torch.Generator().manual_seed(key_seed(self.seed, *key))

    # -- the out folder

    def _open_folder(self):
        """Lock the folder, look whether a training run starts over in it, write config.yaml."""
        init_from = getattr(self.config, "init_from", None)
        restarted = False
        if self.master:
            self._lock_folder()
            self._check_script()
            restarted = self._is_restart()
            if init_from and init_from != "resume" and not restarted:
                self._start_over()
        if self.reduce(int(restarted), "max") and init_from:
            self.config.init_from = "resume"
        if getattr(self.config, "init_from", None) == "resume":
            self._take_over(self.load("ckpt.pt").get("config", {}))
            self.began_from = self._noted("init_from").replace("resume", "")
            self._has_begun = False
        self.save_config()
        self.barrier()

    def _check_script(self):
        """Refuse a folder that holds the results of another script."""
        before = self._noted("# script")
        has_results = any(self.out.glob("results*")) or any(self.out.glob("*.pt"))
        if before not in ("", self._script()) and has_results:
            raise InputError(f"{self.out} holds a run of {before}: give another out_dir=")

    def _noted(self, key):
        """What an earlier run's config.yaml in the folder says after `key: `, or ''."""
        path = self.out / "config.yaml"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        line = re.search(rf"^{key}: (.*)$", text, re.M)
        return line[1].strip("'") if line else ""

    def _script(self):
        return _file_of(type(self.config).__module__).name

    def _take_over(self, saved):
        """A resumed run has the options of its checkpoint, but for those that are given now."""
        config = self.config
        given = getattr(config, "given", saved)  # a Config made by hand is given whole
        own = {*given, "out_dir", "init_from", "overwrite", "device"}
        if "max_iters" in given:
            own.add("minutes")  # which it stands instead of
        others = []
        for field in dataclasses.fields(config):
            key = field.name
            before = saved.get(key, getattr(config, key))  # an option that is new has no past
            if key not in own:
                setattr(config, key, before)
            elif key not in PLUMBING.split() and getattr(config, key) != before:
                others.append(f"{key}={getattr(config, key)} (was {before})")
        check(config)
        self._set_up_torch()
        if others:
            self.print(f"resumed with {', '.join(others)}; all else as in the checkpoint")

    def _is_restart(self):
        """Did the launch that made this folder's checkpoint start the script again?

        torchrun does so when a rank dies; SLURM puts a stopped job back in the queue.
        """
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        restarts += int(os.environ.get("SLURM_RESTART_COUNT", 0))
        has_checkpoint = (self.out / "ckpt.pt").exists()
        return restarts > 0 and has_checkpoint and self._noted("# launch") == self.launch

    def _lock_folder(self):
        """Make the folder and hold its lock until the process ends."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.out / ".lock", "w")  # noqa: SIM115 (open as long as the run)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.out} is in use by another job") from None
        except OSError as error:
            reason = f"cannot be made or written ({error.strerror})"
            raise InputError(f"out_dir={self.out} {reason}: give another out_dir=") from None

    def _start_over(self):
        """What an earlier training run left goes at the first line of the log or checkpoint.

        Until then a run may end with a sentence, or read a model from this very folder.
        """
        checkpoints = sorted(self.out.glob("*.pt"), reverse=True)
        if not checkpoints:
            (self.out / "log.jsonl").unlink(missing_ok=True)
            return
        if not getattr(self.config, "overwrite", False):
            remedy = "init_from=resume, overwrite=True, or another out_dir="
            raise InputError(f"{checkpoints[0]} is there already: give {remedy}")
        self._overwrites = True
        self._has_begun = False

    def _begin(self):
        """Before the first line of the log, or checkpoint: an overwritten run's files go."""
        if self._has_begun:
            return
        self._has_begun = True
        if self._overwrites:
            old = [*self.out.glob("*.pt"), *self.out.glob("results*"), self.out / "log.jsonl"]
            for path in old:
                path.unlink(missing_ok=True)
        self.save_config()

    def save_config(self):
        """Write the resolved options and the environment to config.yaml (rank 0)."""
        if not self.master or not self._has_begun:
            return
        git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
        try:
            code = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        except OSError:  # no git here
            code = ""
        device = f"{self.device} {platform.machine()}"
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
        arguments = " ".join(sys.argv[1:]).replace("\n", "\\n")  # in one line
        options = dataclasses.asdict(self.config)
        options.pop("overwrite", None)  # to be said each time anew
        if self.began_from:
            options["init_from"] = self.began_from
        options = yaml.safe_dump(options, sort_keys=False)
        environment = f"""\
# command: {Path(sys.argv[0]).name} {arguments}
# script: {self._script()}
# code: {code or "not a git checkout"}
# python: {platform.python_version()}
# torch: {torch.__version__}
# launch: {self.launch}
# ranks: {self.world}
# dtype: {self.dtype}
# device: {device}
"""
        write_aside(self.out / "config.yaml", environment + options)

    def dataset(self, name):
        """Folder (Path) of a prepared dataset: a name under data/, or a path.

        An embedded one is made on first use, by rank 0, with a notice; one that must be downloaded
        never is.
        """
        folder = Path(name)
        if not folder.is_dir():
            folder = HERE / "data" / name
        prepare = folder / "prepare.py"
        if not prepare.exists():  # a variant of a set, made into a folder inside it
            prepare = folder.parent / "prepare.py"
        makes = self.master and prepare.exists() and not (folder / "meta.yaml").exists()
        if makes and re.search(r"^EMBEDDED = True", prepare.read_text(), re.M):
            print(f"{name}: made on first use from what is installed here ({prepare})", flush=True)
            with open(prepare.parent / ".lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # a second script waits, then finds it made
                subprocess.run([sys.executable, str(prepare)])
        self.barrier()
        # token files of other projects have no meta.yaml: data/tokens.py reads them
        if (folder / "meta.yaml").exists() or any(folder.glob("*train*.bin")):
            return folder
        names = sorted(path.parent.name for path in HERE.glob("data/*/prepare.py"))
        hint = f"give a prepared folder, or one of {', '.join(names)}"
        if prepare.exists():
            hint = f"run python {os.path.relpath(prepare)}"
        raise InputError(f"dataset '{name}': {folder / 'meta.yaml'} is missing: {hint}")

    def own_folder(self, name, pattern):
        """Make a folder in out_dir for files, called as in `pattern`, of these options and code.

        What other runs left there is removed: no file stands beside results that it is not of.
        """
        folder = self.out / name
        stamp = folder / ".options"
        if self.master and not (stamp.is_file() and stamp.read_text() == self.options_hash()):
            folder.mkdir(exist_ok=True)
            for path in folder.glob(pattern):
                path.unlink()
            write_aside(stamp, self.options_hash())
        self.barrier()

    def save(self, name, state):
        """Write a checkpoint, a dict of plain types and tensors, to out_dir/name (rank 0)."""
        from model import save_checkpoint

        if self.master:
            self._begin()
            save_checkpoint(self.out / name, state)

    def load(self, name):
        """Checkpoint out_dir/name as a dict on the CPU."""
        from model import load_checkpoint

        return load_checkpoint(self.out / name)

    # -- ranks and signals

    def _join_ranks(self):
        """Join torchrun's process group: nccl or gloo, and gloo beside it for single numbers."""
        backend = "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            backend = "nccl"
        # the ranks of a sweep may end hours apart; the launcher sees one that dies
        timeout = datetime.timedelta(hours=24)
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        # after a restart the store still holds the addresses of ranks that died
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world, timeout=timeout
        )
        self._numbers = dist.new_group(backend="gloo")

    def _on_signal(self, number, frame):
        if self.stopped or not self._stops_at_steps:  # asked twice, or the script never looks
            raise SystemExit(128 + number)
        self.stopped = number

    def stopping(self):
        """Has any rank been asked to stop? Call it at every step boundary.

        Returns the signal's number, the same on every rank, or 0. A script that never calls this
        ends at once when it is asked to.
        """
        self._stops_at_steps = True
        self.stopped = int(self.reduce(self.stopped, "max"))
        return self.stopped

    def reduce(self, value, op="sum"):
        """A number or a tensor, summed (op='sum') or maximised (op='max') over the ranks."""
        if self.world == 1:
            return value
        op = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
        if torch.is_tensor(value):
            tensor = value.to(self.device).clone()
            dist.all_reduce(tensor, op)
            return tensor
        number = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(number, op, group=self._numbers)
        return number.item()

    def barrier(self):
        """Wait for every rank."""
        if self.world > 1:
            dist.barrier()

    # -- words and numbers

    def print(self, *words):
        """Print once, on rank 0, above a progress bar."""
        if self.master:
            from tqdm import tqdm

            tqdm.write(" ".join(str(word) for word in words))
            sys.stdout.flush()

    def progress(self, total, initial=0, desc=None):
        """A progress bar with rate and ETA on rank 0: call .update() once a step."""
        from tqdm import tqdm

        seconds = 0.5 if sys.stderr.isatty() else 15  # between its lines
        options = {"dynamic_ncols": True, "smoothing": 0.05, "disable": not self.master}
        return tqdm(desc=desc, total=total, initial=initial, mininterval=seconds, **options)

    def log(self, step, **numbers):
        """One line on the console, in log.jsonl and, with wandb_log=True, on wandb (rank 0)."""
        if not self.master:
            return
        self._begin()
        words = [f"step {step:>6}"]
        for key, value in numbers.items():
            number = f"{value:.4g}" if isinstance(value, float) else value
            words.append(f"{key} {number}")
        self.print(" | ".join(words))
        line = {"step": step, "seconds": round(time.time() - self.start, 2), **numbers}
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def rewind(self, step):
        """Drop the log's lines after `step`: what followed the checkpoint happens again."""
        path = self.out / "log.jsonl"
        if not self.master or not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            if line.endswith("}") and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        write_aside(path, "".join(kept))

    def _open_wandb(self):
        import wandb

        id_file = self.out / "wandb_id.txt"
        if getattr(self.config, "init_from", "") != "resume" or not id_file.exists():
            id_file.write_text(os.urandom(4).hex())
        options = {"project": self.config.wandb_project, "name": self.out.name}
        options |= {"id": id_file.read_text(), "resume": "allow", "dir": str(self.out)}
        try:
            return wandb.init(config=dataclasses.asdict(self.config), **options)
        except wandb.Error as error:
            reason = _one_line(error)[:120]
            raise InputError(f"wandb did not start ({reason}): log in, or go offline") from None

    # -- results of a sweep

    def share(self, jobs):
        """This rank's part of a sweep's jobs."""
        return list(jobs)[self.rank :: self.world]

    def options_hash(self):
        """What identifies a row: hashes of the options, the code and, where set, the content."""
        options = hash_options(dataclasses.asdict(self.config))
        return "-".join(filter(None, [options, hash_code(type(self.config)), self.content]))

    def result(self, score, chance, low, high, n, **keys):
        """Append a row to this rank's part of the results.

        chance: the level of no knowledge; low, high: a 95 % interval, whose ends may be infinite;
        n: how many things were scored. A score of nan does not exist and needs none of them.
        Raises ValueError where any other lacks one of them.
        """
        complete = n >= 1 and not math.isnan(chance) and low <= high
        if not math.isnan(score) and not complete:
            raise ValueError(f"{score} of {keys} stands without chance {chance}, interval or n {n}")
        row = {**keys, "score": score, "chance": chance, "low": low, "high": high, "n": n}
        row["options"] = self.options_hash()
        line = json.dumps(row, default=methodcaller("item"))  # of NumPy's and torch's numbers
        with open(self.out / f"results.part-{self.rank}.jsonl", "a") as file:
            if file.tell():
                file.write("\n")  # before the row: a kill may have left half of another
            file.write(line)
        self._reuse_said = True  # from now on rows are this run's own

    def rows(self):
        """DataFrame of the rows written so far with these options, code and content, by any rank.

        Of rows with the same keys the last one counts. A sweep that starts again skips them.
        """
        import pandas as pd

        known = self.options_hash()
        rows = {}
        others = 0
        for part in sorted(self.out.glob("results.part-*.jsonl")):
            for line in part.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # torn by a kill
                    continue
                if row.get("options") != known:
                    others += 1
                    continue
                keys = [(key, row[key]) for key in sorted(row.keys() - set(MEASURED.split()))]
                rows[str(keys)] = row
        if not self._reuse_said and (rows or others):
            self._reuse_said = True
            reused = f"{len(rows)} rows of an earlier run are reused"
            self.print(f"{self.out}: {reused}; {others} of other options, code or data are not")
        return pd.DataFrame(list(rows.values()))

    def merge(self):
        """Wait for the ranks, write results.csv from all parts, and return it as a DataFrame."""
        self.barrier()
        table = self.rows()
        if self.master and len(table):
            write_aside(self.out / "results.csv", table.to_csv(index=False))
        self.barrier()
        return table

    def close(self):
        """End the run; after a signal, with the exit status a shell expects (128 + its number)."""
        if self.wandb:
            import wandb

            for path in sorted(self.out.glob("*.png")):
                self.wandb.log({path.stem: wandb.Image(str(path))})
            self.wandb.finish()
        if self.world > 1:
            dist.destroy_process_group()
        if self.master:
            self._lock.close()
        if self.stopped:
            raise SystemExit(128 + self.stopped)


def choose_device(wanted="auto"):
    """The torch.device: cuda (this rank's), mps or cpu."""
    if wanted == "auto":
        wanted = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if wanted == "cuda":
        wanted = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError):
        raise InputError(f"option 'device': there is no '{wanted}' here") from None


def choose_dtype(wanted, device):
    """torch.dtype of the run: auto is bfloat16 where that is quicker, on CUDA half precision."""
    allowed = ["float32", "bfloat16"]
    best = "float32"
    if device.type == "cuda":
        allowed.append("float16")
        best = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cpu" and bfloat16_pays() else best
    if wanted not in allowed:
        names = " or ".join(allowed)
        raise InputError(f"option 'dtype' must be auto or {names} on {device}, not '{wanted}'")
    return getattr(torch, wanted)


@functools.cache
def bfloat16_pays():
    """Does this CPU multiply matrices quicker in bfloat16? Measured, in a tenth of a second.

    Some emulate it, and some that have it are half as quick in it as in float32.
    """
    seconds: dict = {torch.float32: [], torch.bfloat16: []}
    for _ in range(5):
        for dtype, times in seconds.items():
            x = torch.ones(256, 256, dtype=dtype)
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
    return min(seconds[torch.bfloat16]) < 0.8 * min(seconds[torch.float32])
