// Small helpers to build nodes. Text only ever becomes text nodes: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg"; // a name, not an address: nothing is fetched
const PATHS = {
  plus: "M12 5v14M5 12h14",
  menu: "M4 7h16M4 12h16M4 17h16",
  close: "M6 6l12 12M18 6L6 18",
  up: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  pencil: "M5 19l1-4L16.5 4.5l3 3L9 18z",
  save: "M12 4v11M7 10l5 5 5-5M5 20h14",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  again: "M19 12a7 7 0 1 1-2.5-5.4M20 3v5h-5",
  terminal: "M5 7l5 5-5 5M12 18h7",
  picture: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15.5 9h.01",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6L19 19M5 19l1.4-1.4M17.6 6.4L19 5",
  moon: "M20 14.5A8.5 8.5 0 1 1 9.5 4a7 7 0 0 0 10.5 10.5z",
  auto: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18M12 3v18M12 7h7M12 12h9M12 17h7",
  gear: "M4 7h9M17 7h3M15 5v4M4 12h3M11 12h9M9 10v4M4 17h9M17 17h3M15 15v4",
};

export const $ = (id) => document.getElementById(id);

export function h(tag, props = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const node = document.createElement(name);
  node.className = classes.join(" ");
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A button with a sign; with `words` its label is visible, else it is the tooltip. */
export function button(sign, label, onclick, words = false) {
  const props = words ? {} : { "aria-label": label, title: label };
  return h(words ? "button.action" : "button.icon", { type: "button", onclick, ...props },
    icon(sign), words ? h("span", {}, label) : null);
}

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Over plain http from another machine the clipboard API is absent: the old way still works.
    const area = h("textarea.unseen", { readonly: true });
    area.value = text;
    const before = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    before?.focus();
    if (!done) throw new Error("copy");
  }
}

export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** crypto.randomUUID is missing over plain http from another machine. */
export const newId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");

/** localStorage or sessionStorage that may be forbidden: then nothing is remembered. */
export const memory = (which) => ({
  get(name) {
    try { return window[which].getItem("cogvlm." + name); } catch { return null; }
  },
  set(name, value) {
    try {
      if (value === null) window[which].removeItem("cogvlm." + name);
      else window[which].setItem("cogvlm." + name, value);
    } catch { /* remembered until the page closes, no longer */ }
  },
});
