"""What `make gpu` checks on a GPU beside test_train.py; without one, the same on the CPU.

The oracle is the CPU, in float64 where it can be.
"""

import copy

import pytest
import torch

import positions
from model import GPT, EncoderConfig, GPTConfig, NeuralEncoder, NeuralGPT

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {"block_size": 64, "vocab_size": 128, "n_layer": 2, "n_head": 4, "n_embd": 64}


def tiny_gpt(**options):
    return GPT(GPTConfig(**SHAPE, **options), seed=3)


def tokens(rows=4, length=32):
    return torch.randint(0, 128, (rows, length + 1), generator=torch.Generator().manual_seed(0))


def losses_and_gradient(model, batch, windows=None, dtype=None):
    """Losses of a batch (B, T + 1), and the gradient as one vector, float64 on the CPU."""
    model.zero_grad()
    device = model.transformer.wte.weight.device
    batch = batch.to(device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        out = model(batch[:, :-1], batch[:, 1:], windows)
    out.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return out.loss.item(), gradient.cpu().double()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_training_step_with_the_spatial_loss(dtype, compiled):
    if compiled and DEVICE == "cpu":
        pytest.skip("compiling on a CPU is tested in test_train.py")
    model = tiny_gpt(sheet=True, radius=3, windows=4, alpha=1.0)
    windows = model.draw_windows(torch.Generator().manual_seed(1))
    wanted, true = losses_and_gradient(copy.deepcopy(model).double(), tokens(), windows)
    model.to(DEVICE)
    if compiled:
        model.compile_blocks()
    loss, gradient = losses_and_gradient(model, tokens(), windows, dtype)
    assert loss == pytest.approx(wanted, rel=1e-5 if dtype is None else 1e-2)
    likeness = torch.cosine_similarity(gradient, true, dim=0)
    assert likeness > (0.99999 if dtype is None else 0.98)


def test_the_spatial_loss():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    cells = positions.window_cells(8, 3)
    near = torch.as_tensor(positions.closeness(cells[0], 8))
    units = torch.as_tensor(positions.random_positions(1, 64)[0][cells])
    wanted = positions.spatial_loss(x.double(), units, near.double())
    loss = positions.spatial_loss(x.to(DEVICE), units.to(DEVICE), near.float().to(DEVICE))
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)


def test_generation_with_a_cache_is_what_the_whole_text_gives():
    model = tiny_gpt()
    oracle = copy.deepcopy(model).double()
    model.to(DEVICE).eval()
    prompts = [[1, 2, 3], [9]]
    for prompt, text in zip(prompts, model.generate(prompts, 20, temperature=0)):
        logits = oracle(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(1).tolist() == text


def test_experts_route_neural_tokens():
    torch.manual_seed(0)
    encoder = NeuralEncoder(EncoderConfig(n_embd=64, width=32, n_layer=1, n_head=2))
    model = NeuralGPT(tiny_gpt(), encoder, "expert").eval()
    with torch.no_grad():
        for p in model.experts.parameters():  # unlike the language model's weights
            p.add_(0.02 * torch.randn_like(p))
    signal = torch.randn(3, 8, 100)
    xyz = torch.randn(3, 8, 3)
    subject = torch.zeros(3, dtype=torch.long)
    idx = tokens(3, 4)
    wanted, _ = model(signal, xyz, subject, idx)
    inputs = [x.to(DEVICE) for x in (signal, xyz, subject, idx)]
    logits, _ = model.to(DEVICE)(*inputs)
    assert torch.allclose(logits.cpu(), wanted, atol=1e-3)
    plain = model.lm(inputs[3]).logits
    assert (logits - plain).abs().max() > 1e-2  # text hears the neural tokens
