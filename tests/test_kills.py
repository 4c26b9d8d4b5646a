"""Fifty times kill -9 in one run of three minutes, and it ends with the weights and the lines of a run that nobody disturbed.

`pytest --slow -n0 -s tests/test_kills.py` takes some twenty minutes on a quiet machine; KILLS=12 before it makes all runs shorter in proportion.
"""
import json, os, random, signal, subprocess, sys, time
from pathlib import Path

import pytest

from house import ROOT, environment

KILLS = int(os.environ.get("KILLS", 50))
STEPS = 40          # for each kill; of the run of minutes 3.6 s
SAME = dict(batch=8, dtype="float32", compile=False, threads=1, log_every=1, save_every=5, eval_every=20, eval_tokens=1500, device="cpu", quiet=True)
WAYS = dict(plain={}, all=dict(accumulate=2, ema=0.9, patience=6, optimizer="adamw", lr=2e-2, batch=4, log_every=3), minutes={})
KEPT = ("tokens", "loss", "lr", "grad_norm", "update_ratio", "val", "val_se", "sample")
STAGES = """
{{preset: tiny, model: {{dropout: 0.1}}, vocab_size: 300, dtype: float32, compile: false, threads: 1, batch: 4, log_every: 1, save_every: 5, eval_every: 20, eval_tokens: 1500,
stages: [{{name: read, kind: train, data: stories, limit: 200, steps: {n}, ctx: 128}},
         {{name: more, kind: train, data: stories, limit: 150, seed: 3, steps: {n}, ctx: 128, optimizer: adamw, accumulate: 2, ema: 0.9}},
         {{name: talk, kind: finetune, data: talks.jsonl, steps: {n}, ctx: 128}}]}}
"""


# In a process of its own: everything is imported once, and each session is a fork, which begins in milliseconds ------

def session(way, kills, folder, repeat=None):
    "Begin a run, or go on with it."
    import torch
    from tiny_llm.assistant.pipeline import pipeline
    from tiny_llm.text.stories import stories
    from tiny_llm.text.tokenizer import train_tokenizer
    from tiny_llm.training.train import train
    from tiny_llm.transformer.model import Transformer, preset
    torch.set_num_threads(1)
    if way == "pipeline": return pipeline(folder.parent/"stages.yaml", folder, resume=(folder/"pipeline.json").exists(), device="cpu", quiet=True)
    docs, resume = stories(200, seed=0), (folder/"config.json").exists()
    tok = train_tokenizer(docs, vocab_size=300)
    torch.manual_seed(0)
    budget = dict(minutes=3.6 * kills / 60) if way == "minutes" else dict(steps=STEPS * kills)
    settings = {n: SAME[n] for n in ("device", "quiet")} | ({} if resume else dict(repeat=str(repeat)) if repeat else SAME | budget | WAYS[way])
    train(Transformer(preset("tiny", vocab_size=len(tok), ctx=128, dropout=0.1)), tok, docs, val=stories(20, seed=1, split="val"), out=folder, resume=resume, **settings)


def fork(*args, log):
    if pid := os.fork(): return pid
    code = 1
    try:
        sys.stdout = sys.stderr = open(log, "a")
        session(*args)
        code = 0
    except BaseException:
        import traceback
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def rows(folder):
    "What all runs of a folder have logged; a line that is being written is left out."
    files = [f for name in ("", "read", "more", "talk") if (f := folder/name/"metrics.jsonl").exists()]
    return [[json.loads(line) for line in f.read_text().split("\n")[:-1]] for f in files]


def so_far(folder, of):
    "Steps of all runs of a folder, or seconds on the clock of the one."
    last = [r[-1][of] for r in rows(folder) if r]
    return sum(last)


def disturbed(way, kills, folder, end, of, log, rng):
    """Kill as often, each time a little after so many steps (or seconds of the run's own clock) were seen; then let it come to its end.

    A run of minutes may end before: what a start costs is part of its minutes, and on a busy machine that is much.
    """
    early = "ended before kill {}: {}"
    targets, killed, pid = sorted(rng.uniform(0, 0.97) * end for _ in range(kills)), 0, None
    for target in targets:
        pid = fork(way, kills, folder, log=log)
        before, began = so_far(folder, "step"), time.monotonic()
        while so_far(folder, of) < target or so_far(folder, "step") <= 0:
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone: return None if of == "seconds" and status == 0 else early.format(killed + 1, log.read_text()[-2000:]), killed
            time.sleep(0.005)
        a_step = (time.monotonic() - began) / max(1, so_far(folder, "step") - before)
        time.sleep(rng.uniform(0, 2) * min(a_step, 0.5))         # anywhere: in a step, an evaluation, a save
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code != -signal.SIGKILL: return None if of == "seconds" and code == 0 else early.format(killed + 1, log.read_text()[-2000:]), killed
        killed += 1
    code = os.waitstatus_to_exitcode(os.waitpid(fork(way, kills, folder, log=log), 0)[1])
    return (log.read_text()[-2000:] if code else None), killed


def whole(way, kills, folder, log, *more):
    code = os.waitstatus_to_exitcode(os.waitpid(fork(way, kills, folder, *more, log=log), 0)[1])
    assert code == 0, log.read_text()[-2000:]


def by_step(lines):
    "What was logged of each step, but times. A run of minutes may log its last step before it sees that the time is up, and evaluate in a line of its own."
    found = {}
    for r in lines: found.setdefault(r["step"], {}).update({n: r[n] for n in KEPT if n in r})
    return found


def differences(a, b):
    "What two finished folders do not have in common, apart from times."
    import torch
    from tiny_llm.training.folder import load
    found, names = [], [n for n in ("read", "more", "talk") if (a/n).exists()] or [""]
    for place in [*(f"{n}/{part}" for n in names for part in ("last", "best")), *(["model"] if (a/"model").exists() else [])]:
        one, two = (load(x/place.lstrip("/"), "cpu")[0].state_dict() for x in (a, b))
        if not all(torch.equal(one[n], two[n]) for n in one): found.append(f"weights of {place}")
    for name, one, two in zip(names, rows(a), rows(b), strict=True):
        for what in ("loss", "val"):
            steps = [r["step"] for r in two if what in r]
            if steps != sorted({*steps}): found.append(f"{what} in {name or 'the run'} is doubled: {[s for s, t in zip(steps, steps[1:]) if s >= t]}")
        if by_step(one) != by_step(two): found.append(f"lines of {name or 'the run'}: steps {[s for s in by_step(one) if by_step(one)[s] != by_step(two).get(s)][:5]}")
    for folder in (f for n in names for f in (b/n).iterdir()):
        if folder.name.startswith(".") and folder.name != ".lock": found.append(f"left behind: {folder.name}")
    return found


def main(way, kills, room, seed):
    import tiny_llm.assistant.pipeline, tiny_llm.text.stories, tiny_llm.training.train       # noqa: F401, before the forks
    kills, room, rng = int(kills), Path(room), random.Random(f"{way} {seed}")
    log, calm, cut = room/"log", room/"calm", room/"cut"
    if way == "pipeline":
        (room/"stages.yaml").write_text(STAGES.format(n=STEPS * kills // 3))
        (room/"talks.jsonl").write_text("".join(json.dumps(dict(instruction=f"Say {n}.", output=f"It is {n}!")) + "\n" for n in range(80)))
    began = time.monotonic()
    os.chdir(room)
    if way != "minutes": whole(way, kills, calm, log)
    calmly = time.monotonic() - began
    end, of = (3.6 * kills, "seconds") if way == "minutes" else (so_far(calm, "step"), "step")
    wrong, killed = disturbed(way, kills, cut, end, of, log, rng)
    if way == "minutes" and not wrong: whole(way, kills, calm, log, cut)          # the same steps again, at the same shares of the run
    if not wrong: wrong = ", ".join(differences(calm, cut))
    stopped = [json.loads(f.read_text())["stopped"] for f in sorted(cut.rglob("summary.json")) if f.parent != cut or way != "pipeline"]
    print(json.dumps(dict(way=way, kills=killed, steps=so_far(cut, "step"), stopped=stopped, calm_seconds=round(calmly), seconds=round(time.monotonic() - began), wrong=wrong)), flush=True)


# From here: tests ----------------------------------------------------------------------------------------------------

def killed(tmp_path, way, kills):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_kills import main; main(*sys.argv[1:])"
    seed = random.randrange(10 ** 6)
    p = subprocess.run([sys.executable, "-c", code, way, str(kills), str(tmp_path), str(seed)], capture_output=True, text=True, env=environment(PYTHONPATH=str(ROOT)))
    assert p.returncode == 0, p.stderr[-4000:]
    found = json.loads(p.stdout.splitlines()[-1])
    print(f"\nseed {seed}: {found}")
    assert not found["wrong"], found
    assert found["kills"] == kills or way == "minutes" and found["kills"] > 0
    return found


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked")


@linux
def test_three_kills(tmp_path): killed(tmp_path, "all", 3)


@linux
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kills", [KILLS])
@pytest.mark.parametrize("way", [*WAYS, "pipeline"])
def test_many_kills(tmp_path, way, kills):
    "Of one run: in steps; with accumulation, averaged weights and patience; in minutes, then repeated. A pipeline is killed a fifth as often."
    found = killed(tmp_path, way, max(3, kills // 5) if way == "pipeline" else kills)
    assert len(found["stopped"]) == (3 if way == "pipeline" else 1)
