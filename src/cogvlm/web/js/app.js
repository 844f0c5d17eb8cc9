// The page put together: which conversation is open, asking, stopping, and what surrounds them.

import { about, curl, Problem } from "./api.js";
import * as composer from "./composer.js";
import { $, copyText, icon, memory, newId } from "./dom.js";
import * as history from "./history.js";
import { switchLanguage, t, translate } from "./i18n.js";
import { reader, say } from "./live.js";
import { urlOf } from "./pictures.js";
import * as run from "./run.js";
import * as settings from "./settings.js";
import * as store from "./store.js";
import { turnView } from "./talk.js";

const THEMES = ["auto", "light", "dark"];
const SIGNS = { auto: "auto", light: "sun", dark: "moon" };
const SAVE_MS = 1000; // how often an answer that is being written is kept
const local = memory("localStorage");
const runs = new Map(); // id of a conversation -> {conversation, controller}: what is being answered
let current = blank();
let views = [];
let editing = null; // index of the question that is being changed
let place = { kind: "unknown" };
let keeps = true;

function blank() {
  return { id: newId(), title: "", created: Date.now(), updated: Date.now(), turns: [] };
}

// ---- where pictures go -----------------------------------------------------------------------

const HERE = ["localhost", "127.0.0.1", "[::1]"];
const placeWhere = (to) => to.where || t("otherService");

function placeText() {
  if (place.kind === "unknown") return t(place.problem === "key" ? "placeKey" : "placeUnknown");
  if (place.kind === "remote") return t("placeRemote", { where: placeWhere(place) });
  return HERE.includes(location.hostname) ? t("placeLocal") : t("placeHost", { host: location.host });
}

function drawPlace() {
  const model = [place.model, place.version].filter(Boolean).join(" · ");
  $("place").className = place.kind;
  $("place").textContent = placeText();
  $("place").title = model;
}

async function findPlace() {
  place = await about(settings.apiKey());
  drawPlace();
}

/** Before a request with pictures: nothing is sent to a place that the person was not told of. */
async function before(withPictures) {
  if (!withPictures) return;
  const told = place;
  await findPlace();
  if (place.kind === "remote" && (told.kind !== "remote" || told.where !== place.where)) {
    throw Object.assign(new Problem("moved"), { where: placeWhere(place) });
  }
  if (place.kind === "unknown" && told.kind !== "unknown") {
    const { problem } = place;
    place = { ...told, problem }; // what was told still holds; the request will show the trouble
    throw new Problem(problem === "key" ? "key" : "unreachable");
  }
}

// ---- the conversation ------------------------------------------------------------------------

const atBottom = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 80;
const toBottom = () => { $("scroll").scrollTop = $("scroll").scrollHeight; };

const actions = {
  look(picture) {
    $("viewer-picture").src = urlOf(picture);
    $("viewer-picture").alt = picture.name;
    $("viewer-name").textContent = `${picture.name} · ${picture.width} × ${picture.height}`;
    $("viewer").showModal();
  },
  settings: () => settings.open(),
  retry: (index) => respond(index),
  edit(index) {
    setEditing(index);
    const { text, pictures } = current.turns[index];
    composer.fill(text, pictures);
  },
  copy: (index, button) => copy(current.turns[index].answer.text, button),
  async curl(index, full, button) {
    const body = await run.request(current, index, !full);
    const note = !full && run.hasPictures(current, index) ? t("curlNote") : "";
    await copy(curl(body, { hasKey: settings.apiKey() !== "", note }), button);
  },
};

async function copy(text, button) {
  const words = button.querySelector("span");
  const before = words.textContent;
  try {
    await copyText(text);
    words.textContent = t("copied");
  } catch {
    words.textContent = t("copyFailed");
  }
  say(words.textContent);
  setTimeout(() => { words.textContent = before; }, 1500);
}

function drawTurns() {
  views = current.turns.map((_, index) => turnView(current, index, actions));
  $("turns").replaceChildren(...views.map((view) => view.element));
  $("empty").hidden = current.turns.length > 0;
  $("title").textContent = current.title || t("newConversation");
  document.title = current.title ? `${current.title} · CogVLM` : "CogVLM";
  drawButtons();
}

function drawButtons() {
  const busy = runs.has(current.id);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
}

const drawHistory = () => history.draw({
  current: current.id,
  live: (id) => (id === current.id ? current : runs.get(id)?.conversation),
  open: openConversation,
  changed(conversation) {
    if (conversation.id === current.id) drawTurns();
    drawHistory();
  },
  async removed(row) {
    runs.get(row.id)?.controller.abort();
    runs.delete(row.id);
    await store.remove(row);
    if (row.id === current.id) show(blank());
    await drawHistory();
    $("new").focus();
    say(t("deleted"));
  },
});

function show(conversation) {
  current = conversation;
  local.set("open", conversation.turns.length ? conversation.id : null);
  setEditing(null);
  drawTurns();
  toBottom();
}

async function openConversation(id) {
  const conversation = runs.get(id)?.conversation ?? (id === current.id ? current : await store.load(id));
  if (!conversation) return;
  for (const { answer } of conversation.turns) {
    // The page was closed while this was being written.
    if (["waiting", "streaming"].includes(answer.state) && !runs.has(id)) answer.state = "stopped";
  }
  show(conversation);
  showHistory(false);
  drawHistory();
}

function newConversation() {
  show(blank());
  showHistory(false);
  drawHistory();
  $("question").focus();
}

function setEditing(index) {
  if (editing !== null && index === null) composer.clear();
  editing = index;
  $("editing").hidden = index === null;
  $("editing-text").textContent = index === null ? "" : t("editing", { n: index + 1 });
  document.querySelectorAll("#turns > li").forEach((node, i) => node.classList.toggle("replaced", index !== null && i >= index));
}

async function ask() {
  const conversation = current;
  await composer.settled(); // pictures that are still being read belong to the question
  if (conversation !== current || runs.has(current.id)) return;
  const question = composer.take();
  if (!question) return;
  const index = editing ?? current.turns.length;
  const first = index === 0;
  current.turns.splice(index, Infinity, { id: newId(), ...question, answer: null });
  if (first && !current.renamed) current.title = question.text.replace(/\s+/g, " ").slice(0, 60);
  editing = null;
  $("editing").hidden = true;
  composer.clear();
  respond(index);
}

/** Answers the question at `index`, which is the last one. */
async function respond(index) {
  const conversation = current;
  if (runs.has(conversation.id)) return;
  const turn = conversation.turns[index];
  const controller = new AbortController();
  runs.set(conversation.id, { conversation, controller });
  turn.answer = run.blank({});
  conversation.updated = Date.now();
  local.set("open", conversation.id);
  drawTurns();
  toBottom();
  say(t("waiting"));

  const read = reader();
  let drawn = 0;
  let saved = performance.now();
  const changed = () => {
    if (!runs.has(conversation.id)) return; // deleted meanwhile
    if (performance.now() - saved > SAVE_MS) {
      saved = performance.now();
      keep(conversation);
    }
    if (conversation !== current || drawn) return;
    drawn = requestAnimationFrame(() => {
      drawn = 0;
      if (conversation !== current || !views[index]) return;
      const follow = atBottom();
      views[index].update();
      if (follow) toBottom();
      read(turn.answer.text, false);
    });
  };
  await keep(conversation);
  drawHistory();
  const key = settings.apiKey();
  try {
    turn.answer.settings = await settings.current();
    await run.answer(conversation, index, { key, signal: controller.signal, before, changed });
  } catch (problem) { // no model is known
    turn.answer.state = controller.signal.aborted ? "stopped" : "failed";
    if (!controller.signal.aborted) turn.answer.problem = { kind: problem.kind ?? "server", said: problem.said ?? String(problem), status: problem.status ?? 0 };
  }
  cancelAnimationFrame(drawn);
  if (!runs.has(conversation.id)) return;
  runs.delete(conversation.id);
  await keep(conversation);
  if (conversation === current) {
    const follow = atBottom();
    views[index]?.update();
    drawButtons();
    if (follow) toBottom();
    read(turn.answer.text, true);
    if (turn.answer.state === "stopped") say(t("stopped"));
    if (document.activeElement === document.body) $("question").focus();
  }
  if (["unreachable", "key"].includes(turn.answer.problem?.kind)) findPlace();
}

async function keep(conversation) {
  try {
    await store.save(conversation);
  } catch { // the disk is full, or the browser's share of it
    keeps = false;
    drawKept();
  }
}

function drawKept() {
  $("kept").dataset.text = keeps ? "keptHere" : "notKept";
  $("kept").textContent = t($("kept").dataset.text);
}

// ---- what surrounds it -----------------------------------------------------------------------

const narrow = matchMedia("(max-width: 800px)");

function showHistory(open) {
  const drawer = narrow.matches;
  $("history").inert = drawer && !open;
  $("history").classList.toggle("open", drawer && open);
  $("shade").hidden = !(drawer && open);
  $("open-history").setAttribute("aria-expanded", String(drawer && open));
  if (drawer && open) $("close-history").focus();
}

function drawTheme() {
  const theme = local.get("theme") ?? "auto";
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const label = t({ auto: "themeAuto", light: "themeLight", dark: "themeDark" }[theme]);
  $("theme").replaceChildren(icon(SIGNS[theme]));
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
}

function drawExamples() {
  $("examples").replaceChildren(...["example1", "example2", "example3"].map((key) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = t(key);
    button.addEventListener("click", () => composer.fill(t(`${key}Text`)));
    item.append(button);
    return item;
  }));
}

function drawAll() {
  translate();
  drawTheme();
  drawExamples();
  drawPlace();
  drawKept();
  drawTurns();
  composer.draw();
  settings.draw();
  drawHistory();
  if (editing !== null) setEditing(editing);
}

function listen() {
  composer.start({ onlook: actions.look, onask: ask });
  settings.start({ onkey: findPlace });
  $("stop").addEventListener("click", () => {
    runs.get(current.id)?.controller.abort();
    $("question").focus();
  });
  $("new").addEventListener("click", newConversation);
  $("open-settings").addEventListener("click", () => settings.open());
  $("cancel-edit").addEventListener("click", () => {
    setEditing(null);
    $("question").focus();
  });
  $("language").addEventListener("click", () => {
    switchLanguage();
    drawAll();
  });
  $("theme").addEventListener("click", () => {
    local.set("theme", THEMES[(THEMES.indexOf(local.get("theme") ?? "auto") + 1) % THEMES.length]);
    drawTheme();
  });
  $("open-history").addEventListener("click", () => showHistory(true));
  for (const id of ["close-history", "shade"]) $(id).addEventListener("click", () => {
    showHistory(false);
    $("open-history").focus();
  });
  narrow.addEventListener("change", () => showHistory(false));
  $("prompt-no").addEventListener("click", () => $("prompt").close());
  $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if ($("history").classList.contains("open")) $("close-history").click();
    else if (runs.has(current.id)) $("stop").click();
    else if (editing !== null) $("cancel-edit").click();
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) findPlace(); });
}

async function start() {
  for (const node of document.querySelectorAll("[data-icon]")) node.prepend(icon(node.dataset.icon));
  listen();
  drawAll();
  showHistory(false);
  keeps = await store.open();
  drawKept();
  const last = local.get("open");
  if (last) await openConversation(last);
  else drawHistory();
  document.documentElement.dataset.ready = "";
  if (!narrow.matches) $("question").focus(); // on a phone that would raise the keyboard
  await Promise.all([settings.refresh(), findPlace()]);
}

start();
