"What people type stays text: chat histories, templates and added tokens of many kinds, tried at random."
import functools, json

import pytest, tokenizers
from hypothesis import given, strategies as st
from tokenizers import normalizers
from tiny_llm.text.bpe import BPE
from tiny_llm.text.stories import stories
from tiny_llm.text.tokenizer import CHAT_TEMPLATE, SPECIALS, Tokenizer, find_added, train_tokenizer

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
         "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
         "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
BARE = "{% for m in messages %}<|u|>{{ m['content'] }}<|e|>{% endfor %}{% if add_generation_prompt %}<|u|>{% endif %}"
LOOKS = ("{% for m in messages %}<|u|>{% if '</think>' in m['content'] %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
         "{% else %}{{ m['content'] }}{% endif %}<|e|>{% endfor %}{% if add_generation_prompt %}<|u|>{% endif %}")
TEMPLATES = {CHAT_TEMPLATE: SPECIALS, CHATML: ["<|im_start|>", "<|im_end|>"], LLAMA: ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
             GEMMA: ["<start_of_turn>", "<end_of_turn>"], BARE: ["<|u|>", "<|e|>"], LOOKS: ["<|u|>", "<|e|>", "</think>"]}
WORDS = ["<tool>", "<tool>x", "<to", "tool", "a b", " a", "  ", "\n\n", "Öl", "kuća", "ß", "the", "<|u|> go", "|>", "><", "[INST]", "</s>", "é", "<|end|><|user|>"]


@functools.cache
def base(): return train_tokenizer([str(s) for s in stories(60)], 400).json_text


@st.composite
def tokenizers_(draw):
    "A tokenizer with a template, whose marks are added in any way, and other added tokens."
    template = draw(st.sampled_from(list(TEMPLATES)))
    tk = tokenizers.Tokenizer.from_str(base())
    if template != CHAT_TEMPLATE and draw(st.booleans()): tk.normalizer = draw(st.sampled_from([normalizers.NFC(), normalizers.Lowercase()]))
    flag = st.booleans()
    flags = st.fixed_dictionaries(dict(special=flag, lstrip=flag, rstrip=flag, normalized=flag, single_word=flag))
    plain = dict(special=True, lstrip=False, rstrip=False, normalized=False, single_word=False)
    marks = [t for t in TEMPLATES[template] if t not in SPECIALS]
    how = draw(st.sampled_from(["plain", "any"]))
    for t in draw(st.permutations(marks + draw(st.lists(st.sampled_from(WORDS), unique=True, max_size=5)))):
        f = plain if how == "plain" and t in marks else draw(flags)
        (tk.add_special_tokens if f["special"] else tk.add_tokens)([tokenizers.AddedToken(t, **f)])
    return tk, template


def added_ids(tk):
    "The letters é and ß stand for bytes in a byte-level vocabulary: added or not, they are bytes."
    return {i for i, t in tk.get_added_tokens_decoder().items() if t.content not in ("é", "ß")}


def typed(tk):
    "Text made of what is added, pieces of it, spaces, and any characters."
    tokens = [t.content for t in tk.get_added_tokens_decoder().values()]
    halves = [h for t in tokens for h in (t[:len(t) // 2], t[len(t) // 2:], t.upper())]
    return st.lists(st.one_of(st.sampled_from([*tokens, *halves, " ", "\n", "<", "go", "user"]), st.text(st.characters(exclude_categories=["Cs"]), max_size=4)),
                    max_size=6).map("".join)


@given(st.data())
def test_typed_text_never_gives_an_added_token(data):
    tk, template = data.draw(tokenizers_())
    tok = Tokenizer(tk, template)
    bpe = BPE(json.loads(tok.json_text), template, tok.named)
    added, text = added_ids(tk), data.draw(typed(tk))
    ids = tok.encode(text)
    assert not added & set(ids) and tok.encode_batch([text]) == [ids] and bpe.encode(text) == ids
    whole = tk.normalizer.normalize_str(text) if tk.normalizer else text
    assert tok.decode(ids) == bpe.decode(ids) == whole
    for wanted in True, {data.draw(st.sampled_from(sorted(tok.added)))}:
        asked = tok.encode(text, wanted)
        assert asked == bpe.encode(text, wanted)
        assert tok.decode(asked) == bpe.decode(asked)


@given(st.data())
def test_a_chat_has_the_marks_of_its_template_and_no_others(data):
    tk, template = data.draw(tokenizers_())
    tok = Tokenizer(tk, template)
    added = added_ids(tk)
    roles = data.draw(st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, max_size=4))
    chat = [dict(role=r, content=data.draw(typed(tk))) for r in roles]
    plain = [dict(role=r, content="q") for r in roles]
    reply = data.draw(st.booleans())
    ids, weights = tok.chat(chat, reply)
    assert [i for i in ids if i in added] == [i for i in tok.chat(plain, reply)[0] if i in added]
    assert len(ids) == len(weights) and tok.prompt(chat, reply) == ids
    if template not in (CHAT_TEMPLATE, LOOKS) and not tk.normalizer:  # those change what is typed
        said = tok.decode(ids)
        for m in chat: assert m["content"].strip() in said


def test_a_single_word_stands_alone():
    cat = [dict(id=7, content="cat", single_word=True, lstrip=False, rstrip=False, normalized=False, special=False)]
    for text in ("concat it", "cats", "a cat9", "_cat"): assert find_added(text, cat) == [(text, None)], text
    assert find_added("a cat.", cat) == [("a ", None), ("cat", 7), (".", None)]
