// What lies within a line of Markdown: emphasis, code, links. Everything else, HTML too, stays text.

import { el } from "./dom.js";

const TOKEN = /\\[\n!-/:-@[-`{-~]|`+|!?\[|<[^\s<>]+>|https?:\/\/[^\s<>]+|\*+|_+|~~/g;
const LINK =
  /!?\[((?:\\.|[^[\]\\]|\[[^[\]]*\])*)\]\( ?<?((?:[^\s<>()]|\([^\s<>()]*\))*)>?(?:\s(?:"[^"]*"|'[^']*'))? ?\)/y;
const SCHEMES = ["http:", "https:", "mailto:"];
const MAX_DEPTH = 8;

/** Append `text` to `parent`. While it is growing, bold and code without an end go on: the end most likely comes. */
export function appendInline(parent, text, growing = false, depth = 0, inLink = false) {
  if (depth > MAX_DEPTH) return void parent.append(text);
  const line = { text, growing, depth, inLink, hopeless: new Set() };
  const token = new RegExp(TOKEN);
  let shown = 0;
  for (let found = token.exec(text); found; found = token.exec(text)) {
    const piece = pieceAt(line, found[0], found.index);
    if (!piece) continue;
    parent.append(text.slice(shown, found.index), piece.node);
    shown = token.lastIndex = piece.end;
  }
  parent.append(text.slice(shown));
}

function pieceAt(line, token, at) {
  if (token[0] === "\\") return { node: token[1], end: at + 2 };
  if (token[0] === "`") return codeAt(line, token, at);
  if ("*_~".includes(token[0])) return emphasisAt(line, token, at);
  if (line.inLink) return null;
  if (token[0] === "<") return bareLink(token.slice(1, -1), at + token.length);
  if (token[0] !== "h") return linkAt(line, at);
  const address = withoutPunctuation(token);
  return bareLink(address, at + address.length);
}

function codeAt(line, mark, at) {
  const from = at + mark.length;
  let to = codeEnd(line, mark, from);
  if (to < 0 && line.growing && mark.length === 1 && from < line.text.length) to = line.text.length;
  if (to < 0) return null;
  const inside = line.text.slice(from, to).replace(/^ (.*\S.*) $/s, "$1");
  return { node: el("code", {}, inside), end: Math.min(to + mark.length, line.text.length) };
}

/** Where the run of backticks begins that ends this code, or -1. */
function codeEnd(line, mark, from) {
  if (line.hopeless.has(mark)) return -1;
  const run = /`+/g;
  run.lastIndex = from;
  for (let found = run.exec(line.text); found; found = run.exec(line.text)) {
    if (found[0].length === mark.length) return found.index;
  }
  line.hopeless.add(mark); // so that many marks without an end are not each looked for to the end
  return -1;
}

function linkAt(line, at) {
  LINK.lastIndex = at;
  const found = LINK.exec(line.text);
  if (!found || !isHarmless(found[2])) return null;
  const node = anchor(found[2]);
  appendInline(node, found[1] || found[2], line.growing, line.depth + 1, true);
  return { node, end: at + found[0].length };
}

function bareLink(text, end) {
  const address = /^[\w.+-]+@[\w-]+(\.[\w-]+)+$/.test(text) ? `mailto:${text}` : text;
  return isHarmless(address) ? { node: anchor(address, text), end } : null;
}

const anchor = (href, ...text) => el("a", { href, target: "_blank", rel: "noopener noreferrer" }, ...text);

function isHarmless(address) {
  try {
    return SCHEMES.includes(new URL(address).protocol);
  } catch {
    return false; // not a whole address
  }
}

/** An address as it stands in a sentence, without what belongs to the sentence. */
function withoutPunctuation(address) {
  let { length } = address;
  let unopened = address.split(")").length - address.split("(").length;
  for (;; length -= 1) {
    if (address[length - 1] === ")" && unopened > 0) unopened -= 1;
    else if (!".,;:!?'\"*_~`]".includes(address[length - 1])) return address.slice(0, length);
  }
}

function emphasisAt(line, mark, at) {
  const { text, growing, depth, inLink } = line;
  const from = at + mark.length;
  const before = text[at - 1] ?? " ";
  // One star or underscore between letters is a product or a name, not emphasis.
  const inWord = mark[0] !== "~" && !mark.startsWith("**") && /[\p{L}\p{N}]/u.test(before);
  if (mark.length > 3 || inWord || !/\S/.test(text[from] ?? " ")) return null;
  let end = emphasisEnd(line, mark, from);
  if (end < 0 && growing && mark === "**") end = text.length + 2;
  if (end < 0) return null;
  const inner = el(mark[0] === "~" ? "del" : mark.length === 2 ? "strong" : "em");
  appendInline(inner, text.slice(from, end - mark.length), growing, depth + 1, inLink);
  return { node: mark.length === 3 ? el("strong", {}, inner) : inner, end: Math.min(end, text.length) };
}

/** The position behind the marks that end this emphasis, or -1. */
function emphasisEnd(line, mark, from) {
  if (line.hopeless.has(mark)) return -1;
  const step = /\\[^]|`+|\*+|_+|~~/g;
  step.lastIndex = from;
  for (let found = step.exec(line.text); found; found = step.exec(line.text)) {
    const run = found[0];
    const end = found.index + run.length;
    if (run[0] === "`") {
      const to = codeEnd(line, run, end);
      if (to >= 0) step.lastIndex = to + run.length;
    } else if (run[0] === mark[0] && ends(line.text, mark, run, found.index)) return end;
  }
  line.hopeless.add(mark);
  return -1;
}

function ends(text, mark, run, at) {
  if (!/\S/.test(text[at - 1])) return false;
  if (mark[0] === "_" && /[\p{L}\p{N}]/u.test(text[at + run.length] ?? " ")) return false;
  return run.length === mark.length || run.length === 3;
}
