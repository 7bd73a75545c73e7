/** Below the picture: messages, text to type, keys, terminals of serial lines. */

import { h, icon, plain } from "./dom.js";
import { clock } from "./figures.js";
import { HOLD, PRESS, TOGETHER } from "./keyboard.js";
import { command, tabs } from "./parts.js";
import { drives, guest, lines, mayAct, shortName, withoutIds } from "./state.js";
import { T } from "./texts.js";

/** @typedef {import("./app.js").App} App */

/** Characters that a session types in a second, see docs/screen.md. */
const PACE = 50;
/** Characters of a text whose command is shown. */
const MAX_COMMAND = 60;
/** Characters that one request types: a session accepts 8192 in a string. */
export const PIECE = 4000;
const MARKS = /** @type {Record<string, string>} */ ({ good: "s-on", progress: "s-wait", bad: "s-stop", info: "s-off", asks: "s-ask" });

/** @param {App} app */
export function dock(app) {
  const { ui, state } = app;
  const may = drives(state);
  const serial = lines(state).map((one) => one.label);
  const line = serial.find((label) => ui.dock === `serial:${label}`);
  const shown = may || line !== undefined ? ui.dock : "messages";
  /** @type {{name: string, content: any}[]} */
  const choices = [{ name: "messages", content: T.messages }];
  if (may) choices.push({ name: "type", content: T.typeText }, { name: "keys", content: T.keys });
  choices.push(...serial.map((label) => ({ name: `serial:${label}`, content: plain(label) })));
  return h("section", { key: "dock", class: `dock${ui.dockOpen ? "" : " folded"}${line !== undefined && ui.dockOpen ? " tall" : ""}`, "aria-label": T.below, onkeydown: (/** @type {KeyboardEvent} */ event) => app.dockKey(event) },
    h("div", { class: "docktabs" },
      tabs(T.below, choices, shown, (name) => app.setUi({ dock: name, dockOpen: true }), { class: "docktablist", panel: "dock-p" }),
      h("span", { class: "grow" }),
      ui.dockOpen && shown === "messages" && record(app),
      ui.dockOpen && line !== undefined && terminalTools(app, line),
      h("button", { class: "b quiet icon", type: "button", "aria-label": ui.dockOpen ? T.fold : T.unfold, "aria-expanded": String(ui.dockOpen), onclick: () => app.setUi({ dockOpen: !ui.dockOpen }) }, icon("i-down"))),
    h("div", { class: "dockbody", id: "dock-p", role: "tabpanel", "aria-label": { messages: T.messages, type: T.typeText, keys: T.keys }[shown] ?? plain(line), hidden: !ui.dockOpen },
      line !== undefined ? terminal(app, line) : shown === "messages" ? [ui.recording && recordForm(app), log(app)] : shown === "type" ? typeBox(app) : keypad(app)));
}

// Terminals

/** @param {App} app @param {string} label */
function terminal(app, label) {
  const { element, problem } = app.terminalOf(label);
  return [
    problem && h("p", { key: "problem", class: "problem", role: "status" }, icon("s-stop", "s"), h("span", null, plain(problem))),
    h("div", { key: `tty-${label}`, class: "ttybox", opaque: true, ref: (/** @type {HTMLElement} */ node) => node.append(element) }),
  ];
}

/** @param {App} app @param {string} label */
function terminalTools(app, label) {
  const one = app.terminalOf(label);
  return [
    h("span", { class: "dim small letgo" }, h("kbd", null, "Ctrl"), "+", h("kbd", null, "Alt"), " ", T.letsGo),
    one.size && h("button", { class: "b quiet act", type: "button", title: T.sendSizeTitle, disabled: one.line === null, onclick: () => one.sendSize() }, T.sendSize(one.size)),
  ];
}

// Messages

/** @param {App} app */
function log(app) {
  const { state } = app;
  return h("div", { key: "log", class: "log", role: "log", "aria-label": T.messages, tabindex: "0" },
    state.log.length === 0 && h("p", { class: "small" }, T.noMessages, state.hello?.log && [" ", T.earlier(plain(state.hello.log))]),
    h("ol", null, state.log.map((one) => h("li", { key: String(one.key), class: { bad: "bad", asks: "asks" }[/** @type {string} */ (one.level)] },
      h("time", null, clock(one.time)), icon(MARKS[one.level] ?? "s-off", "s"),
      h("p", null, one.device && `${plain(shortName(one.device))}: `, plain(withoutIds(one.message)),
        one.name === "attached" && shellOf(app, one),
        (one.remedy || one.fix) && h("span", { class: "fix" }, plain([one.remedy, one.fix].filter(Boolean).join(": "))))))));
}

/** @param {App} app @param {any} one a message about what somebody plugged in here */
function shellOf(app, one) {
  const shell = app.state.commands[one.attachment];
  return shell && h("button", { class: "b link", type: "button", onclick: () => app.copy(shell) }, app.ui.copied === shell ? T.copied : T.copyCommand);
}

/** @param {App} app */
function record(app) {
  if (!mayAct(app.state)) return null;
  const path = guest(app.state)?.capture ?? null;
  if (path !== null) return [h("span", { class: "dim small recpath", title: plain(path) }, T.recording(plain(path))), h("button", { class: "b quiet act", type: "button", onclick: () => app.stopCapture() }, icon("i-rec"), h("span", null, T.stopRecording))];
  if (app.state.server?.web_root === null) return h("span", { class: "dim small recwhy" }, T.recordNoRoot);
  return h("button", { class: "b quiet act", type: "button", "aria-expanded": String(app.ui.recording), onclick: () => app.setUi({ recording: !app.ui.recording }) }, icon("i-rec"), h("span", null, T.record));
}

/** @param {App} app */
function recordForm(app) {
  if (!mayAct(app.state) || guest(app.state)?.capture) return null;
  const path = app.ui.recordPath ?? `${(app.state.session ?? "usb").replaceAll(/[^\w.-]/g, "_")}.pcapng`;
  const shell = app.commandFor("capture", { path });
  return h("form", { key: "record", class: "recordform", onsubmit: (/** @type {Event} */ event) => { event.preventDefault(); app.startCapture(path); } },
    h("label", { for: "record-path" }, T.recordTo),
    h("input", { id: "record-path", type: "text", value: path, "aria-label": T.recordFile, spellcheck: "false", oninput: (/** @type {any} */ event) => app.setUi({ recordPath: event.target.value }) }),
    h("button", { class: "b main", type: "submit", disabled: path.trim() === "" }, T.recordStart),
    h("button", { class: "b", type: "button", onclick: () => app.setUi({ recording: false }) }, T.cancel),
    shell && command(app, shell));
}

// Text

/** @param {App} app */
function typeBox(app) {
  const { type } = app.ui;
  const { typing } = app.state;
  const count = [...type.text].length;
  const busy = type.busy;
  const layouts = app.layouts?.layouts ?? [];
  const missing = type.missing;
  const full = missing.length === 0 ? null : layouts.find((/** @type {any} */ one) => one.name !== type.layout && missing.every((/** @type {any} */ miss) => miss.layouts?.includes(one.name)));
  const progress = type.progress;
  const shell = !busy && !type.hidden && count > 0 && count <= MAX_COMMAND && missing.length === 0 ? app.commandFor("type", { text: type.text, ...(type.layout && layouts.length > 1 ? { layout: type.layout } : {}) }) : "";
  return h("form", { key: "type", class: "typebox", onsubmit: (/** @type {Event} */ event) => { event.preventDefault(); app.typeText(); } },
    h("div", { class: "typing" },
      h("label", { for: "type-text" }, type.hidden ? T.hiddenText : T.text),
      h("div", { class: "paper" },
        !type.hidden && h("div", { key: "mirror", class: "mirror", "aria-hidden": "true" }, underlined(type.text, missing), "\n"),
        type.hidden
          ? h("input", { key: "secret", id: "type-text", type: "password", autocomplete: "off", value: type.text, disabled: busy, "aria-describedby": "type-problem", oninput: (/** @type {any} */ event) => app.setText(event.target.value),
            onkeydown: (/** @type {KeyboardEvent} */ event) => { if (event.key === "Enter") { event.preventDefault(); app.typeText(); } } })
          : h("textarea", {
            key: "text", id: "type-text", spellcheck: "false", autocomplete: "off", autocapitalize: "off", value: type.text, disabled: busy, "aria-describedby": "type-problem",
            oninput: (/** @type {any} */ event) => app.setText(event.target.value), onscroll: (/** @type {any} */ event) => { event.target.previousElementSibling.scrollTop = event.target.scrollTop; },
          })),
      h("p", { class: "problem", id: "type-problem", role: "status" },
        missing.length > 0 ? [icon("s-warn", "s"), h("span", null, h("b", null, T.missing(missing.length)), where(type.text, missing), full ? T.hasAll(plain(full.title)) : "."),
          full && h("button", { class: "b", type: "button", onclick: () => app.setLayout(full.name) }, T.use(plain(full.title)))]
          : type.error ? [icon("s-stop", "s"), h("span", null, h("b", null, type.error.began || type.error.code === "unconfirmed" ? T.typeFailed : T.typeRefused), plain([type.error.message, type.error.remedy].filter(Boolean).join("; ")))]
            : type.note ? h("span", null, type.note) : type.hidden ? h("span", null, T.shellNote) : null)),
    h("div", { class: "opts" },
      layouts.length > 0 && h("label", null, T.layoutOfVm, h("select", { value: type.layout, disabled: busy, onchange: (/** @type {any} */ event) => app.setLayout(event.target.value) },
        layouts.map((/** @type {any} */ one) => h("option", { key: one.name, value: one.name }, plain(one.title))))),
      h("label", { class: "check" }, h("input", { type: "checkbox", checked: type.hidden, disabled: busy, onchange: (/** @type {any} */ event) => app.hideText(event.target.checked) }), " ", T.hideText),
      busy
        ? h("div", { class: "row", key: "busy" }, h("progress", { max: String(Math.max(1, progress.total)), value: Math.min(progress.total, progress.done + (typing?.done ?? 0)), "aria-label": T.typingProgress }),
          h("button", { class: "b", type: "button", onclick: () => app.stopTyping() }, T.stop),
          h("span", { class: "n dim" }, T.typingNow(Math.min(progress.total, progress.done + (typing?.done ?? 0)), progress.total, (progress.total - progress.done - (typing?.done ?? 0)) / PACE)))
        : h("p", { class: "row", key: "idle" }, h("button", { class: "b main", type: "submit", disabled: count === 0 || missing.length > 0 }, T.typeIt),
          missing.length > 0 && h("button", { class: "b", type: "button", onclick: () => app.leaveOut() }, T.leaveOut(missing.length)),
          count > 0 && h("span", { class: "n dim" }, T.characters(count, count / PACE))),
      shell && h("div", { key: "shell", class: "wholerow" }, command(app, shell))));
}

/** @param {string} text @param {any[]} missing `index` counts characters */
function underlined(text, missing) {
  const lacking = new Set(missing.map((one) => one.index));
  /** @type {any[]} */
  const parts = [];
  let run = "";
  [...text].forEach((char, index) => {
    if (!lacking.has(index)) {
      run += char;
      return;
    }
    parts.push(run, h("mark", null, char));
    run = "";
  });
  return [...parts, run];
}

/** @param {string} text @param {any[]} missing */
function where(text, missing) {
  const letters = [...text];
  const shown = missing.slice(0, 4).map((one) => {
    const before = letters.slice(0, one.index);
    const line = before.filter((char) => char === "\n").length + 1;
    return T.missingAt(plain(one.char), line, one.index - before.lastIndexOf("\n"));
  });
  return shown.join(", ") + (missing.length > shown.length ? T.missingMore(missing.length - shown.length) : "");
}

// Keys

/** @param {App} app */
function keypad(app) {
  const { ui } = app;
  const shell = app.commandFor("press", { keys: ui.lastKeys });
  const group = (/** @type {string} */ title, /** @type {string} */ label, /** @type {any[]} */ keys) =>
    h("div", { role: "group", "aria-label": label }, h("p", { class: "kh" }, title), h("div", { class: "ks" }, keys));
  return h("div", { key: "keys", class: "keypad" },
    app.state.inputs.mouse === "none" && app.ui.keyError === null ? null : ui.keyError && h("p", { class: "problem", role: "status" }, icon("s-stop", "s"), h("span", null, T.pressRefused, plain(ui.keyError))),
    group(T.hold, T.holdLabel, HOLD.map(({ name }) => h("button", { key: name, class: "k", type: "button", "aria-pressed": String(ui.hold.has(name)), onclick: () => app.toggleHold(name) },
      T.holdNames[name], ui.hold.has(name) && [" ", h("small", null, T.held)]))),
    group(T.press, T.press, PRESS.map(([label, name]) => h("button", { key: name, class: "k", type: "button", onclick: () => app.press(name) }, label))),
    group(T.together, T.together, TOGETHER.map(([label, keys]) => h("button", { key: keys, class: "k", type: "button", onclick: () => app.press(keys) }, label))),
    shell && command(app, shell));
}
