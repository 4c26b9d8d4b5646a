"Models whose words are known, and a server of them in a process of its own."
import os, re, signal, subprocess, sys, threading, time
from pathlib import Path

import torch

from house import ROOT, environment
from tiny_llm.text.tokenizer import train_tokenizer
from tiny_llm.training.folder import save
from tiny_llm.transformer.model import ModelConfig, Transformer, preset

SAID = "Look: <script>window.hacked=1</SCRIPT> and **bold** words, then `code` in it."
LOOP = " one two three four five six seven eight nine ten eleven twelve"
OTHER = "Quite another model speaks here."


def dictated(text, loop="", layers=3):
    """A model that says a text, and then a loop without end: after each token its successor is likely, the one after that less so.

    Embeddings are the unit vectors, the layers add nothing, and the head holds the successors; no token occurs twice."""
    tok = train_tokenizer([SAID + LOOP, OTHER] * 40, vocab_size=365)
    said, turns = tok.encode(text), tok.encode(loop)
    chain = [tok.vocab["<|assistant|>"], *said, *(turns or [tok.end])]
    assert len(set(chain)) == len(chain), tok.pieces(chain)
    V = len(tok)
    model = Transformer(ModelConfig(vocab_size=V, ctx=1024, d_model=-(-V // 8) * 8, n_layers=layers, n_heads=4, tied=False))
    links = dict(zip(chain, chain[1:]))
    if turns: links[chain[-1]] = turns[0]
    with torch.no_grad():
        model.embed.weight.copy_(torch.eye(*model.embed.weight.shape))
        model.head.weight.zero_()
        for b in model.blocks:
            for p in (b.attn.out.weight, b.ffn.down.weight): p.zero_()
        scale = model.cfg.d_model ** -0.5
        for n, (a, b) in enumerate(links.items()):
            model.head.weight[b, a] = (8 - 0.4 * (n % 3)) * scale       # some are surer than others
            if b in links: model.head.weight[links[b], a] = 6.5 * scale
    return model, tok


def noise(ctx=96):
    "A small model that has learnt nothing: no two texts of it are alike."
    from tiny_llm.text.stories import stories
    tok = train_tokenizer(stories(60), vocab_size=400)
    torch.manual_seed(1)
    return Transformer(preset("tiny", vocab_size=len(tok) + 3, ctx=ctx, window=40, qk_norm=False)), tok      # three rows bear no token


class Served:
    "`tiny_llm serve` as a person starts it; .url, .lines (what it printed), .process."
    def __init__(self, *words, **extra):
        command = [sys.executable, "-m", "tiny_llm", "serve", "--port", "0", *map(str, words)]
        env = environment(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1", **extra)
        self.process = subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines, self.up, self.url = [], threading.Event(), None
        threading.Thread(target=self.listen, daemon=True).start()
        assert self.up.wait(120) and self.url, self.lines

    def listen(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if m := re.search(r"at (http://\S+)", line):
                self.url = m[1]
                self.up.set()
        self.up.set()

    def memory(self):
        "Bytes resident, where the system tells."
        try: return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) * 1024
        except OSError: return 0

    def end(self):
        if self.process.poll() is None: self.process.send_signal(signal.SIGTERM)
        try: return self.process.wait(60)
        except subprocess.TimeoutExpired: self.process.kill()


def folders(path):
    "Folders of three models: said, other, noise."
    made = dict(said=dictated(SAID, LOOP), other=dictated(OTHER), noise=noise())
    for name, (model, tok) in made.items(): save(model, tok, path / name)
    return {name: path / name for name in made}
