"""NeuralEncoder and NeuralGPT: neural rows and text in one sequence against naive oracles; the language model stays what it is."""
import copy
import itertools
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from model import GPT, EncoderConfig, GPTConfig, NeuralEncoder, NeuralGPT, load_matching

KINDS = [dict(kind="linear"), dict(kind="transformer"), dict(kind="transformer", tokens="electrode"), dict(kind="conv"), dict(kind="tsconv")]
WAYS = [(f, p, a) for f in ("prefix", "expert") for p in ("zero", "after_prefix") for a in ("causal", "full")] + [("cross", "zero", "causal")]


def shaken(module, seed=0, std=0.05):
    """Every weight random and large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return module.eval()


def a_gpt(**options):
    return shaken(GPT(GPTConfig(**{**dict(block_size=48, vocab_size=50, n_layer=3, n_head=4, n_embd=32, bias=True), **options})))


def an_encoder(**options):
    torch.manual_seed(0)
    return shaken(NeuralEncoder(EncoderConfig(**{**dict(n_embd=32, width=16, n_head=2, patch=5, virtual=8, subjects=2), **options})), 1)


def a_model(fusion="expert", positions="zero", attention="causal", layers=0, shake=True, **options):
    model = NeuralGPT(a_gpt(**options), an_encoder(), fusion, layers, positions, attention)
    for part in (model.experts, model.crosses) if shake else ():
        if part is not None:
            shaken(part, 2, 0.1)
    return model.eval()


def brain(B=3, C=6, T=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, C, T, generator=generator), torch.randn(C, 3, generator=generator) * 0.06, torch.arange(B) % 3 - 1


def ids(*shape, seed=0):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


# ---- the encoder

@pytest.mark.parametrize("options", KINDS, ids=str)
def test_electrodes_are_places(options):
    encoder, (x, xyz, subject) = an_encoder(**options), brain()
    y = encoder(x, xyz, subject)
    assert y.shape == (3, 4, 32)
    order = torch.randperm(6)
    assert torch.allclose(encoder(x[:, order], xyz[order], subject), y, atol=1e-5)  # order means nothing
    assert torch.allclose(encoder(x, xyz.expand(3, -1, -1), subject), y, atol=1e-5)  # places of each trial, or of all
    more = torch.cat([x, torch.full((3, 2, 20), torch.nan)], 1), torch.cat([xyz, torch.full((2, 3), torch.nan)])
    assert torch.allclose(encoder(*more, subject), y, atol=1e-5)                     # absent channels mean nothing, whatever they hold
    assert (encoder(x, xyz + 0.02, subject) - y).abs().max() > 1e-3                  # and place means something
    assert encoder(x[:, :2], xyz[:2], subject).shape == y.shape and encoder(torch.cat([x, x], 2), xyz, subject).shape == (3, 8, 32)
    with pytest.raises(ValueError, match="shorter than patch=5"):
        encoder(x[..., :4], xyz, subject)


def test_subjects_and_strangers():
    encoder, (x, xyz, _) = an_encoder(kind="linear"), brain(1)
    known = [encoder(x, xyz, torch.tensor([s])) for s in (0, 1)]
    assert (known[0] - known[1]).abs().max() > 1e-2
    assert torch.allclose(encoder(x, xyz, torch.tensor([-1])), (known[0] + known[1]) / 2, atol=1e-5)  # of a linear encoder, exactly the mean
    assert torch.equal(encoder(x, xyz, torch.tensor([-1])), encoder(x, xyz, torch.tensor([7])))


def test_tokens_can_be_left_out_before_the_blocks():
    encoder, (x, xyz, subject) = an_encoder(tokens="electrode"), brain()
    tokens, present = encoder.tokenize(x, xyz, subject)
    assert tokens.shape == (3, 6 * 4, 16) and present.all()
    kept = torch.arange(8, 24)  # all patches of the last four electrodes
    h = encoder.think(tokens[:, kept], present[:, kept])
    assert torch.allclose(encoder.read(h, present[:, kept], 4), encoder(x[:, 2:], xyz[2:], subject), atol=1e-5)
    hidden = present.clone()
    hidden[:, :8] = False  # or masked instead of taken out
    assert torch.allclose(encoder.read(encoder.think(tokens, hidden), hidden, 4), encoder(x[:, 2:], xyz[2:], subject), atol=1e-5)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_first_token_of_the_whole_window(options):
    encoder, (x, xyz, subject) = an_encoder(window=4, **options), brain()
    y = encoder(x, xyz, subject)
    assert y.shape == (3, 5, 32)
    with pytest.raises(ValueError, match="window=4"):
        encoder(x[..., :15], xyz, subject)


def test_pretrained_weights_must_fit():
    there, here = an_encoder(), an_encoder(subjects=5)
    share, left = load_matching(here, there.state_dict(), 0.5)
    assert 0.5 < share < 1 and left == ["subject_mix", "subject_token"] and torch.equal(here.place, there.place)
    with pytest.raises(ValueError, match=r"x\.pt fits only 0\.0%"):
        load_matching(an_encoder(), {f"module.{k}": v for k, v in there.state_dict().items()}, 0.5, "x.pt")


# ---- routing

def concatenation(model, n, idx):
    """[BON, n, EON | text] as embeddings, and how many rows are the expert's."""
    wte, wpe, room = model.lm.transformer.wte, model.lm.transformer.wpe, n.size(1) + 2
    x = torch.cat([model.bon.expand(len(n), 1, -1), n, model.eon.expand(len(n), 1, -1), wte(idx)], 1)
    if model.text_positions == "after_prefix":
        return x + wpe(torch.arange(x.size(1))), room - 1
    x[:, room:] += wpe(torch.arange(idx.size(1)))
    return x, room - 1


@pytest.mark.parametrize("fusion", ["prefix", "expert"])
def test_experts_like_the_core_are_the_plain_gpt_on_the_concatenation(fusion):
    model = a_model(fusion, "after_prefix", shake=False)
    idx, (x, xyz, subject) = ids(3, 6), brain()
    logits, n = model(x, xyz, subject, idx)
    h, _ = concatenation(model, n, idx)
    for block in model.lm.transformer.h:
        h = block(h)[0]
    assert torch.allclose(logits, F.linear(model.lm.transformer.ln_f(h), model.lm.transformer.wte.weight)[:, -6:], atol=1e-5)


@pytest.mark.parametrize("positions", ["zero", "after_prefix"])
@pytest.mark.parametrize("attention", ["causal", "full", "blocked"])
@pytest.mark.parametrize("layers", [0, 2])
def test_two_streams_are_the_scatter_by_a_boolean_mask(positions, attention, layers):
    model = a_model("expert", positions, attention, layers)
    idx, (x, xyz, subject) = ids(3, 6), brain()
    logits, n = model(x, xyz, subject, idx)
    h, P = concatenation(model, n, idx)
    is_neural, T = torch.arange(h.size(1)) < P, h.size(1)
    see = torch.ones(T, T, dtype=torch.bool).tril()
    if attention == "full":
        see |= is_neural[:, None] & is_neural
    if attention == "blocked":
        see &= is_neural[:, None] == is_neural
    for i, block in enumerate(model.lm.transformer.h):  # every row through both, the mask chooses
        expert = model.experts[i - model.first] if i >= model.first else block
        last = i == 2 and i >= model.first

        def choose(theirs, ours):
            return torch.where(is_neural[:, None], theirs, ours)

        a = block.ln_1(h)
        q, k, v = choose(expert.attn.c_attn(a), block.attn.c_attn(a)).view(3, T, 3, 4, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=see).transpose(1, 2).reshape(3, T, 32)
        h = h + choose(torch.zeros_like(y) if last else expert.attn.c_proj(y), block.attn.c_proj(y))
        m = block.ln_2(h)
        h = h + choose(torch.zeros_like(y) if last else expert.mlp(m), block.mlp(m))
    assert torch.allclose(logits, F.linear(model.lm.transformer.ln_f(h), model.lm.transformer.wte.weight)[:, -6:], atol=1e-5)


def run_states(model, n, idx):
    states = []
    return model.trunk(n, idx, states=states), [s[0] for s in states]


def test_blocked_sides_do_not_meet():
    model, idx = a_model("expert", attention="blocked"), ids(3, 6)
    n = torch.randn(3, 4, 32)
    text, neural = run_states(model, n, idx)
    assert torch.equal(run_states(model, n + 1, idx)[0], text)  # neural rows change: text is bit-equal
    shaken(model.experts, 5)
    assert torch.equal(run_states(model, n, idx)[0], text)      # experts change: text is bit-equal
    neural = run_states(model, n, idx)[1]
    h = torch.cat([model.eon.expand(3, 1, -1), model.lm.transformer.wte(idx) + model.lm.transformer.wpe(torch.arange(6))], 1)
    for block in model.lm.transformer.h:
        h = block(h)[0]
    assert torch.allclose(model.lm.transformer.ln_f(h)[:, 1:], text, atol=1e-5)  # the text is the plain GPT's
    for block in model.lm.transformer.h:
        shaken(block.attn, 6), shaken(block.mlp, 7)
    assert all(torch.equal(a, b) for a, b in zip(run_states(model, n, ids(3, 6, seed=1))[1], neural))  # the core and the text change: neural is bit-equal
    open_ = a_model("expert")
    assert not torch.equal(run_states(open_, n + 1, idx)[0], run_states(open_, n, idx)[0])  # open, text hears


def test_what_is_frozen_stays_to_the_bit():
    for fusion in ("prefix", "expert", "cross"):
        model, idx, (x, xyz, subject) = a_model(fusion), ids(3, 6), brain()
        before, weights = model.lm(idx).logits, copy.deepcopy(model.lm.state_dict())
        model.lm.requires_grad_(False)
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=0.1)
        F.cross_entropy(model(x, xyz, subject, idx)[0].flatten(0, 1), idx.flatten()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned), fusion  # whatever may learn, learns
        optimizer.step()
        assert all(torch.equal(v, weights[k]) for k, v in model.lm.state_dict().items()) and torch.equal(model.lm(idx).logits, before)


def test_a_shut_gate_is_the_plain_gpt():
    model, idx, (x, xyz, subject) = a_model("cross", shake=False), ids(3, 6), brain()
    assert torch.equal(model(x, xyz, subject, idx)[0], model.lm(idx).logits)
    with torch.no_grad():
        model.crosses[1].gate.fill_(0.5)
    assert not torch.equal(model(x, xyz, subject, idx)[0], model.lm(idx).logits)


@pytest.mark.parametrize("fusion", ["prefix", "expert", "cross"])
def test_one_graph(fusion):
    torch._dynamo.reset()
    model, idx, (x, xyz, subject) = a_model(fusion), ids(3, 6), brain()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # raises at a graph break
    assert torch.allclose(compiled(x, xyz, subject, idx)[0], model(x, xyz, subject, idx)[0], atol=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="fusion must be prefix or expert or cross"):
        a_model("sum")
    with pytest.raises(ValueError, match="4 layers with experts in a language model of 3"):
        a_model("expert", layers=4)
    with pytest.raises(ValueError, match="32 wide, the language model 16"):
        NeuralGPT(a_gpt(n_embd=16), an_encoder())
    with pytest.raises(ValueError, match="text_positions=zero"):
        a_model(positions="after_prefix").generate(torch.zeros(1, 40, 32), [1], 20)


# ---- generation

@pytest.mark.parametrize("way", WAYS, ids=str)
def test_generation_with_the_cache_is_that_without(way):
    model, (x, xyz, subject) = a_model(*way), brain()
    n, prompts = model.prefix(x, xyz, subject), [[1, 2], [3], [4, 5, 6]]  # ragged
    expected = []
    for i, prompt in enumerate(prompts):
        row = list(prompt)
        for _ in range(7):
            row.append(F.linear(model.trunk(n[i:i + 1], torch.tensor([row])), model.lm.transformer.wte.weight)[0, -1].argmax().item())
        expected.append(row[len(prompt):])
    assert model.generate(n, prompts, 7, temperature=0) == expected
    assert [model.generate(n[i:i + 1], p, 7, temperature=0)[0] for i, p in enumerate(prompts)] == expected  # one by one


class RuleGPT(GPT):
    """The next token is the last one plus the row's own number, modulo the vocabulary."""

    def trunk(self, idx, *args, **kwargs):
        return F.one_hot((idx + self.row[:, None]) % 10, 10).float(), None, None


class RuleModel(NeuralGPT):
    def trunk(self, n, idx, *args, **kwargs):
        self.lm.row = n[:, 0, 0].long()
        return self.lm.trunk(idx)[0]


def test_a_rule_shows_order_and_stopping():
    lm = RuleGPT(GPTConfig(block_size=32, vocab_size=10, n_layer=1, n_head=1, n_embd=10))
    with torch.no_grad():
        lm.transformer.wte.weight.copy_(torch.eye(10))
    model = RuleModel(lm, NeuralEncoder(EncoderConfig(n_embd=10, width=8, n_head=1, virtual=4)), "expert")

    def expected(row, start, stop):
        out, last = [], start
        while len(out) < 12 and (last + row) % 10 != stop:
            out.append(last := (last + row) % 10)
        return out

    for rows in itertools.permutations([1, 2, 3, 5]):  # they stop at different times, one never does
        n = torch.tensor(rows).float()[:, None, None].expand(-1, 3, 10)
        assert model.generate(n, [7], 12, temperature=0, stop=[9]) == [expected(r, 7, 9) for r in rows], rows
    n = torch.tensor([1, 1]).float()[:, None, None].expand(-1, 3, 10)
    assert model.generate(n, [8], 12, temperature=0, stop=[9]) == [[], []]                     # all stop at once
    assert model.generate(n, [8], 12, temperature=0) == [expected(1, 8, None)] * 2             # none stops


def test_blocks_may_be_compiled_in_place():
    model, idx, (x, xyz, subject) = a_model(), ids(3, 6), brain()
    plain = model(x, xyz, subject, idx)[0]
    model.lm.compile_blocks(backend="eager")
    assert torch.allclose(model(x, xyz, subject, idx)[0], plain, atol=1e-5)
    assert partial(model.generate, temperature=0)(model.prefix(x, xyz, subject), [1], 3)
