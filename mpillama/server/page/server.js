// What the page asks the server: whether it is ready, which model it runs, and for answers. Addresses are relative, so
// that the page also works behind a proxy that adds a path.

const KEY = "mpillama.key";
const CHECK_SECONDS = 2;
const WAIT_SECONDS = 3;
const MOST_WAIT_SECONDS = 60;

export const LOCKED = new Error("The server wants an API key.");

/** What is known of the server; state is connecting, ok, loading, draining, unreachable or locked. */
export const server = {
  state: "connecting",
  model: null,
  context: null,
  patience: 60, // seconds without a sign of life; in an answer the server gives one at least every 15
  onchange: () => {},
  askKey: async () => null,
};

let key = "";
let asking = null;
let checking = null;
let timer = 0;

/** Take the key from the address (#key=...), where it does not stay, or from this tab's storage; whether it is new. */
export function takeKey() {
  try {
    key ||= sessionStorage.getItem(KEY) ?? "";
  } catch {
    // Without storage a key lasts as long as the page.
  }
  const given = /^#key=(.*)/.exec(location.hash)?.[1];
  if (given === undefined) return false;
  history.replaceState(history.state, "", location.pathname + location.search);
  try {
    setKey(decodeURIComponent(given)); // not URLSearchParams, for which a "+" is a space
  } catch {
    setKey(given); // it was not encoded, and has a "%"
  }
  return true;
}

export const hasKey = () => Boolean(key);

export function setKey(value) {
  key = value.trim();
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // As above.
  }
}

/** Fetch with the key; when the server wants one or another, the reader is asked. */
async function call(path, init = {}) {
  for (;;) {
    const used = key;
    const headers = { ...init.headers, ...(used && { Authorization: `Bearer ${used}` }) };
    const response = await fetch(new URL(path, document.baseURI), { ...init, headers, cache: "no-store" });
    if (response.status !== 401) return response;
    if (key !== used) continue; // another request has got a new key meanwhile
    asking ??= server.askKey(Boolean(used)).finally(() => (asking = null));
    const given = await asking;
    if (given === null) {
      become("locked");
      throw LOCKED;
    }
    if (key === used) setKey(given);
    if (server.state === "locked") check();
  }
}

function become(state) {
  server.state = state;
  server.onchange();
}

/** Look whether the server is ready, and again later until it is. */
export function check() {
  checking ??= look().finally(() => (checking = null));
  return checking;
}

async function look() {
  clearTimeout(timer);
  try {
    const signal = AbortSignal.timeout(server.patience * 1000);
    const response = await fetch(new URL("health", document.baseURI), { cache: "no-store", signal });
    const { status } = await response.json();
    if (status === "ok") await lookAtModel();
    become(status);
  } catch (error) {
    if (error !== LOCKED) become("unreachable");
  }
  if (!["ok", "locked"].includes(server.state)) timer = setTimeout(check, CHECK_SECONDS * 1000);
}

async function lookAtModel() {
  const response = await call("v1/models");
  if (!response.ok) throw new Error(await reason(response));
  const [model] = (await response.json()).data;
  server.model = model.id;
  server.context = model.max_model_len ?? null;
}

/** The chunks of an answer as they come; `waiting` is told when the server has no room yet and is asked again. */
export async function* completion(body, signal, waiting) {
  const init = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  let response = await call("v1/chat/completions", init);
  while (!response.ok) {
    const why = await busy(response);
    if (!why) throw new Error(await reason(response));
    const told = Number(response.headers.get("Retry-After")) || WAIT_SECONDS;
    const seconds = Math.min(MOST_WAIT_SECONDS, Math.max(1, told));
    waiting(`${why}, trying again in ${seconds} s`);
    await pause(seconds, signal);
    response = await call("v1/chat/completions", init);
  }
  waiting(null);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
  throw new Error("The connection ended before the answer did.");
}

/** The blocks of texts in Markdown as HTML, or null if the server does not render them. */
export async function rendered(texts) {
  try {
    const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
    const signal = AbortSignal.timeout(server.patience * 1000);
    const init = { method: "POST", headers, body: JSON.stringify({ texts }), cache: "no-store", signal };
    const response = await fetch(new URL("page/render", document.baseURI), init);
    return response.ok ? (await response.json()).documents : null;
  } catch {
    return null; // it cannot be reached, which is told elsewhere
  }
}

/** Why a refused request may succeed later, or "". */
async function busy({ status }) {
  if (status === 429) return "Too many requests are waiting";
  if (status !== 503) return "";
  const before = server.state;
  await check();
  return [before, server.state].includes("loading") ? "The model is still loading" : "";
}

/** The data of server-sent events; OpenAI's have one line each. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await patiently(reader.read());
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already, which was told
  }
}

/** What is promised, or an error if it is too long in coming, as when a tunnel has broken unnoticed. */
function patiently(promise) {
  let timer = 0;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error("The server has fallen silent.")), server.patience * 1000);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const wait = setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", () => {
      clearTimeout(wait);
      reject(signal.reason);
    });
  });
}
