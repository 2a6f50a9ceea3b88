// The list of conversations; on a narrow screen it is a drawer.

import { el, find, iconButton } from "./dom.js";

/** Draws the list; `actions` are functions of a conversation: open, rename, download, remove. */
export class Sidebar {
  constructor(actions) {
    this.actions = actions;
    this.list = find("#conversations");
    this.opener = find("#open-sidebar");
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
    const focused = find(":focus", this.list);
    const place = focused && [focused.parentNode.dataset.id, [...focused.parentNode.children].indexOf(focused)];
    this.list.replaceChildren(...conversations.map((one) => this.#entry(one, one === shown)));
    if (place) [...this.list.children].find((item) => item.dataset.id === place[0])?.children[place[1]]?.focus();
  }

  #entry(conversation, current) {
    const { open, rename, download, remove } = this.actions;
    const { id, title, running } = conversation;
    const attributes = { type: "button", "aria-current": current ? "true" : null, onclick: () => open(conversation) };
    const item = el("li", { "data-id": id, class: running ? "running" : null }, el("button", attributes, title));
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
