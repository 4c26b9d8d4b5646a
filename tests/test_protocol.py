"A request into orders and events into an answer, without a network: what is refused and in which words, and what is told of a text."
import json

import pytest

from house import python
from serving import noise
from tiny_llm.assistant.engine import Engine
from tiny_llm.assistant.generate import DEFAULTS, generate, stream
from tiny_llm.assistant.protocol import Refusal, last_piece, make_job, parse_body, piece_of_answer, whole_answer

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL, TOK = noise()
ENGINE = Engine(MODEL, TOK, slots=4)
WHOLE = ("max_tokens", "top_k")


def written(chat=False, **body):
    "(Job, the events of each choice)."
    told = {}
    job = make_job(body, chat, dict(noise=ENGINE), lambda k, event: told.setdefault(k, []).append(event))
    ENGINE.submit(*job.orders)
    while ENGINE.step(): pass
    return job, [told[k] for k in range(len(job.orders))]


def refused(chat=False, **body):
    with pytest.raises(Refusal) as e: make_job(body, chat, dict(noise=ENGINE), print)
    return e.value


def test_it_needs_no_package_of_a_server():
    python("import sys, tiny_llm.assistant.protocol; assert not {'fastapi', 'starlette', 'uvicorn', 'openai'} & sys.modules.keys()")


@pytest.mark.parametrize("name", [name for name in DEFAULTS if name not in WHOLE])
@pytest.mark.parametrize("x", ["hot", True, [1], {}, 1000, -100.5, 1e300, float("inf"), 10 ** 40], ids=repr)
def test_what_is_no_number_is_told_which_numbers_there_are(name, x):
    e = refused(prompt="a", **{name: x})
    assert (e.status, e.param) == (400, name) and e.message.endswith("; give a number from -100 to 100."), e.message
    assert e.message.startswith(f"{name} is ")


@pytest.mark.parametrize("name", [*WHOLE, "max_completion_tokens"])
@pytest.mark.parametrize("x", ["many", 1.5, True, [1]], ids=repr)
def test_what_is_no_whole_number_is_told_so(name, x):
    assert refused(prompt="a", **{name: x}).message.endswith("; give a whole number.")


def test_numbers_within_the_bounds_are_left_to_stream():
    "It knows what each setting may be, and says so."
    assert make_job(dict(prompt="a", presence_penalty=-100, frequency_penalty=100.0), False, dict(noise=ENGINE), print)
    assert "temperature" in refused(prompt="a", temperature=-1).message and "give a number from" not in refused(prompt="a", temperature=-1).message


@pytest.mark.parametrize("data", [b'{"temperature": NaN}', b'{"a": -Infinity}', b'{"a":' * 30_000 + b"1" + b"}" * 30_000, b"[]", b"", b"\xff"], ids=len)
def test_bytes_that_are_no_request(data):
    with pytest.raises(Refusal) as e: parse_body(data)
    assert e.value.status == 400 and json.loads(json.dumps(e.value.body()))["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", ["", "Once upon a time", "é☃", [7, 8, 9]], ids=repr)
def test_a_prompt_is_read_as_stream_reads_it(prompt):
    assert make_job(dict(prompt=prompt), False, dict(noise=ENGINE), print).prompts == [stream(MODEL, TOK, prompt).prompt]


def test_choices_are_what_generate_writes():
    "Those of the second prompt behind those of the first, each with its own seed."
    body = dict(prompt=["Once", "The fox"], n=3, seed=5, max_tokens=9)
    told = [c["text"] for c in whole_answer(*written(**body))["choices"]]
    assert told == [generate(MODEL, TOK, p, seed=5 + k, max_tokens=9)[len(p):] for p in body["prompt"] for k in range(3)]


@pytest.mark.parametrize("chat", [True, False])
def test_pieces_join_to_the_whole(chat):
    asked = dict(messages=[dict(role="user", content="Hi")], logprobs=True, top_logprobs=2) if chat else dict(prompt="Hi é", logprobs=2)
    body = dict(seed=1, max_tokens=14, temperature=1.3, n=2, **asked)
    want, (job, told) = whole_answer(*written(chat, **body)), written(chat, **body)
    for k, (events, c) in enumerate(zip(told, want["choices"], strict=True)):
        got = [piece_of_answer(job, k, e)["choices"][0] for e in events]
        text = c["message"]["content"] if chat else c["text"]
        assert "".join(p["delta"]["content"] if chat else p["text"] for p in got) == text
        assert [p["finish_reason"] for p in got] == [None] * (len(got) - 1) + [c["finish_reason"]]
        for part in ("content",) if chat else ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [x for p in got for x in p["logprobs"][part]] == c["logprobs"][part]
    end = last_piece(job)
    assert (end["choices"], end["usage"], end["id"]) == ([], want["usage"], piece_of_answer(job, 0, None)["id"])


def test_messages_that_were_left_out_are_told_at_either_end():
    turns = [dict(role=("user", "assistant")[k % 2], content="a story " * 6) for k in range(9)]
    job, told = written(True, messages=turns, max_tokens=5, truncation="auto")
    assert job.forgotten and whole_answer(job, told)["forgotten"] == last_piece(job)["forgotten"] == job.forgotten
    assert "forgotten" not in last_piece(written(True, messages=turns[:1], max_tokens=2)[0])
