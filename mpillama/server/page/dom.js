// Making and finding elements. Text is only ever set as text, so nothing that a model or a user writes becomes HTML here;
// rendering.js alone takes HTML, from the server.

const SVG = "http://www.w3.org/2000/svg";

// Strokes on a grid of 24, but for those that are filled.
const FILLED = ["llama", "stop"];
const ICONS = {
  attach: "M19 11.500l-7.500 7.500a4.500 4.500 0 0 1-6.400-6.400l8-8a3 3 0 0 1 4.300 4.300l-7.900 7.900a1.500 1.500 0 0 1-2.200-2.200L14.500 8",
  check: "M5 13l4 4 10-10",
  close: "M6 6l12 12M18 6L6 18",
  contrast: "M12 3a9 9 0 1 0 0 18a9 9 0 0 0 0-18zM12 3v18M12 8h5.500M12 12h9M12 16h7.5",
  continue: "M5 12h13M12 6l6 6-6 6M21 5v14",
  copy: "M9 9h11v11H9zM15 9V4H4v11h5",
  down: "M12 5v14M6 13l6 6 6-6",
  edit: "M4 20l1-4.500L16.5 4 20 7.5 8.5 19zM14 6.500L17.5 10",
  export: "M12 4v11M7 10.500l5 5 5-5M4 20h16",
  key: "M8 11a4 4 0 1 0 .01 0M11 12l8-8M16 7l3 3",
  menu: "M4 7h16M4 12h16M4 17h16",
  plus: "M12 5v14M5 12h14",
  retry: "M19 12a7 7 0 1 1-2-5l2 2M19 4v5h-5",
  send: "M12 19V5M6 11l6-6 6 6",
  sliders: "M4 8h9M19 8h1M16 5.500a2.5 2.5 0 1 0 .01 0M4 16h1M11 16h9M8 13.500a2.5 2.5 0 1 0 .01 0",
  stop: "M6.5 6.5h11v11h-11z",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10.5 11v5M13.5 11v5",
  llama:
    "M8.3 1.6c.7.8 1.1 1.8 1.2 3h1c.1-1.2.5-2.2 1.2-3 .6 1.3.7 2.6.5 3.8v7h5c.4-1.1 1.3-1.7 2.5-1.5.2 1.1-.1 2-.9 2.6" +
    ".3.6.4 1.1.4 1.7v7.2h-2.2V18h-5.6v4.4H9.2V9.3H6.8c-1.4 0-2.4-.8-2.4-2s.9-1.9 2.4-2l1.2-.2c-.2-1.2-.2-2.3.3-3.5z",
};

export const find = (selector, root = document) => root.querySelector(selector);

/** An element; attributes that begin with "on" are listeners, those that are null or false are left out. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** Give an element one of the icons, in place of the one it has. */
export function setIcon(node, name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", FILLED.includes(name) ? "filled" : "line");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  find("svg", node)?.remove();
  node.prepend(svg);
}

/** A button that shows only an icon. */
export function iconButton(icon, label, onclick, more = "") {
  const button = el("button", { type: "button", class: `icon ${more}`, "aria-label": label, title: label, onclick });
  setIcon(button, icon);
  return button;
}

/** A button that copies what `text()` gives. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const copied = await copy(text());
    notice(copied ? "Copied." : "The browser does not allow copying.");
    if (!copied) return;
    setIcon(button, "check");
    setTimeout(() => setIcon(button, "copy"), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages of a node's own name over plain HTTP have no clipboard; the old way still works there.
    const area = el("textarea", { class: "unseen", "aria-hidden": "true" });
    const focused = document.activeElement;
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

let noticed = 0;

/** Say something for some seconds, also to screen readers. */
export function notice(text, seconds = 4) {
  find("#notice").textContent = text;
  clearTimeout(noticed);
  noticed = setTimeout(() => (find("#notice").textContent = ""), seconds * 1000);
}
