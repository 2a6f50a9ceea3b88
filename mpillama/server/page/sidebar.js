// The list of conversations; on a narrow screen it is a drawer.

import { el, find, iconButton } from "./dom.js";
import { foundIn } from "./searching.js";

/** Draws the list, or what a search finds; `actions` are functions of a conversation: open, rename, download, remove. */
export class Sidebar {
  constructor(actions) {
    this.actions = actions;
    this.list = find("#conversations");
    this.opener = find("#open-sidebar");
    this.search = find("#search");
    this.drawn = [[], null];
    this.search.addEventListener("input", () => this.draw(...this.drawn));
    this.search.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !this.search.value) return;
      event.stopPropagation(); // it would stop an answer
      event.preventDefault();
      this.search.value = "";
      this.draw(...this.drawn);
    });
    this.opener.addEventListener("click", () => this.#slide(true));
    for (const id of ["#close-sidebar", "#shade"]) find(id).addEventListener("click", () => this.close());
    matchMedia("(min-width: 48rem)").addEventListener("change", () => this.close());
  }

  get isOpen() {
    return document.body.classList.contains("drawer");
  }

  close() {
    if (this.isOpen) this.#slide(false);
  }

  #slide(open) {
    document.body.classList.toggle("drawer", open);
    this.opener.setAttribute("aria-expanded", String(open));
    find("#shade").hidden = !open;
    find("#main").inert = open;
    (open ? find("#close-sidebar") : this.opener).focus();
  }

  /** Draw the list anew; a focus in it stays where it was. */
  draw(conversations, shown) {
    this.drawn = [conversations, shown];
    const focused = find(":focus", this.list);
    const place = focused && [focused.parentNode.dataset.id, [...focused.parentNode.children].indexOf(focused)];
    const query = this.search.value.trim();
    const entries = conversations.flatMap((one) => {
      const found = query ? foundIn(one, query) : {};
      return found ? [this.#entry(one, one === shown, found)] : [];
    });
    this.list.replaceChildren(...entries);
    find("#found").textContent = query && !entries.length ? "Nothing found." : "";
    if (place) [...this.list.children].find((item) => item.dataset.id === place[0])?.children[place[1]]?.focus();
  }

  #entry(conversation, current, { message, snippet }) {
    const { open, rename, download, remove } = this.actions;
    const { id, title, running } = conversation;
    const attributes = { type: "button", "aria-current": current ? "true" : null, onclick: () => open(conversation, message) };
    const item = el("li", { "data-id": id, class: running ? "running" : null }, el("button", attributes, title, snippet ?? ""));
    // Only the shown one has buttons, so that there are few stops on the way through the list.
    if (current) {
      item.append(
        iconButton("edit", "Rename conversation", () => rename(conversation)),
        iconButton("export", "Export conversation", () => download(conversation)),
        iconButton("trash", "Delete conversation", () => remove(conversation)),
      );
    }
    return item;
  }
}
