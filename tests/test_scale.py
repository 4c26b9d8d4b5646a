"Several processes under torchrun: the run of one process, whatever its number, its settings and what is killed."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from house import ROOT, environment
from tiny_llm.basics import UserError
from tiny_llm.text.stories import stories
from tiny_llm.text.tokenizer import train_tokenizer
from tiny_llm.training import scale
from tiny_llm.training.folder import read_checkpoint, write_checkpoint
from tiny_llm.training.optim import make_optimizer
from tiny_llm.training.run import Run
from tiny_llm.training.train import train
from tiny_llm.transformer.model import ModelConfig, Transformer, preset
from tiny_llm.transformer.sizes import training_memory

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")

PROGRAM = '''
import json, os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from test_scale import parts, SETTINGS
from tiny_llm.training.scale import processes, restarted
from tiny_llm.training.train import Training, train
asked = json.loads(sys.argv[1])
advance = Training.advance
with processes(None, "cpu") as group:
    for job in asked:
        out, dies, settings = job["out"], job.get("dies"), dict(SETTINGS, **job.get("settings", {{}}))
        group.parallel = job.get("parallel", "ddp")
        def mortal(t, share):
            if dies == t.step and t.group.rank == group.world - 1 and not restarted(out): os.kill(os.getpid(), signal.SIGKILL)
            return advance(t, share)
        Training.advance = mortal
        resume = job.get("resume", False) or restarted(out)
        model, tok, docs = parts()
        train(model, tok, docs, out=out, resume=resume, stop_at=job.get("stop_at"), device="cpu", quiet=True,
              group=group if group.world > 1 else None, **({{}} if resume else settings))
'''
SETTINGS = dict(steps=12, batch=5, optimizer="adamw", dtype="float32", compile=False, log_every=1, eval_every=6, save_every=3)


def parts():
    docs = stories(80, seed=0)
    tok = train_tokenizer(docs, vocab_size=300)
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=len(tok), d_model=32, n_layers=2, n_heads=2, ctx=64)), tok, docs


def under_torchrun(room, n, *jobs, options=(), check=True):
    "Train the jobs one after another with n processes."
    program = room/"program.py"
    program.write_text(PROGRAM.format(tests=str(ROOT/"tests")))
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *options, program, json.dumps(jobs, default=str)]
    p = subprocess.run(line, capture_output=True, text=True, cwd=room, env=environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"))
    assert not check or p.returncode == 0, p.stderr[-4000:]
    return p


def alone(out, **settings):
    model, tok, docs = parts()
    return train(model, tok, docs, out=out, device="cpu", quiet=True, **(SETTINGS | settings))


def losses(folder): return {r["step"]: r["loss"] for r in Run(folder).metrics if "loss" in r}


def off(a, b):
    a, b = losses(a), losses(b)
    assert a.keys() == b.keys()
    return max(abs(a[step] - b[step]) for step in a)


def weights(folder): return load_file(Path(folder)/"last"/"model.safetensors")


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], w) for name, w in b.items())


def test_two_processes_are_one(tmp_path):
    "50 steps, each way of sharing; with parts of steps, an average, recomputation and entropies as well; the folders look alike."
    rich = dict(steps=8, accumulate=2, batch=3, ema=0.9, entropy=True, recompute=True)
    jobs = [dict(out=tmp_path/f"{kind}{more}", parallel=kind, settings=rich if more else dict(steps=50)) for kind in scale.PARALLEL for more in (0, 1)]
    under_torchrun(tmp_path, 2, *jobs)
    for more, settings in enumerate((dict(steps=50), rich)):
        alone(tmp_path/f"one{more}", **settings)
        for kind in scale.PARALLEL:
            assert off(tmp_path/f"one{more}", tmp_path/f"{kind}{more}") < 1e-5, kind
            one, two = Run(tmp_path/f"one{more}"), Run(tmp_path/f"{kind}{more}")
            assert [r["tokens"] for r in one.metrics] == [r["tokens"] for r in two.metrics]
            assert abs(one.summary["val"]["nats_per_token"] - two.summary["val"]["nats_per_token"]) < 1e-5
            assert abs(one.summary["val"]["se"] - two.summary["val"]["se"]) < 1e-5
            ratios = [r["update_ratio"]["matrices"] for r in one.metrics if "update_ratio" in r], [r["update_ratio"]["matrices"] for r in two.metrics if "update_ratio" in r]
            assert ratios[0] and max(abs(a - b) for a, b in zip(*ratios, strict=True)) < 1e-5
            assert two.made["made_with"]["processes"] == 2 and {p.name for p in two.folder.iterdir()} == {p.name for p in one.folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", scale.PARALLEL)
def test_any_number_goes_on(tmp_path, kind):
    "Begun with two, ended with one, two and three; begun with one, ended with two."
    rich = dict(accumulate=2, ema=0.9)
    alone(tmp_path/"one", **rich)
    under_torchrun(tmp_path, 2, *(dict(out=tmp_path/f"to{n}", parallel=kind, stop_at=6, settings=rich) for n in (1, 2, 3)))
    for n in (2, 3): under_torchrun(tmp_path, n, dict(out=tmp_path/f"to{n}", parallel=kind, resume=True))
    model, tok, docs = parts()
    train(model, tok, docs, out=tmp_path/"to1", resume=True, device="cpu", quiet=True)
    model, tok, docs = parts()
    train(model, tok, docs, out=tmp_path/"from1", device="cpu", quiet=True, stop_at=6, **(SETTINGS | rich))
    under_torchrun(tmp_path, 2, dict(out=tmp_path/"from1", parallel=kind, resume=True))
    for name in ("to1", "to2", "to3", "from1"): assert off(tmp_path/"one", tmp_path/name) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", scale.PARALLEL)
def test_a_killed_process_is_started_again(tmp_path, kind):
    "torchrun starts all of them anew, and they end with the weights of a run that nobody disturbed; no line is lost or doubled."
    under_torchrun(tmp_path, 2, dict(out=tmp_path/"whole", parallel=kind))
    p = under_torchrun(tmp_path, 2, dict(out=tmp_path/"killed", parallel=kind, dies=8), options=["--max-restarts=2"])
    assert "SIGKILL" in p.stderr or "exitcode: -9" in p.stderr or "exitcode  : -9" in p.stderr
    assert same_weights(tmp_path/"whole", tmp_path/"killed") and losses(tmp_path/"whole") == losses(tmp_path/"killed")
    assert [r["step"] for r in Run(tmp_path/"killed").metrics] == [r["step"] for r in Run(tmp_path/"whole").metrics]


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path):
    "Trains; is stopped by Ctrl-C, saves and says how to go on; another number of processes ends it; a folder in use is refused in one line."
    def line(n, *more):
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "-m", "tiny_llm", "train", "--out", "run", *more]
    env = environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    small = ["--preset", "tiny", "--vocab_size", "300", "--limit", "100", "--batch", "4", "--ctx", "64", "--log_every", "1", "--dtype", "float32"]
    p = subprocess.Popen(line(2, *small, "--steps", "400", "--parallel", "fsdp"), cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    metrics, until = tmp_path/"run"/"metrics.jsonl", time.monotonic() + 200
    while (not metrics.exists() or metrics.read_text().count("\n") < 6) and time.monotonic() < until and p.poll() is None: time.sleep(0.2)
    p.send_signal(signal.SIGINT)
    said = p.communicate(timeout=200)[1]
    reached = Run(tmp_path/"run").summary
    assert reached["stopped"] == "interrupted" and 0 < reached["step"] < 400, said
    other = subprocess.run(line(2, *small, "--steps", "5"), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert other.returncode and other.stderr.count("tiny_llm: run already holds a run") == 1
    one = subprocess.run([sys.executable, "-m", "tiny_llm", "train", "--out", "run", "--resume"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert one.returncode == 0 and Run(tmp_path/"run").summary["step"] == 400, one.stderr


def test_shards_are_put_together_and_checked(tmp_path):
    "What several processes have written of an optimizer is read by one; a file that was changed is refused."
    model, tok, _ = parts()
    def stepped(seed):
        torch.manual_seed(seed)
        opt = make_optimizer(model, "adamw")
        for p in model.parameters(): p.grad = torch.randn_like(p)
        opt.step()
        return opt
    opt, other = stepped(0), stepped(1)
    dcp.save(opt.state_dict(), no_dist=True, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path/".s.part"), save_distributed=True))
    write_checkpoint(tmp_path/"last", model, tok, opt, dict(step=1), shards=tmp_path/".s.part")
    read_checkpoint(tmp_path/"last", model, tok, other)
    want = opt.state_dict()
    assert want.keys() == other.state_dict().keys() and all(torch.equal(want[name], x) for name, x in other.state_dict().items())
    file = next((tmp_path/"last"/"state"/"optimizer").iterdir())
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="optimizer is missing or damaged"): read_checkpoint(tmp_path/"last", model, tok, other)


def test_what_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="MASTER_ADDR"): scale.processes().__enter__()
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="torchrun --nproc-per-node 2"): scale.processes("ddp").__enter__()
    with pytest.raises(UserError, match="Did you mean 'fsdp'"): scale.Group("fsdp2")


def test_on_paper():
    "One GPU needs what 1.07 sizes says; n of them hold an n-th; recomputing costs a third more operations and fewer bytes."
    cfg = preset("small-llm-7b")
    one, many, again = scale.on_paper(cfg, 1), scale.on_paper(cfg, 64), scale.on_paper(cfg, 64, recompute=True)
    want = training_memory(cfg)
    assert (one["weights"], one["gradients"], one["optimizer"]) == (want["weights"], want["gradients"], want["AdamW"])
    assert one["moved"] == 0 and one["gathered"] == 0 and not one["fits"]
    assert 64 * many["optimizer"] == one["optimizer"] and again["activations"] < many["activations"] / 5
    assert again["operations"] == pytest.approx(4 / 3 * many["operations"])
    assert many["of_peak"] == pytest.approx(0.4) and again["of_peak"] == pytest.approx(0.3)      # messages hide behind products
    ddp = scale.on_paper(preset("tiny"), 2, parallel="ddp")
    assert ddp["moved"] == 4 * ddp["params"] and ddp["weights"] == 4 * ddp["params"]
    assert scale.on_paper(cfg, 16)["messages"] > scale.on_paper(cfg, 8)["messages"] * 0.99


@pytest.mark.parametrize("rows, world", [(1, 2), (5, 2), (7, 3), (64, 8)])
def test_parts_are_cut_as_torch_cuts(rows, world):
    chunks = [len(c) for c in torch.ones(rows).chunk(world)]
    assert scale.part_rows(rows, world) == chunks + [0] * (world - len(chunks))
