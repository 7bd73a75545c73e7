/** All sessions of the user: a tile for each, which is one link. */

import { h, icon, mid, plain, sprite } from "./dom.js";
import { duration, rate } from "./figures.js";
import { command } from "./parts.js";
import { T } from "./texts.js";

/** @typedef {import("./app.js").App} App */

/** @param {App} app */
export function board(app) {
  const { sessions, server } = app.state;
  const words = app.ui.find.trim().toLowerCase();
  const shown = (sessions ?? []).filter((one) => `${one.name} ${one.vm ?? ""} ${one.target ?? ""}`.toLowerCase().includes(words));
  const some = sessions !== null && sessions.length > 0;
  return h("div", { key: "board", class: "board" },
    h("header", { class: "top" },
      h("div", { class: "bar" }, h("span", { class: "home" }, icon("i-logo")), h("h1", null, T.sessions),
        server && h("p", { class: "ident" }, some ? T.sessionsOf(sessions.length) : T.sessionsNone, h("b", null, plain(server.machine)))),
      h("div", { class: "tools" }, server?.role === "view" && h("p", { class: "chip" }, T.viewOnly),
        some && h("label", { class: "find" }, icon("i-search"), h("input", { type: "search", placeholder: T.find, "aria-label": T.findSession, value: app.ui.find, oninput: (/** @type {any} */ event) => app.setUi({ find: event.target.value }) })))),
    app.ui.openError && h("div", { class: "banner", role: "alert" }, h("p", null, icon("s-stop", "s"), h("b", null, T.cannotOpen(plain(app.ui.openError.name))), ". ", plain(app.ui.openError.message), " ", plain(app.ui.openError.remedy ?? "")),
      h("button", { class: "b", type: "button", onclick: () => app.setUi({ openError: null }) }, T.putAway)),
    sessions === null ? h("main", { class: "firstrun" }, h("p", { class: "state", role: "status" }, icon("s-wait", "s"), T.connecting))
      : some ? h("main", { class: "tiles" }, shown.map((one) => tile(app, one)),
        shown.length === 0 && h("p", { class: "nothing", role: "status" }, T.noneFound(plain(app.ui.find.trim()))),
        h("section", { key: "start", class: "tile start" }, h("h2", null, T.startAnother), h("p", null, T.startAnotherText), command(app, T.startCommand)))
        : firstRun(app));
}

/** @param {App} app @param {any} one a row of `sessions` */
function tile(app, one) {
  const ports = one.ports ?? null;
  const state = String(one.state ?? "");
  const warn = state !== "connected";
  const devices = one.devices ?? [];
  const lost = devices.filter((/** @type {any} */ device) => device.state === "lost").length;
  const used = (ports ?? []).filter((/** @type {any} */ port) => port.device !== null).length;
  const total = devices.reduce((/** @type {number} */ sum, /** @type {any} */ device) => sum + (device.rate ?? 0), 0);
  const retry = one.attempt ? Math.max(0, Math.round(one.attempt.time - Date.now() / 1000)) : 0;
  const picture = app.thumbnails.get(one.name);
  const opens = ports !== null;
  return h(opens ? "a" : "div", { key: `tile-${one.name}`, class: "tile", ...(opens ? { href: `#session=${encodeURIComponent(one.name)}`, onclick: (/** @type {MouseEvent} */ event) => app.follow(event, one.name) } : {}) },
    picture && state === "connected" ? h("div", { class: "thumb" }, h("img", { src: picture, alt: T.screenOf(plain(one.name)) }))
      : h("div", { class: "thumb none" }, h("p", null,
        ports === null ? [icon("s-warn", "s"), " ", T.doesNotRespond, h("br"), h("small", null, T.doesNotRespondText)]
          : one.attempt ? [icon("s-wait", "s"), " ", T.state.reconnecting, h("br"), h("small", null, `${one.attempt.number}. · ${duration(retry)}`)]
            : state !== "connected" ? [icon("s-wait", "s"), " ", T.state[state] ?? state]
              : [T.screenNotLinked, h("br"), h("small", null, T.openToSee)])),
    h("div", { class: "about" },
      h("div", { class: "head" }, h("h2", null, mid(one.name)), h("p", { class: warn ? "state warn" : "state" }, icon(warn ? "s-wait" : "s-on", "s"), h("b", null, T.state[state] ?? plain(state)), !warn && one.started ? ` ${duration(Date.now() / 1000 - one.started)}` : "")),
      h("p", { class: "target" }, one.vm ? plain(one.vm) : T.nameUnknown, one.target && [" · ", h("code", null, plain(one.target))]),
      ports !== null && h("p", { class: "ports" }, ports.map((/** @type {any} */ port) => h("svg", { class: "m", "aria-hidden": "true" }, h("use", { href: sprite(warn ? "m-lost" : port.device !== null ? "m-full" : "m-empty") }))),
        h("span", null, ports.length === 0 ? T.socketsUnknown : lost > 0 ? T.devicesReturn(lost) : T.socketsUsed(used, ports.length)), h("b", { class: "n" }, rate(total)))));
}

/** @param {App} app */
function firstRun(app) {
  return h("main", { class: "firstrun" },
    h("svg", { class: "port big", viewBox: "0 0 72 32", "aria-hidden": "true" }, h("use", { href: sprite("p-ghost") })),
    h("h2", null, T.noSession), h("p", null, T.noSessionText),
    h("ol", null, T.firstSteps.map(([title, text]) => h("li", null, h("h3", null, title), command(app, text)))),
    h("p", { class: "state", role: "status" }, icon("s-wait", "s"), " ", T.waitingForSession));
}
