// What a screen reader is told. An answer is read sentence by sentence as it comes, not letter by
// letter, which is why the answer itself is no live region.

import { $, h } from "./dom.js";

const KEEP = 30;

export function say(text) {
  const live = $("live");
  live.append(h("p", {}, text));
  while (live.childElementCount > KEEP) live.firstElementChild.remove();
}

/** A function of (text so far, whether that is all) that says what is new in whole sentences. */
export function reader() {
  let said = 0;
  return (text, all) => {
    const fresh = text.slice(said);
    const ends = [...fresh.matchAll(/[.!?:;](?=\s)|[。！？；\n]/g)];
    const length = all ? fresh.length : ends.length ? ends.at(-1).index + 1 : 0;
    const sentence = fresh.slice(0, length).trim();
    said += length;
    if (sentence) say(sentence);
  };
}
