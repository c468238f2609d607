"""GPT-2 with cortical sheets, an encoder of brain signals, and a GPT that reads both.

- GPT: pre-LN, learned positions, tied head. The output units of each sublayer lie on a square sheet
  (positions.py); the loss adds alpha times the spatial loss of every sheet.
- NeuralEncoder: turns signals of any electrodes into tokens; ENCODERS lists its kinds.
- NeuralGPT: a GPT that reads these tokens before its text.
- Our checkpoints; convert.py reads those of other projects.

"Position" refers to the order of tokens, "sheet" and "place" to the cortex or the head.
Radford et al. 2019 (GPT-2); Margalit et al. 2024 (TDANN); Rathi et al. 2025 (TopoLM); Wang et al.
2023 (CogVLM); Alayrac et al. 2022 (Flamingo); Défossez et al. 2023 (electrodes as places).
"""

import copy
import hashlib
import math
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import positions
from data import InputError, aside, check_content


@dataclass
class GPTConfig:
    """Shape of a GPT and its sheets; stored in checkpoints as model_args.

    You may add options at any time: older checkpoints take the default.
    """

    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms
    gelu: Literal["exact", "tanh"] = "exact"  # tanh as in the released GPT-2
    # ---- the sheet
    sheet: bool = False  # units lie on sheets; n_embd must be a square
    radius: int = 5  # a window holds the cells closer than this to its centre
    norm: float = float("inf")  # in this p-norm (1, 2, inf)
    windows: int | str = 5  # drawn per sheet and micro-batch; 'sheet': one, the whole sheet
    alpha: float = 0.0  # weight of each sheet's spatial loss
    spatial: Literal["activations", "weights"] = "activations"  # loss on; weights: TopoLoss
    factor: float = 3.0  # weights: shrink the sheet this much along each axis to blur it
    spatial_kind: str = "relative"  # a name in positions.SPATIAL_KINDS
    accum: Literal["mean", "maximum"] = "mean"  # over the windows
    tap: Literal["sublayer", "residual"] = "sublayer"  # on the sheet: its output, or the stream
    activation_decay: float = 0.0  # weight of the mean squared norm of each sheet's activations
    head_loss: bool = False  # attention sheet is a mosaic of heads, without output projection
    attn_proj: bool = False  # add a Linear after attention; its output lies on the sheet

    def check(self):
        """Raise InputError for invalid values and combinations."""
        for field in fields(self):
            if get_origin(field.type) is Literal:
                check_choice(field.name, getattr(self, field.name), get_args(field.type))
        check_choice("spatial_kind", self.spatial_kind, positions.SPATIAL_KINDS)
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.windows != "sheet" and (isinstance(self.windows, str) or self.windows < 1):
            sheet = "windows=sheet for the whole sheet"
            raise InputError(f"windows={self.windows}: give at least 1, or {sheet}")
        if self.spatial == "weights" and (self.head_loss or self.activation_decay):
            raise InputError("spatial=weights works with neither head_loss nor activation_decay")
        if self.spatial == "weights" and self.factor > math.sqrt(self.n_embd):
            sheet = f"a sheet of {self.n_embd} units: give a smaller factor"
            raise InputError(f"factor={self.factor:g} leaves nothing of {sheet}")


def check_choice(option, value, choices):
    """Raise InputError for a value that is not one of the choices."""
    if value not in choices:
        raise InputError(f"{option} must be {' or '.join(choices)}, not '{value}'")


class Output(NamedTuple):
    """What GPT.forward returns; losses are float32 scalars, or None."""

    logits: torch.Tensor | None = None  # (B, T, vocab_size) without targets
    loss: torch.Tensor | None = None  # task + alpha * spatial + activation_decay * energy
    task: torch.Tensor | None = None  # mean cross-entropy, nats per token
    spatial: torch.Tensor | None = None  # spatial loss summed over the 2 n_layer sheets
    hidden: dict | None = None  # the requested states, (B, T, n_embd) each


# ---- blocks


class PositionEmbedding(nn.Embedding):
    """GPT-2's learned positions, the only code that encodes the order of tokens.

    Cached generation, NeuralGPT and the check of exports build on it. For rotary positions make it
    an nn.Module without weights, with an `add` that returns x and a `turn` that rotates.
    """

    def __init__(self, config):
        super().__init__(config.block_size, config.n_embd)

    def add(self, x, position):
        """Add positions (.., T), from 0, to x (B, T, C) before the first block."""
        return x + self(position)

    @staticmethod
    def turn(x, position, config):
        """Return queries or keys x (B, H, T, hd) at positions (.., 1, T), here unchanged."""
        return x


class Context(NamedTuple):
    """What attention needs besides the states (B, T, C)."""

    position: torch.Tensor | None = None  # (.., T) of each token in its text; None: no order
    mask: torch.Tensor | None = None  # (.., T, K) True where a token attends; None: causal
    kv: torch.Tensor | None = None  # a layer's cache of keys and values (2, B, H, length, hd)
    used: int = 0  # filled columns of the cache


class Attention(nn.Module):
    """Multi-head self-attention: qkv, remember, read."""

    def __init__(self, config):
        super().__init__()
        width = config.n_embd
        self.config = config
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(width, 3 * width, bias=config.bias)
        self.c_proj = nn.Identity()
        self.attn_proj = nn.Identity()
        if not config.head_loss:
            self.c_proj = nn.Linear(width, width, bias=config.bias)
        if config.attn_proj:
            self.attn_proj = nn.Linear(width, width, bias=config.bias)

    def qkv(self, x, position=None):
        """x (B, T, C) -> queries, keys and values, (B, H, T, hd) each."""
        q, k, v = self.c_attn(x).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        if position is not None:
            position = position.unsqueeze(-2)  # the same for all heads
            q = PositionEmbedding.turn(q, position, self.config)
            k = PositionEmbedding.turn(k, position, self.config)
        return q, k, v

    def read(self, q, k, v, mask=None, causal=False):
        """Attend with queries (B, H, T, hd) to keys and values (B, H, K, hd): (B, T, C).

        mask (.., T, K): True where a query attends, or numbers to add to the scores.
        """
        dropout = self.dropout if self.training else 0.0
        if mask is not None and mask.size(-1) != k.size(2):
            mask = mask.expand(*mask.shape[:-1], k.size(2)).contiguous()  # for CUDA's kernel
        half = q.dtype in (torch.bfloat16, torch.float16)
        if q.device.type == "cpu" and half and causal and not dropout and q.size(2) <= 512:
            y = written_out_attention(q, k, v)
        else:
            width = q.size(3)
            if q.is_cuda and width % 8:  # the kernel would pad, too, but not when compiled
                q, k, v = (F.pad(x, (0, -width % 8)) for x in (q, k, v))
            options = {"is_causal": causal, "scale": width**-0.5}
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, **options)[..., :width]
        y = y.transpose(1, 2).flatten(2)  # heads side by side
        return F.dropout(self.attn_proj(self.c_proj(y)), self.dropout, self.training)

    def forward(self, x, context):
        q, k, v = self.qkv(x, context.position)
        k, v = remember(k, v, context)
        causal = context.mask is None and x.size(1) > 1
        return self.read(q, k, v, context.mask, causal)


def written_out_attention(q, k, v):
    """Attend causally in half precision on CPUs, where torch's kernel takes 1.3 times as long."""
    T = q.size(2)
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(2, 3)).float() * k.size(3) ** -0.5
    return scores.masked_fill(later, -math.inf).softmax(-1).to(v.dtype) @ v


def remember(k, v, context):
    """Add k, v (B, H, T, hd) to the cache, if any; return the keys and values of all tokens."""
    if context.kv is None:
        return k, v
    end = context.used + k.size(2)
    context.kv[0, :, :, context.used : end] = k
    context.kv[1, :, :, context.used : end] = v
    return context.kv[0, :, :, :end], context.kv[1, :, :, :end]


class MLP(nn.Module):
    """Two linear layers with a GELU between them, where they are four times as wide.

    The outputs of c_proj lie on the sheet, as in Attention: init_weights, weight_loss and
    convert.py look for that name.
    """

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.gelu = nn.GELU({"exact": "none", "tanh": "tanh"}[config.gelu])
        self.dropout = config.dropout

    def forward(self, x):
        return F.dropout(self.c_proj(self.gelu(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    """One layer: attention and MLP, and the losses of their two sheets."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, context, units=None, near=None, taps=False):
        """Map x (B, T, C) to x, losses (2,) or None, and the activations on both sheets or None.

        units (2, K, n): the units in each window of the two sheets. near (n, n): their closeness.
        """
        attn = self.attn(self.ln_1(x), context)
        middle = x + attn
        mlp = self.mlp(self.ln_2(middle))
        x = middle + mlp
        sheets = (attn, mlp)
        if self.config.tap == "residual":
            sheets = (middle, x)
        losses = None
        if units is not None:
            losses = self.sheet_losses(sheets, units, near)
        return x, losses, sheets if taps else None

    def sheet_losses(self, sheets, units, near):
        """Return the spatial loss and the energy (2,) of the activations on both sheets."""
        c = self.config
        spatial = energy = torch.zeros((), device=near.device)
        for x, sheet_units in zip(sheets, units):
            loss = positions.spatial_loss(x, sheet_units, near, c.spatial_kind, c.accum)
            spatial = spatial + loss
            if c.activation_decay:
                energy = energy + x.float().square().sum(-1).mean()
        return torch.stack([spatial, energy])

    def routed(self, n, t, expert, context, neural_causal, last):
        """Apply the layer to neural rows n (B, P, C) followed by text t (B, T, C); return both.

        Neural rows use the expert's weights (None: this block's), text uses this block's; norms are
        shared. context.position (.., P + T) covers all rows, context.mask (.., T, P + T) the text.
        The `last` layer returns None for n, as no text reads its neural rows.
        """
        P = n.size(1)
        neural = expert or self
        q_n, k_n, v_n = neural.attn.qkv(self.ln_1(n), context.position[..., :P])
        q_t, k_t, v_t = self.attn.qkv(self.ln_1(t), context.position[..., P:])
        k = torch.cat([k_n, k_t], dim=2)  # (B, H, P + T, hd)
        v = torch.cat([v_n, v_t], dim=2)
        remember(k, v, context)
        t = t + self.attn.read(q_t, k, v, context.mask)
        t = t + self.mlp(self.ln_2(t))
        if last:
            return None, t
        n = n + neural.attn.read(q_n, k_n, v_n, causal=neural_causal)
        n = n + neural.mlp(self.ln_2(n))
        return n, t


# ---- cross-entropy of the tied head


def token_losses(logits, right, counted, make_probabilities=False):
    """Return cross-entropies (n,) of logits (n, V), 0 where not counted (n, 1).

    right (n, 1): the targets' logits, in a tensor of their own: compiled torch 2.11 would read them
    from the overwritten logits. make_probabilities: overwrite the logits with probabilities.
    """
    top = logits.amax(1, keepdim=True).float()
    norm = (logits.float() - top).exp().sum(1, keepdim=True).log()
    # subtract the large numbers first, to stay exact far from 0
    losses = ((norm + (top - right.float())) * counted)[:, 0]
    if make_probabilities:
        norm = torch.where(counted, norm, math.inf)
        logits.copy_((logits.float() - top - norm).exp())
    return losses


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of x (N, C) @ weight.T (V, C) against targets (N,).

    The forward pass also computes the gradient, so no logits outlive their chunk of tokens.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, chunk, dtype, losses_of):
        w = weight.to(dtype)
        dx = torch.empty_like(x)
        dw = torch.zeros_like(weight, dtype=torch.float32)
        # one buffer for all chunks, and slabs of the vocabulary: fresh memory is slow on a CPU
        buffer = torch.empty(min(chunk, len(x)), len(w), dtype=dtype, device=x.device)
        slab = 1024 if x.device.type == "cpu" else len(w)
        total = torch.zeros((), device=x.device)
        for start in range(0, len(x), chunk):
            rows = x[start : start + chunk].to(dtype)
            target = targets[start : start + chunk, None]
            counted = target >= 0
            target = target.clamp_min(0)
            p = torch.mm(rows, w.T, out=buffer[: len(rows)])  # logits, then probabilities
            losses = losses_of(p, p.gather(1, target), counted, True)
            total += losses.sum()
            # p - 1 at the target without rounding p first; on a CPU p.scatter_ would copy a whole
            # bfloat16 p to float32 and back
            p[torch.arange(len(p)), target[:, 0]] = (-losses).expm1().to(dtype)
            dx[start : start + chunk] = p @ w
            for dw_slab, p_slab in zip(dw.split(slab), p.split(slab, dim=1)):
                dw_slab += p_slab.T @ rows
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dw.mul_(grad), None, None, None, None


def cross_entropy(x, weight, targets, chunk=None, losses_of=token_losses):
    """Return the mean cross-entropy (nats) of the head x @ weight.T; ignore targets of -1.

    x (..., C), weight (V, C), targets (...). chunk: tokens at a time.
    """
    device = x.device.type
    chunk = chunk or (1024 if device == "cpu" else 4096)  # GPUs are faster with larger products
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x = x.flatten(0, -2)
    targets = targets.flatten()
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            total = ChunkedCrossEntropy.apply(x, weight, targets, chunk, dtype, losses_of)
        else:
            total = torch.zeros((), device=x.device)
            w = weight.to(dtype)
            for rows, target in zip(x.split(chunk), targets[:, None].split(chunk)):
                logits = rows.to(dtype) @ w.T
                right = logits.gather(1, target.clamp_min(0))
                total += losses_of(logits, right, target >= 0).sum()
        return total / (targets >= 0).sum().clamp_min(1)


# ---- the language model


class GPT(nn.Module):
    """GPT-2 with sheets, laid out by unit_at_cell (2 n_layer, n_embd), or at random."""

    def __init__(self, config, unit_at_cell=None, seed=0):
        super().__init__()
        config.check()
        self.config = config
        self.losses_of = token_losses
        parts = {
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": PositionEmbedding(config),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
        }
        self.transformer = nn.ModuleDict(parts)
        self.init_weights(seed)
        if config.sheet:
            self.make_sheets(unit_at_cell, seed)

    def init_weights(self, seed):
        """Initialise as GPT-2 does, each tensor from (seed, its name) alone."""
        for name, p in self.named_parameters():
            key = hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
            if p.dim() == 2:
                std = 0.02
                if name.endswith("c_proj.weight"):
                    std /= math.sqrt(2 * self.config.n_layer)
                with torch.no_grad():
                    p.copy_(torch.randn(p.shape, generator=generator) * std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def make_sheets(self, unit_at_cell, seed):
        """Make the buffers of the spatial loss; checkpoints store unit_at_cell."""
        c = self.config
        side = positions.sheet_side(c.n_embd)
        if c.windows == "sheet":
            cells = torch.arange(c.n_embd)[None]
        else:
            cells = torch.as_tensor(positions.window_cells(side, c.radius, c.norm))  # (M, n)
        if unit_at_cell is None:
            unit_at_cell = positions.random_positions(c.n_layer, c.n_embd, seed)
        unit_at_cell = torch.as_tensor(unit_at_cell).clone()
        if c.head_loss:
            unit_at_cell[::2] = torch.as_tensor(positions.head_mosaic(c.n_head, c.n_embd))
        near = torch.as_tensor(positions.closeness(cells[0], side), dtype=torch.float32)
        self.register_buffer("unit_at_cell", unit_at_cell)
        self.register_buffer("window_cells", cells, persistent=False)
        self.register_buffer("near", near, persistent=False)

    def draw_windows(self, generator):
        """Draw window numbers (2 n_layer, K) for a micro-batch, the same on any device."""
        n_windows = len(self.window_cells)
        count = 1 if self.config.windows == "sheet" else self.config.windows
        return positions.draw_windows(2 * self.config.n_layer, n_windows, count, generator)

    def sheets(self, windows):
        """Return units (n_layer, 2, K, n) in windows (2 n_layer, K), and their closeness (n, n)."""
        cells = self.window_cells[windows.to(self.unit_at_cell.device)]  # (2 n_layer, K, n)
        units = self.unit_at_cell.gather(1, cells.flatten(1)).view(cells.shape)
        return units.unflatten(0, (self.config.n_layer, 2)), self.near

    def weight_loss(self):
        """Return TopoLoss summed over the linear layers whose outputs lie on the sheets."""
        losses = []
        for i, block in enumerate(self.transformer.h):
            attn = block.attn.attn_proj if self.config.attn_proj else block.attn.c_proj
            for linear, units in zip((attn, block.mlp.c_proj), self.unit_at_cell[2 * i :]):
                losses.append(positions.weight_loss(linear.weight, units, self.config.factor))
        return sum(losses)

    # -- forward

    def trunk(
        self, idx, windows=None, hidden=(), position=None, mask=None, cache=None, crosses=None
    ):
        """Run all but the head: return x (B, T, C) after the final LayerNorm, losses, states.

        losses (2,): spatial and energy. position (.., T): 0, 1, ... by default. mask (.., T, K):
        True where tokens attend; causal by default.
        """
        c = self.config
        T = idx.size(1)
        if c.block_size < T:
            raise InputError(f"{T} tokens do not fit block_size={c.block_size}: shorten the text")
        units = [None] * c.n_layer
        near = None
        if windows is not None and c.spatial == "activations":
            units, near = self.sheets(windows)
        if position is None:
            position = torch.arange(T, device=idx.device)
        x = self.transformer.wpe.add(self.transformer.wte(idx), position)
        x = F.dropout(x, c.dropout, self.training)
        context = Context(position, mask)
        losses = []
        states: dict = {0: x}
        for i, block in enumerate(self.transformer.h):
            if crosses and i in crosses:
                cross, keys = crosses[i]
                x = x + cross(x, keys)
            if cache is not None:
                context = Context(position, mask, cache.kv[i], cache.used)
            taps = f"layer.{i}.attn" in hidden or f"layer.{i}.mlp" in hidden
            x, loss, sheets = block(x, context, units[i], near, taps)
            losses.append(loss)
            if i + 1 in hidden:
                states[i + 1] = x
            if taps:
                states[f"layer.{i}.attn"], states[f"layer.{i}.mlp"] = sheets
        if cache is not None:
            cache.used += T
        x = self.transformer.ln_f(x)
        states[c.n_layer] = x
        total = None if near is None else torch.stack(losses).sum(0)
        return x, total, {name: states[name] for name in hidden}

    def forward(self, idx, targets=None, windows=None, hidden=()):
        """Map idx (B, T) int64 to an Output.

        With targets (B, T), -1 where not counted, it has losses, else the logits of every position.
        With windows (2 n_layer, K) from draw_windows it has the spatial loss, too.
        hidden: states to return, numbered as in Hugging Face (0 the embedding, i after block i,
        n_layer after the final LayerNorm), or 'layer.N.attn' and 'layer.N.mlp' for the activations
        on a sheet.
        """
        head = self.transformer.wte.weight
        x, losses, states = self.trunk(idx, windows, hidden)
        if targets is None:
            return Output(logits=F.linear(x, head), hidden=states)
        task = cross_entropy(x, head, targets, losses_of=self.losses_of)
        if windows is None:
            return Output(loss=task, task=task, hidden=states)
        if self.config.spatial == "weights":
            spatial = self.weight_loss()
            energy = 0.0
        else:
            spatial, energy = losses.unbind()
        loss = task + self.config.alpha * spatial + self.config.activation_decay * energy
        return Output(loss=loss, task=task, spatial=spatial, hidden=states)

    def compile_blocks(self, **options):
        """Compile each block in place, and the head's losses; state_dict keys do not change."""
        for block in self.transformer.h:
            block.compile(**options)
            block.routed = torch.compile(block.routed, **options)
        self.losses_of = torch.compile(token_losses, **options)

    def n_params(self):
        """Return the number of parameters without the position embedding (GPT-2's usual count)."""
        n_wpe = sum(p.numel() for p in self.transformer.wpe.parameters())
        return sum(p.numel() for p in self.parameters()) - n_wpe

    # -- generation

    def generate(self, prompts, max_new_tokens, **options):
        """Sample B lists of new tokens, by default at temperature=1.0. Options as in stream."""
        rows: list[list[int]] = [[] for _ in prompts]
        for tokens in self.stream(prompts, max_new_tokens, **options):
            for row, token in zip(rows, tokens):
                if token is not None:
                    row.append(token)
        return rows

    @torch.no_grad()
    def stream(self, prompts, max_new_tokens, stop=(), start=None, seed=0, **sampling):
        """Sample with a cache: yield B new tokens per step, None for rows that have ended.

        prompts: B lists of token ids, or a tensor (B, T). stop: token ids that end a row and are
        not yielded. sampling: see pick_tokens. start: a function to use instead of _start. A row
        whose context is full continues from its last block_size // 2 tokens.
        """
        rows = [list(map(int, row)) for row in prompts]
        if not rows or not all(rows):
            raise InputError("a prompt is empty: begin it with the end-of-text token")
        head = self.transformer.wte.weight
        size = self.config.block_size
        generator = torch.Generator(head.device).manual_seed(seed)
        ended = [False] * len(rows)
        cache = None
        for n_new in range(max_new_tokens):
            if cache is None or cache.used - cache.room == size:
                for i, row in enumerate(rows):
                    if len(row) > size:
                        rows[i] = row[-(size // 2) :]
                length = max(map(len, rows)) + max_new_tokens - n_new
                x, cache = (start or self._start)(rows, min(size, length))
            else:  # one more token of each row, against the cache
                idx = torch.tensor([row[-1:] for row in rows], device=head.device)
                position, mask = cache.next()
                x = self.trunk(idx, None, (), position, mask, cache, cache.crosses)[0][:, -1]
            logits = (head @ x.T).T.float()  # faster on CPUs than x @ head.T for a few rows
            tokens = pick_tokens(logits, generator, **sampling).tolist()
            for i, token in enumerate(tokens):
                ended[i] |= token in stop
                rows[i].append(token)
            if all(ended):
                return
            yield [None if end else token for end, token in zip(ended, tokens)]

    def _start(self, rows, length):
        """Read rows of token ids: return the last states (B, C) and a Cache of `length` tokens."""
        idx, position, real, mask = left_pad(rows, self.transformer.wte.weight.device)
        cache = Cache(self, real, length)
        x = self.trunk(idx, position=position, mask=mask, cache=cache)[0]
        return x[:, -1], cache


def pick_tokens(logits, generator, temperature=1.0, top_k=None, top_p=None):
    """Draw the next token ids (B,) from logits (B, V).

    temperature: 0 is greedy. top_k: keep only the k most likely. top_p: keep only the smallest set
    with at least this probability (nucleus).
    """
    if temperature < 0:
        raise InputError(f"temperature={temperature} must be at least 0")
    if top_k is not None and top_k <= 0:
        raise InputError(f"top_k={top_k} must be above 0")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p} must be above 0 and at most 1")
    if temperature < 1e-6:  # dividing by less would overflow
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1)))[0][:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        excluded = p.cumsum(-1) - p >= top_p  # never the first
        logits = logits.scatter(1, order, ordered.masked_fill(excluded, -math.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def left_pad(rows, device):
    """Pad rows of token ids on the left: return idx, position, real (B, T), and mask.

    real: False for pads. mask (B, 1, T, T): where to attend; None: causal, without pads.
    """
    width = max(len(row) for row in rows)
    lengths = torch.tensor([len(row) for row in rows])
    idx = pad_sequence([torch.tensor(row) for row in rows], True, 0, "left")
    real = torch.arange(width) >= width - lengths[:, None]
    mask = None
    if not real.all():
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        diagonal = torch.eye(width, dtype=torch.bool)  # pads attend to themselves: no empty softmax
        mask = ((causal & real[:, None]) | diagonal)[:, None].to(device)
    position = (real.cumsum(1) - 1).clamp_min(0)
    return idx.to(device), position.to(device), real.to(device), mask


class Cache:
    """Keys and values of all layers during generation.

    kv (n_layer, 2, B, H, room + length, hd): `used` columns are filled, first `room` with a neural
    prefix, then the text's. real (B, room + T): False where text does not attend. position (B,): of
    the next token.
    """

    def __init__(self, lm, real, length, room=0, crosses=None):
        c = lm.config
        weight = lm.transformer.wte.weight
        device = weight.device.type
        dtype = weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        shape = (c.n_layer, 2, len(real), c.n_head, room + length, c.n_embd // c.n_head)
        self.kv = torch.empty(shape, dtype=dtype, device=weight.device)
        self.room = room
        self.crosses = crosses
        self.used = 0
        self.real = F.pad(real, (room, 0), value=True)
        self.position = real.sum(1)

    def next(self):
        """Return the position (B, 1) and the mask of the next token of each row."""
        position = self.position[:, None]
        self.position = self.position + 1
        self.real = F.pad(self.real, (0, 1), value=True)
        mask = None if self.real.all() else self.real[:, None, None]
        return position, mask


# ---- from neural signals to tokens


@dataclass
class EncoderConfig:
    """Shape of a NeuralEncoder; stored in checkpoints as encoder_args."""

    kind: str = "transformer"  # a key of ENCODERS: linear, transformer, ...
    n_embd: int = 256  # width of the output tokens: the language model's
    width: int = 128  # of hidden states
    n_layer: int = 2  # blocks of transformer, convolutions of conv
    n_head: int = 4  # transformer
    patch: int = 10  # samples per token
    tokens: str = "time"  # transformer: a patch of all electrodes, or of one ('electrode')
    virtual: int = 64  # channels that electrodes are mixed into
    degree: int = 3  # of the Fourier code of an electrode's place
    window: int = 0  # patches per window, to add a first token that reads them all; 0: do not
    subjects: int = 1  # people, each with an own mix of the virtual channels
    dropout: float = 0.0
    reach: bool = False  # tokens='electrode': each head learns how far it attends


class PlaceCode(nn.Module):
    """Encode places xyz (..., C, 3) in m as Fourier series of period 0.25 m.

    Returns codes (..., C, M) and which places are known, i.e. not NaN (..., C).
    """

    def __init__(self, degree):
        super().__init__()
        waves = torch.cartesian_prod(*[torch.arange(-degree, degree + 1)] * 3)
        waves = waves[len(waves) // 2 :].float()  # one of each pair k, -k; the first is 0
        self.register_buffer("waves", 2 * math.pi / 0.25 * waves, persistent=False)  # (M / 2, 3)

    def weights(self, width):
        """Return a parameter (M, width) that keeps the code's variance."""
        M = 2 * len(self.waves)
        return nn.Parameter(torch.randn(M, width) * M**-0.5)

    def forward(self, xyz):
        known = xyz.isfinite().all(-1)
        angle = torch.where(known[..., None], xyz, 0.0).float() @ self.waves.T
        code = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return code * known[..., None], known


def of_subject(table, subject):
    """Return rows (B, ...) of a table (subjects, ...) for numbers (B,), the mean for strangers."""
    known = (subject >= 0) & (subject < len(table))
    known = known.view(-1, *[1] * (table.dim() - 1))
    rows = table[subject.clamp(0, len(table) - 1)]
    return torch.where(known, rows, table.mean(0, keepdim=True))


def cut_patches(x, size):
    """Cut (B, C, T) into (B, C, P, size), dropping samples after the last full patch."""
    P = x.size(2) // size
    return x[..., : P * size].unflatten(2, (P, size))


def time_code(P, width, device):
    """Return sinusoids (P, width) that encode the time of each patch."""
    frequency = 1000 ** -(torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(P, device=device)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]


class Montage(nn.Module):
    """Mix any electrodes into `virtual` channels, with an extra mix for each person.

    Mixing weights are functions of the electrodes' places. Maps (B, C, T) to (B, K, T), of unit
    variance if the electrodes have unit variance and are independent, and a person's token
    (B, width).
    """

    def __init__(self, c, width):
        super().__init__()
        self.code = PlaceCode(c.degree)
        self.place = self.code.weights(c.virtual)
        self.subject_mix = nn.Parameter(torch.zeros(c.subjects, c.virtual, c.virtual))
        self.subject_token = nn.Parameter(torch.zeros(c.subjects, width))

    def forward(self, x, xyz, subject):
        code, known = self.code(xyz)
        count = known.sum(-1).clamp_min(1)[..., None, None]
        weight = 2**0.5 * code @ self.place * count**-0.5  # ([B,] C, K)
        x = torch.where(known[..., None], x, 0.0)  # an absent channel may hold any values
        v = weight.transpose(-2, -1) @ x
        v = v + of_subject(self.subject_mix, subject) @ v
        return v, of_subject(self.subject_token, subject)


# Each kind of encoder turns signals (B, C, T) into tokens (B, P, n_embd), one for each of
# P = T // patch patches, and the states (B, P, width) that its linear layer `output` reads.
# Parameters called subject_* belong to people and are not transferred.
class LinearEncoder(nn.Module):
    """A linear map of each patch of the virtual channels."""

    def __init__(self, c):
        super().__init__()
        self.patch = c.patch
        self.montage = Montage(c, c.n_embd)
        self.output = nn.Linear(c.patch * c.virtual, c.n_embd)

    def forward(self, x, xyz, subject):
        v, person = self.montage(x, xyz, subject)
        states = cut_patches(v, self.patch).transpose(1, 2).flatten(2)  # (B, P, K patch)
        return self.output(states) + person[:, None], states


class TransformerEncoder(nn.Module):
    """A transformer over patches of time of all virtual channels."""

    def __init__(self, c):
        super().__init__()
        self.patch = c.patch
        self.montage = Montage(c, c.width)
        self.embed = nn.Linear(c.patch * c.virtual, c.width)
        self.blocks = encoder_blocks(c)
        self.norm = nn.LayerNorm(c.width)
        self.output = nn.Linear(c.width, c.n_embd)

    def forward(self, x, xyz, subject):
        v, person = self.montage(x, xyz, subject)
        h = self.embed(cut_patches(v, self.patch).transpose(1, 2).flatten(2))  # (B, P, width)
        h = h + time_code(h.size(1), h.size(2), h.device) + person[:, None]
        everywhere = torch.ones(1, 1, dtype=torch.bool, device=h.device)
        for block in self.blocks:
            h = block(h, Context(mask=everywhere))[0]
        states = self.norm(h)
        return self.output(states), states


class ElectrodeEncoder(nn.Module):
    """A transformer over patches of time of single electrodes, averaged over electrodes.

    To drop tokens on the way: tokenize -> think, on any subset -> pool.
    """

    def __init__(self, c):
        super().__init__()
        self.patch = c.patch
        self.code = PlaceCode(c.degree)
        self.place = self.code.weights(c.width)
        self.subject_token = nn.Parameter(torch.zeros(c.subjects, c.width))
        self.embed = nn.Linear(c.patch, c.width)
        self.blocks = encoder_blocks(c)
        self.reach = Reach(c.n_layer, c.n_head) if c.reach else None
        self.norm = nn.LayerNorm(c.width)
        self.output = nn.Linear(c.width, c.n_embd)

    def tokenize(self, x, xyz, subject):
        """Return tokens (B, C P, width), electrode by electrode, and which are present (B, C P)."""
        code, known = self.code(xyz)
        patches = cut_patches(torch.where(known[..., None], x, 0.0), self.patch)  # (B, C, P, patch)
        B, C, P, _ = patches.shape
        tokens = self.embed(patches) + (code @ self.place)[..., None, :]
        tokens = tokens + time_code(P, tokens.size(3), x.device)
        tokens = tokens + of_subject(self.subject_token, subject)[:, None, None]
        present = known.expand(B, C)[..., None].expand(B, C, P)
        return tokens.flatten(1, 2), present.flatten(1)

    def spots(self, xyz, P):
        """Return the place and time of the tokens: (B or 1, C P, 4), in cm and patches."""
        known = xyz.isfinite().all(-1, keepdim=True)
        place = torch.where(known, 100 * xyz, 0.0).float().view(-1, xyz.size(-2), 1, 3)
        place = place.expand(-1, -1, P, -1)
        time = torch.arange(P, device=xyz.device, dtype=torch.float32)[:, None]
        return torch.cat([place, time.expand(*place.shape[:3], 1)], dim=-1).flatten(1, 2)

    def think(self, tokens, present, spots=None):
        """Run the blocks on any subset of N tokens, all attending to all present: (B, N, width).

        spots (B or 1, N, 4): of the same subset, if the encoder has reach.
        """
        masks = [present[:, None, None]] * len(self.blocks)
        if self.reach is not None:
            masks = [near.to(tokens.dtype) for near in self.reach(spots, present)]
        for block, mask in zip(self.blocks, masks):
            tokens = block(tokens, Context(mask=mask))[0]
        return tokens

    def pool(self, h, present, P):
        """Average h (B, C P, width) over the electrodes of each patch: states (B, P, width)."""
        present = present.float()[..., None].unflatten(1, (-1, P))
        h = (h.unflatten(1, (-1, P)) * present).sum(1) / present.sum(1).clamp_min(1)
        return self.norm(h)

    def forward(self, x, xyz, subject):
        P = x.size(2) // self.patch
        tokens, present = self.tokenize(x, xyz, subject)
        h = self.think(tokens, present, self.spots(xyz, P))
        states = self.pool(h, present, P)
        return self.output(states), states


class ConvEncoder(nn.Module):
    """Gated convolutions over the virtual channels, with growing dilation."""

    def __init__(self, c):
        super().__init__()
        self.dropout = c.dropout
        self.montage = Montage(c, c.width)
        self.embed = nn.Conv1d(c.virtual, c.width, c.patch, c.patch)
        self.convs = nn.ModuleList()
        for i in range(c.n_layer):
            conv = nn.Conv1d(c.virtual, 2 * c.virtual, 3, padding=2**i, dilation=2**i)
            self.convs.append(conv)
        self.norm = nn.LayerNorm(c.width)
        self.output = nn.Linear(c.width, c.n_embd)

    def forward(self, x, xyz, subject):
        v, person = self.montage(x, xyz, subject)
        for conv in self.convs:
            v = v + F.dropout(F.glu(conv(v), dim=1), self.dropout, self.training)
        h = self.embed(F.gelu(v)).transpose(1, 2)  # (B, P, width)
        states = self.norm(h + person[:, None])
        return self.output(states), states


class TSConvEncoder(nn.Module):
    """Temporal and spatial filters of Song et al. 2024; as they commute, space comes first."""

    def __init__(self, c):
        super().__init__()
        self.patch = c.patch
        self.dropout = c.dropout
        self.montage = Montage(c, c.width)
        self.temporal = nn.Conv1d(c.virtual, 2 * c.virtual, 25, padding=12, groups=c.virtual)
        self.embed = nn.Conv1d(2 * c.virtual, c.width, 1)
        self.norm = nn.LayerNorm(c.width)
        self.output = nn.Linear(c.width, c.n_embd)

    def forward(self, x, xyz, subject):
        v, person = self.montage(x, xyz, subject)
        v = F.elu(F.avg_pool1d(self.temporal(v), self.patch))
        h = self.embed(F.dropout(v, self.dropout, self.training)).transpose(1, 2)
        states = self.norm(h + person[:, None])
        return self.output(states), states


def encoder_blocks(c):
    """Return the blocks of an encoder, initialised as GPT-2's."""
    shape = GPTConfig(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.width, dropout=c.dropout)
    blocks = nn.ModuleList(Block(shape) for _ in range(c.n_layer))
    for name, p in blocks.named_parameters():
        if p.dim() == 2:
            is_projection = name.endswith("c_proj.weight")
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) if is_projection else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    return blocks


ENCODERS: dict[str, Any] = {
    "linear": LinearEncoder,
    "transformer": TransformerEncoder,
    "conv": ConvEncoder,
    "tsconv": TSConvEncoder,
    "electrodes": ElectrodeEncoder,
}


class NeuralEncoder(nn.Module):
    """Turn signals (B, C, T) into tokens (B, P, n_embd), P = T // patch; one more with window.

    A channel is known by its place xyz in m, never by its index. Channels without a place (NaN) are
    absent, so that montages of different sizes share a batch. Subjects are numbers; numbers
    outside the range are strangers.
    """

    def __init__(self, config):
        super().__init__()
        kind = config.kind
        if kind == "transformer" and config.tokens == "electrode":
            kind = "electrodes"
        self.config = config
        self.net = ENCODERS[kind](config)
        self.whole = None
        if config.window:
            self.whole = nn.Linear(config.window * self.net.output.in_features, config.n_embd)

    def forward(self, x, xyz, subject):
        """Map x (B, C, T), xyz (C, 3) or (B, C, 3) and subject (B,) to tokens (B, P, n_embd)."""
        c = self.config
        T = x.size(2)
        if c.patch > T:
            raise InputError(f"a signal of {T} samples is shorter than patch={c.patch}")
        if c.window and T // c.patch != c.window:
            raise InputError(f"a signal has {T // c.patch} patches, not window={c.window}")
        tokens, states = self.net(x, xyz, subject)
        assert tokens.shape == (len(x), T // c.patch, c.n_embd), "a token for each patch"
        if self.whole is None:
            return tokens
        states = F.dropout(states.flatten(1), c.dropout, self.training)
        return torch.cat([self.whole(states)[:, None], tokens], dim=1)


class Reach(nn.Module):
    """Attention penalties for distance in space and time, to add to a head's scores.

    -distance² / 2 reach² - |time| / span; each head learns both, starting from 8 to 25 mm and from
    0.7 to 3 patches.
    """

    def __init__(self, n_layer, n_head):
        super().__init__()
        place = torch.linspace(math.log(0.8), math.log(2.5), n_head)
        time = torch.linspace(math.log(0.7), math.log(3.0), n_head)
        self.place = nn.Parameter(place.repeat(n_layer, 1))
        self.time = nn.Parameter(time.repeat(n_layer, 1))

    def forward(self, spots, present):
        """Yield (B, H, N, N) for each layer, from spots (B, N, 4) and present (B, N)."""
        difference = spots[:, :, None] - spots[:, None]  # (B, N, N, 4)
        distance2 = difference[..., :3].square().sum(-1)[:, None]  # (B, 1, N, N)
        delay = difference[..., 3].abs()[:, None]
        for place, time in zip(self.place, self.time):
            penalty = -distance2 * (-2 * place).exp()[:, None, None] / 2
            penalty = penalty - delay * (-time).exp()[:, None, None]
            yield penalty.masked_fill(~present[:, None, None], -1e4)  # within float16's range


def load_matching(module, state, threshold=0.5, path="checkpoint"):
    """Load the weights that fit; return their share of the module, and the names of the rest."""
    weights = module.state_dict()
    shapes = {name: value.shape for name, value in weights.items()}
    fitting = {name: value for name, value in state.items() if shapes.get(name) == value.shape}
    n_weights = sum(value.numel() for value in weights.values())
    share = sum(value.numel() for value in fitting.values()) / n_weights
    if share < threshold:
        raise InputError(f"{path} fits only {share:.1%} of the encoder, less than {threshold:.0%}")
    module.load_state_dict(fitting, strict=False)
    return share, sorted(set(weights) - set(fitting))


def load_encoder(spec):
    """Load (NeuralEncoder in evaluation mode, recipe) from a run or checkpoint of foundation.py.

    The recipe tells data/recording.py how to feed it: window (s), subjects (a person's number is
    the index in the list, -1 for anybody else), recordings (those it was trained on: dataset, name,
    subject, channels, xyz, centre, scale, and `seen`, the span of time in s).
    """
    path = Path(spec)
    if path.suffix != ".pt":
        path = path / "best.pt"
    if not path.exists():
        raise InputError(f"no pretrained encoder at {spec}: train one with python foundation.py")
    state = load_checkpoint(path)
    if state.get("kind") != "foundation":
        kind = state.get("kind")
        raise InputError(f"{path} holds a '{kind}', not a model of foundation.py: give one")
    encoder = NeuralEncoder(EncoderConfig(**state["encoder_args"]))
    weights = {}
    for name, value in state["model"].items():
        if name.startswith("encoder."):
            weights[name.removeprefix("encoder.")] = value
    encoder.load_state_dict(weights)
    return encoder.eval(), state["recording"]


# ---- a language model that reads neural tokens


class Expert(nn.Module):
    """A layer's weights for neural rows (CogVLM): copies of the block's; norms are shared.

    The last layer uses only its keys and values.
    """

    def __init__(self, block, last=False):
        super().__init__()
        self.attn = copy.deepcopy(block.attn)
        self.mlp = None if last else copy.deepcopy(block.mlp)
        self.requires_grad_(True)
        if last:
            self.attn.c_proj = nn.Identity()
            self.attn.attn_proj = nn.Identity()


class Cross(nn.Module):
    """Gated cross-attention from text to neural tokens (Flamingo); the gate starts closed."""

    def __init__(self, config):
        super().__init__()
        width = config.n_embd
        self.n_head = config.n_head
        self.ln = nn.LayerNorm(width, bias=config.bias)
        self.ln_n = nn.LayerNorm(width, bias=config.bias)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.c_proj = nn.Linear(width, width)
        self.gate = nn.Parameter(torch.zeros(()))

    def keys(self, n):
        """Return keys and values (2, B, H, P, hd) of neural tokens (B, P, C)."""
        return self.kv(self.ln_n(n)).unflatten(2, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x, keys):
        """Return what to add to the text x (B, T, C)."""
        q = self.q(self.ln(x)).unflatten(2, (self.n_head, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, keys[0], keys[1])
        return self.gate.tanh() * self.c_proj(y.transpose(1, 2).flatten(2))


class NeuralGPT(nn.Module):
    """A GPT that reads neural signals: [BON, n_1 .. n_P, EON | text].

    BON and the encoder's tokens n use the experts, EON and text the language model's weights.
    fusion: 'prefix' (the language model's weights for all), 'expert' (experts in the last `layers`
    layers, 0: in all) or 'cross' (no prefix: text attends to n by gated cross-attention).
    text_positions: 'zero' (text starts at position 0, the prefix has the encoder's time code) or
    'after_prefix' (positions run over both). attention among neural rows: 'causal', 'full', or
    'blocked' (causal, and hidden from the text).
    """

    def __init__(
        self, lm, encoder, fusion="expert", layers=0, text_positions="zero", attention="causal"
    ):
        super().__init__()
        n_layer = lm.config.n_layer
        if not 0 <= layers <= n_layer:
            raise InputError(f"layers={layers}, but the language model has only {n_layer}")
        width = lm.config.n_embd
        if encoder.config.n_embd != width:
            sizes = f"n_embd={encoder.config.n_embd}, the language model {width}"
            raise InputError(f"the encoder has {sizes}: make them equal")
        self.lm = lm
        self.encoder = encoder
        self.fusion = fusion
        self.text_positions = text_positions
        self.attention = attention
        self.args = {"fusion": fusion, "layers": layers}  # to rebuild it from a checkpoint
        self.args |= {"text_positions": text_positions, "attention": attention}
        self.first = n_layer - (layers or n_layer)  # first layer with an expert or cross-attention
        blocks = lm.transformer.h[self.first :]
        self.experts = None
        self.crosses = None
        if fusion == "expert":
            self.experts = nn.ModuleList(Expert(block, block is blocks[-1]) for block in blocks)
        if fusion == "cross":
            self.crosses = nn.ModuleList(Cross(lm.config) for _ in blocks)
        else:
            wte = lm.transformer.wte.weight.detach()
            self.bon = nn.Parameter(wte.mean(0) + torch.randn_like(wte[0]) * wte.std(0))
            self.eon = nn.Parameter(wte.mean(0) + torch.randn_like(wte[0]) * wte.std(0))
        self._start_at_tokens()

    @torch.no_grad()
    def _start_at_tokens(self):
        """Start neural tokens around the mean of the token embedding, with its spread."""
        wte = self.lm.transformer.wte.weight
        for layer in (self.encoder.net.output, self.encoder.whole):
            if layer is not None:
                spread = layer.weight.std() * layer.weight.size(1) ** 0.5
                layer.weight.mul_(wte.std() / spread)
                layer.bias.copy_(wte.mean(0))

    def prefix(self, signal, xyz, subject):
        """Return neural tokens (B, P, C) of signals (B, channels, T)."""
        return self.encoder(signal, xyz, subject)

    def forward(self, signal, xyz, subject, idx, position=None, mask=None, start=0):
        """Return logits (B, T - start, vocab) of ids (B, T) from `start` on, and neural tokens."""
        n = self.prefix(signal, xyz, subject)
        x = self.trunk(n, idx, position, mask)[:, start:]
        return F.linear(x, self.lm.transformer.wte.weight), n

    def trunk(self, n, idx, position=None, mask=None, cache=None, states=None):
        """Return text states (B, T, C) after the final LayerNorm, from neural tokens n and ids.

        position and mask as in GPT.trunk. states: a list that receives each layer's input: neural
        rows, and EON with text.
        """
        lm = self.lm
        if position is None:
            position = torch.arange(idx.size(1), device=n.device)
        if self.fusion == "cross":
            crosses = self._cross_keys(n) if cache is None else cache.crosses
            return lm.trunk(idx, None, (), position, mask, cache, crosses)[0]
        n, x, context = self._rows(n, idx, position, mask)
        for i, block in enumerate(lm.transformer.h):
            if states is not None:
                states.append((n, x))
            expert = None
            if self.experts is not None and i >= self.first:
                expert = self.experts[i - self.first]
            if cache is not None:
                context = context._replace(kv=cache.kv[i])
            last = i + 1 == len(lm.transformer.h)
            n, x = block.routed(n, x, expert, context, self.attention != "full", last)
        if cache is not None:
            cache.used = context.position.size(-1)
        return lm.transformer.ln_f(x[:, 1:])

    def _cross_keys(self, n):
        """Return {layer: (Cross, its keys and values of n)}."""
        return {i: (cross, cross.keys(n)) for i, cross in enumerate(self.crosses or (), self.first)}

    def _rows(self, n, idx, position, mask):
        """Return neural rows [BON, n], text rows [EON, text], and the Context of both."""
        B, P, _ = n.shape
        T = idx.size(1)
        wpe = self.lm.transformer.wpe
        n = torch.cat([self.bon.expand(B, 1, -1), n], dim=1)
        eon = self.eon.expand(B, 1, -1)
        prefix_position = torch.zeros(P + 2, dtype=torch.long, device=n.device)  # BON, n, EON
        if self.text_positions == "after_prefix":
            prefix_position = torch.arange(P + 2, device=n.device)
            position = position + P + 2
            n = wpe.add(n, prefix_position[:-1])
            eon = wpe.add(eon, prefix_position[-1:])
        text = wpe.add(self.lm.transformer.wte(idx), position)
        if mask is None:
            mask = torch.ones(T, T, dtype=torch.bool, device=n.device).tril()
        mask = F.pad(mask, (0, 0, 1, 0), value=False)  # a row for EON
        mask = F.pad(mask, (1, 0), value=True)  # and a column
        mask = F.pad(mask, (P + 1, 0), value=self.attention != "blocked")  # columns for BON and n
        prefix_position = prefix_position.expand(*position.shape[:-1], -1)
        position = torch.cat([prefix_position, position], dim=-1)
        return n, torch.cat([eon, text], dim=1), Context(position, mask)

    def check_length(self, P, T, text="the text"):
        """Raise InputError if a prefix of P and T tokens of `text` exceed block_size."""
        size = self.lm.config.block_size
        remedy = f"shorten {text}"
        if self.text_positions == "after_prefix" and self.fusion != "cross":
            T += P + 2
            remedy += ", or give longer patches or text_positions=zero"
        if size < T:
            raise InputError(f"{T} tokens in all do not fit block_size={size}: {remedy}")

    @torch.no_grad()
    def generate(self, n, prompt, max_new_tokens, **options):
        """Sample new tokens after neural tokens n (B, P, C), by default at temperature=1.0.

        prompt: token ids, or B lists of them. options: as in GPT.stream.
        """
        prompts = prompt if isinstance(prompt[0], (list, tuple)) else [prompt] * len(n)
        self.check_length(n.size(1), max(map(len, prompts)) + max_new_tokens)
        start = partial(self._start, n)
        return self.lm.generate(prompts, max_new_tokens, start=start, **options)

    def _start(self, n, rows, length):
        """Read rows as GPT._start does, after the neural tokens n."""
        idx, position, real, mask = left_pad(rows, n.device)
        if self.fusion == "cross":
            cache = Cache(self.lm, real, length, crosses=self._cross_keys(n))
        else:
            cache = Cache(self.lm, real, length, room=n.size(1) + 2)
            if self.text_positions == "after_prefix":
                cache.position += cache.room
            if self.attention == "blocked":
                cache.real[:, : cache.room - 1] = False  # all but EON
        x = self.trunk(n, idx, position, mask, cache)
        return x[:, -1], cache


# ---- checkpoints

VERSION = 2


def save_checkpoint(path, state):
    """Write plain types and tensors; a kill leaves the old file or the new one."""
    try:
        with aside(path) as file:
            torch.save({"format": "nanocortex", "version": VERSION, **state}, file)
            file.flush()
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file.name)
            if unsafe:
                raise TypeError(f"a checkpoint holds plain types and tensors only, not {unsafe}")
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        reason = getattr(cause, "strerror", error)
        remedy = "make room, then resume with init_from=resume"
        raise InputError(f"{path} could not be written ({reason}): {remedy}") from None


def load_checkpoint(path, adopt=None):
    """Load one of our checkpoints as a dict on the CPU. Raises InputError for other files.

    adopt(state, path): a function that converts the checkpoints of other projects.
    """
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        remedy = "train one with python train.py, or leave out init_from=resume"
        raise InputError(f"no checkpoint {path}: {remedy}")
    check_content(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        reason = type(error).__name__
        problem = f"is not a checkpoint ({reason}): it is damaged or not ours"
        raise InputError(f"{path} {problem}, give another") from None
    if adopt and isinstance(state, dict) and "format" not in state:
        return adopt(state, path)
    if not isinstance(state, dict) or state.get("format") != "nanocortex":
        raise InputError(f"{path} comes from another project, so do not resume it: give it as lm=")
    if state["version"] > VERSION:
        problem = f"has version {state['version']}, which is newer than this code"
        raise InputError(f"{path} {problem}: update nanoCortex")
    return patch_checkpoint(state)


def patch_checkpoint(state):
    """Update a checkpoint of an older version."""
    if state["version"] == 1 and "encoder_args" in state:
        state["model"] = _rename_encoder(state["model"], EncoderConfig(**state["encoder_args"]))
    for key in {"model_args", "lm_args"} & state.keys():
        args = {**asdict(GPTConfig()), **state[key]}
        if args["windows"] == 0:  # meant every window in version 1
            args["windows"] = args["n_embd"]
        state[key] = args
    state["version"] = VERSION
    return state


def _rename_encoder(weights, config):
    """Rename the weights of version 1, which had all kinds of encoder in one class."""
    montage_names = ("place", "subject_mix", "subject_token")
    by_electrode = config.kind == "transformer" and config.tokens == "electrode"
    renamed = {}
    for name, value in weights.items():
        if name.startswith("encoder.") and not name.startswith("encoder.whole."):
            first, dot, rest = name.removeprefix("encoder.").partition(".")
            if first == "out" or (first == "embed" and config.kind == "linear"):
                first = "output"
            if first in montage_names and not by_electrode:
                first = f"montage.{first}"
            name = f"encoder.net.{first}{dot}{rest}"
        renamed[name] = value
    return renamed


def lm_state(model):
    """Return what rebuilds a language model."""
    return {"kind": "lm", "model_args": asdict(model.config), "model": model.state_dict()}


def lm_from(state, path="checkpoint", **options):
    """Return the GPT in a checkpoint's dict; options set fields that the weights leave open."""
    if state.get("kind") != "lm":
        kind = state.get("kind")
        raise InputError(f"{path} holds a '{kind}', not a language model: give one of train.py")
    args = {**state["model_args"], **options}
    for key in args.keys() - asdict(GPTConfig()).keys():
        raise InputError(f"{path} has the option '{key}', which GPTConfig lacks: add it")
    weights = state["model"]
    model = GPT(GPTConfig(**args), weights.get("unit_at_cell"))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    for name in missing + unexpected:
        if name != "unit_at_cell":  # the options decide about sheets
            problem = "lacks" if name in missing else "has extra"
            raise InputError(f"{path} {problem} weights '{name}': it is not a GPT like ours")
    return model
