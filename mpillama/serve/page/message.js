// A message on the page.

import { copyButton, el, find, iconButton } from "./dom.js";
import { Markdown } from "./markdown.js";
import { grow } from "./reading.js";

/** Shows one message; `actions` are functions of the message: edit, retry, remove. */
export class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.due = 0;
    this.body = el("div", { class: "body" });
    this.below = el("footer");
    const mine = message.role === "user";
    const name = el("h2", { class: "unseen" }, mine ? "You" : "Answer");
    this.node = el("article", { class: mine ? "user" : "answer", "aria-busy": false }, name, this.body, this.below);
    if (mine) this.#showQuestion();
    else this.#prepareAnswer();
  }

  #showQuestion() {
    const { message, actions } = this;
    this.body.replaceChildren(el("div", { class: "said", dir: "auto" }, message.content));
    this.below.replaceChildren(
      iconButton("edit", "Edit and send again", () => this.#edit()),
      copyButton("Copy message", () => message.content),
      iconButton("trash", "Delete with its answer", () => actions.remove(message)),
    );
  }

  #edit() {
    const text = el("textarea", { "aria-label": "Edit your message", dir: "auto", rows: "3" });
    const send = () => text.value.trim() && this.actions.edit(this.message, text.value);
    const cancel = () => {
      this.#showQuestion();
      find("button", this.below).focus();
    };
    text.value = this.message.content;
    text.addEventListener("input", () => grow(text));
    text.addEventListener("keydown", (event) => {
      if (isEnter(event)) {
        event.preventDefault();
        send();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      }
    });
    this.body.replaceChildren(text);
    this.below.replaceChildren(
      el("button", { type: "button", onclick: cancel }, "Cancel"),
      el("button", { type: "button", class: "main", onclick: send }, "Send"),
    );
    grow(text);
    text.focus();
  }

  #prepareAnswer() {
    const { message, actions } = this;
    this.thought = el("div");
    this.thinking = el("details", { hidden: true }, el("summary", {}, "Thoughts"), this.thought);
    this.text = el("div", { class: "text" });
    this.thoughtText = new Markdown(this.thought);
    this.answerText = new Markdown(this.text);
    this.status = el("p", { class: "waiting" });
    this.error = el("p", { class: "error", role: "alert" });
    this.body.append(this.thinking, this.text, this.status, this.error);
    this.stats = el("div", { class: "stats" });
    this.buttons = el(
      "div",
      { class: "tools" },
      copyButton("Copy answer", () => message.content),
      iconButton("retry", "Answer again", () => actions.retry(message), "retry"),
      iconButton("trash", "Delete with its question", () => actions.remove(message)),
    );
    this.below.append(this.buttons, this.stats);
    this.update(Boolean(message.end));
  }

  /** Show what came, soon; however much comes it is shown once a frame. `after` is called when it is shown. */
  schedule(after) {
    this.due ||= requestAnimationFrame(() => {
      this.due = 0;
      this.update(false);
      after();
    });
  }

  /** Show the answer as it is; `done` when no more will come. */
  update(done) {
    cancelAnimationFrame(this.due);
    this.due = 0;
    const { message } = this;
    const [thought, text] = parts(message.content);
    this.thinking.hidden = !thought;
    this.thoughtText.update(thought, !done);
    this.answerText.update(text, !done);
    this.node.setAttribute("aria-busy", String(!done));
    this.status.hidden = done;
    this.status.textContent = message.content ? "" : (message.waiting ?? "Waiting for the first token");
    this.error.hidden = !message.error;
    this.error.textContent = message.error ?? "";
    this.below.hidden = !done;
    if (done) this.stats.replaceChildren(...statistics(message));
  }

  /** What a screen reader says of it. */
  get spoken() {
    const { end } = this.message;
    return end === "error" ? "" : `${end === "stopped" ? "Stopped" : "Answer"}: ${this.text.textContent}`;
  }
}

/** Whether a key event sends a text: not while an input method composes, whose Enter only takes its proposal. */
export const isEnter = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

/** What a reasoning model thought, and what it said. */
function parts(content) {
  const opened = /^\s*<think>\s*/.exec(content);
  const close = content.indexOf("</think>");
  // Some templates open the thought in the prompt, so that the text only has its end.
  if (!opened && close < 0) return ["", content];
  const from = opened ? opened[0].length : 0;
  if (close < 0) return [content.slice(from), ""];
  return [content.slice(from, close).trim(), content.slice(close + "</think>".length).trimStart()];
}

function statistics({ model, stats, end }) {
  const facts = [];
  if (end === "stopped") facts.push("stopped");
  if (end === "length") facts.push(stats?.used >= stats?.context ? "cut off: context full" : "cut off: most tokens");
  if (stats) {
    facts.push(`${stats.tokens} token${stats.tokens === 1 ? "" : "s"}`, `${rounded(stats.rate)} tokens/s`);
    if (Number.isFinite(stats.wait)) facts.push(`first after ${rounded(stats.wait)} s`);
  }
  if (stats?.context) facts.push(contextUse(stats));
  return [...facts, model].filter(Boolean).map((fact) => el("span", {}, fact));
}

function contextUse({ used, context }) {
  const meter = el("meter", { min: 0, max: context, high: 0.9 * context, value: used, "aria-label": "Context in use" });
  return el("span", {}, meter, `context ${used} of ${context}`);
}

const rounded = (value) => Number(value).toFixed(value < 10 ? 1 : 0);
