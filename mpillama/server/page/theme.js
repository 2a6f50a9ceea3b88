// A classic script in the head, so that nothing is painted in the wrong colours first. No stored choice: the system's.
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const KEY = "mpillama.theme";

  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

  try {
    const stored = localStorage.getItem(KEY);
    if (stored === "dark" || stored === "light") root.dataset.theme = stored;
  } catch {
    // Storage is not to be had; the choice lasts as long as the page.
  }

  function label() {
    const button = document.getElementById("theme");
    button.querySelector("span").textContent = dark() ? "Light colours" : "Dark colours";
  }

  function choose() {
    const wanted = dark() ? "light" : "dark";
    const same = (wanted === "dark") === system.matches;
    if (same) delete root.dataset.theme;
    else root.dataset.theme = wanted;
    try {
      if (same) localStorage.removeItem(KEY);
      else localStorage.setItem(KEY, wanted);
    } catch {
      // As above.
    }
    label();
  }

  addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", choose);
    system.addEventListener("change", label);
    label();
  });
})();
