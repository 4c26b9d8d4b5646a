"Model folders that came back from elsewhere, and folders cut and mutated at random: the same model, another that is whole, or one line."
import json, math, random, shutil
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from house import files


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
