"""Let a language model write: a run folder or checkpoint of ours, or a Hugging Face GPT-2.

    python sample.py                                   # the model that `python train.py` left behind
    python sample.py lm=gpt2 prompt="The cortex" temperature=0.7 top_p=0.9
    python sample.py file=question.txt num_samples=4   # the prompt from a file, four continuations in one batch
"""
from dataclasses import dataclass
from pathlib import Path

from configurator import Run, configure, write_aside
from model import load_lm


@dataclass
class Config:
    lm: str = "out/train"          # run folder, checkpoint, Hugging Face name or folder
    prompt: str = ""               # text to go on from; empty: the start of a document
    file: str = ""                 # read the prompt from this file
    num_samples: int = 1           # continuations, made in one batch; the first is shown as it comes
    max_new_tokens: int = 200      # each
    temperature: float = 0.8       # 0: greedy
    top_k: int | None = 200        # only the k likeliest tokens; none: all
    top_p: float | None = None     # only the likeliest tokens that share this probability
    stop: bool = True              # end at end-of-text
    out_dir: str = "out/sample"    # samples.txt
    seed: int = 1337               # fixes the samples
    device: str = "auto"           # cuda, mps, cpu
    dtype: str = "auto"            # bfloat16, float16, float32

    POSITIVE = "num_samples max_new_tokens top_k top_p"
    SHARES = "top_p"

    def check(self):
        if self.file and not Path(self.file).is_file():
            raise FileNotFoundError(f"no prompt file {self.file}: give file= a text file, or prompt=")


def main(config):
    run = Run(config)
    model, tokenizer = load_lm(config.lm)
    model.to(run.device, run.dtype).eval()
    text = Path(config.file).read_text() if config.file else config.prompt
    prompt = ([] if tokenizer.eot is None else [tokenizer.eot]) + tokenizer.encode(text)  # a document begins after end-of-text
    if not prompt:
        raise ValueError(f"lm={config.lm} has no end-of-text token to begin with: give prompt=")
    stop = [tokenizer.eot] if config.stop and tokenizer.eot is not None else []
    rows, shown = [[] for _ in range(config.num_samples)], 0
    print(text, end="", flush=True)
    with model.packed(config.num_samples):
        for tokens in model.stream([prompt] * config.num_samples, config.max_new_tokens, temperature=config.temperature, top_k=config.top_k,
                                   top_p=config.top_p, stop=stop, seed=config.seed):
            for row, token in zip(rows, tokens):
                row += [] if token is None else [token]
            so_far = tokenizer.decode(rows[0])
            if not so_far.endswith("\ufffd"):  # a character may take several tokens
                print(so_far[shown:], end="", flush=True)
                shown = len(so_far)
            if run.stopping():
                break
    texts = [text + tokenizer.decode(row) for row in rows]
    print(tokenizer.decode(rows[0])[shown:])
    for other in texts[1:]:
        print("-" * 40, other, sep="\n")
    write_aside(run.out / "samples.txt", "\n---------------\n".join(texts) + "\n")
    run.close()


if __name__ == "__main__":
    main(configure(Config))
