/** The panel: the sockets of the VM, and what can be plugged in. Its left edge is the edge of the VM. */

import { h, icon, mid, plain } from "./dom.js";
import { bytes, day, grouped, rate } from "./figures.js";
import { command, copyButton, port as portPicture, state as stateWords, tabs } from "./parts.js";
import { attachments, guest, lastMinute, lines, mayAct, offered, overlay, portOf, ports, shortName, withoutIds } from "./state.js";
import { T } from "./texts.js";

/** @typedef {import("./app.js").App} App */

/** Seconds after a write in which an unplug asks first. */
const RECENT_WRITE = 5;

/** @param {App} app */
export function panel(app) {
  return h("aside", { key: "usb", class: "usb", id: "usb", "aria-label": T.usb, tabindex: "-1" },
    sockets(app), app.state.server?.role === "full" && plugin(app));
}

/** @param {App} app @returns {{used: number, all: number}} */
export function count(app) {
  const all = ports(app.state);
  const used = attachments(app.state).filter((one) => one.state !== "lost" && portOf(app.state, one) !== null).length;
  return { used, all: all.length };
}

/** @param {App} app */
function sockets(app) {
  const { used, all } = count(app);
  const reach = ["lost", "gone", "ended"].includes(overlay(app.state) ?? "");
  const spilt = app.state.refusals.filter((one) => one.port === null || one.port >= all);
  return h("section", { class: "sockets", "aria-labelledby": "sockets-t" },
    h("header", null, h("h2", { id: "sockets-t" }, T.sockets), all > 0 && h("p", { class: "n" }, reach ? T.noneInReach : T.inUse(used, all))),
    all === 0 && h("p", { class: "nothing" }, guest(app.state)?.state === "connected" ? [T.noSockets, " ", T.noSocketsRemedy] : T.noSocketsYet),
    h("ul", null, ports(app.state).map((one, number) => socket(app, one, number)),
      spilt.map((one) => spill(app, one))));
}

/** @param {App} app @param {any} port @param {number} number */
function socket(app, port, number) {
  const state = app.state;
  const here = attachments(state).filter((one) => portOf(state, one) === number);
  const attachment = here.find((one) => one.state !== "lost" && one.state !== "refused" && one.state !== "detached") ?? here.find((one) => one.state === "lost");
  const pending = state.pending.find((one) => one.port === number && one.what === "attach");
  const refusal = state.refusals.find((one) => one.port === number);
  const reached = !["lost", "gone", "ended"].includes(overlay(state) ?? "");
  const target = app.ui.drag !== null && app.ui.drag.port === number;
  const rows = [];
  if (attachment !== undefined) rows.push(device(app, port, number, attachment, reached));
  else if (pending !== undefined) rows.push(row(app, port, number, "waiting", portPicture("p-wait", pending.icon), [
    h("div", { class: "head" }, h("h3", null, mid(pending.title)), h("button", { class: "b quiet", type: "button", disabled: true }, T.pluggingIn)),
    h("p", { class: "state" }, stateWords("s-wait", T.pluggingIn)),
  ]));
  else if (refusal !== undefined) {
    rows.push(row(app, port, number, "refused", portPicture("p-refused", refusal.icon ?? "i-device"), refusalParts(app, refusal)));
    return rows;
  } else if (!reached) rows.push(row(app, port, number, "lost", portPicture("p-empty", null), [h("div", { class: "head" }, h("h3", null, T.empty))]));
  else if (port.error) rows.push(row(app, port, number, "lost", portPicture("p-lost", null), [
    h("div", { class: "head" }, h("h3", null, T.notOpen)),
    h("p", { class: "reason" }, icon("s-stop", "s"), plain(sentence(port.error.message)), port.error.remedy && [" ", plain(sentence(port.error.remedy))]),
  ]));
  else rows.push(row(app, port, number, target ? "empty target" : "empty", portPicture(target ? "p-ghost" : "p-empty", null), [
    h("div", { class: "head" }, h("h3", null, target ? T.goesHere : T.empty),
      !target && mayAct(state) && h("button", { class: "b act", type: "button", "aria-label": `${T.plugInto} ${T.socket(number)}`, onclick: () => app.openDialog({ port: number }) }, T.plugInto)),
    target && h("p", { class: "state" }, app.ui.drag?.over ? T.dropHere : T.firstEmpty),
  ]));
  if (refusal !== undefined) rows.push(spill(app, refusal));
  return rows;
}

/** @param {App} app @param {any} port @param {number} number @param {string} kind @param {any} picture @param {any[]} what @param {any} [more] */
function row(app, port, number, kind, picture, what, more = {}) {
  const high = port.speed !== undefined && port.speed !== "super" && port.speed !== "super-plus";
  return h("li", {
    key: `socket-${number}`, class: `socket ${kind}${high ? " high" : ""}`, "data-port": String(number), "aria-label": T.socket(number),
    ondragover: (/** @type {DragEvent} */ event) => app.dragOver(event, number),
    ondragleave: (/** @type {DragEvent} */ event) => app.dragLeave(event, number),
    ondrop: (/** @type {DragEvent} */ event) => app.dropped(event, number, false), ...more,
  }, h("div", { class: "where" }, picture, h("span", { class: "slot" }, number)), h("div", { class: "what" }, what));
}

/**
 * Return what an attachment is, in words and as an icon.
 *
 * @param {App} app @param {any} attachment
 */
export function kind(app, attachment) {
  const sources = attachment.sources ?? [];
  const first = sources[0];
  const identity = String(attachment.identity ?? "");
  const cd = first ? first.kind === "cdrom" : /Virtual CD-ROM$/.test(identity);
  const disk = first ? ["disk", "read-only-disk", "folder"].includes(first.kind) : /Virtual Disk$/.test(identity);
  const paths = [attachment.label, cd ? medium(app, attachment) : null];
  const file = paths.map(offered).find((/** @type {any} */ one) => one !== null) ?? null;
  const mine = [...app.mediaOf].find(([, id]) => id === attachment.id);
  const client = mine !== undefined ? mine[0] : file === null ? null : file.media;
  let words = T.kinds[first ? (first.kind === "disk" && first.snapshot ? "disk-snapshot" : first.kind) : cd ? "cdrom" : disk ? "plain" : "device"] ?? T.kinds.device;
  if (client !== null) words = `${words} ${app.media.has(client) ? T.fromBrowser : T.fromAnotherBrowser}`;
  const virtual = /** @type {Record<string, string>} */ ({ keyboard: "i-keyboard", tablet: "i-drive", mouse: "i-mouse", touchscreen: "i-touch", gamepad: "i-gamepad", camera: "i-camera", serial: "i-serial", network: "i-network", fido: "i-key" });
  const symbol = cd ? "i-cd" : first?.kind === "folder" ? "i-folder" : disk ? "i-disk" : first && virtual[first.kind] ? virtual[first.kind] : deviceIcon([identity, attachment.label].join(" "));
  // What a keyboard or a security key receives is no write to a medium; a real device may be a disk.
  const holdsData = sources.length === 0 || sources.some((/** @type {any} */ one) => ["disk", "usb-device", "remote-device"].includes(one.kind));
  return { words, icon: symbol, cd, disk, client, holdsData };
}

/** @param {App} app @param {any} attachment @returns {string | null | undefined} what is in its drive; null: nothing; undefined: not known */
function medium(app, attachment) {
  return app.state.drives[attachment.units[0] ?? attachment.label];
}

/** @param {App} app @param {any} attachment @param {{cd: boolean, client: string | null}} what @returns {string} */
export function title(app, attachment, what) {
  if (attachment.units.length > 1) return T.drivesShare(attachment.units.length);
  if (what.client !== null && app.media.has(what.client)) return app.media.get(what.client)?.name ?? "";
  if (!what.cd) return shortName(attachment.label);
  const inside = medium(app, attachment);
  if (inside === null) return T.emptyDrive;
  const path = String(inside ?? attachment.label);
  return offered(path)?.name || path.split("/").at(-1) || path;
}

/** @param {App} app @param {any} attachment @param {{cd: boolean}} what */
function driveEmpty(app, attachment, what) {
  return what.cd && attachment.units.length <= 1 && medium(app, attachment) === null;
}

/** @param {string} text words about a device @returns {string} its icon */
function deviceIcon(text) {
  const kinds = [
    [/storage|disk|drive|traveler|ssd|flash/i, "i-disk"], [/keyboard/i, "i-keyboard"], [/key|smart ?card|fido|yubi/i, "i-key"], [/hid|mouse|input/i, "i-keyboard"],
    [/video|cam/i, "i-camera"], [/serial|uart|comm/i, "i-serial"], [/ethernet|network|rndis/i, "i-network"], [/wireless|bluetooth|radio/i, "i-radio"], [/hub/i, "i-hub"],
  ];
  return String(kinds.find(([pattern]) => /** @type {RegExp} */ (pattern).test(text))?.[1] ?? "i-device");
}

/** @param {string | null} speed */
function speedWords(speed) {
  const words = T.speeds[String(speed ?? "")];
  return words ? [h("span", { class: "sp" }, words[0], " "), words[1]] : null;
}

/** @param {App} app @param {any} port @param {number} number @param {any} attachment @param {boolean} reached */
function device(app, port, number, attachment, reached) {
  const what = kind(app, attachment);
  const name = title(app, attachment, what);
  const act = mayAct(app.state) && reached && attachment.state !== "lost";
  const busy = app.state.pending.find((one) => one.attachment === attachment.id);
  const speed = speedWords(attachment.speed);
  const seconds = Math.max(0, app.now() - (app.state.since[attachment.id] ?? app.now()));
  if (attachment.state === "lost" || !reached) {
    return row(app, port, number, "lost", portPicture("p-lost", what.icon), [
      h("div", { class: "head" }, h("h3", null, mid(name))),
      h("p", { class: "state" }, stateWords("s-off", T.unplugged, " · ", app.state.ended === null && attachment.state === "lost" ? T.returnsWithVm : totals(attachment.figures))),
    ]);
  }
  const inUse = attachment.state === "in use";
  const words = inUse ? stateWords("s-on", T.inUseState) : stateWords("s-wait", T.attached);
  const waits = inUse ? speed : attachment.state === "attached" ? T.waits(seconds) : attachment.state === "waiting" ? T.waitsForVm(seconds) : T.openingPort;
  const about = attachment.units.length > 1 ? T.shareSocket : what.words;
  const question = inUse ? (attachment.questions ?? [])[0] : undefined;
  const asking = app.ui.confirm?.attachment === attachment.id ? app.ui.confirm : null;
  if (question !== undefined) return row(app, port, number, "asks", portPicture("p-plugged", "i-key"), [
    h("div", { class: "head" }, h("h3", null, mid(name)), act && actions(app, attachment, what, name, busy)),
    app.ui.menu === attachment.id && act && menu(app, attachment, what, name),
    ...ask(app, attachment, question, "row"),
  ], { role: "alertdialog", "aria-label": `${T.asksTouch}: ${plain(name)}` });
  return row(app, port, number, inUse ? "in-use" : "waiting", portPicture(inUse ? "p-plugged" : "p-wait", what.icon), [
    h("div", { class: "head" }, h("h3", null, mid(name)), act && actions(app, attachment, what, name, busy)),
    app.ui.menu === attachment.id && act && menu(app, attachment, what, name),
    h("p", { class: "state" }, words, " · ", about, waits && [" · ", waits]),
    asking && h("div", { class: "asking", role: "alertdialog", "aria-label": T.unplug }, h("p", null, T.wroteJustNow(app.now() - asking.wrote)),
      h("p", { class: "row" },
        h("button", { class: "b danger", type: "button", onclick: () => app.unplug(attachment, true) }, T.unplugAnyway),
        h("button", { class: "b", type: "button", onclick: () => app.setUi({ confirm: null }) }, T.wait))),
    attachment.units.length > 1 && h("ul", { class: "units" }, attachment.units.map((/** @type {string} */ unit) => {
      const inside = app.state.drives[unit];
      return h("li", { key: unit }, icon(inside === undefined ? "i-disk" : "i-cd"), mid(inside ? inside.split("/").at(-1) : shortName(unit)));
    })),
    lines(app.state).filter((one) => one.attachment === attachment.id).map(({ label }) => h("p", { key: `tty-${label}`, class: "detail" },
      h("button", { class: "b", type: "button", onclick: () => app.showTerminal(label) }, attachment.units.length > 1 ? T.terminalOf(plain(label)) : T.terminal))),
    [attachment.details].flat().filter((detail) => detail && detail !== "client").map((/** @type {string} */ detail) => h("p", { class: "detail" }, h("code", null, plain(detail)), detail.startsWith("/") && copyButton(app, detail, "b link"))),
    what.client !== null && inUse ? streamed(app, attachment, what) : inUse && measures(app, attachment, what),
    app.ui.endpoints.has(attachment.id) && endpoints(attachment),
  ], app.ui.just.has(attachment.id) ? { "data-just": "plugged" } : {});
}

/**
 * Return the words and buttons of what a program in the VM asks the user of a security key.
 *
 * @param {App} app @param {any} attachment @param {any} question @param {string} place
 */
function ask(app, attachment, question, place) {
  const left = Math.max(0, Math.ceil(question.until - app.now()));
  const act = mayAct(app.state);
  const words = T.asks[question.use];
  const site = question.site ? h("b", null, plain(question.site)) : T.aProgram;
  return [
    h("p", { class: "state ask" }, stateWords("s-ask", T.asksTouch), ` · ${T.securityKey}`),
    h("div", { class: "askbox" },
      act && h("button", { key: "touch", class: "touchkey", type: "button", id: `touch-${place}`, onclick: () => app.answer(attachment, question, "allow") }, h("svg", { viewBox: "0 0 32 32", "aria-hidden": "true" }, h("use", { href: "static/icons.svg#i-touch" })), T.touch),
      h("div", null,
        h("p", null, words ? [site, words[0], question.user && [words[1], h("b", null, plain(question.user))], "."] : question.use === "select" ? T.asksSelect : question.use === "reset" ? T.asksReset : T.asksOther),
        h("p", { class: "n dim" }, T.secondsLeft(left)),
        h("progress", { max: String(Math.max(1, question.seconds)), value: Math.min(left, question.seconds), "aria-label": T.secondsLabel }),
        act && h("p", { class: "row" }, h("button", { class: "b", type: "button", onclick: () => app.answer(attachment, question, "refuse") }, T.refuse)))),
  ];
}

/** Return the question over the picture, where the panel is not to be seen. @param {App} app */
export function floatingAsk(app) {
  if (app.ui.panel && !app.ui.full && !app.narrow) return null;
  if (app.narrow && !app.ui.full && app.ui.tab === "usb") return null;
  const attachment = attachments(app.state).find((one) => one.state === "in use" && (one.questions ?? []).length > 0);
  if (attachment === undefined) return null;
  return h("div", { key: "ask", class: "floating asks", role: "alertdialog", "aria-label": `${T.asksTouch}: ${plain(shortName(attachment.label))}` },
    h("h3", null, mid(shortName(attachment.label))), ask(app, attachment, attachment.questions[0], "float"));
}

/** @param {App} app @param {any} attachment @param {any} what @param {string} name @param {any} busy */
function actions(app, attachment, what, name, busy) {
  const id = `more-${attachment.id}`;
  const cdrom = what.cd && attachment.units.length <= 1;
  const empty = driveEmpty(app, attachment, what);
  return [
    busy ? h("button", { class: "b quiet act", type: "button", disabled: true }, busy.word)
      : !cdrom ? h("button", { class: "b quiet act", type: "button", "aria-label": `${T.unplug} ${name}`, onclick: () => app.unplug(attachment, false) }, attachment.units.length > 1 ? T.unplugAll : T.unplug)
        : empty ? h("button", { class: "b quiet act", type: "button", onclick: () => app.openDialog({ insert: attachment }) }, T.insert)
          : h("button", { class: "b quiet act", type: "button", "aria-label": `${T.eject} ${name}`, onclick: () => app.eject(attachment, false) }, T.eject),
    h("button", {
      class: "b icon quiet", type: "button", id, "aria-label": T.more(name), "aria-haspopup": "menu", "aria-expanded": String(app.ui.menu === attachment.id),
      onclick: () => app.openMenu(app.ui.menu === attachment.id ? null : attachment.id),
    }, icon("i-more")),
  ];
}

/** @param {App} app @param {any} attachment @param {any} what @param {string} name */
function menu(app, attachment, what, name) {
  const items = [];
  if (attachment.figures?.endpoints) items.push({
    text: app.ui.endpoints.has(attachment.id) ? T.hideEndpoints : T.showEndpoints, act: () => app.toggleEndpoints(attachment.id),
  });
  if (what.cd && attachment.units.length <= 1) {
    items.push({ text: T.insertAnother, act: () => app.openDialog({ insert: attachment }) });
    items.push({ text: T.unplugDrive, act: () => app.unplug(attachment, false) });
    if (!driveEmpty(app, attachment, what)) {
      const eject = { drive: attachment.units[0] ?? attachment.label };
      items.push({ text: T.copyEject, code: app.commandFor("eject", eject), act: () => app.copyCommand("eject", eject) });
    }
  }
  const plug = app.state.commands[attachment.id];
  if (plug) items.push({ text: T.copyPlug, code: plug, act: () => app.copy(plug) });
  const unplug = { device: attachment.label };
  items.push({ text: T.copyUnplug, code: app.commandFor("detach", unplug), act: () => app.copyCommand("detach", unplug) });
  return h("div", { class: "menu", role: "menu", "aria-label": name, key: "menu", onkeydown: (/** @type {KeyboardEvent} */ event) => app.menuKey(event) },
    items.map((item) => h("button", {
      role: "menuitem", type: "button", tabindex: "-1", onclick: () => { app.openMenu(null); item.act(); },
    }, item.text, item.code && h("code", { title: item.code }, plain(item.code)))));
}

/** @param {any} figures */
function totals(figures) {
  return `${bytes(figures?.read ?? 0)} ${T.reading}, ${bytes(figures?.written ?? 0)} ${T.writing}`;
}

/** @param {App} app @param {any} attachment @param {any} what */
function measures(app, attachment, what) {
  const figures = attachment.figures ?? {};
  const seconds = lastMinute(app.state.rates[attachment.id], app.now());
  const now = seconds.at(-1) ?? { read: 0, written: 0 };
  const before = seconds.at(-2) ?? { read: 0, written: 0 };
  const reading = Math.max(now.read, before.read), writing = Math.max(now.written, before.written);
  const wide = !what.cd;
  return [
    wide && h("div", { class: "rate" }, chart(seconds), h("p", null, h("b", { class: "n" }, rate(reading)), ` ${T.reading}`, h("br"), h("b", { class: "n" }, rate(writing)), ` ${T.writing}`)),
    h("dl", { class: "figures" },
      figure(T.read, bytes(figures.read ?? 0)),
      wide ? figure(T.written, bytes(figures.written ?? 0)) : figure(T.rate, rate(reading)),
      figure(T.commands, grouped(figures.commands ?? 0)),
      figures.errors !== undefined && figure(T.errors, grouped(figures.errors), figures.errors > 0)),
  ];
}

/** @param {string} name @param {string} value @param {boolean} [bad] */
function figure(name, value, bad = false) {
  return h("div", null, h("dt", null, name), h("dd", bad ? { class: "stop" } : null, value));
}

/** @param {{read: number, written: number}[]} seconds */
function chart(seconds) {
  const peak = Math.max(1, ...seconds.map((one) => Math.max(one.read, one.written)));
  const line = (/** @type {"read" | "written"} */ name) => seconds.map((one, index) =>
    `${index === 0 ? "M" : "L"}${(index * 144 / (seconds.length - 1)).toFixed(1)} ${(27 - 24 * one[name] / peak).toFixed(1)}`).join(" ");
  return h("svg", { class: "spark", viewBox: "0 0 144 28", preserveAspectRatio: "none", role: "img", "aria-label": T.chart },
    h("path", { class: "area", d: `M0 28 ${line("read").replace("M", "L")} L144 28z` }), h("path", { class: "line", d: line("read") }),
    h("path", { class: "line w", d: line("written") }), h("path", { class: "base", d: "M0 27.5H144" }));
}

/** @param {App} app @param {any} attachment @param {any} what */
function streamed(app, attachment, what) {
  const media = app.state.media[what.client] ?? {};
  const mine = app.media.get(what.client);
  const size = mine?.size ?? media.size ?? 0;
  const slices = touchedSlices(media.touched ?? "");
  const percent = Math.round(100 * slices.filter(Boolean).length / 256);
  const fresh = media.time !== undefined && Date.now() / 1000 - media.time < 2;
  return [
    h("figure", null,
      h("svg", { class: "touched", viewBox: "0 0 1024 16", preserveAspectRatio: "none", role: "img", "aria-label": media.read ? T.touchedLabel(percent) : T.untouched },
        h("rect", { class: "all", x: "0", y: "0", width: "1024", height: "12" }),
        runs(slices).map(([from, to]) => h("rect", { x: String(4 * from), y: "0", width: String(4 * (to - from)), height: "12" })),
        media.read > 0 && size > 0 && h("path", { class: "pos", d: `M${Math.min(1023, Math.floor(1024 * media.last / size))} 0v16` })),
      h("figcaption", null, media.read ? h("span", null, h("b", null, T.touched(percent, media.read, size)[0]), T.touched(percent, media.read, size)[1]) : h("span", null, T.untouched),
        h("b", null, rate(fresh ? media.rate ?? 0 : 0)))),
    mine && h("p", { class: "note" }, icon("s-warn", "s"), h("span", null, what.cd ? T.keepOpen : T.keepOpenDisk, app.touchScreen ? ` ${T.tabFrozen}` : "", " ",
      mayAct(app.state) && app.canUpload() && h("button", { class: "b link", type: "button", onclick: () => app.uploadInstead(attachment, mine) }, T.uploadInstead))),
  ];
}

/** @param {string} text base64 of 256 bits, the first slice in the highest bit of the first byte @returns {boolean[]} */
export function touchedSlices(text) {
  let packed = "";
  try {
    packed = atob(text);
  } catch {
    // A bitmap that is not valid shows nothing.
  }
  return Array.from({ length: 256 }, (_, index) => Boolean((packed.charCodeAt(index >> 3) || 0) >> (7 - (index & 7)) & 1));
}

/** @param {boolean[]} slices @returns {[number, number][]} from and to of the runs that are set */
function runs(slices) {
  /** @type {[number, number][]} */
  const found = [];
  slices.forEach((set, index) => {
    const last = found.at(-1);
    if (!set) return;
    if (last !== undefined && last[1] === index) last[1] = index + 1;
    else found.push([index, index + 1]);
  });
  return found;
}

/** @param {any} attachment */
function endpoints(attachment) {
  return h("table", { class: "ends", key: "ends" }, h("caption", null, T.endpoints),
    h("thead", null, h("tr", null, [T.endpoint, T.transfers, T.bytes, T.errors].map((name, index) => h("th", { scope: "col", class: index > 0 ? "num" : undefined }, name)))),
    h("tbody", null, (attachment.figures?.endpoints ?? []).map((/** @type {any} */ one) => h("tr", { key: String(one.endpoint) },
      h("th", { scope: "row" }, h("code", null, one.endpoint.toString(16).padStart(2, "0")), " ", T.endpointWay(one.endpoint)),
      h("td", { class: "num" }, grouped(one.transfers)), h("td", { class: "num" }, bytes(one.bytes)), h("td", { class: "num" }, grouped(one.errors))))));
}

// Refusals

/** @param {App} app @param {any} refusal */
function spill(app, refusal) {
  return h("li", { key: `spill-${refusal.id}`, class: "spill refused" }, h("div", { class: "what" }, refusalParts(app, refusal)));
}

/** @param {App} app @param {any} refusal */
function refusalParts(app, refusal) {
  const { error } = refusal;
  const act = mayAct(app.state);
  const force = refusal.retry === null ? null : forced(refusal.retry, error);
  const sure = app.ui.sure === refusal.id;
  const alternative = refusal.retry === null ? null : forced(refusal.retry, error.alternative ?? {});
  return [
    h("div", { class: "head" }, h("h3", null, mid(refusal.title)),
      h("button", { class: "b icon quiet act", type: "button", "aria-label": T.putRefusalAway, onclick: () => app.dispatch({ type: "put-away", id: refusal.id }) }, icon("i-close"))),
    h("div", { role: "alert" }, h("p", { class: "state stop" }, stateWords("s-stop", T.refused), refusal.what && ` · ${refusal.what}`),
      h("p", { class: "reason" }, plain(sentence(error.message))), error.remedy && h("p", { class: "remedy" }, plain(advice(error)))),
    error.command && command(app, error.command),
    error.alternative?.remedy && h("p", { class: "remedy" }, plain(advice(error.alternative))),
    error.alternative?.command && command(app, error.alternative.command),
    sure && force !== null && h("p", { class: "remedy" }, T.anyway),
    act && refusal.retry !== null && h("p", { class: "row" },
      sure ? null : h("button", { class: "b", type: "button", onclick: () => app.retry(refusal, refusal.retry) }, T.tryAgain),
      [force, alternative].filter((one) => one !== null).map((one) => one.danger
        ? h("button", { key: `${one.word}${sure}`, class: "b danger", type: "button", onclick: () => (sure || !one.asks ? app.retry(refusal, one.request) : app.setUi({ sure: refusal.id })) }, sure && one.asks ? T.plugAnywaySure : one.word)
        : h("button", { key: one.word, class: "b", type: "button", onclick: () => app.retry(refusal, one.request) }, one.word)),
      sure && h("button", { class: "b", type: "button", onclick: () => app.setUi({ sure: null }) }, T.cancel)),
  ];
}

/** @param {unknown} text @returns {string} with a capital, unless a name is first, and a full stop: a message has neither */
export function sentence(text) {
  const words = withoutIds(text);
  if (words === "") return words;
  const first = /^[a-z'’-]+(?=[ ,]|$)/.test(words) ? `${words[0].toUpperCase()}${words.slice(1)}` : words;
  return `${first}${/[.!?:]$/.test(words) ? "" : "."}`;
}

/** @param {any} remedy @returns {string} its text, before its command if it has one */
function advice(remedy) {
  const words = sentence(remedy.remedy);
  return remedy.command ? words.replace(/[.:]$/, ":") : words;
}

/**
 * Return the request with the setting that a remedy names, and the word for it; null: a page cannot apply it.
 *
 * @param {{method: string, params: any}} retry
 * @param {any} remedy `code`, `setting`, `value`
 */
function forced(retry, remedy) {
  const { method, params } = retry;
  if (remedy.code === "medium-locked" && method !== "attach" && !params.force) {
    return { word: T.ejectAnyway, danger: true, asks: false, request: { method, params: { ...params, force: true } } };
  }
  if (method !== "attach" || !remedy.setting) return null;
  const [group, name] = String(remedy.setting).split(".");
  if (name === "force" && (group === "storage" || group === "rules")) {
    return { word: T.plugAnyway, danger: true, asks: true, request: { method, params: { ...params, [group]: { ...params[group], force: remedy.value ?? true } } } };
  }
  if (group === "storage" && remedy.value !== undefined && remedy.value !== null) {
    return { word: `${T.tryAgain}: ${name.replaceAll("_", " ")} ${remedy.value}`, danger: false, asks: false, request: { method, params: { ...params, storage: { ...params.storage, [name]: remedy.value } } } };
  }
  const kinds = /** @type {Record<string, string>} */ ({ usb_cdrom: "cdrom", usb_disk: "disk", usb_disk_ro: "read-only-disk", usb_folder: "folder" });
  if (kinds[remedy.setting] && params.sources.length === 1) {
    const word = remedy.setting === "usb_cdrom" ? T.asCdrom : `${T.plugIn}: ${T.kinds[kinds[remedy.setting]]}`;
    return { word, danger: false, asks: false, request: { method, params: { ...params, sources: [{ ...params.sources[0], kind: kinds[remedy.setting] }] } } };
  }
  return null;
}

// What can be plugged in

/** @param {App} app */
function plugin(app) {
  const state = app.state;
  const over = overlay(state);
  const when = over === "lost" || over === "gone" || over === "ended" ? T.whenBack : !mayAct(state) && state.driver?.holder ? T.whenDrive : null;
  const devices = state.devices?.devices;
  const shown = app.ui.source;
  const source = { devices: deviceList, images: imageList, browser: browserPart, virtual: virtualList }[shown] ?? deviceList;
  return h("section", { class: "plugin", "aria-labelledby": "plugin-t" },
    h("header", null, h("h2", { id: "plugin-t" }, T.plugIn), when && h("p", null, when)),
    tabs(T.whatToPlug, [
      { name: "devices", content: [T.devices, devices && h("b", { class: "n" }, devices.filter(isPlain).length)] },
      { name: "images", content: T.images }, { name: "browser", content: T.thisBrowser }, { name: "virtual", content: T.virtual },
    ], shown, (name) => app.setUi({ source: name }), { panel: "plugin-p" }),
    h("div", { role: "tabpanel", id: "plugin-p", "aria-label": { devices: T.devices, images: T.images, browser: T.thisBrowser, virtual: T.virtual }[shown] }, source(app)));
}

/** @param {any} device root hubs are a part of the machine */
export function isPlain(device) {
  return !String(device.port ?? "").startsWith("usb");
}

/** @param {number | string} id */
function hex(id) {
  return typeof id === "number" ? id.toString(16).padStart(4, "0") : plain(id);
}

/** @param {App} app */
export function deviceList(app) {
  const { devices } = app.state;
  if (devices === null) return h("p", { class: "nothing" }, T.connecting);
  if (devices.error) return h("div", { class: "nothing" }, h("p", { class: "reason" }, icon("s-stop", "s"), T.devicesFailed, " ", plain(sentence(devices.error.message))),
    devices.error.remedy && h("p", { class: "remedy" }, plain(advice(devices.error))), devices.error.command && command(app, devices.error.command));
  const shown = devices.devices.filter(isPlain);
  return [
    h("p", { class: "source" }, T.devicesOf[0], h("b", null, plain(devices.machine ?? app.state.server?.machine)), T.devicesOf[1]),
    shown.length === 0 ? h("p", { class: "nothing" }, T.noDevices) : h("ul", { class: "devices" }, shown.map((/** @type {any} */ one) => deviceRow(app, one))),
  ];
}

/** @param {App} app @param {any} one */
function deviceRow(app, one) {
  const act = mayAct(app.state);
  const free = one.state === "free";
  const busy = app.state.pending.some((pending) => pending.device === one.id);
  const symbol = deviceIcon(`${(one.classes ?? []).join(" ")} ${one.name}`);
  const plug = () => app.plugDevice(one, app.ui.dialog?.port ?? null);
  const force = !free && one.state === "refused" && (one.forceable || one.setting === "rules.force");
  return h("li", {
    key: `device-${one.id}`, class: free ? undefined : "no", draggable: free && act ? "true" : undefined,
    ondragstart: (/** @type {DragEvent} */ event) => app.dragDevice(event, one), ondragend: () => app.endDrag(),
  }, icon(symbol), h("div", null,
    h("h3", null, plain(one.name)),
    h("p", { class: "ids" }, h("code", null, `${hex(one.vendor_id)}:${hex(one.product_id)}`), ` ${T.port(plain(one.port))}`, speedWords(one.speed) && [" · ", speedWords(one.speed)]),
    one.state === "refused" && h("p", { class: "reason" }, icon("s-stop", "s"), plain(sentence(one.message)), one.remedy && !one.command && ` ${plain(sentence(one.remedy))}`),
    one.state === "refused" && one.command && one.remedy && h("p", { class: "remedy" }, plain(advice(one))),
    free && one.caution && h("p", { class: "note" }, icon("s-warn", "s"), h("span", null, plain(sentence(one.caution.message))))),
  free && act && h("div", { class: "acts" }, copyIcon(app, { sources: [{ kind: "usb-device", path: one.id }] }, plain(one.name)),
    h("button", { class: "b act", type: "button", disabled: busy, "aria-label": `${T.plugIn} ${plain(one.name)}`, onclick: plug }, busy ? T.pluggingIn : T.plugIn)),
  one.state === "attached" && h("span", { class: "dim small" }, T.inVm),
  one.state === "refused" && one.command && act && copyButton(app, one.command, "b act"),
  force && act && h("button", { class: "b act danger", type: "button", onclick: plug }, T.plugAnyway));
}

/** @param {App} app */
function imageList(app) {
  if (app.state.server?.web_root === null) return [h("p", { class: "nothing" }, T.noRoot, " ", T.noRootRemedy), h("div", { class: "inset" }, command(app, T.noRootCommand))];
  const listing = app.filesOf(app.ui.path);
  if (listing === null) return h("p", { class: "nothing" }, T.connecting);
  if (listing.error) return h("div", { class: "nothing" }, h("p", { class: "reason" }, icon("s-stop", "s"), plain(sentence(listing.error.message))), pathNav(app, app.ui.path, (path) => app.setUi({ path })));
  return [
    h("div", { class: "source" }, pathNav(app, app.ui.path, (path) => app.setUi({ path }))),
    listing.entries.length === 0 ? h("p", { class: "nothing" }, T.emptyFolder) : h("ul", { class: "devices" }, listing.entries.map((/** @type {any} */ entry) => imageRow(app, entry))),
    listing.free !== undefined && listing.free !== null && h("p", { class: "source end" }, T.free(listing.free)),
  ];
}

/** @param {App} app @param {any} entry */
function imageRow(app, entry) {
  const path = app.join(app.ui.path, entry.name);
  const folder = entry.kind === "folder";
  const plugged = mayAct(app.state) && !entry.problem && (entry.as !== null || folder);
  const name = h("h3", null, mid(entry.name));
  return h("li", { key: `file-${entry.name}`, class: entry.problem ? "no" : undefined }, icon(fileIcon(entry)),
    h("div", null, folder ? h("button", { class: "b link name", type: "button", "aria-label": T.openFolder(plain(entry.name)), onclick: () => app.setUi({ path }) }, mid(entry.name)) : name,
      h("p", { class: "ids" }, [entry.as === "clip" && T.clip, entry.what && plain(entry.what), !folder && bytes(entry.size ?? 0), entry.modified && day(entry.modified, app.now())].filter(Boolean).join(" · ")),
      entry.problem && h("p", { class: "reason" }, icon("s-stop", "s"), plain(sentence(problemText(entry.problem))))),
    plugged && h("button", { class: "b act", type: "button", "aria-label": `${T.plugInto} ${plain(entry.name)}`, onclick: () => app.openDialog({ entry, path: app.ui.path }) }, T.plugInto));
}

/** @param {any} entry of a listing @returns {string} its icon */
export function fileIcon(entry) {
  return entry.kind === "folder" ? "i-folder" : entry.as === "cdrom" ? "i-cd" : entry.as === "clip" ? "i-camera" : "i-disk";
}

/** @param {any} problem */
export function problemText(problem) {
  return typeof problem === "string" ? problem : [problem.message, problem.remedy, problem.command].filter(Boolean).join("; ");
}

/** @param {App} app @param {string} path @param {(path: string) => void} go */
export function pathNav(app, path, go) {
  const parts = path === "" ? [] : path.split("/");
  const root = app.state.server?.web_root?.name ?? T.rootName;
  return h("nav", { class: "pathnav", "aria-label": T.folder }, [root, ...parts].map((name, index) => {
    const last = index === parts.length;
    return [index > 0 && icon("i-right"), last ? h("b", null, plain(name)) : h("button", { class: "b link", type: "button", onclick: () => go(parts.slice(0, index).join("/")) }, plain(name))];
  }));
}

/** @param {App} app @param {any} params of the request that plugs it in @param {string} name */
function copyIcon(app, params, name) {
  const shell = app.commandFor("attach", params);
  return shell && h("button", { class: "b icon quiet", type: "button", title: shell, "aria-label": `${T.copyPlugOf} ${name}`, onclick: () => app.copy(shell) }, icon(app.ui.copied === shell ? "i-check" : "i-terminal"));
}

/** @param {App} app */
export function virtualList(app) {
  return [
    h("p", { class: "source" }, T.virtualText),
    h("ul", { class: "devices" }, T.virtualKinds.map((one) => virtualRow(app, one)), keyRow(app), networkRow(app)),
  ];
}

/** @param {App} app @param {{source: any, icon: string, name: string, about: string}} one */
function virtualRow(app, { source, icon: symbol, name, about }) {
  const port = app.ui.dialog?.port ?? undefined;
  return h("li", { key: `${source.kind} ${source.path ?? ""}` }, icon(symbol),
    h("div", null, h("h3", null, name), h("p", { class: "ids" }, about)),
    mayAct(app.state) && h("div", { class: "acts" },
      source.kind === "camera" && app.state.server?.web_root !== null && h("button", { class: "b quiet act", type: "button", "aria-label": `${T.showClipOf} ${name}`, onclick: () => app.openDialog({ tab: "camera", port }) }, T.showClip),
      copyIcon(app, { sources: [source] }, name), plugButton(app, source, name, symbol)));
}

/** @param {App} app @param {any} source @param {string} name @param {string} symbol */
function plugButton(app, source, name, symbol) {
  return h("button", { class: "b act", type: "button", "aria-label": `${T.plugIn} ${name}`, onclick: () => app.plug({ sources: [source] }, { port: app.ui.dialog?.port ?? null, title: name, what: T.kinds[source.kind], icon: symbol }) }, T.plugIn);
}

/** @param {App} app */
function keyRow(app) {
  const path = app.ui.keyPath;
  const source = { kind: "fido", path, presence: "ask" };
  const root = app.state.server?.web_root !== null;
  const act = mayAct(app.state) && root;
  return h("li", { key: "fido" }, icon("i-key"),
    h("div", null, h("h3", null, T.keyName), h("p", { class: "ids" }, T.keyAbout, ". ", root ? T.keyAsks : T.keyNoRoot),
      act && h("input", { class: "keypath", type: "text", value: path, "aria-label": T.keyFile, spellcheck: "false", oninput: (/** @type {any} */ event) => app.setUi({ keyPath: event.target.value }) })),
    act && path.trim() !== "" && h("div", { class: "acts" }, copyIcon(app, { sources: [source] }, T.keyName), plugButton(app, source, T.keyName, "i-key")));
}

/** @param {App} app */
function networkRow(app) {
  const shell = T.networkCommand(app.state.session ?? "");
  return h("li", { key: "network" }, icon("i-network"),
    h("div", null, h("h3", null, T.networkName), h("p", { class: "ids" }, T.networkAbout)),
    mayAct(app.state) && copyButton(app, shell, "b act", T.copyCommand));
}

/** @param {App} app */
function browserPart(app) {
  const act = mayAct(app.state);
  const { server } = app.state;
  const uploads = server?.uploads ?? null;
  return h("div", { class: "frombrowser" },
    h("p", null, T.browserText),
    act && h("p", { class: "row" },
      h("button", { class: "b", type: "button", onclick: () => app.chooseFile(null, false) }, T.choose),
      uploads && h("button", { class: "b", type: "button", onclick: () => app.chooseFile(null, true) }, T.uploadFirst)),
    h("p", { class: "dim small" }, uploads ? [T.uploadFirstText(plain(server?.machine)), " ", T.uploadsLeft(Math.max(0, uploads.quota - uploads.used))] : T.uploadsOff),
    app.uploads.length > 0 && h("ul", { class: "uploads" }, app.uploads.map((one) => uploadRow(app, one))));
}

/** @param {App} app @param {any} one */
function uploadRow(app, one) {
  return h("li", { key: one.key }, h("div", { class: "head" }, h("h3", null, mid(one.name)),
    one.state === "sending" && h("button", { class: "b quiet", type: "button", onclick: () => one.stop() }, T.stop),
    one.state === "stopped" && mayAct(app.state) && h("button", { class: "b quiet", type: "button", onclick: () => app.upload(one) }, T.resume_),
    one.state !== "sending" && h("button", { class: "b icon quiet", type: "button", "aria-label": T.putAway, onclick: () => app.forgetUpload(one) }, icon("i-close"))),
  one.state !== "done" && h("progress", { max: String(Math.max(1, one.size)), value: one.sent, "aria-label": T.uploadLabel(plain(one.name)) }),
  h("p", { class: "small n" }, one.state === "done" ? T.uploaded("") : one.state === "sending" ? T.uploading(one.sent, one.size, one.rate) : one.error ? T.uploadFailed(plain(one.error)) : T.uploadStopped,
    one.state === "done" && one.sum && h("code", null, one.sum)));
}

export { RECENT_WRITE };
