// Markdown as models write it, to DOM nodes: a document is a list of blocks, each of which can make its node.

import { copyButton, el } from "./dom.js";
import { appendInline } from "./inline.js";

const MAX_DEPTH = 8;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const QUOTE = /^ {0,3}> ?/;
const FENCE = /^( *)(`{3,}|~{3,})([^`]*)$/;
const ITEM = /^[ \t]*([-*+]|(\d{1,9})[.)])(?:[ \t]+(.*))?$/;

/** Shows a text that grows: only the blocks that changed are made again. */
export class Markdown {
  constructor(root) {
    this.root = root;
    this.blocks = [];
  }

  /** Show `text`; while it is `growing` it must begin with what was shown before. */
  update(text, growing) {
    const whole = text.replaceAll("\r\n", "\n");
    // A line that is not whole yet can change the last block, and join it to the one before; nothing further back.
    const kept = growing ? Math.max(0, this.blocks.length - 2) : 0;
    const from = kept ? this.blocks[kept].from : 0;
    const blocks = topBlocks(whole.slice(from), from);
    blocks.forEach((block, i) => this.#show(block, kept + i, growing && i === blocks.length - 1));
    for (const gone of this.blocks.splice(kept + blocks.length)) gone.node.remove();
  }

  #show(block, index, growing) {
    const old = this.blocks[index];
    this.blocks[index] = { ...block, growing };
    if (old?.source === block.source && old.growing === growing) {
      this.blocks[index].node = old.node;
    } else if (old?.code !== undefined && block.code !== undefined && old.language === block.language) {
      // The same nodes, so that a selection and the way the code was scrolled stay.
      this.blocks[index].node = old.node;
      old.node.querySelector("code").textContent = block.code;
    } else {
      this.blocks[index].node = block.make(growing);
      if (old) old.node.replaceWith(this.blocks[index].node);
      else this.root.append(this.blocks[index].node);
    }
  }
}

/** The blocks of a text, with their source and where it begins. */
function topBlocks(text, from) {
  const lines = text.split("\n");
  const starts = [from];
  for (const line of lines) starts.push(starts.at(-1) + line.length + 1);
  return split(lines, 0).map((block) => ({
    ...block,
    from: starts[block.first],
    source: lines.slice(block.first, block.end).join("\n"),
  }));
}

/** The blocks of lines: {first, end, make}, `end` being the line behind the block. */
function split(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const block = depth < MAX_DEPTH ? blockAt(lines, at, depth) : paragraph(lines, at);
    blocks.push({ ...block, first: at });
    at = block.end;
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  return (
    fence(lines, at) ??
    heading(lines, at) ??
    rule(lines, at) ??
    quote(lines, at, depth) ??
    list(lines, at, depth) ??
    table(lines, at) ??
    paragraph(lines, at)
  );
}

/** Whether a line begins another block even without an empty line before it. */
function interrupts(line) {
  const item = ITEM.exec(line);
  const begins = item && item[3] && (!item[2] || item[2] === "1");
  return begins || [FENCE, HEADING, RULE, QUOTE].some((pattern) => pattern.test(line));
}

function fence(lines, at) {
  const open = FENCE.exec(lines[at]);
  if (!open) return null;
  const [, indent, mark, info] = open;
  const closes = (line) => line.trim().length >= mark.length && line.trim() === mark[0].repeat(line.trim().length);
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).map((line) => unindent(line, indent.length)).join("\n");
  const language = info.trim().split(/\s/)[0];
  return { end: Math.min(end + 1, lines.length), code, language, make: () => codeBlock(code, language) };
}

function codeBlock(text, language) {
  const code = el("code", {}, text);
  const button = copyButton("Copy code", () => code.textContent);
  const bar = el("div", { class: "bar" }, el("span", {}, language || "text"), button);
  return el("div", { class: "code" }, bar, el("pre", { tabindex: "0", role: "region", "aria-label": "Code" }, code));
}

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  if (!found) return null;
  // The page has h1, and each message an h2.
  const tag = `h${Math.min(6, found[1].length + 2)}`;
  const text = (found[2] ?? "").trim().replace(/ #+$/, "");
  return { end: at + 1, make: (growing) => withText(tag, text, growing) };
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? { end: at + 1, make: () => el("hr") } : null;
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  if (end === at) return null;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return { end, make: (growing) => withBlocks("blockquote", {}, inner, depth, growing) };
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  if (!first) return null;
  const ordered = first[2] !== undefined;
  const outer = indentOf(lines[at]);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const found = ITEM.exec(lines[end]);
    const same = found && (found[2] !== undefined) === ordered && !RULE.test(lines[end]);
    if (!same || indentOf(lines[end]) < outer) break;
    const begin = end;
    for (end += 1; end < lines.length && belongs(lines, end, outer); ) end += 1;
    const rest = lines.slice(begin + 1, end);
    // Many indent what is in an item by less than its marker's width: the first such line sets the measure.
    const inner = rest.filter((line) => line.trim()).map(indentOf).find((width) => width > outer + 1) ?? 0;
    const width = Math.min(inner, indentOf(lines[begin]) + found[1].length + 1);
    items.push([found[3] ?? "", ...rest.map((line) => unindent(line, width))]);
  }
  const start = ordered && first[2] !== "1" ? Number(first[2]) : null;
  const make = (growing) => {
    const entries = items.map((item, i) => withBlocks("li", {}, item, depth, growing && i === items.length - 1));
    return el(ordered ? "ol" : "ul", { start }, ...entries);
  };
  return { end, make };
}

/** Whether a line goes on with the item before it: empty, indented, or the rest of a paragraph. */
function belongs(lines, at, outer) {
  const line = lines[at];
  if (!line.trim() || indentOf(line) > outer + 1) return true;
  return Boolean(lines[at - 1].trim()) && !ITEM.test(line) && !interrupts(line);
}

function table(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length) return null;
  const head = cells(lines[at]);
  const marks = cells(lines[at + 1]);
  if (marks.length !== head.length || !marks.every((mark) => /^:?-+:?$/.test(mark))) return null;
  const sides = marks.map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "middle" : "end") : null));
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && !interrupts(lines[end])) end += 1;
  const cell = (tag, texts, i) => withText(tag, texts[i] ?? "", false, { class: sides[i] });
  const row = (tag, texts) => el("tr", {}, ...head.map((_, i) => cell(tag, texts, i)));
  const make = () => {
    const body = lines.slice(at + 2, end).map((line) => row("td", cells(line)));
    const whole = el("table", {}, el("thead", {}, row("th", head)), el("tbody", {}, ...body));
    return el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, whole);
  };
  return { end, make };
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines[end]) && !table(lines, end)) end += 1;
  const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
  return { end, make: (growing) => withText("p", text, growing) };
}

function withText(tag, text, growing, attributes = {}) {
  const node = el(tag, { dir: "auto", ...attributes });
  appendInline(node, text, growing);
  return node;
}

function withBlocks(tag, attributes, lines, depth, growing) {
  const blocks = split(lines, depth + 1);
  return el(tag, attributes, ...blocks.map((block, i) => block.make(growing && i === blocks.length - 1)));
}

/** The width of a line's indentation; a tab goes to the next multiple of four. */
function indentOf(line) {
  let width = 0;
  for (const letter of line) {
    if (letter === " ") width += 1;
    else if (letter === "\t") width += 4 - (width % 4);
    else break;
  }
  return width;
}

/** A line with its indentation shortened by `width`. */
function unindent(line, width) {
  const rest = line.trimStart();
  const indent = line.slice(0, line.length - rest.length);
  if (!width || !indent) return line;
  return " ".repeat(Math.max(0, indentOf(line) - width)) + rest;
}
