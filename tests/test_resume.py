"A run that was stopped, killed or had no room goes on as if nothing had happened."
import json, os, random, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch

from house import environment
from tiny_llm.basics import UserError
from tiny_llm.training.folder import load
from tiny_llm.transformer.model import Transformer, preset
from tiny_llm.training.run import Run
from tiny_llm.text.stories import stories
from tiny_llm.text.tokenizer import train_tokenizer
from tiny_llm.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent


def parts(seed=0):
    "The same documents and tokenizer each time, and a model whose initial weights depend on `seed`."
    docs = stories(80, seed=0)
    tok = train_tokenizer(docs, vocab_size=300)
    torch.manual_seed(seed)
    return Transformer(preset("tiny", vocab_size=len(tok), ctx=64, d_model=32)), tok, docs


def go(out=None, seed=0, **kw):
    model, tok, docs = parts(seed)
    return train(model, tok, docs, val=docs[:2], out=out, device="cpu", compile=False, quiet=True, **kw)


def weights(run): return [p.detach().clone() for p in run.model.parameters()]


@pytest.mark.parametrize("dtype, optimizer", [("float32", "adamw"), ("bfloat16", "adamw"), ("float32", "muon")])
def test_a_pause_changes_no_bit(tmp_path, dtype, optimizer):
    settings = dict(steps=60, batch=2, dtype=dtype, optimizer=optimizer)
    whole = go(**settings)
    paused = go(tmp_path/"run", stop_at=30, **settings)
    assert (paused.summary["stopped"], paused.summary["step"]) == ("paused", 30)
    rest = go(tmp_path/"run", seed=7, resume=True)  # other initial weights: all must come from the folder
    assert rest.summary["step"] == 60
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(rest)))
    losses = lambda run: [(r["step"], r["loss"], r["lr"]) for r in run.metrics if "loss" in r]
    assert losses(whole) == losses(rest)
    last, _ = load(tmp_path/"run"/"last")
    assert all(torch.equal(a, b) for a, b in zip(weights(rest), last.parameters()))


def test_what_is_timed_draws_no_chance(tmp_path):
    "A run of minutes tries steps before its first one, and again when it goes on; its repeat does not. Dropout is the same in all of them."
    def go_on(out, seed=0, **kw):
        _, tok, docs = parts()
        torch.manual_seed(seed)
        model = Transformer(preset("tiny", vocab_size=len(tok), ctx=64, d_model=32, dropout=0.3))
        return train(model, tok, docs, val=docs[:2], out=out, device="cpu", quiet=True, **kw)
    go_on(tmp_path/"run", minutes=9, batch=2, dtype="float32", compile=False, threads=1, stop_at=3)
    run = go_on(tmp_path/"run", seed=7, resume=True, stop_at=6)
    assert all(torch.equal(a, b) for a, b in zip(weights(run), weights(go_on(tmp_path/"again", repeat=str(tmp_path/"run")))))


@pytest.mark.parametrize("last", [0, 12], ids=["before the first step", "after the last one"])
def test_cut_off_between_a_save_and_what_follows(tmp_path, last):
    "At either end of a run an evaluation is made again when it goes on: no line twice, and dropout draws what it would have drawn."
    class Cut(Exception): pass
    def cut(event, t):
        if event == "save" and t.step == last: raise Cut
    def go_on(out, seed=0, **kw):
        _, tok, docs = parts()
        torch.manual_seed(seed)
        model = Transformer(preset("tiny", vocab_size=len(tok), ctx=64, d_model=32, dropout=0.3))
        return train(model, tok, docs, val=docs[:2], out=out, device="cpu", quiet=True, **kw)
    settings = dict(steps=12, batch=2, dtype="float32", compile=False, log_every=2, eval_every=5, ema=0.5)
    whole = go_on(tmp_path/"whole", **settings)
    with pytest.raises(Cut): go_on(tmp_path/"run", callbacks=[cut], **settings)
    rest = go_on(tmp_path/"run", seed=7, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(rest)))
    kept = ("step", "tokens", "loss", "lr", "val", "sample")
    lines = [[{n: r[n] for n in kept if n in r} for r in run.metrics] for run in (whole, rest, Run(tmp_path/"run"))]
    assert lines[0] == lines[1] == lines[2] and [r["step"] for r in lines[0]] == [0, 2, 4, 5, 6, 8, 10, 12]


SESSION = """
import sys; sys.path.insert(0, sys.argv[3])
import torch; torch.set_num_threads(1)
from test_resume import go
from pathlib import Path
folder = Path(sys.argv[1])
print("ready", flush=True)
go(folder, steps=60, batch=2, save_every=1, eval_every=5, log_every=1, dtype="float32", resume=sys.argv[2] == "resume")
print("done", flush=True)
"""


def session(folder, resume, kill_after=None):
    "A process that trains; killed so many seconds after its imports. Returns whether it came to its end."
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    p = subprocess.Popen([sys.executable, "-c", SESSION, str(folder), "resume" if resume else "new", str(Path(__file__).parent)],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert p.stdout.readline() == "ready\n", p.stderr.read()
        if kill_after is not None:
            time.sleep(kill_after)
            if p.poll() is None: os.kill(p.pid, signal.SIGKILL)
        out, err = p.communicate(timeout=120)
    finally:
        if p.poll() is None: p.kill()
    if p.returncode != -signal.SIGKILL: assert p.returncode == 0, err
    return p.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_kill_minus_nine_at_random_moments(tmp_path):
    folder, rng, done, kills = tmp_path/"run", random.Random(), False, 0
    while kills < 3 and not done:
        done = session(folder, resume=(folder/"config.json").exists(), kill_after=rng.uniform(0.1, 1.5))
        kills += not done
        for name in ("last", "best"):
            if (folder/name).exists(): load(folder/name)  # whole: hashes are checked
    if not done: assert session(folder, resume=(folder/"config.json").exists())
    run = Run(folder)
    assert run.summary["stopped"] == "finished" and run.summary["step"] == 60
    steps = [r["step"] for r in run.metrics if "loss" in r]
    assert steps == list(range(1, 61))
    killed, _ = load(folder/"last")
    whole = go(steps=60, batch=2, dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), killed.parameters()))
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "best", "config.json", "last", "metrics.jsonl", "plots.png", "summary.json"]


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path/"disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tmpfs")
def test_a_full_disk_leaves_the_checkpoint(small_disk):
    settings = dict(steps=40, batch=2, dtype="float32")
    go(small_disk/"run", stop_at=10, **settings)
    before = {p.relative_to(small_disk): p.read_bytes() for p in (small_disk/"run"/"last").rglob("*") if p.is_file()}
    ballast = small_disk/"ballast"
    with pytest.raises(OSError), open(ballast, "wb", buffering=0) as f:
        while True: f.write(b"\0" * 4096)
    with pytest.raises(UserError, match="No space left on device.*is intact"): go(small_disk/"run", resume=True)
    assert {p.relative_to(small_disk): p.read_bytes() for p in (small_disk/"run"/"last").rglob("*") if p.is_file()} == before
    ballast.unlink()
    rest = go(small_disk/"run", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(rest), weights(go(**settings))))


def test_a_run_in_minutes_ends_on_time_and_resumes(tmp_path):
    run = go(tmp_path/"run", minutes=0.6, batch=2, stop_at=2)      # two small steps fit into 36 s on any machine
    assert run.summary["stopped"] == "paused"
    run = go(tmp_path/"run", batch=2, resume=True)
    lr = [r["lr"] for r in run.metrics if "lr" in r]
    assert run.summary["stopped"] == "finished" and lr[-1] < 0.1 * max(lr)
    assert json.loads((tmp_path/"run"/"config.json").read_text())["minutes"] == 0.6


@pytest.mark.slow
def test_a_run_in_steps_does_not_depend_on_how_busy_the_machine_is(tmp_path):
    "The same line twice, the second time beside two busy loops and with nothing measured before: the same settings, the same weights."
    line = [sys.executable, "-m", "tiny_llm", "train", "--data", "stories", "--limit", "200", "--vocab_size", "300", "--preset", "tiny", "--ctx", "64",
            "--batch", "4", "--steps", "12", "--seed", "3"]
    def trained(name):
        env = environment(PYTHONPATH=str(ROOT), XDG_CACHE_HOME=str(tmp_path/f"cache_{name}"))
        p = subprocess.run([*line, "--out", name], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert p.returncode == 0, p.stderr
        made = json.loads((tmp_path/name/"config.json").read_text())
        return [made[k] for k in ("dtype", "compile", "batch", "threads")], load(tmp_path/name/"last", "cpu")[0].state_dict()
    settings, quiet = trained("quiet")
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try: same, busy = trained("busy")
    finally:
        for p in loops: p.kill()
    assert same == settings and all(torch.equal(busy[k], w) for k, w in quiet.items())


def test_a_second_stop_says_what_is_kept(tmp_path, monkeypatch):
    "Ctrl-C between two steps is obeyed, a second one during the save too; the run goes on from the checkpoint before."
    from tiny_llm.training import run as around, train as trainer
    step, write = trainer.Training.advance, around.write_checkpoint
    def pressed_once(t, share):
        if t.step == 4: signal.raise_signal(signal.SIGINT)
        return step(t, share)
    def pressed_again(folder, model, tok, opt, state, *more):
        if state["step"] == 5: signal.raise_signal(signal.SIGINT)
        return write(folder, model, tok, opt, state, *more)
    settings = dict(steps=9, batch=2, dtype="float32", save_every=3, eval_every=3)
    with monkeypatch.context() as m:
        m.setattr(trainer.Training, "advance", pressed_once)
        m.setattr(around, "write_checkpoint", pressed_again)
        with pytest.raises(KeyboardInterrupt, match="last holds step 3, and resume goes on from there"): go(tmp_path/"run", **settings)
    rest = go(tmp_path/"run", resume=True)
    assert rest.summary["step"] == 9 and all(torch.equal(a, b) for a, b in zip(weights(rest), weights(go(**settings))))


def test_what_is_no_number_is_not_saved(tmp_path, monkeypatch):
    from tiny_llm.training import train as trainer
    model, tok, docs = parts()
    with torch.no_grad(): next(model.parameters())[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite"): train(model, tok, docs, val=docs[:2], steps=3, out=tmp_path/"nan", quiet=True)
    assert not (tmp_path/"nan"/"best").exists() and not (tmp_path/"nan"/"last").exists()
    step = trainer.Training.advance
    def spoils(t, share):
        loss = step(t, share)
        if t.step == 5:
            with torch.no_grad(): next(t.model.parameters())[0, 0] = float("inf")
        return loss
    monkeypatch.setattr(trainer.Training, "advance", spoils)
    with pytest.raises(UserError, match="step 5: .*not saved|NaN or infinite"): go(tmp_path/"inf", steps=9, batch=2, save_every=1)
    assert json.loads((tmp_path/"inf/last/state/state.json").read_text())["step"] == 4
