"""NeuralEncoder and NeuralGPT: neural rows and text in one sequence, against naive oracles."""

import copy
import itertools
from functools import partial

import pytest
import torch
from test_model import ids as any_ids
from test_model import shaken
from torch.nn import functional as F

from data import InputError
from model import (
    GPT,
    EncoderConfig,
    GPTConfig,
    NeuralEncoder,
    NeuralGPT,
    load_checkpoint,
    load_encoder,
    load_matching,
    save_checkpoint,
)

KINDS = [
    {"kind": "linear"},
    {"kind": "transformer"},
    {"kind": "transformer", "tokens": "electrode"},
    {"kind": "transformer", "tokens": "electrode", "reach": True},
    {"kind": "conv"},
    {"kind": "tsconv"},
]
ids = partial(any_ids, high=50)
ORDERS = ["zero", "after_prefix"]
LOOKS = ["causal", "full", "blocked"]


def a_gpt(**options):
    shape = {"block_size": 48, "vocab_size": 50, "n_layer": 3, "n_head": 4, "n_embd": 32}
    return shaken(GPT(GPTConfig(**{**shape, **options})))


def an_encoder(**options):
    torch.manual_seed(0)
    shape = {"n_embd": 32, "width": 16, "n_head": 2, "patch": 5, "virtual": 8, "subjects": 2}
    return shaken(NeuralEncoder(EncoderConfig(**{**shape, **options})), 1)


def a_model(fusion="expert", layers=0, order="zero", attention="causal", shake=True):
    model = NeuralGPT(a_gpt(), an_encoder(), fusion, layers, order, attention)
    for part in (model.experts, model.crosses):
        if part is not None and shake:
            shaken(part, 2, 0.1)
    return model.eval()


def brain(B=3, C=6, T=20):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, C, T, generator=generator)
    xyz = torch.randn(C, 3, generator=generator) * 0.06
    return x, xyz, torch.arange(B) % 3 - 1


def logits_of(model, x):
    return F.linear(x, model.lm.transformer.wte.weight)


# ---- the encoder


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_electrodes_are_places(options):
    encoder = an_encoder(**options)
    x, xyz, subject = brain()
    y = encoder(x, xyz, subject)
    assert y.shape == (3, 4, 32)
    order = torch.randperm(6)
    assert torch.allclose(encoder(x[:, order], xyz[order], subject), y, atol=1e-5)
    assert torch.allclose(encoder(x, xyz.expand(3, -1, -1), subject), y, atol=1e-5)
    absent = torch.full((3, 2, 20), torch.nan)  # channels without places, whatever they hold
    more = torch.cat([x, absent], 1), torch.cat([xyz, torch.full((2, 3), torch.nan)])
    assert torch.allclose(encoder(*more, subject), y, atol=1e-5)
    assert (encoder(x, xyz + 0.02, subject) - y).abs().max() > 1e-3
    assert encoder(x[:, :2], xyz[:2], subject).shape == y.shape
    assert encoder(torch.cat([x, x], 2), xyz, subject).shape == (3, 8, 32)
    with pytest.raises(InputError, match="4 samples is shorter than patch=5"):
        encoder(x[..., :4], xyz, subject)
    encoder(x, torch.full((6, 3), torch.nan), subject).square().sum().backward()  # nobody there
    for name, p in encoder.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name
    encoder = an_encoder(window=4, **options)  # a first token of the whole window
    assert encoder(x, xyz, subject).shape == (3, 5, 32)
    with pytest.raises(InputError, match="3 patches.*window=4"):
        encoder(x[..., :15], xyz, subject)


def test_subjects_and_strangers():
    encoder = an_encoder(kind="linear")
    x, xyz, _ = brain(1)
    first, second, stranger, beyond = (
        encoder(x, xyz, torch.tensor([number])) for number in (0, 1, -1, 7)
    )
    assert (first - second).abs().max() > 1e-2
    assert torch.allclose(stranger, (first + second) / 2, atol=1e-5)  # exact where all is linear
    assert torch.equal(stranger, beyond)


def test_tokens_can_be_left_out_before_the_blocks():
    encoder = an_encoder(tokens="electrode").net
    x, xyz, subject = brain()
    tokens, present = encoder.tokenize(x, xyz, subject)
    assert tokens.shape == (3, 6 * 4, 16) and present.all()
    _, expected = encoder(x[:, 2:], xyz[2:], subject)
    h = encoder.think(tokens[:, 8:], present[:, 8:])  # without two electrodes
    assert torch.allclose(encoder.pool(h, present[:, 8:], 4), expected, atol=1e-5)
    present[:, :8] = False  # or masked instead of taken out
    h = encoder.think(tokens, present)
    assert torch.allclose(encoder.pool(h, present, 4), expected, atol=1e-5)


def test_pretrained_weights_must_fit():
    pretrained = an_encoder().state_dict()
    encoder = an_encoder(subjects=5)
    share, new = load_matching(encoder, pretrained, 0.5)
    assert 0.5 < share < 1
    assert new == ["net.montage.subject_mix", "net.montage.subject_token"]
    assert torch.equal(encoder.net.montage.place, pretrained["net.montage.place"])
    prefixed = {f"module.{name}": value for name, value in pretrained.items()}
    with pytest.raises(InputError, match=r"x\.pt fits only 0\.0%"):
        load_matching(an_encoder(), prefixed, 0.5, "x.pt")


def test_load_encoder(tmp_path):
    encoder = an_encoder(tokens="electrode", reach=True)
    weights = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    state = {"kind": "foundation", "encoder_args": vars(encoder.config), "recording": {"window": 2}}
    save_checkpoint(tmp_path / "best.pt", {**state, "model": {**weights, "time": torch.zeros(2)}})
    again, recipe = load_encoder(tmp_path)
    assert torch.equal(again(*brain()), encoder(*brain())) and recipe == {"window": 2}
    with pytest.raises(InputError, match="no pretrained encoder at nowhere"):
        load_encoder("nowhere")
    save_checkpoint(tmp_path / "best.pt", {"kind": "lm"})
    with pytest.raises(InputError, match="holds a 'lm', not a model of foundation.py"):
        load_encoder(tmp_path / "best.pt")


# ---- routing


def concatenation(model, n, idx):
    """[BON, n, EON | text] as embeddings, and how many rows are the expert's."""
    wte = model.lm.transformer.wte
    wpe = model.lm.transformer.wpe
    B, P, _ = n.shape
    x = torch.cat([model.bon.expand(B, 1, -1), n, model.eon.expand(B, 1, -1), wte(idx)], 1)
    if model.text_positions == "after_prefix":
        x = x + wpe.weight[: x.size(1)]
    else:
        x[:, P + 2 :] += wpe.weight[: idx.size(1)]
    return x, P + 1


LAYERS = [("prefix", 0), ("expert", 0), ("expert", 2)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("attention", LOOKS)
@pytest.mark.parametrize("fusion, layers", LAYERS)
def test_two_streams_are_the_choice_by_a_boolean_mask(fusion, layers, order, attention):
    model = a_model(fusion, layers, order, attention)
    idx = ids(3, 6)
    logits, n = model(*brain(), idx)
    h, n_neural = concatenation(model, n, idx)
    T = h.size(1)
    neural = torch.arange(T) < n_neural
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    if attention == "full":
        mask |= neural[:, None] & neural
    if attention == "blocked":
        mask &= neural[:, None] == neural
    for i, block in enumerate(model.lm.transformer.h):  # every row through both
        has_expert = fusion == "expert" and i >= model.first
        expert = model.experts[i - model.first] if has_expert else block
        last = i == 2

        def choose(of_expert, of_core):
            return torch.where(neural[:, None], of_expert, of_core)

        x = block.ln_1(h)
        qkv = choose(expert.attn.c_attn(x), block.attn.c_attn(x)).view(3, T, 3, 4, 8)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.transpose(1, 2).reshape(3, T, 32)
        of_core = block.attn.c_proj(y)  # the last layer's expert has no more than c_attn
        h = h + (of_core if last else choose(expert.attn.c_proj(y), of_core))
        x = block.ln_2(h)
        h = h + (block.mlp(x) if last else choose(expert.mlp(x), block.mlp(x)))
    assert torch.allclose(logits, logits_of(model, model.lm.transformer.ln_f(h))[:, -6:], atol=1e-5)


@pytest.mark.parametrize("fusion", ["prefix", "expert", "cross"])
def test_what_is_frozen_stays_to_the_bit(fusion):
    model = a_model(fusion)
    idx = ids(3, 6)
    before = model.lm(idx).logits
    weights = copy.deepcopy(model.lm.state_dict())
    model.lm.requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.1)
    F.cross_entropy(model(*brain(), idx)[0].flatten(0, 1), idx.flatten()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)
    optimizer.step()
    assert all(torch.equal(value, weights[name]) for name, value in model.lm.state_dict().items())
    assert torch.equal(model.lm(idx).logits, before)


def test_a_shut_gate_is_the_plain_gpt():
    model = a_model("cross", shake=False)
    idx = ids(3, 6)
    assert torch.equal(model(*brain(), idx)[0], model.lm(idx).logits)
    with torch.no_grad():
        model.crosses[1].gate.fill_(0.5)
    assert not torch.equal(model(*brain(), idx)[0], model.lm(idx).logits)


@pytest.mark.parametrize("fusion", ["expert", "cross"])
def test_one_graph(fusion):
    torch._dynamo.reset()
    model = NeuralGPT(a_gpt(n_layer=2), an_encoder(), fusion).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # raises at a graph break
    logits = model(*brain(), ids(3, 6))[0]
    assert torch.allclose(compiled(*brain(), ids(3, 6))[0], logits, atol=1e-5)


def test_one_graph_a_block():
    torch._dynamo.reset()
    model = NeuralGPT(a_gpt(n_layer=1), an_encoder(), "expert").eval()
    logits = model(*brain(), ids(3, 6))[0]
    n = model.prefix(*brain())
    text = model.generate(n, [1], 3, temperature=0)
    model.lm.compile_blocks(backend="eager")
    assert torch.allclose(model(*brain(), ids(3, 6))[0], logits, atol=1e-5)
    assert model.generate(n, [1], 3, temperature=0) == text


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="layers=4, but the language model has only 3"):
        a_model(layers=4)
    with pytest.raises(InputError, match="n_embd=32, the language model 16"):
        NeuralGPT(a_gpt(n_embd=16), an_encoder())
    with pytest.raises(InputError, match="63 tokens in all do not fit.*text_positions=zero"):
        a_model(order="after_prefix").generate(torch.zeros(1, 40, 32), [1], 20)


# ---- generation

WAYS = [("cross", "zero", "causal")]
WAYS += itertools.product(["prefix", "expert"], ORDERS, LOOKS)


@pytest.mark.parametrize("fusion, order, attention", WAYS)
@torch.no_grad()
def test_generation_with_the_cache_is_that_without(fusion, order, attention):
    model = a_model(fusion, 0, order, attention)
    n = model.prefix(*brain())
    prompts = [[1, 2], [3], [4, 5, 6]]  # ragged
    expected = []
    for i, prompt in enumerate(prompts):
        row = list(prompt)
        for _ in range(7):
            x = model.trunk(n[i : i + 1], torch.tensor([row]))
            row.append(logits_of(model, x)[0, -1].argmax().item())
        expected.append(row[len(prompt) :])
        assert model.generate(n[i : i + 1], prompt, 7, temperature=0) == expected[i:]  # alone
    assert model.generate(n, prompts, 7, temperature=0) == expected


def test_encoders_of_version_1(tmp_path):
    """Their names as the first version wrote them; `whole` and other parts stay as they are."""
    names = {
        "linear": {"embed.weight": "net.output.weight", "place": "net.montage.place"},
        "conv": {"out.bias": "net.output.bias", "convs.0.weight": "net.convs.0.weight"},
        "transformer": {"place": "net.place", "blocks.0.ln_1.bias": "net.blocks.0.ln_1.bias"},
    }
    for kind, renamed in names.items():
        args = {"kind": kind, "tokens": "electrode" if kind == "transformer" else "time"}
        weights = {f"encoder.{old}": torch.zeros(1) for old in [*renamed, "whole.bias"]}
        state = {"format": "nanocortex", "version": 1, "kind": "foundation"}
        state |= {"encoder_args": args, "model": {**weights, "place": torch.zeros(1)}}
        torch.save(state, tmp_path / "old.pt")
        expected = {f"encoder.{new}" for new in [*renamed.values(), "whole.bias"]}
        assert set(load_checkpoint(tmp_path / "old.pt")["model"]) == expected | {"place"}
