// The chat page of tiny_llm. What a person types and a model writes becomes text nodes, never HTML.
"use strict";
const $ = id => document.getElementById(id);
const KEPT = "tiny_llm.chats", CHOSEN = "tiny_llm.settings", KEY = "tiny_llm.key";
const make = (tag, props = {}, ...inside) => {
  const e = Object.assign(document.createElement(tag), props);
  e.append(...inside);
  return e;
};

// What is kept: conversations, each a tree of messages (a message knows its parent) with a leaf; and settings.
const read = (name, other) => { try { return JSON.parse(localStorage.getItem(name)) ?? other; } catch { return other; } };
let chats = read(KEPT, []), settings = read(CHOSEN, {}), chat = null, running = null, mute = false;
if (!Array.isArray(chats)) chats = [];

function keep() {
  for (;;) {
    try { localStorage.setItem(KEPT, JSON.stringify(chats)); break; }
    catch { if (chats.length < 2) { say("This browser keeps no more; the conversation will be gone with the page.", true); break; } chats.pop(); }
  }
  try { localStorage.setItem(CHOSEN, JSON.stringify(settings)); } catch { /* said above */ }
}

// Without what steers a terminal into which it is pasted, or turns the order of letters round.
const printable = text => String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, "");

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

// The tree
const fresh = () => ({ id: crypto.randomUUID ? crypto.randomUUID() : String(Math.random()), title: "", messages: [], leaf: null });
const at = id => chat.messages.find(m => m.id === id);
const siblings = m => chat.messages.filter(o => o.parent === m.parent);
function line() {
  const found = [];
  for (let m = at(chat.leaf); m; m = at(m.parent)) found.unshift(m);
  return found;
}
function add(role, content, parent) {
  const m = { id: 1 + Math.max(0, ...chat.messages.map(o => o.id)), role, content, parent };
  chat.messages.push(m);
  chat.leaf = m.id;
  return m;
}
function lastBelow(m) {                  // the newest message that goes on from this one
  for (;;) {
    const next = chat.messages.filter(o => o.parent === m.id).pop();
    if (!next) return m;
    m = next;
  }
}

// A small renderer of Markdown: elements are made, words are put into them as text.
function inline(text, into) {
  const mark = /(`+)([^`]|[^`].*?[^`])\1(?!`)|\*\*(\S(?:.*?\S)?)\*\*|\*([^\s*](?:[^*]*[^\s*])?)\*/s;
  for (let m; (m = mark.exec(text)); text = text.slice(m.index + m[0].length)) {
    into.append(text.slice(0, m.index));
    if (m[1]) into.append(make("code", { textContent: m[2] }));
    else {
      const e = make(m[3] ? "strong" : "em");
      inline(m[3] || m[4], e);
      into.append(e);
    }
  }
  into.append(text);
}
function render(text, into) {
  into.replaceChildren();
  const lines = text.split("\n");
  let paragraph = [], list = null;
  const flush = () => {
    if (paragraph.length) { const p = make("p"); inline(paragraph.join("\n"), p); into.append(p); }
    paragraph = [];
  };
  for (let i = 0; i < lines.length; i++) {
    const l = lines[i], item = /^\s*(?:([-*+])|(\d{1,9})[.)])\s+(.*)/.exec(l), head = /^#{1,6}\s+(.*)/.exec(l);
    if (!item) list = null;
    if (/^\s*```/.test(l)) {
      flush();
      const code = [];
      while (++i < lines.length && !/^\s*```\s*$/.test(lines[i])) code.push(lines[i]);
      into.append(make("pre", { tabIndex: 0 }, make("code", { textContent: code.join("\n") })));
    } else if (item) {
      flush();
      const kind = item[1] ? "UL" : "OL";
      if (!list || list.tagName !== kind) {
        list = make(kind);
        if (kind === "OL") list.start = Number(item[2]);
        into.append(list);
      }
      const li = make("li");
      inline(item[3], li);
      list.append(li);
    } else if (head) { flush(); const h = make("h3"); inline(head[1], h); into.append(h); }
    else if (!l.trim()) flush();
    else paragraph.push(l);
  }
  flush();
}

// The X-ray: each token on a ground from blue (sure) to orange (unlikely); a click shows what else there was.
const percent = logprob => { const p = 100 * Math.exp(logprob); return p >= 99.95 ? "100%" : p >= 0.1 ? p.toFixed(1) + "%" : "< 0.1%"; };
const visible = t => t === "" ? "∅" : printable(t).replace(/\n/g, "⏎\n");
function ground(logprob) {
  const unlikely = Math.min(1, -logprob / 5), sure = [207, 230, 245], odd = [251, 190, 120];
  return `rgb(${sure.map((c, i) => Math.round(c + (odd[i] - c) * unlikely)).join(" ")})`;
}
function xray(m, into) {
  into.replaceChildren();
  const box = make("div", { className: "xray" }), table = make("table", { className: "others" }), looked = make("div", { className: "looked" });
  for (const [i, t] of (m.tokens || []).entries()) {
    const b = make("button", { type: "button", textContent: visible(t.token), title: percent(t.logprob) });
    b.setAttribute("aria-expanded", "false");
    b.setAttribute("aria-label", `${printable(t.token)}, ${percent(t.logprob)}`);
    b.style.background = ground(t.logprob);
    b.onclick = () => {
      for (const other of box.children) other.setAttribute("aria-expanded", String(other === b));
      table.replaceChildren(make("caption", { textContent: "What might have stood here" + (branches() ? "; choose one, and the reply goes on from it" : "") }));
      const rows = t.top_logprobs.some(o => o.token === t.token) ? t.top_logprobs : [...t.top_logprobs, t];
      for (const o of rows)
        table.append(make("tr", { className: o.token === t.token ? "chosen" : "" },
          make("td", {}, o.token === t.token || o.mark || !branches() ? visible(o.token) : onwards(m, i, o)), make("td", { textContent: percent(o.logprob) })));
      if (source.attention && !mute && m.prompt) look(m, i, looked);
      table.scrollIntoView({ block: "nearest" });
    };
    box.append(b);
  }
  into.append(box, make("div", { className: "beside" }, table, looked));
}
const branches = () => source.branches && !mute && !running;
function onwards(m, i, o) {              // a button: the reply again, up to token i, then this one, and on
  const b = make("button", { type: "button", textContent: visible(o.token), onclick: () => { if (!running) { $("text").focus(); answer(m.parent, [...m.tokens.slice(0, i), { ...m.tokens[i], ...o }], m.prompt); } } });
  b.setAttribute("aria-label", `Go on with ${o.token}`);
  return b;
}

// Attention: the text before a token, on a ground that is the darker the more a head took from there.
const shade = part => `rgb(${[244, 245, 247].map((c, i) => Math.round(c + ([255, 150, 40][i] - c) * Math.sqrt(part))).join(" ")})`;
const share = x => percent(Math.log(x));
async function look(m, i, into) {
  const asked = into.asked = {};
  let found;
  into.replaceChildren(make("p", { textContent: "Looking …" }));
  try { found = await source.attention([...m.prompt, ...m.tokens.map(t => t.id)], m.prompt.length + i - 1); }
  catch (e) { return into.replaceChildren(make("p", { textContent: e.message })); }
  if (into.asked !== asked) return;      // another token was clicked meanwhile
  const heads = found.layers.flatMap((layer, l) => layer.map((row, h) => ({ name: `layer ${l + 1}, head ${h + 1}`, row })));
  const mean = { name: "all heads, on average", row: found.pieces.map((_, k) => heads.reduce((sum, { row }) => sum + row[k], 0) / heads.length) };
  const all = [mean, ...heads], choice = make("select"), text = make("div", { className: "xray", role: "img" }), table = make("table", { className: "others" });
  const most = row => row.reduce((best, x, k) => x > row[best] ? k : best, 0);
  choice.append(...all.map(({ name, row }, n) => make("option", { value: n, textContent: `${name}: ${share(row[most(row)])} at “${visible(found.pieces[most(row)])}”` })));
  const draw = () => {
    const { name, row } = all[choice.value];
    settings.head = Number(choice.value);
    text.replaceChildren(...found.pieces.map((piece, k) => {
      const e = make("span", { textContent: visible(piece), title: share(row[k]) });
      e.style.background = shade(row[k]);
      return e;
    }));
    const first = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, 5).filter(k => row[k] > 0);
    text.setAttribute("aria-label", `The text before this token; ${name} took most from ${first.map(k => found.pieces[k]).join(", ")}`);
    table.replaceChildren(make("caption", { textContent: "It took most from" }), ...first.map(k => make("tr", {},
      make("td", { textContent: visible(found.pieces[k]) }), make("td", { textContent: share(row[k]) }), make("td", { textContent: `token ${k + 1}` }))));
  };
  choice.value = Math.min(settings.head || 0, all.length - 1);
  choice.onchange = () => { draw(); keep(); };
  into.replaceChildren(make("label", {}, "Where it looked before it wrote this: ", choice), text, table);
  draw();
}

// Showing
const action = (name, f, props = {}) => make("button", { type: "button", textContent: name, onclick: f, ...props });
function fill(m, bubble) {
  if (m.role === "user") bubble.textContent = printable(m.content);
  else if (m.seen && m.tokens?.length) xray(m, bubble);
  else render(printable(m.content), bubble);
}
function show(m) {
  const bubble = make("div", { className: "bubble" }), actions = make("div", { className: "actions" });
  fill(m, bubble);
  const busy = running !== null || mute, same = siblings(m), k = same.indexOf(m);
  if (same.length > 1) {
    const go = d => () => { chat.leaf = lastBelow(same[k + d]).id; keep(); draw(); };
    const before = action("‹", go(-1), { disabled: running !== null || k === 0 }), after = action("›", go(1), { disabled: running !== null || k === same.length - 1 });
    before.setAttribute("aria-label", "Version before");
    after.setAttribute("aria-label", "Version after");
    actions.append(before, `${k + 1}/${same.length}`, after);
  }
  actions.append(action("Copy", () => copy(printable(m.content))));
  if (m.role === "user") actions.append(action("Edit", () => edit(m, box), { disabled: busy }));
  else {
    actions.append(action("Regenerate", () => answer(m.parent), { disabled: busy }));
    const x = action("X-ray", () => { m.seen = !m.seen; draw(); [...document.querySelectorAll(".message")].find(e => e.dataset.id === String(m.id))?.querySelector("[aria-pressed]")?.focus(); },
      { disabled: running !== null || !m.tokens?.length });
    x.setAttribute("aria-pressed", String(!!m.seen));
    actions.append(x);
    if (m.note) actions.append(m.note);
  }
  const who = make("span", { className: "hidden", textContent: m.role === "user" ? "You: " : "Model: " });
  const box = make("article", { className: `message ${m.role}` }, who, bubble, actions);
  box.dataset.id = m.id;
  return box;
}
function draw() {
  const log = $("log"), low = log.scrollHeight - log.scrollTop - log.clientHeight < 60, shown = line();
  log.replaceChildren(...shown.map(show));
  if (!shown.length) {
    log.append(make("p", { className: "empty", textContent: source.about ?? "Say something to begin." }));
    if (source.examples?.length && !mute)
      log.append(make("p", { className: "examples" }, ...source.examples.map(t => action(t, () => { $("text").value = t; $("form").requestSubmit(); }))));
  }
  if (low || running) log.scrollTop = log.scrollHeight;
  $("list").replaceChildren(...chats.filter(c => c.messages.length).map(c => {
    const open = action(printable(c.title) || "…", () => { stop(); chat = c; menu(false); draw(); $("text").focus(); });
    if (c === chat) open.setAttribute("aria-current", "true");
    const gone = action("×", () => { if (c === chat) { stop(); chat = fresh(); } chats = chats.filter(o => o !== c); keep(); draw(); });
    gone.setAttribute("aria-label", `Delete ${printable(c.title)}`);
    return make("li", {}, open, gone);
  }));
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
}
async function copy(text) {
  try { await navigator.clipboard.writeText(text); say("Copied."); }
  catch { say("The browser does not let this page copy.", true); }
}
function edit(m, box) {
  const area = make("textarea", { value: m.content }), form = make("form", { className: "edit" }, area,
    make("div", { className: "row" }, action("Cancel", draw), make("button", { type: "submit", textContent: "Send" })));
  area.setAttribute("aria-label", "Edit your message");
  area.onkeydown = e => { if (e.key === "Escape") { e.stopPropagation(); draw(); } else enter(e, form); };
  form.onsubmit = e => {
    e.preventDefault();
    if (area.value.trim()) answer(add("user", area.value.trim(), m.parent).id);
  };
  box.replaceChildren(form);
  area.focus();
}

// Talking
function enter(e, form) {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); form.requestSubmit(); }
}
function heads() {
  const key = sessionStorage.getItem(KEY);
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}
async function* events(response) {       // the objects of a stream of server-sent events
  const decoder = new TextDecoder(), reader = response.body.getReader();
  for (let text = ""; ;) {
    const { value, done } = await reader.read();
    text += decoder.decode(value, { stream: !done });
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts)
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    if (done) return;
  }
}
async function ask(body, signal) {       // the response of the server, however often it must be asked
  for (let again = 0; ; again++) {
    const r = await fetch("/v1/chat/completions", { method: "POST", headers: heads(), body: JSON.stringify(body), signal });
    if (r.ok) return r;
    const error = (await r.json().catch(() => ({}))).error || { message: `The server answers ${r.status}.` };
    if (r.status !== 429 || again === 3) throw Object.assign(new Error(error.message), { status: r.status });
    const wait = Number(r.headers.get("retry-after")) || 2;
    say(`Many are asking; trying again in ${wait} s.`);
    await new Promise((go, no) => { setTimeout(go, 1000 * wait); signal.addEventListener("abort", () => no(signal.reason)); });
  }
}
// Where replies come from: the server of this page, or what a script before this one has made (nbs/_tools/talk/talk.js: a model in the browser).
const server = {
  async models() {
    const r = await fetch("/v1/models", { headers: heads() });
    if (r.status === 401) { open(); throw new Error("This server needs an API key."); }
    return (await r.json()).data;
  },
  async *reply(body, signal) { yield* events(await ask(body, signal)); },
};
const source = window.source ?? server;
function stop() { running?.abort(); }
async function answer(parent, begun = [], prompt) {      // begun: tokens that the reply begins with
  if (running || mute) return;
  chat.leaf = parent;
  const mine = chat, own = new AbortController(), said = line(), m = add("assistant", "", parent), began = performance.now();
  running = own;
  m.tokens = [...begun];
  m.content = begun.map(t => t.token).join("");
  m.prompt = prompt;
  m.seen = begun.length > 0;
  const body = { model: $("model").value || undefined, stream: true, stream_options: { include_usage: true }, logprobs: true, top_logprobs: 5,
    truncation: "auto", messages: said.map(({ role, content }) => ({ role, content })) };
  if (begun.length) body.begun = begun.map(t => t.id);
  if (settings.system) body.messages.unshift({ role: "system", content: settings.system });
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) if (Number.isFinite(settings[name])) body[name] = settings[name];
  keep(); draw(); say("Writing …");
  let waiting = false;
  const update = () => {
    waiting = false;
    const box = [...document.querySelectorAll(".message")].find(e => e.dataset.id === String(m.id));
    if (!box || chat !== mine) return;
    const log = $("log"), low = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    fill(m, box.querySelector(".bubble"));
    if (low) log.scrollTop = log.scrollHeight;
  };
  try {
    let reason = null, forgotten = 0;
    for await (const e of source.reply(body, own.signal)) {
      if (e.error) throw new Error(e.error.message);
      forgotten = e.forgotten || forgotten;
      m.prompt = e.prompt || m.prompt;
      m.content = e.begun ?? m.content;
      const c = e.choices[0];
      if (!c) continue;
      m.content += c.delta.content || "";
      m.tokens.push(...(c.logprobs?.content || []));
      reason = c.finish_reason || reason;
      if (!waiting) { waiting = true; requestAnimationFrame(update); }
    }
    const speed = (m.tokens.length - begun.length) / (performance.now() - began) * 1000;
    m.note = `${m.tokens.length} tokens, ${speed.toFixed(0)} tokens/s` + (reason === "length" ? ", ended at the longest length" : "");
    say(forgotten ? `The context is full: the oldest ${forgotten} messages are forgotten.` : "");
  } catch (e) {
    if (own.signal.aborted) { m.note = "stopped"; say("Stopped."); }
    else {
      m.note = "broken off";
      say(e instanceof TypeError ? "The server does not answer." : e.message, true);
      if (e.status === 401) open();
      if (!m.content) { mine.messages = mine.messages.filter(o => o !== m); mine.leaf = parent; }
    }
  } finally {
    if (running === own) running = null;
    keep(); draw();
  }
}
$("form").onsubmit = e => {
  e.preventDefault();
  const text = $("text").value.trim();
  if (!text || running || mute) return;
  if (!chats.includes(chat)) chats.unshift(chat);
  chat.title = chat.title || text.slice(0, 60);
  $("text").value = "";
  grow();
  answer(add("user", text, chat.leaf).id);
};
const grow = () => { $("text").style.height = "auto"; $("text").style.height = `${$("text").scrollHeight + 2}px`; };
$("text").oninput = grow;
$("text").onkeydown = e => enter(e, $("form"));
$("stop").onclick = () => { stop(); $("text").focus(); };
document.addEventListener("keydown", e => {
  if (e.key !== "Escape" || $("dialog").open) return;
  if ($("chats").classList.contains("open")) { menu(false); $("menu").focus(); } else stop();
});

// Around it
function menu(open) {
  $("chats").classList.toggle("open", open);
  $("menu").setAttribute("aria-expanded", String(open));
}
$("menu").onclick = () => menu(!$("chats").classList.contains("open"));
$("new").onclick = () => { stop(); chat = fresh(); menu(false); say(""); draw(); $("text").focus(); };
function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").setAttribute("aria-pressed", String(dark));
}
$("theme").onclick = () => { settings.dark = document.documentElement.dataset.theme !== "dark"; theme(settings.dark); keep(); };
const fields = $("fields");
function open() {
  for (const name of ["system", "temperature", "top_p", "max_tokens", "seed"]) fields.elements[name].value = settings[name] ?? "";
  if (fields.elements.key) fields.elements.key.value = sessionStorage.getItem(KEY) ?? "";
  if (!$("dialog").open) $("dialog").showModal();
}
$("settings").onclick = open;
$("dialog").onclose = () => {
  settings.system = fields.elements.system.value.trim() || undefined;
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    const x = fields.elements[name];
    settings[name] = x.value === "" || !x.validity.valid ? undefined : Number(x.value);
  }
  const key = fields.elements.key?.value;
  if (key !== undefined && key !== (sessionStorage.getItem(KEY) ?? "")) { sessionStorage.setItem(KEY, key); list(); }
  keep();
};
$("forget").onclick = () => {
  if (!confirm("Delete all conversations of this browser?")) return;
  stop(); chats = []; chat = fresh(); keep(); draw();
};
async function list() {
  try {
    const models = await source.models(say);
    $("model").replaceChildren(...models.map(m => make("option", { value: m.id, textContent: m.id })));
    if (models.some(m => m.id === settings.model)) $("model").value = settings.model;
    say(running ? "Writing …" : "");
    if (!chat.messages.length) draw();
  } catch (e) {
    say(e instanceof TypeError || e instanceof SyntaxError ? "The server does not answer." : e.message, true);
    if (source === server) return;
    mute = true;                         // no reply can be had: what was recorded is shown, what was kept can be read
    for (const name of ["text", "send"]) $(name).disabled = true;
    $("model").hidden = true;
    if (e.recorded) chat = e.recorded;
    draw();
  }
}
$("model").onchange = () => { settings.model = $("model").value; keep(); };

theme(settings.dark ?? matchMedia("(prefers-color-scheme: dark)").matches);
if (source !== server) for (const e of document.querySelectorAll(".of-server")) e.remove();
for (const c of chats) for (const m of c.messages || []) m.seen = false;
chats = chats.filter(c => Array.isArray(c.messages) && c.messages.length);
chat = chats[0] || fresh();
list();
draw();
$("text").focus();
