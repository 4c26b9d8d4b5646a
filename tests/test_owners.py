"Two processes and one folder: one owns it, the other is told so, and whatever is killed when, no run is lost and none is mixed."
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest

from house import ROOT, environment

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked")
REFUSED = r"is in use by |already holds a |is finished|holds no (run|quickstart) to resume|is not empty"

# Everything is imported once; each session is then a fork of this process, which begins in milliseconds.
SCRIPT = '''
import contextlib, io, json, os, random, signal, sys, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
from tiny_llm.assistant.finetune import finetune
from tiny_llm.basics import UserError
from tiny_llm.deployment.quickstart import RECIPE, quickstart
from tiny_llm.deployment.cli import main
from tiny_llm.text.dialogues import conversations
from tiny_llm.text.stories import stories
from tiny_llm.text.tokenizer import train_tokenizer
from tiny_llm.training.train import train
from tiny_llm.training.folder import load
from tiny_llm.training.run import Run
from tiny_llm.transformer.model import Transformer, preset
from dataclasses import replace

docs = stories(60, seed=0)
tok = train_tokenizer(docs, vocab_size=300)
chats = [c[:2] for c in conversations(40, seed=0) if len(c[1]["content"]) < 60]
same = dict(steps=25, batch=2, dtype="float32", compile=False, save_every=1, eval_every=5, log_every=1, quiet=True, device="cpu")
small = replace(RECIPE, stories=replace(RECIPE.stories, preset="tiny", vocab_size=300, batch=2, ctx=64), chat=replace(RECIPE.chat, batch=2, ctx=192),
                ctx=512, held_out=10, judged=2, stories_per_minute=4000, chats_per_minute=6000)

def model():
    torch.manual_seed(0)
    return Transformer(preset("tiny", vocab_size=len(tok), ctx=128, d_model=32))

def session(kind, folder, resume):
    if kind == "train": train(model(), tok, docs, val=docs[:2], out=folder, resume=resume, **({} if resume else same) | dict(quiet=True, device="cpu"))
    if kind == "finetune": finetune(model(), tok, chats, val=chats[:2], out=folder, resume=resume, **({} if resume else same) | dict(quiet=True, device="cpu"))
    if kind == "quickstart": quickstart(None if resume else 0.02, folder, device="cpu", preset="tiny", resume=resume, recipe=small)

def fork(kind, folder, resume, log):
    pid = os.fork()
    if pid: return pid
    code = 1
    with open(log, "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        try:
            session(kind, folder, resume)
            code = 0
        except UserError as e:
            print("REFUSED", e)
            code = 2
        except BaseException: traceback.print_exc()
    os._exit(code)

def outcome(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def begun(kind, folder): return (folder / ("quickstart.json" if kind == "quickstart" else "config.json")).exists()

def over(kind, folder):
    file = folder / "summary.json"
    return file.exists() and (kind == "quickstart" or json.loads(file.read_text())["stopped"] == "finished")

def interleaving(kind, seed, room):
    "Starts, resumes and kills at random moments; then the run is brought to its end. What went wrong, or None."
    rng, folder, log, live, codes = random.Random(f"{kind} {seed}"), room / f"{kind}{seed}", room / f"{kind}{seed}.log", [], []
    for _ in range(rng.randint(4, 8)):
        if live and rng.random() < 0.35: os.kill(rng.choice(live), signal.SIGKILL)
        else: live.append(fork(kind, folder, rng.random() < 0.5 and folder.exists(), log))
        time.sleep(rng.choice([0, 0.01, 0.1, 0.4]))
    codes = [outcome(pid) for pid in live]
    if 1 in codes: return "a session ended in a traceback: " + log.read_text()[-1500:]
    for _ in range(3):
        if over(kind, folder): break
        codes.append(outcome(fork(kind, folder, begun(kind, folder), log)))
    if not over(kind, folder): return f"the run cannot be brought to its end ({codes}): " + log.read_text()[-1500:]
    for part in ([folder / "stories", folder / "chat"] if kind == "quickstart" else [folder]):
        run = Run(part)
        steps = [r["step"] for r in run.metrics if "loss" in r]
        if steps != sorted(set(steps)): return f"metrics of {part.name} are mixed: {steps}"
        if kind != "quickstart" and steps != list(range(1, 26)): return f"steps {steps}"
        load(part / "last"), load(part / "best")          # whole: fingerprints are checked
    if kind == "quickstart": load(folder)
    elif not same_weights(kind, folder): return "other weights than those of a run that nobody disturbed"
    rest = [p.name for p in folder.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    if rest: return f"left behind: {rest}"

whole = {}
def same_weights(kind, folder):
    if kind not in whole:
        session(kind, folder.with_name(f"undisturbed_{kind}"), False)
        whole[kind] = load(folder.with_name(f"undisturbed_{kind}") / "last")[0].state_dict()
    now = load(folder / "last")[0].state_dict()
    return all(torch.equal(now[name], w) for name, w in whole[kind].items())

if __name__ == "__main__":
    room = Path(sys.argv[1])
    for kind, n in json.loads(sys.argv[2]).items():
        for seed in range(n):
            wrong = interleaving(kind, seed, room)
            said = (room / f"{kind}{seed}.log").read_text()
            print(json.dumps(dict(kind=kind, seed=seed, wrong=wrong, refused=[l for l in said.splitlines() if l.startswith("REFUSED")])), flush=True)
'''


def interleavings(tmp_path, **counts):
    (tmp_path/"interleave.py").write_text(SCRIPT)
    p = subprocess.run([sys.executable, tmp_path/"interleave.py", tmp_path, json.dumps(counts)], capture_output=True, text=True, cwd=tmp_path,
                       env=environment(PYTHONPATH=str(ROOT)))
    rows = [json.loads(line) for line in p.stdout.splitlines() if line.startswith('{"kind"')]
    assert len(rows) == sum(counts.values()), p.stderr[-4000:]
    assert not [r for r in rows if r["wrong"]], "\n".join(f"{r['kind']} {r['seed']}: {r['wrong']}" for r in rows if r["wrong"])
    said = [line for r in rows for line in r["refused"]]
    assert all(re.search(REFUSED, line) for line in said), said
    return said


@linux
def test_some_interleavings(tmp_path):
    assert any("is in use by process " in line for line in interleavings(tmp_path, train=3, finetune=2, quickstart=1))


@linux
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_interleavings(tmp_path): interleavings(tmp_path, train=110, finetune=60, quickstart=30)


HOLD = "from tiny_llm.basics import owned\nwith owned('runs/a'): print('mine', flush=True); input()"


@linux
@pytest.mark.parametrize("line", ["train --steps 3 --resume", "finetune --steps 3 --resume", "quickstart --out runs/a --resume"])
def test_a_command_says_who_has_the_folder(tmp_path, line):
    (tmp_path/"runs/a").mkdir(parents=True)
    (tmp_path/"runs/a/config.json").write_text('{"steps": 3}')
    (tmp_path/"runs/a/quickstart.json").write_text('{"minutes": 1, "seed": 0, "preset": "tiny"}')
    here = dict(cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, **here)
    try:
        assert holder.stdout.readline() == "mine\n"
        words = line.split() + ([] if "--out" in line else ["--out", "runs/a"])
        p = subprocess.run([sys.executable, "-m", "tiny_llm", *words], **here, timeout=120)
        assert p.returncode == 2 and f"in use by process {holder.pid} on " in p.stderr and p.stderr.count("\n") == 1, p.stderr
    finally: holder.kill()


def test_many_processes_are_refused(tmp_path):
    "All commands but train are done by one process; train wants to know where the first of them is."
    for rank, said in (("0", 1), ("1", 0)):
        for words in (["quickstart"], ["train", "--steps", "2"]):
            p = subprocess.run([sys.executable, "-m", "tiny_llm", *words], cwd=tmp_path, capture_output=True, text=True,
                               env=environment(PYTHONPATH=str(ROOT), WORLD_SIZE="2", RANK=rank))
            assert p.returncode == 2 and p.stderr.count("one of 2 processes") == said and p.stderr.count("\n") == said, p.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wish", ["--ctx 64", "--lr 0.5", "--batch 3", "--seed 9", "--optimizer adamw", "--data stories=1", "--limit 5", "--steps 99", "--model runs/other",
                                  "--vocab_size 999", "--preset quick"])
@pytest.mark.parametrize("kind", ["train", "finetune"])
def test_other_wishes_are_refused_at_a_resume(begun, kind, wish):
    if kind == "train" and "--model" in wish or kind == "finetune" and wish.split()[0] in ("--vocab_size", "--preset"): return    # no such option
    from tiny_llm.deployment.cli import try_line
    before = {p: p.stat().st_mtime_ns for p in (begun/f"runs/{kind}").rglob("*")}
    code, out, err = try_line(f"{kind} --out runs/{kind} --resume {wish}", show=False)
    name = wish.split()[0][2:]
    assert code == 2 and err.startswith(f"tiny_llm: {name} is ") and f"the run in runs/{kind} " in err and err.count("\n") == 1, err
    now = {p: p.stat().st_mtime_ns for p in before if p.name not in (".lock", ".owner") and p != begun/f"runs/{kind}"}
    assert all(before[p] == t for p, t in now.items())


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    "A training and a fine-tuning that wait to be resumed."
    from tiny_llm.deployment.cli import try_line
    from tiny_llm.training.folder import read_sealed, write_sealed
    room = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(room)
        shape = "--data stories --limit 200 --vocab_size 300 --preset tiny --ctx 128 --batch 2 --steps 6"
        assert try_line(f"train {shape} --out runs/base", show=False)[0] == 0
        assert try_line(f"train {shape} --seed 1 --out runs/other", show=False)[0] == 0
        assert try_line(f"train {shape} --out runs/train", show=False)[0] == 0
        assert try_line("finetune --model runs/base --limit 200 --ctx 128 --batch 2 --steps 6 --out runs/finetune", show=False)[0] == 0
        for kind in ("train", "finetune"):           # as a stop would have left them
            file = room/f"runs/{kind}/summary.json"
            write_sealed(file, {**read_sealed(file), "stopped": "paused"})
        yield room


def test_one_process_writes_a_corpus(tmp_path):
    from tiny_llm.basics import UserError, owned
    from tiny_llm.text.corpus import open_tokens, tokenize
    from tiny_llm.text.tokenizer import train_tokenizer
    tok, hold = train_tokenizer(["a tale of a cat"] * 9, 270), HOLD.replace("'runs/a'", f"{str(tmp_path)!r}, 'tales'")
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(PYTHONPATH=str(ROOT))) as p:
        assert p.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match=f"tales is in use by process {p.pid} "): tokenize(["a cat"], tok, tmp_path/"tales", quiet=True)
        tokenize(["another cat"], tok, tmp_path/"others", quiet=True)          # beside it all is free
        p.kill()
    tokenize(["a cat"], tok, tmp_path/"tales", quiet=True)
    assert len(open_tokens(tmp_path/"tales", tok)) == 1
