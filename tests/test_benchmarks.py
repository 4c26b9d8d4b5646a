"""Losses of texts, minimal pairs and last words against transformers and against lm-eval; the command that prints them.

What needs lm-eval (`pip install lm-eval`) is skipped without it."""
import importlib.util, json, math, os, random, subprocess, sys
from pathlib import Path

import pytest, torch

from tiny_llm.basics import UserError
from tiny_llm.deployment.cli import try_line
from tiny_llm.text.stories import stories
from tiny_llm.text.tokenizer import train_tokenizer
from tiny_llm.training.benchmarks import (all_rows, benchmark, begin_marks, blimp, counted_losses, document_nats, lambada, last_word, margins, paired, text_loss,
                                          text_units)
from tiny_llm.training.folder import load, save
from tiny_llm.training.train import evaluate_loss
from tiny_llm.transformer.model import Transformer, preset

WORDS = "the a dog cat apron sees takes big small red 12 it's Ünder 日本 by near, end. And".split()


def sentence(r, n): return " ".join(r.choice(WORDS) for _ in range(n))


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    "A folder of a random model that prefers something, its twin with other weights, and tasks in the hub's layouts."
    torch.set_num_threads(1)
    at, r = tmp_path_factory.mktemp("bench"), random.Random(0)
    tok = train_tokenizer(stories(200), vocab_size=400)
    for name, seed in (("model", 0), ("other", 1)):
        torch.manual_seed(seed)
        model = Transformer(preset("tiny", vocab_size=len(tok), ctx=96))
        model.norm.weight.data *= 3            # far from even, so that no two sentences are nearly as likely
        save(model, tok, at/name)
    (at/"blimp").mkdir()
    for paradigm in ("one", "two"):
        rows = [dict(sentence_good=f"{start} {sentence(r, 3)}", sentence_bad=f"{start} {sentence(r, r.randint(1, 4))}", UID=f"par_{paradigm}")
                for start in (sentence(r, r.randint(0, 6)) for _ in range(40))]
        (at/"blimp"/f"{paradigm}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    passages = [dict(context=sentence(r, r.randint(2, 20)), continuation=r.choice(WORDS)) for _ in range(60)]
    (at/"lambada_openai.jsonl").write_text("\n".join(map(json.dumps, passages)), encoding="utf-8")
    (at/"text.txt").write_text("\n\n".join(stories(6, split="val")), encoding="utf-8")
    return at


@pytest.fixture(scope="module")
def ours(room): return load(room/"model", device="cpu")


@pytest.fixture(scope="module")
def theirs(room):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(room/"model").eval(), transformers.AutoTokenizer.from_pretrained(room/"model")


def log_likelihood(theirs, before, after):
    "(log q of the ids `after`, whether each was the likeliest), by transformers, one text at a time."
    with torch.no_grad(): log_q = theirs[0](torch.tensor([before + after])).logits[0].float().log_softmax(-1)
    at = range(len(before) - 1, len(before) + len(after) - 1)
    return sum(log_q[t, i].item() for t, i in zip(at, after)), all(log_q[t].argmax() == i for t, i in zip(at, after))


def test_pairs_are_those_of_transformers(room, ours, theirs):
    found, hits = blimp(*ours, room/"blimp"), []
    for _, row in all_rows(room/"blimp"):
        good, bad = (log_likelihood(theirs, [theirs[1].bos_token_id], theirs[1].encode(" " + row[f"sentence_{k}"], add_special_tokens=False))[0] for k in ("good", "bad"))
        hits.append(int(good > bad))
    assert found["items"] == hits and 0 < sum(hits) < len(hits)
    assert found["paradigms"] == {"par_one": pytest.approx(sum(hits[:40]) / 40), "par_two": pytest.approx(sum(hits[40:]) / 40)}
    assert found["accuracy"] == pytest.approx(sum(found["paradigms"].values()) / 2)


def test_last_words_are_those_of_transformers(room, ours, theirs):
    found, nats, hits = lambada(*ours, room/"lambada_openai.jsonl"), [], []
    for _, row in all_rows(room/"lambada_openai.jsonl"):
        whole, alone = theirs[1].encode(f"{row['context']} {row['continuation']}"), theirs[1].encode(row["context"])
        log_q, hit = log_likelihood(theirs, whole[:len(alone)], whole[len(alone):])
        nats.append(-log_q)
        hits.append(int(hit))
    assert found["items"] == hits
    torch.testing.assert_close(torch.tensor(found["nats"]), torch.tensor(nats), atol=1e-3, rtol=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-3)


def test_every_token_of_the_word_must_be_the_likeliest(ours, monkeypatch):
    from tiny_llm.training import benchmarks
    monkeypatch.setattr(benchmarks, "counted_losses", lambda model, rows, tokens: [(torch.ones(2), torch.tensor([True, False])), (torch.ones(2), torch.tensor([True, True]))])
    found = lambada(*ours, [dict(text="the cat"), dict(text="the dog")])
    assert (found["items"], found["nats"]) == ([0, 1], [2.0, 2.0])


def test_a_long_passage_loses_its_beginning(ours):
    model, tok = ours
    row = dict(text=sentence(random.Random(3), 400))
    ids, n = last_word(tok, row)
    assert len(ids) > model.cfg.ctx + 1
    kept = torch.tensor([ids[-model.cfg.ctx - 1:]])
    with torch.no_grad(): log_q = model(kept[:, :-1])[0].log_softmax(-1)
    want = -sum(log_q[t - 1, kept[0, t]].item() for t in range(kept.shape[1] - n, kept.shape[1]))
    assert lambada(model, tok, [row])["nats"][0] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("ctx, stride", [(96, 96), (40, 40), (40, 13), (7, 1)])
def test_windows_against_one_prediction_at_a_time(ours, ctx, stride):
    model, tok = ours
    docs = [d[:n] for d, n in zip(stories(3, split="val"), (10, 150, 400))]
    for doc, got in zip(docs, document_nats(model, tok, docs, ctx, stride, tokens=100)):
        ids, want = [tok.bos, *tok.encode(doc), tok.eos], []
        for t in range(1, len(ids)):
            # a window that ends with stride s holds the places a multiple of s behind the first ctx
            begin = 0 if t <= ctx else ((t - 1 - ctx) // stride + 1) * stride
            with torch.no_grad(): log_q = model(torch.tensor([ids[begin:t]]))[0, -1].log_softmax(-1)
            want.append(-log_q[ids[t]])
        torch.testing.assert_close(got, torch.stack(want), atol=1e-3, rtol=1e-4)


def test_loss_is_that_of_training(ours):
    docs = stories(40, split="val")
    mine, trained = text_loss(*ours, docs), evaluate_loss(*ours, docs)
    for name in ("nats_per_token", "bits_per_byte", "floor_nats_per_token", "floor_bits_per_byte", "gap"):
        assert mine[name] == pytest.approx(trained[name], rel=1e-4), name
    assert (mine["tokens"], mine["bytes"], mine["units"]["kind"]) == (trained["tokens"], trained["bytes"], "documents")
    low, high = mine["gap_interval"]
    assert low < mine["gap"] < high
    assert text_loss(*ours, docs, batch=1)["nats_per_token"] == pytest.approx(mine["nats_per_token"], rel=1e-5)


def test_parts_hold_whole_characters_and_all_of_the_text(ours):
    model, tok = ours
    docs = ["日本 " * 400, "a", "Ünder the apron. " * 100]
    nats = document_nats(model, tok, docs, 96, 96)
    u = text_units(tok, docs, nats)
    assert sum(u["bytes"]) == sum(len(d.encode()) for d in docs) and sum(u["tokens"]) == sum(map(len, nats))
    assert sum(u["nats"]) == pytest.approx(sum(n.sum().item() for n in nats), rel=1e-5)
    assert min(u["bytes"]) == 1 and max(u["bytes"]) - sorted(u["bytes"])[1] <= 200 and len(u["bytes"]) > 3
    # the cut is by bytes: of the second text's tokens those that end in the first half
    half = text_units(tok, ["Ünder the apron. " * 100], nats[2:], n_parts=2)
    ends, at = [], 0
    for i in tok.encode(docs[2]):
        at += len(tok.decode([i]).encode()) if "�" not in tok.decode([i]) else 1
        ends.append(at)
    assert half["tokens"][0] == sum(end <= half["bytes"][0] for end in ends)


def test_same_beginning_or_none(ours):
    model, tok = ours
    pairs = [([1, 5, 6, 7], [1, 5, 6, 8, 9, 10]), ([1, 5], [1, 6]), ([1, 5, 6], [1, 5, 6]), ([1, 2, 3, 4, 5], [1, 2])]
    rows = [(torch.tensor(row), len(row) - 1) for p in pairs for row in p]
    sums = torch.stack([nats.sum() for nats, _ in counted_losses(model, rows)]).view(-1, 2)
    for tokens in (1, 4096):
        torch.testing.assert_close(margins(model, pairs, tokens), sums[:, 1] - sums[:, 0], atol=1e-4, rtol=1e-4)


def test_a_difference_that_is_none_and_one_that_is():
    gen = torch.Generator().manual_seed(0)
    hard, sizes = 5 * torch.rand(60, generator=gen, dtype=torch.float64), torch.full((60,), 10.0)
    noise = 0.1 * torch.randn(60, generator=gen, dtype=torch.float64)
    none, some = paired(hard + noise - noise.mean(), hard, sizes), paired(hard + 0.1 + noise, hard, sizes)
    assert none["p"] > 0.9 and none["interval"][0] < 0 < none["interval"][1]
    assert some["p"] < 0.001 and some["interval"][0] > 0 and some["difference"] == pytest.approx(0.01, abs=0.003)
    assert paired([1, 0, 1], [1, 0, 1])["p"] == 1
    with pytest.raises(UserError, match="the same for both"): paired([1], [1, 2])


def test_models_that_differ_in_context_are_read_in_the_same_windows(ours):
    model, tok = ours
    torch.manual_seed(2)
    small = Transformer(preset("tiny", vocab_size=len(tok), ctx=32)).eval()
    found = benchmark(model, tok, stories(31, split="val"), baseline=(small, tok))
    assert "rows of 32 " in found["text"]["window"] and found["text"]["window"] == found["baseline"]["text"]["window"]
    want = found["text"]["bits_per_byte"] - found["baseline"]["text"]["bits_per_byte"]
    assert found["difference"]["bits_per_byte"]["difference"] == pytest.approx(want)


def test_configurations_of_a_repository_are_read_together(tmp_path):
    "As on the hub: a data set with one configuration per paradigm, each with a train split."
    for name in ("one", "two"):
        (tmp_path/name).mkdir()
        (tmp_path/name/"train.jsonl").write_text(json.dumps(dict(UID=name, sentence_good="a", sentence_bad="b")), encoding="utf-8")
    configs = "".join(f"- config_name: {n}\n  data_files:\n  - split: train\n    path: {n}/train.jsonl\n" for n in ("one", "two"))
    (tmp_path/"README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    assert {row["UID"] for _, row in all_rows(tmp_path)} == {"one", "two"}


def test_names_are_looked_for_in_the_data_folder(room, ours, monkeypatch):
    monkeypatch.setenv("TINY_LLM_DATA", str(room))
    by_path = benchmark(*ours, tasks=f"blimp:{room/'blimp'},lambada:{room/'lambada_openai.jsonl'}")["tasks"]
    assert benchmark(*ours, tasks="blimp, lambada")["tasks"] == by_path
    assert benchmark(*ours, tasks="blimp", limit=7)["tasks"]["blimp"]["items"] == by_path["blimp"]["items"][:7] + by_path["blimp"]["items"][40:47]


def test_begin_mark_is_the_folder_s(ours, theirs):
    "Whether a text begins with a mark is what the tokenizer of the folder does in transformers."
    assert begin_marks(ours[1]) == theirs[1].encode("a")[:1] == [ours[1].bos]


def test_command(room):
    line = f"eval --model {room/'model'} --data {room/'text.txt'} --split all --stride 40 --device cpu --tasks blimp:{room/'blimp'} --baseline {room/'other'}"
    code, out, err = try_line(f"{line} --out {room/'figures.json'}", show=False)
    assert code == 0, err
    assert "windows of 96 tokens at a stride of 40" in out and "parts of" in out and "minus the baseline" in out and "par_two" in out
    figures = json.loads((room/"figures.json").read_text(encoding="utf-8"))
    assert len(figures["tasks"]["blimp"]["items"]) == 80 and figures["difference"]["blimp"]["units"] == 80
    assert f"{figures['text']['bits_per_byte']:.4f}" in out
    assert try_line(f"{line} --out {room/'figures.json'}", show=False)[0] == 2          # it is not overwritten
    code, out, _ = try_line(f"eval --model {room/'model'} --data none --tasks lambada:{room/'lambada_openai.jsonl'} --limit 9 --device cpu", show=False)
    assert code == 0 and "of 9" in out and "validation loss" not in out
    for wrong in ("--data none", "--tasks blimb", f"--stride 200 --data {room/'text.txt'}", f"--data none --tasks blimp:{room/'text.txt'}"):
        code, _, err = try_line(f"eval --model {room/'model'} --device cpu {wrong}", show=False)
        assert code == 2 and err.count("\n") == 1, wrong


def task_files(folder, data):
    "lm-eval's tasks over local files, in a folder; their names."
    def write(name, file, **more):
        task = dict(task=name, dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(file))), test_split="test", num_fewshot=0, **more)
        (folder/f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")       # JSON is YAML
        return name
    acc = dict(metric="acc", aggregation="mean", higher_is_better=True)
    names = [write(f"local_{f.stem}", f, output_type="multiple_choice", doc_to_text="", doc_to_target=0, doc_to_choice="{{[sentence_good, sentence_bad]}}", metric_list=[acc])
             for f in sorted((data/"blimp").glob("*.jsonl"))]
    ppl = dict(metric="perplexity", aggregation="perplexity", higher_is_better=False)
    return names, write("local_lambada", data/"lambada_openai.jsonl", output_type="loglikelihood", doc_to_text="{{context}}", doc_to_target="{{' ' + continuation}}", metric_list=[ppl, acc])


def by_lm_eval(model, data, folder, limit=None):
    "({name of a file: accuracy}, LAMBADA's accuracy and perplexity), as lm-eval measures a folder through transformers."
    names, last = task_files(folder, data)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", "--batch_size", "16",
               "--include_path", str(folder), "--tasks", ",".join([*names, last]), "--output_path", str(folder/"out"), *(["--limit", str(limit)] if limit else [])]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder/"hf")}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next((folder/"out").rglob("results*.json")).read_text())["results"]
    return {n.removeprefix("local_"): found[n]["acc,none"] for n in names}, found[last]["acc,none"], found[last]["perplexity,none"]


needs_lm_eval = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="needs lm-eval: pip install lm-eval")


def agree(model, data, folder, limit, points):
    pairs, accuracy, perplexity = by_lm_eval(model, data, folder, limit)
    mine = benchmark(*load(model, device="cpu"), tasks=f"blimp:{data/'blimp'},lambada:{data/'lambada_openai.jsonl'}", limit=limit)["tasks"]
    assert len(pairs) == len(mine["blimp"]["paradigms"])
    assert 100 * abs(sum(pairs.values()) / len(pairs) - mine["blimp"]["accuracy"]) <= points
    assert 100 * abs(accuracy - mine["lambada"]["accuracy"]) <= points
    assert mine["lambada"]["perplexity"] == pytest.approx(perplexity, rel=0.002)
    print({"blimp": (pairs, mine["blimp"]["paradigms"]), "lambada": (accuracy, mine["lambada"]["accuracy"], perplexity, mine["lambada"]["perplexity"])})


@needs_lm_eval
@pytest.mark.slow
def test_lm_eval_opens_a_folder_of_ours_and_agrees(room, tmp_path): agree(room/"model", room, tmp_path, None, 0.01)


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.skipif(not {"SMOLLM2", "TINY_LLM_BENCH"} <= os.environ.keys(), reason="SMOLLM2: a model folder; TINY_LLM_BENCH: a folder with blimp/ and lambada_openai.jsonl")
@pytest.mark.timeout(6 * 3600)
def test_lm_eval_agrees_on_a_real_model(tmp_path):
    agree(Path(os.environ["SMOLLM2"]), Path(os.environ["TINY_LLM_BENCH"]), tmp_path, int(os.environ.get("ITEMS", 0)) or None, 0.2)
