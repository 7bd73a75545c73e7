/** The page: one connection, one state, one drawing of it; and everything that somebody can do here. */

import { FRESH, dialog } from "./attach.js";
import { board } from "./board.js";
import { BAD_TOKEN, Connection, ENCODINGS, RequestError, TOO_MANY_BAD_TOKENS } from "./connection.js";
import { PIECE } from "./dock.js";
import { atNextFrame, patch } from "./dom.js";
import { InputQueue } from "./input_queue.js";
import { HOLD, Keyboard, PHONE_KEYS } from "./keyboard.js";
import { Upload, answer, droppedFile, droppedName, kindOf, refusal } from "./media.js";
import { RECENT_WRITE, kind, title } from "./panel.js";
import { Pointer } from "./pointer.js";
import { Picture } from "./screen.js";
import { attachments, drives, initial, lines, mayAct, offered, overlay, portOf, ports, reduce } from "./state.js";
import { LineTerminal } from "./terminal.js";
import { T } from "./texts.js";
import { lone, vm } from "./vm.js";

const VERSION = "1.1";
/** Seconds before each attempt to reach the page's server again; the last one is that before all further ones. */
const DELAYS = [0.5, 1, 2, 4, 8, 15];
const TOKEN = "farplug-token";
/** Where the name of the serial line is whose terminal is shown, so that it is shown again when the page is loaded again. */
const TERMINAL = "farplug-terminal";
const DEVICE_TYPE = "application/x-farplug-device";
/** Seconds after which the lists of devices and files are fetched again. */
const STALE = 5;
const COPIED = 2000;
const MAX_COMMANDS = 500;
/** Characters that a layout lacks, of which the page takes note. */
const MAX_MISSING = 1000;

export class App {
  constructor() {
    this.state = initial;
    this.ui = {
      tab: "usb", dock: "messages", dockOpen: true, panel: true, source: "devices", scale: "fit", active: false, full: false,
      menu: /** @type {string | null} */ (null), endpoints: /** @type {Set<string>} */ (new Set()), just: /** @type {Set<string>} */ (new Set()),
      dialog: /** @type {typeof FRESH | null} */ (null), confirm: /** @type {any} */ (null), sure: /** @type {number | null} */ (null),
      drag: /** @type {any} */ (null), copied: "", find: "", path: "", openError: /** @type {any} */ (null),
      hold: /** @type {Set<string>} */ (new Set()), lastKeys: "ctrl+alt+Delete", keyError: /** @type {string | null} */ (null),
      recording: false, recordPath: /** @type {string | null} */ (null), keyPath: "keys.json",
      type: { text: "", layout: "", hidden: false, missing: /** @type {any[]} */ ([]), busy: false, error: /** @type {any} */ (null), note: "", progress: { done: 0, total: 0 } },
    };
    this.token = takeToken();
    /** @type {string | null} the session that the address names */
    this.wanted = sessionOfAddress();
    /** @type {Connection | null} */
    this.connection = null;
    this.retryTimer = 0;
    this.retrySpan = 1;
    this.offset = 0;
    this.frames = 0;
    this.drawing = false;
    this.requests = 0;
    this.triedDrive = false;
    /** @type {{layouts: any[], current: string} | null} */
    this.layouts = null;
    /** @type {Map<string, File>} files that this browser offers, by id of the medium */
    this.media = new Map();
    /** @type {Map<string, string>} the attachment in which a medium is, by id of the medium */
    this.mediaOf = new Map();
    /** @type {Upload[]} */
    this.uploads = [];
    /** @type {Map<string, string>} */
    this.commands = new Map();
    /** @type {Map<string, {at: number, listing: any}>} */
    this.listings = new Map();
    /** @type {Map<string, LineTerminal>} by the label of the serial line */
    this.terminals = new Map();
    this.devicesAt = 0;
    /** @type {Map<string, string>} addresses of pictures of the board */
    this.thumbnails = new Map();
    this.thumbnailsAt = 0;
    /** @type {(() => void)[]} */
    this.after = [];
    this.serial = Promise.resolve();
    this.checkTimer = 0;
    this.stopped = false;
    this.spans = { key: "", span: 1 };
    this.touchScreen = matchMedia("(pointer: coarse)").matches;
    const narrow = matchMedia("(max-width: 760px)");
    this.narrow = narrow.matches;
    narrow.onchange = () => { this.narrow = narrow.matches; this.draw(); };

    this.page = /** @type {HTMLElement} */ (document.getElementById("page"));
    this.dialog = /** @type {HTMLDialogElement} */ (document.getElementById("attach"));
    this.chooser = /** @type {HTMLInputElement} */ (document.getElementById("file"));
    /** @type {HTMLElement | null} */
    this.screen = null;

    this.picture = new Picture({
      acknowledge: (serial) => { this.request("screen-ack", { serial }).catch(ignore); },
      frame: () => { this.frames += 1; },
    });
    this.queue = new InputQueue((method, params) => this.request(method, params));
    this.keyboard = new Keyboard({
      send: (method, params) => this.queue.put(method, params), leave: () => this.leavePicture(), takeHeld: () => this.takeHeld(),
    });
    this.pointer = new Pointer({
      send: (method, params) => this.queue.put(method, params), picture: this.picture, take: () => this.takePicture(),
      active: () => this.ui.active && drives(this.state), mode: () => this.state.inputs.mouse,
    });
    this.field = document.createElement("textarea");
    this.field.className = "phonefield";
    this.field.tabIndex = -1;
    this.field.setAttribute("aria-label", T.typeHere);
    for (const name of ["autocapitalize", "autocomplete", "autocorrect"]) this.field.setAttribute(name, "off");
    this.field.spellcheck = false;
    this.field.addEventListener("beforeinput", (event) => this.fromPhone(event));

    addEventListener("blur", () => this.leavePicture());
    addEventListener("popstate", () => this.goTo(sessionOfAddress()));
    addEventListener("hashchange", () => this.hashChanged());
    addEventListener("pointerdown", (event) => this.pressedOutside(event));
    addEventListener("keydown", (event) => this.pageKey(event));
    addEventListener("dragover", (event) => this.dragOver(event, null));
    addEventListener("dragleave", (event) => { if (event.relatedTarget === null) this.endDrag(); });
    addEventListener("drop", (event) => { event.preventDefault(); this.endDrag(); });
    addEventListener("resize", () => this.picture.placePointer());
    addEventListener("focus", () => this.refresh(true));
    addEventListener("beforeunload", (event) => { if (this.media.size > 0 || this.uploads.some((one) => one.state === "sending")) event.preventDefault(); });
    document.addEventListener("fullscreenchange", () => this.fullChanged());
    document.addEventListener("pointerlockchange", () => { if (document.pointerLockElement === null && this.ui.active && this.state.inputs.mouse === "relative") this.leavePicture(); });
    this.dialog.addEventListener("cancel", (event) => { event.preventDefault(); this.closeDialog(); });
    this.chooser.addEventListener("change", () => this.chosen());
    /** @type {{port: number | null, upload: boolean, insert: any}} */
    this.choice = { port: null, upload: false, insert: null };
    this.skip = /** @type {HTMLElement} */ (document.getElementById("skip"));
    this.skip.textContent = T.skip;
    this.skip.addEventListener("click", (event) => { event.preventDefault(); document.getElementById("usb")?.focus(); });
    setInterval(() => this.second(), 1000);
  }

  // State and drawing

  /** @param {any} action */
  dispatch(action) {
    this.state = reduce(this.state, action);
    this.draw();
  }

  /** @param {any} fields */
  setUi(fields) {
    this.ui = { ...this.ui, ...fields };
    this.draw();
  }

  /** Draw the state at the next frame. */
  draw() {
    if (this.drawing) return;
    this.drawing = true;
    atNextFrame(() => {
      this.drawing = false;
      this.drawNow();
    });
  }

  drawNow() {
    const { state } = this;
    const over = overlay(state);
    this.keepTerminals();
    if (this.ui.active && (over !== null && over !== "no-picture" || !drives(state))) this.leavePicture();
    const view = state.session !== null ? vm(this) : state.link.state !== "open" ? lone(this) : board(this);
    patch(this.page, [view]);
    patch(this.dialog, dialog(this));
    if (this.ui.dialog !== null && !this.dialog.open) this.dialog.showModal();
    if (this.ui.dialog === null && this.dialog.open) this.dialog.close();
    const title = state.session === null ? "farplug" : `${state.session} · farplug`;
    if (document.title !== title) document.title = title;
    this.skip.hidden = state.session === null;
    this.picture.setOwnPointer(drives(state) && state.inputs.mouse === "absolute" && over === null);
    this.picture.placePointer();
    const paper = document.querySelector(".paper textarea");
    if (paper?.previousElementSibling) paper.previousElementSibling.scrollTop = paper.scrollTop;
    for (const run of this.after.splice(0)) run();
  }

  /** Return the seconds since 1970, by the clock of the session. */
  now() {
    return this.wall() + this.offset;
  }

  /** Return the seconds since 1970, by the clock of this browser. */
  wall() {
    return Date.now() / 1000;
  }

  second() {
    this.state = reduce(this.state, { type: "stats", stats: { frames: this.frames } });
    this.frames = 0;
    this.refresh(false);
    if (!document.hidden) this.draw();
  }

  /** @param {string} text that a screen reader reads */
  say(text) {
    const said = /** @type {HTMLElement} */ (document.getElementById("said"));
    said.textContent = text;
  }

  // The connection

  start() {
    this.connect();
    this.draw();
  }

  connect() {
    clearTimeout(this.retryTimer);
    if (this.token === "") {
      this.dispatch({ type: "link", link: { state: "refused" } });
      return;
    }
    const url = new URL("ws", document.baseURI);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    url.hash = url.search = "";
    this.dispatch({ type: "link", link: { state: this.state.link.tries === 0 ? "connecting" : "gone", retryAt: 0 } });
    const connection = new Connection(url.href, {
      onevent: (name, data, bytes) => { if (connection === this.connection) this.event(name, data, bytes); },
      onclose: (code, reason) => { if (connection === this.connection) this.disconnected(code, reason); },
      onroundtrip: (milliseconds) => {
        const before = this.state.stats.roundTrip;
        this.state = reduce(this.state, { type: "stats", stats: { roundTrip: before === 0 ? milliseconds : 0.8 * before + 0.2 * milliseconds } });
      },
    });
    this.connection = connection;
    this.greet(connection).catch(ignore);
  }

  /** @param {Connection} connection */
  async greet(connection) {
    await connection.opened;
    const server = await connection.request("hello", { protocol_version: VERSION, client_name: "farplug page", token: this.token, encodings: ENCODINGS });
    this.dispatch({ type: "server", server });
    const session = this.state.session ?? this.wanted ?? server.session ?? null;
    if (session !== null) await this.open(session);
    else await this.showBoard();
  }

  /** @param {number} code @param {string} reason */
  disconnected(code, reason) {
    this.leavePicture();
    this.queue.clear();
    this.media.clear();
    this.mediaOf.clear();
    for (const terminal of this.terminals.values()) terminal.lost();
    if (code === BAD_TOKEN || code === TOO_MANY_BAD_TOKENS) {
      this.dispatch({ type: "link", link: { state: "refused" } });
      return;
    }
    const { tries } = this.state.link;
    this.retrySpan = DELAYS[Math.min(tries, DELAYS.length - 1)];
    this.dispatch({ type: "link", link: { state: "gone", reason: code >= 4000 ? reason : "", tries: tries + 1, retryAt: this.wall() + this.retrySpan } });
    this.retryTimer = setTimeout(() => this.connect(), 1000 * this.retrySpan);
  }

  tryNow() {
    this.connect();
  }

  /**
   * @param {string} method @param {any} [params] @param {ArrayBuffer | null} [bytes]
   * @returns {Promise<any>}
   */
  request(method, params = {}, bytes = null) {
    if (this.connection === null) return Promise.reject(new RequestError({ code: "gone", message: T.serverGone }));
    return this.connection.request(method, params, bytes);
  }

  /** @param {string} method */
  supports(method) {
    return (this.state.hello?.supported_methods ?? []).includes(method);
  }

  /** @param {string} name @param {any} data @param {ArrayBuffer | null} bytes */
  event(name, data, bytes) {
    if (typeof data.time === "number") this.offset = data.time - this.wall();
    if (name === "screen" && bytes !== null) this.picture.update(data, bytes);
    else if (name === "cursor") {
      this.picture.cursor(data, bytes);
      return;
    } else if (name === "media-read" && this.connection !== null) {
      answer(this.connection, data, this.media.get(data.media)).catch(ignore);
      return;
    } else if (name === "serial" && bytes !== null) {
      for (const terminal of this.terminals.values()) terminal.received(data, bytes);
      return;
    }
    if (name === "dropped") {
      this.subscribe().catch(ignore);
      return;
    }
    const before = attachments(this.state);
    this.dispatch({ type: "event", name, data, now: this.wall() });
    if (name === "driving" && !this.triedDrive && this.state.server?.role === "full") {
      this.triedDrive = true;
      if (data.holder === null) this.takeDrive();
    }
    if (name === "configured") this.plugged(before, data.attachment);
    if (["attached", "detached", "removed"].includes(name)) this.refresh(true);
    if (name === "removed") for (const [media, attachment] of this.mediaOf) if (attachment === data.attachment) this.withdraw(media);
    const ejected = name === "medium-ejected" ? offered(data.medium) : null;
    if (ejected !== null) this.withdraw(ejected.media);
    if (name === "capture-started" || name === "capture-ended") this.setUi({ recording: false });
  }

  /** @param {any[]} before @param {string} id */
  plugged(before, id) {
    const now = attachments(this.state).find((one) => one.id === id);
    if (now?.state !== "in use" || before.find((one) => one.id === id)?.state === "in use") return;
    this.ui.just.add(id);
    setTimeout(() => this.ui.just.delete(id), 400);
  }

  // Board and sessions

  async showBoard() {
    this.dispatch({ type: "sessions", sessions: await this.request("sessions") });
    await this.request("watch-sessions");
    this.refresh(true);
  }

  /** @param {string} name */
  async open(name) {
    let hello;
    try {
      if (this.state.session === null && this.state.sessions !== null) this.request("unwatch-sessions").catch(ignore);
      hello = await this.request("open", { session: name });
    } catch (error) {
      if (this.state.session !== null && this.state.session === name) {
        this.dispatch({ type: "event", name: "session-ended", data: { reason: message(error) }, now: this.wall() });
        return;
      }
      this.wanted = null;
      this.setUi({ openError: { ...fields(error), name } });
      await this.showBoard();
      return;
    }
    this.triedDrive = false;
    this.layouts = null;
    this.dispatch({ type: "opened", session: name, hello });
    this.ui = { ...this.ui, openError: null, menu: null, dialog: null, confirm: null, drag: null };
    await this.subscribe();
    for (const terminal of this.terminals.values()) terminal.open();
    const shown = sessionStorage.getItem(TERMINAL);
    if (lines(this.state).some((one) => `${name} ${one.label}` === shown)) this.showTerminal(String(shown).slice(name.length + 1));
    this.request("watch-screen", { display: 0 }).then(
      ({ width, height }) => { if (width > 0) this.dispatch({ type: "event", name: "screen", data: { width, height }, now: this.wall() }); },
      (error) => this.dispatch({ type: "event", name: "screen-state", data: { ...fields(error), state: "no-display" }, now: this.wall() }));
    this.request("layouts").then((layouts) => {
      // The last one may be of XKB, and not be in the package.
      const known = layouts.layouts.some((/** @type {any} */ one) => one.name === layouts.current);
      this.layouts = known ? layouts : { ...layouts, layouts: [{ name: layouts.current, title: layouts.current }, ...layouts.layouts] };
      this.ui.type.layout = layouts.current;
      this.draw();
    }, ignore);
    this.refresh(true);
  }

  async subscribe() {
    const { snapshot } = await this.request("subscribe");
    this.dispatch({ type: "snapshot", snapshot });
    await this.fetchDrives();
  }

  /** Fetch what is in the CD-ROM drives. Only once, and not to watch: the session prints a line for each drive. */
  async fetchDrives() {
    if (this.state.server?.role !== "full" || !attachments(this.state).some(hasDrive)) return;
    this.dispatch({ type: "drives", drives: await this.request("list").catch(() => []) });
  }

  /** Go back to the board. */
  leave() {
    history.pushState(null, "", location.pathname);
    this.goTo(null);
  }

  /** @param {string | null} session */
  goTo(session) {
    this.wanted = session;
    if (session === this.state.session) return;
    this.leavePicture();
    if (this.state.session !== null) {
      this.request("close").catch(ignore);
      this.dispatch({ type: "left" });
    }
    if (this.state.link.state !== "open") return;
    (session === null ? this.showBoard() : this.open(session)).catch(ignore);
  }

  /** @param {MouseEvent} event @param {string | null} session a link to it was clicked; null: to the board */
  follow(event, session) {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
    event.preventDefault();
    history.pushState(null, "", session === null ? location.pathname : `#session=${encodeURIComponent(session)}`);
    this.goTo(session);
  }

  hashChanged() {
    const token = takeToken();
    if (token !== this.token) {
      this.token = token;
      this.connection?.close();
      this.connection = null;
      this.dispatch({ type: "link", link: { tries: 0 } });
      this.connect();
    }
    this.goTo(sessionOfAddress());
  }

  /** Fetch lists that are old, if they are shown. @param {boolean} now whether they are fetched although they are not old */
  refresh(now) {
    if (this.state.link.state !== "open" || document.hidden) return;
    const old = (/** @type {number} */ at) => now || performance.now() - at > 1000 * STALE;
    if (this.state.session === null) {
      if (this.state.sessions !== null && old(this.thumbnailsAt)) this.fetchThumbnails().catch(ignore);
      return;
    }
    if (this.state.server?.role !== "full" || this.state.snapshot === null || this.state.ended !== null) return;
    if ((this.ui.source === "devices" || this.ui.dialog?.tab === "device" || this.state.devices === null) && old(this.devicesAt)) {
      this.devicesAt = performance.now();
      this.request("devices").then((devices) => this.dispatch({ type: "devices", devices }), (error) => this.dispatch({ type: "devices", devices: { error: fields(error) } }));
    }
    if (this.ui.source === "images") this.filesOf(this.ui.path, now);
    if (this.ui.dialog !== null && this.ui.dialog.tab !== "device") this.filesOf(this.ui.dialog.path, false);
  }

  async fetchThumbnails() {
    this.thumbnailsAt = performance.now();
    for (const one of this.state.sessions ?? []) {
      if (!one.thumbnail) continue;
      const response = await fetch(`screenshot.png?session=${encodeURIComponent(one.name)}&display=0&thumbnail=1`, { headers: { Authorization: `Bearer ${this.token}` } });
      if (!response.ok) continue;
      const url = URL.createObjectURL(await response.blob());
      URL.revokeObjectURL(this.thumbnails.get(one.name) ?? "");
      this.thumbnails.set(one.name, url);
      this.draw();
    }
  }

  /**
   * Return the listing of a folder; null: it is not there yet. It is fetched if it is missing or old.
   *
   * @param {string} path @param {boolean} [now]
   */
  filesOf(path, now = false) {
    const known = this.listings.get(path);
    if (known === undefined || performance.now() - known.at > 1000 * STALE || (now && performance.now() - known.at > 500)) {
      this.listings.set(path, { at: performance.now(), listing: known?.listing ?? null });
      this.request("files", { path }).then((listing) => listing, (error) => ({ error: fields(error), entries: [] })).then((listing) => {
        this.listings.set(path, { at: performance.now(), listing });
        this.draw();
      });
    }
    return known?.listing ?? null;
  }

  /** @param {string} folder @param {string} name */
  join(folder, name) {
    return folder === "" ? name : `${folder}/${name}`;
  }

  /**
   * Return the shell command that does the same; empty: not known yet, or there is none.
   *
   * @param {string} method @param {any} params
   */
  commandFor(method, params) {
    const key = JSON.stringify([this.state.session, method, params]);
    const known = this.commands.get(key);
    if (known !== undefined) return known;
    if (this.commands.size > MAX_COMMANDS) this.commands.clear();
    this.commands.set(key, "");
    this.request("command", { method, params }).then(({ command }) => {
      this.commands.set(key, String(command));
      this.draw();
    }, (error) => { if (error.code === "gone") this.commands.delete(key); });
    return "";
  }

  /** @param {string} method @param {any} params of which the shell command is copied */
  copyCommand(method, params) {
    this.request("command", { method, params }).then(({ command }) => this.copy(String(command)), (error) => this.say(message(error)));
  }

  // Plugging in and out

  /** @returns {number | null} the first socket into which something can be plugged */
  firstFree() {
    const found = ports(this.state).findIndex((port, number) => this.isFree(number));
    return found < 0 ? null : found;
  }

  /** @param {number} number */
  isFree(number) {
    const port = ports(this.state)[number];
    return port !== undefined && !port.error && !attachments(this.state).some((one) => one.state !== "refused" && one.state !== "detached" && portOf(this.state, one) === number) &&
      !this.state.pending.some((one) => one.port === number);
  }

  /**
   * Plug something in; a refusal stays at its socket.
   *
   * @param {any} params of the request `attach`
   * @param {{port: number | null, title: string, what: string, icon?: string, device?: string}} about `port` null: the first free one
   * @returns {Promise<any[] | null>} the attachments; null: refused
   */
  async plug(params, about) {
    const port = about.port ?? this.firstFree();
    const refuse = (/** @type {any} */ error) => {
      this.closeDialog();
      this.dispatch({ type: "refusal", refusal: { ...about, port, error: fields(error), retry: { method: "attach", params } } });
      this.showSockets();
      return null;
    };
    if (port === null) {
      const count = ports(this.state).length;
      return refuse(count === 0 ? refusal("no-usbredir-channel", T.noSockets, T.noSocketsRemedy) : refusal("no-free-port", T.allTaken(count), T.allTakenRemedy));
    }
    if (!this.isFree(port)) return refuse(refusal("no-free-port", T.socketTaken, T.socketTakenRemedy));
    const id = ++this.requests;
    this.closeDialog();
    this.dispatch({ type: "pending", pending: { ...about, id, port, what: "attach" } });
    this.showSockets();
    try {
      const { attachments } = await this.request("attach", { ...params, port, wait: false });
      this.remember(params, attachments);
      const line = lines(this.state).find((one) => attachments.some((/** @type {any} */ made) => made.id === one.attachment));
      if (line !== undefined) this.showTerminal(line.label);
      return attachments;
    } catch (error) {
      return refuse(error);
    } finally {
      this.dispatch({ type: "settled", id });
    }
  }

  /** Keep the shell command for the messages. @param {any} params @param {any[]} attachments */
  remember(params, attachments) {
    if (params.sources.some((/** @type {any} */ one) => String(one.path).startsWith("client:"))) return;
    this.request("command", { method: "attach", params }).then(({ command }) => {
      this.dispatch({ type: "commands", commands: Object.fromEntries(attachments.map((one) => [one.id, String(command)])) });
    }, ignore);
  }

  // Terminals of serial lines

  /** @param {string} label of the serial line */
  showTerminal(label) {
    this.setUi({ dock: `serial:${label}`, dockOpen: true, tab: "messages" });
    this.after.push(() => this.terminals.get(label)?.focus());
  }

  /**
   * Return the terminal of a serial line; it is opened when it is shown first.
   *
   * @param {string} label
   */
  terminalOf(label) {
    let terminal = this.terminals.get(label);
    if (terminal === undefined) {
      terminal = new LineTerminal(label, {
        request: (method, params, bytes) => this.request(method, params, bytes ?? null), changed: () => this.draw(),
        leave: () => /** @type {HTMLElement | null} */ (document.querySelector(".docktabs [aria-selected=true]"))?.focus(),
      });
      this.terminals.set(label, terminal);
      terminal.open().then(() => { if (this.ui.dock === `serial:${label}`) terminal?.focus(); });
    }
    return terminal;
  }

  /** Close the terminals of lines that are not plugged in any more, and remember which one is shown. */
  keepTerminals() {
    if (this.state.link.state !== "open") return;
    const labels = lines(this.state).map((one) => one.label);
    for (const [label, terminal] of this.terminals) {
      if (labels.includes(label)) continue;
      this.terminals.delete(label);
      terminal.close();
    }
    const [, shown] = /^serial:(.*)$/.exec(this.ui.dock) ?? [];
    if (shown !== undefined && !labels.includes(shown)) this.ui = { ...this.ui, dock: "messages" };
    else if (this.state.snapshot !== null) sessionStorage.setItem(TERMINAL, shown === undefined ? "" : `${this.state.session} ${shown}`);
  }

  showSockets() {
    if (this.narrow && this.ui.tab !== "usb") this.setUi({ tab: "usb" });
  }

  /** @param {any} device of the list @param {number | null} port */
  plugDevice(device, port) {
    return this.plug({ sources: [{ kind: "usb-device", path: device.id }] }, { port, title: device.name, what: T.kinds["usb-device"], icon: "i-device", device: device.id });
  }

  /**
   * Carry out a request about an attachment; a refusal stays at its socket.
   *
   * @param {string} method @param {any} params @param {any} attachment @param {string} word for the button meanwhile
   * @returns {Promise<boolean>}
   */
  async change(method, params, attachment, word) {
    const id = ++this.requests;
    this.dispatch({ type: "pending", pending: { id, attachment: attachment.id, word, what: method, port: null } });
    try {
      await this.request(method, params);
      return true;
    } catch (error) {
      this.dispatch({ type: "refusal", refusal: { port: portOf(this.state, attachment), title: title(this, attachment, kind(this, attachment)), what: "", error: fields(error), retry: { method, params }, attachment, word } });
      return false;
    } finally {
      this.dispatch({ type: "settled", id });
    }
  }

  /** @param {any} attachment @param {boolean} sure */
  async unplug(attachment, sure) {
    const wrote = this.state.rates[attachment.id]?.lastWrite ?? 0;
    if (!sure && kind(this, attachment).holdsData && this.now() - wrote < RECENT_WRITE) {
      this.setUi({ confirm: { attachment: attachment.id, wrote } });
      setTimeout(() => { if (this.ui.confirm?.attachment === attachment.id && this.ui.confirm.wrote === wrote) this.draw(); }, 1000);
      return false;
    }
    this.setUi({ confirm: null });
    return this.change("detach", { device: attachment.id }, attachment, T.unplugging);
  }

  /** @param {any} attachment @param {boolean} force */
  eject(attachment, force) {
    return this.change("eject", { drive: attachment.units[0] ?? attachment.label, ...(force ? { force } : {}) }, attachment, T.ejecting);
  }

  /** @param {any} attachment @param {any} params */
  insert(attachment, params) {
    return this.change("insert", params, attachment, T.inserting);
  }

  /** @param {any} refused @param {{method: string, params: any}} request */
  retry(refused, request) {
    this.dispatch({ type: "put-away", id: refused.id });
    this.setUi({ sure: null });
    if (request.method === "attach") this.plug(request.params, { port: refused.port, title: refused.title, what: refused.what, icon: refused.icon, device: refused.device });
    else this.change(request.method, request.params, refused.attachment, refused.word);
  }

  /** @param {boolean} giveUp */
  reconnect(giveUp) {
    this.request("reconnect", giveUp ? { give_up: true } : {}).catch((error) => this.say(message(error)));
  }

  /** @param {any} attachment a security key @param {any} question @param {"allow" | "refuse"} answer */
  answer(attachment, question, answer) {
    this.request("presence", { answer, attachment: attachment.id, request: question.request }).catch((error) => this.say(message(error)));
  }

  // Files of this browser

  canUpload() {
    return this.state.server?.role === "full" && (this.state.server?.uploads ?? null) !== null;
  }

  /** @param {number | null} port @param {boolean} upload @param {any} [insert] the drive's attachment */
  chooseFile(port, upload, insert = null) {
    this.choice = { port, upload, insert };
    this.chooser.value = "";
    this.chooser.click();
  }

  chosen() {
    const file = this.chooser.files?.[0];
    if (file !== undefined) this.take(file, this.choice);
  }

  /** @param {File} file @param {{port: number | null, upload: boolean, insert: any}} goal */
  take(file, goal) {
    if (goal.upload) this.startUpload(file, goal);
    else this.offer(file, goal.port, goal.insert).catch(ignore);
  }

  /** @param {number | null} port @param {string} title @param {any} error */
  refuse(port, title, error) {
    this.dispatch({ type: "refusal", refusal: { port, title, what: T.fromBrowser, icon: "i-disk", error: fields(error), retry: null } });
    this.showSockets();
  }

  /** Offer a file to the VM, and plug it in. @param {File} file @param {number | null} wanted @param {any} insert */
  async offer(file, wanted, insert) {
    let kind, media;
    try {
      kind = await kindOf(file);
      if (!insert && wanted !== null && !this.isFree(wanted)) throw refusal("no-free-port", T.socketTaken, T.socketTakenRemedy);
      if (!insert && wanted === null && this.firstFree() === null) throw refusal("no-free-port", T.allTaken(ports(this.state).length), T.allTakenRemedy);
      ({ media } = await this.request("media-offer", { file: file.name, size: file.size, modified: String(file.lastModified) }));
    } catch (error) {
      this.refuse(insert ? portOf(this.state, insert) : wanted ?? this.firstFree(), file.name, error);
      return;
    }
    this.media.set(media, file);
    this.dispatch({ type: "media", media, fields: { name: file.name, size: file.size } });
    const path = `client:${media}`;
    if (insert) {
      if (await this.insert(insert, { path, drive: insert.units[0] ?? insert.label })) this.mediaOf.set(media, insert.id);
      else this.withdraw(media);
      return;
    }
    const made = await this.plug({ sources: [{ kind, path }] }, { port: wanted, title: file.name, what: `${T.kinds[kind]} ${T.fromBrowser}`, icon: kind === "cdrom" ? "i-cd" : "i-disk" });
    if (made === null) this.withdraw(media);
    else for (const one of made) this.mediaOf.set(media, one.id);
  }

  /** @param {string} media */
  withdraw(media) {
    if (!this.media.delete(media)) return;
    this.mediaOf.delete(media);
    this.request("media-withdraw", { media }).catch(ignore);
  }

  /** @param {File} file @param {{port: number | null, insert: any, replace?: any}} goal */
  startUpload(file, goal) {
    const upload = new Upload(++this.requests, file, goal);
    this.uploads = [upload, ...this.uploads];
    this.setUi({ source: "browser", tab: "plug" });
    this.upload(upload).catch(ignore);
  }

  /** @param {Upload} upload */
  async upload(upload) {
    if (!await upload.send(this.token, () => this.draw())) return;
    this.listings.clear();
    const { goal, path, name } = upload;
    const kind = await kindOf(upload.file);
    const replace = /** @type {any} */ (goal).replace;
    if (goal.insert || (replace && kind === "cdrom")) {
      const drive = goal.insert ?? replace;
      await this.insert(drive, { path, drive: drive.units[0] ?? drive.label });
      return;
    }
    let port = goal.port;
    if (replace) {
      port = portOf(this.state, replace);
      if (!await this.unplug(replace, true)) return;
    }
    await this.plug({ sources: [{ kind, path }] }, { port, title: name, what: T.kinds[kind], icon: kind === "cdrom" ? "i-cd" : "i-disk" });
  }

  /** @param {any} attachment @param {File} file */
  uploadInstead(attachment, file) {
    this.startUpload(file, /** @type {any} */ ({ port: null, insert: null, replace: attachment }));
  }

  /** @param {Upload} upload */
  forgetUpload(upload) {
    this.uploads = this.uploads.filter((one) => one !== upload);
    this.draw();
  }

  // Drag and drop

  /** @param {DragEvent} event @param {number | null} port @param {string} [zone] */
  dragOver(event, port, zone) {
    const types = [...(event.dataTransfer?.types ?? [])];
    const files = types.includes("Files");
    if (!files && !types.includes(DEVICE_TYPE)) return;
    event.preventDefault();
    event.stopPropagation();
    const may = this.state.session !== null && mayAct(this.state) && overlay(this.state) !== "lost";
    if (event.dataTransfer) event.dataTransfer.dropEffect = may ? "copy" : "none";
    if (!may) return;
    const drag = { files, port: port ?? this.firstFree(), over: port !== null, zone: zone ?? (port === null ? "plug" : "") };
    const before = this.ui.drag;
    if (before === null || before.port !== drag.port || before.over !== drag.over || before.zone !== drag.zone) this.setUi({ drag });
  }

  /** @param {DragEvent} event @param {number | null} port */
  dragLeave(event, port) {
    if (port !== null && this.ui.drag?.over && this.ui.drag.port === port && event.relatedTarget instanceof Node && !(/** @type {Node} */ (event.currentTarget)).contains(event.relatedTarget)) {
      this.setUi({ drag: { ...this.ui.drag, port: this.firstFree(), over: false, zone: "" } });
    }
  }

  /** @param {DragEvent} event @param {number | null} port @param {boolean} upload */
  dropped(event, port, upload) {
    event.preventDefault();
    event.stopPropagation();
    this.endDrag();
    const transfer = event.dataTransfer;
    if (transfer === null || !mayAct(this.state)) return;
    const id = transfer.getData(DEVICE_TYPE);
    if (id !== "") {
      const device = (this.state.devices?.devices ?? []).find((/** @type {any} */ one) => String(one.id) === id);
      if (device !== undefined) this.plugDevice(device, port);
      return;
    }
    try {
      this.take(droppedFile(transfer), { port, upload, insert: null });
    } catch (error) {
      this.refuse(port ?? this.firstFree(), droppedName(transfer), error);
    }
  }

  /** @param {DragEvent} event @param {any} device */
  dragDevice(event, device) {
    event.dataTransfer?.setData(DEVICE_TYPE, String(device.id));
    if (event.dataTransfer) event.dataTransfer.effectAllowed = "copy";
  }

  endDrag() {
    if (this.ui.drag !== null) this.setUi({ drag: null });
  }

  // The picture

  /** @param {HTMLElement} bench */
  benchMade(bench) {
    this.bench = bench;
  }

  /** @param {HTMLElement} screen */
  screenMade(screen) {
    this.screen = screen;
    screen.addEventListener("keydown", (event) => this.screenKey(event, true));
    screen.addEventListener("keyup", (event) => this.screenKey(event, false));
    screen.addEventListener("focusout", (event) => { if (!(event.relatedTarget instanceof Node && screen.contains(event.relatedTarget) && event.relatedTarget === this.field)) this.leavePicture(); });
    this.pointer.attach(screen);
  }

  /** @param {HTMLElement} holder */
  pictureMade(holder) {
    holder.append(this.field);
    this.picture.attach(holder);
  }

  /** @param {HTMLElement} card */
  overlayMade(card) {
    const within = this.screen?.contains(document.activeElement) || document.activeElement === document.body;
    if (within) this.after.push(() => /** @type {HTMLElement} */ (card.querySelector(".row .b") ?? card).focus());
  }

  /** @param {KeyboardEvent} event @param {boolean} down */
  screenKey(event, down) {
    if (event.target !== this.screen && event.target !== this.field) return;
    if (this.ui.active) {
      if (event.target === this.field && (event.isComposing || event.code === "" || event.code === "Unidentified")) return;
      if (down) this.keyboard.keydown(event);
      else this.keyboard.keyup(event);
    } else if (down && event.key === "Enter" && !event.ctrlKey && !event.altKey && !event.metaKey) {
      event.preventDefault();
      this.takePicture();
    }
  }

  /** Give the keys to the VM. @returns {boolean} whether the pointer goes there, too */
  takePicture() {
    const over = overlay(this.state);
    if (over !== null && over !== "no-picture") return false;
    if (!drives(this.state)) {
      if (this.state.driver?.holder === null && this.state.server?.role === "full") this.takeDrive();
      return false;
    }
    if (document.activeElement !== this.field) this.screen?.focus({ preventScroll: true });
    if (!this.ui.active) this.setUi({ active: true });
    return true;
  }

  /** Take the keys back: everything is released in the VM. */
  leavePicture() {
    if (!this.ui.active) return;
    this.queue.leave();
    this.keyboard.releaseAll();
    this.pointer.reset();
    this.setUi({ active: false });
    if (document.pointerLockElement !== null) document.exitPointerLock();
    if (document.activeElement === this.field) this.field.blur();
  }

  /** @returns {string[]} the codes of the modifiers that are held for the next key; they are held no longer */
  takeHeld() {
    const held = HOLD.filter(({ name }) => this.ui.hold.has(name)).map(({ code }) => code);
    if (held.length > 0) this.setUi({ hold: new Set() });
    return held;
  }

  takeDrive() {
    this.request("drive", { take: true, client: String(this.state.server?.user ?? "") }).catch((error) => this.say(message(error)));
  }

  phoneKeyboard() {
    if (!this.takePicture()) return;
    this.field.value = "";
    this.field.focus();
  }

  /** Text of a phone's keyboard. @param {InputEvent} event */
  fromPhone(event) {
    event.preventDefault();
    const key = PHONE_KEYS.get(event.inputType);
    if (key !== undefined) {
      this.queue.put("key", { code: key, down: true });
      this.queue.put("key", { code: key, down: false });
    } else if (event.data) {
      const text = event.data;
      this.serial = this.serial.then(() => this.request("type", { text })).then(ignore, (error) => this.say(message(error)));
    }
  }

  saveScreenshot() {
    const when = new Date(1000 * this.wall());
    const stamp = new Date(when.getTime() - 60000 * when.getTimezoneOffset()).toISOString().slice(0, 19).replace("T", "-").replaceAll(":", "");
    this.picture.save(`${this.state.session ?? "farplug"}-${stamp}.png`);
  }

  fullScreen() {
    if (document.fullscreenElement !== null) document.exitFullscreen();
    else this.page.querySelector(".stage")?.requestFullscreen().catch(ignore);
  }

  fullChanged() {
    const full = document.fullscreenElement !== null;
    const lock = /** @type {any} */ (navigator).keyboard;
    // In full screen even Alt+Tab and Escape go to the VM, where the browser allows that.
    if (full) lock?.lock?.().catch?.(ignore);
    else lock?.unlock?.();
    this.setUi({ full });
  }

  // Keys and text

  /** @param {string} name */
  toggleHold(name) {
    const hold = new Set(this.ui.hold);
    if (!hold.delete(name)) hold.add(name);
    this.setUi({ hold });
  }

  /** @param {string} keys names with `+` between them; modifiers that are held come before them */
  press(keys) {
    const held = HOLD.map(({ name }) => name).filter((name) => this.ui.hold.has(name) && !keys.split("+").includes(name));
    const all = [...held, keys].join("+");
    this.setUi({ lastKeys: all, hold: new Set(), keyError: null });
    this.request("press", { keys: all }).catch((error) => this.setUi({ keyError: message(error) }));
  }

  /** @param {any} fields */
  setType(fields) {
    this.setUi({ type: { ...this.ui.type, ...fields } });
  }

  /** @param {string} text */
  setText(text) {
    this.setType({ text, error: null, note: "", missing: [] });
    clearTimeout(this.checkTimer);
    this.checkTimer = setTimeout(() => this.checkText(), 200);
  }

  /** @param {string} layout */
  setLayout(layout) {
    this.setType({ layout });
    this.checkText();
  }

  /** @param {boolean} hidden */
  hideText(hidden) {
    this.setType({ hidden, text: hidden ? this.ui.type.text.replaceAll("\n", "") : this.ui.type.text });
  }

  /** Ask for what the layout lacks, in the pieces in which the text is typed. */
  async checkText() {
    const { text, layout } = this.ui.type;
    if (text === "" || !this.supports("check-text")) return;
    const letters = [...text];
    /** @type {any[]} */
    const found = [];
    for (let at = 0; at < letters.length && found.length < MAX_MISSING; at += PIECE) {
      const piece = letters.slice(at, at + PIECE).join("");
      const answer = await this.request("check-text", { text: piece, ...(layout ? { layout } : {}) }).catch(() => null);
      if (answer === null || text !== this.ui.type.text || layout !== this.ui.type.layout) return;
      found.push(...answer.missing.map((/** @type {any} */ one) => ({ ...one, index: at + one.index })));
    }
    this.setType({ missing: found });
  }

  leaveOut() {
    const lacking = new Set(this.ui.type.missing.map((one) => one.index));
    let leaves = false;
    this.setText([...this.ui.type.text].filter((char, index) => {
      leaves = lacking.has(index) || leaves && /\p{M}/u.test(char);
      return !leaves;
    }).join(""));
  }

  async typeText() {
    const { text, hidden, layout } = this.ui.type;
    const letters = [...text];
    if (letters.length === 0 || this.ui.type.busy) return;
    this.stopped = false;
    let confirmed = true;
    this.setType({ busy: true, error: null, note: "", progress: { done: 0, total: letters.length } });
    try {
      for (let at = 0; at < letters.length && !this.stopped; at += PIECE) {
        const piece = letters.slice(at, at + PIECE);
        const typed = await this.request("type", { text: piece.join(""), hidden, ...(layout && this.layouts && this.layouts.layouts.length > 1 ? { layout } : {}) });
        confirmed &&= typed?.confirmed === true;
        this.state = { ...this.state, typing: null };
        this.setType({ progress: { done: at + piece.length, total: letters.length } });
      }
      this.setType({ note: this.stopped ? T.typeStopped : T.typed(letters.length, confirmed), ...(this.stopped ? {} : { text: "", missing: [] }) });
    } catch (error) {
      if (this.stopped) this.setType({ note: T.typeStopped });
      else this.setType({ error: { ...fields(error), began: this.ui.type.progress.done + (this.state.typing?.done ?? 0) > 0 } });
    }
    this.state = { ...this.state, typing: null };
    this.setType({ busy: false });
    this.after.push(() => /** @type {HTMLElement | null} */ (document.getElementById("type-text"))?.focus());
  }

  stopTyping() {
    this.stopped = true;
    this.request("stop-typing").catch(ignore);
  }

  // Recording

  /** @param {string} path */
  startCapture(path) {
    this.request("capture", { path }).catch((error) => this.refuseRecording(error));
  }

  stopCapture() {
    this.request("stop-capture").catch((error) => this.refuseRecording(error));
  }

  /** @param {any} error */
  refuseRecording(error) {
    this.refuse(null, T.record, error);
  }

  // Menus, tabs, keys of the page

  /** @param {any} fields */
  openDialog(fields) {
    const { entry, path, ...rest } = fields;
    const chosen = { ...FRESH, ...rest };
    if (rest.port === undefined && !rest.insert) chosen.port = this.firstFree();
    if (path !== undefined) chosen.path = path;
    if (entry?.kind === "folder") Object.assign(chosen, { tab: "folder", selected: entry.name });
    else if (entry?.as === "clip") Object.assign(chosen, { tab: "camera", selected: entry.name });
    else if (entry) Object.assign(chosen, { selected: entry.name, as: entry.as === "cdrom" ? "cdrom" : "disk" });
    if (this.state.server?.web_root === null && !entry) chosen.tab = rest.insert ? "browser" : "device";
    this.leavePicture();
    this.setUi({ dialog: chosen, menu: null });
    this.refresh(true);
  }

  closeDialog() {
    this.setUi({ dialog: null });
  }

  /** @param {string | null} id of an attachment */
  openMenu(id) {
    const before = this.ui.menu;
    this.setUi({ menu: id });
    this.after.push(() => {
      if (id !== null) /** @type {HTMLElement | null} */ (document.querySelector(".menu [role=menuitem]"))?.focus();
      else if (before !== null && document.activeElement === document.body) document.getElementById(`more-${before}`)?.focus();
    });
  }

  /** @param {KeyboardEvent} event */
  menuKey(event) {
    const items = [.../** @type {HTMLElement} */ (event.currentTarget).querySelectorAll("[role=menuitem]")];
    const now = items.indexOf(/** @type {Element} */ (document.activeElement));
    const next = { ArrowDown: now + 1, ArrowUp: now - 1, Home: 0, End: items.length - 1 }[event.key];
    if (next !== undefined) {
      event.preventDefault();
      /** @type {HTMLElement} */ (items[(next + items.length) % items.length]).focus();
    } else if (event.key === "Escape" || event.key === "Tab") {
      if (event.key === "Escape") event.preventDefault();
      event.stopPropagation();
      document.getElementById(`more-${this.ui.menu}`)?.focus();
      this.setUi({ menu: null });
    }
  }

  /** @param {PointerEvent} event */
  pressedOutside(event) {
    if (this.ui.menu !== null && event.target instanceof Element && event.target.closest(".menu, [aria-haspopup=menu]") === null) this.setUi({ menu: null });
  }

  /** @param {string} id of an attachment */
  toggleEndpoints(id) {
    const endpoints = new Set(this.ui.endpoints);
    if (!endpoints.delete(id)) endpoints.add(id);
    this.setUi({ endpoints });
  }

  /** @param {string} name */
  toggleDock(name) {
    const open = this.ui.dock === name && this.ui.dockOpen;
    this.setUi(open ? { dock: "messages" } : { dock: name, dockOpen: true, tab: "messages" });
    if (!open && name === "type") this.after.push(() => document.getElementById("type-text")?.focus());
  }

  /** @param {KeyboardEvent} event */
  dockKey(event) {
    if (event.key !== "Escape" || /** @type {HTMLElement} */ (event.target).closest(".tty") !== null) return;
    event.preventDefault();
    if (this.ui.type.busy) this.stopTyping();
    else if (this.ui.dock !== "messages") {
      this.setUi({ dock: "messages" });
      this.screen?.focus({ preventScroll: true });
    }
  }

  /** @param {KeyboardEvent} event */
  pageKey(event) {
    const target = /** @type {HTMLElement} */ (event.target);
    if (event.key !== "/" || event.ctrlKey || event.altKey || event.metaKey || target.matches?.("input, textarea, select")) return;
    const find = /** @type {HTMLElement | null} */ (document.querySelector(".find input"));
    if (find === null) return;
    event.preventDefault();
    find.focus();
  }

  /** @param {string} text */
  async copy(text) {
    let done = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      done = copyBySelection(text);
    }
    this.say(done ? T.copied : T.copyFailed);
    if (!done) return;
    this.setUi({ copied: text });
    setTimeout(() => { if (this.ui.copied === text) this.setUi({ copied: "" }); }, COPIED);
  }

  /** @param {any} attempt of the session to reach the VM @returns {number} the seconds between it and the one before */
  spanOf(attempt) {
    const key = `${attempt.number} ${attempt.time}`;
    if (this.spans.key !== key) this.spans = { key, span: Math.max(1, attempt.time - this.now()) };
    return this.spans.span;
  }
}

/** @param {any} attachment @returns {boolean} whether it has a CD-ROM drive */
function hasDrive(attachment) {
  return attachment.units.some((/** @type {string} */ unit) => unit.startsWith("cdrom")) || /Virtual CD-ROM$/.test(String(attachment.identity ?? ""));
}

/** @param {any} error @returns {any} what is shown of it */
function fields(error) {
  return error instanceof RequestError ? error.fields : { code: "internal-error", message: String(error?.message ?? error) };
}

/** @param {any} error */
function message(error) {
  const { message, remedy } = fields(error);
  return [message, remedy].filter(Boolean).join("; ");
}

/** The error is shown elsewhere: the connection ended, or an event follows. */
function ignore() {}

/** @param {string} text @returns {boolean} whether it was copied; for pages without a secure context */
function copyBySelection(text) {
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "phonefield";
  const focused = /** @type {HTMLElement | null} */ (document.activeElement);
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}

/** Return the token: of the address, from which it is removed, or of this tab. */
function takeToken() {
  const words = new URLSearchParams(location.hash.slice(1));
  const token = words.get("token");
  if (token !== null) {
    sessionStorage.setItem(TOKEN, token);
    words.delete("token");
    const rest = words.toString();
    history.replaceState(null, "", `${location.pathname}${location.search}${rest ? `#${rest}` : ""}`);
  }
  return sessionStorage.getItem(TOKEN) ?? "";
}

/** @returns {string | null} */
function sessionOfAddress() {
  return new URLSearchParams(location.hash.slice(1)).get("session");
}

if (document.getElementById("page") !== null) {
  const app = new App();
  app.start();
}
