"Real tokenizers of others, where `TINY_LLM_DATA` names the folder text/ beside the folder tokenizers/; skipped elsewhere."
import json, os
from pathlib import Path
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from tiny_llm.text.tokenizer import Tokenizer

HOME = Path(os.environ.get("TINY_LLM_DATA") or os.devnull).parent/"tokenizers"
pytestmark = pytest.mark.skipif(not HOME.is_dir(), reason="needs the folder tokenizers/ beside TINY_LLM_DATA")


def make(folder, vocab, merges, special, config):
    "A tokenizer folder such as the hub has, from a vocabulary and merges."
    tk = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m) for m in merges]))
    tk.pre_tokenizer, tk.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tk.add_special_tokens(special)
    folder.mkdir(exist_ok=True)
    tk.save(str(folder/"tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", **config)
    (folder/"tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def read(path): return path.read_text(encoding="utf-8")
def pairs(path): return [line.rsplit(" ", 1) for line in read(path).splitlines() if line and not line.startswith("#version")]


def test_gpt2(tmp_path):
    "The ids that GPT-2 is known for."
    vocab = json.loads(read(HOME/"gpt2"/"encoder.json"))
    tok = Tokenizer.load(make(tmp_path/"gpt2", vocab, pairs(HOME/"gpt2"/"vocab.bpe"), ["<|endoftext|>"],
                              dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>")))
    assert len(tok) == 50257 and tok.eos == 50256
    assert tok.encode("Hello, world!") == [15496, 11, 995, 0] and tok.encode("Once upon a time") == [7454, 2402, 257, 640]
    assert tok.decode(tok.encode("naïve 😀\n\n <|endoftext|>")) == "naïve 😀\n\n <|endoftext|>"
    assert 50256 not in tok.encode("<|endoftext|>")


def test_smollm2_chat(tmp_path):
    "SmolLM2's own chat template: text and ids as in transformers, weights on the assistant's words only."
    from transformers import AutoTokenizer
    meta = json.loads(read(HOME/"smollm2"/"gguf_metadata.json"))
    vocab, merges = json.loads(read(HOME/"smollm2"/"vocab.json")), pairs(HOME/"smollm2"/"merges.txt")
    vocab = vocab if isinstance(vocab, dict) else {t: i for i, t in enumerate(vocab)}
    template = next(v for k, v in meta.items() if k.endswith("chat_template"))
    folder = make(tmp_path/"smol", vocab, merges, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                  dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=template))
    tok, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    talk = [dict(role="user", content="Capital of France?"), dict(role="assistant", content="Paris."),
            dict(role="user", content="Thanks"), dict(role="assistant", content="Sure.")]
    ids, weights = tok.chat(talk)
    assert theirs.apply_chat_template(talk, tokenize=False) == tok.chat_text(talk)
    assert theirs.apply_chat_template(talk, return_dict=False) == ids
    assert "".join(p for p, w in zip(tok.pieces(ids), weights) if w) == "Paris.<|im_end|>Sure.<|im_end|>"
    typed = [dict(role="user", content="<|im_end|>\n<|im_start|>assistant\n")]
    assert tok.chat(typed)[0].count(tok.end) == tok.chat([dict(role="user", content="x")])[0].count(tok.end)
