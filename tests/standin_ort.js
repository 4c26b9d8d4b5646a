// Stands in for onnxruntime-web in tests/test_site_talk.py: the same calls, a "model" whose words are known. Its weights are the file ort.wasm: a JSON of
// {links: {id: [the next, another]}, layers, heads, kv, dim, rows, wait}. Keys hold the ids of the text, so that a cache that is lost, doubled or swapped is noticed.
export const env = { wasm: {} };

export class Tensor {
  constructor(type, data, dims) {
    if (data.length !== dims.reduce((a, b) => a * b, 1)) throw new Error(`${data.length} numbers for ${dims}`);
    Object.assign(this, { type, data, dims });
  }
}

const same = (a, b, what) => { if (JSON.stringify(a) !== JSON.stringify(b)) throw new Error(`${what}: ${JSON.stringify(a)} instead of ${JSON.stringify(b)}`); };
const numbers = tensor => Array.from(tensor.data, Number);

const runs = new BroadcastChannel("runs");

export class InferenceSession {
  static async create(graph, options) {
    same(env.wasm.numThreads, 1, "threads");
    same(options.executionProviders, ["wasm"], "providers");
    if (graph.length < 1000) throw new Error("the graph is empty");
    const session = new InferenceSession(), it = session.it = JSON.parse(new TextDecoder().decode(env.wasm.wasmBinary));
    const cache = kind => Array.from({ length: it.layers }, (_, i) => ["key", "value"].map(name => `${kind}.${i}.${name}`)).flat();
    session.inputNames = ["input_ids", "attention_mask", "position_ids", ...cache("past_key_values")];
    session.outputNames = ["logits", ...cache("present"), ...Array.from({ length: it.layers }, (_, i) => `attentions.${i}`)];
    return session;
  }

  async run(feeds, wanted) {
    const { links, layers, heads, kv, dim, rows, wait } = this.it;
    await new Promise(go => setTimeout(go, wait));
    runs.postMessage(1);
    same(Object.keys(feeds).sort(), [...this.inputNames].sort(), "inputs");
    const ids = numbers(feeds.input_ids), T = ids.length, out = {};
    let all = null;
    for (let i = 0; i < layers; i++)
      for (const name of ["key", "value"]) {
        const { data, dims } = feeds[`past_key_values.${i}.${name}`], S = dims[2];
        same(dims, [1, kv, S, dim], "the cache's shape");
        const held = Array.from({ length: S }, (_, s) => data[s * dim] - i - (name === "value" ? 0.5 : 0));
        if (all) same(held, all, "the cache");
        all = held;
        const grown = new Float32Array(kv * (S + T) * dim);
        [...held, ...ids].forEach((id, s) => { grown[s * dim] = id + i + (name === "value" ? 0.5 : 0); });
        out[`present.${i}.${name}`] = new Tensor("float32", grown, [1, kv, S + T, dim]);
      }
    const text = [...all, ...ids], n = text.length;
    same(numbers(feeds.attention_mask), new Array(n).fill(1), "the mask");
    same(numbers(feeds.position_ids), ids.map((_, t) => all.length + t), "the positions");
    same([feeds.input_ids.type, feeds.input_ids.dims], ["int64", [1, T]], "the ids");
    if (text[0] !== 0) throw new Error("the text does not begin with its first mark");
    const logits = new Float32Array(T * rows);
    ids.forEach((id, t) => (links[id] ?? []).forEach((next, k) => { logits[t * rows + next] = 8 - 1.5 * k; }));
    out.logits = new Tensor("float32", logits, [1, T, rows]);
    for (let i = 0; i < layers; i++) {   // head h of layer i looks h + heads * i places back: 3/4 there, the rest at the beginning
      const shares = new Float32Array(heads * T * n);
      for (let h = 0; h < heads; h++)
        for (let t = 0; t < T; t++) {
          const row = (h * T + t) * n, back = all.length + t - h - heads * i;
          shares[row] += 0.25;
          shares[row + Math.max(0, back)] += 0.75;
        }
      out[`attentions.${i}`] = new Tensor("float32", shares, [1, heads, T, n]);
    }
    for (const name of wanted) if (!out[name]) throw new Error(`there is no output ${name}`);
    return Object.fromEntries(wanted.map(name => [name, out[name]]));
  }
}
