// The settings panel. What is left empty is not sent: the server's own default holds.

import { models, Problem } from "./api.js";
import { $, h, memory } from "./dom.js";
import { t } from "./i18n.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const NAMES = ["model", ...NUMBERS, "system"];
const local = memory("localStorage");
const session = memory("sessionStorage");

let values = {};
try {
  values = JSON.parse(local.get("settings")) ?? {};
} catch { /* written by another hand: start afresh */ }
let key = session.get("key") ?? "";
let offered = [];
let failed = null; // why there is no list of models: [key of its words, what the server said]
let changedKey = () => {};

export const apiKey = () => key;

function keep() {
  local.set("settings", JSON.stringify(values));
}

/** What a request carries, as numbers, plus `system`. Throws Problem where no model is known. */
export async function current() {
  if (!offered.length) await refresh();
  if (!offered.length) throw new Problem(failed.kind, { message: failed.said, status: failed.status });
  const numbers = NUMBERS.filter((name) => values[name]).map((name) => [name, Number(values[name])]);
  return { model: chosen(), ...Object.fromEntries(numbers), system: (values.system ?? "").trim() };
}

const chosen = () => (offered.includes(values.model) ? values.model : offered[0]);

/** Asks the server which models it has. */
export async function refresh() {
  try {
    offered = await models(key);
    failed = null;
  } catch (problem) {
    offered = [];
    failed = problem instanceof Problem ? problem : new Problem("server");
  }
  drawModels();
}

function drawModels() {
  $("model").replaceChildren(...offered.map((name) => h("option", { value: name }, name)));
  $("model").disabled = !offered.length;
  if (offered.length) $("model").value = chosen();
  $("model-note").textContent = failed ? t("modelsFailed", { why: failed.said || t(failed.kind) }) : "";
}

function check(input) {
  const note = $(`${input.id}-note`);
  const fine = input.checkValidity();
  input.setAttribute("aria-invalid", String(!fine));
  note.classList.toggle("wrong", !fine);
  note.textContent = fine ? t(note.dataset.text) : input.validationMessage;
  return fine;
}

/** Shows the kept values again, in the language of the moment. */
export function draw() {
  for (const name of [...NUMBERS, "system"]) $(name).value = values[name] ?? "";
  for (const name of NUMBERS) check($(name));
  $("key").value = key;
  $("keep-key").checked = session.get("key") !== null;
  drawModels();
}

function keepKey() {
  session.set("key", $("keep-key").checked && key ? key : null);
}

export function open() {
  draw();
  $("settings").showModal();
  if (!offered.length) refresh();
}

export function start({ onkey }) {
  changedKey = onkey;
  for (const name of NAMES) {
    $(name).addEventListener("input", () => {
      if (NUMBERS.includes(name) && !check($(name))) return;
      values[name] = $(name).value;
      keep();
    });
  }
  $("key").addEventListener("change", async () => {
    // A header carries Latin letters only: anything else cannot be a key.
    key = $("key").value.trim().replace(/[^\x21-\x7e]/g, "");
    $("key").value = key;
    keepKey();
    await refresh();
    changedKey();
  });
  $("keep-key").addEventListener("change", keepKey);
  $("reset").addEventListener("click", () => {
    values = {};
    keep();
    draw();
  });
  $("settings").querySelector("form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches("input")) { // Enter keeps and closes, as Done
      event.preventDefault();
      event.target.blur();
      $("settings").close();
    }
  });
}
