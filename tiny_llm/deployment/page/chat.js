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
let chats = read(KEPT, []), settings = read(CHOSEN, {}), chat = null, running = null, models = [];
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
  const box = make("div", { className: "xray" }), table = make("table", { className: "others" });
  for (const t of m.tokens || []) {
    const b = make("button", { type: "button", textContent: visible(t.token), title: percent(t.logprob) });
    b.setAttribute("aria-expanded", "false");
    b.setAttribute("aria-label", `${printable(t.token)}, ${percent(t.logprob)}`);
    b.style.background = ground(t.logprob);
    b.onclick = () => {
      for (const other of box.children) other.setAttribute("aria-expanded", String(other === b));
      table.replaceChildren(make("caption", { textContent: "What might have stood here" }));
      const rows = t.top_logprobs.some(o => o.token === t.token) ? t.top_logprobs : [...t.top_logprobs, t];
      for (const o of rows)
        table.append(make("tr", { className: o.token === t.token ? "chosen" : "" },
          make("td", { textContent: visible(o.token) }), make("td", { textContent: percent(o.logprob) })));
    };
    box.append(b);
  }
  into.append(box, table);
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
  const busy = running !== null, same = siblings(m), k = same.indexOf(m);
  if (same.length > 1) {
    const go = d => () => { chat.leaf = lastBelow(same[k + d]).id; keep(); draw(); };
    const before = action("‹", go(-1), { disabled: busy || k === 0 }), after = action("›", go(1), { disabled: busy || k === same.length - 1 });
    before.setAttribute("aria-label", "Version before");
    after.setAttribute("aria-label", "Version after");
    actions.append(before, `${k + 1}/${same.length}`, after);
  }
  actions.append(action("Copy", () => copy(printable(m.content))));
  if (m.role === "user") actions.append(action("Edit", () => edit(m, box), { disabled: busy }));
  else {
    actions.append(action("Regenerate", () => answer(m.parent), { disabled: busy }));
    const x = action("X-ray", () => { m.seen = !m.seen; draw(); [...document.querySelectorAll(".message")].find(e => e.dataset.id === String(m.id))?.querySelector("[aria-pressed]")?.focus(); },
      { disabled: busy || !m.tokens?.length });
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
  if (!shown.length) log.append(make("p", { className: "empty", textContent: "Say something to begin." }));
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
async function ask(body, signal) {
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
function stop() { running?.abort(); }
async function answer(parent) {
  if (running) return;
  chat.leaf = parent;
  const mine = chat, own = new AbortController(), said = line(), m = add("assistant", "", parent), began = performance.now();
  running = own;
  m.tokens = [];
  m.seen = false;
  const body = { model: $("model").value || undefined, stream: true, stream_options: { include_usage: true }, logprobs: true, top_logprobs: 5,
    truncation: "auto", messages: said.map(({ role, content }) => ({ role, content })) };
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
    for await (const e of events(await ask(body, own.signal))) {
      if (e.error) throw new Error(e.error.message);
      forgotten = e.forgotten || forgotten;
      const c = e.choices[0];
      if (!c) continue;
      m.content += c.delta.content || "";
      m.tokens.push(...(c.logprobs?.content || []));
      reason = c.finish_reason || reason;
      if (!waiting) { waiting = true; requestAnimationFrame(update); }
    }
    const speed = m.tokens.length / (performance.now() - began) * 1000;
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
  if (!text || running) return;
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
  fields.elements.key.value = sessionStorage.getItem(KEY) ?? "";
  if (!$("dialog").open) $("dialog").showModal();
}
$("settings").onclick = open;
$("dialog").onclose = () => {
  settings.system = fields.elements.system.value.trim() || undefined;
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    const x = fields.elements[name];
    settings[name] = x.value === "" || !x.validity.valid ? undefined : Number(x.value);
  }
  const key = fields.elements.key.value;
  if (key !== (sessionStorage.getItem(KEY) ?? "")) { sessionStorage.setItem(KEY, key); list(); }
  keep();
};
$("forget").onclick = () => {
  if (!confirm("Delete all conversations of this browser?")) return;
  stop(); chats = []; chat = fresh(); keep(); draw();
};
async function list() {
  try {
    const r = await fetch("/v1/models", { headers: heads() });
    if (r.status === 401) { say("This server needs an API key.", true); return open(); }
    models = (await r.json()).data;
    $("model").replaceChildren(...models.map(m => make("option", { value: m.id, textContent: m.id })));
    if (models.some(m => m.id === settings.model)) $("model").value = settings.model;
    say("");
  } catch { say("The server does not answer.", true); }
}
$("model").onchange = () => { settings.model = $("model").value; keep(); };

theme(settings.dark ?? matchMedia("(prefers-color-scheme: dark)").matches);
for (const c of chats) for (const m of c.messages || []) m.seen = false;
chats = chats.filter(c => Array.isArray(c.messages) && c.messages.length);
chat = chats[0] || fresh();
list();
draw();
$("text").focus();
