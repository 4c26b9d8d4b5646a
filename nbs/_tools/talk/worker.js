// The model of the page Talk to it: an ONNX graph with its cache (1.12 graph) in onnxruntime-web, one thread, away from the page's own.
import * as ort from "./ort.js";
import { Tokenizer, decoder } from "./tokenizer.js";

let tok, session, cfg, ends, usual, shares = [], looked = null, stopped = new Set(), last = Promise.resolve();
const tell = (id, what) => postMessage({ id, ...what });
const breathe = () => new Promise(go => { const c = new MessageChannel(); c.port1.onmessage = () => { c.port1.close(); go(); }; c.port2.postMessage(0); });

async function get(name, heard) {        // the bytes of a file; `heard` is told how many came
  const r = await fetch(new URL(name, import.meta.url));
  if (!r.ok) throw new Error(`${name} is not there (${r.status})`);
  const parts = [], reader = r.body.getReader();
  for (let part; !(part = await reader.read()).done;) { parts.push(part.value); heard(part.value.length); }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}
const json = bytes => JSON.parse(new TextDecoder().decode(bytes));

async function load(id) {
  let all = 0;
  const heard = n => { all += n; tell(id, { came: all }); };
  const [wasm, graph, tokens, config, settings] = await Promise.all(["ort.wasm", "model/onnx/model_quantized.onnx", "model/tokenizer.json",
    "model/config.json", "model/generation_config.json"].map(name => get(name, heard)));
  Object.assign(ort.env.wasm, { numThreads: 1, wasmBinary: wasm.buffer });
  session = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"], logSeverityLevel: 3 });
  tok = new Tokenizer(json(tokens));
  cfg = json(config);
  usual = json(settings);
  ends = new Set([usual.eos_token_id, tok.ids.get("<|end|>")].flat());
  shares = session.outputNames.filter(name => name.startsWith("attentions."));
}

const whole = (x, shape) => new ort.Tensor("int64", BigInt64Array.from(x, BigInt), shape);

async function step(ids, past, extra = []) {      // one pass: [{name: tensor}, the cache that has grown]
  const from = past ? past[0].dims[2] : 0, to = from + ids.length, feeds = {
    input_ids: whole(ids, [1, ids.length]), attention_mask: whole(new Array(to).fill(1), [1, to]),
    position_ids: whole(ids.map((_, i) => from + i), [1, ids.length]) };
  const held = session.inputNames.filter(name => name.startsWith("past_key_values."));
  const shape = [1, cfg.num_key_value_heads, 0, cfg.head_dim ?? cfg.hidden_size / cfg.num_attention_heads];
  held.forEach((name, i) => { feeds[name] = past ? past[i] : new ort.Tensor("float32", new Float32Array(0), shape); });
  const grown = held.map(name => name.replace("past_key_values", "present"));
  const out = await session.run(feeds, ["logits", ...grown, ...extra]);
  return [out, grown.map(name => out[name])];
}

function scores(logits) {                // log-probabilities behind the last token
  const V = logits.dims[2], row = logits.data.slice(-V);
  let top = -Infinity, sum = 0;
  for (const x of row) top = Math.max(top, x);
  for (const x of row) sum += Math.exp(x - top);
  const low = top + Math.log(sum);
  return row.map(x => x - low);
}

function best(logp, k) {                 // the ids of the k likeliest, the likeliest first
  const found = [];
  for (let i = 0; i < logp.length; i++) {
    if (found.length === k && logp[i] <= logp[found[k - 1]]) continue;
    let at = found.length;
    while (at && logp[found[at - 1]] < logp[i]) at--;
    found.splice(at, 0, i);
    if (found.length > k) found.pop();
  }
  return found;
}

function randoms(seed) {                 // numbers from 0 to 1; the same seed, the same numbers
  let s = Number.isFinite(seed) ? seed >>> 0 : crypto.getRandomValues(new Uint32Array(1))[0];
  return () => {
    s = s + 0x6d2b79f5 >>> 0;
    let t = Math.imul(s ^ s >>> 15, 1 | s);
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
    return ((t ^ t >>> 14) >>> 0) / 2 ** 32;
  };
}

function draw(logp, temperature, topP, random) {
  if (!temperature) return best(logp, 1)[0];
  const top = logp[best(logp, 1)[0]];
  let p = Array.from(logp, x => Math.exp((x - top) / temperature)), sum = p.reduce((a, b) => a + b);
  if (topP < 1) {                        // the likeliest that together reach top p
    let seen = 0;
    const kept = new Set();
    for (const i of [...p.keys()].sort((a, b) => p[b] - p[a])) {
      if (seen >= topP * sum) break;
      kept.add(i);
      seen += p[i];
    }
    p = p.map((x, i) => kept.has(i) ? x : 0);
    sum = seen;
  }
  let left = random() * sum, chosen = 0;
  for (let i = 0; i < p.length; i++) {
    if (!p[i]) continue;
    chosen = i;
    if ((left -= p[i]) < 0) break;
  }
  return chosen;
}

function fit(messages, room) {           // [ids, how many of the oldest messages were left out], as `fit_prompt` of 4.06
  const system = messages.filter((m, i) => i === 0 && m.role === "system"), turns = messages.slice(system.length), ctx = cfg.max_position_embeddings;
  let ids;
  for (let f = 0; f < turns.length; f += 2) {
    ids = tok.prompt([...system, ...turns.slice(f)]);
    if (ids.length + room <= ctx || (f === turns.length - 1 && ids.length < ctx)) return [ids, f];
  }
  throw new Error(`The message is too long: with it the prompt has ${ids.length} tokens, and the model's context is ${ctx}. Shorten it.`);
}

async function reply(id, body) {
  const ctx = cfg.max_position_embeddings, most = body.max_tokens ?? usual.max_new_tokens ?? 200, heat = body.temperature ?? usual.temperature ?? 0.8;
  const [prompt, forgotten] = fit(body.messages, Math.min(most, ctx >> 1)), random = randoms(body.seed), words = decoder();
  const token = (i, logp) => ({ id: i, token: tok.piece(i), logprob: Math.max(logp[i], -9999), ...(tok.marks.has(i) ? { mark: true } : {}) });
  const event = (content, rest = {}) => tell(id, { event: { choices: [{ delta: { content }, ...rest }] } });
  const begun = body.begun ?? [];
  tell(id, { event: { prompt, forgotten, begun: begun.map(i => words.decode(tok.bytes(i), { stream: true })).join(""), choices: [] } });
  if (prompt.length + begun.length >= ctx) return event("", { finish_reason: "length" });
  let [out, past] = await step([...prompt, ...begun]);
  for (let n = begun.length; ; n++) {
    await breathe();
    if (stopped.has(id)) return;
    if (n >= most || past[0].dims[2] >= ctx) return event(words.decode(), { finish_reason: "length" });
    const logp = scores(out.logits), i = draw(logp, heat, body.top_p ?? usual.top_p ?? 1, random);
    if (ends.has(i)) return event(words.decode(), { finish_reason: "stop" });
    event(words.decode(tok.bytes(i), { stream: true }),
      { logprobs: { content: [{ ...token(i, logp), top_logprobs: best(logp, 8).map(j => token(j, logp)) }] } });
    [out, past] = await step([i], past);
  }
}

async function attention(ids, at) {      // what each head looks at from place `at`, over the places up to it
  if (!shares.length) throw new Error("This model's file does not tell what its heads look at.");
  const long = looked?.ids.length >= ids.length && ids.every((x, i) => looked.ids[i] === x);
  if (!long) looked = { ids, out: (await step(ids, null, shares))[0] };
  const n = looked.ids.length;
  const layers = shares.map(name => {
    const { data, dims: [, heads] } = looked.out[name];
    return Array.from({ length: heads }, (_, h) => data.slice((h * n + at) * n, (h * n + at) * n + at + 1));
  });
  return { pieces: ids.slice(0, at + 1).map(i => tok.piece(i)), layers };
}

onmessage = ({ data }) => {
  const { id } = data;
  if (data.stop) return stopped.add(id);
  last = last.then(async () => {         // one thing after the other: the session does not do two at once
    try {
      if (stopped.has(id)) return tell(id, { done: null });
      const done = data.load ? await load(id) : data.reply ? await reply(id, data.reply) : await attention(data.ids, data.at);
      tell(id, { done: done ?? null });
    } catch (e) { tell(id, { wrong: e?.message ?? String(e) }); }
    stopped.delete(id);
  });
};
