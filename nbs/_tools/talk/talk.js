// The page Talk to it: replies come from a worker of this browser instead of a server. chat.js, which stands behind this file, draws them.
"use strict";
window.source = (() => {
  let worker = null, ready = null, count = 0;
  const waiting = new Map();             // number of a question -> what to do with its answers

  function ask(question, heard = () => {}) {
    const id = ++count;
    const answer = new Promise((go, no) => waiting.set(id, { go, no, heard }));
    worker.postMessage({ id, ...question });
    return Object.assign(answer.finally(() => waiting.delete(id)), { id });
  }

  function open() {
    worker = new Worker("worker.js", { type: "module" });
    worker.onmessage = ({ data }) => {
      const { go, no, heard } = waiting.get(data.id) ?? {};
      if (!go) return;
      if ("done" in data) go(data.done);
      else if ("wrong" in data) no(new Error(data.wrong));
      else heard(data);
    };
    worker.onerror = e => {
      e.preventDefault();
      for (const { no } of waiting.values()) no(new Error(e.message || "its program could not be loaded"));
    };
  }

  const mb = bytes => (bytes / 1e6).toFixed(1);
  async function load(say) {
    const about = await (await fetch("talk.json")).json();
    Object.assign(source, { about: about.about, examples: about.examples });
    if (typeof WebAssembly !== "object") throw new Error("this browser has no WebAssembly");
    say(`Loading the model: ${mb(about.bytes)} MB …`);
    open();
    await ask({ load: true }, ({ came }) => say(came < about.bytes ? `Loading the model: ${mb(came)} of ${mb(about.bytes)} MB …` : "Starting the model …"));
    return [{ id: about.name }];
  }

  const source = {
    branches: true,                      // a reply can go on from another token

    async models(say) {
      try { return await (ready = load(say)); }
      catch (e) {
        const recorded = await fetch("recorded.json").then(r => r.json()).catch(() => null);
        const why = `The model does not run here: ${e.message}.`;
        throw Object.assign(new Error(recorded ? `${why} What you see was recorded; nothing can be sent.` : `${why} Serve this folder (python -m http.server) and reload.`), { recorded });
      }
    },

    async *reply(body, signal) {         // objects as of a server's stream
      await ready;
      const events = [];
      let wake = () => {}, over = false, wrong = null;
      const answer = ask({ reply: body }, ({ event }) => { events.push(event); wake(); });
      answer.then(() => {}, e => { wrong = e; }).finally(() => { over = true; wake(); });
      const stop = () => { worker.postMessage({ id: answer.id, stop: true }); over = true; wake(); };
      signal.addEventListener("abort", stop);
      try {
        for (;;) {
          while (events.length && !signal.aborted) yield events.shift();
          if (signal.aborted) throw signal.reason;
          if (wrong) throw wrong;
          if (over) return;
          await new Promise(go => { wake = go; });
        }
      } finally { signal.removeEventListener("abort", stop); }
    },

    async attention(ids, at) { await ready; return ask({ ids, at }); },
  };
  return source;
})();
