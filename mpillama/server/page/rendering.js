// Answers in Markdown, as the server renders them: while a text grows only its end is rendered anew, and on the page
// only what has changed is changed, so that a selection or a table that was scrolled stays.

import { copyButton, el, find } from "./dom.js";
import { rendered } from "./server.js";

const PAUSE = 60; // milliseconds between two looks at a growing text
const MOST_TEXTS = 50; // of one request, as the server has it
const MOST_CHARACTERS = 200_000;

/** Shows a text that may grow. */
export class RenderedText {
  constructor(root) {
    this.root = root;
    this.blocks = [];
    this.shown = null;
    this.wanted = null;
    this.working = null;
  }

  /** Show `text`, soon; while it is `growing` it must begin with what was shown before. Resolves when it is shown. */
  update(text, growing) {
    const last = this.wanted ?? this.shown;
    if (last?.text === text && last.growing === growing) return this.working ?? Promise.resolve();
    this.wanted = { text, growing };
    return (this.working ??= this.#work().finally(() => (this.working = null)));
  }

  async #work() {
    while (this.wanted) {
      this.shown = this.wanted;
      this.wanted = null;
      await this.#render(this.shown);
      if (this.shown.growing) await new Promise((done) => setTimeout(done, PAUSE));
    }
  }

  async #render({ text, growing }) {
    const lines = text.split(/\r\n?|\n/);
    // A line that is not whole yet can change the last block, and join it to the one before; nothing further back.
    const kept = growing ? Math.max(0, this.blocks.length - 2) : 0;
    const from = kept ? this.blocks[kept].line : 0;
    const found = text ? await blocksOf(lines.slice(from).join("\n"), growing) : [];
    this.root.classList.toggle("plain", !found);
    if (!found) this.#showPlain(text);
    else if (!this.blocks.length) this.root.replaceChildren();
    found?.forEach(({ line, html }, i) => this.#show(kept + i, line + from, html));
    for (const gone of this.blocks.splice(kept + (found?.length ?? 0))) gone.node.remove();
  }

  #show(index, line, html) {
    const old = this.blocks[index];
    this.blocks[index] = { line, html, node: old?.node };
    if (old?.html === html) return;
    const fresh = nodeOf(html);
    this.blocks[index].node = old ? changed(old.node, fresh) : fresh;
    if (!old) this.root.append(fresh);
  }

  /** As it is written, until the server can render it. */
  #showPlain(text) {
    this.blocks = [];
    this.root.textContent = text;
    unrendered.add(this);
  }

  /** Try again. */
  again() {
    const { text, growing } = this.wanted ?? this.shown;
    this.shown = null;
    return this.update(text, growing);
  }
}

const unrendered = new Set();

/** Render what could not be rendered before; those that are no longer on the page are forgotten. */
export function renderAgain() {
  const texts = [...unrendered].filter((text) => text.root.isConnected);
  unrendered.clear();
  return Promise.all(texts.map((text) => text.again()));
}

let queue = [];
let asking = false;

/** The blocks of a text, or null if the server cannot render it; texts of one moment go in one request. */
function blocksOf(text, growing) {
  if (text.length > MOST_CHARACTERS) return Promise.resolve(null);
  return new Promise((resolve) => {
    queue.push({ text, growing, resolve });
    if (!asking) askAll();
  });
}

async function askAll() {
  asking = true;
  await null; // whatever else is wanted in this moment
  while (queue.length) {
    const batch = nextBatch();
    const found = await rendered(batch.map(({ text, growing }) => ({ text, growing })));
    batch.forEach(({ resolve }, i) => resolve(found?.[i] ?? null));
  }
  asking = false;
}

function nextBatch() {
  const batch = [];
  let characters = 0;
  while (queue.length && batch.length < MOST_TEXTS) {
    characters += queue[0].text.length;
    if (batch.length && characters > MOST_CHARACTERS) break;
    batch.push(queue.shift());
  }
  return batch;
}

/** A block's element. Its HTML is the server's, which lets nothing through that could run (serve/render/safety.py). */
function nodeOf(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  const node = template.content.firstElementChild ?? el("div");
  for (const bar of template.content.querySelectorAll(".code > .bar")) {
    const button = copyButton("Copy code", () => find("code", button.closest(".code")).textContent);
    bar.append(button);
  }
  return node;
}

/** Make `old` what `fresh` is, and return what is on the page then: `old`, if it is of the same kind. */
function changed(old, fresh) {
  if (old.nodeName !== fresh.nodeName || old.className !== fresh.className) {
    old.replaceWith(fresh);
    return fresh;
  }
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return old;
  }
  if (old.nodeName === "BUTTON") return old;
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const parts = [...fresh.childNodes];
  for (const gone of [...old.childNodes].slice(parts.length)) gone.remove();
  parts.forEach((part, i) => (old.childNodes[i] ? changed(old.childNodes[i], part) : old.append(part)));
  return old;
}
