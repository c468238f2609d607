"""Sample text from a language model.

python sample.py                                   # from the model of python train.py
python sample.py lm=gpt2 prompt="The cortex" temperature=0.7 top_p=0.9
python sample.py file=question.txt num_samples=4   # four continuations of the text in a file
"""

from dataclasses import dataclass
from pathlib import Path

from configurator import Run, configure
from convert import load_lm
from data import InputError, write_aside


@dataclass
class Config:
    lm: str = "out/train"  # run folder, checkpoint, Hugging Face name or folder
    prompt: str = ""  # text to continue; empty: start a document
    file: str = ""  # read the prompt from this file
    num_samples: int = 1  # continuations, in one batch; the first is printed as it grows
    max_new_tokens: int = 200  # per continuation
    temperature: float = 0.8  # 0: greedy
    top_k: int | None = 200  # draw from the k likeliest tokens; none: all
    top_p: float | None = None  # draw from the likeliest tokens that make up this probability
    stop: bool = True  # end at end-of-text
    out_dir: str = "out/sample"  # folder for samples.txt
    seed: int = 1337  # fixes the samples
    device: str = "auto"  # cuda, mps, cpu
    dtype: str = "auto"  # bfloat16 where faster; float16, float32

    POSITIVE = "num_samples max_new_tokens top_k top_p"
    SHARES = "top_p"


def read_prompt(config):
    """Return the text of `file`, or `prompt`."""
    if not config.file:
        return config.prompt
    try:
        return Path(config.file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "give a text file"
        raise InputError(f"file={config.file} is not UTF-8 text ({error}): {remedy}") from None


def main(config):
    run = Run(config)
    model, tokenizer = load_lm(config.lm)
    model.to(run.device, run.dtype).eval()
    text = read_prompt(config)
    prompt = tokenizer.encode(text)
    stop = []
    if tokenizer.eot is not None:
        prompt = [tokenizer.eot, *prompt]  # a document begins after end-of-text
        stop = [tokenizer.eot] if config.stop else []
    if not prompt:
        raise InputError(f"lm={config.lm} has no end-of-text token to start from: give prompt=")
    options = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    prompts = [prompt] * config.num_samples
    samples = [[] for _ in prompts]
    print(text, end="", flush=True)
    n_shown = 0
    stream = model.stream(prompts, config.max_new_tokens, stop=stop, seed=config.seed, **options)
    for tokens in stream:
        for sample, token in zip(samples, tokens):
            if token is not None:  # this sample continues
                sample.append(token)
        first = tokenizer.decode(samples[0])
        if not first.endswith("\ufffd"):  # a character may take several tokens
            print(first[n_shown:], end="", flush=True)
            n_shown = len(first)
        if run.stopping():
            break
    print(tokenizer.decode(samples[0])[n_shown:])
    texts = [text + tokenizer.decode(sample) for sample in samples]
    for sample_text in texts[1:]:
        print("-" * 40, sample_text, sep="\n")
    write_aside(run.out / "samples.txt", "\n---------------\n".join(texts) + "\n")
    run.close()


if __name__ == "__main__":
    main(configure(Config))
