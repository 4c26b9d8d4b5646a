"The command that compares our recipes with nanoGPT's: its rule of the loss, its split, its seeds, and a whole small comparison."
import json, math, subprocess, sys

import pytest, torch

import against_nanogpt as duel
from tiny_llm.text.stories import stories
from tiny_llm.training.config import read_config, split_record
from tiny_llm.transformer.model import ModelConfig, Transformer, preset


def small(vocab_size=11, ctx=16):
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=vocab_size, ctx=ctx, d_model=16, n_layers=1, n_heads=2)).eval()


@pytest.mark.parametrize("n", [2, 7, 8, 9, 40, 41, 45])
def test_every_character_but_the_first_is_priced_once(n):
    "Against the rule read word by word: the window's first character is given, all before it in the window is seen."
    model, width = small(), 8
    ids, nats = torch.randint(11, (n,), generator=torch.Generator().manual_seed(n)), 0.0
    for t in range(1, n):
        begin = (t - 1) // width * width
        with torch.no_grad(): z = model(ids[None, begin:t])[0, -1]
        nats += (z.logsumexp(0) - z[ids[t]]).item()
    mean, counted = duel.nats_per_character(model, ids, width, batch=3)
    assert counted == n - 1
    assert mean == pytest.approx(nats / (n - 1), abs=1e-5)


def test_who_knows_nothing_pays_ln_V():
    ids = torch.randint(65, (1000,))
    mean, counted = duel.nats_per_character(lambda x: torch.zeros(*x.shape, 65), ids)
    assert counted == 999 and mean == pytest.approx(math.log(65), abs=1e-6)


def test_the_windows_follow_one_another():
    seen = []
    def logits(x):
        seen.extend((row[0].item(), len(row)) for row in x)
        return torch.zeros(*x.shape, 200)
    duel.nats_per_character(logits, torch.arange(200), 64)
    assert seen == [(0, 64), (64, 64), (128, 64), (192, 7)]


@pytest.mark.parametrize("name", duel.RECIPES)
def test_a_recipe_is_a_settings_file_and_a_preset(name):
    config, made = split_record(read_config(duel.RECIPES[name]), name)
    assert config.tokenizer == "chars" and config.steps and not made
    assert config.ctx is None and preset(config.preset).ctx >= duel.WIDTH, "the model could not read a window"


def play(folder, n=200):
    file = folder / "play.txt"
    file.write_text("\n".join(stories(n)), encoding="utf-8")
    return file


def test_ours_learns_from_the_first_nine_tenths_alone(tmp_path):
    file = play(tmp_path)
    text = file.read_text(encoding="utf-8")
    learnt, first = duel.check_split(file, text)
    assert 0.98 * first < learnt <= first and first + len(duel.validation(text)) == len(text)


def test_a_seed_is_told_without_a_change_to_the_file(tmp_path):
    (tmp_path / "helper.py").write_text("word = 'found'\n")
    (tmp_path / "train.py").write_text("import sys, torch\nfrom helper import word\ntorch.manual_seed(1337)\n"
                                       "print(torch.initial_seed(), sys.argv[1:], word)\n")
    def said(seed):
        line = [sys.executable, "-c", duel.OTHER_SEED, str(seed), "train.py", "a.py", "--b=1"]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    assert said(0) == "1337 ['a.py', '--b=1'] found"
    assert said(2) == "1339 ['a.py', '--b=1'] found"


def test_a_command_that_fails_ends_the_comparison(tmp_path):
    with pytest.raises(SystemExit, match="ended with 3"):
        duel.timed([sys.executable, "-c", "print('no'); raise SystemExit(3)"], tmp_path, 1, tmp_path / "log")


STAND_IN = {   # what the command expects of a checkout, with a model that has learnt nothing
    "model.py": """
import torch
from dataclasses import dataclass
@dataclass
class GPTConfig:
    vocab_size: int
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, x, y=None): return self.table(x), None
""", "train.py": """
import os, sys, torch
from model import GPT, GPTConfig
given = dict(arg[2:].split("=") for arg in sys.argv[2:])
vocab = len(open(given["dataset"] + "/input.txt").read()) and int(open(given["dataset"] + "/size").read())
torch.manual_seed(1337)
model = GPT(GPTConfig(vocab))
torch.nn.init.zeros_(model.table.weight)
os.makedirs(given["out_dir"])
torch.save(dict(model=model.state_dict(), model_args=dict(vocab_size=vocab)), given["out_dir"] + "/ckpt.pt")
""", "data/shakespeare_char/prepare.py": """
import pickle
text = open("input.txt").read()
letters = {c: i for i, c in enumerate(sorted(set(text)))}
pickle.dump(dict(stoi=letters), open("meta.pkl", "wb"))
open("size", "w").write(str(len(letters)))
"""}


@pytest.mark.slow
def test_a_whole_comparison(tmp_path, capsys):
    "With a checkout in whose place a model stands that knows nothing, and two steps of ours."
    for name, code in STAND_IN.items():
        (tmp_path / "nano" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nano" / name).write_text(code)
    file, found = play(tmp_path), tmp_path / "found.json"
    line = [tmp_path / "nano", file, "--seeds", 1, "--threads", 1, "--steps", 1, "--our_steps", 2, "--json", found]
    duel.main([str(word) for word in line])
    text, got = file.read_text(encoding="utf-8"), json.loads(found.read_text())
    rows = {r["who"]: r for r in got["rows"]}
    assert list(rows) == ["nanoGPT", *duel.RECIPES]
    assert rows["nanoGPT"]["loss"] == pytest.approx(math.log(len(set(text))), abs=1e-4)
    for name in duel.RECIPES:
        assert 0 < rows[name]["loss"] < 1.5 * math.log(len(set(text)))
        assert rows[name]["wall"] > 0 < rows[name]["processor"]
    assert ["loss_long" in rows[name] for name in rows] == [False, False, True], "who reads more is scored on more too"
    printed = capsys.readouterr().out
    assert "| nanoGPT | 0 | " in printed and f"| characters | 0 | {rows['characters']['loss']:.4f}" in printed
    assert got["judged"] == duel.judged(got["rows"]) and all(f"{what}: " in printed for what in got["judged"])


def test_the_table_and_the_verdict_compare_within_a_round():
    times = {"nanoGPT": [(90.0, 1.88), (60.0, 1.90)], "characters_quick": [(15.0, 1.89), (11.0, 1.90)],
             "characters": [(91.0, 1.40), (59.0, 1.47)]}
    rows = [dict(who=who, seed=seed, loss=some[seed][1], wall=some[seed][0], processor=2 * some[seed][0])
            for seed in (0, 1) for who, some in times.items()]
    assert list(duel.judged(rows).values()) == ["1 of 2", "1 of 2", "1 of 2", "1 of 2"]
    lines = duel.by_seed(rows).splitlines()
    assert lines[3] == "| characters_quick | 0 | 1.8900 |  | 15.0 | 0.167 | 30.0 | 0.167 |"
    assert lines[7] == "| characters | 1 | 1.4700 |  | 59.0 | 0.983 | 118.0 | 0.983 |"
