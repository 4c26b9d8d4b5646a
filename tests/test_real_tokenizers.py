"Real tokenizers of others, where `TINY_LLM_DATA` names the folder text/ beside the folder tokenizers/; skipped elsewhere."
import json, os, re
from collections import Counter, defaultdict
from pathlib import Path
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from tiny_llm.tokenizer import Tokenizer

HOME = Path(os.environ.get("TINY_LLM_DATA") or os.devnull).parent/"tokenizers"
pytestmark = pytest.mark.skipif(not HOME.is_dir(), reason="needs the folder tokenizers/ beside TINY_LLM_DATA")
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
VISIBLE = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
VISIBLE |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in VISIBLE)}


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


def test_golden_merges():
    "Byte pair encoding with the other tie rule (the greater pair of byte strings) learns the published merges."
    regex = pytest.importorskip("regex")
    text, golden = read(HOME/"bpe_golden"/"corpus.en"), pairs(HOME/"bpe_golden"/"train-bpe-reference-merges.txt")
    chunks = Counter(c for part in re.split(re.escape("<|endoftext|>"), text) for c in regex.findall(GPT2, part))
    words, counts, where = [[[bytes([b]) for b in c.encode()], k] for c, k in chunks.items()], Counter(), defaultdict(set)
    def tally(w, sign):
        for pair in zip(words[w][0], words[w][0][1:]): counts[pair] += sign * words[w][1]; where[pair].add(w)
    for w in range(len(words)): tally(w, 1)
    for want in golden:
        a, b = pair = max(counts, key=lambda p: (counts[p], p))
        assert ["".join(VISIBLE[x] for x in t) for t in pair] == want
        for w in where.pop(pair):
            tally(w, -1)
            old, new = words[w][0][::-1], []
            while old:
                new.append(old.pop())
                if old and (new[-1], old[-1]) == pair: new[-1] += old.pop()
            words[w][0] = new
            tally(w, 1)
