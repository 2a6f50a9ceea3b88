// Conversations and where they are kept: one entry of localStorage each, so that two tabs do not overwrite each other.

const PREFIX = "mpillama.conversation.";
const NEW_TITLE = "New conversation";
const TITLE_LENGTH = 60;

/** All conversations of this browser; `warn` is told what goes wrong with the storage. */
export class Conversations {
  constructor(warn) {
    this.warn = warn;
    this.all = new Map();
    try {
      this.storage = window.localStorage;
      this.#load();
    } catch {
      this.storage = null;
      warn("This browser stores nothing for this page: conversations end with it.");
    }
  }

  #load() {
    let unreadable = 0;
    for (const name of Object.keys(this.storage).filter((name) => name.startsWith(PREFIX))) {
      const conversation = parse(this.storage.getItem(name));
      if (conversation) this.all.set(conversation.id, conversation);
      else unreadable += 1;
    }
    // They stay where they are: perhaps another version can read them.
    if (unreadable) this.warn(`Left out because they cannot be read: ${unreadable} of the stored conversations.`);
  }

  /** Newest first. */
  list() {
    return [...this.all.values()].sort((a, b) => b.updated - a.updated);
  }

  /** A new one, which is stored with its first message. */
  create(settings = {}) {
    const id = Array.from(crypto.getRandomValues(new Uint32Array(3)), (part) => part.toString(36)).join("");
    const content = { settings: structuredClone(settings), messages: [] };
    this.all.set(id, { id, title: NEW_TITLE, updated: Date.now(), ...content });
    return this.all.get(id);
  }

  save(conversation) {
    if (!this.storage || !this.all.has(conversation.id) || !conversation.messages.length) return;
    try {
      this.storage.setItem(PREFIX + conversation.id, JSON.stringify(conversation, keep));
    } catch {
      this.warn("The browser's storage is full: this is not stored. Export or delete conversations.");
    }
  }

  remove(conversation) {
    this.all.delete(conversation.id);
    this.storage?.removeItem(PREFIX + conversation.id);
  }

  /** Follow what another tab stored; returns the id of the conversation, or null. */
  follow({ key, newValue }) {
    if (!key?.startsWith(PREFIX)) return null;
    const id = key.slice(PREFIX.length);
    if (this.all.get(id)?.running) return null;
    const conversation = newValue && parse(newValue);
    if (conversation) this.all.set(id, conversation);
    else if (!newValue) this.all.delete(id);
    return id;
  }
}

/** Take the title from the first message, unless it was given by hand. */
export function nameIt(conversation) {
  if (conversation.named) return;
  const [first] = conversation.messages;
  const line = first?.content.trim().split("\n")[0] || first?.files?.[0]?.name || NEW_TITLE;
  conversation.title = line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH).trimEnd()}…` : line;
}

/** A conversation as a file's text. */
export function exported({ title, updated, settings, messages }) {
  return JSON.stringify({ title, updated: new Date(updated).toISOString(), settings, messages }, keep, 2);
}

/** What is only true while a page runs is not stored. */
function keep(name, value) {
  return name === "running" || name === "waiting" ? undefined : value;
}

/** A stored conversation, or null if it is none. */
function parse(text) {
  try {
    const found = JSON.parse(text);
    const isFile = (file) => typeof file?.name === "string" && typeof file.text === "string";
    const isMessage = (m) => ["user", "assistant"].includes(m.role) && typeof m.content === "string";
    const whole = [found.id, found.title].every((part) => typeof part === "string") && Number.isFinite(found.updated);
    if (!whole || !found.messages.length || !found.messages.every(isMessage)) return null;
    for (const message of found.messages) {
      if (typeof message.stats !== "object") delete message.stats;
      if (typeof message.reasoning !== "string") delete message.reasoning;
      if (!Array.isArray(message.files) || !message.files.every(isFile)) delete message.files;
      // A page that was closed in mid-answer.
      if (message.role === "assistant") message.end ??= "stopped";
    }
    return { ...found, settings: found.settings instanceof Object ? found.settings : {} };
  } catch {
    return null;
  }
}
