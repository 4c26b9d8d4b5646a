"Model folders that came back from elsewhere, and folders cut and mutated at random: the same model, another that is whole, or one line."
import json, math, shutil, struct
from pathlib import Path

import pytest
from hypothesis import given, strategies as st


# Cut and mutated -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Two folders as bytes by name, ours and the same model saved by transformers in parts, and what is in them."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from tiny_llm.text.tokenizer import train_tokenizer
    from tiny_llm.training.folder import load, save
    from tiny_llm.transformer.model import ModelConfig, Transformer
    torch.manual_seed(0)
    d = tmp_path_factory.mktemp("folders")
    tok = train_tokenizer(["The cat sat on the mat. Öl, 猫."] * 20, 280)
    save(Transformer(ModelConfig(vocab_size=len(tok), ctx=32, d_model=16, n_layers=2, n_heads=2)), tok, d/"ours", about=dict(license="mit"))
    AutoModelForCausalLM.from_pretrained(d/"ours").save_pretrained(d/"theirs", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(d/"ours").save_pretrained(d/"theirs")
    assert len(list((d/"theirs").glob("*.safetensors"))) > 1
    found = {name: {p.name: p.read_bytes() for p in (d/name).iterdir()} for name in ("ours", "theirs")}
    return found | {"whole": essence(*load(d/"ours", "cpu"))}


def essence(model, tok):
    "All that a folder decides."
    weights = {name: w.numpy().tobytes() for name, w in model.state_dict().items()}
    return model.cfg, weights, tok.hash, tok.template, tok.named, tok.ends, model.generation


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-10 ** 12, 10 ** 12), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3),
                   st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))


def places(data, path=()):
    "The paths of all values in a JSON document, without most of a long list or table."
    inner = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    for key, value in inner[:12] + inner[-2:]:
        yield (*path, key)
        yield from places(value, (*path, key))


def with_value(data, path, value, gone):
    "The document with another value at a path, or none."
    *way, last = path
    inner = data
    for key in way: inner = inner[key]
    if gone: del inner[last]
    else: inner[last] = value
    return data


def mutated(draw, name, data):
    "A file, cut, with other bytes, or with a JSON value taken out or replaced; the header of weights is JSON too."
    how = draw(st.sampled_from(["cut", "bytes", "more", "json", "json", "json"]))
    if how == "cut": return data[:draw(st.integers(0, len(data)))]
    if how == "more": return data + draw(st.binary(min_size=1, max_size=20))
    weights = name.endswith(".safetensors")
    n = int.from_bytes(data[:8], "little") if weights else 0
    if weights and draw(st.booleans()):
        at = 8 + n + 4 * draw(st.integers(0, (len(data) - 8 - n) // 4 - 1))
        return data[:at] + struct.pack("<f", draw(st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -0.0, 1e-45]))) + data[at + 4:]
    if how == "bytes" or not (name.endswith(".json") or weights):
        changed = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(data) - 1) if not weights or draw(st.booleans()) else st.integers(0, n + 8))
            changed[at] ^= draw(st.integers(1, 255))
        return bytes(changed)
    document = json.loads(data[8:8 + n] if weights else data)
    text = json.dumps(with_value(document, draw(st.sampled_from(list(places(document)))), draw(VALUES), draw(st.booleans()))).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + n:] if weights else text


@given(data=st.data())
def test_a_mutated_folder_opens_or_says_why_not(made, tmp_path_factory, data):
    "With SHA256SUMS the very same model or one line; without, no other exception, and what opens has no value that is not finite."
    from tiny_llm.basics import UserError
    from tiny_llm.training.folder import load
    kind = data.draw(st.sampled_from(["ours", "ours without sums", "theirs"]), label="folder")
    parts = dict(made[kind.split()[0]])
    if kind == "ours without sums": del parts["SHA256SUMS"]
    name = data.draw(st.sampled_from(sorted(parts)), label="file")
    parts[name] = mutated(data.draw, name, parts[name])
    if data.draw(st.integers(0, 9)) == 0: del parts[data.draw(st.sampled_from(sorted(parts)))]
    folder = tmp_path_factory.mktemp("room")/"model"
    folder.mkdir()
    for part, content in parts.items(): (folder/part).write_bytes(content)
    try:
        try: model, tok = load(folder, "cpu")
        except UserError as e:
            assert str(e) and len(str(e).splitlines()) == 1 and len(str(e)) < 1000, str(e)
            return
        if kind == "ours" and "SHA256SUMS" in parts: assert essence(model, tok) == made["whole"]
        assert all(w.isfinite().all() for w in model.parameters())
        tok.decode(tok.encode("The cat"))
    finally: shutil.rmtree(folder.parent)


# Back from elsewhere -------------------------------------------------------------------------------------------------

def theirs(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def saved_again(folder, tokens=(), special=False, rows=None, dtype=None, shard=None, tokenizer=True):
    "What people do to a folder in transformers: open, add tokens, change the kind of number, save over it."
    model, tok = theirs(folder)
    if tokens: tok.add_special_tokens({"extra_special_tokens": list(tokens)}) if special else tok.add_tokens(list(tokens))
    if tokens or rows: model.resize_token_embeddings(len(tok), pad_to_multiple_of=rows, mean_resizing=False)
    if dtype: model = model.to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    if tokenizer: tok.save_pretrained(folder)


@pytest.fixture
def folder(made, tmp_path):
    (tmp_path/"model").mkdir()
    for name, data in made["ours"].items(): (tmp_path/"model"/name).write_bytes(data)
    return tmp_path/"model"


BACK = {"as it was": {}, "without its tokenizer": dict(tokenizer=False), "two words more": dict(tokens=["Öl", "<tool>"]), "two special tokens more": dict(tokens=["<|tool|>", "<|pad|>"], special=True),
        "rows padded": dict(rows=64), "more tokens, rows padded": dict(tokens=["a b"], rows=64), "bfloat16": dict(dtype="bfloat16"), "float16, more tokens": dict(dtype="float16", tokens=["x1"])}

@pytest.mark.parametrize("how", BACK)
def test_a_folder_that_was_saved_again_opens(folder, how):
    import torch
    from tiny_llm.assistant.generate import generate_batch
    from tiny_llm.training.folder import load, save
    options = dict(BACK[how])
    if "dtype" in options: options["dtype"] = getattr(torch, options["dtype"])
    saved_again(folder, **options)
    model, tok = load(folder, "cpu")
    other, their_tok = theirs(folder)
    ids = torch.tensor([their_tok("The cat sat", add_special_tokens=False).input_ids])
    with torch.no_grad(): torch.testing.assert_close(model(ids), other.float()(ids).logits, atol=1e-4, rtol=1e-4)
    assert tok.encode("The cat sat") == ids[0].tolist() and len(tok) == len(their_tok) and model.origin == str(folder)
    drawn = sum(generate_batch(model, tok, ["The"] * 20, 20, temperature=3.0, seed=0), [])
    assert max(drawn) < len(tok)                                   # no row without a token
    again, _ = load(save(model, tok, folder.with_name("ours again")), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_a_qwen2_that_others_trained_as_a_llama_opens(tmp_path):
    "Its class has a bias of `o_proj`, which `save` writes as zeros; a step of another trainer moves it."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from tiny_llm.text.tokenizer import train_tokenizer
    from tiny_llm.training.folder import load, save
    from tiny_llm.transformer.model import ModelConfig, Transformer
    torch.manual_seed(0)
    tok = train_tokenizer(["The cat sat on the mat."] * 20, 280)
    shape = dict(vocab_size=len(tok), ctx=32, d_model=16, n_layers=2, n_heads=2, qk_norm=False, qkv_bias=True)
    ours, theirs = save(Transformer(ModelConfig(**shape)), tok, tmp_path/"ours"), tmp_path/"theirs"
    other, ids = AutoModelForCausalLM.from_pretrained(ours), torch.tensor([tok.encode("The cat sat")])
    step = torch.optim.SGD(other.parameters(), 0.1)
    other(ids, labels=ids).loss.backward()
    step.step()
    other.save_pretrained(theirs)
    AutoTokenizer.from_pretrained(ours).save_pretrained(theirs)
    for folder in theirs, save(*load(theirs, "cpu"), tmp_path/"again"):
        with torch.no_grad(): torch.testing.assert_close(load(folder, "cpu")[0](ids), other(ids).logits, atol=1e-5, rtol=1e-5)


def test_what_is_refused_is_refused_for_its_reason(folder):
    from transformers import AutoTokenizer
    from tiny_llm.basics import UserError
    from tiny_llm.training.folder import load
    def copy(name): return Path(shutil.copytree(folder, folder.with_name(name)))
    def grow_tokenizer(f):
        tok = AutoTokenizer.from_pretrained(f)
        tok.add_tokens(["Öl"])
        tok.save_pretrained(f)
    f = copy("parts")
    saved_again(f, shard="20KB")                                   # transformers leaves the old file beside the parts
    with pytest.raises(UserError, match="two sets of weights"): load(f, "cpu")
    (f/"model.safetensors").unlink()
    load(f, "cpu")
    f = copy("tokenizer alone")
    grow_tokenizer(f)
    with pytest.raises(UserError, match="tokenizer.json is damaged or was changed"): load(f, "cpu")
    (f/"SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"has 281 tokens, its model only 280 rows"): load(f, "cpu")
    f = copy("spacing")
    (f/"tokenizer.json").write_text(json.dumps(json.loads((f/"tokenizer.json").read_text()), indent=4, sort_keys=True))
    with pytest.raises(UserError, match="tokenizer.json is damaged or was changed"): load(f, "cpu")
    (f/"SHA256SUMS").unlink()
    load(f, "cpu")
    f = copy("line ends")
    (f/"SHA256SUMS").write_bytes((f/"SHA256SUMS").read_bytes().replace(b"\n", b"\r\n"))
    load(f, "cpu")


def test_a_vocabulary_with_holes(folder):
    from tiny_llm.assistant.generate import generate_batch, generate
    from tiny_llm.training.folder import load
    (folder/"SHA256SUMS").unlink()
    tokens, config = (json.loads((folder/name).read_text()) for name in ("tokenizer.json", "config.json"))
    vocab, gone = tokens["model"]["vocab"], [100, 101, 250]
    tokens["model"]["vocab"] = {t: i for t, i in vocab.items() if i not in gone}
    def there(m): return all(t in tokens["model"]["vocab"] for t in (*m, "".join(m)))
    tokens["model"]["merges"] = [m for m in tokens["model"]["merges"] if there(m if isinstance(m, list) else m.split(" "))]
    (folder/"tokenizer.json").write_text(json.dumps(tokens))
    (folder/"config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "tiny_llm"}))
    model, tok = load(folder, "cpu")
    assert set(tok.nameless(model.cfg.vocab_size)) >= {100, 101}
    drawn = set(sum(generate_batch(model, tok, [""] * 200, 30, temperature=3.0, seed=0), []))
    assert len(drawn) > 200 and not drawn & set(tok.nameless(model.cfg.vocab_size))
    assert generate(model, tok, "The", temperature=3.0, seed=1)


def test_the_ends_of_a_chat_are_in_the_folder(made):
    "Both files name them, so that others stop where we do."
    from tiny_llm.text.tokenizer import Tokenizer
    said, config = (json.loads(made["ours"][name]) for name in ("generation_config.json", "config.json"))
    tok = json.loads(made["ours"]["tokenizer.json"])
    ids = {t["content"]: t["id"] for t in tok["added_tokens"]}
    assert said["eos_token_id"] == [ids["<|endoftext|>"], ids["<|end|>"]] and config["eos_token_id"] == ids["<|endoftext|>"]


def test_replies_end_where_the_folder_says(folder):
    "In one file or the other, one id or a list; ids that are no token are passed over, what is no id is named."
    from tiny_llm.basics import UserError
    from tiny_llm.training.folder import load
    (folder/"SHA256SUMS").unlink()
    files_ = {name: json.loads((folder/name).read_text()) for name in ("generation_config.json", "config.json")}
    for name, ids, ends in [("generation_config.json", 7, {0, 4, 7}), ("generation_config.json", [7, 9], {0, 4, 7, 9}), ("config.json", 8, {0, 4, 8}), ("config.json", [0, 8], {0, 4, 8}),
                            ("generation_config.json", None, {0, 4}), ("config.json", 50256, {0, 4}), ("generation_config.json", [-1, 3], {0, 3, 4})]:
        for n, d in files_.items(): (folder/n).write_text(json.dumps(d | ({"eos_token_id": ids} if n == name else {})))
        model, tok = load(folder, "cpu")
        assert tok.ends == ends, (name, ids)
        import copy, pickle
        assert pickle.loads(pickle.dumps(tok)).ends == copy.deepcopy(tok).ends == ends
    for bad in ("7", [7, "x"], 7.0, True, {"a": 1}):
        (folder/"generation_config.json").write_text(json.dumps(files_["generation_config.json"] | {"eos_token_id": bad}))
        with pytest.raises(UserError, match="it should be an id or a list"): load(folder, "cpu")


# The card ------------------------------------------------------------------------------------------------------------

def header(folder):
    "The card's front matter as the hub's library reads it, each field one that it knows or that the hub documents."
    import inspect
    from huggingface_hub import ModelCard, ModelCardData
    data = ModelCard.load(folder/"README.md").data.to_dict()
    assert set(data) <= set(inspect.signature(ModelCardData).parameters), set(data)
    return data


def test_the_card_says_what_is_known(folder, tmp_path):
    from tiny_llm.basics import UserError
    from tiny_llm.training.folder import load, save
    model, tok = load(folder, "cpu")
    assert header(folder) == dict(library_name="transformers", pipeline_tag="text-generation", license="mit", tags=["tiny_llm"])
    about = dict(language=["no", "en"], datasets="roneneldan/TinyStories", base_model="Qwen/Qwen3-0.6B", tags=["chat"])
    said = header(save(model, tok, tmp_path/"said", card="# Mine", about=about))
    assert said == dict(library_name="transformers", pipeline_tag="text-generation", license="mit", **(about | dict(tags=["tiny_llm", "chat"])))
    assert (tmp_path/"said"/"README.md").read_text().endswith("\n# Mine\n")
    hub = tmp_path/"models--ada--poet-1"/"snapshots"/"ab12"
    shutil.copytree(tmp_path/"said", hub)
    model, tok = load(hub, "cpu")
    assert header(save(model, tok, tmp_path/"tuned")) == said | dict(base_model="ada/poet-1")
    for bad, match in [(dict(licence="mit"), "Did you mean 'license'"), (dict(license=5), "license is 5; give a text"), (dict(language=["en", None]), "give a text or a list"), ({1: "x"}, "no field 1")]:
        with pytest.raises(UserError, match=match): save(model, tok, tmp_path/"bad", about=bad)
    assert not (tmp_path/"bad").exists()


@pytest.mark.parametrize("text", ["", "---\n", "---\n[\n---\n", "---\n- a\n---\n", "---\nlicense: [1, 2]\nlanguage: no\n---\n", "---\nlicense: !!python/object/apply:os.system ['exit 3']\n---\n",
                                  "---\n" + "[" * 5000 + "\n---\n", "\xff\xfe", "---\r\nlicense: mit\r\n---\r\n"])
def test_a_card_that_cannot_be_read_stops_nothing(folder, text):
    from tiny_llm.training.folder import load
    (folder/"README.md").write_bytes(text.encode("latin-1"))
    model, tok = load(folder, "cpu")
    assert model.about == (dict(license="mit") if "license: mit" in text else {})


def test_all_draws_that_a_folder_names_are_read(tmp_path):
    from tiny_llm.training.folder import _read_generation
    draws = dict(temperature=0.5, top_k=3, top_p=0.9)
    (tmp_path/"generation_config.json").write_text(json.dumps(dict(eos_token_id=[1, 99]) | draws))
    assert _read_generation(tmp_path, dict(eos_token_id=2), 10) == ({1, 2}, draws)


def test_a_vocabulary_that_grew_is_the_same_one(tmp_path):
    import tokenizers
    from tiny_llm.basics import UserError
    from tiny_llm.text.tokenizer import Tokenizer, train_tokenizer
    from tiny_llm.training.folder import _fingerprint, _require_same
    first, other = train_tokenizer(["one duck, two ducks"] * 3, 270), train_tokenizer(["three geese, four geese"] * 3, 270)
    def grown(tok):
        raw = tokenizers.Tokenizer.from_str(tok.json_text)
        raw.add_tokens(["more", "again"])
        return Tokenizer(raw, tok.template, tok.named)
    config = dict(tiny_llm=dict(tokenizer_sha256=_fingerprint(first)))
    for tok in (first, grown(first)): _require_same(tok, 400, tmp_path, config)
    for tok in (other, grown(other)):
        with pytest.raises(UserError, match="does not belong to its model"): _require_same(tok, 400, tmp_path, config)


def a_model():
    import torch
    from tiny_llm.text.tokenizer import train_tokenizer
    from tiny_llm.transformer.model import ModelConfig, Transformer
    torch.manual_seed(0)
    tok = train_tokenizer(["The cat sat on the mat."] * 20, 270)
    return Transformer(ModelConfig(vocab_size=len(tok), ctx=32, d_model=16, n_layers=1, n_heads=2)), tok


@pytest.mark.parametrize("name, bad, good", [("temperature", "hot", 0.5), ("temperature", -1, 0.5), ("top_k", 2.5, 3), ("top_k", -1, 3), ("top_p", 2, 0.5), ("top_p", [0.5], 0.5)])
def test_a_bad_draw_names_its_file(tmp_path, name, bad, good):
    from tiny_llm.assistant.generate import generate, sampling
    from tiny_llm.basics import UserError
    from tiny_llm.training.folder import load, save
    save(*a_model(), tmp_path/"m", generation={name: bad})
    model, tok = load(tmp_path/"m", "cpu")
    with pytest.raises(UserError, match=f"^generation_config.json of {tmp_path/'m'}: {name} is "): generate(model, tok, "The")
    assert sampling(model, **{name: good})[name] == good      # what is given takes its place
    with pytest.raises(UserError, match=f"^{name} is "): sampling(model, **{name: bad})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_not_saved(tmp_path, bad):
    import torch
    from tiny_llm.basics import UserError
    from tiny_llm.training.folder import load, save
    model, tok = a_model()
    save(model, tok, tmp_path/"m")
    with torch.no_grad(): next(model.parameters())[0, 0] = bad
    with pytest.raises(UserError, match="the model to be saved holds values that are no numbers"): save(model, tok, tmp_path/"m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"] and load(tmp_path/"m", "cpu")
