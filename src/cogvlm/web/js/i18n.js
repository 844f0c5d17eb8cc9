// The two languages: t(key) for texts built in scripts, translate() for those in index.html.

import { memory } from "./dom.js";
import en from "./lang/en.js";
import zh from "./lang/zh.js";

const LANGUAGES = { en, zh };
const local = memory("localStorage");
const wished = local.get("language") ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
let language = wished in LANGUAGES ? wished : "en";

export function t(key, values = {}) {
  const text = LANGUAGES[language][key];
  if (text === undefined) throw new Error(`no text for ${key}`);
  return text.replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

export const number = (value, digits = 0) =>
  value.toLocaleString(language, { minimumFractionDigits: digits, maximumFractionDigits: digits });

export function switchLanguage() {
  language = language === "en" ? "zh" : "en";
  local.set("language", language);
}

/** Fills data-text (content), data-label (aria-label and tooltip) and data-hint (placeholder). */
export function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = t(node.dataset.text);
  for (const node of document.querySelectorAll("[data-hint]")) node.placeholder = t(node.dataset.hint);
  for (const node of document.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", t(node.dataset.label));
    if (node.matches("button")) node.title = t(node.dataset.label);
  }
}
