// Search over conversations: every word must occur, in the title or in one of the messages.

import { el } from "./dom.js";

const BEFORE = 24; // characters of a snippet before what was found
const AFTER = 60;

/** Where a conversation has all words of `query`: {message, snippet}, without a message if the title has them; or null. */
export function foundIn(conversation, query) {
  const words = folded(query).split(/\s+/).filter(Boolean);
  const has = (text) => words.every((word) => folded(text).includes(word));
  const message = conversation.messages.find((one) => has(textOf(one)));
  if (message) return { message, snippet: snippet(textOf(message), words[0]) };
  const everything = [conversation.title, ...conversation.messages.map(textOf)].join("\n");
  return has(everything) ? { message: null, snippet: null } : null;
}

const textOf = ({ content, files = [] }) => [content, ...files.flatMap(({ name, text }) => [name, text])].join("\n");

/** Letters without case and accents. */
const folded = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();

function snippet(text, word) {
  // Folding may change lengths, so that the place in the folded text is only about the place in the text.
  const line = text.replace(/\s+/g, " ");
  const exact = line.toLowerCase().indexOf(word);
  const at = exact < 0 ? folded(line).indexOf(word) : exact;
  const near = Math.max(0, at - BEFORE);
  const from = near && Math.max(near, Math.min(at, line.indexOf(" ", near) + 1)); // not within a word
  const before = (from ? "…" : "") + line.slice(from, at);
  const found = exact < 0 ? line.slice(at, at + word.length) : el("mark", {}, line.slice(at, at + word.length));
  return el("small", {}, before, found, line.slice(at + word.length, at + AFTER));
}
