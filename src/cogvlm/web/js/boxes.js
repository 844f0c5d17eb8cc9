// Boxes in answers: [[x0,y0,x1,y1]] or [[a;b]], thousandths (000 to 999) of width and height.

import { h } from "./dom.js";
import { number, t } from "./i18n.js";

const ONE = "\\s*\\d{1,3}\\s*(?:,\\s*\\d{1,3}\\s*){3}";
export const BOXES = `\\[\\[${ONE}(?:;${ONE})*\\]\\]`;
/** The beginning of boxes at the end of an answer that is still being written. */
export const UNFINISHED = /\[?\[[\d\s,;]*\]?$/;

/** "[[a;b]]" -> [[x0, y0, x1, y1], ...], each from left to right and from top to bottom. */
export function readBoxes(text) {
  return text.slice(2, -2).split(";").map((box) => {
    const [a, b, c, d] = box.split(",").map((part) => Number(part));
    return [Math.min(a, c), Math.min(b, d), Math.max(a, c), Math.max(b, d)];
  });
}

function describe(box, n) {
  const [x0, y0, x1, y1] = box.map((value) => number(value / 10, 1));
  return t("box", { n, x0, y0, x1, y1 });
}

const COLOURS = 6;

/** What stands in the text for a box: a numbered chip that points at the drawn one. */
export function chip(box, n, written) {
  const label = describe(box, n);
  const node = h("button.chip", { type: "button", "data-box": n, "aria-label": label, title: `${label}\n${written}` }, String(n));
  node.classList.add(`colour${(n - 1) % COLOURS}`);
  return node;
}

/** The picture with the boxes on it. `pictures` are {url, name}; several can be chosen from. */
export function figure(boxes, pictures, chosen, choose) {
  const image = h("img", { src: pictures[chosen].url, alt: pictures[chosen].name });
  const frame = h("div.frame", {}, image);
  boxes.forEach((box, i) => {
    const [x0, y0, x1, y1] = box;
    const label = describe(box, i + 1);
    const drawn = h("button.box", { type: "button", "data-box": i + 1, "aria-label": label, title: label }, h("span", {}, String(i + 1)));
    drawn.classList.add(`colour${i % COLOURS}`);
    Object.assign(drawn.style, {
      left: `${x0 / 10}%`, top: `${y0 / 10}%`, width: `${(x1 - x0) / 10}%`, height: `${(y1 - y0) / 10}%`,
      zIndex: String(1000 - Math.floor((x1 - x0) * (y1 - y0) / 1000)), // a small one can be reached inside a large one
    });
    frame.append(drawn);
  });
  const choices = pictures.length < 2 ? null : h("figcaption", {}, t("boxesOn"), ...pictures.map((picture, i) =>
    h("button.choice", { type: "button", "aria-pressed": String(i === chosen), "aria-label": t("boxesOnPicture", { n: i + 1 }), onclick: () => choose(i) },
      h("img", { src: picture.url, alt: "" }))));
  return h("figure.boxed", {}, frame, choices);
}

/** Pointing at a chip or at a drawn box lights both. */
export function link(answer) {
  const light = (n) => {
    for (const node of answer.querySelectorAll("[data-box]")) {
      node.classList.toggle("lit", n !== null && node.dataset.box === n);
      node.classList.toggle("dim", n !== null && node.dataset.box !== n);
    }
  };
  const of = (event) => event.target.closest?.("[data-box]")?.dataset.box ?? null;
  for (const kind of ["pointerover", "focusin"]) answer.addEventListener(kind, (event) => light(of(event)));
  answer.addEventListener("pointerleave", () => light(null));
  answer.addEventListener("focusout", () => light(null));
}
