// The list of conversations, and what can be done with one: open, rename, export, delete.

import { $, button, download, h } from "./dom.js";
import { t } from "./i18n.js";
import { dataUrl } from "./pictures.js";
import * as store from "./store.js";

/** Asks a yes-or-no question, or for a line of text; null means no. */
export function ask(text, { yes, value = null }) {
  const dialog = $("prompt");
  const input = $("prompt-input");
  $("prompt-text").textContent = text;
  $("prompt-yes").textContent = yes;
  $("prompt-yes").classList.toggle("danger", value === null);
  input.hidden = value === null;
  input.value = value ?? "";
  dialog.returnValue = "";
  dialog.showModal();
  (value === null ? $("prompt-no") : input).focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes" ? input.value.trim() || yes : null), { once: true });
  });
}

async function exported(conversation) {
  const turns = await Promise.all(conversation.turns.map(async ({ text, pictures, answer }) => ({
    question: { text, pictures: await Promise.all(pictures.map(async (picture) => ({
      name: picture.name, type: picture.type, width: picture.width, height: picture.height, data: await dataUrl(picture) }))) },
    answer: answer && { text: answer.text, state: answer.state, finish: answer.finish, usage: answer.usage,
      seconds: { first: answer.first, total: answer.total }, settings: answer.settings },
  })));
  return { format: "cogvlm-conversation", version: 1, title: conversation.title, created: new Date(conversation.created).toISOString(), turns };
}

const fileName = (title) => (title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "conversation") + ".json";

/** `row` is a conversation without blobs; `actions` are {open, renamed, removed, current}. */
function item(row, actions) {
  const isCurrent = row.id === actions.current;
  const whole = async () => actions.live(row.id) ?? store.load(row.id);
  const rename = async () => {
    const title = await ask(t("renameThis"), { yes: t("rename"), value: row.title });
    if (!title) return;
    const conversation = await whole();
    Object.assign(conversation, { title, renamed: true });
    await store.save(conversation);
    actions.changed(conversation);
  };
  const remove = async () => {
    if (!(await ask(t("deleteThis", { title: row.title }), { yes: t("delete") }))) return;
    await actions.removed(row);
  };
  const save = async () => download(fileName(row.title), JSON.stringify(await exported(await whole()), null, 1), "application/json");
  return h(isCurrent ? "li.current" : "li", {},
    h("button.open", { type: "button", title: row.title, "aria-current": isCurrent ? "true" : undefined, onclick: () => actions.open(row.id) }, row.title),
    h("span.tools", {}, button("pencil", t("rename"), rename), button("save", t("exportIt"), save), button("trash", t("delete"), remove)));
}

export async function draw(actions) {
  const rows = await store.list();
  $("conversations").replaceChildren(...rows.map((row) => item(row, actions)));
}
