// Text files that go with a message: chosen, dropped or pasted.

import { el, find, iconButton, notice } from "./dom.js";

const MOST_BYTES = 256 * 1024;

/** Collects files for the next message; `changed` is called when there are more or fewer. */
export class Attachments {
  constructor(changed) {
    this.changed = changed;
    this.files = [];
    this.list = find("#attached");
    const input = find("#files");
    find("#attach").addEventListener("click", () => input.click());
    input.addEventListener("change", () => {
      this.add([...input.files]);
      input.value = ""; // so that the same file can be chosen again
    });
    this.#listen(find("#main"));
  }

  #listen(main) {
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    main.addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      main.classList.add("dropping");
    });
    main.addEventListener("dragleave", (event) => {
      if (!main.contains(event.relatedTarget)) main.classList.remove("dropping");
    });
    main.addEventListener("drop", (event) => {
      main.classList.remove("dropping");
      if (!hasFiles(event)) return;
      event.preventDefault();
      this.add([...event.dataTransfer.files]);
    });
    find("#text").addEventListener("paste", (event) => {
      if (!event.clipboardData.files.length) return;
      event.preventDefault();
      this.add([...event.clipboardData.files]);
    });
  }

  async add(files) {
    for (const file of files) {
      const text = await textOf(file);
      if (text !== null) this.files.push({ name: file.name, text });
    }
    this.#draw();
  }

  /** The files, which are no longer here then. */
  take() {
    const { files } = this;
    this.files = [];
    this.#draw();
    return files;
  }

  #draw() {
    const entry = (file) => {
      const drop = () => {
        this.files = this.files.filter((other) => other !== file);
        this.#draw();
        find("#text").focus();
      };
      return el("li", {}, el("span", {}, file.name), iconButton("close", `Leave out ${file.name}`, drop));
    };
    this.list.replaceChildren(...this.files.map(entry));
    this.changed();
  }
}

/** The text of a file, or null, which the reader is told. */
async function textOf(file) {
  if (file.size > MOST_BYTES) {
    notice(`${file.name} is larger than ${MOST_BYTES / 1024} KB.`);
    return null;
  }
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (!text.includes("\0")) return text.replace(/\r\n?/g, "\n");
  } catch {
    // Told below.
  }
  notice(`${file.name} is not a text file (UTF-8).`);
  return null;
}

/** A message as the model gets it: each file between fences that do not occur in it, then what was written. */
export function withFiles({ content, files = [] }) {
  return [...files.map(fenced), content].filter(Boolean).join("\n\n");
}

function fenced({ name, text }) {
  const runs = text.match(/`+/g) ?? [];
  const fence = "`".repeat(Math.max(3, ...runs.map((run) => run.length + 1)));
  const kind = /\.(\w+)$/.exec(name)?.[1] ?? "";
  return `${name}:\n\n${fence}${kind}\n${text.replace(/\n$/, "")}\n${fence}`;
}

/** A file of a message, folded. */
export function shownFile({ name, text }) {
  const size = text.length < 1000 ? `${text.length} characters` : `${Math.round(text.length / 1000)} k characters`;
  const summary = el("summary", {}, el("span", {}, name), el("small", {}, size));
  return el("details", { class: "file" }, summary, el("pre", { tabindex: "0", role: "region", "aria-label": name }, text));
}
