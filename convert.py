"""Read and write models, checkpoints, tokenizers and positions of other projects.

- load_lm: any GPT-2 as our GPT, with equal logits and equal token ids, from a run folder or
  checkpoint (ours, nanoGPT's, TopoLM's), or a Hugging Face name or folder. export_gpt writes one.
- HiddenStates: hidden states, layer by layer, or logits of any causal or masked language model of
  transformers, or of ours.
- load_positions: the positions of units on their sheets, from our .npz or TopoLM's pickles.

    python convert.py lm=out/train out_dir=out/hf   # save our model as a Hugging Face folder

transformers and scipy are imported where they are needed: they take a second, and our own models do
without them.
"""

import copy
import inspect
import json
import os
import sys
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import positions
from data import InputError, check_content, read_pickle, write_aside
from data.tokens import (
    BYTE_OF,
    CHARACTERS,
    ENDOFTEXT,
    GPT2_PATTERN,
    Tokenizer,
    bytes_of,
    gpt2_encoding,
    make_state,
    nanogpt_characters,
    rank_file,
    ranks_of,
    replace_lone_surrogates,
    state_of,
)
from model import GPT, VERSION, GPTConfig, lm_from, load_checkpoint, patch_checkpoint


@dataclass
class Config:
    lm: str = "out/train"  # run folder, checkpoint, Hugging Face name or folder
    out_dir: str = "out/hf"  # Hugging Face folder to write


class NotOurGPT(InputError):
    """A model of transformers that does not fit our GPT; HiddenStates uses it as it is."""


def load_lm(spec, **options):
    """Load (GPT, Tokenizer) with the logits and token ids of the original language model.

    spec: a run folder or checkpoint (ours, nanoGPT's, TopoLM's), or the Hugging Face name or folder
    of a GPT-2. options set fields of GPTConfig that the weights leave open (alpha, dropout,
    windows).
    """
    path = find_checkpoint(spec)
    if path is None:
        return gpt_from_hub(spec, **options), Tokenizer(tokenizer_state_from_hub(spec))
    state = load_checkpoint(path, adopt_checkpoint)
    return lm_from(state, path, **options), Tokenizer(state["tokenizer"])


def find_checkpoint(spec):
    """Return the .pt file that a spec stands for, or None if transformers should load it."""
    path = Path(spec)
    candidates = [path]
    if path.suffix != ".pt":
        if (path / "config.json").exists() or any(path.glob("*.gguf")) or path.is_file():
            return None
        if not path.exists() and path.parts[:1] not in [("out",), ("/",), ("..",)]:
            return None
        numbered = sorted(path.glob("ckpt-*.pt"), key=lambda file: (len(file.name), file.name))
        candidates = [path / "best.pt", path / "ckpt.pt", *numbered[-1:]]  # TopoLM's last one
    for file in candidates:
        if os.path.lexists(file):
            return check_content(file)
    remedy = "give a run of python train.py, or a Hugging Face name"
    raise InputError(f"lm: no language model at {spec}: {remedy}")


# ---- hidden states of any language model


class _Deepest(Exception):
    """Raised to end a pass at the deepest layer that is needed."""


class HiddenStates:
    """A causal or masked language model, read layer by layer.

    lm: anything for load_lm; another causal or masked model of transformers (name, folder, GGUF
    file); or {"model": ..., "tokenizer": ...} with a model of ours, of transformers, or any that
    takes input_ids and returns hidden_states. dtype: precision of the pass, a torch.dtype or its
    name. padding_side: "left" becomes "right" where left pads would change the states. bos: start
    each text with the tokenizer's first token. head: load the head, for logits.

    Layer 0 is the input of the first block (the embeddings), n_layer the output of the last one
    after the final norm. Attributes: name, model, tokenizer, causal, n_layer, width, max_length
    (of a text, including special tokens), params, padding_side.
    """

    def __init__(
        self, lm, device="cpu", dtype=torch.float32, padding_side="right", bos=False, head=False
    ):
        self.device = torch.device(device)
        self.dtype = dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        name = lm
        if isinstance(lm, dict):
            model = lm["model"]
            self.tokenizer = lm["tokenizer"]
            hub_name = getattr(getattr(model, "config", None), "name_or_path", "")
            name = lm.get("name") or hub_name or type(model).__name__
        else:
            try:
                model, self.tokenizer = load_lm(lm)
            except NotOurGPT:
                model, self.tokenizer = load_from_transformers(lm, dtype, head)
        self.name = str(name)
        self.foreign_tokenizer = hasattr(self.tokenizer, "convert_ids_to_tokens")
        self._attach(model, padding_side)
        self.max_length = self.room = longest_text(self.base, self.tokenizer)
        self.first = None
        if bos:
            self.write_first_token()

    # -- texts

    def write_first_token(self):
        """Start all later texts with the tokenizer's first token, unless the tokenizer does."""
        if self.foreign_tokenizer:
            row = self.tokenizer("a")["input_ids"]
            plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
            if row[: len(plain)] != plain:
                return
        for name in ("eot", "bos_token_id", "cls_token_id", "eos_token_id"):
            self.first = getattr(self.tokenizer, name, None)
            if self.first is not None:
                self.room = self.max_length - 1
                return
        raise InputError(f"bos: the tokenizer of {self.name} has no first token: leave out bos")

    def encode(self, texts):
        """Return token ids of each text, cut to max_length, and how many texts were cut."""
        rows = []
        n_cut = 0
        for text in texts:
            row = self._row(text)
            if not row:
                number = f"text {len(rows)} of {len(texts)}"
                raise InputError(f"{number} is empty ({text!r} has no tokens): leave it out")
            if len(row) > self.max_length:
                row = self._row(text, truncation=True, max_length=self.room)[: self.max_length]
                n_cut += 1
            if max(row) >= self.vocab_size:
                problem = f"{self.vocab_size:,} tokens, but {text[:40]!r} has token {max(row)}"
                raise InputError(f"{self.name} has {problem}: give the model its own tokenizer")
            rows.append(row)
        return rows, n_cut

    def _row(self, text, **cut):
        text = replace_lone_surrogates(text)
        if self.foreign_tokenizer:
            row = self.tokenizer(text, verbose=False, **cut)["input_ids"]
        else:
            row = list(self.tokenizer.encode(text))
        if self.first is not None and row[:1] != [self.first]:
            row = [self.first, *row]
        return row

    def offsets(self, text):
        """Return the characters (start, end) that each token of encode([text]) covers.

        Excludes spaces at either end of a token; special tokens cover nothing (start == end).
        """
        text = replace_lone_surrogates(text)
        if not self.foreign_tokenizer:
            spans = byte_spans(self.tokenizer, text)[: self.room]
        elif self.tokenizer.is_fast:
            options = {"truncation": True, "max_length": self.room}
            spans = self.tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"]
        else:
            problem = "does not report where tokens begin: give a model with a fast one"
            raise InputError(f"the tokenizer of {self.name} {problem}")
        if len(self.encode([text])[0][0]) > len(spans):
            spans = [(0, 0), *spans]
        trimmed = []
        for start, end in spans:
            part = text[start:end]
            end -= len(part) - len(part.rstrip())
            start = min(end, start + len(part) - len(part.lstrip()))
            trimmed.append((start, end))
        return trimmed

    def pad(self, rows):
        """Pad token lists on padding_side: return ids (B, T), and real (B, T), False for pads."""
        rows = list(map(torch.tensor, rows))
        options = {"batch_first": True, "padding_side": self.padding_side}
        fill = getattr(self.tokenizer, "pad_token_id", None) or 0
        if fill >= self.vocab_size:  # unknown to the model, which ignores pads anyway
            fill = 0
        ids = pad_sequence(rows, padding_value=fill, **options)
        real = pad_sequence(list(map(torch.ones_like, rows)), **options).bool()
        return ids.to(self.device), real.to(self.device)

    # -- the pass

    def run(self, ids, real, layers, take):
        """Call take(layer, state (B, T, width)) for each of `layers` while ids (B, T) pass through.

        Keeps no states, and stops at the deepest layer.
        """
        wanted = set(layers)
        if self.blocks is None:
            states = self._output_states(ids, real)
            for layer in sorted(wanted):
                take(layer, states[layer])
            return

        def report(layer, state):
            if layer in wanted:
                take(layer, state)
            if layer == max(wanted):
                raise _Deepest

        def before_first(module, args, kwargs):
            report(0, (*args, kwargs.get("hidden_states"))[0])

        def after(layer, module, args, output):
            report(layer, output[0] if isinstance(output, tuple) else output)

        handles = [self.blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)]
        for layer, block in enumerate(self.blocks[:-1], start=1):
            handles.append(block.register_forward_hook(partial(after, layer)))
        try:
            output = self._call(self.model.trunk if self.is_gpt else self.base, ids, real)
            last = output[0] if self.is_gpt else getattr(output, "last_hidden_state", None)
            report(self.n_layer, last)
        except _Deepest:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def states(self, ids, real, layers=None):
        """Return {layer: state (B, T, width)} of ids (B, T), by default for all layers."""
        states = {}
        self.run(ids, real, self.layers(layers or ()), states.__setitem__)
        return states

    def logits(self, ids, real):
        """Return logits (B, T, vocab) of ids (B, T); models of transformers need head=True."""
        return self._call(self.model, ids, real).logits

    def layers(self, numbers):
        """Return sorted layer numbers, with negative ones counted from the end; [] means all."""
        numbers = list(numbers) or range(self.n_layer + 1)
        for layer in numbers:
            if not -self.n_layer - 1 <= layer <= self.n_layer:
                remedy = f"give 0 (embeddings) to {self.n_layer}"
                raise InputError(f"{self.name} has no layer {layer}: {remedy}")
        return sorted({layer % (self.n_layer + 1) for layer in numbers})

    def random_twin(self, seed):
        """Return the same architecture and tokenizer with new random weights, as a control."""
        twin = copy.copy(self)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.is_gpt:
                model = GPT(self.model.config, seed=seed)
            elif hasattr(self.model, "config"):
                model = type(self.model)(self.model.config)
            else:  # a user's module
                model = copy.deepcopy(self.model)
                for module in model.modules():
                    if hasattr(module, "reset_parameters"):
                        module.reset_parameters()
                    elif list(module.parameters(recurse=False)):
                        kind = type(module).__name__
                        remedy = f"{kind}.reset_parameters(): add it, or leave that control out"
                        raise InputError(f"random weights for {self.name} need {remedy}")
        twin._attach(model, self.padding_side)
        return twin

    def _call(self, model, ids, real, **options):
        """Return the model's output, given which tokens are pads."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self.is_gpt:
                return model(ids, **options)
            inputs = {"attention_mask": real.long(), "use_cache": False}
            if self.padding_side == "left":
                inputs["position_ids"] = (real.cumsum(1) - 1).clamp_min(0)
            for key in inputs.keys() & self.accepts:
                options[key] = inputs[key]
            return model(input_ids=ids, **options)

    def _output_states(self, ids, real):
        """Return all n_layer + 1 hidden states as the model itself returns them."""
        if self.is_gpt:
            layers = range(self.model.config.n_layer + 1)
            return [*self._call(self.model, ids, real, hidden=layers).hidden.values()]
        return self._call(self.base, ids, real, output_hidden_states=True).hidden_states

    # -- what kind of model it is, by how it behaves

    @torch.no_grad()
    def _attach(self, model, padding_side):
        """Find the model's sizes and blocks, whether it is causal, and how to pad it."""
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            kind = f"an encoder and a decoder ({model.config.model_type})"
            raise InputError(f"{self.name} has {kind}: give a causal or masked language model")
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.is_gpt = isinstance(model, GPT)
        self.base = getattr(model, "base_model", model)  # without its head
        self.vocab_size = getattr(text_config(self.base), "vocab_size", None) or 10**9
        self.accepts = set(inspect.signature(self.base.forward).parameters)
        self.params = sum(p.numel() for p in self.base.parameters())
        self.padding_side = "right"
        ids = torch.tensor([[1, 2, 3, 3], [1, 2, 1, 2]], device=self.device)
        real = torch.ones_like(ids, dtype=torch.bool)
        states = self._output_states(ids, real)
        if any(state.shape[:-1] != ids.shape for state in states):
            remedy = "give a model that does not merge tokens"
            raise InputError(f"{self.name}: some layers lack a state for each token: {remedy}")
        if not all(state.isfinite().all() for state in states):
            cause = "its weights are damaged, or dtype= is too narrow for them"
            raise InputError(f"{self.name}: some hidden states are NaN or infinite: {cause}")
        self.n_layer = len(states) - 1
        self.width = states[-1].size(-1)
        # does a later token change an earlier state?
        self.causal = all(nearly_equal(state[0, :2], state[1, :2], 1e-5) for state in states)
        self.blocks = self._find_blocks(ids, real, states)
        if not self._ignores_pads():
            problem = "reads the padding, so a text's states depend on the rest of its batch"
            raise InputError(f"{self.name} {problem}: give another model")
        if padding_side == "left" and self.causal and not self.is_gpt:
            self.padding_side = "left"
            if not self._ignores_pads():
                self.padding_side = "right"

    def _find_blocks(self, ids, real, states):
        """Return the blocks whose hooks capture the states that the model returns, or None."""
        for module in self.base.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.n_layer:
                self.blocks = module
                captured = self.states(ids, real)
                if all(nearly_equal(captured.get(i), states[i], 1e-5) for i in range(len(states))):
                    return module
        return None

    def _ignores_pads(self):
        """Return whether a text has equal states alone and in a batch with a longer one."""
        together, real = self.pad([[1, 2, 3], [3, 2, 1, 3, 2]])
        batch = self._output_states(together, real)
        single = self._output_states(*self.pad([[1, 2, 3]]))
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.1
        return all(nearly_equal(a[0][real[0]], b[0], tolerance) for a, b in zip(batch, single))


def nearly_equal(a, b, tolerance):
    """Return whether two states agree up to rounding, relative to their size."""
    if not isinstance(a, torch.Tensor) or a.shape != b.shape:
        return False
    scale = b.float().square().mean().sqrt().clamp_min(1e-6)
    return bool((a.float() - b.float()).abs().max() <= tolerance * scale)


def byte_spans(tokenizer, text):
    """Return the characters (start, end) that each token of our Tokenizer covers."""
    n_bytes = [len(character.encode()) for character in text]
    character_of = np.repeat(np.arange(len(text)), n_bytes)  # of each byte
    spans = []
    start = 0
    for token in tokenizer.encode(text):
        end = start + len(tokenizer.core.decode_single_token_bytes(token))
        spans.append((int(character_of[start]), int(character_of[end - 1]) + 1))
        start = end
    return spans


def text_config(model):
    """Return the config of a model, or of its text part; None if it has none."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def longest_text(model, tokenizer):
    """Return how many tokens, including special ones, the model can read; 10 ** 9 if unlimited."""
    config = text_config(model)
    limits = [10**9, getattr(tokenizer, "model_max_length", None)]
    for name in ("max_position_embeddings", "max_seq_len"):
        limits.append(getattr(config, name, None))
    if isinstance(model, GPT):
        limits.append(config.block_size)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            limits.append(module.num_embeddings)
            if module.padding_idx is not None:  # RoBERTa's positions start after it
                limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(int(limit) for limit in limits if limit and limit > 0)


def load_from_transformers(name, dtype, head):
    """Load (model, tokenizer) of a causal or masked language model of transformers."""
    import transformers

    Auto = transformers.AutoModel
    config = from_hub(transformers.AutoConfig, name)
    if head and not config.is_encoder_decoder:  # HiddenStates refuses encoder-decoders
        names = transformers.models.auto.modeling_auto
        causal = names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        Auto = transformers.AutoModelForCausalLM
        masked = config.model_type in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        if masked and causal not in (config.architectures or []):  # models like BERT can be either
            Auto = transformers.AutoModelForMaskedLM
    if dtype != torch.float32:
        dtype = "auto"  # as in the file; the pass uses autocast
    return load_weights(Auto, name, dtype=dtype), hub_tokenizer(name)


# ---- Hugging Face


@cache
def hub_answers():
    """Return whether the Hugging Face hub is reachable; cached, or every file would cost a try."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
        return True
    except Exception:  # no network, no name, no certificate, offline mode
        return False


def from_hub(Auto, name, **options):
    """Call Auto.from_pretrained of transformers with a name, a folder or a GGUF file.

    Raises InputError for anything that transformers raises on damaged or foreign files.
    """
    folder = Path(name)
    ggufs = sorted(folder.glob("*.gguf"))
    if folder.suffix == ".gguf":
        ggufs = [folder]
        folder = folder.parent
    for file in folder.glob("*"):
        if file.suffix in (".json", ".txt", ".model"):  # not weights, which may have other copies
            check_content(file)
    if folder.is_dir():
        if len(ggufs) == 1 and not (folder / "config.json").exists():
            options["gguf_file"] = ggufs[0].name
        problem = f"{name} holds nothing that transformers can read as {Auto.__name__}"
    else:
        options["local_files_only"] = not hub_answers()
        problem = f"the model '{name}' is neither here nor available from the Hugging Face hub"
    try:
        return Auto.from_pretrained(str(folder), **options)
    except Exception as error:
        for file in folder.glob("*"):
            check_content(file)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        remedy = "give the name or the complete folder of a model"
        raise InputError(f"{problem} ({reason}): {remedy}") from None


def hub_tokenizer(name):
    """Load the tokenizer of a Hugging Face model."""
    import transformers

    tokenizer = from_hub(transformers.AutoTokenizer, name)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers made an empty one
        cure = "copy tokenizer.json, or vocab.json and merges.txt, there"
        raise InputError(f"{name} holds no tokenizer: {cure}")
    return tokenizer


def load_weights(Auto, name, **options):
    """Load a model, and refuse missing weights, which transformers would draw at random."""
    import transformers

    transformers.logging.set_verbosity_error()  # no table of unused weights
    model, report = from_hub(Auto, name, output_loading_info=True, **options)
    for key in sorted(report["missing_keys"]):
        if "pooler" not in key:  # it changes no hidden state
            kind = type(model).__name__
            cause = "the file is incomplete, or saved without the head"
            raise InputError(f"{name} lacks weights of {kind} ({key}): {cause}")
    return model


GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}


def gpt_from_hub(name, **options):
    """Load Hugging Face's GPT-2 as our GPT with equal logits, including the sheets of an export."""
    import transformers

    shape = gpt_shape(from_hub(transformers.AutoConfig, name), name)
    hub_model = load_weights(transformers.GPT2LMHeadModel, name, dtype=torch.float32).eval()
    weights = hub_model.state_dict()
    exported = exported_facts(name)
    args = {**exported.get("model_args", {}), **shape}
    args["norm"] = float(args.get("norm", "inf"))  # JSON has no infinity
    biased = any(value.any() for key, value in weights.items() if key.endswith(".bias"))
    args["bias"] = biased or args.get("bias", True)  # training elsewhere may have added biases
    model = GPT(GPTConfig(**{**args, **options}), exported.get("unit_at_cell"))
    state = {}
    for key in model.state_dict().keys() & weights.keys():
        state[key] = transpose_conv1d(key, weights[key])
    model.load_state_dict(state, strict=False)
    if not same_logits(model, hub_model):
        raise NotOurGPT(f"'{name}' is a GPT-2 variant: with its weights our logits differ")
    return model


def gpt_shape(config, name):
    """Return fields of GPTConfig from the config of a Hugging Face GPT-2."""
    if config.model_type != "gpt2":
        raise NotOurGPT(f"'{name}' is a {config.model_type} model, not GPT-2")
    plain = {
        "activation_function": [*GELUS],
        "layer_norm_epsilon": [1e-5],
        "n_inner": [None, 4 * config.n_embd],
        "tie_word_embeddings": [True],
    }
    for key, allowed in plain.items():
        value = getattr(config, key)
        if value not in allowed:
            raise NotOurGPT(f"'{name}' is a GPT-2 variant: our GPT has no {key}={value}")
    shape = {key: getattr(config, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    return {**shape, "block_size": config.n_positions, "gelu": GELUS[config.activation_function]}


def exported_facts(name):
    """Read nanocortex.json of a folder that export_gpt wrote; {} for other folders."""
    path = Path(name) / "nanocortex.json"
    if not path.is_file():
        return {}
    try:
        return patch_checkpoint({"version": 1, **json.loads(path.read_text())})
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged or not ours: export the model again") from None


def transpose_conv1d(name, weight):
    """Convert a weight between our (out, in) and the (in, out) of Hugging Face's Conv1D."""
    if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return weight.t()
    return weight


@torch.no_grad()
def same_logits(model, hub_model):
    """Return whether our GPT and one of transformers give the same logits for some tokens."""
    length = min(16, model.config.block_size)
    ids = torch.arange(2 * length).view(2, length) * 7 % model.config.vocab_size
    training = model.training
    logits = model.eval()(ids).logits
    model.train(training)
    return nearly_equal(logits, hub_model(ids).logits, 1e-3)


def export_gpt(model, folder, tokenizer=None):
    """Save our GPT (on the CPU) as a Hugging Face GPT-2 folder (safetensors) with equal logits.

    nanocortex.json next to the weights adds what that format lacks: our options, the units'
    positions, the tokenizer's state. Raises InputError for a model that is more than a GPT-2.
    """
    import transformers

    c = model.config
    eot = getattr(tokenizer, "eot", None)
    config = transformers.GPT2Config(n_positions=c.block_size, bos_token_id=eot, eos_token_id=eot)
    config.activation_function = {"tanh": "gelu_new", "exact": "gelu"}[c.gelu]
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = c.dropout
    for key in ("vocab_size", "n_layer", "n_head", "n_embd"):
        setattr(config, key, getattr(c, key))
    hub_model = transformers.GPT2LMHeadModel(config).eval()
    weights = {"lm_head.weight": model.transformer.wte.weight}
    for key, value in hub_model.state_dict().items():
        if key.endswith(".bias") and not c.bias:
            weights[key] = torch.zeros_like(value)  # Hugging Face's GPT-2 always has biases
    for key, value in model.state_dict().items():
        if key != "unit_at_cell":
            weights[key] = transpose_conv1d(key, value)
    try:
        hub_model.load_state_dict(weights)
        reason = "" if same_logits(model, hub_model) else "its logits would differ"
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
    if reason:
        problem = f"this GPT cannot be saved as a Hugging Face GPT-2 ({reason})"
        raise InputError(f"{problem}: keep its checkpoint")
    hub_model.save_pretrained(folder)
    extra = {"version": VERSION, "model_args": {**asdict(c), "norm": str(c.norm)}}
    if c.sheet:
        extra["unit_at_cell"] = model.unit_at_cell.tolist()
    if tokenizer:
        extra["tokenizer"] = tokenizer.state
        end = {} if eot is None else {"bos_token": ENDOFTEXT, "eos_token": ENDOFTEXT}
        options = {"tokenizer_object": fast_tokenizer(tokenizer.state), **end}
        options["clean_up_tokenization_spaces"] = False
        transformers.PreTrainedTokenizerFast(**options).save_pretrained(folder)
    write_aside(Path(folder, "nanocortex.json"), json.dumps(extra))
    write_aside(Path(folder, "README.md"), model_card(model))


def model_card(model):
    """Return README.md of an exported model."""
    c = model.config
    topography = ", topography" if c.sheet else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2{topography}]
---
A GPT-2 trained with nanoCortex: {c.n_layer} layers x {c.n_embd} units, {model.n_params():,}
parameters without position embeddings. Weight of each sheet's spatial loss:
{c.alpha if c.sheet else 0:g}; `nanocortex.json` holds the positions of units on their sheets
(`unit_at_cell`). The model writes what its training text makes likely, true or not, and has not
been tested for any use.
"""


# ---- tokenizers


def tokenizer_state_from_hub(name):
    """Return the state of our Tokenizer with the same ids as that of a Hugging Face GPT-2."""
    tokenizer = hub_tokenizer(name)
    if getattr(tokenizer, "is_fast", False):
        form, special = tokenizer_form(tokenizer.backend_tokenizer)
        state = exported_facts(name).get("tokenizer")
        if state is None:
            ranks = {}
            for token, rank in form["vocabulary"].items():
                if token not in special and BYTE_OF.keys() >= set(token):
                    ranks[bytes_of(token)] = rank
            state = make_state(Path(name).name, GPT2_PATTERN, rank_file(ranks), special)
        try:
            if form == tokenizer_form(fast_tokenizer(state))[0]:
                return state
        except InputError:  # tokens that no merges make
            pass
    raise NotOurGPT(f"the tokenizer of '{name}' is not exactly GPT-2's byte-level BPE")


# tokenizer.json may spell GPT-2's pre-tokenizer in two ways
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPLIT = {"type": "Split", "pattern": {"Regex": GPT2_PATTERN}, "behavior": "Isolated"}
SPELLED_OUT = [{**SPLIT, "invert": False}, {**LEVEL, "use_regex": False}]


def tokenizer_form(fast):
    """Return all that decides a tokenizers.Tokenizer's ids, as plain values; its special tokens."""
    form = json.loads(fast.to_str().replace('"trim_offsets":false', '"trim_offsets":true'))
    if form["pre_tokenizer"] == {**LEVEL, "use_regex": True}:
        form["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": SPELLED_OUT}
    model = form["model"]
    vocabulary = dict(model["vocab"])
    special = {}
    words = []
    for token in form["added_tokens"]:
        vocabulary[token["content"]] = token["id"]
        if token["special"]:
            special[token["content"]] = token["id"]
        else:  # matched in texts before any merges
            words.append(token["content"])
    rules = [model.get("dropout"), model.get("merges"), form["normalizer"], form["pre_tokenizer"]]
    return {"rules": [model["type"], *rules, words], "vocabulary": vocabulary}, special


def fast_tokenizer(state):
    """Return the tokenizers.Tokenizer with the ids of a tokenizer state.

    It reads '<|endoftext|>' in a text as the token, while our Tokenizer reads it as plain text.
    """
    ranks = ranks_of(state)
    splitters = tokenizers.pre_tokenizers
    split = splitters.Split(tokenizers.Regex(state["pattern"]), "isolated")
    level = splitters.ByteLevel(add_prefix_space=False, use_regex=False)
    merges = []
    if state["pattern"] == CHARACTERS and any(bytes([b]) not in ranks for b in range(256)):
        vocab = {token.decode(): rank for token, rank in ranks.items()}
        pre_tokenizer = split
        decoder = tokenizers.decoders.Fuse()
    else:
        character_of = {byte: character for character, byte in BYTE_OF.items()}
        vocab = {}
        for token in sorted(ranks, key=ranks.get):
            vocab["".join(map(character_of.get, token))] = ranks[token]
            if len(token) > 1:
                parts = last_merge(token, ranks)
                merges.append(tuple("".join(map(character_of.get, part)) for part in parts))
        pre_tokenizer = splitters.Sequence([split, level])
        decoder = tokenizers.decoders.ByteLevel()
    bpe = tokenizers.models.BPE({**vocab, **state["special_tokens"]}, merges)
    fast = tokenizers.Tokenizer(bpe)
    fast.pre_tokenizer = pre_tokenizer
    fast.decoder = decoder
    return fast


def last_merge(token, ranks):
    """Return the two parts that byte-pair encoding joins last to make a token (bytes)."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        first = pair_ranks.index(min(pair_ranks))
        if pair_ranks[first] >= ranks[token]:
            raise InputError(f"this is not a BPE: no merge makes the token {token!r}")
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


# ---- checkpoints of nanoGPT and TopoLM


def adopt_checkpoint(state, path):
    """Convert a checkpoint of nanoGPT (ckpt.pt) or TopoLM (ckpt-N.pt) to the state of one of ours.

    Takes shapes from the weights and drops the optimiser's state. TopoLM's positions come from
    files next to its checkpoint or in a subfolder.
    """
    foreign_args = state.get("model_args", {})
    weights = {}
    for key, value in state.get("model", {}).items():
        if not key.endswith((".attn.bias", ".attn.masked_bias")):  # nanoGPT's causal mask
            # torch.compile and DistributedDataParallel add prefixes
            weights[key.replace("module.", "").replace("_orig_mod.", "")] = value
    embedding = weights.get("transformer.wte.weight")
    head = weights.pop("lm_head.weight", embedding)
    if embedding is None or "transformer.wpe.weight" not in weights or "n_head" not in foreign_args:
        raise InputError(f"{path} is not a GPT-2 of nanoGPT or TopoLM: give one of those, or ours")
    if not torch.equal(head, embedding):
        raise InputError(f"{path} has an untied head: our GPT can only use its token embedding")
    args = {
        "block_size": len(weights["transformer.wpe.weight"]),
        "vocab_size": len(embedding),
        "n_layer": len({key.split(".")[2] for key in weights if ".h." in key}),
        "n_head": foreign_args["n_head"],
        "n_embd": embedding.size(1),
        "bias": "transformer.ln_f.bias" in weights,
        "dropout": float(foreign_args.get("dropout", 0.0)),
        "head_loss": "transformer.h.0.attn.c_proj.weight" not in weights,
        "attn_proj": "transformer.h.0.attn.attn_proj.weight" in weights,
    }
    origin = "nanoGPT"
    if {"alpha", "with_resid", "accum", "head_loss", "activation_decay"} & foreign_args.keys():
        origin = adopt_sheets(args, weights, foreign_args, path)
    print(f"{path}: a checkpoint of {origin}", file=sys.stderr)
    dataset = str((state.get("config") or {}).get("dataset", ""))
    tokenizer = foreign_tokenizer(path, len(embedding), dataset)
    return {"kind": "lm", "model_args": args, "model": weights, "tokenizer": tokenizer}


def adopt_sheets(args, weights, foreign_args, path):
    """Add TopoLM's positions to the arguments and weights; return words for the notice."""
    first = "layer.0.attn.pkl"
    files = [*path.parent.glob(first), *sorted(path.parent.glob(f"*/{first}"))]
    if not files:
        return f"TopoLM, loaded without sheets: no positions ({first} ...) lie next to it"
    folder = files[0].parent
    layouts, facts = read_layer_pickles(folder, args["n_layer"], args["n_embd"])
    weights["unit_at_cell"] = torch.from_numpy(layouts)
    # without with_resid the sheets show sublayer outputs, as in the published models
    tap = "residual" if foreign_args.get("with_resid") else "sublayer"
    args |= {"sheet": True, "tap": tap, "accum": foreign_args.get("accum", "mean"), **facts}
    for key in ("alpha", "activation_decay"):
        args[key] = float(foreign_args.get(key, 0.0))
    return f"TopoLM with the positions of {folder}"


def foreign_tokenizer(path, vocab_size, dataset=""):
    """Return a nanoGPT checkpoint's tokenizer state, from a meta.pkl next to it or in data/, or
    GPT-2's."""
    folder = path.parent
    for meta in (folder / "meta.pkl", folder.parent / "data" / dataset / "meta.pkl"):
        if meta.is_file():
            tokenizer = nanogpt_characters(meta)
            if len(ranks_of(tokenizer)) > vocab_size:
                cure = "copy the right one there"
                raise InputError(f"{meta} has more tokens than {path}: {cure}")
            return tokenizer
    if not 50257 <= vocab_size <= 50432:  # GPT-2's, padded to a multiple of 64 or 128, or not
        meta = f"nanoGPT's data/{dataset or 'DATASET'}/meta.pkl"
        raise InputError(f"{path} has no tokenizer: copy {meta} next to it")
    files = [*folder.glob("vocab.bpe"), *folder.glob("merges.txt")]
    try:
        return state_of(gpt2_encoding(*files[:1]))
    except InputError as error:
        raise InputError(f"{path}: put vocab.bpe (merges.txt) next to it; {error}") from None


# ---- positions of TopoLM


def load_positions(path, n_layer, n_units):
    """Load unit_at_cell (2 n_layer, n_units) from our .npz or a folder of TopoLM's pickles."""
    if not Path(path).is_dir():
        return positions.load_positions(path, n_layer, n_units)
    return read_layer_pickles(path, n_layer, n_units)[0]


def read_layer_pickles(folder, n_layer, n_units):
    """Read TopoLM's layer.N.attn.pkl and layer.N.mlp.pkl: unit_at_cell (2 n_layer, n_units), facts.

    facts: radius and windows that they were made for. The folder may have more layers than the
    model: TopoLM's init_pos makes 16. The published swap-optimised files put several units on one
    cell and leave others empty: place_units spreads them out, with a notice.
    """
    layouts = {}
    facts = {}
    n_moved = 0
    for name in positions.layer_names(n_layer):
        file = Path(folder) / f"{name}.pkl"
        if not file.exists():
            remedy = "copy all of TopoLM's position files there"
            raise InputError(f"{folder} lacks {file.name} for {n_layer} layers: {remedy}")
        layer = read_pickle(file, allowed=("LayerPositions",))
        coordinates = np.asarray(getattr(layer, "coordinates", ()), np.float64)
        if coordinates.shape[1:] != (2,) or not np.isfinite(coordinates).all():
            remedy = "give a position file of TopoLM"
            raise InputError(f"{file} holds no coordinates (units, 2): {remedy}")
        layouts[name], moved = place_units(coordinates)
        n_moved += np.count_nonzero(moved)
        masks = getattr(layer, "neighborhood_indices", None)
        if torch.is_tensor(masks) and masks.dim() == 2:
            facts["radius"] = round((masks[0].sum().item() ** 0.5 + 1) / 2)
            facts["windows"] = int(getattr(layer, "neighborhoods_per_batch", GPTConfig.windows))
    if n_moved:
        notice = f"some units share a cell: {n_moved} moved to free cells as near as possible"
        print(f"{folder}: {notice}", file=sys.stderr)
    return positions.stack_layers(layouts, n_layer, n_units, folder), facts


def place_units(coordinates):
    """Put one unit on each cell with the least total displacement.

    coordinates (C, 2): row and column of each unit on TopoLM's square grid. Returns unit_at_cell
    (C,) and the displacement of each unit (C,).
    """
    from scipy.optimize import linear_sum_assignment

    side = positions.sheet_side(len(coordinates))
    cells = np.stack(np.divmod(np.arange(side * side), side), axis=1)
    distance = np.linalg.norm(coordinates[:, None] - cells, axis=-1)  # (units, cells)
    cell = distance.argmin(axis=1)
    if len(set(cell)) < len(cell) or distance.min(axis=1).any():
        cell = linear_sum_assignment(distance)[1]
    return np.argsort(cell), distance[np.arange(len(cell)), cell]


if __name__ == "__main__":
    from configurator import configure

    config = configure(Config)
    model, tokenizer = load_lm(config.lm)
    export_gpt(model, config.out_dir, tokenizer)
    print(f"saved {config.out_dir} for AutoModelForCausalLM and AutoTokenizer of transformers")
