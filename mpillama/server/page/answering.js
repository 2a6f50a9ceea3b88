// One answer: the request, what comes, how it ends and how fast it was.

import { withFiles } from "./attachments.js";
import { LOCKED, check, completion, server } from "./server.js";

const AT_ONCE = 50; // milliseconds

/**
 * Ask for the answer to a conversation and add it, or let the last answer go on if it is `continued`; `changed` is
 * called whenever there is something to show.
 */
export async function answer(conversation, changed, continued = false) {
  const body = requestBody(conversation, continued);
  const message = continued ? conversation.messages.at(-1) : { role: "assistant", content: "" };
  const abort = new AbortController();
  if (!continued) conversation.messages.push(message);
  delete message.end;
  delete message.error;
  conversation.running = abort;
  conversation.updated = Date.now();
  const wait = (why) => {
    message.waiting = why;
    changed();
  };
  try {
    await receive(message, completion(body, abort.signal, wait), changed);
    message.end ??= "stop";
  } catch (error) {
    message.end = abort.signal.aborted ? "stopped" : "error";
    if (message.end === "error") fail(message, error);
  }
  conversation.running = null;
  conversation.updated = Date.now();
}

function fail(message, error) {
  // Fetch's own words say little, and differ between browsers.
  message.error = error instanceof TypeError ? "The server cannot be reached." : error.message;
  if (error !== LOCKED) check(); // perhaps the server has ended, or runs another model by now
}

async function receive(message, chunks, changed) {
  const asked = performance.now();
  let first = 0;
  let last = 0;
  let usage = null;
  for await (const chunk of chunks) {
    const choice = chunk.choices?.[0];
    message.model = chunk.model ?? message.model;
    usage = chunk.usage ?? usage;
    const { content, reasoning_content: thought } = choice?.delta ?? {};
    if (content || thought) {
      if (thought) message.reasoning = (message.reasoning ?? "") + thought;
      message.content += content ?? "";
      last = performance.now();
      first ||= last;
    }
    if (choice?.finish_reason) message.end = choice.finish_reason;
    changed();
  }
  const before = message.stats?.tokens ?? 0; // of an answer that goes on
  if (usage) message.stats = stats(usage, asked, first, last);
  if (usage) message.stats.tokens += before;
}

/** Tokens a second count from the first token on; where all came at once, through a proxy perhaps, from the request. */
function stats(usage, asked, first, last) {
  const tokens = usage.completion_tokens;
  const atOnce = last - first < AT_ONCE;
  const rate = atOnce ? (1000 * tokens) / (performance.now() - asked) : (1000 * (tokens - 1)) / (last - first);
  const wait = first && !atOnce ? (first - asked) / 1000 : null;
  return { tokens, rate, wait, used: usage.total_tokens, context: server.context };
}

/** The body of the request: settings that are not set are left to the server. */
function requestBody({ messages, settings }, continued) {
  const { system, ...sampling } = settings;
  return {
    ...(server.model && { model: server.model }),
    messages: [...(system ? [{ role: "system", content: system }] : []), ...turns(messages, continued)],
    stream: true,
    stream_options: { include_usage: true },
    ...(continued && { continue_final_message: true, add_generation_prompt: false }),
    ...sampling,
  };
}

/** Roles and contents; templates of some models insist that user and assistant take turns. */
function turns(messages, continued) {
  const taken = [];
  for (const { role, content } of messages.map((one) => ({ role: one.role, content: withFiles(one) }))) {
    if (content && taken.at(-1)?.role === role) taken.at(-1).content += `\n\n${content}`;
    else if (content) taken.push({ role, content });
  }
  // What was thought before is not needed for new answers, only for the rest of the same one.
  const { reasoning } = messages.at(-1);
  if (continued && reasoning) taken.at(-1).reasoning_content = reasoning;
  return taken;
}
