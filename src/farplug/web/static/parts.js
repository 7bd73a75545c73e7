/** Parts that several places show: a command to copy, tabs, a reason. */

import { h, icon, plain } from "./dom.js";
import { T } from "./texts.js";

/** @typedef {import("./app.js").App} App */

/**
 * Return a shell command beside a button that copies it. The line breaks before options only.
 *
 * @param {App} app @param {string} text
 */
export function command(app, text) {
  const shown = plain(text.replaceAll("\n", " ; ").trim());
  const parts = shown.split(/ (?=--?[A-Za-z])/);
  const code = parts.map((part, index) => {
    if (index === 0) return part;
    const space = part.indexOf(" ");
    const option = space < 0 ? part : part.slice(0, space);
    return [" ", h("span", { class: "o" }, option), space < 0 ? "" : part.slice(space)];
  });
  return h("div", { class: "cmd" },
    h("code", null, h("span", { class: "prompt", "aria-hidden": "true" }, "$ "), code),
    copyButton(app, text, "b ghost"));
}

/** @param {App} app @param {string} text @param {string} [kind] @param {string} [word] */
export function copyButton(app, text, kind = "b", word = T.copy) {
  const done = app.ui.copied === text;
  return h("button", { class: kind, type: "button", onclick: () => app.copy(text) },
    icon(done ? "i-check" : "i-copy"), h("span", null, done ? T.copied : word));
}

/**
 * Return tabs. Arrows, Home and End choose.
 *
 * @param {string} label
 * @param {{name: string, content: any}[]} tabs
 * @param {string | null} selected
 * @param {(name: string) => void} select
 * @param {{class?: string, panel?: string}} [more] `panel`: the id of what they choose
 */
export function tabs(label, tabs, selected, select, more = {}) {
  const names = tabs.map((one) => one.name);
  const onkeydown = (/** @type {KeyboardEvent} */ event) => {
    const now = names.indexOf(selected ?? names[0]);
    const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: names.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const place = (next + names.length) % names.length;
    const list = /** @type {HTMLElement} */ (event.currentTarget);
    select(names[place]);
    /** @type {HTMLElement} */ (list.querySelectorAll("[role=tab]")[place]).focus();
  };
  return h("div", { class: more.class ?? "tabs", role: "tablist", "aria-label": label, onkeydown },
    tabs.map((one, index) => h("button", {
      key: one.name, type: "button", role: "tab", "aria-selected": String(one.name === selected), "aria-controls": more.panel && one.name === selected ? more.panel : undefined,
      tabindex: one.name === selected || (selected === null && index === 0) ? "0" : "-1", onclick: () => select(one.name),
    }, one.content)));
}

/** @param {any} text a message that may name commands and paths in it: shown as it is */
export function reason(text) {
  return h("p", { class: "reason" }, plain(text));
}

/** @param {string} mark of the state @param {any} word @param {...any} rest */
export function state(mark, word, ...rest) {
  return [icon(mark, "s"), h("b", null, word), ...rest];
}

/** @param {string} name of a symbol of a port @param {string | null} device the icon on its plug */
export function port(name, device) {
  const place = { "p-plugged": ["on-plugged", 26], "p-wait": ["on-wait", 31], "p-refused": ["on-refused", 42], "p-lost": ["on-lost", 41] }[name];
  return h("svg", { class: "port", viewBox: "0 0 72 32", "aria-hidden": "true" },
    h("use", { href: `static/icons.svg#${name}` }),
    place && device && h("use", { class: String(place[0]), href: `static/icons.svg#${device}`, x: String(place[1]), y: "9", width: "14", height: "14" }));
}
