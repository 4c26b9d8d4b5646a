"Adapters: equal to PEFT's in both directions, trained alone, resumed to the last bit, switched, merged, and refused where they do not belong."
import copy, json, random, shutil, subprocess, sys, warnings
from pathlib import Path

import pytest
import torch

import tiny_llm as tl
from house import ROOT, python
from tiny_llm.basics import UserError, read_json, write_file
from tiny_llm.deployment.cli import parse_options, commands, try_line
from tiny_llm.training.config import TrainConfig
from tiny_llm.transformer.adapters import CONFIG, TENSORS, LoraLinear, base_hash, find_targets, linear_places
from tiny_llm.transformer.huggingface import families, family, to_hf

pytestmark = pytest.mark.usefixtures("one_thread")

LAYER = dict(norm="layer", norm_bias=True, qk_norm=False, norm_eps=1e-5)
SHAPES = {"llama": dict(qk_norm=False, n_kv_heads=2), "qwen3": dict(n_kv_heads=2), "qwen2": dict(qk_norm=False, qkv_bias=True, n_kv_heads=2),
          "mistral": dict(qk_norm=False, window=8, n_kv_heads=2), "stablelm": dict(LAYER, rotary=0.25, n_kv_heads=2, tied=False),
          "gpt2": dict(LAYER, bias=True, positions="learned", ffn="gelu_tanh"),
          "gpt_neox": dict(LAYER, bias=True, ffn="gelu", parallel=True, rotary=0.25, tied=False),
          "openai-gpt": dict(LAYER, bias=True, positions="learned", ffn="gelu_tanh", norm_place="post", d_ff=128)}
IDS = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))


def small(kind="llama", seed=0, **other):
    torch.manual_seed(seed)
    shape = dict(vocab_size=64, ctx=32, d_model=32, n_layers=2, n_heads=4, d_ff=64, head_dim=8)
    model = tl.Transformer(tl.ModelConfig(**{**shape, **SHAPES[kind], **other}))
    assert family(model.cfg) == kind
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1 * torch.randn(p.shape))        # gains and biases that are not those of the beginning
    return model.eval()


@torch.no_grad()
def learnt(model, seed=1):
    "The adapter that is on, with a B that is not zero."
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad: p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


def theirs(model):
    "The class of transformers, with the base's weights."
    transformers = pytest.importorskip("transformers")
    config, state = to_hf(model)
    other = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    other.load_state_dict({n.replace("embed_out", "lm_head"): w for n, w in state.items()}, strict=False)
    return other.eval()


def near(a, b, tol=2e-5): assert (a - b).abs().max() <= tol, f"off by {(a - b).abs().max():.1e}"


# PEFT

@pytest.mark.parametrize("kind", families)
def test_peft_opens_ours(kind, tmp_path):
    peft = pytest.importorskip("peft")
    for n, how in enumerate([dict(rank=4), dict(rank=3, alpha=1.5, rslora=True, targets=list(linear_places(small(kind)))[1:3])]):
        ours = learnt(tl.add_adapter(small(kind), **how))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)          # PEFT warns of keys that it misses
            warnings.filterwarnings("ignore", message="(?s).*fan_in_fan_out")
            there = peft.PeftModel.from_pretrained(theirs(ours), tl.save_adapter(ours, tmp_path / str(n)))
        there.eval()
        near(logits(there), logits(ours))
        assert (logits(ours) - logits(small(kind))).abs().max() > 0.1
        near(logits(there.merge_and_unload()), logits(ours))
        near(logits(tl.merge_adapter(ours)), logits(there))


@pytest.mark.parametrize("kind", families)
def test_we_open_pefts(kind, tmp_path):
    "Also with ranks and strengths that differ from layer to layer, and with a regular expression for the targets."
    peft = pytest.importorskip("peft")
    names = list(linear_places(small(kind)))
    last = names[1].rpartition(".")[2]
    for n, how in enumerate([dict(target_modules="all-linear"),
                             dict(target_modules=".*(" + "|".join({x.rpartition(".")[2] for x in names[:4]}) + ")", use_rslora=True,
                                  rank_pattern={last: 5}, alpha_pattern={rf".*\.0\..*{last}": 3.0})]):
        torch.manual_seed(n)
        there = peft.get_peft_model(theirs(small(kind)), peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **how)).eval()
        with torch.no_grad():
            for name, p in there.named_parameters():
                if "lora_" in name: p.copy_(0.2 * torch.randn(p.shape))
        there.save_pretrained(tmp_path / str(n))
        ours = small(kind)
        tl.load_adapter(ours, tmp_path / str(n), "theirs")
        near(logits(there), logits(ours))
        again = small(kind)                                       # and out again, with what differs from layer to layer
        tl.load_adapter(again, tl.save_adapter(ours, tmp_path / f"{n} again"))
        assert torch.equal(logits(again), logits(ours))
        near(logits(peft.PeftModel.from_pretrained(theirs(ours), tmp_path / f"{n} again").eval()), logits(ours))
        near(logits(tl.merge_adapter(ours)), logits(there))


def test_three_steps_are_those_of_peft(tmp_path):
    "The same A, the same data, AdamW: the same function is trained."
    peft = pytest.importorskip("peft")
    ours = tl.add_adapter(small("qwen3"), rank=4, alpha=6)
    there = peft.PeftModel.from_pretrained(theirs(ours), tl.save_adapter(ours, tmp_path / "a"), is_trainable=True)
    for net in (ours, there):
        opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            opt.zero_grad()
            out = net(IDS)
            torch.nn.functional.cross_entropy(getattr(out, "logits", out)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
            opt.step()
    near(logits(ours), logits(there.eval()), 1e-3)
    assert (logits(ours) - logits(small("qwen3"))).abs().max() > 0.5


def test_the_package_does_not_know_peft():
    assert not [p for p in (ROOT / "tiny_llm").rglob("*.py") if "import peft" in p.read_text() or "from peft" in p.read_text()]


# On a model

def test_switching_in_any_order_equals_the_one_adapter_alone(tmp_path):
    "A random walk of adding, switching, deleting; after each step the logits are those of a model that has that adapter only."
    rng, alone, model = random.Random(0), {None: logits(small())}, small()
    made = {f"a{i}": dict(rank=1 + i % 4, targets=rng.choice([None, "q_proj", "attn", "k_proj,down_proj", "blocks.1"])) for i in range(5)}
    for n, (name, how) in enumerate(made.items()):
        one = learnt(tl.add_adapter(small(), name=name, **how), n)
        alone[name] = logits(one)
        tl.save_adapter(one, tmp_path / name)
    for _ in range(60):
        there, name = list(tl.list_adapters(model)), rng.choice([*made, None])
        if name is None or name in there and rng.random() < 0.6: tl.set_adapter(model, name)
        elif name in there: tl.delete_adapter(model, name)
        else: tl.load_adapter(model, tmp_path / name)
        assert torch.equal(logits(model), alone[model.adapter])
        on = {n for n, p in model.named_parameters() if p.requires_grad}
        if model.adapter: assert on and all(f".updates.{model.adapter}:" in n for n in on)
        if not tl.list_adapters(model): assert len(on) == len(list(small().parameters())) and not any(isinstance(m, LoraLinear) for m in model.modules())


def test_targets_are_found_by_their_names_and_ours():
    model = small("gpt_neox")
    assert find_targets(model, "query_key_value") == find_targets(model, "attn.qkv") == find_targets(model, r".*query_key_value")
    assert len(find_targets(model)) == 8 and find_targets(model, "lm_head") == ["lm_head"] == find_targets(model, "head")
    assert find_targets(small(), "q_proj, v_proj") == [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"]
    for bad, says in [("proj", "no linear layer is called 'proj'"), ("q_proj,vproj", "Did you mean 'v_proj'"), ("", "is called ''"), ("(", "is called '\\('"),
                      ("q_proj,", "is called ''")]:
        with pytest.raises(UserError, match=says): find_targets(small(), bad)


def test_a_head_of_its_own_has_an_adapter_where_it_is_named(tmp_path):
    model = learnt(tl.add_adapter(small("stablelm"), rank=2, targets="lm_head"))
    again = small("stablelm")
    tl.load_adapter(again, tl.save_adapter(model, tmp_path / "a"))
    assert torch.equal(logits(again), logits(model)) and (logits(model) - logits(small("stablelm"))).abs().max() > 0.1


def test_dropout_acts_in_training_only_and_not_on_the_base():
    model = learnt(tl.add_adapter(small(), rank=2, dropout=0.5))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    tl.set_adapter(model, None)
    assert torch.equal(logits(model), logits(small()))


def test_a_chat_switches_and_the_base_stays_where_it_is(parts, tmp_path):
    "One model, one conversation, the adapter changed between two messages: each reply is that of a model which has this adapter only."
    base, tok, _ = parts
    made = {f"a{i}": learnt(tl.add_adapter(copy.deepcopy(base), name=f"a{i}", rank=2), i) for i in range(2)}
    both = copy.deepcopy(base).eval()
    for name, one in made.items(): tl.load_adapter(both, tl.save_adapter(one.eval(), tmp_path / name))
    where = [p.data_ptr() for p in both.parameters()]
    how = dict(temperature=0.0, max_tokens=8)
    session, said = tl.ChatSession(both, tok, **how), []
    for n, name in enumerate(["a0", "a1", None, "a0"]):
        tl.set_adapter(both, name)
        said.append("".join(session.reply(f"Hello {n}")))
        alone = tl.ChatSession(made.get(name, base).eval(), tok, **how)
        alone.turns = copy.deepcopy(session.turns[:-2])
        assert "".join(alone.reply(f"Hello {n}")) == said[-1]
    assert len({*said[:3]}) == 3 and [p.data_ptr() for p in both.parameters()] == where


def test_the_adapters_of_several_runs_are_switched_by_their_folders(parts, tmp_path, monkeypatch):
    "Two runs of one name and an adapter saved alone; each is read once, and answers as it does alone."
    base, tok, chats = parts
    tl.save(base, tok, tmp_path / "base")
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "a b"]
    for n, folder in enumerate(folders[:2]):
        tl.finetune(tl.load(tmp_path / "base", "cpu")[0], tok, chats, lora=2, steps=3, seed=n, out=folder, **HOW)
    tl.save_adapter(learnt(tl.add_adapter(tl.load(tmp_path / "base", "cpu")[0], rank=3)), folders[2])
    ids = torch.tensor([tok.chat(chats[0])[0]])
    alone = {None: logits(base.eval(), ids)}
    for folder in folders:
        one = tl.load(tmp_path / "base", "cpu")[0].eval()
        tl.load_adapter(one, folder / "best" if (folder / "best").exists() else folder)
        alone[folder] = logits(one, ids)
    both, read = tl.load(tmp_path / "base", "cpu")[0].eval(), []
    from tiny_llm.assistant import lora
    monkeypatch.setattr(lora, "load_adapter", lambda *a: read.append(a[2]) or tl.load_adapter(*a))
    for folder in [*folders, None, *folders[::-1], folders[0], None, folders[2] / ".." / "a b"]:
        assert tl.use_adapter(both, folder) == both.adapter
        assert torch.equal(logits(both, ids), alone[(tmp_path / folder).resolve() if folder else None])
    assert read == list(tl.list_adapters(both)) == ["run", "run-2", "a-b"]
    run = tl.load(folders[1], "cpu")[0]                                       # opened by its run, it need not be read again
    assert tl.use_adapter(run, folders[1]) == "default" and list(tl.list_adapters(run)) == ["default"]
    with pytest.raises(UserError, match="holds no adapter"): tl.use_adapter(both, tmp_path / "base")
    with pytest.raises(UserError, match="other weights"): tl.use_adapter(tl.Transformer(base.cfg), folders[0])


# Folders

def spoilt(folder, to, **change):
    shutil.copytree(folder, to, dirs_exist_ok=True)
    write_file(to / CONFIG, json.dumps({**read_json(to / CONFIG), **change}))
    return to


def test_another_base_is_refused_in_a_line(tmp_path):
    folder = tl.save_adapter(learnt(tl.add_adapter(small(), rank=2)), tmp_path / "a")
    for other, says in [(small(seed=1), "was trained on other weights"), (small(d_ff=96), "belongs to another model: its update of .*mlp.* 96"),
                        (small(n_layers=1), "changes model.layers.1.mlp.down_proj, which this one has not"), (small("gpt2"), "belongs to another model")]:
        before = logits(other)
        with pytest.raises(UserError, match=says) as e: tl.load_adapter(other, folder)
        assert "\n" not in str(e.value) and not tl.list_adapters(other) and torch.equal(logits(other), before)
        assert all(p.requires_grad for p in other.parameters()) and not any(isinstance(m, LoraLinear) for m in other.modules())
    other = small()
    with torch.no_grad(): other.blocks[1].ffn.down.weight[3, 5] += 1e-3       # one weight
    with pytest.raises(UserError, match="other weights"): tl.load_adapter(other, folder)
    assert tl.load_adapter(other, folder, anyway=True) == "a"


def test_what_a_base_is_called_follows_its_weights():
    model = tl.add_adapter(small(), rank=2)
    first = base_hash(model)
    assert first == base_hash(learnt(model)) == base_hash(small())
    with torch.no_grad(): model.embed.weight[0, 0] += 1
    assert base_hash(model) != first


def test_a_pickle_is_refused(tmp_path):
    folder = tl.save_adapter(tl.add_adapter(small(), rank=2), tmp_path / "a")
    (folder / TENSORS).unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin is a pickle, which is not read"): tl.load_adapter(small(), folder)


def test_other_kinds_of_adapters_are_refused_by_name(tmp_path):
    folder = tl.save_adapter(tl.add_adapter(small(), rank=2), tmp_path / "a")
    for n, change in enumerate([dict(use_dora=True), dict(bias="lora_only"), dict(modules_to_save=["embed_tokens"]), dict(init_lora_weights="pissa_niter_4"),
                                dict(peft_type="LOHA"), dict(trainable_token_indices=[3]), dict(lora_bias=True), dict(lora_dropout=5)]):
        name, value = next(iter(change.items()))
        with pytest.raises(UserError, match=name): tl.load_adapter(small(), spoilt(folder, tmp_path / str(n), **change))


def test_damaged_folders_end_in_a_line(tmp_path):
    "Bytes changed at random, in either file: the same adapter, another one that fits, or a UserError."
    folder = tl.save_adapter(learnt(tl.add_adapter(small(), rank=2, targets="q_proj")), tmp_path / "a")
    rng, refused = random.Random(0), 0
    for n in range(120):
        file = folder / (CONFIG if n % 2 else TENSORS)
        whole = file.read_bytes()
        data, place = bytearray(whole), rng.randrange(len(whole) if n % 2 else 1500)
        if n % 10 < 8: data[place] = rng.randrange(256)
        else: del data[place:]
        file.write_bytes(data)
        try: tl.load_adapter(small(), folder)
        except UserError as e: refused += 1; assert "\n" not in str(e)
        finally: file.write_bytes(whole)
    assert refused > 30
    tl.load_adapter(small(), folder)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    model = tl.add_adapter(small(), rank=2)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not the folder of an adapter"): tl.save_adapter(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


# In a training

@pytest.fixture(scope="module")
def parts():
    "(a base, its tokenizer, conversations)"
    says = [("Hello!", "Hello. What shall we talk about?"), ("Who are you?", "A small model."), ("Goodbye.", "Come back soon.")]
    chats = [[dict(role="user", content=f"{q} {i}"), dict(role="assistant", content=a)] for i in range(8) for q, a in says]
    tok = tl.train_tokenizer([m["content"] for c in chats for m in c] * 3, vocab_size=300)
    torch.manual_seed(0)
    return tl.Transformer(tl.ModelConfig(vocab_size=len(tok), ctx=64, d_model=32, n_layers=2, n_heads=2)), tok, chats


HOW = dict(batch=2, ctx=64, lr=1e-2, dtype="float32", compile=False, threads=1, quiet=True, device="cpu")


def state(model): return {n: w.clone() for n, w in model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_only_the_adapter_is_trained(parts):
    model, tok, chats = copy.deepcopy(parts[0]), *parts[1:]
    before = state(model)
    run = tl.finetune(model, tok, chats, lora=4, steps=6, **HOW)
    after = state(model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    moved = [n for n in after if n not in before and n.endswith(".B") and after[n].any()]
    assert len(moved) == 14 and run.summary["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad) < run.summary["params"]
    assert run.summary["val"]["nats_per_token"] < next(r["val"] for r in run.metrics if "val" in r)


@pytest.mark.parametrize("settings", [dict(), dict(optimizer="adamw", lora_dropout=0.3), dict(ema=0.9, lora_targets="q_proj,up_proj", lora_alpha=3.0)],
                         ids=["muon", "adamw with dropout", "average"])
@pytest.mark.parametrize("origin", ["memory", "folder"])
def test_a_resumed_run_is_the_whole_one_to_the_last_bit(parts, tmp_path, settings, origin):
    base, tok, chats = parts
    def begin(): return copy.deepcopy(base) if origin == "memory" else tl.load(tmp_path / "base", "cpu")[0]
    if origin == "folder": tl.save(base, tok, tmp_path / "base")
    how = dict(HOW, lora=3, steps=7, save_every=2, eval_every=3, **settings)
    whole = tl.finetune(begin(), tok, chats, out=tmp_path / "whole", **how)
    tl.finetune(begin(), tok, chats, out=tmp_path / "parts", stop_at=3, **how)
    torch.manual_seed(99)
    with_adapter = tl.load(tmp_path / "parts" / "last", "cpu")[0]            # as the command does it
    tl.finetune(with_adapter, tok, chats, out=tmp_path / "parts", resume=True, stop_at=5, quiet=True, device="cpu")
    last = tl.finetune(begin(), tok, chats, out=tmp_path / "parts", resume=True, quiet=True, device="cpu")
    assert same(state(whole.model), state(last.model))
    for name in ("best", "last"):
        assert same(state(tl.load(tmp_path / "whole" / name, "cpu")[0]), state(tl.load(tmp_path / "parts" / name, "cpu")[0]))
    assert (tmp_path / "whole" / "base").exists() == (origin == "memory")
    where = Path(tl.list_adapters(tl.load(tmp_path / "parts", "cpu")[0])["default"].base)
    assert where == (tmp_path / "parts" / "base" if origin == "memory" else tmp_path / "base")


def test_a_base_that_changed_in_memory_is_written_into_the_run(parts, tmp_path):
    base, tok, chats = parts
    tl.save(base, tok, tmp_path / "base")
    model = tl.load(tmp_path / "base", "cpu")[0]
    tl.finetune(model, tok, chats, steps=2, **HOW)                            # all weights: it is no longer what lies in base
    run = tl.finetune(model, tok, chats, lora=2, steps=2, out=tmp_path / "run", **HOW)
    again = tl.load(tmp_path / "run", "cpu")[0]
    assert Path(tl.list_adapters(again)["default"].base) == tmp_path / "run" / "base"
    assert same(state(again), state(run.model))
    shutil.move(tmp_path / "run", tmp_path / "moved")                         # the base is found beside
    assert same(state(tl.load(tmp_path / "moved", "cpu")[0]), state(again))


def test_folders_of_a_run_open_elsewhere(parts, tmp_path):
    "PEFT on the base, and transformers, which follows the adapter to its base by itself."
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, tok, chats = parts
    run = tl.finetune(copy.deepcopy(base), tok, chats, lora=4, steps=4, out=tmp_path / "run", **HOW)
    ids = torch.tensor([tok.chat(chats[0])[0]])
    below = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "base")
    near(logits(peft.PeftModel.from_pretrained(below, tmp_path / "run" / "last").eval(), ids), logits(run.model.eval(), ids))
    near(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "last").eval(), ids), logits(run.model, ids))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "last").encode("Hello", add_special_tokens=False) == tok.encode("Hello")


def test_what_is_on_is_what_is_saved(parts, tmp_path):
    base, tok, _ = parts
    tl.save(base, tok, tmp_path / "base")
    model = learnt(tl.add_adapter(tl.load(tmp_path / "base", "cpu")[0], rank=2))
    ids = torch.tensor([tok.encode("Hello. What")])
    tl.save(model, tok, tmp_path / "on")
    tl.save(tl.set_adapter(model, None), tok, tmp_path / "off")
    assert torch.equal(logits(tl.load(tmp_path / "on", "cpu")[0], ids), logits(tl.set_adapter(model, "default"), ids))
    assert torch.equal(logits(tl.load(tmp_path / "off", "cpu")[0], ids), logits(base, ids))
    tl.save(tl.merge_adapter(model), tok, tmp_path / "on")                    # a model folder in place of an adapter's
    plain = tl.load(tmp_path / "on", "cpu")[0]
    assert not tl.list_adapters(plain) and torch.equal(logits(plain, ids), logits(model, ids)) and not (tmp_path / "on" / CONFIG).exists()


def test_a_changed_file_of_an_adapter_is_noticed(parts, tmp_path):
    base, tok, chats = parts
    run = tl.finetune(copy.deepcopy(base), tok, chats, lora=2, steps=2, out=tmp_path / "run", **HOW)
    file = run.folder / "best" / TENSORS
    file.write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(UserError, match="is damaged or was changed"): tl.load(tmp_path / "run", "cpu")


def test_a_folder_saved_again_by_peft_opens(parts, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, tok, chats = parts
    run = tl.finetune(copy.deepcopy(base), tok, chats, lora=2, steps=2, out=tmp_path / "run", **HOW)
    there = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(run.folder / "base"), run.folder / "best")
    there.save_pretrained(run.folder / "best")
    assert same(state(tl.load(run.folder, "cpu")[0]), state(run.model))


def test_an_adapter_without_its_base_says_so(parts, tmp_path):
    base, tok, chats = parts
    tl.finetune(copy.deepcopy(base), tok, chats, lora=2, steps=2, out=tmp_path / "run", **HOW)
    shutil.move(tmp_path / "run" / "best", tmp_path / "alone")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="alone is an adapter of .*base: there is no model folder"): tl.load(tmp_path / "alone", "cpu")
    (tmp_path / "alone" / "SHA256SUMS").unlink()
    for named in (None, "", 3, "a\0b"):
        spoilt(tmp_path / "alone", tmp_path / "nameless", base_model_name_or_path=named)
        with pytest.raises(UserError, match="does not say of which model"): tl.load(tmp_path / "nameless", "cpu")


def test_an_adapter_of_an_adapter_is_refused(parts, tmp_path):
    "Also one that names itself, or a chain that comes back."
    base, tok, _ = parts
    tl.save(base, tok, tmp_path / "base")
    tl.save(tl.add_adapter(tl.load(tmp_path / "base", "cpu")[0], rank=2), tok, tmp_path / "one")
    (tmp_path / "one" / "SHA256SUMS").unlink()
    for name, below in [("itself", "itself"), ("two", "one"), ("three", "two")]:
        spoilt(tmp_path / "one", tmp_path / name, base_model_name_or_path=str(tmp_path / below))
        with pytest.raises(UserError, match=f"{name} is an adapter of .*{below}: that is an adapter too; merge it"): tl.load(tmp_path / name, "cpu")


def test_a_training_of_all_weights_begins_with_base_and_adapter(parts, tmp_path):
    base, tok, chats = parts
    model = learnt(tl.add_adapter(copy.deepcopy(base), rank=2))
    tl.add_adapter(model, name="spare", rank=1)
    tl.set_adapter(model, "default")
    ids = torch.tensor([tok.encode("Hello. What")])
    wanted = logits(model.eval(), ids)
    run = tl.finetune(model, tok, chats, steps=1, **{**HOW, "lr": 1e-12})
    assert not tl.list_adapters(run.model) and all(p.requires_grad for p in run.model.parameters())
    near(logits(run.model.eval(), ids), wanted)


def test_settings_that_do_not_fit_are_refused_before_anything_is_written(parts, tmp_path):
    base, tok, chats = parts
    for wrong, says in [(dict(lora=0), "lora is 0"), (dict(lora=1.5), "whole number"), (dict(lora_alpha=2.0), "without lora"),
                        (dict(lora=2, lora_dropout=1.0), "below 1"), (dict(lora=33), "rank 33 is larger than"), (dict(lora=2, lora_targets="w"), "called 'w'")]:
        with pytest.raises(UserError, match=says): tl.finetune(copy.deepcopy(base), tok, chats, steps=2, out=tmp_path / "run", **wrong, **HOW)
        assert not (tmp_path / "run" / "config.json").exists()
    tl.finetune(copy.deepcopy(base), tok, chats, lora=2, steps=4, stop_at=2, out=tmp_path / "run", **HOW)
    for wrong in (dict(lora=4), dict(lora_alpha=2.0, lora=2), dict(lora_targets="q_proj", lora=2), dict(lora_dropout=0.5, lora=2)):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} is .* was started"):
            tl.finetune(copy.deepcopy(base), tok, chats, out=tmp_path / "run", resume=True, quiet=True, **wrong)


# The command

def test_the_command(parts, tmp_path, monkeypatch):
    base, tok, chats = parts
    monkeypatch.chdir(tmp_path)
    tl.save(base, tok, "base")
    write_file("chats.jsonl", "".join(json.dumps(dict(messages=c)) + "\n" for c in chats))
    line = "finetune --model base --data chats.jsonl --steps 4 --batch 2 --lora 2 --lora_targets q_proj,v_proj --out run --device cpu --threads 1"
    code, out, err = try_line(line, show=False)
    assert code == 0, err
    n = 2 * 2 * 2 * (32 + 32)
    assert f"{n:,}" in out and "trained" in out
    assert set(read_json("run/best/adapter_config.json")["target_modules"]) == {"q_proj", "v_proj"}
    code, out, err = try_line("generate --model run --prompt Hello --max_tokens 3 --device cpu", show=False)
    assert code == 0 and out.startswith("Hello"), err
    code, _, err = try_line("finetune --data chats.jsonl --out run --lora 3 --resume", show=False)
    assert code == 2 and "finished" in err
    for word in ("train", "plan", "tune"):
        code, _, err = try_line(f"{word} --lora 2", show=False)
        assert code == 2 and "has no option --lora" in err
    assert parse_options(commands["finetune"], ["--lora", "8", "--lora_alpha", "16"]) == dict(lora=8, lora_alpha=16.0)


def test_a_run_that_was_left_goes_on_by_the_command(parts, tmp_path, monkeypatch):
    base, tok, chats = parts
    monkeypatch.chdir(tmp_path)
    tl.save(base, tok, "base")
    write_file("chats.jsonl", "".join(json.dumps(dict(messages=c)) + "\n" for c in chats))
    settings = TrainConfig(data="chats.jsonl", lora=2, lora_dropout=0.2, steps=6, **{n: v for n, v in HOW.items() if n not in ("quiet", "device")})
    start = tl.load("base", "cpu")[0]
    tl.finetune(start, tok, chats, settings, out="run", stop_at=3, quiet=True, device="cpu")
    whole = tl.finetune(tl.load("base", "cpu")[0], tok, chats, settings, out="whole", quiet=True, device="cpu")
    code, _, err = try_line("finetune --out run --resume --device cpu", show=False)
    assert code == 0, err
    assert same(state(tl.load("run/last", "cpu")[0]), state(whole.model))


def test_stages_with_adapters(tmp_path, monkeypatch):
    "A stage begins with base and adapter of the one before; the last model is a plain one."
    from tiny_llm.assistant.pipeline import pipeline
    monkeypatch.chdir(tmp_path)
    write_file("talks.jsonl", "".join(json.dumps(dict(instruction=f"Say {n}.", output=f"It is {n}!")) + "\n" for n in range(20)))
    stages = [dict(name="read", kind="train", data="stories", limit=30, steps=3), dict(name="talk", kind="finetune", data="talks.jsonl", steps=3, lora=2),
              dict(name="more", kind="finetune", data="talks.jsonl", steps=3, lora=3)]
    write_file("plan.json", json.dumps(dict(preset="tiny", vocab_size=300, dtype="float32", compile=False, batch=2, ctx=64, threads=1, stages=stages)))
    pipeline("plan.json", "out", device="cpu", quiet=True)
    before, last = tl.load("out/talk/best", "cpu")[0], tl.load("out/more/best", "cpu")[0]
    ids = torch.arange(20)[None]
    near(logits(tl.set_adapter(last, None), ids), logits(before, ids))
    plain = tl.load("out/model", "cpu")[0]
    assert not tl.list_adapters(plain)
    near(logits(plain, ids), logits(tl.set_adapter(last, "default"), ids))
