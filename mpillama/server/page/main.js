// The page: which conversation is shown, and what happens to it.

import { answer } from "./answering.js";
import { Attachments } from "./attachments.js";
import { Conversations, exported, nameIt } from "./conversations.js";
import { ask, editSettings } from "./dialogs.js";
import { el, find, notice, setIcon } from "./dom.js";
import { MessageView, isEnter } from "./message.js";
import { Reading, grow } from "./reading.js";
import { renderAgain } from "./rendering.js";
import { check, hasKey, server, setKey, takeKey } from "./server.js";
import { Sidebar } from "./sidebar.js";

const IDEAS = [
  "Tell me a story about a llama on a cluster.",
  "What does an all-reduce do? Three sentences.",
  "Write a Slurm script for a job on four nodes.",
];
const BANNERS = {
  loading: "The model is still loading. This page looks again by itself.",
  draining: "The server is ending and takes no new requests.",
  unreachable: "The server cannot be reached. This page tries again by itself.",
  locked: "The server wants an API key.",
};

const text = find("#text");
const send = find("#send");
const touch = matchMedia("(pointer: coarse)");
const conversations = new Conversations((problem) => notice(problem, 15));
const reading = new Reading(find("#log"), find("#newest"));
const sidebar = new Sidebar({ open, rename, download, remove: removeConversation });
const messageActions = { edit, proceed, retry, remove: removeMessage };
const attachments = new Attachments(() => showState());
let shown = null;
let views = new Map();

function show(conversation) {
  if (shown && shown !== conversation && !shown.messages.length) conversations.remove(shown);
  shown = conversation;
  const viewOf = (message) => views.get(message)?.refreshed() ?? new MessageView(message, messageActions);
  views = new Map(shown.messages.map((message) => [message, viewOf(message)]));
  find("#messages").replaceChildren(...[...views.values()].map((view) => view.node));
  find("#welcome").hidden = shown.messages.length > 0;
  history.replaceState({ shown: shown.id }, ""); // outlives a reload
  showState();
  reading.toEnd();
  for (const view of views.values()) view.ready?.then(() => reading.follow());
}

/** Show everything but the messages. */
function showState() {
  const { title, settings, running } = shown;
  find("#title").textContent = title;
  document.title = `${title} – mpillama`;
  sidebar.draw(conversations.list().filter((conversation) => conversation.messages.length), shown);
  find("#settings-button").classList.toggle("set", Object.keys(settings).length > 0);
  setIcon(send, running ? "stop" : "send");
  send.setAttribute("aria-label", running ? "Stop" : "Send");
  send.disabled = !running && isEmpty();
}

/** Whether there is nothing to send. */
function isEmpty() {
  return !text.value.trim() && !attachments.files.length;
}

function showServer() {
  find("#server").dataset.state = server.state;
  find("#server span").textContent = server.state === "ok" ? server.model : server.state;
  find("#banner").textContent = BANNERS[server.state] ?? "";
  find("#key").hidden = !hasKey() && server.state !== "locked";
  if (server.state === "ok") renderAgain().then(() => reading.follow());
}

/** Have the last message answered, or go on; by the end another conversation may be shown. */
async function run(conversation, continued = false) {
  const changed = () => views.get(conversation.messages.at(-1))?.schedule(() => reading.follow());
  const done = answer(conversation, changed, continued);
  nameIt(conversation);
  conversations.save(conversation);
  find("#spoken").textContent = "";
  show(conversation);
  focusText();
  await done;
  conversations.save(conversation);
  const view = views.get(conversation.messages.at(-1));
  await view?.update(true);
  // Screen readers get an answer once, when it is whole.
  if (view) find("#spoken").textContent = view.spoken;
  reading.follow();
  showState();
}

function submit(content, files = []) {
  if (shown.running || !(content.trim() || files.length)) return false;
  // An answer that never began is no part of the conversation.
  const last = shown.messages.at(-1);
  if (last?.role === "assistant" && !last.content) shown.messages.pop();
  shown.messages.push({ role: "user", content, ...(files.length && { files }) });
  run(shown);
  return true;
}

function stop() {
  shown.running?.abort();
  focusText();
}

/** On a phone the focus would open the keyboard over what one wants to read. */
function focusText() {
  if (!touch.matches) text.focus();
}

/** What is under way would be lost; whether it is. */
function isBusy(conversation) {
  if (conversation.running) notice("Stop the answer first.");
  return Boolean(conversation.running);
}

function edit(message, content) {
  if (isBusy(shown)) return;
  shown.messages.length = shown.messages.indexOf(message);
  submit(content, message.files);
}

function proceed() {
  if (!isBusy(shown)) run(shown, true);
}

function retry(message) {
  if (isBusy(shown)) return;
  shown.messages.length = shown.messages.indexOf(message);
  run(shown);
}

async function removeMessage(message) {
  const conversation = shown;
  const { messages } = conversation;
  if (isBusy(conversation)) return;
  const sure = await ask({ title: "Delete this question and its answer?", action: "Delete" });
  if (sure === null) return;
  const from = messages.indexOf(message) - (message.role === "assistant" ? 1 : 0);
  messages.splice(from, messages[from + 1]?.role === "assistant" ? 2 : 1);
  if (messages.length) conversations.save(conversation);
  else conversations.remove(conversation);
  show(messages.length ? conversation : conversations.create(conversation.settings));
  focusText();
}

/** Show a conversation, and in it the message that was searched for. */
async function open(conversation, message = null) {
  sidebar.close();
  if (conversation !== shown) show(conversation);
  focusText();
  const view = views.get(message);
  if (!view) return;
  await Promise.all([...views.values()].map(({ ready }) => ready));
  view.node.scrollIntoView({ block: "start" });
  view.node.classList.add("found");
  setTimeout(() => view.node.classList.remove("found"), 2000);
}

async function rename(conversation) {
  const title = await ask({ title: "Rename", label: "Title", value: conversation.title, action: "Rename" });
  if (!title) return;
  Object.assign(conversation, { title, named: true });
  conversations.save(conversation);
  showState();
}

async function removeConversation(conversation) {
  const sure = await ask({ title: "Delete this conversation?", text: conversation.title, action: "Delete" });
  if (sure === null) return;
  conversation.running?.abort();
  conversations.remove(conversation);
  show(conversations.list()[0] ?? conversations.create(conversation.settings));
  focusText();
}

function download(conversation) {
  const href = URL.createObjectURL(new Blob([exported(conversation)], { type: "application/json" }));
  const name = conversation.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
  el("a", { href, download: `${name}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

function askKey(refused) {
  const words = refused ? "The server does not take this key." : "This server answers only with its API key.";
  const kept = "This browser keeps it until the tab is closed.";
  return ask({ title: "API key", text: `${words} ${kept}`, label: "Key", type: "password", action: "Use key" });
}

async function changeKey() {
  const key = await askKey(false);
  if (key) setKey(key);
  if (key) check();
}

async function changeSettings() {
  const conversation = shown;
  const settings = await editSettings(conversation.settings);
  if (!settings) return;
  conversation.settings = settings;
  conversations.save(conversation);
  showState();
}

function startNew() {
  sidebar.close();
  show(conversations.create(shown.settings));
  text.focus();
}

function followOtherTab(event) {
  const id = conversations.follow(event);
  if (id === shown.id) show(conversations.all.get(id) ?? conversations.create(shown.settings));
  else if (id) showState();
}

function listen() {
  text.addEventListener("input", () => {
    grow(text);
    send.disabled = !shown.running && isEmpty();
  });
  text.addEventListener("keydown", (event) => {
    if (!isEnter(event)) return;
    event.preventDefault();
    if (!shown.running) find("#composer").requestSubmit();
  });
  find("#composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (shown.running) return stop();
    const content = text.value;
    text.value = "";
    grow(text);
    submit(content, attachments.take());
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || find("dialog[open]")) return;
    if (sidebar.isOpen) sidebar.close();
    else stop();
  });
  find("#new").addEventListener("click", startNew);
  find("#settings-button").addEventListener("click", changeSettings);
  find("#key").addEventListener("click", changeKey);
  addEventListener("storage", followOtherTab);
  addEventListener("hashchange", () => takeKey() && check());
  addEventListener("pagehide", () => {
    for (const conversation of conversations.list()) if (conversation.running) conversations.save(conversation);
  });
}

document.querySelectorAll("[data-icon]").forEach((node) => setIcon(node, node.dataset.icon));
find("#ideas").append(
  ...IDEAS.map((idea) => el("li", {}, el("button", { type: "button", onclick: () => submit(idea) }, idea))),
);
server.askKey = askKey;
server.onchange = showServer;
takeKey();
show(conversations.all.get(history.state?.shown) ?? conversations.list()[0] ?? conversations.create());
listen();
focusText();
check();
