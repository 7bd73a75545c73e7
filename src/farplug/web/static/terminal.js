/**
 * Terminals of serial lines: what the guest sends is shown by xterm.js, what is typed goes to the guest. A line stays as it
 * is while nobody looks: the session keeps what the guest has sent last, and a terminal that is opened again shows it.
 */

import { T } from "./texts.js";

/** Bytes that one request sends; of more the next ones wait, so that pasting is as fast as the guest reads. */
const PIECE = 16384;
const SCROLLBACK = 5000;
/** Modules of xterm.js, loaded with the first terminal. Not names in an import: their types are not checked. */
const MODULES = ["./vendor/xterm.js", "./vendor/xterm-addon-fit.js"];

/**
 * @typedef {object} Owner
 * @property {(method: string, params: any, bytes?: ArrayBuffer) => Promise<any>} request
 * @property {() => void} changed called when what is to be seen beside the terminal has changed
 * @property {() => void} leave called when the user leaves the terminal
 */

/** @type {Promise<any[]> | null} */
let modules = null;
let sheet = false;

/** One terminal: the line is open while it exists. */
export class LineTerminal {
  /** @param {string} label of the serial line @param {Owner} owner */
  constructor(label, owner) {
    this.label = label;
    this.owner = owner;
    /** @type {number | null} the number of the line; null: it is not open */
    this.line = null;
    this.size = "";
    this.problem = "";
    this.element = document.createElement("div");
    this.element.className = "tty";
    /** @type {any} */
    this.xterm = null;
    this.fit = () => {};
    /** @type {Uint8Array[]} */
    this.typed = [];
    this.sending = false;
    this.closed = false;
    /** @type {{data: any, bytes: ArrayBuffer}[] | null} events that came before the reply that names the line; null: it is not being opened */
    this.early = null;
    this.resized = new ResizeObserver(() => this.fit());
  }

  /** Open the line, at once and after the connection was lost; show what the session has kept. */
  async open() {
    this.line = null;
    this.early = [];
    try {
      await this.load();
      const { line } = await this.owner.request("serial-open", { device: this.label });
      if (this.closed) {
        this.owner.request("serial-close", { line }).catch(() => {});
        return;
      }
      const { early } = this;
      this.early = null;
      this.xterm.reset();
      this.line = line;
      this.problem = "";
      for (const { data, bytes } of early ?? []) this.received(data, bytes);
    } catch (error) {
      this.early = null;
      this.problem = /** @type {Error} */ (error).message;
    }
    this.owner.changed();
  }

  async load() {
    if (this.xterm !== null) return;
    modules ??= Promise.all(MODULES.map((name) => import(name)));
    const [{ Terminal }, { FitAddon }] = await modules;
    if (!sheet) {
      sheet = true;
      await styled();
    }
    const xterm = this.xterm = new Terminal({
      cursorBlink: false, fontFamily: "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace",
      fontSize: 13, scrollback: SCROLLBACK, linkHandler: { activate: () => {} }, theme: { background: "#101418", foreground: "#e6e9ec" },
    });
    const addon = new FitAddon();
    xterm.loadAddon(addon);
    xterm.onData((/** @type {string} */ text) => this.type(new TextEncoder().encode(text)));
    xterm.onBinary((/** @type {string} */ text) => this.type(Uint8Array.from(text, (one) => one.charCodeAt(0))));
    xterm.onResize(() => this.measured());
    xterm.attachCustomKeyEventHandler((/** @type {KeyboardEvent} */ event) => this.key(event));
    withoutStyleElements(() => xterm.open(this.element));
    // Nor does the policy permit `style` attributes that are set as text: the colours of cells.
    xterm._core._renderService._renderer.value._rowFactory._addStyle = (/** @type {HTMLElement} */ cell, /** @type {string} */ style) => { cell.style.cssText += style; };
    xterm.textarea?.setAttribute("aria-label", T.terminalOf(this.label));
    this.fit = () => { if (this.element.offsetParent !== null) addon.fit(); };
    this.resized.observe(this.element);
    this.fit();
    this.measured();
  }

  measured() {
    this.size = `${this.xterm.cols}\u00a0×\u00a0${this.xterm.rows}`;
    this.owner.changed();
  }

  /** @param {KeyboardEvent} event @returns {boolean} whether the key is for the terminal */
  key(event) {
    if (event.type !== "keydown" || !(event.ctrlKey && event.altKey && ["Control", "Alt"].includes(event.key))) return true;
    this.owner.leave();
    return false;
  }

  /** Take an event `serial`, of any line. @param {any} data @param {ArrayBuffer} bytes */
  received(data, bytes) {
    if (this.early !== null) this.early.push({ data, bytes });
    if (this.line === null || data.line !== this.line) return;
    if (data.ended) {
      this.line = null;
      this.problem = T.lineGone;
      this.owner.changed();
      return;
    }
    const { line } = this;
    this.xterm.write(new Uint8Array(bytes), () => {
      if (line === this.line) this.owner.request("serial-ack", { line, position: data.position + bytes.byteLength }).catch(() => {});
    });
  }

  /** @param {Uint8Array} bytes */
  type(bytes) {
    for (let start = 0; start < bytes.length; start += PIECE) this.typed.push(bytes.subarray(start, start + PIECE));
    if (!this.sending) this.send();
  }

  async send() {
    this.sending = true;
    while (this.typed.length > 0 && this.line !== null) {
      const piece = /** @type {Uint8Array} */ (this.typed.shift());
      try {
        await this.owner.request("serial-write", { line: this.line }, /** @type {ArrayBuffer} */ (piece.slice().buffer));
      } catch (error) {
        this.problem = /** @type {Error} */ (error).message;
        this.owner.changed();
        break;
      }
    }
    this.typed = [];
    this.sending = false;
  }

  /** Type the command that gives the programs in the guest the size of the terminal: a serial line has none. */
  sendSize() {
    this.type(new TextEncoder().encode(`stty rows ${this.xterm.rows} cols ${this.xterm.cols}\r`));
    this.focus();
  }

  focus() {
    this.xterm?.focus();
  }

  /** The connection was lost: the line is open no more. */
  lost() {
    this.line = null;
  }

  close() {
    this.closed = true;
    if (this.line !== null) this.owner.request("serial-close", { line: this.line }).catch(() => {});
    this.line = null;
    this.resized.disconnect();
    this.xterm?.dispose();
    this.element.remove();
  }
}

/** Load the style sheet of xterm.js. */
function styled() {
  return new Promise((resolve) => {
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = new URL("./vendor/xterm.css", import.meta.url).href;
    link.onload = link.onerror = () => resolve(undefined);
    document.head.append(link);
  });
}

/**
 * Call a function of xterm.js. The content security policy of the page permits no `style` elements with a text; it permits
 * style sheets that scripts make as objects.
 *
 * @param {() => void} call
 */
function withoutStyleElements(call) {
  const page = /** @type {any} */ (document);
  page.createElement = (/** @type {string} */ tag) => (tag === "style" ? styleElement() : Document.prototype.createElement.call(document, tag));
  try {
    call();
  } finally {
    delete page.createElement;
  }
}

/** Return an element whose text is that of a style sheet of the document, as long as it is not removed. */
function styleElement() {
  const rules = new CSSStyleSheet();
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, rules];
  const element = Document.prototype.createElement.call(document, "span");
  element.hidden = true;
  Object.defineProperty(element, "textContent", { set: (text) => rules.replaceSync(String(text)) });
  element.remove = () => {
    document.adoptedStyleSheets = document.adoptedStyleSheets.filter((one) => one !== rules);
    Element.prototype.remove.call(element);
  };
  return element;
}
