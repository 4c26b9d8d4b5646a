"Pairs that cannot be read, TRL's losses and gradients, goals and runs of pairs killed and resumed."
import copy, json, math, random, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from house import ROOT, environment
from tiny_llm.assistant.preference import (FAULTS, PairBatches, PairGoal, Reward, _encoded, as_pair, fingerprint, fit_reward, hold_out_pairs, log_probs_of, pack_pairs, planted, prefer,
                                           preference_loss, read_pairs, reference_log_probs, reply_ids, reply_log_probs, reward_scores, share_right, story_pairs)
from tiny_llm.basics import UserError
from tiny_llm.text.batches import tokenize
from tiny_llm.text.judge import parse
from tiny_llm.text.stories import stories
from tiny_llm.text.tokenizer import train_tokenizer
from tiny_llm.training.folder import load, save
from tiny_llm.training.run import Run
from tiny_llm.training.train import loss_of, train
from tiny_llm.transformer.adapters import add_adapter
from tiny_llm.transformer.model import Transformer, preset

TOK = train_tokenizer([str(s) for s in stories(200)], vocab_size=300)
PAIRS = [dict(prompt=f"Ann{i}", chosen=" ran home and slept. The end.", rejected=f" ran{i} away.") for i in range(12)]
QUICK = dict(batch=3, dtype="float32", quiet=True, log_every=1, val=False, device="cpu")


def small(seed=0, **kw):
    torch.manual_seed(seed)
    return Transformer(preset("tiny", vocab_size=len(TOK), ctx=64, n_layers=1, **kw))


def learn(pairs=PAIRS, model=None, **kw): return prefer(small() if model is None else model, TOK, pairs, **{**QUICK, "steps": 4, **kw})
def same(a, b): return all(torch.equal(v, w) for v, w in zip(a.model.state_dict().values(), b.model.state_dict().values()))
def lines(run): return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s", "memory", "peak_share")} for r in run.metrics]


# Losses ----------------------------------------------------------------------------------------------------------------

def theirs(policy, reference, lengths, kind, beta, smoothing):
    "TRL's own `_compute_loss` on given log-probabilities: a trainer and a model that are nothing else."
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    n, T = len(policy), int(lengths.max()) + 1
    mask = torch.zeros(2 * n, T)
    for row, count in enumerate(lengths.T.flatten().tolist()): mask[row, 1:int(count) + 1] = 1
    share = mask[:, 1:] / mask[:, 1:].sum(1, keepdim=True)
    spread = share.double() * policy.T.flatten()[:, None]            # the log-probability of a reply, spread over its tokens
    zeros = torch.zeros(2 * n, T - 1)
    out = MagicMock(log_probs=spread, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    accelerator = MagicMock(device=torch.device("cpu"), gather_for_metrics=lambda x: x)
    me = MagicMock(accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0],
                   beta=beta, label_smoothing=smoothing, use_weighting=False, _tp_size=1, _total_train_tokens=0)
    batch = dict(input_ids=torch.ones(2 * n, T, dtype=torch.long), attention_mask=torch.ones(2 * n, T), completion_mask=mask.long(),
                 ref_chosen_logps=reference[:, 0], ref_rejected_logps=reference[:, 1])
    return trl.DPOTrainer._compute_loss(me, lambda **kw: out, batch, False)


@pytest.mark.parametrize("method, kind, beta, smoothing", [("dpo", "sigmoid", 0.1, 0.0), ("dpo", "sigmoid", 2.0, 0.0), ("ipo", "ipo", 0.1, 0.0), ("ipo", "ipo", 0.7, 0.0),
                                                           ("dpo", "aot", 0.1, 0.1), ("dpo", "aot", 0.5, 0.4)])
def test_losses_and_gradients_are_trl_s(method, kind, beta, smoothing):
    "TRL has label smoothing in `aot`, which sorts the margins of a batch; of one pair there is nothing to sort, so it is asked pair by pair."
    gen = torch.Generator().manual_seed(1)
    reference = -60 * torch.rand(6, 2, generator=gen, dtype=torch.float64)
    policy = (reference + 8 * torch.randn(6, 2, generator=gen, dtype=torch.float64)).requires_grad_(True)
    lengths = torch.randint(1, 30, (6, 2), generator=gen)
    ours = preference_loss(policy, reference, lengths, method=method, beta=beta, label_smoothing=smoothing).mean()
    mine, = torch.autograd.grad(ours, policy)
    parts = [slice(i, i + 1) for i in range(6)] if kind == "aot" else [slice(0, 6)]
    wanted = sum(theirs(policy[p], reference[p], lengths[p], kind, beta, smoothing) for p in parts) / len(parts)
    grad, = torch.autograd.grad(wanted, policy)
    assert_close(ours, wanted, atol=1e-6, rtol=0)
    assert_close(mine, grad, atol=1e-6, rtol=0)
    assert mine.abs().max() > 1e-4


def test_the_gradient_vanishes_where_a_pair_is_settled():
    policy = torch.tensor([[0.0, -400.0], [-400.0, 0.0]], dtype=torch.float64, requires_grad=True)
    grad, = torch.autograd.grad(preference_loss(policy, torch.zeros(2, 2), beta=0.1).sum(), policy)
    assert_close(grad, torch.tensor([[0.0, 0.0], [-0.1, 0.1]], dtype=torch.float64), atol=1e-9, rtol=0)


# Log-probabilities ------------------------------------------------------------------------------------------------------

def by_one(model, ids, weights):
    "One reply, all logits, in float64."
    log_p = model.double()(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return sum(w * log_p[t, i] for t, (i, w) in enumerate(zip(ids[1:], weights[1:]))).item()


@pytest.mark.parametrize("seed", range(6))
def test_packed_is_one_by_one(seed):
    rng = random.Random(seed)
    text = [rng.choice(["Ann ran.", "The end.", "A dog", "x", "She was happy and slept."]) for _ in range(24)]
    pairs = [dict(prompt=" ".join(text[3 * i:3 * i + 2]), chosen=text[3 * i + 2], rejected=" no") for i in range(8)]
    pairs.append(dict(prompt=[dict(role="user", content="Hi")], chosen=[dict(role="assistant", content="Hello.")], rejected=[dict(role="assistant", content="No")]))
    model = small(seed)
    replies, _ = _encoded(pairs, TOK, 64)
    b = pack_pairs(replies, 64)
    with torch.no_grad():
        found = reply_log_probs(model, b)
        wanted = torch.tensor([by_one(copy.deepcopy(model), *r) for r in replies], dtype=torch.float64).view(-1, 2)
    assert_close(found / b.lengths, wanted / b.lengths, atol=1e-5, rtol=0)
    assert_close(found, wanted, atol=1e-4, rtol=1e-5)
    assert b.lengths.flatten().tolist() == [sum(w) for _, w in replies] and len(b.x) < len(replies)


def test_gradients_of_packed_pairs_are_those_of_single_ones():
    model, replies = small(), _encoded(PAIRS[:5], TOK, 64)[0]
    def grad(parts):
        model.zero_grad()
        sum(preference_loss(reply_log_probs(model, b), b.ref - 3, beta=0.3).sum() for b in parts).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    one = [pack_pairs(replies[2 * i:2 * i + 2], 64) for i in range(5)]
    assert_close(grad([pack_pairs(replies, 64)]), grad(one), atol=2e-4, rtol=1e-4)


def test_the_prompt_does_not_count():
    ids, weights = reply_ids([dict(role="user", content="A?"), dict(role="assistant", content="B"), dict(role="user", content="C?")], [dict(role="assistant", content="Dear")], TOK)
    assert TOK.decode([i for i, w in zip(ids, weights) if w][:-1]).strip() == "Dear"
    ids, weights = reply_ids("One two", " three", TOK)
    assert TOK.decode([i for i, w in zip(ids, weights) if w][:-1]) == " three" and ids[0] == TOK.bos and ids[-1] == TOK.eos


# Pairs ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_of_its_kind_and_behind_the_prompt(kind):
    for p in story_pairs(12, seed=5, kinds=[kind]):
        text = p["prompt"] + p["rejected"]
        v = parse(text)
        assert not v.ok and v.kind == kind == p["kind"] and v.at > len(p["prompt"]) - 1 and parse(p["prompt"] + p["chosen"]).ok
    assert story_pairs(12, seed=5, kinds=[kind]) == story_pairs(12, seed=5, kinds=[kind])


def bad_file(tmp_path, rows):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return file


LONG = "word " * 300
@pytest.mark.parametrize("rows, says", [
    ([], "no rows|holds no pair|empty"), ([dict(prompt="a", chosen="b", rejected="b")], "two equal replies"), ([dict(prompt="a", chosen="b", rejected="")], "an empty rejected reply"),
    ([dict(prompt="a", chosen="b")], "a row holds prompt, chosen and rejected"), ([[1, 2]], "a row holds|no pair"), ([dict(prompt="a", chosen=1, rejected=2)], "chosen is 1"),
    ([dict(prompt="a", chosen=LONG, rejected="c")] * 2, "none of the 2 pairs fits into 64 tokens"), ([dict(chosen=[dict(role="king", content="x")], rejected=[])], "role of message 1 is 'king'"),
    ([dict(prompt=3, chosen="b", rejected="c")], "is no pair")])
def test_bad_input_is_one_line_and_nothing_is_harmed(tmp_path, rows, says):
    file, out = bad_file(tmp_path, rows), tmp_path / "run"
    model = small()
    before = fingerprint(model)
    with pytest.raises(UserError, match=says) as e: learn(file, model, out=out)
    assert "\n" not in str(e.value) and not out.exists() and fingerprint(model) == before


def test_some_bad_rows_are_left_out_and_said(tmp_path, capfd):
    rows = [dict(prompt="a", chosen="b", rejected="b"), *PAIRS[:3]]
    assert read_pairs(bad_file(tmp_path, rows)) == PAIRS[:3]
    assert "1 pairs with nothing to learn were left out; row 1 of" in "".join(capfd.readouterr())


def test_parquet_and_lists_of_messages(tmp_path):
    datasets = pytest.importorskip("datasets")
    talk = dict(prompt=[dict(role="user", content="Hi")], chosen=[dict(role="assistant", content="Hello")], rejected=[dict(role="assistant", content="No")])
    datasets.Dataset.from_list([talk, {**talk, "chosen": [dict(role="assistant", content="Hey")]}]).to_parquet(str(tmp_path / "x.parquet"))
    assert read_pairs(tmp_path / "x.parquet")[0] == talk


def test_what_is_held_out_shares_no_prompt():
    pairs = [dict(prompt=f"p{i % 30}", chosen=f"a{i}", rejected="b") for i in range(90)]
    mine, held = hold_out_pairs(pairs, 0)
    assert len(mine) + len(held) == 90 and not {p["prompt"] for p in mine} & {p["prompt"] for p in held} and held
    assert hold_out_pairs(pairs, 0) == (mine, held) != hold_out_pairs(pairs, 1)


# The reference ------------------------------------------------------------------------------------------------------------

def test_the_reference_is_computed_once_and_checked(tmp_path, monkeypatch):
    import tiny_llm.assistant.preference as module
    replies, file, model, real, calls = _encoded(PAIRS, TOK, 64)[0], tmp_path / "ref.safetensors", small(), module.log_probs_of, []
    monkeypatch.setattr(module, "log_probs_of", lambda *a: calls.append(1) or real(*a))
    wanted = reference_log_probs(model, replies, 64, file)
    assert torch.equal(reference_log_probs(model, replies, 64, file), wanted) and len(calls) == 1
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    assert torch.equal(reference_log_probs(model, replies, 64, file), wanted) and len(calls) == 2
    for other in ((small(1), replies), (model, replies[2:])):
        with pytest.raises(UserError, match="another model or of other pairs"): reference_log_probs(*other, 64, file)


def test_a_run_goes_on_without_its_file_of_the_reference(tmp_path):
    whole = learn(steps=5)
    first = save(small(), TOK, tmp_path / "first")
    prefer(load(first, "cpu")[0], TOK, PAIRS, out=tmp_path / "a", stop_at=2, **{**QUICK, "steps": 5})
    for model in (small(), small(3)):                 # the model itself; another one, and its folder is found by the record
        here = tmp_path / f"b{fingerprint(model)[:4]}"
        import shutil
        shutil.copytree(tmp_path / "a", here)
        (here / "reference.safetensors").unlink()
        assert same(prefer(model, TOK, PAIRS, out=here, resume=True, val=False, quiet=True, device="cpu"), whole)
    shutil.rmtree(first)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c" / "reference.safetensors").unlink()
    with pytest.raises(UserError, match="is gone or damaged"): prefer(small(3), TOK, PAIRS, out=tmp_path / "c", resume=True, val=False, quiet=True, device="cpu")


# Runs ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", [dict(), dict(method="ipo", accumulate=2), dict(lora=2, label_smoothing=0.1), dict(ema=0.5, optimizer="adamw")])
def test_resumed_is_unbroken(tmp_path, how):
    whole = learn(steps=7, log_every=2, **how)
    learn(steps=7, log_every=2, out=tmp_path / "a", stop_at=4, **how)
    rest = learn(steps=None, model=small(5) if "lora" not in how else small(), out=tmp_path / "a", resume=True, log_every=None, batch=None, dtype=None,
                 **{k: how[k] for k in ("method", "label_smoothing") if k in how})
    assert same(rest, whole) and lines(rest) == lines(whole)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["made"]["goal"]["settings"]["method"] == how.get("method", "dpo")


def test_a_run_with_another_goal_is_refused(tmp_path):
    learn(out=tmp_path / "a", stop_at=1)
    for how in (dict(beta=0.2), dict(method="ipo"), dict(label_smoothing=0.1)):
        with pytest.raises(UserError, match="was started with the goal"): learn(out=tmp_path / "a", resume=True, steps=None, **how)
    with pytest.raises(UserError, match="other pairs"): learn(PAIRS[1:], out=tmp_path / "a", resume=True, steps=None)
    replies = _encoded(PAIRS, TOK, 64)[0]
    with pytest.raises(UserError, match='not with "the next token"'): train(small(), TOK, tokenize(replies, TOK), val=False, out=tmp_path / "a", resume=True, quiet=True)
    assert learn(out=tmp_path / "a", resume=True, steps=None).summary["step"] == 4


def test_the_first_loss_is_log_2_and_it_falls():
    run = learn(steps=30, val=PAIRS[:4], eval_every=10, lr=1e-3)
    assert abs(run.metrics[0]["val"] - math.log(2)) < 1e-6 and run.metrics[0]["val_accuracy"] == 0.5
    assert run.summary["val"]["val"] < 0.6 and run.summary["val"]["val_accuracy"] == 1.0
    assert run.summary["best"]["val"] == min(r["val"] for r in run.metrics if "val" in r)
    assert {"accuracy", "margin", "chosen_gain", "rejected_gain"} <= run.metrics[1].keys()


def test_the_logged_figures_are_those_of_the_steps():
    one, three = (learn(steps=6, log_every=n, eval_every=100) for n in (1, 3))
    each = [r["margin"] for r in one.metrics if "margin" in r]
    some = [r["margin"] for r in three.metrics if "margin" in r]
    assert_close(torch.tensor([sum(each[:3]) / 3, sum(each[3:]) / 3]), torch.tensor(some))
    assert abs(each[0]) < 1e-4 < abs(each[-1])


def test_each_epoch_takes_each_pair_once():
    replies = _encoded(PAIRS, TOK, 64)[0]
    batches = PairBatches(replies, torch.arange(24).double().view(12, 2), 64, 5, seed=1)
    seen = torch.cat([batches[k].ref[:, 0] for k in range(12)]).view(5, 12)
    assert all(sorted(row.tolist()) == list(range(0, 24, 2)) for row in seen) and not torch.equal(seen[0], seen[1])
    assert torch.equal(batches[3].x, batches[3].x)


# A goal that draws its batches from the model (what 4.05 needs of `train`) ---------------------------------------------------

class Drawn:
    "Batches that depend on the weights, and two steps on each: what was drawn must outlive a pause."
    settings, axis, draw = dict(method="drawn"), "loss", ("level",)
    def start(self, model, tok, config): self.model, self.seed, self.batches, self.kept, self.level = model, config.seed, self, None, 0.0

    def __getitem__(self, i):
        if i % 2 == 0 or self.kept is None:
            gen = torch.Generator().manual_seed(1000 * self.seed + i)
            with torch.no_grad(): p = self.model(torch.tensor([[1]]))[0, -1].double().softmax(0)
            self.kept = torch.multinomial(p, 8, True, generator=gen).tolist()
        ids = torch.tensor([self.kept])
        return SimpleNamespace(ids=ids, w=torch.ones(1), n_targets=8, to=lambda device: SimpleNamespace(ids=ids))

    def mark_of(self, i): return self.kept
    def go_to(self, mark): self.kept = mark

    def loss(self, model, b, dtype):
        self.level = b.ids.float().mean().item()
        return F.cross_entropy(model(torch.ones(1, 8, dtype=torch.long))[0], (b.ids[0] + 1) % len(TOK))

    def metrics(self): return dict(level=self.level)
    def evaluate(self, model): return dict(val=-1.0)


def test_batches_drawn_from_the_weights_are_the_same_after_a_pause(tmp_path):
    text = tokenize(["Ann ran home."] * 3, TOK)
    kw = dict(lr=1e-2, dtype="float32", batch=2, log_every=1, quiet=True, device="cpu")
    whole = train(small(), TOK, text, steps=9, goal=Drawn(), **kw)
    train(small(), TOK, text, steps=9, goal=Drawn(), out=tmp_path / "a", stop_at=5, **kw)          # in the middle of a draw
    rest = train(small(4), TOK, text, goal=Drawn(), out=tmp_path / "a", resume=True, quiet=True)
    assert same(rest, whole) and lines(rest) == lines(whole) and all("level" in r for r in whole.metrics if "loss" in r)


def test_a_goal_with_minutes_is_measured_and_not_compiled():
    run = learn(steps=None, minutes=0.05)
    assert run.summary["stopped"] == "finished" and not run.summary["compiled"] and run.summary["step"] >= 1


SESSION = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
torch.set_num_threads(1)
from test_preference import PAIRS, QUICK, TOK, small
from tiny_llm.assistant.preference import prefer
prefer(small(), TOK, PAIRS, out={out!r}, resume={resume}, save_every=2, **({{**QUICK, "steps": 60}} if not {resume} else dict(val=False, quiet=True, device="cpu")))
"""


@pytest.mark.slow
def test_killed_five_times_it_ends_with_the_same_weights(tmp_path):
    "Each session is a process of its own, killed by SIGKILL when so many more lines are there as a draw says."
    whole, out, rng = learn(steps=60, save_every=2, out=tmp_path / "whole"), tmp_path / "killed", random.Random(0)
    def begin():
        code = SESSION.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(out), resume=(out / "config.json").exists())
        return subprocess.Popen([sys.executable, "-c", code], env=environment(PYTHONPATH=str(ROOT)), stderr=subprocess.PIPE, text=True)
    def logged(): return len((out / "metrics.jsonl").read_bytes().splitlines()) if (out / "metrics.jsonl").exists() else 0
    for _ in range(5):
        p, until = begin(), logged() + rng.randrange(2, 8)
        while p.poll() is None and logged() < until: time.sleep(0.01)
        p.send_signal(signal.SIGKILL)
        p.communicate()
    p = begin()
    assert p.communicate()[1].count("Error") == 0 and p.returncode == 0
    assert same(Run(out), Run(tmp_path / "whole")) and lines(Run(out)) == lines(Run(tmp_path / "whole"))


# Rewards ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["frozen", "all", "lora"])
def test_a_reward_learns_what_is_chosen(how):
    model, pairs = small(), [dict(prompt="Tell me", chosen=f" good {w}", rejected=f" bad {w}") for w in "dog cat tree house name road".split()]
    if how == "lora": add_adapter(model, 4)
    before = {n: w.clone() for n, w in model.state_dict().items()}
    reward = fit_reward(model, TOK, pairs, frozen=how == "frozen", steps=60, lr=3e-3)
    assert share_right(*reward_scores(reward, pairs))["share"] == 1.0
    moved = {n for n, w in model.state_dict().items() if not torch.equal(w, before[n])}
    assert (not moved if how == "frozen" else all(".updates." in n for n in moved) and moved if how == "lora" else len(moved) > 5)
    scores, _ = reward_scores(reward, pairs)
    assert abs(reward("Tell me", " good dog") - scores[0, 0].item()) < 1e-4


def test_a_reward_that_reads_the_log_probability_begins_with_it():
    "What a body that has learnt nothing yet says of a reply is its log-probability; then the body learns through it."
    model, pairs = small(), [dict(prompt="Tell me", chosen=f" good {w}", rejected=f" bad {w}") for w in "dog cat tree house name road".split()]
    replies, _ = _encoded(pairs, TOK, model.cfg.ctx)
    likely, before = log_probs_of(model, replies, model.cfg.ctx), [w.clone() for w in model.parameters()]
    scores, _ = reward_scores(fit_reward(model, TOK, pairs, steps=1, lr=1e-9, surprise=True), pairs)
    assert_close(scores.double(), likely, atol=1e-3, rtol=1e-5)
    frozen = fit_reward(model, TOK, pairs, frozen=True, surprise=True)
    assert share_right(*reward_scores(frozen, pairs))["share"] == 1.0 and frozen.head.shape == (model.cfg.d_model + 1,)
    reward = fit_reward(model, TOK, pairs, steps=60, lr=3e-3, surprise=True)
    scores, _ = reward_scores(reward, pairs)
    assert share_right(scores, pairs)["share"] == 1.0 and abs(reward("Tell me", " good dog") - scores[0, 0].item()) < 1e-3
    assert sum(not torch.equal(v, w) for v, w in zip(model.parameters(), before)) > 5


def test_shares_count_ties_half_and_kinds_apart():
    pairs = [dict(kind="a"), dict(kind="a"), dict(kind="b")]
    found = share_right(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]), pairs)
    assert found["share"] == 0.5 and found["kinds"]["a"]["share"] == 0.75 and found["kinds"]["b"]["share"] == 0 and found["low"] < 0.5 < found["high"]
