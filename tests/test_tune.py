"The search for settings: what it proposes, gives up, keeps over a kill, writes and refuses."
import math, signal, sqlite3, subprocess, sys, time
from types import SimpleNamespace

import optuna
import pytest
import torch

from tiny_llm.basics import UserError
from tiny_llm.deployment import cli
from tiny_llm.text.batches import tokenize
from tiny_llm.text.stories import stories
from tiny_llm.text.tokenizer import train_tokenizer
from tiny_llm.training.config import TrainConfig, read_config, split_record
from tiny_llm.training.run import BEST_LR
from tiny_llm.training.tune import SPACE, ask, draw, may_begin, point_of, reports, settings_at, tune
from tiny_llm.transformer.model import preset

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = stories(200, seed=3)
TOK = train_tokenizer([str(d) for d in DOCS[:100]], 300)
TOKENS, HELD = tokenize(DOCS, TOK), tokenize(stories(8, seed=3, split="val"), TOK)
CFG = preset("tiny", vocab_size=len(TOK), ctx=32, d_model=16)
BASE = TrainConfig(batch=4, dtype="float32")


def search(out=None, trials=4, config=BASE, **how): return tune(CFG, TOK, TOKENS, config, val=HELD, out=out, trials=trials, **dict(trial_steps=8, device="cpu", quiet=True) | how)


def losses(t): return [(x.value, x.state.name, x.params) for x in t.over]


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
import test_tune as here
begun = [0]
def die(event, training):
    begun[0] += event == "begin"
    if begun[0] == 4 and event == "step" and training.step == 3: os.kill(os.getpid(), signal.SIGKILL)
here.torch.set_num_threads(1)
here.search(sys.argv[1], trials=8, callbacks=[die])
"""


@pytest.mark.slow
def test_a_kill_loses_no_trial(tmp_path):
    out = tmp_path/"s"
    end = subprocess.run([sys.executable, "-c", KILLED, str(out)], capture_output=True, text=True, timeout=300)
    assert end.returncode == -signal.SIGKILL, end.stderr
    with sqlite3.connect(out/"study.db") as db: states = [s for s, in db.execute("select state from trials order by number")]
    assert states == ["COMPLETE"]*3 + ["RUNNING"]
    t, whole = search(out, trials=8, resume=True), search(trials=8)
    assert losses(t) == losses(whole)                        # as if nothing had happened
    every = t.study.get_trials()
    assert [x.state.name for x in every].count("FAIL") == 1 and len(every) == 9 and every[3].state.name == "FAIL"
    assert every[4].params == every[3].params and every[4].user_attrs["again"] == 3


def test_an_interrupted_search_goes_on(tmp_path):
    begun = []
    def stop(event, training):
        begun.append(event == "begin")
        if sum(begun) == 2 and event == "step": training.stop = "interrupted"
    with pytest.raises(KeyboardInterrupt, match="--resume"): search(tmp_path/"s", trials=3, callbacks=[stop])
    assert losses(search(tmp_path/"s", trials=3, resume=True)) == losses(search(trials=3))


def test_what_does_not_belong_together_is_refused(tmp_path):
    out = tmp_path/"s"
    with pytest.raises(UserError, match="no study.db"): search(out, resume=True)
    with pytest.raises(UserError, match="give out"): search(resume=True)
    t = search(out, trials=1)
    with pytest.raises(UserError, match="already holds a search"): search(out)
    for how, word in (dict(trial_steps=9), "trial is 9"), (dict(seed=4), "seed is 4"), (dict(search="lr"), "search is"), (dict(config=TrainConfig(batch=5)), "base is"), (dict(prune=False), "prune is"), (dict(sampler="random"), "sampler is"):
        with pytest.raises(UserError, match=word): search(out, resume=True, **how)
    with pytest.raises(UserError, match="text is"): tune(CFG, TOK, tokenize(DOCS[:90], TOK), BASE, val=HELD, out=out, trials=2, trial_steps=8, device="cpu", quiet=True, resume=True)
    assert len(search(out, trials=1, resume=True).over) == len(t.over) == 1
    for how, word in (dict(trials=0), "trials is 0"), (dict(minutes=-1), "minutes is -1"), (dict(sampler="tp"), "choose one of tpe"), (dict(trial_steps=1.5), "trial_steps is 1.5"), (dict(search="lr,warmap"), "warmup"):
        with pytest.raises(UserError, match=word): search(**how)


def test_one_process_owns_the_folder(tmp_path):
    hold = "import sys\nfrom tiny_llm.basics import owned\nwith owned(sys.argv[1]):\n    print('mine', flush=True)\n    sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path/"s")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match="in use by"): search(tmp_path/"s")
        other.stdin.close()
    assert len(search(tmp_path/"s", trials=1).over) == 1


def test_without_optuna_the_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="pip install optuna"): search()


def test_settings_of_a_point_cost_the_same():
    usual = TrainConfig(lr=0.04, batch=8, optimizer="muon")
    for power in range(-2, 3):
        found = settings_at(dict(batch=power), usual, 100)
        assert found["batch"]*found["steps"] == 800 and "lr" not in found
    assert settings_at(dict(lr=0.5, optimizer="adamw"), usual)["lr"] == pytest.approx(BEST_LR["adamw"])      # the base has twice the usual rate
    assert settings_at(dict(warmup=0.1), usual) == dict(warmup=0.1)
    assert settings_at(dict(batch=-2), TrainConfig(lr=0.02, batch=2), 10) == dict(batch=1, steps=20)


def test_every_setting_is_drawn_from_its_range():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [draw(study.ask(), list(SPACE)) for _ in range(200)]
    for name, (low, *_, high) in SPACE.items():
        values = [p[name] for p in points]
        if isinstance(low, str): assert set(values) == set(SPACE[name])
        else: assert low <= min(values) < max(values) <= high
    assert 60 < sum(p["lr"] < 1 for p in points) < 140        # as many below the usual rate as above it
    for p in points[:20]: TrainConfig(**settings_at(p, TrainConfig(lr=0.02, batch=8), 50))


def test_the_first_trial_is_the_base_and_the_first_proposals_are_not_the_same():
    t = search(trials=3, search="lr,batch,weight_decay,decay", config=TrainConfig(batch=4, dtype="float32", decay="cosine", weight_decay=0.0))
    assert t.over[0].params == point_of(t.usual, t.names) == dict(lr=1.0, batch=0, weight_decay=0.003, decay="cosine")
    assert len({x.params["lr"] for x in t.over}) == 3


def test_the_sampler_is_the_one_asked_for():
    study = optuna.create_study()
    ask(study, "tpe", 0)
    assert isinstance(study.sampler, optuna.samplers.TPESampler)
    ask(study, "random", 0)
    assert isinstance(study.sampler, optuna.samplers.RandomSampler)


def test_reports_and_stops():
    told = []
    trial = SimpleNamespace(report=lambda value, look: told.append((value, look)), should_prune=lambda: True)
    def run(done, prune=True, event="evaluate", report=None):
        t = SimpleNamespace(step=done, stop=None, metrics=[dict(val=3.0 + done)], clock=SimpleNamespace(progress=lambda step: step/10))
        (report or reports(trial, prune))(event, t)
        return t.stop
    assert run(0) is run(4, event="step") is None and told == []
    assert run(4) == "pruned" and run(4, prune=False) is None and run(10) is None
    assert told == [(7.0, 4), (7.0, 4), (13.0, 10)]
    report = reports(trial)
    run(4, report=report), run(4, report=report)
    assert len(told) == 4


def test_the_worse_half_is_given_up(tmp_path):
    t = search(trials=14, search="lr", trial_steps=20)
    cut = [x for x in t.over if x.state.name == "PRUNED"]
    assert cut and all(x.user_attrs["stopped"] == "pruned" and x.user_attrs["tokens"] < t.whole[0].user_attrs["tokens"] for x in cut)
    assert t.loss == min(x.value for x in t.whole)
    assert all(x.state.name == "COMPLETE" for x in search(trials=6, search="lr", prune=False).over)


def test_a_run_without_numbers_is_given_up():
    def spoil(event, training):
        if event == "step" and training.config.lr > 0.02:
            with torch.no_grad(): training.model.embed.weight.fill_(math.nan)
    t = search(trials=5, search="lr", callbacks=[spoil])
    lost = [x for x in t.over if x.params["lr"] > 1]
    assert lost and all(x.user_attrs["stopped"] == "diverged" and x.state.name == "PRUNED" for x in lost)
    assert t._best().params["lr"] <= 1 and "trials" in dict(t.rows())


def test_the_budget_holds(tmp_path):
    study = optuna.create_study()
    assert may_begin(study, 3, 0.001, 5.0)                # the first one always
    for _ in range(2):
        trial = study.ask()
        time.sleep(0.02)
        study.tell(trial, 1.0)
    assert may_begin(study, 3) and not may_begin(study, 2)
    assert may_begin(study, None, 10, 9) and not may_begin(study, None, 10, 9.999) and not may_begin(study, 9, 10, 11)
    assert len(search(tmp_path/"s", trials=None, minutes=1e-6).over) == 1
    assert len(search(tmp_path/"s", trials=None, minutes=1e-6, resume=True).over) == 1


def test_the_best_settings_are_a_file_that_train_takes(tmp_path):
    t = search(tmp_path/"s", trials=5, config=TrainConfig(batch=4, dtype="float32", steps=40, ctx=16))
    found, best = split_record(read_config(tmp_path/"s"/"best.yaml"))[0], t.best()
    assert found == best and found.steps*found.batch == pytest.approx(160, rel=0.1) and found.ctx == 16
    settings = t._best().user_attrs["settings"]
    assert all(getattr(found, name) == settings[name] for name in t.names)
    assert (tmp_path/"s"/"tune.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "tune --preset tiny --ctx 32 --vocab_size 300 --limit 60 --batch 4 --dtype fp32 --trial_steps 6 --device cpu --search lr,batch"
    code, out, err = cli.try_line(f"{line} --trials 2 --out s", show=False)
    assert code == 0 and "best trial" in out and "trial 2:" in err, out + err
    code, out, err = cli.try_line(f"{line} --trials 3 --out s --resume", show=False)
    assert code == 0 and "3, of which" in out, out + err
    code, out, err = cli.try_line("train --config s/best.yaml --steps 3 --out r --device cpu", show=False)
    assert code == 0, err
    assert split_record(read_config("r/config.json"))[0].lr == read_config("s/best.yaml")["lr"]
    for words in ("--search warmap", "--out s", "--trials 0", "--preset tinny"):
        code, out, err = cli.try_line(f"tune {words}", show=False)
        assert code == 2 and err.count("\n") == 1, err
