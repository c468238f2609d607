"""GPT-2 whose units have a place on a cortical sheet, and how brain signals enter it.

- GPT: pre-LN, learned positions, tied head. The output units of each sublayer lie on a square sheet
  (positions.py); the loss adds alpha times the spatial loss of every sheet.
- NeuralEncoder: signals of any electrodes into tokens; ENCODERS is the table of its kinds.
- NeuralGPT: a GPT that reads such tokens before its text.
- Checkpoints of ours; convert.py reads what others wrote.

"Position" means the order of tokens, "sheet" and "place" the cortex or the head.
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
    """Shape of a GPT and what lies on its sheets; travels in checkpoints as model_args.

    A new option may be added at any time: older checkpoints take its default.
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
    sheet: bool = False  # units have places; n_embd must be a square
    radius: int = 5  # a window is the cells closer than this to its centre
    norm: float = float("inf")  # in this p-norm (1, 2, inf)
    windows: int | str = 5  # drawn per sheet and micro-batch; 'sheet': one, the whole sheet
    alpha: float = 0.0  # weight of each sheet's spatial loss
    spatial: Literal["activations", "weights"] = "activations"  # weights: TopoLoss, the rival
    factor: float = 3.0  # weights: how much the sheet is shrunk per axis
    spatial_kind: str = "relative"  # a name in positions.SPATIAL_KINDS
    accum: Literal["mean", "maximum"] = "mean"  # over the windows
    tap: Literal["sublayer", "residual"] = "sublayer"  # on the sheet: outputs, or the stream after
    activation_decay: float = 0.0  # weight of each sheet's mean squared norm
    head_loss: bool = False  # no attention c_proj; heads tile the attention sheet as a mosaic
    attn_proj: bool = False  # one more Linear after attention, the sheet behind it

    def check(self):
        """Raises InputError for values that do not exist or do not go together."""
        for field in fields(self):
            if get_origin(field.type) is Literal:
                check_choice(field.name, getattr(self, field.name), get_args(field.type))
        check_choice("spatial_kind", self.spatial_kind, positions.SPATIAL_KINDS)
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.windows != "sheet" and (isinstance(self.windows, str) or self.windows < 1):
            sheet = "windows=sheet for one window that is the whole sheet"
            raise InputError(f"windows={self.windows}: give a number from 1 on, or {sheet}")
        if self.spatial == "weights" and (self.head_loss or self.activation_decay):
            raise InputError("spatial=weights goes neither with head_loss nor activation_decay")
        if self.spatial == "weights" and self.factor > math.sqrt(self.n_embd):
            sheet = f"a sheet of {self.n_embd} units: give a smaller one"
            raise InputError(f"factor={self.factor:g} leaves nothing of {sheet}")


def check_choice(option, value, choices):
    """Raises InputError for a value that is none of the choices."""
    if value not in choices:
        raise InputError(f"{option} must be {' or '.join(choices)}, not '{value}'")


class Output(NamedTuple):
    """What GPT.forward returns; losses are float32 scalars, None where not asked for."""

    logits: torch.Tensor | None = None  # (B, T, vocab_size) when no targets are given
    loss: torch.Tensor | None = None  # task + alpha * spatial + activation_decay * energy
    task: torch.Tensor | None = None  # mean cross-entropy, nats per token
    spatial: torch.Tensor | None = None  # spatial loss summed over the 2 n_layer sheets
    hidden: dict | None = None  # the states asked for, (B, T, n_embd) each


# ---- blocks


class PositionEmbedding(nn.Embedding):
    """GPT-2's learned positions: the only place that knows how tokens get their order.

    Generation with its cache, NeuralGPT and the check of exports follow. For rotary positions make
    it an nn.Module without weights, whose `add` returns x and whose `turn` turns.
    """

    def __init__(self, config):
        super().__init__(config.block_size, config.n_embd)

    def add(self, x, position):
        """x (B, T, C), as it enters the first block, with its positions (.., T), from 0."""
        return x + self(position)

    @staticmethod
    def turn(x, position, config):
        """Queries or keys x (B, H, T, hd) at positions (.., 1, T): left as they are."""
        return x


class Context(NamedTuple):
    """What attention knows of its tokens beside their states (B, T, C)."""

    position: torch.Tensor | None = None  # (.., T) of each token in its text; None: no order
    mask: torch.Tensor | None = None  # (.., T, K) True where it looks; None: back and at itself
    kv: torch.Tensor | None = None  # a layer's cache of keys and values (2, B, H, length, hd)
    used: int = 0  # columns of it that are filled


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
        """What queries (B, H, T, hd) read from keys and values (B, H, K, hd): (B, T, C).

        mask (.., T, K): True where a query looks, or numbers that are added to the scores.
        """
        dropout = self.dropout if self.training else 0.0
        if mask is not None and mask.size(-1) != k.size(2):
            mask = mask.expand(*mask.shape[:-1], k.size(2)).contiguous()  # CUDA's kernel wants it
        half = q.dtype in (torch.bfloat16, torch.float16)
        if q.device.type == "cpu" and half and causal and not dropout and q.size(2) <= 512:
            y = written_out_attention(q, k, v)
        else:
            width = q.size(3)
            if q.is_cuda and width % 8:  # what the kernel does itself, but compiled
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
    """Causal attention for half precision on CPUs, where torch's kernel takes 1.3 times as long."""
    T = q.size(2)
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(2, 3)).float() * k.size(3) ** -0.5
    return scores.masked_fill(later, -math.inf).softmax(-1).to(v.dtype) @ v


def remember(k, v, context):
    """Keys and values of all tokens so far: the cache's, if any, with k, v (B, H, T, hd) added."""
    if context.kv is None:
        return k, v
    end = context.used + k.size(2)
    context.kv[0, :, :, context.used : end] = k
    context.kv[1, :, :, context.used : end] = v
    return context.kv[0, :, :, :end], context.kv[1, :, :, :end]


class MLP(nn.Module):
    """Two linear layers, four times as wide between them, with a GELU.

    c_proj is the layer whose outputs lie on the sheet, here and in Attention: init_weights,
    weight_loss and convert.py know it by that name.
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
        """x (B, T, C) -> x, losses (2,) or None, the activations on both sheets or None.

        units (2, K, n): the units in each window of the two sheets, near (n, n) their closeness.
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
        """Spatial loss and energy (2,) of the activations on both sheets."""
        c = self.config
        spatial = energy = torch.zeros((), device=near.device)
        for x, sheet_units in zip(sheets, units):
            loss = positions.spatial_loss(x, sheet_units, near, c.spatial_kind, c.accum)
            spatial = spatial + loss
            if c.activation_decay:
                energy = energy + x.float().square().sum(-1).mean()
        return torch.stack([spatial, energy])

    def routed(self, n, t, expert, context, neural_causal, last):
        """One layer over [n | t]: neural rows n (B, P, C), then text t (B, T, C); returns both.

        Neural rows take the expert's weights (None: this block's), text takes this block's; norms
        are shared. context.position (.., P + T) is that of all rows, context.mask (.., T, P + T)
        the text's. No text reads the neural rows that leave the `last` layer: None there.
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
    """Cross-entropies (n,) of logits (n, V), 0 where not counted (n, 1).

    right (n, 1): the logits of the targets, a tensor of their own: torch 2.11, compiled, would look
    them up in what replaces the logits. make_probabilities: probabilities do.
    """
    top = logits.amax(1, keepdim=True).float()
    norm = (logits.float() - top).exp().sum(1, keepdim=True).log()
    # small differences first: exact far from 0
    losses = ((norm + (top - right.float())) * counted)[:, 0]
    if make_probabilities:
        norm = torch.where(counted, norm, math.inf)
        logits.copy_((logits.float() - top - norm).exp())
    return losses


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of x (N, C) @ weight.T (V, C) against targets (N,).

    The gradient is made in the forward pass, so no logits outlive their chunk of tokens.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, chunk, dtype, losses_of):
        w = weight.to(dtype)
        dx = torch.empty_like(x)
        dw = torch.zeros_like(weight, dtype=torch.float32)
        # one buffer for all chunks, and slabs of words below: fresh memory is slow on a CPU
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
            # p - 1 at the target, not rounded before the difference; p.scatter_ would copy all of a
            # bfloat16 p to float32 and back on a CPU
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
    """Mean cross-entropy (nats) of the head x @ weight.T; targets of -1 do not count.

    x (..., C), weight (V, C), targets (...). chunk: tokens at a time.
    """
    device = x.device.type
    chunk = chunk or (1024 if device == "cpu" else 4096)  # a GPU wants larger products
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
    """GPT-2 with sheets; without unit_at_cell (2 n_layer, n_embd) their layouts are random."""

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
        """GPT-2's initialisation, each tensor from (seed, its name) whatever else there is."""
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
        """The buffers of the spatial loss; unit_at_cell travels in checkpoints."""
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
        """Numbers (2 n_layer, K) of the windows of one micro-batch, the same on any device."""
        n_windows = len(self.window_cells)
        count = 1 if self.config.windows == "sheet" else self.config.windows
        return positions.draw_windows(2 * self.config.n_layer, n_windows, count, generator)

    def sheets(self, windows):
        """units (n_layer, 2, K, n) in the windows (2 n_layer, K), and their closeness (n, n)."""
        cells = self.window_cells[windows.to(self.unit_at_cell.device)]  # (2 n_layer, K, n)
        units = self.unit_at_cell.gather(1, cells.flatten(1)).view(cells.shape)
        return units.unflatten(0, (self.config.n_layer, 2)), self.near

    def weight_loss(self):
        """TopoLoss, summed over the sheets, of the linear layers whose outputs lie on them."""
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
        """Everything before the head: x (B, T, C) after the final LayerNorm, losses, states.

        losses (2,): spatial and energy. position (.., T) and mask (.., T, K), True where tokens
        look: by default 0, 1, ... and causal.
        """
        c = self.config
        T = idx.size(1)
        if c.block_size < T:
            raise InputError(f"{T} tokens do not fit block_size={c.block_size}: cut the text")
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
        """idx (B, T) int64 -> Output.

        targets (B, T), -1 where not counted: losses; without them, logits of every position.
        windows (2 n_layer, K) from draw_windows: the spatial loss, too.
        hidden: states to return, numbered as Hugging Face does (0 the embedding, i after block i,
        n_layer after the final LayerNorm), or named 'layer.N.attn' and 'layer.N.mlp' for the
        activations on a sheet.
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
        """Compile each block in place, and the head's losses; state_dict keys stay the same."""
        for block in self.transformer.h:
            block.compile(**options)
            block.routed = torch.compile(block.routed, **options)
        self.losses_of = torch.compile(token_losses, **options)

    def n_params(self):
        """Number of parameters without the position embedding (GPT-2's usual count)."""
        of_positions = sum(p.numel() for p in self.transformer.wpe.parameters())
        return sum(p.numel() for p in self.parameters()) - of_positions

    # -- generation

    def generate(self, prompts, max_new_tokens, **options):
        """Sample at temperature=1.0 (0 is greedy): B lists of new tokens. Options as in stream."""
        rows: list[list[int]] = [[] for _ in prompts]
        for tokens in self.stream(prompts, max_new_tokens, **options):
            for row, token in zip(rows, tokens):
                if token is not None:
                    row.append(token)
        return rows

    @torch.no_grad()
    def stream(self, prompts, max_new_tokens, stop=(), start=None, seed=0, **sampling):
        """Sample with a cache, yielding after each step B new tokens, None for rows that ended.

        prompts: B lists of token ids, or a tensor (B, T). stop: token ids that end a row and are
        not given out. sampling: see pick_tokens. start: reads the rows in place of _start. A row
        whose context is full goes on from its last block_size // 2 tokens.
        """
        rows = [list(map(int, row)) for row in prompts]
        if not rows or not all(rows):
            raise InputError("a prompt needs a token: begin with the end-of-text token")
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
            logits = (head @ x.T).T.float()  # for a few rows quicker on CPUs than x @ head.T
            tokens = pick_tokens(logits, generator, **sampling).tolist()
            for i, token in enumerate(tokens):
                ended[i] |= token in stop
                rows[i].append(token)
            if all(ended):
                return
            yield [None if over else token for over, token in zip(ended, tokens)]

    def _start(self, rows, length):
        """Read rows of token ids; last states (B, C), and a Cache with room for `length` tokens."""
        idx, position, real, mask = left_pad(rows, self.transformer.wte.weight.device)
        cache = Cache(self, real, length)
        x = self.trunk(idx, position=position, mask=mask, cache=cache)[0]
        return x[:, -1], cache


def pick_tokens(logits, generator, temperature=1.0, top_k=None, top_p=None):
    """Draw the next token ids (B,) from logits (B, V).

    temperature: 0 is greedy. top_k: only the k most likely. top_p: only the smallest set of at
    least this probability (nucleus).
    """
    cuts = (top_k is None or top_k > 0, top_p is None or 0 < top_p <= 1)
    if temperature < 0 or not all(cuts):
        given = f"temperature={temperature}, top_k={top_k}, top_p={top_p}"
        raise InputError(f"{given}: they must be at least 0, above 0, and above 0 up to 1")
    if temperature < 1e-6:  # smaller ones overflow
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1)))[0][:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # never the first
        logits = logits.scatter(1, order, ordered.masked_fill(beyond, -math.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def left_pad(rows, device):
    """Rows of token ids that end in the same column: idx, position, real (B, T), and mask.

    real: False for pads. mask (B, 1, T, T): where attention looks; None: causal, without pads.
    """
    width = max(len(row) for row in rows)
    lengths = torch.tensor([len(row) for row in rows])
    idx = pad_sequence([torch.tensor(row) for row in rows], True, 0, "left")
    real = torch.arange(width) >= width - lengths[:, None]
    mask = None
    if not real.all():
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        itself = torch.eye(width, dtype=torch.bool)  # a pad looks at itself: no empty softmax
        mask = ((causal & real[:, None]) | itself)[:, None].to(device)
    position = (real.cumsum(1) - 1).clamp_min(0)
    return idx.to(device), position.to(device), real.to(device), mask


class Cache:
    """Keys and values of all layers, while text is generated.

    kv (n_layer, 2, B, H, room + length, hd), of which `used` columns are filled: first `room` of a
    neural prefix, then the text's. real (B, room + T): False where text does not look. position
    (B,): of the next token.
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
        """Position (B, 1) and mask of one more token of each row."""
        position = self.position[:, None]
        self.position = self.position + 1
        self.real = F.pad(self.real, (0, 1), value=True)
        mask = None if self.real.all() else self.real[:, None, None]
        return position, mask


# ---- neural signals into tokens


@dataclass
class EncoderConfig:
    """Shape of a NeuralEncoder; travels in checkpoints as encoder_args."""

    kind: str = "transformer"  # a key of ENCODERS: linear, transformer, ...
    n_embd: int = 256  # width of the tokens that come out: the language model's
    width: int = 128  # inside
    n_layer: int = 2  # blocks of transformer, convolutions of conv
    n_head: int = 4  # transformer
    patch: int = 10  # samples per token
    tokens: str = "time"  # transformer: a patch of all electrodes, or of one ('electrode')
    virtual: int = 64  # channels into which electrodes are mixed
    degree: int = 3  # of the Fourier code of an electrode's place
    window: int = 0  # patches of a window, for a first token that reads all of it; 0: no such token
    subjects: int = 1  # each mixes the virtual channels in its own way
    dropout: float = 0.0
    reach: bool = False  # tokens='electrode': each head learns how near it looks


class PlaceCode(nn.Module):
    """Fourier series of places xyz (..., C, 3) in m, of period 0.25 m: codes (..., C, M).

    And which places are known (..., C): not nan.
    """

    def __init__(self, degree):
        super().__init__()
        waves = torch.cartesian_prod(*[torch.arange(-degree, degree + 1)] * 3)
        waves = waves[len(waves) // 2 :].float()  # one of each pair k, -k; the first is 0
        self.register_buffer("waves", 2 * math.pi / 0.25 * waves, persistent=False)  # (M / 2, 3)

    def weights(self, width):
        """A parameter (M, width) that keeps the code's variance."""
        M = 2 * len(self.waves)
        return nn.Parameter(torch.randn(M, width) * M**-0.5)

    def forward(self, xyz):
        known = xyz.isfinite().all(-1)
        angle = torch.where(known[..., None], xyz, 0.0).float() @ self.waves.T
        code = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return code * known[..., None], known


def of_subject(table, subject):
    """Rows (B, ...) of a table (subjects, ...) for numbers (B,); a stranger gets their mean."""
    known = (subject >= 0) & (subject < len(table))
    known = known.view(-1, *[1] * (table.dim() - 1))
    rows = table[subject.clamp(0, len(table) - 1)]
    return torch.where(known, rows, table.mean(0, keepdim=True))


def cut_patches(x, size):
    """(B, C, T) -> (B, C, P, size), without the samples beyond the last whole patch."""
    P = x.size(2) // size
    return x[..., : P * size].unflatten(2, (P, size))


def time_code(P, width, device):
    """Sinusoids (P, width) that tell patches of time apart."""
    frequency = 1000 ** -(torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(P, device=device)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]


class Montage(nn.Module):
    """Any electrodes into `virtual` channels, for each person in their own way.

    They are mixed by weights that are functions of their places. (B, C, T) -> (B, K, T), of unit
    variance where the electrodes have it and are independent, and a person's token (B, width).
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
        x = torch.where(known[..., None], x, 0.0)  # an absent channel may hold anything
        v = weight.transpose(-2, -1) @ x
        v = v + of_subject(self.subject_mix, subject) @ v
        return v, of_subject(self.subject_token, subject)


# A kind of encoder makes tokens (B, P, n_embd) of signals (B, C, T), one for each of P = T // patch
# patches, and the states (B, P, width) that its linear layer `output` reads. A parameter called
# subject_* belongs to people, and is left behind on transfer.
class LinearEncoder(nn.Module):
    """Nothing but a linear map of each patch of the virtual channels."""

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
    """Blocks over tokens that are a patch of time of all virtual channels."""

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
    """Blocks over tokens that are a patch of time of one electrode; the mean over electrodes.

    For who drops tokens in between: tokenize -> think, on any subset -> pool.
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
        """Tokens (B, C P, width), electrode by electrode, and which of them are there (B, C P)."""
        code, known = self.code(xyz)
        patches = cut_patches(torch.where(known[..., None], x, 0.0), self.patch)  # (B, C, P, patch)
        B, C, P, _ = patches.shape
        tokens = self.embed(patches) + (code @ self.place)[..., None, :]
        tokens = tokens + time_code(P, tokens.size(3), x.device)
        tokens = tokens + of_subject(self.subject_token, subject)[:, None, None]
        present = known.expand(B, C)[..., None].expand(B, C, P)
        return tokens.flatten(1, 2), present.flatten(1)

    def spots(self, xyz, P):
        """Where and when the tokens are: (B or 1, C P, 4), in cm and patches."""
        known = xyz.isfinite().all(-1, keepdim=True)
        place = torch.where(known, 100 * xyz, 0.0).float().view(-1, xyz.size(-2), 1, 3)
        place = place.expand(-1, -1, P, -1)
        time = torch.arange(P, device=xyz.device, dtype=torch.float32)[:, None]
        return torch.cat([place, time.expand(*place.shape[:3], 1)], dim=-1).flatten(1, 2)

    def think(self, tokens, present, spots=None):
        """The blocks, every token looking at all that are there: (B, N, width), N any subset.

        spots (B or 1, N, 4), of the same subset, with reach.
        """
        masks = [present[:, None, None]] * len(self.blocks)
        if self.reach is not None:
            masks = [near.to(tokens.dtype) for near in self.reach(spots, present)]
        for block, mask in zip(self.blocks, masks):
            tokens = block(tokens, Context(mask=mask))[0]
        return tokens

    def pool(self, h, present, P):
        """States (B, P, width): of h (B, C P, width) the mean over the electrodes of a patch."""
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
    """Gated convolutions of growing dilation over the virtual channels."""

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
    """Temporal filters, then spatial ones, after Song et al. 2024; they commute: space first."""

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
    """The blocks of an encoder, initialised as GPT-2's."""
    shape = GPTConfig(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.width, dropout=c.dropout)
    blocks = nn.ModuleList(Block(shape) for _ in range(c.n_layer))
    for name, p in blocks.named_parameters():
        if p.dim() == 2:
            projects = name.endswith("c_proj.weight")
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) if projects else 0.02)
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
    """Signals into tokens: (B, C, T) -> (B, P, n_embd), P = T // patch; one more with window.

    A channel is its place xyz in m, never its index; one without a place (nan) is absent, so
    montages of different sizes share a batch. Subjects are numbers; any other is a stranger.
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
        """x (B, C, T), xyz (C, 3) or (B, C, 3), subject (B,) -> (B, P, n_embd)."""
        c = self.config
        T = x.size(2)
        if c.patch > T:
            raise InputError(f"a signal of {T} samples is shorter than patch={c.patch}")
        if c.window and T // c.patch != c.window:
            raise InputError(f"a signal of {T // c.patch} patches, not of window={c.window}")
        tokens, states = self.net(x, xyz, subject)
        assert tokens.shape == (len(x), T // c.patch, c.n_embd), "a token for each patch"
        if self.whole is None:
            return tokens
        states = F.dropout(states.flatten(1), c.dropout, self.training)
        return torch.cat([self.whole(states)[:, None], tokens], dim=1)


class Reach(nn.Module):
    """How much less a head looks at what is farther away: numbers to add to its scores.

    -distance² / 2 reach² - |time| / span, both learned, at first from 8 to 25 mm and from 0.7 to 3
    patches over the heads.
    """

    def __init__(self, n_layer, n_head):
        super().__init__()
        place = torch.linspace(math.log(0.8), math.log(2.5), n_head)
        time = torch.linspace(math.log(0.7), math.log(3.0), n_head)
        self.place = nn.Parameter(place.repeat(n_layer, 1))
        self.time = nn.Parameter(time.repeat(n_layer, 1))

    def forward(self, spots, present):
        """spots (B, N, 4) in cm and patches, present (B, N): yields (B, H, N, N) for each layer."""
        difference = spots[:, :, None] - spots[:, None]  # (B, N, N, 4)
        distance = difference[..., :3].square().sum(-1)[:, None]  # squared, (B, 1, N, N)
        delay = difference[..., 3].abs()[:, None]
        for place, time in zip(self.place, self.time):
            near = -distance * (-2 * place).exp()[:, None, None] / 2
            near = near - delay * (-time).exp()[:, None, None]
            yield near.masked_fill(~present[:, None, None], -1e4)  # float16 has it, too


def load_matching(module, state, threshold=0.5, path="checkpoint"):
    """Load what fits of a state dict; its share of the module's numbers, and what is left."""
    weights = module.state_dict()
    shapes = {name: value.shape for name, value in weights.items()}
    fitting = {name: value for name, value in state.items() if shapes.get(name) == value.shape}
    n_weights = sum(value.numel() for value in weights.values())
    share = sum(value.numel() for value in fitting.values()) / n_weights
    if share < threshold:
        raise InputError(f"{path} fits only {share:.1%} of the encoder, not {threshold:.0%}")
    module.load_state_dict(fitting, strict=False)
    return share, sorted(set(weights) - set(fitting))


def load_encoder(spec):
    """(NeuralEncoder in evaluation mode, recipe) of a run folder or checkpoint of foundation.py.

    The recipe says how to feed it (data/recording.py takes it): window (s), subjects (a person's
    number is the place in the list, -1 for anybody else), recordings (what it was trained on:
    dataset, name, subject, channels, xyz, centre, scale, and `seen`, the span of time in s).
    """
    path = Path(spec)
    if path.suffix != ".pt":
        path = path / "best.pt"
    if not path.exists():
        raise InputError(f"no pretrained encoder at {spec}: make one with python foundation.py")
    state = load_checkpoint(path)
    if state.get("kind") != "foundation":
        raise InputError(f"{path} holds a '{state.get('kind')}', no foundation model")
    encoder = NeuralEncoder(EncoderConfig(**state["encoder_args"]))
    own = [name for name in state["model"] if name.startswith("encoder.")]
    encoder.load_state_dict({name.removeprefix("encoder."): state["model"][name] for name in own})
    return encoder.eval(), state["recording"]


# ---- a language model that reads neural tokens


class Expert(nn.Module):
    """A layer's own weights for neural rows (CogVLM): copies of the block's; norms stay shared.

    In the last layer only its keys and values are read.
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
    """Gated cross-attention from text to neural tokens (Flamingo); the gate is shut at first."""

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
        """Keys and values (2, B, H, P, hd) of neural tokens (B, P, C)."""
        return self.kv(self.ln_n(n)).unflatten(2, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x, keys):
        """What is added to the text x (B, T, C)."""
        q = self.q(self.ln(x)).unflatten(2, (self.n_head, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, keys[0], keys[1])
        return self.gate.tanh() * self.c_proj(y.transpose(1, 2).flatten(2))


class NeuralGPT(nn.Module):
    """A GPT that reads neural signals: [BON, n_1 .. n_P, EON | text].

    BON and the encoder's tokens n take the experts, EON and text the language model's weights.
    fusion: 'prefix' (the language model's weights for all), 'expert' (experts in the last `layers`
    layers, 0: in each) or 'cross' (no prefix: text looks at n by gated cross-attention).
    text_positions: 'zero' (text begins at position 0, the prefix has the encoder's code of time) or
    'after_prefix' (positions run over both). attention among neural rows: 'causal', 'full', or
    'blocked' (causal, and text does not see them).
    """

    def __init__(
        self, lm, encoder, fusion="expert", layers=0, text_positions="zero", attention="causal"
    ):
        super().__init__()
        n_layer = lm.config.n_layer
        if not 0 <= layers <= n_layer:
            raise InputError(f"{layers} layers with experts, the language model has {n_layer}")
        width = lm.config.n_embd
        if encoder.config.n_embd != width:
            raise InputError(f"tokens {encoder.config.n_embd} wide, a language model {width} wide")
        self.lm = lm
        self.encoder = encoder
        self.fusion = fusion
        self.text_positions = text_positions
        self.attention = attention
        self.args = {"fusion": fusion, "layers": layers}  # what builds it again
        self.args |= {"text_positions": text_positions, "attention": attention}
        self.first = n_layer - (layers or n_layer)  # layer with an expert or cross-attention
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
        """Let neural tokens begin around the mean of the token embedding, with its spread."""
        wte = self.lm.transformer.wte.weight
        for layer in (self.encoder.net.output, self.encoder.whole):
            if layer is not None:
                spread = layer.weight.std() * layer.weight.size(1) ** 0.5
                layer.weight.mul_(wte.std() / spread)
                layer.bias.copy_(wte.mean(0))

    def prefix(self, signal, xyz, subject):
        """Neural tokens (B, P, C) of signals (B, channels, T)."""
        return self.encoder(signal, xyz, subject)

    def forward(self, signal, xyz, subject, idx, position=None, mask=None, start=0):
        """Logits (B, T - start, vocab) of ids (B, T) from column `start` on, and neural tokens."""
        n = self.prefix(signal, xyz, subject)
        x = self.trunk(n, idx, position, mask)[:, start:]
        return F.linear(x, self.lm.transformer.wte.weight), n

    def trunk(self, n, idx, position=None, mask=None, cache=None, states=None):
        """Text states (B, T, C) after the final LayerNorm, of neural tokens (B, P, C) and ids.

        position and mask as in GPT.trunk. states: a list to which every layer's input (neural
        rows, EON and text) is appended.
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
        """{layer: (Cross, its keys and values of n)}"""
        return {i: (cross, cross.keys(n)) for i, cross in enumerate(self.crosses or (), self.first)}

    def _rows(self, n, idx, position, mask):
        """Neural rows [BON, n], text rows [EON, text], and the Context of both."""
        B, P, _ = n.shape
        T = idx.size(1)
        wpe = self.lm.transformer.wpe
        n = torch.cat([self.bon.expand(B, 1, -1), n], dim=1)
        eon = self.eon.expand(B, 1, -1)
        before = torch.zeros(P + 2, dtype=torch.long, device=n.device)  # positions of what precedes
        if self.text_positions == "after_prefix":
            before = torch.arange(P + 2, device=n.device)
            position = position + P + 2
            n = wpe.add(n, before[:-1])
            eon = wpe.add(eon, before[-1:])
        text = wpe.add(self.lm.transformer.wte(idx), position)
        if mask is None:
            mask = torch.ones(T, T, dtype=torch.bool, device=n.device).tril()
        mask = F.pad(mask, (0, 0, 1, 0), value=False)  # a row for EON
        mask = F.pad(mask, (1, 0), value=True)  # and a column
        mask = F.pad(mask, (P + 1, 0), value=self.attention != "blocked")  # columns of neural rows
        position = torch.cat([before.expand(*position.shape[:-1], -1), position], dim=-1)
        return n, torch.cat([eon, text], dim=1), Context(position, mask)

    def check_length(self, P, T, text="the text"):
        """Raises InputError where a prefix of P and T tokens of `text` have no positions."""
        size = self.lm.config.block_size
        remedy = f"shorten {text}"
        if self.text_positions == "after_prefix" and self.fusion != "cross":
            T += P + 2
            remedy += ", take longer patches, or text_positions=zero"
        if size < T:
            raise InputError(f"{T} tokens in all do not fit block_size={size}: {remedy}")

    @torch.no_grad()
    def generate(self, n, prompt, max_new_tokens, **options):
        """Sample at temperature=1.0 (0 is greedy) new tokens behind neural tokens n (B, P, C).

        prompt: token ids, or B lists of them. options as in GPT.stream.
        """
        prompts = prompt if isinstance(prompt[0], (list, tuple)) else [prompt] * len(n)
        self.check_length(n.size(1), max(map(len, prompts)) + max_new_tokens)
        start = partial(self._start, n)
        return self.lm.generate(prompts, max_new_tokens, start=start, **options)

    def _start(self, n, rows, length):
        """As GPT._start, behind the neural tokens n."""
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
    """Write plain types and tensors aside, flushed, renamed: a kill leaves the old or the new."""
    try:
        with aside(path) as file:
            torch.save({"format": "nanocortex", "version": VERSION, **state}, file)
            file.flush()
            others = torch.serialization.get_unsafe_globals_in_checkpoint(file.name)
            if others:
                raise TypeError(f"a checkpoint holds plain types and tensors only, not {others}")
    except (OSError, RuntimeError) as error:  # torch's writer has an error of its own
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        reason = getattr(cause, "strerror", error)
        remedy = "make room, then go on with init_from=resume"
        raise InputError(f"{path} could not be written ({reason}): {remedy}") from None


def load_checkpoint(path, adopt=None):
    """A checkpoint of ours as a dict on the CPU. Raises InputError where it is none.

    adopt(state, path) makes such a dict of what another code wrote; without it that is refused.
    """
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        remedy = "train one with python train.py, or leave init_from=resume out"
        raise InputError(f"no checkpoint {path}: {remedy}")
    check_content(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file raises nearly anything
        reason = type(error).__name__
        raise InputError(f"{path} is no checkpoint ({reason}): it is torn or not ours") from None
    if adopt and isinstance(state, dict) and "format" not in state:
        return adopt(state, path)
    if not isinstance(state, dict) or state.get("format") != "nanocortex":
        raise InputError(f"{path} is of another code and cannot be resumed: give it as lm=")
    if state["version"] > VERSION:
        raise InputError(f"{path} has version {state['version']}, newer than this code: update it")
    return patch_checkpoint(state)


def patch_checkpoint(state):
    """The one place where checkpoints of older versions are brought up to date."""
    if state["version"] == 1 and "encoder_args" in state:
        state["model"] = _rename_encoder(state["model"], EncoderConfig(**state["encoder_args"]))
    for key in {"model_args", "lm_args"} & state.keys():
        args = {**asdict(GPTConfig()), **state[key]}
        if args["windows"] == 0:  # version 1: every window
            args["windows"] = args["n_embd"]
        state[key] = args
    state["version"] = VERSION
    return state


def _rename_encoder(weights, config):
    """Version 1 had all kinds of encoder in one class."""
    of_montage = ("place", "subject_mix", "subject_token")
    by_electrode = config.kind == "transformer" and config.tokens == "electrode"
    renamed = {}
    for name, value in weights.items():
        if name.startswith("encoder.") and not name.startswith("encoder.whole."):
            first, dot, rest = name.removeprefix("encoder.").partition(".")
            if first == "out" or (first == "embed" and config.kind == "linear"):
                first = "output"
            if first in of_montage and not by_electrode:
                first = f"montage.{first}"
            name = f"encoder.net.{first}{dot}{rest}"
        renamed[name] = value
    return renamed


def lm_state(model):
    """What builds a language model again."""
    return {"kind": "lm", "model_args": asdict(model.config), "model": model.state_dict()}


def lm_from(state, path="checkpoint", **options):
    """GPT from a checkpoint's dict; options set fields of GPTConfig that are not of the weights."""
    if state.get("kind") != "lm":
        kind = state.get("kind")
        raise InputError(f"{path} holds a '{kind}', no language model: give one of train.py")
    args = {**state["model_args"], **options}
    for key in args.keys() - asdict(GPTConfig()).keys():
        raise InputError(f"{path} has the option '{key}', which this GPTConfig lacks")
    weights = state["model"]
    model = GPT(GPTConfig(**args), weights.get("unit_at_cell"))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    for name in missing + unexpected:
        if name != "unit_at_cell":  # sheets are given or left as the options say
            problem = "lacks" if name in missing else "has besides"
            raise InputError(f"{path} {problem} the weights '{name}': it is of no such GPT as ours")
    return model
