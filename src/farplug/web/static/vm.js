/** One VM: its bar, its picture with what has stopped it, the row of information below. */

import { h, icon, mid, plain } from "./dom.js";
import { clock, duration } from "./figures.js";
import { command, port } from "./parts.js";
import { dock } from "./dock.js";
import { count, floatingAsk, panel, sentence } from "./panel.js";
import { attachments, drives, guest, mayAct, overlay } from "./state.js";
import { T } from "./texts.js";

/** @typedef {import("./app.js").App} App */

/** @param {App} app */
export function vm(app) {
  const { ui } = app;
  const over = overlay(app.state);
  return h("div", {
    key: "vm", class: `vm${ui.panel ? "" : " nopanel"}`, "data-tab": ui.tab, "data-over": over ?? undefined, "data-dock": ui.dock,
    "data-active": ui.active ? "true" : undefined,
  }, top(app, over), stage(app, over), tabbar(app), ui.panel || app.narrow ? panel(app) : null);
}

/** @param {App} app @returns {boolean} whether a banner stands for the pause */
function paused(app) {
  return overlay(app.state) === null && app.state.screen.state === "paused";
}

/** @param {App} app @param {string | null} over */
function top(app, over) {
  const { state } = app;
  const name = state.session ?? "";
  const vmName = guest(state)?.name ?? "";
  return h("header", { class: "top" },
    h("div", { class: "bar" },
      h("a", { class: "home", href: "#", "aria-label": T.allSessions, onclick: (/** @type {MouseEvent} */ event) => app.follow(event, null) }, icon("i-logo")),
      h("h1", null, mid(name)),
      h("p", { class: "ident" }, vmName && [plain(vmName), " · "], h("code", null, plain(state.hello?.target ?? ""))),
      h("p", { class: "state", role: "status" }, statusWords(app, over))),
    h("div", { class: "tools", role: "toolbar", "aria-label": T.theVm }, tools(app, over)));
}

/** @param {App} app @param {string | null} over */
function statusWords(app, over) {
  const { state } = app;
  const words = (/** @type {string} */ mark, /** @type {string} */ word, /** @type {string} */ kind, /** @type {string} */ more) =>
    h("span", { class: kind }, icon(mark, "s"), h("b", null, word), more && h("span", { class: "opt" }, " ", more));
  if (over === "server") return words("s-wait", state.link.state === "connecting" ? T.state.connecting : T.state.gone, "warn", "");
  if (over === "ended") return words("s-stop", T.state.ended, "stop", "");
  if (over === "gone") return words("s-stop", takenOver(app) ? T.state.taken : T.state.closed, "stop", "");
  if (over === "lost") return words("s-wait", T.state.reconnecting, "warn", "");
  if (over === "connecting") return words("s-wait", T.state.connecting, "warn", "");
  if (paused(app)) return words("s-pause", T.state.paused, "", "");
  return words("s-on", T.state.connected, "", state.hello?.started ? duration(app.now() - state.hello.started) : "");
}

/** @param {App} app @param {string | null} over */
function tools(app, over) {
  const { state, ui } = app;
  const full = state.server?.role === "full";
  const { driver } = state;
  const reach = over === null || over === "no-picture";
  const drive = drives(state);
  const tool = (/** @type {string} */ symbol, /** @type {string} */ label, /** @type {() => void} */ act, /** @type {any} */ more = {}, /** @type {boolean} */ word = false) =>
    h("button", { key: label, type: "button", "aria-label": label, title: word ? undefined : label, onclick: act, ...more, class: `b quiet tool${word ? "" : " icon"}${more.class ? ` ${more.class}` : ""}` }, icon(symbol), word && h("span", null, label));
  const others = driver?.watchers ?? 0;
  return [
    driver !== null && reach && (driver.holder?.you
      ? h("p", { key: "driver", class: "driver" }, icon("i-drive"), h("b", null, T.youDrive), others > 0 && h("span", { class: "opt" }, T.watch(others)))
      : h("p", { key: "driver", class: "driver other" }, icon("i-eye"), h("b", null, driver.holder ? [h("span", null, plain(driver.holder.name)), " ", T.drives] : T.nobodyDrives), driver.holder && h("span", { class: "opt" }, T.youWatch))),
    full && driver !== null && !drive && reach && h("button", { key: "take", class: "b", type: "button", onclick: () => app.takeDrive() }, driver.holder ? T.takeOver : T.drive),
    !full && state.server && h("p", { key: "chip", class: "chip" }, T.viewOnly),
    drive && [
      h("span", { key: "sep1", class: "sep" }),
      tool("i-keyboard", T.phoneKeyboard, () => app.phoneKeyboard(), { class: "phone", disabled: !reach }),
      tool("i-text", T.typeText, () => app.toggleDock("type"), { "aria-pressed": String(ui.dock === "type" && ui.dockOpen), disabled: !reach }, true),
      tool("i-keys", T.keys, () => app.toggleDock("keys"), { "aria-pressed": String(ui.dock === "keys" && ui.dockOpen), disabled: !reach }, true),
      h("button", { key: "cad", class: "b quiet tool cad", type: "button", disabled: !reach, onclick: () => app.press("ctrl+alt+Delete") }, h("span", null, T.ctrlAltDel)),
    ],
    h("span", { key: "sep2", class: "sep" }),
    tool("i-shot", T.saveScreenshot, () => app.saveScreenshot(), { disabled: !(reach && state.screen.width > 0) }),
    tool("i-full", ui.full ? T.leaveFullScreen : T.fullScreen, () => app.fullScreen(), { "aria-pressed": String(ui.full) }),
    h("button", { key: "panelkey", class: "b quiet tool icon panelkey", type: "button", "aria-pressed": String(ui.panel), "aria-label": T.usbPanel, title: T.usbPanel, onclick: () => app.setUi({ panel: !ui.panel }) },
      icon("i-usb"), !ui.panel && h("b", { class: "n" }, `${count(app).used}/${count(app).all}`)),
  ];
}

/** @param {App} app @param {string | null} over */
function stage(app, over) {
  const { state, ui } = app;
  const vmName = plain(guest(state)?.name || state.session || "");
  const { width, height } = state.screen;
  const some = width > 0;
  const drive = drives(state);
  return h("main", { key: "stage", class: "stage" },
    paused(app) && h("div", { key: "paused", class: "banner", role: "status" }, h("p", null, icon("s-pause", "s"), h("b", null, T.paused), " ", T.pausedText), command(app, T.resume(guest(state)?.name ?? ""))),
    h("div", {
      key: "bench", class: `bench${ui.scale === "1:1" ? " actual" : ""}`, ref: (/** @type {HTMLElement} */ node) => app.benchMade(node),
      ondragover: (/** @type {DragEvent} */ event) => app.dragOver(event, null), ondragleave: (/** @type {DragEvent} */ event) => app.dragLeave(event, null),
      ondrop: (/** @type {DragEvent} */ event) => app.dropped(event, null, false),
    }, h("div", {
      key: "screen", class: `screen${ui.active ? " active" : ""}${over !== null ? " stopped" : ""}${paused(app) ? " paused" : ""}${ui.drag && ui.drag.files ? " dragged" : ""}`,
      tabindex: "0", role: "application", "aria-label": (drive ? T.picture : T.pictureWatched)(vmName, width, height), "aria-describedby": "keys-hint",
      style: some ? { "--w": String(width), "--h": String(height) } : {}, ref: (/** @type {HTMLElement} */ node) => app.screenMade(node),
    },
    // The canvases and the field for a phone's keyboard are the picture's own.
    h("div", { key: "held", class: "held", opaque: true, ref: (/** @type {HTMLElement} */ node) => app.pictureMade(node) }),
    overlayCard(app, over),
    ui.drag?.files && over === null && dropZones(app)),
    over === null && floatingAsk(app)),
    h("footer", { key: "info", class: "info" },
      h("p", { class: "n size" }, some && over !== "no-display" ? T.pixels(width, height) : T.noPicture),
      some && h("div", { class: "seg", role: "group", "aria-label": T.scale },
        [["fit", T.fit], ["1:1", T.oneToOne]].map(([name, word]) => h("button", { key: name, type: "button", "aria-pressed": String(ui.scale === name), onclick: () => app.setUi({ scale: name }) }, word))),
      over === null && h("p", { class: "n opt2" }, h("b", null, state.stats.frames), " ", T.framesPerSecond),
      over === null && drive && state.stats.roundTrip > 0 && h("p", { class: "n opt2" }, h("b", null, `${Math.round(state.stats.roundTrip)}\u00a0ms`), " ", T.roundTrip),
      hint(app, over),
      some && h("ul", { class: "leds", "aria-label": T.lockKeys }, ["num", "caps", "scroll"].map((name) => {
        const lit = state.inputs.locks.includes(name);
        return h("li", { key: name, class: lit ? "lit" : undefined }, T.lockNames[name], " ", h("span", null, lit ? T.on : T.off));
      }))),
    dock(app));
}

/** @param {App} app @param {string | null} over */
function hint(app, over) {
  const { state, ui } = app;
  const words = (/** @type {string} */ symbol, /** @type {any} */ ...content) => h("p", { class: "hint", id: "keys-hint" }, icon(symbol), content);
  if (over !== null && over !== "no-picture") return words("i-keyboard", h("span", null, T.nowhere));
  if (!drives(state)) return words("i-eye", h("span", null, state.driver?.holder === null && state.server?.role === "full" ? T.nobodyHint : T.watchHint));
  if (ui.active && paused(app)) return words("i-keyboard", h("span", null, h("b", null, T.keysWait), " · ", h("kbd", null, "Ctrl"), "+", h("kbd", null, "Alt"), " ", T.letsGo));
  if (ui.active) return words("i-keyboard",
    h("span", { class: "wide" }, h("b", null, T.keysGo), " ", h("kbd", null, "Ctrl"), "+", h("kbd", null, "Alt"), " ", T.letsGo),
    h("span", { class: "phone" }, h("b", null, T.keysGoPhone), " ", T.tapBelow));
  if (paused(app)) return words("i-keyboard", h("span", null, T.keysWait));
  return words("i-keyboard", h("span", { class: "wide" }, T.clickToType), h("span", { class: "phone" }, T.tapToType));
}

/** @param {App} app */
function tabbar(app) {
  const { used, all } = count(app);
  const words = { usb: [T.socketsShort, " ", h("b", { class: "n" }, `${used}/${all}`)], plug: T.plugIn, messages: T.messages };
  return h("nav", { key: "tabbar", class: "tabbar", "aria-label": T.tabs }, Object.entries(words)
    .filter(([name]) => name !== "plug" || app.state.server?.role === "full")
    .map(([name, content]) => h("button", { key: name, type: "button", "aria-pressed": String(app.ui.tab === name && (name !== "messages" || app.ui.dock === name)), onclick: () => app.setUi({ tab: name, dock: "messages", dockOpen: true }) }, content)));
}

/** The page without a VM: its server does not answer, or does not know the token. @param {App} app */
export function lone(app) {
  return h("main", { key: "lone", class: "lone" }, overlayCard(app, "server"));
}

// What has stopped the picture

/** @param {App} app @param {string | null} over */
function overlayCard(app, over) {
  if (over === null) return null;
  const parts = { server: serverGone, ended, lost, gone, connecting, "no-display": noDisplay, "no-picture": noPicture }[over];
  const { alert, mark, title, content } = /** @type {(app: App) => any} */ (parts)(app);
  const solid = over === "no-display" || app.state.screen.width === 0;
  return h("div", { key: `over-${over}`, class: solid ? "over solid" : "over" },
    h("div", { class: `card${mark === "s-stop" ? " stop" : ""}`, role: alert ? "alertdialog" : "group", "aria-labelledby": "over-t", tabindex: "-1", ref: alert ? (/** @type {HTMLElement} */ node) => app.overlayMade(node) : undefined },
      h("h2", { id: "over-t" }, mark && icon(mark, "s"), title), content));
}

/** @param {App} app @param {{at: number, tries: number, span: number}} when @param {(() => void) | null} now @param {(() => void) | null} stop */
function countdown(app, when, now, stop = null) {
  const left = Math.max(0, Math.ceil(when.at - app.wall()));
  const words = T.nextTry(left, when.tries);
  return [
    left > 0 ? h("div", { class: "count" }, h("p", null, h("b", { class: "big n" }, words[0]), words[1]),
      h("progress", { max: String(Math.max(1, when.span)), value: Math.min(left, when.span), "aria-label": T.secondsToTry }))
      : h("p", { role: "status" }, T.trying, "…"),
    now && h("p", { class: "row" },
      h("button", { class: "b main", type: "button", disabled: left === 0, onclick: now }, T.tryNow),
      stop && h("button", { class: "b", type: "button", onclick: stop }, T.stopTrying)),
  ];
}

/** @param {App} app */
function serverGone(app) {
  const { link } = app.state;
  if (link.state === "refused") return { alert: true, mark: "s-stop", title: app.token === "" ? T.noToken : T.badToken, content: h("p", null, app.token === "" ? T.noTokenText : T.badTokenText) };
  if (link.state === "connecting" && link.tries === 0) return { alert: false, mark: "s-wait", title: T.connecting, content: h("p", { role: "status" }, T.openingText) };
  const left = attachments(app.state).length > 0;
  return {
    alert: true, mark: "s-wait", title: link.reason === "" ? T.serverGone : T.serverRefused, content: [
      link.reason !== "" && h("p", null, plain(link.reason)),
      h("p", null, app.state.session !== null && T.serverGoneText, left && app.media.size > 0 && [" ", T.serverGoneMedia]),
      countdown(app, { at: link.retryAt, tries: link.tries + 1, span: app.retrySpan }, () => app.tryNow()),
      h("div", null, h("p", { class: "why" }, T.startServer), command(app, "farplug page")),
    ],
  };
}

/** @param {App} app */
function connecting(app) {
  return { alert: false, mark: "s-wait", title: T.opening, content: h("p", { role: "status" }, T.openingText) };
}

/** @param {App} app */
function why(app) {
  const { loss, hello } = app.state;
  if (!loss?.message) return null;
  const target = `${hello?.target}: `;  // the bar has it
  return plain(sentence(loss.message.startsWith(target) ? loss.message.slice(target.length) : loss.message));
}

/** @param {App} app @returns {boolean} the SPICE server ended the session, and still answers */
function takenOver(app) {
  return app.state.loss?.reason === "taken-over";
}

/** @param {App} app */
function lost(app) {
  const { loss } = app.state;
  const attempt = guest(app.state)?.attempt ?? null;
  const returning = attachments(app.state).filter((one) => one.state === "lost").length;
  const act = app.state.server?.role === "full";
  return {
    alert: true, mark: "s-wait", title: takenOver(app) ? T.takenOver : T.noAnswer, content: [
      h("p", null, loss?.time && [T.since(clock(loss.time)), why(app), " "], app.state.screen.width > 0 && T.lastPicture, " ", T.returns(returning)),
      takenOver(app) && h("p", null, T.fights),
      attempt && countdown(app, { at: attempt.time + app.wall() - app.now(), tries: attempt.number, span: app.spanOf(attempt) }, act ? () => app.reconnect(false) : null, act ? () => app.reconnect(true) : null),
      !takenOver(app) && [  // farplug doctor would end the other client, too
        loss?.remedy && h("p", null, plain(sentence(loss.remedy))),
        h("div", null, h("p", { class: "why" }, T.doctor), command(app, `farplug doctor ${shellWord(app.state.hello?.target ?? "")}`)),
      ],
    ],
  };
}

/** @param {App} app */
function gone(app) {
  const { loss } = app.state;
  return {
    alert: true, mark: "s-stop", title: takenOver(app) ? T.takenOver : T.gone, content: [
      h("p", null, loss?.time && T.goneAt(clock(loss.time)), why(app), loss?.remedy && [" ", plain(sentence(loss.remedy))]),
      again(app),
    ],
  };
}

/** @param {App} app */
function ended(app) {
  const { loss, ended } = app.state;
  if (loss !== null) return gone(app);
  return { alert: true, mark: "s-stop", title: T.ended, content: [h("p", null, ended && [plain(ended), " "], T.endedText), again(app)] };
}

/** @param {App} app */
function again(app) {
  const { hello } = app.state;
  return [
    h("div", null, h("p", { class: "why" }, T.connectAgain), command(app, `farplug connect ${shellWord(hello?.target ?? "TARGET")} --name ${hello?.session ?? "web1"} --detach`)),
    h("p", { class: "row" }, h("button", { class: "b main", type: "button", onclick: () => app.leave() }, T.allSessions)),
  ];
}

/** @param {App} app */
function noDisplay(app) {
  const target = String(app.state.hello?.target ?? "");
  const scheme = /^(tcp|tcp-listen|unix):/.exec(target);
  const { message, remedy } = app.state.screen;
  const words = scheme ? T.noScreenTcp(scheme[0]) : null;
  return {
    alert: false, mark: null, title: T.noScreen, content: [
      words ? h("p", null, words[0], h("code", null, `${words[2]}//`), words[1]) : h("p", null, message && [plain(sentence(message)), " "], T.noScreenText),
      remedy?.remedy && !words && h("p", null, plain(sentence(remedy.remedy))),
      words && [h("p", null, T.connectSpice), command(app, "farplug connect spice://vmhost:5900 --name web1")],
    ],
  };
}

/** @param {App} app */
function noPicture(app) {
  const { message, remedy } = app.state.screen;
  return { alert: false, mark: "s-wait", title: T.noPictureTitle, content: [h("p", null, message ? [plain(sentence(message)), " "] : null, T.noPictureText), remedy?.remedy && h("p", null, plain(sentence(remedy.remedy)))] };
}

/** @param {string} text @returns {string} quoted for a shell */
function shellWord(text) {
  return /^[\w@%+=:,./[\]-]+$/.test(text) && !/[[\]]/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

/** @param {App} app */
function dropZones(app) {
  const { drag } = app.ui;
  const uploads = app.canUpload();
  if (!mayAct(app.state)) return null;
  const over = (/** @type {string} */ zone) => (drag?.zone === zone ? "zone on" : "zone");
  const zone = (/** @type {string} */ name, /** @type {any} */ content) => h("div", {
    key: name, class: over(name), ondragover: (/** @type {DragEvent} */ event) => app.dragOver(event, null, name), ondrop: (/** @type {DragEvent} */ event) => app.dropped(event, null, name === "upload"),
  }, h("div", { class: "plate" }, content));
  return h("div", { key: "drop", class: "over drop" }, h("div", { class: uploads ? "zones" : "zones one" },
    zone("plug", [port("p-wait", "i-cd"), h("h2", null, T.dropIt), h("p", null, T.dropText)]),
    uploads && zone("upload", [h("h2", null, icon("i-up"), T.uploadFirst), h("p", null, T.uploadFirstText(plain(app.state.server?.machine)))])));
}
