"""What every script starts with, and nothing about any experiment.

    config = configure(Config)      # dataclass defaults < YAML files < key=value, checked by type
    run = Run(config)               # device, precision, ranks, seeds, out folder, log, checkpoints, results

Everything random is keyed, `run.generator(step, micro, "dropout")`, so a run that stops at any step needs nothing but the step to
go on, on any number of ranks. An error that a file of this repository raises on purpose ends in one sentence and exit status 2.
"""
import ctypes, dataclasses, datetime, difflib, errno, fcntl, hashlib, inspect, io, json, linecache, math, os, platform, re, signal, subprocess, sys, time
import tokenize, types, typing
from contextlib import nullcontext
from pathlib import Path

import yaml

from data import aside, read_yaml, write_aside  # noqa: F401 (aside is for the scripts)

HERE = Path(__file__).resolve().parent
PLUMBING = {"out_dir", "device", "compile", "init_from", "overwrite", "log_interval", "wandb_log", "wandb_project"}  # not in a row's hash

MEASURED = {"score", "chance", "low", "high", "n", "p", "p_holm", "p_corrected", "shuffled"}  # what a row says, beside the keys of what it is about


# ---- options

def configure(Config, argv=None):
    """Fill the dataclass `Config` from its defaults, then YAML files, then key=value (also --key=value); dots reach into dicts and nested
    dataclasses. Values are parsed by the field's type. Raises ValueError or FileNotFoundError with one sentence; --help prints and exits."""
    sys.excepthook = _one_sentence
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(_manual(Config))
        raise SystemExit(0)
    config = Config()
    for arg in (a for a in argv if "=" not in a):
        path = next((p for p in (Path(arg), HERE / "config" / arg) if p.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no config file '{arg}' here or in {HERE / 'config'}: give a .yaml file or key=value (see --help)")
        try:
            options = read_yaml(path.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise ValueError(f"{path} is not a YAML file: {' '.join(str(e).split())}") from None
        if not isinstance(options, dict):
            raise ValueError(f"{path} holds no 'key: value' lines: write one option a line")
        for key, value in options.items():
            _set(config, str(key), value, path)
    for arg in (a for a in argv if "=" in a):
        key, value = arg.split("=", 1)
        _set(config, key.removeprefix("--"), value, "command line")
    check(config)
    return config


def check(config):
    """What no type can say: the range of every number, and the Config's own check(), where it has one. A number is 0 or more, unless the Config names it
    in POSITIVE (above 0; a list: not empty), SHARES (0 to 1) or SIGNED (any; so is one whose default is negative). Raises ValueError with one sentence."""
    positive, shares, signed = (getattr(config, kind, "").split() for kind in ("POSITIVE", "SHARES", "SIGNED"))
    for field in dataclasses.fields(config):
        key, value = field.name, getattr(config, field.name)
        if key in positive and value == []:
            raise ValueError(f"option '{key}' must name at least one")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        usual = field.default if isinstance(field.default, (int, float)) else 0
        wrong = "finite" if value == math.inf != usual else "between 0 and 1" if key in shares and not 0 <= value <= 1 else \
            ("at least 1" if isinstance(value, int) else "above 0") if key in positive and value <= 0 else \
            "at least 0" if value < 0 <= usual and key not in signed else ""
        if wrong:
            raise ValueError(f"option '{key}' must be {wrong}, not {value}")
    getattr(config, "check", lambda: None)()


def _set(target, key, value, source):
    owner, (head, _, rest) = target, key.partition(".")
    while rest:  # walk the dots
        owner = owner.get(head) if isinstance(owner, dict) else getattr(owner, head, None)
        if not (isinstance(owner, dict) or dataclasses.is_dataclass(owner)):
            raise ValueError(f"{source}: option '{key}' reaches into '{head}', which is no group of options")
        head, _, rest = rest.partition(".")
    if isinstance(owner, dict):
        owner[head] = read_yaml(value) if isinstance(value, str) else value
        return
    kinds = typing.get_type_hints(type(owner))
    if head not in kinds:
        near = difflib.get_close_matches(head, kinds, 1)
        raise ValueError(f"{source}: unknown option '{key}'" + (f"; did you mean '{near[0]}'?" if near else "; see --help"))
    if dataclasses.is_dataclass(kinds[head]) and isinstance(value, dict):
        for k, v in value.items():
            _set(target, f"{key}.{k}", v, source)
        return
    try:
        setattr(owner, head, _parse(value, kinds[head]))
    except (ValueError, TypeError, KeyError, OverflowError, yaml.YAMLError):
        kind = kinds[head]
        wanted = " or ".join(map(str, typing.get_args(kind))) if typing.get_origin(kind) is typing.Literal else \
            str(kind) if typing.get_args(kind) else kind.__name__
        raise ValueError(f"{source}: option '{key}' must be {wanted}, not '{value}'") from None


def _parse(value, kind):
    """`value`, a string or what YAML made of it, as `kind`; ValueError, TypeError or KeyError where it is not one."""
    origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for arg in sorted(args, key=lambda a: a is not types.NoneType):
            try:
                return _parse(value, arg)
            except (ValueError, TypeError, KeyError):
                continue
        raise ValueError(value)
    if origin is types.NoneType:
        return {"none": None, "null": None, "": None}[str(value).lower()]
    if origin is typing.Literal:
        return {str(a): a for a in args}[str(value)]
    if origin is str:
        if isinstance(value, (list, dict)):
            raise TypeError(value)
        return "" if value is None else str(value)
    if isinstance(value, str):
        value = read_yaml(f"[{value}]" if origin in (list, tuple) and not value.startswith("[") else value)
    if origin in (list, tuple):
        return origin(_parse(v, args[0]) if args else v for v in (value if isinstance(value, list) else [value]))
    if origin is bool:
        return {"True": True, "1": True, "False": False, "0": False}[str(value)]
    if origin in (int, float):
        number = float("not a number" if isinstance(value, bool) else value)
        if number != number or origin is int and number != int(number):
            raise ValueError(value)
        return number if origin is float else value if isinstance(value, int) else int(number)
    if not isinstance(value, origin):
        raise TypeError(value)
    return value


def _manual(Config):
    """--help: the script's own docstring, then every option with its default and the comment beside it."""
    lines = [inspect.getdoc(sys.modules[Config.__module__]) or "", "", "options (key=value):"]
    defaults, source = dataclasses.asdict(Config()), inspect.getsource(Config)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    for number, line in enumerate(source.splitlines(), 1):
        field = re.match(r"    (\w+)\s*:", line)
        if field and field[1] in defaults:
            lines.append(f"  {field[1]}={defaults[field[1]]}".ljust(34) + comments.get(number, ""))
        elif number in comments and line.startswith("    #"):
            lines.append(f" {comments[number]}")
    return "\n".join(lines)


def _one_sentence(kind, error, trace):
    """The excepthook: a ValueError or OSError that this repository raises on purpose is for the user; anything else is a bug, with its traceback."""
    frame = trace
    while frame is not None and frame.tb_next:
        frame = frame.tb_next
    file = frame.tb_frame.f_code.co_filename if frame else ""
    if issubclass(kind, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        print(f"error: {error.filename or 'a file'} could not be written ({error.strerror}): make room, then start again; what was finished is kept",
              file=sys.stderr, flush=True)
        raise SystemExit(2)
    ours = HERE in Path(file).resolve().parents and "site-packages" not in file
    if issubclass(kind, (ValueError, OSError)) and ours and linecache.getline(file, frame.tb_lineno).strip().startswith("raise "):
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2)
    sys.__excepthook__(kind, error, trace)


def key_seed(*key):
    """A 63-bit seed out of any key, the same on every machine: counter-based randomness for torch and numpy alike."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def hash_options(options):
    """Short hash of those of a dict of options that can change a result."""
    kept = {k: v for k, v in options.items() if k not in PLUMBING}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:10]


def keep_memory():
    """Let glibc keep up to 2 GB of freed memory: it hands pieces back to the system again and again, and fresh pages cost a CPU more than the sums in them."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another libc
        return
    mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-3, 2 ** 25)      # M_MMAP_THRESHOLD, its largest: what is bigger still comes and goes


# ---- the run

class Run:
    """Device, precision, ranks, seeds, out folder, log, checkpoints and results of one run; the same object on one rank and on many.

    Attributes: rank, world, master, device (torch.device), dtype, out (Path), config, stopped (a signal asked us to stop).
    Raises FileExistsError for an out folder that holds a checkpoint (unless init_from=resume or overwrite=True) or another live job."""

    def __init__(self, config):
        import torch
        import torch.distributed as dist
        self.config, self.start, self.stopped, self._asks, self.content = config, time.time(), 0, False, ""
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.master = self.rank == 0
        if "SLURM_ARRAY_TASK_COUNT" in os.environ:  # an array of independent jobs: a worker each
            self.worker = int(os.environ["SLURM_ARRAY_TASK_ID"]) - int(os.environ["SLURM_ARRAY_TASK_MIN"])
            self.workers = int(os.environ["SLURM_ARRAY_TASK_COUNT"])
        else:
            self.worker, self.workers = self.rank, self.world
        self.device = torch.device(self._device(torch))
        self.dtype = self._dtype(torch)
        if self.device.type == "cpu":
            keep_memory()
        if self.world > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            long = datetime.timedelta(hours=24)  # the ranks of a sweep end hours apart; the launcher sees one that dies
            store, *_ = next(dist.rendezvous("env://", timeout=long))  # after a restart it may still hold the addresses of ranks that died
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", store=store, rank=self.rank, world_size=self.world, timeout=long)
            self._flags = dist.new_group(backend="gloo")  # numbers travel beside the GPU, which need not stop for them
        self.seed = config.seed
        torch.manual_seed(key_seed(self.seed))
        if getattr(config, "deterministic", False):
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        elif self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self.out = Path(config.out_dir)
        self._open_folder()
        self.wandb = self._open_wandb() if self.master and getattr(config, "wandb_log", False) else None

    def _device(self, torch):
        wanted = getattr(self.config, "device", "auto")
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            name = torch.device(best if wanted == "auto" else wanted)
        except RuntimeError:
            raise ValueError(f"option 'device' must be auto, cpu, cuda, cuda:N or mps, not '{wanted}'") from None
        if name.type == "cuda" and not torch.cuda.is_available() or name.type == "mps" and best != "mps":
            raise ValueError(f"option 'device': this machine has no {name.type} device; use device={best}")
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if str(name) == "cuda" else name

    def _dtype(self, torch):
        wanted = getattr(self.config, "dtype", "auto")
        if wanted == "auto":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if self.device.type == "cuda" else \
                self.device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
            wanted = "bfloat16" if bf16 else "float16" if self.device.type == "cuda" else "float32"
        if wanted not in ("float32", "bfloat16", "float16") or (wanted == "float16" and self.device.type == "cpu"):
            raise ValueError(f"option 'dtype' must be auto, float32, bfloat16 or, on a GPU, float16, not '{wanted}'")
        return getattr(torch, wanted)

    def autocast(self):
        """Context of the run's precision; leaves float32 alone."""
        import torch
        return nullcontext() if self.dtype is torch.float32 else torch.autocast(self.device.type, self.dtype)

    # -- the out folder

    def _open_folder(self):
        config, init = self.config, getattr(self.config, "init_from", None)
        ckpt = self.out / "ckpt.pt"
        again = False
        if self.master:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.out / (f".lock-{self.worker}" if self.workers > self.world else ".lock"), "a+")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileExistsError(f"{self.out} is in use by another job: wait for it, or give another out_dir=") from None
            again = self._started_again() and ckpt.exists()
            if init and init != "resume" and not again:
                if ckpt.exists() and not getattr(config, "overwrite", False):
                    raise FileExistsError(f"{ckpt} is there already: continue it with init_from=resume, or start over with overwrite=True, "
                                          "or give another out_dir=")
                old = [*self.out.glob("*.pt"), *self.out.glob("results*")] if ckpt.exists() else []
                for path in [*old, self.out / "log.jsonl"]:  # what a run logged that never came to a checkpoint happens again
                    path.unlink(missing_ok=True)
        if self.reduce(int(again), "max") and init:
            config.init_from = "resume"
        if self.master:
            self._lock.write(self._launch)
            self._lock.flush()
            write_aside(self.out / "config.yaml", self._environment() + yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
        self.barrier()

    def _started_again(self):
        """Has this folder's last job been of this very launch? A launcher starts all ranks again when one dies, and SLURM a job that it stopped: then the
        run goes on from the last checkpoint, whatever init_from says. The lock file holds the launch; one that was refused the folder is so again."""
        launch = os.environ.get("TORCHELASTIC_RUN_ID", os.environ.get("SLURM_JOB_ID", "none"))
        self._launch = f"launcher {os.getppid()}" if launch == "none" else launch
        self._lock.seek(0)
        before = self._lock.read()
        self._lock.truncate(0)
        return any(int(os.environ.get(key, 0)) for key in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")) and before == self._launch

    def _environment(self):
        import torch
        git = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True)
        facts = {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "code": git.stdout.strip() or "not a git checkout",
                 "python": platform.python_version(), "torch": torch.__version__, "ranks": self.world, "dtype": str(self.dtype),
                 "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{self.device} {platform.machine()}"}
        return "".join(f"# {key}: {value}\n" for key, value in facts.items())

    def dataset(self, name):
        """Folder (Path) of a prepared dataset: a name under data/, or a path. An embedded one is made on first use, by rank 0, with a notice;
        one that must be downloaded never is. Raises FileNotFoundError with the command that makes it."""
        folder = Path(name) if Path(name).is_dir() else HERE / "data" / name
        prepare = next((p / "prepare.py" for p in (folder, folder.parent) if (p / "prepare.py").exists()), None)
        if self.master and not (folder / "meta.yaml").exists() and prepare:
            if re.search(r"^EMBEDDED = True", prepare.read_text(), re.M):
                print(f"{name}: made on first use from what is installed here (python {os.path.relpath(prepare)})", flush=True)
                with open(prepare.parent / ".lock", "w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)  # a second script waits, then finds it made
                    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
                    subprocess.run([sys.executable, str(prepare)], env=alone)
        self.barrier()
        if not (folder / "meta.yaml").exists() and not any(folder.glob("*train*.bin")):  # token files of others have none: data/tokens.py
            here = sorted(str(p.parent.relative_to(HERE / "data")) for p in (HERE / "data").glob("*/prepare.py"))
            raise FileNotFoundError(f"dataset '{name}' is not there ({folder / 'meta.yaml'} is missing): " + (
                f"run python {os.path.relpath(prepare)}" if prepare else f"give dataset= one of {', '.join(here)}, or a prepared folder"))
        return folder

    def save(self, name, state):
        """Checkpoint `state` (plain types and tensors) to out_dir/name, aside and renamed; rank 0 writes."""
        from model import save_checkpoint
        if self.master:
            save_checkpoint(self.out / name, state)

    def load(self, name):
        """Checkpoint out_dir/name as a dict on the CPU; raises with one sentence where it is missing, torn, foreign or newer."""
        from model import load_checkpoint
        return load_checkpoint(self.out / name)

    # -- ranks, signals, randomness

    def _on_signal(self, number, frame):
        if self.stopped or not self._asks:  # asked twice, or the script never looks: at once
            raise SystemExit(128 + number)
        self.stopped = number

    def stopping(self):
        """At a step boundary: has any rank been asked to stop? Every rank gets the same answer (the signal's number, 0 for none). A script that
        never calls this ends at once when asked to."""
        self._asks = True
        self.stopped = int(self.reduce(self.stopped, "max"))
        return self.stopped

    def reduce(self, value, op="sum"):
        """A number, or a tensor, summed ('sum') or maximised ('max') over the ranks."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist
        op = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
        if torch.is_tensor(value):
            tensor = value.to(self.device).clone()
            dist.all_reduce(tensor, op)
            return tensor
        number = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(number, op, group=self._flags)
        return number.item()

    def barrier(self):
        """Wait for every rank."""
        if self.world > 1:
            import torch.distributed as dist
            dist.barrier()

    def generator(self, *key):
        """A torch.Generator (CPU) keyed by (seed, *key): what it draws depends on nothing else."""
        import torch
        return torch.Generator().manual_seed(key_seed(self.seed, *key))

    # -- words and numbers

    def print(self, *words):
        """Print once, on rank 0, above a progress bar."""
        if self.master:
            from tqdm import tqdm
            tqdm.write(" ".join(map(str, words)))
            sys.stdout.flush()

    def progress(self, total, initial=0, desc=None):
        """A progress bar with rate and ETA (rank 0 only): call .update() once a step."""
        from tqdm import tqdm
        return tqdm(total=total, initial=initial, desc=desc, disable=not self.master, dynamic_ncols=True,
                    mininterval=0.5 if sys.stderr.isatty() else 15, smoothing=0.05)

    def log(self, step, **numbers):
        """One line on the console, in log.jsonl and, with wandb_log=True, on wandb. Rank 0 writes."""
        if not self.master:
            return
        self.print(f"step {step:>6} | " + " | ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items()))
        with open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps({"step": step, "seconds": round(time.time() - self.start, 2), **numbers}) + "\n")
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def rewind(self, step):
        """Drop the log's lines after `step`: what was logged between the checkpoint and the stop happens again."""
        path = self.out / "log.jsonl"
        if self.master and path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
            write_aside(path, "".join(line + "\n" for line in lines))

    def _open_wandb(self):
        import wandb
        id_file = self.out / "wandb_id.txt"
        if getattr(self.config, "init_from", "") != "resume" or not id_file.exists():
            id_file.write_text(os.urandom(4).hex())
        try:
            return wandb.init(project=self.config.wandb_project, name=self.out.name, id=id_file.read_text(), resume="allow", dir=str(self.out),
                              config=dataclasses.asdict(self.config))
        except wandb.Error as e:
            raise ValueError(f"wandb did not start ({' '.join(str(e).split())[:120]}): log in with wandb login, set WANDB_MODE=offline, or leave out "
                             "wandb_log") from None

    # -- results of a sweep

    def share(self, jobs):
        """This worker's part of a sweep's jobs: dealt over torchrun ranks, or over the tasks of a SLURM array."""
        return list(jobs)[self.worker::self.workers]

    def options_hash(self, without=()):
        """Short hash of every option that can change a result, less those in `without`; behind it `content`, where the script sets that: a hash of what the
        options only name (weights, data), since others under the same name are another experiment."""
        return hash_options({k: v for k, v in dataclasses.asdict(self.config).items() if k not in without}) + f"-{self.content}" * bool(self.content)

    def result(self, score, chance, low, high, n, **keys):
        """Append a row to this worker's part of the results table. Raises ValueError where a score would stand without its chance level, interval or n;
        an end of the interval may be infinite, and a score that does not exist (nan) has none."""
        if score == score and not (n >= 1 and chance == chance and low <= high):  # nan is a score that does not exist: it has no interval
            raise ValueError(f"the score {score} of {keys} stands without a chance level ({chance}), an interval ({low} to {high}) or n ({n})")
        row = {**keys, "score": score, "chance": chance, "low": low, "high": high, "n": n, "options": self.options_hash()}
        with open(self.out / f"results.part-{self.worker}.jsonl", "ab+") as f:
            f.seek(max(0, f.tell() - 1))
            torn = f.read(1) not in (b"", b"\n")  # a kill in the middle of a row
            f.write(("\n" * torn + json.dumps({k: v.item() if hasattr(v, "item") else v for k, v in row.items()}) + "\n").encode())

    def rows(self):
        """DataFrame of the rows written so far with these options, by any worker, the last of its keys: what a sweep started again may skip."""
        import pandas as pd
        rows = {}
        for part in sorted(self.out.glob("results.part-*.jsonl")):
            for line in part.read_text(errors="replace").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # a kill may have torn it
                    continue
                if isinstance(row, dict) and row.get("options") == self.options_hash():
                    rows[str(sorted((k, v) for k, v in row.items() if k not in MEASURED))] = row
        return pd.DataFrame(list(rows.values()))

    def merge(self):
        """Wait for the ranks and write results.csv, tidy, one row per measurement, from all parts (they stay). Returns it as a DataFrame."""
        self.barrier()
        table = self.rows()
        if self.master and len(table):
            write_aside(self.out / "results.csv", table.to_csv(index=False))
        self.barrier()
        return table

    def close(self):
        """End the run; after a signal, with the status that a shell expects of it (128 + its number)."""
        if self.wandb:
            import wandb
            if figures := sorted(self.out.glob("*.png")):
                self.wandb.log({figure.stem: wandb.Image(str(figure)) for figure in figures})
            self.wandb.finish()
        if self.world > 1:
            import torch.distributed as dist
            dist.destroy_process_group()
        if self.master:
            self._lock.close()
        if self.stopped:
            raise SystemExit(128 + self.stopped)

