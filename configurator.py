"""Options, devices, logs and results: what every script needs, whatever its experiment.

    config = configure(Config)      # dataclass defaults < YAML files < key=value, checked by type
    run = Run(config)               # device, precision, ranks, seeds, out folder, log, results

All random numbers are keyed, as in `run.generator(step, micro, "dropout")`, so a run can stop at
any step and resume from the step number alone, on any number of ranks. Bad input raises InputError,
which ends the script with one sentence and exit status 2.
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
# options that cannot change a result and so do not identify a row of results
PLUMBING = "out_dir device compile init_from overwrite log_interval wandb_log wandb_project"
# the measured columns of a row of results; the others say what was measured
MEASURED = "score chance low high n p p_holm p_corrected shuffled"
LARGEST = 10**12  # only a seed may be larger
# exceptions raised by a value of the wrong type
NOT_PARSED = (ValueError, TypeError, KeyError, OverflowError, RecursionError, yaml.YAMLError)


# ---- options


def configure(Config, argv=None):
    """Return a `Config` (a dataclass): its defaults, then YAML files, then key=value.

    Takes any number of YAML files; a bare name is looked up in config/. --key=value works too, and
    dots reach into options that are dictionaries. --help prints every option and exits. A Config
    may set RENAMED = {"old": "new"}, POSITIVE, SHARES and SIGNED (see `check`).
    """
    sys.excepthook = _print_one_sentence
    _user_code.clear()  # left by another script in this process
    script_code(Config)
    if argv is None:
        argv = sys.argv[1:]
    if "-h" in argv or "--help" in argv:
        print(_manual(Config))
        raise SystemExit(0)
    config = Config()
    config.given = {}  # {option set by a file or argument: its index in argv}
    for place, argument in enumerate(argv):
        if "=" not in argument:
            _read_config_file(config, argument, place)
    for argument in argv:
        key, equals, value = argument.partition("=")
        if re.search("[\ud800-\udfff]", argument):
            raise InputError(f"{argument!r} has bytes that are not UTF-8: type it again")
        if equals:
            _set_option(config, key.removeprefix("--"), value, "command line")
            config.given[key.removeprefix("--").partition(".")[0]] = len(argv)  # beats any file
    _choose_length(config)
    check(config)
    return config


def _choose_length(config):
    """Let the later of max_iters and minutes win.

    In one file max_iters wins: a run's config.yaml holds the steps that its minutes came to.
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
        raise InputError(f"config file '{name}' is neither here nor in {path.parent}: see --help")
    try:
        text = path.read_text(encoding="utf-8")
        values = read_yaml(text) or {}
        as_typed = yaml.load(text, yaml.BaseLoader)  # every scalar a string: 01 stays 01
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not a YAML file: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} has no 'key: value' lines: write one option per line")
    kinds = typing.get_type_hints(type(config))
    for key, value in values.items():
        if kinds.get(key) in (str, list[str], list[dict | str]) and value is not None:
            value = _as_typed(value, as_typed.get(key, value))  # BaseLoader merges no keys
        _set_option(config, str(key), value, path)
        config.given[str(key).partition(".")[0]] = place


def _set_option(config, key, value, source):
    """Set an option from `value`, a string or parsed YAML; `source` is named in errors."""
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
            raise InputError(f"{source}: option '{name}' takes no keys, so '{key}' does not exist")
        try:
            group[inner] = read_yaml(value) if isinstance(value, str) else value
        except NOT_PARSED:
            raise InputError(f"{source}: option '{key}' is not YAML: quote '{value}'") from None
        return
    try:
        setattr(config, name, _parse(value, kinds[name]))
    except NOT_PARSED:
        wanted = inspect.formatannotation(kinds[name])
        if typing.get_origin(kinds[name]) is typing.Literal:
            wanted = " or ".join(str(choice) for choice in typing.get_args(kinds[name]))
        raise InputError(f"{source}: option '{key}' must be {wanted}, not '{value}'") from None


def _nearest(key, allowed):
    """Return the end of an error about an unknown key."""
    near = difflib.get_close_matches(key, allowed, 1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; choose from {', '.join(sorted(allowed))}"


def _one_line(error):
    return " ".join(str(error).split())


def _parse(value, kind):
    """Convert `value`, a string or parsed YAML, to the type `kind`, or raise one of NOT_PARSED."""
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
    """Restore the spelling of YAML scalars outside dicts, where 01 and null may be names."""
    if isinstance(value, list):
        return list(map(_as_typed, value, typed))
    return value if isinstance(value, dict) else typed


def _parse_list(value, kind):
    """Parse a list written `[a, b]` or `a,b`. Strings stay as typed."""
    if isinstance(value, str):
        text = value if value.startswith("[") else f"[{value}]"
        value = read_yaml(text)
        if kind in (str, dict | str):
            value = _as_typed(value, yaml.load(text, yaml.BaseLoader))
    if not isinstance(value, list):
        value = [value]
    return [_parse(item, kind) for item in value]


def check(config):
    """Check the range of every number, then call the Config's own check(), if it has one.

    Numbers must be at least 0, unless the Config names them in the strings POSITIVE (above 0; for
    a list: not empty), SHARES (0 to 1) or SIGNED (any number). A negative default implies SIGNED.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        wanted = _wanted_range(config, field, value)
        if wanted:
            raise InputError(f"option '{field.name}' must be {wanted}, not {value}")
    if hasattr(config, "check"):
        config.check()


def _wanted_range(config, field, value):
    """Return the range that a number violates, or ''."""

    def is_named_in(rule):
        return field.name in getattr(config, rule, "").split()

    if value == [] and is_named_in("POSITIVE"):
        return "a list with at least one item"
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
    """Refuse keys that the dictionary option `option` does not have."""
    for key in given:
        if key not in allowed:
            raise InputError(f"option '{option}' has no key '{key}'{_nearest(key, allowed)}")


# the users' files as they were loaded: part of what identifies a row of results
_user_code: dict[Path, bytes] = {}


def load_function(spec, option):
    """Load the function `my_file.py:name`. The file may import others in its folder."""
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
        cure = "give my_file.py:name"
        raise InputError(f"option '{option}': cannot load {spec} ({reason}): {cure}") from None
    for path in files[1:]:  # a module of the same name may have been loaded already
        loaded = getattr(sys.modules.get(path.stem), "__file__", None)
        if loaded and path.parent == folder and Path(loaded).resolve() != path:
            raise InputError(f"{path} has the same name as {loaded}, which was loaded: rename it")
    return function


def user_files(file):
    """List a user's file and all that it imports from its folder, also inside functions."""
    files = [Path(file).resolve()]
    folder = files[0].parent
    for path in files:  # the list grows meanwhile
        for imported in _imports_of(path, folder):
            if imported not in files:
                files.append(imported)
    return files


def _imports_of(path, folder):
    """List the files in a folder that the code in `path` imports, at any level."""
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
    """Return the text of --help: the script's docstring, then each option with its comment."""
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
        elif comment:  # the last line of a longer option
            lines[-1] += comment
    return "\n".join(lines)


def _print_one_sentence(kind, error, trace):
    """Print one sentence for bad input and disk trouble (the excepthook); the rest are bugs."""
    full_disk = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    no_right = (errno.EACCES, errno.EPERM, errno.EROFS)
    if issubclass(kind, KeyboardInterrupt):
        raise SystemExit(128 + signal.SIGINT)
    if issubclass(kind, InputError):
        sentence = _one_line(error)
    elif issubclass(kind, OSError) and error.errno in full_disk:
        sentence = f"{error.filename or 'a file'} could not be written ({error.strerror}): "
        sentence += "make room, then start again; finished work is kept"
    elif issubclass(kind, OSError) and error.errno in no_right:
        sentence = f"{error.filename or 'a file'} cannot be read or written ({error.strerror}): "
        sentence += "change its permissions, or give another out_dir= or dataset="
    else:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# ---- keys and hashes


def key_seed(*key):
    """Return a 63-bit seed for any key, the same on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def hash_options(options):
    """Return a short hash of the options that can change a result."""
    kept = {key: value for key, value in options.items() if key not in PLUMBING.split()}
    return _hash(json.dumps(kept, sort_keys=True, default=str))


def hash_code(Config):
    """Return a short hash of the code behind the results of `Config`, without its comments."""
    hashes = map(_hash_source, [*script_code(Config), *_user_code.values()])
    return _hash("".join(sorted(hashes)))[:6]


@functools.cache
def script_code(Config):
    """Return the sources of the script of `Config`, of what it imports from its folder, of model.py
    and convert.py, and of a user's script that imports it.

    They are read when a script starts, as a user may edit them during the run.
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


@functools.cache  # needed for each row of results; parsing a script takes 0.1 s
def _hash_source(source):
    return _hash(ast.dump(ast.parse(source)))


def keep_memory():
    """Let glibc keep up to 2 GB of freed memory: fresh pages cost more time than arithmetic."""
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
    stopped: the number of the signal that asked the run to stop, or 0; content: a hash that a
    script sets of the weights and data that its options only name, so that a sweep reuses no rows
    of other content.
    """

    def __init__(self, config):
        global torch, dist  # imported here: prepare scripts do without torch (4 s)
        import torch
        import torch.distributed as dist

        self.config = config
        self.content = ""
        self.began_from = ""  # the original init_from of a resumed run
        self.start = time.time()
        self.stopped = 0
        self._stops_at_steps = False  # whether the script calls stopping()
        self._reported_reuse = False
        self._overwrites = False  # whether to remove an earlier run's files
        self._has_begun = True  # a resumed run writes config.yaml only once it has begun
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.master = self.rank == 0
        # unchanged when torchrun restarts a script, or SLURM a job
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
        """Set the seed, precision and determinism."""
        config = self.config
        self.seed = config.seed
        torch.manual_seed(key_seed(self.seed))
        self.dtype = choose_dtype(getattr(config, "dtype", "auto"), self.device)
        if self.reduce(int(self.dtype is torch.float32), "max"):
            self.dtype = torch.float32  # on every rank if on any
        half = self.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        if getattr(config, "deterministic", False):
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        elif self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")

    def autocast(self):
        """Return the autocast context for the run's precision."""
        return torch.autocast(self.device.type, self.dtype, self.dtype is not torch.float32)

    def generator(self, *key):
        """Return a torch.Generator (CPU) that depends on (seed, *key) alone."""
        return torch.Generator().manual_seed(key_seed(self.seed, *key))

    # -- the out folder

    def _open_folder(self):
        """Lock the folder, decide whether to start, resume or start over, write config.yaml."""
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
            self._adopt_options(self.load("ckpt.pt").get("config", {}))
            self.began_from = self._from_config_file("init_from").replace("resume", "")
            self._has_begun = False
        self.save_config()
        self.barrier()

    def _check_script(self):
        """Refuse a folder that holds the results of another script."""
        script = self._from_config_file("# script")
        has_results = any(self.out.glob("results*")) or any(self.out.glob("*.pt"))
        if script not in ("", self._script()) and has_results:
            raise InputError(f"{self.out} holds a run of {script}: give another out_dir=")

    def _from_config_file(self, key):
        """Return the value of `key: ` in an earlier run's config.yaml, or ''."""
        path = self.out / "config.yaml"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        line = re.search(rf"^{key}: (.*)$", text, re.M)
        return line[1].strip("'") if line else ""

    def _script(self):
        return _file_of(type(self.config).__module__).name

    def _adopt_options(self, saved):
        """Resume with the options of the checkpoint, except those that are given now."""
        config = self.config
        given = getattr(config, "given", saved)  # a Config made by hand gives every option
        kept = {*given, "out_dir", "init_from", "overwrite", "device"}
        if "max_iters" in given:
            kept.add("minutes")  # max_iters replaces it
        changes = []
        for field in dataclasses.fields(config):
            key = field.name
            before = saved.get(key, getattr(config, key))  # older checkpoints lack new options
            if key not in kept:
                setattr(config, key, before)
            elif key not in PLUMBING.split() and getattr(config, key) != before:
                changes.append(f"{key}={getattr(config, key)} (was {before})")
        check(config)
        self._set_up_torch()
        if changes:
            self.print(f"resumed with {', '.join(changes)}; all else as in the checkpoint")

    def _is_restart(self):
        """Return whether the launcher that made this folder's checkpoint restarted the script.

        torchrun does so when a rank dies; SLURM puts a stopped job back in the queue.
        """
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        restarts += int(os.environ.get("SLURM_RESTART_COUNT", 0))
        has_checkpoint = (self.out / "ckpt.pt").exists()
        same_launch = self._from_config_file("# launch") == self.launch
        return restarts > 0 and has_checkpoint and same_launch

    def _lock_folder(self):
        """Make the folder and lock it until the process ends."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.out / ".lock", "w")  # noqa: SIM115 (open as long as the run)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.out} is in use by another job: wait for it, or stop it"
            ) from None
        except OSError as error:
            reason = f"cannot be created or written ({error.strerror})"
            raise InputError(f"out_dir={self.out} {reason}: give another out_dir=") from None

    def _start_over(self):
        """Plan to remove an earlier training run, or refuse to.

        `_begin` removes it: until then this run may end with an error, or read a model from this
        very folder.
        """
        checkpoints = sorted(self.out.glob("*.pt"), reverse=True)
        if not checkpoints:
            (self.out / "log.jsonl").unlink(missing_ok=True)
            return
        if not getattr(self.config, "overwrite", False):
            remedy = "init_from=resume, overwrite=True, or another out_dir="
            raise InputError(f"{checkpoints[0]} already exists: give {remedy}")
        self._overwrites = True
        self._has_begun = False

    def _begin(self):
        """Remove an overwritten run's files before the first log line or checkpoint."""
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
        except OSError:  # git is not installed
            code = ""
        device = f"{self.device} {platform.machine()}"
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
        arguments = " ".join(sys.argv[1:]).replace("\n", "\\n")
        options = dataclasses.asdict(self.config)
        options.pop("overwrite", None)  # must be given each time
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
        """Return the folder (Path) of a prepared dataset: a name under data/, or a path.

        Rank 0 makes an embedded one on first use, with a notice; nothing is ever downloaded.
        """
        folder = Path(name)
        if not folder.is_dir():
            folder = HERE / "data" / name
        prepare = folder / "prepare.py"
        if not prepare.exists():  # a variant of a dataset, in a folder inside it
            prepare = folder.parent / "prepare.py"
        may_make = self.master and prepare.exists() and not (folder / "meta.yaml").exists()
        if may_make and re.search(r"^EMBEDDED = True", prepare.read_text(), re.M):
            print(f"{name}: made on first use, without a download ({prepare})", flush=True)
            with open(prepare.parent / ".lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # a second script waits, then finds the dataset
                subprocess.run([sys.executable, str(prepare)])
        self.barrier()
        # data/tokens.py reads other projects' token files, which come without a meta.yaml
        if (folder / "meta.yaml").exists() or any(folder.glob("*train*.bin")):
            return folder
        names = sorted(path.parent.name for path in HERE.glob("data/*/prepare.py"))
        hint = f"give a prepared folder, or one of {', '.join(names)}"
        if prepare.exists():
            hint = f"run python {os.path.relpath(prepare)}"
        raise InputError(f"dataset '{name}': {folder / 'meta.yaml'} is missing: {hint}")

    def own_folder(self, name, pattern):
        """Make a folder in out_dir for files that match `pattern`, made by these options and code.

        Removes what other options or code left there: it does not belong to these results.
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
        """Load the checkpoint out_dir/name as a dict on the CPU."""
        from model import load_checkpoint

        return load_checkpoint(self.out / name)

    # -- ranks and signals

    def _join_ranks(self):
        """Join torchrun's process group (nccl or gloo), and a gloo group for single numbers."""
        backend = "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            backend = "nccl"
        # the ranks of a sweep may end hours apart; the launcher notices when a rank dies
        timeout = datetime.timedelta(hours=24)
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        # after a restart the store still holds the addresses of the dead ranks
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world, timeout=timeout
        )
        self._numbers = dist.new_group(backend="gloo")

    def _on_signal(self, number, frame):
        if self.stopped or not self._stops_at_steps:  # a second signal, or the script never looks
            raise SystemExit(128 + number)
        self.stopped = number

    def stopping(self):
        """Return the number of the signal that asked any rank to stop, or 0: equal on all ranks.

        Call it at every step boundary. A script that never calls it ends at once on a signal.
        """
        self._stops_at_steps = True
        self.stopped = int(self.reduce(self.stopped, "max"))
        return self.stopped

    def reduce(self, value, op="sum"):
        """Return a number or a tensor, summed (op='sum') or maximised (op='max') over the ranks."""
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

    # -- console and log

    def print(self, *words):
        """Print once, on rank 0, above a progress bar."""
        if self.master:
            from tqdm import tqdm

            tqdm.write(" ".join(str(word) for word in words))
            sys.stdout.flush()

    def progress(self, total, initial=0, desc=None):
        """Return a progress bar with rate and ETA (rank 0): call .update() after each step."""
        from tqdm import tqdm

        seconds = 0.5 if sys.stderr.isatty() else 15  # between updates
        options = {"dynamic_ncols": True, "smoothing": 0.05, "disable": not self.master}
        return tqdm(desc=desc, total=total, initial=initial, mininterval=seconds, **options)

    def log(self, step, **numbers):
        """Log numbers to the console, log.jsonl and, with wandb_log=True, wandb (rank 0)."""
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
        """Drop the log's lines after `step`: those steps will run again."""
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
            remedy = "log in, or set WANDB_MODE=offline"
            raise InputError(f"wandb did not start ({reason}): {remedy}") from None

    # -- results of a sweep

    def share(self, jobs):
        """Return this rank's share of a sweep's jobs."""
        return list(jobs)[self.rank :: self.world]

    def options_hash(self):
        """Return what identifies a row: hashes of options, code and, where set, content."""
        options = hash_options(dataclasses.asdict(self.config))
        return "-".join(filter(None, [options, hash_code(type(self.config)), self.content]))

    def result(self, score, chance, low, high, n, **keys):
        """Append a row to this rank's part of the results.

        chance: the chance level; low, high: a 95 % interval, whose ends may be infinite; n: number
        of items scored. Raises ValueError where a score lacks any of them; a score of NaN may.
        """
        complete = n >= 1 and not math.isnan(chance) and low <= high
        if not math.isnan(score) and not complete:
            raise ValueError(f"score {score} of {keys} lacks a chance level, an interval or n")
        row = {**keys, "score": score, "chance": chance, "low": low, "high": high, "n": n}
        row["options"] = self.options_hash()
        line = json.dumps(row, default=methodcaller("item"))  # NumPy's and torch's numbers, too
        with open(self.out / f"results.part-{self.rank}.jsonl", "a") as file:
            if file.tell():
                file.write("\n")  # before the row: a kill may have cut the last one short
            file.write(line)
        self._reported_reuse = True  # this run's own rows are not reused ones

    def rows(self):
        """Return a DataFrame of all ranks' rows so far with these options, code and content.

        Of rows with the same keys the last one counts. A restarted sweep skips them.
        """
        import pandas as pd

        current = self.options_hash()
        rows = {}
        n_ignored = 0
        for part in sorted(self.out.glob("results.part-*.jsonl")):
            for line in part.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # torn by a kill
                    continue
                if row.get("options") != current:
                    n_ignored += 1
                    continue
                keys = [(key, row[key]) for key in sorted(row.keys() - set(MEASURED.split()))]
                rows[str(keys)] = row
        if not self._reported_reuse and (rows or n_ignored):
            self._reported_reuse = True
            reused = f"{len(rows)} rows of an earlier run are reused"
            self.print(f"{self.out}: {reused}; {n_ignored} of other options, code or data are not")
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
        """End the run; after a signal, exit with the status that shells expect (128 + number)."""
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
    """Return the torch.device: cuda (this rank's), mps or cpu."""
    if wanted == "auto":
        wanted = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if wanted == "cuda":
        wanted = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError):
        raise InputError(f"option 'device': this machine has no '{wanted}': give cpu") from None


def choose_dtype(wanted, device):
    """Return the run's torch.dtype. auto: half precision on CUDA, on a CPU bfloat16 if faster."""
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
    """Measure, in a tenth of a second, whether this CPU multiplies matrices faster in bfloat16.

    Some CPUs emulate it, and some with hardware for it take twice as long as in float32.
    """
    seconds: dict = {torch.float32: [], torch.bfloat16: []}
    for _ in range(5):
        for dtype, times in seconds.items():
            x = torch.ones(256, 256, dtype=dtype)
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
    return min(seconds[torch.bfloat16]) < 0.8 * min(seconds[torch.float32])
