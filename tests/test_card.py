"""The two launch lines that users know by heart, with small sizes: they must work as typed."""

import pandas as pd
import torch
from helpers import byte_tokenizer, make_dataset, make_eeg, run

import telepath
from configurator import configure
from data.tokens import state_of
from model import GPT, GPTConfig, lm_state, load_checkpoint, save_checkpoint


def test_topographic_gpt2_on_four_ranks(tmp_path):
    """torchrun --nproc_per_node=4 train.py config/train_gpt2.yaml"""
    dataset = make_dataset(tmp_path / "data")
    small = ["n_layer=1", "n_head=2", "n_embd=16", "block_size=32", "batch_size=1"]
    small += ["vocab_size=512", "tokens_per_step=256", "max_iters=2", "eval_batches=1", "radius=2"]
    paths = [f"dataset={dataset}", f"out_dir={tmp_path / 'out'}"]
    run("train", "config/train_gpt2.yaml", *small, *paths, "wandb_log=False", ranks=4)
    checkpoint = load_checkpoint(tmp_path / "out/ckpt.pt")
    assert checkpoint["step"] == 2 and checkpoint["config"]["alpha"] == 2.5
    assert checkpoint["model_args"]["n_embd"] == 16


def test_telepath_with_batches_of_16(tmp_path):
    """python telepath.py batch_size=16"""
    make_eeg(tmp_path / "eeg")
    torch.manual_seed(0)
    lm = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=1, n_head=2, n_embd=16, bias=False))
    save_checkpoint(tmp_path / "lm.pt", {**lm_state(lm), "tokenizer": state_of(byte_tokenizer())})
    small = ["t_end=0.4", "patch=10", "width=16", "encoder_layers=1", "max_iters=2"]
    paths = [f"lm={tmp_path}/lm.pt", f"dataset={tmp_path}/eeg", f"out_dir={tmp_path}/out"]
    words = ["batch_size=16", *small, *paths, "max_new_tokens=3", "shuffles=40", "device=cpu"]
    telepath.main(configure(telepath.Config, words))
    results = pd.read_csv(tmp_path / "out/results.csv")
    assert {"chance", "low", "high", "n"} <= set(results) and results.n.gt(0).all()
