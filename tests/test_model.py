"""The model against naive oracles: Hugging Face logits, full cross-entropy, uncached generation; checkpoints that are refused."""
import copy
import math
import pickle
import socket
import time
from functools import partial

import numpy as np
import pytest
import torch
from helpers import byte_tokenizer
from torch.nn import functional as F

import model as M
import positions
import probe
import topography
from data.tokens import state_of
from model import GPT, GPTConfig, Tokenizer, cross_entropy, load_checkpoint, load_lm, lm_state, save_checkpoint

SMALL = dict(block_size=32, vocab_size=100, n_layer=2, n_head=4, n_embd=64)


def small(**options):
    """A GPT whose every weight, biases and norms too, is random and large enough to matter."""
    model = GPT(GPTConfig(**{**SMALL, **options})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


def ids(*shape, high=100, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gelu, bias", [("tanh", True), ("exact", True), ("exact", False)])
def test_hugging_face_both_ways(tmp_path, gelu, bias):
    transformers = pytest.importorskip("transformers")
    ours = small(gelu=gelu, bias=bias)
    ours.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    idx = ids(3, 20)
    with torch.no_grad():
        out = theirs(idx, output_hidden_states=True)
        mine = ours(idx, hidden=[0, 1, 2])
        assert torch.allclose(mine.logits, out.logits, atol=1e-5)
        for i in range(3):
            assert torch.allclose(mine.hidden[i], out.hidden_states[i], atol=1e-5)
        back = GPT.from_pretrained(str(tmp_path)).eval()
        assert torch.allclose(back(idx).logits, out.logits, atol=1e-5)


def test_pretrained_that_we_cannot_be(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10, activation_function="relu")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="variant"):
        GPT.from_pretrained(str(tmp_path))
    with pytest.raises((OSError, ValueError), match="no model"):
        GPT.from_pretrained(str(tmp_path / "none"))


def test_pretrained_without_network_or_weights(tmp_path, monkeypatch):
    """A sentence, at once, where transformers would go on trying, or fail in the depths."""
    transformers = pytest.importorskip("transformers")
    def nowhere(*args, **kwargs):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr(socket.socket, "connect", nowhere)
    M.hub_answers.cache_clear()
    start = time.time()
    for load in (M.load_lm, partial(M.from_hub, transformers.AutoModel), topography.load_any, probe.LMModel):
        with pytest.raises((OSError, ValueError), match="no model 'gpt2-nowhere'.*not to be had from the Hugging Face hub"):
            load("gpt2-nowhere")
    assert time.time() - start < 10
    for config in (dict(n_layer=1, n_head=1, n_embd=8, vocab_size=9), None):
        if config:
            transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path)
        else:
            transformers.BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
        for damage in ({}, {"model.safetensors": b"torn"}, {"pytorch_M.bin": b"torn"}):
            for name, content in damage.items():
                (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match="holds nothing that transformers can read"):
                topography.load_any(str(tmp_path))
            for name in damage:
                (tmp_path / name).unlink()
    for config in ("{", "{}", "[]"):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ValueError, match="holds nothing that transformers can read"):
            M.load_lm(str(tmp_path))
    small().save_pretrained(tmp_path)
    (tmp_path / "nanocortex.json").write_text('{"model_args": ')
    with pytest.raises(ValueError, match="nanocortex.json is torn"):
        M.load_lm(str(tmp_path))
    M.hub_answers.cache_clear()


@pytest.mark.parametrize("chunk", [7, 1000])
def test_chunked_cross_entropy_is_cross_entropy(chunk):
    x, w, y = torch.randn(50, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True), ids(50, high=30)
    y[:5] = -1
    full = F.cross_entropy(x @ w.t(), y, ignore_index=-1)
    expected = torch.autograd.grad(3 * full, (x, w))
    got_loss = cross_entropy(x, w, y, chunk)
    got = torch.autograd.grad(3 * got_loss, (x, w))
    assert torch.allclose(got_loss, full, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected))
    assert cross_entropy(x, w, torch.full_like(y, -1)).item() == 0  # nothing counted
    got_loss = cross_entropy(x, w, y, chunk)
    got_loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        got_loss.backward()  # the weight's gradient was given away, not copied
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(cross_entropy(x, w, y, chunk).item() - full.item()) < 0.05


def test_the_head_far_from_zero():
    x, w, y = torch.randn(100, 16), torch.randn(300, 16), ids(100, high=300)
    x[:, 0], w[:, 0] = 1, 1000  # the same for every word: no difference but to rounding
    got, expected = (torch.autograd.grad(loss, a)[0] for a, loss in
                     ((a, f(a)) for a, f in ((x.clone().requires_grad_(), lambda a: cross_entropy(a, w, y)),
                                             (x.double().requires_grad_(), lambda a: F.cross_entropy(a @ w.double().t(), y)))))
    assert (got - expected).norm() < 1e-3 * expected.norm()


def test_the_head_in_half_precision():
    torch.manual_seed(0)
    x, w = torch.randn(300, 16), torch.randn(2500, 16)  # several slabs of words
    y = (x @ w.t()).argmax(1)  # nearly sure of the word: what is left is a small difference
    x, w = x.bfloat16().requires_grad_(), w.bfloat16().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(cross_entropy(x, w, y, 128), (x, w))
    expected = torch.autograd.grad(F.cross_entropy((x @ w.bfloat16().t()).float(), y), (x, w))  # of the same rounded logits
    assert all((a.float() - b.float()).norm() < 0.01 * b.float().norm() for a, b in zip(got, expected))


@pytest.mark.parametrize("tap", ["sublayer", "residual"])
def test_spatial_loss_is_that_of_the_taps(tap):
    model = small(sheet=True, radius=2, windows=3, alpha=0.5, activation_decay=0.01, tap=tap)
    idx, targets = ids(4, 16), ids(4, 16, seed=1)
    windows = model.draw_windows(torch.Generator().manual_seed(0))
    names = positions.layer_names(2)
    out = model(idx, targets, windows, hidden=names)
    cells = positions.window_cells(8, 2)
    near = torch.tensor(positions.closeness(cells[0], 8)).float()
    spatial = sum(positions.spatial_loss(out.hidden[name], torch.tensor(model.unit_at_cell[i].numpy()[cells[windows[i]]]), near)
                  for i, name in enumerate(names))
    energy = sum(out.hidden[name].square().sum(-1).mean() for name in names)
    assert torch.allclose(out.spatial, spatial, atol=1e-6)
    assert torch.allclose(out.loss, out.task + 0.5 * spatial + 0.01 * energy, atol=1e-5)
    if tap == "residual":
        blocks = model(idx, hidden=[1, "layer.0.mlp"]).hidden
        assert torch.equal(blocks[1], blocks["layer.0.mlp"])
    assert model(idx, targets).spatial is None and model(idx, targets).loss == model(idx, targets).task


def test_taps_and_windows_do_not_change_the_logits():
    model = small(sheet=True, radius=2)
    idx = ids(2, 16)
    assert torch.equal(model(idx).logits, model(idx, hidden=["layer.1.attn"]).logits)
    assert torch.equal(model(idx).logits, small()(idx).logits)


def test_head_mosaic_and_projection():
    model = small(sheet=True, radius=2, head_loss=True, n_head=4)
    assert model.transformer.h[0].attn.c_proj is None
    grid = model.unit_at_cell[0].view(8, 8) // 16  # head of each cell
    assert all((grid[4 * i:4 * i + 4, 4 * j:4 * j + 4] == 2 * i + j).all() for i in range(2) for j in range(2))
    assert torch.equal(model.unit_at_cell[0].sort()[0], torch.arange(64))
    assert not torch.equal(model.unit_at_cell[1], model.unit_at_cell[3])
    assert small(head_loss=True, attn_proj=True)(ids(1, 4)).logits.shape == (1, 4, 100)
    with pytest.raises(ValueError, match="mosaic|square number of heads"):
        GPT(GPTConfig(**{**SMALL, "n_head": 2}, sheet=True, head_loss=True, radius=2))


@pytest.mark.parametrize("options, words", [
    (dict(n_embd=60, n_head=4, sheet=True), "not a square"), (dict(n_head=5), "divisible"), (dict(sheet=True, radius=5), "radius=5"),
    (dict(tap="middle"), "tap must be"), (dict(gelu="relu"), "gelu")])
def test_shapes_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        GPT(GPTConfig(**{**SMALL, **options}))


def naive(model, prompt, n, size=32):
    """Greedy generation with a full forward per token, and the rule at block_size."""
    context, made = list(prompt), []
    for _ in range(n):
        context = context if len(context) <= size else context[-(size // 2):]
        made.append(int(model(torch.tensor([context])).logits[0, -1].argmax()))
        context.append(made[-1])
    return made


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_linear_is_linear_without_a_gradient(bias):
    ours, x = M.Linear(48, 40, bias=bias), torch.randn(2, 3, 48)
    assert torch.allclose(ours(x), F.linear(x, ours.weight, ours.bias), atol=1e-5)
    copies = torch.stack([ours.weight, 2 * ours.weight])
    many = torch.vmap(lambda w: torch.func.functional_call(ours, {"weight": w}, (x,)))(copies)
    assert torch.allclose(many[1], F.linear(x, copies[1], ours.bias), atol=1e-5)
    assert torch.allclose(torch.func.jvp(ours, (x,), (x,))[1], x @ ours.weight.t(), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype is torch.bfloat16


def test_cached_generation_is_uncached_generation():
    model = small()
    prompts = [[1, 2, 3], [5], list(range(31)), list(range(40)), list(range(32))]
    with torch.no_grad():
        expected = [naive(model, p, 45) for p in prompts]
    assert model.generate(prompts, 45, temperature=0) == expected  # ragged, across block_size
    assert [model.generate([p], 45, temperature=0)[0] for p in prompts] == expected  # batch = single
    stop = expected[0][3]
    ended = model.generate(prompts, 45, temperature=0, stop=[stop])
    assert ended == [row[:row.index(stop)] if stop in row else row for row in expected]
    half = small().to(torch.bfloat16)  # the cache has the weights' precision
    assert half.generate([[1, 2]], 1, temperature=0) == [[int(half(torch.tensor([[1, 2]])).logits[0, -1].argmax())]]
    own = model.generate(prompts, 45, temperature=0, stop=[[row[5]] for row in expected])
    assert own == [row[:row.index(row[5])] for row in expected]  # a stop of its own for each row
    assert model.generate(prompts, 5, temperature=0) == [row[:5] for row in expected]  # too few for packed weights


def test_one_row_of_attention_is_float32_under_autocast():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 1, 16).bfloat16(), torch.randn(2, 3, 50, 16).bfloat16(), torch.randn(2, 3, 50, 16).bfloat16()
    outside = M.attend(q, k, v, None, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(M.attend(q, k, v, None, 0.0), outside)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert torch.equal(outside, exact.to(torch.bfloat16))  # rounded once, at the end


def test_packed_weights_are_the_weights():
    model = small()
    linears = [module for module in model.modules() if isinstance(module, M.Linear)]
    with model.packed(1):
        assert all((module.packed is not None) == M.positions.onednn(model.transformer.wte.weight) for module in linears)
    assert all(module.packed is None for module in linears) and model.packed_head is None
    before = model.generate([[1, 2]], 40, temperature=0)
    with torch.no_grad():
        model.transformer.wte.weight.neg_()
        linears[0].weight.neg_()
    assert model.generate([[1, 2]], 40, temperature=0)[0] == naive(model, [1, 2], 40) != before[0]
    torch.testing.assert_close(copy.deepcopy(model)(ids(1, 8)).logits, model(ids(1, 8)).logits)


def test_without_onednn(monkeypatch):
    """As on a build of torch that has it not."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setitem(torch.ops.__dict__, "mkldnn", None)
    model = small()
    assert model.generate([[1, 2]], 40, temperature=0)[0] == naive(model, [1, 2], 40)


def test_sampling():
    model = small()
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(20000, 1)
    generator = torch.Generator().manual_seed(0)
    for options, allowed in ((dict(top_k=2), [2, 3]), (dict(top_p=0.6), [3]), (dict(top_p=0.7), [2, 3]), (dict(), [0, 1, 2, 3])):
        drawn = M.pick(logits, 1.0, options.get("top_k"), options.get("top_p"), generator)
        p = logits[0, allowed].softmax(0)
        seen = torch.bincount(drawn, minlength=4) / len(drawn)
        assert torch.allclose(seen[allowed], p, atol=0.02) and abs(seen[allowed].sum() - 1) < 1e-6
    assert model.generate([[1]], 20, seed=1) == model.generate([[1]], 20, seed=1) != model.generate([[1]], 20, seed=2)
    for bad in (dict(prompts=[[]]), dict(prompts=[[1]], temperature=-1), dict(prompts=[[1]], top_p=0), dict(prompts=[[1]], top_k=0)):
        with pytest.raises(ValueError):
            model.generate(**{"max_new_tokens": 2, **bad})
    with pytest.raises(ValueError, match="block_size"):
        model(ids(1, 33))


def test_layers_share_one_compiled_graph():
    torch._dynamo.reset()
    eager, compiled = small(sheet=True, radius=2, windows=2, alpha=1.0, n_layer=3), small(sheet=True, radius=2, windows=2, alpha=1.0, n_layer=3)
    from torch._dynamo.testing import CompileCounter
    counter = CompileCounter()
    compiled.compile_blocks(backend=counter)
    idx, targets = ids(2, 16), ids(2, 16, seed=1)
    for step in range(3):  # other windows, same graph
        windows = eager.draw_windows(torch.Generator().manual_seed(step))
        a, b = eager(idx, targets, windows), compiled(idx, targets, windows)
        assert torch.allclose(a.loss, b.loss, atol=1e-5)
    assert counter.frame_count == 2  # one of all blocks, one of the head's softmax
    assert list(compiled.state_dict()) == list(eager.state_dict())


def test_checkpoints_round_trip_and_refuse(tmp_path):
    model, path = small(sheet=True, radius=2), tmp_path / "best.pt"
    tokenizer = state_of(byte_tokenizer())
    save_checkpoint(path, {**lm_state(model), "tokenizer": tokenizer})
    again, reader = load_lm(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert reader.decode(reader.encode("Zoë <|endoftext|>")) == "Zoë <|endoftext|>" and reader.eot == 256
    for bad in ({"config": GPTConfig()}, {"n": np.float64(1)}, {"out": tmp_path}):
        with pytest.raises(TypeError, match="plain types"):
            save_checkpoint(path, bad)
    whole = path.read_bytes()
    for name, content, words in (("torn.pt", whole[:len(whole) // 2], "torn"), ("empty.pt", b"", "torn"),
                                 ("text.pt", b"hello", "torn"), ("hostile.pt", pickle.dumps(print), "not ours")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            load_checkpoint(tmp_path / name)
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    torch.save({"format": "nanocortex", "version": 99}, tmp_path / "newer.pt")
    save_checkpoint(tmp_path / "decoder.pt", dict(kind="decoder"))
    for name, words in (("foreign.pt", "no nanoCortex checkpoint"), ("newer.pt", "update the code"), ("none.pt", "python train.py")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            load_checkpoint(tmp_path / name)
    for spec, words in ((tmp_path / "decoder.pt", "no language model"), (tmp_path / "nothing", "no language model"), ("out/nothing", "python train.py")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            load_lm(str(spec))


def test_hugging_face_tokenizer_becomes_ours(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import ByteLevelBPETokenizer
    bpe = ByteLevelBPETokenizer()
    text = "the cat sat on the mat, and the other cat — Zoë's — didn't sit at all 12345\n\n  two  spaces"
    bpe.train_from_iterator([text] * 3, vocab_size=300, special_tokens=[], show_progress=False)
    bpe.add_special_tokens(["<|endoftext|>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(tmp_path)
    ours, theirs = Tokenizer.from_pretrained(str(tmp_path)), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for sample in (text, "unseen words ☃ too", ""):
        assert ours.encode(sample) == theirs.encode(sample, add_special_tokens=False) and ours.decode(ours.encode(sample)) == sample
    assert ours.decode([ours.encode("a")[0], 10 ** 6]) == "a\ufffd"


def test_init_depends_on_the_seed_and_name_alone():
    a, b = GPT(GPTConfig(**SMALL)), GPT(GPTConfig(**SMALL, sheet=True, radius=2, alpha=1.0))
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
    proj = a.transformer.h[0].mlp.c_proj.weight
    assert abs(proj.std().item() - 0.02 / math.sqrt(4)) < 1e-3
    assert not torch.equal(GPT(GPTConfig(**SMALL), seed=1).transformer.wte.weight, a.transformer.wte.weight)
