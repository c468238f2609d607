"""The language model against naive oracles, and its checkpoints."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import input_error
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import positions
from data import InputError
from model import (
    GPT,
    EncoderConfig,
    GPTConfig,
    NeuralEncoder,
    NeuralGPT,
    PositionEmbedding,
    cross_entropy,
    lm_from,
    lm_state,
    load_checkpoint,
    pick_tokens,
    save_checkpoint,
    written_out_attention,
)

SMALL = {"block_size": 32, "vocab_size": 100, "n_layer": 2, "n_head": 4, "n_embd": 64}


def shaken(module, seed=0, std=0.05):
    """Every weight, biases and norms too, random and large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return module.eval()


def small(**options):
    return shaken(GPT(GPTConfig(**{**SMALL, **options})))


def ids(*shape, high=100, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


# ---- the head


@pytest.mark.parametrize("chunk", [7, 1000])
def test_chunked_cross_entropy_is_cross_entropy(chunk):
    x = torch.randn(50, 16, requires_grad=True)
    w = torch.randn(30, 16, requires_grad=True)
    y = ids(50, high=30)
    y[:5] = -1
    plain = F.cross_entropy(x @ w.T, y, ignore_index=-1)
    loss = cross_entropy(x, w, y, chunk)
    assert torch.allclose(loss, plain, atol=1e-6)
    expected = torch.autograd.grad(3 * plain, (x, w))
    grads = torch.autograd.grad(3 * loss, (x, w))
    for grad, right in zip(grads, expected):
        assert torch.allclose(grad, right, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(cross_entropy(x, w, y, chunk), plain, atol=1e-6)
    assert cross_entropy(x, w, torch.full_like(y, -1)).item() == 0  # nothing counts
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(cross_entropy(x, w, y, chunk).item() - plain.item()) < 0.05


def test_the_head_far_from_zero_and_in_half_precision():
    torch.manual_seed(0)
    x = torch.randn(100, 16)
    w = torch.randn(300, 16)
    y = ids(100, high=300)
    x[:, 0] = 1
    w[:, 0] = 1000  # the same for every word: no difference but to rounding
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    cross_entropy(x, w, y).backward()
    F.cross_entropy(exact @ w.double().T, y).backward()
    assert (x.grad - exact.grad).norm() < 1e-3 * exact.grad.norm()

    x = torch.randn(300, 16)
    w = torch.randn(2500, 16)  # several slabs of words
    y = (x @ w.T).argmax(1)  # nearly sure of the word: what is left is a small difference
    x = x.bfloat16().requires_grad_()
    w = w.bfloat16().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(cross_entropy(x, w, y, 128), (x, w))
    logits = (x @ w.bfloat16().T).float()  # rounded the same way
    expected = torch.autograd.grad(F.cross_entropy(logits, y), (x, w))
    for grad, right in zip(grads, expected):
        assert (grad.float() - right.float()).norm() < 0.01 * right.float().norm()


# ---- sheets


@pytest.mark.parametrize("tap", ["sublayer", "residual"])
@pytest.mark.parametrize("windows", [3, "sheet"])
def test_spatial_loss_is_that_of_the_taps(tap, windows):
    options = {"alpha": 0.5, "activation_decay": 0.01, "tap": tap, "windows": windows}
    model = small(sheet=True, radius=2, **options)
    idx = ids(4, 16)
    targets = ids(4, 16, seed=1)
    drawn = model.draw_windows(torch.Generator().manual_seed(0))
    assert drawn.shape == (4, 1 if windows == "sheet" else 3)
    names = positions.layer_names(2)
    out = model(idx, targets, drawn, hidden=names)
    all_cells = torch.arange(64)[None]
    if windows != "sheet":
        all_cells = torch.tensor(positions.window_cells(8, 2))
    near = torch.tensor(positions.closeness(all_cells[0], 8)).float()
    spatial = 0
    energy = 0
    for i, name in enumerate(names):
        units = model.unit_at_cell[i][all_cells[drawn[i]]]
        spatial += positions.spatial_loss(out.hidden[name], units, near)
        energy += out.hidden[name].square().sum(-1).mean()
    assert torch.allclose(out.spatial, spatial, atol=1e-6)
    assert torch.allclose(out.loss, out.task + 0.5 * spatial + 0.01 * energy, atol=1e-5)
    if tap == "residual":
        states = model(idx, hidden=[1, "layer.0.mlp"]).hidden
        assert torch.equal(states[1], states["layer.0.mlp"])
    plain = model(idx, targets)
    assert plain.spatial is None and plain.loss == plain.task


def test_taps_sheets_head_mosaic_and_projection():
    model = small(sheet=True, radius=2)
    idx = ids(2, 16)
    logits = model(idx).logits
    assert torch.equal(logits, model(idx, hidden=["layer.1.attn"]).logits)
    assert torch.equal(logits, small()(idx).logits)
    model = small(sheet=True, radius=2, head_loss=True)
    assert "transformer.h.0.attn.c_proj.weight" not in model.state_dict()
    assert np.array_equal(model.unit_at_cell[0], positions.head_mosaic(4, 64))
    assert not torch.equal(model.unit_at_cell[1], model.unit_at_cell[3])
    assert small(head_loss=True, attn_proj=True)(ids(1, 4)).logits.shape == (1, 4, 100)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"n_embd": 60, "sheet": True}, "not a square"),
        ({"n_head": 5}, "divisible"),
        ({"sheet": True, "radius": 5}, "radius=5"),
        ({"sheet": True, "radius": 2, "head_loss": True, "n_head": 2}, "square number of heads"),
        ({"tap": "middle"}, "tap must be sublayer or residual, not 'middle'"),
        ({"gelu": "relu"}, "gelu"),
        ({"windows": 0}, "windows=0: give at least 1, or windows=sheet"),
        ({"windows": "all"}, "windows=all"),
        ({"spatial": "weights", "activation_decay": 0.1}, "spatial=weights"),
    ],
)
def test_shapes_that_do_not_fit(options, words):
    input_error(words, GPT, GPTConfig(**{**SMALL, **options}))


def test_init_depends_on_the_seed_and_name_alone():
    a = GPT(GPTConfig(**SMALL))
    b = GPT(GPTConfig(**SMALL, sheet=True, radius=2, alpha=1.0))
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert abs(a.transformer.h[0].mlp.c_proj.weight.std().item() - 0.02 / math.sqrt(4)) < 1e-3
    other = GPT(GPTConfig(**SMALL), seed=1)
    assert not torch.equal(other.transformer.wte.weight, a.transformer.wte.weight)


def test_layers_share_one_compiled_graph():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    options = {"sheet": True, "radius": 2, "windows": 2, "alpha": 1.0, "n_layer": 3}
    eager = small(**options)
    compiled = small(**options)
    counter = CompileCounter()
    compiled.compile_blocks(backend=counter)
    idx = ids(2, 16)
    targets = ids(2, 16, seed=1)
    for step in range(3):  # other windows, same graph
        windows = eager.draw_windows(torch.Generator().manual_seed(step))
        loss = compiled(idx, targets, windows).loss
        assert torch.allclose(loss, eager(idx, targets, windows).loss, atol=1e-5)
    assert counter.frame_count == 2  # one of all blocks, one of the head's losses
    assert list(compiled.state_dict()) == list(eager.state_dict())


# ---- generation


def naive(model, prompt, n, size=32):
    """Greedy generation with a full forward per token, and the rule at block_size."""
    context = list(prompt)
    new = []
    for _ in range(n):
        if len(context) > size:
            context = context[-(size // 2) :]
        new.append(int(model(torch.tensor([context])).logits[0, -1].argmax()))
        context.append(new[-1])
    return new


@torch.no_grad()
def test_cached_generation_is_uncached_generation():
    model = small()
    prompts = [[1, 2, 3], [5], list(range(31)), list(range(40)), list(range(32))]
    expected = [naive(model, prompt, 45) for prompt in prompts]
    assert model.generate(prompts, 45, temperature=0) == expected  # ragged, across block_size
    for prompt, row in zip(prompts, expected):
        assert model.generate([prompt], 45, temperature=0) == [row]  # and alone
    stop = expected[0][3]
    until = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert model.generate(prompts, 45, temperature=0, stop=[stop]) == until
    half = small().to(torch.bfloat16)  # the cache has the weights' precision
    assert half.generate([[1, 2]], 3, temperature=0)[0] == naive(half, [1, 2], 3)


def test_sampling():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(20000, 1)
    generator = torch.Generator().manual_seed(0)
    for options, allowed in (
        ({"top_k": 2}, [2, 3]),
        ({"top_p": 0.6}, [3]),
        ({"top_p": 0.7}, [2, 3]),
        ({}, [0, 1, 2, 3]),
    ):
        drawn = pick_tokens(logits, generator, **options)
        share = torch.bincount(drawn, minlength=4) / len(drawn)
        assert torch.allclose(share[allowed], logits[0, allowed].softmax(0), atol=0.02)
        assert abs(share[allowed].sum() - 1) < 1e-6
    model = small()
    texts = [model.generate([[1]], 20, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    for bad in ({"prompts": [[]]}, {"temperature": -1}, {"top_p": 0}, {"top_k": 0}):
        with pytest.raises(InputError):
            model.generate(**{"prompts": [[1]], "max_new_tokens": 2, **bad})
    input_error("block_size=32", model, ids(1, 33))


def test_rotary_positions_touch_one_class(monkeypatch):
    """GPT and NeuralGPT, cached or not: all of them get their order from PositionEmbedding."""

    def turn(x, position, config):
        """x (B, H, T, hd), its halves turned by an angle that grows with position (.., 1, T)."""
        a, b = x.chunk(2, -1)
        frequency = 100 ** -torch.linspace(0, 1, a.size(-1))
        angle = position[..., None] * frequency
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    monkeypatch.setattr(PositionEmbedding, "add", lambda self, x, position: x)
    monkeypatch.setattr(PositionEmbedding, "turn", staticmethod(turn))
    model = small()
    with torch.no_grad():
        idx = ids(1, 20)
        shifted = model.trunk(idx, position=torch.arange(20) + 7)[0]
        assert torch.allclose(shifted, model.trunk(idx)[0], atol=1e-5)  # rotary is relative
        assert not torch.allclose(model(idx[:, [1, 0, 2]]).logits[:, 2], model(idx).logits[:, 2])
        prompts = [[1, 2, 3], [5], list(range(20))]
        expected = [naive(model, prompt, 12) for prompt in prompts]
        assert model.generate(prompts, 12, temperature=0) == expected
        encoder = EncoderConfig(n_embd=64, width=16, n_head=2, patch=5, virtual=8)
        for order in ("zero", "after_prefix"):
            neural = NeuralGPT(model, NeuralEncoder(encoder), "prefix", text_positions=order)
            n = torch.randn(1, 3, 64)
            row = [1, 2]
            for _ in range(6):
                x = neural.trunk(n, torch.tensor([row]))[:, -1]
                row.append((x @ model.transformer.wte.weight.T).argmax().item())
            assert neural.generate(n, [1, 2], 6, temperature=0) == [row[2:]]


# ---- precision


def test_attention_in_half_precision_is_that_of_float32():
    model = small()
    idx = ids(2, 24)
    exact = model(idx).logits
    with torch.autocast("cpu", torch.bfloat16):
        half = model(idx).logits
    assert (half.float() - exact).norm() < 0.02 * exact.norm()
    q, k, v = torch.randn(3, 2, 4, 24, 16).bfloat16()
    y = written_out_attention(q, k, v).float()
    oracle = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert (y - oracle).norm() < 0.01 * oracle.norm()


class SixteenBit(TorchDispatchMode):
    """Remembers every operation that takes or gives a 16-bit float."""

    def __init__(self):
        super().__init__()
        self.operations = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if torch.is_tensor(value) and value.dtype in (torch.bfloat16, torch.float16):
                self.operations.add(str(function))
        return out


def test_float32_forward_and_generation_touch_no_16_bit_tensor():
    """A CPU without bfloat16 emulates it, a hundred times as slow."""
    model = small(sheet=True, radius=2)
    with SixteenBit() as mode:
        windows = model.draw_windows(torch.Generator().manual_seed(0))
        model(ids(2, 8), hidden=[0, 2, "layer.1.mlp"])
        model(ids(2, 8), ids(2, 8), windows).loss.backward()
        model.generate([[1, 2], [3]], 4, temperature=0.8, top_k=5)
    assert not mode.operations
    with SixteenBit() as mode, torch.autocast("cpu", torch.bfloat16):
        model(ids(2, 8))
    assert mode.operations  # the test can fail


# ---- checkpoints


def test_checkpoints_round_trip(tmp_path):
    model = small(sheet=True, radius=2, windows="sheet")
    save_checkpoint(tmp_path / "best.pt", {**lm_state(model), "cursor": [1, 2.5, None, "x"]})
    state = load_checkpoint(tmp_path / "best.pt")
    again = lm_from(state)
    assert again.config == model.config and state["cursor"] == [1, 2.5, None, "x"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert lm_from(state, alpha=2.0, dropout=0.5).config.alpha == 2.0
    without = lm_from(state, sheet=False)
    assert torch.equal(without(ids(1, 5)).logits, lm_from(state)(ids(1, 5)).logits)


def test_checkpoints_of_an_older_gptconfig(tmp_path):
    """Absent options take their defaults; every window, which was windows=0, stays every window."""
    state = lm_state(small(sheet=True, radius=2))
    for name in ("spatial", "factor", "attn_proj"):
        del state["model_args"][name]
    state["model_args"]["windows"] = 0
    torch.save({"format": "nanocortex", "version": 1, **state}, tmp_path / "old.pt")
    state = load_checkpoint(tmp_path / "old.pt")
    assert state["model_args"]["factor"] == 3.0
    model = lm_from(state)
    windows = model.draw_windows(torch.Generator().manual_seed(0))
    assert torch.equal(windows, torch.arange(49).repeat(4, 1)) == (len(model.window_cells) == 49)
    state["model_args"]["rotary"] = True
    sentence = "x.pt has the option 'rotary', which GPTConfig lacks"
    input_error(sentence, lm_from, state, "x.pt")


def test_checkpoints_that_are_refused(tmp_path):
    path = tmp_path / "best.pt"
    state = lm_state(small())
    save_checkpoint(path, state)
    whole = path.read_bytes()
    for bad in ({"config": GPTConfig()}, {"n": [np.float64(1)]}, {"out": tmp_path}):
        with pytest.raises(TypeError, match="plain types"):
            save_checkpoint(path, bad)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for content, words in (
        (whole[: len(whole) // 2], "best.pt .*damaged"),
        (b"", "best.pt .*damaged"),
        (pickle.dumps(print), "best.pt .*not ours"),
        (pointer, "best.pt .*a pointer whose content is missing"),
        ({"model": {}, "model_args": {}}, "do not resume it"),
        ({"format": "nanocortex", "version": 99}, "newer than this code"),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        input_error(words, load_checkpoint, path)
    input_error("no checkpoint .*none.pt", load_checkpoint, tmp_path / "none.pt")
    more = {**state["model"], "lm_head.bias": torch.zeros(1)}
    fewer = copy.copy(state["model"])
    del fewer["transformer.wpe.weight"]
    for bad, words in (
        ({**state, "model": fewer}, "lacks weights 'transformer.wpe.weight'"),
        ({**state, "model": more}, "has extra weights 'lm_head.bias'"),
    ):
        input_error(words, lm_from, bad)
