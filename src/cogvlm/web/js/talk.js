// Questions and answers as nodes. `actions` is what their buttons do; nothing is decided here.

import { chip, figure, link, UNFINISHED } from "./boxes.js";
import { button, h } from "./dom.js";
import { number, t } from "./i18n.js";
import { markdown } from "./markdown.js";
import { urlOf } from "./pictures.js";
import { hasPictures, rate } from "./run.js";

function questionView(turn, index, actions) {
  const pictures = turn.pictures.map((picture) => h("li", {},
    h("button.shown", { type: "button", "aria-label": t("look", { name: picture.name }), onclick: () => actions.look(picture) },
      h("img", { src: urlOf(picture), alt: picture.name, width: picture.width, height: picture.height }))));
  return h("section.question", { "aria-label": t("you") },
    pictures.length ? h("ul.shown-pictures", {}, ...pictures) : null,
    h("div.asked", {}, button("pencil", t("edit"), () => actions.edit(index)), h("p", {}, turn.text)));
}

/** Keeps the blocks that did not change, so that a selection in them stays. */
function patch(parent, blocks) {
  blocks.forEach((block, i) => {
    const old = parent.children[i];
    if (!old) parent.append(block);
    else if (!old.isEqualNode(block)) old.replaceWith(block);
  });
  while (parent.children.length > blocks.length) parent.lastElementChild.remove();
}

const NOTICES = { length: "length", content_filter: "filtered" };

function notice(answer) {
  if (answer.state === "stopped") return t("stopped");
  if (answer.state !== "done") return "";
  if (answer.finish in NOTICES) return t(NOTICES[answer.finish]);
  return answer.text ? "" : t("emptyAnswer");
}

function problemView({ kind, said, where }, retry, actions, answered) {
  const card = h("div.problem", { role: "alert" }, h("p", {}, t(kind, { where: where || t("otherService") })));
  if (said) card.append(h("p.said", {}, t("saidServer", { text: said })));
  if (!answered) card.append(h("p.said", {}, t("leftOut")));
  const row = h("div.actions", {});
  if (kind === "key" || kind === "missing") row.append(button("gear", t("settings"), actions.settings, true));
  if (retry) row.append(button("again", t("retry"), retry, true));
  if (row.childElementCount) card.append(row);
  return card;
}

function measures(answer) {
  const speed = rate(answer);
  return [
    answer.first === null ? null : t("firstToken", { s: number(answer.first, 2) }),
    answer.usage ? t("tokens", { in: number(answer.usage.in), out: number(answer.usage.out) }) : null,
    speed === null ? null : t("rate", { n: number(speed, 1) }),
    answer.total === null ? null : t("total", { s: number(answer.total, 1) }),
  ].filter(Boolean);
}

function footer(conversation, index, actions) {
  const { answer } = conversation.turns[index];
  const last = index === conversation.turns.length - 1;
  const row = h("div.actions", {});
  if (answer.text) row.append(button("copy", t("copy"), (event) => actions.copy(index, event.currentTarget), true));
  if (last && answer.state !== "failed") row.append(button("again", t("retry"), () => actions.retry(index), true));
  row.append(button("terminal", t("copyCurl"), (event) => actions.curl(index, false, event.currentTarget), true));
  if (hasPictures(conversation, index)) {
    row.append(button("terminal", t("copyCurlFull"), (event) => actions.curl(index, true, event.currentTarget), true));
  }
  const numbers = measures(answer);
  return h("footer", {}, row,
    numbers.length ? h("p.measures", {}, ...numbers.map((text) => h("span", {}, text))) : null);
}

/** {element, update}: the answer at `index`; update() draws what changed since. */
function answerView(conversation, index, actions) {
  const turn = conversation.turns[index];
  const text = h("div.text", {});
  const drawn = h("div", {});
  const below = h("div", {});
  const element = h("section.answer", { "aria-label": t("answer") }, text, drawn, below);
  const source = conversation.turns.slice(0, index + 1).reverse().find((one) => one.pictures.length);
  let shown = "";
  let chosen = 0;
  link(element);

  function draw(boxes) {
    const state = `${boxes.join(" ")}/${chosen}`;
    if (state === shown) return;
    shown = state;
    if (!boxes.length) drawn.replaceChildren();
    else if (!source) drawn.replaceChildren(h("p.notice", {}, t("boxNoPicture")));
    else {
      const pictures = source.pictures.map((picture) => ({ url: urlOf(picture), name: picture.name }));
      const choose = (i) => {
        chosen = i;
        draw(boxes);
        drawn.querySelector(`[aria-pressed="true"]`).focus();
      };
      drawn.replaceChildren(figure(boxes, pictures, chosen, choose));
    }
  }

  function update() {
    const { answer } = turn;
    const writing = answer.state === "waiting" || answer.state === "streaming";
    element.setAttribute("aria-busy", String(writing));
    element.classList.toggle("writing", answer.state === "streaming");
    const boxes = [];
    const box = (one, written) => {
      boxes.push(one);
      return chip(one, boxes.length, written);
    };
    patch(text, markdown(writing ? answer.text.replace(UNFINISHED, "") : answer.text, box));
    draw(boxes);
    below.replaceChildren();
    if (answer.wait) below.append(h("p.notice", { role: "status" }, t("busyWait", answer.wait)));
    else if (answer.state === "waiting") below.append(h("p.waiting", {}, t("waiting")));
    const note = notice(answer);
    if (note) below.append(h("p.notice", {}, note));
    if (answer.problem) {
      const last = index === conversation.turns.length - 1;
      below.append(problemView(answer.problem, last ? () => actions.retry(index) : null, actions, answer.text !== ""));
    }
    if (!writing) below.append(footer(conversation, index, actions));
  }
  update();
  return { element, update };
}

/** {element, update} of one question with its answer. */
export function turnView(conversation, index, actions) {
  const view = answerView(conversation, index, actions);
  return { element: h("li", {}, questionView(conversation.turns[index], index, actions), view.element), update: view.update };
}
