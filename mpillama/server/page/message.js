// A message on the page.

import { shownFile } from "./attachments.js";
import { copyButton, el, find, iconButton } from "./dom.js";
import { grow } from "./reading.js";
import { RenderedText } from "./rendering.js";
import { server } from "./server.js";

/** Shows one message; `actions` are functions of the message: edit, proceed, retry, remove. */
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
    const said = message.content ? [el("div", { class: "said", dir: "auto" }, message.content)] : [];
    this.body.replaceChildren(...(message.files ?? []).map(shownFile), ...said);
    this.below.replaceChildren(
      iconButton("edit", "Edit and send again", () => this.#edit()),
      copyButton("Copy message", () => message.content),
      iconButton("trash", "Delete with its answer", () => actions.remove(message)),
    );
  }

  #edit() {
    const text = el("textarea", { "aria-label": "Edit your message", dir: "auto", rows: "3" });
    const send = () => (text.value.trim() || this.message.files?.length) && this.actions.edit(this.message, text.value);
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
    this.thoughtText = new RenderedText(this.thought);
    this.answerText = new RenderedText(this.text);
    this.status = el("p", { class: "waiting" });
    this.error = el("p", { class: "error", role: "alert" });
    this.body.append(this.thinking, this.text, this.status, this.error);
    this.stats = el("div", { class: "stats" });
    this.proceed = iconButton("continue", "Continue this answer", () => actions.proceed(message), "proceed");
    this.buttons = el(
      "div",
      { class: "tools" },
      this.proceed,
      copyButton("Copy answer", () => message.content),
      iconButton("retry", "Answer again", () => actions.retry(message), "retry"),
      iconButton("trash", "Delete with its question", () => actions.remove(message)),
    );
    this.below.append(this.buttons, this.stats);
    this.ready = this.update(Boolean(message.end));
  }

  /** Show what came, soon; however much comes it is shown once a frame. `after` is called when it is shown. */
  schedule(after) {
    this.due ||= requestAnimationFrame(() => {
      this.due = 0;
      this.update(false).then(after);
    });
  }

  /** This view, with what has changed in its message. */
  refreshed() {
    if (this.message.role === "assistant") this.ready = this.update(Boolean(this.message.end));
    return this;
  }

  /** Show the answer as it is; `done` when no more will come. Resolves when it is shown. */
  async update(done) {
    cancelAnimationFrame(this.due);
    this.due = 0;
    const { message } = this;
    const { content, reasoning = "" } = message;
    if (!done) this.node.setAttribute("aria-busy", "true");
    this.status.hidden = done;
    this.status.textContent = content || reasoning ? "" : (message.waiting ?? "Waiting for the first token");
    this.error.hidden = !message.error;
    this.error.textContent = message.error ?? "";
    this.thinking.hidden = !reasoning;
    this.thinking.classList.toggle("under-way", !done && !content);
    await Promise.all([this.thoughtText.update(reasoning, !done), this.answerText.update(content, !done)]);
    this.below.hidden = !message.end;
    if (!done) return;
    this.node.setAttribute("aria-busy", "false");
    this.proceed.hidden = !canProceed(message);
    this.stats.replaceChildren(...statistics(message));
  }

  /** What a screen reader says of it. */
  get spoken() {
    const { end } = this.message;
    return end === "error" ? "" : `${end === "stopped" ? "Stopped" : "Answer"}: ${this.text.textContent}`;
  }
}

/** Whether a key event sends a text: not while an input method composes, whose Enter only takes its proposal. */
export const isEnter = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

/** Whether an answer was cut off and can go on. */
function canProceed({ content, end, stats }) {
  const full = end === "length" && stats?.used >= (stats?.context ?? server.context);
  return Boolean(content) && ["length", "stopped", "error"].includes(end) && !full;
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
