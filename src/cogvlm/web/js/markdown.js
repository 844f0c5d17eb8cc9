// A small subset of Markdown to nodes: paragraphs, headings, lists, quotes, tables, code, bold,
// italics, and our boxes. Links and pictures stay the text they are: an answer can neither lead
// away nor fetch anything.

import { BOXES, readBoxes } from "./boxes.js";
import { h } from "./dom.js";

const INLINE = new RegExp("(`+)(.+?)\\1|(" + BOXES + ")|\\*\\*(?=\\S)(.+?)\\*\\*|\\*(?=[^\\s*])([^*\\n]*[^\\s*])\\*", "gs");

function inline(text, box) {
  const nodes = [];
  let last = 0;
  for (const found of text.matchAll(INLINE)) {
    const [all, , code, boxes, bold, italic] = found;
    if (found.index > last) nodes.push(text.slice(last, found.index));
    if (code !== undefined) nodes.push(h("code", {}, code.trim() || code));
    else if (boxes !== undefined) nodes.push(h("span.chips", {}, ...readBoxes(boxes).map((one) => box(one, boxes))));
    else if (bold !== undefined) nodes.push(h("strong", {}, ...inline(bold, box)));
    else nodes.push(h("em", {}, ...inline(italic, box)));
    last = found.index + all.length;
  }
  if (last < text.length) nodes.push(text.slice(last));
  return nodes;
}

const FENCE = /^\s*(```+|~~~+)/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const QUOTE = /^\s*>\s?(.*)$/;
const RULE = /^\s*([-*_])(?:\s*\1){2,}\s*$/;
const ROW = /^\s*\|.*\|\s*$/;
const SEPARATOR = /^\s*\|(?:\s*:?-+:?\s*\|)+\s*$/;

const cells = (line) => line.trim().slice(1, -1).split("|").map((cell) => cell.trim());

function table(lines, box) {
  const row = (line, tag) => h("tr", {}, ...cells(line).map((cell) => h(tag, {}, ...inline(cell, box))));
  return h("div.table", { tabindex: "0" }, h("table", {}, h("thead", {}, row(lines[0], "th")),
    h("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")))));
}

/** Lists nest by indentation; a line that is no item belongs to the item before it. */
function list(lines, box) {
  const items = lines.map((line) => ITEM.exec(line));
  const depth = items[0][1].length;
  const ordered = items[0][2] !== undefined;
  const node = h(ordered ? "ol" : "ul", ordered ? { start: items[0][2] } : {});
  for (let i = 0; i < lines.length;) {
    let end = i + 1;
    while (end < lines.length && (!items[end] || items[end][1].length > depth)) end += 1;
    const rest = lines.slice(i + 1, end);
    const nested = rest.findIndex((line) => ITEM.test(line));
    const own = [items[i][3], ...(nested < 0 ? rest : rest.slice(0, nested)).map((line) => line.trim())];
    node.append(h("li", {}, ...inline(own.join("\n"), box), nested < 0 ? null : list(rest.slice(nested), box)));
    i = end;
  }
  return node;
}

/**
 * The blocks of `text` as nodes. `box(box, written)` makes the node for one box. Never parses HTML.
 */
export function markdown(text, box) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  const take = (i, fits) => {
    let end = i + 1;
    while (end < lines.length && fits(lines[end])) end += 1;
    return end;
  };
  for (let i = 0; i < lines.length;) {
    const line = lines[i];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    let end = i + 1;
    if (fence) {
      end = take(i, (next) => !next.trim().startsWith(fence[1]));
      blocks.push(h("pre", { tabindex: "0" }, h("code", {}, lines.slice(i + 1, end).join("\n"))));
      end += 1;
    } else if (heading) {
      blocks.push(h("p.heading", { role: "heading", "aria-level": Math.min(6, heading[1].length + 2) }, ...inline(heading[2], box)));
    } else if (RULE.test(line)) {
      blocks.push(h("hr"));
    } else if (ROW.test(line) && SEPARATOR.test(lines[i + 1] ?? "")) {
      end = take(i, (next) => ROW.test(next));
      blocks.push(table(lines.slice(i, end), box));
    } else if (ITEM.test(line)) {
      end = take(i, (next) => next.trim() !== "" && (ITEM.test(next) || /^\s/.test(next)));
      blocks.push(list(outdent(lines.slice(i, end)), box));
    } else if (QUOTE.test(line)) {
      end = take(i, (next) => QUOTE.test(next));
      const inner = lines.slice(i, end).map((next) => QUOTE.exec(next)[1]).join("\n");
      blocks.push(h("blockquote", {}, ...inline(inner, box)));
    } else if (line.trim() !== "") {
      end = take(i, (next) => next.trim() !== "" && ![FENCE, HEADING, RULE, ITEM, QUOTE].some((form) => form.test(next))
        && !(ROW.test(next)));
      blocks.push(h("p", {}, ...inline(lines.slice(i, end).join("\n"), box)));
    }
    i = end;
  }
  return blocks;
}

/** No item may stand left of the first one, or it would belong to no list. */
function outdent(lines) {
  const depth = ITEM.exec(lines[0])[1].length;
  return lines.map((line) => (ITEM.test(line) && ITEM.exec(line)[1].length < depth ? " ".repeat(depth) + line.trimStart() : line));
}
