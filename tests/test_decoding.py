"""What is drawn, and how: every setting against its exact probabilities and transformers; caches against none; beams and guesses against brute force.

Shares of n draws over V tokens are tested by Hoeffding's bound: a right sampler is further away than it with a probability of `ALARM` at most."""
import itertools, math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers.generation import logits_process as hf

import tiny_llm as tl
from tiny_llm.assistant.decoding import accept, beam_search, continuation, speculate
from tiny_llm.assistant.generate import generate_batch, pick, sample, sampling, stream, text_pieces, until, warp
from tiny_llm.basics import UserError
from tiny_llm.transformer.model import ModelConfig, Transformer

ALARM = 1e-6


def improbable(shares, r, n): return bool((shares - r).abs().max() >= math.sqrt(math.log(2 * len(r) / ALARM) / (2 * n)))


# Samplers ------------------------------------------------------------------------------------------------------------

SETTINGS = dict(plain={}, cold=dict(temperature=0.5), warm=dict(temperature=2.0), top_k=dict(top_k=5), top_p=dict(top_p=0.7), min_p=dict(min_p=0.15),
                repetition=dict(repetition_penalty=1.7), presence=dict(presence_penalty=1.2), frequency=dict(frequency_penalty=0.6), negative=dict(frequency_penalty=-0.4),
                all=dict(temperature=1.3, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2))


def by_hand(z, previous, drawn, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0):
    "The exact probabilities of one row, in Python's own numbers, in the words of the definitions."
    z = [x if i not in previous else x / repetition_penalty if x > 0 else x * repetition_penalty for i, x in enumerate(z.double().tolist())]
    z = [(x - frequency_penalty * drawn.count(i) - presence_penalty * (i in drawn)) / temperature for i, x in enumerate(z)]
    weight = [math.exp(x - max(z)) for x in z]
    keep = sorted(range(len(z)), key=lambda i: -weight[i])[:top_k or None]
    total, before, kept = sum(weight[i] for i in keep), 0.0, []
    for i in keep:
        if before < top_p * total: kept.append(i)
        before += weight[i]
    kept = [i for i in kept if weight[i] >= min_p * weight[kept[0]]]
    total = sum(weight[i] for i in kept)
    return torch.tensor([weight[i] / total if i in kept else 0.0 for i in range(len(z))], dtype=torch.float64)


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_100_000_draws(options):
    g = torch.Generator().manual_seed(1)
    z, n = 2 * torch.randn(30, generator=g), 100_000
    previous, drawn = torch.randint(30, (12,), generator=g), torch.randint(30, (9,), generator=g)
    r = by_hand(z, previous.tolist(), drawn.tolist(), **options)
    given = dict(previous=previous[None].expand(n, -1), drawn=drawn[None].expand(n, -1), **options)
    assert_close(warp(z[None], **given | dict(previous=previous[None], drawn=drawn[None])).softmax(-1)[0].double(), r, rtol=0, atol=1e-6)
    shares = sample(z.expand(n, -1), g, **given).bincount(minlength=30) / n
    assert not improbable(shares, r, n)
    assert shares[r == 0].sum() == 0
    other = 0.97 * r + 0.03 * torch.eye(30)[int(r.argmin())]
    assert improbable(shares, other, n)          # 3 of 100 draws misplaced would be seen


@pytest.mark.parametrize("ours, theirs", [
    (dict(temperature=0.3), lambda: hf.TemperatureLogitsWarper(0.3)), (dict(temperature=1.9), lambda: hf.TemperatureLogitsWarper(1.9)),
    (dict(top_k=1), lambda: hf.TopKLogitsWarper(1)), (dict(top_k=40), lambda: hf.TopKLogitsWarper(40)), (dict(top_p=0.1), lambda: hf.TopPLogitsWarper(0.1)),
    (dict(top_p=0.9), lambda: hf.TopPLogitsWarper(0.9)), (dict(min_p=0.02), lambda: hf.MinPLogitsWarper(0.02)), (dict(min_p=0.5), lambda: hf.MinPLogitsWarper(0.5)),
    (dict(repetition_penalty=1.3), lambda: hf.RepetitionPenaltyLogitsProcessor(1.3)), (dict(repetition_penalty=0.8), lambda: hf.RepetitionPenaltyLogitsProcessor(0.8))],
    ids=lambda x: str(x) if isinstance(x, dict) else "")            # a function's address is another in each worker
def test_equals_transformers_processor(ours, theirs):
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        logits, seen = 3 * torch.randn(32, 500, generator=g), torch.randint(500, (32, 60), generator=g)
        want = theirs()(seen, logits.clone()).softmax(-1)
        assert_close(warp(logits, previous=seen, **ours).softmax(-1), want, rtol=0, atol=1e-6)


def test_greedy_takes_the_first_of_the_likeliest():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert warp(logits, temperature=0).softmax(-1).tolist() == [[0, 1, 0, 0]]


# Caches and batches --------------------------------------------------------------------------------------------------

BASE = dict(vocab_size=40, ctx=48, d_model=32, n_layers=2, n_heads=4)
VARIANTS = dict(mha={}, gqa=dict(n_kv_heads=2), mqa=dict(n_kv_heads=1), llama=dict(qk_norm=False, tied=False), wide=dict(head_dim=16), bias=dict(bias=True, norm="layer"),
                gpt2=dict(qk_norm=False, norm="layer", norm_bias=True, bias=True, positions="learned", ffn="gelu_tanh"), nowhere=dict(positions="none"),
                neox=dict(rotary=0.5, parallel=True, norm="layer"), post=dict(norm_place="post", norm="layer", positions="learned"),
                yarn=dict(rope_scaling=dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=24)), linear=dict(rope_scaling=dict(rope_type="linear", factor=2.0)),
                window=dict(window=5), narrow=dict(window=1, n_kv_heads=2), window_gpt2=dict(window=7, positions="learned"), window_neox=dict(window=4, rotary=0.5, parallel=True))
each = pytest.mark.parametrize("shape", VARIANTS.values(), ids=VARIANTS)


def model_of(shape, seed=0):
    torch.manual_seed(seed)
    m = Transformer(ModelConfig(**BASE | shape)).eval()
    with torch.no_grad():
        for p in m.parameters(): p.add_(0.2 * torch.randn_like(p))       # also gains and biases
    return m


class Letters:
    "A tokenizer whose ids are letters; `end` ends a text."
    def __init__(self, end=None): self.bos, self.eos, self.end, self.ends, self.template = 0, end, end, {end} - {None}, None
    def nameless(self, n): return []
    def encode(self, text): return [ord(c) - 48 for c in text]
    def decode(self, ids, special=True): return "".join(chr(48 + i) for i in ids)


def ids_of(s):
    for _ in s: pass
    return s.ids


@torch.no_grad()
def naive(m, ids, n):
    "Greedy, the whole text through the model each time."
    ids = list(ids)
    for _ in range(n): ids.append(int(m(torch.tensor([ids]))[0, -1].argmax()))
    return ids


@each
@pytest.mark.parametrize("B", [1, 3])
def test_cached_equals_uncached(shape, B):
    "Logits within 1e-4 in float32, in pieces and one by one, through a cache that holds all and one that slides."
    m = model_of(shape)
    ids = torch.randint(40, (B, 48))
    with torch.no_grad():
        whole = m(ids)
        for cuts, slide in itertools.product(([1] * 48, [20] + [1] * 28, [3, 9, 1, 1, 30, 4]), (False, True)):
            cache = m.cache(B, 48, slide=slide)
            assert_close(torch.cat([m(part, cache=cache) for part in ids.split(cuts, 1)], 1), whole, rtol=0, atol=1e-4)
            assert not slide or m.cfg.window is None or cache.k.shape[3] == m.cfg.window       # it holds no more


@each
def test_cached_generation_in_float64(shape):
    m = model_of(shape).double()
    for prompt, n in ([3], 40), (list(range(20)), 28):
        assert prompt + ids_of(stream(m, Letters(), prompt, n, temperature=0)) == naive(m, prompt, n)


@each
def test_padded_rows_equal_single_prompts(shape):
    m = model_of(shape)
    rows = [torch.randint(40, (n,)) for n in (30, 1, 17, 30, 29)]
    pad = torch.tensor([30 - len(r) for r in rows])
    text = torch.stack([torch.cat([torch.randint(40, (int(p),)), r]) for p, r in zip(pad, rows)])    # what stands there is not seen
    with torch.no_grad():
        cache = m.cache(5, 30, pad=pad)
        out = torch.cat([m(part, cache=cache) for part in text.split([26, 1, 1, 2], 1)], 1)
        for o, r, p in zip(out, rows, pad): assert_close(o[p:], m(r[None])[0], rtol=0, atol=1e-4)
    m = m.double()
    prompts = [r.tolist() for r in rows]
    alone = [ids_of(stream(m, Letters(), p, 40, temperature=0)) for p in prompts]
    assert generate_batch(m, Letters(), prompts, 40, temperature=0) == alone
    assert {len(ids) for ids in alone} == {19, 40, 32, 20}               # up to the end of the context, each its own


def test_rows_that_end_do_not_disturb_the_others():
    m = model_of({}).double()
    prompts = [[i, i + 1, 7][: 1 + i % 3] for i in range(12)]
    for options in [dict(temperature=0), dict(temperature=1.5), dict(temperature=1.2, frequency_penalty=0.7, presence_penalty=0.3, repetition_penalty=1.2)]:
        together = generate_batch(m, Letters(5), prompts, 30, seed=3, **options)
        assert len({len(t) for t in together}) > 2 and together == generate_batch(m, Letters(5), prompts, 30, seed=3, batch=1, **options)
        assert ids_of(stream(m, Letters(5), prompts[0], 30, seed=3, **options)) == together[0]


def test_a_sliding_cache_does_not_step_back():
    m = model_of(dict(window=5))
    cache = m.cache(1, 48, slide=True)
    with torch.no_grad(): m(torch.randint(40, (1, 9)), cache=cache)
    with pytest.raises(UserError, match="slides over 9 tokens and cannot go back to 8"): cache.truncate(8)
    cache.truncate(0)
    assert cache.held == 0


# Events --------------------------------------------------------------------------------------------------------------

def test_events_tell_what_was_drawn():
    m, options = model_of({}), dict(max_tokens=30, temperature=1.3, top_p=0.9, frequency_penalty=0.5, seed=4)
    s = stream(m, Letters(), [1, 2], top=3, **options)
    events = list(s.events)
    assert [e.id for e in events] == [*s.ids, None] and "".join(e.text for e in events) == "".join(stream(m, Letters(), [1, 2], **options))
    assert [e.reason for e in events] == [None] * 30 + ["length"] and s.logprobs == [e.logprob for e in events[:-1]]
    with torch.no_grad(): q = m(torch.tensor([[1, 2, *s.ids]]))[0, 1:-1].log_softmax(-1)
    assert_close(torch.tensor(s.logprobs), q[range(30), s.ids], rtol=0, atol=1e-4)
    assert_close(torch.tensor([e.entropy for e in events[:-1]]), -(q.exp() * q).sum(-1), rtol=0, atol=1e-4)
    for e, row in zip(events, q): assert [i for i, _ in e.top] == row.topk(3).indices.tolist() and abs(e.top[0][1] - row.max().exp()) < 1e-4
    assert list(s.events) == [] and list(s) == []


def test_the_end_of_events():
    m = model_of({})
    full = ids_of(stream(m, Letters(), [1], temperature=0, max_tokens=20))
    end = next(i for i in full if full.index(i) > 3)
    last = list(stream(m, Letters(end), [1], temperature=0, max_tokens=20).events)[-1]
    assert (last.id, last.text, last.reason) == (end, "", "stop") and last.logprob is not None
    s = stream(m, Letters(), [1], temperature=0, max_tokens=20)
    next(s)
    s.interrupt.set()
    assert [(e.id, e.reason) for e in s.events] == [(None, "interrupted")]


@pytest.mark.parametrize("seed", range(20))
def test_stop_texts_do_not_depend_on_the_pieces(seed):
    import random
    rng = random.Random(seed)
    for _ in range(50):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(25)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(3))]
        pieces, at = [], 0
        while at < len(text):
            n = rng.randrange(5)
            pieces.append(text[at:at + n])
            at += n
        end = min((text.index(s) + len(s) for s in stops if s in text), default=None)
        want = text if end is None else text[:min(end - len(s) for s in stops if text[:end].endswith(s))]
        got, shown = [*until(pieces, stops)], ""
        for k, (piece, found) in enumerate(got):
            shown += piece
            assert want.startswith(shown) and found == (end is not None and k == len(got) - 1)
        assert shown == want


def test_a_stop_text_ends_a_stream():
    m = model_of({})
    whole = "".join(stream(m, Letters(), [1], seed=2, max_tokens=40))
    for stop in (whole[7:9], [whole[11:15], "~~"]):
        s = stream(m, Letters(), [1], seed=2, max_tokens=40, stop=stop)
        first = stop if isinstance(stop, str) else stop[0]
        assert "".join(s) == whole[: whole.index(first)] and s.reason == "stop" and len(s.ids) == whole.index(first) + len(first)


def test_seeds():
    m = model_of({})
    a, b, c = (ids_of(stream(m, Letters(), [1], seed=seed, max_tokens=30)) for seed in (1, 1, 2))
    assert a == b != c
    assert ids_of(speculate(m, Letters(), [1], seed=1, max_tokens=30)) == ids_of(speculate(m, Letters(), [1], seed=1, max_tokens=30))


def test_pieces_are_as_many_as_ids():
    tok = tl.char_tokenizer(["abc"])
    ids = tok.encode("abcab")
    assert [*text_pieces(ids, tok.decode)] == ["a", "b", "c", "a", "b", ""] and [*text_pieces([], tok.decode)] == [""]


# What a folder says --------------------------------------------------------------------------------------------------

def test_a_folder_s_settings_are_the_defaults(tmp_path):
    tok = tl.train_tokenizer(["The cat sat on the mat."] * 20, 270)
    m = Transformer(ModelConfig(vocab_size=len(tok), ctx=32, d_model=16, n_layers=1, n_heads=2))
    said = dict(temperature=0.6, top_k=7, top_p=0.9, min_p=0.05, repetition_penalty=1.1)
    tl.save(m, tok, tmp_path/"m", generation=said | dict(eos_token_id=[1, 2, 9]))
    again, its_tok = tl.load(tmp_path/"m", "cpu")
    settings = sampling(again)
    assert {name: settings[name] for name in said} == said and {1, 2, 9} <= its_tok.ends and stream(again, its_tok).stop >= {1, 2, 9}
    assert stream(again, its_tok).options == {name: x for name, x in settings.items() if name != "max_tokens"}
    assert stream(again, its_tok, repetition_penalty=1.0, min_p=0.0).options["repetition_penalty"] == 1
    tl.save(m, tok, tmp_path/"greedy", generation=dict(do_sample=False, top_k=3, repetition_penalty=1.2))
    assert tl.load(tmp_path/"greedy", "cpu")[0].generation == dict(temperature=0, repetition_penalty=1.2)


# Beams ---------------------------------------------------------------------------------------------------------------

def tiny(seed, V=5): return model_of(dict(vocab_size=V, d_model=16, n_layers=1, n_heads=2, tied=False, ctx=24), seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ell", [0.0, 0.7, 1.0])
def test_beams_find_what_brute_force_finds(seed, ell):
    m, scores = tiny(seed).double(), {}
    texts = [ids for k in range(1, 5) for ids in itertools.product(range(5), repeat=k) if 4 not in ids[:-1] and (k == 4 or ids[-1] == 4)]
    with torch.no_grad():
        for ids in texts: scores[ids] = m(torch.tensor([[0, *ids]]))[0].log_softmax(-1)[range(len(ids)), ids].sum().item() / len(ids) ** ell
    best = sorted(scores, key=scores.get, reverse=True)
    found = beam_search(m, Letters(4), [0], beams=len(texts), max_tokens=4, length_penalty=ell)
    assert tuple(found[0].ids) == best[0] and abs(found[0].score - scores[best[0]]) < 1e-5
    assert [tuple(b.ids) for b in found[:20]] == best[:20]
    for beams in (1, 2, 4):
        for b in beam_search(m, Letters(4), [0], beams, 4, ell): assert abs(b.score - scores[tuple(b.ids)]) < 1e-5      # its score is true


@pytest.fixture(scope="module")
def pair_with_theirs():
    import transformers
    from tiny_llm.transformer.huggingface import to_hf
    ours = model_of(dict(tied=False))
    config, state = to_hf(ours)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).eval()
    theirs.load_state_dict(state, strict=False)
    return ours, theirs


@pytest.mark.parametrize("beams, n, ell, stop", [(2, 10, 1.0, [5]), (4, 16, 1.0, [5, 11]), (4, 16, 0.0, [5, 11]), (3, 16, 2.0, [7]), (5, 12, -0.5, list(range(12)))])
def test_beams_equal_transformers(pair_with_theirs, beams, n, ell, stop):
    ours, theirs = pair_with_theirs
    for prompt in ([1], [4, 20, 33], list(range(25))):
        out = theirs.generate(torch.tensor([prompt]), num_beams=beams, max_new_tokens=n, length_penalty=ell, do_sample=False, num_return_sequences=beams,
                              eos_token_id=stop, pad_token_id=39, output_scores=True, return_dict_in_generate=True)
        found = beam_search(ours, Letters(), prompt, beams, n, ell, stop=stop)
        assert len(found) == beams
        for b, ids, score in zip(found, out.sequences, out.sequences_scores):
            assert b.ids == ids[len(prompt):len(prompt) + len(b.ids)].tolist() and abs(b.score - score) < 1e-4


def test_beams_at_the_edges():
    m = model_of({})
    assert [len(b.ids) for b in beam_search(m, Letters(), list(range(20)) * 2 + [1] * 8, 3, 9)] == [1, 1, 1]    # a full context leaves room for one
    assert beam_search(m, Letters(), [1], 1, 20)[0].ids == ids_of(stream(m, Letters(), [1], 20, temperature=0))
    w = model_of(dict(window=5)).double()
    assert beam_search(w, Letters(), [1], 1, 30)[0].ids == naive(w, [1], 30)[1:]
    for bad in (0, 2.5, True):
        with pytest.raises(UserError, match="beams is "): beam_search(m, Letters(), [1], bad)
    with pytest.raises(UserError, match="end at ids alone"): beam_search(m, Letters(), [1], stop="x")


# Guesses -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("d", [[0.1, 0.3, 0.1, 0.5, 0.0], [0.45, 0.25, 0.15, 0.1, 0.05], [0, 0, 0, 0, 1.0], [0.2] * 5], ids=["other", "same", "sure", "level"])
def test_what_is_accepted_has_the_model_s_distribution(d):
    g, n = torch.Generator().manual_seed(0), 100_000
    r, d = torch.tensor([0.45, 0.25, 0.15, 0.10, 0.05]), torch.tensor(d)
    guesses = pick(d.expand(n, 5), torch.rand(n, generator=g))
    out, kept = accept(guesses, r.expand(n, 5), d.expand(n, 5), torch.rand(n, 2, generator=g))
    assert not improbable(out.bincount(minlength=5) / n, r, n)
    assert abs(kept.float().mean() - torch.minimum(r, d).sum()) < 0.01 and torch.equal(out[kept], guesses[kept])


def exact_pairs(m, prompt, **options):
    "The probability of each text of two tokens."
    out = torch.ones(4, 4, dtype=torch.float64)
    for ids in itertools.product(range(4), repeat=2):
        for t in range(2):
            text = torch.tensor([[*prompt, *ids[:t]]])
            with torch.no_grad(): out[ids] *= warp(m(text)[:, -1].float(), previous=text, drawn=text[:, len(prompt):], **options).softmax(-1)[0, ids[t]]
    return out.flatten()


@pytest.mark.parametrize("guesser", ["draft", "lookup", "far"])
def test_texts_have_the_model_s_distribution(guesser):
    target, small, prompt, n = tiny(3, 4), tiny(9, 4), [0, 1, 2, 0], 600
    options, how = dict(temperature=1.1, top_p=0.95, frequency_penalty=0.6), dict(draft=dict(draft=small), lookup={}, far=dict(draft=small, ahead=1))[guesser]
    counts = torch.zeros(16)
    for seed in range(n):
        a, b = ids_of(speculate(target, Letters(), prompt, max_tokens=2, seed=seed, **how, **options))
        counts[4 * a + b] += 1
    right = exact_pairs(target, prompt, **options)
    assert not improbable(counts / n, right, n) and (right == 0).sum() > 4 and counts[right == 0].sum() == 0       # its settings too
    assert improbable(counts / n, exact_pairs(small, prompt, **options), n)


def greedy_as_without(m, prompt, **how):
    s = speculate(m, Letters(), prompt, temperature=0, max_tokens=60, **how)
    assert prompt + ids_of(s) == naive(m, prompt, 49 - len(prompt)) and s.reason == "context" and s.passes <= len(s.ids)
    return s


@each
def test_greedy_guesses_change_nothing(shape):
    m, draft = model_of(shape).double(), model_of(dict(n_layers=1, d_model=16, n_heads=2), 5).double()
    greedy_as_without(m, list(range(30)), draft=draft)
    greedy_as_without(m, [1, 2, 3, 1, 2, 3, 1] * 4, longest=2, ahead=6)


def test_a_draft_that_is_the_model_is_always_right():
    m = model_of({}).double()
    for ahead, passes in (1, 23), (4, 10), (7, 6), (60, 1): assert greedy_as_without(m, [1, 2, 3], draft=m, ahead=ahead).passes == passes


def test_guesses_end_where_a_stream_ends():
    m = model_of({}).double()
    full = ids_of(stream(m, Letters(), [1], temperature=0, max_tokens=20))
    end = next(i for i in full if full.index(i) > 4)
    for tok, options in (Letters(end), {}), (Letters(), dict(stop=Letters().decode(full[6:8]))), (Letters(), dict(max_tokens=3)):
        plain, fast = (how(m, tok, [1], temperature=0, **dict(max_tokens=20) | options) for how in (stream, lambda *a, **kw: speculate(*a, draft=m, **kw)))
        assert ("".join(plain), plain.ids, plain.reason) == ("".join(fast), fast.ids, fast.reason)
        assert_close(torch.tensor(plain.logprobs), torch.tensor(fast.logprobs), rtol=0, atol=1e-5)


def test_what_cannot_guess_is_refused():
    m = model_of({})
    with pytest.raises(UserError, match="The draft has 30 tokens, the model 40"): speculate(m, Letters(), [1], draft=model_of(dict(vocab_size=30)))
    for name, bad in itertools.product(("ahead", "longest"), (0, 1.5, True)):
        with pytest.raises(UserError, match=f"{name} is "): speculate(m, Letters(), [1], **{name: bad})


def test_lookup():
    assert continuation([5, 1, 2, 3, 4, 1, 2], 2, 3) == [3, 4] and continuation([1, 2, 7, 2, 9, 2], 3, 3) == [9, 2]
    assert continuation([4, 1, 2, 8, 1, 2, 9, 4, 1, 2], 1, 3) == [8]        # three that match before two that are nearer
    assert continuation([1], 3, 3) == continuation([], 3, 3) == continuation([1, 2, 3], 3, 3) == []
