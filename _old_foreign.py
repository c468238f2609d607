"""The foreign formats of the first version, verbatim, until convert.py and data/tokens.py have them."""
import base64
import json
import math
import os
import sys
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch

import data
import positions
from model import GPT, VERSION, GPTConfig, lm_from, load_checkpoint


def _load_any(path):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return load_checkpoint(path)
    if isinstance(state, dict) and "format" not in state and isinstance(state.get("model_args"), dict) and isinstance(state.get("model"), dict):
        return adopt_checkpoint(state, path)
    return load_checkpoint(path)


def load_positions(path, n_layer, n_units):
    return positions.stack_layers(read_layer_pickles(path)[0], n_layer, n_units, path)


def from_pretrained(name, **options):
    """Hugging Face GPT-2 weights, a name or a local folder, as our GPT with equal logits; options set other fields of GPTConfig. A folder that
    save_pretrained wrote gives the sheets and their positions back too."""
    from transformers import AutoConfig, GPT2LMHeadModel
    c = from_hub(AutoConfig, name)
    if c.model_type != "gpt2":
        raise NotOurGPT(f"'{name}' is a {c.model_type} model: only GPT-2 weights load into our GPT")
    theirs = from_hub(GPT2LMHeadModel, name)
    gelu = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}.get(c.activation_function)
    if gelu is None or c.scale_attn_by_inverse_layer_idx or not c.scale_attn_weights or c.layer_norm_epsilon != 1e-5 \
            or c.n_inner not in (None, 4 * c.n_embd) or not c.tie_word_embeddings:
        raise NotOurGPT(f"'{name}' is a GPT-2 variant whose config ({c.activation_function}, layer norm {c.layer_norm_epsilon}) our GPT has not")
    ours = _our_file(name)
    args = {k: v for k, v in ours.get("model_args", {}).items() if k in {f.name for f in fields(GPTConfig)}}
    biased = any(v.any() for k, v in theirs.state_dict().items() if k.endswith(".bias"))  # trained on elsewhere, biases may have come
    args |= dict(block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
                 bias=biased or args.get("bias", True), gelu=gelu, norm=float(args.get("norm", "inf")))
    model = GPT(GPTConfig(**{**args, **options}), ours.get("unit_at_cell"))
    state = {k: v.t() if _is_conv1d(k) else v for k, v in theirs.state_dict().items() if k in model.state_dict()}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {"unit_at_cell"}, missing
    return model


def save_pretrained(self, folder, tokenizer=None, facts=""):
    """Write the weights as a Hugging Face GPT-2 folder (safetensors) with equal logits, with a model card, of which `facts` is a paragraph, and with
    the Tokenizer where one is given. nanocortex.json beside them holds what that format has no place for: our options and the units' positions."""
    from transformers import GPT2Config, GPT2LMHeadModel
    c, eot = self.config, tokenizer.eot if tokenizer else None
    if c.head_loss or c.attn_proj:
        raise ValueError("head_loss and attn_proj models have no Hugging Face GPT-2 form")
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                                        activation_function="gelu_new" if c.gelu == "tanh" else "gelu", resid_pdrop=c.dropout,
                                        embd_pdrop=c.dropout, attn_pdrop=c.dropout, bos_token_id=eot, eos_token_id=eot))
    ours, keys = self.state_dict(), theirs.state_dict().keys()
    if strange := [k for k in ours if k not in keys and k != "unit_at_cell"]:
        raise ValueError(f"a model with {strange[0]} has no Hugging Face GPT-2 form")
    state = {k: torch.zeros_like(v) if k not in ours else ours[k].t() if _is_conv1d(k) else ours[k]  # no bias of ours is a zero bias there
             for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    theirs.load_state_dict(state, strict=False)
    theirs.tie_weights()
    theirs.save_pretrained(folder)
    extra = dict(model_args={**asdict(c), "norm": str(c.norm)}, **({"unit_at_cell": self.unit_at_cell.tolist()} if c.sheet else {}),
                 **({"tokenizer": tokenizer.state} if tokenizer else {}))
    if tokenizer:
        tokenizer.save_pretrained(folder)
    Path(folder, "nanocortex.json").write_text(json.dumps(extra))
    Path(folder, "README.md").write_text(model_card(c, self.n_params(), tokenizer, facts))


def model_card(config, n_params, tokenizer=None, facts=""):
    """README.md of an exported model."""
    sheet = f"""
Each of its {2 * config.n_layer} sublayers has a square sheet of {config.n_embd} cells on which its units have a place; training added {config.alpha:g}
times the spatial loss of every sheet to the next-token loss. The places are in `nanocortex.json`: `unit_at_cell`, a permutation per sheet, attention
and MLP in turns.
""" if config.sheet else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2{", topography" if config.sheet else ""}]
---
A GPT-2 of {config.n_layer} layers x {config.n_embd} units and {config.n_head} heads, {n_params:,} parameters without positions, context of
{config.block_size} tokens, vocabulary of {config.vocab_size:,}{f" ({tokenizer.state['name']})" if tokenizer else ""}, written by nanoCortex.
{sheet}{facts and f"{chr(10)}{facts}{chr(10)}"}
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("this folder"){' ; tokenizer = AutoTokenizer.from_pretrained("this folder")' if tokenizer else ""}

It says what its training text makes likely, true or not, and has been tested for nothing else than what is written here.
"""


def _our_file(name):
    """nanocortex.json of a local folder, {} where there is none."""
    path = Path(name) / "nanocortex.json"
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError):
        raise ValueError(f"{path} is torn or not ours: export the model again, or take the file away") from None


class NotOurGPT(ValueError):
    """A Hugging Face model that GPT.from_pretrained has no place for; scripts that only listen to a model may take it as it is."""


@cache
def hub_answers():
    """Is the Hugging Face hub within reach? Asked once: transformers would try for half a minute at each file."""
    from huggingface_hub import constants, get_session
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
        return True
    except Exception:  # no network, no name, no certificate, offline mode
        return False


def from_hub(Auto, name):
    """Auto.from_pretrained(name), Auto a class of transformers. Raises FileNotFoundError where there is no such model and the hub is out of reach,
    ValueError for torn and foreign files, over which transformers and what it reads them with stumble in nearly any way."""
    try:
        return Auto.from_pretrained(name, **{} if Path(name).is_dir() or hub_answers() else {"local_files_only": True})
    except Exception as e:
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"
        if Path(name).is_dir():
            raise ValueError(f"{name} holds nothing that transformers can read as {Auto.__name__} ({why}): give a whole folder of a model, a run folder or "
                             "a checkpoint") from None
        raise FileNotFoundError(f"no model '{name}': it is no folder or file here, and not to be had from the Hugging Face hub ({why})") from None


def _is_conv1d(name):
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))  # Hugging Face keeps these transposed


GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer:
    """A byte-pair tokenizer from its state, the plain dict that travels in checkpoints: name, pattern, special_tokens {text: id} and `ranks`,
    the text of a tiktoken rank file (base64 token, space, rank; a line each)."""

    def __init__(self, state):
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in state["ranks"].splitlines())}
        self.state, self.special = state, dict(state["special_tokens"])
        self.core = tiktoken.Encoding(state["name"], pat_str=state["pattern"], mergeable_ranks=ranks, special_tokens=self.special)
        self.n_vocab = self.core.n_vocab
        self.eot = self.special.get("<|endoftext|>")  # None: a character tokenizer has none
        # a tokenizer without all 256 bytes, of characters say, knows only its own
        self.known = None if all(bytes([b]) in ranks for b in range(256)) else {token.decode(errors="ignore") for token in ranks}

    def encode(self, text):
        """Token ids of a text; '<|endoftext|>' in it is plain text. ValueError for a character that the vocabulary has not."""
        if self.known is not None and (strange := set(text) - self.known):
            raise ValueError(f"the tokenizer '{self.state['name']}' does not know {sorted(strange)[0]!r}: leave it out of the text")
        return self.core.encode(text, disallowed_special=())

    def decode(self, ids):
        """The text of token ids; ids of no token (a padded vocabulary's) and torn characters become '\ufffd'."""
        return b"".join(self.core.decode_single_token_bytes(i) if self._is_token(i) else b"\xef\xbf\xbd" for i in map(int, ids)).decode(errors="replace")

    def _is_token(self, i):
        try:
            self.core.decode_single_token_bytes(i)
            return True
        except KeyError:
            return False

    @classmethod
    def from_pretrained(cls, name):
        """The byte-level BPE of a Hugging Face GPT-2 folder or name."""
        if "tokenizer" in (ours := _our_file(name)):
            return cls(ours["tokenizer"])
        from transformers import AutoTokenizer
        vocab = from_hub(AutoTokenizer, name).get_vocab()
        byte_of = {c: b for b, c in _character_of_byte().items()}
        special = {"<|endoftext|>": vocab.pop("<|endoftext|>")} if "<|endoftext|>" in vocab else {}
        if any(c not in byte_of for token in vocab for c in token):
            raise ValueError(f"the tokenizer of '{name}' is no byte-level BPE: only GPT-2's kind is read")
        ranks = sorted((rank, bytes(byte_of[c] for c in token)) for token, rank in vocab.items())
        return cls(dict(name=os.path.basename(name), pattern=GPT2_PATTERN, special_tokens=special,
                        ranks="".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks)))

    def save_pretrained(self, folder):
        """Write it in Hugging Face's form, for AutoTokenizer: the same ids for the same text, but '<|endoftext|>' in a text is the token there."""
        from tokenizers import Regex, Tokenizer as Fast, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in self.state["ranks"].splitlines())}
        split = pre_tokenizers.Split(Regex(self.state["pattern"]), "isolated")
        if self.known is None:
            name = _character_of_byte()
            spell = lambda token: "".join(name[b] for b in token)
            joined = (_merge(token, ranks) for token in sorted(ranks, key=lambda token: ranks[token]) if len(token) > 1)
            merges = [(spell(a), spell(b)) for a, b in joined]
            before: Any
            after: Any
            before, after = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]), decoders.ByteLevel()
        else:  # of characters
            spell, merges, before, after = bytes.decode, [], split, decoders.Fuse()
        fast = Fast(models.BPE({spell(token): rank for token, rank in ranks.items()} | self.special, merges))
        fast.pre_tokenizer, fast.decoder = before, after
        end = {key: "<|endoftext|>" for key in ("eos_token", "bos_token")} if self.eot is not None else {}
        PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False, **end).save_pretrained(folder)


def _character_of_byte():
    """{byte: the character that GPT-2's files write it as}: printable ones as themselves, the others as 256, 257, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in printable)}


def _merge(token, ranks):
    """The two parts that byte-pair encoding joins last to make `token`, bytes: what the merges ranked before it leave."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        rank, at = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank >= ranks[token]:
            raise ValueError(f"the token {token!r} is not made by merging two others: this tokenizer has no Hugging Face BPE form")
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


def adopt_checkpoint(state, path):
    """The one place where foreign checkpoints become ours: nanoGPT's ckpt.pt and TopoLM's ckpt-N.pt, which has the same form. Optimiser state stays behind.

    Shapes are read from the weights. TopoLM's positions are not in its checkpoint: its layer.N.attn.pkl and layer.N.mlp.pkl are taken from the same folder
    or from one in it. A checkpoint of it that does not say with_resid is one of sublayer outputs, as the published ones are."""
    weights, args = {}, state["model_args"]
    for key, value in state["model"].items():
        for prefix in ("module.", "_orig_mod.", "module."):
            key = key.removeprefix(prefix)
        if not key.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask of old versions
            weights[key] = value
    head, wte, wpe = weights.pop("lm_head.weight", None), weights.get("transformer.wte.weight"), weights.get("transformer.wpe.weight")
    if wte is None or wpe is None or "n_head" not in args:
        raise ValueError(f"{path} is a checkpoint of no GPT-2: nanoGPT's and TopoLM's are read")
    if head is not None and not torch.equal(head, wte):
        raise ValueError(f"{path} has a head of its own, where our GPT's is tied to the token embedding")
    first = "transformer.h.0.attn."
    ours = dict(block_size=len(wpe), vocab_size=len(wte), n_layer=1 + max(int(key.split(".")[2]) for key in weights if key.startswith("transformer.h.")),
                n_head=args["n_head"], n_embd=wte.size(1), bias="transformer.ln_f.bias" in weights, gelu="exact", dropout=float(args.get("dropout", 0.0)),
                head_loss=f"{first}c_proj.weight" not in weights, attn_proj=f"{first}attn_proj.weight" in weights)
    folder = Path(path).parent
    found = next((f for f in (folder, *sorted(f for f in folder.iterdir() if f.is_dir())) if (f / "layer.0.attn.pkl").is_file()), None)
    topographic = bool({"alpha", "with_resid", "accum", "head_loss", "activation_decay"} & args.keys())
    said = "nanoGPT" if not topographic else "TopoLM, of whose units no positions (layer.0.attn.pkl ...) lie beside it"
    if topographic and found:
        rows, facts = read_layer_pickles(found)
        names = positions.layer_names(ours["n_layer"])
        if sorted(rows) != sorted(names) or len(rows[names[0]]) != ours["n_embd"]:
            raise ValueError(f"{found} places {len(rows[min(rows)])} units in each of {len(rows)} sheets, {path} has {ours['n_embd']} in {len(names)}")
        weights["unit_at_cell"] = torch.stack([torch.from_numpy(rows[name]) for name in names])
        ours |= dict(sheet=True, alpha=float(args.get("alpha", 0.0)), accum=args.get("accum", "mean"), tap="residual" if args.get("with_resid") else "sublayer",
                     activation_decay=float(args.get("activation_decay", 0.0)), **facts)
        said = f"TopoLM with the positions of {found}"
    if os.environ.get("RANK", "0") == "0":
        print(f"{path}: a checkpoint of {said}", file=sys.stderr)
    dataset = str((state.get("config") or {}).get("dataset", ""))
    return dict(format="nanocortex", version=VERSION, kind="lm", model_args=ours, model=weights, tokenizer=foreign_tokenizer(path, len(wte), dataset),
                step=int(state.get("iter_num", 0)), best=float(state.get("best_val_loss", math.inf)), config={}, foreign=said)


def foreign_tokenizer(path, vocab_size, dataset=""):
    """State of the tokenizer of a nanoGPT checkpoint: of the characters in meta.pkl, beside it or in nanoGPT's data/DATASET, or GPT-2's BPE."""
    folder = Path(path).parent
    for meta in (folder / "meta.pkl", folder.parent / "data" / dataset / "meta.pkl"):
        if meta.is_file():
            stoi = data.read_pickle(meta).get("stoi", {})
            if not stoi or not all(isinstance(c, str) and isinstance(i, int) and i < vocab_size for c, i in stoi.items()):
                raise ValueError(f"{meta} is not the vocabulary of {path}, which has {vocab_size} tokens")
            ranks = "".join(f"{base64.b64encode(c.encode()).decode()} {i}\n" for c, i in sorted(stoi.items(), key=lambda item: item[1]))
            return dict(name="characters", pattern=r"[\s\S]", special_tokens={}, ranks=ranks)
    if not 50257 <= vocab_size <= 50432:  # padded to a multiple of 64 or 128, or not
        raise ValueError(f"{path} has {vocab_size} tokens and no meta.pkl says which: copy nanoGPT's data/{dataset or 'DATASET'}/meta.pkl beside it")
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        return Tokenizer.from_pretrained(str(folder)).state
    try:
        core = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:
        raise FileNotFoundError(f"{path} speaks GPT-2's BPE, which is neither in tiktoken's cache nor reachable ({type(e).__name__}): run once with "
                                "network, point TIKTOKEN_CACHE_DIR to a copied cache, or put GPT-2's vocab.json and merges.txt beside it") from None
    tokens = sorted((rank, token) for token, rank in core._mergeable_ranks.items())
    return dict(name="gpt2", pattern=GPT2_PATTERN, special_tokens={"<|endoftext|>": core.eot_token},
                ranks="".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in tokens))


def load_lm(spec, **options):
    """(model, tokenizer) of any language model the project takes: a run folder or checkpoint of ours, of nanoGPT or of TopoLM (adopt_checkpoint), a
    Hugging Face GPT-2 name or local folder. options set fields of GPTConfig that are not of the weights. Raises FileNotFoundError with the command
    that makes a missing one."""
    path = Path(spec)
    if path.is_dir() and not (path / "config.json").exists():
        numbered = sorted(path.glob("ckpt-*.pt"), key=lambda p: (len(p.name), p.name))  # TopoLM's; the last of them
        path = next((p for p in (path / "best.pt", path / "ckpt.pt", *numbered[-1:]) if p.exists()), path / "best.pt")
    if path.suffix == ".pt" or (path.parts and path.parts[0] in ("out", "/", ".", "..")) and not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"no language model at {spec}: train one with python train.py, or give lm= a run folder, a checkpoint or a "
                                    "Hugging Face name")
        state = _load_any(path)
        return lm_from(state, path, **options), Tokenizer(state["tokenizer"])
    return from_pretrained(spec, **options), Tokenizer.from_pretrained(spec)


def export_lm(spec, folder):
    """Any language model that load_lm takes as a Hugging Face folder that AutoModelForCausalLM and AutoTokenizer open: safetensors, tokenizer, model card.

        python -c "import model; model.export_lm('out/train', 'out/hf')" """
    model, tokenizer = load_lm(spec)
    facts, path = "", Path(spec)
    for name in ("config.yaml", "results.csv"):  # what a run of ours says of itself
        if (path / name).is_file():
            lines = [f"    {line}\n" for line in (path / name).read_text().splitlines() if not line.startswith("#")]
            facts += f"`{name}` of its run:\n\n{''.join(lines)}\n"
    save_pretrained(model, folder, tokenizer, facts.strip())


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
        layer = data.read_pickle(path, allowed=("LayerPositions",))
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
    side = positions.sheet_side(len(coordinates))
    cell = np.rint(coordinates).astype(np.int64) @ (side, 1)
    if not (np.array_equal(np.sort(cell), np.arange(side * side)) and np.array_equal(np.stack(np.divmod(cell, side), 1), coordinates)):
        cells = np.stack(np.divmod(np.arange(side * side), side), 1)
        cell = linear_sum_assignment(np.linalg.norm(coordinates[:, None] - cells, axis=-1))[1]  # of each unit
    moved = np.linalg.norm(np.stack(np.divmod(cell, side), 1) - coordinates, axis=1)
    return np.argsort(cell), moved


gpt_from_hub = from_pretrained
export_gpt = save_pretrained
