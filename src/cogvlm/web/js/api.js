// The server's API, as any client of OpenAI's sees it. Addresses are relative to the page.

const LIMIT_MS = 20_000; // for the small questions; an answer may take as long as it takes

/** What went wrong, by a kind that the page has words for; `message` is the server's own. */
export class Problem extends Error {
  constructor(kind, { message = "", status = 0, after = null } = {}) {
    super(message || kind);
    Object.assign(this, { kind, said: message, status, after });
  }
}

const KINDS = { 401: "key", 403: "key", 404: "missing", 413: "large", 429: "busy", 503: "loading" };

function seconds(header) {
  const after = Number(header);
  return header !== null && Number.isFinite(after) && after >= 0 ? Math.min(after, 120) : null;
}

async function problemOf(response) {
  let message = "";
  try {
    const text = await response.text();
    message = text.slice(0, 500);
    const body = JSON.parse(text);
    message = String(body.error?.message ?? body.detail ?? message);
  } catch { /* not JSON: a proxy, or another program; its first words are shown */ }
  const kind = KINDS[response.status] ?? (response.status >= 500 ? "server" : "refused");
  if (message.trimStart().startsWith("<")) message = ""; // somebody's HTML says nothing to a person
  return new Problem(kind, { message, status: response.status, after: seconds(response.headers.get("Retry-After")) });
}

async function call(path, { key, ...options } = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "same-origin", cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted && error.name === "AbortError") throw error;
    throw new Problem("unreachable");
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function json(path, key) {
  const response = await call(path, { key, signal: AbortSignal.timeout(LIMIT_MS) });
  try {
    return await response.json();
  } catch {
    throw new Problem("strange");
  }
}

export async function models(key) {
  const list = (await json("v1/models", key)).data;
  if (!Array.isArray(list)) throw new Problem("strange");
  if (!list.length) throw new Problem("noModel");
  return list.map((model) => String(model.id));
}

/** Where pictures go: {kind: "local" | "remote" | "unknown", where, model, version, problem}. */
export async function about(key) {
  try {
    const said = await json("api/about", key);
    // Whatever does not say that it is local is taken to pass pictures on.
    return { kind: said.backend === "local" ? "local" : "remote", where: String(said.where ?? ""),
      model: String(said.model ?? ""), version: String(said.version ?? "") };
  } catch (problem) {
    if (problem.status === 404) return { kind: "local", where: "", model: "", version: "" };
    return { kind: "unknown", where: "", model: "", version: "", problem: problem.kind };
  }
}

/** The data of server-sent events, one string each, from a stream of bytes. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += done ? "\n\n" : value;
      const parts = rest.split(/\r\n\r\n|\n\n|\r\r/);
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split(/\r\n|\n|\r/).filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).replace(/^ /, "")).join("\n");
        if (data) yield data;
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // the server sees that nobody listens
  }
}

/** Chunks of a streamed answer. Ends only after [DONE]: an end without it is a broken line. */
export async function* chat(body, { key, signal }) {
  const response = await call("v1/chat/completions", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), key, signal,
  });
  if (!/^text\/event-stream/i.test(response.headers.get("Content-Type") ?? "")) throw new Problem("strange");
  try {
    for await (const data of events(response.body)) {
      if (data.trim() === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) {
        const status = Number(chunk.error.code ?? chunk.error.status) || 0;
        throw new Problem(KINDS[status] ?? "server", { message: String(chunk.error.message ?? chunk.error), status });
      }
      yield chunk;
    }
  } catch (error) {
    if (error instanceof Problem || signal.aborted) throw error;
    throw new Problem(error instanceof SyntaxError ? "strange" : "cut");
  }
  throw new Problem("cut");
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The request as a shell command; it holds the name of the key's variable, never the key. */
export function curl(body, { hasKey, note }) {
  const lines = [
    `curl -sN ${quoted(new URL("v1/chat/completions", document.baseURI).href)} \\`,
    "  -H 'Content-Type: application/json' \\",
    ...(hasKey ? ['  -H "Authorization: Bearer $OPENAI_API_KEY" \\'] : []),
    "  --data-binary @- <<'JSON'", // through a pipe: a picture is longer than a command line may be
    JSON.stringify(body, null, 1),
    "JSON",
  ];
  return (note ? `# ${note}\n` : "") + lines.join("\n") + "\n";
}
