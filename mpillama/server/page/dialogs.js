// The two dialogs: a question with an optional field, and the settings of a conversation.

import { el, find } from "./dom.js";
import { FIELDS, MAX_STOPS } from "./sampling.js"; // which the server makes of its own list

let before = Promise.resolve();

/** Ask one question after the other; the text of the field, "" without a field, or null when it is cancelled. */
export function ask(question) {
  before = before.then(() => askNow(question));
  return before;
}

async function askNow({ title, text = "", label = null, value = "", type = "text", action }) {
  const dialog = find("#ask");
  const input = find("input", dialog);
  find("h2", dialog).textContent = title;
  find("#ask-text").textContent = text;
  find("#ask-field").hidden = label === null;
  find("#ask-field span").textContent = label ?? "";
  find(".main", dialog).textContent = action;
  find(".main", dialog).classList.toggle("bad", action === "Delete");
  Object.assign(input, { type, value, required: label !== null });
  const done = closed(dialog);
  dialog.showModal();
  if (label !== null) input.select();
  const agreed = await done;
  const given = input.value.trim();
  input.value = ""; // it may have been a key
  return agreed ? given : null;
}

/** Let the reader change settings; the new ones, or null when it is cancelled. */
export async function editSettings(settings) {
  const dialog = find("#settings");
  const form = find("form", dialog);
  if (!find("#numbers").children.length) find("#numbers").append(...FIELDS.map(numberField));
  form.system.value = settings.system ?? "";
  form.stop.value = [settings.stop ?? []].flat().map(escaped).join("\n");
  for (const { name } of FIELDS) form[name].value = settings[name] ?? "";
  find("[value=clear]", dialog).onclick = () => form.querySelectorAll("input, textarea").forEach((f) => (f.value = ""));
  const done = closed(dialog);
  dialog.showModal();
  return (await done) ? given(form) : null;
}

function numberField({ name, label, min, max, step, hint }) {
  const limits = { min, max, step, inputmode: min < 0 ? "text" : "decimal" };
  const input = el("input", { type: "number", name, placeholder: "default", ...limits });
  return el("label", {}, el("span", {}, label), input, el("small", {}, hint));
}

/** What the form has, without what is empty. */
function given(form) {
  const settings = {};
  if (form.system.value.trim()) settings.system = form.system.value;
  for (const { name } of FIELDS) if (form[name].value !== "") settings[name] = form[name].valueAsNumber;
  const stops = form.stop.value.split("\n").filter(Boolean).slice(0, MAX_STOPS).map(unescaped);
  if (stops.length) settings.stop = stops;
  return settings;
}

const escaped = (text) => text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n");
const unescaped = (text) => text.replace(/\\([n\\])/g, (_, letter) => (letter === "n" ? "\n" : "\\"));

/** Whether a dialog was agreed to, when it is closed. */
function closed(dialog) {
  return new Promise((resolve) => {
    let agreed = false;
    find("form", dialog).onsubmit = () => (agreed = true);
    find("[value=cancel]", dialog).onclick = () => dialog.close();
    dialog.onclose = () => resolve(agreed);
  });
}
