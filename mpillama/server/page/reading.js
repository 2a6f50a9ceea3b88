// Where the reader is: new text moves the page only for a reader at its end.

const NEAR = 32;

/** Follows the end of `log` as long as the reader does; `newest` is a button that goes there. */
export class Reading {
  constructor(log, newest) {
    this.log = log;
    this.newest = newest;
    this.following = true;
    log.addEventListener("scroll", () => {
      this.following = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
      newest.hidden = this.following;
    });
    newest.addEventListener("click", () => {
      this.toEnd();
      log.focus({ preventScroll: true });
    });
    // A keyboard that opens on a phone, or a window that is made smaller, must not hide the end.
    new ResizeObserver(() => this.follow()).observe(log);
  }

  /** There is more text. */
  follow() {
    if (this.following) this.log.scrollTop = this.log.scrollHeight;
  }

  toEnd() {
    this.following = true;
    this.newest.hidden = true;
    this.follow();
  }
}

/** Make a text field as high as its text; its style sheet says where that ends. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}
