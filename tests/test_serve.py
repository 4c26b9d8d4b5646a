"""The server as others meet it: a process of its own, OpenAI's client, many at once, and clients of ill will.

    nice pytest -n0 -s tests/test_serve.py -m slow -k crowd      # a minute of 64 clients, and 1,000 that come at once; prints what it measured
"""
import asyncio, json, math, os, random, socket, statistics, subprocess, sys, threading, time, urllib.error, urllib.request

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed: pip install 'tiny_llm[serve]'")
openai = pytest.importorskip("openai", reason="pip install openai")
import httpx
import torch
from hypothesis import given, strategies as st

from house import ROOT, environment
from serving import LOOP, OTHER, SAID, Served, folders, noise
from tiny_llm.assistant.engine import Engine
from tiny_llm.assistant.generate import generate, stream
from tiny_llm.deployment.serve import _listen, _run, make_app
from tiny_llm.training.folder import load


@pytest.fixture(scope="module")
def places(tmp_path_factory): return folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(places):
    one = Served("--model", places["noise"], "--model", f"talk={places['said']}", "--slots", 4, "--queue", 24, "--body", 200_000)
    yield one
    assert one.end() == 0


@pytest.fixture(scope="module")
def client(server): return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def made(places): return {name: load(folder, device="cpu") for name, folder in (("noise", places["noise"]), ("talk", places["said"]))}


def get(server, path): return urllib.request.urlopen(server.url + path, timeout=60).read().decode()


def metric(server, name):
    "The sum of a metric over its labels."
    return sum(float(line.split()[-1]) for line in get(server, "/metrics").splitlines() if line.startswith(f"tiny_llm_{name}"))


def until(done, seconds=60):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"it did not happen in {seconds} s"
        time.sleep(0.1)


# OpenAI's client -----------------------------------------------------------------------------------------------------

SETTINGS = [dict(temperature=0), dict(seed=3), dict(seed=4, temperature=1.3, top_p=0.9), dict(seed=5, presence_penalty=1.0, frequency_penalty=0.5),
            dict(seed=6, stop=["e"]), dict(seed=7, stop=" a"), dict(seed=8, extra_body=dict(top_k=5, min_p=0.01, repetition_penalty=1.3))]


@pytest.mark.parametrize("k", range(len(SETTINGS)))
def test_a_completion_is_what_generate_writes(client, made, k):
    s = dict(SETTINGS[k])
    for prompt in ("Once upon a time", "", [5, 9, 300], "é☃"):
        got = client.completions.create(model="noise", prompt=prompt, max_tokens=24, **s)
        ours = {**s, **s.get("extra_body", {})}
        ours.pop("extra_body", None)
        text = "".join(stream(*made["noise"], prompt, max_tokens=24, **ours))
        assert got.choices[0].text == text
        if isinstance(prompt, str): assert prompt + text == generate(*made["noise"], prompt, max_tokens=24, **ours)
        assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def test_a_chat_is_what_stream_writes(client, made):
    model, tok = made["talk"]
    for messages in ([dict(role="user", content="Hello")], [dict(role="system", content="Be brief."), dict(role="user", content="<|end|> Hi"),
                                                           dict(role="assistant", content="Yes?"), dict(role="user", content="Go on.")]):
        for s in (dict(temperature=0), dict(seed=2, temperature=1.0)):
            got = client.chat.completions.create(model="talk", messages=messages, max_tokens=60, **s)
            assert got.choices[0].message.content == "".join(stream(model, tok, tok.prompt(messages), max_tokens=60, **s))
            assert got.choices[0].finish_reason == "length" and got.usage.prompt_tokens == len(tok.prompt(messages))
    assert got.object == "chat.completion" and got.id.startswith("chatcmpl-") and got.choices[0].message.role == "assistant"


def test_developer_and_parts(client):
    def said(messages): return client.chat.completions.create(model="noise", messages=messages, seed=1, max_tokens=10).choices[0].message.content
    plain = said([dict(role="system", content="Be\nbrief."), dict(role="user", content="Hi")])
    assert plain == said([dict(role="developer", content=[dict(type="text", text="Be"), dict(type="text", text="brief.")]), dict(role="user", content="Hi")])


def test_streams(client):
    asked = dict(model="talk", messages=[dict(role="user", content="Hello")], seed=3, temperature=1.0, max_tokens=40)
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=dict(include_usage=True)))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"] and len(chunks) > 10
    text = client.completions.create(model="noise", prompt="Once", seed=3, max_tokens=20)
    pieces = list(client.completions.create(model="noise", prompt="Once", seed=3, max_tokens=20, stream=True))
    assert "".join(p.choices[0].text for p in pieces) == text.choices[0].text and len(pieces) > 5


def test_stop_ends_a_text_before_it(client):
    got = client.chat.completions.create(model="talk", messages=[dict(role="user", content="Hello")], temperature=0, stop=["bold", "never"])
    assert got.choices[0].message.content == SAID[:SAID.index("bold")] and got.choices[0].finish_reason == "stop"
    pieces = client.chat.completions.create(model="talk", messages=[dict(role="user", content="Hello")], temperature=0, stop="window.hack", stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == SAID[:SAID.index("window.hack")]


def test_n_choices_have_seeds_of_their_own(client):
    three = client.completions.create(model="noise", prompt=["Once", "The"], n=3, seed=10, max_tokens=8)
    assert [c.index for c in three.choices] == list(range(6)) and len({c.text for c in three.choices}) > 3
    for k, c in enumerate(three.choices):
        one = client.completions.create(model="noise", prompt=("Once", "The")[k // 3], seed=10 + k % 3, max_tokens=8)
        assert one.choices[0].text == c.text
    assert three.usage.completion_tokens == 48
    streams = {}
    for p in client.completions.create(model="noise", prompt=["Once", "The"], n=3, seed=10, max_tokens=8, stream=True):
        c = p.choices[0]
        streams[c.index] = streams.get(c.index, "") + c.text
    assert [streams[k] for k in range(6)] == [c.text for c in three.choices]


def test_logprobs(client, made):
    model, tok = made["noise"]
    events = [e for e in stream(model, tok, "Once", seed=1, max_tokens=12, top=4).events if e.id is not None]
    chat = client.completions.create(model="noise", prompt="Once", seed=1, max_tokens=12, logprobs=4).choices[0].logprobs
    assert len(chat.tokens) == len(events)
    for e, x, top in zip(events, chat.token_logprobs, chat.top_logprobs):
        assert abs(e.logprob - x) < 1e-4
        want = sorted(math.log(p) for _, p in e.top)
        assert max(top.values()) == pytest.approx(want[-1], abs=1e-3) and len(top) in (3, 4, 5)
    prompt = tok.prompt([dict(role="user", content="Hi")])
    events = [e for e in stream(model, tok, prompt, seed=1, max_tokens=12, top=2).events if e.id is not None]
    got = client.chat.completions.create(model="noise", messages=[dict(role="user", content="Hi")], seed=1, max_tokens=12, logprobs=True, top_logprobs=2)
    rows = got.choices[0].logprobs.content
    assert b"".join(bytes(r.bytes) for r in rows).decode(errors="replace") == got.choices[0].message.content
    assert [abs(r.logprob - e.logprob) < 1e-4 and len(r.top_logprobs) == 2 for r, e in zip(rows, events, strict=True)] == [True] * len(events)
    chunks = client.chat.completions.create(model="noise", messages=[dict(role="user", content="Hi")], seed=1, max_tokens=12, logprobs=True, top_logprobs=2, stream=True)
    assert [r for c in chunks if c.choices[0].logprobs for r in c.choices[0].logprobs.content] == rows


def test_echo_scores_a_prompt(client, made):
    model, tok = made["noise"]
    ids = tok.encode("Once upon a time there was a fox.")
    got = client.completions.create(model="noise", prompt=ids, echo=True, max_tokens=0, logprobs=1).choices[0]
    with torch.no_grad(): log_q = model(torch.tensor([ids]))[0].index_fill(-1, torch.tensor(tok.nameless(model.cfg.vocab_size)), -torch.inf).log_softmax(-1)
    assert got.logprobs.token_logprobs[0] is None and got.text == "Once upon a time there was a fox."
    assert got.logprobs.token_logprobs[1:] == pytest.approx(log_q[torch.arange(len(ids) - 1), ids[1:]].tolist(), abs=1e-4)
    assert got.logprobs.text_offset == [sum(map(len, got.logprobs.tokens[:k])) for k in range(len(ids))]
    more = client.completions.create(model="noise", prompt=ids, echo=True, max_tokens=3, logprobs=1, seed=0).choices[0]
    assert len(more.logprobs.tokens) == len(ids) + 3 and more.text.startswith("Once upon a time there was a fox.") and len(more.text) > len(got.text)


def test_lm_eval_measures_over_the_wire(server, made, places):
    "lm-eval's own client, `local-completions`, against the log-probabilities of the model in this process."
    pytest.importorskip("lm_eval", reason="pip install lm-eval")
    pytest.importorskip("tenacity", reason="pip install 'lm-eval[api]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    model, tok = made["noise"]
    lm = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", tokenizer_backend="huggingface", tokenizer=str(places["noise"]), model="noise",
                             num_concurrent=1, batch_size=2, max_length=96)
    pairs = [("Once upon a", " time"), ("The fox", " was happy."), ("One day", " the girl found a red ball.")]
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    for (before, after), (got, greedy) in zip(pairs, found):
        a, ids = lm.tok_encode(before), lm.tok_encode(before + after)
        with torch.no_grad(): log_q = model(torch.tensor([ids]))[0].index_fill(-1, torch.tensor(tok.nameless(model.cfg.vocab_size)), -torch.inf).log_softmax(-1)
        want = sum(log_q[t - 1, ids[t]].item() for t in range(len(a), len(ids)))
        assert got == pytest.approx(want, abs=1e-3) and greedy is False


TASKS = {     # of a whole task of lm-eval: what is asked, the file's rows
    "wire_pairs": dict(output_type="multiple_choice", doc_to_text="", doc_to_target=0, doc_to_choice="{{[good, bad]}}"),
    "wire_words": dict(output_type="loglikelihood", doc_to_text="{{context}}", doc_to_target="{{continuation}}"),
    "wire_texts": dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}"),
    "wire_answers": dict(output_type="generate_until", doc_to_text="{{context}}", doc_to_target="{{answer}}", generation_kwargs=dict(until=["e"], do_sample=False, max_gen_toks=12))}


def wire_rows(model, tok, n=24):
    "Sentences of stories with one word changed, last words, texts, and what the model writes itself, greedily, up to an e."
    from tiny_llm.text.stories import stories
    rng, found = random.Random(0), []
    for text in map(str, stories(n, seed=7)):
        words = text.split()[:9]
        front = " ".join(words[:6])
        said = "".join(stream(model, tok, tok.encode(front), max_tokens=12, temperature=0.0, stop=["e"]))      # lm-eval sends ids, without the begin mark
        if rng.random() < 0.5: said += "!"           # a wrong answer, which is to count as one
        context, last = " ".join(words[:-1]), " " + words[-1]
        ids = list(e.id for e in stream(model, tok, tok.encode(context), max_tokens=2, temperature=0.0).events if e.id is not None)
        if tok.encode(context + tok.decode(ids)) == tok.encode(context) + ids: last = tok.decode(ids)       # what the model would write: to count as right
        found.append(dict(good=" ".join(words), bad=" ".join(rng.sample(words, len(words))), context=context, continuation=last,
                          text=" ".join(words), answer=said, front=front))
    return found


@pytest.mark.slow
def test_lm_eval_runs_whole_tasks_against_the_server(server, made, places, tmp_path):
    """The command of lm-eval, its own model `local-completions`, four tasks over a local file: one of each kind of request.

    Every figure that it prints is reckoned again with the model in this process."""
    pytest.importorskip("lm_eval", reason="pip install lm-eval")
    pytest.importorskip("tenacity", reason="pip install 'lm-eval[api]'")
    model, tok = made["noise"]
    rows = wire_rows(model, tok)
    (tmp_path/"rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (tmp_path/"fronts.jsonl").write_text("".join(json.dumps({**r, "context": r["front"]}) + "\n" for r in rows), encoding="utf-8")
    metrics = dict(wire_pairs=["acc"], wire_words=["perplexity", "acc"], wire_texts=["word_perplexity", "byte_perplexity", "bits_per_byte"], wire_answers=["exact_match"])
    for name, task in TASKS.items():
        file = tmp_path/("fronts.jsonl" if name == "wire_answers" else "rows.jsonl")
        whole = dict(task=name, dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(file))), test_split="test", num_fewshot=0,
                     metric_list=[dict(metric=m) for m in metrics[name]], **task)
        (tmp_path/f"{name}.yaml").write_text(json.dumps(whole), encoding="utf-8")        # JSON is YAML
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--include_path", str(tmp_path), "--tasks", ",".join(TASKS), "--output_path", str(tmp_path/"out"),
               "--model_args", f"model=noise,base_url={server.url}/v1/completions,tokenizer_backend=huggingface,tokenizer={places['noise']},num_concurrent=2,max_length=96,tokenized_requests=True"]
    done = subprocess.run(command, env=environment(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path/"hf")), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(next((tmp_path/"out").rglob("results*.json")).read_text())["results"]
    assert all(found[name].get(f"{m},none") is not None for name, ms in metrics.items() for m in ms), found

    nameless = torch.tensor(tok.nameless(model.cfg.vocab_size))
    @torch.no_grad()
    def scored(before, after):
        "(nats of what follows, whether it is what the model would write). lm-eval begins with the mark where nothing comes before, and puts a space before a choice."
        front = [] if before else [tok.bos]
        ids, n = front + tok.encode(before + after), len(front) + len(tok.encode(before))
        log_q = model(torch.tensor([ids]))[0].index_fill(-1, nameless, -torch.inf).log_softmax(-1)
        return sum(log_q[t - 1, ids[t]].item() for t in range(n, len(ids))), all(log_q[t - 1].argmax() == ids[t] for t in range(n, len(ids)))

    near = pytest.approx
    pairs = [scored("", " " + r["good"])[0] > scored("", " " + r["bad"])[0] for r in rows]
    assert found["wire_pairs"]["acc,none"] == near(statistics.mean(pairs)) and 0 < sum(pairs) < len(rows)
    words = [scored(r["context"], r["continuation"]) for r in rows]
    assert 0 < sum(hit for _, hit in words) < len(rows)
    assert found["wire_words"]["acc,none"] == near(statistics.mean(hit for _, hit in words))
    assert found["wire_words"]["perplexity,none"] == near(math.exp(-statistics.mean(x for x, _ in words)), rel=1e-3)
    nats = [scored("", r["text"])[0] for r in rows]
    assert found["wire_texts"]["bits_per_byte,none"] == near(-sum(nats) / math.log(2) / sum(len(r["text"].encode()) for r in rows), rel=1e-3)
    right = [not r["answer"].endswith("!") for r in rows]
    assert found["wire_answers"]["exact_match,none"] == near(statistics.mean(right)) and 0 < sum(right) < len(rows)
    print({name: {k: v for k, v in found[name].items() if k.endswith(",none")} for name in TASKS})


def test_models_and_health(client, server):
    assert [m.id for m in client.models.list()] == ["noise", "talk"]
    assert json.loads(get(server, "/health"))["status"] == "ok"


def test_mistakes_are_told_in_openai_s_form(client):
    def wrong(kind, param=None, code=None, f=client.chat.completions.create, **body):
        with pytest.raises(kind) as e: f(**{"model": "noise", **({"messages": [dict(role="user", content="Hi")]} if f == client.chat.completions.create else {}), **body})
        assert (e.value.param, e.value.code) == (param, code) and len(e.value.body["message"]) > 10, e.value.body
    bad = openai.BadRequestError
    wrong(openai.NotFoundError, "model", "model_not_found", model="gpt-4o")
    wrong(bad, "temprature", extra_body=dict(temprature=1))
    wrong(bad, "tools", "unsupported_parameter", tools=[dict(type="function", function=dict(name="f"))])
    wrong(bad, "messages", "context_length_exceeded", messages=[dict(role="user", content="word " * 400)])
    wrong(bad, "messages.0.role", messages=[dict(role="judge", content="Hi")])
    wrong(bad, "temperature", temperature=1000)
    wrong(bad, None, temperature=-1)
    wrong(bad, "n", n=0)
    wrong(bad, "stop", stop=[""])
    wrong(bad, "top_logprobs", top_logprobs=3)
    wrong(bad, "prompt", f=client.completions.create, prompt=[401])
    wrong(bad, "echo", f=client.completions.create, prompt="a", echo=True, stream=True)
    with pytest.raises(openai.InternalServerError) as e: client.embeddings.create(model="noise", input="a")
    assert e.value.status_code == 501 and "embeddings" in e.value.body["message"]


def test_a_conversation_that_is_too_long_may_be_cut(client):
    turns = [dict(role=("user", "assistant")[k % 2], content="a story " * 6) for k in range(9)]
    got = client.chat.completions.create(model="noise", messages=turns, max_tokens=5, extra_body=dict(truncation="auto"))
    assert got.usage.prompt_tokens < 96 and got.forgotten > 0 and got.forgotten % 2 == 0


# Many at once --------------------------------------------------------------------------------------------------------

def post(server, path, body, **headers):
    "(status, headers, object); body: an object or bytes."
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    ask = urllib.request.Request(server.url + path, data, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(ask, timeout=120) as r: return r.status, r.headers, json.loads(r.read())
    except urllib.error.HTTPError as e: return e.code, e.headers, json.loads(e.read())


def test_company_changes_no_bit_over_the_wire(server):
    draw = random.Random(0)
    bodies = [dict(model="noise", prompt=[draw.randrange(5, 300) for _ in range(draw.randrange(1, 40))], seed=k, temperature=1.2, max_tokens=draw.randrange(5, 40),
                   logprobs=3) for k in range(16)]
    def text(body): return post(server, "/v1/completions", body)[2]["choices"]
    alone, together = [text(b) for b in bodies], [None] * len(bodies)
    def ask(k): together[k] = text(bodies[k])
    threads = [threading.Thread(target=ask, args=(k,)) for k in range(len(bodies))]
    for t in threads: t.start()
    for t in threads: t.join()
    assert together == alone


def test_who_finds_no_room_is_told_when_to_come_again(server, client):
    "80 at once before 4 seats and 24 places: a whole answer or a 429, nothing else."
    found = []
    def ask(k): found.append(post(server, "/v1/completions", dict(model="noise", prompt="Once", seed=k, max_tokens=60, temperature=1.5)))
    threads = [threading.Thread(target=ask, args=(k,)) for k in range(80)]
    for t in threads: t.start()
    for t in threads: t.join(120)
    assert len(found) == 80 and {s for s, _, _ in found} <= {200, 429} and sum(s == 200 for s, _, _ in found) >= 28
    busy = [(h, b) for s, h, b in found if s == 429]
    for heads, body in busy: assert 1 <= int(heads["retry-after"]) <= 60 and body["error"]["type"] == "rate_limit_error"
    assert busy, "80 found room where there are 28 places"
    until(lambda: json.loads(get(server, "/health"))["running"] == 0)
    assert client.completions.create(model="noise", prompt="a", max_tokens=2).usage.completion_tokens > 0


def test_a_client_that_goes_stops_its_text(server, client):
    before = metric(server, "tokens_total")
    flow = client.chat.completions.create(model="talk", messages=[dict(role="user", content="Hello")], max_tokens=900, temperature=0, stream=True)
    for _ in range(3): next(iter(flow))
    flow.close()
    until(lambda: metric(server, "texts_running") == 0)
    until(lambda: metric(server, "tokens_total") > before)
    assert metric(server, "tokens_total") - before < 700
    host = server.url.removeprefix("http://")
    body = json.dumps(dict(model="talk", messages=[dict(role="user", content="Hi")], max_tokens=900, temperature=0)).encode()      # without a stream
    with socket.create_connection(host.split(":")) as s:
        s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n%s" % (host.encode(), len(body), body))
        until(lambda: metric(server, "texts_running") == 1, 20)
    until(lambda: metric(server, "texts_running") == 0, 20)
    assert metric(server, "tokens_total") - before < 1500


def test_metrics_are_what_prometheus_reads(server):
    parser = pytest.importorskip("prometheus_client.parser", reason="pip install prometheus_client")
    found = {f.name: f for f in parser.text_string_to_metric_families(get(server, "/metrics"))}
    assert {"tiny_llm_tokens", "tiny_llm_texts_running", "tiny_llm_texts_waiting", "tiny_llm_answers"} <= found.keys()
    h = {s.labels.get("le", s.name): s.value for s in found["tiny_llm_first_token_seconds"].samples}
    assert h["+Inf"] == h["tiny_llm_first_token_seconds_count"] > 0
    assert list(v for k, v in h.items() if k[0].isdigit()) == sorted(v for k, v in h.items() if k[0].isdigit())


# Ill will ------------------------------------------------------------------------------------------------------------

def raw(server, data, pieces=(), seconds=60):
    "What comes back to these bytes, as (status, object)."
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as s:
        try:
            s.sendall(data)
            for piece in pieces: s.sendall(piece)
        except OSError: pass            # it has heard enough
        got = b""
        try:
            while b"\r\n\r\n" not in got or len(got.split(b"\r\n\r\n", 1)[1]) < int(got.lower().split(b"content-length: ")[1].split(b"\r\n")[0]):
                if not (more := s.recv(65536)): break
                got += more
        except OSError: pass
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

def with_body(data): return HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data

@pytest.mark.parametrize("status, data", [
    (413, HEAD + b"Content-Length: 100000000\r\n\r\n"),
    (413, with_body(b'{"messages": "' + b"a" * 300_000 + b'"}')),
    (400, with_body(b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}')),
    (400, with_body(b"[" * 90_000)),
    (400, with_body(b'{"a":' * 30_000 + b"1" + b"}" * 30_000)),
    (400, with_body(b'{"messages": [{"role": "user", "content": "\\ud800"}]}')),
    (400, with_body(b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}')),
    (400, with_body(b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1' + b"0" * 5000 + b"}")),
    (400, with_body(b'{"messages": [{"role": "user", "content": "a"}], "presence_penalty": 1' + b"0" * 400 + b"}")),
    (400, with_body(b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1}')),
    (400, with_body(b"")),
    (400, with_body(b"null")),
    (400, HEAD + b"X-Long: " + b"a" * 1_000_000 + b"\r\n\r\n"),
    (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 this is TLS \r\n\r\n"),
    (405, b"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    (404, b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    (404, b"GET /%2e%2e/serve.py HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    (403, b"GET /v1/models HTTP/1.1\r\nHost: rebound.example\r\n\r\n"),
    (403, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: https://elsewhere.example\r\nContent-Length: 2\r\n\r\n{}"),
], ids=lambda x: str(x) if isinstance(x, int) else x[-24:].decode("latin-1").strip().encode("ascii", "replace").decode().replace("\n", " "))
def test_ill_will_gets_an_error_and_the_server_goes_on(server, client, status, data):
    pieces = (b"a" * 1_000_000 for _ in range(100)) if b"Length: 100000000\r" in data else ()
    got, body = raw(server, data, pieces)
    assert got == status and body["error"]["message"] and body["error"]["type"]
    assert json.loads(get(server, "/health"))["status"] == "ok" and not any("Traceback" in line for line in server.lines)


def test_a_hundred_megabytes_take_no_memory(server):
    get(server, "/health")
    before = server.memory()
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    status, _ = raw(server, head, (b"%x\r\n%s\r\n" % (1_000_000, b"a" * 1_000_000) for _ in range(100)))
    assert status == 413 and server.memory() - before < 30e6


@pytest.fixture(scope="module")
def hasty():
    "A server in this process that waits a second for what it waits for; its engine and its address."
    engine, sock = Engine(*noise(), slots=2, queue=4).start(), _listen("127.0.0.1", 0)
    app, up = make_app(dict(noise=engine), patience=1.0, seconds=300), threading.Event()
    threading.Thread(target=_run, args=(app, sock, 1.0, 1, up.set), daemon=True).start()
    assert up.wait(30)
    yield type("Hasty", (), dict(url=f"http://127.0.0.1:{sock.getsockname()[1]}", engine=engine, app=app))
    engine.close()


def test_slow_clients_do_not_hold_their_place(hasty):
    def slowly(data):
        for i in range(len(data)):
            time.sleep(0.1)
            yield data[i:i + 1]
    for data in (b"", HEAD[:-20]), (HEAD + b"Content-Length: 100\r\n\r\n{", b" " * 60):
        began = time.monotonic()
        status, body = raw(hasty, data[0], slowly(data[1] or HEAD), 30)
        assert status == 408 and "did not arrive" in body["error"]["message"] and time.monotonic() - began < 30
    host, port = hasty.url.removeprefix("http://").split(":")       # the head of a second request, on the same connection
    with socket.create_connection((host, int(port)), timeout=30) as s:
        s.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        first = b""
        while b'"waiting"' not in first: first += s.recv(65536)
        s.sendall(b"GET /hea")
        assert b"200 OK" in first and b"408" in s.recv(65536)


def test_two_requests_on_one_connection(hasty):
    with httpx.Client(base_url=hasty.url) as c:
        for k in range(3): assert c.post("/v1/completions", json=dict(prompt="Once", max_tokens=3, seed=k)).status_code == 200


def test_a_text_that_takes_too_long():
    engine = Engine(*noise(), slots=1).start()
    app = make_app(dict(noise=engine), seconds=0.0)
    status, _, body = in_process(app, "/v1/completions", dict(prompt="Once", max_tokens=90))
    assert status == 504 and body["error"]["code"] == "timeout"
    engine.close()
    status, heads, body = in_process(app, "/v1/completions", dict(prompt="Once"))
    assert status == 503 and heads["retry-after"] and in_process(app, "/health", None)[0] == 503


def in_process(app, path, body, **headers):
    "(status, headers, object) by ASGI."
    async def call():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as c:
            if body is None: return await c.get(path, headers=headers)
            return await c.post(path, content=body if isinstance(body, bytes) else json.dumps(body).encode(), headers=headers)
    r = asyncio.run(call())
    return r.status_code, r.headers, json.loads(r.content)


@pytest.fixture(scope="module")
def app():
    engine = Engine(*noise(), slots=4).start()
    yield make_app(dict(noise=engine))
    engine.close()


def test_keys(app):
    locked = make_app(app.api.engines, key="sécret")
    key = "Bearer sécret".encode()
    for path in ("/v1/models", "/metrics"):
        for wrong in ({}, dict(authorization="Bearer other"), dict(authorization="sécret".encode()[:4]), dict(authorization=b"Bearer \xff")):
            status, heads, body = in_process(locked, path, None, **wrong)
            assert status == 401 and body["error"]["code"] == "invalid_api_key" and "www-authenticate" in heads
    plain = make_app(app.api.engines, key="secret")
    assert in_process(plain, "/v1/models", None, authorization="Bearer secret")[0] == 200 and in_process(plain, "/health", None)[0] == 200


def test_pages_elsewhere_may_ask_only_where_allowed(app):
    there = "https://friend.example"
    assert in_process(app, "/v1/models", None, origin=there)[0] == 403
    assert in_process(app, "/v1/models", None, origin="null")[0] == 403
    assert in_process(app, "/v1/models", None, origin="http://127.0.0.1")[0] == 200
    open_ = make_app(app.api.engines, cors=[there])
    status, heads, _ = in_process(open_, "/v1/models", None, origin=there)
    assert status == 200 and heads["access-control-allow-origin"] == there
    assert in_process(open_, "/v1/models", None, origin="https://other.example")[0] == 403
    assert "access-control-allow-origin" not in in_process(app, "/v1/models", None)[1]


# Mutated requests ----------------------------------------------------------------------------------------------------

odd = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-3, 30), st.floats(), st.text(max_size=8), st.sampled_from(
    [{}, [], "", 0, -1, 1e308, 10 ** 400, [[]], [None], [[[]]], {"a": {}}, "\ud800", "auto", [1, "a"], [{"type": "text"}], "<|end|>", "noise"]))
value = st.recursive(odd, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)
NAMES = ("model messages prompt max_tokens max_completion_tokens temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty seed "
         "stop n stream stream_options logprobs top_logprobs echo truncation user tools response_format logit_bias suffix best_of modalities").split()
fields = st.sampled_from(NAMES) | st.text(max_size=6)


@st.composite
def requests(draw):
    "(path, bytes): a request that is right but for what was done to it."
    chat = draw(st.booleans())
    said = [dict(role=r, content=draw(st.text(max_size=12))) for r in draw(st.sampled_from([["user"], ["system", "user"], ["user", "assistant", "user"]]))]
    body = dict(messages=said) if chat else dict(prompt=draw(st.text(max_size=12)))
    body |= dict(max_tokens=3, seed=1)
    for _ in range(draw(st.integers(0, 3))): body[draw(fields)] = draw(value)
    if chat and draw(st.booleans()) and isinstance(body.get("messages"), list) and body["messages"]:
        m = draw(st.sampled_from(range(len(body["messages"]))))
        if isinstance(body["messages"][m], dict): body["messages"][m][draw(st.sampled_from(["role", "content", "name", "x"]))] = draw(value)
    for _ in range(draw(st.integers(0, 1))): body.pop(draw(st.sampled_from(sorted(body))), None)
    data = json.dumps(body).encode()
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):                 # bytes that were changed, taken or put in
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=2)) + data[at + draw(st.integers(0, 2)):]
    return ("/v1/chat/completions" if chat else "/v1/completions"), data


def whatever(app, request):
    path, data = request
    async def call():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as c: return await c.post(path, content=data)
    r = asyncio.run(call())                # what the application raises is raised here
    assert r.status_code in (200, 400, 404, 422), (r.status_code, r.text)
    if r.status_code != 200: assert json.loads(r.text)["error"]["message"]
    elif r.headers["content-type"].startswith("text/event-stream"):
        assert r.text.endswith("data: [DONE]\n\n") and '"error"' not in r.text, r.text
    else: assert json.loads(r.text, parse_constant=lambda name: 1 / 0)["choices"]
    return r.status_code


@given(requests())
def test_no_request_is_an_error_of_the_server(app, request): whatever(app, request)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(requests())
def test_ten_thousand_requests(app, request): whatever(app, request)       # with --slow hypothesis makes 10,000


# The process ---------------------------------------------------------------------------------------------------------

def line_of(*words, code=2, **extra):
    "The one line of a command that ends at once."
    p = subprocess.run([sys.executable, "-m", "tiny_llm", "serve", *map(str, words)], env=environment(PYTHONPATH=str(ROOT), **extra), capture_output=True,
                       text=True, timeout=120, stdin=subprocess.DEVNULL)
    lines = [l for l in p.stderr.splitlines() if l.startswith("tiny_llm:")]
    assert p.returncode == code and len(lines) == 1 and "Traceback" not in p.stderr and not p.stdout, p.stderr + p.stdout
    return lines[0]


def test_what_is_wrong_at_the_start_is_one_line(places, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = line_of("--model", places["noise"], "--port", taken.getsockname()[1])
        assert "in use" in said and "--port" in said
    assert "no model folder" in line_of("--model", tmp_path / "none")
    assert "two models are called" in line_of("--model", places["noise"], "--model", places["noise"])
    assert "slots is 0" in line_of("--model", places["noise"], "--slots", 0, "--port", 0)
    (tmp_path / "fastapi.py").write_text("raise ImportError('not here')")
    p = subprocess.run([sys.executable, "-m", "tiny_llm", "serve", "--model", places["noise"]], capture_output=True, text=True, timeout=120,
                       env=environment(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)])))
    assert p.returncode == 2 and "pip install 'tiny_llm[serve]'" in p.stderr and "Traceback" not in p.stderr


def test_every_option_arrives(monkeypatch, places):
    from tiny_llm.deployment import cli, serve
    said = []
    monkeypatch.setattr(serve, "serve", lambda models, host, **how: said.append((sorted(models), host, how)))
    monkeypatch.setenv("TINY_LLM_API_KEY", "from the environment")
    line = f"serve --model {places['noise']} --model b={places['other']} --port 0 --cors https://a.example,https://b.example --slots 3 --rows 2 --queue 5 --seconds 7 --body 900 --drain 4"
    assert cli.main([*line.split(), "--log_prompts", "--device", "cpu"]) == 0
    models, host, how = said[0]
    assert (models, host, how.pop("sock").fileno()) == (["b", "noise"], "127.0.0.1", -1)
    assert how == dict(api_key="from the environment", cors=["https://a.example", "https://b.example"], slots=3, rows=2, queue=5, seconds=7.0, body=900, drain=4,
                       log_prompts=True)
    assert cli.main(["serve", "--model", str(places["noise"]), "--port", "0", "--api_key", "own", "--host", "localhost"]) == 0
    assert said[1][1] == "localhost" and said[1][2]["api_key"] == "own" and said[1][2]["cors"] == ()


def test_sigterm_drains(places):
    "A stream that has begun is written to its end; whoever comes now finds nobody; the process ends with 0."
    one = Served("--model", f"talk={places['said']}")
    client = openai.OpenAI(base_url=f"{one.url}/v1", api_key="none", max_retries=0)
    flow = iter(client.chat.completions.create(model="talk", messages=[dict(role="user", content="Hi")], max_tokens=500, temperature=0, stream=True))
    said = [next(flow) for _ in range(5)]
    one.process.terminate()
    time.sleep(0.3)
    with pytest.raises(openai.APIConnectionError): client.models.list()
    said += list(flow)
    text = "".join(c.choices[0].delta.content or "" for c in said)
    assert said[-1].choices[0].finish_reason == "length" and text.startswith(SAID) and text.count("twelve") > 10
    assert one.process.wait(60) == 0


def test_the_log_holds_no_word_of_what_was_said(places):
    for more, holds in ((), False), (("--log_prompts",), True):
        one = Served("--model", f"talk={places['other']}", *more, TINY_LLM_API_KEY="k")
        client = openai.OpenAI(base_url=f"{one.url}/v1", api_key="k", max_retries=0)
        got = client.chat.completions.create(model="talk", messages=[dict(role="user", content="Xylophone")], temperature=0)
        assert got.choices[0].message.content == OTHER and got.choices[0].finish_reason == "stop"
        with pytest.raises(openai.BadRequestError): client.chat.completions.create(model="talk", messages=[dict(role="judge", content="Xylophone")])
        with pytest.raises(openai.AuthenticationError): openai.OpenAI(base_url=f"{one.url}/v1", api_key="x", max_retries=0).models.list()
        assert one.end() == 0
        log = "\n".join(one.lines)
        assert "tokens read" in log and ("Xylophone" in log) == holds and "Quite" not in log


def test_other_machines_are_warned_of(places):
    one = Served("--model", places["other"], "--host", "0.0.0.0")
    assert any("can be reached from other machines, and no API key is needed" in line for line in one.lines)
    assert one.end() == 0


# A crowd -------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_crowd(places):
    "A minute of 64 clients that stream, and 1,000 that come at once: none hangs, every answer is whole or a 429. Prints what it measured."
    seconds = float(os.environ.get("CROWD_SECONDS", 60))
    one = Served("--model", f"talk={places['said']}", "--slots", 16, "--queue", 128)
    async def text(c, tokens=60):
        "(status, tokens, seconds to the first) of a streamed reply."
        began, first, n = time.monotonic(), None, 0
        body = dict(messages=[dict(role="user", content="Hi")], max_tokens=tokens, temperature=0, stream=True)
        async with c.stream("POST", "/v1/chat/completions", json=body) as r:
            if r.status_code != 200: return r.status_code, 0, None
            last = ""
            async for line in r.aiter_lines():
                if not line.startswith("data: "): continue
                last, n = line, n + ('"content":' in line)
                if first is None and n > 1: first = time.monotonic() - began
        assert last == "data: [DONE]", last
        return 200, tokens, first
    def client(): return httpx.AsyncClient(base_url=one.url, timeout=300, limits=httpx.Limits(max_connections=None))
    async def rate(clients, seconds):
        found, end = [], time.monotonic() + seconds
        async with client() as c:
            async def person():
                while time.monotonic() < end: found.append(await text(c))
            began = time.monotonic()
            await asyncio.wait_for(asyncio.gather(*(person() for _ in range(clients))), seconds + 200)
        return found, sum(n for _, n, _ in found) / (time.monotonic() - began)
    async def at_once(n):
        async with client() as c: return await asyncio.wait_for(asyncio.gather(*(text(c, 20) for _ in range(n))), 300)
    def percent(times, share): return sorted(times)[min(len(times) - 1, int(share * len(times)))]
    start = one.memory()
    _, alone = asyncio.run(rate(1, min(seconds, 10)))
    found, many = asyncio.run(rate(64, seconds))
    assert all(s == 200 for s, _, _ in found) and len(found) >= 64
    times = [t for _, _, t in found]
    print(f"\none client {alone:.0f} tokens/s; 64 clients {many:.0f}, {len(found)} replies of 60 tokens; first token {statistics.median(times):.2f} s at the "
          f"median, {percent(times, 0.99):.2f} s at the 99th percentile")
    crowd = asyncio.run(at_once(1000))
    whole = [t for s, _, t in crowd if s == 200]
    assert len(crowd) == 1000 and {s for s, _, _ in crowd} <= {200, 429} and len(whole) >= 144
    print(f"1,000 at once: {len(whole)} whole answers, {1000 - len(whole)} told to come again; first token {statistics.median(whole):.2f} s at the median, "
          f"{percent(whole, 0.99):.2f} s at the 99th percentile; memory {start / 1e6:.0f} MB before, {one.memory() / 1e6:.0f} MB after")
    assert one.memory() - start < 200e6
    assert one.end() == 0
