"""Weights in fewer bits: 100 random shapes, every kind of shape of a model, what needs float32 refused, GGUF's blocks kept, commands, memory."""
import copy, random

import pytest
import torch
import torch.nn.functional as F

import tiny_llm as tl
from tiny_llm.assistant.decoding import beam_search
from tiny_llm.basics import UserError
from tiny_llm.deployment.quantize import round_groups, round_with_feedback
from tiny_llm.training.benchmarks import benchmark
from tiny_llm.transformer import packed as module
from tiny_llm.transformer.attention import SlidingCache
from tiny_llm.transformer.packed import KINDS, PackedLinear, PackedTransformer, pack4, row_product, unpack4

LLAMA = dict(qk_norm=False, norm_eps=1e-5)
SHAPES = {"own": {}, "grouped": dict(n_kv_heads=1), "llama": dict(LLAMA, tied=False), "qwen2": dict(qk_norm=False, qkv_bias=True),
          "gpt2": dict(qk_norm=False, norm="layer", norm_bias=True, bias=True, positions="learned", ffn="gelu_tanh"),
          "gpt1": dict(qk_norm=False, norm="layer", norm_bias=True, bias=True, positions="learned", ffn="gelu_tanh", norm_place="post"),
          "neox": dict(qk_norm=False, norm="layer", norm_bias=True, bias=True, ffn="gelu", parallel=True, rotary=0.25, tied=False),
          "window": dict(window=9), "none": dict(positions="none", ffn="relu2"), "odd": dict(d_model=50, n_heads=5, head_dim=10, d_ff=77),
          "dynamic": dict(rope_scaling=dict(rope_type="dynamic", factor=2.0))}


def small(kind="own", **more):
    torch.manual_seed(0)
    return tl.Transformer(tl.ModelConfig(**{**dict(vocab_size=270, ctx=48, d_model=64, n_layers=2, n_heads=4), **SHAPES[kind], **more})).eval()


@pytest.fixture(scope="module")
def tok(): return tl.train_tokenizer(tl.stories(30), vocab_size=270)


def text(T, B=1, V=270): return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(T))


@torch.no_grad()
def by_steps(model, ids, first=1):
    cache = model.cache(1, ids.shape[1])
    return torch.cat([model(ids[:, :first], cache=cache)] + [model(ids[:, t:t + 1], cache=cache) for t in range(first, ids.shape[1])], 1)


def dequantized(model, kind, **how):
    "The twin: a float32 model with the weights that the quantized one stands for."
    net, q = copy.deepcopy(model), tl.quantize(model, kind, **how)
    with torch.no_grad():
        for name, m in q.named_modules():
            if isinstance(m, PackedLinear) and (name.startswith("blocks.") or name == "head"):
                net.get_submodule(name).weight.copy_(m.numbers()[:, :m.in_features])
        table = getattr(q.embed, "table", None)
        if table is not None: net.embed.weight.copy_(table.numbers()[:, :table.in_features])
    return net, q


# --- products


def test_products_of_100_random_shapes():
    "The product on words, eagerly, and the plain way, against float64 sums over whole numbers; odd sizes, groups that do not divide."
    rng, seen = random.Random(0), set()
    for k in range(100):
        gen = torch.Generator().manual_seed(k)
        outputs, inputs, bits = rng.choice([1, 2, 3, 17, 64, 130]), rng.choice([1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 96, 100, 257, 576]), rng.choice([8, 4])
        groups = -(-inputs // 32) if bits == 4 or k % 2 else 1
        n = torch.randint(-2 ** (bits - 1), 2 ** (bits - 1), (outputs, inputs), generator=gen)
        scale, x = torch.rand(outputs, groups, generator=gen) + 0.1, torch.randn(1, inputs, generator=gen)
        layer = PackedLinear(n, scale, bits)
        wide = scale.repeat_interleave(32, 1)[:, :inputs] if groups > 1 else scale
        want = x.double() @ (n.double() * wide.double()).T
        on_words = row_product(F.pad(x[0], (0, layer.padding)), layer.words, layer.scale, bits)
        most = 1e-5 * (x.abs() @ (n.abs() * wide).T.float()).max() * 2 ** (bits - 4) + 1e-5     # of the sum of what is added
        assert (layer(x) - want).abs().max() <= most and (on_words - want[0]).abs().max() <= most, (outputs, inputs, bits, groups)
        assert torch.equal(layer.numbers()[:, :inputs], n * wide)
        seen.add((bits, groups > 1, inputs % 32 == 0))
    assert len(seen) >= 6


def test_four_bits_come_back():
    for inputs in (64, 128, 640):
        n = torch.randint(-8, 8, (5, inputs), generator=torch.Generator().manual_seed(inputs))
        assert torch.equal(unpack4(pack4(n)).long(), n) and pack4(n).shape == (5, inputs // 2)


def test_steps_that_do_not_fit_are_refused():
    n = torch.zeros(4, 70)
    for shape in ((4, 2), (3, 1), (4, 4), (70, 1)):
        with pytest.raises(UserError, match="one for each 32 weights"): PackedLinear(n, torch.ones(shape), 8)


# --- rounding


def test_rounding_is_to_the_nearest_point():
    gen = torch.Generator().manual_seed(0)
    for bits in (2, 3, 4, 8):
        for inputs, group in ((64, 32), (45, 32), (45, None), (7, 16)):
            W = torch.randn(9, inputs, generator=gen)
            n, s = round_groups(W, bits, group)
            wide, top = s.repeat_interleave(group or inputs, 1)[:, :inputs], 2 ** (bits - 1) - 1
            assert n.abs().max() <= top and torch.equal(s, s.half().float())
            grid = torch.arange(-top, top + 1)
            best = (W[..., None] - wide[..., None] * grid).abs().min(-1).values
            assert torch.allclose((W - n * wide).abs(), best, atol=1e-6)
            searched, step = round_groups(W, bits, group, search=True)
            lost = (W - searched * step.repeat_interleave(group or inputs, 1)[:, :inputs]).square().sum()
            assert lost <= (W - n * wide).square().sum() + 1e-6


def test_zeros_and_extremes_are_rounded():
    W = torch.tensor([[0.0] * 32, [1e-30] * 32, [1e6] + [0.0] * 31, [-1.0] + [1.0] * 31])
    n, s = round_groups(W, 8, 32)
    assert n.isfinite().all() and s.isfinite().all() and (n[0] == 0).all() and n[3, 0] == -127
    with pytest.raises(UserError, match="not finite"): round_groups(torch.tensor([[1.0, float("nan")]]), 8)


def test_feedback_gives_less_error_of_the_output():
    gen = torch.Generator().manual_seed(1)
    for inputs, bits in ((40, 4), (64, 3), (96, 2)):
        W, X = torch.randn(8, inputs, generator=gen), torch.randn(300, inputs, generator=gen) @ torch.randn(inputs, inputs, generator=gen)
        def lost(n, s): return (X @ (W - n * s.repeat_interleave(32, 1)[:, :inputs]).T).square().mean()
        assert lost(*round_with_feedback(W, X.T @ X, bits, 32)) < 0.9 * lost(*round_groups(W, bits, 32, True))
    n, s = round_with_feedback(W, torch.zeros(96, 96), 4, 32)        # an input that is never read
    assert n.isfinite().all()


# --- models


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("rounding", ["int8", "int4", "bfloat16"])
def test_a_model_equals_its_dequantized_twin(kind, rounding):
    twin, q = dequantized(small(kind), rounding)
    ids = text(20, 2)
    with torch.no_grad(): torch.testing.assert_close(q(ids), twin(ids), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(by_steps(q, ids[:1]), twin(ids[:1]).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["own", "odd", *(pytest.param(k, marks=pytest.mark.slow) for k in ("gpt1", "neox", "qwen2", "dynamic"))])
def test_compiled_steps_equal_the_plain_way(kind):
    ids, net = text(30), tl.quantize(small(kind), "int4" if kind in ("own", "odd") else "int8", fast=True)
    with torch.no_grad(): want = net(ids)
    torch.testing.assert_close(by_steps(net, ids), want, atol=1e-3, rtol=1e-3)
    assert net.fast and net.parts, "it was compiled"


def test_what_the_compiled_step_does_not_do_goes_the_plain_way():
    net = tl.quantize(small("window"), "int8", fast=True)
    net.step = lambda *args: pytest.fail("not for these")
    ids = text(20)
    sliding = net.cache(1, 20, slide=True)
    assert type(sliding) is SlidingCache
    with torch.no_grad():
        for t in range(20): out = net(ids[:, t:t + 1], cache=sliding)
        torch.testing.assert_close(out, net(ids)[:, -1:], atol=1e-4, rtol=1e-4)
        net(ids[:, :1])
        net(text(4, 3), cache=net.cache(3, 8))
        net(ids[:, :1], cache=net.cache(1, 8))
        net(ids[:, :2], cache=net.cache(1, 8, pad=torch.tensor([1])))


def test_steps_refuse_what_the_model_refuses():
    net = tl.quantize(small(), "int8", fast=True)
    cache = net.cache(1, 48)
    with torch.no_grad():
        net(text(5), cache=cache)
        with pytest.raises(UserError, match="must lie in 0"): net(torch.tensor([[270]]), cache=cache)
        cache.length = 48
        with pytest.raises(UserError, match="do not fit"): net(torch.tensor([[1]]), cache=cache)


def test_no_compiler_means_a_line_and_the_plain_way(monkeypatch, capsys):
    ids, net = text(6), tl.quantize(small(), "int8", fast=True)
    monkeypatch.setattr(module, "compile_part", lambda *a: (_ for _ in ()).throw(RuntimeError("no compiler")))
    out = by_steps(net, ids)
    assert net.fast is False and "not compiled here" in capsys.readouterr().err
    with torch.no_grad(): torch.testing.assert_close(out, net(ids), atol=1e-4, rtol=1e-4)


def test_compiling_is_decided_by_size_and_compiler(monkeypatch):
    def decided(large, compiler):
        monkeypatch.setattr(module, "LARGE", 1 if large else 10 ** 9)
        monkeypatch.setattr(module.shutil, "which", lambda name: compiler)
        net = tl.quantize(small(), "int8")
        monkeypatch.setattr(PackedTransformer, "compile_step", lambda self: dict(threads=torch.get_num_threads()))
        return bool(net.compiled())
    assert decided(True, "/usr/bin/g++") and not decided(False, "/usr/bin/g++") and not decided(True, None)


def test_the_model_is_left_as_it_was():
    model, ids = small(), text(9)
    before, state = model(ids), {n: t.clone() for n, t in model.state_dict().items()}
    for kind in KINDS: tl.quantize(model, kind)
    tl.quantize(model, "int4", text(40, 2))
    assert torch.equal(model(ids), before) and all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert type(model) is tl.Transformer and all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_memory_shrinks():
    model = small("own", d_model=256, n_heads=4)
    size = {kind: tl.kept_bytes(tl.quantize(model, kind)) / tl.kept_bytes(model) for kind in KINDS}
    assert size["bfloat16"] < 0.52 and size["int8"] < 0.28 and size["int4"] < 0.2 and size["float32"] == 1
    assert tl.quantize(model, "int8").embed.table is not None
    shared = tl.quantize(model, "int8")
    assert shared.embed.table is shared.head        # tied


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_model_is_taken_as_any_other(kind, tok):
    model = small()
    twin, q = dequantized(model, kind)
    same = dict(max_tokens=12, temperature=0)
    assert tl.generate(q, tok, "Once", **same) == tl.generate(twin, tok, "Once", **same)
    prompts = ["Once", "A dog and", "The"]
    assert tl.generate_batch(q, tok, prompts, **same) == tl.generate_batch(twin, tok, prompts, **same)
    docs = tl.stories(400, split="val")
    docs = [d for d in docs if len(tok.encode(d)) < 46][:3] or ["The dog ran.", "A cat sat."]
    for f in (lambda m: tl.evaluate_loss(m, tok, docs, ctx=48)["nats_per_token"], lambda m: benchmark(m, tok, ["A dog ran home. " * 9])["text"]["nats_per_token"]):
        assert abs(f(q) - f(twin)) < 1e-4
    assert beam_search(q, tok, "Once", max_tokens=5)[0].ids == beam_search(twin, tok, "Once", max_tokens=5)[0].ids


@pytest.mark.parametrize("does", ["save", "train", "adapt", "to_hf", "optimizer", "again", "adapters"])
def test_what_needs_float32_is_refused_in_a_line(does, tok, tmp_path):
    q, plain = tl.quantize(small(), "int8"), small()
    if does == "adapters": tl.add_adapter(plain, 2)
    acts = dict(save=lambda: tl.save(q, tok, tmp_path / "m"), train=lambda: tl.train(q, tok, tl.stories(3), steps=1, quiet=True, compile=False),
                adapt=lambda: tl.add_adapter(q, 2), to_hf=lambda: tl.to_hf(q), optimizer=lambda: tl.make_optimizer(q, "adamw", 1e-3, 0.0),
                again=lambda: tl.quantize(q, "int4"), adapters=lambda: tl.quantize(plain, "int8"))
    with pytest.raises(UserError) as e: acts[does]()
    said = str(e.value)
    assert "\n" not in said and any(w in said for w in ("made from", "quantize that", "merge_adapter")), said
    assert not [p for p in tmp_path.iterdir()]


def test_wrong_words_are_refused():
    for wrong, says in ((dict(kind="int7"), "Did you mean 'int8'"), (dict(kind=8), "are known"), (dict(kind="int8", head=5), "head is 5"),
                        (dict(kind="bfloat16", ids=text(5)), "not fed back")):
        with pytest.raises(UserError, match=says): tl.quantize(small(), **wrong)


# --- GGUF


def write_as(monkeypatch, model, file, kind, arch):
    "A GGUF file in blocks of a kind, by the library's own rounding."
    import gguf
    from test_weights import cousin
    add, q = gguf.GGUFWriter.add_tensor, gguf.GGMLQuantizationType[kind]
    def rounded(self, name, W):
        return add(self, name, gguf.quantize(W, q), raw_dtype=q) if W.ndim > 1 and kind != "F32" else add(self, name, W)
    with monkeypatch.context() as m:
        m.setattr(gguf.GGUFWriter, "add_tensor", rounded)
        return cousin(model, arch, file)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("shape", ["llama", "qwen2"])
def test_gguf_blocks_are_kept(kind, shape, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    file = write_as(monkeypatch, small(shape, vocab_size=258), tmp_path / "m.gguf", kind, shape)
    kept, tok = tl.load(file, "cpu")
    plain = tl.from_gguf(file)[0]
    assert type(kept) is PackedTransformer and type(plain) is tl.Transformer
    with torch.no_grad(): torch.testing.assert_close(kept(text(20, 2, 258)), plain(text(20, 2, 258)), atol=1e-5, rtol=1e-5)
    for name, m in kept.named_modules():
        if isinstance(m, PackedLinear) and name != "embed.table": assert torch.equal(m.numbers()[:, :m.in_features], plain.get_submodule(name).weight), name
    assert tl.kept_bytes(kept) < 0.4 * tl.kept_bytes(plain)
    with pytest.raises(UserError, match="from_gguf"): tl.make_optimizer(kept, "adamw", 1e-3, 0.0)


def test_other_blocks_become_float32(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    for kind in ("F32", "F16", "Q4_1"):
        file = write_as(monkeypatch, small("llama", vocab_size=258), tmp_path / f"{kind}.gguf", kind, "llama")
        assert type(tl.load(file, "cpu")[0]) is tl.Transformer


# --- commands


def test_commands_quantize(monkeypatch, tok, tmp_path):
    from tiny_llm.deployment.cli import try_line
    tl.save(small(), tok, tmp_path / "m")
    seen = []
    from tiny_llm.deployment import quantize as home
    real = home.quantize
    monkeypatch.setattr(home, "quantize", lambda model, kind: seen.append(kind) or real(model, kind))
    for line in ("generate --prompt Once --max_tokens 4 --quantize int8", "eval --data none --tasks blimp --quantize int4", "generate --prompt Once --max_tokens 4"):
        try_line(f"{line} --model {tmp_path / 'm'} --device cpu", show=False)
    assert seen == ["int8", "int4"]
    code, _, err = try_line(f"generate --model {tmp_path / 'm'} --quantize int7", show=False)
    assert code == 2 and "Did you mean 'int8'" in err
