// Where a question is made: its text and its pictures, dropped, pasted or picked, in an order.

import { $, button, h } from "./dom.js";
import { number, t } from "./i18n.js";
import { say } from "./live.js";
import { looksLikePicture, read, urlOf } from "./pictures.js";

let pictures = [];
let notes = []; // [key, values]: kept so, to follow a change of language
let reading = Promise.resolve();
let dragged = null;
const field = $("question");

const size = ([w, h2]) => `${number(w)} × ${number(h2)}`;

function note(key, values) {
  notes.push([key, values]);
  drawNotes();
}

function drawNotes() {
  $("notes").replaceChildren(...notes.map(([key, values]) => h("p", {}, t(key, values))));
}

async function addOne(file) {
  const name = file.name || t("picture");
  if (!looksLikePicture(file)) {
    note("notPicture", { name });
    return;
  }
  try {
    const picture = await read(file);
    pictures.push(picture);
    if (picture.was) note("converted", { name, type: picture.type, was: picture.was });
    if (picture.from) note("shrunk", { name, from: size(picture.from), to: size([picture.width, picture.height]) });
  } catch {
    note("unreadable", { name });
  }
  draw();
}

/** Reads files in order; each gives a thumbnail or a sentence that says why not. */
export function add(files) {
  for (const file of files) reading = reading.then(() => addOne(file));
  return reading;
}

/** Resolves when every picture that was given has been read. */
export const settled = () => reading;

function move(from, to) {
  if (to < 0 || to >= pictures.length || from === to) return;
  pictures.splice(to, 0, ...pictures.splice(from, 1));
  draw();
  $("pictures").children[to].focus();
  say(t("thumbMoved", { n: to + 1, all: pictures.length }));
}

function drop(index) {
  const [{ name }] = pictures.splice(index, 1);
  if (!pictures.length) notes = [];
  draw();
  ($("pictures").children[Math.min(index, pictures.length - 1)] ?? field).focus();
  say(t("thumbRemoved", { name }));
}

function keys(event, index, look) {
  if (event.target !== event.currentTarget) return;
  const act = {
    ArrowLeft: () => move(index, index - 1),
    ArrowRight: () => move(index, index + 1),
    Delete: () => drop(index),
    Backspace: () => drop(index),
    Enter: () => look(pictures[index]),
  }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

let look = () => {};

function thumb(picture, index) {
  const all = pictures.length;
  const label = t("thumb", { n: index + 1, all, name: picture.name, width: number(picture.width), height: number(picture.height) });
  const node = h("li.thumb", { tabindex: "0", draggable: "true", "aria-label": label, title: picture.name,
    onkeydown: (event) => keys(event, index, look),
    ondblclick: () => look(picture),
    ondragstart: (event) => {
      dragged = index;
      event.dataTransfer.effectAllowed = "move";
      event.dataTransfer.setData("text/plain", picture.name);
    },
    ondragend: () => { dragged = null; },
    ondragover: (event) => { if (dragged !== null) event.preventDefault(); },
    ondrop: (event) => {
      if (dragged === null) return;
      event.preventDefault();
      move(dragged, index);
      dragged = null;
    } },
  h("img", { src: urlOf(picture), alt: "", draggable: "false" }),
  button("close", t("remove"), () => drop(index)));
  node.lastElementChild.classList.add("remove");
  if (all > 1) {
    const left = button("left", t("moveLeft"), () => move(index, index - 1));
    const right = button("right", t("moveRight"), () => move(index, index + 1));
    left.disabled = index === 0;
    right.disabled = index === all - 1;
    node.append(h("div.order", {}, left, right));
  }
  return node;
}

/** Draws everything again, in the language of the moment. */
export function draw() {
  const focused = [...$("pictures").children].indexOf(document.activeElement);
  $("pictures").replaceChildren(...pictures.map(thumb));
  $("pictures").children[focused]?.focus();
  drawNotes();
  grow();
}

function grow() {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

export function clear() {
  pictures = [];
  notes = [];
  field.value = "";
  draw();
}

export function fill(text, some = null) {
  field.value = text;
  if (some) {
    pictures = [...some];
    notes = [];
  }
  draw();
  field.focus();
}

/** {text, pictures}, or null when there is no question yet, and then a word that says so. */
export function take() {
  const text = field.value.trim();
  if (!text) {
    if (!notes.some(([key]) => key === "needQuestion")) note("needQuestion");
    field.focus();
    return null;
  }
  return { text, pictures: [...pictures] };
}

const filesOf = (transfer) => [...(transfer?.files ?? [])];
const carriesFiles = (event) => dragged === null && event.dataTransfer?.types.includes("Files");

export function start({ onlook, onask }) {
  look = onlook;
  field.addEventListener("input", () => {
    notes = notes.filter(([key]) => key !== "needQuestion");
    drawNotes();
    grow();
  });
  field.addEventListener("keydown", (event) => {
    // An input method's Enter picks a word; it must not send half a question.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    onask();
  });
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    onask();
  });
  for (const id of ["pick", "invite"]) $(id).addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", async () => {
    const files = [...$("file").files];
    $("file").value = "";
    field.focus();
    await add(files);
  });
  document.addEventListener("paste", (event) => {
    const files = filesOf(event.clipboardData);
    if (!files.length || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    add(files);
  });
  document.addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    $("drop").hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) $("drop").hidden = true;
  });
  document.addEventListener("drop", (event) => {
    $("drop").hidden = true;
    if (!carriesFiles(event)) return;
    event.preventDefault(); // or the browser would leave the page for the picture
    add(filesOf(event.dataTransfer));
    field.focus();
  });
}
