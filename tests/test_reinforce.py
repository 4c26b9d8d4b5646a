"Reinforcement: the exact optimum reached, every part against its twin, rewards that fail, runs killed in the middle of a round, the command."
import copy, json, math, os, random, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch

import tiny_llm as tl
from house import ROOT
from tiny_llm.assistant import reinforce as R
from tiny_llm.basics import UserError
from tiny_llm.deployment.cli import try_line
from tiny_llm.text.dialogues import SMALL_TALK, conversations
from tiny_llm.training.code_tasks import code_tasks
from tiny_llm.training.folder import load, save
from tiny_llm.training.run import Run, read_metrics
from tiny_llm.transformer.model import ModelConfig, Transformer

pytestmark = pytest.mark.usefixtures("one_thread")

HOW = dict(quiet=True, device="cpu", dtype="float32", threads=1, eval_every=10_000)
TEXTS = R.small_stories()


@pytest.fixture(scope="module")
def world():
    "(fenced model, tokenizer, ids, ln π0, rewards)"
    tok = tl.train_tokenizer(TEXTS * 5, vocab_size=332)
    ids = torch.tensor([tok.encode(t) + [tok.eos] for t in TEXTS])
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=len(tok), ctx=ids.shape[1], d_model=32, n_layers=2, n_heads=2, d_ff=64, head_dim=16)
    model = R.FencedModel(shape, R.fence_of(ids, len(tok)))
    with torch.no_grad():
        ref = R.all_logprobs(model, ids, tok.bos).double().log_softmax(0)
    return model, tok, ids, ref, torch.tensor([R.small_reward("", t) for t in TEXTS]).double()


def small(tok, seed=0, ctx=48):
    torch.manual_seed(seed)
    return Transformer(ModelConfig(vocab_size=len(tok), ctx=ctx, d_model=32, n_layers=2, n_heads=4, d_ff=64, head_dim=8))


@pytest.fixture(scope="module")
def words(): return tl.train_tokenizer(["a fox had a hat. the cat had a red kite."] * 50 + [m["content"] for c in conversations(30) for m in c], vocab_size=330)


def count_a(prompt, reply): return reply.count("a") / (1 + len(reply))


# The small world

def test_the_policy_goes_to_the_exact_optimum(world):
    "From an untrained reference, in 40 steps, half of the way at least; and to no optimum of another price."
    model, tok, ids, ref, r = world
    goal, net = R.optimum(ref, r, 0.5), copy.deepcopy(model)
    before = R.divergence(ref, goal).item()
    R.reinforce(net, tok, [""], R.small_reward, val=False, **HOW, beta=0.5, group=96, batch=96, steps=40, lr=3e-2, weight_decay=0.0, updates=1, max_tokens=20)
    with torch.no_grad(): end = R.all_logprobs(net, ids, tok.bos).double()
    assert R.divergence(end, goal) < before / 2
    assert R.divergence(end, goal) < min(R.divergence(end, R.optimum(ref, r, b)) for b in (0.2, 2.0))


def test_the_optimum_is_the_best(world):
    _, _, _, ref, r = world
    def J(p): return (p.exp() * r).sum() - 0.3 * R.divergence(p, ref)
    best = R.optimum(ref, r, 0.3)
    for seed in range(5):
        other = (best + 0.1 * torch.randn(len(r), generator=torch.Generator().manual_seed(seed))).log_softmax(0)
        assert J(best) > J(other)
        assert abs(J(best) - J(other) - 0.3 * R.divergence(other, best)) < 1e-9


def test_the_fence_holds(world):
    model, tok, ids, _, _ = world
    made = R.generate_batch(model, tok, [[tok.bos]] * 50, max_tokens=20, seed=0, temperature=1.0)
    known = {tuple(i) for i in ids.tolist()}
    assert all(tuple(m) in known for m in made)
    with torch.no_grad(): assert abs(R.all_logprobs(model, ids, tok.bos).exp().sum() - 1) < 1e-4


# Parts

@pytest.mark.parametrize("G", [2, 3, 8])
def test_advantages_leave_the_reply_itself_out(G):
    r = torch.rand(5, G)
    other = torch.stack([torch.stack([r[i, j] - torch.cat([r[i, :j], r[i, j + 1:]]).mean() for j in range(G)]) for i in range(5)])
    torch.testing.assert_close(R.advantages(r), other)
    scaled = R.advantages(r, scale=True)
    torch.testing.assert_close(scaled.std(1), torch.ones(5), atol=1e-2, rtol=0)
    assert not R.advantages(torch.full((2, G), 0.3)).abs().max() > 1e-6


def test_loss_and_its_gradient_equal_the_formula():
    g = torch.Generator().manual_seed(0)
    for B, T in (1, 1), (4, 7):
        logp = (-torch.rand(B, T, generator=g)).requires_grad_()
        old, A, mask = -torch.rand(B, T, generator=g), torch.randn(B, generator=g), (torch.rand(B, T, generator=g) < 0.7).float()
        for clip in (0.0, 0.2):
            total, out = 0.0, 0
            for i in range(B):
                for t in range(T):
                    rho = (logp[i, t] - old[i, t]).exp()
                    held = min(max(rho, 1 - clip), 1 + clip) if clip else rho
                    total = total - mask[i, t] * min(rho * A[i], held * A[i]) / B
                    out += mask[i, t] * (clip > 0) * (rho > 1 + clip if A[i] > 0 else rho < 1 - clip)
            loss = R.policy_loss(logp, old, A, mask, clip)
            torch.testing.assert_close(loss, total)
            torch.testing.assert_close(*(torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (loss, total)))
            assert abs(R.clipped_share(logp.detach(), old, A, mask, clip) - float(out / mask.sum().clamp_min(1))) < 1e-6
    by_length = R.policy_loss(logp, logp.detach(), A, mask, 0.2, by_length=True)
    torch.testing.assert_close(by_length, -(A * (mask.sum(1) > 0)).mean())


def test_token_logprobs_equal_one_reply_at_a_time(words):
    model = small(words)
    rng = random.Random(0)
    prompts = [[words.bos, *(rng.randrange(len(words)) for _ in range(rng.randrange(6)))] for _ in range(21)]
    replies = [[rng.randrange(len(words)) for _ in range(rng.randint(1, 9))] for _ in range(21)]
    x, y, mask = R.rows_of(prompts, replies)
    with torch.no_grad(): logp, entropy = R.token_logprobs(model, x, y, mask)
    for i, (p, r) in enumerate(zip(prompts, replies)):
        with torch.no_grad(): full = model(torch.tensor([p + r[:-1]]))[0, len(p) - 1:].log_softmax(-1)
        torch.testing.assert_close(logp[i][mask[i] > 0], full.gather(-1, torch.tensor(r)[:, None])[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy[i][mask[i] > 0], -(full.exp() * full).sum(-1), atol=1e-4, rtol=1e-4)
        assert not logp[i][mask[i] == 0].any()
    learnt = R.token_logprobs(model, x, y, mask)[0]
    torch.testing.assert_close(learnt.detach(), logp)
    assert learnt.requires_grad


def test_estimators_of_the_distance(world):
    _, _, _, ref, r = world
    p = R.optimum(ref, r, 0.7)
    found, true = R.kl_estimates(p - ref), R.divergence(p, ref)
    for name in ("k1", "k3"): assert abs((p.exp() * found[name]).sum() - true) < 1e-9
    assert found["k3"].min() >= 0 and abs((p.exp() * found["k2"]).sum() - true) > 1e-4


def test_rounds_cover_all_prompts_and_follow_from_the_seed(words):
    def rounds(seed, n):
        goal = R.Reinforcement([str(i) for i in range(10)], [[0]] * 10, count_a, "a", None, {**R.HOW, "group": 2})
        goal.start(small(words), words, tl.TrainConfig(batch=8, seed=seed, dtype="float32", ctx=32))
        return [goal.chosen(k) for k in n]
    some = rounds(0, range(5))
    assert sorted(sum(some, [])) == sorted([*range(10)] * 2 * 2), "two orders of ten, each prompt twice"
    assert rounds(0, (3, 1)) == [some[3], some[1]] and rounds(1, range(5)) != some


def test_what_is_drawn_and_paid(words):
    "A round: replies of the policy, advantages of what they earn less what the distance costs, in groups."
    model, how = small(words), {**R.HOW, "group": 4, "max_tokens": 12, "beta": 0.5}
    goal = R.Reinforcement(["a", "the"], [R.prompt_ids(words, p) for p in ("a", "the")], count_a, "a", None, how)
    goal.start(model, words, tl.TrainConfig(batch=8, seed=0, dtype="float32", ctx=48))
    with torch.no_grad():
        for w in model.parameters(): w.add_(0.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1)))
    b = goal.batches[0]
    ends = {words.eos, words.end, *words.ends}
    texts = [words.decode([i for i in y[m > 0].tolist() if i not in ends], special=False) for y, m in zip(b.y, b.mask)]
    kl = ((b.old - b.ref) * b.mask).sum(1)
    assert kl.abs().max() > 1e-3, "the reference stays where it was"
    paid = torch.tensor([count_a("", t) for t in texts]) - 0.5 * kl
    first = b.x[:, 1] == words.encode("a")[0]
    for group in (first, ~first): torch.testing.assert_close(b.advantage[group], R.advantages(paid[group][None])[0], atol=1e-5, rtol=1e-4)
    again = goal.batches[1]
    assert torch.equal(again.y, b.y), "a round is learnt from twice"
    assert goal.batches[2].y.shape != b.y.shape or not torch.equal(goal.batches[2].y, b.y)


# Rewards

def test_stories_reward():
    story = tl.stories(1)[0]
    assert R.stories_reward("", story) == 1 and R.stories_reward(story[:20], story[20:]) == 1 and R.stories_reward("", story + " And more.") == 0
    said, right = SMALL_TALK[0]
    hello = [dict(role="user", content=said[0])]
    assert R.stories_reward(hello, right[0]) == 1 and R.stories_reward(hello, "Go away.") == 0


@pytest.mark.parametrize("reward, says", [
    (lambda p, y: 1 / 0, "failed (ZeroDivisionError: division by zero) for the reply"), (lambda p, y: math.nan, "is nan for the reply"),
    (lambda p, y: math.inf, "is inf"), (lambda p, y: None, "failed (TypeError"), (lambda p, y: "good", "failed (ValueError"),
    ("storys", "Did you mean 'stories'"), ("no.such.module:f", "cannot be imported"), ("math:nothing", "has no function nothing"), (7, "there is no reward 7")])
def test_a_reward_that_fails_leaves_no_folder(words, tmp_path, reward, says):
    with pytest.raises(UserError) as e:
        R.reinforce(small(words), words, ["a"], reward, steps=2, max_tokens=8, batch=4, group=2, out=tmp_path / "run", **HOW)
    assert says in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


def test_a_reward_that_fails_later_harms_nothing(words, tmp_path):
    calls = []
    def reward(prompt, reply):
        calls.append(1)
        return count_a(prompt, reply) if len(calls) < 20 else math.nan
    with pytest.raises(UserError, match="is nan"):
        R.reinforce(small(words), words, ["a"], reward, val=False, steps=50, save_every=1, max_tokens=8, batch=4, group=2, updates=1, out=tmp_path / "run", **HOW)
    net, _ = load(tmp_path / "run" / "last", "cpu")
    assert all(w.isfinite().all() for w in net.parameters())
    run = R.reinforce(small(words), words, ["a"], count_a_named("reward"), val=False, out=tmp_path / "run", resume=True, stop_at=8, quiet=True)
    assert run.summary["step"] == 8


def count_a_named(name):
    def f(prompt, reply): return count_a(prompt, reply)
    f.__name__ = name
    return f


@pytest.mark.parametrize("given, says", [
    (dict(group=1), "give 2 or more"), (dict(group=3), "no whole number of groups"), (dict(beta=-1), "beta is -1"), (dict(beta=math.nan), "beta is nan"),
    (dict(clip=True), "clip is True"), (dict(kl="k1"), "choose one of reward, k2, k3"), (dict(updates=0), "updates is 0"), (dict(max_tokens=48), "does not fit"),
    (dict(steps=2, minutes=1), "give minutes or steps"), (dict(sleps=2), "sleps")])
def test_settings_that_make_no_sense(words, given, says):
    with pytest.raises((UserError, TypeError)) as e:
        R.reinforce(small(words), words, ["a fox"], count_a, **{**HOW, "batch": 4, "group": 2, "max_tokens": 8, **given})
    assert says in str(e.value)


def test_prompts_that_make_no_sense(words):
    for prompts, says in ([], "there is no prompt"), ("a fox", "give a list"), (["a " * 60], "does not fit"), ([[]], "prompt 1"), ([3], "prompt 1"), ([dict(a=1)], "prompt 1"):
        with pytest.raises(UserError) as e: R.reinforce(small(words), words, prompts, count_a, batch=4, group=2, max_tokens=8, **HOW)
        assert says in str(e.value) and "\n" not in str(e.value), says


# Runs

def settings(**more): return {**HOW, **dict(batch=4, group=2, max_tokens=8, updates=2, steps=8, save_every=1, log_every=1, seed=3), **more}


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def lines(folder): return [{k: v for k, v in r.items() if not k.endswith("_s") and k not in ("seconds", "memory", "peak_share")} for r in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("more", [dict(), dict(updates=3), dict(accumulate=2, batch=2), dict(lora=2), dict(kl="k3", by_std=True, by_length=True)], ids=str)
def test_resumed_anywhere_it_ends_alike(words, tmp_path, more):
    prompts = ["a fox", "the cat", [dict(role="user", content="Hello")]]
    base = save(small(words), words, tmp_path / "base")
    def begin(out, **how): return R.reinforce(load(base, "cpu")[0], words, prompts, count_a, out=tmp_path / out, **settings(**more), **how)
    whole = begin("whole")
    begin("cut", stop_at=3)
    for stop in (4, 5, None):
        end = R.reinforce(load(base, "cpu")[0], words, prompts, count_a, out=tmp_path / "cut", resume=True, quiet=True, device="cpu", **(dict(stop_at=stop) if stop else {}))
    assert same(whole.model, end.model) and not same(whole.model, load(base, "cpu")[0])
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    row = next(r for r in reversed(whole.metrics) if "reward" in r)
    assert {"reward", "kl", "policy_entropy", "length", "clip_share", "distinct", "sampling_s", "judging_s", "learning_s"} <= row.keys()
    assert (tmp_path / "whole" / "plots.png").exists() and load(tmp_path / "whole", "cpu")


def test_what_must_agree_when_a_run_goes_on(words, tmp_path):
    out = tmp_path / "run"
    R.reinforce(small(words), words, ["a fox"], count_a, out=out, stop_at=2, **settings())
    for model, prompts, more, says in ((small(words), ["a fox"], dict(beta=0.7), "0.7"), (small(words, seed=1), ["a fox"], {}, "goal"), (small(words), ["a cat"], {}, "text"),
                                       (small(words), ["a fox"], dict(lr=0.5), "lr is 0.5")):
        with pytest.raises(UserError, match=says): R.reinforce(model, words, prompts, count_a, out=out, resume=True, quiet=True, **more)
    def other(prompt, reply): return 0.0
    with pytest.raises(UserError, match="goal"): R.reinforce(small(words), words, ["a fox"], other, out=out, resume=True, quiet=True)
    assert R.reinforce(small(words), words, ["a fox"], count_a, out=out, resume=True, quiet=True).summary["stopped"] == "finished"


def test_with_an_adapter_the_reference_is_the_model_without_it(words):
    seen = []
    def look(event, t):
        if event == "begin":
            with torch.no_grad():
                for n, w in t.model.named_parameters():
                    if n.endswith(".B"): w.add_(0.3)
            name = t.model.adapter
            b = t.goal.play(0)
            seen.append((b, t.model.adapter == name))
    model = small(words)
    plain = copy.deepcopy(model)
    R.reinforce(model, words, ["a"], count_a, lora=2, callbacks=[look], **{**settings(), "steps": 1})
    b, kept = seen[0]
    assert kept and (b.old - b.ref).abs().max() > 1e-3
    with torch.no_grad(): torch.testing.assert_close(R.token_logprobs(plain, b.x, b.y, b.mask)[0], b.ref, atol=1e-5, rtol=1e-5)


def test_entropy_is_kept_by_the_price(world):
    "Without one the policy collapses."
    model, tok, ids, ref, r = world
    entropy = []
    for beta in (0.0, 1.0):
        net = copy.deepcopy(model)
        R.reinforce(net, tok, [""], R.small_reward, val=False, **HOW, beta=beta, group=32, batch=32, steps=25, lr=3e-2, weight_decay=0.0, updates=1, max_tokens=20)
        with torch.no_grad(): p = R.all_logprobs(net, ids, tok.bos)
        entropy.append(-(p.exp() * p).sum().item())
    assert entropy[0] < entropy[1] - 1


# The command

@pytest.fixture
def room(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(small(words), words, tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(dict(prompt=p)) + "\n" for p in ("Hello", "a fox", "Who are you?")))
    (tmp_path / "mine.py").write_text("def many_a(prompt, reply): return reply.count('a') / (1 + len(reply))\ndef raises(prompt, reply): return [][1]\n"
                                      "def nan(prompt, reply): return float('nan')\n")
    yield tmp_path
    sys.modules.pop("mine", None)


LINE = "align --method grpo --model base --reward mine:many_a --data prompts.jsonl --steps 6 --batch 4 --group 2 --max_tokens 8 --device cpu --threads 1 --dtype float32 --out run"


def test_align_from_the_command_line(room):
    code, out, err = try_line(LINE, show=False)
    assert code == 0, err
    assert "reward_val" in out and "run folder" in out and "learning" in err
    net, tok = load(room / "run", "cpu")
    assert not same(net, load(room / "base", "cpu")[0])
    assert Run(room / "run").made["goal"]["settings"]["reward"] == "mine:many_a"
    code, _, err = try_line(LINE, show=False)
    assert code == 2 and "already holds a run" in err


def test_tasks_too_long_for_the_context_are_left_out(room):
    tok = load(room / "base", "cpu")[1]
    sizes = [len(R.prompt_ids(tok, t.prompt)) for t in code_tasks(40)]
    longest = sorted(sizes)[20]
    found = R.own_prompts("code", tok, longest, 40)
    assert len(found) == sum(n <= longest for n in sizes) < 40
    assert max(len(R.prompt_ids(tok, p)) for p in found) == longest


@pytest.mark.parametrize("change, says", [
    (("mine:many_a", "mine:raises"), "failed (IndexError"), (("mine:many_a", "mine:nan"), "is nan"), (("mine:many_a", "nobody"), "there is no reward"), (("--reward mine:many_a", ""), "needs a reward"),
    (("mine:many_a", "other:f"), "cannot be imported"), (("--method grpo", "--method ppo"), "choose one of"), (("--method grpo", "--method dpo"), "takes no reward"),
    (("prompts.jsonl", "empty.jsonl"), "empty.jsonl"), (("prompts.jsonl", "missing.jsonl"), "missing.jsonl"), (("prompts.jsonl", "odd.jsonl"), "odd.jsonl"),
    (("--max_tokens 8", "--max_tokens 80"), "context"), (("--group 2", "--group 3"), "groups of 3"), (("--data prompts.jsonl", ""), "brings no prompts"), (("--model base", "--model nowhere"), "nowhere"),
    (("--out run", "--out run --resume"), "no run to resume")])
def test_what_a_person_gets_wrong_is_one_line(room, change, says):
    (room / "empty.jsonl").write_text("")
    (room / "odd.jsonl").write_text('{"text": 3}\n')
    line = LINE.replace(*change)
    assert line != LINE
    code, _, err = try_line(line, show=False)
    said = [l for l in err.splitlines() if l.startswith("tiny_llm:")]
    assert code == 2 and len(said) == 1 and says in said[0], err
    assert not (room / "run").exists() and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_killed_five_times_it_ends_alike(room, method):
    "At random moments, in processes of their own; then the weights and the lines of a run that nobody disturbed."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = LINE.replace("--steps 6", "--steps 40 --save_every 1 --log_every 1")
    if method == "dpo":
        pairs = [dict(prompt=f"{who} fox {n}", chosen=" had a hat", rejected=" a red kite") for who in ("a", "the") for n in range(12)]
        (room / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
        line = "align --method dpo --model base --data pairs.jsonl --steps 150 --batch 2 --save_every 1 --log_every 1 --device cpu --threads 1 --dtype float32 --out run"
    line = line.split()
    def start(*more): return subprocess.Popen([sys.executable, "-m", "tiny_llm", *more], cwd=room, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    whole = start(*[w if w != "run" else "whole" for w in line])
    assert whole.wait() == 0, whole.stderr.read()
    rng, kills, file = random.Random(0), 0, room / "run" / "metrics.jsonl"
    p = start(*line)
    while kills < 5:
        had = len(file.read_bytes().splitlines()) if file.exists() else 0
        goal, began = had + rng.randint(2, 5), time.monotonic()
        while p.poll() is None and (not file.exists() or len(file.read_bytes().splitlines()) < goal) and time.monotonic() - began < 120: time.sleep(0.01)
        time.sleep(rng.random() * 0.1)
        if p.poll() is not None: break
        p.send_signal(signal.SIGKILL)
        p.wait()
        kills += 1
        p = start("align", "--out", "run", "--resume", "--device", "cpu")
    assert p.wait() == 0, p.stderr.read()
    assert kills == 5
    assert same(load(room / "whole" / "last", "cpu")[0], load(room / "run" / "last", "cpu")[0])
    assert lines(room / "whole") == lines(room / "run")


@pytest.mark.parametrize("method", ["dpo", "ipo"])
def test_align_from_pairs(room, method):
    "The other door: 4.04 preference, through the same command, and on again after a stop."
    pairs = [dict(prompt="a fox", chosen=" had a hat", rejected=" a red kite"), dict(prompt="the cat", chosen=" had a red kite", rejected=" had a fox")]
    (room / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs * 3))
    line = f"align --method {method} --model base --data pairs.jsonl --steps 4 --batch 2 --device cpu --threads 1 --dtype float32 --out run"
    code, out, err = try_line(line, show=False)
    assert code == 0, err
    assert "run folder" in out and Run(room / "run").made["goal"]["settings"]["method"] == method
    for wrong, says in (f"{line} --reward stories", "takes no reward"), (f"{line} --group 4", "group belongs to grpo"), (line.replace("pairs.jsonl", "none.jsonl"), "none.jsonl"):
        code, _, err = try_line(wrong.replace("--out run", "--out other"), show=False)
        assert code == 2 and says in err and not (room / "other").exists()
