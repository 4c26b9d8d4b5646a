// A byte-level BPE tokenizer of tiny_llm (2.04 tokenizer), read from its tokenizer.json. Typed text never becomes a mark: it is cut into pieces, and marks are no pieces.
"use strict";

// The pattern of 2.04 in JavaScript's words: \s there is White_Space, (?i:s) knows the long s.
const WHITE = "\\p{White_Space}", WORD = "\\p{L}\\p{M}", NAMED = `\\r\\n${WORD}\\p{N}`;
export const PATTERN = new RegExp([
  "'(?:[sdmtSDMT\\u017f]|[lL]{2}|[vV][eE]|[rR][eE])", `[^${NAMED}]?[${WORD}]+`, "\\p{N}", ` ?[^${WHITE}${WORD}\\p{N}]+[\\r\\n]*`,
  `${WHITE}*[\\r\\n]+`, `${WHITE}+(?!\\P{White_Space})`, `${WHITE}+`].join("|"), "gu");

// Each byte has a letter, as in every byte-level vocabulary: visible ones stand for themselves, the others follow from 256 on.
const LETTERS = [], BYTES = new Map();
for (let b = 0, next = 256; b < 256; b++) {
  const seen = (b > 32 && b < 127) || (b > 160 && b < 256 && b !== 173);
  LETTERS.push(String.fromCharCode(seen ? b : next++));
  BYTES.set(LETTERS[b], b);
}

// A decoder that keeps every character; a mark of byte order is one of them.
export const decoder = () => new TextDecoder("utf-8", { ignoreBOM: true });

export class Tokenizer {
  constructor(file) {                    // the object in a tokenizer.json
    this.ids = new Map(Object.entries(file.model.vocab));
    this.names = new Map([...this.ids].map(([name, id]) => [id, name]));
    this.ranks = new Map(file.model.merges.map((pair, rank) => [typeof pair === "string" ? pair : pair.join(" "), rank]));
    this.marks = new Map(file.added_tokens.map(t => [t.id, t.content]));
    for (const [id, name] of this.marks) { this.names.set(id, name); this.ids.set(name, id); }
    this.encoder = new TextEncoder();
    this.known = new Map();
  }

  chunk(text) {                          // the ids of one chunk: the pair that was learnt first is merged first
    let parts = Array.from(this.encoder.encode(text), b => LETTERS[b]);
    for (;;) {
      let best = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) best = Math.min(best, this.ranks.get(parts[i] + " " + parts[i + 1]) ?? Infinity);
      if (best === Infinity) return parts.map(p => this.ids.get(p));
      const next = [];
      for (let i = 0; i < parts.length; i++)
        if (i + 1 < parts.length && this.ranks.get(parts[i] + " " + parts[i + 1]) === best) next.push(parts[i] + parts[++i]);
        else next.push(parts[i]);
      parts = next;
    }
  }

  encode(text) {
    const found = [];
    for (const [chunk] of text.matchAll(PATTERN)) {
      let ids = this.known.get(chunk);
      if (!ids) {
        ids = this.chunk(chunk);
        if (this.known.size < 20000) this.known.set(chunk, ids);
      }
      for (const id of ids) found.push(id);
    }
    return found;
  }

  bytes(id) {                            // of a piece; none for a mark or an id without a name
    const name = this.marks.has(id) ? "" : this.names.get(id) ?? "";
    return Uint8Array.from(name, letter => BYTES.get(letter));
  }

  piece(id) {                            // how a token is shown
    if (this.marks.has(id)) return this.marks.get(id);
    const bytes = this.bytes(id), text = decoder().decode(bytes);
    return text.includes("\ufffd") ? Array.from(bytes, b => `\\x${b.toString(16).padStart(2, "0")}`).join("") : text;
  }

  // A conversation as the chat template of 2.04 writes it: a mark, what is said, the end; then the mark of the reply.
  prompt(messages) {
    const mark = name => this.ids.get(`<|${name}|>`);
    const turns = messages.flatMap(m => [mark(m.role), ...this.encode(m.content.replaceAll("<|", "< |")), mark("end")]);
    return [mark("endoftext"), ...turns, mark("assistant")];
  }
}
