"""GPT-2 whose units have a place on a cortical sheet.

- GPT-2: pre-LN, GELU, learned positions, tied head; reads and writes Hugging Face GPT-2 weights.
- Each sublayer's output units sit on a square sheet (positions.py); the loss adds alpha times the spatial loss of every layer, measured
  inside each block, so a compiled block holds it in one graph that all layers share (positions and windows are tensor arguments).
- Cross-entropy in chunks of tokens: the float32 logits of the whole batch never exist.
- generate() with a KV cache, batched, ragged prompts. load_lm() reads any language model that the project accepts.
- NeuralEncoder: signals of any electrodes into tokens, from the same Block. NeuralGPT: a GPT that reads them before its text, through its own
  weights or through experts of each layer, or looks at them by cross-attention; the weights of the language model stay what they are.

References: Radford et al. 2019 (GPT-2); Margalit et al. 2024 (TDANN); Rathi et al. 2025 (TopoLM); Wang et al. 2023 (CogVLM); Alayrac et al. 2022
(Flamingo); Défossez et al. 2023 (electrodes as places); Song et al. 2024 (temporal-spatial convolution).
"""
import base64
import copy
import hashlib
import json
import math
import os
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch
import torch.nn as nn
from torch.nn import functional as F

import positions


@dataclass
class GPTConfig:
    """Shape of a GPT and what lies on its sheets; travels in checkpoints as model_args."""

    block_size: int = 1024            # longest context, tokens
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True                 # in linear layers and LayerNorms
    gelu: str = "exact"               # or 'tanh', as in the released GPT-2
    # the sheet
    sheet: bool = False               # units have positions; n_embd must be a square
    radius: int = 5                   # a window is the cells closer than this to its centre
    norm: float = float("inf")        # in this p-norm (1, 2, inf)
    windows: int = 5                  # drawn per layer and micro-batch; 0: all of the sheet
    alpha: float = 0.0                # weight of each layer's spatial loss
    spatial: str = "activations"      # or 'weights' (positions.weight_loss), of each sublayer's last linear layer
    factor: float = 3.0               # weights: how much the sheet is shrunk per axis
    spatial_kind: str = "relative"    # activations: or 'absolute' (positions.spatial_loss)
    accum: str = "mean"               # or 'maximum' over the windows
    tap: str = "sublayer"             # what lies on the sheet: each sublayer's output, or 'residual', the stream after it
    activation_decay: float = 0.0     # weight of each layer's mean squared norm
    head_loss: bool = False           # no attention c_proj; heads tile the attention sheet as patches of a mosaic
    attn_proj: bool = False           # one more Linear after attention, the sheet behind it


class Output(NamedTuple):
    """What forward returns; losses are float32 scalars, None where not asked for."""
    logits: torch.Tensor | None = None   # (B, T, vocab_size) when no targets are given
    loss: torch.Tensor | None = None     # task + alpha * spatial + activation_decay * energy
    task: torch.Tensor | None = None     # mean cross-entropy, nats per token
    spatial: torch.Tensor | None = None  # spatial loss summed over the 2 n_layer sheets
    hidden: dict | None = None           # the states asked for, (B, T, n_embd) each


# ---- blocks

class LayerNorm(nn.Module):
    """LayerNorm with an optional bias."""

    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Linear(nn.Linear):
    """nn.Linear; where no gradient is asked for it takes positions.linear, twice as fast on some CPUs. packed: see GPT.packed."""
    packed: torch.Tensor | None = None

    def forward(self, x):
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():  # oneDNN's has no vmap, no jvp
            return super().forward(x)
        return positions.linear(x, self.weight, self.bias, self.packed)


def short_attention(q, k, v, hidden):
    """Attention written out, hidden (.., T, K) what is not seen: fused by the compiler, a short context takes less than half the time of torch's fused
    kernel for CPUs, and less without a compiler when there is a backward pass."""
    scores = (q @ k.transpose(2, 3)).float() * k.size(3) ** -0.5  # (B, H, T, K)
    return scores.masked_fill(hidden, -math.inf).softmax(-1).to(v.dtype) @ v


def attend(q, k, v, mask, dropout):
    """Attention (B, H, T, hd) where mask (.., T, K) is True; None: everywhere."""
    if q.device.type == "cpu" and not dropout and (k.size(2) <= 512 or q.size(2) == 1):
        hidden = torch.zeros((), dtype=torch.bool) if mask is None else ~mask
        if q.size(2) == 1:  # a row at a time, products in half precision take a CPU four times as long
            with torch.autocast("cpu", enabled=False):
                exact = torch.promote_types(q.dtype, torch.float32)
                return short_attention(q.to(exact), k.to(exact), v.to(exact), hidden).to(v.dtype)
        return short_attention(q, k, v, hidden)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class Attention(nn.Module):
    """Causal self-attention; with `cache`, a layer's ((2, B, H, T_max, hd), tokens in it), keys and values are appended to it."""

    def __init__(self, config):
        super().__init__()
        width = config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(width, 3 * width, bias=config.bias)
        self.c_proj = None if config.head_loss else Linear(width, width, bias=config.bias)
        self.attn_proj = Linear(width, width, bias=config.bias) if config.attn_proj else None

    def qkv(self, x):
        """x (B, T, C) → queries, keys and values, (B, H, T, hd) each."""
        B, T, C = x.shape
        return self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)

    def project(self, y):
        """What the heads read (B, H, T, hd) → (B, T, C)."""
        y = y.transpose(1, 2).flatten(2)  # heads side by side
        for project in (self.c_proj, self.attn_proj):
            y = y if project is None else project(y)
        return F.dropout(y, self.dropout, self.training)

    def forward(self, x, cache=None, mask=None):
        T = x.size(1)
        q, k, v = self.qkv(x)  # (B, H, T, hd) each
        if cache is not None:
            kv, used = cache
            kv[0, :, :, used:used + T], kv[1, :, :, used:used + T] = k, v
            k, v = kv[:, :, :, :used + T]
        dropout = self.dropout if self.training else 0.0
        if x.device.type == "cpu" and mask is None and not dropout and k.size(2) == T <= 512:
            y = short_attention(q, k, v, torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1))
        elif cache is not None and T == 1:
            y = attend(q, k, v, mask, dropout)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and k.size(2) == T > 1)
        return self.project(y)


class MLP(nn.Module):
    """Two linear layers, four times as wide between them, with a GELU."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.gelu, self.dropout = "tanh" if config.gelu == "tanh" else "none", config.dropout

    def forward(self, x):
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu)), self.dropout, self.training)


class Block(nn.Module):
    """One layer: two sublayers, and the losses of their two sheets."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)
        self.residual, self.decays = config.tap == "residual", config.activation_decay > 0
        self.spatial = dict(kind=config.spatial_kind, accum=config.accum)

    def forward(self, x, units=None, near=None, cache=None, mask=None, taps=False, neural=None, expert=None, attention="causal", last=False):
        """x (B, T, C) → x, losses, taps. units (2, K, n): the units in each window of the two sheets (None: no losses), near (n, n): their
        closeness; for every window of the sheet units (2, C), unit_at_cell, and near a WholeSheet. losses (2,): spatial loss and energy summed
        over both sheets. taps: the activations on both sheets, on request. With neural rows (B, P, C) before x: see routed()."""
        if neural is not None:
            return self.routed(neural, x, expert, attention, mask, cache, last)
        attn = self.attn(self.ln_1(x), cache, mask)
        x = x + attn
        tap_1 = x if self.residual else attn
        mlp = self.mlp(self.ln_2(x))
        x = x + mlp
        tap_2 = x if self.residual else mlp
        losses = None
        if units is not None:
            spatial = [positions.spatial_loss(tap, sheet, near, **self.spatial) for tap, sheet in ((tap_1, units[0]), (tap_2, units[1]))]
            energy = [tap.float().square().sum(-1).mean() for tap in (tap_1, tap_2)] if self.decays else [x.new_zeros((), dtype=torch.float32)]
            losses = torch.stack([sum(spatial), sum(energy)])
        return x, losses, (tap_1, tap_2) if taps else None


    def routed(self, n, t, expert, attention, mask, cache, last):
        """One layer over [n | t], two streams in one sequence: the neural rows n (B, P, C) take the expert's weights (None: this block's), the text
        t (B, T, C) this block's; norms are shared. Returns n, t; no text reads the neural rows that leave the last layer: None there.
        attention: 'causal' or 'full' among neural rows, which never see text; 'blocked': text does not see them either. mask (.., T, P + T):
        what text sees. Both streams stay dense, so nothing is gathered, and a compiler sees one graph."""
        theirs = self if expert is None else expert
        (q_n, k_n, v_n), (q_t, k_t, v_t) = theirs.attn.qkv(self.ln_1(n)), self.attn.qkv(self.ln_1(t))
        k, v = torch.cat([k_n, k_t], 2), torch.cat([v_n, v_t], 2)  # (B, H, P + T, hd)
        if cache is not None:
            kv, used = cache
            kv[0, :, :, used:used + k.size(2)], kv[1, :, :, used:used + k.size(2)] = k, v
        dropout = self.attn.dropout if self.training else 0.0
        if attention == "blocked":
            k, v, mask = k_t, v_t, mask[..., n.size(1):]
        t = t + self.attn.project(attend(q_t, k, v, mask, dropout))
        t = t + self.mlp(self.ln_2(t))
        if last:
            return None, t
        causal = None if attention == "full" else torch.ones(n.size(1), n.size(1), dtype=torch.bool, device=n.device).tril()
        n = n + theirs.attn.project(attend(q_n, k_n, v_n, causal, dropout))
        return n + theirs.mlp(self.ln_2(n)), t


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x @ weight.T against targets, a chunk of tokens at a time; the gradient is made in the same pass, so neither
    logits nor probabilities outlive their chunk. x (N, C), weight (V, C), targets (N,) int64 with -1 for "do not count"; softmax: nats_of, or
    nats_of compiled. Fresh memory costs a CPU more than the sums in it: one chunk's logits serve all, and the weight's gradient is added up by slabs."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk, dtype, softmax, grad):
        w = weight.to(dtype)
        total = torch.zeros((), device=x.device)
        dx: Any = torch.empty_like(x) if grad else None
        dw: Any = torch.zeros_like(weight, dtype=torch.float32) if grad else None
        logits = torch.empty(min(chunk, len(x)), len(w), dtype=dtype, device=x.device)
        slab = 1024 if x.device.type == "cpu" else len(w)  # words
        for at in range(0, len(x), chunk):
            rows, right = x[at:at + chunk].to(dtype), targets[at:at + chunk]
            p = torch.mm(rows, w.t(), out=logits[:len(rows)])  # (chunk, V), logits first
            nats = softmax(p, right, grad)
            total += nats.sum()
            if grad:
                p[torch.arange(len(p), device=p.device), right.clamp_min(0)] = torch.expm1(-nats).to(dtype)  # p - 1, not rounded before the difference
                dx[at:at + chunk] = p @ w
                for part, q in zip(dw.split(slab), p.split(slab, 1)):
                    part += q.t() @ rows
        count = (targets >= 0).sum().clamp_min(1)
        ctx.save_for_backward(dx, dw, count)
        return total / count

    @staticmethod
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        scale = grad / count
        return dx * scale.to(dx.dtype), dw.mul_(scale), None, None, None, None, None


def nats_of(logits, targets, grad):
    """Cross-entropies (n,) of logits (n, V) against targets (n,), 0 for -1, which is not counted; with `grad` the probabilities take the logits'
    place, 0 in rows not counted. The mean's division comes later, in backward, where float16's loss scale keeps small ones from underflow."""
    targets = targets[:, None]
    counted = targets >= 0
    top = logits.amax(1, keepdim=True).float()
    norm = (logits.float() - top).exp().sum(1, keepdim=True).log()
    nats = ((norm + (top - logits.gather(1, targets.clamp_min(0)).float())) * counted)[:, 0]
    if grad:
        logits.copy_((logits.float() - top - torch.where(counted, norm, math.inf)).exp())  # small differences first: the logits may lie far from 0
    return nats


def cross_entropy(x, weight, targets, chunk=1024, softmax=nats_of):
    """Mean cross-entropy (nats) of the tied head on x (..., C) against targets (...), never holding more than `chunk` tokens' logits."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    with torch.autocast(x.device.type, enabled=False):
        return ChunkedCrossEntropy.apply(x.flatten(0, -2), weight, targets.flatten(), chunk, dtype, softmax, grad)


# ---- the model

class GPT(nn.Module):
    """GPT-2 with spatial positions. `unit_at_cell` (2 n_layer, n_embd): a permutation per sheet (positions.py); None draws the seeded random one.
    Raises ValueError where the widths do not fit."""
    packed_head: torch.Tensor | None = None

    def __init__(self, config, unit_at_cell=None, seed=0):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}")
        for key, allowed in dict(gelu=("exact", "tanh"), spatial=("activations", "weights"), spatial_kind=("relative", "absolute"), accum=("mean", "maximum"),
                                 tap=("sublayer", "residual")).items():
            if getattr(config, key) not in allowed:
                raise ValueError(f"{key} must be {' or '.join(allowed)}, not '{getattr(config, key)}'")
        if config.spatial == "weights" and (config.head_loss or config.activation_decay):
            raise ValueError("spatial=weights goes with neither head_loss (it needs the attention's projection) nor activation_decay")
        self.config, self.softmax = config, nats_of
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=LayerNorm(config.n_embd, config.bias)))
        self.init_weights(seed)
        if config.sheet:
            side = positions.sheet_side(config.n_embd)
            cells = positions.window_cells(side, config.radius, config.norm)  # (M, n)
            if unit_at_cell is None:
                unit_at_cell = positions.random_positions(config.n_layer, config.n_embd, seed)
            unit_at_cell = torch.as_tensor(unit_at_cell).clone()
            if config.head_loss:  # the mosaic is the attention sheets' layout
                unit_at_cell[::2] = torch.as_tensor(positions.head_mosaic(config.n_head, config.n_embd))
            self.register_buffer("unit_at_cell", unit_at_cell)
            self.register_buffer("window_cells", torch.as_tensor(cells), persistent=False)
            self.register_buffer("near", torch.as_tensor(positions.closeness(cells[0], side), dtype=torch.float32), persistent=False)
            self.every = config.windows == 0 and config.norm == float("inf") and config.spatial_kind == "relative"
            if self.every:
                for name, constant in positions.whole_sheet(side, config.radius)._asdict().items():
                    self.register_buffer(f"every_{name}", constant, persistent=False)

    def init_weights(self, seed):
        """GPT-2's initialisation, each tensor from (seed, its name): the same whatever else the model holds."""
        for name, p in self.named_parameters():
            key = hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
            if p.dim() == 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                with torch.no_grad():
                    p.copy_(torch.randn(p.shape, generator=generator) * std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def n_params(self):
        """Number of parameters without the position embedding (GPT-2's usual count)."""
        return sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()

    def flops_per_token(self, length):
        """Floating-point operations of forward and backward per token at a context of `length` (Chowdhery et al. 2022, appendix B)."""
        c = self.config
        return 6 * self.n_params() + 12 * c.n_layer * c.n_embd * length

    def draw_windows(self, generator):
        """Window ids (2 n_layer, K) of one micro-batch; with a keyed generator the same on any rank and device."""
        return positions.draw_windows(2 * self.config.n_layer, len(self.window_cells), self.config.windows, generator)

    def sheets(self, windows):
        """What the spatial loss of each block takes (Block.forward): units (n_layer, 2, K, n) of the windows (2 n_layer, K) and their closeness, or,
        where every window counts, unit_at_cell (n_layer, 2, C) and a WholeSheet."""
        if self.every:
            sheet = positions.WholeSheet(*(getattr(self, f"every_{name}") for name in positions.WholeSheet._fields))
            return self.unit_at_cell.view(self.config.n_layer, 2, -1), sheet
        cells = self.window_cells[windows.to(self.unit_at_cell.device)]  # (2L, K, n)
        return self.unit_at_cell.gather(1, cells.flatten(1)).view(self.config.n_layer, 2, *cells.shape[1:]), self.near

    def compile_blocks(self, **options):
        """Compile each block in place, and the head's softmax: all layers run the one graph, and state_dict keys stay as they are."""
        for block in self.transformer.h:
            block.compile(**options)
        self.softmax = torch.compile(nats_of, **options)

    def forward(self, idx, targets=None, windows=None, hidden=()):
        """idx (B, T) int64 → Output. targets (B, T), -1 where not counted: losses; else logits at every position.
        windows (2 n_layer, K) from draw_windows: spatial loss too.
        hidden: states to return, numbered as Hugging Face does (0 the embedding, i after block i, n_layer after the final LayerNorm), or
        named 'layer.N.attn' / 'layer.N.mlp' for the activations on a sheet."""
        hidden = list(hidden)
        x, losses, kept = self.trunk(idx, windows, hidden)
        if targets is None:
            return Output(logits=F.linear(x, self.transformer.wte.weight), hidden=kept)
        loss = task = cross_entropy(x, self.transformer.wte.weight, targets, softmax=self.softmax)
        spatial = None
        if windows is not None:
            spatial, energy = losses.unbind() if self.config.spatial == "activations" else (self.weight_loss(), 0.0)
            loss = task + self.config.alpha * spatial + self.config.activation_decay * energy
        return Output(loss=loss, task=task, spatial=spatial, hidden=kept)

    def weight_loss(self):
        """TopoLoss summed over the sheets: that of the linear layers whose outputs lie on them."""
        outputs = [linear.weight for block in self.transformer.h for linear in (block.attn.attn_proj or block.attn.c_proj, block.mlp.c_proj)]
        return sum(positions.weight_loss(weight, units, self.config.factor) for weight, units in zip(outputs, self.unit_at_cell))

    def trunk(self, idx, windows=None, hidden=(), cache=None, position=None, mask=None, cross=None):
        """Everything before the head: x (B, T, C) after the final LayerNorm, losses (2,) or None, hidden states asked for. cross: a function of x per
        layer, what it adds before the block."""
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit block_size={self.config.block_size}: cut the text")
        names = positions.layer_names(self.config.n_layer)
        if wrong := [h for h in hidden if h not in names and h not in range(self.config.n_layer + 1)]:
            raise ValueError(f"no hidden state {wrong[0]!r}: there are 0 to {self.config.n_layer} and {names[0]} to {names[-1]}")
        units, near = self.sheets(windows) if windows is not None and self.config.spatial == "activations" else (None, None)
        taps = any(isinstance(h, str) for h in hidden)
        if position is None:
            position = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)
        x = F.dropout(x, self.config.dropout, self.training)
        states, losses = {0: x}, []
        for i, block in enumerate(self.transformer.h):
            layer_cache = None if cache is None else (cache.kv[i], cache.used)
            x = x if cross is None else x + cross[i](x)
            x, loss, tapped = block(x, None if units is None else units[i], near, layer_cache, mask, taps)
            losses.append(loss)
            if hidden:
                states[i + 1] = x
                states |= dict(zip(names[2 * i:2 * i + 2], tapped)) if taps else {}
                states = {k: v for k, v in states.items() if k in hidden}
        x = self.transformer.ln_f(x)
        if self.config.n_layer in hidden:
            states[self.config.n_layer] = x
        return x, torch.stack(losses).sum(0) if units is not None else None, {h: states[h] for h in hidden} if hidden else None

    # -- generation

    @torch.no_grad()
    def stream(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=(), seed=0, start=None, room=0):
        """Generate with a KV cache, yielding after each step a list of B new token ids (None for a row that has ended).

        prompts: B lists of token ids, of any lengths, or a tensor (B, T). temperature 0 is greedy; top_k and top_p (nucleus) cut the
        distribution. stop: token ids that end a row, or one collection a row; the stop token itself is not given out.
        The rule at block_size: a row whose context is full goes on from its last block_size // 2 tokens (so does a longer prompt).
        start(rows, cache, device) fills the cache in place of _prefill, for NeuralGPT, whose prefix takes `room` columns before the text.
        A row's greedy text does not depend on the rows beside it. Raises ValueError for an empty prompt."""
        rows = [list(map(int, row)) for row in prompts]
        if not rows or not all(rows):
            raise ValueError("generate wants at least one token in each prompt: begin with the end-of-text token")
        if not (temperature >= 0 and (top_k is None or top_k > 0) and (top_p is None or 0 < top_p <= 1)):
            raise ValueError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: they must be >= 0, > 0 and in (0, 1]")
        stops = [set(s) for s in stop] if stop and not isinstance(next(iter(stop)), int) else [set(stop)] * len(rows)
        device, size = self.transformer.wte.weight.device, self.config.block_size
        generator = torch.Generator(device).manual_seed(seed)
        done, cache = [False] * len(rows), None
        for made in range(max_new_tokens):
            if cache is None or cache.used - room == size:
                rows = [row if len(row) <= size else row[-(size // 2):] for row in rows]
                length = room + min(size, max(map(len, rows)) + max_new_tokens - made)
                cache = Cache(self.config, len(rows), length, self.transformer.wte.weight)
                x = (start or self._prefill)(rows, cache, device)
            else:
                x = self._step([row[-1] for row in rows], cache, device)
            logits = positions.linear(x, self.transformer.wte.weight, packed=self.packed_head)
            tokens = pick(logits.float(), temperature, top_k, top_p, generator).tolist()
            done = [d or t in s for d, t, s in zip(done, tokens, stops)]
            if all(done):
                return
            for row, token in zip(rows, tokens):
                row.append(token)
            yield [None if d else t for d, t in zip(done, tokens)]

    def _prefill(self, rows, cache, device):
        """Fill the cache with left-padded rows; last states (B, C)."""
        idx, position, mask = self._left_pad(rows, cache, device)
        x = self.trunk(idx, cache=cache, position=position, mask=mask, cross=cache.cross)[0]
        cache.used = idx.size(1)
        return x[:, -1]

    def _left_pad(self, rows, cache, device):
        """idx and position (B, T) of left-padded rows, mask (B, 1, T, T) or None where causal says it all; the cache gets to know the pads."""
        width = max(map(len, rows))
        idx = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
        real = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)  # (B, width)
        cache.real, cache.lengths = real, torch.tensor([len(row) for row in rows], device=device)
        mask = None
        if not real.all():  # causal, and nobody looks at a pad but the pad itself (an empty softmax would be nan)
            causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
            mask = ((causal & real[:, None]) | torch.eye(width, dtype=torch.bool, device=device))[:, None]
        return idx, (real.cumsum(1) - 1).clamp_min(0), mask

    def _step(self, tokens, cache, device):
        """One more token per row (B ints) against the cache; states (B, C)."""
        idx = torch.tensor(tokens, device=device)[:, None]
        cache.real = torch.cat([cache.real, torch.ones_like(cache.real[:, :1])], 1)
        mask = None if cache.real.all() else cache.real[:, None, None]
        x = self.trunk(idx, cache=cache, position=cache.lengths[:, None], mask=mask, cross=cache.cross)[0]
        cache.used, cache.lengths = cache.used + 1, cache.lengths + 1
        return x[:, -1]

    @contextmanager
    def packed(self, rows):
        """Inside, while the weights stay as they are, generating `rows` texts reads copies of them in oneDNN's own layout: a third faster again."""
        linears = [module for module in self.modules() if isinstance(module, Linear)] if positions.onednn(self.transformer.wte.weight) else []
        try:
            for module in linears:
                module.packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows)
            self.packed_head = torch.ops.mkldnn._reorder_linear_weight(self.transformer.wte.weight.detach(), rows) if linears else None
            yield
        finally:
            for module in linears:
                module.packed = None
            self.packed_head = None

    def generate(self, prompts, max_new_tokens, **options):
        """The new tokens of each prompt, a list of B lists; options as in stream()."""
        rows: list[list[int]] = [[] for _ in prompts]
        with self.packed(len(rows)) if max_new_tokens >= 32 else nullcontext():  # fewer would not pay for the copies
            for tokens in self.stream(prompts, max_new_tokens, **options):
                for row, token in zip(rows, tokens):
                    row += [] if token is None else [token]
        return rows

    # -- Hugging Face

    @classmethod
    def from_pretrained(cls, name, **options):
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
        model = cls(GPTConfig(**{**args, **options}), ours.get("unit_at_cell"))
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


class Cache:
    """Keys and values of all layers, kv (n_layer, 2, B, H, length, hd), of which the first `used` columns are filled; lengths (B,): tokens of
    each row; real (B, used): False where a row is padded on the left; cross: GPT.trunk's, where the text looks at something beside it."""

    def __init__(self, config, batch, length, weight):
        device = weight.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        self.kv = torch.empty(config.n_layer, 2, batch, config.n_head, length, config.n_embd // config.n_head, dtype=dtype, device=device)
        self.used, self.lengths, self.real, self.cross = 0, None, None, None


def pick(logits, temperature, top_k, top_p, generator):
    """Next token ids (B,) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.size(-1)))[0][:, -1:], -math.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        ordered = ordered.masked_fill(p.cumsum(-1) - p >= top_p, -math.inf)  # the smallest set that reaches top_p; never empty
        logits = torch.empty_like(logits).scatter_(1, order, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# ---- neural signals

@dataclass
class EncoderConfig:
    """Shape of a NeuralEncoder; travels in checkpoints as encoder_args."""

    kind: str = "transformer"   # or linear (nothing but a linear map of each patch), conv, tsconv
    n_embd: int = 256           # width of the tokens that come out: the language model's
    width: int = 128            # inside
    n_layer: int = 2            # blocks of transformer, convolutions of conv
    n_head: int = 4             # transformer
    patch: int = 10             # samples per token
    tokens: str = "time"        # transformer: a token is a patch of time of all electrodes, or of one ('electrode')
    virtual: int = 64           # channels into which electrodes are mixed
    degree: int = 3             # of the Fourier code of an electrode's place
    window: int = 0             # patches of the window: a first token is a linear map of all of them; 0: no such token, and any length
    subjects: int = 1           # each mixes the virtual channels in its own way
    dropout: float = 0.0
    reach: bool = False         # tokens='electrode': each head looks at what is near, in place and time, and learns how near that is


class NeuralEncoder(nn.Module):
    """Signals into tokens, (B, C, T) → (B, P, n_embd), P = T // patch, one more before them with `window`, for any number and order of electrodes: a
    channel is its place, never its index.

    Electrodes are mixed into virtual channels by weights that are functions of place (a Fourier series of xyz in m, period 0.25 m). A channel
    without place (nan in xyz) is absent: montages of different sizes share a batch, padded so. Subjects are numbers; -1, or one beyond
    `subjects`, is a stranger, who gets the mean of all. A transformer's way in three steps, for who drops tokens in between:
    tokenize → (B, N, width) with place, time and subject in them, think on any subset of them (`spots` likewise, with reach), read → (B, P, n_embd).
    Raises ValueError for an unknown kind, or a signal shorter than a patch."""

    PERIOD = 0.25

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.kind not in ("linear", "transformer", "conv", "tsconv") or c.tokens not in ("time", "electrode"):
            raise ValueError(f"encoder '{c.kind}' of '{c.tokens}' tokens: there are linear, transformer, conv and tsconv, of time and electrode")
        k = torch.cartesian_prod(*[torch.arange(-c.degree, c.degree + 1)] * 3)
        k = k[len(k) // 2:]  # one of each pair k, -k; the first is 0, whose sine is 0
        self.register_buffer("waves", 2 * math.pi / self.PERIOD * k.float(), persistent=False)  # (M, 3)
        M, inner = 2 * len(k), c.n_embd if c.kind == "linear" else c.width
        electrodes = c.kind == "transformer" and c.tokens == "electrode"
        self.place = nn.Parameter(torch.randn(M, c.width if electrodes else c.virtual) * M ** -0.5)
        self.subject_mix = None if electrodes else nn.Parameter(torch.zeros(c.subjects, c.virtual, c.virtual))
        self.subject_token = nn.Parameter(torch.zeros(c.subjects, inner))
        if c.kind in ("linear", "transformer"):
            self.embed = nn.Linear(c.patch * (1 if electrodes else c.virtual), inner)
        elif c.kind == "conv":
            self.embed = nn.Conv1d(c.virtual, c.width, c.patch, c.patch)
            self.convs = nn.ModuleList(nn.Conv1d(c.virtual, 2 * c.virtual, 3, padding=2 ** i, dilation=2 ** i) for i in range(c.n_layer))
        else:  # filters over time and over place commute: place first is the cheaper order
            self.temporal = nn.Conv1d(c.virtual, 2 * c.virtual, 25, padding=12, groups=c.virtual)
            self.embed = nn.Conv1d(2 * c.virtual, c.width, 1)
        if c.kind == "transformer":
            shape = GPTConfig(block_size=1, vocab_size=1, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.width, dropout=c.dropout)
            self.blocks = nn.ModuleList(Block(shape) for _ in range(c.n_layer))
            for block in self.blocks:
                for name, p in block.named_parameters():
                    if p.dim() == 2:
                        nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) if name.endswith("c_proj.weight") else 0.02)
                    elif name.endswith("bias"):
                        nn.init.zeros_(p)
        self.reach = Reach(c.n_layer, c.n_head) if c.reach and electrodes else None
        if c.kind != "linear":
            self.norm, self.out = LayerNorm(c.width, True), nn.Linear(c.width, c.n_embd)
        self.whole = nn.Linear(c.window * (c.patch * c.virtual if c.kind == "linear" else c.width), c.n_embd) if c.window else None

    def code(self, xyz):
        """Places (..., C, 3) in m → (..., C, M), and which are known (..., C)."""
        known = xyz.isfinite().all(-1)
        angle = torch.where(known[..., None], xyz, 0.0).float() @ self.waves.t()
        return torch.cat([angle.cos(), angle.sin()], -1) * known[..., None], known

    def by_subject(self, table, subject):
        """Rows (B, ...) of a table (subjects, ...); a stranger's is the mean of all."""
        known = (subject >= 0) & (subject < len(table))
        mean = table.mean(0, keepdim=True)
        return torch.where(known.view(-1, *[1] * (table.dim() - 1)), table[subject.clamp(0, len(table) - 1)], mean)

    def mix(self, x, xyz, subject):
        """x (B, C, T) → virtual channels (B, K, T): at unit variance where the channels have it and are independent."""
        code, known = self.code(xyz)
        weight = 2 ** 0.5 * code @ self.place * known.sum(-1).clamp_min(1)[..., None, None] ** -0.5  # (B or none, C, K)
        x = torch.where(known[..., None], x, 0.0)  # an absent channel may hold anything, nan say
        v = weight.transpose(-2, -1) @ x
        return v + self.by_subject(self.subject_mix, subject) @ v

    def patches(self, x):
        """(B, C, T) → (B, C, P, patch), the samples beyond the last whole patch left out."""
        P = x.size(2) // self.config.patch
        if P < 1:
            raise ValueError(f"a signal of {x.size(2)} samples is shorter than patch={self.config.patch}: widen the window")
        return x[..., :P * self.config.patch].unflatten(2, (P, self.config.patch))

    def tokenize(self, x, xyz, subject):
        """Tokens (B, N, width) and which of them are there (B, N); N = P, or C x P (electrode-major) for tokens='electrode'. xyz (C, 3) or (B, C, 3)."""
        if self.subject_mix is None:
            code, known = self.code(xyz)
            parts = self.patches(torch.where(known[..., None], x, 0.0))  # (B, C, P, patch)
            tokens = self.embed(parts) + (code @ self.place)[..., None, :]
            present = known.expand(x.shape[:2])[..., None].expand(parts.shape[:3]).flatten(1)
        else:
            tokens = self.embed(self.patches(self.mix(x, xyz, subject)).transpose(1, 2).flatten(2))[:, None]  # (B, 1, P, width)
            present = torch.ones(tokens.size(0), tokens.size(2), dtype=torch.bool, device=x.device)
        P, d = tokens.shape[2:]
        angle = torch.arange(P, device=x.device)[:, None] / 1000 ** (torch.arange(0, d, 2, device=x.device) / d)
        time = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :d]  # (P, width)
        return (tokens + time + self.by_subject(self.subject_token, subject)[:, None, None]).flatten(1, 2), present

    def spots(self, xyz, P):
        """Where and when the electrode tokens are: (B or 1, C x P, 4), cm and patches."""
        xyz = torch.where(xyz.isfinite().all(-1, keepdim=True), 100 * xyz, 0.0).float().view(-1, xyz.size(-2), 1, 3).expand(-1, -1, P, -1)
        time = torch.arange(P, device=xyz.device, dtype=torch.float32)[:, None].expand(*xyz.shape[:3], 1)
        return torch.cat([xyz, time], -1).flatten(1, 2)

    def think(self, tokens, present, spots=None):
        """The blocks, every token looking at all that are there: (B, N, width), N any subset. spots (B or 1, N, 4), of the same subset, with reach."""
        near = [present[:, None, None]] * len(self.blocks) if self.reach is None else self.reach(spots, spots, present)
        for block, mask in zip(self.blocks, near):
            tokens = block(tokens, mask=mask if mask.dtype == torch.bool else mask.to(tokens.dtype))[0]
        return tokens

    def read(self, h, present, P):
        """(B, N, width) → (B, P, n_embd); of electrode tokens the mean over the electrodes of a patch."""
        if self.subject_mix is None:
            here = present.float()[..., None].unflatten(1, (-1, P))
            h = (h.unflatten(1, (-1, P)) * here).sum(1) / here.sum(1).clamp_min(1)
        h = self.norm(h)
        return self.with_whole(self.out(h), h)

    def with_whole(self, tokens, h):
        """The token of the whole window, from states h (B, P, ...), before the others."""
        if self.whole is None:
            return tokens
        if h.size(1) != self.config.window:
            raise ValueError(f"a signal of {h.size(1)} patches, the encoder was made for window={self.config.window}")
        return torch.cat([self.whole(F.dropout(h.flatten(1), self.config.dropout, self.training))[:, None], tokens], 1)

    def forward(self, x, xyz, subject):
        """x (B, C, T), xyz (C, 3) or (B, C, 3) in m, subject (B,) → (B, P, n_embd)."""
        c, P = self.config, x.size(2) // self.config.patch
        if c.kind == "transformer":
            tokens, present = self.tokenize(x, xyz, subject)
            spots = None if self.reach is None else self.spots(xyz, P)
            return self.read(self.think(tokens, present, spots), present, P)
        v = self.mix(x, xyz, subject)
        parts = self.patches(v)
        if c.kind == "linear":
            parts = parts.transpose(1, 2).flatten(2)  # (B, P, K patch)
            return self.with_whole(self.embed(parts) + self.by_subject(self.subject_token, subject)[:, None], parts)
        if c.kind == "conv":
            for conv in self.convs:
                v = v + F.dropout(F.glu(conv(v), 1), c.dropout, self.training)
            h = self.embed(F.gelu(v))
        else:
            h = self.embed(F.dropout(F.elu(F.avg_pool1d(self.temporal(v), c.patch)), c.dropout, self.training))
        h = h.transpose(1, 2) + self.by_subject(self.subject_token, subject)[:, None]  # (B, P, width)
        h = self.norm(h)
        return self.with_whole(self.out(h), h)


class Reach(nn.Module):
    """How much less a head looks at what is farther away: what is added to its scores, -distance² / 2 reach² - |time| / span, both learned, head by head
    from short to long (8 to 25 mm, 0.7 to 3 patches) at first."""

    def __init__(self, layers, heads):
        super().__init__()
        begin = lambda low, high: nn.Parameter(torch.linspace(math.log(low), math.log(high), heads).repeat(layers, 1))
        self.place, self.time = begin(0.8, 2.5), begin(0.7, 3.0)

    def forward(self, asks, spots, present):
        """asks (B, N, 4), spots (B, K, 4) in cm and patches, present (B, K) → (B, H, N, K) for each layer."""
        apart = (asks[..., None, :3] - spots[:, None, :, :3]).square().sum(-1)[:, None]  # (B, 1, N, K)
        late = (asks[..., None, 3] - spots[:, None, :, 3]).abs()[:, None]
        for place, time in zip(self.place, self.time):
            near = -apart * (-2 * place).exp()[:, None, None] / 2 - late * (-time).exp()[:, None, None]
            yield near.masked_fill(~present[:, None, None], -1e4)  # float16 has it, too


def load_matching(module, state, threshold=0.5, path="checkpoint"):
    """Load the tensors of a state dict that fit the module by name and shape. Returns the matched share of the module's weights (numbers, not
    tensors) and the names left out. Raises ValueError under the threshold: a load that matched nothing must not pass for pretraining."""
    own = module.state_dict()
    fit = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    share = sum(v.numel() for v in fit.values()) / sum(v.numel() for v in own.values())
    if share < threshold:
        raise ValueError(f"{path} fits only {share:.1%} of the encoder's weights ({len(fit)} of {len(own)} tensors), {threshold:.0%} are asked for: "
                         "give the encoder the shape it was trained with, or lower the threshold")
    module.load_state_dict(fit, strict=False)
    return share, sorted(set(own) - set(fit))


def load_encoder(spec):
    """(NeuralEncoder in evaluation mode, recipe) of a run folder or checkpoint of foundation.py. The recipe says how to feed it: data/recording.py's
    resampled, robust_scale, places and encoder_input take it; window (s), subjects (names: a person's number is the place in the list, -1 for anybody
    else), recordings (what it was trained on: dataset, name, subject, channels, xyz, centre, scale, and `seen`, the span of time in s)."""
    path = Path(spec)
    path = path if path.suffix == ".pt" else path / "best.pt"
    if not path.exists():
        raise FileNotFoundError(f"no pretrained encoder at {spec}: make one with python foundation.py, or give its run folder or .pt")
    state = load_checkpoint(path)
    if state.get("kind") != "foundation":
        raise ValueError(f"{path} holds a '{state.get('kind')}', no foundation model: give one that foundation.py wrote")
    encoder = NeuralEncoder(EncoderConfig(**state["encoder_args"]))
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in state["model"].items() if k.startswith("encoder.")})
    return encoder.eval(), state["recording"]


class Expert(nn.Module):
    """A layer's own weights for neural rows: QKV, attention output projection and MLP, copied from the core's; norms stay shared (CogVLM).
    In the last layer only keys and values are read."""

    def __init__(self, block, last=False):
        super().__init__()
        self.attn, self.mlp = copy.deepcopy(block.attn), None if last else copy.deepcopy(block.mlp)
        self.requires_grad_(True)
        if last:
            self.attn.c_proj = self.attn.attn_proj = None


class Cross(nn.Module):
    """Gated cross-attention from text to neural tokens (Flamingo); the gate is shut at first, so that the text is the language model's own."""

    def __init__(self, config):
        super().__init__()
        width, self.n_head = config.n_embd, config.n_head
        self.ln, self.ln_n = LayerNorm(width, config.bias), LayerNorm(width, config.bias)
        self.q, self.kv, self.c_proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.gate = nn.Parameter(torch.zeros(()))

    def keys(self, n):
        """Keys and values of neural tokens (B, P, C): (B, H, P, hd) each."""
        return self.kv(self.ln_n(n)).unflatten(2, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x, kv):
        """What the text x (B, T, C) adds to itself."""
        q = self.q(self.ln(x)).unflatten(2, (self.n_head, -1)).transpose(1, 2)
        k, v = kv
        return self.gate.tanh() * self.c_proj(attend(q, k, v, None, 0.0).transpose(1, 2).flatten(2))


class NeuralGPT(nn.Module):
    """A GPT that reads neural signals: [BON, n_1 .. n_P, EON | text]. BON and the encoder's tokens n take the experts, EON and text the core.

    fusion: 'prefix' (core weights for all), 'expert' (experts in the last `layers` layers, 0: in each), 'cross' (nothing is prefixed, text looks by
    gated cross-attention). text_positions: 'zero' (text has GPT-2's own positions, the prefix the encoder's code of time) or 'after_prefix'
    (positions run over the concatenation). attention among neural rows: 'causal', 'full', or 'blocked' (the two sides do not meet)."""

    def __init__(self, lm, encoder, fusion="expert", layers=0, text_positions="zero", attention="causal"):
        super().__init__()
        for key, value, allowed in (("fusion", fusion, ("prefix", "expert", "cross")), ("text_positions", text_positions, ("zero", "after_prefix")),
                                    ("prefix_attention", attention, ("causal", "full", "blocked"))):
            if value not in allowed:
                raise ValueError(f"{key} must be {' or '.join(allowed)}, not '{value}'")
        L, wte = lm.config.n_layer, lm.transformer.wte.weight.detach()
        if not 0 <= layers <= L:
            raise ValueError(f"{layers} layers with experts in a language model of {L}: give 0 (all) to {L}")
        if encoder.config.n_embd != lm.config.n_embd:
            raise ValueError(f"the encoder's tokens are {encoder.config.n_embd} wide, the language model {lm.config.n_embd}")
        self.lm, self.encoder, self.fusion, self.text_positions, self.attention = lm, encoder, fusion, text_positions, attention
        self.args = dict(fusion=fusion, layers=layers, text_positions=text_positions, attention=attention)  # what builds it again
        self.first = L - (layers or L)
        blocks = lm.transformer.h[self.first:]
        self.experts = nn.ModuleList(Expert(b, b is blocks[-1]) for b in blocks) if fusion == "expert" else None
        self.crosses = nn.ModuleList(Cross(lm.config) for _ in blocks) if fusion == "cross" else None
        if fusion != "cross":
            self.bon, self.eon = (nn.Parameter(wte.mean(0) + torch.randn_like(wte[0]) * wte.std(0)) for _ in range(2))
        # neural tokens begin where the language model's tokens are: around their mean, with their spread
        with torch.no_grad():
            for last in (encoder.embed if encoder.config.kind == "linear" else encoder.out, encoder.whole):
                if last is not None:
                    last.weight.mul_(wte.std() / (last.weight.std() * last.weight.size(1) ** 0.5))
                    last.bias.copy_(wte.mean(0))

    def prefix(self, signal, xyz, subject):
        """Neural tokens (B, P, C) of signals (B, channels, T)."""
        return self.encoder(signal, xyz, subject)

    def rows(self, n):
        """The neural stream [BON, n] and the EON row that opens the core's, (B, P + 1, C) and (B, 1, C), with their positions where they have some."""
        B, P, _ = n.shape
        x = torch.cat([self.bon.expand(B, 1, -1), n, self.eon.expand(B, 1, -1)], 1)
        if self.text_positions == "after_prefix":
            x = x + self.lm.transformer.wpe(torch.arange(P + 2, device=n.device))
        return x[:, :-1], x[:, -1:]

    def trunk(self, n, idx, position=None, mask=None, cache=None, states=None):
        """Text states (B, T, C) after the final LayerNorm, of neural tokens n (B, P, C) and ids (B, T). position (.., T): of text, from 0;
        mask (.., T, T): what text sees of text, causal by default. states: a list to which every layer's input (n, EON and text) is appended."""
        T, device, lm = idx.size(1), n.device, self.lm
        position = torch.arange(T, device=device) if position is None else position
        if self.fusion == "cross":
            cross = [lambda x: 0.0] * self.first + [partial(c, kv=c.keys(n)) for c in self.crosses or ()]
            if cache is not None:
                cache.cross = cross
            return lm.trunk(idx, position=position, mask=mask, cache=cache, cross=cross)[0]
        n, eon = self.rows(n)
        room = n.size(1) + 1
        mask = torch.ones(T, T, dtype=torch.bool, device=device).tril() if mask is None else mask
        mask = F.pad(F.pad(mask, (room, 0), value=True), (0, 0, 1, 0), value=False)  # the row of EON, the columns of all that lies before the text
        mask = mask | (torch.arange(room + T, device=device) < room)  # (.., 1 + T, P + 2 + T)
        x = torch.cat([eon, lm.transformer.wte(idx) + lm.transformer.wpe(position + (room if self.text_positions == "after_prefix" else 0))], 1)
        for i, block in enumerate(lm.transformer.h):
            if states is not None:
                states.append((n, x))
            expert = self.experts[i - self.first] if self.experts is not None and i >= self.first else None
            n, x = block(x, neural=n, expert=expert, attention=self.attention, mask=mask, last=i + 1 == len(lm.transformer.h),
                         cache=None if cache is None else (cache.kv[i], cache.used))
        return lm.transformer.ln_f(x[:, 1:])

    def check_length(self, P, T):
        """Raises ValueError where positions do not reach."""
        size, room = self.lm.config.block_size, P + 2 if self.text_positions == "after_prefix" and self.fusion != "cross" else 0
        if room + T > size:
            raise ValueError(f"a prefix of {P} and {T} tokens of text do not fit block_size={size} of the language model: take longer patches, less text"
                             + (" or text_positions=zero" if room else ""))

    def forward(self, signal, xyz, subject, idx, position=None, mask=None, start=0):
        """Logits (B, T - start, vocab) of text ids (B, T) from position `start` on, and the neural tokens (B, P, C)."""
        n = self.prefix(signal, xyz, subject)
        return F.linear(self.trunk(n, idx, position, mask)[:, start:], self.lm.transformer.wte.weight), n

    @torch.no_grad()
    def generate(self, n, prompt, max_new_tokens, **options):
        """New tokens, a list of B lists in the order of the rows of n (B, P, C), after prompt (token ids, or B lists of them); options as in
        GPT.stream. The prefix is read once; each new token then costs what it costs the plain GPT."""
        prompts = prompt if isinstance(prompt[0], (list, tuple)) else [prompt] * len(n)
        self.check_length(n.size(1), max(map(len, prompts)) + max_new_tokens)
        room = 0 if self.fusion == "cross" else n.size(1) + 2
        return self.lm.generate(prompts, max_new_tokens, start=partial(self._prefill, n, room), room=room, **options)

    def _prefill(self, n, room, rows, cache, device):
        idx, position, mask = self.lm._left_pad(rows, cache, device)
        x = self.trunk(n, idx, position, mask, cache)
        cache.used = room + idx.size(1)
        cache.real = torch.cat([cache.real.new_ones(len(rows), room), cache.real], 1)
        cache.lengths = cache.lengths + (room if self.text_positions == "after_prefix" else 0)
        return x[:, -1]


# ---- tokenizers

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


# ---- checkpoints

VERSION = 1


def save_checkpoint(path, state):
    """Write a checkpoint, plain types and tensors only: aside, flushed, renamed, so a kill at any moment leaves the old one or the new one."""
    _check_plain(state, "checkpoint")
    aside = f"{path}.tmp"
    try:
        with open(aside, "wb") as f:
            torch.save({"format": "nanocortex", "version": VERSION, **state}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as e:  # torch's writer has an error of its own for a write that fails
        Path(aside).unlink(missing_ok=True)
        why = e if isinstance(e, OSError) else e.__context__ if isinstance(e.__context__, OSError) else None
        raise OSError(f"{path} could not be written ({why.strerror if why else 'is the disk full?'}): make room, then go on with init_from=resume; the last "
                      "checkpoint is untouched") from None


def _check_plain(value, where):
    if isinstance(value, dict):
        for k, v in value.items():
            _check_plain(k, where)
            _check_plain(v, f"{where}[{k!r}]")
    elif isinstance(value, (list, tuple)):
        for v in value:
            _check_plain(v, where)
    elif type(value) not in (int, float, str, bool, type(None), torch.Tensor, torch.nn.Parameter):
        raise TypeError(f"{where} is a {type(value).__name__}: a checkpoint holds plain types and tensors only")


def load_checkpoint(path):
    """A checkpoint as a dict on the CPU. Raises FileNotFoundError where it is missing, ValueError where it is torn, foreign or newer."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"no checkpoint {path}: train one with python train.py, or leave init_from=resume out")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds here: RuntimeError for a torn zip, UnpicklingError for a pickle with code in it, EOFError ...
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(e).__name__}): it is torn or not ours; take another, best.pt say") from None
    if isinstance(state, dict) and "format" not in state and isinstance(state.get("model_args"), dict) and isinstance(state.get("model"), dict):
        return adopt_checkpoint(state, path)
    if not isinstance(state, dict) or state.get("format") != "nanocortex":
        raise ValueError(f"{path} is no nanoCortex checkpoint: give one that train.py, nanoGPT or TopoLM wrote, or a Hugging Face folder")
    if state["version"] > VERSION:
        raise ValueError(f"{path} has checkpoint version {state['version']}, this code reads up to {VERSION}: update the code")
    return patch_checkpoint(state)


def patch_checkpoint(state):
    """The one place where checkpoints of older versions are brought up to date. There is none yet."""
    return state


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
        rows, facts = positions.read_layer_pickles(found)
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
            stoi = positions.read_pickle(meta).get("stoi", {})
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


def lm_state(model):
    """What a language model needs to be built again: kind, model_args and weights (positions travel along as a buffer)."""
    return dict(kind="lm", model_args=asdict(model.config), model=model.state_dict())


def lm_from(state, path="checkpoint", **options):
    """GPT from a checkpoint's dict; options set fields of GPTConfig that are not of the weights (alpha, dropout, windows ...)."""
    if state.get("kind") != "lm":
        raise ValueError(f"{path} holds a '{state.get('kind')}', no language model: give one that train.py wrote")
    known = {f.name for f in fields(GPTConfig)}
    model = GPT(GPTConfig(**{k: v for k, v in {**state["model_args"], **options}.items() if k in known}), unit_at_cell=state["model"].get("unit_at_cell"))
    odd = model.load_state_dict(state["model"], strict=False)
    if strange := [key for key in (*odd.missing_keys, *odd.unexpected_keys) if key != "unit_at_cell"]:  # positions are given or left as options say
        raise ValueError(f"{path} does not fit our GPT: '{strange[0]}' is {'missing' if strange[0] in odd.missing_keys else 'more than it has'}")
    return model


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
        state = load_checkpoint(path)
        return lm_from(state, path, **options), Tokenizer(state["tokenizer"])
    return GPT.from_pretrained(spec, **options), Tokenizer.from_pretrained(spec)


def export_lm(spec, folder):
    """Any language model that load_lm takes as a Hugging Face folder that AutoModelForCausalLM and AutoTokenizer open: safetensors, tokenizer, model card.

        python -c "import model; model.export_lm('out/train', 'out/hf')" """
    model, tokenizer = load_lm(spec)
    facts, path = "", Path(spec)
    for name in ("config.yaml", "results.csv"):  # what a run of ours says of itself
        if (path / name).is_file():
            lines = [f"    {line}\n" for line in (path / name).read_text().splitlines() if not line.startswith("#")]
            facts += f"`{name}` of its run:\n\n{''.join(lines)}\n"
    model.save_pretrained(folder, tokenizer, facts.strip())
