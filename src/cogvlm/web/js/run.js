// One question to its answer: the request, its stream, waiting while the server is busy, measures.
// Knows nothing of the page; it fills `turn.answer` and calls `changed` after every piece.

import { chat, Problem } from "./api.js";
import { dataUrl } from "./pictures.js";

const TRIES = 3; // how often a busy server is asked again
const PATIENCE_S = 5; // when it does not say how long to wait

async function content(turn, short) {
  if (!turn.pictures.length) return turn.text;
  const urls = await Promise.all(turn.pictures.map((picture) => dataUrl(picture, short)));
  return [...urls.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text: turn.text }];
}

/** The exact request for the question at `index`; questions without an answer are left out. */
export async function request(conversation, index, short = false) {
  const { system, ...settings } = conversation.turns[index].answer.settings;
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of conversation.turns.slice(0, index)) {
    if (!turn.answer?.text) continue;
    messages.push({ role: "user", content: await content(turn, short) }, { role: "assistant", content: turn.answer.text });
  }
  messages.push({ role: "user", content: await content(conversation.turns[index], short) });
  return { ...settings, messages, stream: true, stream_options: { include_usage: true } };
}

export const hasPictures = (conversation, index) =>
  conversation.turns.slice(0, index + 1).some((turn, i) => turn.pictures.length && (i === index || turn.answer?.text));

const rest = (ms, signal) => new Promise((resolve, reject) => {
  const gone = () => { clearTimeout(timer); reject(signal.reason); };
  const timer = setTimeout(() => { signal.removeEventListener("abort", gone); resolve(); }, ms);
  signal.addEventListener("abort", gone, { once: true });
});

async function read(answer, body, { key, signal, changed }) {
  const start = performance.now();
  const now = () => (performance.now() - start) / 1000;
  for await (const chunk of chat(body, { key, signal })) {
    if (chunk.usage) answer.usage = { in: chunk.usage.prompt_tokens, out: chunk.usage.completion_tokens };
    const choice = chunk.choices?.[0];
    const piece = choice?.delta?.content;
    if (choice?.finish_reason) answer.finish = choice.finish_reason;
    answer.total = now();
    if (piece) {
      answer.first ??= answer.total;
      answer.last = answer.total;
      answer.text += piece;
      answer.state = "streaming";
      changed();
    }
  }
}

/** Tokens a second while writing: the first token's time is waiting, not writing. Null where all
 * came at once, so that there is nothing to measure. */
export function rate({ usage, first, last }) {
  if (!usage || first === null || usage.out < 2 || last - first < 0.05) return null;
  return (usage.out - 1) / (last - first);
}

export const blank = (settings) => ({
  text: "", state: "waiting", wait: null, problem: null, finish: null, usage: null,
  first: null, last: null, total: null, settings,
});

/** Never throws: what went wrong is in `answer.problem`. `before` may refuse by throwing Problem. */
export async function answer(conversation, index, { key, signal, before, changed }) {
  const mine = conversation.turns[index].answer;
  try {
    const body = await request(conversation, index);
    await before(hasPictures(conversation, index));
    for (let n = 1; ; n += 1) {
      try {
        await read(mine, body, { key, signal, changed });
        break;
      } catch (error) {
        if (error.kind !== "busy" || mine.text || n > TRIES) throw error;
        for (let s = Math.max(1, Math.ceil(error.after ?? PATIENCE_S)); s > 0; s -= 1) {
          mine.wait = { s, n, all: TRIES };
          changed();
          await rest(1000, signal);
        }
        mine.wait = null;
      }
    }
    mine.state = "done";
  } catch (error) {
    mine.wait = null;
    mine.state = signal.aborted ? "stopped" : "failed";
    if (!signal.aborted) {
      if (!(error instanceof Problem)) console.error(error);
      const { kind = "server", said = "", status = 0, where = "" } = error;
      mine.problem = { kind, said: said || (error instanceof Problem ? "" : String(error)), status, where };
    }
  }
  changed();
}
